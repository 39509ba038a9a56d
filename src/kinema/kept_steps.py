"""A sampling that can go on where it was stopped: what the solver needs after a step, in a file beside the output.

The file replaces itself at once and whole, so that a kill at any moment leaves the last saved step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save

from kinema.errors import CheckpointError
from kinema.media.files import write_whole
from kinema.planning.outputs import parse_plan
from kinema.sampling.solvers import Step
from kinema.schema import Plan
from kinema.weights.files import open_tensors

STEPS_SUFFIX = ".steps.safetensors"
SECONDS = 60.0
"""Between two saves, unless the request says otherwise."""

KEY = "kinema_steps"


class KeptSteps:
    """The file of one seed's sampling.

    plan     of all seeds; index says which of them this is.
    after    the step that is done and behind which to go on; None at the beginning.
    """

    def __init__(self, plan: Plan, index: int, path: Path, after: Step | None = None) -> None:
        self.plan, self.index, self.path, self.after = plan, index, path, after
        every = plan.request.save_steps
        self._seconds = SECONDS if every is None else every
        self._last = time.monotonic()
        self._saved = self.done

    @classmethod
    def open(cls, path: Path) -> KeptSteps:
        """Return what a file holds that `keep` wrote.

        Raises CheckpointError for another file, and where a file of the plan is no longer the one it was.
        """
        file = open_tensors(path)
        if KEY not in file.metadata:
            raise CheckpointError(
                f"{path} holds no saved steps of Kinema",
                f"name a file NAME{STEPS_SUFFIX} that Kinema left beside an output",
                path=str(path),
            )
        state = json.loads(file.metadata[KEY])
        plan = parse_plan(json.dumps(state["plan"]), path)
        refuse_changed(plan, state["files"])
        memory = tuple(file.get(f"memory.{place}").clone() for place in range(len(file)))
        return cls(plan, int(state["index"]), path, Step(int(state["step"]), memory[0], memory[0], memory))

    @property
    def done(self) -> int:
        """How many steps were done before this run."""
        return 0 if self.after is None else self.after.index + 1

    def keep(self, step: Step) -> None:
        """Save a step, where it is time."""
        if time.monotonic() - self._last < self._seconds or step.index == len(self.plan.steps) - 1:
            return
        state = {"plan": self.plan.model_dump(mode="json"), "index": self.index, "step": step.index}
        metadata = {KEY: json.dumps(state | {"files": stamps(self.plan)})}
        tensors = {f"memory.{place}": tensor.cpu().contiguous() for place, tensor in enumerate(step.memory)}
        write_whole(self.path, save(tensors, metadata=metadata))
        self._last, self._saved = time.monotonic(), step.index + 1

    def remove(self) -> None:
        if self._saved:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def hint(self) -> str:
        """What to type to go on; "" where nothing is saved."""
        if not self._saved:
            return ""
        return f"{self._saved} of {len(self.plan.steps)} steps are saved; go on with: kinema resume {self.path}"


def stamps(plan: Plan) -> dict[str, list[int]]:
    """Size and time of change of every file a plan rests on."""
    found = {}
    for path in plan.files:
        with suppress(OSError):
            stat = path.stat()
            found[str(path)] = [stat.st_size, stat.st_mtime_ns]
    return found


def refuse_changed(plan: Plan, before: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError where a file of the plan is not the one whose stamps these are."""
    now = stamps(plan)
    changed = [name for name, stamp in before.items() if now.get(name) != stamp]
    if changed:
        raise CheckpointError(
            f"{changed[0]} has changed since, so what follows would not belong to what is done",
            "put the file back, or make the video anew: kinema replay takes a plan",
            path=changed[0],
        )
