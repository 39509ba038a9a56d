"""What happens during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kinema.schema.facts import Note
from kinema.schema.plan import Plan
from kinema.schema.words import Frozen


class Progress(Frozen):
    """A stage has done `done` of `total` units; `eta_seconds` for this stage, None before the first unit.

    rate   units a second, where it is measured.
    """

    stage: str
    done: int
    total: int
    unit: Literal["", "bytes"] = ""
    rate: float | None = None
    eta_seconds: float | None = None
    seed: int | None = None


class Preview(Frozen):
    """A preview frame was written to `path` after step `step`."""

    step: int
    path: Path


class StageReport(Frozen):
    """What one stage really took."""

    stage: str
    seconds: float
    peak_bytes: int


class Result(Frozen):
    """One finished video: the files written, and what each stage took."""

    seed: int
    paths: tuple[Path, ...]
    plan: Plan
    stages: tuple[StageReport, ...]


Event = Progress | Preview | Note | Result
