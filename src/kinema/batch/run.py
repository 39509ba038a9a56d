"""Plan all lines, then run those that can: a failed line is told and the next one follows.

Yields what happens and leaves telling to the caller. Names the outputs of lines that name none, in the order
of the file, and never over a file that this batch did not make.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kinema.batch.manifest import Manifest, content_keys
from kinema.batch.sources import Line
from kinema.engine import Engine
from kinema.errors import Cancelled, KinemaError, RequestError
from kinema.planning import output_folder
from kinema.request import make_request
from kinema.schema import Event, Note, Plan, Request, Result


@dataclass(frozen=True)
class LineEvent:
    """Something that happened to a line."""

    line: Line
    event: Event | KinemaError


@dataclass(frozen=True)
class Job:
    """A line ready to run. `plan` holds only the seeds that are still to be made, none where all are there."""

    line: Line
    key: str
    plan: Plan | None = None
    fault: KinemaError | None = None


def manifest_path(source: Path, defaults: Mapping[str, object]) -> Path:
    """Return where the manifest of a batch lies: in the folder of the outputs, named after the prompt file.

    Raises RequestError where the outputs of all lines are sent to one file.
    """
    request = make_request({"save": defaults["save"]} if defaults.get("save") else {})
    if request.save and request.save.suffix:
        raise RequestError(
            f"save {request.save} is one file, and a batch makes many",
            f"pass --save {request.save.parent / request.save.stem}, a folder; a line may name its own file",
            field="save",
            got=str(request.save),
        )
    return output_folder(request) / f"{source.resolve().stem}.manifest.jsonl"


def plan_lines(engine: Engine, lines: Sequence[Line], manifest: Manifest) -> list[Job]:
    """Return a job a line: its plan, or its fault, or nothing left to do. Loads no weight."""
    keys = content_keys([line.request for line in lines])
    owned, taken = manifest.owned(), set[Path]()
    jobs = []
    for line, key in zip(lines, keys, strict=True):
        if line.request is None:
            jobs.append(Job(line, key, fault=line.fault))
            continue
        try:
            jobs.append(Job(line, key, _plan(engine, line, line.request, manifest, key, owned, taken)))
        except KinemaError as fault:
            jobs.append(Job(line, key, fault=fault))
    return jobs


def run_lines(
    engine: Engine, jobs: Sequence[Job], manifest: Manifest, cancelled: Callable[[], bool] = lambda: False
) -> Iterator[LineEvent]:
    """Yield the events of every job that has a plan, in order, and the error of each that fails.

    Raises Cancelled; what was finished by then stays finished.
    """
    for job in jobs:
        if job.plan is None:
            continue
        if cancelled():
            raise Cancelled("stopped between two lines; the same command goes on from here")
        try:
            yield from _run(engine, job, job.plan, manifest, cancelled)
        except Cancelled:
            raise
        except KinemaError as error:
            yield _failed(job, error, manifest)
        except Exception as error:  # one broken line must not cost the night's other lines
            trace = "".join(traceback.format_exception(error)[-3:])
            fault = KinemaError(
                f"{type(error).__name__}: {error}", "this is a fault of Kinema; please report it", trace=trace
            )
            yield _failed(job, fault, manifest)


def _run(
    engine: Engine, job: Job, plan: Plan, manifest: Manifest, cancelled: Callable[[], bool]
) -> Iterator[LineEvent]:
    if not manifest.record(job.key).seeds:
        manifest.started(job.key, job.line.number, plan.seeds, plan.output.paths)
    spent = 0.0
    for event in engine.run(plan, cancelled=cancelled):
        if isinstance(event, Result):
            total = sum(stage.seconds for stage in event.stages)
            manifest.made(job.key, job.line.number, event.seed, event.paths, total - spent)
            spent = total
        yield LineEvent(job.line, event)


def _failed(job: Job, error: KinemaError, manifest: Manifest) -> LineEvent:
    manifest.failed(job.key, job.line.number, error)
    return LineEvent(job.line, error)


# --- where the outputs of a line go ------------------------------------------------------------------


def _plan(
    engine: Engine, line: Line, request: Request, manifest: Manifest, key: str, owned: set[Path], taken: set[Path]
) -> Plan | None:
    """Return the plan of the seeds not made yet, None where the manifest has them all."""
    record = manifest.record(key)
    if record.seeds and not record.missing():
        return None
    named = request.save is not None and bool(request.save.suffix)
    # Existing files are judged below: this batch may replace what it made itself.
    plan = engine.plan(request.model_copy(update={"overwrite": True}) if named else request)
    if record.seeds:
        return _resumed(plan, record.seeds, record.outputs, record.missing())
    paths, notes = [], []
    for files in plan.output.paths:
        if named:
            notes += _check_named(request, files, owned, taken)
        else:
            files = _numbered(files, line.number, taken)
        taken.update(path.absolute() for path in files)
        paths.append(files)
    output = plan.output.model_copy(update={"paths": tuple(paths)})
    return plan.model_copy(update={"output": output, "notes": (*plan.notes, *notes)})


def _resumed(plan: Plan, seeds: Sequence[int], outputs: Sequence[tuple[Path, ...]], missing: Sequence[int]) -> Plan:
    paths = tuple(outputs[index] for index in missing)
    output = plan.output.model_copy(update={"paths": paths})
    note = Note(about="batch", text=f"goes on with {len(missing)} of {len(seeds)} seeds; the others are made")
    notes = (*plan.notes, note) if len(missing) < len(seeds) else plan.notes
    return plan.model_copy(update={"seeds": tuple(seeds[index] for index in missing), "output": output, "notes": notes})


def _check_named(request: Request, files: Sequence[Path], owned: set[Path], taken: set[Path]) -> list[Note]:
    notes = []
    resolved = {path.resolve() for path in owned}
    for path in files:
        if path.absolute() in taken:
            raise RequestError(
                f"save {path} is the output of an earlier line too",
                "give each line its own --save",
                field="save",
                got=str(path),
            )
        if path.exists() and not request.overwrite:
            if path.resolve() not in resolved:
                raise RequestError(
                    f"{path} exists already",
                    "pass another --save, or --overwrite to replace it",
                    field="save",
                    got=str(path),
                )
            notes.append(Note(about="save", text=f"{path} is made again: its line has changed"))
    return notes


def _numbered(files: Sequence[Path], number: int, taken: set[Path]) -> tuple[Path, ...]:
    """Put the line's number before each name, and a counter behind where a file is there already."""
    again = 1
    while True:
        extra = f"{number:04d}-" if again == 1 else f"{number:04d}-{again}-"
        names = tuple(path.with_name(extra + path.name) for path in files)
        if not any(path.exists() or path.absolute() in taken for path in names):
            return names
        again += 1


def summary(jobs: Sequence[Job], failed: Mapping[int, KinemaError]) -> str:
    """Return one sentence on how a batch ended; `failed` by line number, faults of planning included."""
    done = sum(1 for job in jobs if job.line.number not in failed)
    skipped = sum(1 for job in jobs if job.plan is None and job.fault is None)
    text = f"{done} of {len(jobs)} lines are made"
    if skipped:
        text += f", {skipped} of them before"
    return text + (f"; failed: line {', '.join(map(str, sorted(failed)))}" if failed else "")
