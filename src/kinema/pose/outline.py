"""The outline of a person in a frame: SAM 2, told by the skeleton where the person is.

Two ONNX files, as samexporter makes them of the official weights. Every frame is asked about by itself; the official
preprocessing asks about four or five in 400 and follows the person from there by SAM 2's memory, not in these files.
Source: vietanhdev/samexporter export_sam2.py, sam2_onnx.py (MIT): names, shapes, labels; Wan-Video/Wan2.2
wan/modules/animate/preprocess/process_pipepline.py (Apache-2.0): the points.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.media.pixels import fit_pixels
from kinema.pose.keypoints import (
    LEFT_ANKLE,
    LEFT_HIP,
    LEFT_SHOULDER,
    NECK,
    NOSE,
    RIGHT_ANKLE,
    RIGHT_HIP,
    RIGHT_SHOULDER,
    Pose,
)
from kinema.pose.networks import Network, normalised, planes
from kinema.pose.skeleton import SEEN

FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")
DECODER_INPUTS = (*FEATURES, "point_coords", "point_labels", "mask_input", "has_mask_input")
MASKS, QUALITY = "masks", "iou_predictions"
SIDE = 1024
MASK_STRIDE = 4

PROMPTS = (NOSE, NECK, RIGHT_SHOULDER, LEFT_SHOULDER, RIGHT_HIP, LEFT_HIP, RIGHT_ANKLE, LEFT_ANKLE)
"""Points of the skeleton that say where the person is."""

ON_IT, TOP_LEFT, BOTTOM_RIGHT = 1.0, 2.0, 3.0
"""What a point of a prompt is."""


class OutlineReader:
    """Masks of a person in frames.

    encoder  ONNX file: image [1, 3, 1024, 1024], RGB with ImageNet's mean and spread taken out -> image_embed
             [1, 256, 64, 64], high_res_feats_0 [1, 32, 256, 256], high_res_feats_1 [1, 64, 128, 128].
    decoder  ONNX file: those, point_coords [1, N, 2] in the encoder's pixels, point_labels [1, N], mask_input
             [1, 1, 256, 256] and has_mask_input [1] -> masks [1, M, h, w], above 0 inside, and how good each is taken
             to be, iou_predictions [1, M].

    Raises MachineError without onnxruntime, CheckpointError for files that are something else.
    """

    def __init__(self, encoder: Path, decoder: Path, device: str = "cpu") -> None:
        self._encoder, self._decoder = Network(encoder, device), Network(decoder, device)
        self.name = encoder.name
        self._size = self._encoder.picture_size((SIDE, SIDE))
        _check_names(self._encoder, self._encoder.outputs, FEATURES)
        _check_names(self._decoder, self._decoder.inputs, DECODER_INPUTS)
        _check_names(self._decoder, self._decoder.outputs, (MASKS, QUALITY))

    def __call__(self, frame_HWC: Tensor, pose: Pose | None) -> Tensor:
        """Return the mask, bool [H, W], of the person in a uint8 RGB frame; empty without a pose."""
        height, width = frame_HWC.shape[:2]
        if pose is None:
            return torch.zeros(height, width, dtype=torch.bool)
        rows, columns = self._size
        features = self._encoder(normalised(planes(fit_pixels(frame_HWC, columns, rows, "stretch"))))
        points, labels = prompt(pose)
        asked = {
            **features,
            "point_coords": (points * torch.tensor([columns / width, rows / height]))[None],
            "point_labels": labels[None],
            "mask_input": torch.zeros(1, 1, rows // MASK_STRIDE, columns // MASK_STRIDE),
            "has_mask_input": torch.zeros(1),
        }
        found = self._decoder(*(asked[name] for name in self._decoder.inputs))
        best = int(found[QUALITY][0].argmax())
        return F.interpolate(found[MASKS][:, best : best + 1], (height, width), mode="bilinear")[0, 0] > 0


def prompt(pose: Pose) -> tuple[Tensor, Tensor]:
    """Return points [N, 2] in pixels and labels [N] that say where the person is.

    Of PROMPTS those that were seen inside the frame, where the official code takes all eight, wherever they are guessed
    to be; without any the corners of the person's box.
    """
    points = pose.body[list(PROMPTS)]
    inside = (points[:, :2] >= 0).all(1) & (points[:, :2] < (pose.width, pose.height)).all(1)
    points = points[inside & (points[:, 2] >= SEEN), :2]
    if len(points):
        return torch.from_numpy(points).float(), torch.full((len(points),), ON_IT)
    corners = np.array(pose.box).reshape(2, 2)
    return torch.from_numpy(corners).float(), torch.tensor([TOP_LEFT, BOTTOM_RIGHT])


def _check_names(network: Network, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{network.path} is not of SAM 2 as samexporter writes it: it has no {', '.join(missing)}",
            "take sam2_hiera_large.encoder.onnx and sam2_hiera_large.decoder.onnx of "
            "vietanhdev/segment-anything-2-onnx-models",
            path=str(network.path),
            expected=list(expected),
            found=list(found),
        )
