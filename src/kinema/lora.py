"""LoRA as it is asked for, as its header shows it, as it is published and as it is planned: the nouns, without tensors.

No torch; what the tensors mean is kinema.weights.lora's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


LORA_SYNTAX = "FILE[:STRENGTH][@high|@low|@both][,steps=FIRST-LAST][,only=PATTERN|...][,skip=PATTERN|...][,allow=...]"
_LORA_TAIL = re.compile(
    r"(?P<path>.+?)(?::(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?))?(?:@(?P<expert>high|low|both))?"
    r"(?P<options>(?:,steps=[\d-]+|,(?:only|skip|allow)=[^,:@]+)*)",
    re.DOTALL,
)


def _first_message(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return str(fault.get("ctx", {}).get("error") or f"{where}: {fault['msg']}, got {fault['input']!r}")


def _parse_lora(value: Any) -> Any:
    """A LoRA as text -> its fields. Everything before the longest tail that can be read is the path."""
    if not isinstance(value, str | Path):
        return value
    match = _LORA_TAIL.fullmatch(str(value))
    if match is None:
        raise ValueError(f"lora {str(value)!r} names no file; write {LORA_SYNTAX}")
    fields = {name: match[name] for name in ("path", "strength", "expert") if match[name]}
    for option in filter(None, match["options"].split(",")):
        name, _, text = option.partition("=")
        if name in fields:
            raise ValueError(f"lora {value}: {name} is given twice; write {LORA_SYNTAX}")
        fields[name] = text
    return fields


def _parse_steps(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    first, dash, last = value.partition("-")
    if not re.fullmatch(r"\d*-\d*|\d+", value) or value == "-":
        raise ValueError(f"steps {value!r} is not FIRST-LAST, counted from 1; for example 1-2, 3- or 4")
    return (int(first or 1), (int(last) if last else None) if dash else int(first))


def _check_steps(value: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
    if value is not None and (value[0] < 1 or (value[1] is not None and value[1] < value[0])):
        raise ValueError(f"steps {value[0]}-{value[1]} is no range; the first step is 1, the last not before the first")
    return value


def _patterns(value: Any) -> Any:
    return tuple(part for part in value.split("|") if part) if isinstance(value, str) else value


class LoraRef(Frozen):
    """One LoRA: the file, how strong, and where it acts.

    path      file, PEFT folder, or the name of a file in the `loras` folder of a models folder.
    strength  factor on the change of the weights; 0 is off, below 0 the opposite.
    expert    of two-expert models: high, low or both. None: what the file's name says, else both.
    steps     (first, last) denoising steps, counted from 1; last None is the end.
    only      glob patterns over official parameter names (or their starts): the layers that change.
    skip      the same, for layers that do not change.
    allow     what is not to be refused: "unmatched" tensors, an "expert" its name contradicts.
    """

    path: Path
    strength: float = Field(default=1.0, allow_inf_nan=False)
    expert: Literal["high", "low", "both"] | None = None
    steps: Annotated[tuple[int, int | None] | None, BeforeValidator(_parse_steps), AfterValidator(_check_steps)] = None
    only: Annotated[tuple[str, ...], BeforeValidator(_patterns)] = ()
    skip: Annotated[tuple[str, ...], BeforeValidator(_patterns)] = ()
    allow: Annotated[tuple[Literal["unmatched", "expert"], ...], BeforeValidator(_patterns)] = ()

    def __str__(self) -> str:
        """Return the text that is read back as this LoRA."""
        text = f"{self.path}:{self.strength!r}" + (f"@{self.expert}" if self.expert else "")
        if self.steps:
            text += f",steps={self.steps[0]}-{self.steps[1] or ''}"
        for name in ("only", "skip", "allow"):
            text += f",{name}={'|'.join(getattr(self, name))}" if getattr(self, name) else ""
        return text

    def strength_at(self, step: int) -> float:
        """Return the strength at a step counted from 1."""
        first, last = self.steps or (1, None)
        return self.strength if first <= step and (last is None or step <= last) else 0.0

    def selects(self, parameter: str) -> bool:
        """Whether an official parameter changes: it is one of `only` (all, without one) and none of `skip`.

        A pattern is a glob over the name or over its start: `blocks.0` means all of that block.
        """
        wanted = not self.only or any(_fits(pattern, parameter) for pattern in self.only)
        return wanted and not any(_fits(pattern, parameter) for pattern in self.skip)

    def idle(self, parameters: Sequence[str]) -> str | None:
        """Return the first of the layer patterns that fits none of these parameters, as it was written."""
        for name, patterns in (("only", self.only), ("skip", self.skip)):
            for pattern in patterns:
                if not any(_fits(pattern, parameter) for parameter in parameters):
                    return f"{name}={pattern}"
        return None


def _fits(pattern: str, parameter: str) -> bool:
    return fnmatchcase(parameter, pattern) or fnmatchcase(parameter, f"{pattern}.*")


def parse_loras(value: Any) -> tuple[LoraRef, ...]:
    """Return the LoRAs that a text, a table of fields, or several of them describe. Raises ValueError."""
    given = value if isinstance(value, list | tuple) else (value,)
    try:
        return tuple(item if isinstance(item, LoraRef) else LoraRef.model_validate(_parse_lora(item)) for item in given)
    except ValidationError as error:
        raise ValueError(f"lora {_first_message(error)}") from None


class Unmatched(Frozen):
    """A part of a LoRA that has no place in a model: the official parameter, or the tensor nobody understands.

    kind  "unknown" name, "absent" from the model, another "shape", or of the 2.1 "image branch" that a model lacks.
    """

    name: str
    why: str
    kind: Literal["unknown", "absent", "shape", "image branch"] = "unknown"


class LoraMatch(Frozen):
    """How a LoRA fits one model. targets: the official parameters it changes, one for each change."""

    targets: tuple[str, ...]
    unmatched: tuple[Unmatched, ...] = ()


class LoraFacts(Frozen):
    """What one LoRA says of itself, from its header alone, and how it fits the model of each role.

    parameters  numbers in its tensors.
    total    changes it makes, and tensors that are part of none.
    known    its name in the catalog of published LoRAs, None for others.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    parameters: int = 0
    dialect: str
    family: Literal["wan", "flux"]
    algorithms: dict[str, int]
    ranks: tuple[int, ...] = ()
    name_suggests: Literal["high", "low"] | None = None
    total: int
    matches: dict[str, LoraMatch] = {}
    known: str | None = None


class CatalogLora(Frozen):
    """One published LoRA (of a two-expert model: the pair), and, where it is distilled, how it wants to be sampled.

    files    glob patterns over a file's name or its folder/name, in any case.
    used_by  models of the catalog it is known to serve, its own first; no pair of these is refused.
    one_expert  which of a pair serves the models of `used_by` that have one expert.
    sigmas   of each step, where they follow no shift.
    steps, shift, guidance, solver, boundary  None leaves the model's own; without steps it is no preset.
    """

    name: str
    title: str
    files: tuple[str, ...]
    used_by: tuple[str, ...]
    one_expert: Literal["high", "low"] | None = None
    steps: int | None = None
    sigmas: tuple[float, ...] = ()
    shift: float | None = None
    guidance: float | None = None
    solver: Literal["unipc", "dpmpp", "euler"] | None = None
    boundary: float | None = None
    source: str = ""
    licence: str = ""

    @property
    def is_preset(self) -> bool:
        return self.steps is not None


class LoraPlan(Frozen):
    """One LoRA on one expert: the report of what it changes.

    matched, total  changes that have a place in the model, of all the file makes.
    left_out        what has none, in words, and why that is no fault; chosen: how many the layer patterns leave.
    change          size of the change at full strength: its norm over that of the weights it changes; from the run.
    """

    path: Path
    expert: Literal["model", "high", "low"]
    strength: float
    dialect: str
    algorithms: dict[str, int]
    ranks: tuple[int, ...] = ()
    matched: int
    total: int
    chosen: int
    left_out: tuple[str, ...] = ()
    known: str | None = None
    bytes: int = 0
    change: float | None = None

    @property
    def said(self) -> str:
        """The report in one line."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.algorithms.items())
        parts = [
            self.path.name + ("" if self.expert == "model" else f" on the {self.expert}-noise expert"),
            f": {self.matched} of {self.total} parts matched ({self.dialect} names, {kinds}",
            f", rank {'-'.join(map(str, sorted({self.ranks[0], self.ranks[-1]})))})" if self.ranks else ")",
            "" if self.chosen == self.matched else f", {self.chosen} of them chosen",
            f", strength {self.strength:g}",
        ]
        if self.change is not None:
            parts.append(f"; at strength 1 it changes those weights by {self.change:.2%} of their norm")
        return "".join(parts)
