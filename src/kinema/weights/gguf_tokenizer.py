"""The sentencepiece model inside a T5's GGUF file, put together again from its metadata.

Owns the few fields of sentencepiece's format that reading needs. Source: google/sentencepiece
src/sentencepiece_model.proto; ggml-org/llama.cpp convert_hf_to_gguf.py, which writes the metadata of T5 models.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "tokenizer.ggml."
NEEDED = ("tokens", "scores", "token_type", "precompiled_charsmap")
FILLING = re.compile(r"\[PAD\d+\]|<extra_id_\d+>")
"""What converters put behind the vocabulary: filling up to the size of the embedding, and tokens we make ourselves."""

UNIGRAM = 1
"""The kind of sentencepiece model that T5 has."""

BYTE = 6
"""The kind of piece that stands for a byte; a model with them reads every text."""


def has_sentencepiece(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata hold everything a T5 tokenizer needs; without its normaliser it would read other ids."""
    if metadata.get(f"{PREFIX}model") != "t5" or any(PREFIX + name not in metadata for name in NEEDED):
        return False
    tokens, scores, kinds, normaliser = (metadata[PREFIX + name] for name in NEEDED)
    lists = all(isinstance(values, tuple) for values in (scores, kinds, normaliser))
    return lists and len(scores) == len(kinds) == getattr(tokens, "count", None)


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Return the model as sentencepiece stores it."""
    tokens: Sequence[str] = tuple(metadata[f"{PREFIX}tokens"])
    count = len(tokens)
    while count and FILLING.fullmatch(tokens[count - 1]):
        count -= 1
    scores, kinds = metadata[f"{PREFIX}scores"][:count], metadata[f"{PREFIX}token_type"][:count]
    pieces = [
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for token, score, kind in zip(tokens[:count], scores, kinds, strict=True)
    ]
    ids = {40: "unknown_token_id", 41: "bos_token_id", 42: "eos_token_id", 43: "padding_token_id"}
    trainer = _field(3, UNIGRAM) + _field(4, count) + _field(35, BYTE in kinds)
    for number, name in ids.items():
        trainer += _field(number, int(metadata.get(PREFIX + name, -1)))
    normaliser = _field(1, b"nmt_nfkc") + _field(2, bytes(metadata[f"{PREFIX}precompiled_charsmap"]))
    normaliser += _field(3, bool(metadata.get(f"{PREFIX}add_space_prefix", True)))
    normaliser += _field(4, bool(metadata.get(f"{PREFIX}remove_extra_whitespaces", True))) + _field(5, True)
    return b"".join(pieces) + _field(2, trainer) + _field(3, normaliser)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field in the wire format of protocol buffers."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(int(value) % 2**64)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
