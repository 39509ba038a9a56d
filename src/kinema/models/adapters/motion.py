"""From face crops to motion tokens: the encoders that Animate runs once a segment, before any denoising step.

An appearance encoder of the LIA kind reads a face as 20 amplitudes along learned directions; a causal encoder in time
makes five tokens a latent frame of them. All of it is computed in float32: it is small, and it runs once.

Source: Wan-Video/Wan2.2 wan/modules/animate/motion_encoder.py, face_blocks.py (Apache-2.0).
Parity: tests/parity/test_animate.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import CausalConv, LayerNorm, Linear
from kinema.models.wan_config import AnimateConfig

FACES_AT_ONCE = 8
"""How many 512 x 512 faces the motion encoder holds in memory together, about 1.5 GB."""

BLUR = (1.0, 3.0, 3.0, 1.0)


def blur_kernel() -> Tensor:
    """Return the [4, 4] kernel of every blur, which official files store and diffusers' files leave out."""
    row = torch.tensor(BLUR, device="cpu")
    return torch.outer(row, row) / row.sum() ** 2


class Blur(nn.Module):
    """Smooth before a stride, as upfirdn2d does: a true convolution, so the kernel is flipped."""

    kernel: Tensor

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.register_buffer("kernel", blur_kernel())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        kernel = self.kernel.flip(0, 1).expand(channels, 1, -1, -1)
        return F.conv2d(x_BCHW, kernel, padding=self.pad, groups=channels)


class ScaledConv(nn.Module):
    """A convolution without bias whose weight is used divided by the root of its fan-in."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, pad: int = 0) -> None:
        super().__init__()
        self.stride, self.pad = stride, pad
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size).normal_())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.weight * self.scale, stride=self.stride, padding=self.pad)


class ScaledLinear(nn.Module):
    """A linear layer whose weight, not its bias, is used divided by the root of its fan-in."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim).normal_())
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)


class BiasedLeakyReLU(nn.Module):
    """Leaky ReLU of slope 0.2 after its own bias, times the root of 2, which keeps the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.leaky_relu(x_BCHW + self.bias, 0.2) * math.sqrt(2)


class HalvingBlock(nn.Module):
    """Residual block that halves both sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConv(in_channels, in_channels, 3, pad=1), BiasedLeakyReLU(in_channels))
        self.conv2 = nn.Sequential(
            Blur(pad=2), ScaledConv(in_channels, out_channels, 3, stride=2), BiasedLeakyReLU(out_channels)
        )
        self.skip = nn.Sequential(Blur(pad=1), ScaledConv(in_channels, out_channels, 1, stride=2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x_BCHW)) + self.skip(x_BCHW)
        return y / math.sqrt(2)


class AppearanceEncoder(nn.Module):
    """A face to one vector."""

    def __init__(self, config: AnimateConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        layers: list[nn.Module] = [nn.Sequential(ScaledConv(3, first, 1), BiasedLeakyReLU(first))]
        layers += [HalvingBlock(before, after) for before, after in pairwise(config.channels)]
        self.convs = nn.Sequential(*layers, ScaledConv(last, config.motion_width, 4))

    def forward(self, faces_BCHW: Tensor) -> Tensor:
        x: Tensor = self.convs(faces_BCHW)
        return x.flatten(1)


class FaceReader(nn.Module):
    """A face to amplitudes [B, motion_dim] along the directions of `Directions`."""

    def __init__(self, config: AnimateConfig) -> None:
        super().__init__()
        width = config.motion_width
        self.net_app = AppearanceEncoder(config)
        self.fc = nn.Sequential(*(ScaledLinear(width, width) for _ in range(4)), ScaledLinear(width, config.motion_dim))

    def forward(self, faces_BCHW: Tensor) -> Tensor:
        amplitudes: Tensor = self.fc(self.net_app(faces_BCHW))
        return amplitudes


class Direction(nn.Module):
    """Orthonormal directions of motion: the Q of the stored matrix."""

    def __init__(self, config: AnimateConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.motion_width, config.motion_dim).normal_())

    def forward(self, amplitudes: Tensor) -> Tensor:
        # On the CPU, where the signs of Q's columns are the same on every machine; MPS has no QR at all.
        directions = torch.linalg.qr(self.weight.float().cpu() + 1e-8).Q
        return amplitudes @ directions.T.to(amplitudes)


class MotionEncoder(nn.Module):
    """Face crops to motion vectors, a frame at a time."""

    def __init__(self, config: AnimateConfig) -> None:
        super().__init__()
        self.enc = FaceReader(config)
        self.dec = nn.ModuleDict({"direction": Direction(config)})

    def forward(self, faces_BCTHW: Tensor) -> Tensor:
        """Return motion [B, T, motion_width] of faces in [-1, 1], each of the size the model was built for."""
        batch = faces_BCTHW.shape[0]
        faces_BCHW = faces_BCTHW.transpose(1, 2).flatten(0, 1)
        amplitudes = torch.cat([self.enc(some.float()) for some in faces_BCHW.split(FACES_AT_ONCE)])
        motion: Tensor = self.dec["direction"](amplitudes)
        return motion.unflatten(0, (batch, -1))


class FaceEncoder(nn.Module):
    """Motion vectors to tokens [B, F, heads + 1, dim]: those of 4n+1 frames to n+1 latent frames."""

    def __init__(self, config: AnimateConfig, dim: int) -> None:
        super().__init__()
        hidden = config.face_width
        self.heads = config.face_heads
        self.conv1_local = CausalConv(config.motion_width, hidden * config.face_heads)
        self.conv2 = CausalConv(hidden, hidden, stride=2)
        self.conv3 = CausalConv(hidden, hidden, stride=2)
        self.norm = LayerNorm(hidden, 1e-6, elementwise_affine=False)
        self.out_proj = Linear(hidden, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, motion_BTC: Tensor) -> Tensor:
        batch = motion_BTC.shape[0]
        x = self.conv1_local(motion_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
        x = self._activate(self.conv3(self._activate(self.conv2(self._activate(x)))))
        tokens = self.out_proj(x).unflatten(0, (batch, self.heads)).transpose(1, 2)
        padding = self.padding_tokens.to(tokens.dtype).expand(batch, tokens.shape[1], 1, -1)
        return torch.cat([tokens, padding], dim=2)

    def _activate(self, x_BTC: Tensor) -> Tensor:
        return F.silu(self.norm(x_BTC))
