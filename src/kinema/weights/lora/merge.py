"""LoRAs into the weights of a model file: a new file, in any names and numbers that `convert` can write."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from kinema.lora import LoraRef
from kinema.schema import Progress
from kinema.weights.convert import Converted, convert
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
    fusion = fitted(loras, weights)

    @lru_cache(maxsize=1)  # its rows come in chunks, one behind the other
    def whole(name: str) -> Tensor:
        return fusion(name, weights.get(name))

    def changed(name: str, begin: int, rows: Tensor) -> Tensor:
        return whole(name)[begin : begin + len(rows)] if name in fusion else rows

    written = yield from convert(model, target, to, names, overwrite=overwrite, adjust=changed)
    return written, fusion.sizes
