"""S2V: sound drives the video's tokens; a reference image, the motion before the clip and a pose video condition it.

Tokens are [video | reference | motion], each with its own learned mark; those behind the video's see t = 0 and stand at
times of their own in the rotary positions. After certain blocks each latent frame attends to the sound of its time.

Source: Wan-Video/Wan2.2 wan/modules/s2v (Apache-2.0). Parity: tests/parity/test_wan_speech.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.layers import CausalConv, LayerNorm, Linear, finest, map_once, rope_at, sinusoid
from kinema.models.wan_blocks import Context, CrossAttention, KVCache, Stream
from kinema.models.wan_config import PATCH, SpeechConfig, WanConfig
from kinema.tensors import SpeechConditions

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT

REFERENCE_TIME = 30
"""Latent frame at which the reference stands in the rotary positions, whatever the length of the video."""

BUCKETS = (1, 2, 16)
"""Latent frames of motion that are packed finely, coarser and coarsest, from the nearest to the farthest."""

VIDEO, REFERENCE, MOTION = 0, 1, 2  # rows of trainable_cond_mask


# --- sound -----------------------------------------------------------------------------------------


class AudioTokens(nn.Module):
    """Sound at the rate of frames to tokens at the rate of latent frames, a quarter of it.

    Several local tokens a latent frame, the branches of one convolution, then a constant one; and one global token.
    Source: wan/modules/s2v/auxi_blocks.py MotionEncoder_tc.
    """

    def __init__(self, dim: int, config: SpeechConfig, eps: float) -> None:
        super().__init__()
        quarter, half = dim // 4, dim // 2
        self.num_tokens = config.num_tokens
        self.conv1_local = CausalConv(config.audio_dim, quarter * config.num_tokens)
        self.conv1_global = CausalConv(config.audio_dim, quarter)
        self.conv2 = CausalConv(quarter, half, stride=2)
        self.conv3 = CausalConv(half, dim, stride=2)
        self.norms = tuple(LayerNorm(width, eps, elementwise_affine=False) for width in (quarter, half, dim))
        self.final_linear = Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, sound_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Return (local_BFND, global_BFD); F = ceil(T / 4), N = num_tokens + 1."""
        parts = self.conv1_local(sound_BTC).unflatten(-1, (self.num_tokens, -1))
        local = self._shrink(parts.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(sound_BTC), -1)).transpose(1, 2)
        constant = self.padding_tokens.expand(*local.shape[:2], -1, -1)
        return torch.cat([local, constant], dim=2), self.final_linear(self._shrink(self.conv1_global(sound_BTC)))

    def _shrink(self, x_BTC: Tensor) -> Tensor:
        """The two strided convolutions, which local branches and the global one share."""
        x_BTC = F.silu(self.norms[0](x_BTC))
        x_BTC = F.silu(self.norms[1](self.conv2(x_BTC)))
        return F.silu(self.norms[2](self.conv3(x_BTC)))


class AudioEncoder(nn.Module):
    """All hidden states of a speech encoder, weighed, to tokens. Named `casual_audio_encoder` in the files."""

    def __init__(self, dim: int, config: SpeechConfig, eps: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, config.audio_layers, 1, 1), 0.01))
        self.encoder = AudioTokens(dim, config, eps)

    def forward(self, audio_BLDT: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.silu(self.weights)
        sound_BDT = (audio_BLDT * weights).sum(1) / weights.sum(1)
        tokens: tuple[Tensor, Tensor] = self.encoder(sound_BDT.transpose(1, 2))
        return tokens


class SoundScale(nn.Module):
    """The global token to the shift and scale of normed video tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, global_BFD: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.linear(F.silu(global_BFD)).float().flatten(0, 1)[:, None].chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """After some blocks: norm scaled by the global token, then attention to the local tokens of the same time."""

    def __init__(self, config: WanConfig, count: int) -> None:
        super().__init__()
        plain = replace(config, has_clip_tokens=False)
        self.injector = nn.ModuleList(CrossAttention(plain) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(SoundScale(config.dim) for _ in range(count))
        self.norm = LayerNorm(config.dim, 1e-5, elementwise_affine=False)  # torch's eps, unlike all other norms


# --- motion ----------------------------------------------------------------------------------------


class FramePacker(nn.Module):
    """The 19 latent frames before a clip as tokens: the nearer, the finer.

    Source: wan/modules/s2v/motioner.py FramePackMotioner.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (
            nn.Conv3d(channels, dim, kernel_size=patch, stride=patch) for patch in (PATCH, (2, 4, 4), (4, 8, 8))
        )

    def forward(self, motion_BCFhw: Tensor) -> Tensor:
        """Return tokens_BLD, nearest first. Fewer frames than the buckets hold are taken as zeros before them."""
        wanted = sum(BUCKETS)
        missing = max(0, wanted - motion_BCFhw.shape[2])
        padded = F.pad(motion_BCFhw[:, :, -wanted:], (0, 0, 0, 0, missing, 0)).to(self.proj.weight.dtype)
        far, middle, near = padded.split(BUCKETS[::-1], dim=2)
        packed = (self.proj(near), self.proj_2x(middle), self.proj_4x(far))
        return torch.cat([tokens.flatten(2).transpose(1, 2) for tokens in packed], dim=1).float()


def motion_positions(rows: int, columns: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return times, rows and columns of the tokens of each bucket, in a token grid of `rows` x `columns`.

    Times are negative, 0 being the clip's first latent frame. Coarse tokens stand at whole positions spread over the
    full grid, from its first to its last, rounded down: so the weights were trained.
    """
    places = []
    for index, (bucket, coarse) in enumerate(zip(BUCKETS, (1, 2, 4), strict=True)):
        farthest = sum(BUCKETS[: index + 1])
        times = _spread(farthest, farthest - bucket + 1, bucket // coarse)
        places.append(
            (
                [-time for time in times],
                _spread(0, rows - 1, rows // coarse),
                _spread(0, columns - 1, columns // coarse),
            )
        )
    return places


def _spread(first: int, last: int, count: int) -> list[int]:
    # numpy's rounding decides which of two neighbours is meant where the quotient is whole but for the last bit.
    values: list[int] = np.linspace(first, last, count).astype(int).tolist()
    return values


# --- the adapter -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeechState:
    """What stays constant over the steps of one clip and branch.

    audio          the sound, a context of its own with a batch entry a latent frame.
    scales         of each injector, shift and scale [B F, 1, D].
    pose_BLD       what is added to the video's tokens: of the pose video, or one row for all without one.
    extra_BLD      tokens of reference and motion, marked.
    rope_LK        their positions.
    time_BRD, modulation_BR6D   the rows of t = 0, which they see.
    """

    audio: Context
    scales: tuple[tuple[Tensor, Tensor], ...]
    pose_BLD: Tensor
    extra_BLD: Tensor
    rope_LK: Tensor
    time_BRD: Tensor
    modulation_BR6D: Tensor


class Speech(Adapter):
    field = "speech"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.speech is not None
        speech, dim = config.speech, config.dim
        self.places = {block: number for number, block in enumerate(speech.layers)}
        self.cond_encoder = nn.Conv3d(speech.pose_channels, dim, kernel_size=PATCH, stride=PATCH)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.casual_audio_encoder = AudioEncoder(dim, speech, config.eps)
        self.audio_injector = AudioInjector(config, len(speech.layers))
        self.frame_packer = FramePacker(config.out_channels, dim)

    def prepare(self, model: WanDiT, told: Sequence[SpeechConditions]) -> list[SpeechState]:
        sounds = map_once(self._sound, told)
        poses = map_once(self._pose, [given.pose_BCFhw for given in told])
        before = [given.motion_BCFhw for given in told]
        extras = map_once(partial(self._extra, model), [given.reference_BCFhw for given in told], before)
        time_BRD = model.time_embedding(sinusoid(poses[0].new_zeros(1, 1), model.config.freq_dim)).float()
        modulation_BR6D = model.time_projection(time_BRD).float().unflatten(-1, (6, model.config.dim))
        return [
            SpeechState(Context(audio), scales, pose_BLD, *extra, time_BRD, modulation_BR6D)
            for (audio, scales), pose_BLD, extra in zip(sounds, poses, extras, strict=True)
        ]

    def _pose(self, pose_BCFhw: Tensor | None) -> Tensor:
        """Rows for the video's tokens. Latents of zeros stand for no pose: of those the convolution leaves its bias."""
        if pose_BCFhw is None:
            pose_BCFhw = self.cond_encoder.weight.new_zeros(1, self.cond_encoder.in_channels, *PATCH)
        return _tokens(self.cond_encoder, pose_BCFhw) + self.trainable_cond_mask.weight.float()[VIDEO]

    def _extra(self, model: WanDiT, reference_BCFhw: Tensor, motion_BCFhw: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens of reference and motion, and their positions."""
        marks = self.trainable_cond_mask.weight.float()
        extra = [_tokens(model.patch_embedding, reference_BCFhw) + marks[REFERENCE]]
        if motion_BCFhw is not None:
            extra.append(self.frame_packer(motion_BCFhw) + marks[MOTION])
        return torch.cat(extra, dim=1), self._rope(model, reference_BCFhw, motion_BCFhw is not None)

    def embed(self, model: WanDiT, stream: Stream, state: SpeechState) -> Stream:
        batch, extra = len(stream.tokens_BLD), state.extra_BLD.shape[1]
        frames, _, _ = stream.grid
        if state.scales[0][0].shape[0] != batch * frames:
            raise ValueError(f"sound for {state.scales[0][0].shape[0] // batch} latent frames, the clip has {frames}")
        return replace(
            stream,
            tokens_BLD=torch.cat([stream.tokens_BLD + state.pose_BLD, state.extra_BLD], dim=1),
            time_BRD=torch.cat([stream.time_BRD, state.time_BRD.expand(batch, -1, -1)], dim=1),
            modulation_BR6D=torch.cat([stream.modulation_BR6D, state.modulation_BR6D.expand(batch, -1, -1, -1)], dim=1),
            segments=(*stream.segments, extra),
            rope_LK=torch.cat([stream.rope_LK, state.rope_LK.to(stream.rope_LK.dtype)]),
        )

    def after_block(self, index: int, stream: Stream, context: Context, state: SpeechState) -> Stream:
        place = self.places.get(index)
        if place is None:
            return stream
        frames, rows, columns = stream.grid
        stop = stream.front + frames * rows * columns
        before, video, behind = stream.tokens_BLD.tensor_split((stream.front, stop), dim=1)
        x_XLD = video.reshape(-1, rows * columns, video.shape[2])  # X: batch entries times latent frames
        shift, scale = state.scales[place]
        normed = torch.addcmul(shift, self.audio_injector.norm(x_XLD), 1 + scale)
        x_XLD = x_XLD + self.audio_injector.injector[place](normed, state.audio)
        return replace(stream, tokens_BLD=torch.cat([before, x_XLD.view_as(video), behind], dim=1))

    def companions(self, index: int) -> Iterable[nn.Module]:
        place = self.places.get(index)
        return () if place is None else (self.audio_injector.injector[place],)

    def _sound(self, given: SpeechConditions) -> tuple[KVCache, tuple[tuple[Tensor, Tensor], ...]]:
        """What injectors attend to, and the scales of each. The clip's first sound stands for all before it."""
        audio_BLDT = given.audio_BLDT.float()
        history = 4 * given.history_frames - 3
        before = audio_BLDT[..., :1].expand(-1, -1, -1, history)
        local_BFND, global_BFD = self.casual_audio_encoder(torch.cat([before, audio_BLDT], dim=-1))
        local_XND = local_BFND[:, given.history_frames :].flatten(0, 1)
        global_BFD = global_BFD[:, given.history_frames :]
        return KVCache(local_XND), tuple(scale(global_BFD) for scale in self.audio_injector.injector_adain_layers)

    @staticmethod
    def _rope(model: WanDiT, reference_BCFhw: Tensor, motion: bool) -> Tensor:
        rows, columns = reference_BCFhw.shape[3] // PATCH[1], reference_BCFhw.shape[4] // PATCH[2]
        places: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
            ([REFERENCE_TIME], range(rows), range(columns))
        ]
        if motion:
            places += motion_positions(rows, columns)
        device = reference_BCFhw.device
        dtype = finest(device).to_complex()
        return torch.cat([rope_at(place, model.config.head_dim, dtype=dtype, device=device) for place in places])


def _tokens(conv: nn.Conv3d, latents_BCFhw: Tensor) -> Tensor:
    tokens: Tensor = conv(latents_BCFhw.to(conv.weight.dtype))
    return tokens.flatten(2).transpose(1, 2).float()
