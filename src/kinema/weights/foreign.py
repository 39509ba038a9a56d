"""Files that are no weights Kinema loads: other models, adapters. Owns what to say of them.

Source: header conventions of the named model families.
"""

from __future__ import annotations

import re
from typing import NoReturn

from kinema.errors import CheckpointError
from kinema.weights.files import TensorFile

FOREIGN = (
    (r".*\.(lora_A|lora_B|lora_down|lora_up|lora_a|lora_b)(\..+)?|lora_(unet|te).*|.*\.diff(_b|_m)?", "a LoRA"),
    (r".*(hada_w1_a|lokr_w1|lokr_w2).*", "a LoHa or LoKr adapter"),
    (r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.qkv\.weight", "a HunyuanVideo transformer"),
    (r"blocks\.0\.cross_attn\.kv_linear\.weight", "a LongCat-Video transformer"),
    (r"single_transformer_blocks\.0\..+", "a transformer like FLUX.1 in diffusers names"),
    (r"(model\.diffusion_model\.)?joint_blocks\.0\..+", "a Stable Diffusion 3 transformer"),
    (r"(model\.diffusion_model\.)?input_blocks\.0\..+|down_blocks\.0\.attentions\..+", "a Stable Diffusion UNet"),
    (r"(first_stage_model\.)?decoder\.up\.0\.block\.0\.conv1\.weight", "an image VAE (FLUX or Stable Diffusion)"),
    (r"decoder\.up_blocks\.0\.resnets\.0\.conv1\.weight", "a VAE in diffusers names, of another model"),
    (r"taesd.*|.*decoder\.1\.conv\.0\.weight", "a tiny preview VAE"),
    (r"(text_model\.)?encoder\.layers\.0\..*", "a CLIP text encoder"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight", "a T5 encoder, neither umT5 nor T5 v1.1"),
    (r"(model\.)?layers\.0\.self_attn\.q_proj\.weight", "a language model"),
    (r"transformer_blocks\.0\..+", "a transformer of another family (LTX, Qwen-Image, CogVideoX)"),
    (r"latents", "latents saved by Kinema; `kinema decode` makes the video"),
)


def refuse_foreign(file: TensorFile) -> NoReturn:
    """Raise CheckpointError saying what a file of no known dialect probably is."""
    names = file.names
    kind = next((kind for pattern, kind in FOREIGN if any(re.fullmatch(pattern, name) for name in names)), None)
    what = f"is probably {kind}, not a model Kinema loads" if kind else "is of an unknown kind"
    hint = "Expected: the transformer, the VAE or an encoder of Wan 2.1, Wan 2.2 or FLUX.1."
    if kind and kind.startswith(("a LoRA", "a LoHa")):
        what, hint = f"is {kind}, not a model", f"Pass it as --lora {file.path}; see: kinema lora inspect {file.path}"
    first = ", ".join(names[:10]) or "none"
    raise CheckpointError(
        f"{file.path} {what}; its first tensors are {first}",
        hint,
        path=file.path,
        found=kind or "unknown",
        keys=list(names[:10]),
    )
