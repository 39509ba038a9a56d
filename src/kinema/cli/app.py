"""The verbs, each a thin function of a Call, and the one place where errors become exit codes.

What a verb may be asked is read from its signature and from schema.Request (see cli.flags).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Group, Parameter

from kinema.cli import store
from kinema.cli.flags import ALIASES, ELSEWHERE, Call, flag_names, parameters
from kinema.cli.interrupt import EXIT_CODE, Interruption
from kinema.cli.loras import lora_convert, lora_extract, lora_inspect, lora_merge
from kinema.cli.tell import make_teller, told
from kinema.errors import Cancelled, CatalogError, KinemaError, RequestError
from kinema.request import make_request, merge, nearest
from kinema.schema import Plan, Request
from kinema.settings import PLACES, configure
from kinema.version import VERSION

if TYPE_CHECKING:
    from kinema.engine import Engine

DEMO_PROMPT = "a large yellow star moves right on a dark green background"
DEMO_SEED = 1
THEN_HELP = 'a model that goes on from the picture made, with options of its own: "wan2.2-i2v-a14b it runs --f 81"'

Verb = Callable[..., int]

MANY = Group("Many prompts", sort_key=9)


def _switch(help: str, group: Group | None = None) -> Parameter:
    return Parameter(help=help, group=group, negative=(), show_default=False)


def generate(
    call: Call,
    *,
    interactive: Annotated[bool, _switch("read prompt lines at a prompt; models stay loaded", MANY)] = False,
    from_file: Annotated[
        Path | None, _switch("a batch: .txt with options in its lines, .jsonl, .csv, or a folder of images", MANY)
    ] = None,
    fresh: Annotated[bool, _switch("with --from-file: forget its manifest, do every line again", MANY)] = False,
    then: Annotated[str | None, _switch(THEN_HELP)] = None,
    pull: Annotated[bool, _switch("fetch files of the model that are not installed")] = False,
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
        _pull_missing(request, call)
    if not interactive and from_file is None:
        return _generate(request, call) if then is None else _generate_chain(request, then, call)
    from kinema.cli import sessions

    with make_teller(call.json) as teller:
        if interactive:
            return sessions.interact(fields, call.configuration.settings, teller)
        assert from_file is not None
        return sessions.run_batch(from_file, fields, call.configuration.settings, teller, fresh=fresh)


def plan(call: Call, *, then: Annotated[str | None, _switch(THEN_HELP)] = None) -> int:
    """Show every decision of a run, without loading a weight."""
    request = make_request(merge(call.configuration.defaults, call.fields))
    from kinema.cli.plans import plan_text
    from kinema.engine import Engine

    with make_teller(call.json) as teller, Engine(call.configuration.settings) as engine:
        plans = [engine.plan(request)] if then is None else _chain(engine, request, then)
        for made in plans:
            teller.show(plan_text(made), made.model_dump(mode="json"))
    return 0


def inspect_files(
    call: Call,
    *files: Annotated[Path, Parameter(name="FILE", help="weights, latents or outputs of Kinema", negative=())],
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
    source: Annotated[Path, Parameter(name="IN", help="a checkpoint: file, folder, index or shard")],
    target: Annotated[Path, Parameter(name="OUT", help="a .safetensors or .gguf file")],
    /,
    *,
    to: Annotated[str | None, _switch("what the large matrices become; default: as they are")] = None,
    names: Annotated[str | None, _switch("official, comfyui, diffusers, transformers or gguf names")] = None,
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
    file: Annotated[Path, Parameter(name="FILE", help="an output of Kinema, or the .json plan beside it")],
    /,
    *,
    allow_changed: Annotated[bool, _switch("go on where a weight file is not the one of the plan")] = False,
) -> int:
    """Make an output again from the plan it carries, beside it as NAME-replay."""
    from kinema.cli.replays import replay_plan
    from kinema.engine import Engine

    with (
        make_teller(call.json) as teller,
        Engine(call.configuration.settings) as engine,
        Interruption() as cancelled,
    ):
        again = replay_plan(file, call.configuration.settings.cache, allow_changed=allow_changed)
        for event in engine.run(again, cancelled=cancelled):
            teller.event(event)
    return 0


def decode(
    call: Call,
    latents: Annotated[Path, Parameter(name="LATENTS", help="a latents file of Kinema, or a folder of finished clips")],
    /,
) -> int:
    """Make the video of a latents file."""
    request = make_request(call.fields)
    from kinema.engine import Engine

    with (
        make_teller(call.json) as teller,
        Engine(call.configuration.settings) as engine,
        Interruption() as cancelled,
    ):
        for event in engine.decode(latents, request, cancelled=cancelled):
            teller.event(event)
    return 0


def control(
    call: Call,
    kind: Annotated[str, Parameter(name="KIND", help="canny, scribble, depth or pose")],
    video: Annotated[Path, Parameter(name="VIDEO", help="a clip, an animated image or a folder of frames")],
    /,
    *,
    low: Annotated[float | None, _switch("canny: gradient from which an edge goes on; 100")] = None,
    high: Annotated[float | None, _switch("canny: gradient from which an edge begins; 200")] = None,
    threshold: Annotated[float | None, _switch("scribble: gradient from which an outline begins; 60")] = None,
    weights: Annotated[Path | None, _switch("depth: folder of a Depth Anything V2 model")] = None,
    detector: Annotated[Path | None, _switch("pose: yolov10m.onnx, which finds people")] = None,
    points: Annotated[Path | None, _switch("pose: vitpose_h_wholebody.onnx, which finds their joints")] = None,
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
    video: Annotated[Path, Parameter(name="VIDEO", help="a video of one person")],
    /,
    *,
    replace: Annotated[bool, _switch("make mask and background too, to put somebody else into the video")] = False,
    no_retarget: Annotated[bool, _switch("keep the driver's own limbs, whatever the reference's body")] = False,
    neutral: Annotated[
        str | None, _switch("model that puts both in a neutral pose to measure their limbs: flux.1-kontext-dev")
    ] = None,
    columns: Annotated[int, _switch("columns of the mask's blocks; 1 by 1 makes it a box")] = 1,
    rows: Annotated[int, _switch("rows of the mask's blocks")] = 1,
    detector: Annotated[Path | None, _switch("yolov10m.onnx, which finds people")] = None,
    points: Annotated[Path | None, _switch("vitpose_h_wholebody.onnx, which finds their joints")] = None,
    sam2: Annotated[
        Path | None, _switch("sam2_hiera_large.encoder.onnx, its decoder beside it, for the mask's outline")
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
    kept: Annotated[Path, Parameter(name="PATH", help="saved steps or finished clips that a stopped run left")],
    /,
) -> int:
    """Go on with a run that was stopped, to the same bits as if it had not been."""
    request = make_request(call.fields)
    from kinema.engine import Engine

    if not kept.exists():
        raise RequestError(f"{kept}: no such file or folder", "check the path", field="PATH", got=str(kept))
    with (
        make_teller(call.json) as teller,
        Engine(call.configuration.settings) as engine,
        Interruption() as cancelled,
    ):
        for event in engine.resume(kept, request, cancelled=cancelled):
            teller.event(event)
    return 0


def demo(call: Call) -> int:
    """Make a small video with the model that ships with Kinema."""
    fields = {"prompt": DEMO_PROMPT, "seed": DEMO_SEED, **call.fields, "model": "demo"}
    return _generate(make_request(fields), call)


def _generate(request: Request, call: Call) -> int:
    from kinema.engine import Engine

    with make_teller(call.json) as teller, Engine(call.configuration.settings) as engine:
        made = engine.plan(request)
        with Interruption() as cancelled:
            for event in engine.run(made, cancelled=cancelled):
                teller.event(event)
    return 0


def _generate_chain(request: Request, then: str, call: Call) -> int:
    """Show both plans, then run them one after the other."""
    from kinema.chain import Chain, run_chain
    from kinema.cli.plans import plan_text
    from kinema.engine import Engine

    with make_teller(call.json) as teller, Engine(call.configuration.settings) as engine:
        pictures, *videos = _chain(engine, request, then)
        for made in (pictures, *videos):
            if call.json:
                teller.show("", {"event": "plan", "plan": made.model_dump(mode="json")})
            else:
                teller.say(plan_text(made))
        with Interruption() as cancelled:
            for event in run_chain(engine, Chain(pictures, tuple(videos)), cancelled):
                teller.event(event)
    return 0


def _chain(engine: Engine, request: Request, then: str) -> list[Plan]:
    from kinema.batch.lines import parse_line
    from kinema.chain import plan_chain, then_fields

    chain = plan_chain(engine, request, then_fields(then, parse_line))
    return [chain.pictures, *chain.videos]


def _pull_missing(request: Request, call: Call) -> None:
    """Fetch what a request lacks, for this card; several addresses one after another."""
    from kinema.survey import survey

    settings, before = call.configuration.settings, ""
    while True:
        try:
            survey(request, settings)
            return
        except CatalogError as error:
            if error.details.get("pull", before) == before:
                raise
            before = error.details["pull"]
            with make_teller(call.json) as teller:
                store.pull_missing(error, settings, teller)


@dataclass(frozen=True)
class Command:
    """A verb as the command line has it: its function and the Request fields that are its flags."""

    verb: Verb
    fields: tuple[str, ...] = ()


ALL_FIELDS = tuple(Request.model_fields)
DRIVE_FIELDS = (
    "reference", "mask", "size", "frames", "fps", "save", "overwrite", "quality", "device", "precision", "quantise",
    "seed", "vram", "ram",
)  # fmt: skip
COMMANDS: dict[str, Command] = {
    "generate": Command(generate, ALL_FIELDS),
    "plan": Command(plan, ALL_FIELDS),
    "inspect": Command(inspect_files),
    "convert": Command(convert, ("overwrite",)),
    "doctor": Command(doctor),
    "replay": Command(replay),
    "resume": Command(resume, ("output", "save", "overwrite", "quality", "strip")),
    "decode": Command(decode, ("output", "save", "overwrite", "quality", "strip")),
    "drive": Command(drive, DRIVE_FIELDS),
    "control": Command(control, ("size", "frames", "fps", "device", "save", "overwrite", "quality")),
    "demo": Command(demo, ("prompt", "first", "last", "seed", "steps", "device", "output", "save", "overwrite")),
    "models": Command(store.models),
    "models search": Command(store.search),
    "models show": Command(store.show),
    "models plan": Command(store.plan),
    "models pull": Command(store.pull),
    "models verify": Command(store.verify),
    "models where": Command(store.where),
    "models du": Command(store.usage),
    "models paths": Command(store.paths),
    "models import": Command(store.import_files),
    "models migrate": Command(store.migrate),
    "models prune": Command(store.prune),
    "lora inspect": Command(lora_inspect),
    "lora convert": Command(lora_convert),
    "lora merge": Command(lora_merge),
    "lora extract": Command(lora_extract),
}

GROUP_HELP = {
    "models": "Models and their files: which there are, which to take, and how they come here.",
    "lora": "Look into LoRA files, and make them of others.",
}
"""Verbs of two words: the first one, and what it is about. Where the first one is a verb too, it is `list`."""


def build_app() -> App:
    """Return the command line, made from COMMANDS."""
    app = App(
        name="kinema",
        help="One engine for the open Wan 2.1 and 2.2 video models, and FLUX.1 for images.",
        version=f"kinema {VERSION}",
        version_flags=["--version"],
    )
    groups = {name: App(name=name, help=text) for name, text in GROUP_HELP.items()}
    for place, (name, command) in enumerate(COMMANDS.items()):
        first, _, second = name.partition(" ")
        owner = groups[first] if second else app
        if first in groups and not second:
            groups[first].default(_command(command))
            owner, second = groups[first], "list"
        owner.command(_command(command), name=second or first, sort_key=place)
    for group in groups.values():
        app.command(group)
    return app


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; every error is told here, and its exit code returned."""
    words = list(sys.argv[1:] if argv is None else argv)
    teller = make_teller("--json" in words)
    try:
        return _dispatch(words)
    except KinemaError as error:
        teller.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        teller.error(Cancelled("stopped"))
        return EXIT_CODE
    except BrokenPipeError:
        # The reader of our output has gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    try:
        command, bound, _ = build_app().parse_args(words, print_error=False, exit_on_error=False)
    except cyclopts.CycloptsError as error:
        raise _flag_fault(words, error) from error
    return command(*bound.args, **bound.kwargs) or 0


def _command(command: Command) -> Callable[..., int]:
    """Return a function with the flags of a command as its signature, as cyclopts reads it."""
    made = parameters(command.verb, command.fields)

    def run_command(*args: Any, **values: Any) -> int:
        bound = signature.bind(*args, **values)
        bound.apply_defaults()
        given = dict(bound.arguments)
        fields = {name: given.pop(name) for name in command.fields if name in given}
        places = {name: given.pop(name) for name in ("config", *PLACES)}
        as_json = given.pop("json")
        configuration = configure(os.environ, **places)
        call = Call({name: value for name, value in fields.items() if value is not None}, configuration, as_json)
        for note in configuration.notes:
            make_teller(as_json).event(note)
        own = [item for item in made if item.kind in (item.POSITIONAL_ONLY, item.VAR_POSITIONAL)]
        placed = [given.pop(item.name) for item in own]
        words = placed[0] if own and own[0].kind is inspect.Parameter.VAR_POSITIONAL else placed
        return command.verb(call, *words, **given)

    signature = inspect.Signature(made)
    run_command.__signature__ = signature  # type: ignore[attr-defined]
    run_command.__annotations__ = {item.name: item.annotation for item in made}
    run_command.__doc__ = command.verb.__doc__
    return run_command


def _flag_fault(words: Sequence[str], error: cyclopts.CycloptsError) -> RequestError:
    """Put a fault of the command line into our words: what was typed, what is near."""
    verb = " ".join(words[: 2 if " ".join(words[:2]) in COMMANDS else 1])
    if verb in GROUP_HELP and len(words) > 1 and not words[1].startswith("-"):
        known = ["list"] if verb in COMMANDS else []
        known += [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{verb} ")]
        near = nearest(words[1], known)
        return RequestError(
            f"{words[1]!r} is no verb of kinema {verb}; there are {', '.join(known)}",
            f"did you mean: kinema {verb} {near}" if near else f"see: kinema {verb} --help",
            field="verb",
            got=words[1],
            allowed=known,
        )
    if verb not in COMMANDS:
        near = nearest(verb, COMMANDS)
        hint = f"did you mean: kinema {near}" if near else f'for a video of that text: kinema generate "{verb}"'
        if verb.startswith("-"):
            hint = "see: kinema --help"
        return RequestError(
            f"{verb!r} is no verb of kinema; there are {', '.join(COMMANDS)}",
            hint,
            field="verb",
            got=verb,
            allowed=list(COMMANDS),
        )
    known = flag_names(parameters(COMMANDS[verb].verb, COMMANDS[verb].fields))
    known += [f"--no-{name}" for name in ("overwrite", "strip") if f"--{name}" in known]
    for word in words[len(verb.split()) :]:
        spelled = word.partition("=")[0].replace("_", "-")
        if word == "--":
            break
        if spelled.startswith("--") and spelled not in (*known, "--help"):
            return _unknown_flag(verb, word.partition("=")[0], known)
    message = str(error).strip()
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return RequestError(
            f"too many words: {message.partition(':')[2].strip(' .')}",
            f'put the text in quotes: kinema {verb} "a cat walks"',
            field="prompt",
            got=list(words[1:]),
        )
    message = message.removeprefix(f'Command "{verb}" parameter ').rstrip(".")
    return RequestError(message, f"see: kinema {verb} --help", field=message.split()[0], got=list(words))


def _unknown_flag(verb: str, word: str, known: Sequence[str]) -> RequestError:
    name = word.lstrip("-").replace("_", "-")
    near = nearest(name, [*ELSEWHERE, *known])
    near = ELSEWHERE.get(near or "", near)
    return RequestError(
        f"{word} is no flag of kinema {verb}" + (f"; did you mean {near}?" if near else ""),
        f"see: kinema {verb} --help",
        field=word,
        got=word,
        allowed=[flag for flag in known if flag.startswith("-")],
    )


__all__ = ["ALIASES", "COMMANDS", "build_app", "run"]
