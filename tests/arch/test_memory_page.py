"""The tables of docs/memory.md are what plans of full-size models say today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_those_of_the_plans():
    spec = importlib.util.spec_from_file_location("make_memory_page", DOCS / "make_memory_page.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert page[page.index(script.MARK) :] == script.tables(), "run: .venv/bin/python docs/make_memory_page.py"
    assert page.count("GB |") >= len(script.ROWS) * len(script.CARDS)
