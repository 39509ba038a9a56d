"""A LoRA file read: which changes it makes to which official parameters, from its header alone; tensors on demand.

Every tensor of the file ends in a change or in `leftover`, with the reason: none is passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.weights.files import TensorFile, open_tensors
from kinema.weights.keys import exchanged
from kinema.weights.lora.branches import (
    Branch,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Rotated,
    tucker,
)
from kinema.weights.lora.dialects import (
    BUTTERFLY,
    MLP_PART,
    OTHER_PARTS,
    UNREAD,
    Family,
    Spelling,
    dialect_name,
    ending,
    official,
    spelling,
)

LOKR_FIRST, LOKR_SECOND = ({"w1"}, {"w1_a", "w1_b"}), ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
NEEDED = {
    "lora": ({"down", "up"}, {"down", "up", "mid"}),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "lokr": tuple(first | second for first in LOKR_FIRST for second in LOKR_SECOND),
    "oft": ({"blocks"}, {"blocks", "rescale"}),
}
"""The sets of tensors that make one change, by algorithm."""

OUTWARD = {"up", "w1_a", "w2_a", "full"}
"""Tensors whose rows are those of the weight."""

UNTURNED = ("magnitude", "mid", "t1", "blocks", "lokr")
"""Roles and algorithms whose rows cannot change places by halves."""

EXTRA = {"alpha", "magnitude", "up_bias", "reshape"}


@dataclass(frozen=True)
class Change:
    """One change of one official parameter.

    tensors  role -> name in the file.
    shape    of the matrix that changes [out, in], or of the vector or tensor itself for a difference; of OFT [out].
    part     of a fused matrix of FLUX: see `dialects.MLP_PART`; fused: whether the target is such a matrix.
    swap     the halves of its rows change places.
    """

    target: str
    algorithm: str
    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    part: int = 0
    fused: bool = False
    swap: bool = False

    def rows(self, height: int) -> tuple[int, int]:
        """Return (first row, rows) of the parameter of `height` rows that change."""
        if not self.fused:
            return 0, height
        start = height - self.shape[0] if self.part == MLP_PART else self.part * self.shape[0]
        return start, self.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file changes. `leftover` maps names that mean nothing to the reason."""

    file: TensorFile
    dialect: str
    spelling: Spelling
    changes: tuple[Change, ...]
    leftover: Mapping[str, str]
    default_scale: Mapping[str, float]

    @property
    def family(self) -> Family:
        return self.spelling.family

    @property
    def algorithms(self) -> dict[str, int]:
        """How many changes of each kind there are, as people name them."""
        found: dict[str, int] = {}
        for change in self.changes:
            name = "dora" if "magnitude" in change.tensors else change.algorithm
            found[name] = found.get(name, 0) + 1
        return found

    @property
    def ranks(self) -> tuple[int, ...]:
        found = {rank for change in self.changes if (rank := self.rank(change)) is not None}
        return tuple(sorted(found))

    def rank(self, change: Change) -> int | None:
        """Return the rank of a change, None for one that has none (differences, whole Kronecker factors)."""
        for role in ("down", "w1_b", "w2_b"):
            if role in change.tensors:
                return self.file.shape(change.tensors[role])[0]
        return None

    def scale(self, change: Change) -> float:
        """Return alpha / rank; 1 without an alpha, unless PEFT's own record beside the matrices has one."""
        rank = self.rank(change)
        if change.algorithm in ("diff", "set", "oft") and "down" not in change.tensors:
            return 1.0
        if "alpha" in change.tensors and rank:
            alpha = float(self.file.get(change.tensors["alpha"]).float().reshape(-1)[0])
            if not math.isfinite(alpha):
                raise self.error(f"{change.tensors['alpha']} is {alpha}", "The file is broken; take another.")
            return alpha / rank
        if rank and "lora_alpha" in self.default_scale:
            root = bool(self.default_scale.get("use_rslora"))
            return self.default_scale["lora_alpha"] / (math.sqrt(rank) if root else rank)
        return 1.0

    def tensor(self, change: Change, role: str) -> Tensor:
        """Return one tensor of a change, mapped, its rows in the official order."""
        tensor = self.file.get(change.tensors[role])
        return exchanged(tensor) if change.swap and role in OUTWARD else tensor

    def branch(self, change: Change, weight: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> Branch:
        """Return the change as a module.

        weight  of the layer, float32 [out, in], or the vector: only DoRA and whole parameters need it; a difference
                takes its shape.
        """

        def get(role: str) -> Tensor:
            return self.tensor(change, role).to(device=device, dtype=dtype)

        def product(name: str, core: str) -> Tensor:
            """One factor, as a matrix: whole, of low rank, or of a Tucker core."""
            if name in change.tensors:
                return get(name).flatten(1)
            first, second = get(f"{name}_a"), get(f"{name}_b")
            return tucker(get(core), first, second) if core in change.tensors else first @ second

        scale = self.scale(change)
        inner: Branch
        if change.algorithm == "lora" and "mid" not in change.tensors:
            inner = LowRank(get("down").flatten(1), get("up").flatten(1), scale)
        elif change.algorithm == "lora":
            inner = Difference(tucker(get("mid"), get("up").flatten(1).T, get("down").flatten(1)), scale)
        elif change.algorithm == "loha" and "t1" not in change.tensors:
            inner = Hadamard(get("w1_a"), get("w1_b"), get("w2_a"), get("w2_b"), scale)
        elif change.algorithm == "loha":
            inner = Difference(product("w1", "t1") * product("w2", "t2"), scale)
        elif change.algorithm == "lokr":
            inner = Kronecker(product("w1", "t1"), product("w2", "t2"), scale)
        elif change.algorithm == "oft":
            inner = self._rotated(change, device)
        elif change.algorithm == "set":
            assert weight is not None, "the difference to the weight it replaces"
            inner = Difference((get("full").float().reshape(weight.shape) - weight).to(dtype), scale)
        else:
            inner = Difference(get("full") if weight is None else get("full").reshape(weight.shape), scale)
        if "magnitude" not in change.tensors:
            return inner
        assert weight is not None, "DoRA needs the weight it turns"
        magnitude = self.file.get(change.tensors["magnitude"]).to(device).float()
        return Decomposed(inner, magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude.flatten(1), weight)

    def _rotated(self, change: Change, device: torch.device | str) -> Rotated:
        """OFT, whose alpha is no scale: times the rows it limits how far the blocks turn."""
        found = {role: self.file.get(name).to(device).float() for role, name in change.tensors.items()}
        limit = float(found["alpha"].reshape(-1)[0]) * change.shape[0] if "alpha" in found else 0.0
        return Rotated(found["blocks"], limit, found.get("rescale"))

    def error(self, problem: str, hint: str = "", **details: Any) -> CheckpointError:
        return CheckpointError(f"{self.file.path} (LoRA in {self.dialect} names): {problem}", hint,
                               path=self.file.path, dialect=self.dialect, **details)  # fmt: skip


def read_lora(path: Path) -> LoraFile:
    """Return what a LoRA file (or PEFT folder) changes. Reads headers only.

    Raises CheckpointError for a file that is damaged, or holds no LoRA at all.
    """
    file = open_tensors(path)
    groups, leftover = _group(file)
    if not groups:
        first = ", ".join(file.names[:5]) or "none"
        raise CheckpointError(
            f"{path} is no LoRA: none of its {len(file)} tensors is a part of one; its first are {first}",
            "Pass a model to --dit, or a LoRA file here.",
            path=path,
        )
    found = spelling(groups)
    changes: list[Change] = []
    for spelled, roles in groups.items():
        made, why = _changes(file, spelled, roles, found)
        changes += made
        leftover |= why
    return LoraFile(file, dialect_name(found, file.names), found, tuple(changes), leftover, _peft_record(file))


def _group(file: TensorFile) -> tuple[dict[str, dict[str, tuple[str, str]]], dict[str, str]]:
    """Tensors by module as spelled, then by role: (algorithm, name); and those that are no part of a LoRA."""
    groups: dict[str, dict[str, tuple[str, str]]] = {}
    leftover: dict[str, str] = {}
    for name in file:
        parsed = ending(name)
        known = next((why for pattern, why in UNREAD if re.fullmatch(pattern, name)), None)
        if parsed is None or known:
            leftover[name] = known or "its ending is that of no LoRA tensor"
        elif parsed[2] == "blocks" and len(file.shape(name)) == 4:
            leftover[name] = BUTTERFLY
        elif parsed[2] in groups.setdefault(parsed[0], {}):
            leftover[name] = f"{groups[parsed[0]][parsed[2]][1]} says the same"
        else:
            groups[parsed[0]][parsed[2]] = (parsed[1], name)
    return {spelled: roles for spelled, roles in groups.items() if roles}, leftover


def _changes(
    file: TensorFile, spelled: str, roles: Mapping[str, tuple[str, str]], found: Spelling
) -> tuple[list[Change], dict[str, str]]:
    """The changes that the tensors of one module make, and the reasons for those that make none."""
    names = {role: name for role, (_, name) in roles.items()}
    other = next((why for pattern, why in OTHER_PARTS if re.fullmatch(pattern, spelled)), None)
    module = found.module(spelled)
    if other or module is None:
        return [], dict.fromkeys(names.values(), other or f"it does not begin with {found.prefix}")
    changes, used = [], set()
    for role, tensors in _complete({role: roles[role][0] for role in roles}, names):
        place = official(module, role, found.words, found.family)
        if place is None:
            return [], dict.fromkeys(names.values(), f"no part of a model is called {module} in {found.words} names")
        if place.swap and any(role in UNTURNED or kind in UNTURNED for role, (kind, _) in roles.items()):
            return [], dict.fromkeys(names.values(), f"the halves of {module} change places, and those of this cannot")
        if "full" in tensors:
            algorithm = "set" if role in roles and roles[role][0] == "set" else "diff"
        else:
            algorithm = next(roles[r][0] for r in tensors if roles[r][0] != "any")
        shape = _shape(file, algorithm, tensors)
        if shape is None or ("reshape" in tensors and tuple(file.get(tensors["reshape"]).tolist()) != shape):
            continue
        changes.append(Change(place.parameter, algorithm, tensors, shape, place.part, place.fused, place.swap))
        used |= set(tensors.values())
    rest = [name for name in names.values() if name not in used]
    return changes, dict.fromkeys(rest, "the other tensors that belong to it are missing, or do not fit it")


def _complete(kinds: Mapping[str, str], names: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """(what of the module changes, tensors by role) of every change these tensors make."""
    found: list[tuple[str, dict[str, str]]] = []
    for algorithm, sets in NEEDED.items():
        present = {role for role, kind in kinds.items() if kind == algorithm} - EXTRA
        needed = next((roles for roles in sets if roles == present), None)
        if needed:
            extra = ({"alpha"} if algorithm == "oft" else {"alpha", "magnitude", "reshape"}) & names.keys()
            found.append(("weight", {role: names[role] for role in (*sorted(needed), *sorted(extra))}))
            if "up_bias" in names:
                scale = {role: names[role] for role in ("alpha", "down") if role in names}
                found.append(("bias", {"full": names["up_bias"], **scale}))
    for role in ("weight", "bias", "modulation"):
        if kinds.get(role) in ("diff", "set"):
            found.append((role, {"full": names[role]}))
    return found


def _shape(file: TensorFile, algorithm: str, tensors: Mapping[str, str]) -> tuple[int, ...] | None:
    """The shape of what changes, None where the tensors do not fit each other."""
    shapes = {role: file.shape(name) for role, name in tensors.items()}
    if algorithm in ("diff", "set"):
        return shapes["full"]
    flat = {role: (shape[0], math.prod(shape[1:])) for role, shape in shapes.items() if len(shape) >= 2}
    if any(role not in flat for role in shapes if role not in EXTRA):
        return None
    if algorithm == "oft":
        return _rows_of_oft(shapes)

    def product(outward: str, inward: str, core: str, turned: bool = True) -> tuple[int, int] | None:
        """Shape of what two factors make, with a core between them if there is one; None where they do not fit."""
        (out, rank), (inner, into) = flat[outward], flat[inward]
        if core not in shapes:
            return (out, into) if rank == inner else None
        rank, out = (out, rank) if turned else (rank, out)  # beside a core, LoHa's and LoKr's stand the other way
        return (out, into * math.prod(shapes[core][2:])) if shapes[core][:2] == (rank, inner) else None

    found: tuple[int, int] | None
    if algorithm == "lora":
        found = product("up", "down", "mid", turned=False)
    else:
        first, second = (
            flat[w] if w in flat else product(f"{w}_a", f"{w}_b", core) for w, core in (("w1", "t1"), ("w2", "t2"))
        )
        if first is None or second is None or (algorithm == "loha" and first != second):
            return None
        found = first if algorithm == "loha" else (first[0] * second[0], first[1] * second[1])
    if found is None or not _fits_rows_or_columns(shapes.get("magnitude"), found):
        return None
    return found


def _rows_of_oft(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    blocks, rescale = shapes["blocks"], shapes.get("rescale")
    rows = math.prod(blocks[:2])
    fits = len(blocks) == 3 and blocks[1] == blocks[2] and (rescale is None or rescale[0] == math.prod(rescale) == rows)
    return (rows,) if fits else None


def _fits_rows_or_columns(magnitude: tuple[int, ...] | None, whole: tuple[int, int]) -> bool:
    """Whether the lengths of DoRA are those of rows (axes of size 1 behind, if any) or of columns."""
    if magnitude is None or magnitude == (1, whole[1]):
        return True
    return bool(magnitude) and magnitude[0] == math.prod(magnitude) == whole[0]


def _peft_record(file: TensorFile) -> dict[str, float]:
    """lora_alpha and use_rslora where PEFT or diffusers wrote them: beside the file, or into its header."""
    beside = file.files[0].with_name("adapter_config.json")
    try:
        if file.files[0].stem == "adapter_model" and beside.is_file():
            record = dict(json.loads(beside.read_text("utf-8")))
        else:
            written = dict(json.loads(file.metadata.get("lora_adapter_metadata", "{}")))
            parts = [key for key in written if key.startswith("transformer.")] or list(written)
            record = {key.rpartition(".")[2]: written[key] for key in parts}  # text encoders have records of their own
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path}: PEFT's record of its alpha cannot be read ({error})", path=file.path
        ) from error
    if record.get("alpha_pattern"):
        raise CheckpointError(
            f"{file.path} has an alpha of its own for some layers (PEFT's alpha_pattern), which is not read",
            "Save it with one alpha, or with .alpha tensors.",
            path=file.path,
        )
    return {key: float(record[key]) for key in ("lora_alpha", "use_rslora") if isinstance(record.get(key), int | float)}
