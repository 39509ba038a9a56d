"""Who may import whom: DESIGN section 2 as a table, held by reading every import in src/kinema.

Imports inside functions and under TYPE_CHECKING count like those at the top: a layer that is reached
late is still reached.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

NOUNS = ("kinema.errors", "kinema.lora", "kinema.schema", "kinema.version")
TENSORS = (*NOUNS, "kinema.tensors")
BELOW_WEIGHTS = (*TENSORS, "kinema.models")
BELOW_OPS = (
    *BELOW_WEIGHTS,
    "kinema.sampling",
    "kinema.media",
    "kinema.weights",
    "kinema.runtime",
    "kinema.catalog",
    "kinema.planning",
)

LAYERS: dict[str, tuple[str, ...]] = {
    "kinema.version": (),
    "kinema.errors": (),
    "kinema.lora": (),
    "kinema.schema": ("kinema.lora",),
    "kinema.tensors": NOUNS,
    "kinema.models": TENSORS,
    "kinema.media": TENSORS,
    "kinema.sampling": TENSORS,
    "kinema.sampling.schedule": NOUNS,
    "kinema.weights": BELOW_WEIGHTS,
    "kinema.runtime": (*BELOW_WEIGHTS, "kinema.weights"),
    "kinema.catalog": (
        *NOUNS,
        "kinema.weights.files",
        "kinema.weights.folders",
        "kinema.weights.detect",
        "kinema.weights.hashes",
    ),
    "kinema.catalog.table": NOUNS,
    "kinema.catalog.files": (*NOUNS, "kinema.catalog.table"),
    "kinema.catalog.layouts": (*NOUNS, "kinema.catalog.files", "kinema.catalog.choice", "kinema.catalog.table"),
    "kinema.catalog.folders": (*NOUNS, "kinema.catalog.files"),
    "kinema.catalog.choice": (*NOUNS, "kinema.catalog.files"),
    "kinema.catalog.sources": (*NOUNS, "kinema.catalog.folders"),
    "kinema.catalog.moves": (*NOUNS, "kinema.catalog.files", "kinema.catalog.folders"),
    "kinema.catalog.hub": (*NOUNS, "kinema.catalog.sources"),
    "kinema.catalog.transfer": (*NOUNS, "kinema.catalog.hub"),
    "kinema.catalog.verify": (*NOUNS, "kinema.catalog", "kinema.weights"),
    "kinema.catalog.pull": (
        *NOUNS,
        "kinema.catalog.files",
        "kinema.catalog.sources",
        "kinema.catalog.hub",
        "kinema.catalog.transfer",
    ),
    "kinema.provision": (
        *NOUNS,
        "kinema.catalog.files",
        "kinema.catalog.choice",
        "kinema.catalog.layouts",
        "kinema.catalog.table",
        "kinema.planning",
    ),
    "kinema.planning": (*NOUNS, "kinema.sampling.schedule"),
    "kinema.request": NOUNS,
    "kinema.settings": (*NOUNS, "kinema.request", "kinema.catalog.folders"),
    "kinema.survey": (
        *NOUNS,
        "kinema.catalog",
        "kinema.media",
        "kinema.models.tokenizer",
        "kinema.planning",
        "kinema.provision",
        "kinema.runtime",
        "kinema.weights",
    ),
    "kinema.residents": (*BELOW_WEIGHTS, "kinema.planning.memory", "kinema.runtime", "kinema.weights"),
    "kinema.conditioning": BELOW_OPS,
    "kinema.ops": BELOW_OPS,
    "kinema.pose": ("kinema.errors", "kinema.schema", "kinema.media.pixels"),
    "kinema.driving": (*TENSORS, "kinema.media", "kinema.neutral", "kinema.planning.geometry", "kinema.pose"),
    "kinema.neutral": (*TENSORS, "kinema.engine", "kinema.media", "kinema.pose", "kinema.request"),
    "kinema.conditioning_flux": (*BELOW_OPS, "kinema.conditioning", "kinema.ops"),
    "kinema.control_video": (
        *NOUNS,
        "kinema.tensors",
        "kinema.request",
        "kinema.media",
        "kinema.models.depth",
        "kinema.pose",
        "kinema.planning.geometry",
        "kinema.planning.outputs",
    ),
    "kinema.clips": (*BELOW_OPS, "kinema.conditioning", "kinema.kept_steps", "kinema.ops"),
    "kinema.progress": (*NOUNS, "kinema.runtime.machine"),
    "kinema.texts": (*BELOW_WEIGHTS, "kinema.residents", "kinema.text_cache", "kinema.weights.load"),
    "kinema.endings": (*NOUNS, "kinema.ops", "kinema.planning.memory", "kinema.runtime.finite"),
    "kinema.delivery": (
        *TENSORS,
        "kinema.clips.kept",
        "kinema.media",
        "kinema.ops",
        "kinema.planning",
        "kinema.progress",
        "kinema.survey",
    ),
    "kinema.engine": (
        *BELOW_OPS,
        "kinema.clips",
        "kinema.conditioning",
        "kinema.conditioning_flux",
        "kinema.delivery",
        "kinema.endings",
        "kinema.kept_steps",
        "kinema.ops",
        "kinema.progress",
        "kinema.residents",
        "kinema.survey",
        "kinema.texts",
    ),
    "kinema.kept_steps": (
        *NOUNS,
        "kinema.media.files",
        "kinema.planning.outputs",
        "kinema.sampling.solvers",
        "kinema.weights.files",
    ),
    "kinema.text_cache": ("kinema.errors", "kinema.media.files"),
    "kinema.chain": (
        *NOUNS,
        "kinema.batch.lines",
        "kinema.endings",
        "kinema.engine",
        "kinema.planning.outputs",
        "kinema.request",
    ),
    "kinema.batch": (*NOUNS, "kinema.request", "kinema.planning", "kinema.engine"),
    "kinema.cli": ("kinema",),
    "kinema": ("kinema",),
}
"""Module or package -> what it may import besides itself. The longest row holds; a name covers all that is in it."""

ONLY = {"transformers": ("kinema.models.depth",)}
"""Third-party package -> the only modules that may import it."""

WITHOUT_TORCH = (
    "kinema.version",
    "kinema.errors",
    "kinema.lora",
    "kinema.schema",
    "kinema.request",
    "kinema.settings",
    "kinema.planning",
    "kinema.catalog.table",
    "kinema.catalog.files",
    "kinema.catalog.folders",
    "kinema.catalog.choice",
    "kinema.catalog.layouts",
    "kinema.catalog.hub",
    "kinema.catalog.sources",
    "kinema.catalog.moves",
    "kinema.catalog.transfer",
    "kinema.catalog.pull",
    "kinema.provision",
    "kinema.sampling.schedule",
)
"""Modules and packages that know nothing of tensors: they import none of HEAVY, and run where it is absent."""

HEAVY = ("torch", "numpy", "transformers", "safetensors")


def modules(source: Path) -> dict[str, str]:
    """Return {dotted name: text} of every module of the package under `source`."""
    found = {}
    for path in sorted(source.rglob("kinema/**/*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(name: str, text: str, known: Iterable[str], is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield (module, line) for every import, also late ones and import_module("literal")."""
    known = set(known)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(name, node, is_package)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield (inner if inner in known else origin), node.lineno
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value, node.lineno


def _absolute(name: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = name.split(".") if is_package else name.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def row_of(name: str) -> str | None:
    """Return the key of the longest row that covers a module; `kinema` covers only itself."""
    rows = [row for row in LAYERS if name == row or (row != "kinema" and within(name, row))]
    return max(rows, key=len, default=None)


def violations(sources: dict[str, str]) -> list[str]:
    """Return one line for each import that the tables forbid, and for each module without a row."""
    faults = []
    for name, text in sources.items():
        row = row_of(name)
        if row is None:
            faults.append(f"{name} has no row in LAYERS: say which layer it is")
            continue
        is_package = any(other.startswith(name + ".") for other in sources)
        for target, line in sorted(set(imports(name, text, sources, is_package))):
            if within(target, "kinema") and not _allowed(row, target):
                faults.append(f"{name}:{line} imports {target}; {row} may import {LAYERS[row] or 'nothing of ours'}")
            if any(within(target, library) for library in HEAVY) and any(within(name, row) for row in WITHOUT_TORCH):
                faults.append(f"{name}:{line} imports {target}; it must work without")
            for library, users in ONLY.items():
                if within(target, library) and name not in users:
                    faults.append(f"{name}:{line} imports {target}; only {users} may")
    return faults


def _allowed(row: str, target: str) -> bool:
    return any(within(target, package) for package in (row, *LAYERS[row]))


def test_every_import_is_allowed():
    assert violations(modules(SOURCE)) == []


def test_every_row_names_something():
    rows = {row for row in LAYERS if not any(within(name, row) for name in modules(SOURCE))}
    assert rows <= {"kinema.cli"}


def test_the_page_for_contributors_names_every_layer():
    page = (SOURCE.parent / "CONTRIBUTING.md").read_text()
    named = {cell.strip("/") for cell in re.findall(r"`([a-z_]+/?)`", page)}
    assert {row.split(".")[1] for row in LAYERS if "." in row} - named == set()


TREE = """
kinema kinema.models kinema.models.layers kinema.models.wan kinema.models.depth kinema.media
kinema.sampling kinema.sampling.schedule kinema.sampling.solvers kinema.sampling.guidance
kinema.weights kinema.weights.files kinema.weights.detect kinema.weights.load kinema.runtime kinema.runtime.memory
kinema.catalog kinema.planning kinema.ops kinema.engine kinema.cli
"""
TREE_NAMES = tuple(TREE.split())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kinema.schema", "from kinema.errors import KinemaError"),
        ("kinema.errors", "import kinema.schema"),
        ("kinema.tensors", "from kinema.models import wan"),
        ("kinema.sampling.solvers", "from kinema.models.wan import WanDiT"),
        ("kinema.sampling.solvers", "def f():\n    from ..models import wan"),
        (
            "kinema.sampling.solvers",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kinema.weights.load",
        ),
        ("kinema.sampling.schedule", "from kinema.tensors import Conditions"),
        ("kinema.sampling.schedule", "from . import solvers"),
        ("kinema.models.wan", "from importlib import import_module\nimport_module('kinema.weights.files')"),
        ("kinema.models.wan", "from kinema import generate"),
        ("kinema.models.wan", "import transformers"),
        ("kinema.weights.load", "def f():\n    from transformers import AutoModel"),
        ("kinema.media.image", "from kinema.sampling import guidance"),
        ("kinema.weights.load", "from kinema.runtime import memory"),
        ("kinema.catalog", "from kinema.weights import load"),
        ("kinema.planning.plan", "from kinema.weights.detect import inspect"),
        ("kinema.planning.plan", "from kinema.sampling import solvers"),
        ("kinema.ops", "from kinema.engine import Engine"),
        ("kinema.engine", "from kinema import cli"),
        ("kinema.planning.plan", "def f():\n    import torch"),
        ("kinema.catalog.table", "from numpy import array"),
        ("kinema.catalog.table", "from kinema.weights.files import open_tensors"),
        ("kinema.elsewhere", "import json"),
    ],
)
def test_a_planted_violation_is_caught(name: str, line: str):
    sources = dict.fromkeys(TREE_NAMES, "")
    assert violations(sources) == []
    faults = violations({**sources, name: line})
    assert len(faults) == 1 and faults[0].startswith(name)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kinema.models.wan", "from .layers import Linear"),
        ("kinema.models.depth", "def f():\n    import transformers"),
        ("kinema.planning.plan", "from kinema.sampling.schedule import schedule"),
        ("kinema.catalog", "from kinema.weights.files import open_tensors"),
        ("kinema.sampling.solvers", "from .schedule import schedule"),
        ("kinema.cli", "from kinema.engine import Engine"),
    ],
)
def test_what_is_allowed_passes(name: str, line: str):
    sources = dict.fromkeys(TREE_NAMES, "")
    assert violations({**sources, name: line}) == []


IMPORT_WITHOUT = """
import sys
for library in ("torch", "numpy", "transformers", "safetensors"):
    sys.modules[library] = None
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_planning_and_reading_work_without_torch():
    light = [name for name in modules(SOURCE) if any(within(name, row) for row in WITHOUT_TORCH)]
    assert len(light) > len(WITHOUT_TORCH)
    result = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT, "kinema", *light], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_torch_check_catches_torch():
    result = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT, "kinema.tensors"], capture_output=True, text=True)
    assert result.returncode != 0 and "torch" in result.stderr
