"""Checkpoint files written a piece at a time: the header first, from shapes alone, then the bytes as they are made.

Owns the two containers we write, safetensors and GGUF. A file appears under its name only when it is whole and whoever
asked for it has looked at it.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinema.errors import OutputError
from kinema.weights.files import DTYPES
from kinema.weights.gguf import gguf_header
from kinema.weights.quantised.blocks import BLOCK_TYPES

SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
GGUF_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Written:
    """One tensor to write.

    kind    the dtype it is stored in, or of a GGUF file the name of its block type.
    chunks  makes its contents, in order, when their turn comes.
    """

    name: str
    shape: tuple[int, ...]
    kind: torch.dtype | str
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        count = torch.Size(self.shape).numel()
        if isinstance(self.kind, torch.dtype):
            return count * self.kind.itemsize
        return count // BLOCK_TYPES[self.kind].weights * BLOCK_TYPES[self.kind].bytes


def in_memory(name: str, tensor: Tensor) -> Written:
    """Return a tensor that is there already, to be written as it is."""
    return Written(name, tuple(tensor.shape), tensor.dtype, lambda: iter((tensor,)))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its name at the end; after an error nothing is left of it.

    Raises OutputError where it cannot be written.
    """
    temporary = path.parent / f".{secrets.token_hex(6)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}",
            f"check that {path.parent} exists, can be written to and has room",
            path=str(path),
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Sequence[Written], metadata: Mapping[str, str], container: str
) -> Iterator[Written]:
    """Write a file, yielding each tensor once it is in it, and see it on the disk. Peak memory is that of one chunk."""
    header, starts = (_safetensors if container == "safetensors" else _gguf)(tensors, metadata)
    with path.open("xb") as file:
        file.write(header)
        for tensor, start in zip(tensors, starts, strict=True):
            file.write(b"\0" * (start - file.tell()))
            for chunk in tensor.chunks():
                file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            found = file.tell() - start
            assert found == tensor.bytes, f"{tensor.name} made {found} bytes, not {tensor.bytes}"
            yield tensor
        file.flush()
        os.fsync(file.fileno())


def _safetensors(tensors: Sequence[Written], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    rows: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets, end = [], 0
    for tensor in tensors:
        assert isinstance(tensor.kind, torch.dtype)
        place = [end, end + tensor.bytes]
        rows[tensor.name] = {"dtype": SAFETENSORS_NAMES[tensor.kind], "shape": tensor.shape, "data_offsets": place}
        offsets.append(end)
        end += tensor.bytes
    raw = json.dumps(rows).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, [8 + len(raw) + offset for offset in offsets]


def _gguf(tensors: Sequence[Written], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    names = [GGUF_NAMES[item.kind] if isinstance(item.kind, torch.dtype) else item.kind for item in tensors]
    rows = [(item.name, item.shape, kind, item.bytes) for item, kind in zip(tensors, names, strict=True)]
    return gguf_header(rows, {**metadata, "general.quantization_version": 2})
