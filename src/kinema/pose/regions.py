"""What goes with a pose: the face, cut out, and the mask of the person, grown and made of blocks.

Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/utils.py (Apache-2.0).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.media.pixels import fit_pixels
from kinema.pose.keypoints import Pose

FACE_AREA = 1.3
"""Area of the face crop over that of the box around the 68 face points; of added height three quarters go on top."""

GROWTH = 9
"""Pixels that a mask grows by on every side: three dilations by a square of 7."""


def face_box(pose: Pose) -> tuple[int, int, int, int] | None:
    """Return x0, y0, x1, y1 of the face crop inside the frame; None where the face lies outside or has no extent."""
    (x0, y0), (x1, y1) = pose.face[:, :2].min(0), pose.face[:, :2].max(0)
    grow = math.sqrt(FACE_AREA) - 1
    wider, higher = (x1 - x0) * grow, (y1 - y0) * grow
    left, right = max(x0 - wider / 2, 0), min(x1 + wider / 2, pose.width)
    top, bottom = max(y0 - higher * 3 / 4, 0), min(y1 + higher / 4, pose.height)
    box = (int(left), int(top), int(right), int(bottom))
    return box if box[2] > box[0] and box[3] > box[1] else None


def crop(frame_HWC: Tensor, box: tuple[int, int, int, int], side: int) -> Tensor:
    """Return the box of a uint8 frame as a square picture [side, side, 3], bilinear, its aspect not kept."""
    x0, y0, x1, y1 = box
    return fit_pixels(frame_HWC[y0:y1, x0:x1], side, side, "stretch")


def grown(mask_HW: Tensor) -> Tensor:
    """Return the mask, bool, dilated by GROWTH."""
    return F.max_pool2d(mask_HW.float()[None], 2 * GROWTH + 1, stride=1, padding=GROWTH)[0] > 0


def blocked(mask_HW: Tensor, columns: int = 1, rows: int = 1) -> Tensor:
    """Return the mask made of blocks: its bounding box cut in columns x rows cells, those that it touches filled.

    An empty mask stays empty. The official code fails at one, at a box narrower than its cells, and leaves out the last
    row and column.
    """
    out = torch.zeros_like(mask_HW, dtype=torch.bool)
    ys, xs = torch.nonzero(mask_HW, as_tuple=True)
    if not len(ys):
        return out
    x_edges = _edges(int(xs.min()), int(xs.max()) + 1, columns)
    y_edges = _edges(int(ys.min()), int(ys.max()) + 1, rows)
    for top, bottom in pairwise(y_edges):
        for left, right in pairwise(x_edges):
            out[top:bottom, left:right] = bool(mask_HW[top:bottom, left:right].any())
    return out


def _edges(start: int, stop: int, cells: int) -> list[int]:
    step = max(1, (stop - start) // cells)
    return [*range(start, stop, step), stop]


def box_mask(pose: Pose | None, width: int, height: int) -> Tensor:
    """Return the mask, bool [height, width], of the box around a person and all points seen; empty without one."""
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    if pose is not None:
        points = np.concatenate([pose.body, pose.face, *pose.hands])
        points = points[points[:, 2] >= 0.5][:, :2]
        corners = np.concatenate([np.array(pose.box).reshape(2, 2), points])
        x0, y0 = np.clip(np.floor(corners.min(0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(corners.max(0)), 0, (width, height)).astype(int)
        mask_HW[y0:y1, x0:x1] = True
    return mask_HW
