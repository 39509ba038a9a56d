"""How input images and videos are brought to the video's size, rate and length: what is decided, noted, refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kinema.errors import CheckpointError, RequestError
from kinema.planning.geometry import LATENT_CHANNELS, frames_shown, whole_frames
from kinema.planning.restart import starts_from_video
from kinema.schema import AREAS, CatalogEntry, Facts, ImagePlan, MediaFacts, Note, Plan, Request, VideoPlan

VIDEO_ROLES = ("video", "control", "mask")
PLACE = re.compile(r"(.+)@(\d+)(%?)")
Channels = tuple[Literal["control", "mask", "masked", "start"], ...]


def plan_concat(entry: CatalogEntry, facts: Facts) -> Channels:
    """Return what the channels after the noise are: the DiT's number of them leaves one layout each.

    Source: Wan-Video/Wan2.2 wan/image2video.py; aigc-apps/VideoX-Fun videox_fun/pipeline (Apache-2.0).
    """
    if makes_its_own(entry):
        return ()
    file, z = facts.files["dit"], LATENT_CHANNELS[entry.vae]
    layouts: dict[int, Channels] = {
        0: (),
        z: ("start",),
        4 + z: ("mask", "masked"),
        2 * z: ("control", "start"),
        2 * z + 4: ("control", "mask", "masked"),
    }
    more = file.config["in_channels"] - z
    if more not in layouts:
        raise CheckpointError(
            f"{file.path} takes {more} channels besides the {z} of the noise; known are {list(layouts)}",
            "it is a model that is not known yet",
            path=str(file.path),
            found=more,
            allowed=list(layouts),
        )
    return layouts[more]


def makes_its_own(entry: CatalogEntry) -> bool:
    """Whether a model brings its inputs to size and length itself: it goes clip by clip, or makes images."""
    return bool(entry.family != "wan" or entry.structure.get("speech") or entry.structure.get("animate"))


# --- images --------------------------------------------------------------------------------------


def plan_images(
    request: Request, entry: CatalogEntry, facts: Facts, size: tuple[int, int], frames: int, notes: list[Note]
) -> tuple[ImagePlan, ...]:
    plans: list[ImagePlan] = []
    if request.one_frame:
        return _control_images(entry, facts, size, notes)
    for role in ("first", "last"):
        for media in facts.media.get(role, ()):
            derived = role == "first" and entry.by_area and (request.size is None or request.size in AREAS)
            overwrite = entry.first_frame == "overwrite"
            crop, filter = overwrite or not derived, "lanczos" if overwrite else "bicubic"
            plans.append(plan_image(role, media, size, notes, crop=crop, filter=filter))
    plans += _middle_images(request, facts, size, frames, notes)
    if not makes_its_own(entry):
        plans += [_reference(entry, media, size, notes) for media in facts.media.get("reference", ())]
    if request.last and not request.first and "mask" not in entry.takes:
        notes.append(
            Note(about="last", text=f"no first image: the released code of {entry.name} always gives its model one")
        )
    seen = _seen_by_clip(entry, plans)
    return tuple(plan.model_copy(update={"clip": plan in seen}) for plan in plans)


def _seen_by_clip(entry: CatalogEntry, plans: Sequence[ImagePlan]) -> Sequence[ImagePlan]:
    """Images whose CLIP tokens are seen: both of a first-last-frame model; else the one that is most like a first.

    Fun models were trained on zeros where there is no reference and no first image; an image-to-video model never was,
    and sees the last or middle one then.
    Source: Wan-Video/Wan2.1 wan; aigc-apps/VideoX-Fun examples/wan2.1_fun (Apache-2.0).
    """
    if not entry.structure.get("has_clip_tokens"):
        return ()
    if entry.structure.get("num_clip_positions"):
        return [plan for plan in plans if plan.role in ("first", "last")]
    order = ("first", "last", "middle") if "first" in entry.needs else ("reference", "first")
    return sorted((plan for plan in plans if plan.role in order), key=lambda plan: order.index(plan.role))[:1]


def _reference(entry: CatalogEntry, media: MediaFacts, size: tuple[int, int], notes: list[Note]) -> ImagePlan:
    """VACE shows a reference whole on a white canvas of the video's size; Fun Control has it fill the frame."""
    if not entry.structure.get("vace"):
        return plan_image("reference", media, size, notes, crop=True, filter="lanczos")
    plan = plan_image("reference", media, size, notes, crop=False, filter="bilinear", pad=True)
    if not _same_aspect(media, size):
        notes.append(Note(about="reference", text=f"{media.path.name} is shown whole on white, {size[0]}x{size[1]}"))
    return plan


def plan_image(
    role: str, media: MediaFacts, size: tuple[int, int], notes: list[Note], *, crop: bool, filter: str, **more: Any
) -> ImagePlan:
    """Return how a picture, or the last one of a video, is brought to a size; what that leaves out is noted.

    filter, more   fields of the ImagePlan.
    """
    if media.kind == "video":
        text = f"the last of the {media.frames} frames of {media.path.name} is where it goes on from"
        notes.append(Note(about=role, text=text))
    if crop and not _same_aspect(media, size):
        shape = f"{media.path.name} ({media.width}x{media.height})"
        notes.append(Note(about=role, text=f"{shape} is cropped at its centre to {size[0]}x{size[1]}"))
    if media.frames > 1 and media.kind == "image":
        notes.append(Note(about=role, text=f"{media.path.name} has {media.frames} frames; the first is taken"))
    if media.has_alpha:
        notes.append(Note(about=role, text=f"{media.path.name} has transparency, which is dropped"))
    given: dict[str, Any] = {"width": size[0], "height": size[1], "crop": crop, "filter": filter, **more}
    return ImagePlan(role=role, path=media.path, from_video=media.kind == "video", **given)


def split_place(text: str) -> tuple[Path, str | None]:
    """Return the path of a middle image and where it stands, as written; None where nothing is said of that."""
    match = PLACE.fullmatch(text)
    return (Path(match[1]), match[2] + match[3]) if match else (Path(text), None)


def _middle_images(
    request: Request, facts: Facts, size: tuple[int, int], frames: int, notes: list[Note]
) -> list[ImagePlan]:
    """Images of frames between the first and the last; RequestError for places that are not, or twice."""
    plans: list[ImagePlan] = []
    for text, media in zip(request.middle, facts.media.get("middle", ()), strict=True):
        place = split_place(text)[1] or "50%"
        frame = round((frames - 1) * int(place[:-1]) / 100) if place.endswith("%") else int(place)
        if not 0 < frame < frames - 1 or frame in [plan.frame for plan in plans]:
            why = "is taken already" if 0 < frame < frames - 1 else f"is not between the first and the last of {frames}"
            raise RequestError(
                f"middle {text}: frame {frame} {why}",
                f"pass --middle {media.path}@FRAME with another FRAME, 1 to {frames - 2}",
                field="middle",
                got=text,
                allowed=f"1 to {frames - 2}",
            )
        notes.append(
            Note(about="middle", text=f"frame {frame} shows {media.path.name}; the model was trained on the ends")
        )
        plans.append(plan_image("middle", media, size, notes, crop=True, filter="bicubic", frame=frame))
    return plans


def _control_images(
    entry: CatalogEntry, facts: Facts, size: tuple[int, int], notes: list[Note]
) -> tuple[ImagePlan, ...]:
    """Control images of one-frame inference, with their masks; the CLIP tokens are those of first and last image,
    and where these are not given, of the first and last control image."""
    masks = [media.path for media in facts.media.get("control_mask", ())]
    plans = []
    for index, media in enumerate(facts.media.get("control_image", ())):
        mask = masks[index] if index < len(masks) else None
        plans.append(plan_image("control_image", media, size, notes, crop=True, filter="lanczos", mask=mask))
    both = bool(entry.structure.get("num_clip_positions"))
    for role, place in (("first", 0), ("last", -1)) if both else (("first", 0),):
        given = facts.media.get(role, ())
        if given:
            plans.append(plan_image(role, given[0], size, notes, crop=False, filter="bicubic", clip=True))
        else:
            seen = len(facts.media["control_image"]) - 1 if place else 0
            plans[seen] = plans[seen].model_copy(update={"clip": True})
    return tuple(plans)


def _same_aspect(media: MediaFacts, size: tuple[int, int]) -> bool:
    """Whether the picture fits the size but for a column or row of tokens."""
    return abs(media.width * size[1] - media.height * size[0]) <= media.width * 16


# --- videos --------------------------------------------------------------------------------------


def length_of_inputs(request: Request, entry: CatalogEntry, facts: Facts, fps: float, notes: list[Note]) -> int:
    """Return the model's length, or that of the video whose frames decide those of the result, if it is shorter."""
    follows = request.mask or request.outpaint or starts_from_video(request, entry)
    role = "control" if request.control else "video" if request.video and follows else None
    if role is None or makes_its_own(entry):
        return entry.frames
    media = facts.media[role][0]
    whole = whole_frames(frames_shown(media, fps))
    if media.frames == 1 or whole >= entry.frames:
        return entry.frames
    notes.append(
        Note(about="frames", text=f"{whole}: as long as {media.path.name} at {fps:g} fps, a multiple of 4 and 1")
    )
    return whole


def plan_videos(
    request: Request,
    entry: CatalogEntry,
    facts: Facts,
    size: tuple[int, int],
    frames: int,
    fps: float,
    notes: list[Note],
) -> tuple[VideoPlan, ...]:
    """Return the videos as they are read.

    Raises RequestError for a control or mask that ends too early, a mask of another shape, and nothing left to make.
    """
    if makes_its_own(entry):
        return ()
    plans = {}
    for role in VIDEO_ROLES:
        for media in facts.media.get(role, ()):
            if role == "video" and starts_from_video(request, entry):
                return (_source(request, media, size, frames, fps, notes),)
            fit: Literal["crop", "whole"] = "whole" if request.outpaint and role != "control" else "crop"
            plans[role] = plan_video(role, media, size, frames, fps, notes, fit)
    if "mask" in plans:
        base = "video" if "video" in plans else "control"
        _check_mask(plans["mask"], plans[base], facts.media["mask"][0], facts.media[base][0])
    if "control" in plans and plans["control"].frames < frames:
        _short_control(entry, plans["control"], frames, notes)
    if "video" in plans:
        _check_room(request, plans["video"], facts.media["video"][0], size, frames, notes)
    return tuple(plans.values())


def _source(
    request: Request, media: MediaFacts, size: tuple[int, int], frames: int, fps: float, notes: list[Note]
) -> VideoPlan:
    """The video that sampling starts from: it has to be as long as the result."""
    plan = plan_video("source", media, size, frames, fps, notes)
    if plan.frames < frames:
        near = whole_frames(plan.frames)
        raise RequestError(
            f"video {plan.path} has {plan.frames} frames at {fps:g} fps; {frames} are to be made of it",
            f"pass --frames {near}, or a longer video",
            field="video",
            got=plan.frames,
            allowed=frames,
            nearest=near,
        )
    return plan


def plan_video(
    role: str,
    media: MediaFacts,
    size: tuple[int, int],
    frames: int,
    fps: float,
    notes: list[Note],
    fit: Literal["crop", "whole"] = "crop",
) -> VideoPlan:
    """Return how a video is brought to a size and rate, `frames` of it at most; what that leaves out is noted."""
    name, still = media.path.name, media.frames == 1
    shown = frames_shown(media, fps)
    if shown > frames and not still:
        notes.append(
            Note(about=role, text=f"of the {shown} frames of {name} at {fps:g} fps the first {frames} are used")
        )
    if media.fps and not still and abs(media.fps - fps) > 0.01:
        rate = f"{media.fps:.3g} fps, varying" if media.variable_rate else f"{media.fps:.4g} fps"
        notes.append(Note(about=role, text=f"{name} ({rate}) is read at {fps:g} fps"))
    if role != "mask" and not _same_aspect(media, size):
        done = "cropped at its centre to" if fit == "crop" else "shown whole inside"
        notes.append(Note(about=role, text=f"{name} ({media.width}x{media.height}) is {done} {size[0]}x{size[1]}"))
    if media.has_alpha:
        notes.append(Note(about=role, text=f"{name} has transparency, which is shown as black"))
    return VideoPlan(
        role=role,
        path=media.path,
        files=media.files,
        fps=fps,
        frames=min(shown, frames),
        still=still,
        width=size[0],
        height=size[1],
        fit=fit,
    )


def _check_mask(mask: VideoPlan, base: VideoPlan, mask_facts: MediaFacts, facts: MediaFacts) -> None:
    """Raise unless the mask covers the video it masks, in time and in space."""
    if abs(mask_facts.width * facts.height - mask_facts.height * facts.width) > 0.02 * mask_facts.width * facts.height:
        raise RequestError(
            f"mask {mask.path} is {mask_facts.width}x{mask_facts.height}, of another shape than {base.path}, "
            f"{facts.width}x{facts.height}",
            f"make it {facts.width}x{facts.height}, or of that aspect",
            field="mask",
            got=f"{mask_facts.width}x{mask_facts.height}",
            allowed=f"{facts.width}x{facts.height}",
        )
    if not mask.still and mask.frames < base.frames:
        raise RequestError(
            f"mask {mask.path} has {mask.frames} frames at {mask.fps:g} fps; {base.path} has {base.frames}",
            f"give a mask as long, one image for all frames, or pass --frames {whole_frames(mask.frames)}",
            field="mask",
            got=mask.frames,
            allowed=base.frames,
        )


def _short_control(entry: CatalogEntry, control: VideoPlan, frames: int, notes: list[Note]) -> None:
    if entry.structure.get("vace"):
        text = f"{control.path.name} ends with frame {control.frames} of {frames}; what follows is not controlled"
        notes.append(Note(about="control", text=text))
        return
    near = whole_frames(control.frames)
    raise RequestError(
        f"control {control.path} has {control.frames} frames at {control.fps:g} fps; the video has {frames}",
        f"pass --frames {near}, or a longer control video",
        field="control",
        got=control.frames,
        allowed=frames,
        nearest=near,
    )


def _check_room(
    request: Request, video: VideoPlan, media: MediaFacts, size: tuple[int, int], frames: int, notes: list[Note]
) -> None:
    """Raise where a video would be kept whole and leave nothing to make; note what follows on its end."""
    bars = request.outpaint and not _same_aspect(media, size)
    if video.frames < frames:
        text = f"frames {video.frames + 1} to {frames} follow on {video.path.name} and are made"
        notes.append(Note(about="video", text=text))
    elif not (request.mask or bars):
        raise RequestError(
            f"video {video.path} fills all {frames} frames of {size[0]}x{size[1]}: nothing is left to make",
            f"pass --mask, --outpaint with another --size, or more frames, --frames {video.frames // 4 * 4 + 5}",
            field="video",
            got=str(video.path),
        )


# --- what is encoded -------------------------------------------------------------------------------


def encodes(plan: Plan) -> bool:
    """Whether images or videos are encoded before sampling. VACE encodes empty ones where none are given."""
    return bool(plan.images or plan.videos or _has(plan, "vace"))


def encoded_latent_frames(plan: Plan) -> int:
    """How many latent frames of inputs the VAE encodes."""
    if plan.flux is not None:
        return len(plan.images)
    if plan.one_frame is not None:
        return len(plan.one_frame.positions)
    roles = {image.role for image in plan.images} | {video.role for video in plan.videos}
    frames = plan.latent[1] - plan.reference_frames
    known = bool(roles & {"first", "last", "middle", "video"})
    count = 2 * frames + plan.reference_frames if _has(plan, "vace") else 0
    count += frames * (("control" in plan.concat and "control" in roles) + ("masked" in plan.concat and known))
    count += frames * ("source" in roles) + ("start" in plan.concat and "first" in roles)
    count += plan.first_frame == "overwrite" and "masked" not in plan.concat
    return count + (_has(plan, "reference") and "reference" in roles)


def _has(plan: Plan, adapter: str) -> bool:
    return any(ref.config.get(adapter) for ref in plan.experts.values())
