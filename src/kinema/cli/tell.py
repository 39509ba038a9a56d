"""Events told: progress bars and paths for people, one JSON object a line for machines.

Both kinds of teller have the same four methods; results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any, Protocol, Self, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from kinema.errors import Cancelled, KinemaError
from kinema.schema import Event, Note, Progress, Result

T = TypeVar("T")


class Teller(Protocol):
    """Tells what happens; `where` names the line of a batch."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def event(self, event: Event, where: str = "") -> None: ...
    def error(self, error: KinemaError, where: str = "") -> None: ...
    def say(self, text: str) -> None: ...
    def show(self, text: str, data: Any) -> None: ...


def make_teller(as_json: bool) -> Teller:
    return JsonTeller() if as_json else TerminalTeller()


def told(making: Generator[Event, None, T], teller: Teller, cancelled: Callable[[], bool]) -> T:
    """Tell what a generator yields and return what it returns; Cancelled, with the generator closed, once asked."""
    while True:
        try:
            teller.event(next(making))
        except StopIteration as end:
            return cast(T, end.value)
        if cancelled():
            making.close()
            raise Cancelled("stopped as asked; no file was left half-written")


class JsonTeller:
    """One JSON object a line on stdout: {"event": "progress" | "preview" | "note" | "result" | "error", ...}."""

    def __enter__(self) -> JsonTeller:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def event(self, event: Event, where: str = "") -> None:
        self._put(type(event).__name__.lower(), event.model_dump(mode="json"), where)

    def error(self, error: KinemaError, where: str = "") -> None:
        self._put("error", error.to_dict(), where)

    def say(self, text: str) -> None:
        self._put("note", {"about": "batch", "text": text}, "")

    def show(self, text: str, data: Any) -> None:
        print(json.dumps(data, ensure_ascii=False), flush=True)

    def _put(self, kind: str, data: dict[str, Any], where: str) -> None:
        head = {"event": kind, "where": where} if where else {"event": kind}
        print(json.dumps(head | data, ensure_ascii=False), flush=True)


class Done(ProgressColumn):
    """How much is done: a count, or of bytes gigabytes and their rate."""

    def render(self, task: Task) -> Text:
        if task.fields.get("unit") != "bytes":
            return Text(f"{task.completed:.0f}/{task.total or 0:.0f}", style="green")
        rate = task.fields.get("rate")
        speed = f", {rate / 1e6:.0f} MB/s" if rate else ""
        return Text(f"{gigabytes(task.completed)} of {gigabytes(task.total or 0)}{speed}", style="green")


class TimeLeft(ProgressColumn):
    """The time left that the engine measured, not one guessed from the bar."""

    def render(self, task: Task) -> Text:
        seconds = task.fields.get("eta_seconds")
        if task.finished:
            return Text(f"{task.finished_time or 0:.1f} s", style="dim")
        return Text("" if seconds is None else f"{duration(seconds)} left", style="cyan")


class TerminalTeller:
    """Bars per stage on stderr, paths of results on stdout."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False, markup=False)
        self._bars: Bars | None = None
        self._tasks: dict[tuple[str, int | None], TaskID] = {}

    def __enter__(self) -> TerminalTeller:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bars()

    def event(self, event: Event, where: str = "") -> None:
        if isinstance(event, Progress):
            self._progress(event, where)
        elif isinstance(event, Note):
            self._console.print(f"{_prefix(where)}note: {event.text}", style="dim")
        elif isinstance(event, Result):
            self._stop_bars()
            self._console.print(_prefix(where) + stages_text(event), style="dim")
            for path in event.paths:
                print(path, flush=True)

    def error(self, error: KinemaError, where: str = "") -> None:
        self._stop_bars()
        self._console.print(Text(f"{_prefix(where)}error:", style="bold red"), error.message)
        if error.hint:
            self.say(error.hint)

    def say(self, text: str) -> None:
        self._console.print(text)

    def show(self, text: str, data: Any) -> None:
        print(text, flush=True)

    def _progress(self, event: Progress, where: str) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                Done(),
                TimeLeft(),
                console=self._console,
                redirect_stdout=False,
                disable=not self._console.is_terminal,
            )
            self._bars.start()
        key = (event.stage, event.seed)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(_prefix(where) + event.stage, total=event.total)
        self._bars.update(
            self._tasks[key],
            completed=event.done,
            total=event.total,
            unit=event.unit,
            rate=event.rate,
            eta_seconds=event.eta_seconds,
        )

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks = {}


def stages_text(result: Result) -> str:
    """Return seconds of each stage, their sum and the highest peak, on one line."""
    parts = [f"{stage.stage} {stage.seconds:.1f} s" for stage in result.stages]
    total = sum(stage.seconds for stage in result.stages)
    peak = max((stage.peak_bytes for stage in result.stages), default=0)
    return f"seed {result.seed}: {', '.join(parts)}; together {total:.1f} s, peak {gigabytes(peak)}"


def duration(seconds: float) -> str:
    """Return 2.5 as 2.5 s, 75 as 1:15 and 4000 as 1:06:40."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""
