"""The block types of GGUF: rows of weights as blocks of 32 or 256, each with scales of its own, and their arithmetic.

Owns bytes to numbers and, for the simple types, numbers to bytes; equal to the last bit to the gguf package, the
reference. Runs on whatever device the bytes are on. Knows nothing of files or models.
Source: ggml-org/ggml docs and the block layouts of ggml-common.h; tests/formats/test_blocks.py compares every type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen values of the non-linear 4-bit types."""


# --- pieces ----------------------------------------------------------------------------------------


def _fields(blocks_NX: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Cut every block into fields of these many bytes."""
    parts: tuple[Tensor, ...] = blocks_NX.split(sizes, dim=1)
    return parts


def _half(field_N2: Tensor) -> Tensor:
    """Two bytes as float16, raised to float32 [N, 1]."""
    return field_N2.contiguous().view(torch.float16).float()


def _split(field_NX: Tensor, bits: int, span: int) -> Tensor:
    """Numbers of `bits` bits [N, X * 8 / bits]: of each run of `span` bytes first all lowest bits, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field_NX.device)[:, None]
    parts: Tensor = (field_NX.unflatten(1, (-1, 1, span)) >> shifts) & (2**bits - 1)
    return parts.flatten(1)


def _grouped(scale_NG: Tensor, values_NX: Tensor) -> Tensor:
    """Values times the scale of their group."""
    groups: Tensor = values_NX.unflatten(1, (scale_NG.shape[1], -1)) * scale_NG[..., None]
    return groups.flatten(1)


def _levels(indices: Tensor) -> Tensor:
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=indices.device)
    return table[indices.int()]


# --- bytes to numbers --------------------------------------------------------------------------------


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 32)
    return q.view(torch.int8).float() * _half(d)


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 16)
    return _half(d) * (_split(q, 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = _fields(blocks, 2, 2, 16)
    return _half(d) * _split(q, 4, 16).float() + _half(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = _fields(blocks, 2, 4, 16)
    return _half(d) * ((_split(low, 4, 16) | _split(high, 1, 1) << 4).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = _fields(blocks, 2, 2, 4, 16)
    return _half(d) * (_split(low, 4, 16) | _split(high, 1, 1) << 4).float() + _half(m)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, q, d, m = _fields(blocks, 16, 64, 2, 2)
    lowest = _half(m) * (scales >> 4).float()
    scaled = _grouped(_half(d) * (scales & 15).float(), _split(q, 2, 32).float())
    return scaled - lowest.repeat_interleave(16, 1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, scales, d = _fields(blocks, 32, 64, 12, 2)
    scale = (_split(scales[:, :8], 4, 8) | _split(scales[:, 8:], 2, 4) << 4).float() - 32
    # A bit that is set means nothing is taken away.
    q = (_split(low, 2, 32) | _split(high, 1, 32) << 2).float() - 4
    return _grouped(_half(d) * scale, q)


def _six_bits(scales_N12: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits each, packed into 12 bytes: as float32 [N, 8]."""
    first, second, rest = _fields(scales_N12, 4, 4, 4)
    scale = torch.cat([first & 63, (rest & 15) | (first >> 2 & 48)], dim=1)
    lowest = torch.cat([second & 63, (rest >> 4) | (second >> 2 & 48)], dim=1)
    return scale.float(), lowest.float()


def _with_minima(d: Tensor, m: Tensor, scales: Tensor, q_NX: Tensor) -> Tensor:
    scale, lowest = _six_bits(scales)
    return _grouped(_half(d) * scale, q_NX.float()) - (_half(m) * lowest).repeat_interleave(32, 1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, m, scales, q = _fields(blocks, 2, 2, 12, 128)
    return _with_minima(d, m, scales, _split(q, 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    d, m, scales, high, low = _fields(blocks, 2, 2, 12, 32, 128)
    return _with_minima(d, m, scales, _split(low, 4, 32) | _split(high, 1, 32) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = _fields(blocks, 128, 64, 16, 2)
    q = (_split(low, 4, 64) | _split(high, 2, 32) << 4).float() - 32
    return _grouped(_half(d) * scales.contiguous().view(torch.int8).float(), q)


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 16)
    return _half(d) * _levels(_split(q, 4, 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, q = _fields(blocks, 2, 2, 4, 128)
    scale = (_split(low, 4, 1) | _split(high, 2, 1) << 4).float() - 32
    return _grouped(_half(d) * scale, _levels(_split(q, 4, 16)))


# --- numbers to bytes --------------------------------------------------------------------------------


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _bytes_of(half: Tensor) -> Tensor:
    return half.to(torch.float16).view(torch.uint8)


def _nibbles(q_N32: Tensor) -> Tensor:
    return q_N32[:, :16] & 15 | q_N32[:, 16:] << 4


def _fifth_bits(q_N32: Tensor) -> Tensor:
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=q_N32.device)
    bits: Tensor = (q_N32 >> 4).unflatten(1, (4, 8)) * weights
    return bits.sum(-1, dtype=torch.int32).to(torch.uint8)


def _symmetric(x_N32: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and numbers of `bits` bits: the value farthest from 0 gets the lowest number, exactly."""
    half = 2 ** (bits - 1)
    d = x_N32.gather(1, x_N32.abs().argmax(1, keepdim=True)) / -half
    q = (x_N32 * _inverse(d) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return _bytes_of(d), q.to(torch.uint8)


def _from_lowest(x_N32: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum and numbers of `bits` bits between the least and the greatest value."""
    lowest = x_N32.amin(1, keepdim=True)
    d = (x_N32.amax(1, keepdim=True) - lowest) / (2**bits - 1)
    q = ((x_N32 - lowest) * _inverse(d) + 0.5).trunc().clamp(0, 2**bits - 1)
    return _bytes_of(d), _bytes_of(lowest), q.to(torch.uint8)


def _to_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    q = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())  # halves away from 0
    return torch.cat([_bytes_of(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def _to_q4_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 4)
    return torch.cat([d, _nibbles(q)], dim=1)


def _to_q4_1(x: Tensor) -> Tensor:
    d, m, q = _from_lowest(x, 4)
    return torch.cat([d, m, _nibbles(q)], dim=1)


def _to_q5_0(x: Tensor) -> Tensor:
    d, q = _symmetric(x, 5)
    return torch.cat([d, _fifth_bits(q), _nibbles(q)], dim=1)


def _to_q5_1(x: Tensor) -> Tensor:
    d, m, q = _from_lowest(x, 5)
    return torch.cat([d, m, _fifth_bits(q), _nibbles(q)], dim=1)


# --- the table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockType:
    """One way to store a block of weights.

    number       what GGUF calls it by.
    weights      weights in a block; a row must be a multiple of them.
    bytes        bytes of a block.
    dequantise   blocks uint8 [N, bytes] -> float32 [N, weights].
    quantise     the way back; None where only the reader is known, or a plain reader would write another choice.
    """

    number: int
    weights: int
    bytes: int
    dequantise: Callable[[Tensor], Tensor]
    quantise: Callable[[Tensor], Tensor] | None = None


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, _q4_0, _to_q4_0),
    "Q4_1": BlockType(3, 32, 20, _q4_1, _to_q4_1),
    "Q5_0": BlockType(6, 32, 22, _q5_0, _to_q5_0),
    "Q5_1": BlockType(7, 32, 24, _q5_1, _to_q5_1),
    "Q8_0": BlockType(8, 32, 34, _q8_0, _to_q8_0),
    "Q2_K": BlockType(10, 256, 84, _q2_k),
    "Q3_K": BlockType(11, 256, 110, _q3_k),
    "Q4_K": BlockType(12, 256, 144, _q4_k),
    "Q5_K": BlockType(13, 256, 176, _q5_k),
    "Q6_K": BlockType(14, 256, 210, _q6_k),
    "IQ4_NL": BlockType(20, 32, 18, _iq4_nl),
    "IQ4_XS": BlockType(23, 256, 136, _iq4_xs),
}
"""By the name GGUF gives them. Source: ggml-org/ggml docs/gguf.md and gguf-py constants (numbers and sizes)."""
