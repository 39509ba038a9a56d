"""diffusers' FluxPipeline over the small FLUX files of tiny_flux: the same weights in its own classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from kinema.models.flux import pack, unpack
from kinema.models.tokenizer import Tokenizer
from kinema.sampling.denoiser import noise
from kinema.weights.keys_flux import FLUX_DIFFUSERS


class Pieces:
    """The sentencepiece model behind the few calls a pipeline makes of a T5 tokenizer."""

    model_max_length = 512
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        self.model = Tokenizer.from_path(path)

    def __call__(self, prompts: list[str], max_length: int = 512, **_: object) -> object:
        rows = [self.model.encode(prompt, max_length).ids for prompt in prompts]
        padded = torch.tensor([[*ids, *([0] * (max_length - len(ids)))] for ids in rows])
        return type("Encoding", (), {"input_ids": padded})()

    def tokenize(self, prompt: str) -> list[str]:
        return [prompt]

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def fill_from_official(module: nn.Module, official: dict[str, Tensor]) -> None:
    """Give a diffusers transformer the weights of a BFL file, by our table read backwards."""
    with torch.no_grad():
        taken: dict[str, int] = {}
        for name, tensor in sorted(module.state_dict().items(), key=lambda item: _part(item[0])):
            rule = next(rule for rule in FLUX_DIFFUSERS if re.fullmatch(rule.pattern, name))
            place = re.sub(rule.pattern, rule.official, name)
            whole = official[place]
            if rule.swap:
                whole = torch.cat(tuple(reversed(whole.chunk(2))))
            start = taken.get(place, 0)
            tensor.copy_(whole[start : start + len(tensor)])
            taken[place] = start + len(tensor)


def _part(name: str) -> int:
    return next(rule.part for rule in FLUX_DIFFUSERS if re.fullmatch(rule.pattern, name))


def latents_of_diffusers(root: Path, prompt: str, *, seed: int, steps: int, text_len: int, guidance: float) -> Tensor:
    """Return latents [16, 8, 8] of a 64 x 64 picture."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, num_attention_heads=1, joint_attention_dim=24,
        pooled_projection_dim=64, guidance_embeds=True,
    )  # fmt: skip
    # diffusers fixes the MLP at four times the width; the small file has two.
    transformer = _narrow(transformer, 256)
    fill_from_official(transformer, load_file(root / "diffusion_models/flux_dev.safetensors"))
    t5 = T5EncoderModel(
        T5Config(vocab_size=60, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )
    t5.load_state_dict(load_file(root / "text_encoders/tiny_t5.safetensors"), strict=False)
    t5.encoder.embed_tokens.weight = t5.shared.weight
    vocab = root / "text_encoders/openai/clip-vit-large-patch14"
    words = json.loads((vocab / "vocab.json").read_text())
    end = words["<|endoftext|>"]
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=530, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
            max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    clip_state = load_file(root / "text_encoders/tiny_clip_l.safetensors")
    ours = {name.removeprefix("text_model."): tensor for name, tensor in clip_state.items()}
    clip.load_state_dict({name: ours[name.removeprefix("text_model.")] for name in clip.state_dict()})
    merges = [tuple(line.split()) for line in (vocab / "merges.txt").read_text().splitlines()[1:]]
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=AutoencoderKL(latent_channels=16, block_out_channels=[32, 64, 128, 128],
                          down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
        text_encoder=clip.eval(),
        tokenizer=CLIPTokenizer(vocab=words, merges=merges, model_max_length=77),
        text_encoder_2=t5.eval(),
        tokenizer_2=None,
        transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.tokenizer_2 = Pieces(root / "text_encoders/google/t5-v1_1-xxl")
    pipeline.set_progress_bar_config(disable=True)
    start = noise(seed, (1, 16, 1, 8, 8))
    tokens = pipeline(
        prompt, height=64, width=64, num_inference_steps=steps, guidance_scale=guidance, latents=pack(start),
        max_sequence_length=text_len, output_type="latent",
    ).images  # fmt: skip
    return unpack(tokens, (4, 4))[0, :, 0]


def _narrow(model: FluxTransformer2DModel, mlp_dim: int) -> FluxTransformer2DModel:
    dim = model.config.num_attention_heads * 128
    for block in model.transformer_blocks:
        for feed_forward in (block.ff, block.ff_context):
            feed_forward.net[0].proj = nn.Linear(dim, mlp_dim)
            feed_forward.net[2] = nn.Linear(mlp_dim, dim)
    for block in model.single_transformer_blocks:
        block.proj_mlp, block.proj_out = nn.Linear(dim, mlp_dim), nn.Linear(dim + mlp_dim, dim)
        block.mlp_hidden_dim = mlp_dim
    return model
