"""Every full-size layout, in every spelling, is recognised from its header and fits our modules exactly."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import manifest, write_sparse
from kinema.errors import CheckpointError
from kinema.models.wan import constant
from kinema.weights.detect import inspect
from kinema.weights.files import open_tensors
from kinema.weights.keys import translate

BIG = {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
SMALL = {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
TI2V = {**SMALL, "dim": 3072, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "has_clip_tokens": False}
CLIP_TOKENS = {"in_channels": 36, "has_clip_tokens": True, "clip_dim": 1280}
ANIMATE = {
    "channels": [32, 64, 128, 256, 512, 512, 512, 512],
    "motion_width": 512,
    "motion_dim": 20,
    "face_width": 1024,
    "face_heads": 4,
    "interval": 5,
    "pose_channels": 16,
}

PLAIN16 = {"in_channels": 16, "has_clip_tokens": False}
VACE, SMALL_VACE = ({"vace": {"layers": list(range(0, n, step)), "in_channels": 96}} for n, step in ((40, 5), (30, 2)))
CAMERA = {"camera": {"in_channels": 24, "downscale": 8}}
REFERENCE = {"reference": {"in_channels": 16}}

DITS: dict[str, tuple[dict[str, Any], int]] = {
    "wan2.1_t2v_1.3B": ({**SMALL, "in_channels": 16, "has_clip_tokens": False}, 1_418_996_800),
    "wan2.1_t2v_14B": ({**BIG, "in_channels": 16, "has_clip_tokens": False}, 14_288_491_584),
    "wan2.2_t2v_a14B": ({**BIG, "in_channels": 16, "has_clip_tokens": False}, 14_288_491_584),
    "wan2.2_i2v_a14B": ({**BIG, "in_channels": 36, "has_clip_tokens": False}, 14_288_901_184),
    "wan2.1_i2v_14B": ({**BIG, **CLIP_TOKENS}, 16_394_878_784),
    "wan2.1_fun_inp_1.3B": ({**SMALL, **CLIP_TOKENS}, 1_564_428_608),
    "wan2.1_flf2v_14B": ({**BIG, **CLIP_TOKENS, "num_clip_positions": 514}, 16_395_536_704),
    "wan2.2_ti2v_5B": (TI2V, 4_999_787_712),
    "wan2.2_animate_14B": ({**BIG, **CLIP_TOKENS, "animate": ANIMATE}, 17_274_817_108),
    "wan2.1_vace_1.3B": ({**SMALL, **PLAIN16, **SMALL_VACE}, 2_153_972_032),
    "wan2.1_vace_14B": ({**BIG, **PLAIN16, **VACE}, 17_337_592_896),
    "wan2.1_fun_camera_14B": ({**BIG, **CLIP_TOKENS, "in_channels": 32, **CAMERA}, 16_898_128_704),
    "wan2.2_fun_camera_a14B": ({**BIG, "in_channels": 36, "has_clip_tokens": False, **CAMERA}, 14_792_233_024),
    "wan2.1_fun_control_14B": ({**BIG, **CLIP_TOKENS, "in_channels": 48, **REFERENCE}, 16_395_457_344),
    "wan2.2_fun_control_a14B": ({**BIG, "in_channels": 52, "has_clip_tokens": False, **REFERENCE}, 14_289_561_664),
}
FUN5 = {**TI2V, "camera": {"in_channels": 24, "downscale": 16}, "in_channels": 100}
CONTROL5 = {**TI2V, "reference": {"in_channels": 48}, "in_channels": 148}
DERIVED: dict[str, tuple[str, dict[str, Any], int]] = {
    "fun inp 5B": ("wan2.2_ti2v_5B", {**TI2V, "in_channels": 100}, 5_000_426_688),
    "fun control 5B": ("wan2.2_ti2v_5B", CONTROL5, 5_001_609_408),
    "fun camera 5B": ("wan2.2_ti2v_5B", FUN5, 5_245_802_688),
    "fun control 1.3B": ("wan2.1_fun_inp_1.3B", {**SMALL, **CLIP_TOKENS, "in_channels": 48}, 1_564_502_336),
    "fun control 14B": ("wan2.1_i2v_14B", {**BIG, **CLIP_TOKENS, "in_channels": 48}, 16_395_124_544),
    "fun camera 1.3B": ("wan2.1_fun_inp_1.3B", {**SMALL, **CLIP_TOKENS, "in_channels": 32, **CAMERA}, 1_616_313_152),
}
"""Layouts without a manifest of their own: the one they follow from, what is read of them, and their parameters."""

VAE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temporal_downsample": [False, True, True]}
VAES: dict[str, tuple[dict[str, Any], int]] = {
    "wan2.1_vae": ({**VAE, "version": "2.1", "dim": 96, "dec_dim": 96, "z_dim": 16}, 126_892_531),
    "wan2.2_vae": ({**VAE, "version": "2.2", "dim": 160, "dec_dim": 256, "z_dim": 48}, 704_688_668),
}
UMT5 = {"vocab": 256384, "dim": 4096, "dim_attn": 4096, "num_heads": 64, "ffn_dim": 10240, "num_layers": 24}
VIT_H = {"image_size": 224, "patch_size": 14, "dim": 1280, "num_heads": 16, "num_layers": 32, "mlp_ratio": 4}


def diffusers_dit(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' own class: the oracle of our table."""
    from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel

    clip = config["has_clip_tokens"]
    if "animate" in config:
        with torch.device("meta"):
            animate = WanAnimateTransformer3DModel(added_kv_proj_dim=config["dim"])
        return {name: tuple(tensor.shape) for name, tensor in animate.state_dict().items()}
    vace = config.get("vace")
    more = {"vace_layers": vace["layers"], "vace_in_channels": vace["in_channels"]} if vace else {}
    with torch.device("meta"):
        model = (WanVACETransformer3DModel if vace else WanTransformer3DModel)(
            **more,
            num_attention_heads=config["dim"] // 128,
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            image_dim=1280 if clip else None,
            added_kv_proj_dim=config["dim"] if clip else None,
            pos_embed_seq_len=config.get("num_clip_positions"),
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def diffusers_vae(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from diffusers import AutoencoderKLWan

    newer = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    with torch.device("meta"):
        model = AutoencoderKLWan(
            base_dim=config["dim"],
            decoder_base_dim=config["dec_dim"],
            z_dim=config["z_dim"],
            **(newer if config["version"] == "2.2" else {}),
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def translated(path: Path) -> dict[str, tuple[int, ...]]:
    translation = translate(open_tensors(path))
    assert not translation.leftover
    return {name: translation.shape(name) for name in translation.sources}


DIFFUSERS_LACKS = ("fun_camera", "fun_control")
SPELLED = [
    (name, spelling)
    for name in DITS
    for spelling in ("official", "comfyui", "diffusers")
    if spelling != "diffusers" or not any(variant in name for variant in DIFFUSERS_LACKS)
]


@pytest.mark.parametrize(("name", "spelling"), SPELLED)
def test_dits(tmp_path: Path, name: str, spelling: str) -> None:
    config, parameters = DITS[name]
    official = manifest(name)
    prefix = {"comfyui": "model.diffusion_model."}.get(spelling, "")
    shapes = {prefix + key: shape for key, shape in official.items()}
    if spelling == "diffusers":
        shapes = diffusers_dit(config)
        kernels = {key for key in official if constant(key) is not None}  # diffusers leaves them out
        parameters -= sum(math.prod(official[key]) for key in kernels)
        official = {key: shape for key, shape in official.items() if key not in kernels}
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    began = time.process_time()
    facts = inspect(path)
    assert time.process_time() - began < 3, "a header is read in an instant"
    assert translated(path) == official
    assert (facts.component, facts.dialect, facts.dtype) == ("dit", spelling, "bfloat16")
    assert facts.config == {"num_clip_positions": 0, **config}
    assert (facts.parameters, facts.tensors) == (parameters, len(official))
    assert facts.bytes > 2 * parameters
    assert facts.name_suggests is None


@pytest.mark.parametrize("name", DERIVED)
def test_layouts_that_follow_from_others(tmp_path: Path, name: str) -> None:
    origin, config, parameters = DERIVED[name]
    dim = config["dim"]
    shapes = {**manifest(origin), "patch_embedding.weight": (dim, config["in_channels"], 1, 2, 2)}
    if camera := config.get("camera"):
        shapes["control_adapter.conv.weight"] = (dim, 24 * camera["downscale"] ** 2, 2, 2)
        for place in ("conv1", "conv2"):
            shapes[f"control_adapter.residual_blocks.0.{place}.weight"] = (dim, dim, 3, 3)
            shapes[f"control_adapter.residual_blocks.0.{place}.bias"] = (dim,)
        shapes["control_adapter.conv.bias"] = (dim,)
    if reference := config.get("reference"):
        shapes |= {"ref_conv.weight": (dim, reference["in_channels"], 2, 2), "ref_conv.bias": (dim,)}
    facts = inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    assert facts.config == {"num_clip_positions": 0, **config}
    assert facts.parameters == parameters


def test_adapters_are_told_in_words(tmp_path: Path) -> None:
    for name, words in (("vace_1.3B", "VACE blocks"), ("fun_camera_14B", "camera"), ("fun_control_14B", "reference")):
        assert words in inspect(write_sparse(tmp_path / "a.safetensors", manifest(f"wan2.1_{name}"))).structure


def test_vace_blocks_that_do_not_divide_the_others_are_refused(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in manifest("wan2.1_vace_1.3B").items() if "vace_blocks.14." not in name}
    with pytest.raises(CheckpointError, match="its 14 VACE blocks do not divide its 30 blocks"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in manifest("wan2.1_fun_camera_14B").items() if "conv2" not in name}
    with pytest.raises(CheckpointError, match=r"control_adapter\.residual_blocks\.0\.conv2\.weight.*missing"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_the_short_prefix(tmp_path: Path) -> None:
    shapes = {f"diffusion_model.{key}": shape for key, shape in manifest("wan2.1_t2v_1.3B").items()}
    assert inspect(write_sparse(tmp_path / "a.safetensors", shapes)).dialect == "comfyui"


def test_structure_is_told_in_words(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "wan2.2_i2v_high_noise_14B_fp16.safetensors", manifest("wan2.2_i2v_a14B"), "F16")
    facts = inspect(path)
    assert facts.structure == "Wan DiT 40 layers, 5120 wide, in 36, out 16, no CLIP tokens"
    assert facts.name_suggests == "high"
    path = write_sparse(tmp_path / "a.safetensors", manifest("wan2.1_flf2v_14B"))
    assert inspect(path).structure.endswith("in 36, out 16, 514 CLIP tokens with positions")


@pytest.mark.parametrize("spelling", ["official", "diffusers"])
@pytest.mark.parametrize("name", VAES)
def test_vaes(tmp_path: Path, name: str, spelling: str) -> None:
    config, parameters = VAES[name]
    official = manifest(name)
    path = write_sparse(
        tmp_path / "a.safetensors", diffusers_vae(config) if spelling == "diffusers" else official, "F32"
    )
    facts = inspect(path)
    assert translated(path) == official
    assert (facts.component, facts.dialect, facts.dtype) == ("vae", spelling, "float32")
    assert facts.config == config
    assert (facts.parameters, facts.tensors) == (parameters, len(official))


@pytest.mark.parametrize("embedding", ["shared", "encoder.embed_tokens", "both"])
def test_umt5_transformers(tmp_path: Path, embedding: str) -> None:
    shapes = manifest("umt5_xxl_encoder_transformers")
    table = shapes.pop("shared.weight")
    shapes.pop("encoder.embed_tokens.weight", None)
    names = {"both": ("shared", "encoder.embed_tokens")}.get(embedding, (embedding,))
    path = write_sparse(tmp_path / "a.safetensors", shapes | {f"{name}.weight": table for name in names})
    facts = inspect(path)
    assert translated(path) == manifest("umt5_xxl_encoder_official")
    assert (facts.component, facts.dialect, facts.config) == (
        "text_encoder",
        "transformers",
        {**UMT5, "num_buckets": 32},
    )
    assert facts.parameters == 5_680_910_336
    assert facts.ignored == (("encoder.embed_tokens.weight",) if embedding == "both" else ())
    assert not facts.has_tokenizer


def test_umt5_official(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a.safetensors", manifest("umt5_xxl_encoder_official"))
    facts = inspect(path)
    assert (facts.dialect, facts.config, facts.tensors) == ("official", {**UMT5, "num_buckets": 32}, 242)


def test_umt5_with_its_tokenizer_inside(tmp_path: Path) -> None:
    """ComfyUI's file: every tensor fp16, beside them the sentencepiece model as bytes."""
    shapes = manifest("umt5_xxl_encoder_transformers")
    shapes.pop("encoder.embed_tokens.weight", None)
    path = write_sparse(tmp_path / "a.safetensors", shapes | {"spiece_model": (4_548_313,)}, "F16")
    facts = inspect(path)
    assert facts.has_tokenizer
    assert facts.ignored == ("spiece_model",)


def test_clip_official_leaves_out_what_wan_never_runs(tmp_path: Path) -> None:
    shapes = manifest("clip_vision_h_official")
    facts = inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    assert (facts.component, facts.dialect, facts.config) == ("clip_vision", "official", VIT_H)
    text = sum(name.startswith("textual.") for name in shapes)
    assert set(facts.ignored) == {
        f"textual.* ({text} tensors)",
        "log_scale",
        "visual.head",
        "visual.post_norm.weight",
        "visual.post_norm.bias",
        "visual.transformer.31.* (12 tensors)",
    }
    assert facts.tensors == 5 + 31 * 12


@pytest.mark.parametrize("extra", [{}, {"visual_projection.weight": (1024, 1280)}])
def test_clip_transformers(tmp_path: Path, extra: dict[str, tuple[int, ...]]) -> None:
    path = write_sparse(tmp_path / "a.safetensors", manifest("clip_vision_h_transformers") | extra)
    facts = inspect(path)
    assert (facts.component, facts.dialect, facts.config) == ("clip_vision", "transformers", VIT_H)
    official = manifest("clip_vision_h_official")
    for name, shape in translated(path).items():
        assert official["visual." + name] == shape
    assert {name for name in facts.ignored if "projection" in name} == set(extra)


def test_a_clip_of_another_size_is_refused(tmp_path: Path) -> None:
    shapes = manifest("clip_vision_h_transformers")
    fewer = {name: shape for name, shape in shapes.items() if ".layers.31." not in name}
    with pytest.raises(CheckpointError, match="1280 wide with 31 layers; Wan takes CLIP ViT-H, 1280 wide with 32"):
        inspect(write_sparse(tmp_path / "a.safetensors", fewer))


def test_an_official_file_of_65_gigabytes_maps_on_a_small_machine(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a.safetensors", manifest("wan2.1_i2v_14B"), "F32")
    assert path.stat().st_size > 65e9
    assert open_tensors(path).get("head.modulation").abs().sum() == 0


# --- what is not read ------------------------------------------------------------------------------

UNREAD = {
    "audio_proj.proj1.weight": "an audio-driven Wan",
    "blocks.0.audio_cross_attn.q.weight": "an audio-driven Wan",
    "music_encoder.0.linear1.weight": "Wan-Dancer",
    "blocks.0.attn1_mot_ref.to_q.weight": "Video-As-Prompt",
    "first_stage_model.conv1.weight": "an all-in-one checkpoint",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", UNREAD)
def test_variants_that_are_not_read_are_named_with_their_keys(tmp_path: Path, name: str, prefix: str) -> None:
    shapes = {prefix + key: shape for key, shape in manifest("wan2.1_i2v_14B").items()}
    with pytest.raises(CheckpointError, match=f"seems to be {UNREAD[name]}") as caught:
        inspect(write_sparse(tmp_path / "a.safetensors", shapes | {prefix + name: (8, 8)}))
    assert caught.value.details["keys"] == [prefix + name]


def test_a_model_saved_inside_of_another_module_is_read(tmp_path: Path) -> None:
    """As krea-realtime-video is. Source: DiffSynth-Studio's converter, which takes `model.` off."""
    shapes = manifest("wan2.1_t2v_14B")
    bare = inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    inside = inspect(write_sparse(tmp_path / "b.safetensors", {f"model.{key}": shape for key, shape in shapes.items()}))
    assert (inside.component, inside.config, inside.parameters) == ("dit", bare.config, bare.parameters)


OTHERS = {
    "blocks.0.cross_attn.kv_linear.weight": "a LongCat-Video transformer",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "is a LoRA, not a model",
    "lora_unet_blocks_0_self_attn_q.lora_down.weight": "is a LoRA, not a model",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion UNet",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "something.else": "of an unknown kind",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=OTHERS[name]) as caught:
        inspect(write_sparse(tmp_path / "a.safetensors", {name: (4, 4)}))
    assert name in caught.value.message


QUANTISED: dict[str, tuple[dict[str, tuple[int, ...]], str, dict[str, str] | None, str]] = {
    "marker alone": ({"scaled_fp8": (2,)}, "BF16", None, "without any fp8 weight"),
    "marker with a prefix": ({"model.diffusion_model.scaled_fp8": (2,)}, "BF16", None, "without any fp8 weight"),
    "scale of a bf16 weight": ({"blocks.0.self_attn.q.scale_weight": (1,)}, "BF16", None, "missing or is no fp8"),
    "scale of no weight": ({"blocks.0.ffn.0.weight_scale": (1,)}, "BF16", None, "missing or is neither fp8 nor int8"),
    "scale of another shape": ({"blocks.0.ffn.0.weight_scale": (7,)}, "F8_E4M3", None, "a scale of shape"),
    "scale that is fp8": ({"blocks.0.ffn.0.weight_scale": (1,)}, "F8_E4M3", None, "a scale of shape"),
    "two scales": (
        {"blocks.0.ffn.0.weight_scale": (1,), "blocks.0.ffn.0.scale_weight": (1,)},
        "F8_E4M3",
        None,
        "two scales for one weight",
    ),
    "comfy_quant of another kind": ({"blocks.0.ffn.0.comfy_quant": (9,)}, "BF16", None, "second fp8"),
    "metadata": ({}, "BF16", {"_quantization_metadata": "{}"}, "second format"),
    "metadata of no weight": (
        {},
        "BF16",
        {"_quantization_metadata": '{"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}'},
        "a description without its weight",
    ),
    "metadata of nvfp4": ({}, "BF16", {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'}, "nvfp4"),
    "metadata of another dtype": (
        {},
        "F8_E4M3",
        {"_quantization_metadata": '{"layers": {"blocks.0.ffn.0": {"format": "float8_e5m2"}}}'},
        "fp8_e5m2 by its description and fp8_e4m3 by its dtype",
    ),
    "second scale": ({"blocks.0.ffn.0.weight_scale_2": (1,)}, "F8_E4M3", None, "nvfp4"),
    "int8 without scale": ({}, "I8", None, "int8 without a scale"),
    "bitsandbytes": ({"blocks.0.ffn.0.weight.absmax": (1,)}, "BF16", None, "bitsandbytes"),
    "svdquant": ({"transformer_blocks.0.qweight": (1,)}, "BF16", None, "SVDQuant"),
    "quanto": ({"blocks.0.ffn.0.weight._data": (1,)}, "BF16", None, "quanto"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_files_are_refused_by_format(tmp_path: Path, name: str) -> None:
    extra, dtype, metadata, wanted = QUANTISED[name]
    shapes = manifest("wan2.1_t2v_1.3B") | extra
    with pytest.raises(CheckpointError, match=f"is quantised.*{wanted}"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes, dtype, metadata))


# --- almost right ----------------------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    shapes = manifest("wan2.1_t2v_1.3B")
    for name in [name for name in shapes if name.startswith("blocks.7.")][:12]:
        del shapes[name]
    with pytest.raises(CheckpointError) as caught:
        inspect(write_sparse(tmp_path / "broken.safetensors", shapes))
    message = caught.value.message
    assert "broken.safetensors (read as a Wan DiT in official names): 12 tensors (blocks.7.modulation, " in message
    assert message.endswith(", ...) missing")
    assert len(caught.value.details["missing"]) == 10


@pytest.mark.parametrize(("version", "level"), [("2.1", ""), ("2.2", "1.")])
def test_a_vae_that_lacks_a_level_is_refused(tmp_path: Path, version: str, level: str) -> None:
    gone = f"encoder.downsamples.{level}"
    shapes = {name: shape for name, shape in manifest(f"wan{version}_vae").items() if not name.startswith(gone)}
    with pytest.raises(CheckpointError, match=r"make no model|missing"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_left_over_tensors_are_named_in_the_file_s_spelling(tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in manifest("wan2.1_t2v_1.3B").items()}
    shapes["model.diffusion_model.blocks.0.extra.weight"] = (3,)
    with pytest.raises(
        CheckpointError, match=r"1 tensors \(model\.diffusion_model\.blocks\.0\.extra\.weight\) left over"
    ):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    del shapes["model.diffusion_model.blocks.0.extra.weight"]
    shapes["first_stage_model.conv2.weight"] = (3,)
    with pytest.raises(CheckpointError, match="an all-in-one checkpoint"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    shapes = manifest("wan2.1_t2v_1.3B")
    shapes["blocks.3.self_attn.o.weight"] = (1536, 1537)
    with pytest.raises(
        CheckpointError, match=re.escape("blocks.3.self_attn.o.weight is [1536, 1537], not [1536, 1536]")
    ):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head.modulation", (), r"head\.modulation has shape \[\]"),
        ("head.modulation", (1, 2, 1500), "does not divide into heads"),
        ("blocks.99999999.modulation", (1, 6, 1536), "a layer is numbered 99999999"),
        ("patch_embedding.weight", (1536, 0, 1, 2, 2), r"has shape \[1536, 0, 1, 2, 2\]"),
    ],
)
def test_absurd_headers_are_errors_not_crashes(tmp_path: Path, name: str, shape: Any, message: str) -> None:
    shapes = manifest("wan2.1_t2v_1.3B") | {name: shape}
    with pytest.raises(CheckpointError, match=message):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_a_vae_of_another_width_needs_its_statistics(tmp_path: Path) -> None:
    from checkpoints import TINY, official_state

    config = {**TINY["vae"], "z_dim": 4, "latent_mean": [0.0, 1.0, 2.0, 3.0], "latent_std": [1.0] * 4}
    shapes = {name: tuple(tensor.shape) for name, tensor in official_state("vae", config).items()}
    with pytest.raises(CheckpointError, match="mean and deviation of its 4 latent channels are unknown"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    metadata = {key: json.dumps(config[key]) for key in ("latent_mean", "latent_std")}
    assert inspect(write_sparse(tmp_path / "b.safetensors", shapes, metadata=metadata)).config == config
    for wrong in ("[1, 2]", "[0, 1, 1, 1]", "nonsense", '[1, 1, 1, "a"]', "[NaN, 1, 1, 1]", "[" * 100_000):
        with pytest.raises(CheckpointError, match="metadata latent_std"):
            inspect(write_sparse(tmp_path / "c.safetensors", shapes, metadata={**metadata, "latent_std": wrong}))
