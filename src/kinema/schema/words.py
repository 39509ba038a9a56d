"""The words that several nouns share: literal types, named areas, and what every noun is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Expert = Literal["model", "high", "low"]
Solver = Literal["unipc", "dpmpp", "euler"]
Precision = Literal["fast", "reference"]
Quantise = Literal["fp8", "fp8-64", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]
Placement = Literal["device", "streamed", "cpu"]
Component = Literal[
    "dit",
    "vae",
    "text_encoder",
    "clip_vision",
    "audio_encoder",
    "motion_controller",
    "flux_dit",
    "flux_vae",
    "t5",
    "clip_text",
    "siglip",
    "redux",
]
OutputKind = Literal["mp4", "webm", "gif", "webp", "png", "latents"]

AREAS = {"480p": 832 * 480, "720p": 1280 * 720}
"""Named areas in pixels: the aspect then comes from the input image, or is 16:9 without one."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
