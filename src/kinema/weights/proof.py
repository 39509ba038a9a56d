"""Whether a file that was written holds what was meant, found by reading it as a loader does."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kinema.errors import CheckpointError
from kinema.schema import FileFacts, Progress
from kinema.weights.detect import inspect
from kinema.weights.keys import translate
from kinema.weights.passage import Passage, Rows
from kinema.weights.quantised.schemes import open_weights


@dataclass(frozen=True)
class Proof:
    """What writing changed: root mean square of the change over that of the weights, of all and of the worst."""

    error: float
    worst: float
    worst_name: str


def compared(path: Path, facts: FileFacts, passages: Sequence[Passage]) -> Generator[Progress, None, Proof]:
    """Yield progress and return the proof. Raises CheckpointError for a tensor that is not just what was meant."""
    found = inspect(path)
    if (found.component, found.config) != (facts.component, facts.config):
        raise _unequal(path, "its structure")
    back = Rows(translate(open_weights(path)))
    sums: dict[str, tuple[float, float]] = {}
    for number, passage in enumerate(passages, 1):
        sums[passage.official] = _change(path, passage, back)
        yield Progress(stage="read back", done=number, total=len(passages))
    errors = {name: _share(*row) for name, row in sums.items()}
    worst = max(errors, key=lambda name: errors[name])
    total = _share(sum(row[0] for row in sums.values()), sum(row[1] for row in sums.values()))
    return Proof(total, errors[worst], worst)


def _change(path: Path, passage: Passage, back: Rows) -> tuple[float, float]:
    """Sum of squares of what writing changed, and of the tensor itself."""
    change = size = 0.0
    name = passage.official
    for start, stop in passage.rows.spans(name, 0, passage.shape[0] if passage.shape else 1):
        exact, found = passage.rows.get(name, start, stop), back.get(name, start, stop)
        back.translation.file.release()
        if not torch.equal(found, passage.meant(start, stop)):
            raise _unequal(path, name)
        change += float((found - exact).square_().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return change, size


def _share(change: float, size: float) -> float:
    return float((change / size) ** 0.5) if size else 0.0


def _unequal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was written and read back, and {what} is not what was meant: the disk, the memory or we are at fault",
        "Nothing was kept. Try again; if it stays, report it.",
        path=path,
        key=what,
    )
