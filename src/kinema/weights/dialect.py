"""What a spelling of a model's tensors consists of: marks that prove it, a prefix, names it may ignore, and rules."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.schema import Component

WB = r"\.(weight|bias)"
"""The last word of most names, as a group."""


@dataclass(frozen=True)
class Rule:
    """File names that match `pattern` whole are the official tensor `official` (a template of re.sub).

    part       its place among several that are joined along axis 0.
    lead       axes of size 1 to put in front of its shape.
    tail       axes of size 1 to put behind it.
    swap       the halves along axis 0 change places.
    copy       a second name of the same tensor: used where the first is absent, else ignored.
    """

    pattern: str
    official: str
    part: int = 0
    lead: int = 0
    tail: int = 0
    swap: bool = False
    copy: bool = False


@dataclass(frozen=True)
class Dialect:
    """One spelling of one component. `marks` are names every such file has; names and rules are without `prefix`."""

    component: Component
    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...] = (Rule("(.+)", r"\1"),)
    prefix: str = ""
    ignore: tuple[str, ...] = ()
