"""Fun camera control: the Pluecker embedding of a camera's path, added to the grid of tokens.

Source: aigc-apps/VideoX-Fun videox_fun/models/wan_camera_adapter.py (Apache-2.0).
Parity: tests/parity/test_wan_adapters.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.layers import map_once
from kinema.models.wan_blocks import Stream
from kinema.models.wan_config import PATCH, CameraConfig, WanConfig
from kinema.tensors import CameraConditions

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT


class ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + y


class CameraEmbedding(nn.Module):
    """Turn Pluecker coordinates of every pixel into one row a token."""

    def __init__(self, config: CameraConfig, dim: int) -> None:
        super().__init__()
        self.downscale = config.downscale
        self.conv = nn.Conv2d(config.in_channels * config.downscale**2, dim, kernel_size=PATCH[1:], stride=PATCH[1:])
        self.residual_blocks = nn.Sequential(ResidualBlock(dim))

    def forward(self, pluecker_BCHW: Tensor) -> Tensor:
        """Return rows [B, tokens, D] of one latent frame [B, 24, H, W], in the dtype of the weights."""
        pixels_BCHW = pluecker_BCHW.to(self.conv.weight.dtype)
        cells: Tensor = self.residual_blocks(self.conv(F.pixel_unshuffle(pixels_BCHW, self.downscale)))
        return cells.flatten(2).transpose(1, 2)


class Camera(Adapter):
    field = "camera"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.camera is not None
        self.control_adapter = CameraEmbedding(config.camera, config.dim)

    def prepare(self, model: WanDiT, told: Sequence[CameraConditions]) -> list[Tensor]:
        return map_once(self._tokens, told)

    def _tokens(self, told: CameraConditions) -> Tensor:
        return torch.cat([self.control_adapter(frame_BCHW) for frame_BCHW in told.frames], dim=1)

    def embed(self, model: WanDiT, stream: Stream, state: Tensor) -> Stream:
        if state.shape[1] != stream.tokens_BLD.shape[1]:
            raise ValueError(f"the camera path has {state.shape[1]} tokens, the latents {stream.tokens_BLD.shape[1]}")
        return replace(stream, tokens_BLD=stream.tokens_BLD + state)
