"""How far a run is: its plan, whether it is to stop, what each stage took, and the events that tell of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

from kinema.errors import Cancelled
from kinema.runtime.machine import PeakMemory
from kinema.schema import Plan, Progress, StageReport


class Stages:
    """What each stage of one run took; repeated stages (several seeds) add up in time.

    now   the stage that runs, or ran last.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._reports: dict[str, StageReport] = {}
        self._counts: Counter[str] = Counter()
        self.now = "start"

    @contextmanager
    def measure(self, stage: str, counted: bool = True) -> Iterator[None]:
        """A context in which that stage runs. Uncounted, it leaves no report: what it does says nothing of its cost."""
        began, self.now = time.perf_counter(), stage
        with PeakMemory(self._device) as peak:
            yield
        if not counted:
            return
        seconds = time.perf_counter() - began
        self._counts[stage] += 1
        before = self._reports.get(stage)
        self._reports[stage] = StageReport(
            stage=stage,
            seconds=seconds + (before.seconds if before else 0),
            peak_bytes=max(peak.bytes, before.peak_bytes if before else 0),
        )

    @property
    def reports(self) -> tuple[StageReport, ...]:
        return tuple(self._reports.values())

    def mean_seconds(self) -> dict[str, float]:
        """Return seconds of one go of each stage: of one seed, where it is run for each."""
        return {stage: report.seconds / self._counts[stage] for stage, report in self._reports.items()}


class Meter:
    """Counts the units of one stage into Progress events, with the time left at the pace so far.

    work   of each unit, where they differ.
    The first unit is left out of the pace as soon as there is a second: it loads and prepares.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        seed: int | None = None,
        work: Sequence[float] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stage, self._total, self._seed, self._clock = stage, total, seed, clock
        self._work_until = [0.0, *accumulate(work or [1.0] * total)]
        self._done = 0
        self._since, self._since_done = clock(), 0

    def start(self) -> Progress:
        return self._progress(None)

    def tick(self, units: int = 1) -> Progress:
        now = self._clock()
        first, self._done = self._done == 0, self._done + units
        until = self._work_until
        pace = (now - self._since) / (until[self._done] - until[self._since_done])
        if first:
            self._since, self._since_done = now, self._done
        return self._progress(pace * (until[-1] - until[self._done]))

    def _progress(self, eta_seconds: float | None) -> Progress:
        return Progress(stage=self._stage, done=self._done, total=self._total, eta_seconds=eta_seconds, seed=self._seed)


@dataclass(frozen=True)
class Run:
    """One plan under way. `cancelled` is asked now and then whether to stop."""

    plan: Plan
    cancelled: Callable[[], bool]
    stages: Stages

    @classmethod
    def of(cls, plan: Plan, cancelled: Callable[[], bool]) -> Run:
        return cls(plan, cancelled, Stages(plan.device))

    def of_seed(self, index: int) -> Run:
        """Return the run of one of several seeds, whose plan is what its output file carries."""
        output = self.plan.output.model_copy(update={"paths": (self.plan.output.paths[index],)})
        return replace(self, plan=self.plan.model_copy(update={"seeds": (self.plan.seeds[index],), "output": output}))

    def stop_if_asked(self) -> None:
        if self.cancelled():
            raise Cancelled("stopped as asked; no file was left half-written")
