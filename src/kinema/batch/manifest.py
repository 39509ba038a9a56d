"""The record of a batch beside its outputs: JSON lines, each appended whole and flushed to the disk.

    {"key": ..., "line": 3, "state": "started", "seeds": [7, 8], "outputs": [["0003-a.mp4"], ["0003-b.mp4"]]}
    {"key": ..., "line": 3, "state": "made", "seed": 7, "outputs": ["0003-a.mp4"], "seconds": 41.2}
    {"key": ..., "line": 3, "state": "failed", "error": {...}}

A key is the hash of what a line asks, input files included, so that lines may move, and a changed line is a
new one. Whether a line is finished is never stored: it is, when every seed it started was made and its files
are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.errors import KinemaError, OutputError
from kinema.planning import MEDIA_FIELDS
from kinema.planning.inputs import split_place
from kinema.schema import Note, Request

PLACE = {"save", "overwrite", "preview", "save_steps"}
MEMORY = {"vram", "ram", "blocks_to_swap", "text_encoder_on", "ffn_tokens", "vae_cache"}
NOT_CONTENT = PLACE | MEMORY
"""Fields that say where and within which memory, not what: changing them makes no line new."""


@dataclass
class Record:
    """What the manifest knows of one key: the seeds and files of its last start, and those made since."""

    seeds: tuple[int, ...] = ()
    outputs: tuple[tuple[Path, ...], ...] = ()
    made: set[int] = field(default_factory=set)

    def missing(self) -> list[int]:
        """Return the positions of seeds that are not made, or whose files are gone."""
        return [
            index
            for index, (seed, paths) in enumerate(zip(self.seeds, self.outputs, strict=True))
            if seed not in self.made or not all(path.exists() for path in paths)
        ]


class Manifest:
    """The record of one batch in one file. Reads it at once; `fresh` begins anew and keeps no old line.

    A torn line, left by a machine that stopped while writing, is left out with a Note.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.notes: list[Note] = []
        self._records: dict[str, Record] = {}
        self._torn_end = False
        if path.is_file():
            if fresh:
                path.unlink()
            else:
                self._read(path.read_bytes())

    def record(self, key: str) -> Record:
        """Return what is known of a key; an empty record for a new one."""
        return self._records.get(key, Record())

    def owned(self) -> set[Path]:
        """Return every file that this batch ever announced."""
        return {path for record in self._records.values() for paths in record.outputs for path in paths}

    def started(self, key: str, line: int, seeds: Sequence[int], outputs: Sequence[Sequence[Path]]) -> None:
        self._append(key, line, "started", seeds=list(seeds), outputs=[self._names(paths) for paths in outputs])

    def made(self, key: str, line: int, seed: int, outputs: Sequence[Path], seconds: float) -> None:
        self._append(key, line, "made", seed=seed, outputs=self._names(outputs), seconds=round(seconds, 3))

    def failed(self, key: str, line: int, error: KinemaError) -> None:
        self._append(key, line, "failed", error=error.to_dict())

    def _append(self, key: str, line: int, state: str, **more: Any) -> None:
        entry = {"key": key, "line": line, "state": state, **more}
        data = (b"\n" if self._torn_end else b"") + json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: lines of two processes never mix.
            with open(self.path, "ab", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"manifest {self.path} cannot be written: {error.strerror}",
                "pass --save another folder",
                path=str(self.path),
            ) from error
        self._torn_end = False
        self._take(entry)

    def _read(self, data: bytes) -> None:
        self._torn_end = bool(data) and not data.endswith(b"\n")
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self.notes.append(Note(about="manifest", text=f"{self.path} line {number} is torn and was left out"))

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["state"] == "started":
            outputs = tuple(tuple(self.path.parent / name for name in names) for names in entry["outputs"])
            seeds = tuple(int(seed) for seed in entry["seeds"])
            if len(seeds) != len(outputs):
                raise ValueError("as many outputs as seeds")
            made = self._records[entry["key"]].made if entry["key"] in self._records else set()
            self._records[entry["key"]] = Record(seeds, outputs, made)
        elif entry["state"] == "made":
            self._records[entry["key"]].made.add(int(entry["seed"]))

    def _names(self, paths: Iterable[Path]) -> list[str]:
        """Names relative to the manifest where the files lie under it, so that the folder may move."""
        folder, found = self.path.parent.resolve(), [path.resolve() for path in paths]
        return [path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path) for path in found]


def content_keys(requests: Sequence[Request | None]) -> list[str]:
    """Return one key a request; equal requests are told apart by their order."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        key = _content_hash(request) if request else ""
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys


def _content_hash(request: Request) -> str:
    content = request.model_dump(mode="json", exclude=NOT_CONTENT)
    for name in MEDIA_FIELDS:
        content[f"{name} sha256"] = [_file_hash(path) for path in _input_files(request, name)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _input_files(request: Request, name: str) -> list[Path]:
    """Return the files that a field of inputs names; of a folder those in it."""
    value = getattr(request, name)
    given = [split_place(text)[0] for text in value] if name == "middle" else value
    paths = [Path(one) for one in (given if isinstance(given, tuple | list) else (given,)) if one]
    return [file for path in paths for file in (sorted(path.iterdir()) if os.path.isdir(path) else (path,))]


def _file_hash(path: Path) -> str | None:
    """Hash of an input file; None for one that is not there, which planning reports."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
