"""One small model, written in every dialect and container, loads to equal tensors; nothing is held in memory twice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import TINY, TINY_VAE22, official_state, tiny, write, write_sparse
from golden_weights import input_tensor
from kinema.errors import CheckpointError
from kinema.models.wan import stays_float32
from kinema.schema import Component, FileFacts, ModelRef
from kinema.tensors import Conditions
from kinema.weights.detect import inspect
from kinema.weights.load import load

State = dict[str, Tensor]


def ref_of(facts: FileFacts, dtype: Any = "float32", **changes: Any) -> ModelRef:
    return ModelRef(
        component=facts.component,
        files=facts.files,
        dialect=facts.dialect,
        container=facts.container,
        config=facts.config,
        dtype=dtype,
        **changes,
    )


# --- other spellings of a small model, written out by hand and so independent of the tables --------------


def swap(state: State, *pairs: tuple[str, str]) -> State:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def dit_to_diffusers(state: State) -> State:
    return swap(
        state,
        (r"^head\.modulation$", "scale_shift_table"),
        (r"^head\.head\.", "proj_out."),
        (r"\.modulation$", ".scale_shift_table"),
        (r"cross_attn\.k_img", "attn2.add_k_proj"),
        (r"cross_attn\.v_img", "attn2.add_v_proj"),
        (r"norm_k_img", "norm_added_k"),
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
        (r"(attn[12])\.([qkv])\.", r"\1.to_\2."),
        (r"(attn[12])\.o\.", r"\1.to_out.0."),
        (r"\.norm3\.", ".norm2."),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
        (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
        (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
        (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    )


def text_to_transformers(state: State) -> State:
    return swap(
        state,
        (r"^token_embedding", "shared"),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.norm([12])\.", lambda m: f"encoder.block.{m[1]}.layer.{int(m[2]) - 1}.layer_norm."),
        (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
        (
            r"^blocks\.(\d+)\.pos_embedding\.embedding",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias",
        ),
        (r"^blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
        (r"^blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
        (r"^blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
    )


def clip_to_transformers(state: State) -> State:
    renamed = swap(
        state,
        (r"^visual\.", "vision_model."),
        ("patch_embedding", "embeddings.patch_embedding"),
        ("pos_embedding", "embeddings.position_embedding.weight"),
        ("cls_embedding", "embeddings.class_embedding"),
        (r"\.pre_norm", ".pre_layrnorm"),
        (r"\.post_norm", ".post_layernorm"),
        (r"\.transformer\.", ".encoder.layers."),
        (r"\.norm([12])", r".layer_norm\1"),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"mlp\.0", "mlp.fc1"),
        (r"mlp\.2", "mlp.fc2"),
    )
    split: State = {}
    for name, tensor in renamed.items():
        if ".to_qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("attn.to_qkv", f"self_attn.{letter}_proj")] = part.clone()
        else:
            split[name] = tensor.flatten() if "class_embedding" in name else tensor
    split["vision_model.embeddings.position_embedding.weight"].squeeze_(0)
    return split


def prefixed(state: State) -> State:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}


SPELLINGS: dict[str, tuple[Component, Any]] = {
    "dit official": ("dit", dict),
    "dit comfyui": ("dit", prefixed),
    "dit diffusers": ("dit", dit_to_diffusers),
    "vae official": ("vae", dict),
    "text_encoder official": ("text_encoder", dict),
    "text_encoder transformers": ("text_encoder", text_to_transformers),
    "clip_vision official": ("clip_vision", dict),
    "clip_vision transformers": ("clip_vision", clip_to_transformers),
}


def as_single(folder: Path, state: State) -> Path:
    return write(folder / "model.safetensors", state)


def as_shards(folder: Path, state: State) -> Path:
    for number in range(3):
        write(folder / f"model-{number + 1:05}-of-00003.safetensors", dict(list(state.items())[number::3]))
    return folder


def as_indexed_shards(folder: Path, state: State) -> Path:
    as_shards(folder, state)
    weight_map = {name: f"model-{n % 3 + 1:05}-of-00003.safetensors" for n, name in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "model.safetensors.index.json"


def as_pth(folder: Path, state: State) -> Path:
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize("container", [as_single, as_shards, as_indexed_shards, as_pth])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_container_loads_to_equal_tensors(tmp_path: Path, spelling: str, container: Any) -> None:
    component, respell = SPELLINGS[spelling]
    want = tiny(component)
    facts = inspect(container(tmp_path, respell(official_state(component))))
    assert facts.dialect == spelling.split(" ")[1]
    assert facts.config == TINY[component]
    got = load(ref_of(facts))
    assert not got.training
    assert not any(parameter.requires_grad for parameter in got.parameters())
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


# --- the classes of others, with their own weights, as oracles of the tables' meaning ---------------------


def saved(module: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    module.eval().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_diffusers_dit_gives_the_same_velocity(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=1,
        in_channels=36,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=2,
        image_dim=48,
        added_kv_proj_dim=128,
    )
    facts = inspect(saved(theirs, tmp_path / "transformer"))
    assert facts.dialect == "diffusers"
    ours: Any = load(ref_of(facts, dtype="float32"))
    x, clip = input_tensor("x", (1, 36, 3, 4, 6), 1), input_tensor("clip", (1, 257, 48), 1)
    text = input_tensor("text", (512, 32), 1)
    want = theirs(x, torch.tensor([400.0]), text[None], encoder_hidden_states_image=clip, return_dict=False)[0]
    got = ours(x, torch.tensor([400.0]), ours.prepare(Conditions(text=(text,), clip_BVD=clip)))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("config", [TINY["vae"], TINY_VAE22])
@torch.no_grad()
def test_a_diffusers_vae_gives_the_same_frames_and_latents(tmp_path: Path, config: dict[str, Any]) -> None:
    from diffusers import AutoencoderKLWan

    newer = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    theirs = AutoencoderKLWan(
        base_dim=config["dim"],
        decoder_base_dim=config["dec_dim"],
        z_dim=config["z_dim"],
        **(newer if config["version"] == "2.2" else {}),
    )
    facts = inspect(saved(theirs, tmp_path / "vae"))
    assert facts.dialect == "diffusers"
    assert facts.config == config
    ours: Any = load(ref_of(facts))
    video = input_tensor("video", (1, 3, 5, 32, 32), 1, 0.5)
    mean = theirs.encode(video).latent_dist.mode()
    assert (ours.denormalise(ours.encode(video)) - mean).abs().max() < 1e-4 * mean.abs().max()
    frames = theirs.decode(mean).sample
    assert (ours.decode(ours.normalise(mean)).clamp(-1, 1) - frames).abs().max() < 1e-4


@torch.no_grad()
def test_a_transformers_umt5_gives_the_same_features(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=60, d_model=32, d_kv=6, num_heads=4, d_ff=40, num_layers=2, feed_forward_proj="gated-gelu"
        )
    )
    facts = inspect(saved(theirs, tmp_path / "text_encoder"))
    assert facts.config == TINY["text_encoder"]
    ids = torch.tensor([[5, 9, 2, 40, 1]])
    want = theirs(ids).last_hidden_state
    got = load(ref_of(facts))(ids)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def test_a_transformers_clip_gives_the_same_features(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=16,
            hidden_act="gelu",
        )
    )
    facts = inspect(saved(theirs, tmp_path / "image_encoder"))
    assert facts.config == TINY["clip_vision"]
    assert "visual_projection.weight" in facts.ignored
    pixels = input_tensor("pixels", (2, 3, 28, 28), 1, 2.0)
    want = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    got = load(ref_of(facts))(pixels)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


# --- dtypes and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes_and_float32_islands(tmp_path: Path, stored: torch.dtype, wanted: str) -> None:
    state = {name: tensor.to(stored) for name, tensor in official_state("dit").items()}
    module = load(ref_of(inspect(write(tmp_path / "a.safetensors", state)), dtype=wanted))
    islands = 0
    for name, tensor in module.state_dict().items():
        want = torch.float32 if stays_float32(name) else getattr(torch, wanted)
        islands += stays_float32(name)
        assert tensor.dtype == want, name
        assert torch.equal(tensor, state[name].to(want)), name
    assert 0 < islands < len(state)


def test_the_wrong_component_is_refused(tmp_path: Path) -> None:
    facts = inspect(write(tmp_path / "a.safetensors", official_state("text_encoder")))
    with pytest.raises(CheckpointError, match="is a umT5 text encoder, not a Wan VAE"):
        load(ref_of(facts).model_copy(update={"component": "vae"}))


def test_a_plan_for_another_file_is_refused(tmp_path: Path) -> None:
    facts = inspect(write(tmp_path / "a.safetensors", official_state("dit")))
    config = {**facts.config, "num_layers": 3}
    with pytest.raises(CheckpointError, match=r"tensors \(blocks\.2\.modulation, .* missing"):
        load(ref_of(facts).model_copy(update={"config": config}))


MEASURE = """
import sys, torch
from pathlib import Path
from kinema.schema import ModelRef
from kinema.weights.detect import inspect
from kinema.weights.load import load

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

facts = inspect(Path(sys.argv[1]))
for dtype in sys.argv[2:]:
    before = anonymous()
    module = load(ModelRef(component=facts.component, files=facts.files, dialect=facts.dialect,
                           container=facts.container, config=facts.config, dtype=dtype))
    for parameter in module.parameters():
        parameter.view(torch.uint8).flatten()[::4096].sum()  # touches every page
    print(anonymous() - before)
    del module
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_model_takes_no_memory_and_a_copy_is_noticed(tmp_path: Path) -> None:
    config = {"vocab": 20_000, "dim": 1024, "dim_attn": 1024, "ffn_dim": 2816, "num_layers": 10, "num_heads": 16}
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (20_000, 1024), "norm.weight": (1024,)}
    for layer in range(config["num_layers"]):
        shapes |= {f"blocks.{layer}.attn.{name}.weight": (1024, 1024) for name in "qkvo"}
        shapes |= {f"blocks.{layer}.ffn.{name}.weight": (2816, 1024) for name in ("gate.0", "fc1")}
        shapes |= {f"blocks.{layer}.ffn.fc2.weight": (1024, 2816)}
        shapes |= {f"blocks.{layer}.norm{number}.weight": (1024,) for number in (1, 2)}
        shapes |= {f"blocks.{layer}.pos_embedding.embedding.weight": (32, 16)}
    path = write_sparse(tmp_path / "big.safetensors", shapes)
    assert path.stat().st_size > 280e6

    run = [sys.executable, "-c", MEASURE, str(path), "bfloat16", "float16"]
    mapped, copied = map(int, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert mapped < 40e6
    assert copied > 250e6, "the planted copy: were the file converted, this is what would be seen"
