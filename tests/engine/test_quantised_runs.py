"""Whole runs from quantised files and from files rounded when loaded: near the plain run, true to their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.models.wan import stays_float32
from kinema.schema import Request, Result
from tiny_world import TinyWorld

E4M3 = torch.float8_e4m3fn


def latents(engine: Engine, folder: Path, **fields: Any) -> tuple[Tensor, Result]:
    asked = {"model": "tiny-t2v", "prompt": "a cat walks", "seed": 3, "precision": "reference", "device": "cpu",
             "output": "latents", "save": folder / "out.safetensors", "overwrite": True, **fields}  # fmt: skip
    (result,) = (event for event in engine.run(engine.plan(Request(**asked))) if isinstance(event, Result))
    return load_file(result.paths[0])["latents"], result


def in_blocks(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("blocks.") and not stays_float32(name)


def write_fp8(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    stored, meaning = {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, {}
    for name, tensor in state.items():
        meaning[name] = stored[name] = tensor
        if in_blocks(name, tensor):
            scale = tensor.abs().max() / 448
            stored[name], stored[name.replace("weight", "scale_weight")] = (tensor / scale).to(E4M3), scale
            meaning[name] = stored[name].float() * scale
    save_file(stored, path)
    return meaning


def write_q8(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    writer, meaning, q8 = gguf.GGUFWriter(path, "wan"), {}, gguf.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        if in_blocks(name, tensor):
            raw = gguf.quantize(tensor.numpy(), q8)
            writer.add_tensor(name, raw, raw_dtype=q8)
            meaning[name] = torch.from_numpy(gguf.dequantize(raw, q8))
        else:
            writer.add_tensor(name, tensor.numpy())
            meaning[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@pytest.mark.parametrize(("name", "write"), [("fp8.safetensors", write_fp8), ("q8.gguf", write_q8)])
def test_a_run_from_a_quantised_file_is_that_of_its_numbers(
    engine: Engine, tiny_world: TinyWorld, tmp_path: Path, name: str, write: Any
) -> None:
    state = load_file(tiny_world.file("diffusion_models/t2v.safetensors"))
    meaning = write(tmp_path / name, state)
    save_file({n: t.contiguous() for n, t in meaning.items()}, tmp_path / "plain.safetensors")
    found, result = latents(engine, tmp_path, dit=tmp_path / name)
    wanted, _ = latents(engine, tmp_path, dit=tmp_path / "plain.safetensors")
    exact, _ = latents(engine, tmp_path)
    assert torch.equal(found, wanted)
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert result.plan.experts["model"].quantisation


@pytest.mark.parametrize("how", ["fp8", "int8"])
def test_a_run_rounded_when_loaded(engine: Engine, tmp_path: Path, how: str) -> None:
    exact, _ = latents(engine, tmp_path)
    found, result = latents(engine, tmp_path, quantise=how, quantise_text_encoder=how)
    assert 0 < (found - exact).norm() / exact.norm() < 0.1
    assert {result.plan.experts["model"].quantisation, result.plan.text_encoder.quantisation} == {how}
    again, _ = latents(engine, tmp_path)
    assert torch.equal(again, exact)


@pytest.mark.parametrize("name", ["fp8.safetensors", "q8.gguf", "int8"])
def test_packed_blocks_are_streamed_to_the_same_bits(
    engine: Engine, tiny_world: TinyWorld, tmp_path: Path, name: str
) -> None:
    asked: dict[str, Any] = {"quantise": "int8"}
    if name != "int8":
        write = write_fp8 if name.startswith("fp8") else write_q8
        write(tmp_path / name, load_file(tiny_world.file("diffusion_models/t2v.safetensors")))
        asked = {"dit": tmp_path / name}
    staying, _ = latents(engine, tmp_path, **asked)
    for swap in (1, 2):
        streamed, result = latents(engine, tmp_path, blocks_to_swap=swap, **asked)
        assert torch.equal(streamed, staying) and result.plan.experts["model"].resident_blocks == 2 - swap


def test_rows_that_do_not_divide_are_refused_with_what_does(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"rows of t2v\.safetensors do not divide .* of 64 weights, only of 32"):
        engine.plan(Request(model="tiny-t2v", prompt="a cat walks", quantise="fp8-64"))
