"""How each publisher spells the tensors of a model: tables from their names to the official ones.

Source: Wan-Video/Wan2.1 and Wan-Video/Wan2.2 wan/modules (official names); huggingface/diffusers
scripts/convert_wan_to_diffusers.py; huggingface/transformers UMT5EncoderModel, CLIPVisionModel; ComfyUI file headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kinema.schema import Component
from kinema.weights.dialect import WB, Dialect, Rule
from kinema.weights.files import TensorFile
from kinema.weights.foreign import refuse_foreign
from kinema.weights.keys_encoders import (
    CLIP_TRANSFORMERS,
    CLIP_UNUSED,
    TEXT_GGUF,
    TEXT_TRANSFORMERS,
    WAV2VEC2_MARKS,
    WAV2VEC2_POSITIONS,
    WAV2VEC2_UNUSED,
)
from kinema.weights.keys_flux import FLUX_DIALECTS
from kinema.weights.quantised.packed import Packed


def exchanged(tensor: Tensor) -> Tensor:
    """Return a tensor whose halves along axis 0 have changed places."""
    return torch.cat(tuple(reversed(tensor.chunk(2))))


@dataclass
class Source:
    """File names by part, to be joined along axis 0, then put between axes of size 1."""

    parts: dict[int, str] = field(default_factory=dict)
    lead: int = 0
    tail: int = 0
    swap: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts[part] for part in sorted(self.parts))


@dataclass(frozen=True)
class Translation:
    """A checkpoint by official names.

    sources    official name -> where it comes from.
    ignored    pattern of the dialect's list -> the names it left out.
    leftover   names that mean nothing in this dialect.
    """

    file: TensorFile
    dialect: Dialect
    sources: dict[str, Source]
    ignored: dict[str, tuple[str, ...]]
    leftover: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the file of everything that is used."""
        return tuple(name for source in self.sources.values() for name in source.names)

    def shape(self, official: str) -> tuple[int, ...]:
        """Shape the official tensor will have. Parts that do not fit together give the first part's other axes."""
        source = self.sources[official]
        shapes = [self.file.shape(name) for name in source.names]
        joined = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes if shape), *shapes[0][1:])
        return (1,) * source.lead + joined + (1,) * source.tail

    def read(self, official: str) -> Tensor:
        """Return the official tensor: mapped, unless it has to be joined of parts or unpacked, which gives float32."""
        source = self.sources[official]
        parts = [self.file.get(name) for name in source.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if source.swap:
            tensor = exchanged(tensor)
        return tensor.reshape((1,) * source.lead + tensor.shape + (1,) * source.tail)

    def stays_packed(self, official: str) -> bool:
        """Whether the official tensor is one packed matrix of the file, not to be joined or reshaped."""
        source = self.sources.get(official, Source())
        if len(source.parts) != 1 or source.lead or source.tail or source.swap:
            return False
        return self.file.is_packed(source.names[0]) and len(self.file.shape(source.names[0])) == 2

    def packed(self, official: str) -> Packed | None:
        """Return the official tensor in its packed form, mapped; None where it does not stay packed."""
        return self.file.packed(self.sources[official].names[0]) if self.stays_packed(official) else None


# --- DiT -------------------------------------------------------------------------------------------


def _dit_blocks(theirs: str, official: str) -> tuple[Rule, ...]:
    """Rules of the blocks in diffusers' list `theirs`, which the official list `official` holds."""
    block, place = rf"{theirs}\.(\d+)", rf"{official}.\1"
    return (
        Rule(rf"{block}\.scale_shift_table", rf"{place}.modulation"),
        Rule(rf"{block}\.attn1\.to_(q|k|v){WB}", rf"{place}.self_attn.\2.\3"),
        Rule(rf"{block}\.attn2\.to_(q|k|v){WB}", rf"{place}.cross_attn.\2.\3"),
        Rule(rf"{block}\.attn1\.to_out\.0{WB}", rf"{place}.self_attn.o.\2"),
        Rule(rf"{block}\.attn2\.to_out\.0{WB}", rf"{place}.cross_attn.o.\2"),
        Rule(rf"{block}\.attn1\.(norm_q|norm_k)\.weight", rf"{place}.self_attn.\2.weight"),
        Rule(rf"{block}\.attn2\.(norm_q|norm_k)\.weight", rf"{place}.cross_attn.\2.weight"),
        Rule(rf"{block}\.attn2\.add_(k|v)_proj{WB}", rf"{place}.cross_attn.\2_img.\3"),
        Rule(rf"{block}\.attn2\.norm_added_k\.weight", rf"{place}.cross_attn.norm_k_img.weight"),
        # In order of use diffusers counts 1, 2, 3 and the official code 1, 3, 2; only the middle one has weights.
        Rule(rf"{block}\.norm2{WB}", rf"{place}.norm3.\2"),
        Rule(rf"{block}\.ffn\.net\.0\.proj{WB}", rf"{place}.ffn.0.\2"),
        Rule(rf"{block}\.ffn\.net\.2{WB}", rf"{place}.ffn.2.\2"),
    )


DIT_DIFFUSERS = (
    Rule(rf"patch_embedding{WB}", r"patch_embedding.\1"),
    Rule(rf"condition_embedder\.text_embedder\.linear_1{WB}", r"text_embedding.0.\1"),
    Rule(rf"condition_embedder\.text_embedder\.linear_2{WB}", r"text_embedding.2.\1"),
    Rule(rf"condition_embedder\.time_embedder\.linear_1{WB}", r"time_embedding.0.\1"),
    Rule(rf"condition_embedder\.time_embedder\.linear_2{WB}", r"time_embedding.2.\1"),
    Rule(rf"condition_embedder\.time_proj{WB}", r"time_projection.1.\1"),
    Rule(rf"condition_embedder\.image_embedder\.norm1{WB}", r"img_emb.proj.0.\1"),
    Rule(rf"condition_embedder\.image_embedder\.ff\.net\.0\.proj{WB}", r"img_emb.proj.1.\1"),
    Rule(rf"condition_embedder\.image_embedder\.ff\.net\.2{WB}", r"img_emb.proj.3.\1"),
    Rule(rf"condition_embedder\.image_embedder\.norm2{WB}", r"img_emb.proj.4.\1"),
    Rule(r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    *_dit_blocks("blocks", "blocks"),
    *_dit_blocks("vace_blocks", "vace_blocks"),
    Rule(rf"vace_blocks\.(\d+)\.proj_in{WB}", r"vace_blocks.\1.before_proj.\2"),
    Rule(rf"vace_blocks\.(\d+)\.proj_out{WB}", r"vace_blocks.\1.after_proj.\2"),
    Rule(rf"vace_patch_embedding{WB}", r"vace_patch_embedding.\1"),
    Rule(r"scale_shift_table", "head.modulation"),
    Rule(rf"proj_out{WB}", r"head.head.\1"),
)


FACE_DIFFUSERS, CONVS = r"face_adapter\.(\d+)", "motion_encoder.enc.net_app.convs"


def _halving_block(number: int) -> tuple[Rule, ...]:
    theirs, official = rf"motion_encoder\.res_blocks\.{number}", f"{CONVS}.{number + 1}"
    return (
        Rule(rf"{theirs}\.conv1\.weight", f"{official}.conv1.0.weight"),
        Rule(rf"{theirs}\.conv1\.act_fn\.bias", f"{official}.conv1.1.bias", lead=1, tail=2),
        Rule(rf"{theirs}\.conv2\.weight", f"{official}.conv2.1.weight"),
        Rule(rf"{theirs}\.conv2\.act_fn\.bias", f"{official}.conv2.2.bias", lead=1, tail=2),
        Rule(rf"{theirs}\.conv_skip\.weight", f"{official}.skip.1.weight"),
    )


HALVING_BLOCKS = 7
"""Of the motion encoder of 512-pixel faces, the only one there is in diffusers' names."""

# The blurs' kernels are not among diffusers' tensors: see models.wan.constant.
ANIMATE_DIFFUSERS = (
    Rule(rf"pose_patch_embedding{WB}", r"pose_patch_embedding.\1"),
    Rule(r"motion_encoder\.conv_in\.weight", f"{CONVS}.0.0.weight"),
    Rule(r"motion_encoder\.conv_in\.act_fn\.bias", f"{CONVS}.0.1.bias", lead=1, tail=2),
    *(rule for number in range(HALVING_BLOCKS) for rule in _halving_block(number)),
    Rule(r"motion_encoder\.conv_out\.weight", f"{CONVS}.{HALVING_BLOCKS + 1}.weight"),
    Rule(rf"motion_encoder\.motion_network\.(\d+){WB}", r"motion_encoder.enc.fc.\1.\2"),
    Rule(r"motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
    Rule(rf"face_encoder\.(conv1_local|conv2|conv3){WB}", r"face_encoder.\1.conv.\2"),
    Rule(rf"face_encoder\.out_proj{WB}", r"face_encoder.out_proj.\1"),
    Rule(r"face_encoder\.padding_tokens", "face_encoder.padding_tokens"),
    Rule(rf"{FACE_DIFFUSERS}\.to_q{WB}", r"face_adapter.fuser_blocks.\1.linear1_q.\2"),
    Rule(rf"{FACE_DIFFUSERS}\.to_k{WB}", r"face_adapter.fuser_blocks.\1.linear1_kv.\2", part=0),
    Rule(rf"{FACE_DIFFUSERS}\.to_v{WB}", r"face_adapter.fuser_blocks.\1.linear1_kv.\2", part=1),
    Rule(rf"{FACE_DIFFUSERS}\.to_out{WB}", r"face_adapter.fuser_blocks.\1.linear2.\2"),
    Rule(rf"{FACE_DIFFUSERS}\.norm_(q|k)\.weight", r"face_adapter.fuser_blocks.\1.\2_norm.weight"),
)

# --- VAE -------------------------------------------------------------------------------------------

WBG = r"\.(weight|bias|gamma)"
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
RESIDUAL["conv_shortcut"] = "shortcut"


def _residual(theirs: str, official: str, group: int) -> tuple[Rule, ...]:
    """Rules of one residual block; `group` is the number of the last group in `theirs`, plus one."""
    return tuple(Rule(rf"{theirs}\.{name}{WBG}", rf"{official}.{place}.\{group}") for name, place in RESIDUAL.items())


def _resampler(theirs: str, official: str, group: int) -> tuple[Rule, ...]:
    return (Rule(rf"{theirs}\.(resample\.1|time_conv){WB}", rf"{official}.\{group}.\{group + 1}"),)


VAE_DIFFUSERS_SHARED = (
    Rule(rf"quant_conv{WB}", r"conv1.\1"),
    Rule(rf"post_quant_conv{WB}", r"conv2.\1"),
    Rule(rf"(encoder|decoder)\.conv_in{WB}", r"\1.conv1.\2"),
    Rule(r"(encoder|decoder)\.norm_out\.gamma", r"\1.head.0.gamma"),
    Rule(rf"(encoder|decoder)\.conv_out{WB}", r"\1.head.2.\2"),
    *_residual(r"(encoder|decoder)\.mid_block\.resnets\.0", r"\1.middle.0", 2),
    *_residual(r"(encoder|decoder)\.mid_block\.resnets\.1", r"\1.middle.2", 2),
    Rule(r"(encoder|decoder)\.mid_block\.attentions\.0\.norm\.gamma", r"\1.middle.1.norm.gamma"),
    Rule(rf"(encoder|decoder)\.mid_block\.attentions\.0\.(to_qkv|proj){WB}", r"\1.middle.1.\2.\3"),
)

UP_LEVELS, UP_BLOCKS = 4, 3
"""Levels of the decoder and residual blocks of each: diffusers nests what the 2.1 names count through."""

VAE21_DIFFUSERS = (
    *VAE_DIFFUSERS_SHARED,
    *_residual(r"encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1", 2),
    *_resampler(r"encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1", 2),
    *(
        rule
        for level in range(UP_LEVELS)
        for block in range(UP_BLOCKS)
        for rule in _residual(
            rf"decoder\.up_blocks\.{level}\.resnets\.{block}",
            rf"decoder.upsamples.{(UP_BLOCKS + 1) * level + block}",
            1,
        )
    ),
    *(
        rule
        for level in range(UP_LEVELS - 1)
        for rule in _resampler(
            rf"decoder\.up_blocks\.{level}\.upsamplers\.0",
            rf"decoder.upsamples.{(UP_BLOCKS + 1) * level + UP_BLOCKS}",
            1,
        )
    ),
)

VAE22_DIFFUSERS = (
    *VAE_DIFFUSERS_SHARED,
    *_residual(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.downsamples.\1.downsamples.\2", 3),
    *_resampler(r"encoder\.down_blocks\.(\d+)\.downsampler", rf"encoder.downsamples.\1.downsamples.{UP_BLOCKS - 1}", 2),
    *_residual(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.upsamples.\1.upsamples.\2", 3),
    *_resampler(r"decoder\.up_blocks\.(\d+)\.upsampler", rf"decoder.upsamples.\1.upsamples.{UP_BLOCKS}", 2),
)

# --- the table ---------------------------------------------------------------------------------------

DIT_MARKS = ("head.modulation", "blocks.0.self_attn.q.weight")

DIALECTS = (
    Dialect("dit", "official", DIT_MARKS),
    Dialect("dit", "official", DIT_MARKS, prefix="model."),
    Dialect("dit", "comfyui", DIT_MARKS, prefix="model.diffusion_model."),
    Dialect("dit", "comfyui", DIT_MARKS, prefix="diffusion_model."),
    Dialect(
        "dit",
        "diffusers",
        ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        DIT_DIFFUSERS + ANIMATE_DIFFUSERS,
    ),
    Dialect("vae", "official", ("conv2.weight", "decoder.middle.0.residual.0.gamma")),
    Dialect("vae", "diffusers", ("post_quant_conv.weight", "encoder.down_blocks.0.norm1.gamma"), VAE21_DIFFUSERS),
    Dialect(
        "vae", "diffusers", ("post_quant_conv.weight", "encoder.down_blocks.0.resnets.0.norm1.gamma"), VAE22_DIFFUSERS
    ),
    Dialect(
        "text_encoder",
        "official",
        ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
        ignore=("spiece_model",),
    ),
    Dialect(
        "text_encoder",
        "transformers",
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            # T5 has a bias in block 0 alone, umT5 in every block.
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        TEXT_TRANSFORMERS,
        ignore=("spiece_model",),
    ),
    Dialect(
        "text_encoder",
        "gguf",
        # As above: T5 has this bias in block 0 alone.
        ("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.1.attn_rel_b.weight"),
        TEXT_GGUF,
    ),
    Dialect(
        "clip_vision",
        "official",
        ("cls_embedding", "transformer.0.attn.to_qkv.weight"),
        prefix="visual.",
        ignore=(r"textual\..+", "log_scale"),
    ),
    Dialect("clip_vision", "official", ("cls_embedding", "transformer.0.attn.to_qkv.weight")),
    Dialect(
        "clip_vision",
        "transformers",
        ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        CLIP_TRANSFORMERS,
        ignore=(
            r"visual_projection\.weight",
            r"vision_model\.embeddings\.position_ids",
            r"text_model\..+",
            r"text_projection\.weight",
            "logit_scale",
        ),
    ),
    Dialect("audio_encoder", "transformers", WAV2VEC2_MARKS, WAV2VEC2_POSITIONS, "wav2vec2.", WAV2VEC2_UNUSED),
    Dialect("audio_encoder", "transformers", WAV2VEC2_MARKS, WAV2VEC2_POSITIONS, ignore=WAV2VEC2_UNUSED),
    Dialect("motion_controller", "diffsynth", ("linear.0.weight", "linear.2.weight", "linear.4.weight")),
    *FLUX_DIALECTS,
)


def translate(file: TensorFile, component: Component | None = None) -> Translation:
    """Return what the names of a file mean: of an all-in-one file, as `component`.

    Raises CheckpointError for other models.
    """
    rows = _recognised(file)
    if not rows:
        refuse_foreign(file)
    dialect = next((row for row in rows if row.component == component), rows[0])
    sources: dict[str, Source] = {}
    ignored: dict[str, list[str]] = {}
    leftover: list[str] = []
    copies: list[tuple[str, str, Rule]] = []
    for name in file:
        bare = name.removeprefix(dialect.prefix)
        rule = rule_of(dialect, bare) if name.startswith(dialect.prefix) else None
        if pattern := _matching(dialect.ignore, name):
            ignored.setdefault(pattern, []).append(name)
        elif rule is None:
            leftover.append(name)
        elif rule.copy:
            copies.append((name, re.sub(rule.pattern, rule.official, bare), rule))
        elif not _place(sources, re.sub(rule.pattern, rule.official, bare), name, rule):
            leftover.append(name)
    for name, official, rule in copies:
        if not _place(sources, official, name, rule):
            ignored.setdefault(rule.pattern, []).append(name)
    for official in _unused(dialect.component, sources):
        names = sources.pop(official).names
        ignored.setdefault(_without_index(names[0]), []).extend(names)
    tidy = {pattern.replace(r"\..+", ".*").replace("\\", ""): tuple(names) for pattern, names in ignored.items()}
    return Translation(file, dialect, sources, tidy, tuple(leftover))


def components_of(file: TensorFile) -> tuple[Component, ...]:
    """Return all components a file holds: several of an all-in-one file, none of an unknown one. Never raises."""
    return tuple(dict.fromkeys(row.component for row in _recognised(file)))


def _recognised(file: TensorFile) -> list[Dialect]:
    return [row for row in DIALECTS if all(row.prefix + mark in file for mark in row.marks)]


def rule_of(dialect: Dialect, name: str) -> Rule | None:
    """Return the rule that says what a name without its prefix means."""
    return next((rule for rule in dialect.rules if re.fullmatch(rule.pattern, name)), None)


def _matching(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)


def _place(sources: dict[str, Source], official: str, name: str, rule: Rule) -> bool:
    """File `name` under its official name; False where that place is taken."""
    source = sources.setdefault(official, Source(lead=rule.lead, tail=rule.tail, swap=rule.swap))
    if rule.part in source.parts:
        return False
    source.parts[rule.part] = name
    return True


def _unused(component: Component, sources: Iterable[str]) -> list[str]:
    if component != "clip_vision":
        return []
    layers = [int(match[1]) for name in sources if (match := re.match(r"transformer\.(\d+)\.", name))]
    patterns = [pattern.replace("LAST", str(max(layers, default=0))) for pattern in CLIP_UNUSED]
    return [name for name in sources if _matching(patterns, name)]


def _without_index(name: str) -> str:
    match = re.match(r"(.*?\.\d+)\.", name)
    return f"{match[1]}.*" if match else name
