"""Blocks of the DiT compiled for training on a CPU, where elementwise work costs more than the matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kinema.models import wan_blocks
from kinema.models.wan import Block, Context, Stream, WanDiT


def rotate(x_BLNK: Tensor, rope_LK: Tensor) -> Tensor:
    """kinema's rotation in real float32 numbers: the compiler does not fuse complex ones. `rope_LK` holds cos, sin."""
    rope_LK2 = torch.view_as_real(rope_LK) if rope_LK.is_complex() else rope_LK
    cos, sin = (part[:, None] for part in rope_LK2.float().unbind(-1))
    even, odd = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BLNK.dtype)


def attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Plain attention: over so few tokens quicker, forwards and backwards, than a flash kernel."""
    scores_BNLL = (q_BNLK * q_BNLK.shape[-1] ** -0.5) @ k_BNLK.transpose(-1, -2)
    if attn_mask is not None:
        scores_BNLL = scores_BNLL + attn_mask
    return scores_BNLL.float().softmax(dim=-1).to(v_BNLK.dtype) @ v_BNLK


@dataclass(frozen=True)
class Made:
    """A KVCache of one block, filled outside what is compiled."""

    keys_values: tuple[Tensor, Tensor]

    def of(self, *_: object) -> tuple[Tensor, Tensor]:
        return self.keys_values


def compile_blocks(dit: WanDiT) -> None:
    """Swap the forward of each block of `dit` for one that is compiled, run once for each set of weights."""
    torch._dynamo.config.recompile_limit = 32
    wan_blocks.rotate = rotate  # type: ignore[assignment]  # only for this process, which only trains
    wan_blocks.F.scaled_dot_product_attention = attention
    one = torch.compile(
        lambda block, stream, context: Block.forward(block, stream, context, 0).tokens_BLD, dynamic=False
    )

    def forward(block: nn.Module, stream: Stream, context: Context, index: int) -> Stream:
        cross = block.cross_attn
        stream = replace(stream, rope_LK=torch.view_as_real(stream.rope_LK), attention=attention)
        tokens_BLD = one(block, stream, replace(context, text=Made(context.text.of(cross, cross.project))))
        return replace(stream, rope_LK=torch.view_as_complex(stream.rope_LK), tokens_BLD=tokens_BLD)

    for block in dit.blocks:
        block.forward = partial(forward, block)
