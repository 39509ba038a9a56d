"""What a video, a sound file or a folder of frames says of itself. Images are read in media/image.py."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from PIL import Image

from kinema.errors import RequestError
from kinema.media.image import image_facts
from kinema.media.reader import decoded, display_size, image_files, is_webp, stored_frames, unreadable, video_stream
from kinema.schema import MediaFacts


def probe(path: Path) -> MediaFacts:
    """Return size, frames, rate and length of a video as it is shown; or that it is sound alone, with 0 frames.

    Decodes the first frame and walks through the packets of the rest. Where the rate varies, `fps` is the mean one.
    A folder of images has no rate; its first image stands for all.
    Raises RequestError where there is no such file, or it cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        files = image_files(path)
        first = image_facts(files[0])
        return first.model_copy(update={"path": path, "kind": "video", "frames": len(files), "files": tuple(files)})
    try:
        if is_webp(path):
            return _webp_facts(path)
        with av.open(str(path.resolve())) as container:
            stream = video_stream(container)
            if stream is None:
                return _sound_facts(path, container)
            frame = next(decoded(container, stream))
            width, height = display_size(stream, frame)
            facts = MediaFacts(path=path, kind="video", width=width, height=height, has_alpha=_has_alpha(frame))
        return facts.model_copy(update=_timing(path))
    except (OSError, av.FFmpegError, StopIteration, EOFError) as error:
        raise unreadable(path, getattr(error, "strerror", None) or str(error) or "it has no frames") from error


def video_facts(video: Path) -> MediaFacts:
    """Return what `probe` does of a file whose frames are wanted.

    Raises RequestError as `probe` does, and for sound alone.
    """
    if not video.exists():
        raise RequestError(f"{video}: no such file", "pass a video", field="video", got=str(video))
    facts = probe(video)
    if facts.kind != "video":
        raise RequestError(f"{video} is sound alone", "pass a video", field="video", got=str(video))
    return facts


def check_frames(facts: MediaFacts, shown: int, fps: float, asked: int | None) -> int:
    """Return how many frames to read of a video that shows `shown` at `fps`: those asked for, or all of them.

    Raises RequestError for more than it shows.
    """
    if (asked or 0) > shown:
        raise RequestError(
            f"frames {asked}: {facts.path.name} shows {shown} at {fps:g} fps",
            f"pass --frames {shown} or less, or a longer video",
            field="frames",
            got=asked,
            nearest=shown,
        )
    return asked or shown


def _sound_facts(path: Path, container: av.container.InputContainer) -> MediaFacts:
    if not container.streams.audio:
        raise unreadable(path, "it holds neither video nor sound")
    next(container.decode(audio=0))
    stream = container.streams.audio[0]
    seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
    return MediaFacts(path=path, kind="audio", frames=0, seconds=seconds)


def _timing(path: Path) -> dict[str, object]:
    """frames, fps, seconds and variable_rate by the packets' times: what a container states of itself may be wrong."""
    with av.open(str(path.resolve())) as container:
        stream = video_stream(container)
        assert stream is not None, "the caller found it"
        tick = stream.time_base or Fraction(1, 1000)
        whole = 0
        packets = []
        for packet in container.demux(stream):
            if packet.size:  # of a film, packets themselves would fill the memory
                whole += not packet.is_corrupt
                packets.append((packet.pts, packet.duration, packet.is_discard))
        if whole < stream.frames:
            raise unreadable(path, f"it breaks off after {whole} of its {stream.frames} frames")
        # A comment at the end of a GIF looks like one packet more; what an edit list hides is not shown.
        shown = [(pts, duration) for pts, duration, hidden in packets[: stream.frames or None] if not hidden]
        stated, (_, last) = stream.average_rate, max(shown, key=lambda packet: packet[0] or 0)
        times = sorted(pts * tick for pts, _ in shown if pts is not None)
    if not times or (len(times) == 1 and not stated):
        return {"frames": len(shown), "fps": float(stated) if stated else None}
    mean = (times[-1] - times[0]) / max(len(times) - 1, 1)
    usual = mean or 1 / (stated or Fraction(25))
    length = last * tick if last else usual
    seconds = times[-1] - times[0] + length - min(length / 4, tick)
    steps = [after - before for before, after in pairwise(times)]
    varies = bool(steps) and max(steps) - min(steps) > max(2 * tick, mean / 10)
    # A constant rate is what the container states, not what its rounded times give.
    fps = 1 / usual if varies or not stated or abs(stated * usual - 1) > Fraction(1, 100) else stated
    return {"frames": len(shown), "fps": float(fps), "seconds": float(seconds), "variable_rate": varies}


def _webp_facts(path: Path) -> MediaFacts:
    with Image.open(path) as image:
        width, height, has_alpha = image.width, image.height, image.has_transparency_data
    durations = [picture.duration for picture in stored_frames(path)]
    total = sum(durations, Fraction(0))
    return MediaFacts(
        path=path,
        kind="video",
        width=width,
        height=height,
        frames=len(durations),
        fps=float(round(len(durations) / total, 2)) if total else None,
        seconds=float(total - min(durations[-1] / 4, Fraction(1, 1000))) if total else None,
        has_alpha=has_alpha,
        variable_rate=max(durations) - min(durations) > Fraction(2, 1000),
    )


def _has_alpha(frame: av.VideoFrame) -> bool:
    if not any(component.is_alpha for component in frame.format.components):
        return False
    opacity: np.ndarray = frame.to_ndarray(format="rgba")[..., 3]
    return int(opacity.min()) < 255
