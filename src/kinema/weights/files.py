"""Checkpoint files as lazy, memory-mapped tensors: safetensors (one file or shards), .pth and GGUF.

Owns containers only: bytes to named tensors. Knows nothing of models, key names or dialects.
Headers are untrusted: every offset, size and dtype is checked before anything is mapped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.weights.gguf import MAGIC as GGUF_MAGIC
from kinema.weights.gguf import read_gguf
from kinema.weights.gguf_tokenizer import has_sentencepiece, sentencepiece_model
from kinema.weights.mapped import MappedFile, StoredTensor, contiguous, corrupt, truncated
from kinema.weights.pickles import read_pth
from kinema.weights.quantised.packed import Packed
from kinema.weights.quantised.stored import StoredPacked

Container = Literal["safetensors", "pth", "gguf"]

SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".sft")
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors dtype names. Source: huggingface/safetensors, format description in README.md."""

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class TensorFile:
    """Named tensors of one checkpoint, from one file or several, read lazily.

    names      in the order stored.
    metadata   text the file carries about itself.
    bytes      size of all files together.
    tokenizer  makes the sentencepiece model that GGUF metadata hold; None without one.
    """

    def __init__(
        self,
        path: Path,
        files: tuple[Path, ...],
        container: Container,
        tensors: Mapping[str, StoredTensor | StoredPacked],
        metadata: Mapping[str, str],
        tokenizer: Callable[[], bytes] | None = None,
    ) -> None:
        self.path = path
        self.files = files
        self.container = container
        self.metadata = dict(metadata)
        self.tokenizer = tokenizer
        self.bytes = sum(file.stat().st_size for file in files)
        self._tensors = dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    def kind(self, name: str) -> str:
        """Return how a tensor is stored, in a word: a dtype of torch, or the kind of a packed weight."""
        stored = self._stored(name)
        return stored.kind if isinstance(stored, StoredPacked) else str(stored.dtype).removeprefix("torch.")

    def get(self, name: str) -> Tensor:
        """Return one tensor, memory-mapped: its bytes are read when used, and writing to it never reaches the file.

        A packed weight is unpacked to float32.
        """
        return self._stored(name).open()

    def is_packed(self, name: str) -> bool:
        return isinstance(self._stored(name), StoredPacked)

    def packed(self, name: str) -> Packed | None:
        """Return a packed weight as it is, memory-mapped; None for a plain tensor."""
        stored = self._stored(name)
        return stored.packed() if isinstance(stored, StoredPacked) else None

    def release(self) -> None:
        """Give back the memory of pages that were read; they are read again when used."""
        for tensor in self._tensors.values():
            data = tensor.data if isinstance(tensor, StoredPacked) else tensor
            data.file.release()

    def stored(self) -> dict[str, StoredTensor | StoredPacked]:
        """Return where every tensor lies."""
        return dict(self._tensors)

    def _stored(self, name: str) -> StoredTensor | StoredPacked:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}", path=self.path, key=name)
        return self._tensors[name]


def open_tensors(path: Path | str | Sequence[Path]) -> TensorFile:
    """Open a checkpoint: a file, a folder with one checkpoint in it, an index.json, any one shard, or all files of one.

    Only headers are read. Raises CheckpointError for files that are missing, truncated, corrupt or of another kind.
    """
    if not isinstance(path, str | Path):
        files = tuple(Path(file) for file in path)
        return open_tensors(files[0]) if len(files) == 1 else _join(files[0].parent, files)
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if (match := SHARD.fullmatch(path.name)) and int(match["count"]) > 1:
        return _open_shards(path.parent, match["stem"], int(match["count"]))
    return _open_one(path)


def checkpoints_in(folder: Path) -> tuple[Path, ...]:
    """Return what open_tensors could open in `folder` itself: single files, an index for shards, or the first shard."""
    found = {file for file in folder.iterdir() if file.suffix in SUFFIXES}
    indices = {file for file in folder.iterdir() if file.name.endswith(".safetensors.index.json")}
    for index in indices:
        stem = index.name.removesuffix(".safetensors.index.json")
        found -= {file for file in found if (match := SHARD.fullmatch(file.name)) and match["stem"] == stem}
    first: dict[str, Path] = {}
    for file in sorted(found):
        match = SHARD.fullmatch(file.name)
        first.setdefault(match["stem"] if match else file.name, file)
    return tuple(sorted([*first.values(), *indices]))


def _open_folder(folder: Path) -> TensorFile:
    found = checkpoints_in(folder)
    if len(found) == 1:
        return open_tensors(found[0])
    if not found:
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise CheckpointError(f"{folder} holds no {kinds} file", "Name the file itself.", path=folder)
    names = ", ".join(file.name for file in found[:10])
    raise CheckpointError(f"{folder} holds {len(found)} checkpoints: {names}", "Name one of them.", path=folder)


def _open_index(path: Path) -> TensorFile:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        wanted = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of shards", "Download it again.", path=path) from error
    shards = sorted(set(wanted.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard or shard in ("", ".", "..")]:
        raise CheckpointError(f"{path} names a shard outside its folder: {outside[0]!r}", path=path)
    whole = _join(path, tuple(path.parent / shard for shard in shards))
    if missing := [name for name in wanted if name not in whole]:
        raise CheckpointError(
            f"{path} promises {len(missing)} tensors its shards do not hold: {', '.join(missing[:10])}",
            "The shards are of different downloads; download them again.",
            path=path,
            key=missing[0],
        )
    return whole


def _open_shards(folder: Path, stem: str, count: int) -> TensorFile:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _open_index(index)
    return _join(folder, tuple(folder / f"{stem}-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)))


def _join(path: Path, files: tuple[Path, ...]) -> TensorFile:
    if absent := [file for file in files if not file.is_file()]:
        names = ", ".join(file.name for file in absent[:10])
        raise CheckpointError(
            f"{path} misses {len(absent)} of its {len(files)} shards: {names}",
            f"Download {'it' if len(absent) == 1 else 'them'} into {absent[0].parent}.",
            path=path,
            missing=[file.name for file in absent],
        )
    tensors: dict[str, StoredTensor | StoredPacked] = {}
    metadata: dict[str, str] = {}
    for file in files:
        part = _open_one(file)
        if twice := tensors.keys() & part._tensors.keys():
            raise CheckpointError(f"{file} repeats {min(twice)!r} of another shard", path=file, key=min(twice))
        tensors |= part._tensors
        metadata |= part.metadata
    return TensorFile(path, files, "safetensors", tensors, metadata)


# --- one file ------------------------------------------------------------------------------------

OTHER_KINDS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself",
        "Run git lfs pull, or download the file.",
    ),
    (b"<", "is a web page, not a checkpoint", "The download failed, often for want of a login; download it again."),
    (
        b"\x80",
        "is a pickle of the old torch format, which is not read, since unpickling runs code",
        "Convert it once: python -c \"import torch; torch.save(torch.load('FILE', weights_only=True), 'new.pth')\"",
    ),
    (b"\x1f\x8b", "is a gzip archive", "Unpack it first."),
    (b"7z\xbc\xaf", "is a 7z archive", "Unpack it first."),
)


def _open_one(path: Path) -> TensorFile:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", "Check the path.", path=path)
    file = MappedFile(path)
    magic = file.read(0, 32)
    if _header_length(magic) and magic[8:9] == b"{":
        return TensorFile(path, (path,), "safetensors", *_read_safetensors(file))
    if magic.startswith(b"PK"):
        return TensorFile(path, (path,), "pth", *read_pth(file))
    if magic.startswith(GGUF_MAGIC):
        return _open_gguf(path, file)
    for start, what, hint in OTHER_KINDS:
        if magic.startswith(start):
            raise CheckpointError(f"{path} {what}", hint.replace("FILE", path.name), path=path)
    if file.size < 8 or (file.size == 8 and _header_length(magic)):
        raise truncated(file, max(1, 8 - file.size), exact=False)
    raise CheckpointError(
        f"{path} is no checkpoint: its first bytes are those of no known format",
        "Name a .safetensors, .gguf or .pth file of a Wan or FLUX.1 model.",
        path=path,
    )


def _open_gguf(path: Path, file: MappedFile) -> TensorFile:
    tensors, metadata = read_gguf(file)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    tokenizer = (lambda: sentencepiece_model(metadata)) if has_sentencepiece(metadata) else None
    return TensorFile(path, (path,), "gguf", tensors, texts, tokenizer)


def _header_length(magic: bytes) -> int:
    """Length of the safetensors header, 0 where the first bytes cannot be one's."""
    length = int.from_bytes(magic[:8], "little")
    return length if 2 <= length <= MAX_HEADER_BYTES else 0


def _read_safetensors(file: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    length = _header_length(file.read(0, 8))
    if file.size < 8 + length:
        raise truncated(file, 8 + length - file.size, exact=False)
    header = _parse_header(file, file.read(8, length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(file, "its __metadata__ is not a table of texts")
    tensors: dict[str, StoredTensor] = {}
    end = 0
    rows = [(name, *_parse_row(file, name, row)) for name, row in header.items()]
    for name, dtype, shape, begin, stop in sorted(rows, key=lambda row: (row[3], row[4])):
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else f"leaves a gap of {begin - end} bytes"
            raise corrupt(file, f"{name!r} {problem}", key=name)
        tensors[name] = StoredTensor(file, dtype, shape, contiguous(shape), 8 + length + begin)
        end = stop
    if file.size < 8 + length + end:
        raise truncated(file, 8 + length + end - file.size)
    if file.size > 8 + length + end:
        raise corrupt(file, f"{file.size - 8 - length - end:,} bytes follow its last tensor")
    return {name: tensors[name] for name in header}, metadata


def _parse_header(file: MappedFile, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise corrupt(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise corrupt(file, "its header is not a table")
    return header


def _parse_row(file: MappedFile, name: str, row: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt(file, f"the row of {name!r} is not dtype, shape and data_offsets", key=name)
    shape, offsets = row["shape"], row["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise corrupt(file, f"the shape or offsets of {name!r} are not whole numbers", key=name)
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(
            f"{file.path}: {name!r} has dtype {row['dtype']!r}; known are {known}", path=file.path, key=name
        )
    dtype = DTYPES[row["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size or size >= 2**62:
        got = offsets[1] - offsets[0]
        raise corrupt(file, f"{name!r} of shape {shape} needs {size} bytes, its offsets give {got}", key=name)
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(item) is int and 0 <= item < 2**62 for item in value)
    )
