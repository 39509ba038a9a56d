"""The Wan DiT: one class for Wan 2.1 and 2.2, text or image to video, with or without CLIP tokens.

Parameter names are the official checkpoint's. Owns the forward pass and its float32 islands; knows nothing of files,
devices, schedules, guidance or offloading: those swap a leaf Linear, `attention` or `run_blocks`.

Source of the architecture: Wan-Video/Wan2.2 and Wan-Video/Wan2.1 wan/modules/model.py (Apache-2.0).
Parity: tests/parity/test_wan_dit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import (
    Attention,
    LayerNorm,
    Linear,
    RMSNorm,
    gated_add,
    modulate,
    rope_table,
    rotate,
    sdpa,
    sinusoid,
)
from kinema.tensors import Conditions

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of one token."""

FLOAT32_PARTS = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")
"""Prefixes of the keys that stay float32 whatever the compute dtype; see also `stays_float32`."""


def stays_float32(key: str) -> bool:
    """Whether the parameter `key` stays float32 in fast mode: all but the matrices of blocks, text and CLIP MLPs."""
    name = key.rsplit(".", 2)
    return key.startswith(FLOAT32_PARTS) or name[-1] in ("modulation", "emb_pos") or "norm" in name[-2]


@dataclass(frozen=True)
class WanConfig:
    """Structure of one Wan DiT; every field can be read from tensor shapes except `text_len` and `eps`.

    in_channels          noise channels plus those of `Conditions.concat_BCFhw`.
    has_clip_tokens      cross-attention has its own keys and values for CLIP tokens (2.1 image models).
    num_clip_positions   rows of the learned position of CLIP tokens: 514 for first-last frame, else 0.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    has_clip_tokens: bool = False
    clip_dim: int = 1280
    num_clip_positions: int = 0
    head_dim: int = 128
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        return self.dim // self.head_dim


@dataclass(frozen=True)
class Context:
    """What stays constant over the steps of one request, expert and guidance branch. Made by `WanDiT.prepare`.

    kv             of each block: keys and values [B, N, S, K] of the text, then, if it has any, of the CLIP tokens.
    text_bias_1S   logarithm of how many equal rows each text row stands for; None where each is itself.
    concat_BCFhw   channels put after the noise.
    clean_frames   leading latent frames that are given, not denoised: their tokens see t = 0.
    """

    kv: tuple[tuple[Tensor, ...], ...]
    text_bias_1S: Tensor | None = None
    concat_BCFhw: Tensor | None = None
    clean_frames: int = 0


@dataclass(frozen=True)
class Stream:
    """What flows through the blocks of one forward pass.

    tokens_BLD       the residual stream, float32.
    time_BRD         time embedding, one row for each distinct timestep; the head is modulated by it.
    modulation_BR6D  its projection, which modulates the blocks: shift, scale, gate of attention, then of the FFN.
    segments         how many tokens, in order, each row applies to.
    rope_LK          unit complex numbers, one row a token.
    grid             latent frames, rows and columns of tokens.
    attention        the self-attention core of this pass.
    """

    tokens_BLD: Tensor
    time_BRD: Tensor
    modulation_BR6D: Tensor
    segments: tuple[int, ...]
    rope_LK: Tensor
    grid: tuple[int, int, int]
    attention: Attention


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def forward(self, x_BLD: Tensor, stream: Stream) -> Tensor:
        heads = (-1, self.head_dim)
        q_BLNK = rotate(self.norm_q(self.q(x_BLD)).unflatten(-1, heads), stream.rope_LK)
        k_BLNK = rotate(self.norm_k(self.k(x_BLD)).unflatten(-1, heads), stream.rope_LK)
        v_BLNK = self.v(x_BLD).unflatten(-1, heads)
        y_BNLK = stream.attention(q_BLNK.transpose(1, 2), k_BLNK.transpose(1, 2), v_BLNK.transpose(1, 2))
        y_BLD: Tensor = self.o(y_BNLK.transpose(1, 2).flatten(2))
        return y_BLD


class CrossAttention(nn.Module):
    """Attention to the constant context; its keys and values are computed once, by `project`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        if config.has_clip_tokens:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def project(self, text_BSD: Tensor, clip_BVD: Tensor | None) -> tuple[Tensor, ...]:
        """Return keys and values of the text, then of the CLIP tokens if there are any, split into heads."""
        rows = [self.norm_k(self.k(text_BSD)), self.v(text_BSD)]
        if clip_BVD is not None:
            rows += [self.norm_k_img(self.k_img(clip_BVD)), self.v_img(clip_BVD)]
        return tuple(row.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for row in rows)

    def forward(self, x_BLD: Tensor, context: Context, index: int) -> Tensor:
        q_BNLK = self.norm_q(self.q(x_BLD)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k_BNSK, v_BNSK, *clip = context.kv[index]
        bias_1S = None if context.text_bias_1S is None else context.text_bias_1S.to(q_BNLK.dtype)
        # Plain SDPA, not `stream.attention`: few keys, all of them here even when the tokens are spread over devices.
        y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=bias_1S)
        if clip:
            y_BNLK = y_BNLK + F.scaled_dot_product_attention(q_BNLK, clip[0], clip[1])
        y_BLD: Tensor = self.o(y_BNLK.transpose(1, 2).flatten(2))
        return y_BLD


class Block(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, stream: Stream, context: Context, index: int) -> Stream:
        x_BLD, segments = stream.tokens_BLD, stream.segments
        rows = (self.modulation.float() + stream.modulation_BR6D).unbind(2)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows
        y_BLD = self.self_attn(modulate(self.norm1(x_BLD), shift_attn, scale_attn, segments), stream)
        x_BLD = gated_add(x_BLD, y_BLD, gate_attn, segments)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), context, index)
        y_BLD = self.ffn(modulate(self.norm2(x_BLD), shift_ffn, scale_ffn, segments))
        return replace(stream, tokens_BLD=gated_add(x_BLD, y_BLD, gate_ffn, segments))


class ClipEmbedding(nn.Module):
    """Project CLIP tokens to the width of the model. Its norms have torch's own eps, 1e-5, unlike all others."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(config.clip_dim),
            Linear(config.clip_dim, config.clip_dim),
            nn.GELU(),
            Linear(config.clip_dim, config.dim),
            LayerNorm(config.dim),
        )
        if config.num_clip_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.num_clip_positions, config.clip_dim))

    def forward(self, clip_BVD: Tensor) -> Tensor:
        x_BVD: Tensor = self.proj(clip_BVD + self.emb_pos if hasattr(self, "emb_pos") else clip_BVD)
        return x_BVD


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, config.out_channels * PATCH[0] * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, stream: Stream) -> Tensor:
        shift, scale = (self.modulation.float() + stream.time_BRD[:, :, None]).unbind(2)
        x_BLD: Tensor = self.head(modulate(self.norm(stream.tokens_BLD), shift, scale, stream.segments))
        return x_BLD


def pad_texts(texts: tuple[Tensor, ...], text_len: int) -> tuple[Tensor, Tensor | None]:
    """Return texts padded with zero rows as if to `text_len`, [B, S, D], and the bias [1, S] of attention to them.

    Padding rows are equal and so get equal keys and values: a few that weigh as much as all of them are exact, and
    spare a hundred tokens of prompt the other four hundred. Weights enter softmax as their logarithms.
    """
    longest = max(len(text) for text in texts)
    if longest > text_len:
        raise ValueError(f"text of {longest} tokens; this DiT takes at most {text_len}")
    biases = _log_weights(text_len - longest)
    merged = longest + len(biases) < text_len
    rows = longest + len(biases) if merged else text_len
    padded_BSD = torch.stack([F.pad(text, (0, 0, 0, rows - len(text))) for text in texts])
    return padded_BSD, torch.tensor([[0.0] * longest + biases], device=padded_BSD.device) if merged else None


def _log_weights(count: int) -> list[float]:
    """Return the fewest numbers, each exact in bfloat16, whose exponentials sum to `count` within 1e-7 of it."""
    biases: list[float] = []
    rest = float(count)
    while rest > 1e-7 * count:
        # Round down to the 8 bits of bfloat16: rounding log(495) alone would misjudge the padding by 1 %.
        mantissa, exponent = math.frexp(math.log(rest))
        biases.append(math.ldexp(math.floor(mantissa * 256), exponent - 8))
        rest -= math.exp(biases[-1])
    return biases


def run_in_order(blocks: Iterable[nn.Module], stream: Stream, context: Context) -> Stream:
    """Run every block once: the default of `WanDiT.run_blocks`."""
    for index, block in enumerate(blocks):
        stream = block(stream, context, index)
    return stream


class WanDiT(nn.Module):
    """Velocity of Wan latents under text, and optionally CLIP tokens, concatenated channels or clean first frames.

    attention    self-attention core, read at every forward: see `layers.Attention`.
    run_blocks   run_blocks(blocks, stream, context) -> Stream.

    Forward and `prepare` may be differentiated; nothing is kept on the model between calls.
    """

    attention: Attention
    run_blocks: Callable[[Iterable[nn.Module], Stream, Context], Stream]

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.attention = sdpa
        self.run_blocks = run_in_order
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.has_clip_tokens:
            self.img_emb = ClipEmbedding(config)

    def init_weights(self) -> None:
        """Fill the weights for training from nothing: Xavier matrices, zero biases, a zero head."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or name == "head.head.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("text_embedding.", "time_embedding.")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim >= 2 and not name.endswith(("modulation", "emb_pos")):
                nn.init.xavier_uniform_(parameter.flatten(1))

    def prepare(self, conditions: Conditions) -> Context:
        """Return the constant context: embedded text and CLIP tokens as keys and values of every block.

        Texts are padded with zeros to `text_len` rows before `text_embedding`, and all rows are attended: the weights
        were trained so. Raises ValueError for a text longer than that, or CLIP tokens given or missing wrongly.
        """
        config, clip_BVD, clean = self.config, conditions.clip_BVD, conditions.clean_BCFhw
        if config.has_clip_tokens != (clip_BVD is not None):
            raise ValueError(f"this DiT {'needs' if config.has_clip_tokens else 'takes no'} CLIP tokens")
        text_BSD, bias_1S = pad_texts(conditions.text, config.text_len)
        text_BSD = self.text_embedding(text_BSD)
        if clip_BVD is not None:
            clip_BVD = self.img_emb(clip_BVD)
        kv = tuple(block.cross_attn.project(text_BSD, clip_BVD) for block in cast(Iterable[Block], self.blocks))
        return Context(kv, bias_1S, conditions.concat_BCFhw, clean_frames=0 if clean is None else clean.shape[2])

    def embed(self, x_BCFhw: Tensor, timesteps_BR: Tensor, segments: tuple[int, ...], context: Context) -> Stream:
        """Return latents as tokens, with the modulation rows of their timesteps.

        x_BCFhw        noisy latents; h and w even.
        timesteps_BR   in [0, 1000], one for each segment.
        segments       tokens of each timestep, in order, together all of them.
        """
        if context.concat_BCFhw is not None:
            x_BCFhw = torch.cat([x_BCFhw, context.concat_BCFhw.to(x_BCFhw.dtype)], dim=1)
        if x_BCFhw.shape[1] != self.config.in_channels or x_BCFhw.shape[3] % PATCH[1] or x_BCFhw.shape[4] % PATCH[2]:
            wanted = f"{self.config.in_channels} channels and even height and width"
            raise ValueError(f"latents {list(x_BCFhw.shape)}, conditions included, are not of {wanted}")
        if len(context.kv[0][0]) != len(x_BCFhw):
            raise ValueError(f"{len(x_BCFhw)} latents but conditions for {len(context.kv[0][0])}")
        tokens = self.patch_embedding(x_BCFhw.to(self.patch_embedding.weight.dtype))
        grid = (tokens.shape[2], tokens.shape[3], tokens.shape[4])
        time_BRD = self.time_embedding(sinusoid(timesteps_BR, self.config.freq_dim)).float()
        modulation_BR6D = self.time_projection(time_BRD).float().unflatten(-1, (6, self.config.dim))
        return Stream(
            tokens_BLD=tokens.flatten(2).transpose(1, 2).float(),
            time_BRD=time_BRD,
            modulation_BR6D=modulation_BR6D,
            segments=segments,
            rope_LK=rope_table(grid, self.config.head_dim, dtype=self._rope_dtype(context), device=tokens.device),
            grid=grid,
            attention=self.attention,
        )

    @staticmethod
    def _rope_dtype(context: Context) -> torch.dtype:
        # Rounding queries to bfloat16 loses 2 ** -9; a float32 rotation, 2 ** -24, then costs nothing.
        exact = context.kv[0][0].dtype == torch.float32 and context.kv[0][0].device.type != "mps"
        return torch.complex128 if exact else torch.complex64

    def unembed(self, stream: Stream) -> Tensor:
        """Return the velocity_BCFhw, float32, of the tokens."""
        frames, rows, columns = stream.grid
        # Columns of the head are ordered (frame, row, column, channel) within a patch.
        patches = self.head(stream).view(-1, frames, rows, columns, *PATCH, self.config.out_channels)
        velocity: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return velocity.flatten(6, 7).flatten(4, 5).flatten(2, 3).float()

    def forward(self, x_BCFhw: Tensor, timesteps_B: Tensor, context: Context) -> Tensor:
        """Return velocity_BCFhw, float32: noise minus clean latents.

        x_BCFhw       noisy latents, their first `context.clean_frames` frames already overwritten by the clean ones.
        timesteps_B   in [0, 1000].
        """
        _, _, frames, height, width = x_BCFhw.shape
        per_frame = (height // PATCH[1]) * (width // PATCH[2])
        clean, noisy = context.clean_frames * per_frame, (frames - context.clean_frames) * per_frame
        timesteps_BR = timesteps_B[:, None]
        segments: tuple[int, ...] = (noisy,)
        if clean:
            timesteps_BR = torch.cat([torch.zeros_like(timesteps_BR), timesteps_BR], dim=1)
            segments = (clean, noisy)
        stream = self.embed(x_BCFhw, timesteps_BR, segments, context)
        stream = self.run_blocks(self.blocks, stream, context)
        return self.unembed(stream)
