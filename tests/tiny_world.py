"""A models folder with one small model of every kind, in real files, and the catalog that names them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

from checkpoints import TINY, TINY_VAE22, official_state, write
from kinema.media.video import write as write_media
from kinema.schema import Settings
from kinema.tensors import Media

TEXTS = ["a cat walks on grass", "a large red circle moves left on a blue ground", "two small squares stand still"]
TEXT_DIM, CLIP_DIM = TINY["text_encoder"]["dim"], TINY["clip_vision"]["dim"]
DIT = {
    **TINY["dit"],
    "dim": 128,
    "has_clip_tokens": False,
    "num_clip_positions": 0,
    "in_channels": 16,
    "text_dim": TEXT_DIM,
}
CLIP = {**DIT, "has_clip_tokens": True, "clip_dim": CLIP_DIM}
DITS: dict[str, dict[str, Any]] = {
    "t2v": DIT,
    "i2v": {**DIT, "in_channels": 36},
    "clip": {**CLIP, "in_channels": 36},
    "flf": {**CLIP, "in_channels": 36, "num_clip_positions": 10},
    "ti2v": {**DIT, "in_channels": 48, "out_channels": 48},
    "vace": {**DIT, "vace": {"layers": [0, 1], "in_channels": 96}},
    "control21": {**CLIP, "in_channels": 48},
    "control21ref": {**CLIP, "in_channels": 48, "reference": {"in_channels": 16}},
    "control22": {**DIT, "in_channels": 52, "reference": {"in_channels": 16}},
    "camera21": {**CLIP, "in_channels": 32, "camera": {"in_channels": 24, "downscale": 8}},
    "camera22": {**DIT, "in_channels": 36, "camera": {"in_channels": 24, "downscale": 8}},
    "inp5": {**DIT, "in_channels": 100, "out_channels": 48},
    "control5": {**DIT, "in_channels": 148, "out_channels": 48, "reference": {"in_channels": 48}},
    "camera5": {**DIT, "in_channels": 100, "out_channels": 48, "camera": {"in_channels": 24, "downscale": 16}},
}
ADAPTERS = ("vace", "reference", "camera")

CATALOG = """
[shared]
text_encoder = ["text_encoders/tiny_umt5.safetensors"]
vae21 = ["vae/tiny_vae.safetensors"]
vae22 = ["vae/tiny_vae22.safetensors"]
clip_vision = ["clip_vision/tiny_clip.safetensors"]
"""
ROW = """
[models.{name}]
title = "A small {name}"
structure.dim = 128
structure.num_layers = 2
structure.in_channels = {in_channels}
structure.out_channels = {out_channels}
structure.has_clip_tokens = {clip}
structure.num_clip_positions = {positions}
{adapters}vae = "{vae}"
text_len = 16
size = [32, 32]
frames = 5
fps = 8
steps = 2
shift = 3.0
guidance = 3.0
negative = "two small squares"
licence = "none"
files.dit = ["diffusion_models/{kind}.safetensors"]
{more}
"""
TWO = """
experts = ["high", "low"]
boundary = 0.875
guidance_high = 4.0
files.dit_high = ["diffusion_models/{}_high.safetensors"]
"""
CONTROL = 'takes = {}\nneeds = ["control"]\nby_area = true\n'
CAMERA = 'takes = {}\nneeds = ["camera"]\nby_area = true\n'
FIRST = 'needs = ["first"]\nby_area = true\n'
SPEED = 'files.motion_controller = ["speed/tiny.safetensors"]\n'
ONE_FRAME = '"one_frame", "control_image", "control_mask"'
VACE = 'takes = ["control", "video", "mask", "reference", "first", "middle", "last"]\nby_area = true\n'
INPAINT = 'takes = ["first", "middle", "last", "video", "mask"]\n'
NEEDS = {
    "tiny-t2v": ("t2v", 'takes = ["video", "motion_bucket_id"]\n' + SPEED),
    "tiny-t2v-two": ("t2v", TWO.format("t2v")),
    "tiny-i2v-two": ("i2v", f'takes = ["first", "middle", "last"]\n{FIRST}' + TWO.format("i2v")),
    "tiny-clip": ("clip", f'takes = ["first", "middle", "last", {ONE_FRAME}]\n{FIRST}'),
    "tiny-flf": ("flf", f'takes = ["first", "last", {ONE_FRAME}]\nneeds = ["first", "last"]\nby_area = true\n'),
    "tiny-ti2v": ("ti2v", 'takes = ["first", "video"]\nfirst_frame = "overwrite"\nby_area = true\n'),
    "tiny-vace": ("vace", VACE),
    "tiny-vace-two": ("vace", VACE + TWO.format("vace")),
    "tiny-inp": ("clip", INPAINT + 'by_area = true\n'),
    "tiny-inp-two": ("i2v", INPAINT + 'by_area = true\n' + TWO.format("i2v")),
    "tiny-control21": (
        "control21", CONTROL.format('["control", "first", "reference"]') + 'structure.reference = "optional"\n'
    ),
    "tiny-control21ref": ("control21ref", CONTROL.format('["control", "first", "reference"]')),
    "tiny-control22": ("control22", CONTROL.format('["control", "first", "last", "reference"]')),
    "tiny-control22-two": (
        "control22", CONTROL.format('["control", "first", "last", "reference"]') + TWO.format("control22")
    ),
    "tiny-camera21": ("camera21", CAMERA.format('["camera", "first"]')),
    "tiny-camera22": ("camera22", CAMERA.format('["camera", "first", "last"]')),
    "tiny-camera22-two": ("camera22", CAMERA.format('["camera", "first", "last"]') + TWO.format("camera22")),
    "tiny-inp5": ("inp5", INPAINT + 'first_frame = "overwrite"\nby_area = true\n'),
    "tiny-control5": (
        "control5", CONTROL.format('["control", "first", "reference"]') + 'first_frame = "overwrite"\n'
    ),
    "tiny-camera5": ("camera5", CAMERA.format('["camera", "first"]') + 'first_frame = "overwrite"\n'),
}  # fmt: skip


@dataclass(frozen=True)
class TinyWorld:
    """root: a ComfyUI-like models folder; settings: where an engine finds it."""

    root: Path
    settings: Settings

    def file(self, name: str) -> Path:
        return self.root / name


@cache
def spiece_model(vocab: int = TINY["text_encoder"]["vocab"]) -> bytes:
    """Train a sentencepiece model on a few sentences; ids of pad, eos and unk as in umT5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=vocab, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def build(root: Path) -> TinyWorld:
    """Write every file of the tiny world under `root`."""
    for kind, config in DITS.items():
        write(root / f"diffusion_models/{kind}.safetensors", official_state("dit", config, salt=11))
    for kind in ("t2v", "i2v", "vace", "control22", "camera22"):
        write(root / f"diffusion_models/{kind}_high.safetensors", official_state("dit", DITS[kind], salt=21))
    write(root / "vae/tiny_vae.safetensors", official_state("vae"))
    write(root / "vae/tiny_vae22.safetensors", official_state("vae", TINY_VAE22))
    write(root / "clip_vision/tiny_clip.safetensors", official_state("clip_vision"))
    write(root / "speed/tiny.safetensors", official_state("motion_controller"))
    text = official_state("text_encoder")
    text["spiece_model"] = torch.from_numpy(np.frombuffer(spiece_model(), np.uint8).copy())
    write(root / "text_encoders/tiny_umt5.safetensors", text)
    rows = [
        ROW.format(
            name=name, kind=kind, more=more, vae="wan2.2" if DITS[kind]["out_channels"] == 48 else "wan2.1",
            in_channels=DITS[kind]["in_channels"], out_channels=DITS[kind]["out_channels"],
            clip=str(DITS[kind]["has_clip_tokens"]).lower(), positions=DITS[kind]["num_clip_positions"],
            adapters="".join(f"structure.{name} = true\n" for name in ADAPTERS if name in DITS[kind]),
        )
        for name, (kind, more) in NEEDS.items()
    ]  # fmt: skip
    catalog = root / "tiny.toml"
    catalog.write_text(CATALOG + "".join(rows), "utf-8")
    return TinyWorld(root, Settings(models=(root,), catalogs=(catalog,)))


def film(path: Path, frames: int = 5, width: int = 32, height: int = 32, fps: float = 8, seed: int = 0) -> Path:
    """Write a film of smooth coloured pictures, another one each frame."""
    coarse = torch.from_numpy(np.random.default_rng(seed).random((frames, 3, 3, 3), np.float32))
    frames_TCHW = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    media = Media(iter([frames_TCHW.permute(0, 2, 3, 1)]), frames, width, height, fps, {})
    write_media(media, path, "mp4", 100)
    return path


def picture(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    """Write a smooth coloured picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path
