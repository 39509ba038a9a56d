"""Animate, clip by clip: skeleton and face of each clip, the scene, the reference, the frames of the clip before.

Source: Wan-Video/Wan2.2 wan/animate.py (Apache-2.0). Parity: tests/parity/test_animate_clips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema import ops
from kinema.clips.loop import Branches, Models
from kinema.media.frames import in_fours, to_video_range
from kinema.media.image import read_image
from kinema.media.pixels import fit_pixels
from kinema.media.reader import read_video
from kinema.media.window import Window
from kinema.models.encoders import ClipVision
from kinema.models.wan_vae import WanVAE
from kinema.planning.clips import back_and_forth
from kinema.sampling.denoiser import Branch, noise
from kinema.schema import ClipPlan, Note, Plan, VideoPlan
from kinema.tensors import AnimateConditions, Conditions

EMPTY = 0.1
"""A mask nowhere lighter shows nobody: video codecs leave traces of the frames before."""


@dataclass(frozen=True)
class Driving:
    """The 4n+1 frames that drive one clip, in [-1, 1], all of the video's size but the square faces.

    scene_CTHW   what surrounds the person, who is replaced; None in animation mode.
    person_THW   1 where the person is made anew, 0 where the scene stays, in [0, 1]; None in animation mode.
    """

    pose_CTHW: Tensor
    face_CTHW: Tensor
    scene_CTHW: Tensor | None = None
    person_THW: Tensor | None = None


class DrivingVideos:
    """The driving videos of a run, read on from clip to clip.

    Raises RequestError where one cannot be read or ends before it should.
    """

    def __init__(self, videos: Sequence[VideoPlan], clip_frames: int) -> None:
        self._videos = {video.role: video for video in videos}
        self._windows = {
            video.role: Window(_frames(video), clip_frames, f"--{video.role} {video.path}") for video in videos
        }

    def take(self, numbers: Sequence[int]) -> Driving:
        """Return the frames of these numbers, in this order, some perhaps more than once."""
        person_THW = scene_CTHW = None
        if "mask" in self._videos:
            person_THW = torch.stack([frame[..., 0].float() / 255 for frame in self._read("mask", numbers)])
            scene_CTHW = self._scene(numbers, person_THW)
        return Driving(self._pixels("pose", numbers), self._pixels("face", numbers), scene_CTHW, person_THW)

    def _scene(self, numbers: Sequence[int], person_THW: Tensor) -> Tensor:
        """The background; where only the video itself is there, that with black in place of the person."""
        if "background" in self._videos:
            return self._pixels("background", numbers)
        return (self._pixels("video", numbers) + 1) * (1 - person_THW) - 1

    def _pixels(self, role: str, numbers: Sequence[int]) -> Tensor:
        return torch.stack([to_video_range(frame_HWC) for frame_HWC in self._read(role, numbers)], dim=1)

    def _read(self, role: str, numbers: Sequence[int]) -> list[Tensor]:
        video = self._videos[role]
        return [
            fit_pixels(frame_HWC, video.width, video.height, "crop") for frame_HWC in self._windows[role].take(numbers)
        ]


def _frames(video: VideoPlan) -> Iterator[Tensor]:
    return cycle(read_video(video.path)) if video.still else read_video(video.path, fps=video.fps)


def reference_channels(vae: WanVAE, reference_CHW: Tensor, tile: int | None = None) -> Tensor:
    """Return the channels of the latent frame in front: ones, for it is given, and the reference's latents."""
    latents_BCFhw = vae.encode(reference_CHW[None, :, None], tile=tile)
    return torch.cat([torch.ones_like(latents_BCFhw[:, :4]), latents_BCFhw], dim=1)


def clip_channels(vae: WanVAE, driving: Driving, before_CTHW: Tensor | None, chunk: int, tile: int | None) -> Tensor:
    """Return mask4 + latents, [1, 4 + z, F, h, w], of what of a clip is given: the scene and the frames before it.

    before_CTHW   the last frames of the clip before, in [-1, 1], that this one begins with; None for the first clip.

    What is not given is grey, with a mask of 0.
    """
    known_CTHW = torch.zeros_like(driving.pose_CTHW) if driving.scene_CTHW is None else driving.scene_CTHW
    overlap = 0 if before_CTHW is None else before_CTHW.shape[1]
    if before_CTHW is not None:
        known_CTHW = torch.cat([before_CTHW, known_CTHW[:, overlap:]], dim=1)
    latents_BCFhw = vae.encode(known_CTHW[None], chunk=chunk, tile=tile)
    size = latents_BCFhw.shape[3:]
    keep_Thw = torch.zeros(known_CTHW.shape[1], *size)
    if driving.person_THW is not None:
        keep_Thw = 1 - F.interpolate(driving.person_THW[:, None], size, mode="nearest")[:, 0]
    keep_Thw[:overlap] = 1
    return torch.cat([in_fours(keep_Thw)[None].to(latents_BCFhw), latents_BCFhw], dim=1)


@dataclass
class AnimateClips:
    """The task of Animate.

    texts             rows of the prompt, and of the negative prompt where there is guidance.
    clip_BVD          CLIP tokens of the reference image, at the video's size; and its channels, see reference_channels.
    """

    plan: Plan
    models: Models
    texts: Mapping[Branch, Tensor]
    clip_BVD: Tensor
    reference_BCFhw: Tensor
    videos: DrivingVideos

    def __post_init__(self) -> None:
        assert self.plan.animate is not None
        self.history_frames = self.plan.animate.overlap
        self._notes: list[Note] = []

    @property
    def vae(self) -> WanVAE:
        # Asked for each time: it may have made room for the DiT in between.
        return cast(WanVAE, self.models(self.plan.vae))

    def opening(self) -> Tensor:
        return torch.zeros(0, self.plan.height, self.plan.width, 3)

    def before(self, number: int, history_THWC: Tensor) -> Tensor | None:
        return history_THWC.permute(3, 0, 1, 2) * 2 - 1 if number else None

    def conditions(self, number: int, clip: ClipPlan, before: Tensor | None) -> Branches:
        vae, chunk, tile = self.vae, self.plan.chunk, self.plan.tile
        driving = self.videos.take(back_and_forth(self.plan.frames, clip.start, clip.frames))
        self._notes = list(_told_empty(number, clip, driving.person_THW))
        channels_BCFhw = torch.cat([self.reference_BCFhw, clip_channels(vae, driving, before, chunk, tile)], dim=2)
        pose_BCFhw = vae.encode(driving.pose_CTHW[None], chunk=chunk, tile=tile)
        face_BCTHW = driving.face_CTHW[None]
        # Guidance pushes away from a person without a face, not only from the negative prompt.
        faces: dict[Branch, Tensor] = {"cond": face_BCTHW, "uncond": torch.full_like(face_BCTHW[:, :, :1], -1)}
        told = {branch: AnimateConditions(pose_BCFhw, face) for branch, face in faces.items()}
        return {
            branch: Conditions((rows,), self.clip_BVD, channels_BCFhw, animate=told[branch])
            for branch, rows in self.texts.items()
        }

    def notes(self) -> Iterable[Note]:
        told, self._notes = self._notes, []
        return told

    def noise(self, number: int, seed: int) -> Tensor:
        """One generator for all clips, as the official code has it: each draws on from where the last one ended."""
        return noise(seed, (1, *self.plan.latent), draw=number)

    def decode(self, clip: ClipPlan, latents_CFhw: Tensor, before: Tensor | None) -> Iterator[Tensor]:
        """The latent frame in front is the reference's, and no part of the video."""
        yield from ops.decode_frames(self.vae, latents_CFhw[:, 1:], self.plan)


def _told_empty(number: int, clip: ClipPlan, person_THW: Tensor | None) -> Iterator[Note]:
    if person_THW is not None:
        empty = int((person_THW[clip.skip : clip.skip + clip.shown].amax((1, 2)) < EMPTY).sum())
        if empty:
            text = f"empty in {empty} of the {clip.shown} frames of clip {number + 1}: nobody is replaced there"
            yield Note(about="mask", text=text)


@torch.inference_mode()
def animate_clips(plan: Plan, models: Models, texts: Mapping[Branch, Tensor], stop: Callable[[], None]) -> AnimateClips:
    """Return the task of a plan, its reference image encoded."""
    assert plan.animate is not None and plan.clip_vision is not None
    image = next(image for image in plan.images if image.role == "reference")
    pixels_HWC = fit_pixels(read_image(image.path)[0], image.width, image.height, "pad")
    reference_CHW = to_video_range(pixels_HWC)
    clip_BVD = cast(ClipVision, models(plan.clip_vision)).encode(reference_CHW[None])
    stop()
    reference_BCFhw = reference_channels(cast(WanVAE, models(plan.vae)), reference_CHW, plan.tile)
    videos = DrivingVideos(plan.videos, plan.clips[0].frames)
    return AnimateClips(plan, models, texts, clip_BVD, reference_BCFhw, videos)
