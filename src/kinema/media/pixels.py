"""8-bit frames to another size, for videos that are read, looked at or written and no model was trained on resizing."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fit = Literal["stretch", "crop", "pad"]


def fit_pixels(frame_HWC: Tensor, width: int, height: int, fit: Fit) -> Tensor:
    """Return a uint8 frame at width x height: stretched, cropped at its centre, or whole in the middle of black.

    Bilinear; where it shrinks, over all pixels that a new one covers. A frame that has the size is returned as it is.
    """
    rows, columns = frame_HWC.shape[:2]
    if (columns, rows) == (width, height):
        return frame_HWC
    if fit == "stretch":
        return _scaled(frame_HWC, width, height)
    if fit == "crop":
        scale = max(width / columns, height / rows)
        cover = _scaled(frame_HWC, max(round(columns * scale), width), max(round(rows * scale), height))
        left, top = (cover.shape[1] - width) // 2, (cover.shape[0] - height) // 2
        return cover[top : top + height, left : left + width]
    inner_width, inner_height, left, top = inside(columns, rows, width, height)
    out = frame_HWC.new_zeros(height, width, 3)
    out[top : top + inner_height, left : left + inner_width] = _scaled(frame_HWC, inner_width, inner_height)
    return out


def inside(width: int, height: int, into_width: int, into_height: int) -> tuple[int, int, int, int]:
    """Return (width, height, left, top) of a picture, aspect kept, in the middle of another size.

    Sides and margins are rounded down, as the official code pads.
    Source: Wan-Video/Wan2.2 wan/animate.py padding_resize (Apache-2.0).
    """
    if height * into_width > into_height * width:
        inner = max(1, into_height * width // height)
        return inner, into_height, (into_width - inner) // 2, 0
    inner = max(1, into_width * height // width)
    return into_width, inner, 0, (into_height - inner) // 2


def _scaled(frame_HWC: Tensor, width: int, height: int) -> Tensor:
    shrinks = width * height < frame_HWC.shape[0] * frame_HWC.shape[1]
    frame_BCHW = frame_HWC.permute(2, 0, 1)[None].float()
    out = F.interpolate(frame_BCHW, (height, width), mode="bilinear", antialias=shrinks)
    return out[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
