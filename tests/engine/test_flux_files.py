"""FLUX.1 from quantised files and with LoRAs: the same picture as from the weights those stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import write
from kinema.engine import Engine
from kinema.errors import KinemaError
from kinema.schema import Plan, Request, Result, Settings
from kinema.weights.files import open_tensors
from kinema.weights.keys_flux import PARTS
from tiny_flux import autoencoder, clip_text, transformer, transformers_t5
from tiny_world import TinyWorld, picture

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def settings(flux_world: TinyWorld) -> Settings:
    return flux_world.settings


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


def test_fp8_bare_and_all_in_one(engine: Engine, flux_world: TinyWorld, tmp_path: Path) -> None:
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
    folder = flux_world.root / "text_encoders"
    tokenizers = {
        "tokenizer": folder / "google/t5-v1_1-xxl",
        "clip_tokenizer": folder / "openai/clip-vit-large-patch14",
    }
    _, got = latents(engine, tmp_path, dit=whole, **tokenizers)
    assert torch.equal(got, want)


def test_an_all_in_one_file_is_found_by_the_model_s_name(flux_world: TinyWorld, engine: Engine, tmp_path: Path) -> None:
    """A models folder with nothing but the checkpoint and the two tokenizers."""
    parts = {
        "flux_dit": transformer("dev"),
        "flux_vae": autoencoder(),
        "t5": transformers_t5(),
        "clip_text": clip_text(),
    }
    state = {PARTS[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    root = tmp_path / "models"
    path = write(root / "checkpoints/all.safetensors", state)
    for name in ("google", "openai"):
        shutil.copytree(flux_world.root / "text_encoders" / name, root / "text_encoders" / name)
    catalog = tmp_path / "one.toml"
    (text,) = (
        row for row in flux_world.settings.catalogs[0].read_text().split("\n[models.") if row.startswith('"tiny-flux"')
    )
    row = text.replace("diffusion_models/flux_dev.safetensors", "checkpoints/all.safetensors")
    catalog.write_text("[models." + row.replace('"tiny-flux"', '"tiny-whole"'))
    with Engine(Settings(models=(root,), catalogs=(catalog,))) as alone:
        plan, got = latents(alone, tmp_path, model="tiny-whole")
    _, want = latents(engine, tmp_path)
    assert {ref.files for ref in (plan.vae, plan.text_encoder, *plan.experts.values())} == {(path,)}
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(engine: Engine, tmp_path: Path, kind: str) -> None:
    meant = write_gguf(tmp_path / "flux.gguf", transformer("dev"), kind)
    plan, got = latents(engine, tmp_path, dit=tmp_path / "flux.gguf")
    assert plan.experts["model"].quantisation == kind
    _, want = latents(engine, tmp_path, dit=write(tmp_path / "plain.safetensors", meant))
    assert torch.equal(got, want)


def t5_gguf_names(state: State) -> State:
    """The T5 encoder as llama.cpp's converter names it, which city96's files have."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, llama in (
            ("encoder.block.", "enc.blk."), ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
            ("layer.0.SelfAttention.", "attn_"), ("layer.0.layer_norm", "attn_norm"),
            ("layer.1.layer_norm", "ffn_norm"),
            ("layer.1.DenseReluDense.wi_0", "ffn_gate"), ("layer.1.DenseReluDense.wi_1", "ffn_up"),
            ("layer.1.DenseReluDense.wo", "ffn_down"), ("encoder.final_layer_norm", "enc.output_norm"),
            ("shared", "token_embd"),
        ):  # fmt: skip
            name = name.replace(theirs, llama)
        renamed[name] = tensor
    return renamed


def test_t5_in_fp8_and_gguf(engine: Engine, flux_world: TinyWorld, tmp_path: Path) -> None:
    tokenizer = flux_world.root / "text_encoders/google/t5-v1_1-xxl"
    state = transformers_t5()
    rounded = {
        name: tensor.to(torch.float8_e4m3fn) if name.endswith((".q.weight", ".wo.weight")) else tensor
        for name, tensor in state.items()
    }
    meant = {name: tensor.float() for name, tensor in rounded.items()}
    _, got = latents(engine, tmp_path, tokenizer=tokenizer, text_encoder=write(tmp_path / "fp8.safetensors", rounded))
    _, want = latents(engine, tmp_path, tokenizer=tokenizer, text_encoder=write(tmp_path / "p.safetensors", meant))
    assert torch.equal(got, want)
    path = tmp_path / "t5.gguf"
    writer = gguf.GGUFWriter(path, "t5encoder")
    for name, tensor in t5_gguf_names(state).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan, got = latents(engine, tmp_path, tokenizer=tokenizer, text_encoder=path)
    _, want = latents(engine, tmp_path)
    assert plan.text_encoder.container == "gguf"
    assert torch.equal(got, want)


def test_a_diffusers_folder(engine: Engine, flux_world: TinyWorld, tmp_path: Path) -> None:
    """FLUX's folders: text_encoder is CLIP, text_encoder_2 is T5, each with a tokenizer beside."""
    folder = tmp_path / "FLUX.1-dev"
    parts = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    parts |= {"text_encoder_2": "T5EncoderModel", "tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    index = {"_class_name": "FluxPipeline", **{name: ["some", kind] for name, kind in parts.items()}}
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    write(folder / "transformer/diffusion_pytorch_model.safetensors", transformer("dev"))
    write(folder / "vae/diffusion_pytorch_model.safetensors", autoencoder())
    write(folder / "text_encoder/model.safetensors", clip_text())
    write(folder / "text_encoder_2/model.safetensors", transformers_t5())
    shutil.copytree(flux_world.root / "text_encoders/openai/clip-vit-large-patch14", folder / "tokenizer")
    shutil.copytree(flux_world.root / "text_encoders/google/t5-v1_1-xxl", folder / "tokenizer_2")
    _, want = latents(engine, tmp_path)
    with pytest.raises(KinemaError, match="may be tiny-flux or tiny-kontext or tiny-redux"):
        latents(engine, tmp_path, model=str(folder))
    named = {"dit": folder / "transformer", "vae": folder / "vae", "text_encoder": folder / "text_encoder_2"}
    plan, got = latents(engine, tmp_path, **named, clip_text=folder / "text_encoder")
    assert torch.equal(got, want)
    assert str(plan.text_encoder.tokenizer).endswith("tokenizer_2/spiece.model")
    assert plan.flux is not None and str(plan.flux.clip_text.tokenizer).endswith("tokenizer/vocab.json")


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


def xlabs(state: State) -> tuple[State, State]:
    """A LoRA of the attention processors, as XLabs has them: of both sides, and of a single block."""
    lora, meant = {}, dict(state)
    parts = (
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", 384, 128),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", 128, 128),
        ("single_blocks.0.processor.qkv_lora", "single_blocks.0.linear1", 384, 128),
        ("single_blocks.0.processor.proj_lora", "single_blocks.0.linear2", 128, 384),
    )
    for seed, (theirs, layer, rows, columns) in enumerate(parts):
        down, up = low_rank(seed, rows, columns)
        lora |= {f"{theirs}.down.weight": down, f"{theirs}.up.weight": up}
        weight = meant[f"{layer}.weight"].clone()
        weight[:rows] += up @ down
        meant[f"{layer}.weight"] = weight
    return lora, meant


@pytest.mark.parametrize("mode", ["branch", "fuse"])
@pytest.mark.parametrize("spelling", [kohya, diffusers, xlabs])
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


@pytest.mark.parametrize("mode", ["branch", "fuse"])
def test_a_control_lora_widens_the_input(engine: Engine, tmp_path: Path, mode: str) -> None:
    """BFL's LoRAs of Canny and Depth: matrices with biases, whole norms, and an input twice as wide as the model's."""
    state = transformer("dev")
    wide = torch.cat([state["img_in.weight"], torch.zeros(128, 64)], dim=1)
    down, up = low_rank(5, 128, 128)
    bias, norm = torch.linspace(-0.2, 0.2, 128), torch.linspace(0.8, 1.3, 128)
    lora = {
        "img_in.lora_A.weight": down, "img_in.lora_B.weight": up, "img_in.lora_B.bias": bias,
        "double_blocks.0.img_attn.norm.query_norm.scale": norm,
    }  # fmt: skip
    meant = {**state, "img_in.weight": wide + up @ down, "img_in.bias": state["img_in.bias"] + bias}
    meant["double_blocks.0.img_attn.norm.query_norm.scale"] = norm
    base = write(tmp_path / "dev.safetensors", state)
    file = write(tmp_path / "flux1-canny-dev-lora.safetensors", lora)
    shown = {"model": "tiny-canny", "control": picture(tmp_path / "edges.png")}
    _, want = latents(engine, tmp_path, dit=write(tmp_path / "merged.safetensors", meant), **shown)
    plan, got = latents(engine, tmp_path, dit=base, lora=str(file), lora_mode=mode, **shown)
    assert any("gets columns of zeros" in note.text for note in plan.notes)
    assert plan.experts["model"].config["in_channels"] == 32
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(KinemaError, match="in_channels is 16, expected 32"):
        latents(engine, tmp_path, dit=base, **shown)


@pytest.mark.parametrize("swapped", [1, 2, 3])
def test_streamed_blocks_give_the_same_bits(engine: Engine, tmp_path: Path, swapped: int) -> None:
    _, want = latents(engine, tmp_path)
    plan, got = latents(engine, tmp_path, blocks_to_swap=swapped, text_encoder_on="streamed")
    assert plan.experts["model"].resident_blocks == 3 - swapped
    assert torch.equal(got, want)
