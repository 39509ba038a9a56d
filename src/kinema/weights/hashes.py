"""sha256 of files, remembered by path, size and time of change, so that gigabytes are read once."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from kinema.errors import CheckpointError, OutputError
from kinema.weights.writing import whole_file


class HashCache:
    """Hashes kept in the JSON file `path`, or in memory alone where it is None. Safe to share between threads.

    A cache that cannot be read or written costs time, never a wrong hash, so neither is an error.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rows: dict[str, Any] = _read(path) if path else {}

    def sha256(self, file: Path) -> str:
        """Return the hash of `file`, read only if its path, size or time of change is new."""
        key, stamp = str(file.resolve()), _stamp(file)
        with self._lock:
            row = self._rows.get(key)
        if isinstance(row, list) and len(row) == 3 and row[:2] == stamp and isinstance(row[2], str):
            return row[2]
        digest = hash_file(file)
        if _stamp(file) == stamp:  # else it was being written meanwhile
            with self._lock:
                self._rows[key] = [*stamp, digest]
                self._write()
        return digest

    def _write(self) -> None:
        if self._path is None:
            return
        with suppress(OutputError), whole_file(self._path) as temporary:
            rows = _read(self._path) | self._rows  # another process may have added some
            temporary.write_text(json.dumps(rows), "utf-8")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error


def _stamp(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", path=file) from error
    return [stat.st_size, stat.st_mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return rows if isinstance(rows, dict) else {}
