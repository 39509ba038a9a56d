"""The causal video autoencoder of Wan 2.1 (4x8x8, z 16).

Owns the encoder, the decoder and how a clip streams through them chunk by chunk: one frame first, then any number of
latent frames at a time with the same numbers. Knows nothing of files, requests or codecs.

Source: Wan-Video/Wan2.2 wan/modules/vae2_1.py (Apache-2.0). Parity: tests/parity/test_wan_vae.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from kinema.errors import RequestError
from kinema.models.wan_vae_layers import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    History,
    ResidualBlock,
    Upsample,
    run,
)

# Source: wan-models facts; Wan-Video/Wan2.2 wan/modules/vae2_1.py and vae2_2.py. (mean, std) per latent channel.
# fmt: off
LATENT_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "2.1": (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
}
# fmt: on


@dataclass(frozen=True)
class WanVAEConfig:
    """Structure of a Wan VAE, read from a file's shapes, and the latent statistics, which the file does not hold.

    latent_mean, latent_std   per latent channel, of the un-normalised mean; None: the official ones of this version.
    """

    version: Literal["2.1", "2.2"] = "2.1"
    dim: int = 96
    dec_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        mean, std = LATENT_STATISTICS[self.version]
        mean, std = tuple(self.latent_mean or mean), tuple(self.latent_std or std)
        if len(mean) != self.z_dim or len(std) != self.z_dim:
            raise RequestError(
                f"latent statistics have {len(mean)} and {len(std)} values for {self.z_dim} latent channels",
                "pass latent_mean and latent_std with one value a channel",
                field="latent_mean",
            )
        object.__setattr__(self, "latent_mean", mean)
        object.__setattr__(self, "latent_std", std)
        object.__setattr__(self, "dec_dim", self.dec_dim or self.dim)


class Encoder(nn.Module):
    """Frames to the 2 * z_dim channels of mean and log-variance, before the last 1x1x1 convolution."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0])
        self.downsamples = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(in_dim, out_dim))
                in_dim = out_dim
            if level < len(config.dim_mult) - 1:
                self.downsamples.append(Downsample(out_dim, config.temporal_downsample[level]))
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.conv1(x, history)
        for block in (*self.downsamples, *self.middle):
            x = block(x, history)
        return run(self.head, x, history)


class Decoder(nn.Module):
    """Latents, after the first 1x1x1 convolution, to frames."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        assert config.dec_dim is not None
        dims = [config.dec_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal = (*reversed(config.temporal_downsample), False)
        self.conv1 = CausalConv3d(config.z_dim, dims[0])
        self.middle = middle(dims[0])
        self.upsamples = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            if level > 0:
                in_dim //= 2  # the upsampling before it halved them
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(in_dim, out_dim))
                in_dim = out_dim
            if level < len(config.dim_mult) - 1:
                self.upsamples.append(Upsample(out_dim, out_dim // 2, temporal[level]))
        self.head = head(dims[-1], 3)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.conv1(x, history)
        for block in (*self.middle, *self.upsamples):
            x = block(x, history)
        return run(self.head, x, history)


def middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def head(dim: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, out_channels))


class WanVAE(nn.Module):
    """Encode clips to normalised latents and back. State-dict keys are the official spelling.

    Computes in the weights' dtype, returns float32. Keeps nothing between calls.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.z_dim = config.z_dim
        self.temporal_stride = 2 ** sum(config.temporal_downsample)
        self.spatial_stride = 2 ** (len(config.dim_mult) - 1)
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def latent_mean(self) -> Tensor:
        """[z, 1, 1, 1] float32, on the device of the weights."""
        return self._per_channel(self.config.latent_mean)

    @property
    def latent_std(self) -> Tensor:
        """[z, 1, 1, 1] float32, on the device of the weights."""
        return self._per_channel(self.config.latent_std)

    def normalise(self, mean_BCFhw: Tensor) -> Tensor:
        return (mean_BCFhw - self.latent_mean) / self.latent_std

    def denormalise(self, latents_BCFhw: Tensor) -> Tensor:
        return latents_BCFhw * self.latent_std + self.latent_mean

    def encode(self, video_BCTHW: Tensor, chunk: int = 1) -> Tensor:
        """Return normalised mean latents_BCFhw, F = (T - 1) / 4 + 1, of a clip in [-1, 1].

        chunk   latent frames at a time after the first; the numbers do not depend on it, time and memory do.
        """
        return torch.cat(list(self.encode_chunks(video_BCTHW, chunk)), dim=2)

    def decode(self, latents_BCFhw: Tensor, chunk: int = 1) -> Tensor:
        """Return video_BCTHW, about [-1, 1] and not clamped, T = 4 (F - 1) + 1, of normalised latents."""
        return torch.cat(list(self.decode_chunks(latents_BCFhw, chunk)), dim=2)

    def encode_chunks(self, video_BCTHW: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Yield normalised latents_BCFhw: one latent frame, then `chunk` at a time."""
        for mean, _ in self._moments(video_BCTHW, chunk):
            yield self.normalise(mean)

    def decode_chunks(self, latents_BCFhw: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Yield video_BCTHW in order: one frame, then 4 * chunk at a time. Memory does not grow with the clip."""
        history = History()
        for start, stop in pieces(latents_BCFhw.shape[2], 1, chunk):
            history.last = stop == latents_BCFhw.shape[2]
            yield self._decode(latents_BCFhw[:, :, start:stop], history)

    def moments(self, video_BCTHW: Tensor, chunk: int = 1) -> tuple[Tensor, Tensor]:
        """Return (mean_BCFhw, log_variance_BCFhw) of the posterior, not normalised: what training needs."""
        means, log_variances = zip(*self._moments(video_BCTHW, chunk), strict=True)
        return torch.cat(means, dim=2), torch.cat(log_variances, dim=2)

    def _moments(self, video_BCTHW: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        check_clip(video_BCTHW, self.temporal_stride, self.spatial_stride)
        history = History()
        for start, stop in pieces(video_BCTHW.shape[2], self.temporal_stride, chunk):
            history.last = stop == video_BCTHW.shape[2]
            x = self._enter(video_BCTHW[:, :, start:stop])
            mean, log_variance = self.conv1(self.encoder(x, history)).float().chunk(2, dim=1)
            yield mean, log_variance

    def _decode(self, latents_BCFhw: Tensor, history: History) -> Tensor:
        z = self._enter(self.denormalise(latents_BCFhw.float()))
        video: Tensor = self.decoder(self.conv2(z), history)
        return video.float()

    def _enter(self, x: Tensor) -> Tensor:
        """Bring x to the dtype of the weights and the layout all layers keep (frames fold into the batch as a view)."""
        return x.to(self.conv2.weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _per_channel(self, values: tuple[float, ...] | None) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.conv2.weight.device).view(-1, 1, 1, 1)


def pieces(frames: int, stride: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the first frame, then of `stride * chunk` frames at a time."""
    if chunk < 1:
        raise RequestError(f"chunk {chunk} is not a positive number of latent frames", "pass 1 or more", field="chunk")
    yield 0, 1
    for start in range(1, frames, stride * chunk):
        yield start, min(start + stride * chunk, frames)


def check_clip(video_BCTHW: Tensor, temporal_stride: int, spatial_stride: int) -> None:
    """Raise RequestError for a clip that does not divide; a partial last chunk would be lost."""
    frames, height, width = video_BCTHW.shape[2:]
    if frames % temporal_stride != 1:
        below = max(frames - 1, 0) // temporal_stride * temporal_stride + 1
        raise RequestError(
            f"{frames} frames is not {temporal_stride}n+1; nearest are {below} and {below + temporal_stride}",
            "cut or extend the clip",
            field="frames",
            got=frames,
            allowed=[below, below + temporal_stride],
        )
    if height % spatial_stride or width % spatial_stride:
        raise RequestError(
            f"{width}x{height} does not divide by {spatial_stride}",
            f"resize the clip to multiples of {spatial_stride}",
            field="size",
            got=[width, height],
        )
