"""What a Wan DiT is made of: the constant context, the stream, and the blocks it flows through.

Adapters build on these; `models/wan.py` puts them together. Parameter names are the official checkpoint's.

Source of the architecture: Wan-Video/Wan2.2 and Wan-Video/Wan2.1 wan/modules/model.py (Apache-2.0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import Attention, LayerNorm, Linear, RMSNorm, gated_add, modulate, rotate
from kinema.models.wan_config import PATCH, WanConfig

if TYPE_CHECKING:
    from kinema.models.adapters.adapter import Adapter


@dataclass(frozen=True, eq=False)
class KVCache:
    """Rows that blocks attend to, and the keys and values each block made of them when it first came by.

    Made then and not before, so that no block has to be brought for them alone; contexts that share the cache share
    what is in it.

    rows   [B, ..., S, D], as wide as the model.
    """

    rows: Tensor
    made: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, block: nn.Module, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, S, K] of the rows, as `project` of the block made or now makes them."""
        if block not in self.made:
            self.made[block] = project(self.rows)
        return self.made[block]


@dataclass(frozen=True)
class Context:
    """What stays constant over the steps of one request, expert and guidance branch. Made by `WanDiT.prepare`.

    text           what cross-attention reads of the prompt.
    clip           and of the image, where the model has CLIP tokens.
    text_bias_1S   logarithm of how many equal rows each text row stands for; None where each is itself.
    concat_BCFhw   channels put after the noise.
    adapters       each adapter in use, with what its `prepare` made of the conditions.
    clean_frames   leading latent frames that are given, not denoised: their tokens see t = 0.
    positions      place in time of each latent frame; None: 0, 1, 2 ...
    motion_B6D     added to the modulation of every block, whatever the timestep.
    more_kv        of each block: keys, rotated, and values [B, N, S, K] that tokens attend to beside the stream's own,
                   such as another video's, kept from its one pass through the network; empty: none.
    """

    text: KVCache
    clip: KVCache | None = None
    text_bias_1S: Tensor | None = None
    concat_BCFhw: Tensor | None = None
    clean_frames: int = 0
    positions: tuple[int, ...] | None = None
    adapters: tuple[tuple[Adapter, Any], ...] = ()
    motion_B6D: Tensor | None = None
    more_kv: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Stream:
    """What flows through the blocks of one forward pass.

    tokens_BLD       the residual stream, float32: `front` tokens of adapters, the video's, then more of adapters.
    time_BRD         time embedding, one row for each distinct timestep; the head is modulated by it.
    modulation_BR6D  its projection, which modulates the blocks: shift, scale, gate of attention, then of the FFN.
    segments         how many tokens, in order, each row applies to.
    rope_LK          unit complex numbers, one row a token.
    grid             latent frames, rows and columns of tokens.
    attention        the self-attention core of this pass.
    front            how many tokens come before the video's.
    ffn_tokens       how many tokens pass a feed-forward at once; None: all. Its hidden rows are the widest there are.
    side_BLD         a second stream beside the tokens, token for token, where an adapter runs one.
    """

    tokens_BLD: Tensor
    time_BRD: Tensor
    modulation_BR6D: Tensor
    segments: tuple[int, ...]
    rope_LK: Tensor
    grid: tuple[int, int, int]
    attention: Attention
    front: int = 0
    side_BLD: Tensor | None = None
    ffn_tokens: int | None = None

    def video(self) -> Stream:
        """Return the stream of the video's tokens alone, without those that adapters put around them."""
        start, stop = self.front, self.front + math.prod(self.grid)
        ends = list(itertools.accumulate(self.segments))
        clipped = [min(max(end, start), stop) for end in ends]
        segments = tuple(end - begin for begin, end in itertools.pairwise([start, *clipped]))
        tokens_BLD, rope_LK = self.tokens_BLD[:, start:stop], self.rope_LK[start:stop]
        return replace(self, tokens_BLD=tokens_BLD, rope_LK=rope_LK, segments=segments, front=0, side_BLD=None)


class Projections(nn.Module):
    """The layers of attention: queries, keys, values, output, and the norms of queries and keys over all heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)


class SelfAttention(Projections):
    def forward(self, x_BLD: Tensor, stream: Stream, more_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        q_BNLK = rotate(self.norm_q(self.q(x_BLD)).unflatten(-1, heads), stream.rope_LK).transpose(1, 2)
        k_BNSK, v_BNSK = self.keys_values(x_BLD, stream)
        if more_kv is not None:
            k_BNSK, v_BNSK = torch.cat([k_BNSK, more_kv[0]], dim=2), torch.cat([v_BNSK, more_kv[1]], dim=2)
        y_BNLK = stream.attention(q_BNLK, k_BNSK, v_BNSK)
        y_BLD: Tensor = self.o(y_BNLK.transpose(1, 2).flatten(2))
        return y_BLD

    def keys_values(self, x_BLD: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Return keys, rotated, and values [B, N, L, K] of the tokens."""
        heads = (-1, self.head_dim)
        k_BLNK = rotate(self.norm_k(self.k(x_BLD)).unflatten(-1, heads), stream.rope_LK)
        return k_BLNK.transpose(1, 2), self.v(x_BLD).unflatten(-1, heads).transpose(1, 2)


class CrossAttention(Projections):
    """Attention to the constant context, whose keys and values are computed once."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.has_clip_tokens:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def project(self, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the text, split into heads."""
        return self._heads(self.norm_k(self.k(text_BSD))), self._heads(self.v(text_BSD))

    def project_clip(self, clip_BVD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the CLIP tokens, split into heads."""
        return self._heads(self.norm_k_img(self.k_img(clip_BVD))), self._heads(self.v_img(clip_BVD))

    def _heads(self, rows_BSD: Tensor) -> Tensor:
        return rows_BSD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        q_BNLK = self._heads(self.norm_q(self.q(x_BLD)))
        k_BNSK, v_BNSK = context.text.of(self, self.project)
        bias_1S = None if context.text_bias_1S is None else context.text_bias_1S.to(q_BNLK.dtype)
        # Plain SDPA, not `stream.attention`: few keys, all of them here even when the tokens are spread over devices.
        y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=bias_1S)
        if context.clip is not None:
            k_BNVK, v_BNVK = context.clip.of(self, self.project_clip)
            y_BNLK = y_BNLK + F.scaled_dot_product_attention(q_BNLK, k_BNVK, v_BNVK)
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
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim).normal_(std=config.dim**-0.5))

    def forward(self, stream: Stream, context: Context, index: int) -> Stream:
        x_BLD, segments = stream.tokens_BLD, stream.segments
        rows = (self.modulation.float() + stream.modulation_BR6D).unbind(2)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows
        # Rounded here, once for all layers that read it: the float32 rows need not live as long as those do.
        dtype = context.text.of(self.cross_attn, self.cross_attn.project)[0].dtype
        n_BLD = modulate(self.norm1(x_BLD), shift_attn, scale_attn, segments).to(dtype)
        more_kv = context.more_kv[index] if context.more_kv else None
        x_BLD = gated_add(x_BLD, self.self_attn(n_BLD, stream, more_kv), gate_attn, segments)
        n_BLD = self.norm3(x_BLD).to(dtype)
        x_BLD = x_BLD + self.cross_attn(n_BLD, context)
        n_BLD = modulate(self.norm2(x_BLD), shift_ffn, scale_ffn, segments).to(dtype)
        x_BLD = gated_add(x_BLD, self.feed_forward(n_BLD, stream), gate_ffn, segments)
        stream = replace(stream, tokens_BLD=x_BLD)
        for adapter, state in context.adapters:
            stream = adapter.after_block(index, stream, context, state)
        return stream

    def feed_forward(self, x_BLD: Tensor, stream: Stream) -> Tensor:
        if stream.ffn_tokens is None:
            y_BLD: Tensor = self.ffn(x_BLD)
            return y_BLD
        return torch.cat([self.ffn(part) for part in x_BLD.split(stream.ffn_tokens, 1)], dim=1)


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
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim).normal_(std=config.dim**-0.5))

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
