"""Where a model's files lie on this machine: the shipped demo, official folders, ComfyUI's folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from kinema.errors import CatalogError
from kinema.schema import CatalogEntry
from kinema.weights.detect import resolve_folder


def find_files(entry: CatalogEntry, roots: Sequence[Path]) -> dict[str, Path]:
    """Return paths by role of the first complete set among the roots.

    Looked at in order, in each root: a folder named as an official repository, then single files by the
    names the catalog lists. Raises CatalogError naming what is missing and every place that was searched.
    """
    if entry.name == "demo":
        return demo_files()
    best: dict[str, Path] = {}
    for root in roots:
        for found in (*_repository_folders(entry, root), _single_files(entry, root)):
            if not missing(entry, found):
                return found
            best = found if len(found) > len(best) else best
    raise CatalogError(
        f"model {entry.name} is not installed: {', '.join(missing(entry, best)) or 'its files'} not found in "
        f"{', '.join(map(str, roots)) or 'any models folder (none is set)'}",
        _where_to_get(entry, missing(entry, best)),
        name=entry.name,
        searched=[str(root) for root in roots],
    )


def missing(entry: CatalogEntry, found: dict[str, Path]) -> list[str]:
    """Return the roles without which this model cannot run, that `found` lacks."""
    needed = ["dit", "vae", "text_encoder"]
    needed += ["dit_high"] if "high" in entry.experts else []
    needed += ["clip_vision"] if entry.structure.get("has_clip_tokens") else []
    return [role for role in needed if role not in found]


def demo_files() -> dict[str, Path]:
    """Return the files of the model that ships in the package."""
    folder = Path(str(resources.files("kinema").joinpath("assets/demo")))
    files = {role: folder / f"{role}.safetensors" for role in ("dit", "vae", "text_encoder")}
    for role, path in files.items():
        if not path.is_file():
            raise CatalogError(f"the demo model's {role} is missing at {path}", "reinstall kinema", name="demo")
    return files


def _repository_folders(entry: CatalogEntry, root: Path) -> list[dict[str, Path]]:
    folders = [root / repo for repo in entry.repositories] + [root / repo.split("/")[-1] for repo in entry.repositories]
    return [resolve_folder(folder) for folder in folders if folder.is_dir()]


def _single_files(entry: CatalogEntry, root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for role, names in entry.files.items():
        for name in names:
            if (root / name).is_file():
                found[role] = root / name
                break
    return found


def _where_to_get(entry: CatalogEntry, roles: list[str]) -> str:
    lines = [f"put them in a models folder under these names, or name each with its flag, for {entry.name}:"]
    lines += [f"  --{role.replace('_', '-')}: {' or '.join(entry.files.get(role, ()))}" for role in roles]
    if entry.repositories:
        lines.append(f"or the whole folder of the repository {entry.repositories[0]} with --model FOLDER")
    return "\n".join(lines)
