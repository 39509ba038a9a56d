"""A small Animate in real files, added to the tiny world, and the videos that drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints import official_state, write
from kinema.media.video import write as write_video
from kinema.schema import Settings, SoundPlan
from kinema.tensors import Media
from sounds import save_sound, tone_with_clicks
from tiny_world import DITS, TinyWorld, picture

ANIMATE: dict[str, Any] = {
    "channels": [4, 6, 8, 8],
    "motion_width": 12,
    "motion_dim": 5,
    "face_width": 16,
    "face_heads": 2,
    "interval": 1,
    "pose_channels": 16,
}
FACE = 32
ROW = """
[models.tiny-animate]
title = "A small Animate"
structure = { dim = 128, num_layers = 2, in_channels = 36, out_channels = 16, has_clip_tokens = true, animate = true }
vae = "wan2.1"
text_len = 16
takes = ["reference", "pose", "face", "mask", "background", "video"]
needs = ["reference", "pose", "face"]
size = [64, 64]
frames = 9
fps = 30
steps = 2
shift = 5.0
guidance = 1.0
prompt = "a cat walks"
negative = "two small squares"
licence = "none"
files.dit = ["diffusion_models/animate.safetensors"]
"""


def build_animate(world: TinyWorld, root: Path) -> Settings:
    """Write the model under `root`; return settings that find it, and in `world` what it shares with others."""
    write(
        root / "diffusion_models/animate.safetensors", official_state("dit", {**DITS["clip"], "animate": ANIMATE}, 41)
    )
    catalog = root / "animate.toml"
    catalog.write_text(ROW, "utf-8")
    return world.settings.model_copy(
        update={"models": (root, *world.settings.models), "catalogs": (*world.settings.catalogs, catalog)}
    )


def moving(
    path: Path, frames: int, size: tuple[int, int] = (64, 48), *, seed: int, fps: float = 30, sound: Path | None = None
) -> Path:
    """Write a video of a coloured ground that shifts a pixel a frame."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 6, 3), np.uint8)
    ground = np.array(Image.fromarray(coarse).resize((width + frames, height), Image.Resampling.BICUBIC))
    video = torch.from_numpy(np.stack([ground[:, n : n + width] for n in range(frames)]))
    plan = None if sound is None else SoundPlan(path=sound, seconds=frames / fps)
    write_video(Media(iter([video]), frames, width, height, fps, {}, plan), path, "mp4", 100)
    return path


def masks(path: Path, frames: int, size: tuple[int, int] = (64, 48), *, empty: bool = False) -> Path:
    """Write a mask: the right half is the person."""
    width, height = size
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    if not empty:
        video[:, :, width // 2 :] = 255
    write_video(Media(iter([video]), frames, width, height, 30, {}), path, "mp4", 100)
    return path


def animation(folder: Path, frames: int) -> dict[str, Path]:
    """Write what animation takes."""
    return {
        "reference": picture(folder / "me.png", 50, 90),
        "pose": moving(folder / "pose.mp4", frames, seed=1),
        "face": moving(folder / "face.mp4", frames, (FACE, FACE), seed=2),
    }


def replacement(folder: Path, frames: int) -> dict[str, Path]:
    """Write what replacement takes."""
    scene = {
        "mask": masks(folder / "mask.mp4", frames),
        "background": moving(folder / "background.mp4", frames, seed=3),
    }
    return animation(folder, frames) | scene


def driving_video(folder: Path, frames: int) -> Path:
    """Write a video with a sound."""
    sound = save_sound(folder / "sound.wav", tone_with_clicks(frames / 30, 16_000, [0.2]), 16_000)
    return moving(folder / "dance.mp4", frames, seed=3, sound=sound)
