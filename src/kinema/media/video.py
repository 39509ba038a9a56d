"""Write finished frames as a video or images, some at a time, whole or not at all.

Owns containers, codecs and the way to disk: a temporary name in the same folder, synced, then renamed.
Knows nothing of models or plans: `Media` carries frames and the text to embed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.filter import Graph
from PIL import Image
from torch import Tensor

from kinema.errors import NumericsError, OutputError, RequestError
from kinema.media.audio import SoundTrack
from kinema.media.files import unwritable
from kinema.media.metadata import add_gif_comment, pack, png_text, webp_exif
from kinema.media.webp import MOST_PIXELS, write_animation
from kinema.schema import OutputKind
from kinema.tensors import Media

Frames = Iterator[np.ndarray]

# To BT.709, limited range, with 4:2:0 chroma: what browsers play and what the tags below say.
YUV420P = (
    ("scale", "out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"),
    ("format", "pix_fmts=yuv420p"),
)
BT709 = 1  # the code of primaries, transfer and matrix alike, ITU-T H.273
LIMITED_RANGE = 1


def write(media: Media, path: Path, kind: OutputKind, quality: int = 80) -> None:
    """Write `media` to `path`, its folder made where it is missing, and embed its metadata; {} embeds nothing.

    kind     mp4 (H.264, yuv420p, bt709, index in front), webm (VP9), gif (256 colours chosen per frame,
             whatever the quality), webp (animated), png (one file for one frame; else `path` is a folder of
             frame_0001.png and so on, each with the metadata).
    quality  0 (smallest) to 100 (best).

    Frames are encoded as they come and `media.chunks` is consumed once. Float frames become
    round-half-to-even(255 * x); the official writer truncates, which is up to one level darker.
    An existing file is replaced, an existing folder only if it holds nothing but such frames.
    Raises RequestError for a size or rate the kind cannot hold, NumericsError for frames outside [0, 1],
    OutputError where the disk refuses. Errors of `media.chunks` pass through. After any of them
    nothing is left under `path` or beside it.
    """
    path = Path(path)
    _check(media, kind, quality)
    frames = _Uint8Frames(media)
    folder = kind == "png" and media.frames > 1
    temporary = path.parent / f".{secrets.token_hex(6)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other_work(path, folder)
        temporary.mkdir() if folder else temporary.touch()
        WRITERS[kind](iter(frames), media, temporary, quality)
        _sync(temporary)
        if folder and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError | av.FFmpegError) and error is not frames.failure:
            raise unwritable(path, error.strerror or error) from error
        raise


class _Uint8Frames:
    """The frames of a Media as [H, W, 3] uint8 arrays, checked. `failure` is the error their source raised."""

    def __init__(self, media: Media) -> None:
        self.media = media
        self.count = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Frames:
        while True:
            try:
                chunk_THWC = next(self.media.chunks, None)
            except BaseException as error:
                self.failure = error
                raise
            if chunk_THWC is None:
                return self.check_count()
            for frame in self._to_uint8(chunk_THWC):
                self.count += 1
                if self.count > self.media.frames:
                    self.check_count()
                yield frame

    def check_count(self) -> None:
        if self.count != self.media.frames:
            what = "more than" if self.count > self.media.frames else f"only {self.count} of"
            raise OutputError(
                f"the decoder gave {what} {self.media.frames} frames", "this is a fault of Kinema; please report it"
            )

    def _to_uint8(self, chunk_THWC: Tensor) -> np.ndarray:
        want = (self.media.height, self.media.width, 3)
        if tuple(chunk_THWC.shape[1:]) != want:
            raise OutputError(
                f"frames of shape {tuple(chunk_THWC.shape[1:])} came where {want} was promised",
                "this is a fault of Kinema; please report it",
            )
        if chunk_THWC.dtype != torch.uint8:
            low, high = (bound.item() for bound in torch.aminmax(chunk_THWC)) if chunk_THWC.numel() else (0, 0)
            if not (low >= 0 and high <= 1):  # NaN fails too
                raise NumericsError(
                    f"decoded frames reach from {low:.4g} to {high:.4g}; they must lie within 0 and 1",
                    "run with --precision reference",
                    stage="decode",
                    step=self.count,
                )
            chunk_THWC = (chunk_THWC.float() * 255).round().to(torch.uint8)
        return np.ascontiguousarray(chunk_THWC.cpu().numpy())


# --- one writer a kind ---------------------------------------------------------------------------


def _write_mp4(frames: Frames, media: Media, temporary: Path, quality: int) -> None:
    # crf 1 to 51; 0 would be lossless, in a profile browsers do not play. 80 gives 11, near the official 10.
    # x264's macroblock tree weighs blocks by memory it never wrote: the same frames came out another way now and then.
    options = {"crf": f"{1 + (100 - quality) / 2:g}", "preset": "medium", "mbtree": "0"}
    _encode(_filtered(frames, media), media, temporary, "mp4", options)


def _write_webm(frames: Frames, media: Media, temporary: Path, quality: int) -> None:
    options = {"crf": f"{4 + (100 - quality) * 0.59:.0f}", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
    _encode(_filtered(frames, media), media, temporary, "webm", options)


def _write_gif(frames: Frames, media: Media, temporary: Path, quality: int) -> None:
    # One palette a frame: a palette for all would have to see, and so hold, every frame first.
    _encode(_paletted(frames, media), media, temporary, "gif", {})
    if media.metadata:
        add_gif_comment(temporary, media.metadata)


def _write_webp(frames: Frames, media: Media, temporary: Path, quality: int) -> None:
    exif = webp_exif(media.metadata) if media.metadata else b""
    if media.frames > 1:
        write_animation(temporary, frames, (media.width, media.height), _fraction(media.fps), quality, exif)
        return
    for frame in frames:
        Image.fromarray(frame).save(temporary, format="WEBP", quality=quality, method=4, exif=exif)


def _write_png(frames: Frames, media: Media, temporary: Path, quality: int) -> None:
    text = png_text(media.metadata)
    digits = max(4, len(str(media.frames)))
    for number, frame in enumerate(frames, 1):
        file = temporary if media.frames == 1 else temporary / f"frame_{number:0{digits}}.png"
        Image.fromarray(frame).save(file, format="PNG", pnginfo=text, compress_level=4)


WRITERS: dict[OutputKind, Callable[[Frames, Media, Path, int], None]] = {
    "mp4": _write_mp4,
    "webm": _write_webm,
    "gif": _write_gif,
    "webp": _write_webp,
    "png": _write_png,
}


# --- codecs and filters --------------------------------------------------------------------------

CODECS = {"mp4": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"), "gif": ("gif", "pal8")}
"""By container: encoder and pixel format."""


def _encode(
    images: Iterator[av.VideoFrame], media: Media, temporary: Path, kind: OutputKind, options: dict[str, str]
) -> None:
    """Encode one stream, then count the packets in the file: a disk can fill without a word of the encoder."""
    where, fps = str(temporary.resolve()), _fraction(media.fps)
    name, pix_fmt = CODECS[kind]
    with av.open(where, "w", format=kind, options={"movflags": "+faststart"} if kind == "mp4" else {}) as container:
        stream = cast(av.VideoStream, container.add_stream(name, rate=fps, options=options))
        stream.width, stream.height, stream.pix_fmt = media.width, media.height, pix_fmt
        stream.bit_rate = 0  # the quality alone decides
        stream.codec_context.time_base = 1 / fps
        sound = None
        if kind != "gif":
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            sound = SoundTrack(container, kind, media.audio) if media.audio else None
            if media.metadata:
                container.metadata["comment"] = pack(media.metadata)
        for number, image in enumerate(images):
            container.mux(stream.encode(image))
            if sound:
                sound.until(float(number / fps))
        container.mux(stream.encode())
        if sound:
            sound.until(float("inf"))
    with av.open(where) as container:
        found = sum(1 for packet in container.demux(video=0) if packet.size)
    if found != media.frames:
        raise OSError(f"it holds {found} of {media.frames} frames")


def _filtered(frames: Frames, media: Media) -> Iterator[av.VideoFrame]:
    graph, source = _graph(media)
    graph.link_nodes(source, *(graph.add(name, args) for name, args in YUV420P), graph.add("buffersink"))
    return _run(graph, frames, media)


def _paletted(frames: Frames, media: Media) -> Iterator[av.VideoFrame]:
    graph, source = _graph(media)
    split, sink = graph.add("split"), graph.add("buffersink")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=sierra2_4a")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    return _run(graph, frames, media)


def _graph(media: Media) -> tuple[Graph, av.filter.context.FilterContext]:
    graph = Graph()
    time_base = 1 / _fraction(media.fps)
    return graph, graph.add_buffer(
        width=media.width, height=media.height, format=av.VideoFormat("rgb24"), time_base=time_base
    )


def _run(graph: Graph, frames: Frames, media: Media) -> Iterator[av.VideoFrame]:
    """Push frames through a filter graph and yield what comes out, numbered anew."""
    graph.configure()
    time_base = 1 / _fraction(media.fps)
    number = 0
    for pushed, frame in enumerate(chain(frames, [None])):  # None flushes
        image = None
        if frame is not None:
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = pushed, time_base
        graph.push(image)
        while True:
            try:
                out = cast(av.VideoFrame, graph.pull())
            except (av.BlockingIOError, av.EOFError):
                break
            out.pts, out.time_base = number, time_base
            number += 1
            yield out


def _fraction(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


# --- what is allowed, and the way to disk --------------------------------------------------------


def _check(media: Media, kind: OutputKind, quality: int) -> None:
    def refuse(field: str, got: object, message: str, hint: str) -> RequestError:
        return RequestError(message, hint, field=field, got=got, allowed=hint)

    if kind not in WRITERS:
        raise refuse("output", kind, f"{kind!r} is no kind of video", f"one of {', '.join(WRITERS)}")
    if not 0 <= quality <= 100:
        raise refuse("quality", quality, f"quality {quality} is not within 0 and 100", "pass --quality 80")
    size = f"{media.width}x{media.height}"
    if kind in ("mp4", "webm") and (media.width % 2 or media.height % 2):
        raise refuse(
            "size", size, f"{kind} needs an even width and height, not {size}", "pass a size of multiples of 16, or gif"
        )
    if kind == "webp" and max(media.width, media.height) > MOST_PIXELS:
        raise refuse("size", size, f"webp ends at {MOST_PIXELS} pixels an edge, not {size}", "pass --output mp4")
    if kind == "gif" and media.fps > 50:
        raise refuse("fps", media.fps, f"gif plays at most 50 frames a second, not {media.fps:g}", "pass --output webp")


def _refuse_other_work(path: Path, folder: bool) -> None:
    """Raise OSError where `path` holds what is not ours to replace."""
    if not path.is_dir():
        if folder and path.exists():
            raise NotADirectoryError(20, "a file is in the way of the folder of frames")
        return
    if not folder:
        raise IsADirectoryError(21, "a folder of that name is in the way")
    if any(not re.fullmatch(r"frame_\d+\.png", entry.name) for entry in path.iterdir()):
        raise FileExistsError(17, "the folder holds other files than frames")


def _sync(path: Path) -> None:
    """Wait until the file, or each file of the folder, is on the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if os.path.isdir(path):  # unlike Path.is_dir never raises
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
