"""Published LoRAs, recognised by the names their files are published under."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from kinema.catalog.table import read_shipped
from kinema.schema import CatalogLora


@cache
def load_loras() -> dict[str, CatalogLora]:
    """Return all published LoRAs that Kinema knows, by name."""
    rows = read_shipped("loras.toml")["loras"]
    return {name: CatalogLora.model_validate({**row, "name": name}) for name, row in rows.items()}


def known_lora(path: Path) -> str | None:
    """Return the name of the published LoRA that a file is called after, None for others: a hint, as names are."""
    spelled = (path.name.casefold(), f"{path.parent.name}/{path.name}".casefold())
    for name, lora in load_loras().items():
        if any(fnmatchcase(text, pattern) for pattern in lora.files for text in spelled):
            return name
    return None
