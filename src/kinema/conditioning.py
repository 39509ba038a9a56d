"""Input images, videos and camera paths become what the DiT is told: channels, clean frames, adapter inputs.

What is read, and how it is fitted, is in the Plan. What a model does with a mask, a control or a reference is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from kinema.errors import RequestError
from kinema.media.camera import Rays, camera_poses
from kinema.media.frames import crop_to, fit_inside, pack_mask, resize, to_video_range, unshuffle_mask
from kinema.media.image import read_image
from kinema.media.reader import read_video
from kinema.models.adapters.speed import MotionController
from kinema.models.encoders import ClipVision
from kinema.models.wan_vae import WanVAE
from kinema.planning.geometry import whole_frames
from kinema.schema import ImagePlan, ModelRef, OneFramePlan, Plan, VideoPlan
from kinema.tensors import CameraConditions, Conditions, ReferenceConditions, VaceConditions

WHITE, GREY = 1.0, 0.0

Encode = Callable[[Tensor], Tensor]
"""encode(video_CTHW) -> latents_BCFhw of one entry, by the VAE as the plan uses it; loaded when first called."""


@torch.inference_mode()
def media_conditions(plan: Plan, load: Callable[[ModelRef], nn.Module]) -> Conditions:
    """Return the conditions of a plan's images, videos and camera, without texts.

    load  recipe -> loaded module; asked for the CLIP and VAE encoders and the motion controller, each only where it
          is used.
    """
    clip = None if plan.clip_vision is None else _clip_tokens(plan, plan.clip_vision, load)
    adapters = next(iter(plan.experts.values())).config

    def encode(video_CTHW: Tensor) -> Tensor:
        vae = cast(WanVAE, load(plan.vae))
        return vae.encode(video_CTHW[None], chunk=plan.chunk, tile=plan.tile)

    if plan.one_frame is not None:
        channels_BCFhw = one_frame_channels(plan, plan.one_frame, encode)
        return Conditions((), clip, channels_BCFhw, positions=plan.one_frame.positions)
    canvas = Canvas.of(plan) if adapters.get("vace") or plan.concat else None
    concat, clean = _channels(plan, canvas, encode)
    motion_B6D = None
    if plan.motion is not None:
        motion_B6D = cast(MotionController, load(plan.motion.controller))(plan.motion.bucket_id)
    return Conditions(
        (),
        clip,
        concat,
        clean,
        source_BCFhw=_video_latents(plan, "source", encode),
        motion_B6D=motion_B6D,
        vace=_vace(plan, cast(Canvas, canvas), encode) if adapters.get("vace") else None,
        camera=CameraConditions(Rays.of(camera_poses(plan.camera), plan.width, plan.height)) if plan.camera else None,
        reference=_reference(plan, encode) if adapters.get("reference") else None,
    )


# --- read ----------------------------------------------------------------------------------------


def read_planned(image: ImagePlan) -> Tensor:
    """Return image_CHW float32 in [-1, 1] at the size the plan gives it."""
    pixels_CHW = to_video_range(_pixels(image))
    if image.pad:
        return fit_inside(pixels_CHW, image.width, image.height, image.filter, WHITE)[0]
    fit = crop_to if image.crop else resize
    return fit(pixels_CHW, image.width, image.height, image.filter)


def _pixels(image: ImagePlan) -> Tensor:
    """The image as it is stored, uint8 [H, W, 3]; of a video its last frame, read through to there."""
    if not image.from_video:
        return read_image(image.path)[0]
    newest = deque(read_video(image.path), maxlen=1)
    return newest[0]


def read_frames(video: VideoPlan) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (frame_CHW float32 in [-1, 1], bars_HW or None) of each planned frame, at the planned size.

    Raises RequestError where the video ends before the plan says.
    """
    count = 0
    for pixels_HWC in read_video(video.path, fps=video.fps, frames=video.frames):
        frame_CHW, count = to_video_range(pixels_HWC), count + 1
        if video.fit == "whole":
            yield fit_inside(frame_CHW, video.width, video.height, "lanczos", GREY)
        else:
            yield crop_to(frame_CHW, video.width, video.height, "lanczos"), None
    if count < video.frames:
        raise RequestError(
            f"{video.role} {video.path} ends after {count} frames at {video.fps:g} fps, not the {video.frames} planned",
            f"pass --frames {whole_frames(count)}",
            field=video.role,
            got=count,
            allowed=video.frames,
        )


# --- what is known of the result -----------------------------------------------------------------


class Canvas:
    """The result so far as it is given: known pixels, and where they are to be made.

    known_CTHW  in [-1, 1], 0 (grey) where unknown.
    mask_1THW   1 where it is to be made, 0 where it is known.
    """

    def __init__(self, frames: int, height: int, width: int) -> None:
        self.known_CTHW = torch.zeros(3, frames, height, width)
        self.mask_1THW = torch.ones(1, frames, height, width)

    @classmethod
    def of(cls, plan: Plan) -> Canvas:
        """Lay the plan's source video down, then first and last image; of VACE, a masked control may be the source."""
        canvas = cls(plan.frames, plan.height, plan.width)
        videos = {video.role: video for video in plan.videos}
        source = videos.get("video") or (videos.get("control") if "mask" in videos else None)
        if source is not None:
            masks = _mask_frames(videos["mask"], source.frames) if "mask" in videos else None
            for index, (frame_CHW, bars_HW) in enumerate(read_frames(source)):
                canvas.put(index, frame_CHW, next(masks) if masks else None)
                if bars_HW is not None:
                    canvas.mask_1THW[:, index, bars_HW] = 1
        for image in plan.images:
            if image.role in ("first", "middle", "last"):
                place = {"first": 0, "last": plan.frames - 1}.get(image.role, image.frame)
                canvas.put(cast(int, place), read_planned(image), None)
        canvas.known_CTHW *= 1 - canvas.mask_1THW
        return canvas

    def put(self, index: int, frame_CHW: Tensor, mask_HW: Tensor | None) -> None:
        self.known_CTHW[:, index] = frame_CHW
        self.mask_1THW[:, index] = 0 if mask_HW is None else mask_HW

    @property
    def empty(self) -> bool:
        return bool(self.mask_1THW.all())


def _mask_frames(mask: VideoPlan, count: int) -> Iterator[Tensor]:
    """Yield mask_HW, 1 where it is white; a still one for every frame."""
    for frame_CHW, bars_HW in read_frames(mask):
        white_HW = (frame_CHW.mean(0) > GREY).float()
        if bars_HW is not None:
            white_HW[bars_HW] = 1
        yield from [white_HW] * (count if mask.still else 1)


# --- channels after the noise --------------------------------------------------------------------


def _channels(plan: Plan, canvas: Canvas | None, encode: Encode) -> tuple[Tensor | None, Tensor | None]:
    """Return (concat_BCFhw, clean_BCFhw), None for what this model does not take."""
    overwrite = plan.first_frame == "overwrite"
    if canvas is None or not plan.concat:
        first = next((image for image in plan.images if image.role == "first"), None)
        return None, encode(read_planned(first)[:, None]) if overwrite and first else None
    channels, frames, h, w = plan.latent
    nothing = torch.zeros(1, channels, frames - plan.reference_frames, h, w)
    parts: dict[str, Tensor] = dict.fromkeys(plan.concat, nothing)
    control_BCFhw = _video_latents(plan, "control", encode) if "control" in parts else None
    if control_BCFhw is not None:
        parts["control"] = control_BCFhw
    if "start" in parts and not canvas.mask_1THW[:, 0].any():
        first_BCFhw = encode(canvas.known_CTHW[:, :1])
        parts["start"] = torch.cat([first_BCFhw, nothing[:, :, 1:].to(first_BCFhw)], dim=2)
    if "masked" in parts:
        # Not the code of a grey video: with nothing known the models were trained on zeros.
        parts["masked"] = nothing if canvas.empty else encode(canvas.known_CTHW)
        parts["mask"] = pack_mask(1 - canvas.mask_1THW if not canvas.empty else 0 * canvas.mask_1THW, h, w)[None]
    clean = parts["masked"][:, :, :1] if overwrite else None
    device = max((part.device for part in parts.values()), key=lambda device: device.type != "cpu")
    return torch.cat([parts[name].to(device) for name in plan.concat], dim=1), clean


def _video_latents(plan: Plan, role: str, encode: Encode) -> Tensor | None:
    """Latents of the video of a role; None where there is none."""
    for video in plan.videos:
        if video.role == role:
            return encode(torch.stack([frame_CHW for frame_CHW, _ in read_frames(video)], dim=1))
    return None


def one_frame_channels(plan: Plan, one: OneFramePlan, encode: Encode) -> Tensor:
    """Return mask4 + image channels [1, 4 + z, F, h, w] of one-frame inference: each latent frame encoded alone, mask
    1 and the control image's latents where there is one, 0 and those of grey where the picture is made.

    A control mask is 1 where its image counts; elsewhere the image is grey and the mask 0, as models of this layout
    have it (`pack_mask`).
    Source of the rest: kohya-ss/musubi-tuner src/musubi_tuner/wan_generate_video.py (Apache-2.0).
    """
    _, frames, h, w = plan.latent
    latents = [torch.empty(0)] * frames
    mask_BCFhw = torch.zeros(1, 4, frames, h, w)
    latents[one.target] = encode(torch.zeros(3, 1, plan.height, plan.width))
    images = [image for image in plan.images if image.role == "control_image"]
    for slot, image in zip(one.controls, images, strict=True):
        known_1THW = torch.ones(1, 1, plan.height, plan.width)
        if image.mask is not None:
            white_CHW = crop_to(to_video_range(read_image(image.mask)[0]), image.width, image.height, "lanczos")
            known_1THW[0, 0] = (white_CHW.mean(0) > GREY).float()
        latents[slot] = encode(read_planned(image)[:, None] * known_1THW)
        mask_BCFhw[0, :, slot] = pack_mask(known_1THW, h, w)[:, 0]
    latents_BCFhw = torch.cat(latents, dim=2)
    return torch.cat([mask_BCFhw.to(latents_BCFhw), latents_BCFhw], dim=1)


# --- adapters ------------------------------------------------------------------------------------


def _vace(plan: Plan, canvas: Canvas, encode: Encode) -> VaceConditions:
    """What is kept, what guides, and where: 96 channels, references in front.

    Source: Wan-Video/Wan2.1 wan/vace.py (Apache-2.0). Where both a video and a control are given, the video is what is
    outside of the mask and the control what is inside.
    """
    guide_CTHW = torch.zeros_like(canvas.known_CTHW)
    for video in plan.videos:
        if video.role == "control":
            for index, (frame_CHW, _) in enumerate(read_frames(video)):
                guide_CTHW[:, index] = frame_CHW
    inactive_BCFhw, reactive_BCFhw = encode(canvas.known_CTHW), encode(guide_CTHW * canvas.mask_1THW)
    stride = plan.width // plan.latent[3]
    mask_BCFhw = unshuffle_mask(canvas.mask_1THW, stride)[None].to(inactive_BCFhw)
    context_BCFhw = torch.cat([inactive_BCFhw, reactive_BCFhw, mask_BCFhw], dim=1)
    references = [encode(read_planned(image)[:, None]) for image in plan.images if image.role == "reference"]
    rest = context_BCFhw.shape[1] - plan.latent[0]
    padded = [torch.nn.functional.pad(latent, (0, 0, 0, 0, 0, 0, 0, rest)) for latent in references]
    return VaceConditions(torch.cat([*padded, context_BCFhw], dim=2), plan.control_scale)


def _reference(plan: Plan, encode: Encode) -> ReferenceConditions:
    """The latent of the reference image; zeros without one, as such models were trained."""
    for image in plan.images:
        if image.role == "reference":
            return ReferenceConditions(encode(read_planned(image)[:, None])[:, :, 0])
    channels, _, h, w = plan.latent
    return ReferenceConditions(torch.zeros(1, channels, h, w))


def _clip_tokens(plan: Plan, ref: ModelRef, load: Callable[[ModelRef], nn.Module]) -> Tensor:
    """CLIP tokens [1, 257 or 514, 1280] of the images that are seen, at their own resolution; zeros without any."""
    seen = [image for image in plan.images if image.clip]
    if not seen:
        tokens = (ref.config["image_size"] // ref.config["patch_size"]) ** 2 + 1
        return torch.zeros(1, tokens, ref.config["dim"])
    clip = cast(ClipVision, load(ref))
    return torch.cat([clip.encode(to_video_range(_pixels(image))[None]) for image in seen], dim=1)
