"""A LoRA from two models: what the second has that the first has not, as the best matrices of low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kinema.errors import CheckpointError, OutputError, RequestError
from kinema.schema import Component, Progress
from kinema.weights.keys import exchanged
from kinema.weights.lora.convert import DIFF_ENDINGS, check_target, dialect_of
from kinema.weights.lora.dialects import Dialect, Family, module_in, spelled_parts, swaps
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.weights import Weights
from kinema.weights.writing import Written, whole_file, write_tensors

EXACT_UP_TO = 512
"""Smaller side of a matrix up to which all its singular values are computed; beyond, only those that are kept."""

FAMILIES: dict[Component, Family] = {"dit": "wan", "flux_dit": "flux"}
OVERSAMPLE, ITERATIONS = 16, 4
SAME = 1e-9
"""Relative change below which a parameter is taken for the same."""


@dataclass(frozen=True)
class Extracted:
    """matrices and others that changed, and what low rank left out: its norm over that of all the change."""

    matrices: int
    others: int
    lost: float


def extract(
    base: Path, tuned: Path, target: Path, *, rank: int = 64, to: str = "comfyui", dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Generator[Progress, None, Extracted]:  # fmt: skip
    """Write the LoRA of this rank that turns `base` into `tuned` as nearly as can be, yielding progress.

    Matrices become two of low rank, by singular values; biases, norms, modulation and convolutions whole differences.
    Peak memory is that of a few copies of the largest matrix. Raises RequestError for models that differ in structure
    or not at all, CheckpointError for numbers that are not finite, OutputError where it cannot be written.
    """
    dialect = dialect_of(to)
    check_target(target, overwrite)
    if not 1 <= rank <= 4096:
        raise RequestError(f"rank {rank} is not 1 to 4096", "pass --rank 64", field="rank", got=rank)
    first, second = Weights(base), Weights(tuned)
    family = FAMILIES.get(first.facts.component)
    if family is None:
        raise RequestError(f"{base.name} is {first.facts.structure}, which takes no LoRA",
                           "take two files of a transformer", field="BASE", got=str(base))  # fmt: skip
    if first.shapes != second.shapes:
        raise RequestError(
            f"{tuned.name} ({second.facts.structure}) is not built as {base.name} ({first.facts.structure})",
            "take two files of one model",
            field="TUNED",
            got=str(tuned),
        )

    def change(name: str) -> Tensor:
        return second.get(name) - first.get(name)

    names: list[str] = []
    for number, name in enumerate(first.shapes, 1):
        difference = float(change(name).norm())
        if not math.isfinite(difference):
            raise CheckpointError(f"{name} of {tuned.name} or {base.name} holds values that are not finite",
                                  "The file is broken; take another.", path=tuned, key=name)  # fmt: skip
        if difference > SAME * float(first.get(name).norm()):
            names.append(name)
        yield Progress(stage="compare", done=number, total=len(first.shapes))
    if not names:
        raise RequestError(f"{tuned.name} and {base.name} hold the same numbers", "take another file",
                           field="TUNED", got=str(tuned))  # fmt: skip
    tensors = [
        tensor
        for name in names
        for tensor in _written(name, first.shapes[name], partial(change, name), dialect, family, rank, dtype)
    ]
    metadata = {"kinema_extracted": f"rank {rank}, {tuned.name} less {base.name}"}
    with whole_file(target) as temporary:
        for number, _ in enumerate(write_tensors(temporary, tensors, metadata, "safetensors"), 1):
            yield Progress(stage="extract", done=number, total=len(tensors))
        return (yield from _compared(temporary, names, change))


def _written(
    name: str, shape: tuple[int, ...], change: Callable[[], Tensor], dialect: Dialect, family: Family, rank: int,
    dtype: torch.dtype,
) -> Iterator[Written]:  # fmt: skip
    parts = spelled_parts(name, dialect, family, shape)
    matrix = len(shape) == 2 and name.endswith(".weight")
    if not parts or not (matrix or dialect.more):
        what = "" if matrix else ", which is no matrix"
        raise RequestError(f"{dialect.name} names have no place for the change of {name}{what}",
                           "pass --to comfyui", field="to", got=dialect.name)  # fmt: skip
    for part, rows in parts.items():
        module = module_in(name, dialect, family, part)
        assert module is not None, f"a part of {name} without a name"
        start, height = rows or (0, shape[0])
        cut = partial(_rows, change, start, height, swaps(name, dialect, family))
        if matrix:
            yield from _pair(module, (height, shape[1]), cut, dialect, rank, dtype)
        else:
            ending = DIFF_ENDINGS.get(name.rpartition(".")[2], ".diff")
            yield Written(module + ending, (height, *shape[1:]), dtype,
                          lambda cut=cut: iter((cut().to(dtype),)))  # type: ignore[misc]  # fmt: skip


def _rows(change: Callable[[], Tensor], start: int, height: int, swap: bool) -> Tensor:
    return (exchanged(change()) if swap else change()).narrow(0, start, height)


def _pair(
    module: str, shape: tuple[int, int], change: Callable[[], Tensor], dialect: Dialect, rank: int, dtype: torch.dtype
) -> Iterator[Written]:
    """The two matrices of low rank that stand for one change."""
    kept = min(rank, *shape)
    found: list[Tensor] = []

    def down() -> Iterator[Tensor]:
        up_matrix, down_matrix = low_rank(change(), kept)
        found.append(up_matrix)
        yield down_matrix.to(dtype)

    yield Written(module + dialect.down, (kept, shape[1]), dtype, down)
    yield Written(module + dialect.up, (shape[0], kept), dtype, lambda: iter((found.pop().to(dtype),)))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (up [out, rank], down [rank, in]) whose product is the nearest of that rank; both of equal size.

    Large matrices are first projected on the directions they stretch most, found from random ones (the same at every
    run). Source: arXiv:0909.4061, algorithm 4.4.
    """
    basis = None
    if min(matrix.shape) > EXACT_UP_TO:
        columns = min(rank + OVERSAMPLE, *matrix.shape)
        basis = matrix @ torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
        for _ in range(ITERATIONS):
            basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
        basis = torch.linalg.qr(basis).Q
    u, s, v = torch.linalg.svd(matrix if basis is None else basis.T @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    u = u[:, :rank] if basis is None else basis @ u[:, :rank]
    return u * root, root[:, None] * v[:rank]


def _compared(path: Path, names: list[str], change: Callable[[str], Tensor]) -> Generator[Progress, None, Extracted]:
    """Read the file back: every parameter, and what its change leaves of the true one."""
    lora = read_lora(path)
    if {item.target for item in lora.changes} != set(names) or lora.leftover:
        raise OutputError(f"{path.name} was written and read back, and does not change what it should",
                          "nothing was kept; report it", path=str(path))  # fmt: skip
    lost = size = 0.0
    for number, item in enumerate(lora.changes, 1):
        wanted = change(item.target)
        wanted = wanted.narrow(0, *item.rows(wanted.shape[0])) if item.fused else wanted
        found = lora.branch(item, None, torch.float32, "cpu").delta().view_as(wanted)
        lost += float((wanted - found).square().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
        yield Progress(stage="read back", done=number, total=len(lora.changes))
    matrices = len({item.target for item in lora.changes if item.algorithm == "lora"})
    return Extracted(matrices, len(names) - matrices, (lost / size) ** 0.5)
