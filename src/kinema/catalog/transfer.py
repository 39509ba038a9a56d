"""One file on its way to its place: a part beside it, a note of the pieces that are safely on disk, then its name.

Pieces count only once they are flushed, so that a kill or a loss of power costs the pieces under way and no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from kinema.catalog.hub import Remote
from kinema.errors import CatalogError

BUFFER = 2**20


class Transfer:
    """One file on its way. Pieces may arrive in any order and from several threads; hashing follows from the front."""

    def __init__(self, remote: Remote, place: Path, chunk: int) -> None:
        self.remote = remote
        self.place = place
        self.chunk = chunk
        self.count = max(1, math.ceil(remote.bytes / chunk))
        self.done: set[int] = set()
        self.received = 0  # of pieces under way, for progress
        self.sequential = False  # a server without ranges: one connection brings it all
        self.note = ""
        folder = place.parent / ".kinema"
        self.part, self.state = folder / f"{place.name}.part", folder / f"{place.name}.state"
        self.lock = filelock.FileLock(folder / f"{place.name}.lock", thread_local=False)
        self._write = threading.Lock()
        self._hash = threading.Lock()
        self._at = threading.Lock()  # one place in the file at a time: Windows has no pwrite
        self._file: BinaryIO | None = None
        self._read_state()

    @property
    def left(self) -> int:
        return self.remote.bytes - sum(self.span(index)[1] - self.span(index)[0] for index in self.done)

    def span(self, index: int) -> tuple[int, int]:
        """Return (first byte, byte after the last) of a piece."""
        return index * self.chunk, min((index + 1) * self.chunk, self.remote.bytes)

    def missing(self) -> list[int]:
        return [index for index in range(self.count) if index not in self.done]

    def open(self) -> None:
        """Open the part for writing. The lock is held: what another process left is read again."""
        self._read_state()
        if not self.done:
            self.part.unlink(missing_ok=True)
            self.part.touch()
        self._file = self.part.open("r+b", buffering=0)
        self._save_state()
        self._fresh_hash()

    def put(self, offset: int, data: bytes) -> None:
        with self._at:
            self._opened.seek(offset)
            while data:
                data = data[self._opened.write(data) :]

    def finish_piece(self, index: int) -> None:
        """Flush a piece and note it down; only then would it survive a loss of power."""
        os.fsync(self._opened.fileno())
        with self._write:
            self.done.add(index)
            self._save_state()
        if self._hash.acquire(blocking=False):  # else who holds it goes on to this piece
            try:
                self._hash_on()
            finally:
                self._hash.release()

    def complete(self) -> None:
        """Check the hash of the whole, keep what the hub said, and give the file its name."""
        with self._hash:
            self._hash_on()
        found = {"sha256": self._sha256.hexdigest(), "git_sha1": self._sha1.hexdigest()}
        for kind, digest in found.items():
            expected = getattr(self.remote, kind)
            if expected and expected != digest:
                self.discard()
                raise WrongHash(
                    f"{self.remote.repository}/{self.remote.path} arrived with another {kind.replace('git_', '')}",
                    "what came was thrown away; pull again, or from elsewhere: HF_ENDPOINT, ms:OWNER/NAME",
                    name=self.place.name,
                    expected=expected,
                    found=digest,
                )
        record = {"repository": self.remote.repository, "path": self.remote.path, "bytes": self.remote.bytes}
        _write_whole(self.part.with_name(f"{self.place.name}.json"), {**record, "sha256": found["sha256"]})
        os.fsync(self._opened.fileno())
        self.close()
        self.part.replace(self.place)
        _flush_folder(self.place.parent)
        self.state.unlink(missing_ok=True)

    def discard(self) -> None:
        self.close()
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)
        self.done, self.received = set(), 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _opened(self) -> BinaryIO:
        assert self._file is not None, "open() comes first"
        return self._file

    def _hash_on(self) -> None:
        while self._hashed in self.done:
            begin, end = self.span(self._hashed)
            for offset in range(begin, end, BUFFER):
                with self._at:
                    self._opened.seek(offset)
                    data = self._opened.read(min(BUFFER, end - offset))
                self._sha256.update(data)
                self._sha1.update(data)
            self._hashed += 1

    def _fresh_hash(self) -> None:
        self._hashed = 0
        self._sha256 = hashlib.sha256()
        self._sha1 = hashlib.sha1(b"blob %d\0" % self.remote.bytes, usedforsecurity=False)

    def _identity(self) -> dict[str, Any]:
        known = self.remote.sha256 or self.remote.git_sha1
        return {"path": self.remote.path, "bytes": self.remote.bytes, "hash": known, "chunk": self.chunk}

    def _read_state(self) -> None:
        """Take up what an earlier process got, if it is a part of this very file."""
        try:
            state = json.loads(self.state.read_text("utf-8"))
            done = {index for index in state.pop("done") if 0 <= index < self.count}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return
        if state == self._identity() and self.part.is_file():
            self.done = done
        elif state != self._identity():
            self.note = f"{self.place.name} changed on the hub since its first part came: it is fetched anew"

    def _save_state(self) -> None:
        _write_whole(self.state, {**self._identity(), "done": sorted(self.done)})


class WrongHash(CatalogError):
    """What arrived is not what the hub announced."""


def _write_whole(path: Path, table: dict[str, Any]) -> None:
    """Write a small JSON file that is there wholly or not at all, also after a loss of power."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some network disks cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def record_of(path: Path) -> dict[str, Any] | None:
    """Return what the hub said of a pulled file when it came: repository, path, bytes, sha256; None of any other."""
    try:
        found = json.loads((path.parent / ".kinema" / f"{path.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
