"""The causal video autoencoders of Wan 2.1 (4x8x8 pixels a latent cell, z 16) and 2.2 (4x16x16, z 48).

Owns the encoder, the decoder and how a clip streams through them chunk by chunk: one frame first, then any number of
latent frames at a time with the same numbers. Knows nothing of files, requests or codecs.

Source: Wan-Video/Wan2.2 wan/modules/vae2_1.py, vae2_2.py (Apache-2.0). Parity: tests/parity/test_wan_vae.py.
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
    DownLevel,
    Downsample,
    History,
    ResidualBlock,
    UpLevel,
    Upsample,
    patchify,
    run,
    unpatchify,
)
from kinema.models.wan_vae_tiles import Tile, pixel_tiles, run_tiles

# Source: wan-models facts; Wan-Video/Wan2.2 wan/modules/vae2_1.py and vae2_2.py. (mean, std) per latent channel.
# fmt: off
LATENT_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "2.1": (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
    "2.2": (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
         -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
         -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
         -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
         0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}
# fmt: on


@dataclass(frozen=True)
class WanVAEConfig:
    """Structure of a Wan VAE, read from a file's shapes, and the latent statistics, which the file does not hold.

    dec_dim                   the decoder's own base width; None: dim.
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

    @property
    def patch(self) -> int:
        """Edge in pixels of the squares that enter as channels."""
        return 1 if self.version == "2.1" else 2

    @property
    def pixel_channels(self) -> int:
        return 3 * self.patch**2


class Encoder(nn.Module):
    """Frames to the 2 * z_dim channels of mean and log-variance, before the last 1x1x1 convolution."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        temporal = (*config.temporal_downsample, False)
        self.conv1 = CausalConv3d(config.pixel_channels, dims[0])
        self.downsamples = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            shrinks = level < len(config.dim_mult) - 1
            layers = residual_blocks(in_dim, out_dim, config.num_res_blocks)
            if shrinks:
                layers.append(Downsample(out_dim, temporal[level]))
            if config.version == "2.1":
                self.downsamples.extend(layers)
            else:
                self.downsamples.append(DownLevel(layers, out_dim, 1 + temporal[level], 1 + shrinks))
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
        dim = config.dec_dim or config.dim
        dims = [dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal = (*reversed(config.temporal_downsample), False)
        halves = config.version == "2.1"  # whether upsampling halves the channels
        self.conv1 = CausalConv3d(config.z_dim, dims[0])
        self.middle = middle(dims[0])
        self.upsamples = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            grows = level < len(config.dim_mult) - 1
            layers = residual_blocks(in_dim // 2 if halves and level else in_dim, out_dim, config.num_res_blocks + 1)
            if grows:
                layers.append(Upsample(out_dim, out_dim // 2 if halves else out_dim, temporal[level]))
            if config.version == "2.1":
                self.upsamples.extend(layers)
            else:
                self.upsamples.append(UpLevel(layers, out_dim, 1 + temporal[level], 1 + grows))
        self.head = head(dims[-1], config.pixel_channels)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.conv1(x, history)
        for block in (*self.middle, *self.upsamples):
            x = block(x, history)
        return run(self.head, x, history)


def residual_blocks(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(count)]


def middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def head(dim: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, out_channels))


class WanVAE(nn.Module):
    """Encode clips to normalised latents and back. State-dict keys are the official spelling.

    Computes in the weights' dtype, returns float32. Keeps nothing between calls.

    history_on_host   what the causal convolutions remember of a clip waits in host memory, not on the device.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.z_dim = config.z_dim
        self.history_on_host = False
        self.temporal_stride = 2 ** sum(config.temporal_downsample)
        self.spatial_stride = config.patch * 2 ** (len(config.dim_mult) - 1)
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def normalise(self, mean_BCFhw: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (mean_BCFhw - mean) / std

    def denormalise(self, latents_BCFhw: Tensor) -> Tensor:
        mean, std = self._statistics()
        return latents_BCFhw * std + mean

    def encode(self, video_BCTHW: Tensor, chunk: int = 1, tile: int | None = None) -> Tensor:
        """Return normalised mean latents_BCFhw, F = (T - 1) / 4 + 1, of a clip in [-1, 1].

        chunk   latent frames at a time after the first; the numbers do not depend on it, time and memory do.
        tile    as in `decode_chunks`.
        Raises RequestError where T is not 4n + 1 or a side does not divide by the spatial stride.
        """
        return torch.cat(list(self.encode_chunks(video_BCTHW, chunk, tile)), dim=2)

    def decode(self, latents_BCFhw: Tensor, chunk: int = 1, tile: int | None = None) -> Tensor:
        """Return video_BCTHW, about [-1, 1] and not clamped, T = 4 (F - 1) + 1, of normalised latents."""
        return torch.cat(list(self.decode_chunks(latents_BCFhw, chunk, tile)), dim=2)

    def moments(self, video_BCTHW: Tensor, chunk: int = 1) -> tuple[Tensor, Tensor]:
        """Return (mean_BCFhw, log_variance_BCFhw) of the posterior, not normalised: what training needs."""
        means, log_variances = zip(*self._moments(video_BCTHW, chunk, None), strict=True)
        return torch.cat(means, dim=2), torch.cat(log_variances, dim=2)

    def encode_chunks(self, video_BCTHW: Tensor, chunk: int = 1, tile: int | None = None) -> Iterator[Tensor]:
        """Yield normalised latents_BCFhw in order: one latent frame, then `chunk` at a time."""
        for mean, _ in self._moments(video_BCTHW, chunk, tile):
            yield self.normalise(mean)

    def decode_chunks(self, latents_BCFhw: Tensor, chunk: int = 1, tile: int | None = None) -> Iterator[Tensor]:
        """Yield video_BCTHW in order, not clamped: one frame, then 4 * chunk at a time.

        Memory does not grow with the number of frames.
        tile    longest tile edge in pixels, for frames too large to decode whole: tiles overlap by a quarter and are
                blended linearly, which changes the picture a little; each has its own history, kept in host memory
                while others run. None, or a tile no smaller than the frame: whole frames.
        """
        tiles = self._tiles(latents_BCFhw.shape[3], latents_BCFhw.shape[4], tile)
        for start, stop, last in pieces(latents_BCFhw.shape[2], 1, chunk):
            yield run_tiles(self._decode, latents_BCFhw[:, :, start:stop], tiles, 1, self.spatial_stride, last)

    def _moments(self, video_BCTHW: Tensor, chunk: int, tile: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        stride = self.spatial_stride
        check_clip(video_BCTHW, self.temporal_stride, stride)
        tiles = self._tiles(video_BCTHW.shape[3] // stride, video_BCTHW.shape[4] // stride, tile)
        for start, stop, last in pieces(video_BCTHW.shape[2], self.temporal_stride, chunk):
            moments = run_tiles(self._encode, video_BCTHW[:, :, start:stop], tiles, stride, 1, last)
            mean, log_variance = moments.chunk(2, dim=1)
            yield mean, log_variance

    def _encode(self, video_BCTHW: Tensor, history: History) -> Tensor:
        x = self._enter(patchify(video_BCTHW, self.config.patch))
        moments: Tensor = self.conv1(self.encoder(x, history))
        return moments.float()

    def _decode(self, latents_BCFhw: Tensor, history: History) -> Tensor:
        z = self._enter(self.denormalise(latents_BCFhw.float()))
        return unpatchify(self.decoder(self.conv2(z), history), self.config.patch).float()

    def _tiles(self, height: int, width: int, tile: int | None) -> list[Tile]:
        tiles = pixel_tiles(height, width, tile, self.spatial_stride)
        for one in tiles:
            one.history.on_host = self.history_on_host
        return tiles

    def _enter(self, x: Tensor) -> Tensor:
        """Bring x to the dtype of the weights and the layout all layers keep (frames fold into the batch as a view)."""
        return x.to(self.conv2.weight).contiguous(memory_format=torch.channels_last_3d)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel, [z, 1, 1, 1] float32, on the device of the weights."""
        both = (self.config.latent_mean, self.config.latent_std)
        statistics = torch.tensor(both, dtype=torch.float32, device=self.conv2.weight.device)
        mean, std = statistics.view(2, -1, 1, 1, 1).unbind()
        return mean, std


def pieces(frames: int, stride: int, chunk: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, whether last) of the first frame, then of `stride * chunk` frames at a time."""
    if chunk < 1:
        raise RequestError(f"chunk {chunk} is not a positive number of latent frames", "pass 1 or more", field="chunk")
    yield 0, 1, frames == 1
    for start in range(1, frames, stride * chunk):
        stop = min(start + stride * chunk, frames)
        yield start, stop, stop == frames


def check_clip(video_BCTHW: Tensor, temporal_stride: int, spatial_stride: int) -> None:
    """Raise RequestError for a clip that does not divide; a partial last chunk would be lost."""
    frames, height, width = video_BCTHW.shape[2:]
    if frames < 1 or (frames - 1) % temporal_stride:
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
