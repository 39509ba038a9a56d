"""A LoRA in one publisher's names, written in another's, and read back to be the same change.

What a spelling cannot hold is refused: nothing of a file is dropped. Fused matrices of FLUX are split for diffusers,
and joined as blocks of one matrix the other way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import OutputError, RequestError
from kinema.schema import Progress
from kinema.weights.keys import exchanged
from kinema.weights.lora.dialects import DIALECTS, MLP_PART, Dialect, module_in, spelled_parts, swaps
from kinema.weights.lora.file import Change, LoraFile, read_lora
from kinema.weights.writing import Written, in_memory, whole_file, write_tensors

PROBES = 4
"""Random inputs on which the file that was written must answer as the one it was made from."""

TOLERANCE = 1e-5
FUSED_HEIGHTS = {"qkv": 3, "linear1": 7, "linear1_kv": 2}
DIFF_ENDINGS = {"weight": ".diff", "scale": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}
FACTORS = {"loha": "hada_", "lokr": "lokr_", "oft": ""}
"""What goes before the roles of algorithms that are written as they are."""


def convert_lora(source: Path, target: Path, to: str, *, overwrite: bool = False) -> Generator[Progress, None, None]:
    """Write a LoRA in the names of `to`, yielding progress; the file appears when it was read back and is the same.

    Raises RequestError for a dialect that is unknown or cannot hold the file, OutputError where it cannot be written.
    """
    dialect = dialect_of(to)
    check_target(target, overwrite)
    lora = read_lora(source)
    if lora.leftover:
        name, why = next(iter(lora.leftover.items()))
        raise RequestError(
            f"{source} has {len(lora.leftover)} tensors that are no part of a change, and would be lost: {name}: {why}",
            "see: kinema lora inspect FILE",
            field="FILE",
            got=str(source),
        )
    tensors = [tensor for group in _grouped(lora, dialect) for tensor in _spelled(lora, group, dialect)]
    kept = {key: value for key, value in lora.file.metadata.items() if key not in ("format", "lora_adapter_metadata")}
    with whole_file(target) as temporary:
        for number, _ in enumerate(write_tensors(temporary, tensors, kept, "safetensors"), 1):
            yield Progress(stage="convert", done=number, total=len(tensors))
        _prove(lora, read_lora(temporary), target)


def dialect_of(name: str) -> Dialect:
    """Return the dialect called `name`; RequestError for others."""
    row = next((row for row in DIALECTS if row.name == name), None)
    if row is None:
        known = [row.name for row in DIALECTS]
        near = next(iter(get_close_matches(name, known, 1)), "comfyui")
        raise RequestError(f"{name!r} is no dialect of LoRA; there are {', '.join(known)}", f"pass --to {near}",
                           field="to", got=name, allowed=known)  # fmt: skip
    return row


def check_target(target: Path, overwrite: bool) -> None:
    """Raise RequestError for a file that is there already, or is not named as what will be in it."""
    if target.suffix != ".safetensors":
        raise RequestError(f"{target} does not end in .safetensors", f"write to {target.with_suffix('.safetensors')}",
                           field="OUT", got=str(target))  # fmt: skip
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists", "name another file, or pass --overwrite", field="OUT", got=str(target))


# --- what becomes what ---------------------------------------------------------------------------------


def _grouped(lora: LoraFile, dialect: Dialect) -> Iterator[tuple[Change, ...]]:
    """The changes that are written together: parts of one fused matrix where that has one name, else each alone."""
    together: dict[str, list[Change]] = {}
    for change in lora.changes:
        if change.fused and dialect.words == "official" and change.algorithm == "lora" and len(change.shape) == 2:
            together.setdefault(change.target, []).append(change)
        else:
            yield (change,)
    yield from (tuple(sorted(parts, key=lambda change: change.part)) for parts in together.values())


def _spelled(lora: LoraFile, group: Sequence[Change], dialect: Dialect) -> Iterator[Written]:
    change, is_lora = group[0], group[0].algorithm == "lora"
    what = f"a {change.algorithm} of {change.target}"
    joined = change.fused and dialect.words == "official"
    if not is_lora and (not dialect.more or joined):
        raise _cannot(lora, dialect, what)
    if joined and any("magnitude" in part.tensors for part in group):
        raise _cannot(lora, dialect, f"a DoRA of parts of {change.target}")
    split = change.fused and not joined
    parts = _own_parts(change) if split else spelled_parts(change.target, dialect, lora.family, change.shape)
    if not parts:
        raise _cannot(lora, dialect, what)
    for part, rows in parts.items():
        module = module_in(change.target, dialect, lora.family, part)
        swap = swaps(change.target, dialect, lora.family)
        can_be_cut = {"down", "up", "full", "alpha"} >= change.tensors.keys() and change.algorithm != "set"
        if module is None or ((rows or swap) and not can_be_cut):
            raise _cannot(lora, dialect, what)
        if change.algorithm == "diff":
            yield _difference(lora, change, module, rows, swap)
        elif change.algorithm == "set":
            yield _as_is(lora, change, "full", f"{module}.set_weight")
        elif is_lora:
            yield from _low_rank(lora, group, dialect, module, rows, swap)
        else:
            for role in sorted(change.tensors.keys() - {"alpha", "magnitude"}):
                role_name = f"oft_{role}" if role == "blocks" else f"{FACTORS[change.algorithm]}{role}"
                yield _as_is(lora, change, role, f"{module}.{role_name}")
            yield from _alpha(lora, change, module)
        yield from _magnitude(lora, change, dialect, module)


def _own_parts(change: Change) -> dict[int, tuple[int, int] | None]:
    """The parts of a fused matrix that one change covers: its own, or three of XLabs' single blocks."""
    if len(change.shape) < 2 or change.part == MLP_PART or change.shape[0] <= change.shape[1]:
        return {change.part: None}
    width = change.shape[1]
    return {change.part + n: (n * width, width) for n in range(change.shape[0] // width)}


def _difference(lora: LoraFile, change: Change, module: str, rows: tuple[int, int] | None, swap: bool) -> Written:
    name = module + DIFF_ENDINGS.get(change.target.rpartition(".")[2], ".diff")
    return _scaled(name, lora, change, "full", lora.scale(change), rows, swap)


def _scaled(
    name: str, lora: LoraFile, change: Change, role: str, factor: float, rows: tuple[int, int] | None, swap: bool
) -> Written:
    """These rows of a tensor times a factor, in the order the dialect has them."""
    stored = change.tensors[role]
    # Halves and doubles are exact where the range is float32's; anything else would round the tensor once more.
    kept = factor == 1 or (lora.file.dtype(stored) == torch.bfloat16 and _is_exact(factor))
    dtype = lora.file.dtype(stored) if kept else torch.float32
    shape = lora.file.shape(stored) if rows is None else (rows[1], *lora.file.shape(stored)[1:])

    def chunks() -> Iterator[Tensor]:
        tensor = lora.tensor(change, role)
        tensor = exchanged(tensor) if swap else tensor
        tensor = tensor if rows is None else tensor.narrow(0, *rows)
        yield tensor if factor == 1 else (tensor.float() * factor).to(dtype)

    return Written(name, shape, dtype, chunks)


def _low_rank(
    lora: LoraFile, group: Sequence[Change], dialect: Dialect, module: str, rows: tuple[int, int] | None, swap: bool
) -> Iterator[Written]:
    change = group[0]
    if "mid" in change.tensors and not dialect.more:
        raise _cannot(lora, dialect, f"the Tucker core of {change.target}")
    if change.fused and dialect.words == "official":
        ranks = sum(lora.file.shape(part.tensors["down"])[0] for part in group)
        down, up = (ranks, change.shape[1]), (_height(group), ranks)
        yield Written(module + dialect.down, down, torch.float32,
                      lambda: iter((torch.cat([lora.tensor(part, "down").float() for part in group]),)))  # fmt: skip
        yield Written(module + dialect.up, up, torch.float32, lambda: iter((_blocks(lora, group, up),)))
        return
    yield _as_is(lora, change, "down", module + dialect.down)
    more = {"mid": ".lora_mid.weight", "reshape": ".reshape_weight"} if dialect.more else {}
    for role in sorted(more.keys() & change.tensors.keys()):
        yield _as_is(lora, change, role, module + more[role])
    factor = 1.0 if dialect.alpha else lora.scale(change)
    yield _scaled(module + dialect.up, lora, change, "up", factor, rows, swap)
    if dialect.alpha:
        yield from _alpha(lora, change, module)


def _alpha(lora: LoraFile, change: Change, module: str) -> Iterator[Written]:
    scale, rank = lora.scale(change), lora.rank(change)
    if change.algorithm == "oft" and "alpha" in change.tensors:
        yield _as_is(lora, change, "alpha", f"{module}.alpha")
    if rank and (scale != 1 or "alpha" in change.tensors):
        yield in_memory(f"{module}.alpha", torch.tensor(scale * rank))


def _magnitude(lora: LoraFile, change: Change, dialect: Dialect, module: str) -> Iterator[Written]:
    if "magnitude" not in change.tensors:
        return
    tensor = lora.file.get(change.tensors["magnitude"])
    by_row = tensor.ndim == 1 or tensor.shape[1] == 1
    if not dialect.more and not by_row:
        raise _cannot(lora, dialect, f"a DoRA by column of {change.target}")
    tensor = tensor.flatten() if not dialect.more else tensor.reshape(-1, 1) if tensor.ndim == 1 else tensor
    name = module + (".dora_scale" if dialect.more else ".lora_magnitude_vector")
    yield in_memory(name, tensor)


def _blocks(lora: LoraFile, group: Sequence[Change], shape: tuple[int, int]) -> Tensor:
    """The up matrices of several parts as one, each beside its own rows and columns, scales included."""
    whole, column = torch.zeros(shape), 0
    for part in group:
        up = lora.tensor(part, "up").float() * lora.scale(part)
        start, _ = part.rows(shape[0])
        whole[start : start + up.shape[0], column : column + up.shape[1]] = up
        column += up.shape[1]
    return whole


def _height(group: Sequence[Change]) -> int:
    """Rows of a fused matrix: its width for each part; for FLUX's MLP as many as it has, or four times that."""
    width = group[0].shape[1]
    times = next(count for word, count in FUSED_HEIGHTS.items() if f".{word}." in group[0].target)
    mlp = next((part for part in group if part.part == MLP_PART), None)
    return MLP_PART * width + mlp.shape[0] if mlp else width * times


def _as_is(lora: LoraFile, change: Change, role: str, name: str) -> Written:
    stored = change.tensors[role]
    return Written(name, lora.file.shape(stored), lora.file.dtype(stored), lambda: iter((lora.tensor(change, role),)))


def _is_exact(scale: float) -> bool:
    return scale != 0 and float(torch.frexp(torch.tensor(abs(scale), dtype=torch.float64)).mantissa) == 0.5


def _cannot(lora: LoraFile, dialect: Dialect, what: str) -> RequestError:
    able = ", ".join(row.name for row in DIALECTS if row.more and row.words == "official")
    return RequestError(f"{dialect.name} names have no place for {what}, which {lora.file.path} has",
                        f"write it in one of: {able}", field="to", got=dialect.name, allowed=able)  # fmt: skip


# --- the proof -------------------------------------------------------------------------------------------


def _prove(before: LoraFile, after: LoraFile, target: Path) -> None:
    """Raise OutputError unless both files change the same parameters by the same."""
    wanted, found = _answers(before), _answers(after)
    same = wanted.keys() == found.keys() and not after.leftover
    for name in wanted if same else ():
        limit, rows = TOLERANCE * float(wanted[name].abs().max()), max(len(wanted[name]), len(found[name]))
        difference = _padded(wanted[name], rows) - _padded(found[name], rows)
        same = same and bool((difference.abs() <= max(limit, 1e-12)).all())
    if not same:
        raise OutputError(
            f"{target} was written and read back, and is not the same change: nothing was kept",
            "this is a fault of ours or of the disk: report it with the file's name",
            path=str(target),
        )


def _padded(answer: Tensor, rows: int) -> Tensor:
    """At least this many rows, zeros behind: where parts of a fused matrix do not change."""
    return F.pad(answer, (0, 0, 0, max(0, rows - len(answer))))


def _answers(lora: LoraFile) -> Mapping[str, Tensor]:
    """What each parameter's change makes of a few random inputs; vectors and magnitudes as they are."""
    found: dict[str, Tensor] = {}
    for change in lora.changes:
        if change.algorithm in ("diff", "set"):
            answer = lora.scale(change) * lora.tensor(change, "full").float().flatten()[:, None]
        else:
            inner = {role: name for role, name in change.tensors.items() if role != "magnitude"}
            branch = lora.branch(replace(change, tensors=inner), None, torch.float32, "cpu")
            # OFT turns what the layer answers: here the probe itself.
            columns = change.shape[0] if change.algorithm == "oft" else torch.Size(change.shape[1:]).numel()
            probe = torch.randn(PROBES, columns, generator=torch.Generator().manual_seed(columns))
            answer = branch.forward(probe, lambda x: x).T
        before = found.get(change.target, torch.zeros(0, answer.shape[1]))
        start = change.part * len(answer)
        if change.part == MLP_PART:  # behind the others: as wide as its columns each; of a bias those are there by now
            start = MLP_PART * change.shape[1] if len(change.shape) > 1 else len(before)
        whole = _padded(before, start + len(answer))
        whole[start : start + len(answer)] += answer
        found[change.target] = whole
        if "magnitude" in change.tensors:
            found[f"{change.target} magnitude"] = lora.file.get(change.tensors["magnitude"]).float().reshape(-1, 1)
    return found
