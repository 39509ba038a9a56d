"""Where a person's joints are in a frame: 133 points of the whole body, of which 20 make the skeleton Animate reads.

Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/pose2d_utils.py (Apache-2.0); COCO-WholeBody numbering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kinema.media.pixels import inside

NUM_POINTS = 133
FACE = slice(23, 91)
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)

BODY = (
    (0, 0), (5, 6), (6, 6), (8, 8), (10, 10), (5, 5), (7, 7), (9, 9), (12, 12), (14, 14), (16, 16), (11, 11), (13, 13),
    (15, 15), (2, 2), (1, 1), (4, 4), (3, 3), (17, 18), (20, 21),
)  # fmt: skip
"""The 20 points of the skeleton, each the mean of two: nose, neck (between the shoulders), right shoulder, elbow,
wrist, left ones, right hip, knee, ankle, left ones, right eye, left eye, right ear, left ear, left and right toes."""

NOSE, NECK, RIGHT_SHOULDER, RIGHT_WRIST, LEFT_SHOULDER, LEFT_WRIST = 0, 1, 2, 4, 5, 7
RIGHT_HIP, RIGHT_ANKLE, LEFT_HIP, LEFT_ANKLE, LEFT_TOE, RIGHT_TOE = 8, 10, 11, 13, 18, 19

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19),
)  # fmt: skip
"""Skeleton points joined by a limb, from the neck outwards: a limb's first point is the end of an earlier one."""


@dataclass(frozen=True)
class Pose:
    """One person in one frame of width x height pixels. Points are rows of x, y in pixels and a score, 1 for certain.

    body        [20, 3], see BODY.
    face        [68, 3].
    hands       left, right: [21, 3] each, the wrist first.
    box         x0, y0, x1, y1 of the person as the detector saw it.
    """

    width: int
    height: int
    body: np.ndarray
    face: np.ndarray
    hands: tuple[np.ndarray, np.ndarray]
    box: tuple[float, float, float, float]

    @staticmethod
    def of(points: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> Pose:
        """Return the pose that the 133 points [133, 3] make in a frame of (width, height)."""
        pairs = np.array(BODY)
        body = (points[pairs[:, 0]] + points[pairs[:, 1]]) / 2
        return Pose(*size, body, points[FACE].copy(), (points[LEFT_HAND].copy(), points[RIGHT_HAND].copy()), box)

    def fitted(self, width: int, height: int) -> Pose:
        """Return the pose as it lies in a frame of another size into which its own is fitted, centred, aspect kept."""
        inner_width, inner_height, left, top = inside(self.width, self.height, width, height)
        scale = max(inner_width / self.width, inner_height / self.height)  # the one that was not rounded down

        def moved(points: np.ndarray) -> np.ndarray:
            return points * (scale, scale, 1) + (left, top, 0)

        x0, y0, x1, y1 = self.box
        box = (x0 * scale + left, y0 * scale + top, x1 * scale + left, y1 * scale + top)
        left_hand, right_hand = self.hands
        hands = moved(left_hand), moved(right_hand)
        return replace(
            self, width=width, height=height, body=moved(self.body), face=moved(self.face), hands=hands, box=box
        )
