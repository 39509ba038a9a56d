"""VACE: side blocks that read control latents, masks and reference images, and hint at the main blocks.

Source: Wan-Video/Wan2.1 wan/modules/vace_model.py (Apache-2.0). Parity: tests/parity/test_wan_adapters.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.layers import Linear, map_once
from kinema.models.wan_blocks import Block, Context, Stream
from kinema.models.wan_config import PATCH, WanConfig
from kinema.tensors import VaceConditions

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT


class VaceBlock(Block):
    """A main block with a projection of its output, and for the first one of its input."""

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)


@dataclass(frozen=True)
class VaceState:
    """tokens_BLD: what VACE is told, embedded and projected."""

    tokens_BLD: Tensor
    scale: float


class Vace(Adapter):
    """Side block n runs right after main block layers[n], which gives what running them all first would.

    The official code runs all side blocks before the main ones and keeps their outputs; they only depend on the
    embedded input, so only one output has to exist at a time.
    """

    field = "vace"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.vace is not None
        self.layers = config.vace.layers
        self.vace_patch_embedding = nn.Conv3d(config.vace.in_channels, config.dim, kernel_size=PATCH, stride=PATCH)
        self.vace_blocks = nn.ModuleList(VaceBlock(config, first=n == 0) for n in range(len(self.layers)))

    def prepare(self, model: WanDiT, told: Sequence[VaceConditions]) -> list[VaceState]:
        tokens = map_once(partial(self._tokens, model), [given.context_BCFhw for given in told])
        return [VaceState(tokens_BLD, given.scale) for tokens_BLD, given in zip(tokens, told, strict=True)]

    def _tokens(self, model: WanDiT, context_BCFhw: Tensor) -> Tensor:
        context_BCFhw = context_BCFhw.to(self.vace_patch_embedding.weight.dtype)
        cells_BLD: Tensor = self.vace_patch_embedding(context_BCFhw).flatten(2).transpose(1, 2)

        def project(block: nn.Module, _: int, cells_BLD: Tensor) -> Tensor:
            tokens_BLD: Tensor = cast(VaceBlock, block).before_proj(cells_BLD)
            return tokens_BLD.float()

        return model.run_blocks(self.blocks[:1], project, cells_BLD)

    def embed(self, model: WanDiT, stream: Stream, state: VaceState) -> Stream:
        if state.tokens_BLD.shape[1] != stream.tokens_BLD.shape[1]:
            raise ValueError(
                f"the VACE context has {state.tokens_BLD.shape[1]} tokens, the latents {stream.tokens_BLD.shape[1]}"
            )
        return replace(stream, side_BLD=state.tokens_BLD + stream.tokens_BLD)

    def after_block(self, index: int, stream: Stream, context: Context, state: VaceState) -> Stream:
        if index not in self.layers or stream.side_BLD is None:
            return stream
        place = self.layers.index(index)
        block = self.blocks[place]
        context = replace(context, adapters=(), more_kv=())
        side_BLD = block(replace(stream, tokens_BLD=stream.side_BLD), context, place).tokens_BLD
        hint_BLD = block.after_proj(side_BLD).to(torch.float32)
        return replace(stream, tokens_BLD=stream.tokens_BLD + hint_BLD * state.scale, side_BLD=side_BLD)

    def companions(self, index: int) -> Iterable[nn.Module]:
        return [self.blocks[self.layers.index(index)]] if index in self.layers else []

    @property
    def blocks(self) -> list[VaceBlock]:
        return list(self.vace_blocks)  # type: ignore[arg-type]
