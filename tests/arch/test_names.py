"""Names and sizes that keep the tree readable: DESIGN sections 2 and 10 as hard gates."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "recipes", "bench", "docs")
MOST_LINES = 700
MOST_LINES_OF_A_FUNCTION = 100
EMPTY_WORDS = {"util", "utils", "common", "helper", "helpers", "misc", "base", "manager"}


def python_files() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def words(name: str) -> set[str]:
    """Split snake_case and CamelCase: ModelManager -> {model, manager}."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def bad_name(name: str) -> bool:
    return (
        bool(words(name) & EMPTY_WORDS)
        or name.lower().endswith(("_new", "_old", "_v2"))
        or bool(re.search(r"[a-z]2$", name))
    )


def bad_names(path: str, text: str) -> list[str]:
    """Return the file, folder, class and function names that say nothing."""
    parts = Path(path).with_suffix("").parts
    faults = [f"{path}: {part}" for part in parts if bad_name(part)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and bad_name(node.name):
            faults.append(f"{path}:{node.lineno}: {node.name}")
    return faults


def too_long(path: str, text: str) -> list[str]:
    """Return the file if it has over 700 lines, and every function over 100."""
    count = len(text.splitlines())
    faults = [f"{path}: {count} lines"] if count > MOST_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return faults


def test_names_say_something():
    faults = [fault for path in python_files() for fault in bad_names(str(path.relative_to(ROOT)), path.read_text())]
    assert faults == []


def test_nothing_is_too_long():
    faults = [fault for path in python_files() for fault in too_long(str(path.relative_to(ROOT)), path.read_text())]
    assert faults == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("src/kinema/utils.py", ""),
        ("src/kinema/model_helpers.py", ""),
        ("src/kinema/common/keys.py", ""),
        ("src/kinema/wan_new.py", ""),
        ("src/kinema/wan2.py", ""),
        ("src/kinema/memory.py", "class MemoryManager: ..."),
        ("src/kinema/memory.py", "def misc(): ..."),
    ],
)
def test_a_planted_name_is_caught(path: str, text: str):
    assert bad_names(path, text)


def test_good_names_pass():
    assert bad_names("src/kinema/models/wan_vae.py", "class Database: ...\ndef database_path(): ...") == []


def test_planted_length_is_caught():
    assert too_long("x.py", "x = 1\n" * 701)
    assert too_long("x.py", "def f():\n" + "    x = 1\n" * 100)
    assert not too_long("x.py", "def f():\n" + "    x = 1\n" * 99)
