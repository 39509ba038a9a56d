"""From a raw driving video to what Animate takes: skeleton, face, mask and background videos. What `kinema drive` does.

Two passes over the video, so that memory does not grow with its length: poses first, then the videos made of them.
Source of the order and the numbers: Wan-Video/Wan2.2 wan/modules/animate/preprocess/process_pipepline.py (Apache-2.0).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kinema.errors import RequestError
from kinema.media.background import BackgroundWriter
from kinema.media.image import read_image
from kinema.media.pixels import fit_pixels
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import write
from kinema.planning.geometry import frames_shown, size_within
from kinema.pose.files import find_reader
from kinema.pose.keypoints import Pose
from kinema.pose.reader import PoseReader
from kinema.pose.regions import blocked, box_mask, crop, face_box, grown
from kinema.pose.retarget import retarget
from kinema.pose.skeleton import draw
from kinema.schema import AREAS, Frozen, MediaFacts, Note, Progress, Request
from kinema.tensors import Media

FPS = 30.0
FACE_SIDE = 512


class DriveOptions(Frozen):
    """What is told beyond a Request's size, frames, fps, save, overwrite, quality, device, reference and mask.

    replace         make what replacement takes as well: mask and background, at the video's own shape.
    retarget        in animation, give the skeleton the limbs of the person in the reference image.
    columns, rows   cells of the mask's blocks: 1 x 1, the official default, makes it a box.
    detector, points   ONNX files; None looks in the models folders.
    """

    replace: bool = False
    retarget: bool = True
    columns: int = 1
    rows: int = 1
    detector: Path | None = None
    points: Path | None = None


def make_driving(
    video: Path, request: Request, options: DriveOptions, models: Sequence[Path] = ()
) -> Generator[Progress | Note, None, dict[str, Path]]:
    """Write the driving videos of a clip into the folder `request.save`; return them by Request field.

    request  reference: the person to animate, needed unless options.replace; mask: a video, white where the person to
             be replaced is; size: an area, 720p by default; fps: 30 by default.

    Raises RequestError for what cannot be read, for a video in which no person is found, and a reference without one.
    """
    facts, reference = _checked(video, request, options)
    folder = request.save or Path(f"{video.stem}-driving")
    outputs = _outputs(folder, options, request.overwrite)
    fps = request.fps or FPS
    shown = frames_shown(facts, fps)
    frames = min(request.frames or shown, shown)
    area = _area(request)
    reader = find_reader(options.detector, options.points, request.device or "cpu", models)
    source = size_within(facts.width, facts.height, area) if options.replace else (facts.width, facts.height)
    poses = yield from _read_poses(reader, _frames(video, fps, frames, source), frames)
    frames = len(poses)
    yield from _told_gaps(video, poses, fps)
    target = source if reference is None else size_within(reference.shape[1], reference.shape[0], area)
    drawn = yield from _drawn(poses, reader, reference, target, options)
    yield from _write(video, fps, frames, source, target, poses, drawn, request, options, outputs)
    return outputs


def generate_command(request: Request, made: Mapping[str, Path]) -> str:
    """Return the command that makes a video of these driving videos."""
    reference = str(request.reference[0]) if request.reference else "IMAGE"
    files = [word for role, path in made.items() for word in (f"--{role}", str(path))]
    return shlex.join(["kinema", "generate", "--model", "wan2.2-animate-14b", "--reference", reference, *files])


# --- poses ---------------------------------------------------------------------------------------


def _read_poses(
    reader: PoseReader, video: Iterator[Tensor], frames: int
) -> Generator[Progress, None, list[Pose | None]]:
    poses: list[Pose | None] = []
    yield Progress(stage="read poses", done=0, total=frames)
    for frame_HWC in video:
        poses.append(reader(frame_HWC))
        yield Progress(stage="read poses", done=len(poses), total=frames)
    return poses


def _told_gaps(video: Path, poses: Sequence[Pose | None], fps: float) -> Iterator[Note]:
    missing = [number for number, pose in enumerate(poses) if pose is None]
    if len(missing) == len(poses):
        raise RequestError(
            f"no person was found in any of the {len(poses)} frames of {video}",
            "give a video of one person, large enough to be seen",
            field="video",
            got=str(video),
        )
    if missing:
        text = (
            f"{len(missing)} of {len(poses)} frames show no person, the first at {missing[0] / fps:.2f} s: skeleton "
            "and mask are empty there, and the face is the one before"
        )
        yield Note(about="video", text=text)


def _drawn(
    poses: Sequence[Pose | None],
    reader: PoseReader,
    reference: Tensor | None,
    size: tuple[int, int],
    options: DriveOptions,
) -> Generator[Note, None, list[Pose | None]]:
    """The poses as they are drawn: carried over to the reference's body, or fitted into the frame."""
    width, height = size
    if reference is None or not options.retarget:
        return [None if pose is None else pose.fitted(width, height) for pose in poses]
    person = reader(fit_pixels(reference, width, height, "pad"))
    if person is None:
        raise RequestError(
            "no person was found in the reference image, whose body the skeleton should take",
            "give another image, or pass --no-retarget to keep the driver's own limbs",
            field="reference",
            got=None,
        )
    first = next(pose for pose in poses if pose is not None)
    yield Note(
        about="pose",
        text="limbs take the reference's lengths, measured where the first frame shows a person: both should face the "
        "camera there, arms and legs stretched",
    )
    change = retarget(first, person)
    return [None if pose is None else change(pose) for pose in poses]


# --- videos --------------------------------------------------------------------------------------


def _write(
    video: Path,
    fps: float,
    frames: int,
    source: tuple[int, int],
    target: tuple[int, int],
    poses: Sequence[Pose | None],
    drawn: Sequence[Pose | None],
    request: Request,
    options: DriveOptions,
    outputs: dict[str, Path],
) -> Generator[Progress | Note, None, None]:
    sizes = {"face": (FACE_SIDE, FACE_SIDE)}
    quality = 90 if request.quality is None else request.quality

    def write_one(role: str, chunks: Iterator[Tensor]) -> None:
        width, height = sizes.get(role, target)
        write(Media(chunks, frames, width, height, fps, {}), outputs[role], "mp4", quality)

    faces = _FaceCrops()
    masks = _masks(request, fps, frames, source, poses, options)
    empty = 0
    yield Progress(stage="write", done=0, total=frames)
    with ExitStack() as stack:
        files = {role: stack.enter_context(BackgroundWriter(partial(write_one, role))) for role in outputs}
        for number, frame_HWC in enumerate(_frames(video, fps, frames, source)):
            files["pose"].add(draw(drawn[number], *target)[None])
            files["face"].add(faces(poses[number], frame_HWC)[None])
            if options.replace:
                mask_HW = next(masks)
                empty += not bool(mask_HW.any())
                files["mask"].add((mask_HW[None, :, :, None] * 255).to(torch.uint8).expand(-1, -1, -1, 3))
                files["background"].add((frame_HWC * ~mask_HW[:, :, None])[None])
            yield Progress(stage="write", done=number + 1, total=frames)
    if options.replace:
        yield from _told_masks(request, frames, empty)


class _FaceCrops:
    """The face of each frame; where none is to be cut out, the last one before, black at the start."""

    def __init__(self) -> None:
        self._last = torch.zeros(FACE_SIDE, FACE_SIDE, 3, dtype=torch.uint8)

    def __call__(self, pose: Pose | None, frame_HWC: Tensor) -> Tensor:
        box = None if pose is None else face_box(pose)
        if box is not None:
            self._last = crop(frame_HWC, box, FACE_SIDE)
        return self._last


def _masks(
    request: Request,
    fps: float,
    frames: int,
    size: tuple[int, int],
    poses: Sequence[Pose | None],
    options: DriveOptions,
) -> Iterator[Tensor]:
    """Yield masks [H, W], bool, grown and in blocks: of the mask video, or else of the box around the person."""
    given = read_video(request.mask, fps=fps, frames=frames) if request.mask else None
    for pose in poses:
        if given is None:
            mask_HW = box_mask(pose, *size)
        else:
            frame_HWC = next(given, None)
            if frame_HWC is None:
                raise RequestError(
                    f"mask {request.mask} ends before the video does",
                    "give one as long",
                    field="mask",
                    got=str(request.mask),
                )
            mask_HW = fit_pixels(frame_HWC, *size, "pad")[..., 0] > 127
        yield blocked(grown(mask_HW), options.columns, options.rows)


def _told_masks(request: Request, frames: int, empty: int) -> Iterator[Note]:
    if request.mask is None:
        yield Note(about="mask", text="the box around the person; a mask of the outline is taken with --mask VIDEO")
    if empty:
        yield Note(about="mask", text=f"empty in {empty} of {frames} frames, which stay as they are")


# --- inputs and outputs --------------------------------------------------------------------------


def _checked(video: Path, request: Request, options: DriveOptions) -> tuple[MediaFacts, Tensor | None]:
    """Facts of the video and, for animation, the reference's pixels."""
    if not video.exists():
        raise RequestError(f"{video}: no such file", "pass a video", field="video", got=str(video))
    facts = probe(video)
    if facts.kind != "video":
        raise RequestError(f"{video} is sound alone", "pass a video", field="video", got=str(video))
    if request.mask and not options.replace:
        raise RequestError(
            f"mask {request.mask} belongs to replacement",
            "pass --replace as well, or leave it out",
            field="mask",
            got=str(request.mask),
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
    return facts, read_image(request.reference[0])[0]


def _area(request: Request) -> int:
    if request.size is None or request.size in AREAS:
        return AREAS[request.size or "720p"]
    width, height = request.size.split("x")
    return int(width) * int(height)


def _outputs(folder: Path, options: DriveOptions, overwrite: bool) -> dict[str, Path]:
    roles = ("pose", "face", "mask", "background") if options.replace else ("pose", "face")
    outputs = {role: folder / f"{role}.mp4" for role in roles}
    for path in outputs.values():
        if path.exists() and not overwrite:
            raise RequestError(
                f"{path} exists already",
                "pass another --save, or --overwrite to replace it",
                field="save",
                got=str(path),
            )
    folder.mkdir(parents=True, exist_ok=True)
    return outputs


def _frames(video: Path, fps: float, frames: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the frames of the clip at its rate, brought to `size` whole, with black bars if need be."""
    fit: Callable[[Tensor], Tensor] = partial(fit_pixels, width=size[0], height=size[1], fit="pad")
    return map(fit, read_video(video, fps=fps, frames=frames))
