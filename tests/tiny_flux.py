"""A models folder with small models of every part of FLUX.1, in real files, and the catalog that names them."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from checkpoints import write
from golden_weights import fill
from kinema.models.clip_text import ClipText, ClipTextConfig
from kinema.models.encoders import UMT5, TextEncoderConfig
from kinema.models.flux import FluxConfig, FluxDiT
from kinema.models.flux_vae import FluxVAE, FluxVAEConfig
from kinema.models.siglip import Redux, ReduxConfig, Siglip, SiglipConfig
from kinema.models.tokenizer import CLIP_END, CLIP_START
from kinema.schema import Settings
from kinema.weights.keys_encoders import TEXT_TRANSFORMERS
from tiny_world import TinyWorld, spiece_model

DIM, TEXT_DIM, VECTOR_DIM = 128, 24, 64
CHANNELS = {"dev": 16, "schnell": 16, "canny": 32, "fill": 96}
T5 = TextEncoderConfig(
    vocab=60, dim=TEXT_DIM, dim_attn=24, num_heads=4, ffn_dim=40, num_layers=2, num_buckets=32, shared_bias=True
)
ROW = """
[models."{name}"]
title = "A small FLUX {name}"
family = "flux"
structure = {{ dim = 128, in_channels = {channels}, out_channels = 16, has_guidance = {guidance} }}
vae = "flux"
size = [64, 64]
frames = 1
steps = 2
solver = "euler"
guidance = 3.5
text_len = 12
licence = "none"
files.dit = ["diffusion_models/flux_{kind}.safetensors"]
{more}
"""
NAMES = {
    "tiny-flux": ("dev", 'takes = ["first"]\nshift_by_tokens = true\nby_area = true'),
    "tiny-schnell": ("schnell", "shift = 1.0"),
    "tiny-kontext": ("dev", 'takes = ["reference"]\nkontext = true\nshift_by_tokens = true'),
    "tiny-canny": ("canny", 'takes = ["control"]\nneeds = ["control"]\nshift_by_tokens = true'),
    "tiny-fill": ("fill", 'takes = ["first", "mask"]\nneeds = ["first", "mask"]\nshift_by_tokens = true'),
    "tiny-redux": ("dev", 'takes = ["reference"]\nneeds = ["reference"]\nredux = true\nshift_by_tokens = true'),
}
SHARED = """
[shared]
vae_flux = ["vae/tiny_ae.safetensors"]
t5 = ["text_encoders/tiny_t5.safetensors"]
clip_text = ["text_encoders/tiny_clip_l.safetensors"]
siglip = ["clip_vision/tiny_siglip.safetensors"]
redux = ["style_models/tiny_redux.safetensors"]
"""


def filled(module: nn.Module, salt: int = 3) -> dict[str, Tensor]:
    fill(module, salt)
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def transformers_t5() -> dict[str, Tensor]:
    """The T5 encoder in the names of its published files, sentencepiece model apart."""
    theirs = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    places = {
        "attn.q": "0.SelfAttention.q", "attn.k": "0.SelfAttention.k", "attn.v": "0.SelfAttention.v",
        "attn.o": "0.SelfAttention.o", "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
        "norm1": "0.layer_norm", "norm2": "1.layer_norm", "ffn.gate.0": "1.DenseReluDense.wi_0",
        "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo",
    }  # fmt: skip
    state = {}
    for name, tensor in filled(UMT5(T5)).items():
        if name not in theirs:
            _, number, rest = name.split(".", 2)
            theirs[name] = f"encoder.block.{number}.layer.{places[rest.removesuffix('.weight')]}.weight"
        state[theirs[name]] = tensor
    assert len(TEXT_TRANSFORMERS) == 10
    return state


def clip_tables(folder: Path) -> Path:
    """A byte-pair vocabulary in OpenAI's two files: letters, and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("a", "b</w>"), ("p", "h"), ("o", "f</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += [CLIP_START, CLIP_END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return folder


def transformer(kind: str) -> dict[str, Tensor]:
    return filled(
        FluxDiT(
            FluxConfig(
                dim=DIM, mlp_dim=256, num_double=1, num_single=2, in_channels=CHANNELS[kind], text_dim=TEXT_DIM,
                vector_dim=VECTOR_DIM, has_guidance=kind != "schnell",
            )
        ),
        salt=11,
    )  # fmt: skip


def clip_text() -> dict[str, Tensor]:
    config = ClipTextConfig(vocab=530, num_positions=77, dim=VECTOR_DIM, mlp_dim=96, num_layers=2)
    return {f"text_model.{name}": tensor for name, tensor in filled(ClipText(config)).items()}


def autoencoder() -> dict[str, Tensor]:
    return filled(FluxVAE(FluxVAEConfig(dim=32, num_res_blocks=1)))


def build_flux(root: Path) -> TinyWorld:
    """Write every file of the small FLUX models under `root`."""
    for kind in CHANNELS:
        write(root / f"diffusion_models/flux_{kind}.safetensors", transformer(kind))
    write(root / "vae/tiny_ae.safetensors", autoencoder())
    write(root / "text_encoders/tiny_t5.safetensors", transformers_t5())
    write(root / "text_encoders/tiny_clip_l.safetensors", clip_text())
    (root / "text_encoders/google/t5-v1_1-xxl").mkdir(parents=True)
    (root / "text_encoders/google/t5-v1_1-xxl/spiece.model").write_bytes(spiece_model())
    clip_tables(root / "text_encoders/openai/clip-vit-large-patch14")
    siglip = filled(Siglip(SiglipConfig(image_size=28, patch_size=14, dim=72, mlp_dim=64, num_layers=1)))
    write(
        root / "clip_vision/tiny_siglip.safetensors",
        {f"vision_model.{name}": tensor for name, tensor in siglip.items()},
    )
    write(root / "style_models/tiny_redux.safetensors", filled(Redux(ReduxConfig(72, 32, TEXT_DIM))))
    rows = [
        ROW.format(
            name=name, kind=kind, channels=CHANNELS[kind], guidance=str(kind != "schnell").lower(), more=more
        )
        for name, (kind, more) in NAMES.items()
    ]  # fmt: skip
    catalog = root / "flux.toml"
    catalog.write_text(SHARED + "".join(rows), "utf-8")
    return TinyWorld(root, Settings(models=(root,), catalogs=(catalog,)))
