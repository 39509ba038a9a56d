"""From official names back to a publisher's: the rules of `keys` run the other way.

A rule is a pattern with groups and a template that uses them; read backwards, the template is the pattern. Each name
made so is translated forwards again: what cannot be undone is an error here and not a file nobody can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from kinema.errors import RequestError
from kinema.schema import Component
from kinema.weights.dialect import Dialect, Rule
from kinema.weights.keys import DIALECTS, rule_of


@dataclass(frozen=True)
class Spelt:
    """One tensor as a dialect has it: its name, and the rule that makes the official tensor, or a part of it, of it."""

    name: str
    rule: Rule


def spell(component: Component, dialect: str, officials: Iterable[str]) -> tuple[Dialect, dict[str, tuple[Spelt, ...]]]:
    """Return the dialect and, for each official name, the tensors it is stored as, in order of their parts.

    Raises RequestError for a dialect this component does not have, or that has no name for one of its tensors.
    """
    rows = [row for row in DIALECTS if row.component == component and row.name == dialect]
    names = tuple(officials)
    lacking: list[str] = []
    for row in rows:
        spelt = {official: _spellings(row, official) for official in names}
        lacking = [official for official, found in spelt.items() if not found]
        made = {item.name for found in spelt.values() for item in found}
        if not lacking and all(row.prefix + mark in made for mark in row.marks):
            return row, spelt
    known = sorted({row.name for row in DIALECTS if row.component == component})
    what = component.replace("_", " ")
    problem = f"names {dialect!r} have no place for {lacking[0]}" if lacking else f"a {what} has no {dialect!r} names"
    raise RequestError(problem, f"pass --names {' or '.join(known)}", field="names", got=dialect, allowed=known)


def _spellings(dialect: Dialect, official: str) -> tuple[Spelt, ...]:
    parts: dict[int, Spelt] = {}
    for rule in dialect.rules:
        name = None if rule.copy else backwards(rule, official)
        if name is None or rule.part in parts or rule_of(dialect, name) is not rule:
            continue
        if re.sub(rule.pattern, rule.official, name) == official:
            parts[rule.part] = Spelt(dialect.prefix + name, rule)
    return tuple(parts[part] for part in sorted(parts))


def backwards(rule: Rule, official: str) -> str | None:
    """Return the name that `rule` would turn into `official`; None where it makes no such name."""
    template, pieces = _reversed(rule)
    match = re.fullmatch(template, official)
    if match is None:
        return None
    number, name = 0, ""
    for text, is_group in pieces:
        number += is_group
        known = is_group and f"g{number}" in match.re.groupindex
        name += match[f"g{number}"] if known else re.sub(r"\\(.)", r"\1", text)
    return name


@cache
def _reversed(rule: Rule) -> tuple[re.Pattern[str], list[tuple[str, bool]]]:
    """The template of a rule as a pattern of named groups, and the pieces of its pattern."""
    pieces = _pieces(rule.pattern)
    groups = dict(enumerate((text for text, is_group in pieces if is_group), 1))
    seen: set[int] = set()

    def use(match: re.Match[str]) -> str:
        number = int(match[1])
        again = number in seen
        seen.add(number)
        return f"(?P=g{number})" if again else f"(?P<g{number}>{groups[number]})"

    template = "".join(
        re.sub(r"\\(\d+)", use, part) if part.startswith("\\") else re.escape(part)
        for part in re.split(r"(\\\d+)", rule.official)
    )
    return re.compile(template), pieces


def _pieces(pattern: str) -> list[tuple[str, bool]]:
    """Cut a pattern into text and groups: (content, is a group). Groups may hold groups that do not capture."""
    pieces: list[tuple[str, bool]] = []
    depth = start = at = 0
    while at < len(pattern):
        letter = pattern[at]
        at += 2 if letter == "\\" else 1
        if letter not in "()":
            continue
        depth += 1 if letter == "(" else -1
        if depth == (letter == "("):  # a group opens or closes
            pieces.append((pattern[start : at - 1], letter == ")"))
            start = at
    pieces.append((pattern[start:], False))
    return [(text, is_group) for text, is_group in pieces if text]


def parts_of(spelt: tuple[Spelt, ...], shape: tuple[int, ...], config: Mapping[str, object]) -> list[tuple[int, int]]:
    """Return the rows [begin, end) of an official tensor that each of its parts holds.

    Two are keys and values, three queries too, as many rows each; a fourth, of FLUX, is what is left.
    """
    if len(spelt) == 1:
        return [(0, shape[0] if shape else 1)]
    height = int(str(config["dim"])) if len(spelt) == 4 else shape[0] // len(spelt)
    edges = [height * part for part in range(len(spelt))] + [shape[0]]
    return list(pairwise(edges))
