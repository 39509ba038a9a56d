"""Resizing against Pillow and torch as the official code calls them, and the packing of frame masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kinema.media.frames import crop_to, latent_mask, resize, to_video_range


def pixels(height: int = 37, width: int = 53) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def video_range(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def test_video_range():
    frame = to_video_range(torch.tensor([[[0, 255, 128]]], dtype=torch.uint8))
    assert frame.shape == (3, 1, 1) and frame[:2].flatten().tolist() == [-1.0, 1.0]
    assert frame[2].item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_every_byte_survives_the_way_there_and_back():
    """Lanczos works on 8-bit pixels; at the same size it must return them unchanged."""
    every = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    assert torch.equal(resize(to_video_range(every), 16, 16, "lanczos"), to_video_range(every))


@pytest.mark.parametrize("size", [(80, 48), (16, 16), (53, 37)])
def test_bicubic_is_torchs_without_antialiasing(size):
    width, height = size
    frame = to_video_range(pixels())
    want = F.interpolate(frame[None], (height, width), mode="bicubic", align_corners=False, antialias=False)[0]
    got = resize(frame, width, height, "bicubic")
    assert torch.equal(got, want)
    if width < 53:
        smooth = F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0]
        assert (got - smooth).abs().max() > 0.1, "antialiasing would go unnoticed"


def test_lanczos_is_pillows():
    image = Image.fromarray(pixels().numpy())
    got = resize(to_video_range(pixels()), 64, 32, "lanczos")
    assert torch.allclose(got, video_range(image.resize((64, 32), Image.Resampling.LANCZOS)), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (40, 40), (53, 37), (20, 37), (160, 32)])
def test_cover_and_crop_is_that_of_the_official_code(size):
    """Wan-Video/Wan2.2 wan/textimage2video.py: scale to cover, then cut the middle out."""
    width, height = size
    image = Image.fromarray(pixels().numpy())
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    x, y = (image.width - width) // 2, (image.height - height) // 2
    want = video_range(image.crop((x, y, x + width, y + height)))
    assert torch.allclose(crop_to(to_video_range(pixels()), width, height, "lanczos"), want, atol=1e-6)
    assert crop_to(to_video_range(pixels()), width, height, "bicubic").shape == (3, height, width)


@pytest.mark.parametrize("old", [(3, 20), (20, 3), (481, 833), (1, 1)])
def test_cover_always_covers(old):
    frame = torch.zeros(3, *old)
    for width, height in [(208, 120), (17, 31), (120, 208)]:
        assert crop_to(frame, width, height, "bicubic").shape == (3, height, width)


def official_mask(known: tuple[int, ...], frames: int, h: int, w: int) -> torch.Tensor:
    """The packing spelled out: frame 0 four times, then frame by frame, in fours."""
    flat = [float(frame in known) for frame in [0, 0, 0, *range(frames)]]
    rows = [flat[i : i + 4] for i in range(0, len(flat), 4)]
    return torch.tensor(rows).T[:, :, None, None].expand(4, len(rows), h, w)


@pytest.mark.parametrize("frames", [1, 5, 17, 33, 81, 121])
@pytest.mark.parametrize("known", [(), (0,), (-1,), (0, -1), (0, -2)])
def test_masks(frames, known):
    known = tuple(sorted({max(0, frames + k) if k < 0 else k for k in known}))
    mask = latent_mask(known, frames, 3, 5)
    assert mask.shape == (4, (frames - 1) // 4 + 1, 3, 5) and mask.dtype == torch.float32
    assert torch.equal(mask, official_mask(known, frames, 3, 5))


def test_mask_of_first_and_last_frame():
    mask = latent_mask([0, 80], 81, 60, 104)
    assert mask.shape == (4, 21, 60, 104)
    assert mask[:, 0, 7, 7].tolist() == [1, 1, 1, 1]
    assert mask[:, 20, 7, 7].tolist() == [0, 0, 0, 1]
    assert mask[:, 1:20].sum() == 0
    assert latent_mask([0], 81, 2, 2)[:, 1:].sum() == 0
