"""How each publisher spells the tensors of FLUX.1 and of its encoders: the rows of keys.DIALECTS that are its own.

Source: black-forest-labs/flux src/flux (official names); huggingface/diffusers scripts/convert_flux_to_diffusers.py;
huggingface/transformers T5EncoderModel, CLIPTextModel, SiglipVisionModel; ComfyUI file headers.
"""

from __future__ import annotations

import re

from kinema.weights.dialect import WB, Dialect, Rule
from kinema.weights.keys_encoders import CLIP_TEXT, CLIP_TEXT_UNUSED, SIGLIP, TEXT_GGUF, TEXT_TRANSFORMERS


def _flux_stream(theirs: str, ours: str, ff: str, attention: tuple[str, str, str], out: str) -> tuple[Rule, ...]:
    """Rules of one side (image or text) of a double block."""
    block = r"transformer_blocks\.(\d+)"
    return (
        Rule(rf"{block}\.{theirs}\.linear{WB}", rf"double_blocks.\1.{ours}_mod.lin.\2"),
        *(
            Rule(rf"{block}\.attn\.{name}{WB}", rf"double_blocks.\1.{ours}_attn.qkv.\2", part=part)
            for part, name in enumerate(attention)
        ),
        Rule(rf"{block}\.attn\.{out}{WB}", rf"double_blocks.\1.{ours}_attn.proj.\2"),
        Rule(rf"{block}\.{ff}\.net\.0\.proj{WB}", rf"double_blocks.\1.{ours}_mlp.0.\2"),
        Rule(rf"{block}\.{ff}\.net\.2{WB}", rf"double_blocks.\1.{ours}_mlp.2.\2"),
    )


SINGLE = r"single_transformer_blocks\.(\d+)"

FLUX_DIFFUSERS = (
    Rule(rf"x_embedder{WB}", r"img_in.\1"),
    Rule(rf"context_embedder{WB}", r"txt_in.\1"),
    *(
        Rule(rf"time_text_embed\.{theirs}_embedder\.linear_{n}{WB}", rf"{ours}_in.{layer}_layer.\1")
        for theirs, ours in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
        for n, layer in ((1, "in"), (2, "out"))
    ),
    *_flux_stream("norm1", "img", "ff", ("to_q", "to_k", "to_v"), r"to_out\.0"),
    *_flux_stream("norm1_context", "txt", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
    *(
        Rule(
            rf"transformer_blocks\.(\d+)\.attn\.{theirs}{short}\.weight",
            rf"double_blocks.\1.{ours}_attn.norm.{name}_norm.scale",
        )
        for theirs, ours in (("norm_", "img"), ("norm_added_", "txt"))
        for short, name in (("q", "query"), ("k", "key"))
    ),
    Rule(rf"{SINGLE}\.norm\.linear{WB}", r"single_blocks.\1.modulation.lin.\2"),
    *(
        Rule(rf"{SINGLE}\.{name}{WB}", r"single_blocks.\1.linear1.\2", part=part)
        for part, name in enumerate((r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp"))
    ),
    Rule(rf"{SINGLE}\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    Rule(rf"{SINGLE}\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    Rule(rf"{SINGLE}\.proj_out{WB}", r"single_blocks.\1.linear2.\2"),
    Rule(rf"proj_out{WB}", r"final_layer.linear.\1"),
    # Scale before shift there, shift before scale here.
    Rule(rf"norm_out\.linear{WB}", r"final_layer.adaLN_modulation.1.\1", swap=True),
)

FLUX_VAE_LEVELS = 4


def _flux_vae_level(theirs: str, ours: str, resample: str) -> tuple[Rule, ...]:
    """Rules of one level; `theirs` and `ours` name it, and have no groups."""
    return (
        Rule(rf"{theirs}\.resnets\.(\d+)\.(norm1|conv1|norm2|conv2){WB}", rf"{ours}.block.\1.\2.\3"),
        Rule(rf"{theirs}\.resnets\.(\d+)\.conv_shortcut{WB}", rf"{ours}.block.\1.nin_shortcut.\2"),
        Rule(rf"{theirs}\.{resample}rs\.0\.conv{WB}", rf"{ours}.{resample}.conv.\1"),
    )


FLUX_VAE_DIFFUSERS = (
    Rule(rf"(encoder|decoder)\.(conv_in|conv_out){WB}", r"\1.\2.\3"),
    Rule(rf"(encoder|decoder)\.conv_norm_out{WB}", r"\1.norm_out.\2"),
    *(
        Rule(
            rf"(encoder|decoder)\.mid_block\.resnets\.{n}\.(norm1|conv1|norm2|conv2){WB}",
            rf"\1.mid.block_{n + 1}.\2.\3",
        )
        for n in (0, 1)
    ),
    Rule(rf"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm{WB}", r"\1.mid.attn_1.norm.\2"),
    *(
        rule
        for theirs, ours in ((r"to_(q|k|v)", r"\2"), (r"(to_out)\.0", "proj_out"))
        for rule in (
            Rule(
                rf"(encoder|decoder)\.mid_block\.attentions\.0\.{theirs}\.weight",
                rf"\1.mid.attn_1.{ours}.weight",
                tail=2,
            ),
            Rule(rf"(encoder|decoder)\.mid_block\.attentions\.0\.{theirs}\.bias", rf"\1.mid.attn_1.{ours}.bias"),
        )
    ),
    *(
        rule
        for n in range(FLUX_VAE_LEVELS)
        for rule in (
            *_flux_vae_level(rf"encoder\.down_blocks\.{n}", f"encoder.down.{n}", "downsample"),
            # diffusers numbers the decoder's levels as they run, the official code from the finest.
            *_flux_vae_level(rf"decoder\.up_blocks\.{n}", f"decoder.up.{FLUX_VAE_LEVELS - 1 - n}", "upsample"),
        )
    ),
)

FLUX_MARKS = ("double_blocks.0.img_attn.qkv.weight", "img_in.weight")
FLUX_VAE_MARKS = ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
T5_MARKS = ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight")
CLIP_TEXT_MARKS = ("text_model.embeddings.token_embedding.weight",)

# ComfyUI's all-in-one files hold every part of a model, each under a prefix of its own.
PARTS = {
    "flux_dit": "model.diffusion_model.",
    "flux_vae": "vae.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip_text": "text_encoders.clip_l.transformer.",
}


def _other_parts(component: str) -> tuple[str, ...]:
    """Patterns of the names of an all-in-one file that belong to its other parts."""
    others = {prefix.split(".transformer.")[0] for part, prefix in PARTS.items() if part != component}
    return tuple(re.escape(prefix.rstrip(".")) + r"\..+" for prefix in sorted(others))


FLUX_DIALECTS = (
    Dialect("flux_dit", "official", FLUX_MARKS),
    Dialect("flux_dit", "comfyui", FLUX_MARKS, prefix=PARTS["flux_dit"], ignore=_other_parts("flux_dit")),
    Dialect(
        "flux_dit",
        "diffusers",
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
        FLUX_DIFFUSERS,
    ),
    Dialect("flux_vae", "official", FLUX_VAE_MARKS),
    Dialect("flux_vae", "comfyui", FLUX_VAE_MARKS, prefix=PARTS["flux_vae"], ignore=_other_parts("flux_vae")),
    Dialect(
        "flux_vae",
        "diffusers",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        FLUX_VAE_DIFFUSERS,
    ),
    Dialect("t5", "transformers", T5_MARKS, TEXT_TRANSFORMERS, ignore=("spiece_model",)),
    Dialect("t5", "gguf", ("token_embd.weight", "enc.blk.0.attn_q.weight"), TEXT_GGUF),
    Dialect(
        "t5",
        "comfyui",
        T5_MARKS,
        TEXT_TRANSFORMERS,
        prefix=PARTS["t5"],
        ignore=(*_other_parts("t5"), r"text_encoders\.t5xxl\.(spiece_model|logit_scale)"),
    ),
    Dialect("clip_text", "transformers", CLIP_TEXT_MARKS, CLIP_TEXT, ignore=CLIP_TEXT_UNUSED),
    Dialect(
        "clip_text",
        "comfyui",
        CLIP_TEXT_MARKS,
        CLIP_TEXT,
        prefix=PARTS["clip_text"],
        ignore=(*_other_parts("clip_text"), *CLIP_TEXT_UNUSED),
    ),
    Dialect(
        "siglip",
        "transformers",
        ("vision_model.embeddings.patch_embedding.bias", "vision_model.post_layernorm.weight"),
        SIGLIP,
        ignore=(r"vision_model\.head\..+", r"vision_model\.embeddings\.position_ids", r"text_model\..+", r"logit_.+"),
    ),
    Dialect("redux", "official", ("redux_up.weight", "redux_down.weight")),
)
