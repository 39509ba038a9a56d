"""The two nouns with tensors: Conditions (what the DiT is told) and Media (what writers accept).

Shape letters: B batch, C channel, T pixel frames, F latent frames, H W pixels, h w latent cells,
S text tokens, V vision tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What one guidance branch of a DiT is conditioned on, constant over a run. Batched; CPU or device tensors.

    text          one [S, D] tensor a batch entry: encoder rows of true length, without padding.
    clip_BVD      CLIP tokens [B, 257 or 514, 1280], None where the model has no CLIP branch.
    concat_BCFhw  channels concatenated after the noise (mask4 + image16), None where there are none.
    clean_BCFhw   normalised latents that overwrite the first latent frames, whose tokens then see t = 0.
    """

    text: tuple[Tensor, ...]
    clip_BVD: Tensor | None = None
    concat_BCFhw: Tensor | None = None
    clean_BCFhw: Tensor | None = None

    def to(self, device: torch.device | str) -> Conditions:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Conditions(
            tuple(text.to(device) for text in self.text),
            move(self.clip_BVD),
            move(self.concat_BCFhw),
            move(self.clean_BCFhw),
        )


@dataclass(frozen=True)
class Media:
    """Frames on their way to a file, some at a time, in order.

    chunks    iterator of frames_THWC, float32 in [0, 1] or uint8; consumed once.
    frames    how many frames there will be in all.
    """

    chunks: Iterator[Tensor]
    frames: int
    width: int
    height: int
    fps: float
    metadata: dict[str, str]
