"""The motion controller of Wan 2.1 T2V 1.3B: how much moves, as rows added to the modulation of every block.

A model of its own, in a file of its own: what it says is the same at every step, so it runs once a request, before
the DiT, which is told the rows (`Conditions.motion_B6D`) and needs no part of it.

Source: modelscope/DiffSynth-Studio diffsynth/models/wan_video_motion_controller.py and pipelines/wan_video.py
(Apache-2.0). Tests: tests/engine/test_motion_controller.py, against that formula; no output of the original is held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.models.layers import Linear, sinusoid

TIMESTEPS_PER_BUCKET = 10
"""Buckets 0 to 100 are told as timesteps are, of which there are 1000."""


@dataclass(frozen=True)
class MotionControllerConfig:
    """Widths of a motion controller; the published one is (256, 1536). dim: of the DiT it was trained beside."""

    freq_dim: int
    dim: int


class MotionController(nn.Module):
    def __init__(self, config: MotionControllerConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Sequential(
            Linear(config.freq_dim, config.dim), nn.SiLU(), Linear(config.dim, config.dim), nn.SiLU(),
            Linear(config.dim, 6 * config.dim),
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, bucket_id: int) -> Tensor:
        """Return motion_B6D, float32, of one batch entry: shift, scale, gate of attention, then of the FFN.

        bucket_id   0 (slow) to 100 (fast).
        """
        told = torch.tensor([float(TIMESTEPS_PER_BUCKET * bucket_id)], device=next(self.parameters()).device)
        rows: Tensor = self.linear(sinusoid(told, self.config.freq_dim))
        return rows.float().unflatten(-1, (6, self.config.dim))
