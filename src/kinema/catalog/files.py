"""Which files there are: rows of files.toml, the parts and presets of parts.toml, looked up by any spelling.

Owns those tables and the search in them; knows nothing of this machine, its folders or the network. The shipped
tables are read once, when first asked for (0.05 s), so that commands which need none of it do not pay.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kinema.catalog.table import faults, letters, load_catalog, read_shipped, read_tables
from kinema.errors import CatalogError, RequestError
from kinema.schema import CatalogEntry, Frozen


class CatalogFile(Frozen):
    """One published file, or a folder or set of shards that belong together.

    path      inside the repository; ends in / where it is a folder; of shards the index.
    folder    of ComfyUI's models folders; None keeps the file in a folder named as its repository.
    used_by   models and shared parts, * allowed.
    bytes     None where nobody printed it; `size` says what the number is worth.
    known     "computed" where path or folder follows from siblings and was not seen, "guessed" where the name is.
    tuned     distilled or fine-tuned: not the plain weights of the model.
    """

    repository: str
    path: str
    folder: str | None = None
    role: str
    expert: Literal["high", "low"] | None = None
    precision: str = ""
    used_by: tuple[str, ...] = ()
    bytes: int | None = None
    size: Literal["exact", "listed", "computed", "estimated"] | None = None
    sha256: str | None = None
    known: Literal["seen", "computed", "guessed"] = "seen"
    tuned: bool = False
    shards: int | None = None
    licence: str = ""
    gated: bool | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The file's own name; of a folder the folder's."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path to fetch; of shards the index first. Of a folder none: the repository has to be asked."""
        if self.path.endswith("/"):
            return ()
        if self.shards is None:
            return (self.path,)
        stem = self.path.removesuffix(".safetensors.index.json")
        return (self.path, *(f"{stem}-{n:05}-of-{self.shards:05}.safetensors" for n in range(1, self.shards + 1)))

    @property
    def place(self) -> str:
        """Where it lies below a models folder: ComfyUI's folder, or a folder named as the repository."""
        return f"{self.folder}/{self.name}" if self.folder else f"{self.repository}/{self.path}".rstrip("/")

    def serves(self, name: str) -> bool:
        return name in self.used_by or any("*" in row and fnmatchcase(name, row) for row in self.used_by)


class Part(Frozen):
    """A file that several models share."""

    role: str
    title: str


class Renamed(Frozen):
    """A name that circulates and was never published, and what is meant by it."""

    real: tuple[str, ...]
    why: str


class PresetLine(Frozen):
    """One model of a preset, in the precision its menu names."""

    model: str
    precision: str
    loras: bool = False


class Preset(Frozen):
    """A menu of models for a card."""

    title: str
    lines: tuple[PresetLine, ...]


@dataclass(frozen=True)
class Store:
    """All tables together; files in order of preference, models as they are listed."""

    files: tuple[CatalogFile, ...]
    models: dict[str, CatalogEntry]
    parts: dict[str, Part] = field(default_factory=dict)
    renames: dict[str, Renamed] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)

    def serving(self, name: str) -> list[CatalogFile]:
        """Return the files of a model or shared part, best repository first."""
        return [file for file in self.files if file.serves(name)]

    def groups(self, model: CatalogEntry) -> dict[str, list[CatalogFile]]:
        """Return the files of a model's DiT and of each of its parts, by name."""
        names = dict.fromkeys((model.dit_of or model.name, *model.parts.values()))
        return {name: self.serving(name) for name in names}

    @property
    def published(self) -> dict[str, CatalogEntry]:
        """Return the models whose files are published, all but the demo: Wan 2.2, Wan 2.1, then the others."""
        order = {"wan2.2": 0, "wan2.1": 1}
        rows = sorted(self.models.items(), key=lambda row: order.get(row[0][:6], 2))
        return {name: model for name, model in rows if name != "demo"}


def load_store(extra: Sequence[Path] = ()) -> Store:
    """Return the shipped tables with the rows of the user's catalog files: models, and repositories, which come first.

    Raises CatalogError for a row that is no file.
    """
    store = _shipped()
    own = [file for path in extra for file in read_files(str(path), read_tables(path).get("repositories", {}))]
    named = {(file.repository, file.path) for file in own}
    rest = (file for file in store.files if (file.repository, file.path) not in named)
    return replace(store, files=(*own, *rest), models=load_catalog(extra)) if extra else store


@cache
def _shipped() -> Store:
    table = read_shipped("parts.toml")
    return Store(
        tuple(read_files("kinema/catalog/files.toml", read_shipped("files.toml")["repositories"])),
        load_catalog(),
        {name: Part(**row) for name, row in table["parts"].items()},
        {name: Renamed(**row) for name, row in table["renames"].items()},
        {name: Preset(**row) for name, row in table["presets"].items()},
    )


def read_files(source: str, repositories: Mapping[str, Any]) -> list[CatalogFile]:
    """Return the rows of a `repositories` table; what stands beside `files` holds for every row without its own."""
    found = []
    for repository, table in repositories.items():
        shared = {name: value for name, value in table.items() if name != "files"}
        for number, row in enumerate(table.get("files", ()), 1):
            try:
                found.append(CatalogFile.model_validate({"repository": repository, **shared, **row}))
            except (ValidationError, TypeError) as error:
                table_only = "a file is a table such as { path = 'model.safetensors', role = 'dit' }"
                fault = faults(error) if isinstance(error, ValidationError) else table_only
                raise CatalogError(f"{source}, {repository}, file {number}: {fault}", name=source) from error
    return found


ADDRESS = re.compile(r"^https?://[^/]+/|(?<=/)(resolve|blob)/[^/]+/|[?#].*$")
"""What an address of a hub has around repository and path."""


# --- looking up ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a name stands for: files, and a sentence where the name itself was never published."""

    files: tuple[CatalogFile, ...]
    note: str = ""


def find_files(name: str, store: Store) -> Found:
    """Return the files that a spelling means: a file name, a path, an address, a repository, or words to search for.

    Names that circulate and were never published give the real ones, and say so. CatalogError names the nearest.
    """
    inside = ADDRESS.sub("", name)
    renamed = {letters(key): value for key, value in store.renames.items()}
    for spelled in dict.fromkeys((inside, inside.rstrip("/").rsplit("/", 1)[-1])):
        if other := renamed.get(letters(spelled)):
            files = tuple(file for real in other.real for file in _named(real, store))
            return Found(files, f"{spelled} was never published: {other.why}")
        if exact := _named(spelled, store):
            return Found(exact)
    if near := search(name, store):
        return Found(near)
    names = {file.name.casefold(): file.name for file in store.files}
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)
    raise CatalogError(
        f"no file is called {name!r}, and none has all of its words",
        f"nearest: {', '.join(names[key] for key in close)}" if close else "see `kinema models search WORDS`",
        name=name,
    )


def one_file(name: str, store: Store) -> Found:
    """Return the one file a spelling means, or those of a name that was never published.

    Of copies in several repositories the first that needs no login. RequestError where different files are meant.
    """
    found = find_files(name, store)
    if found.note or len(found.files) == 1:
        return found
    repositories = {file.repository for file in found.files}
    if len({(file.name, file.bytes) for file in found.files}) == 1 and len(repositories) == len(found.files):
        return Found((min(found.files, key=lambda file: (bool(file.gated), file.folder is None)),))
    rows = [f"{file.repository}/{file.path}" for file in found.files]
    raise RequestError(
        f"{name} may be {len(rows)} files: {', '.join(rows[:6])}{', ...' if len(rows) > 6 else ''}",
        f"name one in full: {rows[0]}",
        field="NAME",
        got=name,
    )


def search(words: str, store: Store) -> tuple[CatalogFile, ...]:
    """Return the files whose repository, path, precision, role or models hold every word, in any case."""
    wanted = re.findall(r"[a-z0-9._]+", words.casefold().replace("-", " "))
    if not wanted:
        return ()
    return tuple(file for file in store.files if all(word in _text(file) for word in wanted))


def _named(name: str, store: Store) -> tuple[CatalogFile, ...]:
    """Return the files of this name, path or repository: as it is written, else in any case."""
    name = name.strip("/")
    exact = tuple(file for file in store.files if name in _spellings(file))
    return exact or tuple(file for file in store.files if name.casefold() in map(str.casefold, _spellings(file)))


def _spellings(file: CatalogFile) -> set[str]:
    path = file.path.strip("/")
    return {file.name, path, file.repository, f"{file.repository}/{path}", file.place, *file.paths}


def _text(file: CatalogFile) -> str:
    words = (file.repository, file.path, file.precision, file.role, *file.used_by)
    return " ".join(words).casefold().replace("-", " ")


def alternatives(file: CatalogFile, store: Store) -> list[CatalogFile]:
    """Return copies of a gated file that need no login: the same name, role and precision, elsewhere."""
    is_of = (file.name, file.role, file.precision)
    same = (other for other in store.files if (other.name, other.role, other.precision) == is_of)
    return [other for other in same if other.gated is False and other.repository != file.repository]
