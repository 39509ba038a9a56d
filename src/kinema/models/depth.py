"""Depth of a picture, by Depth Anything V2 as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import CheckpointError, NumericsError

SHORT_SIDE = 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Depth:
    """depth(frame_HWC) -> control frame. Made from a transformers folder (config.json, model.safetensors).

    Raises CheckpointError where the folder holds no such model, or not all of its weights.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import DepthAnythingForDepthEstimation

        try:
            loaded: Any = DepthAnythingForDepthEstimation.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} holds no Depth Anything model: {str(error).splitlines()[0]}",
                "give a folder with its config.json and model.safetensors",
                path=str(folder),
            ) from error
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors of the model, such as {', '.join(missing[:3])}",
                "fetch the folder again",
                path=str(folder),
                key=missing[0],
            )
        self._model = model.eval().float().to(device)
        self._device = device
        self._patch: int = model.config.patch_size

    @torch.inference_mode()
    def __call__(self, frame_HWC: Tensor) -> Tensor:
        """Return depth as grey, uint8 [H, W, 3] at the frame's size: the nearest is white, the farthest black.

        Each frame has its own scale, as the preprocessors that control models were trained with have it.
        """
        height, width, _ = frame_HWC.shape
        depth_BHW = self._model(pixel_values=self.pixels(frame_HWC)).predicted_depth.float()
        depth_HW = F.interpolate(depth_BHW[None], (height, width), mode="bilinear", align_corners=True)[0, 0]
        low, high = depth_HW.aminmax()
        if not bool(torch.isfinite(high - low)):
            raise NumericsError("the depth model gave values that are not finite", "check its weights", stage="depth")
        grey_HW = ((depth_HW - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8).cpu()
        return grey_HW[:, :, None].expand(-1, -1, 3)

    def pixels(self, frame_HWC: Tensor) -> Tensor:
        """Return the model's input [1, 3, h, w]: the short side 518 pixels, both whole patches, normalised.

        Source: DepthAnything/Depth-Anything-V2 depth_anything_v2/dpt.py image2tensor (Apache-2.0).
        """
        height, width, _ = frame_HWC.shape
        scale = SHORT_SIDE / min(height, width)
        h, w = (max(1, round(side * scale / self._patch)) * self._patch for side in (height, width))
        frame_BCHW = frame_HWC.to(self._device).permute(2, 0, 1)[None].float() / 255
        resized_BCHW = F.interpolate(frame_BCHW, (h, w), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (resized_BCHW - mean) / std
