"""Files of models folders linked, moved or thrown away: first a list of moves to look at, then done.

Links are hard links where the disk allows it, so that two folders share the same bytes; across disks symbolic ones.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock

from kinema.catalog.files import CatalogFile, Store
from kinema.catalog.folders import KEYS, YAML, Folders, comfy_folders, models_folder
from kinema.errors import CatalogError, MachineError


@dataclass(frozen=True)
class Move:
    """One thing to do with one file; target None throws it away."""

    kind: Literal["link", "move", "remove"]
    source: Path
    target: Path | None
    bytes: int


def imports(source: Path, root: Path, store: Store) -> tuple[list[Move], list[str]]:
    """Return the links that bring known files of another tree to `root`, and what was left out and why.

    source   a ComfyUI folder, a models folder, or a cache of huggingface_hub.
    """
    if not source.is_dir():
        raise CatalogError(f"{source} is no folder", "name a ComfyUI folder, a models folder or a hub cache")
    folders = Folders((models_folder(source)[0],), comfy_folders((source,)), (source, source / "hub"))
    moves: dict[Path, Move] = {}
    left: dict[str, Path] = {}
    known: set[Path] = set()
    for file in store.files:
        place = folders.locate(file)
        has_one_length = file.size == "exact" and file.shards is None and not file.path.endswith("/")
        for path, target in _pairs(file, place) if place else ():
            origin, size = path.resolve(), path.stat().st_size
            if has_one_length and size != file.bytes:
                left[f"{path} has {size:,} bytes, and {file.repository}/{file.path} {file.bytes:,}"] = origin
                continue
            known.add(origin)
            if not (root / target).exists():
                moves.setdefault(root / target, Move("link", origin, root / target, size))
    return list(moves.values()), [line for line, origin in left.items() if origin not in known]


def _pairs(file: CatalogFile, place: Path) -> Iterator[tuple[Path, str]]:
    """Yield (where a file lies, its place below a models folder), of shards and folders each."""
    if place.is_dir():
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            inside = path.relative_to(place)
            if ".kinema" not in inside.parts:
                yield path, f"{file.place}/{inside.as_posix()}"
        return
    for part in file.paths:
        name = part.rpartition("/")[2]
        yield place.with_name(name), f"{file.place.rpartition('/')[0]}/{name}"


def migration(old: Path, new: Path, *, link: bool = False) -> list[Move]:
    """Return the moves that bring a whole models folder to another place. CatalogError names what is in the way."""
    old, new = models_folder(old)[0].absolute(), new.absolute()
    if not old.is_dir():
        raise CatalogError(f"{old} is no folder", "name the models folder to bring away")
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise CatalogError(f"{new} and {old} lie in one another", "name a folder outside")
    moves = []
    for path in sorted(path for path in old.rglob("*") if path.is_file() and not path.name.endswith(".lock")):
        target = new / path.relative_to(old)
        if not target.exists():
            moves.append(Move("link" if link else "move", path, target, path.stat().st_size))
        elif target.stat().st_size != path.stat().st_size:
            raise CatalogError(
                f"{target} is there already, and another file than {path}", "rename one of them", name=str(target)
            )
    return moves


def leftovers(roots: Iterable[Path]) -> list[Move]:
    """Return what broken pulls left behind and no process is at: parts, and notes about files that are gone."""
    moves = []
    for root in roots:
        for folder in sorted(root.rglob(".kinema")) if root.is_dir() else ():
            for path in sorted(folder.iterdir()):
                if path.suffix in (".part", ".state", ".new", ".json") and not _in_use(path) and _is_idle(path):
                    moves.append(Move("remove", path, None, path.stat().st_size))
    return moves


def _in_use(path: Path) -> bool:
    return path.suffix == ".json" and (path.parent.parent / path.stem).exists()


def _is_idle(path: Path) -> bool:
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
            return True
    except filelock.Timeout:
        return False


def carry_out(moves: Sequence[Move]) -> None:
    """Do it. MachineError where one fails: what was done stays done, and the same command goes on with the rest."""
    for move in moves:
        try:
            if move.target is None:
                move.source.unlink(missing_ok=True)
                continue
            move.target.parent.mkdir(parents=True, exist_ok=True)
            (_link if move.kind == "link" else _relocate)(move.source, move.target)
        except OSError as error:
            place = f" to {move.target}" if move.target else ""
            raise MachineError(
                f"cannot {move.kind} {move.source}{place}: {error.strerror or error}",
                "what was done before stays done, and the same command goes on with the rest",
            ) from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        target.symlink_to(source)


def _relocate(source: Path, target: Path) -> None:
    """Move a file; across disks it is copied beside its place first, so that no half of it ever has its name."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = target.with_name(target.name + ".part")
        shutil.copy2(source, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        source.unlink()


def yaml_text(root: Path) -> str:
    """Return the section of an extra_model_paths.yaml that names every folder of ComfyUI below `root`."""
    names = dict.fromkeys(name for names in KEYS.values() for name in names)
    lines = [f"  {name}: {name}/" for name in names if (root / name).is_dir()]
    return "\n".join(["kinema:", f"  base_path: {root.absolute()}", *lines]) + "\n"


def write_yaml(old: Path, root: Path) -> Path | None:
    """Tell the ComfyUI of `old`, if it is one, where its models are now; None where it has such a file already."""
    comfy = models_folder(old)[1] or root
    if (comfy / YAML).exists():
        return None
    (comfy / YAML).write_text(yaml_text(root), "utf-8")
    return comfy / YAML
