"""The syntax of one prompt line: `A cat walks. --w 832 --h 480 --f 81 --n "blurry, --grey"`.

An option begins where white space is followed by `--` and a letter. Text in double quotes is taken whole, with
\\" and \\\\ inside for a quote and a backslash, when the quotes enclose the prompt or a value, and keeps its dashes
when they stand inside prose. Apostrophes are letters: "the cat's" needs no care.

Source of the short names: kohya-ss/musubi-tuner docs/wan.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kinema.errors import RequestError
from kinema.request import REPEATED, nearest
from kinema.schema import Request

SHORT_NAMES = {
    "w": "width",
    "h": "height",
    "f": "frames",
    "d": "seed",
    "s": "steps",
    "g": "guidance",
    "l": "guidance",
    "fs": "shift",
    "i": "first",
    "ei": "last",
    "cn": "control",
    "n": "negative",
    "ci": "control_image",
    "cim": "control_mask",
    "of": "one_frame",
    "image": "first",
}
"""Short name -> Request field; width and height are the halves of size."""

SIDES = ("width", "height")

_OPTION = re.compile(r"--([A-Za-z][\w-]*)")
_END = r"(?=\s+--[A-Za-z]|\s*$)"
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*)"' + _END)
_SINGLE = re.compile(r"'([^']*)'" + _END)
# Either a quotation inside prose, whose dashes are text, or the white space before an option.
_QUOTATION_OR_OPTION = re.compile(r'(?<![^\s(\[{])"[^"]*"(?![^\s.,;:!?)\]}])|\s+(?=--[A-Za-z])')


def parse_line(text: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the Request fields that one line gives, as text.

    defaults   fields from elsewhere; only their size is looked at, for a line that gives one side alone.

    Raises RequestError for an unknown option (with the nearest), one without its value, one given twice, a
    quote that is never closed.
    """
    fields: dict[str, Any] = {}
    text = text.strip()
    prompt, position = _take_text(text, 0) if not _OPTION.match(text) else (None, 0)
    if prompt is not None:
        fields["prompt"] = prompt
    while position < len(text):
        option = _OPTION.match(text, position)
        if option is None:
            raise RequestError(f"cannot read {text[position:]!r}", "an option is written --name value", got=text)
        name, position = _field_of(option[1]), option.end()
        value, position = _take_value(text, position)
        _put(fields, name, option[0], value)
    return _with_size(fields, defaults or {})


def _field_of(name: str) -> str:
    field = SHORT_NAMES.get(name, name.replace("-", "_"))
    if field in Request.model_fields or field in SIDES:
        return field
    known = [*SHORT_NAMES, *(field.replace("_", "-") for field in Request.model_fields)]
    near = nearest(name, known)
    raise RequestError(
        f"unknown option --{name}" + (f"; did you mean --{near}?" if near else ""),
        'options: --w --h --f --s and the rest of "kinema generate --help"; text that holds -- goes in double quotes',
        field=name,
        got=f"--{name}",
        allowed=[f"--{option}" for option in known],
    )


def _put(fields: dict[str, Any], name: str, option: str, value: str | None) -> None:
    is_switch = name in Request.model_fields and Request.model_fields[name].annotation is bool
    if value is None and not is_switch:
        raise RequestError(f"{option} has no value", f"write {option} VALUE", field=name, got=option)
    if name in REPEATED:
        fields[name] = (*fields.get(name, ()), value)
        return
    if name in fields:
        raise RequestError(
            f"{option} {value} gives {name} twice; it was {fields[name]} already",
            "leave one of the two out",
            field=name,
            got=value,
        )
    fields[name] = True if value is None else value


def _with_size(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Join width and height to size; a side given alone keeps the other one of the default size."""
    sides = {name: fields.pop(name) for name in SIDES if name in fields}
    if not sides:
        return fields
    if "size" in fields:
        name, value = next(iter(sides.items()))
        raise RequestError(
            f"--{name[0]} {value} and --size {fields['size']} both say the size",
            "leave one out",
            field="size",
            got=value,
        )
    known = re.fullmatch(r"(\d+)x(\d+)", str(defaults.get("size") or ""))
    both = dict(zip(SIDES, known.groups(), strict=True)) | sides if known else sides
    if len(both) < 2:
        given, other = ("w", "h") if "width" in sides else ("h", "w")
        value = next(iter(sides.values()))
        raise RequestError(
            f"--{given} {value} says one side only",
            f"give --{other} as well",
            field="size",
            got=value,
            allowed="--w and --h",
        )
    return fields | {"size": f"{both['width']}x{both['height']}"}


def _take_value(text: str, position: int) -> tuple[str | None, int]:
    """Return the value after an option and where the next one begins; None where there is no value."""
    if text[position : position + 1] == "=":
        return _take_text(text, position + 1)
    start = _skip_space(text, position)
    if start == position and start < len(text):
        raise RequestError(f"cannot read {text[position:]!r}", "an option is written --name value", got=text)
    if start >= len(text) or _OPTION.match(text, start):
        return None, start
    return _take_text(text, start)


def _take_text(text: str, start: int) -> tuple[str, int]:
    """Return the prompt or value at `start` without its quotes, and where the next option begins."""
    if quoted := _DOUBLE.match(text, start):
        return re.sub(r'\\(["\\])', r"\1", quoted[1]), _skip_space(text, quoted.end())
    if quoted := _SINGLE.match(text, start):
        return quoted[1], _skip_space(text, quoted.end())
    end = next(
        (match.start() for match in _QUOTATION_OR_OPTION.finditer(text, start) if not match[0].startswith('"')),
        len(text),
    )
    bare = text[start:end]
    if bare.startswith('"') and bare.count('"') == 1:
        raise RequestError(
            f"the quote that opens {bare[:30]!r} is never closed",
            'close it before the next option; inside, a quote is written \\" and a backslash at the end twice',
            got=bare,
        )
    if len(bare) > 1 and bare[0] == bare[-1] == "'":
        bare = bare[1:-1]
    return bare, _skip_space(text, end)


def _skip_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())
