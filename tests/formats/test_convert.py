"""Every file becomes every other: names, numbers and container, proven by reading it back, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_load import SPELLINGS as NAMES
from test_quantised import DIT, DIT_STATE, MULTIPLIED, SPELLINGS, TEXT_STATE, islands, matrix, mixed, ref_of, write_gguf
from torch import Tensor

from checkpoints import TINY, TINY_VAE22, official_state, write, write_sparse
from kinema.errors import CheckpointError, OutputError, RequestError
from kinema.schema import Component, Progress
from kinema.weights import convert as converting
from kinema.weights import passage as passing
from kinema.weights import proof as proving
from kinema.weights.convert import FORMATS, Converted, convert
from kinema.weights.detect import inspect
from kinema.weights.keys import DIALECTS
from kinema.weights.load import load
from kinema.weights.quantised.layers import QuantisedLinear, packable
from kinema.weights.quantised.schemes import open_weights
from kinema.weights.structure import build
from tiny_world import DITS

State = dict[str, Tensor]


def run(source: Path, target: Path, *arguments: Any, **more: Any) -> Converted:
    making = convert(source, target, *arguments, **more)
    stages: list[str] = []
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            assert list(dict.fromkeys(stages)) == ["convert", "read back"]
            assert not list(target.parent.glob(".*.partial"))
            return end.value
        assert isinstance(event, Progress) and event.done <= event.total
        stages.append(event.stage)


def numbers(path: Path) -> State:
    return dict(load(ref_of(inspect(path), quantisation=inspect(path).quantisation)).state_dict())


def meaning(path: Path) -> State:
    """All tensors of a file as float32, by official name."""
    from kinema.weights.keys import translate

    translation = translate(open_weights(path))
    return {name: translation.read(name).float() for name in translation.sources}


# --- names -------------------------------------------------------------------------------------------------

STATES: dict[Component, State] = {
    "dit": DIT_STATE,
    "text_encoder": TEXT_STATE,
    "vae": official_state("vae"),
    "clip_vision": official_state("clip_vision"),
}
RENAMED = [(row.component, row.name) for row in DIALECTS if row.component in ("dit", "vae", "text_encoder")]


@pytest.mark.parametrize(("component", "dialect"), list(dict.fromkeys(RENAMED)))
def test_names_of_every_dialect_and_back(tmp_path: Path, component: Component, dialect: str) -> None:
    source = write(tmp_path / "a.safetensors", STATES[component])
    there = run(source, tmp_path / "there.safetensors", None, dialect)
    assert there.facts.dialect == dialect and there.proof.error == 0
    run(tmp_path / "there.safetensors", tmp_path / "back.safetensors", None, "official")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == STATES[component].keys()
    assert all(torch.equal(back[name], STATES[component][name]) for name in back)


OTHER_NAMES = [name for name in NAMES if "official" not in name and "clip" not in name]


@pytest.mark.parametrize("spelling", OTHER_NAMES)
def test_names_are_those_written_by_hand(tmp_path: Path, spelling: str) -> None:
    component, respell = NAMES[spelling]
    run(write(tmp_path / "a.safetensors", STATES[component]), tmp_path / "b.safetensors", None, spelling.split()[1])
    found, wanted = load_file(tmp_path / "b.safetensors"), respell(dict(STATES[component]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_vae_of_22_finds_its_own_diffusers_names(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", official_state("vae", TINY_VAE22))
    assert run(source, tmp_path / "b.safetensors", None, "diffusers").facts.config["version"] == "2.2"
    assert "encoder.down_blocks.0.resnets.0.norm1.gamma" in load_file(tmp_path / "b.safetensors")


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_written_and_loads(tmp_path: Path, to: str) -> None:
    suffix = converting.SUFFIXES[FORMATS[to].container]
    source = write(tmp_path / "a.safetensors", DIT_STATE)
    made = run(source, tmp_path / f"b{suffix}", to)
    wanted = inspect(source)
    assert made.facts.config == wanted.config and made.facts.files == (tmp_path / f"b{suffix}",)
    found = meaning(tmp_path / f"b{suffix}")
    lossy = FORMATS[to].kind not in (torch.float32,)
    assert (made.proof.error > 0) == lossy
    for name, tensor in DIT_STATE.items():
        changed = not torch.equal(found[name], tensor)
        assert changed <= lossy and (not changed or not islands(name) or FORMATS[to].whole), name
        assert (found[name] - tensor).norm() <= 0.2 * tensor.norm()
    numbers(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("variant", DITS)
def test_every_variant_keeps_its_matrices_packed(tmp_path: Path, variant: str) -> None:
    source = write(tmp_path / "a.safetensors", official_state("dit", DITS[variant]))
    made = run(source, tmp_path / "b.safetensors", "fp8_channel")
    module = load(ref_of(made.facts, "bfloat16"))
    packed = {f"{name}.weight" for name, leaf in module.named_modules() if isinstance(leaf, QuantisedLinear)}
    assert packed == {name for name, _ in packable("dit", build("dit", made.facts.config))}
    assert all("blocks." in name for name in packed) and made.facts.packed_parameters == made.facts.matrix_parameters


@pytest.mark.parametrize("to", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_the_gguf_package_reads_what_we_write(tmp_path: Path, to: str) -> None:
    run(write(tmp_path / "a.safetensors", DIT_STATE), tmp_path / "b.gguf", to)
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert reader.get_field("general.architecture").contents() == "wan"  # type: ignore[union-attr]
    found = meaning(tmp_path / "b.gguf")
    assert {tensor.name for tensor in reader.tensors} == found.keys()
    for tensor in reader.tensors:
        assert tuple(reversed(tensor.shape.tolist())) == found[tensor.name].shape
        values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(found[tensor.name].shape)
        assert np.array_equal(values, found[tensor.name].numpy())
        kind = to if matrix(tensor.name, found[tensor.name]) and not islands(tensor.name) else "F32"
        assert tensor.tensor_type.name == kind


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_quantised_spelling_unpacks_without_loss(tmp_path: Path, name: str) -> None:
    stored, wanted, metadata = SPELLINGS[name][0](dict(DIT_STATE))
    source = write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()}, metadata or None)
    assert run(source, tmp_path / "b.safetensors", "float32").proof.error == 0
    found = meaning(tmp_path / "b.safetensors")
    assert all(torch.equal(found[official], tensor) for official, tensor in wanted.items())


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q8_0"])
def test_gguf_unpacks_and_is_renamed_without_loss(tmp_path: Path, kind: str) -> None:
    wanted = write_gguf(tmp_path / "a.gguf", DIT_STATE, mixed(kind))
    assert run(tmp_path / "a.gguf", tmp_path / "b.safetensors", "float32", "diffusers").proof.error == 0
    again = run(tmp_path / "a.gguf", tmp_path / "c.gguf", None, "comfyui")
    assert (again.proof.error, again.facts.quantisation, again.facts.dialect) == (0, kind, "comfyui")
    for path in ("b.safetensors", "c.gguf"):
        found = meaning(tmp_path / path)
        assert all(torch.equal(found[official], tensor) for official, tensor in wanted.items())


@pytest.mark.parametrize("to", ["fp8_scaled", "fp8_channel", "fp8_e5m2", "int8_channel"])
def test_packed_numbers_keep_their_bits_under_other_names(tmp_path: Path, to: str) -> None:
    run(write(tmp_path / "a.safetensors", DIT_STATE), tmp_path / "b.safetensors", to)
    made = run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", None, "comfyui")
    assert made.proof.error == 0
    first, second = load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "c.safetensors")
    assert {f"model.diffusion_model.{name}" for name in first} == second.keys()
    for name, tensor in first.items():
        moved = second[f"model.diffusion_model.{name}"]
        assert torch.equal(moved.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", MULTIPLIED)
def test_what_may_be_multiplied_stays_so_under_other_names_or_is_refused(tmp_path: Path, name: str) -> None:
    stored, _, metadata = MULTIPLIED[name][0](dict(DIT_STATE))
    source = write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()}, metadata or None)
    words = inspect(source).quantisation
    if "+" in words:
        with pytest.raises(RequestError, match="of some fp8 layers that they are not to be multiplied"):
            run(source, tmp_path / "b.safetensors", None, "comfyui")
    else:
        assert run(source, tmp_path / "b.safetensors", None, "diffusers").facts.quantisation == words
    assert "weight only" not in run(source, tmp_path / "c.safetensors", "fp8_channel").facts.quantisation


def test_a_tokenizer_goes_along_where_it_can(tmp_path: Path) -> None:
    piece = torch.arange(50, dtype=torch.uint8)
    source = write(tmp_path / "a.safetensors", TEXT_STATE | {"spiece_model": piece})
    run(source, tmp_path / "b.safetensors", "fp8_scaled", "transformers")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["spiece_model"], piece)
    made = run(source, tmp_path / "c.gguf", "Q8_0")
    assert made.facts.dialect == "gguf" and "the tokenizer inside does not go along" in made.notes[0].text


def test_clip_keeps_what_it_does_not_use(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", STATES["clip_vision"])
    made = run(source, tmp_path / "b.safetensors", "fp8_channel")
    assert made.facts.config == inspect(source).config
    with pytest.raises(RequestError, match="its unused last block would be lost"):
        run(source, tmp_path / "c.safetensors", None, "transformers")


def test_rows_that_hold_no_whole_block_stay_plain_and_are_named(tmp_path: Path) -> None:
    narrow = {**TINY["dit"], "ffn_dim": 80}
    made = run(write(tmp_path / "a.safetensors", official_state("dit", narrow)), tmp_path / "b.gguf", "Q8_0")
    assert "blocks.0.ffn.2.weight and 1 more stay plain" in made.notes[0].text
    with pytest.raises(RequestError, match="a vae has no place in a GGUF file"):
        run(write(tmp_path / "v.safetensors", STATES["vae"]), tmp_path / "v.gguf", "Q8_0")


def test_chunks_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.safetensors", DIT_STATE)
    for to in ("fp8_scaled", "fp8_channel", "Q5_1", "float16"):
        suffix = converting.SUFFIXES[FORMATS[to].container]
        whole, parts = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
        run(source, whole, to, overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr(passing, "CHUNK", 50 * 256)
            run(source, parts, to, overwrite=True)
        assert whole.read_bytes() == parts.read_bytes()


def test_weights_can_be_changed_on_their_way(tmp_path: Path) -> None:
    """The way in for a merged LoRA: rows of a chunk, told from which row on they are."""
    up, down = torch.randn(256, 2), torch.randn(2, 256)

    def adjust(official: str, begin: int, rows: Tensor) -> Tensor:
        return rows + up[begin : begin + len(rows)] @ down if official == "blocks.0.self_attn.q.weight" else rows

    run(write(tmp_path / "a.safetensors", DIT_STATE), tmp_path / "b.safetensors", "float32", adjust=adjust)
    found = meaning(tmp_path / "b.safetensors")
    for name, tensor in DIT_STATE.items():
        wanted = tensor + up @ down if name == "blocks.0.self_attn.q.weight" else tensor
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-5), name


# --- what goes wrong ---------------------------------------------------------------------------------------


def fault(at: str) -> Callable[..., Any]:
    """A stand-in for reading back that finds one number changed."""

    class Changed(passing.Rows):
        def get(self, official: str, begin: int, end: int) -> Tensor:
            rows = super().get(official, begin, end)
            return rows + 2**-10 if official == at else rows

    return Changed


def test_a_result_that_is_not_what_was_meant_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.safetensors", DIT_STATE)
    monkeypatch.setattr(proving, "Rows", fault("blocks.0.ffn.0.weight"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.weight is not what was meant"):
        run(source, tmp_path / "b.safetensors", "fp8_channel")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_converted_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.safetensors", DIT_STATE)
    (tmp_path / "there.safetensors").write_bytes(b"x")
    for target, to, names, words in (
        ("b.bin", None, None, "ends neither in .safetensors nor in .gguf"),
        ("b.gguf", "fp8_scaled", None, "is a safetensors format"),
        ("b.safetensors", "Q8_0", None, "write to .*b.gguf"),
        ("b.gguf", "Q4_K", None, "no format; there are"),
        ("there.safetensors", None, None, "exists"),
        ("b.safetensors", None, "transformers", "has no 'transformers' names"),
    ):
        with pytest.raises(RequestError, match=words):
            run(source, tmp_path / target, to, names)
    with pytest.raises(RequestError, match="is the file to convert"):
        run(source, source, "bfloat16", overwrite=True)
    with pytest.raises(RequestError) as caught:
        run(source, tmp_path / "b.gguf", "q8_0")
    assert caught.value.hint == "pass --to Q8_0"
    write_gguf(tmp_path / "k.gguf", DIT_STATE, mixed("Q4_K"))
    with pytest.raises(RequestError, match="is Q4_K, which cannot stay as it is in this safetensors file"):
        run(tmp_path / "k.gguf", tmp_path / "b.safetensors")
    large = write(tmp_path / "l.safetensors", DIT_STATE | {"blocks.0.ffn.0.bias": torch.full((512,), 1e6)})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.bias does not fit into torch\.float16"):
        run(large, tmp_path / "b.safetensors", "float16")
    for value, to in ((1e4, "fp8_e4m3"), (float("nan"), "Q8_0"), (float("inf"), "int8_channel")):
        odd = DIT_STATE["blocks.0.ffn.0.weight"].clone()
        odd[3, 5] = value
        write(tmp_path / "l.safetensors", DIT_STATE | {"blocks.0.ffn.0.weight": odd})
        with pytest.raises(CheckpointError, match=rf"blocks\.0\.ffn\.0\.weight does not fit into {FORMATS[to].kind}"):
            run(large, tmp_path / f"b{converting.SUFFIXES[FORMATS[to].container]}", to)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"needs .* GB, and 0\.0 GB are free"):
        run(source, tmp_path / "b.safetensors", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors", "k.gguf", "l.safetensors", "there.safetensors"
    ]  # fmt: skip


# --- memory ------------------------------------------------------------------------------------------------

BOUND = 120_000_000
"""Bytes above the process before it began; the file below is larger."""

MEASURE = """
import sys
from pathlib import Path
from kinema.weights.convert import convert
from kinema.weights.detect import inspect
from kinema.runtime.machine import PeakMemory
import torch
torch.set_num_threads(1)
inspect(Path(sys.argv[1]))
with PeakMemory("cpu") as before:
    pass
with PeakMemory("cpu") as peak:
    making = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    for _ in making:
        pass
print(peak.bytes - before.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are exact on Linux")
def test_memory_is_bounded_whatever_the_file(tmp_path: Path) -> None:
    wide = {**DIT, "num_layers": 3, "dim": 1024, "ffn_dim": 4096}
    shapes = {name: tuple(tensor.shape) for name, tensor in build("dit", wide).state_dict().items()}
    source = write_sparse(tmp_path / "a.safetensors", shapes, "F32")
    assert source.stat().st_size > 1.4 * BOUND
    words = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "b.safetensors"), "fp8_scaled"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < BOUND, f"{int(ran.stdout) / 1e6:.0f} MB"
