"""FLUX.1 and T5 from quantised files and through the converter; and full-size quantised headers of Wan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_quantised import LLAMA, ref_of, write_gguf
from torch import Tensor, nn

from checkpoints import manifest, write, write_sparse
from kinema.models.encoders import UMT5
from kinema.weights import passage
from kinema.weights.convert import convert
from kinema.weights.detect import inspect
from kinema.weights.gguf import gguf_header
from kinema.weights.keys import Translation
from kinema.weights.load import load
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.layers import QuantisedEmbedding, QuantisedLinear, packable
from kinema.weights.structure import build
from tiny_flux import filled, transformer, transformers_t5


def done(making: Any) -> Any:
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value


def in_blocks(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))


def loaded_equal(path: Path, meaning: Mapping[str, Tensor], tmp_path: Path) -> nn.Module:
    plain = write(tmp_path / "plain.safetensors", {name: tensor.contiguous() for name, tensor in meaning.items()})
    module, wanted = load(ref_of(inspect(path))), load(ref_of(inspect(plain))).state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, QuantisedLinear | QuantisedEmbedding):
            assert torch.equal(layer.dequantised(torch.float32), wanted.pop(f"{name}.weight")), name
    found = module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return module


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_a_flux_transformer_in_gguf(tmp_path: Path, kind: str) -> None:
    meaning = write_gguf(tmp_path / "a.gguf", transformer("dev"), lambda n, t: kind if in_blocks(n, t) else "F32")
    facts = inspect(tmp_path / "a.gguf")
    assert (facts.component, facts.dialect, facts.quantisation) == ("flux_dit", "official", kind)
    module = loaded_equal(tmp_path / "a.gguf", meaning, tmp_path)
    assert isinstance(module.get_submodule("single_blocks.0.linear1"), QuantisedLinear)


def test_a_flux_transformer_in_fp8(tmp_path: Path) -> None:
    e4m3, state = torch.float8_e4m3fn, transformer("schnell")
    stored = {name: tensor.to(e4m3) for name, tensor in state.items()}
    write(tmp_path / "plain_fp8.safetensors", stored)
    loaded_equal(tmp_path / "plain_fp8.safetensors", {n: t.float() for n, t in stored.items()}, tmp_path)


def test_t5_in_gguf_names(tmp_path: Path) -> None:
    from dataclasses import replace

    from tiny_flux import T5

    state, renamed = filled(UMT5(replace(T5, dim=32, dim_attn=32, ffn_dim=64))), {}
    for name, tensor in state.items():
        new = name
        for official, llama in LLAMA:
            new = new.replace(official, llama)
        renamed["enc.output_norm.weight" if name == "norm.weight" else new] = tensor
    meaning = write_gguf(tmp_path / "a.gguf", renamed, lambda n, t: "F32" if t.ndim == 1 or "rel_b" in n else "Q8_0")
    facts = inspect(tmp_path / "a.gguf")
    assert (facts.component, facts.dialect, facts.quantisation) == ("t5", "gguf", "Q8_0")
    module = load(ref_of(facts))
    for name, value in zip(state, meaning.values(), strict=True):
        leaf = module.get_submodule(name.removesuffix(".weight"))
        held = leaf.dequantised() if isinstance(leaf, QuantisedLinear | QuantisedEmbedding) else leaf.weight
        assert torch.equal(held, value), name


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_flux_names_there_and_back(tmp_path: Path, kind: str) -> None:
    """Joined queries, keys, values and MLPs come apart, halves change places, and all of it comes back."""
    state = transformer(kind)
    source = write(tmp_path / "a.safetensors", state)
    made = done(convert(source, tmp_path / "b.safetensors", None, "diffusers"))
    assert made.facts.dialect == "diffusers" and made.proof.error == 0
    theirs = load_file(tmp_path / "b.safetensors")
    joined = state["single_blocks.0.linear1.weight"]
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    apart = torch.cat([theirs[f"single_transformer_blocks.0.{part}.weight"] for part in parts])
    assert torch.equal(apart, joined)
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(theirs["norm_out.linear.weight"], torch.cat([scale, shift]))
    done(convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", None, "official"))
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    done(convert(tmp_path / "b.safetensors", tmp_path / "d.gguf", "Q8_0", "official"))
    done(convert(source, tmp_path / "e.gguf", "Q8_0"))
    one, other = (load(ref_of(inspect(tmp_path / name))).single_blocks[0].linear1 for name in ("d.gguf", "e.gguf"))
    assert torch.equal(one.dequantised(), other.dequantised())


@pytest.mark.parametrize("stored", ["plain", "fp8_channel"])
def test_joined_matrices_are_read_a_few_rows_at_a_time(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys, values and MLP in four tensors, of which no chunk needs more than two."""
    source = write(tmp_path / "a.safetensors", transformer("schnell"))
    done(convert(source, tmp_path / "theirs.safetensors", None if stored == "plain" else stored, "diffusers"))
    done(convert(tmp_path / "theirs.safetensors", tmp_path / "whole.gguf", "Q8_0", "official"))
    read = Translation.read

    def small_ones(self: Translation, official: str) -> Tensor:
        assert len(self.sources[official].parts) == 1, f"{official} is read whole"
        return read(self, official)

    monkeypatch.setattr(Translation, "read", small_ones)
    monkeypatch.setattr(passage, "CHUNK", 50 * 128)
    done(convert(tmp_path / "theirs.safetensors", tmp_path / "parts.gguf", "Q8_0", "official"))
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_t5_becomes_gguf(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", transformers_t5())
    made = done(convert(source, tmp_path / "b.gguf", "F16"))
    assert (made.facts.component, made.facts.dialect) == ("t5", "gguf")


# --- full size -----------------------------------------------------------------------------------------------


def sparse_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]], packed: set[str], kind: str) -> Path:
    block, rows = BLOCK_TYPES[kind], []
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        size = count // block.weights * block.bytes if name in packed else count * 4
        rows.append((name, shape, kind if name in packed else "F32", size))
    header, starts = gguf_header(rows, {"general.architecture": "wan"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(starts[-1] + rows[-1][3])
    return path


@pytest.mark.parametrize(("kind", "share"), [("Q4_K", 4.5 / 8), ("Q8_0", 8.5 / 8)])
def test_a_full_size_gguf_is_read_from_its_header(tmp_path: Path, kind: str, share: float) -> None:
    shapes = manifest("wan2.1_t2v_1.3B")
    config = inspect(write_sparse(tmp_path / "a.safetensors", shapes)).config
    matrices = {name for name, _ in packable("dit", build("dit", config))}
    facts = inspect(sparse_gguf(tmp_path / "a.gguf", shapes, matrices, kind))
    assert facts.config == config and facts.quantisation == kind and facts.dtype == kind
    assert facts.packed_bytes == share * facts.packed_parameters
    assert facts.packed_parameters == facts.matrix_parameters > 0.9 * facts.parameters
