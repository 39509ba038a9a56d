"""Containers: every tensor equals what safetensors and torch read; nothing hostile, cut or corrupt gets through."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.weights.files import open_tensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def random_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(12):
        rank = int(torch.randint(0, 5, (), generator=generator))
        shape = torch.randint(0 if number == 3 else 1, 6, (rank,), generator=generator).tolist()
        dtype = DTYPES[number % len(DTYPES)]
        tensors[f"layer.{number}.weight"] = (torch.randn(shape, generator=generator) * 50).abs().to(dtype)
    return tensors


def assert_same(path: Path, want: dict[str, Tensor]) -> None:
    file = open_tensors(path)
    assert set(file.names) == set(want)
    for name, tensor in want.items():
        got = file.get(name)
        assert got.dtype == tensor.dtype == file.dtype(name)
        assert tuple(got.shape) == tuple(tensor.shape) == file.shape(name)
        assert torch.equal(got, tensor), name


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


# --- right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_safetensors_equals_the_library(tmp_path: Path, seed: int) -> None:
    save_file(random_tensors(seed), tmp_path / "a.safetensors", metadata={"made": "here"})
    assert_same(tmp_path / "a.safetensors", load_file(tmp_path / "a.safetensors"))
    assert open_tensors(tmp_path / "a.safetensors").metadata == {"made": "here"}


@pytest.mark.parametrize("seed", range(8))
def test_pth_equals_torch(tmp_path: Path, seed: int) -> None:
    tensors = OrderedDict(random_tensors(seed))
    big = torch.randn(6, 10)
    tensors |= {
        "slice": big[2:5, 1:8:2],
        "transposed": big.t(),
        "tied": big,
        "expanded": torch.randn(3, 1).expand(3, 4),
    }
    tensors["parameter"] = torch.nn.Parameter(torch.randn(4))
    tensors._metadata = OrderedDict({"": {"version": 1}})  # what nn.Module.state_dict() attaches
    torch.save(tensors, tmp_path / "a.pth")
    want = torch.load(tmp_path / "a.pth", weights_only=True)
    assert_same(tmp_path / "a.pth", want)
    assert open_tensors(tmp_path / "a.pth").get("slice").stride() == want["slice"].stride()


def test_pth_nested_under_state_dict_keeps_plain_values(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(2)}}, tmp_path / "a.ckpt")
    file = open_tensors(tmp_path / "a.ckpt")
    assert file.names == ("a",)
    assert file.metadata == {"epoch": "3"}


def test_pth_with_two_tables_is_not_halved(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="beside tensors it holds"):
        open_tensors(tmp_path / "a.pth")


def test_tensors_outlive_the_file_object_and_never_write_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0)}, path)
    before = path.read_bytes()
    tensor = open_tensors(path).get("a")
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes() == before


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0)}, tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read: No such file"):
        file.get("a")


def test_get_is_a_view_of_one_map(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.arange(6.0)}, tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    assert file.get("a").data_ptr() == file.get("a").data_ptr()
    assert abs(file.get("a").data_ptr() - file.get("b").data_ptr()) == 24


def test_unaligned_tensors_are_copied_not_misread(tmp_path: Path) -> None:
    values = torch.arange(4, dtype=torch.float32)
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    for padding in range(4):
        raw = json.dumps(header).encode() + b" " * padding
        write_raw(tmp_path / "a.safetensors", raw, values.numpy().tobytes())
        assert torch.equal(open_tensors(tmp_path / "a.safetensors").get("a"), values)


# --- shards ----------------------------------------------------------------------------------------


def write_shards(folder: Path, *, index: bool) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(1)
    weight_map = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return tensors


@pytest.mark.parametrize("index", [True, False])
def test_shards_open_by_folder_index_or_any_shard(tmp_path: Path, index: bool) -> None:
    tensors = write_shards(tmp_path, index=index)
    assert_same(tmp_path, tensors)
    assert_same(tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors", tensors)
    files = open_tensors(tmp_path).files
    assert [file.name[-8 - 12 : -12] for file in files] == ["of-00003"] * 3
    assert open_tensors(files).names == open_tensors(tmp_path).names


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    write_shards(tmp_path, index=index)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"misses 1 of its 3 shards: diffusion_pytorch_model-00002-of-00003"):
        open_tensors(tmp_path)


def test_shards_of_different_downloads(tmp_path: Path) -> None:
    write_shards(tmp_path, index=True)
    save_file({"other": torch.ones(1)}, tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="promises 4 tensors its shards do not hold"):
        open_tensors(tmp_path)
    save_file({"layer.0.weight": torch.ones(1)}, tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"repeats 'layer\.0\.weight'"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../../a.safetensors"}}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index of shards|outside its folder"):
        open_tensors(tmp_path)


def test_folders_that_do_not_name_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors, .* or \.sft file"):
        open_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "c.sft")
    assert open_tensors(tmp_path).files == (tmp_path / "c.sft",)
    (tmp_path / "c.sft").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints: a\.safetensors, b\.safetensors"):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_tensors(tmp_path / "none.safetensors")


# --- cut short -------------------------------------------------------------------------------------


def test_every_cut_of_a_safetensors_file_is_reported(tmp_path: Path) -> None:
    save_file(random_tensors(2), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    cut = tmp_path / "cut.safetensors"
    for size in [*range(12), *range(12, len(whole), 13), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated") as caught:
            open_tensors(cut)
        short = caught.value.details["bytes_short"]
        assert 0 < short <= len(whole) - size
        assert short == len(whole) - size or size < 8 + header  # exact once the header is whole


def test_every_cut_of_a_pth_file_is_reported(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(50, 20), "b": torch.randn(40)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for size in [*range(2, 40, 3), *range(40, len(whole), 61), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated") as caught:
            open_tensors(cut)
        assert 0 < caught.value.details["bytes_short"] <= len(whole) - size
    cut.write_bytes(whole[:1200])
    with pytest.raises(CheckpointError) as caught:
        open_tensors(cut)
    assert caught.value.details["bytes_short"] > 3000  # the pickle at the front tells of 4,160 bytes of numbers


# --- corrupt ---------------------------------------------------------------------------------------

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not JSON": b"{" + b"x" * 20,
    "not UTF-8": b'{"\xff\xfe": 1}',
    "name twice": b'{"a":' + json.dumps(ROW).encode() + b',"a":' + json.dumps(ROW).encode() + b"}",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "row is a list": {"a": [1, 2]},
    "field missing": {"a": {"dtype": "F32", "shape": [2]}},
    "field more": {"a": {**ROW, "more": 1}},
    "unknown dtype": {"a": {**ROW, "dtype": "F4"}},
    "dtype a list": {"a": {**ROW, "dtype": ["F32"]}},
    "negative axis": {"a": {**ROW, "shape": [-2]}},
    "axis true": {"a": {**ROW, "shape": [True, 2]}},
    "axis a float": {"a": {**ROW, "shape": [2.0]}},
    "axis too large": {"a": {**ROW, "shape": [2**63]}},
    "shape a text": {"a": {**ROW, "shape": "2"}},
    "shape too large": {"a": {**ROW, "shape": [3]}},
    "offsets swapped": {"a": {**ROW, "data_offsets": [8, 0]}},
    "offsets negative": {"a": {**ROW, "data_offsets": [-8, 0]}},
    "offsets of three": {"a": {**ROW, "data_offsets": [0, 8, 8]}},
    "overlap": {"a": {**ROW, "shape": [1], "data_offsets": [0, 4]}, "b": {**ROW, "shape": [1], "data_offsets": [2, 6]}},
    "gap": {"a": {**ROW, "shape": [1], "data_offsets": [4, 8]}},
    "bytes after": {"a": {**ROW, "shape": [1], "data_offsets": [0, 4]}},
    "metadata a list": {"__metadata__": [], "a": ROW},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": ROW},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_corrupt_headers(tmp_path: Path, name: str) -> None:
    assert open_tensors(write_raw(tmp_path / "good.safetensors", {"a": ROW}, b"\0" * 8)).shape("a") == (2,)
    path = write_raw(tmp_path / "bad.safetensors", BAD_HEADERS[name], b"\0" * 8)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert "bad.safetensors" in caught.value.message


def test_a_header_longer_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_tensors(path)


KINDS = {
    b"GGUF\x09\0\0\0{\0\0\0\0\0\0\0": "GGUF version 9",
    b"version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer",
    b"<!DOCTYPE html><html>": "web page",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "old torch format",
    b"\x89PNG\r\n\x1a\n0123456789": "no checkpoint",
}


@pytest.mark.parametrize("start", KINDS)
def test_other_kinds_of_files_are_told_apart(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(start + b"\0" * 50)
    with pytest.raises(CheckpointError, match=KINDS[start]):
        open_tensors(tmp_path / "a.safetensors")


def test_legacy_pth_says_how_to_convert(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch\.load\('old\.pth', weights_only=True\)"):
        open_tensors(tmp_path / "old.pth")


# --- hostile pickles -------------------------------------------------------------------------------

RAN: list[str] = []


def witness(text: str = "called") -> str:
    RAN.append(text)
    return text


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def by_hand(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_pickle(storage: bytes, offset: int = 0, shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
    head = b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n("
    return head + storage + b"J" + struct.pack("<i", offset) + shape + stride + b"\x89}tRs."


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
NESTED_TUPLE = b"".join(b"q" + bytes([n % 200]) + b"h" + bytes([n % 200]) + b"\x86" for n in range(60))
WITNESS = f"{__name__}\nwitness\n".encode()

HOSTILE = {
    "os.system": pickle.dumps(Calls(__import__("os").system, "exit 3"), 2),
    "builtins.eval": pickle.dumps(Calls(eval, "witness()"), 2),
    "builtins.exec": pickle.dumps({"a": Calls(exec, "import os")}, 2),
    "builtins.getattr": pickle.dumps(Calls(getattr, "a", "upper"), 2),
    "subprocess.Popen": pickle.dumps(Calls(__import__("subprocess").Popen, ["true"]), 2),
    "own function": pickle.dumps(Calls(witness), 2),
    "own function, protocol 4 (STACK_GLOBAL)": pickle.dumps(Calls(witness), 4),
    "own function, protocol 5": pickle.dumps({"a": [Calls(witness)]}, 5),
    "own function, protocol 0": pickle.dumps(Calls(witness), 0),
    "nested reduce": pickle.dumps(Calls(list, Calls(tuple, Calls(witness))), 2),
    "reduce in a key": pickle.dumps({Calls(witness): 1}, 2),
    "in an OrderedDict's items": pickle.dumps(OrderedDict(a=Calls(witness)), 2),
    "behind a tensor": pickle.dumps([1, 2, Calls(witness)], 2),
    "INST": b"\x80\x02(" + text("x") + b"i" + WITNESS + b".",
    "OBJ": b"\x80\x02(c" + WITNESS + text("x") + b"o.",
    "NEWOBJ": b"\x80\x02c" + WITNESS + b")\x81.",
    "NEWOBJ_EX": b"\x80\x04c" + WITNESS + b")}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "PERSID": b"\x80\x02Pstorage\n.",
    "STRING escapes": b"S'\\x41'\n.",
    "BUILD on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("a") + b"K\x01sb.",
    "BUILD with slots": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"N\x86sb.",
    "dotted name": by_hand("torch._utils", "_rebuild_tensor_v2.__globals__", b")"),
    "torch.load": by_hand("torch", "load", b"(" + text("other.pth") + b"t"),
    "torch.hub.load": by_hand("torch.hub", "load", b"(" + text("a/b") + b"t"),
    "torch.serialization._load": by_hand("torch.serialization", "_load", b")"),
    "torch.storage._load_from_bytes": by_hand("torch.storage", "_load_from_bytes", b"(" + text("x") + b"t"),
    "torch._utils.getattr": by_hand("torch._utils", "_import_dotted_name", b"(" + text("os.system") + b"t"),
    "functools.partial": by_hand("functools", "partial", b"(c" + WITNESS + b"t"),
    "numpy reconstruct": by_hand("numpy.core.multiarray", "_reconstruct", b")"),
    "codecs.encode": by_hand("_codecs", "encode", b"(" + text("x") + text("latin1") + b"t"),
    "storage called": by_hand("torch", "FloatStorage", b"(K\x04t"),
    "storage by another name": tensor_pickle(STORAGE.replace(b"FloatStorage", b"_C\nFloatStorage")),
    "storage outside the archive": tensor_pickle(STORAGE.replace(text("0"), text("../0"))),
    "storage too large": tensor_pickle(STORAGE.replace(b"K\x04", b"K\x05")),
    "view outside": tensor_pickle(STORAGE, offset=1),
    "view before": tensor_pickle(STORAGE, offset=-1),
    "stride outside": tensor_pickle(STORAGE, stride=b"K\x02\x85"),
    "negative stride": tensor_pickle(STORAGE, stride=b"J\xff\xff\xff\xff\x85"),
    "more strides than axes": tensor_pickle(STORAGE, stride=b"K\x01K\x01\x86"),
    "axis of 2**62": tensor_pickle(STORAGE, shape=b"\x8a\x08\0\0\0\0\0\0\0\x40\x85"),
    "memo of 2**32": b"\x80\x02Nr\xff\xff\xff\xff0.",
    "unknown memo": b"\x80\x02h\x07.",
    "empty stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "key of 2**60 nested tuples": b"\x80\x02}K\x00" + NESTED_TUPLE + b"K\x01s.",
    "persistent id of nested tuples": b"\x80\x02K\x00" + NESTED_TUPLE + b"Q.",
    "call of nested tuples": b"\x80\x02K\x00" + NESTED_TUPLE + b")R.",
    "ends early": b"\x80\x02}" + text("a"),
    "a list": b"\x80\x02].",
}


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, twice: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", b"\0" * 16)
        if twice:
            with pytest.warns(UserWarning):
                file.writestr("archive/data/0", b"\1" * 16)
    return path


def test_the_archive_itself_is_well_formed(tmp_path: Path) -> None:
    """Without this the hostile ones could be refused for another reason."""
    assert_same(archive(tmp_path / "a.pth", tensor_pickle(STORAGE)), {"a": torch.zeros(4)})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_none_runs(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "a.pth", HOSTILE[name])
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert str(path) in caught.value.message
    assert not RAN


def test_a_plain_unpickler_would_have_run_them() -> None:
    """The witness works: what is refused above does run elsewhere."""
    pickle.loads(HOSTILE["own function, protocol 4 (STACK_GLOBAL)"])
    assert RAN == ["called"]
    RAN.clear()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("os.system", "system"), ("builtins.eval", "eval"), ("torch.load", "torch.load"), ("numpy reconstruct", "numpy")],
)
def test_the_refused_global_is_named(tmp_path: Path, name: str, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=f"asks for .*{wanted}.*, which no table of tensors needs"):
        open_tensors(archive(tmp_path / "a.pth", HOSTILE[name]))


def test_archives_torch_never_writes(tmp_path: Path) -> None:
    good = tensor_pickle(STORAGE)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_tensors(archive(tmp_path / "a.pth", good, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="occurs twice"):
        open_tensors(archive(tmp_path / "b.pth", good, twice=True))
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as file:
        file.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match="not one of tensors"):
        open_tensors(tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as file:
        file.writestr("archive/data.pkl", good)
        file.writestr("archive/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_tensors(tmp_path / "d.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_random_pickles_never_escape_as_other_errors(tmp_path: Path) -> None:
    """Mutated archives either open or are CheckpointError, whatever byte was hit."""
    whole = bytearray(archive(tmp_path / "a.pth", tensor_pickle(STORAGE)).read_bytes())
    generator = torch.Generator().manual_seed(7)
    for _ in range(300):
        mutated = bytearray(whole)
        for place in torch.randint(0, len(whole), (2,), generator=generator).tolist():
            mutated[place] = int(torch.randint(0, 256, (), generator=generator))
        (tmp_path / "m.pth").write_bytes(mutated)
        try:
            file = open_tensors(tmp_path / "m.pth")
            [file.get(name) for name in file]
        except CheckpointError:
            continue
