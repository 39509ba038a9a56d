"""From shapes to models: the constructor arguments a file implies, the module they make, and whether the two agree.

Shapes decide, never file names or hashes. Tensors are not read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kinema.errors import CheckpointError, KinemaError
from kinema.models import flux, wan
from kinema.models.adapters.speed import MotionController, MotionControllerConfig
from kinema.models.clip_text import ClipText, ClipTextConfig
from kinema.models.encoders import UMT5, ClipVision, ClipVisionConfig, TextEncoderConfig
from kinema.models.flux import FluxConfig, FluxDiT
from kinema.models.flux_vae import FluxVAE, FluxVAEConfig
from kinema.models.siglip import Redux, ReduxConfig, Siglip, SiglipConfig
from kinema.models.wan import WanConfig, WanDiT, constant
from kinema.models.wan_config import ADAPTER_CONFIGS, CameraConfig
from kinema.models.wan_vae import LATENT_STATISTICS, WanVAE, WanVAEConfig
from kinema.models.wav2vec import STRIDES, Wav2Vec, Wav2VecConfig
from kinema.schema import Component
from kinema.weights.keys import Translation

S2V_LAYERS = {(40, 12): (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)}
"""Blocks after which the sound enters, by number of blocks and of injectors.
Source: Wan-Video/Wan2.2 wan/configs/wan_s2v_14B.py (Apache-2.0)."""

CLIP_HEAD_WIDTH = 80
CLIP_VIT_H = (1280, 32)
"""Width and layers of the one CLIP that Wan was trained with."""


class Shapes:
    """Shapes by official name; a question about an absent tensor is a CheckpointError."""

    def __init__(self, translation: Translation) -> None:
        self.file, self.translation = translation.file, translation
        self.table = {name: translation.shape(name) for name in translation.sources}

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def axis(self, name: str, axis: int) -> int:
        shape = self.table.get(name, ())
        if not -len(shape) <= axis < len(shape) or not shape[axis]:
            problem = "is missing" if name not in self.table else f"has shape {list(shape)}"
            raise self.error(f"{name} {problem}, from which its structure is read", key=name)
        return shape[axis]

    def count(self, pattern: str) -> int:
        """How many numbers the group of `pattern` counts through, from 0."""
        numbers = {int(match[1]) for name in self.table if (match := re.match(pattern, name))}
        if numbers and max(numbers) > len(self.table):
            raise self.error(f"a layer is numbered {max(numbers)}")
        return max(numbers, default=-1) + 1

    def error(self, problem: str, hint: str = "", **details: Any) -> CheckpointError:
        dialect = self.translation.dialect
        where = f"{self.file.path} (read as {MODELS[dialect.component].what} in {dialect.name} names)"
        return CheckpointError(f"{where}: {problem}", hint, path=self.file.path, dialect=dialect.name, **details)


# --- constructor arguments -------------------------------------------------------------------------


def dit_config(shapes: Shapes) -> dict[str, Any]:
    has_clip_tokens = "img_emb.proj.0.bias" in shapes
    config: dict[str, Any] = {
        "dim": shapes.axis("head.modulation", -1),
        "ffn_dim": shapes.axis("blocks.0.ffn.0.weight", 0),
        "num_layers": shapes.count(r"blocks\.(\d+)\."),
        "in_channels": shapes.axis("patch_embedding.weight", 1),
        "out_channels": shapes.axis("head.head.weight", 0) // 4,
        "text_dim": shapes.axis("text_embedding.0.weight", 1),
        "freq_dim": shapes.axis("time_embedding.0.weight", 1),
        "has_clip_tokens": has_clip_tokens,
        "num_clip_positions": shapes.axis("img_emb.emb_pos", 1) if "img_emb.emb_pos" in shapes else 0,
    }
    if has_clip_tokens:
        config["clip_dim"] = shapes.axis("img_emb.proj.0.bias", 0)
    if config["dim"] % WanConfig.head_dim:
        raise shapes.error(f"its width {config['dim']} does not divide into heads {WanConfig.head_dim} wide")
    return config | {name: read(shapes, config) for name, (mark, read) in ADAPTERS.items() if mark in shapes}


def _vace(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Side blocks follow every so many main blocks, from the first on: where exactly is in no file."""
    count, num_layers = shapes.count(r"vace_blocks\.(\d+)\."), config["num_layers"]
    if not count or num_layers % count:
        raise shapes.error(f"its {count} VACE blocks do not divide its {num_layers} blocks")
    layers = list(range(0, num_layers, num_layers // count))
    return {"layers": layers, "in_channels": shapes.axis("vace_patch_embedding.weight", 1)}


def _camera(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    channels = shapes.axis("control_adapter.conv.weight", 1)
    downscale = math.isqrt(channels // CameraConfig.in_channels)
    return {"in_channels": channels // downscale**2 if downscale else channels, "downscale": downscale}


def _reference(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"in_channels": shapes.axis("ref_conv.weight", 1)}


def _animate(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    convs = "motion_encoder.enc.net_app.convs"
    last = shapes.count(rf"{re.escape(convs)}\.(\d+)\.") - 1
    widths = [shapes.axis(f"{convs}.{n}.conv2.1.weight", 0) for n in range(1, last)]
    hidden = shapes.axis("face_encoder.conv2.conv.weight", 0)
    return {
        "channels": [shapes.axis(f"{convs}.0.0.weight", 0), *widths],
        "motion_width": shapes.axis("motion_encoder.dec.direction.weight", 0),
        "motion_dim": shapes.axis("motion_encoder.dec.direction.weight", 1),
        "face_width": hidden,
        "face_heads": shapes.axis("face_encoder.conv1_local.conv.weight", 0) // hidden,
        "interval": config["num_layers"] // shapes.count(r"face_adapter\.fuser_blocks\.(\d+)\."),
        "pose_channels": shapes.axis("pose_patch_embedding.weight", 1),
    }


def _speech(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """S2V's additions. Where its injectors stand is in no shape: the metadata may say, else it is the official 14B."""
    num_layers, injectors = config["num_layers"], shapes.count(r"audio_injector\.injector\.(\d+)\.")
    told = shapes.file.metadata.get("audio_inject_layers")
    try:
        layers = (
            [int(layer) for layer in json.loads(told)] if told else list(S2V_LAYERS.get((num_layers, injectors), ()))
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise shapes.error("its metadata audio_inject_layers is not a JSON list of numbers") from error
    if len(layers) != injectors or sorted(set(layers)) != layers or not all(0 <= n < num_layers for n in layers):
        raise shapes.error(
            f"after which of its {num_layers} blocks its {injectors} audio injectors stand is unknown",
            "Store it in the safetensors metadata as audio_inject_layers, a JSON list.",
        )
    local = shapes.axis("casual_audio_encoder.encoder.conv1_local.conv.weight", 0)
    quarter = shapes.axis("casual_audio_encoder.encoder.conv1_global.conv.weight", 0)
    return {
        "layers": layers,
        "audio_dim": shapes.axis("casual_audio_encoder.encoder.conv1_local.conv.weight", 1),
        "audio_layers": shapes.axis("casual_audio_encoder.weights", 1),
        "num_tokens": local // quarter,
        "pose_channels": shapes.axis("cond_encoder.weight", 1),
    }


ADAPTERS: dict[str, tuple[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]]] = {
    "vace": ("vace_patch_embedding.weight", _vace),
    "camera": ("control_adapter.conv.weight", _camera),
    "reference": ("ref_conv.weight", _reference),
    "animate": ("face_adapter.fuser_blocks.0.k_norm.weight", _animate),
    "speech": ("casual_audio_encoder.encoder.final_linear.weight", _speech),
}
"""Fields of WanConfig that hold an adapter: the tensor that shows it is there, and how its structure is read.
Source of the markers: ComfyUI comfy/model_detection.py (facts only)."""


def vae_config(shapes: Shapes) -> dict[str, Any]:
    version = "2.2" if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes else "2.1"
    levels = _vae_levels(shapes, version)
    dim = shapes.axis("encoder.conv1.weight", 0)
    dim_mult = [shapes.axis(f"{level[0]}.residual.6.weight", 0) // dim for level in levels]
    config: dict[str, Any] = {
        "version": version,
        "dim": dim,
        "dec_dim": shapes.axis("decoder.conv1.weight", 0) // max([1, *dim_mult[-1:]]),
        "z_dim": shapes.axis("conv2.weight", 0),
        "dim_mult": dim_mult,
        "num_res_blocks": sum(f"{name}.residual.2.weight" in shapes for name in (levels or [[]])[0]),
        "temporal_downsample": [f"{level[-1]}.time_conv.weight" in shapes for level in levels[:-1]],
    }
    return config | _latent_statistics(shapes, version, config["z_dim"])


def _vae_levels(shapes: Shapes, version: str) -> list[list[str]]:
    """Names of the encoder's layers, level by level; each level but the last ends with its resampler."""
    levels: list[list[str]] = [[]]
    for n in range(shapes.count(r"encoder\.downsamples\.(\d+)\.")):
        name = f"encoder.downsamples.{n}"
        if version == "2.2":
            inner = shapes.count(rf"encoder\.downsamples\.{n}\.downsamples\.(\d+)\.")
            levels.append([f"{name}.downsamples.{m}" for m in range(inner)])
            continue
        levels[-1].append(name)
        if f"{name}.resample.1.weight" in shapes:
            levels.append([])
    return [level for level in levels if level]


def _latent_statistics(shapes: Shapes, version: str, z_dim: int) -> dict[str, Any]:
    """latent_mean and latent_std where the file carries its own; the official ones fit only their own width."""
    metadata = shapes.file.metadata
    if "latent_mean" not in metadata or "latent_std" not in metadata:
        if len(LATENT_STATISTICS[version][0]) == z_dim:
            return {}
        raise shapes.error(
            f"mean and deviation of its {z_dim} latent channels are unknown",
            "Store them in the safetensors metadata as latent_mean and latent_std, JSON lists.",
        )
    statistics = {}
    for key in ("latent_mean", "latent_std"):
        try:
            values = [float(value) for value in json.loads(metadata[key])]
        except (ValueError, TypeError, RecursionError) as error:
            raise shapes.error(f"its metadata {key} is not a JSON list of numbers") from error
        if len(values) != z_dim or not all(map(math.isfinite, values)) or (key == "latent_std" and min(values) <= 0):
            raise shapes.error(f"its metadata {key} is not {z_dim} usable numbers")
        statistics[key] = values
    return statistics


def text_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "vocab": shapes.axis("token_embedding.weight", 0),
        "dim": shapes.axis("token_embedding.weight", 1),
        "dim_attn": shapes.axis("blocks.0.attn.q.weight", 0),
        "num_heads": shapes.axis("blocks.0.pos_embedding.embedding.weight", 1),
        "ffn_dim": shapes.axis("blocks.0.ffn.fc1.weight", 0),
        "num_layers": shapes.count(r"blocks\.(\d+)\."),
        "num_buckets": shapes.axis("blocks.0.pos_embedding.embedding.weight", 0),
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    dim, patch_size = shapes.axis("patch_embedding.weight", 0), shapes.axis("patch_embedding.weight", 2)
    side = math.isqrt(max(shapes.axis("pos_embedding", 1) - 1, 0))
    num_layers = shapes.count(r"transformer\.(\d+)\.") + 1  # the last is not run, so not among the shapes
    width, layers = CLIP_VIT_H
    if dim % CLIP_HEAD_WIDTH or (dim == width and num_layers != layers):
        raise shapes.error(
            f"it is {dim} wide with {num_layers} layers; Wan takes CLIP ViT-H, {width} wide with {layers}",
            "Take clip_vision_h.safetensors, or models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.",
        )
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "num_heads": dim // CLIP_HEAD_WIDTH,
        "num_layers": num_layers,
        "mlp_ratio": shapes.axis("transformer.0.mlp.0.weight", 0) // dim,
    }


def audio_config(shapes: Shapes) -> dict[str, Any]:
    convolutions = shapes.count(r"feature_extractor\.conv_layers\.(\d+)\.")
    if convolutions != len(STRIDES) or "feature_extractor.conv_layers.1.layer_norm.weight" not in shapes:
        raise shapes.error(
            "it is a wav2vec2 of another form: S2V takes one with a layer norm in each of its 7 convolutions",
            "Take wav2vec2-large-xlsr-53-english, or wav2vec2_large_english_fp16.safetensors.",
        )
    dim = shapes.axis("encoder.layer_norm.weight", 0)
    return {
        "dim": dim,
        "num_layers": shapes.count(r"encoder\.layers\.(\d+)\."),
        "ffn_dim": shapes.axis("encoder.layers.0.feed_forward.intermediate_dense.weight", 0),
        "conv_dim": shapes.axis("feature_projection.layer_norm.weight", 0),
        "kernels": [shapes.axis(f"feature_extractor.conv_layers.{n}.conv.weight", 2) for n in range(convolutions)],
        "position_kernel": shapes.axis("encoder.pos_conv_embed.conv.weight_v", 2),
        "position_width": shapes.axis("encoder.pos_conv_embed.conv.weight_v", 1),
    }


def motion_config(shapes: Shapes) -> dict[str, Any]:
    return {"freq_dim": shapes.axis("linear.0.weight", 1), "dim": shapes.axis("linear.0.weight", 0)}


def flux_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "dim": shapes.axis("img_in.weight", 0),
        "mlp_dim": shapes.axis("double_blocks.0.img_mlp.0.weight", 0),
        "num_double": shapes.count(r"double_blocks\.(\d+)\."),
        "num_single": shapes.count(r"single_blocks\.(\d+)\."),
        "in_channels": shapes.axis("img_in.weight", 1) // 4,
        "out_channels": shapes.axis("final_layer.linear.weight", 0) // 4,
        "text_dim": shapes.axis("txt_in.weight", 1),
        "vector_dim": shapes.axis("vector_in.in_layer.weight", 1),
        "has_guidance": "guidance_in.in_layer.weight" in shapes,
    }


def flux_vae_config(shapes: Shapes) -> dict[str, Any]:
    dim = shapes.axis("encoder.conv_in.weight", 0)
    levels = shapes.count(r"encoder\.down\.(\d+)\.")
    return {
        "dim": dim,
        "dim_mult": [shapes.axis(f"encoder.down.{n}.block.0.conv1.weight", 0) // dim for n in range(levels)],
        "num_res_blocks": shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "z_dim": shapes.axis("decoder.conv_in.weight", 1),
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    return {**text_config(shapes), "shared_bias": True}


def clip_text_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "vocab": shapes.axis("embeddings.token_embedding.weight", 0),
        "num_positions": shapes.axis("embeddings.position_embedding.weight", 0),
        "dim": shapes.axis("embeddings.token_embedding.weight", 1),
        "mlp_dim": shapes.axis("encoder.layers.0.mlp.fc1.weight", 0),
        "num_layers": shapes.count(r"encoder\.layers\.(\d+)\."),
    }


def siglip_config(shapes: Shapes) -> dict[str, Any]:
    patch_size = shapes.axis("embeddings.patch_embedding.weight", 2)
    return {
        "image_size": math.isqrt(shapes.axis("embeddings.position_embedding.weight", 0)) * patch_size,
        "patch_size": patch_size,
        "dim": shapes.axis("embeddings.patch_embedding.weight", 0),
        "mlp_dim": shapes.axis("encoder.layers.0.mlp.fc1.weight", 0),
        "num_layers": shapes.count(r"encoder\.layers\.(\d+)\."),
    }


def redux_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "image_dim": shapes.axis("redux_up.weight", 1),
        "hidden_dim": shapes.axis("redux_up.weight", 0),
        "text_dim": shapes.axis("redux_down.weight", 0),
    }


# --- words -----------------------------------------------------------------------------------------


def describe_dit(config: Mapping[str, Any]) -> str:
    positions = config["num_clip_positions"]
    clip = f"{positions} CLIP tokens with positions" if positions else "CLIP tokens"
    layers = f"{config['num_layers']} layers, {config['dim']} wide"
    channels = f"in {config['in_channels']}, out {config['out_channels']}"
    added = "".join(f", {words}" for name, words in ADAPTER_WORDS.items() if config.get(name))
    return f"Wan DiT {layers}, {channels}, {clip if config['has_clip_tokens'] else 'no CLIP tokens'}{added}"


ADAPTER_WORDS = {
    "vace": "VACE blocks",
    "camera": "camera adapter",
    "reference": "reference image",
    "animate": "face blocks",
    "speech": "sound after some blocks",
}


def describe_vae(config: Mapping[str, Any]) -> str:
    own = ", own latent statistics" if "latent_mean" in config else ""
    return f"Wan VAE {config['version']}, {config['dim']} wide, {config['z_dim']} latent channels{own}"


def describe_flux(config: Mapping[str, Any]) -> str:
    blocks = f"{config['num_double']} double and {config['num_single']} single blocks, {config['dim']} wide"
    guidance = "guidance as an input" if config["has_guidance"] else "no guidance input"
    return f"FLUX.1 transformer {blocks}, in {config['in_channels']}, out {config['out_channels']}, {guidance}"


DESCRIBE: dict[Component, Callable[[Mapping[str, Any]], str]] = {
    "dit": describe_dit,
    "vae": describe_vae,
    "text_encoder": "umT5 encoder {num_layers} layers, {dim} wide, {vocab} tokens".format_map,
    "clip_vision": "CLIP vision encoder {num_layers} layers, {dim} wide, {image_size} pixels".format_map,
    "audio_encoder": "wav2vec2 encoder {num_layers} layers, {dim} wide".format_map,
    "motion_controller": "motion controller of a DiT {dim} wide".format_map,
    "flux_dit": describe_flux,
    "flux_vae": "FLUX.1 autoencoder {dim} wide, {z_dim} latent channels".format_map,
    "t5": "T5 encoder {num_layers} layers, {dim} wide, {vocab} tokens".format_map,
    "clip_text": "CLIP text encoder {num_layers} layers, {dim} wide, {vocab} tokens".format_map,
    "siglip": "SigLIP vision encoder {num_layers} layers, {dim} wide, {image_size} pixels".format_map,
    "redux": "FLUX.1 Redux embedder, {image_dim} to {text_dim} wide".format_map,
}
"""What a configuration is in words."""


@dataclass(frozen=True)
class Model:
    """What one component is called, and how it is recognised and built.

    stays_float32   of an official name: whether it does, whatever the dtype asked for.
    """

    what: str
    config: Callable[[Shapes], dict[str, Any]]
    arguments: Callable[..., Any]
    module: Callable[[Any], nn.Module]
    stays_float32: Callable[[str], bool] = lambda name: False


MODELS: dict[Component, Model] = {
    "dit": Model("a Wan DiT", dit_config, WanConfig, WanDiT, wan.stays_float32),
    "vae": Model("a Wan VAE", vae_config, WanVAEConfig, WanVAE),
    "text_encoder": Model("a umT5 text encoder", text_config, TextEncoderConfig, UMT5),
    "clip_vision": Model("a CLIP vision encoder", clip_config, ClipVisionConfig, ClipVision),
    "audio_encoder": Model("a wav2vec2 audio encoder", audio_config, Wav2VecConfig, Wav2Vec),
    "motion_controller": Model("a motion controller", motion_config, MotionControllerConfig, MotionController),
    "flux_dit": Model("a FLUX.1 transformer", flux_config, FluxConfig, FluxDiT, flux.stays_float32),
    "flux_vae": Model("a FLUX.1 autoencoder", flux_vae_config, FluxVAEConfig, FluxVAE),
    "t5": Model("a T5 text encoder", t5_config, TextEncoderConfig, UMT5),
    "clip_text": Model("a CLIP text encoder", clip_text_config, ClipTextConfig, ClipText),
    "siglip": Model("a SigLIP vision encoder", siglip_config, SiglipConfig, Siglip),
    "redux": Model("a FLUX.1 Redux embedder", redux_config, ReduxConfig, Redux),
}


# --- modules ---------------------------------------------------------------------------------------

VARIANTS = (
    (r"(audio_proj|.*audio_cross_attn).*", "an audio-driven Wan (HuMo, FantasyTalking, InfiniteTalk)"),
    (r"music_(encoder|projection|injector)\..+", "Wan-Dancer"),
    (r".*_mot_ref.*", "Video-As-Prompt"),
    (r"first_stage_model\..+|vae\..+|text_encoders\..+|cond_stage_model\..+", "an all-in-one checkpoint"),
)
"""Leftover names that give a model away which is not read yet. Source: the key tables of each model's code."""


class Undrawn(TorchFunctionMode):
    """Leaves initial values undrawn: to draw what has no memory, torch loads its compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def build(component: Component, config: Mapping[str, Any]) -> nn.Module:
    """Return the module of these constructor arguments on the meta device: structure without memory."""
    model = MODELS[component]
    with torch.device("meta"), Undrawn():
        return model.module(model.arguments(**constructor_arguments(config)))


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a configuration of JSON values means: lists are tuples, adapters' fields their own classes."""
    arguments = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = ADAPTER_CONFIGS[key](**constructor_arguments(value))
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return arguments


def build_for(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    """Return the module of a file's own structure, checked against its tensors.

    Raises CheckpointError for tensors missing, left over or of a wrong shape, with the first ten of them.
    """
    try:
        module = build(shapes.translation.dialect.component, config)
    except (KinemaError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise shapes.error(f"its shapes make no model ({error})") from error
    check(shapes, module)
    return module


def check(shapes: Shapes, module: nn.Module) -> None:
    """Raise CheckpointError unless the file holds exactly the tensors of the module."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sources = shapes.translation.sources
    unknown = [name for official in sources if official not in wanted for name in sources[official].names]
    leftover = [*shapes.translation.leftover, *unknown]
    bare = [name.removeprefix(shapes.translation.dialect.prefix) for name in leftover]
    for pattern, variant in VARIANTS:
        if any(re.fullmatch(pattern, name) for name in bare):
            raise shapes.error(
                f"it seems to be {variant}, which is not read yet; {_some(leftover)} belong to no part that is known",
                "Known are Wan 2.1 and 2.2 text and image to video, first-last frame, TI2V, VACE, Fun, S2V, Animate; "
                "docs/support.md says why others are not.",
                found=variant,
                keys=leftover[:10],
            )
    if missing := [name for name in wanted if name not in shapes and constant(name) is None]:
        raise shapes.error(
            f"{_some(missing)} missing" + (f"; {_some(leftover)} left over" if leftover else ""),
            "The file is incomplete, or of another model.",
            missing=missing[:10],
            keys=leftover[:10],
        )
    if leftover:
        raise shapes.error(
            f"{_some(leftover)} left over, belonging to no part of it",
            "It is another model, or has additions that would be lost.",
            keys=leftover[:10],
        )
    wrong = [name for name, shape in wanted.items() if shapes.table.get(name, shape) != shape]
    if wrong:
        rows = ", ".join(f"{name} is {list(shapes.table[name])}, not {list(wanted[name])}" for name in wrong[:10])
        raise shapes.error(f"{len(wrong)} tensors have a wrong shape: {rows}", key=wrong[0], keys=wrong[:10])


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
