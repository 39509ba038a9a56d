"""The frames of a video, one at a time, upright, at the times asked for.

Reads every container and codec of PyAV, animated WebP (Pillow) and folders of images. Owns time, turning and mirroring,
pixel aspect, colour and transparency; nothing is held but the frame at hand. Resizing is the work of frames.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import SideData
from PIL import Image
from torch import Tensor

from kinema.errors import RequestError
from kinema.media.image import read_image

# Frames tagged with no colour matrix are taken as BT.709 from 720 lines on and BT.601 below, as players do.
HD_LINES = 720
UNSPECIFIED = 2

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave the transparency of a WebM out."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """One stored frame: when it is shown, in seconds from the first, for how long, and its pixels when asked for.

    tick    what its container rounds times to, in seconds.
    pixels  () -> RGBA [H, W, 4] uint8.
    """

    time: Fraction
    duration: Fraction
    tick: Fraction
    pixels: Callable[[], np.ndarray]


def read_video(
    path: Path | str, *, fps: float | None = None, start: int = 0, frames: int | None = None
) -> Iterator[Tensor]:
    """Yield frames_HWC uint8 RGB in order, upright and with square pixels, what is transparent over black; memory does
    not grow with the length.

    path    a video, an animated image, or a folder of images in the order of their names' numbers.
    fps     rate to give it at: each frame is the one on display at that time, so a variable rate comes out even.
            None yields every stored frame. A folder has no time of its own and is taken to be at this rate.
    start   frames to skip, at that rate; they are decoded, so read on instead of starting over for each clip.
    frames  how many to yield at most; fewer come where the video ends.

    Raises RequestError where there is no such file, it cannot be decoded, breaks off, or changes its size.
    """
    path = Path(path)
    pictures: Iterator[np.ndarray]
    if path.is_dir():
        pictures = (read_image(file)[0].numpy() for file in image_files(path))
    elif fps is None:
        pictures = (picture.pixels() for picture in stored_frames(path))
    else:
        pictures = on_display(stored_frames(path), Fraction(fps).limit_denominator(100_000))
    size = None
    for pixels_HWC in islice(pictures, start, None if frames is None else start + frames):
        size = size or pixels_HWC.shape[:2]
        if pixels_HWC.shape[:2] != size:
            got, first = (f"{shape[1]}x{shape[0]}" for shape in (pixels_HWC.shape, size))
            raise unreadable(path, f"its size changes on the way, from {first} to {got}")
        yield torch.from_numpy(_over_black(pixels_HWC))


def on_display(pictures: Iterator[Picture], fps: Fraction) -> Iterator[np.ndarray]:
    """Yield the pixels shown at 0, 1/fps, 2/fps and so on, up to the end of the last picture.

    A picture counts as begun one tick early, a quarter of its length at most: containers round their times.
    Source of the rule: Wan-Video/Wan2.1 wan/utils/vace_processor.py (Apache-2.0).
    """
    count, shown, pixels, end = 0, None, None, Fraction(0)
    for picture in pictures:
        slack = min(picture.duration / 4, picture.tick)
        while shown is not None and count / fps < picture.time - slack:
            pixels = shown.pixels() if pixels is None else pixels
            yield pixels
            count += 1
        shown, pixels, end = picture, None, picture.time + picture.duration - slack
    while shown is not None and (count / fps < end or count == 0):
        pixels = shown.pixels() if pixels is None else pixels
        yield pixels
        count += 1


def _over_black(pixels_HWC: np.ndarray) -> np.ndarray:
    """RGB of RGB, or of RGBA whose colour is not multiplied by alpha."""
    colour, alpha = pixels_HWC[..., :3], pixels_HWC[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(colour)
    return np.rint(colour * (alpha.astype(np.float32) / 255)).astype(np.uint8)


# --- stored frames -------------------------------------------------------------------------------


def stored_frames(path: Path) -> Iterator[Picture]:
    """Yield the frames of a video or animated image as stored, RGBA, their times counted from the first."""
    with _told(path):
        yield from _webp_frames(path) if is_webp(path) else _video_frames(path)


def _video_frames(path: Path) -> Iterator[Picture]:
    with av.open(str(path.resolve())) as container:
        stream = video_stream(container)
        if stream is None:
            raise unreadable(path, "it holds no video")
        tick = stream.time_base or Fraction(1, 1000)
        usual = 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)
        convert = _Converter(stream)
        first: Fraction | None = None
        time = -usual
        for frame in decoded(container, stream):
            stated = None if frame.pts is None else frame.pts * tick
            first = stated if first is None and stated is not None else first
            time = time + usual if stated is None or first is None else stated - first
            yield Picture(time, frame.duration * tick if frame.duration else usual, tick, partial(convert, frame))


def _webp_frames(path: Path) -> Iterator[Picture]:
    """FFmpeg before version 8.1 cannot read animated WebP."""
    with Image.open(path) as image:
        time = Fraction(0)
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            duration = Fraction(image.info.get("duration", 0), 1000)
            yield Picture(time, duration, Fraction(1, 1000), partial(np.array, image.convert("RGBA")))
            time += duration


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder, frame_2 before frame_10. Raises RequestError where there is none."""
    images = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise unreadable(folder, f"the folder holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(images, key=lambda file: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", file.name)])


def is_webp(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        head = file.read(12)
        return head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return False


# --- streams and pixels --------------------------------------------------------------------------


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the first stream that moves: not the cover picture of a song."""
    covers = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & covers), None)
    if stream is not None:
        stream.thread_type = "AUTO"
    return stream


def decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream, with their transparency where it has any.

    Raises EOFError where there are fewer than the container states.
    """
    decoder: av.VideoStream | av.VideoCodecContext = stream
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ALPHA_DECODERS:
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r"))
    packets = 0
    for packet in container.demux(stream):
        if packet.is_corrupt and stream.frames:
            continue  # one packet too few is told below; a decoder without threads would fail in words of its own
        packets += packet.size > 0
        yield from decoder.decode(packet if packet.size else None)
    if packets < stream.frames:
        raise EOFError(f"it breaks off after {packets} of its {stream.frames} frames")


def display_size(stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Return (width, height) as players show it: square pixels, upright."""
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    return (frame.height, width) if _turn_of(frame)[0] else (width, frame.height)


def _turn_of(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether a frame is shown with rows and columns swapped and then mirrored in x, in y: by its display matrix.

    Of [a b u, c d v, x y w] the point (p, q), q downwards, goes to (a p + c q, b p + d q).
    Source: ISO/IEC 14496-12, the matrix of a track header; angles between are taken as the nearest quarter turn.
    """
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(memoryview(cast(SideData, found)), np.int32).tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if swapped else (False, a < 0, d < 0)


class _Converter:
    """Turns decoded frames into upright RGBA pixels. Its filter rounds to nearest; PyAV's own conversion is about
    one level too dark."""

    def __init__(self, stream: av.VideoStream) -> None:
        self._aspect = stream.sample_aspect_ratio or Fraction(1)
        self._tick = stream.time_base or Fraction(1, 1000)
        self._graph: Graph | None = None
        self._layout: tuple[int, int, str] | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        layout = (frame.width, frame.height, frame.format.name)
        if self._graph is None or layout != self._layout:
            self._graph, self._layout = self._new_graph(frame), layout
        self._graph.push(frame)
        pixels_HWC = cast(av.VideoFrame, self._graph.pull()).to_ndarray()
        swapped, mirror_x, mirror_y = _turn_of(frame)
        pixels_HWC = pixels_HWC.swapaxes(0, 1) if swapped else pixels_HWC
        return np.ascontiguousarray(pixels_HWC[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])

    def _new_graph(self, frame: av.VideoFrame) -> Graph:
        matrix = "auto"
        if frame.colorspace == UNSPECIFIED and frame.format.name.startswith("yuv"):
            matrix = "bt709" if frame.height >= HD_LINES else "bt601"
        size = f"w={round(frame.width * self._aspect)}:h={frame.height}"
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or self._tick
        )
        scale = graph.add("scale", f"{size}:in_color_matrix={matrix}:flags=bicubic+accurate_rnd+full_chroma_int")
        graph.link_nodes(source, scale, graph.add("format", "pix_fmts=rgba"), graph.add("buffersink")).configure()
        return graph


# --- errors --------------------------------------------------------------------------------------


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell what decoders raise as a RequestError that names the file."""
    try:
        yield
    except (OSError, av.FFmpegError, EOFError, IndexError) as error:
        raise unreadable(path, getattr(error, "strerror", None) or str(error) or "it breaks off") from error


def unreadable(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path} cannot be read as video or sound: {why}",
        "check the path and that the file plays elsewhere",
        field="path",
        got=str(path),
    )
