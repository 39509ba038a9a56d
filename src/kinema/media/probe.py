"""What a video or sound file says of itself, and its frames. Images are read in media/image.py."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.filter import Graph
from torch import Tensor

from kinema.errors import RequestError
from kinema.schema import MediaFacts

# Frames tagged with no colour matrix are taken as BT.709 from 720 lines on and BT.601 below, as players do.
HD_LINES = 720
UNSPECIFIED = 2


def probe(path: Path) -> MediaFacts:
    """Return size, frames and rate of a video, after rotation metadata; or that it is sound alone.

    Opens the file, decodes its first frame and counts the frames; a sound file has 0 frames.
    Raises RequestError where there is no such file, or it cannot be decoded.
    """
    path = Path(path)
    try:
        with av.open(str(path.resolve())) as container:
            videos = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not videos:
                if not container.streams.audio:
                    raise _unreadable(path, "it holds neither video nor sound")
                next(container.decode(audio=0))
                return MediaFacts(path=path, kind="audio", frames=0)
            stream = videos[0]
            first = next(container.decode(stream))
            turned = first.rotation % 180 != 0
            facts = MediaFacts(
                path=path,
                kind="video",
                width=first.height if turned else first.width,
                height=first.width if turned else first.height,
                frames=stream.frames,
                fps=float(stream.average_rate) if stream.average_rate else None,
                has_alpha=_has_alpha(first),
            )
        return facts if facts.frames else facts.model_copy(update={"frames": _count(path)})
    except (OSError, av.FFmpegError, StopIteration) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error) or "it has no frames") from error


def read_frames(path: Path) -> Iterator[Tensor]:
    """Yield frames_HWC uint8 RGB of a video, in order, rotation applied.

    Raises RequestError where the file cannot be opened or decoding breaks off.
    """
    path = Path(path)
    try:
        with av.open(str(path.resolve())) as container:
            graph = None
            for frame in container.decode(video=0):
                graph = graph or _to_rgb(frame)
                graph.push(frame)
                image = cast(av.VideoFrame, graph.pull()).to_ndarray()
                yield torch.from_numpy(np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))))
    except (OSError, av.FFmpegError, IndexError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from error


def _to_rgb(frame: av.VideoFrame) -> Graph:
    """A filter that rounds to nearest; the plain conversion of PyAV is about one level too dark."""
    matrix = "auto"
    if frame.colorspace == UNSPECIFIED and frame.format.name.startswith("yuv"):
        matrix = "bt709" if frame.height >= HD_LINES else "bt601"
    graph = Graph()
    time_base = frame.time_base or Fraction(1, 1000)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    scale = graph.add("scale", f"in_color_matrix={matrix}:flags=bicubic+accurate_rnd+full_chroma_int")
    graph.link_nodes(source, scale, graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")).configure()
    return graph


def _count(path: Path) -> int:
    """Containers such as webm do not say how many frames they hold."""
    with av.open(str(path.resolve())) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def _has_alpha(frame: av.VideoFrame) -> bool:
    if not any(component.is_alpha for component in frame.format.components):
        return False
    return bool(frame.to_ndarray(format="rgba")[..., 3].min() < 255)


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _unreadable(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path} cannot be read as video or sound: {why}",
        "check the path and that the file plays elsewhere",
        field="path",
        got=str(path),
    )
