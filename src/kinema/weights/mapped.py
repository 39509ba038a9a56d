"""One file on disk as memory-mapped tensors: where each lies, and a view of it without a copy.

Knows nothing of container formats: safetensors and .pth readers say where tensors are.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from kinema.errors import CheckpointError

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Without it the kernel may refuse a private map larger than RAM. Python names it from 3.13 on."""


class MappedFile:
    """One file on disk, mapped on first use. Tensors made from the map keep it alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            self.size = os.fstat(file.fileno()).st_size

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}", path=self.path) from error

    def read(self, start: int, count: int) -> bytes:
        with self._opened() as file:
            file.seek(start)
            return file.read(count)

    @cached_property
    def buffer(self) -> mmap.mmap:
        """Copy-on-write map of the whole file: pages stay in the page cache until somebody writes to them."""
        with self._opened() as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.size:
                raise CheckpointError(
                    f"{self.path} changed from {self.size} to {size} bytes while in use", path=self.path
                )
            if not hasattr(mmap, "MAP_PRIVATE"):
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def release(self) -> None:
        """Give back the memory of pages read so far. For maps nobody writes to: a private copy would be lost."""
        if "buffer" in self.__dict__ and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `start` is the byte of its first element, strides are in elements."""

    file: MappedFile = field(repr=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> Tensor:
        """Return the tensor as a view of the mapped file; copied only where its offset is not aligned to its dtype."""
        span = span_of(self.shape, self.stride)
        if span == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.start % self.dtype.itemsize:
            stop = self.start + span * self.dtype.itemsize
            flat = torch.frombuffer(bytearray(self.file.buffer[self.start : stop]), dtype=self.dtype)
        else:
            flat = torch.frombuffer(self.file.buffer, dtype=self.dtype, count=span, offset=self.start)
        return flat.as_strided(self.shape, self.stride)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def span_of(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one a strided view touches; 0 where it is empty."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def truncated(file: MappedFile, short: int, *, exact: bool = True) -> CheckpointError:
    """Return the error for a file that ends `short` bytes too early."""
    amount = f"{short:,}" if exact else f"at least {short:,}"
    return CheckpointError(
        f"{file.path} is truncated: {file.size:,} bytes are there, {amount} bytes are missing",
        "Download it again.",
        path=file.path,
        bytes=file.size,
        bytes_short=short,
    )


def corrupt(file: MappedFile, problem: str, key: str | None = None) -> CheckpointError:
    """Return the error for a file whose bytes contradict each other."""
    return CheckpointError(f"{file.path} is corrupt: {problem}", "Download it again.", path=file.path, key=key)


def refuse(file: MappedFile, problem: str, hint: str = "", **details: Any) -> NoReturn:
    """Raise CheckpointError about this file."""
    raise CheckpointError(f"{file.path}: {problem}", hint, path=file.path, **details)
