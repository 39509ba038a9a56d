"""Files that are not plain Wan weights: quantised ones, other models, adapters. Owns what to say of them.

Source: header conventions of ComfyUI, bitsandbytes, quanto, GPTQ and of the named model families.
"""

from __future__ import annotations

import re
from typing import NoReturn

import torch

from kinema.errors import CheckpointError
from kinema.weights.files import TensorFile

QUANTISED_NAMES = (
    (r".*\.?comfy_quant", "ComfyUI's second fp8/int8 format"),
    (r".*\.?scaled_fp8", "ComfyUI's scaled fp8"),
    (r".*\.scale_(weight|input)", "ComfyUI's scaled fp8"),
    (r".*\.weight_scale(_2)?", "fp8 or int8 with a scale for each weight"),
    (r".*\.(quant_state|absmax|quant_map|nested_absmax).*", "bitsandbytes"),
    (r".*\.(qweight|qzeros|wscales|g_idx)", "int4 (GPTQ, AWQ or SVDQuant)"),
    (r".*\.weight\._(data|scale)", "quanto"),
)
QUANTISED_DTYPES = {
    torch.float8_e4m3fn: "plain fp8 (e4m3fn)",
    torch.float8_e5m2: "plain fp8 (e5m2)",
    torch.int8: "int8",
}

FOREIGN = (
    (r".*\.(lora_A|lora_B|lora_down|lora_up|lora_a|lora_b)(\..+)?|lora_(unet|te).*|.*\.diff(_b|_m)?", "a LoRA"),
    (r".*(hada_w1_a|lokr_w1|lokr_w2).*", "a LoHa or LoKr adapter"),
    (r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.qkv\.weight", "a HunyuanVideo transformer"),
    (r"single_transformer_blocks\.0\..+", "a FLUX transformer in diffusers names"),
    (r"(model\.diffusion_model\.)?joint_blocks\.0\..+", "a Stable Diffusion 3 transformer"),
    (r"(model\.diffusion_model\.)?input_blocks\.0\..+|down_blocks\.0\.attentions\..+", "a Stable Diffusion UNet"),
    (r"(first_stage_model\.)?decoder\.up\.0\.block\.0\.conv1\.weight", "an image VAE (FLUX or Stable Diffusion)"),
    (r"decoder\.up_blocks\.0\.resnets\.0\.conv1\.weight", "a VAE in diffusers names, of another model"),
    (r"taesd.*|.*decoder\.1\.conv\.0\.weight", "a tiny preview VAE"),
    (r"(text_model\.)?encoder\.layers\.0\..*", "a CLIP text encoder"),
    (r"text_model\.encoder\.layers\.0\..+", "a CLIP text encoder"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight", "a T5 encoder, not umT5"),
    (r"(model\.)?layers\.0\.self_attn\.q_proj\.weight", "a language model"),
    (r"transformer_blocks\.0\..+", "a transformer of another family (LTX, Qwen-Image, CogVideoX)"),
    (r"latents", "latents saved by Kinema; `kinema decode` makes the video"),
)


def refuse_quantised(file: TensorFile) -> None:
    """Raise CheckpointError, naming the format, for a file whose numbers are not plain weights."""
    found: tuple[str, str] | None = None
    if "_quantization_metadata" in file.metadata:
        found = ("_quantization_metadata", "ComfyUI's second fp8/int8 format")
    for name in file:
        if found:
            break
        found = next(((name, kind) for pattern, kind in QUANTISED_NAMES if re.fullmatch(pattern, name)), None)
        if found is None and (kind := QUANTISED_DTYPES.get(file.dtype(name))):
            found = (name, kind)
    if found:
        raise CheckpointError(
            f"{file.path} is quantised: {found[1]} (its {found[0]!r} shows it), and is not read as plain weights",
            "Take the fp16 or bf16 file of the same model.",
            path=file.path,
            key=found[0],
            found=found[1],
        )


def refuse_foreign(file: TensorFile) -> NoReturn:
    """Raise CheckpointError saying what a file of no known dialect probably is."""
    names = file.names
    kind = next((kind for pattern, kind in FOREIGN if any(re.fullmatch(pattern, name) for name in names)), None)
    what = f"is probably {kind}, not a model Kinema loads" if kind else "is of an unknown kind"
    if kind and kind.startswith(("a LoRA", "a LoHa")):
        what = f"is {kind}, not a model"
    first = ", ".join(names[:10]) or "none"
    raise CheckpointError(
        f"{file.path} {what}; its first tensors are {first}",
        "Expected: a Wan 2.1 or 2.2 DiT, a Wan VAE, a umT5 text encoder or the CLIP ViT-H vision encoder.",
        path=file.path,
        found=kind or "unknown",
        keys=list(names[:10]),
    )
