"""Control pictures from pictures, by plain arithmetic: edges and scribbles.

Frames in, frames out, one at a time; knows nothing of files. Depth needs a model and is in models/depth.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CANNY_LOW, CANNY_HIGH = 100, 200
TAN_22 = 0.4142135623730951
SCRIBBLE_THRESHOLD = 60


def canny(frame_HWC: Tensor, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Tensor:
    """Return the edges of a uint8 RGB frame, white on black, uint8 [H, W, 3]: Canny's method without a blur.

    low, high  bounds of the gradient |dx| + |dy| (Sobel 3x3): an edge is above `high`, and goes on above `low`.

    Of the three channels each pixel takes the one with the largest gradient. Equal to cv2.Canny(frame, low, high), as
    VideoX-Fun makes its control videos. Source of the rules: opencv/opencv modules/imgproc/src/canny.cpp (Apache-2.0).
    """
    dx_HW, dy_HW = _gradient(frame_HWC)
    size_HW = np.abs(dx_HW) + np.abs(dy_HW)
    ridge_HW = _is_ridge(size_HW, dx_HW, dy_HW) & (size_HW > low)
    edges_HW = _connected(ridge_HW & (size_HW > high), ridge_HW)
    return torch.from_numpy(np.where(edges_HW[:, :, None], np.uint8(255), np.uint8(0)).repeat(3, axis=2))


def _gradient(frame_HWC: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sobel gradients [H, W], int32, of the channel where they are largest; the border is repeated outwards."""
    padded = np.pad(frame_HWC.numpy().astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    best = np.argmax(np.abs(dx) + np.abs(dy), axis=2, keepdims=True)
    return np.take_along_axis(dx, best, 2)[..., 0], np.take_along_axis(dy, best, 2)[..., 0]


def _is_ridge(size_HW: np.ndarray, dx_HW: np.ndarray, dy_HW: np.ndarray) -> np.ndarray:
    """Whether no neighbour across the edge is steeper; of two equal ones the first wins. Outside is flat."""
    around = np.pad(size_HW, 1)
    height, width = size_HW.shape

    def beats(row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        before = around[1 - row : 1 - row + height, 1 - column : 1 - column + width]
        after = around[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        return size_HW > before, size_HW > after if row and column else size_HW >= after

    x, y = np.abs(dx_HW), np.abs(dy_HW)
    flat, steep = y < TAN_22 * x, y > (TAN_22 + 2) * x
    falling = (dx_HW ^ dy_HW) >= 0
    ways = [np.logical_and(*beats(0, 1)), np.logical_and(*beats(1, 0)), np.logical_and(*beats(1, 1))]
    ridge: np.ndarray = np.select([flat, steep, falling], ways, np.logical_and(*beats(1, -1)))
    return ridge


def _connected(seeds_HW: np.ndarray, ridge_HW: np.ndarray) -> np.ndarray:
    """The ridge pixels that are joined to a seed, corners included."""
    width = ridge_HW.shape[1] + 2
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    open_ = np.pad(ridge_HW & ~seeds_HW, 1).ravel()
    found = np.pad(seeds_HW, 1).ravel()
    front = np.flatnonzero(found)
    while len(front):
        near = (front[:, None] + around).ravel()
        front = np.unique(near[open_[near]])
        open_[front], found[front] = False, True
    return found.reshape(-1, width)[1:-1, 1:-1]


def scribble(frame_HWC: Tensor, threshold: float = SCRIBBLE_THRESHOLD) -> Tensor:
    """Return thick strokes along the outlines of a uint8 RGB frame, white on black, uint8 [H, W, 3].

    threshold  gradient from which an outline begins, as `high` of `canny`; a smaller one draws more.

    Canny's edges of the frame without its detail (a blur over 1/120 of the short side), widened to 1/120 of it: the
    strokes of a hand, made without a model.
    """
    frame_BCHW = frame_HWC.permute(2, 0, 1)[None].float()
    pen = max(1, round(min(frame_HWC.shape[:2]) / 120))
    smooth_HWC = _blurred(frame_BCHW, pen)[0].round().to(torch.uint8).permute(1, 2, 0)
    edges_HWC = canny(smooth_HWC, threshold / 2, threshold)
    edges_BCHW = edges_HWC.permute(2, 0, 1)[None].float()
    strokes_BCHW = F.max_pool2d(edges_BCHW, 2 * (pen // 2) + 1, stride=1, padding=pen // 2)
    return strokes_BCHW[0].to(torch.uint8).permute(1, 2, 0)


def _blurred(frame_BCHW: Tensor, sigma: float) -> Tensor:
    reach = min(round(4 * sigma), *(side - 1 for side in frame_BCHW.shape[2:]))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (weights / weights.sum()).expand(frame_BCHW.shape[1], 1, 1, -1)
    padded = F.pad(frame_BCHW, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.transpose(2, 3), groups=len(kernel))
