"""Published LoRAs, recognised by the names their files are published under."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path

from kinema.schema import CatalogLora


@cache
def load_loras() -> dict[str, CatalogLora]:
    """Return all published LoRAs that Kinema knows, by name."""
    text = resources.files("kinema.catalog").joinpath("loras.toml").read_text("utf-8")
    return {
        name: CatalogLora.model_validate({**row, "name": name}) for name, row in tomllib.loads(text)["loras"].items()
    }


def known_lora(path: Path, table: Mapping[str, CatalogLora]) -> str | None:
    """Return the name of the published LoRA that a file is called after, None for others: a hint, as names are."""
    spelled = (path.name.casefold(), f"{path.parent.name}/{path.name}".casefold())
    for name, lora in table.items():
        if any(fnmatchcase(text, pattern) for pattern in lora.files for text in spelled):
            return name
    return None
