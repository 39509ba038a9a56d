"""Which installed files a model runs from: the best of official folders, ComfyUI's folders and the hub's cache.

Headers are read only where a name does not tell what a file holds, so that a look at an empty folder loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kinema.catalog.choice import Card, Judge, Offer, choose, choose_part, kind, offers, part_offers, rank
from kinema.catalog.files import CatalogFile, Store
from kinema.catalog.folders import Folders
from kinema.errors import CatalogError, CheckpointError, KinemaError
from kinema.schema import CatalogEntry, Component

SHORT = 0.8  # of the published size; sizes of the catalog are right within 5 %

INSIDE: dict[Component, str] = {"flux_vae": "vae", "t5": "text_encoder", "clip_text": "clip_text"}
"""What all-in-one files of FLUX hold besides the transformer, and which roles that fills where nothing else does."""


@dataclass(frozen=True)
class Need:
    """What the choice of files is made for: a card, and who knows how a DiT runs on it."""

    card: Card
    judge: Judge


@dataclass(frozen=True)
class Installed:
    """An offer that is here: where each of its roles lies, the tokenizer's included where the folder has it.

    short   a file is far smaller than the published one: half a download, taken only where there is nothing else.
    """

    offer: Offer
    paths: Mapping[str, Path]
    short: bool = False


@dataclass(frozen=True)
class Chosen:
    """The files a model runs from, by role, and a sentence where there was something to choose."""

    files: dict[str, Path]
    note: str = ""


def find_files(
    entry: CatalogEntry,
    store: Store,
    folders: Folders,
    *,
    need: Need | None = None,
    given: Collection[str] = (),
    also: Collection[str] = (),
) -> Chosen:
    """Return the best installed files of a model, without the roles that are `given`.

    also   roles that this run needs besides.
    Raises CatalogError naming what is missing and every place that was searched.
    """
    if entry.name == "demo":
        return Chosen({role: path for role, path in demo_files().items() if role not in given})
    faults: list[KinemaError] = []
    whole = list(_repository_folders(entry, store, folders, faults))
    models = list(_installed_sets(entry, store, folders))
    models += [one for one in whole if set(entry.dit_roles) <= one.paths.keys()]
    found: dict[str, Path] = {}
    note = ""
    wanted = set(entry.dit_roles) - set(given)
    if models and wanted:
        best, note = _choose(entry, models, need)
        found |= {role: best.paths[role] for role in wanted}
    for role in (role for role in (*entry.parts, *also) if role not in given):
        found |= _part(role, entry, store, folders, whole, need)
    if entry.family == "flux" and "dit" in found:
        from kinema.weights.detect import components_in

        held = components_in(found["dit"])
        inside = {role: found["dit"] for kind, role in INSIDE.items() if kind in held and role not in given}
        found = {**inside, **found}
    if lacking := missing(entry, {**dict.fromkeys(given), **found}, also):
        if faults:
            raise faults[0]
        raise CatalogError(
            f"model {entry.name} is not installed: {', '.join(lacking)} not found in "
            f"{', '.join(map(str, folders.roots)) or 'any models folder (none is set)'}",
            _where_to_put(entry, lacking, store),
            name=entry.name,
            missing=lacking,
            found=sorted({path.name for path in found.values()}),
            searched=[str(root) for root in folders.roots],
        )
    return Chosen(found, note)


def missing(entry: CatalogEntry, found: Collection[str], also: Collection[str] = ()) -> list[str]:
    """Return the roles without which this model cannot run, and those of `also`, that `found` lacks."""
    return [role for role in (*entry.roles, *also) if role not in found]


def demo_files() -> dict[str, Path]:
    """Return the files of the model that ships in the package."""
    folder = Path(str(resources.files("kinema").joinpath("assets/demo")))
    files = {role: folder / f"{role}.safetensors" for role in ("dit", "vae", "text_encoder")}
    for role, path in files.items():
        if not path.is_file():
            raise CatalogError(f"the demo model's {role} is missing at {path}", "reinstall kinema", name="demo")
    return files


def size_on_disk(path: Path) -> int:
    """Return bytes of a file, of all shards of an index, or of a folder's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    if path.name.endswith(".index.json"):
        stem = path.name.removesuffix(".safetensors.index.json")
        return sum(file.stat().st_size for file in path.parent.glob(f"{stem}-*-of-*.safetensors"))
    return path.stat().st_size


# --- what is here --------------------------------------------------------------------------------


def _installed_sets(entry: CatalogEntry, store: Store, folders: Folders) -> Iterator[Installed]:
    """Yield the DiTs that the entry itself names, pair by pair, then those on offer."""
    for names in zip(*(entry.files.get(role, ()) for role in entry.dit_roles), strict=False):
        files = [_row(name, role, store) for name, role in zip(names, entry.dit_roles, strict=True)]
        yield from _locate(files, folders)
    for offer in offers(entry, store):
        yield from _locate(offer.files, folders)


def _locate(files: Collection[CatalogFile], folders: Folders) -> Iterator[Installed]:
    places = [folders.locate(file) for file in files]
    if all(places):
        here = [(file, place) for file, place in zip(files, places, strict=True) if place]
        sized = [file.model_copy(update={"bytes": size_on_disk(place)}) for file, place in here]
        short = any((now.bytes or 0) < SHORT * (file.bytes or 0) for file, now in zip(files, sized, strict=True))
        yield Installed(Offer(tuple(sized)), {file.role: place for file, place in here}, short)


def _row(name: str, role: str, store: Store) -> CatalogFile:
    """Return the row of a file an entry names by its place, or one made of what its name says."""
    for file in store.files:
        if file.place == name and file.role == role:
            return file
    folder, _, base = name.rpartition("/")
    said = re.search(r"(?i)fp8\w*|bf16|fp16|fp32|Q\d_\w+", base)
    precision = said[0] if said and kind(said[0]) else "16-bit"
    return CatalogFile(repository="", path=base, folder=folder or None, role=role, precision=precision, bytes=1)


def _repository_folders(
    entry: CatalogEntry, store: Store, folders: Folders, faults: list[KinemaError]
) -> Iterator[Installed]:
    """Yield what official and diffusers folders of the model hold; half a folder is a fault only if nothing else is."""
    for repository in entry.repositories:
        said = [file.precision for file in store.serving(entry.name) if file.repository == repository]
        precision = said[0] if said else "16-bit"
        for folder in filter(Path.is_dir, folders.in_repository(repository)):
            from kinema.weights.folders import resolve_folder

            try:
                paths = resolve_folder(folder)
            except (CatalogError, CheckpointError) as error:
                faults.append(error)
                continue
            files = [
                CatalogFile(
                    repository=repository, path=path.name, role=role, precision=precision, bytes=size_on_disk(path)
                )
                for role, path in sorted(paths.items(), key=lambda item: not item[0].startswith("dit"))
            ]
            if files:
                yield Installed(Offer(tuple(files)), paths)


# --- which of it ---------------------------------------------------------------------------------


def _choose(entry: CatalogEntry, models: list[Installed], need: Need | None) -> tuple[Installed, str]:
    models = [one for one in models if not one.short] or models
    different = list({tuple(sorted(map(str, one.paths.values()))): one for one in reversed(models)}.values())
    different.sort(key=lambda one: (rank(one.offer.precision), one.offer.largest))
    if need is None or len(different) == 1:
        return different[0], ""
    dits = [Offer(tuple(file for file in one.offer.files if file.role.startswith("dit"))) for one in different]
    choice = choose(dits, need.judge)
    if choice is None:
        return different[0], ""
    best = different[dits.index(choice.offer)]
    names = " and ".join(best.paths[role].name for role in entry.dit_roles)
    size = f"{choice.offer.largest / 1e9:.1f} GB" + (" each" if len(entry.dit_roles) > 1 else "")
    where = f"{need.card.vram / 1e9:.0f} GB" if need.card.vram else "the CPU"
    return best, f"of {len(different)} installed sets, {names} ({size}) is used: {choice.mode} on {where}"


def _part(
    role: str, entry: CatalogEntry, store: Store, folders: Folders, whole: list[Installed], need: Need | None
) -> dict[str, Path]:
    """Return the best installed file of a shared part, with its tokenizer where it came with one."""
    part = entry.part(role)
    rows = [_row(name, role, store) for name in entry.files.get(role, ())]
    rows += [offer.files[0] for offer in part_offers(part, store)]
    rows += [file for file in store.serving(part) if file.role == role and kind(file.precision) and file not in rows]
    here = sorted((one for row in rows for one in _locate([row], folders)), key=lambda one: one.short)
    if here and not (here[0].short and any(role in one.paths for one in whole)):
        picked = choose_part([one.offer for one in here], need.card) if need and role == "text_encoder" else None
        return {role: next((one for one in here if one.offer == picked), here[0]).paths[role]}
    for one in whole:
        if role in one.paths:
            extra = {"tokenizer": one.paths["tokenizer"]} if role == "text_encoder" and "tokenizer" in one.paths else {}
            return {role: one.paths[role], **extra}
    return {}


def _where_to_put(entry: CatalogEntry, roles: list[str], store: Store) -> str:
    lines = [f"put them in a models folder under these names, or name each with its flag, for {entry.name}:"]
    lines += [f"  --{role.replace('_', '-')}: {' or '.join(_names(entry, role, store)[:4])}" for role in roles]
    if entry.repositories:
        lines.append(f"or the whole folder of the repository {entry.repositories[0]} with --model FOLDER")
    return "\n".join(lines)


def _names(entry: CatalogEntry, role: str, store: Store) -> list[str]:
    if role.startswith("dit"):
        dits = store.serving(entry.dit_of or entry.name)
        rows = [file for file in dits if file.role == role and not file.tuned]
    else:
        rows = store.serving(entry.part(role))
    return list(dict.fromkeys([*entry.files.get(role, ()), *(file.place for file in rows if kind(file.precision))]))
