"""The Wan DiT: one class for Wan 2.1 and 2.2 and every variant of them, whatever adapters they carry.

Parameter names are the official checkpoint's. Owns the forward pass and its float32 islands; knows nothing of files,
devices, schedules, guidance or offloading: those swap a leaf Linear, `attention` or `run_blocks`.

Source of the architecture: Wan-Video/Wan2.2 and Wan-Video/Wan2.1 wan/modules/model.py (Apache-2.0).
Parity: tests/parity/test_wan_dit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.adapters.animate import Animate
from kinema.models.adapters.camera import Camera
from kinema.models.adapters.motion import blur_kernel
from kinema.models.adapters.reference import Reference
from kinema.models.adapters.speech import Speech
from kinema.models.adapters.vace import Vace
from kinema.models.layers import Attention, Linear, RunBlocks, finest, map_once, rope_at, run_in_order, sdpa, sinusoid
from kinema.models.wan_blocks import Block, ClipEmbedding, Context, Head, KVCache, Stream, pad_texts
from kinema.models.wan_config import ADAPTER_CONFIGS, PATCH, WanConfig
from kinema.tensors import Conditions

__all__ = ["Block", "Context", "Head", "Stream", "WanConfig", "WanDiT", "constant", "pad_texts", "stays_float32"]

ADAPTERS: dict[str, Callable[[WanConfig], Adapter]] = {
    "vace": Vace,
    "camera": Camera,
    "reference": Reference,
    "animate": Animate,
    "speech": Speech,
}
"""What each field of WanConfig in ADAPTER_CONFIGS adds; in this order they change the stream."""

FLOAT32_PARTS = (
    "patch_embedding.",
    "vace_patch_embedding.",
    "ref_conv.",
    "pose_patch_embedding.",
    "motion_encoder.",
    "face_encoder.",
    "cond_encoder.",
    "trainable_cond_mask.",
    "casual_audio_encoder.",
    "frame_packer.",
    "time_embedding.",
    "time_projection.",
    "head.",
)
"""Prefixes of the keys that stay float32 whatever the compute dtype; see also `stays_float32`."""


def stays_float32(key: str) -> bool:
    """Whether the parameter `key` stays float32 in fast mode: all but the matrices of blocks, text and CLIP MLPs."""
    name = key.rsplit(".", 2)
    return key.startswith(FLOAT32_PARTS) or name[-1] in ("modulation", "emb_pos") or "norm" in name[-2]


def constant(key: str) -> Tensor | None:
    """Return the value of a tensor that never varies, so that a file may leave it out; None for all others."""
    return blur_kernel() if key.startswith("motion_encoder.") and key.endswith(".kernel") else None


class WanDiT(nn.Module):
    """Velocity of Wan latents under text, and whatever else `Conditions` may hold and the configuration names.

    attention    self-attention core, read at every forward: see `layers.Attention`.
    run_blocks   has the weights of each block at hand while it is used: see `layers.RunBlocks`.
    ffn_tokens   how many tokens pass a feed-forward at once, where memory is short; None: all.

    Forward and `prepare` may be differentiated; nothing is kept on the model between calls, on a context only the keys
    and values of its rows.
    """

    attention: Attention
    run_blocks: RunBlocks

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.attention = sdpa
        self.run_blocks = run_in_order
        self.ffn_tokens: int | None = None
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.has_clip_tokens:
            self.img_emb = ClipEmbedding(config)
        self.adapters = tuple(make(config) for name, make in ADAPTERS.items() if getattr(config, name) is not None)
        for adapter in self.adapters:
            assert not any(True for _ in adapter.parameters(recurse=False)), f"{type(adapter)} has tensors of its own"
            for name, child in adapter.named_children():
                self.add_module(name, child)

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
        """Return the constant context: text and CLIP tokens embedded, adapter states. No block is run for it.

        Raises ValueError for a text that is too long, and for CLIP tokens or adapter inputs given or missing wrongly.
        """
        (context,) = self.prepare_branches((conditions,))
        return context

    def prepare_branches(self, branches: Sequence[Conditions]) -> list[Context]:
        """Return what `prepare` returns of each guidance branch.

        What branches are told by the same objects is prepared once, and their contexts share it.

        Texts are padded with zeros to `text_len` rows before `text_embedding`, and all rows are attended: the weights
        were trained so.
        """
        for conditions in branches:
            self._check(conditions)
        texts = [pad_texts(conditions.text, self.config.text_len) for conditions in branches]
        clips = map_once(self._clip, [conditions.clip_BVD for conditions in branches])
        states = [(adapter, self._states(adapter, branches)) for adapter in self.adapters]
        return [
            Context(
                KVCache(self.text_embedding(text_BSD)),
                clip,
                bias_1S,
                conditions.concat_BCFhw,
                clean_frames=0 if conditions.clean_BCFhw is None else conditions.clean_BCFhw.shape[2],
                positions=conditions.positions,
                adapters=tuple((adapter, made[index]) for adapter, made in states if made[index] is not None),
                motion_B6D=conditions.motion_B6D,
            )
            for index, (conditions, (text_BSD, bias_1S), clip) in enumerate(zip(branches, texts, clips, strict=True))
        ]

    def _check(self, conditions: Conditions) -> None:
        config = self.config
        for name in ADAPTER_CONFIGS:
            if getattr(conditions, name) is not None and getattr(config, name) is None:
                raise ValueError(f"this DiT takes no {name} conditions")
        if config.speech is not None and conditions.speech is None:
            raise ValueError("this DiT needs speech conditions: sound and a reference image")
        if config.has_clip_tokens != (conditions.clip_BVD is not None):
            raise ValueError(f"this DiT {'needs' if config.has_clip_tokens else 'takes no'} CLIP tokens")

    def _clip(self, clip_BVD: Tensor | None) -> KVCache | None:
        return None if clip_BVD is None else KVCache(self.img_emb(clip_BVD))

    def _states(self, adapter: Adapter, branches: Sequence[Conditions]) -> list[Any]:
        """What the adapter prepared of each branch, None of those that do not ask for it."""
        told = [getattr(conditions, adapter.field) for conditions in branches]
        asking = [index for index, given in enumerate(told) if given is not None]
        made = adapter.prepare(self, [told[i] for i in asking]) if asking else ()
        states = dict(zip(asking, made, strict=True))
        return [states.get(index) for index in range(len(branches))]

    def embed(self, x_BCFhw: Tensor, timesteps_BR: Tensor, segments: tuple[int, ...], context: Context) -> Stream:
        """Return latents as tokens, with the modulation rows of their timesteps.

        x_BCFhw        noisy latents; h and w even.
        timesteps_BR   in [0, 1000], one for each segment.
        segments       of the video's tokens, how many see each timestep, in order.
        """
        if context.concat_BCFhw is not None:
            x_BCFhw = torch.cat([x_BCFhw, context.concat_BCFhw.to(x_BCFhw.dtype)], dim=1)
        if x_BCFhw.shape[1] != self.config.in_channels or x_BCFhw.shape[3] % PATCH[1] or x_BCFhw.shape[4] % PATCH[2]:
            wanted = f"{self.config.in_channels} channels and even height and width"
            raise ValueError(f"latents {list(x_BCFhw.shape)}, conditions included, are not of {wanted}")
        if len(context.text.rows) != len(x_BCFhw):
            raise ValueError(f"{len(x_BCFhw)} latents but conditions for {len(context.text.rows)}")
        tokens = self.patch_embedding(x_BCFhw.to(self.patch_embedding.weight.dtype))
        grid = (tokens.shape[2], tokens.shape[3], tokens.shape[4])
        time_BRD = self.time_embedding(sinusoid(timesteps_BR, self.config.freq_dim)).float()
        modulation_BR6D = self.time_projection(time_BRD).float().unflatten(-1, (6, self.config.dim))
        if context.motion_B6D is not None:
            modulation_BR6D = modulation_BR6D + context.motion_B6D[:, None]
        places = range(grid[0]) if context.positions is None else context.positions
        if len(places) != grid[0]:
            raise ValueError(f"{len(places)} positions for {grid[0]} latent frames")
        positions = (places, range(grid[1]), range(grid[2]))
        stream = Stream(
            tokens_BLD=tokens.flatten(2).transpose(1, 2).float(),
            time_BRD=time_BRD,
            modulation_BR6D=modulation_BR6D,
            segments=segments,
            rope_LK=rope_at(positions, self.config.head_dim, dtype=self._rope_dtype(context), device=tokens.device),
            grid=grid,
            attention=self.attention,
            ffn_tokens=self.ffn_tokens,
        )
        for adapter, state in context.adapters:
            stream = adapter.embed(self, stream, state)
        return stream

    @staticmethod
    def _rope_dtype(context: Context) -> torch.dtype:
        # Rounding queries to bfloat16 loses 2 ** -9; a float32 rotation, 2 ** -24, then costs nothing.
        rows = context.text.rows
        return (finest(rows.device) if rows.dtype == torch.float32 else torch.float32).to_complex()

    def unembed(self, stream: Stream) -> Tensor:
        """Return the velocity_BCFhw, float32, of the video's tokens."""
        frames, rows, columns = stream.grid
        # Columns of the head are ordered (frame, row, column, channel) within a patch.
        patches = self.head(stream.video()).view(-1, frames, rows, columns, *PATCH, self.config.out_channels)
        velocity: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return velocity.flatten(6, 7).flatten(4, 5).flatten(2, 3).float()

    def forward(self, x_BCFhw: Tensor, timesteps_B: Tensor, *contexts: Context) -> Tensor:
        """Return velocity_BCFhw, float32: noise minus clean latents; of several contexts one after the other, in B.

        x_BCFhw       noisy latents, their first `context.clean_frames` frames already overwritten by the clean ones.
        timesteps_B   in [0, 1000].
        contexts      of several guidance branches, all of which pass a block before the next one's turn: where weights
                      have to be brought, they are brought once.
        """
        streams = [self._enter(x_BCFhw, timesteps_B, context) for context in contexts]
        self.through_blocks(streams, contexts)
        return torch.cat([self.unembed(stream) for stream in streams])

    def through_blocks(self, streams: list[Stream], contexts: Sequence[Context]) -> None:
        """Take every stream through all blocks, each under its own context: each is replaced by what becomes of it."""

        def step(block: nn.Module, index: int, streams: list[Stream]) -> list[Stream]:
            for branch, context in enumerate(contexts):
                # In place, so that no branch's tokens of before live on beside the next branch's.
                streams[branch] = block(streams[branch], context, index)
            return streams

        self.run_blocks(self.blocks, step, streams)

    def _enter(self, x_BCFhw: Tensor, timesteps_B: Tensor, context: Context) -> Stream:
        _, _, frames, height, width = x_BCFhw.shape
        per_frame = (height // PATCH[1]) * (width // PATCH[2])
        clean, noisy = context.clean_frames * per_frame, (frames - context.clean_frames) * per_frame
        timesteps_BR = timesteps_B[:, None]
        segments: tuple[int, ...] = (noisy,)
        if clean:
            timesteps_BR = torch.cat([torch.zeros_like(timesteps_BR), timesteps_BR], dim=1)
            segments = (clean, noisy)
        return self.embed(x_BCFhw, timesteps_BR, segments, context)

    def block_groups(self) -> list[list[nn.Module]]:
        """Return each block with the modules of adapters that run with it: what moves its weights moves theirs."""
        return [
            [block, *(module for adapter in self.adapters for module in adapter.companions(index))]
            for index, block in enumerate(self.blocks)
        ]
