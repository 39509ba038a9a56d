"""The image autoencoder of FLUX.1: 8x8 pixels a latent cell, 16 channels.

Speaks the language of the video VAEs: clips of one frame, normalised latents. Parameter names are those of
ae.safetensors. Knows nothing of files, requests or codecs.

Source: black-forest-labs/flux src/flux/modules/autoencoder.py (Apache-2.0). Parity: tests/parity/test_flux.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.wan_vae_layers import History
from kinema.models.wan_vae_tiles import pixel_tiles, run_tiles

STRIDE = 8
"""Pixels of a latent cell, each way."""

NUM_GROUPS = 32
EPS = 1e-6


@dataclass(frozen=True)
class FluxVAEConfig:
    """Structure of a FLUX autoencoder, read from shapes; the latent statistics are no tensor of the file.

    latents = scale * (mean - shift).
    """

    dim: int = 128
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    scale: float = 0.3611
    shift: float = 0.1159


def _norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, dim, EPS)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = _norm(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        if in_dim != out_dim:
            self.nin_shortcut = nn.Conv2d(in_dim, out_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_BCHW)))
        y = self.conv2(F.silu(self.norm2(y)))
        skip: Tensor = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        return skip + y


class AttentionBlock(nn.Module):
    """Attention of all cells to all, in one head as wide as the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _norm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.norm(x_BCHW)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x_BCHW.shape)
        out: Tensor = x_BCHW + self.proj_out(y)
        return out


class Resample(nn.Module):
    """One 3x3 convolution that halves (stride 2) or, after repeating pixels, doubles the edge."""

    def __init__(self, dim: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(dim, dim, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Zeros on the right and below only: the official asymmetry.
        x = F.pad(x_BCHW, (0, 1, 0, 1)) if self.down else F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        y: Tensor = self.conv(x)
        return y


class Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(dim, dim)
        self.attn_1 = AttentionBlock(dim)
        self.block_2 = ResidualBlock(dim, dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return y


class Level(nn.Module):
    """Residual blocks at one resolution, then, but for the last level, a step to the next."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(out_dim if n else in_dim, out_dim) for n in range(num_blocks))
        self.resample = resample
        if resample:
            self.add_module(resample, Resample(out_dim, down=resample == "downsample"))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return self.get_submodule(self.resample)(x_BCHW) if self.resample else x_BCHW


class Encoder(nn.Module):
    def __init__(self, config: FluxVAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = nn.Conv2d(3, config.dim, 3, padding=1)
        self.down = nn.ModuleList(
            Level(dims[n], dims[n + 1], config.num_res_blocks, "downsample" if n < last else None)
            for n in range(last + 1)
        )
        self.mid = Middle(dims[-1])
        self.norm_out = _norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        y: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))
        return y


class Decoder(nn.Module):
    def __init__(self, config: FluxVAEConfig) -> None:
        super().__init__()
        dims = [config.dim * mult for mult in config.dim_mult]
        self.conv_in = nn.Conv2d(config.z_dim, dims[-1], 3, padding=1)
        self.mid = Middle(dims[-1])
        # Numbered from the finest resolution, run from the coarsest.
        self.up = nn.ModuleList(
            Level(dims[min(n + 1, len(dims) - 1)], dims[n], config.num_res_blocks + 1, "upsample" if n else None)
            for n in range(len(dims))
        )
        self.norm_out = _norm(dims[0])
        self.conv_out = nn.Conv2d(dims[0], 3, 3, padding=1)

    def forward(self, z_BChw: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BChw))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return y


class FluxVAE(nn.Module):
    """FLUX's autoencoder. Runs in the dtype of its weights; latents and frames are float32."""

    def __init__(self, config: FluxVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, video_BCTHW: Tensor, chunk: int = 1, tile: int | None = None) -> Tensor:
        """Return normalised latents_BCFhw, float32, of one frame in [-1, 1]; edges multiples of 8.

        tile  edge in pixels, a multiple of 8, where memory is short. chunk is there for video's sake.
        """
        rows, columns = _one_frame(video_BCTHW, STRIDE)
        tiles = pixel_tiles(rows // STRIDE, columns // STRIDE, tile, STRIDE)
        mean_BCFhw = run_tiles(self._mean, video_BCTHW, tiles, read=STRIDE, write=1, last=True)
        return self.config.scale * (mean_BCFhw.float() - self.config.shift)

    def decode_chunks(self, latents_BCFhw: Tensor, chunk: int = 1, tile: int | None = None) -> Iterator[Tensor]:
        """Yield the one frame video_BCTHW, float32, about [-1, 1], not clamped."""
        tiles = pixel_tiles(*_one_frame(latents_BCFhw, 1), tile, STRIDE)
        z_BCFhw = latents_BCFhw.float() / self.config.scale + self.config.shift
        yield run_tiles(self._decode, z_BCFhw, tiles, read=1, write=STRIDE, last=True).float()

    def _mean(self, video_BCTHW: Tensor, _: History) -> Tensor:
        return self.encoder(self._enter(video_BCTHW))[:, : self.config.z_dim, None]

    def _decode(self, z_BCFhw: Tensor, _: History) -> Tensor:
        return self.decoder(self._enter(z_BCFhw))[:, :, None]

    def _enter(self, x_BCTHW: Tensor) -> Tensor:
        """The frame in the dtype of the weights and the layout that convolutions keep: on a CPU they would copy what
        goes in and out of each of them otherwise."""
        return x_BCTHW[:, :, 0].to(self.decoder.conv_in.weight).contiguous(memory_format=torch.channels_last)


def _one_frame(video_BCTHW: Tensor, multiple: int) -> tuple[int, int]:
    """Height and width of a video that is one frame, whose edges divide."""
    frames, height, width = video_BCTHW.shape[2:]
    if frames != 1 or height % multiple or width % multiple:
        raise ValueError(f"{list(video_BCTHW.shape)} is not one frame with edges that divide by {multiple}")
    return height, width
