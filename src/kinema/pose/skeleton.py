"""Draw a pose as the coloured skeleton that Animate was trained on.

Limbs are ellipses at 0.6 of a joint's colour, joints discs, fingers lines over the hues. Colours and widths are the
model's language: another drawing is another language.
Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/human_visualization.py (Apache-2.0).
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kinema.pose.keypoints import LIMBS, Pose

SEEN = 0.5
"""Points with a lower score are not drawn, nor are limbs that end in one."""

COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0),
)  # fmt: skip
"""RGB of the 20 joints; the first 19 are the limbs' as well."""

FINGERS = tuple(
    (0 if joint == 1 else 4 * finger + joint - 1, 4 * finger + joint) for finger in range(5) for joint in range(1, 5)
)
FINGER_COLOURS = tuple(
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number / len(FINGERS), 1, 1))
    for number in range(len(FINGERS))
)
FINGER_JOINT = (0, 0, 255)


def draw(pose: Pose | None, width: int, height: int) -> Tensor:
    """Return frame_HWC, uint8 RGB: the skeleton on black; black alone without a pose.

    The pose's own frame must be of that size: see `Pose.fitted`.
    """
    canvas = Image.new("RGB", (width, height))
    if pose is not None:
        assert (pose.width, pose.height) == (width, height), "fit the pose to the canvas first"
        pen = ImageDraw.Draw(canvas)
        radius = max(min(width, height) // 200 - 1, 1)
        _body(pen, pose.body, radius)
        for points in pose.hands:
            _hand(pen, points, max(radius // 2, 1))
    return torch.from_numpy(np.array(canvas))


def _body(pen: ImageDraw.ImageDraw, points: np.ndarray, radius: int) -> None:
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
        if min(points[start, 2], points[end, 2]) >= SEEN:
            dark = tuple(int(0.6 * part) for part in colour)
            pen.polygon(_ellipse(points[start], points[end], radius), fill=dark, outline=dark)
    for (x, y, score), colour in zip(points, COLOURS, strict=True):
        if score >= SEEN:
            _disc(pen, int(x), int(y), radius, colour)


def _ellipse(start: np.ndarray, end: np.ndarray, radius: int) -> list[tuple[int, int]]:
    """The outline of the ellipse along a limb, in whole pixels, a point a degree."""
    x, y = int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2)
    along = int(math.hypot(*(start - end)[:2]) / 2)
    angle = math.radians(int(math.degrees(math.atan2(start[1] - end[1], start[0] - end[0]))))
    turns = np.radians(np.arange(360))
    u, v = along * np.cos(turns), radius * np.sin(turns)
    xs, ys = x + u * math.cos(angle) - v * math.sin(angle), y + u * math.sin(angle) + v * math.cos(angle)
    return list(zip(np.rint(xs).astype(int).tolist(), np.rint(ys).astype(int).tolist(), strict=True))


def _hand(pen: ImageDraw.ImageDraw, points: np.ndarray, width: int) -> None:
    # A finger that lies on the frame's first row or column is one that was not found.
    seen = [score >= SEEN and int(x) > 0 and int(y) > 0 for x, y, score in points]
    spots = [(int(x), int(y)) for x, y, _ in points]
    for (start, end), colour in zip(FINGERS, FINGER_COLOURS, strict=True):
        if seen[start] and seen[end]:
            pen.line([spots[start], spots[end]], fill=colour, width=width)
    for spot, is_seen in zip(spots, seen, strict=True):
        if is_seen:
            _disc(pen, *spot, width, FINGER_JOINT)


def _disc(pen: ImageDraw.ImageDraw, x: int, y: int, radius: int, colour: tuple[int, ...]) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
