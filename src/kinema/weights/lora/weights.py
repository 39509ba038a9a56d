"""A model file as the numbers a LoRA changes: parameters by official name, in float32, however they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from kinema.errors import RequestError
from kinema.lora import LoraFacts, LoraRef, Unmatched
from kinema.weights.detect import inspect, name_suggests
from kinema.weights.keys import translate
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.fuse import Fusion
from kinema.weights.lora.match import lora_facts
from kinema.weights.quantised.schemes import open_weights


class Weights:
    """The parameters of one checkpoint. Raises CheckpointError for a file that is no model."""

    def __init__(self, path: Path) -> None:
        self.facts = inspect(path)
        self.path = path
        self._translation = translate(open_weights(path))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._translation.shape(name) for name in self._translation.sources}

    def get(self, name: str) -> Tensor:
        """Return one parameter, float32."""
        return self._translation.read(name).float()


def fitted(refs: Sequence[LoraRef], weights: Weights) -> Fusion:
    """Return the LoRAs as they are added to a model's weights.

    Raises RequestError for one that would not act wholly or is named as the other expert's, unless it says `allow`.
    """
    for ref in refs:
        _check(ref, weights)
    return Fusion(refs, weights.shapes)


def _check(ref: LoraRef, weights: Weights) -> None:
    facts, model, said = fit(ref.path, weights), weights.path.name, name_suggests(weights.path)
    targets, lost = facts.matches["dit"].targets, unexplained(facts.matches["dit"].unmatched)
    if not targets or (lost and "unmatched" not in ref.allow):
        first = "; ".join(f"{item.name}: {item.why}" for item in lost[:3])
        raise _refused(ref, f"matches {len(targets)} of {facts.total} parts of {model}: {first}",
                       "take a LoRA made for this model; FILE,allow=unmatched does without them")  # fmt: skip
    if facts.name_suggests and said not in (None, facts.name_suggests) and "expert" not in ref.allow:
        raise _refused(ref, f"is named as the {facts.name_suggests}-noise LoRA, {model} as the {said}-noise expert",
                       "take the other one, or write FILE,allow=expert if it is meant")  # fmt: skip
    if ref.steps or ref.expert:
        part = f"steps={ref.steps[0]}-..." if ref.steps else f"@{ref.expert}"
        raise _refused(ref, f"{part} means nothing for weights in a file", "leave it out")
    if pattern := ref.idle(targets):
        raise _refused(ref, f"{pattern} fits none of the {len(targets)} layers it changes",
                       f"names look like: {', '.join(targets[:3])}")  # fmt: skip


def _refused(ref: LoraRef, fault: str, hint: str) -> RequestError:
    return RequestError(f"lora {ref.path} {fault}", hint, field="lora", got=str(ref))


def fit(path: Path, weights: Weights) -> LoraFacts:
    """Return what a LoRA is and how it fits one model."""
    return lora_facts(read_lora(path), {"dit": weights.shapes})


def unexplained(items: Iterable[Unmatched]) -> list[Unmatched]:
    return [item for item in items if item.kind != "image branch"]


def sizes(ref: LoraRef, weights: Weights) -> float:
    """Return by how much a LoRA changes the weights of a model at strength 1: norm of the change over theirs."""
    fusion = Fusion([ref], weights.shapes)
    for name in weights.shapes:
        if name in fusion:
            fusion(name, weights.get(name))
    return fusion.sizes[0]
