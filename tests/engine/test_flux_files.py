"""FLUX.1 from quantised files and with LoRAs: the same picture as from the weights those stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import write
from kinema.engine import Engine
from kinema.errors import KinemaError
from kinema.schema import Plan, Request, Result
from kinema.weights.files import open_tensors
from kinema.weights.keys_flux import PARTS
from tiny_flux import autoencoder, build_flux, clip_text, transformer, transformers_t5
from tiny_world import TinyWorld

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def engine(world: TinyWorld) -> Iterator[Engine]:
    with Engine(world.settings) as engine:
        yield engine


def latents(engine: Engine, folder: Path, **fields: object) -> tuple[Plan, Tensor]:
    usual = {"prompt": "a red cat", "seed": 3, "model": "tiny-flux", "precision": "reference"}
    save = folder / f"{len(list(folder.iterdir()))}.latents.safetensors"
    plan = engine.plan(Request.model_validate({**usual, "output": "latents", "save": save, **fields}))
    (result,) = [event for event in engine.run(plan) if isinstance(event, Result)]
    return plan, open_tensors(result.paths[0]).get("latents").clone()


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "blocks." in name


def halves(state: State, round_to: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[State, State]:
    """Return (as stored, what it stands for) of a state whose block matrices are rounded."""
    stored, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if is_matrix(name, tensor):
            stored[name], meant[name] = round_to(tensor)
    return stored, meant


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    rounded = tensor.to(torch.float8_e4m3fn)
    return rounded, rounded.float()


def write_gguf(path: Path, state: State, kind: str) -> State:
    writer, named, meant = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType[kind], {}
    for name, tensor in state.items():
        of_kind = named if is_matrix(name, tensor) else gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(tensor.numpy(), of_kind)
        writer.add_tensor(name, raw, raw_dtype=of_kind)
        meant[name] = torch.from_numpy(np.array(gguf.dequantize(raw, of_kind))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_fp8_bare_and_all_in_one(engine: Engine, world: TinyWorld, tmp_path: Path) -> None:
    stored, meant = halves(transformer("dev"), to_fp8)
    bare, plain = write(tmp_path / "bare.safetensors", stored), write(tmp_path / "plain.safetensors", meant)
    parts = {"flux_dit": stored, "flux_vae": autoencoder(), "t5": transformers_t5(), "clip_text": clip_text()}
    whole = write(
        tmp_path / "whole.safetensors",
        {PARTS[part] + name: tensor for part, state in parts.items() for name, tensor in state.items()},
    )
    _, want = latents(engine, tmp_path, dit=plain)
    plan, got = latents(engine, tmp_path, dit=bare)
    assert plan.experts["model"].quantisation == "fp8_e4m3 plain"
    assert torch.equal(got, want)
    folder = world.root / "text_encoders"
    tokenizers = {
        "tokenizer": folder / "google/t5-v1_1-xxl",
        "clip_tokenizer": folder / "openai/clip-vit-large-patch14",
    }
    _, got = latents(engine, tmp_path, dit=whole, **tokenizers)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(engine: Engine, tmp_path: Path, kind: str) -> None:
    meant = write_gguf(tmp_path / "flux.gguf", transformer("dev"), kind)
    plan, got = latents(engine, tmp_path, dit=tmp_path / "flux.gguf")
    assert plan.experts["model"].quantisation == kind
    _, want = latents(engine, tmp_path, dit=write(tmp_path / "plain.safetensors", meant))
    assert torch.equal(got, want)


def test_quantised_when_loaded(engine: Engine, tmp_path: Path) -> None:
    _, want = latents(engine, tmp_path)
    for kind, most in (("fp8", 0.2), ("int8", 0.05)):
        plan, got = latents(engine, tmp_path, quantise=kind)
        assert plan.experts["model"].quantisation
        assert 0 < (got - want).norm() < most * want.norm(), kind


# --- LoRA --------------------------------------------------------------------------------------------


def low_rank(seed: int, out: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, rows, generator=generator) / 16, torch.randn(out, 4, generator=generator) / 16


def kohya(state: State) -> tuple[State, State]:
    """A LoRA of the fused matrices under kohya's names, alpha given, and the weights it makes of them."""
    lora, meant = {}, dict(state)
    targets = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.1.linear1")
    for seed, layer in enumerate(targets):
        weight = state[f"{layer}.weight"]
        down, up = low_rank(seed, *weight.shape)
        name = "lora_unet_" + layer.replace(".", "_")
        lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        meant[f"{layer}.weight"] = weight + 2.0 / 4 * up @ down
    return lora, meant


def diffusers(state: State) -> tuple[State, State]:
    """A LoRA of q, v and the single block's MLP apart, as diffusers and PEFT have them."""
    lora, meant = {}, dict(state)
    parts = (
        ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", 0, 128),
        ("transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv", 256, 128),
        ("single_transformer_blocks.0.proj_mlp", "single_blocks.0.linear1", 384, 256),
    )
    for seed, (theirs, layer, start, rows) in enumerate(parts):
        down, up = low_rank(seed, rows, 128)
        lora |= {f"transformer.{theirs}.lora_A.weight": down, f"transformer.{theirs}.lora_B.weight": up}
        weight = meant[f"{layer}.weight"].clone()
        weight[start : start + rows] += up @ down
        meant[f"{layer}.weight"] = weight
    return lora, meant


@pytest.mark.parametrize("mode", ["branch", "fuse"])
@pytest.mark.parametrize("spelling", [kohya, diffusers])
def test_loras(engine: Engine, tmp_path: Path, spelling: Callable[[State], tuple[State, State]], mode: str) -> None:
    lora, meant = spelling(transformer("dev"))
    _, without = latents(engine, tmp_path)
    file = write(tmp_path / "style.safetensors", {name: tensor.contiguous() for name, tensor in lora.items()})
    _, got = latents(engine, tmp_path, lora=str(file), lora_mode=mode)
    _, want = latents(engine, tmp_path, dit=write(tmp_path / "merged.safetensors", meant))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (got - without).norm() > 1e-3 * want.norm()
    _, again = latents(engine, tmp_path)
    assert torch.equal(again, without), "the base weights are as they were"


def test_a_lora_that_does_not_fit_is_refused(engine: Engine, tmp_path: Path) -> None:
    lora, _ = kohya(transformer("dev"))
    renamed = {name.replace("single_blocks_1", "single_blocks_7"): tensor for name, tensor in lora.items()}
    file = write(tmp_path / "wrong.safetensors", {name: tensor.contiguous() for name, tensor in renamed.items()})
    with pytest.raises(KinemaError, match=r"single_blocks\.7"):
        latents(engine, tmp_path, lora=str(file))
