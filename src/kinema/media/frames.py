"""Pixels to the size, range and masks the models take.

Owns resizing, cropping and the packing of frame masks. Sizes are decided by the plan.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Filter = Literal["bicubic", "bilinear", "lanczos", "antialiased"]

PILLOW_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "antialiased": Image.Resampling.BILINEAR}


def to_video_range(frame_HWC: Tensor) -> Tensor:
    """Return frame_CHW, float32 in [-1, 1], of uint8 pixels."""
    return frame_HWC.permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def resize(frame_CHW: Tensor, width: int, height: int, filter: Filter) -> Tensor:
    """Return the frame at width x height, float32; its aspect is not kept.

    bicubic      torch's, on the CPU, not antialiased and not clamped: what image to video models were trained with.
    bilinear     torch's, likewise: what VACE's references were trained with.
    lanczos      Pillow's, on 8-bit pixels: what TI2V was trained with. The frame has to come from 8-bit pixels.
    antialiased  Pillow's bilinear, likewise, which averages where it shrinks: what S2V was trained with.
    Source: Wan-Video/Wan2.2 wan/image2video.py, wan/textimage2video.py, wan/speech2video.py (Apache-2.0).
    """
    if filter not in PILLOW_FILTERS:
        return F.interpolate(frame_CHW.cpu().float()[None], size=(height, width), mode=filter)[0]
    pixels_HWC = frame_CHW.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0)
    resized = Image.fromarray(pixels_HWC.cpu().numpy()).resize((width, height), PILLOW_FILTERS[filter])
    return to_video_range(torch.from_numpy(np.array(resized)))


def crop_to(frame_CHW: Tensor, width: int, height: int, filter: Filter) -> Tensor:
    """Return the frame scaled, aspect kept, until it covers width x height, and cropped there at its centre."""
    _, old_height, old_width = frame_CHW.shape
    scale = max(width / old_width, height / old_height)
    cover_CHW = resize(frame_CHW, round(old_width * scale), round(old_height * scale), filter)
    left, top = (cover_CHW.shape[2] - width) // 2, (cover_CHW.shape[1] - height) // 2
    return cover_CHW[:, top : top + height, left : left + width]


def fit_inside(frame_CHW: Tensor, width: int, height: int, filter: Filter, fill: float) -> tuple[Tensor, Tensor]:
    """Return the whole frame, aspect kept, in the middle of a canvas of `fill`; and bars_HW, bool, where canvas shows.

    Source: Wan-Video/Wan2.1 wan/vace.py prepare_source (Apache-2.0).
    """
    _, old_height, old_width = frame_CHW.shape
    scale = min(width / old_width, height / old_height)
    inner_CHW = resize(frame_CHW, max(1, int(old_width * scale)), max(1, int(old_height * scale)), filter)
    _, h, w = inner_CHW.shape
    left, top = (width - w) // 2, (height - h) // 2
    canvas_CHW = torch.full((frame_CHW.shape[0], height, width), fill)
    canvas_CHW[:, top : top + h, left : left + w] = inner_CHW
    bars_HW = torch.ones(height, width, dtype=torch.bool)
    bars_HW[top : top + h, left : left + w] = False
    return canvas_CHW, bars_HW


def pack_mask(known_1THW: Tensor, h: int, w: int) -> Tensor:
    """Return mask_CFhw as `in_fours` does, of a mask at pixel size, 1 where it is known, scaled bilinearly.

    Source: Wan-Video/Wan2.2 wan/image2video.py, Wan-Video/Wan2.1 wan/first_last_frame2video.py, and of the size
    aigc-apps/VideoX-Fun videox_fun/pipeline/pipeline_wan_fun_inpaint.py resize_mask (Apache-2.0).
    """
    return in_fours(F.interpolate(known_1THW.float(), size=(h, w), mode="bilinear")[0])


def in_fours(mask_Thw: Tensor) -> Tensor:
    """Return mask_CFhw, [4, (T - 1) / 4 + 1, h, w], of a mask at the latent's size.

    The four channels are the four pixel frames behind a latent frame; of the first latent frame, which has only one,
    that one four times over.
    """
    assert len(mask_Thw) % 4 == 1, "the plan makes frames 4n+1"
    return torch.cat([mask_Thw[:1].expand(3, -1, -1), mask_Thw]).unflatten(0, (-1, 4)).transpose(0, 1)


def unshuffle_mask(mask_1THW: Tensor, stride: int) -> Tensor:
    """Return mask_CFhw, [stride ** 2, (T + 3) // 4, h, w]: VACE's mask, each pixel of a latent cell a channel.

    Of time, the frames nearest to each latent frame are kept.
    Source: Wan-Video/Wan2.1 wan/vace.py vace_encode_masks (Apache-2.0).
    """
    cells_CThw = F.pixel_unshuffle(mask_1THW.transpose(0, 1), stride).transpose(0, 1)
    size = ((mask_1THW.shape[1] + 3) // 4, *cells_CThw.shape[2:])
    return F.interpolate(cells_CThw[None], size=size, mode="nearest-exact")[0]
