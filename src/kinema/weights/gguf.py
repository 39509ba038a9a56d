"""The GGUF container: header, metadata and where each tensor lies; and the way back.

Owns the layout of the file. What is inside a block is `quantised.blocks`' affair; names are those of `keys`.
Headers are untrusted: every length, type and offset is checked before anything is mapped.
Source: ggml-org/ggml docs/gguf.md (versions 2 and 3, little end first).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kinema.weights.mapped import MappedFile, StoredTensor, contiguous, corrupt, refuse, truncated
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.stored import StoredPacked

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 32

PLAIN_TYPES = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
BLOCKS_BY_NUMBER = {block.number: kind for kind, block in BLOCK_TYPES.items()}
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Types no known file of these models uses, to name them in an error."""

VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Metadata key, before a tensor's name, of the shape it had before it was reshaped to be quantised."""


@dataclass(frozen=True)
class Texts:
    """A list of texts in the metadata, read when it is iterated."""

    file: MappedFile
    at: int
    count: int

    def __iter__(self) -> Iterator[str]:
        cursor = _Cursor(self.file, self.at)
        return (cursor.text() for _ in range(self.count))


@dataclass
class _Cursor:
    """Reads the header in order; `file` names it in errors."""

    file: MappedFile
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > MAX_HEADER_BYTES:
            raise corrupt(self.file, f"a piece of its header claims {count:,} bytes")
        if self.at + count > self.file.size:
            raise truncated(self.file, self.at + count - self.file.size, exact=False)
        self.at += count
        return bytes(self.file.buffer[self.at - count : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def texts(self, count: int) -> Texts:
        """Walk past many texts without making them: a vocabulary has hundreds of thousands."""
        found = Texts(self.file, self.at, count)
        read, data, size = struct.Struct("<Q").unpack_from, self.file.buffer, self.file.size
        for _ in range(count):
            if self.at + 8 > size:
                raise truncated(self.file, self.at + 8 - size, exact=False)
            self.at += 8 + read(data, self.at)[0]
        if self.at > size:
            raise truncated(self.file, self.at - size, exact=False)
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in VALUES:
                raw = self.take(count * struct.calcsize(f"<{VALUES[inner]}"))
                return struct.unpack(f"<{count}{VALUES[inner]}", raw)
            if inner == STRING and count <= MAX_HEADER_BYTES:
                return self.texts(count)
        elif kind in VALUES:
            return self.number(VALUES[kind])
        raise corrupt(self.file, f"its metadata holds a value of unknown type {kind}")


def read_gguf(file: MappedFile) -> tuple[dict[str, StoredTensor | StoredPacked], dict[str, Any]]:
    """Return tensors by name, axes in torch's order, and the metadata: numbers, texts, tuples of numbers, Texts.

    Raises CheckpointError for a file that is truncated, corrupt, of another version, or of a type that is not read.
    """
    cursor = _Cursor(file, len(MAGIC))
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        what = "written with the big end first" if swapped else f"GGUF version {version}"
        refuse(file, f"is {what}; versions 2 and 3, little end first, are read", "Take another GGUF or safetensors.")
    count, num_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    rows = [_row(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise corrupt(file, f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor | StoredPacked] = {}
    for name, shape, number, offset in rows:
        if name in tensors:
            raise corrupt(file, f"{name!r} occurs twice", key=name)
        tensors[name] = _stored(file, name, _shape(metadata, name, shape), shape, number, start + offset)
    return tensors, metadata


def _row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = cursor.text(), cursor.number("I")
    if axes > 8:
        raise corrupt(cursor.file, f"{name!r} has {axes} axes", key=name)
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))  # GGUF counts axes from the fastest
    return name, shape, cursor.number("I"), cursor.number("Q")


def _shape(metadata: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    original = metadata.get(ORIGINAL_SHAPE + name)
    counts = isinstance(original, tuple) and all(type(size) is int and size > 0 for size in original)
    return original if counts and original and math.prod(original) == math.prod(shape) else shape


def _stored(
    file: MappedFile, name: str, shape: tuple[int, ...], rows: tuple[int, ...], number: int, start: int
) -> StoredTensor | StoredPacked:
    if number not in PLAIN_TYPES and number not in BLOCKS_BY_NUMBER:
        kind = OTHER_TYPES.get(number, f"number {number}")
        known = ", ".join(["F32", "F16", "BF16", *BLOCK_TYPES])
        refuse(file, f"{name!r} is of GGUF type {kind}, which is not read", f"Take one of {known}.", key=name)
    kind = BLOCKS_BY_NUMBER.get(number, "")
    size = math.prod(rows)
    if kind:
        block = BLOCK_TYPES[kind]
        if not rows or rows[-1] % block.weights:
            raise corrupt(file, f"rows of {name!r} are no multiple of {block.weights}", key=name)
        size = size // block.weights * block.bytes
        data_shape = (*rows[:-1], rows[-1] // block.weights * block.bytes)
        data = StoredTensor(file, torch.uint8, data_shape, contiguous(data_shape), start)
    else:
        size *= PLAIN_TYPES[number].itemsize
        data = StoredTensor(file, PLAIN_TYPES[number], shape, contiguous(shape), start)
    if start + size > file.size:
        raise truncated(file, start + size - file.size)
    return StoredPacked(kind, shape, data) if kind else data


# --- writing ---------------------------------------------------------------------------------------


def gguf_header(
    tensors: Sequence[tuple[str, Sequence[int], str, int]], metadata: Mapping[str, str | int]
) -> tuple[bytes, list[int]]:
    """Return the header of a file and where in it each tensor starts.

    tensors   name, shape, type (F32, F16, BF16 or a name of BLOCK_TYPES) and bytes of each, in order.
    """
    numbers = {"F32": 0, "F16": 1, "BF16": 30} | {kind: block.number for kind, block in BLOCK_TYPES.items()}
    out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _text(key) + (
            struct.pack("<I", STRING) + _text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        )
    offsets, end = [], 0
    for name, shape, kind, size in tensors:
        out += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack("<IQ", numbers[kind], end)
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    out += b"\0" * (-len(out) % ALIGNMENT)
    return bytes(out), [len(out) + offset for offset in offsets]


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
