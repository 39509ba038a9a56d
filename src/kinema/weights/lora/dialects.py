"""How publishers spell a LoRA: prefixes, joined or dotted names, and the endings that say what a tensor is for.

Tables only: a name in a LoRA file -> the official parameter it changes, and back. Reads no files, holds no numbers.
Source: the writers and readers of kohya-ss/musubi-tuner, huggingface/peft, huggingface/diffusers, ModelTC/LightX2V,
aigc-apps/VideoX-Fun, modelscope/DiffSynth-Studio and KohakuBlueleaf/LyCORIS (names alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kinema.weights.dialect import Rule
from kinema.weights.keys import ANIMATE_DIFFUSERS, DIT_DIFFUSERS
from kinema.weights.keys_flux import FLUX_DIFFUSERS
from kinema.weights.spelling import backwards

Words = Literal["official", "diffusers"]
Family = Literal["wan", "flux"]


@dataclass(frozen=True)
class Dialect:
    """One spelling. `joined` names have underscores for dots; `down` and `up` are how it is written.

    alpha   whether readers of this dialect look for `.alpha`; without, the scale goes into the matrices.
    more    whether it can hold differences, LoHa and LoKr; PEFT and diffusers files cannot.
    """

    name: str
    prefix: str
    down: str
    up: str
    words: Words = "official"
    joined: bool = False
    alpha: bool = True
    more: bool = True


DIALECTS = (
    Dialect("comfyui", "diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    Dialect("lightx2v", "diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
    Dialect("kohya", "lora_unet_", ".lora_down.weight", ".lora_up.weight", joined=True),
    Dialect("videox-fun", "lora_unet__", ".lora_down.weight", ".lora_up.weight", joined=True),
    Dialect("peft", "base_model.model.", ".lora_A.weight", ".lora_B.weight", alpha=False, more=False),
    Dialect(
        "diffusers", "transformer.", ".lora_A.weight", ".lora_B.weight", words="diffusers", alpha=False, more=False
    ),
    Dialect("diffsynth", "", ".lora_A.default.weight", ".lora_B.default.weight", alpha=False, more=False),
    Dialect("official", "", ".lora_A.weight", ".lora_B.weight"),
    Dialect("onetrainer", "lora_transformer_", ".lora_down.weight", ".lora_up.weight", words="diffusers", joined=True),
)
"""What `convert` writes. Reading is freer: any prefix goes with any ending."""

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.")
JOINED_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

OTHER_PARTS = (
    (r"(lora_te\d?_|text_encoder(_\d)?\.|text_encoders\.|te\d?\.).*", "a part for the text encoder, which takes none"),
)

# --- endings: what a tensor is for -----------------------------------------------------------------

ENDINGS = (
    (r"\.lora_(?:down|A)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?", "lora", "down"),
    (r"\.lora_(?:up|B)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?", "lora", "up"),
    (r"(?:[._]lora|\.lora_linear_layer)\.down\.weight", "lora", "down"),
    (r"(?:[._]lora|\.lora_linear_layer)\.up\.weight", "lora", "up"),
    (r"\.lora_(?:up|B)(?:\.[^.]+)?\.bias", "lora", "up_bias"),
    (r"\.lora_mid(?:\.weight)?", "lora", "mid"),
    *((rf"\.hada_{part}", "loha", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((rf"\.lokr_{part}", "lokr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    (r"\.oft_blocks", "oft", "blocks"),
    (r"\.rescale", "oft", "rescale"),
    (r"\.alpha", "any", "alpha"),
    (r"\.reshape_weight", "any", "reshape"),
    (r"\.dora_scale|\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?", "any", "magnitude"),
    (r"\.diff|\.w_norm", "diff", "weight"),
    (r"\.diff_b|\.b_norm", "diff", "bias"),
    (r"\.diff_m", "diff", "modulation"),
    (r"\.set_weight|(?<=query_norm)\.scale|(?<=key_norm)\.scale", "set", "weight"),
)
"""Ending -> algorithm and role. `set`: the parameter as it will be, not by how much it changes; FLUX's own
LoRAs of Canny and Depth hold their norms so. Source of `.diff_m`: ModelTC/LightX2V lightx2v/utils/lora_loader.py;
of `set_weight` and `reshape_weight`: ComfyUI's readers."""

UNREAD = (
    (r"bundle_emb\..+", "a textual inversion bundled with the LoRA: words for a prompt, which Kinema does not read"),
    (r".+\.(oft_R|boft_R|boft_s|hra_u)(\..+)?", "PEFT's OFT, BOFT or HRA: its rotations of inputs are not read"),
    (r".+\.[ab][12]\.weight", "GLoRA, which is not read"),
    (r".+\.(on_input|ia3_l)(\..+)?", "IA3, which is not read"),
)
"""Names of adapters that are known and left: pattern, reason. The others have an ending nobody knows."""

BUTTERFLY = "BOFT: programs that write it do not agree on what it turns, so it is not read"


XLABS = (
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.(down|up)\.weight", r"\1.img_attn.\2.lora_\3.weight"),
    (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.(down|up)\.weight", r"\1.txt_attn.\2.lora_\3.weight"),
    (r"(single_blocks\.\d+)\.processor\.qkv_lora\.(down|up)\.weight", r"\1.linear1.qkv.lora_\2.weight"),
    (r"(single_blocks\.\d+)\.processor\.proj_lora\.(down|up)\.weight", r"\1.linear2.lora_\2.weight"),
)
"""XLabs' names of FLUX, those of its attention processors. Source: XLabs-AI/x-flux src/flux/modules/layers.py."""


def plain(name: str) -> str:
    """Return a name of XLabs as others would write it, any other as it is."""
    for pattern, template in XLABS:
        if match := re.fullmatch(rf"(?:diffusion_model\.)?{pattern}", name):
            return match.expand(template)
    return name


def ending(name: str) -> tuple[str, str, str] | None:
    """Return (module as spelled, algorithm, role) of a tensor's name, None for one that is no part of a LoRA."""
    name = plain(name)
    for pattern, algorithm, role in ENDINGS:
        if match := re.fullmatch(rf"(.+?)(?:{pattern})", name):
            return match[1], algorithm, role
    return None


# --- prefixes and words ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How the names of one file are spelled."""

    prefix: str
    joined: bool
    words: Words
    family: Family

    def module(self, spelled: str) -> str | None:
        """Return the dotted module of a name without its ending, None where the prefix is another."""
        if not spelled.startswith(self.prefix):
            return None
        bare = spelled.removeprefix(self.prefix)
        return dotted(bare) if self.joined else bare


DIFFUSERS_MARKS = re.compile(
    r"attn[12][._]|condition_embedder[._]|ffn[._]net[._]|(^|[._])(single_)?transformer_blocks[._]|scale_shift_table"
    r"|proj_out$"
)
FLUX_MARKS = re.compile(r"(^|[._])(double_blocks|single_blocks|(single_)?transformer_blocks)[._]")


def spelling(modules: Iterable[str]) -> Spelling:
    """Return how most of the modules (as spelled, without endings) are spelled."""
    names = list(modules)
    prefixes = [_prefix(name) for name in names]
    prefix, joined = max(set(prefixes), key=lambda found: (prefixes.count(found), found)) if names else ("", False)
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    words: Words = "diffusers" if any(DIFFUSERS_MARKS.search(name) for name in inside) else "official"
    return Spelling(prefix, joined, words, "flux" if any(FLUX_MARKS.search(name) for name in inside) else "wan")


def dialect_name(found: Spelling, names: Iterable[str]) -> str:
    """Return what a file in this spelling is called: a row of DIALECTS, or its prefix."""
    rows = [row for row in DIALECTS if (row.prefix, row.joined) == (found.prefix, found.joined)]
    rows = [row for row in rows if row.words == found.words]
    ends = list(names)
    for row in rows:
        if any(name.endswith((row.down, row.up)) for name in ends):
            return row.name
    return rows[-1].name if rows else f"{found.prefix or 'bare '}{found.words} names"


def _prefix(name: str) -> tuple[str, bool]:
    for prefix in JOINED_PREFIXES:
        if name.startswith(prefix):
            return prefix, True
    found, rest = "", name
    while prefix := next((prefix for prefix in DOTTED_PREFIXES if rest.startswith(prefix)), ""):
        found, rest = found + prefix, rest.removeprefix(prefix)
    return found, False


WORDS = frozenset(
    """
    patch_embedding text_embedding time_embedding time_projection self_attn cross_attn norm_q norm_k k_img v_img
    norm_k_img img_emb emb_pos
    vace_blocks vace_patch_embedding before_proj after_proj control_adapter residual_blocks ref_conv
    pose_patch_embedding motion_encoder net_app face_adapter fuser_blocks linear1_kv linear1_q q_norm k_norm
    face_encoder padding_tokens conv1_local out_proj cond_encoder casual_audio_encoder conv1_global final_linear
    audio_injector injector_adain_layers trainable_cond_mask frame_packer proj_2x proj_4x
    img_in txt_in time_in vector_in guidance_in in_layer out_layer double_blocks single_blocks img_mod txt_mod
    img_attn txt_attn query_norm key_norm img_mlp txt_mlp final_layer adaLN_modulation
    condition_embedder text_embedder time_embedder time_proj image_embedder linear_1 linear_2 to_q to_k to_v to_out
    add_q_proj add_k_proj add_v_proj to_add_out norm_added_q norm_added_k norm1_context ff_context proj_mlp proj_out
    norm_out transformer_blocks single_transformer_blocks time_text_embed timestep_embedder guidance_embedder
    x_embedder context_embedder
    """.split()  # noqa: SIM905
)
"""Parts of module names that hold an underscore themselves; joined names cannot be split without them."""

LONGEST_WORD = 3


def dotted(joined: str) -> str:
    """Return `blocks_0_self_attn_q` as `blocks.0.self_attn.q`: at each place the longest known word."""
    tokens = joined.split("_")
    parts: list[str] = []
    while tokens:
        length = next((n for n in range(LONGEST_WORD, 1, -1) if "_".join(tokens[:n]) in WORDS), 1)
        parts.append("_".join(tokens[:length]))
        tokens = tokens[length:]
    return ".".join(parts)


# --- official parameters ---------------------------------------------------------------------------

MLP_PART = 3
"""Of the fused matrices of FLUX: q, k and v are 0, 1, 2, each as tall as the model is wide; the MLP is the rest."""

DIFFUSERS: dict[Family, tuple[Rule, ...]] = {"wan": DIT_DIFFUSERS + ANIMATE_DIFFUSERS, "flux": FLUX_DIFFUSERS}

FUSED = re.compile(r"\.(qkv|linear1|linear1_kv)\.(weight|bias)$")
"""Parameters that diffusers has as several: of FLUX, and of Animate's face blocks."""

BARE_PARAMETERS = ("modulation", "emb_pos", "scale_shift_table", "pos_embed", "padding_tokens", "weights")
"""Last words of parameters that hang on no Linear, norm or convolution."""

SCALES = ("query_norm", "key_norm")
"""Norms of FLUX, whose weight is called scale."""


@dataclass(frozen=True)
class Target:
    """An official parameter, or one `part` of a fused one; `swap`: its halves along axis 0 change places."""

    parameter: str
    part: int = 0
    fused: bool = False
    swap: bool = False


def official(module: str, role: str, words: Words, family: Family) -> Target | None:
    """Return what `role` of a dotted module changes; None for names that mean nothing in these words."""
    last = module.rpartition(".")[2]
    if role == "weight" and last in BARE_PARAMETERS:
        name = module
    else:
        name = f"{module}.{'scale' if role == 'weight' and last in SCALES else role}"
    if words == "official" and ".linear1.qkv." in name:  # XLabs: the first three parts of a fused matrix
        return Target(name.replace(".qkv.", "."), fused=True)
    if words == "official":
        return Target(name)
    for rule in DIFFUSERS[family]:
        if match := re.fullmatch(rule.pattern, name):
            parameter = match.expand(rule.official)
            return Target(parameter, rule.part, bool(FUSED.search(parameter)), rule.swap)
    return None


def module_in(parameter: str, dialect: Dialect, family: Family, part: int = 0) -> str | None:
    """Return the module of an official parameter as `dialect` spells it, None where it has no name for it."""
    if dialect.words == "diffusers":
        names = _spelled(parameter, family)
        if part not in names:
            return None
        _, parameter = names[part]
    module = re.sub(r"\.(weight|bias|scale|modulation)$", "", parameter)
    return dialect.prefix + (module.replace(".", "_") if dialect.joined else module)


def spelled_parts(
    parameter: str, dialect: Dialect, family: Family, shape: tuple[int, ...]
) -> dict[int, tuple[int, int] | None]:
    """Return the parts a dialect has an official parameter in, each with its (first row, rows); None is all of it.

    shape   of the whole change, [rows, columns].
    """
    if dialect.words == "official":
        return {0: None}
    parts = list(_spelled(parameter, family))
    if len(parts) < 2:
        return dict.fromkeys(parts)
    # The MLP is as wide as the file has it; of a bias, which does not tell, four times as wide as the rest.
    width = shape[0] // (7 if MLP_PART in parts else len(parts))
    if MLP_PART in parts and len(shape) > 1:
        width = shape[1]
    return {part: (part * width, shape[0] - MLP_PART * width if part == MLP_PART else width) for part in parts}


def swaps(parameter: str, dialect: Dialect, family: Family) -> bool:
    """Whether a dialect has the halves of an official parameter in the other order."""
    return dialect.words == "diffusers" and any(rule.swap for rule, _ in _spelled(parameter, family).values())


def _spelled(parameter: str, family: Family) -> dict[int, tuple[Rule, str]]:
    """Rule and name, by part, of an official parameter in diffusers' words."""
    names = ((rule, backwards(rule, parameter)) for rule in DIFFUSERS[family])
    return {rule.part: (rule, name) for rule, name in names if name is not None}
