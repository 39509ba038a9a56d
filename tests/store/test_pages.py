"""The pages about models are what the catalog says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from kinema.catalog.files import load_store
from kinema.provision import tasks

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "run: .venv/bin/python docs/make_model_pages.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_model_pages", DOCS / "make_model_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_which_model_is_made_from_the_catalog():
    page = (DOCS / "which-model.md").read_text()
    assert page == script().which_model(), AGAIN
    assert all(f"`{name}`" in page for name in load_store().published)
    assert all(f"## {task}:" in page for task in tasks(load_store()))


def test_the_tables_of_models_are_made_from_the_catalog():
    page = (DOCS / "models.md").read_text()
    assert page == script().models_page(page), AGAIN
    assert f"{len(load_store().files):,} files" in page
