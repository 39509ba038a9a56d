"""Encoders that condition the Wan models: umT5 (text) and CLIP ViT-H (image).

umT5 is written out here rather than wrapped: transformers 5 once left the encoder's embedding unattached, so that every
prompt became zeros without a word (its issue 43992), its key names differ from those of the official files, and a
trainable encoder of a few kinds of layers is shorter than an adapter would be. transformers is the oracle in the tests.

Both models run in the dtype of their weights, one weight at a time, with a float32 residual stream, float32 norms and a
float32 softmax: bfloat16 files are used as mapped, never copied whole. With float32 weights everything is float32.
Parameter names are those of the official files. Nothing here knows of checkpoints or of the DiT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import CheckpointError, NumericsError, RequestError
from kinema.models.layers import LayerNorm, Linear, RunBlocks, run_in_order
from kinema.models.tokenizer import Tokenizer

# --- umT5 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoderConfig:
    """Structure of a umT5 encoder; umT5-XXL is (256384, 4096, 4096, 64, 10240, 24).

    dim_attn     width of all heads together, num_heads times the width of one.
    shared_bias  the relative bias of block 0 serves all blocks: T5. umT5 has one in every block.
    """

    vocab: int
    dim: int
    dim_attn: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    shared_bias: bool = False


class T5Linear(Linear):
    """A bias-free linear layer that leaves float32. float16 weights are raised to float32 for the product:
    T5 activations pass 65504 in the feed-forward, and half precision would turn them into infinities."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """The published T5 initialisation."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float16:
            return F.linear(x.float(), self.weight.float())
        return super().forward(x).float()


class T5Norm(nn.Module):
    """Root mean square norm without centring, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class T5Attention(nn.Module):
    """Self-attention without the 1/sqrt(d) factor: T5 folds it into the weights' initialisation."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = T5Linear(config.dim, config.dim_attn)
        self.k = T5Linear(config.dim, config.dim_attn)
        self.v = T5Linear(config.dim, config.dim_attn)
        self.o = T5Linear(config.dim_attn, config.dim)
        nn.init.normal_(self.q.weight, std=(config.dim * config.dim_attn / config.num_heads) ** -0.5)

    def forward(self, x_BSD: Tensor, bias_BNSS: Tensor) -> Tensor:
        q, k, v = (part(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = torch.softmax(q @ k.transpose(-1, -2) + bias_BNSS, dim=-1) @ v
        out_BSD: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return out_BSD


class T5FeedForward(nn.Module):
    """fc2(gelu_tanh(gate(x)) * fc1(x))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(T5Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"))
        self.fc1 = T5Linear(config.dim, config.ffn_dim)
        self.fc2 = T5Linear(config.ffn_dim, config.dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.fc2(self.gate(x_BSD) * self.fc1(x_BSD))
        return out_BSD


class RelativeBias(nn.Module):
    """Attention bias by the distance from query to key, one value a head and bucket."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)

    def forward(self, num_tokens: int) -> Tensor:
        """Return bias_NSS, float32."""
        buckets = distance_buckets(num_tokens, self.embedding.num_embeddings, self.max_distance)
        bias_SSN: Tensor = self.embedding(buckets.to(self.embedding.weight.device))
        return bias_SSN.permute(2, 0, 1).float()


class T5Block(nn.Module):
    def __init__(self, config: TextEncoderConfig, has_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = T5Norm(config.dim, config.eps)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim, config.eps)
        self.ffn = T5FeedForward(config)
        if has_bias:
            self.pos_embedding = RelativeBias(config)

    def bias(self, num_tokens: int, mask_B11S: Tensor | None) -> Tensor:
        """Return the attention bias [1 or B, N, S, S] of this block, its lowest number where a key is padding."""
        bias: Tensor = self.pos_embedding(num_tokens)[None]
        return bias if mask_B11S is None else bias.masked_fill(~mask_B11S, torch.finfo(bias.dtype).min)

    def forward(self, x_BSD: Tensor, bias: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD), bias)
        x_BSD = x_BSD + self.ffn(self.norm2(x_BSD))
        return x_BSD


class UMT5(nn.Module):
    """umT5 encoder, or T5 by `shared_bias`: token ids to features. Trainable; dropout is left out.

    run_blocks   as in `WanDiT`.

    Source: Wan-Video/Wan2.2 wan/modules/t5.py (Apache-2.0). Parity: tests/parity/test_encoders.py.
    """

    run_blocks: RunBlocks

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.run_blocks = run_in_order
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(
            T5Block(config, has_bias=index == 0 or not config.shared_bias) for index in range(config.num_layers)
        )
        self.norm = T5Norm(config.dim, config.eps)

    def encode(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return features_BSD, float32, on the device of the weights.

        mask_BS  1 at tokens, 0 at padding, whose rows of the result mean nothing. None: no padding. Rows of true length
                 and rows padded under a mask give the same features, for padding is never attended.
        """
        mask_B11S = None if mask_BS is None else mask_BS.to(self.norm.weight.device, torch.bool)[:, None, None, :]
        # The table, a fifth of the model for a few hundred rows, may stay on the host and as its file stores it.
        x_BSD = self.token_embedding(ids_BS.to(self.token_embedding.weight.device)).to(self.norm.weight).float()

        def step(module: nn.Module, _: int, state: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            block, (x_BSD, bias) = cast(T5Block, module), state
            if bias is None or not self.config.shared_bias:
                bias = block.bias(x_BSD.shape[1], mask_B11S)
            return block(x_BSD, bias), bias

        start: tuple[Tensor, Tensor | None] = (x_BSD, None)
        x_BSD, _ = self.run_blocks(self.blocks, step, start)
        features_BSD: Tensor = self.norm(x_BSD)
        return features_BSD

    forward = encode

    def block_groups(self) -> list[list[nn.Module]]:
        """As in `WanDiT`."""
        return [[block] for block in self.blocks]


def distance_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each (query, key) pair, int64 [S, S].

    Half the buckets are for keys after the query; of each half, the first half holds one distance a bucket, the rest
    grows logarithmically up to max_distance. Made on the CPU, so that no device rounds a logarithm another way.
    """
    position = torch.arange(num_tokens)
    distance = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    after = (distance > 0).long() * half
    distance = distance.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    return after + torch.where(distance < exact, distance, (exact + growth.long()).clamp(max=half - 1))


@torch.no_grad()
def encode_prompts(
    encoder: UMT5,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    text_len: int = 512,
    device: torch.device | str = "cpu",
    *,
    padded: bool = False,
) -> tuple[Tensor, ...]:
    """Return one features_SD a prompt, float32 on `device`, of its true length with </s> and without padding.

    padded   `text_len` rows, padded with token 0, which is attended like any other: FLUX's T5 was run without a mask in
             training, and still is.

    `tokenizer.encode(prompt, text_len).cut` says what was left out of a long prompt.
    Raises RequestError for a token the encoder has no embedding for, NumericsError for features that are not finite.
    """
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, text_len).ids
        if max(ids) >= encoder.config.vocab:
            raise RequestError(
                f"the prompt has token {max(ids)}, the text encoder knows {encoder.config.vocab}",
                "Leave <extra_id_N> out of the prompt, or use the tokenizer that belongs to the text encoder.",
                field="prompt",
                got=prompt,
            )
        if padded:
            ids += (0,) * (text_len - len(ids))
        row_SD = encoder.encode(torch.tensor([ids]))[0]
        if not row_SD.isfinite().all():
            raise NumericsError("the text encoder gave a value that is not finite", stage="encode text")
        rows.append(row_SD.to(device))
    return tuple(rows)


# --- CLIP vision -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipVisionConfig:
    """Structure of a CLIP vision tower; ViT-H/14 is (224, 14, 1280, 16, 32). num_layers counts the file's."""

    image_size: int
    patch_size: int
    dim: int
    num_heads: int
    num_layers: int
    mlp_ratio: int = 4
    eps: float = 1e-5


class ClipAttention(nn.Module):
    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = Linear(config.dim, 3 * config.dim)
        self.proj = Linear(config.dim, config.dim)

    def forward(self, x_BVD: Tensor) -> Tensor:
        num_images, num_tokens, _ = x_BVD.shape
        qkv = self.to_qkv(x_BVD).view(num_images, num_tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out_BVD: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out_BVD


class ClipBlock(nn.Module):
    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        hidden = config.dim * config.mlp_ratio
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.attn = ClipAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.mlp = nn.Sequential(Linear(config.dim, hidden), nn.GELU(), Linear(hidden, config.dim))

    def forward(self, x_BVD: Tensor) -> Tensor:
        x_BVD = x_BVD + self.attn(self.norm1(x_BVD))
        x_BVD = x_BVD + self.mlp(self.norm2(x_BVD))
        return x_BVD


class ClipVision(nn.Module):
    """CLIP vision tower up to the last block but one, without post norm: the features Wan 2.1 was trained on.

    Its keys are those of the official file without the prefix `visual.`. A strict loader leaves out only these:
    of the official file textual.*, log_scale, visual.head, visual.post_norm.{weight,bias} and the last block,
    visual.transformer.{num_layers - 1}.*; of transformers files vision_model.post_layernorm.{weight,bias},
    vision_model.encoder.layers.{num_layers - 1}.*, visual_projection.weight and vision_model.embeddings.position_ids.
    Source: Wan-Video/Wan2.1 wan/modules/clip.py (Apache-2.0). Parity: tests/parity/test_encoders.py.
    """

    run_blocks: RunBlocks

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.run_blocks = run_in_order
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, num_tokens, config.dim))
        self.pre_norm = LayerNorm(config.dim, config.eps)
        self.transformer = nn.ModuleList(ClipBlock(config) for _ in range(config.num_layers - 1))

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features_BVD of RGB pixels in [-1, 1], of any size: the image is squashed to a square."""
        size = (self.config.image_size, self.config.image_size)
        # No antialiasing, and no clamp after the overshoot of the cubic: both as in the official code.
        pixels = F.interpolate(pixels_BCHW.float(), size=size, mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.MEAN, self.STD))
        return self.forward((pixels - mean) / std)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features_BVD, float32, of pixels already square and normalised; V = 1 class token + the patches."""
        weight = self.patch_embedding.weight
        patches: Tensor = self.patch_embedding(pixels_BCHW.to(weight.device, weight.dtype))
        cls = self.cls_embedding.expand(len(patches), -1, -1)
        x_BVD: Tensor = torch.cat([cls.float(), patches.flatten(2).transpose(1, 2).float()], dim=1) + self.pos_embedding
        return self.run_blocks(self.transformer, lambda block, _, x_BVD: block(x_BVD), self.pre_norm(x_BVD))

    def block_groups(self) -> list[list[nn.Module]]:
        """As in `WanDiT`."""
        return [[block] for block in self.transformer]


# --- after loading -----------------------------------------------------------------------------------


@torch.no_grad()
def check_encoder(encoder: UMT5 | ClipVision, path: Path | str) -> None:
    """Raise CheckpointError unless the encoder tells two inputs apart: zeroed or constant weights load without a word.

    Costs one pass over two very short inputs.
    """
    if isinstance(encoder, UMT5):
        step = encoder.config.vocab // 8
        ids = torch.arange(step, step * 7, step).view(2, 3)
        weights_IW = encoder.token_embedding(ids.flatten().to(encoder.token_embedding.weight.device)).float()
        part, features_BSD = "token_embedding", encoder.encode(ids)
    else:
        weights_IW = encoder.patch_embedding.weight.flatten(1)[:8].float()
        generator = torch.Generator().manual_seed(0)
        size = encoder.config.image_size
        part, features_BSD = "patch_embedding", encoder(torch.randn(2, 3, size, size, generator=generator))
    if not features_BSD.isfinite().all():
        raise _broken(path, "its features are not finite")
    if not weights_IW.any():
        raise _broken(path, f"its {part} is zero")
    if (weights_IW == weights_IW[0]).all():
        raise _broken(path, f"its {part} is the same everywhere")
    if torch.allclose(features_BSD[0], features_BSD[1], rtol=1e-3, atol=1e-6):
        raise _broken(path, "it gives the same features for different inputs")


def _broken(path: Path | str, fault: str) -> CheckpointError:
    hint = "The file is damaged or was saved wrongly; fetch it again."
    return CheckpointError(f"the encoder in {path} cannot be used: {fault}", hint, path=path, found=fault)
