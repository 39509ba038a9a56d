"""Layers that models share: leaf Linear, norms, rotary positions, modulation by segment, plain attention.

Owns arithmetic and its dtypes. Knows nothing of variants, files, devices or schedules.

Shape letters: B batch, L tokens, S text tokens, D width, N heads, K head dim, R distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attention(q_BNLK, k_BNLK, v_BNLK) -> BNLK: softmax(q k^T / sqrt(K)) v, in the inputs' dtype."""

Made = TypeVar("Made")
State = TypeVar("State")


class RunBlocks(Protocol):
    """run_blocks(blocks, step, state) -> state after `state = step(block, index, state)` of each block in order.

    Within `step`, and only there, the weights of the block are on the device: a runner may bring them from elsewhere.
    """

    def __call__(
        self, blocks: Iterable[nn.Module], step: Callable[[nn.Module, int, State], State], state: State, /
    ) -> State: ...


def run_in_order(blocks: Iterable[nn.Module], step: Callable[[nn.Module, int, State], State], state: State) -> State:
    """Run blocks whose weights are where they belong: the default of every model."""
    for index, block in enumerate(blocks):
        state = step(block, index, state)
    return state


def map_once(make: Callable[..., Made], *given: Sequence[Any]) -> list[Made]:
    """Return what map(make, *given) yields; arguments that are the same objects as before get the same result as then.

    So what guidance branches share is computed, and held, once; no model has to know what that is.
    """
    made: dict[tuple[int, ...], Made] = {}
    found = []
    for arguments in zip(*given, strict=True):
        key = tuple(map(id, arguments))
        if key not in made:
            made[key] = make(*arguments)
        found.append(made[key])
    return found


HELD_AS = "held_as"
"""Attribute of a parameter that is left as its file stores it: the dtype it has where it is used."""


class Linear(nn.Linear):
    """The leaf that quantisation and LoRA swap: casts its input to its weight's dtype and answers in it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the width, computed and returned in float32 whatever dtype input and weights have."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm over the whole width (all heads together).

    The order of casts is the official one and matters in bfloat16: normalise in float32 (as torch does inside), round
    to the input's dtype, then multiply by the weight.
    Source: Wan-Video/Wan2.2 wan/modules/model.py WanRMSNorm (Apache-2.0).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight.to(x.dtype)


class CausalConv(nn.Module):
    """Convolution over time that sees the past alone; before the start it sees the first value."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BCT: Tensor = self.conv(F.pad(x_BTC.transpose(1, 2), (2, 0), mode="replicate"))
        return y_BCT.transpose(1, 2)


def sdpa(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """Full attention by torch, the default of every model."""
    return F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK)


# --- positions -----------------------------------------------------------------------------------


def finest(device: torch.device) -> torch.dtype:
    """Return the finest real numbers of a device: float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def rope_at(
    positions: tuple[Sequence[int], Sequence[int], Sequence[int]],
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return unit complex numbers [L, head_dim / 2], time-major, that turn by each token's position.

    positions  of a grid of L tokens along time, height and width; they may be negative.
    dtype      complex128 or complex64 of the result; angles are computed in `finest`.

    The K/2 slots are split t : h : w as 22 : 21 : 21 for K = 128; each axis has its own ladder of frequencies
    10000 ** (-j / slots).
    """
    slots = head_dim // 2
    split = (slots - 2 * (slots // 3), slots // 3, slots // 3)
    real = finest(device)
    turns = []
    grid = [len(axis) for axis in positions]
    for axis, (places, width) in enumerate(zip(positions, split, strict=True)):
        frequencies = 10000.0 ** (-torch.arange(width, dtype=real, device=device) / width)
        angles = torch.outer(torch.tensor(list(places), dtype=real, device=device), frequencies)
        shape = [1, 1, 1, width]
        shape[axis] = len(places)
        turns.append(torch.polar(torch.ones_like(angles), angles).view(shape).expand(*grid, width))
    return torch.cat(turns, dim=-1).reshape(-1, slots).to(dtype)


def rotate(x_BLNK: Tensor, rope_LK: Tensor) -> Tensor:
    """Turn interleaved pairs of `x` by `rope`, in the precision of `rope`; returns the dtype of `x`."""
    pairs = x_BLNK.to(rope_LK.dtype.to_real()).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * rope_LK[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_BLNK.dtype)


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Return float32 features [..., width] of timesteps in [0, 1000]: cosines first, then sines."""
    half = width // 2
    real = finest(timesteps.device)
    frequencies = 10000.0 ** (-torch.arange(half, dtype=real, device=timesteps.device) / half)
    angles = timesteps.to(real)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


# --- modulation: one row for each distinct timestep, over contiguous segments of tokens ------------


def modulate(x_BLD: Tensor, shift_BRD: Tensor, scale_BRD: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return x * (1 + scale) + shift, row r applied to the tokens of segment r."""
    if len(segments) == 1:
        return torch.addcmul(shift_BRD, x_BLD, 1 + scale_BRD)
    parts = zip(x_BLD.split(segments, 1), shift_BRD.split(1, 1), (1 + scale_BRD).split(1, 1), strict=True)
    return torch.cat([torch.addcmul(shift, x, scale) for x, shift, scale in parts], dim=1)


def gated_add(x_BLD: Tensor, y_BLD: Tensor, gate_BRD: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return x + y * gate in the dtype of `x` (float32), row r of the gate on the tokens of segment r."""
    y_BLD = y_BLD.to(x_BLD.dtype)
    if len(segments) == 1:
        return torch.addcmul(x_BLD, y_BLD, gate_BRD)
    parts = zip(x_BLD.split(segments, 1), y_BLD.split(segments, 1), gate_BRD.split(1, 1), strict=True)
    return torch.cat([torch.addcmul(x, y, gate) for x, y, gate in parts], dim=1)
