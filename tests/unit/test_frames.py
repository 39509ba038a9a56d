"""Resizing against Pillow and torch as the official code calls them, and the packing of frame masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from golden_weights import uniform
from kinema.media.frames import crop_to, fit_inside, pack_mask, resize, to_video_range, unshuffle_mask


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


@pytest.mark.parametrize(("filter", "pillows"), [("lanczos", "LANCZOS"), ("antialiased", "BILINEAR")])
def test_filters_that_are_pillows(filter, pillows):
    image = Image.fromarray(pixels().numpy())
    for size in ((64, 32), (16, 16)):
        got = resize(to_video_range(pixels()), *size, filter)
        assert torch.allclose(got, video_range(image.resize(size, Image.Resampling[pillows])), atol=1e-6)


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


def known_pixels(known: tuple[int, ...], frames: int, height: int = 24, width: int = 40) -> torch.Tensor:
    mask = torch.zeros(1, frames, height, width)
    mask[:, list(known)] = 1
    return mask


@pytest.mark.parametrize("frames", [1, 5, 17, 33, 81, 121])
@pytest.mark.parametrize("known", [(), (0,), (-1,), (0, -1), (0, -2)])
def test_masks(frames, known):
    known = tuple(sorted({max(0, frames + k) if k < 0 else k for k in known}))
    mask = pack_mask(known_pixels(known, frames), 3, 5)
    assert mask.shape == (4, (frames - 1) // 4 + 1, 3, 5) and mask.dtype == torch.float32
    assert torch.equal(mask, official_mask(known, frames, 3, 5))


def test_mask_of_first_and_last_frame():
    mask = pack_mask(known_pixels((0, 80), 81, 480, 832), 60, 104)
    assert mask.shape == (4, 21, 60, 104)
    assert mask[:, 0, 7, 7].tolist() == [1, 1, 1, 1]
    assert mask[:, 20, 7, 7].tolist() == [0, 0, 0, 1]
    assert mask[:, 1:20].sum() == 0
    assert pack_mask(known_pixels((0,), 81, 16, 16), 2, 2)[:, 1:].sum() == 0


def official_resized_mask(mask_1THW: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The steps of VideoX-Fun in its own order: repeat, view, transpose, then trilinear, the first frame apart."""
    repeated = torch.cat([mask_1THW[:, :1].repeat_interleave(4, 1), mask_1THW[:, 1:]], 1)
    packed = repeated.view(1, repeated.shape[1] // 4, 4, *mask_1THW.shape[2:]).transpose(1, 2)
    first = F.interpolate(packed[:, :, :1], size=(1, h, w), mode="trilinear", align_corners=False)
    rest = F.interpolate(packed[:, :, 1:], size=(packed.shape[2] - 1, h, w), mode="trilinear", align_corners=False)
    return torch.cat([first, rest], 2)[0]


def test_a_mask_within_the_picture_is_packed_as_officially():
    mask = (uniform("mask", (1, 17, 64, 96), 1) > 0).float()
    assert torch.allclose(pack_mask(mask, 8, 12), official_resized_mask(mask, 8, 12), atol=1e-6)


def official_vace_mask(mask_1THW: torch.Tensor) -> torch.Tensor:
    """The steps of Wan 2.1's vace_encode_masks: every pixel of an 8 x 8 cell a channel, rows first."""
    frames, height, width = mask_1THW.shape[1:]
    cells = mask_1THW[0].view(frames, height // 8, 8, width // 8, 8).permute(2, 4, 0, 1, 3)
    cells = cells.reshape(64, frames, height // 8, width // 8)
    size = ((frames + 3) // 4, height // 8, width // 8)
    return F.interpolate(cells[None], size=size, mode="nearest-exact")[0]


@pytest.mark.parametrize("frames", [1, 5, 17, 81])
def test_vace_masks_are_unshuffled_as_officially(frames):
    mask = (uniform("mask", (1, frames, 32, 48), 2) > 0).float()
    got = unshuffle_mask(mask, 8)
    assert torch.equal(got, official_vace_mask(mask))
    columns_first = got.unflatten(0, (8, 8)).transpose(0, 1).flatten(0, 1)
    assert not torch.equal(columns_first, official_vace_mask(mask)), "a mask that cannot tell rows from columns"


def test_a_frame_is_shown_whole_in_the_middle():
    frame = uniform("frame", (3, 20, 40), 1)
    canvas, bars = fit_inside(frame, 32, 32, "bilinear", 1.0)
    assert canvas.shape == (3, 32, 32) and bars.sum() == 32 * 16
    assert (canvas[:, bars] == 1).all() and not bars[8:24].any()
    want = F.interpolate(frame[None], size=(16, 32), mode="bilinear", align_corners=False)[0]
    assert torch.equal(canvas[:, 8:24], want)
