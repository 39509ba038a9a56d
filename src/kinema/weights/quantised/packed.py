"""One weight in its packed form: the bytes as stored, and the arithmetic that makes numbers of them.

Two families: a number format (fp8, int8) times scales, and the block types of GGUF. Both give the same float32 numbers
wherever they are unpacked, and those numbers, rounded once, in any other dtype. Knows nothing of files or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kinema.weights.quantised.blocks import BLOCK_TYPES

NUMBER_TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
"""Number formats by the name used in plans and messages."""

LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}

ON_LOAD = {"fp8": ("fp8_e4m3", "channel"), "fp8-64": ("fp8_e4m3", "64"), "int8": ("int8", "channel")}
"""What plain weights can be rounded to when they are loaded: kind and scales by the name a request uses."""

CHUNK = 2**22
"""Weights unpacked at a time: what a layer needs in float32 beside its result."""


@dataclass(frozen=True)
class Packed:
    """A weight of `shape`, as stored.

    kind      a name of NUMBER_TYPES or BLOCK_TYPES.
    data      numbers in `shape`, or blocks uint8 [..., bytes of a row].
    scale     float32: [] for all, [out, 1] for each row, [out, n] for each of n equal parts of a row; None is 1.
    rotation  width of the groups of a row that were turned by a Hadamard matrix before they were rounded; 0 is none.
    weight_only  its file says that it is to be unpacked, never multiplied as it is.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None
    rotation: int = 0
    weight_only: bool = False

    @property
    def bytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device | str) -> Packed:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def rows(self, index: Tensor | slice) -> Packed:
        """Return these rows of the weight; `index` is of one dimension."""
        data = self.data[index]
        scale = self.scale[index] if self.scale is not None and self.scale.ndim else self.scale
        return replace(self, shape=(len(data), *self.shape[1:]), data=data, scale=scale)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, where its bytes are. Peak memory is the result and CHUNK float32 numbers a few times."""
        out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        step = max(1, CHUNK * len(out) // max(1, out.numel())) if self.shape else 1
        if not self.shape or len(out) <= step:
            return out.copy_(self._numbers())
        for start in range(0, len(out), step):
            out[start : start + step] = self.rows(slice(start, start + step))._numbers()
        return out

    def _numbers(self) -> Tensor:
        """The weight in float32, all at once."""
        if self.kind in BLOCK_TYPES:
            block = BLOCK_TYPES[self.kind]
            return block.dequantise(self.data.reshape(-1, block.bytes)).reshape(self.shape)
        numbers = self.data.float()
        if self.scale is not None and self.scale.ndim == 2:
            numbers.unflatten(1, (self.scale.shape[1], -1)).mul_(self.scale[..., None])
        elif self.scale is not None:
            numbers.mul_(self.scale)
        if self.rotation:
            turned: Tensor = numbers.unflatten(-1, (-1, self.rotation)) @ hadamard(self.rotation).to(numbers.device)
            numbers = turned.flatten(-2)
        return numbers


@lru_cache
def hadamard(size: int) -> Tensor:
    """Return the orthogonal, symmetric matrix of +-1 / sqrt(size); `size` is a power of 4.

    Source: the `convrot` of ComfyUI's int8 format, a Kronecker power of the 4x4 matrix that is -1 on its antidiagonal.
    """
    corner = 1 - 2 * torch.eye(4).flip(1)
    whole = torch.ones(1, 1)
    for _ in range(round(math.log(size, 4))):
        whole = torch.kron(whole, corner)
    return whole / math.sqrt(size)


# --- numbers to bytes --------------------------------------------------------------------------------


def quantise(weight: Tensor, kind: str, scales: str = "channel", scale: Tensor | None = None) -> Packed:
    """Return the weight rounded to a kind, where the weight is.

    kind    of NUMBER_TYPES, or of the BLOCK_TYPES that can be written; rows must be a multiple of a block.
    scales  for numbers: "none", "tensor", "channel" (one a row), or "64" (one for each 64 weights of a row).
    scale   that of a whole tensor of which these are some rows.
    """
    shape = tuple(weight.shape)
    if kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        assert block.quantise is not None, f"{kind} is only read"
        data = block.quantise(weight.float().reshape(-1, block.weights))
        return Packed(kind, shape, data.view(*shape[:-1], shape[-1] // block.weights * block.bytes))
    numbers = weight.float()
    if scales != "none":
        scale = _scale(numbers, kind, scales) if scale is None else scale
        parts = scale.shape[1] if scale.ndim else 1
        numbers = (numbers.unflatten(-1, (parts, -1)) / scale[..., None]).flatten(-2)
    if kind == "int8":
        numbers = numbers.round()
    # Beyond the largest number torch gives NaN, infinity or the largest, by its version; division may round up to it.
    limit = LARGEST[kind]
    return Packed(kind, shape, numbers.clamp(-limit, limit).to(NUMBER_TYPES[kind]), scale)


def _scale(numbers: Tensor, kind: str, scales: str) -> Tensor:
    """What the largest magnitude of each group has to be divided by; 1 for a group of zeros."""
    if scales == "tensor":
        largest = numbers.abs().amax()
    else:
        width = numbers.shape[-1] if scales == "channel" else int(scales)
        largest = numbers.abs().unflatten(-1, (-1, width)).amax(-1)
    return torch.where(largest == 0, 1.0, largest / LARGEST[kind])
