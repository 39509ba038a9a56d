"""Flags of the command line, made from schema.Request: no second list of what can be asked.

A verb is a plain function of a Call and its own keyword arguments; `parameters` joins to those the fields of
Request and the settings every verb shares. Values of Request fields stay text here: kinema.request judges them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from kinema.request import REPEATED
from kinema.schema import Request, flag
from kinema.settings import PLACES, Configuration

GROUPS = {
    "what": "What",
    "model": "Model",
    "media": "Input media",
    "speech": "Speech",
    "shape": "Shape",
    "sampling": "Sampling",
    "machine": "Machine",
    "output": "Output",
}
ALIASES = {"first": ("--image",), "save": ("-o",)}

ELSEWHERE = {
    "width": "--size WIDTHxHEIGHT",
    "height": "--size WIDTHxHEIGHT",
    "video-size": "--size WIDTHxHEIGHT",
    "num-frames": "--frames",
    "frame-num": "--frames",
    "video-length": "--frames",
    "infer-steps": "--steps",
    "sample-steps": "--steps",
    "num-inference-steps": "--steps",
    "flow-shift": "--shift",
    "sample-shift": "--shift",
    "cfg-scale": "--guidance",
    "guidance-scale": "--guidance",
    "sample-guide-scale": "--guidance",
    "sample-solver": "--solver",
    "negative-prompt": "--negative",
    "base-seed": "--seed",
    "image-path": "--first",
    "end-image-path": "--last",
    "ckpt-dir": "--model FOLDER",
    "task": "--model NAME",
    "t5": "--text-encoder",
    "clip": "--clip-vision",
    "dit-low": "--dit",
    "save-path": "--save",
    "save-file": "--save",
}
"""Flags of other programs -> ours, for the hint of an unknown flag. docs/coming-from.md has them all."""


@dataclass(frozen=True)
class Call:
    """What every verb is given: the Request fields typed as flags, the settings, and whether to speak JSON."""

    fields: Mapping[str, Any]
    configuration: Configuration
    json: bool = False


def option(help: str, name: str | None = None, **more: Any) -> Parameter:
    """Return how a flag or word of a verb's own is called and what it means; a switch has no --no- form.

    more   such as its group, left out where it has none: with group=None it would not stand in --help.
    """
    return Parameter(name=name, help=help, negative=(), show_default=False, **more)


def parameters(verb: Callable[..., Any], fields: Sequence[str]) -> list[inspect.Parameter]:
    """Return the parameters of a verb's command: its own, those of the Request `fields`, and the shared ones."""
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    asked = [_field_parameter(name) for name in fields]
    words_first = sorted([*own, *asked], key=lambda item: item.kind is inspect.Parameter.KEYWORD_ONLY)
    return [*words_first, *_shared_parameters()]


def spellings(item: inspect.Parameter) -> tuple[str, ...]:
    """Return what a parameter of a command is called: its flags, or the word that stands in its place."""
    names = item.annotation.__metadata__[0].name or flag(item.name)
    return (names,) if isinstance(names, str) else tuple(names)


def flag_names(command: Sequence[inspect.Parameter]) -> list[str]:
    """Return every spelling of the flags of these parameters."""
    return [name for item in command for name in spellings(item)]


def _field_parameter(name: str) -> inspect.Parameter:
    declared = Request.model_fields[name]
    extra = declared.json_schema_extra
    group = GROUPS[str(extra["group"])] if isinstance(extra, dict) else "What"
    kind: Any = str
    if declared.annotation is bool:
        kind = bool
    elif name in REPEATED:
        kind = tuple[str, ...]
    more = Parameter(
        name=(flag(name), *ALIASES.get(name, ())),
        help=declared.description,
        group=_group(group),
        show_default=False,
        negative=() if kind is not bool else None,
    )
    placed = inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "prompt" else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, placed, default=None, annotation=Annotated[kind | None, more])


def _shared_parameters() -> list[inspect.Parameter]:
    def shared(name: str, spelled: str, kind: Any, default: Any, help: str) -> inspect.Parameter:
        more = option(help, spelled, group=_group("Settings"))
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, more]
        )

    places = [
        shared(
            name, spelled, Path | None if name == "cache" else tuple[Path, ...], None if name == "cache" else (), help
        )
        for name, (_, spelled, help) in PLACES.items()
    ]
    config = shared("config", "--config", Path | None, None, "configuration file to read instead of the usual one")
    return [*places, config, shared("json", "--json", bool, False, "one JSON object a line on stdout, errors too")]


def _group(title: str) -> Group:
    return Group(title, sort_key=[*GROUPS.values(), "Settings"].index(title) + 10)
