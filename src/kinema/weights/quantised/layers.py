"""Layers that compute from packed weights: swapped for the plain leaves of a model, which never learns of it.

Owns which layers may be packed. Those with few weights and much say (norms, modulation, time, text and head) never are.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models import flux, wan
from kinema.models.encoders import T5Linear
from kinema.schema import Component
from kinema.weights.quantised.packed import CHUNK, LARGEST, Packed

SCALED_MM_MULTIPLE = 16
"""Both sides of a matrix must be a multiple of this for fp8 multiplication."""


class _PackedLayer(nn.Module):
    """Holds a packed weight as buffers, so that it moves, streams and is counted like any other.

    A cast of the module, `module.to(torch.bfloat16)`, leaves them as they are: their numbers mean nothing apart.
    """

    data: Tensor
    scale: Tensor | None

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = replace(packed, data=torch.empty(0), scale=None), dtype
        self.out_features, self.in_features = packed.shape
        self.register_buffer("data", packed.data, persistent=False)
        self.register_buffer("scale", packed.scale, persistent=False)

    @property
    def packed(self) -> Packed:
        return replace(self.form, data=self.data, scale=self.scale)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return weight [out, in], unpacked to `dtype`, that of computation by default."""
        return self.packed.dequantised(dtype or self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form.kind}, computes in {self.dtype}"


class QuantisedLinear(_PackedLayer):
    """A linear layer over a packed weight: unpacked at every use, or multiplied in fp8 as it is.

    dtype        of computation and of the result; with `wide` the result is raised to float32, as umT5's layers do.
    activations  where rows rounded to fp8 are shared with the layers beside this one; None multiplies unpacked weights.
    """

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        *,
        wide: bool = False,
        activations: Activations | None = None,
    ) -> None:
        super().__init__(packed, dtype)
        self.bias = bias
        self.wide = wide
        self.activations = activations if activations is not None and multiplies(packed, dtype) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            y = self._multiplied(x, self.activations)
        else:
            y = F.linear(x.to(self.dtype), self.dequantised(), self.bias)
        return y.float() if self.wide else y

    def _multiplied(self, x: Tensor, activations: Activations) -> Tensor:
        """The product of fp8 numbers, each row of `x` and of the weight with a scale of its own."""
        rows, row_scale = activations.rounded(x)
        scale = torch.ones((), device=x.device) if self.scale is None else self.scale
        weight_scale = scale.reshape(1, -1).expand(1, self.out_features).contiguous()
        y = torch._scaled_mm(
            rows,
            self.data.t(),
            scale_a=row_scale,
            scale_b=weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], self.out_features)


def multiplies(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether a weight may be multiplied as it is: fp8 e4m3, at most one scale a row, both sides multiples of 16.

    Not where its file says that it is to be unpacked.
    """
    if packed.kind != "fp8_e4m3" or packed.rotation or packed.weight_only:
        return False
    per_row = packed.scale is None or packed.scale.numel() in (1, packed.shape[0])
    return dtype == torch.bfloat16 and per_row and all(side % SCALED_MM_MULTIPLE == 0 for side in packed.shape)


class Activations:
    """The last activation rounded to fp8, for as long as it lives: q, k and v round their common input once."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._rounded: tuple[Tensor, Tensor] | None = None

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of `x` [..., K] as fp8 [M, K], and the float32 scale [M, 1] of each."""
        if self._of is None or self._of() is not x or self._rounded is None:
            self._of = self._rounded = None  # the one before leaves first
            self._rounded = _rounded(x.detach().reshape(-1, x.shape[-1]))
            self._of = weakref.ref(x, self._forget)
        return self._rounded

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._of is gone:
            self._of = self._rounded = None


def _rounded(rows_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as fp8 and their scales, in chunks: activations are wide, and float32 of all of them would not fit."""
    limit = LARGEST["fp8_e4m3"]
    numbers = torch.empty(rows_MK.shape, dtype=torch.float8_e4m3fn, device=rows_MK.device)
    scales = torch.empty(len(rows_MK), 1, device=rows_MK.device)
    step = max(1, CHUNK // rows_MK.shape[1])
    for start in range(0, len(rows_MK), step):
        rows = rows_MK[start : start + step].float()
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(limit)
        scales[start : start + step] = scale
        numbers[start : start + step] = (rows / scale).clamp_(-limit, limit)
    return numbers, scales


class QuantisedEmbedding(_PackedLayer):
    """A table of which only the rows asked for are unpacked."""

    @property
    def weight(self) -> Tensor:
        """The packed bytes: who looks up rows asks them where the table is."""
        return self.data

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed.rows(ids.flatten()).dequantised(self.dtype)
        return rows.view(*ids.shape, self.in_features)


# --- which layers ------------------------------------------------------------------------------------


IN_BLOCKS = re.compile(r"((.*[._])?blocks|audio_injector\.injector)\.\d+\..+")
"""Names of the layers a DiT repeats; what lies outside is a hundredth of it and computes in high precision."""


def _dit(name: str) -> bool:
    return IN_BLOCKS.fullmatch(name) is not None and not wan.stays_float32(name)


def _flux(name: str) -> bool:
    return name.startswith(("double_blocks.", "single_blocks.")) and not flux.stays_float32(name)


PACKABLE: dict[Component, Callable[[str], bool]] = {
    "dit": _dit,
    "flux_dit": _flux,
    "text_encoder": lambda name: True,
    "t5": lambda name: True,
    "clip_vision": lambda name: True,
}
"""Which of a component's matrices, by official name, may stay packed; components that are not here have none."""


def packable(component: Component, module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    """Yield name and layer of every weight that may stay packed: linear layers, and the text encoder's embedding."""
    allowed = PACKABLE.get(component, lambda name: False)
    for path, leaf in module.named_modules():
        matrix = isinstance(leaf, nn.Linear) or path == "token_embedding"
        if matrix and allowed(f"{path}.weight"):
            assert isinstance(leaf, nn.Linear | nn.Embedding)
            yield f"{path}.weight", leaf


def swap(module: nn.Module, name: str, packed: Packed, dtype: torch.dtype, *, fp8_matmul: bool = False) -> None:
    """Replace the layer whose weight is `name` by one over the packed weight; its bias stays its own."""
    path = name.removesuffix(".weight")
    parent = module.get_submodule(path.rpartition(".")[0])
    leaf = module.get_submodule(path)
    if isinstance(leaf, nn.Embedding):
        new: nn.Module = QuantisedEmbedding(packed, dtype)
    else:
        assert isinstance(leaf, nn.Linear)
        beside = (child.activations for child in parent.children() if isinstance(child, QuantisedLinear))
        shared = next((found for found in beside if found), None) or Activations()
        new = QuantisedLinear(
            packed,
            leaf.bias,
            dtype,
            wide=isinstance(leaf, T5Linear),
            activations=shared if fp8_matmul else None,
        )
    parent.add_module(path.rpartition(".")[2], new)
