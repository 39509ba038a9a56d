"""Fun control with a reference image: its latents become tokens in front of the video's.

Source: aigc-apps/VideoX-Fun videox_fun/models/wan_transformer3d.py (Apache-2.0).
Parity: tests/parity/test_wan_adapters.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.layers import map_once, rope_at
from kinema.models.wan_blocks import Stream
from kinema.models.wan_config import PATCH, WanConfig
from kinema.tensors import ReferenceConditions

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT


class Reference(Adapter):
    """The reference takes the place of latent frame 0 in rotary positions; the video's frames follow from 1."""

    field = "reference"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.reference is not None
        self.ref_conv = nn.Conv2d(config.reference.in_channels, config.dim, kernel_size=PATCH[1:], stride=PATCH[1:])

    def prepare(self, model: WanDiT, told: Sequence[ReferenceConditions]) -> list[Tensor]:
        return map_once(self._tokens, told)

    def _tokens(self, told: ReferenceConditions) -> Tensor:
        cells: Tensor = self.ref_conv(told.latent_BChw.to(self.ref_conv.weight.dtype))
        return cells.flatten(2).transpose(1, 2).float()

    def embed(self, model: WanDiT, stream: Stream, state: Tensor) -> Stream:
        frames, rows, columns = stream.grid
        if state.shape[1] != rows * columns:
            raise ValueError(f"the reference has {state.shape[1]} tokens, a latent frame {rows * columns}")
        noisy = _at_last_timestep(stream, state.shape[1])
        places, rope = (range(frames + 1), range(rows), range(columns)), stream.rope_LK
        return replace(
            noisy,
            tokens_BLD=torch.cat([state, stream.tokens_BLD], dim=1),
            rope_LK=rope_at(places, model.config.head_dim, dtype=rope.dtype, device=rope.device),
            front=state.shape[1],
        )


def _at_last_timestep(stream: Stream, count: int) -> Stream:
    """Modulate `count` tokens in front as the last frames are, which are noisy also where the first ones are given."""
    if len(stream.segments) == 1:
        return replace(stream, segments=(count + stream.segments[0],))
    return replace(
        stream,
        time_BRD=torch.cat([stream.time_BRD[:, -1:], stream.time_BRD], dim=1),
        modulation_BR6D=torch.cat([stream.modulation_BR6D[:, -1:], stream.modulation_BR6D], dim=1),
        segments=(count, *stream.segments),
    )
