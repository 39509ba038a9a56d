"""Rows of prompts: encoded once, then remembered, the latest in memory and all of them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from kinema.models.encoders import UMT5, encode_prompts
from kinema.residents import BackgroundHashes
from kinema.schema import ModelRef, Note, Plan
from kinema.text_cache import TextCache
from kinema.weights.load import load_tokenizer

KEPT = 32
"""Encoded texts kept in memory from run to run; a long one of the full-size encoder takes 8 MB."""

Key = tuple[ModelRef, int, str]
"""Encoder, text_len and text."""


class Texts:
    """What was encoded, by encoder and text. `encode` loads the encoder only where a text is new.

    On disk the key is content, and hashes take their time: what is new waits for `keep`.
    """

    def __init__(self, cache: Path | None, hashes: BackgroundHashes) -> None:
        self._disk = TextCache.within(cache)
        self._hashes = hashes
        self._rows: dict[Key, Tensor] = {}
        self._new: list[Key] = []

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, plan: Plan, texts: Sequence[str]) -> bool:
        """Whether all of these are known; those on disk are then in memory."""
        keys = keys_of(plan, texts)
        self._read(plan, keys)
        return all(key in self._rows for key in keys)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._rows.clear()
        self._new.clear()

    def encode(self, plan: Plan, texts: Sequence[str], get: Callable[[ModelRef], nn.Module]) -> list[Tensor]:
        """Return rows [S, D] of each text.

        get   recipe -> loaded model.
        """
        keys = keys_of(plan, texts)
        self._read(plan, keys)
        new = [key for key in dict.fromkeys(keys) if key not in self._rows]
        if new:
            ref = plan.text_encoder
            encoder = cast(UMT5, get(ref))
            tokenizer = load_tokenizer(ref.files, ref.tokenizer, ref.component)
            unknown = [text for _, _, text in new]
            rows = encode_prompts(encoder, tokenizer, unknown, plan.text_len, padded=ref.component == "t5")
            self._rows.update(zip(new, rows, strict=True))
            self._new += new
        wanted = {key: self._rows[key] for key in keys}
        # The negative prompt of a batch is asked for again and again, so what was asked for last is kept.
        older = {key: rows for key, rows in self._rows.items() if key not in wanted}
        self._rows = dict(list({**older, **wanted}.items())[-KEPT:])
        return [wanted[key] for key in keys]

    def keep(self, plan: Plan) -> None:
        """Put what was encoded by this plan on disk, waiting for the hashes of its encoder's files."""
        new, self._new = self._new, []
        if not new or self._disk.folder is None:
            return
        hashes = self._hashes.collect(files_of(plan))
        for encoder, text_len, text in new:
            rows, name = self._rows.get((encoder, text_len, text)), content_key(plan, text, hashes)
            if rows is not None and name is not None and (encoder, text_len) == (plan.text_encoder, plan.text_len):
                self._disk.put(name, rows)

    def notes(self) -> Iterator[Note]:
        """Yield, once, what was found damaged on disk."""
        while self._disk.damaged:
            path = self._disk.damaged.pop()
            yield Note(about="text cache", text=f"{path} was damaged; it is dropped, and its text encoded again")

    def _read(self, plan: Plan, keys: Sequence[Key]) -> None:
        """Bring from disk those of these texts that are not in memory."""
        unread = [key for key in keys if key not in self._rows]
        hashes = self._hashes.ready(files_of(plan)) if unread and self._disk.folder else {}
        for key in unread:
            name = content_key(plan, key[-1], hashes)
            rows = None if name is None else self._disk.get(name)
            if rows is not None:
                self._rows[key] = rows


def keys_of(plan: Plan, texts: Sequence[str]) -> list[Key]:
    return [(plan.text_encoder, plan.text_len, text) for text in texts]


def files_of(plan: Plan) -> list[Path]:
    """Return the files that decide what rows a text becomes."""
    ref = plan.text_encoder
    return [*ref.files, *([ref.tokenizer] if ref.tokenizer else [])]


def content_key(plan: Plan, text: str, hashes: Mapping[str, str]) -> str | None:
    """Return the key of a text under a plan's encoder; None while the hashes of its files are not known."""
    ref = plan.text_encoder
    files = files_of(plan)
    if any(str(file) not in hashes for file in files):
        return None
    made_by = (ref.dtype, ref.quantisation, ref.fp8_matmul, torch.device(ref.device).type, torch.__version__)
    content = [[hashes[str(file)] for file in files], [str(word) for word in made_by], plan.text_len, text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
