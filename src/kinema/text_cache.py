"""Encoded prompts on disk, by content: the same text through the same encoder is encoded once.

Bounded; the least recently used leave first. An entry that is damaged is found out, dropped and made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from kinema.errors import OutputError
from kinema.media.files import write_whole
from kinema.schema import Plan

LIMIT = 512_000_000
"""Bytes of all entries together; a long prompt of the full-size encoder takes 8 MB."""


class TextCache:
    """Rows by key in a folder; None keeps nothing.

    damaged   how many entries were found not to be what was written.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self._folder, self._limit, self.damaged = folder, limit, 0

    def get(self, key: str) -> Tensor | None:
        """Return rows [S, D], None where there are none or they are damaged."""
        if self._folder is None:
            return None
        path = self._folder / f"{key}.safetensors"
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, _, body = data.partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            self.damaged += 1
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return load(body)["rows"]

    def put(self, key: str, rows_SD: Tensor) -> None:
        """Keep rows; a folder that cannot be written costs a later encoding, so that is no error."""
        if self._folder is None:
            return
        body = save({"rows": rows_SD.cpu().contiguous()})
        with suppress(OutputError):
            write_whole(self._folder / f"{key}.safetensors", hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        self._shrink()

    def _shrink(self) -> None:
        assert self._folder is not None
        with suppress(OSError):
            entries = [
                (path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._folder.glob("*.safetensors")
            ]
            total = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if total <= self._limit:
                    return
                path.unlink()
                total -= size


def text_files(plan: Plan) -> list[Path]:
    """Return the files that decide what rows a text becomes."""
    ref = plan.text_encoder
    return [*ref.files, *([ref.tokenizer] if ref.tokenizer else [])]


def text_key(plan: Plan, text: str, hashes: Mapping[str, str]) -> str | None:
    """Return the key of a text under a plan's encoder; None while the hashes of its files are not known."""
    ref = plan.text_encoder
    files = text_files(plan)
    if any(str(file) not in hashes for file in files):
        return None
    made_by = (ref.dtype, ref.quantisation, ref.fp8_matmul, torch.device(ref.device).type, torch.__version__)
    content = [[hashes[str(file)] for file in files], [str(word) for word in made_by], plan.text_len, text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
