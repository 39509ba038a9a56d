"""What drives Animate: which videos, at which size and rate, and in which clips the result is made.

Source: Wan-Video/Wan2.2 wan/animate.py, wan/configs/wan_animate_14B.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kinema.errors import RequestError
from kinema.planning.clips import overlapping_clips
from kinema.planning.geometry import PATCH, frames_shown, latent_frames, size_within
from kinema.planning.inputs import plan_image, plan_video
from kinema.planning.shape import asked_size
from kinema.schema import (
    AREAS,
    AnimatePlan,
    CatalogEntry,
    ClipPlan,
    Facts,
    ImagePlan,
    MediaFacts,
    Note,
    Plan,
    Request,
    SoundPlan,
    VideoPlan,
)

OVERLAPS = (1, 5)
"""Frames of a clip that the model was made to go on from."""

RELIGHTING = "relight-animate"
"""The LoRA for replacement, by its name in loras.toml."""

STILL = ("mask", "background")
"""Roles that one image may have, in all frames."""

MULTIPLE = 16
SAME_SHAPE = 0.02
SAME_LENGTH = 0.1  # seconds; containers round the length of sound to whole packets


@dataclass(frozen=True)
class Animated:
    """Everything in a plan that follows from the driving videos. size: width, height; length: frames, fps."""

    size: tuple[int, int]
    length: tuple[int, float]
    images: tuple[ImagePlan, ...]
    videos: tuple[VideoPlan, ...]
    clips: tuple[ClipPlan, ...]
    animate: AnimatePlan
    sound: SoundPlan | None

    def applied(self, plan: Plan) -> Plan:
        """Return the plan with all of it; its latents are those of one clip, behind the reference's."""
        channels, _, rows, columns = plan.latent
        latent = (channels, latent_frames(self.clips[0].frames) + 1, rows, columns)
        return plan.model_copy(
            update={
                "task": "replacement" if self.animate.replaces else "animation",
                "images": self.images,
                "videos": self.videos,
                "clips": self.clips,
                "animate": self.animate,
                "sound": self.sound,
                "latent": latent,
                "tokens": latent[1] * (rows // PATCH) * (columns // PATCH),
            }
        )


def plan_animated(request: Request, entry: CatalogEntry, facts: Facts, notes: list[Note]) -> Animated:
    """Return what follows from the driving videos of a request.

    Raises RequestError for inputs that do not belong together, in mode, length or shape.
    """
    media = {
        role: facts.media[role][0] for role in ("pose", "face", "mask", "background", "video") if facts.media.get(role)
    }
    replaces = _check_mode(request)
    if not replaces:
        notes += [
            Note(about="lora", text=f"{ref.path.name} fits a person to a scene in replacement; this is animation")
            for ref, found in zip(request.lora, facts.loras, strict=True)
            if found.known == RELIGHTING
        ]
    width, height = _size(request, entry, media["pose"], notes)
    fps = request.fps or entry.fps
    frames = _frames(request, media["pose"], fps)
    face_side = _face_side(facts)
    videos = []
    for role in ("pose", "face", *(("mask", "background" if request.background else "video") if replaces else ())):
        size = (face_side, face_side) if role == "face" else (width, height)
        videos.append(_video(role, media, size, fps, frames, notes))
    overlap = _overlap(request)
    clips = overlapping_clips(frames, entry.frames, overlap)
    if len(clips) > 1:
        text = f"{frames} frames in {len(clips)} clips of {entry.frames}, each on the last {overlap} of the one before"
        notes.append(Note(about="frames", text=text))
    extra = clips[-1].start + clips[-1].frames - frames
    if extra:
        text = f"the last clip reaches {extra} frames beyond the end: its inputs run backwards there, and it is cut"
        notes.append(Note(about="frames", text=text))
    return Animated(
        size=(width, height),
        length=(frames, fps),
        images=(_reference(facts.media["reference"][0], width, height, notes),),
        videos=tuple(videos),
        clips=clips,
        animate=AnimatePlan(overlap=overlap, replaces=replaces),
        sound=_sound(request, media, frames / fps, notes),
    )


# --- what is meant -------------------------------------------------------------------------------


def _check_mode(request: Request) -> bool:
    """Whether a person is replaced: where a mask says which pixels are theirs."""
    if len(request.reference) > 1:
        raise RequestError(
            f"{len(request.reference)} reference images; Animate takes one, of the person who is to move",
            f"pass --reference {request.reference[0]} alone",
            field="reference",
            got=len(request.reference),
            allowed=1,
        )
    if request.outpaint:
        raise RequestError(
            "outpaint: Animate keeps the shape of its skeleton, and makes nothing around it",
            "leave out --outpaint",
            field="outpaint",
            got=True,
        )
    if request.mask and not (request.background or request.video):
        raise RequestError(
            f"mask {request.mask} says who is replaced, but not in what",
            "pass --background VIDEO, or the video itself as --video",
            field="background",
            got=None,
        )
    if request.background and not request.mask:
        raise RequestError(
            f"background {request.background} belongs to replacement, which needs a mask of the person",
            "pass --mask VIDEO as well, or leave --background out",
            field="mask",
            got=None,
        )
    if request.video and not request.keep_audio and (request.background or not request.mask):
        raise RequestError(
            f"video {request.video} has no use: the skeleton drives the motion"
            + (", and the background is given" if request.background else ""),
            "pass --keep-audio to have its sound, or leave --video out; kinema drive makes skeletons of it",
            field="video",
            got=str(request.video),
        )
    return request.mask is not None


def _overlap(request: Request) -> int:
    overlap = OVERLAPS[0] if request.overlap is None else request.overlap
    if overlap not in OVERLAPS:
        raise RequestError(
            f"overlap {overlap}: Animate goes on from the last 1 or 5 frames of a clip",
            "pass --overlap 1 or --overlap 5",
            field="overlap",
            got=overlap,
            allowed=list(OVERLAPS),
        )
    return overlap


def _sound(request: Request, media: Mapping[str, MediaFacts], seconds: float, notes: list[Note]) -> SoundPlan | None:
    if not request.keep_audio:
        return None
    heard = media["video" if request.video else "pose"]
    if heard.seconds and abs(heard.seconds - seconds) > SAME_LENGTH:
        said = "cut with the video" if heard.seconds > seconds else "silent where it ends before"
        text = f"the sound of {heard.path.name} ({heard.seconds:.2f} s) is {said}, {seconds:.2f} s"
        notes.append(Note(about="keep_audio", text=text))
    return SoundPlan(path=heard.path, seconds=seconds)


# --- size and length -----------------------------------------------------------------------------


def _size(request: Request, entry: CatalogEntry, pose: MediaFacts, notes: list[Note]) -> tuple[int, int]:
    if request.size and request.size not in AREAS:
        return asked_size(request.size, MULTIPLE)
    limit = AREAS[request.size] if request.size else entry.size[0] * entry.size[1]
    whole = not (pose.width % MULTIPLE or pose.height % MULTIPLE)
    if whole and pose.width * pose.height <= limit:
        return pose.width, pose.height
    width, height = size_within(pose.width, pose.height, min(limit, pose.width * pose.height))
    shape = f"{pose.path.name} ({pose.width}x{pose.height})"
    notes.append(Note(about="size", text=f"{width}x{height}: near that of {shape}, in multiples of {MULTIPLE}"))
    return width, height


def _frames(request: Request, pose: MediaFacts, fps: float) -> int:
    shown = frames_shown(pose, fps)
    asked = request.frames or (max(1, round(request.seconds * fps)) if request.seconds else shown)
    if asked > shown:
        raise RequestError(
            f"{'frames' if request.frames else 'seconds'} ask for {asked} frames; {pose.path.name} shows {shown} at "
            f"{fps:g} fps",
            f"pass --frames {shown} or less, or a longer skeleton video",
            field="frames" if request.frames else "seconds",
            got=asked,
            allowed=f"1 to {shown}",
            nearest=shown,
        )
    return asked


def _face_side(facts: Facts) -> int:
    return int(4 * 2 ** (len(facts.files["dit"].config["animate"]["channels"]) - 1))


# --- inputs --------------------------------------------------------------------------------------


def _reference(media: MediaFacts, width: int, height: int, notes: list[Note]) -> ImagePlan:
    if abs(media.width * height - media.height * width) > SAME_SHAPE * media.width * height:
        text = f"{media.path.name} ({media.width}x{media.height}) is shown whole on black, {width}x{height}"
        notes.append(Note(about="reference", text=text))
    return plan_image("reference", media, (width, height), notes, crop=False, filter="bilinear")


def _video(
    role: str, media: Mapping[str, MediaFacts], size: tuple[int, int], fps: float, frames: int, notes: list[Note]
) -> VideoPlan:
    """How one video is read; RequestError where it ends early, or is of another shape than the skeleton's."""
    facts, pose = media[role], media["pose"]
    plan, shown = plan_video(role, facts, size, frames, fps, notes), frames_shown(facts, fps)
    if role in STILL and plan.still and frames > 1:
        notes.append(Note(about=role, text=f"{facts.path.name} is one image: the {role} of all {frames} frames"))
    elif shown < frames:
        raise RequestError(
            f"{role} {facts.path} shows {shown} frames at {fps:g} fps; {frames} are made",
            f"give one as long as {pose.path.name}, {'one image for all frames, ' * (role in STILL)}or pass "
            f"--frames {shown}",
            field=role,
            got=shown,
            allowed=frames,
        )
    other = abs(facts.width * pose.height - facts.height * pose.width) > SAME_SHAPE * facts.width * pose.height
    if role != "face" and other:
        raise RequestError(
            f"{role} {facts.path} is {facts.width}x{facts.height}, of another shape than {pose.path}, "
            f"{pose.width}x{pose.height}",
            "make both of one video: kinema drive --replace does",
            field=role,
            got=f"{facts.width}x{facts.height}",
            allowed=f"{pose.width}x{pose.height}",
        )
    return plan
