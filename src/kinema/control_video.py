"""Control videos from a clip, frame by frame: what `kinema control` does.

Owns the way from a file to a file; the pictures themselves are made in media/control.py and models/depth.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from kinema.errors import CatalogError, RequestError
from kinema.media import control as pictures
from kinema.media.background import BackgroundWriter
from kinema.media.pixels import fit_pixels
from kinema.media.probe import check_frames, video_facts
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.planning.geometry import frames_shown, size_by_area
from kinema.planning.outputs import SUFFIXES
from kinema.pose.files import find_reader
from kinema.pose.skeleton import draw
from kinema.request import nearest
from kinema.schema import AREAS, Frozen, MediaFacts, Progress, Request
from kinema.tensors import Media

ControlKind = Literal["canny", "scribble", "depth", "pose"]
Picture = Callable[[Tensor], Tensor]
"""frame_HWC uint8 -> control frame_HWC uint8."""

METADATA_KEY = "kinema-control"
DEPTH_FOLDERS = ("Depth-Anything-V2-Small-hf", "Depth-Anything-V2-Base-hf", "Depth-Anything-V2-Large-hf")
DEPTH_SOURCE = "depth-anything/Depth-Anything-V2-Small-hf"


class ControlOptions(Frozen):
    """What kinds can be told beyond a Request's size, frames, fps, device and output fields.

    low, high  canny: bounds of the gradient.
    threshold  scribble: gradient from which an outline begins.
    weights    depth: folder of a Depth Anything model; None looks in the models folders.
    detector, points   pose: ONNX files that find people and their joints; None looks in the models folders.
    """

    low: float = pictures.CANNY_LOW
    high: float = pictures.CANNY_HIGH
    threshold: float = pictures.SCRIBBLE_THRESHOLD
    weights: Path | None = None
    detector: Path | None = None
    points: Path | None = None


def check_kind(kind: str) -> ControlKind:
    """Return `kind` if there is such a control video; RequestError with the nearest otherwise."""
    if kind in KINDS:
        return kind
    near = nearest(kind, KINDS)
    raise RequestError(
        f"{kind!r} is no control video; there are {', '.join(KINDS)}",
        f"type: kinema control {near or 'canny'} VIDEO",
        field="kind",
        got=kind,
        allowed=list(KINDS),
    )


def make_control(
    kind: ControlKind, video: Path, request: Request, options: ControlOptions, models: Iterable[Path] = ()
) -> Generator[Progress, None, Path]:
    """Write the control video of a clip, yielding progress; return where it is.

    request  its size, frames, fps, save, overwrite, quality and device count; without `fps` the clip's rate is kept.
    models   folders to look for the depth model in.

    Frames stream through: memory does not grow with the length.
    Raises RequestError for a clip that cannot be read or has fewer frames than are asked for, and for what cannot be
    written, CatalogError without a depth model.
    """
    facts = video_facts(video)
    save = _save(kind, video, request)
    picture = KINDS[kind](options, request.device or "cpu", models)
    fps = request.fps or facts.fps or 16.0
    shown = frames_shown(facts, fps) if request.fps else facts.frames
    frames = check_frames(facts, shown, fps, request.frames)
    width, height = _size(request, facts)
    made = {"kind": kind, "video": video.name, **options.model_dump(mode="json", exclude_none=True)}

    def write_all(chunks: Iterable[Tensor]) -> None:
        media = Media(iter(chunks), frames, width, height, fps, {METADATA_KEY: json.dumps(made)})
        write(media, save, SUFFIXES[save.suffix.lower()], 80 if request.quality is None else request.quality)

    yield Progress(stage=kind, done=0, total=frames)
    done = 0
    with BackgroundWriter(write_all) as writer:
        for frame_HWC in read_video(video, fps=request.fps, frames=frames):
            writer.add(picture(fit_pixels(frame_HWC, width, height, "crop"))[None])
            done += 1
            yield Progress(stage=kind, done=done, total=frames)
        if done < frames:
            raise RequestError(
                f"{video} breaks off after {done} of its {frames} frames",
                f"pass --frames {max(done, 1)}, or a file that plays to its end",
                field="video",
                got=str(video),
            )
    return save


def _size(request: Request, facts: MediaFacts) -> tuple[int, int]:
    if request.size in AREAS:
        return size_by_area(facts.width, facts.height, AREAS[request.size])
    width, height = request.size.split("x") if request.size else (facts.width, facts.height)
    return int(width), int(height)


def _save(kind: ControlKind, video: Path, request: Request) -> Path:
    save = request.save or Path(f"{video.stem}-{kind}.mp4")
    save = save if save.suffix else save / f"{video.stem}-{kind}.mp4"
    known = [suffix for suffix in SUFFIXES if SUFFIXES[suffix] != "latents"]
    if save.suffix.lower() not in known:
        hint = f"pass --save {save.with_suffix('.mp4')}"
        message = f"save {save} ends in {save.suffix}; known are {', '.join(known)}"
        raise RequestError(message, hint, field="save", got=str(save), allowed=known)
    if save.exists() and not request.overwrite:
        hint = "pass another --save, or --overwrite to replace it"
        raise RequestError(f"{save} exists already", hint, field="save", got=str(save))
    if save.resolve() == video.resolve():
        raise RequestError(f"save {save} is the clip itself", "pass another --save", field="save", got=str(save))
    return save


# --- kinds ---------------------------------------------------------------------------------------


def _canny(options: ControlOptions, device: str, models: Iterable[Path]) -> Picture:
    if not 0 <= options.low <= options.high:
        raise RequestError(
            f"low {options.low:g} and high {options.high:g}: the bounds of an edge are 0 <= low <= high",
            "pass --low 100 --high 200",
            field="low",
            got=options.low,
        )
    return lambda frame_HWC: pictures.canny(frame_HWC, options.low, options.high)


def _scribble(options: ControlOptions, device: str, models: Iterable[Path]) -> Picture:
    if options.threshold <= 0:
        raise RequestError(
            f"threshold {options.threshold:g} is not above 0",
            "pass --threshold 60",
            field="threshold",
            got=options.threshold,
        )
    return lambda frame_HWC: pictures.scribble(frame_HWC, options.threshold)


def _depth(options: ControlOptions, device: str, models: Iterable[Path]) -> Picture:
    from kinema.models.depth import Depth

    inside = [Path(folder, name) for name in DEPTH_FOLDERS for folder in ("depth", "depth-anything", "")]
    places = [options.weights] if options.weights else [root / place for root in models for place in inside]
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        searched = ", ".join(map(str, places if options.weights else models)) or "no folder"
        raise CatalogError(
            f"depth needs a Depth Anything V2 model; none lies in {searched}",
            f"type: kinema models pull hf:{DEPTH_SOURCE}, or pass a folder of it: --weights FOLDER",
            name=DEPTH_SOURCE,
        )
    return Depth(folder, device)


def _pose(options: ControlOptions, device: str, models: Iterable[Path]) -> Picture:
    reader = find_reader(options.detector, options.points, device, models)
    return lambda frame_HWC: draw(reader(frame_HWC), frame_HWC.shape[1], frame_HWC.shape[0])


KINDS: dict[ControlKind, Callable[[ControlOptions, str, Iterable[Path]], Picture]] = {
    "canny": _canny,
    "scribble": _scribble,
    "depth": _depth,
    "pose": _pose,
}

assert tuple(KINDS) == get_args(ControlKind)
