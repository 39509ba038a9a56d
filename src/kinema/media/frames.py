"""Pixels to the size, range and masks the models take.

Owns resizing, cropping and the packing of frame masks. Sizes are decided by the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Filter = Literal["bicubic", "bilinear", "lanczos"]


def to_video_range(frame_HWC: Tensor) -> Tensor:
    """Return frame_CHW, float32 in [-1, 1], of uint8 pixels."""
    return frame_HWC.permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def to_uint8(frame_CHW: Tensor) -> Tensor:
    """Return frame_HWC uint8 of pixels in [-1, 1]; what lies outside, as bicubic resizing may, is clipped."""
    return frame_CHW.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0)


def resize(frame_CHW: Tensor, width: int, height: int, filter: Filter) -> Tensor:
    """Return the frame at width x height, float32; its aspect is not kept.

    bicubic  torch's, on the CPU, without antialiasing and not clamped: what image to video models were trained with.
    lanczos  Pillow's, on 8-bit pixels: what TI2V was trained with. The frame has to come from 8-bit pixels.
    bilinear Pillow's likewise, which averages where it shrinks: what S2V was trained with.
    Source: Wan-Video/Wan2.2 wan/image2video.py, wan/textimage2video.py, wan/speech2video.py (Apache-2.0).
    """
    if filter == "bicubic":
        return F.interpolate(frame_CHW.cpu().float()[None], size=(height, width), mode="bicubic")[0]
    pixels_HWC = to_uint8(frame_CHW).cpu().numpy()
    resized = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling[filter.upper()])
    return to_video_range(torch.from_numpy(np.array(resized)))


def crop_to(frame_CHW: Tensor, width: int, height: int, filter: Filter) -> Tensor:
    """Return the frame scaled, aspect kept, until it covers width x height, and cropped there at its centre."""
    _, old_height, old_width = frame_CHW.shape
    scale = max(width / old_width, height / old_height)
    cover_CHW = resize(frame_CHW, round(old_width * scale), round(old_height * scale), filter)
    left, top = (cover_CHW.shape[2] - width) // 2, (cover_CHW.shape[1] - height) // 2
    return cover_CHW[:, top : top + height, left : left + width]


def latent_mask(known_frames: Iterable[int], frames: int, h: int, w: int) -> Tensor:
    """Return mask_CFhw, float32 [4, (frames - 1) / 4 + 1, h, w]: 1 where a pixel frame is given.

    The four channels are the four pixel frames behind a latent frame; of the first latent frame, which has only one,
    that one four times over.
    Source: Wan-Video/Wan2.2 wan/image2video.py, Wan-Video/Wan2.1 wan/first_last_frame2video.py (Apache-2.0).
    """
    assert frames % 4 == 1, "the plan makes frames 4n+1"
    known = torch.zeros(frames)
    known[list(known_frames)] = 1
    mask_FC = torch.cat([known[:1].expand(4), known[1:]]).view(-1, 4)
    return mask_FC.T[:, :, None, None].repeat(1, 1, h, w)
