"""Encoded prompts on disk, by content: the same text through the same encoder is encoded once.

Bounded; the least recently used leave first. An entry that is damaged is found out, dropped and made anew.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from kinema.errors import OutputError
from kinema.media.files import write_whole

LIMIT = 512_000_000
"""Bytes of all entries together; a long prompt of the full-size encoder takes 8 MB."""


class TextCache:
    """Rows by key in a folder; None keeps nothing.

    damaged   entries that were found not to be what was written, since somebody last took them from this list.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder, self._limit = folder, limit
        self.damaged: list[Path] = []

    @classmethod
    def within(cls, cache: Path | None) -> TextCache:
        """Return the one of a cache folder."""
        return cls(cache / "texts" if cache else None)

    def get(self, key: str) -> Tensor | None:
        """Return rows [S, D], None where there are none or they are damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, _, body = data.partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            self.damaged.append(path)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return load(body)["rows"]

    def put(self, key: str, rows_SD: Tensor) -> None:
        """Keep rows; a folder that cannot be written costs a later encoding, so that is no error."""
        if self.folder is None:
            return
        body = save({"rows": rows_SD.cpu().contiguous()})
        with suppress(OutputError):
            write_whole(self.folder / f"{key}.safetensors", hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        self._shrink()

    def size(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes together."""
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def _shrink(self) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._limit:
                return
            with suppress(OSError):
                path.unlink()
            total -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every file, oldest first; those a killed process half wrote too."""
        found = []
        with suppress(OSError):
            for path in self.folder.iterdir() if self.folder else ():
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        return sorted(found)
