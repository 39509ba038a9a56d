"""torch's zip .pth files, read without unpickling: a stack machine of our own for the few opcodes tensors need.

Nothing a file says is imported or called. A global is a name compared with a literal list, REDUCE knows
what each listed name means, and tensors come out as strided views of the mapped zip entries.
Source: Python's pickletools (opcodes); torch/serialization.py and torch/_utils.py (layout of the archive).
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from kinema.errors import CheckpointError
from kinema.weights.mapped import MappedFile, StoredTensor, corrupt, refuse, span_of, truncated

MAX_PICKLE_BYTES = 100_000_000
LOCAL_HEADER = struct.Struct("<4s5H3I2H")

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NESTED = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the tensors inside a larger table."""


@dataclass(frozen=True)
class Global:
    """A name from the list below, as it stands on the stack."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """One block of numbers in the archive, `count` elements long."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class View:
    """A tensor as pickled: a window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class MalformedError(Exception):
    """The pickle does something a table of tensors never does."""


class CutShortError(Exception):
    """The pickle ends before its STOP."""


ALLOWED = {
    Global("collections", "OrderedDict"),
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_parameter"),
    *(Global("torch", name) for name in STORAGES),
}


def read_pth(file: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a zip .pth and, as metadata, the plain values stored beside them."""
    entries = _entries(file)
    pickled = next((name for name in entries if name.endswith("data.pkl") and name.count("/") == 1), None)
    if pickled is None or any(name.endswith("/constants.pkl") for name in entries):
        refuse(file, "a zip archive, but not one of tensors (TorchScript or other)", "Take the .safetensors form.")
    prefix = pickled.removesuffix("data.pkl")
    start, size = entries[pickled]
    if size > MAX_PICKLE_BYTES:
        refuse(file, f"its data.pkl of {size:,} bytes is larger than {MAX_PICKLE_BYTES:,}")
    if (order := entries.get(prefix + "byteorder")) and file.read(*order) != b"little":
        refuse(file, "stored in big-endian byte order, which is not read")
    value = _run(file, file.read(start, size))
    views, notes = _named_tensors(file, value)
    return {name: _place(file, entries, prefix, name, view) for name, view in views.items()}, notes


def _run(file: MappedFile, data: bytes) -> Any:
    try:
        return PickleReader().run(data)
    except MalformedError as error:
        hint = "Only tables of tensors are read from .pth files. Take the .safetensors form of this model."
        raise CheckpointError(f"{file.path} is not read: {error}", hint, path=file.path) from error
    except CutShortError as error:
        raise corrupt(file, str(error)) from error


# --- the archive ---------------------------------------------------------------------------------


def _entries(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Map each entry to the (start, size) of its bytes in the file."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, OverflowError, UnicodeDecodeError, NotImplementedError):
        raise _cut_archive(file) from None
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            refuse(file, f"its entry {info.filename!r} is compressed or encrypted, which torch.save never does")
        if info.filename in entries:
            refuse(file, f"its entry {info.filename!r} occurs twice")
        start = _data_start(file, info.header_offset)
        if start is None or start + info.file_size > file.size:
            refuse(file, f"its entry {info.filename!r} reaches outside the file", "Download it again.")
        entries[info.filename] = (start, info.file_size)
    return entries


def _data_start(file: MappedFile, offset: int) -> int | None:
    raw = file.read(offset, LOCAL_HEADER.size) if 0 <= offset < file.size else b""
    if len(raw) < LOCAL_HEADER.size:
        return None
    magic, *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack(raw)
    return offset + LOCAL_HEADER.size + name_bytes + extra_bytes if magic == b"PK\x03\x04" else None


def _cut_archive(file: MappedFile) -> CheckpointError:
    """A zip keeps its table at the end, so a cut file has none: the pickle at its start tells what should follow."""
    start = _data_start(file, 0)
    reader = PickleReader()
    end = start or LOCAL_HEADER.size
    with suppress(CutShortError, MalformedError):
        reader.run(file.read(end, MAX_PICKLE_BYTES))
    end += reader.position
    needed = sum(storage.count * storage.dtype.itemsize for storage in reader.storages)
    return truncated(file, max(1, end + needed - file.size), exact=False)


def _place(
    file: MappedFile, entries: Mapping[str, tuple[int, int]], prefix: str, name: str, view: View
) -> StoredTensor:
    start, size = entries.get(f"{prefix}data/{view.storage.key}", (0, -1))
    itemsize = view.storage.dtype.itemsize
    if size < 0:
        refuse(file, f"the bytes of {name!r} are missing from the archive", "Download it again.", key=name)
    if view.storage.count * itemsize != size:
        refuse(file, f"{name!r} claims {view.storage.count} elements, its entry holds {size} bytes", key=name)
    if view.offset + span_of(view.shape, view.stride) > view.storage.count:
        refuse(file, f"{name!r} reaches outside its storage", "Download it again.", key=name)
    return StoredTensor(file, view.storage.dtype, view.shape, view.stride, start + view.offset * itemsize)


def _named_tensors(file: MappedFile, value: Any) -> tuple[dict[str, View], dict[str, str]]:
    if not isinstance(value, dict):
        refuse(file, f"holds a {type(value).__name__}, not a table of tensors")
    if not any(isinstance(item, View) for item in value.values()):
        inner = [key for key, item in value.items() if isinstance(item, dict)]
        if len(inner) == 1 and inner[0] in NESTED:
            value = {**value, **value[inner[0]]}
            del value[inner[0]]
    views = {key: item for key, item in value.items() if isinstance(item, View)}
    if odd := [key for key in views if not isinstance(key, str)]:
        refuse(file, f"a tensor is named {odd[0]}, which is not text")
    notes = {str(key): str(item) for key, item in value.items() if isinstance(item, str | int | float | bool)}
    if lost := [key for key in value if key not in views and str(key) not in notes]:
        refuse(file, f"beside tensors it holds {lost[0]!r}, a {type(value[lost[0]]).__name__}")
    return views, notes


# --- the pickle ----------------------------------------------------------------------------------

MARK = object()


class PickleReader:
    """A stack machine for the opcodes of a table of tensors.

    storages   blocks of numbers met so far.
    position   byte of the pickle it has come to.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: set[Storage] = set()
        self.position = 0

    def run(self, data: bytes) -> Any:
        """Return what the pickle describes. Raises MalformedError or CutShortError."""
        stream = io.BytesIO(data)
        try:
            for opcode, argument, position in pickletools.genops(stream):
                self.position = position or 0
                if opcode.name == "STOP":
                    return self.pop()
                step = OPCODES.get(opcode.name)
                if step is None:
                    raise MalformedError(f"its pickle uses {opcode.name}, which tensors never need")
                step(self, argument)
        except (ValueError, OverflowError, TypeError, KeyError, IndexError, AttributeError) as error:
            if stream.tell() == len(data) and isinstance(error, ValueError):
                self.position = len(data)
                raise CutShortError("its pickle ends too early") from error
            raise MalformedError(f"its pickle is broken ({type(error).__name__}: {error})") from error
        raise CutShortError("its pickle ends too early")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise MalformedError("its pickle takes from an empty stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise MalformedError(f"its pickle fills something that is not a {kind.__name__}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise MalformedError("its pickle misses a mark")

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or Global(module, name) not in ALLOWED:
            raise MalformedError(
                f"its pickle asks for {_named(module)}.{_named(name)}, which no table of tensors needs"
            )
        self.push(Global(module, name))

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple) or function.name not in CALLS:
            raise MalformedError(f"its pickle calls {_named(function)}")
        self.push(CALLS[function.name](arguments))

    def build(self, _: Any) -> None:
        """Drop the attributes of an OrderedDict: torch keeps module versions there, nothing of the tensors."""
        self.pop()
        self.top(OrderedDict)

    def persistent(self, _: Any) -> None:
        match self.pop():
            case ("storage", Global(module="torch", name=name), str(key), str(), int(count)) if name in STORAGES:
                storage = Storage(STORAGES[name], key, _count(count))
            case _:
                raise MalformedError("its pickle refers to something that is not a storage of numbers")
        self.storages.add(storage)
        self.push(storage)

    def set_items(self, items: list[Any]) -> None:
        table = self.top(dict)
        if len(items) % 2:
            raise MalformedError("its pickle has a key without a value")
        keys = items[::2]
        if not all(isinstance(key, str | int) for key in keys):  # hashing nested tuples could take for ever
            raise MalformedError("its pickle has a key that is neither text nor number")
        table.update(zip(keys, items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)


def _named(value: Any) -> str:
    """Say what a stack entry is, without following it: a hostile one may be nested without end."""
    match value:
        case str():
            return value[:100]
        case Global(module=module, name=name):
            return f"{module}.{name}"
    return f"a {type(value).__name__}"


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise MalformedError("its pickle has something else where a count belongs")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 64:
        raise MalformedError("its pickle has something else where a shape belongs")
    return tuple(_count(item) for item in value)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> View:
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        raise MalformedError("its pickle describes a tensor in an unknown way")
    storage, offset, shape, stride = arguments[:4]
    view = View(storage, _count(offset), _counts(shape), _counts(stride))
    if len(view.shape) != len(view.stride):
        raise MalformedError("its pickle gives a tensor more strides than axes")
    return view


def _rebuild_parameter(arguments: tuple[Any, ...]) -> View:
    if len(arguments) != 3 or not isinstance(arguments[0], View):
        raise MalformedError("its pickle describes a parameter in an unknown way")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    if arguments:
        raise MalformedError("its pickle builds an OrderedDict in an unknown way")
    return OrderedDict()


CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "OrderedDict": _ordered_dict,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


def _memoize(reader: PickleReader, index: Any) -> None:
    if not reader.stack:
        raise MalformedError("its pickle remembers nothing")
    reader.memo[len(reader.memo) if index is None else index] = reader.stack[-1]


def _take(count: int) -> Callable[[PickleReader, Any], None]:
    return lambda reader, _: reader.push(tuple(reversed([reader.pop() for _ in range(count)])))


def _global(reader: PickleReader, argument: Any) -> None:
    reader.find(*str(argument).split(" ", 1))


def _stack_global(reader: PickleReader, _: Any) -> None:
    name, module = reader.pop(), reader.pop()
    reader.find(module, name)


OPCODES: dict[str, Callable[[PickleReader, Any], None]] = {
    "PROTO": lambda reader, _: None,
    "FRAME": lambda reader, _: None,
    "MARK": lambda reader, _: reader.push(MARK),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), PickleReader.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), PickleReader.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda reader, index: reader.push(reader.memo[index])),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "TUPLE1": _take(1),
    "TUPLE2": _take(2),
    "TUPLE3": _take(3),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_mark())),
    "APPEND": lambda reader, _: reader.append([reader.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.pop_mark()),
    "SETITEM": lambda reader, _: reader.set_items(list(reversed([reader.pop(), reader.pop()]))),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": PickleReader.reduce,
    "BUILD": PickleReader.build,
    "BINPERSID": PickleReader.persistent,
}
