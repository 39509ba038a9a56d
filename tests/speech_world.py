"""A small speech-driven model in real files, added to the tiny world, and what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import TINY, official_state, write
from kinema.schema import Settings
from sounds import save_sound, tone_with_clicks
from tiny_world import DIT, TinyWorld, picture

SPEECH: dict[str, Any] = {
    "layers": (0, 1),
    "audio_dim": TINY["audio_encoder"]["dim"],
    "audio_layers": TINY["audio_encoder"]["num_layers"] + 1,
}
ROW = """
[models.tiny-s2v]
title = "A small speech to video model"
structure = { dim = 128, num_layers = 2, in_channels = 16, out_channels = 16, has_clip_tokens = false, speech = true }
vae = "wan2.1"
text_len = 16
takes = ["audio", "reference", "pose"]
needs = ["audio", "reference"]
size = [64, 64]
by_area = true
clip_frames = 8
history_frames = 13
steps = 2
shift = 3.0
guidance = 3.0
negative = "two small squares"
licence = "none"
files.dit = ["diffusion_models/s2v.safetensors"]
files.audio_encoder = ["audio_encoders/tiny_wav2vec2.safetensors"]
"""
CLICKS = [0.3, 0.8, 1.2]
"""Seconds into the sound at which it clicks."""


def build_speech(world: TinyWorld, root: Path) -> Settings:
    """Write the model under `root`; return settings that find it, and in `world` what it shares with others."""
    layers = {"audio_inject_layers": "[0, 1]"}
    write(root / "diffusion_models/s2v.safetensors", official_state("dit", {**DIT, "speech": SPEECH}, 31), layers)
    write(root / "audio_encoders/tiny_wav2vec2.safetensors", official_state("audio_encoder"))
    catalog = root / "speech.toml"
    catalog.write_text(ROW, "utf-8")
    return world.settings.model_copy(
        update={"models": (root, *world.settings.models), "catalogs": (*world.settings.catalogs, catalog)}
    )


def inputs(folder: Path, seconds: float = 1.5) -> dict[str, Path]:
    """Write a reference image and a sound with clicks."""
    rate = 16_000
    return {
        "reference": picture(folder / "face.png", 96, 80),
        "audio": save_sound(folder / "voice.wav", tone_with_clicks(seconds, rate, CLICKS), rate),
    }
