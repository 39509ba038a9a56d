"""Many prompts on one engine: typed at a prompt, or from a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kinema.batch.lines import parse_line
from kinema.batch.manifest import Manifest
from kinema.batch.run import manifest_path, plan_lines, run_lines, summary
from kinema.batch.sources import read_lines
from kinema.cli.interrupt import Interruption
from kinema.cli.tell import Teller
from kinema.engine import Engine
from kinema.errors import KinemaError
from kinema.request import make_request, merge
from kinema.schema import Settings

ENDINGS = ("exit", "quit")


def interact(fields: Mapping[str, Any], settings: Settings, teller: Teller) -> int:
    """Run each line that is typed over `fields` until `exit` or the end of input; errors are told and end nothing."""
    with Engine(settings) as engine:
        for line in _typed_lines():
            if line in ENDINGS:
                break
            try:
                request = make_request(merge(fields, parse_line(line, fields)))
                plan = engine.plan(request)
                with Interruption() as cancelled:
                    for event in engine.run(plan, cancelled=cancelled):
                        teller.event(event)
            except KinemaError as error:
                teller.error(error)
    return 0


def run_batch(source: Path, fields: Mapping[str, Any], settings: Settings, teller: Teller, *, fresh: bool) -> int:
    """Plan all lines of a file, tell every fault, run the others; return 0 or the code of the first failed line."""
    path = manifest_path(source, fields)
    lines = read_lines(source, fields)
    manifest = Manifest(path, fresh)
    failed: dict[int, KinemaError] = {}
    with Engine(settings) as engine, Interruption() as cancelled:
        for note in manifest.notes:
            teller.event(note)
        jobs = plan_lines(engine, lines, manifest)
        for job in jobs:
            if job.fault is not None:
                failed[job.line.number] = job.fault
                teller.error(job.fault, job.line.where)
        for happened in run_lines(engine, jobs, manifest, cancelled):
            if isinstance(happened.event, KinemaError):
                failed[happened.line.number] = happened.event
                teller.error(happened.event, happened.line.where)
            else:
                teller.event(happened.event, happened.line.where)
    teller.say(summary(jobs, failed))
    return failed[min(failed)].exit_code if failed else 0


def _typed_lines() -> Iterator[str]:
    """Yield lines as typed, with editing and history at a terminal; no blank lines, no comments."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  editing and history come with the import
    while True:
        try:
            line = input("kinema> ") if at_terminal else sys.stdin.readline()
        except EOFError:
            return
        if not line and not at_terminal:
            return
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()
