"""Carry the motion of one body over to another: every limb keeps its direction and takes the other body's length.

Lengths are right where both bodies face the camera, limbs stretched: in the pictures at hand, or in others of the same
people made for it.
Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/retarget_pose.py (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kinema.pose.keypoints import (
    LEFT_ANKLE,
    LEFT_HIP,
    LEFT_SHOULDER,
    LEFT_TOE,
    LEFT_WRIST,
    LIMBS,
    NECK,
    NOSE,
    RIGHT_ANKLE,
    RIGHT_HIP,
    RIGHT_SHOULDER,
    RIGHT_TOE,
    RIGHT_WRIST,
    Pose,
)

MEASURED, PRESENT = 0.5, 0.4
"""Scores from which a point counts for a body's height, and for whether a part of the body is there."""

HEAD = (0, 14, 15, 16, 17)
"""Nose, eyes and ears."""

LONGEST_FOOT = 0.5
"""Of the calf; (foot, calf) by limb."""
FEET = ((18, 8), (17, 11))

PAIRED_LONGER = ((0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (17, 18))
PAIRED_MEAN = ((13, 15), (14, 16))
"""Limbs left and right that are stretched alike: by the larger of the two ratios, or by their mean (eyes, ears)."""


@dataclass(frozen=True)
class Retarget:
    """How bodies differ: the ratio of each limb's length, and how the result is put into the reference's frame.

    ratios   [19], reference over driver, the reference scaled to the driver's height.
    offset   x, y in the driver's pixels that bring the driver's ground, or neck, to the reference's.
    scale    pixels of the driver that one pixel of the reference is.
    """

    ratios: np.ndarray
    offset: np.ndarray
    scale: float
    width: int
    height: int

    def __call__(self, pose: Pose) -> Pose:
        """Return the pose as the reference's body would take it, in the reference's frame."""
        body = pose.body.copy()
        body[:, :2] = (stretched(pose.body, self.ratios) - self.offset) / self.scale
        hands = (
            self._hand(pose.hands[0], pose.body[LEFT_WRIST], body[LEFT_WRIST]),
            self._hand(pose.hands[1], pose.body[RIGHT_WRIST], body[RIGHT_WRIST]),
        )
        return replace(pose, width=self.width, height=self.height, body=body, hands=hands)

    def _hand(self, hand: np.ndarray, wrist: np.ndarray, new_wrist: np.ndarray) -> np.ndarray:
        """Hands grow with the shoulders, about their root, which goes where the wrist went."""
        root = hand[0] if hand[0, 2] >= PRESENT else wrist
        moved = hand.copy()
        moved[:, :2] = new_wrist[:2] + (hand[:, :2] - root[:2]) * (self.ratios[:2].max() / self.scale)
        moved[hand[:, 2] < PRESENT, 2] = 0
        return moved


def retarget(driver: Pose, reference: Pose, neutral: tuple[Pose, Pose] | None = None) -> Retarget:
    """Return how to carry poses of the driver, measured in the frame `driver`, over to the reference's body.

    neutral   both of them, driver first, in pictures where they stand straight: limbs are measured there, and only how
              large they are and where they stand in `driver` and `reference`.
    """
    scale = _height_ratio(driver, reference)
    target = reference.body[:, :2] * scale
    ratios = _ratios(driver.body[:, :2], target) if neutral is None else _neutral_ratios(driver, reference, *neutral)
    moved = stretched(driver.body, ratios, foot_limit=False)
    both_whole = _whole(driver) and _whole(reference)
    offset = _stance(moved) - _stance(target) if both_whole else moved[NECK] - target[NECK]
    return Retarget(ratios, offset, scale, reference.width, reference.height)


def stretched(body: np.ndarray, ratios: np.ndarray, foot_limit: bool = True) -> np.ndarray:
    """Return points [20, 2] whose limbs are `ratios` times as long, rebuilt from the neck outwards."""
    old = body[:, :2]
    limbs = np.array([(old[end] - old[start]) * ratio for (start, end), ratio in zip(LIMBS, ratios, strict=True)])
    for foot, calf in FEET if foot_limit else ():
        length, longest = np.hypot(*limbs[foot]), LONGEST_FOOT * np.hypot(*limbs[calf])
        if length > longest:
            limbs[foot] *= longest / length
    new = old.copy()
    for (start, end), limb in zip(LIMBS, limbs, strict=True):
        new[end] = new[start] + limb
    return new


def _height_ratio(driver: Pose, reference: Pose) -> float:
    """Height of the driver over that of the reference, in pixels; where it cannot be measured their frames'."""
    frames = float(np.sqrt(driver.width * driver.height / (reference.width * reference.height)))
    return _measured_ratio(driver, reference) or frames


def _measured_ratio(driver: Pose, reference: Pose) -> float | None:
    """Nose to ankles, else to hips; None where either does not show them."""
    for low in ((RIGHT_ANKLE, LEFT_ANKLE), (RIGHT_HIP, LEFT_HIP)):
        points = [NOSE, *low]
        if min(driver.body[points, 2].min(), reference.body[points, 2].min()) > MEASURED:
            heights = [abs(pose.body[list(low), 1].mean() - pose.body[NOSE, 1]) for pose in (driver, reference)]
            if min(heights) > 0:
                return float(heights[0] / heights[1])
    return None


def _neutral_ratios(driver: Pose, reference: Pose, straight_driver: Pose, straight_reference: Pose) -> np.ndarray:
    """Ratios measured where both stand straight; half bodies, which show no height, as large as they were before."""
    height = _measured_ratio(straight_driver, straight_reference)
    scale = height or _height_ratio(straight_driver, straight_reference) * (
        _shown(reference, straight_reference) / _shown(driver, straight_driver)
    )
    return _ratios(straight_driver.body[:, :2], straight_reference.body[:, :2] * scale)


def _shown(pose: Pose, edited: Pose) -> float:
    """How much larger a person is in one picture than in another, by the width of head or shoulders."""
    widths = [
        (np.ptp(one.body[list(HEAD), 0]), np.hypot(*(one.body[RIGHT_SHOULDER] - one.body[LEFT_SHOULDER])[:2]))
        for one in (pose, edited)
    ]
    return float(max((before / after for before, after in zip(*widths, strict=True) if after > 0), default=0)) or 1.0


def _ratios(driver: np.ndarray, target: np.ndarray) -> np.ndarray:
    lengths = [np.array([np.hypot(*(body[a] - body[b])) for a, b in LIMBS]) for body in (driver, target)]
    # A limb seen end-on has no length to compare: it stays as it is.
    ratios = np.divide(lengths[1], lengths[0], out=np.ones(len(LIMBS)), where=lengths[0] > 0)
    for pairs, joint in ((PAIRED_LONGER, max), (PAIRED_MEAN, lambda a, b: (a + b) / 2)):
        for one, other in pairs:
            ratios[[one, other]] = joint(ratios[one], ratios[other])
    return ratios


def _stance(body: np.ndarray) -> np.ndarray:
    """Where a body stands: x between its hips, y of the lower foot, halfway from ankle to toes.

    The official code takes the driver's ankle but the reference's foot, so that a body carried over to itself sinks.
    """
    feet = (body[[RIGHT_ANKLE, LEFT_ANKLE], 1] + body[[RIGHT_TOE, LEFT_TOE], 1]) / 2
    return np.array([body[[RIGHT_HIP, LEFT_HIP], 0].mean(), feet.max()])


def _whole(pose: Pose) -> bool:
    """Whether hips and ankles are there and inside the frame."""
    points = pose.body[[RIGHT_HIP, LEFT_HIP, RIGHT_ANKLE, LEFT_ANKLE]]
    return bool((points[:, 2] >= PRESENT).all() and (points[:, 1] <= pose.height).all())
