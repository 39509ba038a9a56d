"""Is a file what its name says: by its hash where one is known, else by its header. Reads; never writes.

Fast mode reads headers: it finds what is cut short, what has another length, and what is another model. Full mode
reads every byte: it also finds what was altered, and knows a renamed file by its hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kinema.catalog.files import CatalogFile, Store
from kinema.catalog.folders import Folders
from kinema.catalog.layouts import dit_layouts, load_layouts
from kinema.catalog.transfer import record_of
from kinema.errors import CheckpointError
from kinema.schema import FileFacts
from kinema.weights.detect import inspect
from kinema.weights.files import SUFFIXES, open_tensors
from kinema.weights.hashes import hash_file

Finding = Literal["right", "truncated", "altered", "another model", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """What a file is: `says` is a sentence; `by` what it rests on."""

    path: Path
    finding: Finding
    says: str
    by: Literal["hash", "header", "length", "name"] = "header"

    @property
    def is_fault(self) -> bool:
        return self.finding in ("truncated", "altered", "another model")


def checkpoints(folders: Folders) -> Iterator[Path]:
    """Yield every checkpoint of the folders that are searched, once."""
    seen: set[Path] = set()
    for key, places in folders.by_key.items():
        for name in folders.names(key, SUFFIXES):
            path = next((place / name for place in places if (place / name).is_file()), None)
            if path is not None and path.suffix in SUFFIXES and (real := path.resolve()) not in seen:
                seen.add(real)
                yield path
    for root in folders.roots:
        for path in sorted(root.glob("*/**/*")) if root.is_dir() else ():
            if path.suffix in SUFFIXES and (real := path.resolve()) not in seen:
                seen.add(real)
                yield path


def verify(path: Path, store: Store, *, full: bool = False) -> Verdict:
    """Return what one file is. `full` reads all of it: a minute for every few gigabytes."""
    rows = [row for row in store.files if path.name in {one.rpartition("/")[2] for one in row.paths}]
    record, size = record_of(path), path.stat().st_size
    hashes = {row.sha256: row for row in store.files if row.sha256 and row.shards is None}
    digest = hash_file(path) if full else None
    if digest and digest in hashes:
        row = hashes[digest]
        known = f"is {row.repository}/{row.path}"
        return Verdict(path, "right", known if row.name == path.name else f"{known}, under another name", "hash")
    if digest and record:
        same = record["sha256"] == digest
        what = f"{record['repository']}/{record['path']}"
        says = f"is {what}, as it was pulled" if same else f"is no longer what was pulled as {what}: bytes have changed"
        return Verdict(path, "right" if same else "altered", says, "hash")
    return _by_header(path, size, record["bytes"] if record else None, rows, store, digest)


def _by_header(
    path: Path, size: int, pulled: int | None, rows: list[CatalogFile], store: Store, digest: str | None
) -> Verdict:
    try:
        tensors = open_tensors(path) if path.suffix != ".ckpt" else None
    except CheckpointError as error:
        finding: Finding = "truncated" if "truncated" in error.message or "short" in error.message else "altered"
        return Verdict(path, finding, error.message.removeprefix(f"{path} "))
    facts = _facts(path) if tensors is not None else None
    if facts is not None and rows and not any(_fits(row, facts, store) for row in rows):
        said = " or ".join(dict.fromkeys(row.used_by[0] for row in rows if row.used_by))
        return Verdict(path, "another model", f"is called as {said} is, and holds a {facts.structure}")
    if pulled and size != pulled:
        return Verdict(path, "altered", f"has {size:,} bytes; it was pulled with {pulled:,}", "length")
    lengths = {row.bytes for row in rows if row.bytes and row.size == "exact" and row.shards is None}
    if lengths and not pulled and size not in lengths:
        expected = " or ".join(f"{length:,}" for length in sorted(lengths))
        return Verdict(path, "altered", f"has {size:,} bytes; the published file has {expected}", "length")
    if digest and any(row.sha256 for row in rows if row.bytes == size and row.shards is None):
        return Verdict(
            path, "altered", "has the length of the published file and another hash: bytes have changed", "hash"
        )
    return _sound(path, rows, facts)


def _sound(path: Path, rows: list[CatalogFile], facts: FileFacts | None) -> Verdict:
    what = f"a {facts.structure}" if facts else "tensors of no model that is known"
    if rows and (facts or rows[0].role in ("lora", "module", "controlnet", "preview")):
        row = rows[0]
        return Verdict(path, "right", f"header and length are those of {row.repository}/{row.path}: {what}")
    if rows:
        return Verdict(path, "unknown", f"is called as a file of {rows[0].repository}; it holds {what}", "name")
    return Verdict(path, "unknown", f"no published file has this name; it is whole, and holds {what}")


def _facts(path: Path) -> FileFacts | None:
    try:
        return inspect(path)
    except CheckpointError:
        return None


def _fits(row: CatalogFile, facts: FileFacts, store: Store) -> bool:
    """False where the header contradicts a row: another part, or another count of tensors or parameters.

    Shards are not told apart, and roles without a model of ours say nothing.
    """
    if row.shards or row.role in ("lora", "module", "checkpoint", "controlnet", "preview"):
        return True
    if row.role in ("dit", "dit_high"):
        models = (model for model in store.models.values() if row.serves(model.name))
        sizes = {(one.parameters, one.tensors) for model in models for one in dit_layouts(model)}
        return facts.component in ("dit", "flux_dit") and (not sizes or (facts.parameters, facts.tensors) in sizes)
    parts = [load_layouts()[name] for name in row.used_by if name in store.parts]
    return not parts or any((facts.component, facts.parameters) == (one.component, one.parameters) for one in parts)
