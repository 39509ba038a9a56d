"""Fields as people type them -> Request, and every fault as one RequestError.

Owns the words of validation errors: what was given, what is allowed, what to type. Knows nothing of
files, models or where the fields came from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kinema.errors import RequestError
from kinema.schema import Request, flag

EXCLUSIVE = ({"frames", "seconds"}, {"seeds", "seed"}, {"seeds", "count"})
"""Fields that say the same thing twice: a source of higher rank that gives one drops the other."""

REPEATED = ("middle", "lora", "reference", "control_image", "control_mask")
"""Fields that are given several times, one item each."""

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, dashes and underscores aside; None where nothing is close."""
    spelled = {_letters(item): item for item in known}
    close = difflib.get_close_matches(_letters(name), list(spelled), n=1, cutoff=0.6)
    return spelled[close[0]] if close else None


def _letters(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")


def check_names(names: Iterable[str], where: str = "") -> None:
    """Raise RequestError for the first name that is no field of Request."""
    for name in names:
        if name not in Request.model_fields:
            near = nearest(name, Request.model_fields)
            raise RequestError(
                f"{where}{name!r} is not a field of a request" + (f"; did you mean {near!r}?" if near else ""),
                f"write {near}" if near else "fields: " + ", ".join(Request.model_fields),
                field=name,
                got=name,
                allowed=list(Request.model_fields),
            )


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return `lower` overridden by `upper`; what contradicts an upper field (EXCLUSIVE) is dropped from the lower."""
    dropped = {name for pair in EXCLUSIVE for name in pair if name not in upper and pair & upper.keys()}
    return {name: value for name, value in lower.items() if name not in dropped} | dict(upper)


def make_request(fields: Mapping[str, Any], where: str = "") -> Request:
    """Return the Request that `fields` (typed, or text as typed by people) describe.

    where   a prefix of messages, such as "prompts.txt line 3: ".

    Raises RequestError naming every bad field; its details are those of the first.
    """
    check_names(fields, where)
    for name, value in fields.items():
        if value == "" and name not in ("prompt", "negative"):
            raise RequestError(
                f"{where}{name} is empty", f"give {flag(name)} a value, or leave it out", field=name, got=""
            )
    try:
        return Request(**fields)
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors(include_url=False)]
    message = "; ".join(fault.message for fault in faults)
    hint = "; ".join(dict.fromkeys(fault.hint for fault in faults if fault.hint))
    raise RequestError(where + message, hint, **faults[0].details)


def _fault(detail: ErrorDetails) -> RequestError:
    """Put one pydantic error into words. Source of the types: pydantic's list of validation errors."""
    name, got = str(detail["loc"][0]), detail["input"]
    kind, limits = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return RequestError(str(limits["error"]), f"correct {flag(name)}", field=name, got=got)
    if kind == "literal_error":
        return _choice_fault(name, got)
    if kind in _BOUNDS:
        words, allowed, legal = _BOUNDS[kind]
        limit = next(iter(limits.values()))
        return RequestError(
            f"{name} {got} is {words.format(f'{limit:.19g}')}",
            f"pass {flag(name)} {legal(limit)}",
            field=name,
            got=got,
            allowed=allowed.format(f"{limit:.19g}"),
        )
    wanted = "a finite number" if kind == "finite_number" else _KINDS.get(kind.split("_")[0], detail["msg"])
    return RequestError(
        f"{name} {got!r} is not {wanted}", f"pass {flag(name)} as {wanted}", field=name, got=got, allowed=wanted
    )


def _choice_fault(name: str, got: Any) -> RequestError:
    allowed = choices(name)
    near = nearest(str(got), allowed)
    return RequestError(
        f"{name} {got!r} is not one of {', '.join(allowed)}" + (f"; did you mean {near!r}?" if near else ""),
        f"pass {flag(name)} {near or allowed[0]}",
        field=name,
        got=got,
        allowed=list(allowed),
    )


def choices(name: str) -> tuple[str, ...]:
    """Return the words a field is limited to, () where it is free."""
    pending, found = [Request.model_fields[name].annotation], []
    while pending:
        kind = pending.pop(0)
        pending += [item for item in get_args(kind) if not isinstance(item, str)]
        found += [item for item in get_args(kind) if isinstance(item, str)]
    return tuple(found)


# In words, what is allowed, and a legal value near the limit.
_BOUNDS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "greater_than_equal": ("below {}", "{} or more", lambda limit: f"{limit:.19g}"),
    "greater_than": ("not above {}", "above {}", lambda limit: f"{math.floor(limit) + 1}"),
    "less_than_equal": ("above {}", "{} or less", lambda limit: f"{limit:.19g}"),
    "less_than": ("not below {}", "below {}", lambda limit: f"{math.ceil(limit) - 1}"),
}
