"""What can be typed, as a table of commands, and the one place where errors become exit codes.

What a verb may be asked is read from its signature and from schema.Request (see cli.flags).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cyclopts
from cyclopts import App

from kinema.cli import loras, store, verbs
from kinema.cli.flags import ELSEWHERE, Call, flag_names, parameters
from kinema.cli.tell import make_teller
from kinema.errors import Cancelled, KinemaError, RequestError
from kinema.request import nearest
from kinema.schema import Request
from kinema.settings import PLACES, configure
from kinema.version import VERSION


@dataclass(frozen=True)
class Command:
    """A verb as the command line has it: its function and the Request fields that are its flags."""

    verb: Callable[..., int]
    fields: tuple[str, ...] = ()


ALL_FIELDS = tuple(Request.model_fields)
DRIVE_FIELDS = (
    "reference", "mask", "size", "frames", "fps", "save", "overwrite", "quality", "device", "precision", "quantise",
    "seed", "vram", "ram",
)  # fmt: skip
COMMANDS: dict[str, Command] = {
    "generate": Command(verbs.generate, ALL_FIELDS),
    "plan": Command(verbs.plan, ALL_FIELDS),
    "inspect": Command(verbs.inspect_files),
    "convert": Command(verbs.convert, ("overwrite",)),
    "doctor": Command(verbs.doctor),
    "replay": Command(verbs.replay),
    "resume": Command(verbs.resume, ("output", "save", "overwrite", "quality", "strip")),
    "decode": Command(verbs.decode, ("output", "save", "overwrite", "quality", "strip")),
    "drive": Command(verbs.drive, DRIVE_FIELDS),
    "control": Command(verbs.control, ("size", "frames", "fps", "device", "save", "overwrite", "quality")),
    "demo": Command(verbs.demo, ("prompt", "first", "last", "seed", "steps", "device", "output", "save", "overwrite")),
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
    "lora inspect": Command(loras.lora_inspect),
    "lora convert": Command(loras.lora_convert),
    "lora merge": Command(loras.lora_merge),
    "lora extract": Command(loras.lora_extract),
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
    except (KinemaError, KeyboardInterrupt) as fault:
        error = fault if isinstance(fault, KinemaError) else Cancelled("stopped")
        teller.error(error)
        return error.exit_code
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
    if len(words) > 1 and words[0] in COMMANDS and words[0] in GROUP_HELP and words[1] == "list":
        words = [words[0], *words[2:]]
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
