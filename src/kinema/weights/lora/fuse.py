"""LoRA into the weights, one tensor at a time, as they are loaded or merged into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kinema.lora import LoraRef
from kinema.schema import ModelRef
from kinema.weights.lora.attach import as_matrix, check_finite, chosen, parameter_shapes
from kinema.weights.lora.file import Change, LoraFile, read_lora
from kinema.weights.structure import build


class Fusion:
    """Adds LoRAs to the parameters of one model: `fusion(name, tensor)` is the tensor with all its changes.

    shapes   of the model's parameters by official name.
    sizes    norm of each LoRA's change over that of the weights it changes, of what was fused so far.
    """

    def __init__(self, loras: Sequence[LoraRef], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._changes: dict[str, list[tuple[int, float, LoraFile, Change]]] = {}
        self._squares = [[0.0, 0.0] for _ in loras]
        for index, ref in enumerate(loras):
            lora = read_lora(ref.path)
            for change in chosen(lora, ref, dict(shapes)):
                self._changes.setdefault(change.target, []).append((index, ref.strength, lora, change))

    def __contains__(self, name: str) -> bool:
        return name in self._changes

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Return the parameter as it is, or float32 with its changes; the tensor itself is not written to."""
        if name not in self._changes:
            return tensor
        weight = tensor.float()
        total = as_matrix(weight).clone()
        for index, strength, lora, change in self._changes[name]:
            start, rows = change.rows(weight.shape[0])
            before = as_matrix(weight).narrow(0, start, rows)
            branch = lora.branch(change, before, torch.float32, weight.device)
            total.narrow(0, start, rows).add_(branch.change(before), alpha=strength)
            norm = branch.norm(before)
            check_finite(lora, change, norm)
            self._squares[index][0] += norm**2
            self._squares[index][1] += float(before.norm()) ** 2
        return total.view_as(weight)

    @property
    def sizes(self) -> tuple[float, ...]:
        return tuple((part / whole) ** 0.5 if whole else 0.0 for part, whole in self._squares)


def fusion_of(ref: ModelRef) -> Fusion:
    """Return the fusion of a recipe: that of its LoRAs, or of none where they stay beside the weights."""
    if ref.lora_mode == "branch" or not ref.loras:
        return Fusion((), {})
    return Fusion(ref.loras, parameter_shapes(build(ref.component, ref.config)))
