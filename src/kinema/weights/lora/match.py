"""A LoRA against a model: which of its changes have a place there, and why the others have none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kinema.lora import LoraFacts, LoraMatch, Unmatched
from kinema.weights.detect import name_suggests
from kinema.weights.lora.file import Change, LoraFile

IMAGE_BRANCH = re.compile(r"img_emb\..+|.*\.cross_attn\.(k_img|v_img|norm_k_img)\..+")
"""Parameters of the image branch that Wan 2.1 image models have and 2.2 lacks."""


@dataclass(frozen=True)
class Matched:
    """changes: those with a place in the model. unmatched: every other tensor or parameter, with the reason."""

    changes: tuple[Change, ...]
    unmatched: tuple[Unmatched, ...]


def match(lora: LoraFile, shapes: Mapping[str, Sequence[int]]) -> Matched:
    """Return how a LoRA fits a model of these parameters: official name -> shape."""
    fitting, unmatched = [], [Unmatched(name=name, why=why) for name, why in lora.leftover.items()]
    has_image_branch = any(IMAGE_BRANCH.fullmatch(name) for name in shapes)
    for change in lora.changes:
        fault = _fault(change, shapes)
        if fault is None:
            fitting.append(change)
            continue
        kind = "image branch" if not has_image_branch and IMAGE_BRANCH.fullmatch(change.target) else fault[0]
        unmatched.append(Unmatched(name=change.target, why=fault[1], kind=kind))
    return Matched(tuple(fitting), tuple(unmatched))


def lora_facts(lora: LoraFile, roles: Mapping[str, Mapping[str, Sequence[int]]]) -> LoraFacts:
    """Return what planning needs to know of a LoRA: itself, and how it fits the model of each role."""
    found = {role: match(lora, shapes) for role, shapes in roles.items()}
    return LoraFacts(
        path=lora.file.path,
        files=lora.file.files,
        bytes=lora.file.bytes,
        parameters=sum(math.prod(lora.file.shape(name)) for name in lora.file),
        dialect=lora.dialect,
        family=lora.family,
        algorithms=lora.algorithms,
        ranks=lora.ranks,
        name_suggests=name_suggests(lora.file.path),
        total=len(lora.changes) + len(lora.leftover),
        matches={
            role: LoraMatch(targets=tuple(change.target for change in fits.changes), unmatched=fits.unmatched)
            for role, fits in found.items()
        },
    )


def _fault(change: Change, shapes: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
    """(kind, reason) why a change has no place in the model, None where it has."""
    if change.target not in shapes:
        return "absent", "the model has no such part"
    shape = tuple(shapes[change.target]) or (1,)
    flat = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape
    own = (change.shape[0], math.prod(change.shape[1:])) if len(change.shape) > 1 else change.shape
    start, height = change.rows(shape[0])
    wide = len(flat) == 2 if change.algorithm == "oft" else len(own) == len(flat) and own[1:] == flat[1:]
    if wide and start >= 0 and start + height <= shape[0] and height == own[0]:
        return None
    return "shape", f"it is for a weight of {list(change.shape)}, the model's is {list(shape)}"
