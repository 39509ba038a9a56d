"""The verbs, each a thin function of a Call. What they are called and may be asked stands in cli.app."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group

from kinema.cli import store
from kinema.cli.flags import Call, option
from kinema.cli.interrupt import Interruption
from kinema.cli.tell import make_teller, told
from kinema.errors import CatalogError, KinemaError, RequestError
from kinema.request import make_request, merge
from kinema.schema import Event, Plan, Request

if TYPE_CHECKING:
    from kinema.engine import Engine

DEMO_PROMPT = "a large yellow star moves right on a dark green background"
DEMO_SEED = 1
THEN = option('a model that goes on from the picture made, with options of its own: "wan2.2-i2v-a14b it runs --f 81"')
MANY = Group("Many prompts", sort_key=9)


def generate(
    call: Call,
    *,
    interactive: Annotated[bool, option("read prompt lines at a prompt; models stay loaded", group=MANY)] = False,
    from_file: Annotated[
        Path | None, option("a batch: .txt with options in its lines, .jsonl, .csv, or a folder of images", group=MANY)
    ] = None,
    fresh: Annotated[bool, option("with --from-file: forget its manifest, do every line again", group=MANY)] = False,
    then: Annotated[str | None, THEN] = None,
    pull: Annotated[bool, option("fetch files of the model that are not installed")] = False,
) -> int:
    """Make videos or images."""
    if then is not None and (interactive or from_file is not None):
        raise RequestError(
            "--then goes on from one request, not from many prompts",
            "leave out --interactive and --from-file, or --then",
            field="then",
            got=then,
        )
    if interactive and from_file is not None:
        raise RequestError(
            f"--interactive and --from-file {from_file} both say where prompts come from",
            "leave one out",
            field="from_file",
            got=str(from_file),
        )
    if fresh and from_file is None:
        raise RequestError("--fresh belongs to a batch", "pass --from-file FILE as well", field="fresh", got=True)
    fields = merge(call.configuration.defaults, call.fields)
    request = make_request(fields)
    if pull:
        _pull_missing(request, then, call)
    if not interactive and from_file is None:
        return _generate(request, call) if then is None else _generate_chain(request, then, call)
    from kinema.cli import sessions

    with make_teller(call.json) as teller:
        if interactive:
            return sessions.interact(fields, call.configuration.settings, teller)
        assert from_file is not None
        return sessions.run_batch(from_file, fields, call.configuration.settings, teller, fresh=fresh)


def plan(call: Call, *, then: Annotated[str | None, THEN] = None) -> int:
    """Show every decision of a run, without loading a weight."""
    request = make_request(merge(call.configuration.defaults, call.fields))
    from kinema.cli.plans import plan_text
    from kinema.engine import Engine

    with make_teller(call.json) as teller, Engine(call.configuration.settings) as engine:
        for made in _plans(engine, request, then):
            teller.show(plan_text(made), made.model_dump(mode="json"))
    return 0


def inspect_files(
    call: Call,
    *files: Annotated[Path, option("weights, latents or outputs of Kinema", "FILE")],
) -> int:
    """Say what files are: family, structure, dialect, dtype, parameters, likely role."""
    from kinema.cli.inspection import inspect_file

    if not files:
        raise RequestError("no file to inspect", "type: kinema inspect FILE", field="FILE", got=None)
    code = 0
    with make_teller(call.json) as teller:
        for file in files:
            try:
                teller.show(*inspect_file(file))
            except KinemaError as error:
                teller.error(error, str(file) if len(files) > 1 else "")
                code = code or error.exit_code
    return code


def convert(
    call: Call,
    source: Annotated[Path, option("a checkpoint: file, folder, index or shard", "IN")],
    target: Annotated[Path, option("a .safetensors or .gguf file", "OUT")],
    /,
    *,
    to: Annotated[str | None, option("what the large matrices become; default: as they are")] = None,
    names: Annotated[str | None, option("official, comfyui, diffusers, transformers or gguf names")] = None,
) -> int:
    """Write a checkpoint as another: other numbers, other names, another container; then read it back."""
    from kinema.cli.inspection import converted_text
    from kinema.weights.convert import convert as convert_file

    overwrite = make_request(call.fields).overwrite
    with make_teller(call.json) as teller, Interruption() as cancelled:
        made = told(convert_file(source, target, to, names, overwrite=overwrite), teller, cancelled)
        for note in made.notes:
            teller.event(note)
        teller.show(*converted_text(made))
    return 0


def doctor(call: Call) -> int:
    """Say what this machine has: torch, devices, attention, codecs, memory, disk, settings, extras."""
    from kinema.cli.doctor import examine

    with make_teller(call.json) as teller:
        teller.show(*examine(call.configuration))
    return 0


def replay(
    call: Call,
    file: Annotated[Path, option("an output of Kinema, or the .json plan beside it", "FILE")],
    /,
    *,
    allow_changed: Annotated[bool, option("go on where a weight file is not the one of the plan")] = False,
) -> int:
    """Make an output again from the plan it carries, beside it as NAME-replay."""
    from kinema.cli.replays import replay_plan

    again = replay_plan(file, call.configuration.settings.cache, allow_changed=allow_changed)
    return _run(call, lambda engine, cancelled: engine.run(again, cancelled=cancelled))


def decode(
    call: Call,
    latents: Annotated[Path, option("a latents file of Kinema, or a folder of finished clips", "LATENTS")],
    /,
) -> int:
    """Make the video of a latents file."""
    request = make_request(call.fields)
    return _run(call, lambda engine, cancelled: engine.decode(latents, request, cancelled=cancelled))


def control(
    call: Call,
    kind: Annotated[str, option("canny, scribble, depth or pose", "KIND")],
    video: Annotated[Path, option("a clip, an animated image or a folder of frames", "VIDEO")],
    /,
    *,
    low: Annotated[float | None, option("canny: gradient from which an edge goes on; 100")] = None,
    high: Annotated[float | None, option("canny: gradient from which an edge begins; 200")] = None,
    threshold: Annotated[float | None, option("scribble: gradient from which an outline begins; 60")] = None,
    weights: Annotated[Path | None, option("depth: folder of a Depth Anything V2 model")] = None,
    detector: Annotated[Path | None, option("pose: yolov10m.onnx, which finds people")] = None,
    points: Annotated[Path | None, option("pose: vitpose_h_wholebody.onnx, which finds their joints")] = None,
) -> int:
    """Make a control video of a clip: edges, scribbles, depth or skeletons."""
    from kinema.control_video import ControlOptions, check_kind, make_control

    given = {"low": low, "high": high, "threshold": threshold, "weights": weights}
    given |= {"detector": detector, "points": points}
    options = ControlOptions(**{name: value for name, value in given.items() if value is not None})
    request = make_request(call.fields)
    with make_teller(call.json) as teller:
        making = make_control(check_kind(kind), video, request, options, call.configuration.settings.models)
        with Interruption() as cancelled:
            save = told(making, teller, cancelled)
        teller.show(str(save), {"event": "result", "paths": [str(save)]})
    return 0


def drive(
    call: Call,
    video: Annotated[Path, option("a video of one person", "VIDEO")],
    /,
    *,
    replace: Annotated[bool, option("make mask and background too, to put somebody else into the video")] = False,
    no_retarget: Annotated[bool, option("keep the driver's own limbs, whatever the reference's body")] = False,
    neutral: Annotated[
        str | None, option("model that puts both in a neutral pose to measure their limbs: flux.1-kontext-dev")
    ] = None,
    columns: Annotated[int, option("columns of the mask's blocks; 1 by 1 makes it a box")] = 1,
    rows: Annotated[int, option("rows of the mask's blocks")] = 1,
    detector: Annotated[Path | None, option("yolov10m.onnx, which finds people")] = None,
    points: Annotated[Path | None, option("vitpose_h_wholebody.onnx, which finds their joints")] = None,
    sam2: Annotated[
        Path | None, option("sam2_hiera_large.encoder.onnx, its decoder beside it, for the mask's outline")
    ] = None,
) -> int:
    """Make the videos that drive Animate of a video: skeleton, face, and for replacement mask and background."""
    from kinema.driving import DriveOptions, generate_command, make_driving

    options = DriveOptions(
        replace=replace,
        retarget=not no_retarget,
        neutral=neutral,
        columns=columns,
        rows=rows,
        detector=detector,
        points=points,
        sam2=sam2,
    )
    request = make_request(call.fields)
    with make_teller(call.json) as teller:
        making = make_driving(video, request, options, call.configuration.settings)
        with Interruption() as cancelled:
            made = told(making, teller, cancelled)
        paths = {role: str(path) for role, path in made.items()}
        teller.show(generate_command(request, made), {"event": "result", "paths": list(paths.values()), **paths})
    return 0


def resume(
    call: Call,
    kept: Annotated[Path, option("saved steps or finished clips that a stopped run left", "PATH")],
    /,
) -> int:
    """Go on with a run that was stopped, to the same bits as if it had not been."""
    if not kept.exists():
        raise RequestError(f"{kept}: no such file or folder", "check the path", field="PATH", got=str(kept))
    request = make_request(call.fields)
    return _run(call, lambda engine, cancelled: engine.resume(kept, request, cancelled=cancelled))


def demo(call: Call) -> int:
    """Make a small video with the model that ships with Kinema."""
    fields = {"prompt": DEMO_PROMPT, "seed": DEMO_SEED, **call.fields, "model": "demo"}
    return _generate(make_request(fields), call)


def _run(call: Call, start: Callable[[Engine, Callable[[], bool]], Iterator[Event]]) -> int:
    """Tell all that a run on a new engine yields."""
    from kinema.engine import Engine

    with (
        make_teller(call.json) as teller,
        Engine(call.configuration.settings) as engine,
        Interruption() as cancelled,
    ):
        for event in start(engine, cancelled):
            teller.event(event)
    return 0


def _generate(request: Request, call: Call) -> int:
    return _run(call, lambda engine, cancelled: engine.run(engine.plan(request), cancelled=cancelled))


def _generate_chain(request: Request, then: str, call: Call) -> int:
    """Show both plans, then run them one after the other."""
    from kinema.chain import Chain, run_chain
    from kinema.cli.plans import plan_text
    from kinema.engine import Engine

    with make_teller(call.json) as teller, Engine(call.configuration.settings) as engine:
        pictures, *videos = _plans(engine, request, then)
        for made in (pictures, *videos):
            if call.json:
                teller.show("", {"event": "plan", "plan": made.model_dump(mode="json")})
            else:
                teller.say(plan_text(made))
        with Interruption() as cancelled:
            for event in run_chain(engine, Chain(pictures, tuple(videos)), cancelled):
                teller.event(event)
    return 0


def _plans(engine: Engine, request: Request, then: str | None) -> list[Plan]:
    """The plan of a request, and of each video that goes on from its pictures."""
    from kinema.chain import plan_chain, then_fields

    if then is None:
        return [engine.plan(request)]
    chain = plan_chain(engine, request, then_fields(then))
    return [chain.pictures, *chain.videos]


def _pull_missing(request: Request, then: str | None, call: Call) -> None:
    """Fetch what a request lacks, and what goes on from it; several addresses one after another."""
    from kinema.engine import Engine
    from kinema.survey import survey

    settings, before = call.configuration.settings, ""
    with make_teller(call.json) as teller, Engine(settings) as engine:
        while True:
            try:
                survey(request, settings)
                if then is not None:
                    _plans(engine, request, then)
                return
            except CatalogError as error:
                if error.details.get("pull", before) == before:
                    raise
                before = error.details["pull"]
                store.pull_missing(error, settings, teller)
