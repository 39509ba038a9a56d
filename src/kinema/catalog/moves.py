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
from kinema.errors import CatalogError


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
    left: list[str] = []
    for file in store.files:
        place = folders.locate(file)
        for origin, target in _pairs(file, place) if place else ():
            size = origin.stat().st_size
            if file.size == "exact" and file.shards is None and size != file.bytes:
                left.append(f"{origin} has {size:,} bytes, and {file.repository}/{file.path} {file.bytes:,}")
            elif not (root / target).exists():
                moves.setdefault(root / target, Move("link", origin.resolve(), root / target, size))
    known = {move.source for move in moves.values()}
    return list(moves.values()), [
        line for line in dict.fromkeys(left) if Path(line.split(" has ")[0]).resolve() not in known
    ]


def _pairs(file: CatalogFile, place: Path) -> Iterator[tuple[Path, str]]:
    """Yield (where a file lies, its place below a models folder), of shards and folders each."""
    if place.is_dir():
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            yield path, f"{file.place}/{path.relative_to(place).as_posix()}"
        return
    for inside in file.paths:
        name = inside.rpartition("/")[2]
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
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    lock.release()
    return True


def carry_out(moves: Sequence[Move]) -> None:
    """Do it. What was done stays done when one fails; the same command goes on with the rest."""
    for move in moves:
        if move.target is None:
            move.source.unlink(missing_ok=True)
            continue
        move.target.parent.mkdir(parents=True, exist_ok=True)
        (_link if move.kind == "link" else _relocate)(move.source, move.target)


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
