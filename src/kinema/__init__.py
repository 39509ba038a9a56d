"""Kinema: one engine for the open Wan 2.1 and 2.2 video models, and FLUX.1 for images.

    kinema.generate(prompt="a large red circle moves left on a navy background", model="demo")
    kinema.plan(prompt=..., model=...)       the Plan, nothing loaded
    with kinema.Engine() as engine: ...      models stay loaded

The fields of `Request` are the keyword arguments. Importing this loads no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kinema.errors import (
    Cancelled,
    CatalogError,
    CheckpointError,
    KinemaError,
    MachineError,
    NumericsError,
    OutputError,
    RequestError,
)
from kinema.request import make_request
from kinema.schema import Event, ModelRef, Note, Plan, Request, Result, Settings
from kinema.version import VERSION as __version__

if TYPE_CHECKING:
    from kinema.engine import Engine

__all__ = [
    "Cancelled",
    "CatalogError",
    "CheckpointError",
    "Engine",
    "KinemaError",
    "MachineError",
    "ModelRef",
    "NumericsError",
    "OutputError",
    "Plan",
    "Request",
    "RequestError",
    "Result",
    "Settings",
    "__version__",
    "control",
    "drive",
    "generate",
    "generate_all",
    "generate_then",
    "plan",
    "pull",
]

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from kinema.engine import Engine

        return Engine
    raise AttributeError(f"module 'kinema' has no attribute {name!r}")


def plan(*, settings: Settings | None = None, **fields: Any) -> Plan:
    """Return the plan of a request given by its fields; no weight is loaded.

    settings  where models lie; None: ./models and the user's data folder, as on the command line without settings.
    Raises RequestError, CatalogError, CheckpointError or MachineError for what cannot be done.
    """
    with _engine(settings) as engine:
        return engine.plan(make_request(fields))


def generate(*, settings: Settings | None = None, **fields: Any) -> Result:
    """Run a request given by its fields and return its Result; of several seeds the first, all are written."""
    with _engine(settings) as engine:
        return _results(engine.run(engine.plan(make_request(fields))))[0]


def generate_all(*, settings: Settings | None = None, **fields: Any) -> list[Result]:
    """Run a request given by its fields and return one Result a seed. Arguments and errors as of `plan`.

    Warns of what is found only on the way; what the plan noted is in `Result.plan.notes`.
    """
    with _engine(settings) as engine:
        return _results(engine.run(engine.plan(make_request(fields))))


def generate_then(
    first: Mapping[str, Any], then: Mapping[str, Any], *, settings: Settings | None = None
) -> list[Result]:
    """Make pictures of the fields `first`, and of each a video of the fields `then`; return the results of both.

    Everything is planned before anything is loaded, and the models of the pictures are gone before those of the videos
    are loaded. Prompt, device and precision of `then` are those of `first` unless given. Errors as of `plan`.
    """
    from kinema.chain import plan_chain, run_chain

    with _engine(settings) as engine:
        chain = plan_chain(engine, make_request(first), then)
        return _results(run_chain(engine, chain))


def _results(events: Iterable[Event]) -> list[Result]:
    """Run to the end and return the results; warn, where our caller was called, of what none of their plans notes."""
    happened = [event for event in events if isinstance(event, Note | Result)]
    results = [event for event in happened if isinstance(event, Result)]
    carried = {note.text for result in results for note in result.plan.notes}
    carried |= {lora.said for result in results for lora in result.plan.loras}
    for event in happened:
        if isinstance(event, Note) and event.text not in carried:
            warnings.warn(event.text, stacklevel=3)
    return results


def control(kind: str, video: Path | str, **fields: Any) -> Path:
    """Make a control video of a clip and return where it is: "canny", "scribble", "depth" or "pose".

    fields  size, frames, fps, save, overwrite, quality, device as of a Request; low, high (canny), threshold
            (scribble), weights (depth), detector, points (pose) as of kinema.control_video.ControlOptions.
    Raises RequestError for what cannot be read or written, CatalogError without a depth model.
    """
    from kinema.control_video import ControlOptions, check_kind, make_control
    from kinema.settings import default_settings

    options = ControlOptions(**{name: fields.pop(name) for name in ControlOptions.model_fields if name in fields})
    return _finished(
        make_control(check_kind(kind), Path(video), make_request(fields), options, default_settings().models)
    )


def drive(video: Path | str, **fields: Any) -> dict[str, Path]:
    """Make the videos that drive Animate of a video of one person; return them by Request field.

    fields  reference, mask, size, frames, fps, device, save (a folder), overwrite, quality as of a Request; replace,
            retarget, neutral, columns, rows, detector, points, sam2 as of kinema.driving.DriveOptions.
    Raises RequestError for what cannot be read or shows nobody, CatalogError without the two ONNX files.
    """
    from kinema.driving import DriveOptions, make_driving
    from kinema.settings import default_settings

    options = DriveOptions(**{name: fields.pop(name) for name in DriveOptions.model_fields if name in fields})
    return _finished(make_driving(Path(video), make_request(fields), options, default_settings()))


def _finished(making: Generator[Any, None, T]) -> T:
    """Run a generator to its end and return what it returns; what it notes is warned of, as no Result carries it."""
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            return cast(T, end.value)
        if isinstance(event, Note):
            warnings.warn(event.text, stacklevel=3)


def pull(
    *names: str, vram: int, ram: int = 32 * 10**9, loras: bool = False, settings: Settings | None = None
) -> list[Path]:
    """Fetch the files of models for a card, single files, or repositories (hf:OWNER/NAME:PATTERN), and return where.

    vram, ram  bytes of the card and of the machine that models are chosen for.
    Warns of what was chosen, of files that stand for others, and of those that come from ModelScope.
    Raises CatalogError for what cannot be had, MachineError for a disk that is too small.
    """
    from kinema.catalog.choice import Card
    from kinema.catalog.files import load_store
    from kinema.catalog.folders import store_root
    from kinema.catalog.pull import pull as fetch
    from kinema.catalog.pull import wanted_of
    from kinema.provision import order
    from kinema.settings import default_settings

    settings = settings or default_settings()
    asked = order(names, load_store(settings.catalogs), Card(vram, ram), with_loras=loras)
    rows, root = wanted_of(asked.files, asked.addresses, settings.hub, "hf"), store_root(settings)

    def fetching() -> Generator[Event, None, list[Path]]:
        yield from (Note(about="pull", text=text) for text in asked.notes)
        yield from fetch(rows, root, settings.hub)
        return [root / row.place for row in rows]

    return _finished(fetching())


def _engine(settings: Settings | None) -> Engine:
    from kinema.engine import Engine
    from kinema.settings import default_settings

    return Engine(settings or default_settings())
