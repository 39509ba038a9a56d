"""LoRAs into the weights of a model file: a new file, in any names and numbers that `convert` can write."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kinema.lora import LoraRef
from kinema.schema import Progress
from kinema.weights.convert import Converted, convert
from kinema.weights.lora.fuse import Fusion
from kinema.weights.lora.weights import Weights, fitted


def merge(
    model: Path, loras: Sequence[LoraRef], target: Path, to: str | None = None, names: str | None = None,
    *, overwrite: bool = False,
) -> Generator[Progress, None, tuple[Converted, tuple[float, ...]]]:  # fmt: skip
    """Write `model` with LoRAs added to its weights; return what was written, and the size of each change.

    to, names   as of `convert`. Sums are made in float32, a parameter at a time, and rounded once.

    Raises as `convert`, and RequestError for a LoRA that would not act wholly.
    """
    weights = Weights(model)
    changed = _Changed(weights, fitted(loras, weights))
    written = yield from convert(model, target, to, names, overwrite=overwrite, adjust=changed)
    return written, changed.sizes


class _Changed:
    """adjust(official name, first row, rows) -> rows, with the changes; a parameter is made whole once."""

    def __init__(self, weights: Weights, fusion: Fusion) -> None:
        self._weights, self._fusion = weights, fusion
        self._name = ""
        self._whole = torch.empty(0)

    def __call__(self, name: str, begin: int, rows: Tensor) -> Tensor:
        if name not in self._fusion:
            return rows
        if name != self._name:
            self._name, self._whole = name, self._fusion(name, self._weights.get(name))
        return self._whole[begin : begin + len(rows)]

    @property
    def sizes(self) -> tuple[float, ...]:
        return self._fusion.sizes
