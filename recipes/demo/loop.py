"""What both training scripts share: the learning-rate law, atomic resumable checkpoints, the log."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from torch import Tensor


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Linear warmup, then a cosine down to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it: a killed run leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def restore(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


class Log:
    """One JSON line a report, on the screen and appended to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.started = path, time.perf_counter()

    def __call__(self, **values: float | int | str) -> None:
        values["seconds"] = round(time.perf_counter() - self.started, 1)
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def bank(seeds: range, split: data.Split = "train", two_share: float = 0.25) -> tuple[Tensor, list[str]]:
    """Frames uint8 [N, T, H, W, 3] and captions of many seeds, kept in memory."""
    frames = np.empty((len(seeds), data.FRAMES, data.EDGE, data.EDGE, 3), np.uint8)
    captions = []
    for row, (clip, text, _) in enumerate(data.clips(seeds, split, two_share)):
        frames[row] = clip
        captions.append(text)
    return torch.from_numpy(frames), captions


def video(frames_BTHWC: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 frames [..., H, W, 3] to float32 [B, 3, T, H, W] (or [B, 3, H, W]) in [-1, 1]."""
    x = frames_BTHWC.to(device).float() / 127.5 - 1
    return x.movedim(-1, 1)
