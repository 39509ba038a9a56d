"""From a raw driving video to what Animate takes: skeleton, face, mask and background videos. What `kinema drive` does.

Two passes over the video, so that memory does not grow with its length: poses first, then the videos made of them.
Source of the order and the numbers: Wan-Video/Wan2.2 wan/modules/animate/preprocess/process_pipepline.py (Apache-2.0).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kinema.errors import RequestError
from kinema.media.background import BackgroundWriter
from kinema.media.image import read_image
from kinema.media.pixels import fit_pixels
from kinema.media.probe import check_frames, probe, video_facts
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.neutral import EDITING, NeutralPoses
from kinema.planning.geometry import frames_shown, size_within
from kinema.pose.files import find_outline, find_reader
from kinema.pose.keypoints import Pose
from kinema.pose.reader import PoseReader
from kinema.pose.regions import blocked, box_mask, crop, face_box, grown
from kinema.pose.retarget import retarget
from kinema.pose.skeleton import draw
from kinema.schema import AREAS, Frozen, MediaFacts, Note, Progress, Request, Settings
from kinema.tensors import Media

FPS = 30.0
FACE_SIDE = 512
SAME_SHAPE = 0.02


class DriveOptions(Frozen):
    """What is told beyond a Request's size, frames, fps, save, overwrite, quality, device, reference and mask.

    replace         make what replacement takes as well: mask and background, at the video's own shape.
    retarget        in animation, give the skeleton the limbs of the person in the reference image.
    neutral         model that edits both to a neutral pose, in which limbs are then measured, such as
                    flux.1-kontext-dev. Takes a Request's precision, quantise, seed, vram and ram as well.
    columns, rows   cells of the mask's blocks: 1 x 1, the official default, makes it a box.
    detector, points   ONNX files; None looks in the models folders.
    sam2            ONNX file of SAM 2's encoder, its decoder beside it; None looks in the models folders.
    """

    replace: bool = False
    retarget: bool = True
    neutral: str | None = None
    columns: int = 1
    rows: int = 1
    detector: Path | None = None
    points: Path | None = None
    sam2: Path | None = None


class Clip(NamedTuple):
    """What is read of the video: so many frames at a rate, brought to a size whole, with black bars if need be."""

    path: Path
    fps: float
    frames: int
    size: tuple[int, int]

    def read(self, start: int = 0) -> Iterator[Tensor]:
        width, height = self.size
        frames = read_video(self.path, fps=self.fps, start=start, frames=self.frames - start)
        return (fit_pixels(frame_HWC, width, height, "pad") for frame_HWC in frames)


Outline = Callable[[Tensor, Pose | None], Tensor]
"""A frame [H, W, 3], uint8, and its pose -> the mask [H, W], bool, of the person."""


def make_driving(
    video: Path, request: Request, options: DriveOptions, settings: Settings
) -> Generator[Progress | Note, None, dict[str, Path]]:
    """Write the driving videos of a clip into the folder `request.save`; return them by Request field.

    request  reference: the person to animate, needed unless options.replace; mask: a video or image, white where the
             person to be replaced is; size: an area, 720p by default; fps: 30 by default.

    Raises RequestError for what cannot be read, for a video in which no person is found, and a reference without one;
    where options.neutral, what planning it raises.
    """
    facts, reference = _checked(video, request, options)
    folder = request.save or Path(f"{video.stem}-driving")
    outputs = _outputs(video, request, options, folder)
    fps = request.fps or FPS
    frames = check_frames(facts, frames_shown(facts, fps), fps, request.frames)
    area = _area(request)
    size = size_within(facts.width, facts.height, area) if options.replace else (facts.width, facts.height)
    clip = Clip(video, fps, frames, size)
    reader = find_reader(options.detector, options.points, request.device or "cpu", settings.models)
    if request.device not in (None, "cpu") and reader.runs_on == "cpu":
        text = f"read on the CPU: onnxruntime as it is installed does not know {request.device}"
        yield Note(about="pose", text=text)
    outline, said = _outline(clip, request, options, settings.models)
    neutral = NeutralPoses(options.neutral, request, settings, folder, size) if options.neutral else None
    _make(folder)
    poses = yield from _read_poses(reader, clip)
    clip = clip._replace(frames=len(poses))
    yield from _told_gaps(clip, poses)
    target = size if reference is None else size_within(reference.shape[1], reference.shape[0], area)
    if reference is None or not options.retarget:
        drawn = [None if pose is None else pose.fitted(*target) for pose in poses]
    else:
        drawn = yield from _carried_over(clip, poses, reader, fit_pixels(reference, *target, "pad"), neutral)
    if options.replace:
        yield Note(about="mask", text=said)
    yield from _write(clip, target, poses, drawn, outline, request, options, outputs)
    return outputs


def generate_command(request: Request, made: Mapping[str, Path]) -> str:
    """Return the command that makes a video of these driving videos."""
    reference = str(request.reference[0]) if request.reference else "IMAGE"
    files = [word for role, path in made.items() for word in (f"--{role}", str(path))]
    return shlex.join(["kinema", "generate", "--model", "wan2.2-animate-14b", "--reference", reference, *files])


# --- poses ---------------------------------------------------------------------------------------


def _read_poses(reader: PoseReader, clip: Clip) -> Generator[Progress, None, list[Pose | None]]:
    poses: list[Pose | None] = []
    yield Progress(stage="read poses", done=0, total=clip.frames)
    for frame_HWC in clip.read():
        poses.append(reader(frame_HWC))
        yield Progress(stage="read poses", done=len(poses), total=clip.frames)
    return poses


def _told_gaps(clip: Clip, poses: Sequence[Pose | None]) -> Iterator[Note]:
    missing = [number for number, pose in enumerate(poses) if pose is None]
    if len(missing) == len(poses):
        raise RequestError(
            f"no person was found in any of the {len(poses)} frames of {clip.path}",
            "give a video of one person, large enough to be seen",
            field="video",
            got=str(clip.path),
        )
    if missing:
        text = (
            f"{len(missing)} of {len(poses)} frames show no person, the first at {missing[0] / clip.fps:.2f} s: "
            "skeleton and mask are empty there, and the face is the one before"
        )
        yield Note(about="video", text=text)


def _carried_over(
    clip: Clip, poses: Sequence[Pose | None], reader: PoseReader, reference_HWC: Tensor, neutral: NeutralPoses | None
) -> Generator[Progress | Note, None, list[Pose | None]]:
    """The poses as the reference's body would take them."""
    person = reader(reference_HWC)
    if person is None:
        raise RequestError(
            "no person was found in the reference image, whose body the skeleton should take",
            "give another image, or pass --no-retarget to keep the driver's own limbs",
            field="reference",
            got=None,
        )
    number, first = next((number, pose) for number, pose in enumerate(poses) if pose is not None)
    if neutral is None:
        text = (
            "measured where the first frame shows a person: both should face the camera there, arms and legs stretched"
        )
        change = retarget(first, person)
    else:
        pictures = yield from neutral(next(clip.read(number)), poses)
        text = f"measured in {' and '.join(map(str, pictures))}: look whether both stand straight there"
        straight = [_straight(reader, picture, pose) for picture, pose in zip(pictures, (first, person), strict=True)]
        change = retarget(first, person, (straight[0], straight[1]))
    yield Note(about="pose", text=f"limbs take the reference's lengths, {text}")
    return [None if pose is None else change(pose) for pose in poses]


def _straight(reader: PoseReader, picture: Path, before: Pose) -> Pose:
    """The pose in an edited picture, brought back to the size it had before."""
    pose = reader(fit_pixels(read_image(picture)[0], before.width, before.height, "pad"))
    if pose is None:
        raise RequestError(
            f"no person was found in {picture}, the picture in a neutral pose",
            "pass another --seed, or leave --neutral out",
            field="neutral",
            got=str(picture),
        )
    return pose


# --- masks ---------------------------------------------------------------------------------------


def _outline(clip: Clip, request: Request, options: DriveOptions, models: Iterable[Path]) -> tuple[Outline, str]:
    """Where the person is in each frame, and how that is known: by a mask video, SAM 2, or the box around them."""
    if request.mask is not None:
        facts = probe(request.mask)
        when = ", the same in every frame" if facts.frames == 1 else ""
        return _given_outline(clip, request.mask, facts), f"{request.mask.name} says where the person is{when}"
    reader = find_outline(options.sam2, request.device or "cpu", models) if options.replace else None
    if reader is not None:
        return reader, f"the outline of the person, by {reader.name} from the skeleton of each frame"
    text = "the box around the person; an outline is made by SAM 2 where its files are, or taken with --mask VIDEO"
    return lambda frame_HWC, pose: box_mask(pose, *clip.size), text


def _given_outline(clip: Clip, mask: Path, facts: MediaFacts) -> Outline:
    """Of a mask video, which has to be as long as the clip, or of one image; of the clip's shape."""
    still, shown = facts.frames == 1, frames_shown(facts, clip.fps)
    if shown < clip.frames and not still:
        raise RequestError(
            f"mask {mask} ends before the video does: it shows {shown} of {clip.frames} frames",
            f"give one as long, one image for all frames, or pass --frames {shown}",
            field="mask",
            got=shown,
            allowed=clip.frames,
        )
    width, height = clip.size
    if abs(facts.width * height - facts.height * width) > SAME_SHAPE * facts.width * height:
        raise RequestError(
            f"mask {mask} is {facts.width}x{facts.height}, of another shape than the video, {width}x{height}",
            "give one that lies over the video",
            field="mask",
            got=f"{facts.width}x{facts.height}",
        )
    masks = cycle(read_video(mask)) if still else read_video(mask, fps=clip.fps)
    return lambda frame_HWC, pose: fit_pixels(next(masks), width, height, "stretch")[..., 0] > 127


# --- videos --------------------------------------------------------------------------------------


def _write(
    clip: Clip,
    target: tuple[int, int],
    poses: Sequence[Pose | None],
    drawn: Sequence[Pose | None],
    outline: Outline,
    request: Request,
    options: DriveOptions,
    outputs: dict[str, Path],
) -> Generator[Progress | Note, None, None]:
    quality = 90 if request.quality is None else request.quality

    def write_one(role: str, chunks: Iterator[Tensor]) -> None:
        width, height = (FACE_SIDE, FACE_SIDE) if role == "face" else target
        write(Media(chunks, clip.frames, width, height, clip.fps, {}), outputs[role], "mp4", quality)

    faces = _FaceCrops()
    empty = 0
    yield Progress(stage="write", done=0, total=clip.frames)
    with ExitStack() as stack:
        files = {role: stack.enter_context(BackgroundWriter(partial(write_one, role))) for role in outputs}
        for number, frame_HWC in enumerate(clip.read()):
            files["pose"].add(draw(drawn[number], *target)[None])
            files["face"].add(faces(poses[number], frame_HWC)[None])
            if options.replace:
                mask_HW = blocked(grown(outline(frame_HWC, poses[number])), options.columns, options.rows)
                empty += not bool(mask_HW.any())
                files["mask"].add((mask_HW[None, :, :, None] * 255).to(torch.uint8).expand(-1, -1, -1, 3))
                files["background"].add((frame_HWC * ~mask_HW[:, :, None])[None])
            yield Progress(stage="write", done=number + 1, total=clip.frames)
    if empty:
        yield Note(about="mask", text=f"empty in {empty} of {clip.frames} frames, which stay as they are")


class _FaceCrops:
    """The face of each frame; where none is to be cut out, the last one before, black at the start."""

    def __init__(self) -> None:
        self._last = torch.zeros(FACE_SIDE, FACE_SIDE, 3, dtype=torch.uint8)

    def __call__(self, pose: Pose | None, frame_HWC: Tensor) -> Tensor:
        box = None if pose is None else face_box(pose)
        if box is not None:
            self._last = crop(frame_HWC, box, FACE_SIDE)
        return self._last


# --- inputs and outputs --------------------------------------------------------------------------


def _checked(video: Path, request: Request, options: DriveOptions) -> tuple[MediaFacts, Tensor | None]:
    """Facts of the video and, for animation, the reference's pixels."""
    facts = video_facts(video)
    for field, value in (("mask", request.mask), ("sam2", options.sam2)):
        if value and not options.replace:
            raise RequestError(
                f"{field} {value} belongs to replacement",
                "pass --replace as well, or leave it out",
                field=field,
                got=str(value),
            )
    if request.mask and options.sam2:
        raise RequestError(
            f"mask {request.mask} and sam2 {options.sam2} both say where the person is",
            "leave one of them out",
            field="sam2",
            got=str(options.sam2),
        )
    for field, cells in (("columns", options.columns), ("rows", options.rows)):
        if cells < 1:
            raise RequestError(
                f"{field} {cells}: a mask is cut into one cell or more", f"pass --{field} 1", field=field, got=cells
            )
    if options.neutral and (options.replace or not options.retarget):
        raise RequestError(
            f"neutral {options.neutral} is for measuring limbs, which keep their lengths "
            + ("in replacement" if options.replace else "without retargeting"),
            "leave out --neutral" + ("" if options.replace else " or --no-retarget"),
            field="neutral",
            got=options.neutral,
        )
    for field in EDITING:
        if getattr(request, field) is not None and not options.neutral:
            raise RequestError(
                f"{field} is for the pictures in a neutral pose, and none are made",
                f"leave --{field} out, or pass --neutral flux.1-kontext-dev as well",
                field=field,
                got=getattr(request, field),
            )
    if options.replace:
        return facts, None
    if not request.reference:
        raise RequestError(
            "no reference image: the skeleton is drawn at its shape, and takes its limbs",
            "pass --reference IMAGE, or --replace to put somebody into the video itself",
            field="reference",
            got=None,
        )
    if len(request.reference) > 1:
        raise RequestError(
            f"{len(request.reference)} reference images; one person is animated",
            f"pass --reference {request.reference[0]} alone",
            field="reference",
            got=len(request.reference),
            allowed=1,
        )
    return facts, read_image(request.reference[0])[0]


def _area(request: Request) -> int:
    if request.size is None or request.size in AREAS:
        return AREAS[request.size or "720p"]
    width, height = request.size.split("x")
    return int(width) * int(height)


def _outputs(video: Path, request: Request, options: DriveOptions, folder: Path) -> dict[str, Path]:
    inputs = {path.resolve() for path in (video, request.mask, *request.reference) if path}
    roles = ("pose", "face", "mask", "background") if options.replace else ("pose", "face")
    outputs = {role: folder / f"{role}.mp4" for role in roles}
    for path in (*outputs.values(), *([folder / "driver.png"] if options.neutral else [])):
        if path.resolve() in inputs:
            raise RequestError(
                f"{path} is read, and would be written over", "pass another --save", field="save", got=str(path)
            )
        if path.exists() and not request.overwrite:
            raise RequestError(
                f"{path} exists already",
                "pass another --save, or --overwrite to replace it",
                field="save",
                got=str(path),
            )
    return outputs


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"save {folder} cannot be a folder, into which the videos go: {error.strerror}",
            "pass --save FOLDER",
            field="save",
            got=str(folder),
        ) from error
