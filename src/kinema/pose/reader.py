"""Read a person's pose from a frame with two networks: one finds the person, one the 133 points of the whole body.

Both are ONNX files: yolov10m and ViTPose-H wholebody, the two that Animate was trained behind; others with the same
inputs and outputs do as well.
Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/pose2d.py, pose2d_utils.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.pose.keypoints import NUM_POINTS, Pose
from kinema.pose.networks import Network, normalised, planes

Box = tuple[float, float, float, float]

PERSON = 0
"""Its number among the 80 classes of COCO."""

FOUND = 0.05
"""Least score of a person; of several the largest counts, so a low one does no harm."""

SAME = 0.5
"""Overlap (intersection over union) from which two boxes are one person's."""

STOUT = 0.4
"""The largest box must be this long, measured against the longest: a large crowd of nothing is no person."""

SMALLEST = 10
"""Pixels; in a smaller box no pose is looked for, but in the whole frame."""

MARGIN = 1.25
BLUR_WIDTH, BLUR_SIGMA = 11, 2.0


class PoseReader:
    """Poses of the largest person in each frame.

    detector  ONNX file: RGB [1, 3, 640, 640] in [0, 1] -> boxes [1, N, 6]: x0, y0, x1, y1 in its pixels, score, class.
    points    ONNX file, or a folder with end2end.onnx: RGB [1, 3, 256, 192] -> heatmaps [1, 133, 64, 48].
    device    cuda is used where onnxruntime was built for it; `runs_on` tells.

    Raises MachineError without onnxruntime, CheckpointError for files that are something else.
    """

    def __init__(self, detector: Path, points: Path, device: str = "cpu") -> None:
        self._detector, self._points = Network(detector, device), Network(points, device)
        self.runs_on = self._points.runs_on
        self._detector_size = self._detector.picture_size((640, 640))
        self._points_size = self._points.picture_size((256, 192))

    def __call__(self, frame_HWC: Tensor) -> Pose | None:
        """Return the pose in a uint8 RGB frame, None where no person is found."""
        box = self.find(frame_HWC)
        if box is None:
            return None
        height, width = frame_HWC.shape[:2]
        return Pose.of(self.read(frame_HWC, box), (width, height), box)

    def find(self, frame_HWC: Tensor) -> Box | None:
        """Return the box of the largest person, in the frame's pixels."""
        rows, columns = self._detector_size
        height, width = frame_HWC.shape[:2]
        picture = F.interpolate(planes(frame_HWC), (rows, columns), mode="bilinear").round() / 255
        found = _first(self._detector(picture)).numpy()
        if found.ndim != 3 or found.shape[-1] != 6:
            raise _wrong(self._detector, "person detector", f"boxes [1, N, 6], not {list(found.shape)}")
        boxes = found[0][(found[0, :, 4] > FOUND) & (found[0, :, 5] == PERSON)]
        boxes = boxes[:, :5] * (width / columns, height / rows, width / columns, height / rows, 1)
        return largest_person(boxes)

    def read(self, frame_HWC: Tensor, box: Box) -> np.ndarray:
        """Return the 133 points [133, 3] of the person in the box: x, y in the frame's pixels, score."""
        height, width = frame_HWC.shape[:2]
        if box[2] - box[0] < SMALLEST or box[3] - box[1] < SMALLEST:
            box = (0, 0, width, height)
        rows, columns = self._points_size
        centre = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        tall = MARGIN * max((box[2] - box[0]) * rows / columns, box[3] - box[1])
        extent = np.array([tall * columns / rows, tall])
        picture = F.interpolate(_cut(frame_HWC, centre, extent), (rows, columns), mode="bilinear")
        heat = _first(self._points(normalised(picture)))
        if heat.ndim != 4 or heat.shape[1] != NUM_POINTS:
            raise _wrong(self._points, "pose network", f"heatmaps [1, {NUM_POINTS}, h, w], not {list(heat.shape)}")
        peaks, scores = heatmap_peaks(heat[0].float())
        cells = np.array([heat.shape[3], heat.shape[2]])
        places = peaks.numpy() * extent / cells + centre - extent / 2
        return np.concatenate([places, scores.numpy()[:, None]], axis=1)


def _first(answer: Mapping[str, Tensor]) -> Tensor:
    return next(iter(answer.values()))


def _wrong(network: Network, what: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{network.path} answers with something else than a {what}: expected {expected}",
        "take yolov10m.onnx to find people and vitpose_h_wholebody.onnx for their points",
        path=str(network.path),
    )


def largest_person(boxes: np.ndarray) -> Box | None:
    """Return the largest of boxes [N, 5] (x0, y0, x1, y1, score) without doubles of better ones; None of none."""
    kept: list[np.ndarray] = []
    for box in boxes[np.argsort(-boxes[:, 4])]:
        if all(_overlap(box, other) <= SAME for other in kept):
            kept.append(box)
    if not kept:
        return None
    longest = max(max(box[2] - box[0], box[3] - box[1]) for box in kept)
    stout = [box for box in kept if max(box[2] - box[0], box[3] - box[1]) >= STOUT * longest]
    x0, y0, x1, y1, _ = max(stout, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return float(x0), float(y0), float(x1), float(y1)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:4], other[2:4]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    both = float(np.prod(one[2:4] - one[:2]) + np.prod(other[2:4] - other[:2]))
    return shared / (both - shared) if both > shared else 0.0


def heatmap_peaks(heat_KHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return peaks [K, 2] as x, y in cells, between cells where the heat around them says so, and their heights [K].

    A peak is moved by one Newton step on the logarithm of the heatmap, blurred by a Gaussian of two cells.
    Source: Zhang et al., Distribution-Aware Coordinate Representation for Human Pose Estimation, CVPR 2020.
    """
    count, height, width = heat_KHW.shape
    scores, places = heat_KHW.flatten(1).max(1)
    x, y = places % width, places // width
    log = _blurred(heat_KHW).clamp_min(1e-10).log()
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    k, x0, y0 = torch.arange(count), x.clamp(2, max(width - 3, 2)), y.clamp(2, max(height - 3, 2))

    def at(dx: int, dy: int) -> Tensor:
        return log[k, y0 + dy, x0 + dx]

    slope = torch.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], 1) / 2
    xx, yy = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4, (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = xx * yy - xy**2
    inside &= determinant != 0
    safe = torch.where(inside, determinant, torch.ones_like(determinant))
    step = torch.stack([yy * slope[:, 0] - xy * slope[:, 1], xx * slope[:, 1] - xy * slope[:, 0]], 1) / safe[:, None]
    return torch.stack([x, y], 1) - torch.where(inside[:, None], step, torch.zeros_like(step)), scores


def _blurred(heat_KHW: Tensor) -> Tensor:
    """Blurred, each map brought back to the height it had."""
    weights = torch.exp(-0.5 * ((torch.arange(BLUR_WIDTH) - BLUR_WIDTH // 2) / BLUR_SIGMA) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    rows_K1HW = F.conv2d(heat_KHW[:, None], weights, padding=(0, BLUR_WIDTH // 2))
    maps = F.conv2d(rows_K1HW, weights.mT, padding=(BLUR_WIDTH // 2, 0))[:, 0]
    return maps * (heat_KHW.amax((1, 2)) / maps.amax((1, 2)).clamp_min(1e-10))[:, None, None]


def _cut(frame_HWC: Tensor, centre: np.ndarray, extent: np.ndarray) -> Tensor:
    """Return the rectangle [1, 3, h, w] of a frame, black outside of it."""
    left, top = (round(float(edge)) for edge in centre - extent / 2)
    right, bottom = (round(float(edge)) for edge in centre + extent / 2)
    height, width = frame_HWC.shape[:2]
    inner = planes(frame_HWC[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)])
    return F.pad(inner, (max(-left, 0), max(right - width, 0), max(-top, 0), max(bottom - height, 0)))
