"""The catalog table: TOML rows read into CatalogEntry, looked up by name or by structure."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kinema.errors import CatalogError
from kinema.schema import CatalogEntry

VAE_FILES = {"wan2.1": "vae21", "wan2.2": "vae22", "flux": "vae_flux"}


def read_shipped(name: str) -> dict[str, Any]:
    """Return a table that comes with the package."""
    return tomllib.loads(resources.files("kinema.catalog").joinpath(name).read_text("utf-8"))


def load_catalog(extra: Sequence[Path] = ()) -> dict[str, CatalogEntry]:
    """Return all models by name: those Kinema ships, then the user's files, whose rows win.

    Raises CatalogError for a file that cannot be read or a row that is not a model.
    """
    own = ((str(path), read_tables(path)) for path in extra)
    catalog: dict[str, CatalogEntry] = {}
    shared: dict[str, Any] = {}
    negatives: dict[str, str] = {}
    for source, table in (("kinema/catalog/models.toml", read_shipped("models.toml")), *own):
        shared |= table.get("shared", {})
        negatives |= table.get("negatives", {})
        for name, row in table.get("models", {}).items():
            catalog[name] = _entry(source, name, row, shared, negatives)
    return catalog


def find_entry(name: str, catalog: Mapping[str, CatalogEntry]) -> CatalogEntry:
    """Return the model that `name` means; CatalogError names the nearest."""
    if found := named(name, catalog):
        return found
    spelled = {letters(spelling): entry for entry in catalog.values() for spelling in _spellings(entry)}
    near = difflib.get_close_matches(letters(name), spelled, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(sorted({spelled[n].name for n in near}))}" if near else "see `kinema models`"
    raise CatalogError(f"no model is called {name!r}; known: {', '.join(catalog)}", hint, name=name)


def named(name: str, catalog: Mapping[str, CatalogEntry]) -> CatalogEntry | None:
    """Return the model called `name` in any case, with or without its owner: Wan-AI/Wan2.2-I2V-A14B, FLUX.1-dev."""
    wanted = letters(name.rsplit("/", 1)[-1])
    return next((entry for entry in catalog.values() if wanted in map(letters, _spellings(entry))), None)


def letters(name: str) -> str:
    """Return a name as it is compared: in lower case, with one space for blanks, - and _."""
    return re.sub(r"[\s_-]+", " ", name.casefold()).strip()


def _spellings(entry: CatalogEntry) -> tuple[str, ...]:
    return (entry.name, entry.name.removeprefix("wan2.2-").removeprefix("wan2.1-"), *entry.aliases)


def matching_entries(config: Mapping[str, Any], catalog: Mapping[str, CatalogEntry]) -> list[CatalogEntry]:
    """Return the models whose structure a DiT of this configuration has. Several may: a header holds no role."""
    return [entry for entry in catalog.values() if entry.misfit(config) is None]


def read_tables(path: Path) -> dict[str, Any]:
    """Return the tables of a catalog file of the user; CatalogError for a file that is none."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CatalogError(f"catalog file {path} cannot be read: {error.strerror}", name=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(
            f"catalog file {path} is not TOML: {error}",
            "write models as the file kinema/catalog/models.toml does, [models.NAME]",
            name=str(path),
        ) from error
    known = ("models", "negatives", "shared", "repositories")
    if unknown := sorted(set(tables) - set(known)):
        raise CatalogError(
            f"catalog file {path} has unknown tables: {', '.join(unknown)}",
            f"allowed: {', '.join(known)}",
            name=str(path),
        )
    return tables


def faults(error: ValidationError) -> str:
    """Return what is wrong with a row, field by field."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _entry(
    source: str, name: str, row: Mapping[str, Any], shared: Mapping[str, Any], negatives: Mapping[str, str]
) -> CatalogEntry:
    fields = dict(row, name=name)
    fields["negative"] = negatives.get(row.get("negative", ""), row.get("negative", ""))
    flux = row.get("family") == "flux"
    files = {"text_encoder": shared.get("t5" if flux else "text_encoder", ()), **row.get("files", {})}
    if flux:
        files.setdefault("clip_text", shared.get("clip_text", ()))
    if row.get("redux"):
        files |= {"clip_vision": shared.get("siglip", ()), "redux": shared.get("redux", ())}
    files.setdefault("vae", shared.get(VAE_FILES.get(row.get("vae", ""), ""), ()))
    if row.get("structure", {}).get("has_clip_tokens"):
        files.setdefault("clip_vision", shared.get("clip_vision", ()))
    fields["files"] = files
    try:
        return CatalogEntry.model_validate(fields)
    except ValidationError as error:
        raise CatalogError(f"model {name!r} in {source}: {faults(error)}", name=name) from error
