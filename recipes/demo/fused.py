"""Blocks of the DiT compiled for training on a CPU, where elementwise work costs more than the matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kinema.models import wan
from kinema.models.wan import Context, Stream, WanDiT


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


def compile_blocks(dit: WanDiT) -> None:
    """Swap the block runner of `dit` for one compiled block, run once for each set of weights."""
    torch._dynamo.config.recompile_limit = 32
    wan.rotate = rotate  # type: ignore[assignment]  # only for this process, which only trains
    wan.F.scaled_dot_product_attention = attention
    step = torch.compile(lambda block, stream, context: block(stream, context, 0).tokens_BLD, dynamic=False)

    def run(blocks: Iterable[nn.Module], stream: Stream, context: Context) -> Stream:
        stream = replace(stream, rope_LK=torch.view_as_real(stream.rope_LK), attention=attention)
        for block, kv in zip(blocks, context.kv, strict=True):
            stream = replace(stream, tokens_BLD=step(block, stream, replace(context, kv=(kv,))))
        return stream

    dit.run_blocks = run
