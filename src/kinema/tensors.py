"""The two nouns with tensors: Conditions (what the DiT is told) and Media (what writers accept).

Shape letters: B batch, C channel, T pixel frames, F latent frames, H W pixels, h w latent cells,
S text tokens, V vision tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinema.schema import SoundPlan


@dataclass(frozen=True)
class VaceConditions:
    """What VACE is told.

    context_BCFhw  inactive latents, reactive latents, mask: 96 channels, as many latent frames as the noise has.
    scale          how strongly the side blocks' hints count; 1 is as trained.
    """

    context_BCFhw: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class CameraConditions:
    """The camera's path: Pluecker coordinates of every pixel, four frames a latent frame.

    frames  pluecker_BCHW of each latent frame, in order, gone through at every `prepare`: 24 channels, coordinate by
            coordinate (o x d, then d), the four frames of each. All at once they would take 2.7 GB at 1280x704x121.
    """

    frames: Iterable[Tensor]


@dataclass(frozen=True)
class ReferenceConditions:
    """The normalised latent of a reference image, of the video's size."""

    latent_BChw: Tensor


@dataclass(frozen=True)
class AnimateConditions:
    """What Animate is told of a segment.

    pose_BCFhw   normalised latents of the skeleton video: one frame fewer than the noise, whose first is the reference.
    face_BCTHW   face crops in [-1, 1], 4n+1 for n+1 of those latent frames; or a single one that stands for all.
    """

    pose_BCFhw: Tensor
    face_BCTHW: Tensor


@dataclass(frozen=True)
class SpeechConditions:
    """What S2V is told of one clip.

    audio_BLDT       hidden states of the speech encoder, one column a pixel frame of the clip.
    reference_BCFhw  normalised latent of the reference image, one latent frame.
    motion_BCFhw     normalised latents of the frames before the clip, newest last; None: the clip follows nothing.
    pose_BCFhw       normalised latents of the pose video, as many as the clip's; None without one.
    history_frames   latent frames of time before the clip, through which its first sound is held.
    """

    audio_BLDT: Tensor
    reference_BCFhw: Tensor
    motion_BCFhw: Tensor | None = None
    pose_BCFhw: Tensor | None = None
    history_frames: int = 19


@dataclass(frozen=True)
class FluxConditions:
    """What FLUX is told besides text rows.

    pooled_BD  pooled CLIP text, one vector a batch entry.
    guidance   guidance scale the model was distilled with as an input; None where it has none (schnell).
    images     normalised latents_BCFhw of images to attend to (Kontext), of any even size.
    """

    pooled_BD: Tensor
    guidance: float | None = None
    images: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Conditions:
    """What one guidance branch of a DiT is conditioned on, constant over a run. Batched; CPU or device tensors.

    text          one [S, D] tensor a batch entry: encoder rows of true length, without padding.
    clip_BVD      CLIP tokens [B, 257 or 514, 1280], None where the model has no CLIP branch.
    concat_BCFhw  channels concatenated after the noise (mask4 + image16), None where there are none.
    clean_BCFhw   normalised latents that overwrite the first latent frames, whose tokens then see t = 0.
    source_BCFhw  normalised latents of a video that sampling starts from, noised; None: it starts from noise.
    positions     place in time of each latent frame, for the rotary embedding; None: 0, 1, 2 ...
    motion_B6D    added to what modulates the blocks, at every timestep; None without a motion controller.
    vace, ...     what each adapter is told, None where it is not used.
    flux          what FLUX takes besides, None for Wan.
    """

    text: tuple[Tensor, ...]
    clip_BVD: Tensor | None = None
    concat_BCFhw: Tensor | None = None
    clean_BCFhw: Tensor | None = None
    source_BCFhw: Tensor | None = None
    positions: tuple[int, ...] | None = None
    motion_B6D: Tensor | None = None
    vace: VaceConditions | None = None
    camera: CameraConditions | None = None
    reference: ReferenceConditions | None = None
    animate: AnimateConditions | None = None
    speech: SpeechConditions | None = None
    flux: FluxConditions | None = None

    def to(self, device: torch.device | str) -> Conditions:
        return on_device((self,), device)[0]


def on_device(branches: Sequence[Conditions], device: torch.device | str) -> list[Conditions]:
    """Return conditions with every tensor on `device`; what is one object in several of them is one there too."""
    there: dict[int, Any] = {}
    return [_moved(conditions, device, there) for conditions in branches]


def _moved(value: Any, device: torch.device | str, there: dict[int, Any]) -> Any:
    """The same value with every tensor in it on `device`; `there`: what is already, by the id of what it was."""
    if id(value) in there:
        return there[id(value)]
    moved = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, tuple):
        moved = tuple(_moved(item, device, there) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(
            value, **{item.name: _moved(getattr(value, item.name), device, there) for item in fields(value)}
        )
    there[id(value)] = moved
    return moved


@dataclass(frozen=True)
class Media:
    """Frames on their way to a file, some at a time, in order.

    chunks    iterator of frames_THWC, float32 in [0, 1] or uint8; consumed once.
    frames    how many frames there will be in all.
    audio     sound for containers that can hold it, mp4 and webm.
    """

    chunks: Iterator[Tensor]
    frames: int
    width: int
    height: int
    fps: float
    metadata: dict[str, str]
    audio: SoundPlan | None = None
