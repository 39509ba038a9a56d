"""Which LoRA changes which expert, how strongly at each step, and what of it is refused. Pure Python.

A LoRA is applied wholly, or the plan says what is left out and why, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from kinema.errors import RequestError
from kinema.lora import LoraFacts, LoraMatch, LoraRef, Unmatched
from kinema.schema import (
    CatalogEntry,
    CatalogLora,
    Expert,
    Facts,
    LoraPlan,
    ModelRef,
    Note,
    PlanStep,
    Quantise,
    Request,
)

ROLES: dict[Expert, str] = {"high": "dit_high", "low": "dit", "model": "dit"}
NAMED = 3
"""Names of parameters that a message gives before it says how many more there are."""


@dataclass(frozen=True)
class Loras:
    """LoRAs of each expert as its model will hold them, their reports, and the preset that came with one."""

    refs: dict[Expert, tuple[LoraRef, ...]]
    reports: tuple[LoraPlan, ...]
    preset: CatalogLora | None
    distilled: dict[Expert, str]
    parameters: dict[Path, int]


def plan_loras(request: Request, entry: CatalogEntry, facts: Facts, notes: list[Note]) -> Loras:
    """Return what every LoRA of the request changes.

    Raises RequestError for one that would not act as asked: unmatched, on the wrong expert, contradictory.
    """
    refs: dict[Expert, list[LoraRef]] = {expert: [] for expert in entry.experts}
    reports: list[LoraPlan] = []
    distilled: dict[Expert, str] = {}
    names: set[str] = set()
    for ref, found in zip(request.lora, facts.loras, strict=True):
        if found.family != entry.family:
            raise _refused(ref, f"is a LoRA for {found.family.upper()}; {entry.name} is {entry.family.title()}",
                           "take one that was made for this model")  # fmt: skip
        known = facts.known_loras.get(found.known or "")
        if known and entry.name not in known.used_by:
            notes.append(_note(ref, f"{known.title}: known to serve {', '.join(known.used_by)}, not {entry.name}"))
        for expert in _experts(ref, found, known, entry, notes):
            report = _report(ref, found, known, entry, expert, notes)
            refs[expert].append(ref.model_copy(update={"path": found.files[0], "expert": None}))
            reports.append(report)
            if known and known.is_preset and ref.strength:
                distilled[expert] = known.name
                names.add(known.name)
    preset = _preset(request, entry, facts, set(distilled), names, notes)
    if request.lora_mode == "fuse" and any(ref.steps for ref in request.lora):
        raise RequestError("a LoRA that is fused into the weights acts at every step; steps=... cannot be kept",
                           "pass --lora-mode branch", field="lora_mode", got="fuse")  # fmt: skip
    held = {expert: tuple(found) for expert, found in refs.items()}
    parameters = {found.files[0]: found.parameters for found in facts.loras}
    return Loras(held, tuple(reports), preset, distilled, parameters)


def with_preset(entry: CatalogEntry, preset: CatalogLora | None) -> CatalogEntry:
    """Return the model with the defaults of a preset in place of its own."""
    if preset is None:
        return entry
    fields = ("steps", "shift", "guidance", "solver", "boundary")
    update: dict[str, Any] = {name: value for name in fields if (value := getattr(preset, name)) is not None}
    if preset.shift is not None:
        update["shift_480p"] = None
    if preset.guidance is not None:
        update["guidance_high"] = preset.guidance
    return entry.model_copy(update=update)


def with_loras(experts: Mapping[Expert, ModelRef], loras: Loras, request: Request) -> dict[Expert, ModelRef]:
    """Return the recipes of the experts with their LoRAs. RequestError for packed weights, which cannot be added to."""
    mode = request.lora_mode or "branch"
    packed = next((ref for ref in experts.values() if ref.quantisation not in ("", *get_args(Quantise))), None)
    if mode == "fuse" and packed and any(loras.refs.values()):
        raise RequestError(
            f"lora_mode fuse: {packed.files[0].name} is quantised ({packed.quantisation}), and adding to its numbers "
            "would round them again",
            "pass --lora-mode branch, which is exact, or take the fp16 or bf16 file",
            field="lora_mode",
            got="fuse",
        )
    return {expert: _held(ref, loras, expert, mode) if loras.refs[expert] else ref for expert, ref in experts.items()}


def _held(ref: ModelRef, loras: Loras, expert: Expert, mode: str) -> ModelRef:
    numbers = sum(loras.parameters[lora.path] for lora in loras.refs[expert]) if mode == "branch" else 0
    held = numbers * (4 if ref.dtype == "float32" else 2)
    return ref.model_copy(update={"loras": loras.refs[expert], "lora_mode": mode, "lora_bytes": held})


def step_strengths(
    steps: Sequence[PlanStep], loras: Loras, request: Request, notes: list[Note]
) -> tuple[PlanStep, ...]:
    """Return the steps with the strength of each LoRA of their expert.

    Raises RequestError for guidance that a distilled LoRA already contains, and for steps that do not exist.
    """
    for ref in request.lora:
        first, last = ref.steps or (1, None)
        if max(first, last or 1) > len(steps):
            raise _refused(ref, f"acts at steps {first}-{last or ''}; there are {len(steps)}",
                           f"write steps={min(first, len(steps))}-{len(steps)}")  # fmt: skip
    made = []
    for number, step in enumerate(steps, 1):
        strengths = tuple(ref.strength_at(number) for ref in loras.refs.get(step.expert, ()))
        made.append(step.model_copy(update={"loras": strengths}) if strengths else step)
        preset = loras.preset and loras.preset.guidance
        if step.expert in loras.distilled and preset is not None and step.guidance != preset:
            which = "" if step.expert == "model" else f" of the {step.expert}-noise expert"
            raise RequestError(
                f"guidance {step.guidance:g}{which} with the distilled LoRA {loras.distilled[step.expert]}, "
                f"which already contains it: allowed is {preset:g}",
                f"pass --guidance {preset:g}, or --preset none to sample it as the plain model",
                field="guidance",
                got=step.guidance,
                allowed=preset,
            )
    for expert, refs in loras.refs.items():
        for index, ref in enumerate(refs):
            if not any(step.loras[index] for step in made if step.expert == expert):
                notes.append(_note(ref, f"has no effect on {_named(expert)}: no step of it has a strength but 0"))
    return tuple(made)


# --- one LoRA on one expert --------------------------------------------------------------------------


def _experts(
    ref: LoraRef, found: LoraFacts, known: CatalogLora | None, entry: CatalogEntry, notes: list[Note]
) -> tuple[Expert, ...]:
    """The experts a LoRA goes to: as asked, else as its name says, else all. What its name contradicts is refused."""
    says, told = found.name_suggests, "expert" in ref.allow
    if "high" not in entry.experts:
        if ref.expert not in (None, "both"):
            raise _refused(ref, f"is for the {ref.expert}-noise expert; {entry.name} has one expert", "leave out @...")
        official = known is not None and entry.name in known.used_by and says == known.one_expert
        if says and not told and not official:
            raise _refused(ref, f"is named as the {says}-noise half of a pair; {entry.name} has one expert",
                           f"if it is meant, write {_with(ref, 'expert')}")  # fmt: skip
        return ("model",)
    asked: tuple[Literal["high", "low"], ...] = ("high", "low") if ref.expert in (None, "both") else (
        cast(Literal["high", "low"], ref.expert),)  # fmt: skip
    if ref.expert is None:
        asked = (says,) if says else asked
        where = f"the {says}-noise expert, as its name says" if says else "both experts; @high or @low names one"
        notes.append(_note(ref, f"goes to {where}"))
    elif says and not told and asked != (says,):
        wrong = "low" if says == "high" else "high"
        raise _refused(
            ref,
            f"is named as the {says}-noise LoRA and is put on the {wrong}-noise expert",
            f"write {ref.model_copy(update={'expert': says})}; if it is meant, {_with(ref, 'expert')}",
        )
    return asked


def _report(
    ref: LoraRef, found: LoraFacts, known: CatalogLora | None, entry: CatalogEntry, expert: Expert, notes: list[Note]
) -> LoraPlan:
    """What it changes on one expert. Raises RequestError for unmatched parts that nothing explains or allows."""
    match = found.matches[ROLES[expert]]
    official = known is not None and entry.name in known.used_by
    unexplained = [item for item in match.unmatched if _explanation(item, entry, official) is None]
    left_out = list(dict.fromkeys(
        why for item in match.unmatched if (why := _explanation(item, entry, official)) is not None))  # fmt: skip
    if not match.targets:
        raise _refused(ref, f"matches nothing of {entry.name}: none of {found.total} parts; {_some(match.unmatched)}",
                       "take a LoRA that was made for this model")  # fmt: skip
    if unexplained and "unmatched" not in ref.allow:
        raise _refused(
            ref,
            f"matches {len(match.targets)} of {found.total} parts of {_named(expert)} ({found.dialect} names); "
            f"{_some(unexplained)}",
            f"take a LoRA made for {entry.name}; to use it without those parts, write {_with(ref, 'unmatched')}",
            unmatched=[item.name for item in unexplained],
        )
    if unexplained:
        left_out.append(f"as allowed, {_some(unexplained)}")
    chosen = _chosen(ref, match)
    notes += [_note(ref, f"left out on {_named(expert)}: {why}") for why in left_out]
    return LoraPlan(
        path=found.files[0], expert=expert, strength=ref.strength, dialect=found.dialect, algorithms=found.algorithms,
        ranks=found.ranks, matched=len(match.targets), total=found.total, chosen=chosen, left_out=tuple(left_out),
        known=found.known, bytes=found.bytes,
    )  # fmt: skip


def _explanation(item: Unmatched, entry: CatalogEntry, official: bool) -> str | None:
    if item.kind == "image branch":
        return f"the image branch of Wan 2.1, which {entry.name} lacks"
    if item.kind == "shape" and official and item.name == "patch_embedding.weight":
        return f"the patch embedding: {entry.name} has other input channels than the model it was made for"
    return None


def _chosen(ref: LoraRef, match: LoraMatch) -> int:
    """How many changes the layer patterns leave; each pattern must mean something."""
    if pattern := ref.idle(match.targets):
        example = ", ".join(match.targets[:NAMED])
        raise _refused(ref, f"{pattern} fits none of the {len(match.targets)} layers it changes",
                       f"names look like: {example}; a * stands for anything")  # fmt: skip
    chosen = sum(ref.selects(target) for target in match.targets)
    if not chosen:
        raise _refused(ref, "its patterns leave no layer to change", "drop skip=..., or widen only=...")
    return chosen


# --- presets -------------------------------------------------------------------------------------------


def _preset(
    request: Request, entry: CatalogEntry, facts: Facts, distilled: set[Expert], names: set[str], notes: list[Note]
) -> CatalogLora | None:
    """The one preset of this run: as asked, else that of the distilled LoRAs (`names`, on the experts `distilled`)."""
    presets = {name: lora for name, lora in facts.known_loras.items() if lora.is_preset}
    if request.preset == "none":
        return None
    if request.preset is not None and request.preset not in presets:
        raise RequestError(f"preset {request.preset!r} is none of {', '.join(presets)}, none", "name one of them",
                           field="preset", got=request.preset, allowed=[*presets, "none"])  # fmt: skip
    names = names | ({request.preset} if request.preset else set())
    if len(names) > 1:
        raise RequestError(
            f"{' and '.join(sorted(names))} are distilled for different sampling and cannot be mixed",
            "take the LoRAs of one, or --preset none to set steps, shift and guidance yourself",
            field="preset",
            got=request.preset or sorted(names),
        )
    if not names:
        return None
    preset = presets[names.pop()]
    if distilled and distilled != set(entry.experts):
        missing = next(expert for expert in entry.experts if expert not in distilled)
        raise RequestError(
            f"{preset.name} is a pair, and the {missing}-noise expert has no LoRA of it: at {preset.steps} steps "
            "without guidance that expert alone would fail",
            f"pass the {missing}-noise file as well, or --preset none with steps and guidance of your own",
            field="lora",
            got=[str(ref) for ref in request.lora],
        )
    if not distilled and entry.name not in preset.used_by:
        raise RequestError(f"preset {preset.name} is for {', '.join(preset.used_by)}, not {entry.name}",
                           "leave it out", field="preset", got=preset.name, allowed=list(preset.used_by))  # fmt: skip
    own = {name: getattr(request, name) for name in ("steps", "shift", "solver", "boundary")}
    differs = [f"{name} {value}" for name, value in own.items()
               if value is not None and getattr(preset, name) not in (None, value)]  # fmt: skip
    values = [f"{name} {value}" for name in ("steps", "shift", "guidance", "solver", "boundary")
              if (value := getattr(preset, name)) is not None]  # fmt: skip
    text = f"{preset.title}: {', '.join(values)}" + (f"; changed by you: {', '.join(differs)}" if differs else "")
    notes.append(Note(about="preset", text=text))
    return preset


# --- words -----------------------------------------------------------------------------------------------


def _named(expert: Expert) -> str:
    return "the model" if expert == "model" else f"the {expert}-noise expert"


def _some(items: Sequence[Unmatched]) -> str:
    first = "; ".join(f"{item.name}: {item.why}" for item in items[:NAMED])
    return f"{len(items)} unmatched: {first}{'; ...' if len(items) > NAMED else ''}"


def _with(ref: LoraRef, allow: Literal["unmatched", "expert"]) -> str:
    return str(ref.model_copy(update={"allow": (*ref.allow, allow)}))


def _note(ref: LoraRef, text: str) -> Note:
    return Note(about="lora", text=f"{ref.path.name}: {text}")


def _refused(ref: LoraRef, fault: str, hint: str, **details: Any) -> RequestError:
    return RequestError(f"lora {ref.path} {fault}", hint, field="lora", got=str(ref), **details)
