"""Tables as text: words are taken as they are, and lines are never broken."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 10_000
"""Columns of a page: paths and prompts are never broken here, so that they can be copied; the terminal wraps."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()) -> Table:
    """Return rows under a head; columns of `numbers` stand to the right."""
    made = Table(box=SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        made.add_row(*row)
    return made


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Return names and what there is to say of each, without a head."""
    made = Table.grid(padding=(0, 2))
    for name, value in facts:
        made.add_row(name, value)
    return made


def text_of(*parts: RenderableType) -> str:
    """Return tables and lines as one text. Brackets in it are no markup."""
    page = io.StringIO()
    console = Console(file=page, width=WIDTH, highlight=False, emoji=False, markup=False, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
