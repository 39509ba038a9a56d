"""The model store as text for people, and as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kinema.catalog.choice import Card
from kinema.catalog.files import CatalogFile, Found, Store
from kinema.catalog.folders import Folders
from kinema.catalog.moves import Move
from kinema.cli.plans import memory_choices
from kinema.cli.tables import table, text_of
from kinema.cli.tell import gigabytes
from kinema.errors import MachineError
from kinema.provision import Provision, distinct, trial_size
from kinema.schema import CatalogEntry

MOST_ROWS = 60

Page = tuple[str, Any]


def files_page(found: Found, folders: Folders, whole: bool = False) -> Page:
    """Return files as a table; `whole` adds hashes, models and notes."""
    shown = found.files if whole else found.files[:MOST_ROWS]
    rows = [
        (_size(file), file.precision, file.role, f"{file.repository}/{file.path}", str(folders.locate(file) or ""))
        for file in shown
    ]
    text = text_of(table(("size", "precision", "role", "file", "installed"), rows, numbers=("size",)))
    lines = [f"note: {found.note}"] if found.note else []
    lines += [line for line in text.splitlines() if line]
    lines += [f"... and {len(found.files) - len(shown)} more: add words"] if len(shown) < len(found.files) else []
    lines += [_details(file) for file in shown] if whole else []
    return "\n".join(lines), {"note": found.note, "files": [_row(file, folders) for file in found.files]}


def model_page(model: CatalogEntry, store: Store, folders: Folders) -> Page:
    """Return a model with its files and those of its shared parts."""
    rows = store.groups(model)
    lines = [f"{model.name}: {model.title}", f"  {model.use}", f"  tasks: {', '.join(model.tasks)}"]
    for name, files in rows.items():
        lines += ["", f"{name} ({store.parts[name].title}):" if name in store.parts else f"{name}:"]
        lines += [files_page(Found(tuple(files)), folders)[0]]
    data = {"name": model.name, "title": model.title, "tasks": list(model.tasks)}
    return "\n".join(lines), data | {"files": {n: [_row(f, folders) for f in files] for n, files in rows.items()}}


def plan_page(made: Sequence[Provision], card: Card, folders: Folders, more: Mapping[str, Sequence[str]]) -> Page:
    """Return which files each model takes on a card, and what they come to; `more`: what a larger one would bring."""
    disk = f", {gigabytes(card.disk)} of disk" if card.disk else ""
    where = f"{gigabytes(card.vram)} of VRAM" if card.vram else "the CPU"
    lines = [f"for {where} and {gigabytes(card.ram)} of RAM{disk}:"]
    for one in made:
        lines += ["", f"{one.model.name}: {one.precision}, {one.mode}, {gigabytes(one.bytes)} of files"]
        lines += [f"  {one.model.use}", f"  {_run(one)}"]
        lines += [f"  {_size(f):>9}  {f.repository}/{f.path}{_mark(f, folders)}" for f in one.files]
        lines += [f"  note: {note}" for note in (*one.notes, *more.get(one.model.name, ()))]
    files = distinct(made)
    absent = [file for file in files if folders.locate(file) is None]
    lines += [
        "",
        f"together {gigabytes(_sum(files))} in {len(files)} entries; still to pull: {gigabytes(_sum(absent))}",
    ]
    return "\n".join(lines), {
        "vram": card.vram,
        "ram": card.ram,
        "disk": card.disk,
        "bytes": _sum(files),
        "to_pull": _sum(absent),
        "models": [
            {"name": one.model.name, "precision": one.precision, "mode": one.mode, "bytes": one.bytes,
             "peak_bytes": one.peak_bytes, "notes": [*one.notes, *more.get(one.model.name, ())],
             "files": [_row(f, folders) for f in one.files]}
            for one in made
        ],
    }  # fmt: skip


def moves_page(moves: Sequence[Move], notes: Sequence[str]) -> Page:
    """Return moves of files, one a line."""
    lines = [
        f"{move.kind} {move.source}{f' -> {move.target}' if move.target else ''} ({gigabytes(move.bytes)})"
        for move in moves
    ]
    total = f"{len(moves)} files, {gigabytes(sum(move.bytes for move in moves))}"
    rows = [{"kind": m.kind, "source": str(m.source), "target": str(m.target or ""), "bytes": m.bytes} for m in moves]
    return "\n".join([*lines, *notes, total]), {"moves": rows, "notes": list(notes)}


def _details(file: CatalogFile) -> str:
    facts = {
        "used by": ", ".join(file.used_by),
        "licence": file.licence + (" (gated: a login that accepted it is needed)" if file.gated else ""),
        "bytes": f"{file.bytes:,} ({file.size})" if file.bytes else "unknown until it is pulled",
        "sha256": file.sha256 or "unknown until it is pulled",
        "known": "" if file.known == "seen" else f"{file.known}: nobody saw this very name",
        "tuned": "distilled or fine-tuned: not the plain weights" if file.tuned else "",
        "note": file.note,
    }
    lines = [f"  {name:<8} {value}" for name, value in facts.items() if value]
    return "\n".join([f"{file.repository}/{file.path}", *lines])


def _row(file: CatalogFile, folders: Folders) -> dict[str, Any]:
    return {**file.model_dump(mode="json"), "installed": str(folders.locate(file) or "")}


def _mark(file: CatalogFile, folders: Folders) -> str:
    return "  (installed)" if folders.locate(file) else "  (gated)" if file.gated else ""


def _size(file: CatalogFile) -> str:
    return "unknown" if file.bytes is None else gigabytes(file.bytes)


def _run(made: Provision) -> str:
    """Say what the run that files were chosen by takes, in the words of `kinema plan`."""
    size = "x".join(map(str, trial_size(made.model)))
    if isinstance(made.trial, MachineError):
        return f"at {size} it does not fit"
    size += f", {made.trial.frames} frames" if made.trial.frames > 1 else ""
    return "; ".join([f"peak about {gigabytes(made.peak_bytes)} at {size}", *memory_choices(made.trial)])


def _sum(files: Iterable[CatalogFile]) -> int:
    return sum(file.bytes or 0 for file in files)
