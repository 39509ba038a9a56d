"""ONNX files that look at frames: opened once, then asked. onnxruntime is the extra `pose`; nothing else imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.errors import CheckpointError, MachineError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ERRORS_ALONE = 3  # of onnxruntime: exporters leave unused nodes, of which it would warn


class Network:
    """One ONNX file, or a folder with end2end.onnx.

    device   cuda is used where onnxruntime was built for it; `runs_on` tells.
    inputs, outputs   their names, in order.

    Raises MachineError without onnxruntime, CheckpointError for what is no ONNX file.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MachineError(
                "looking at frames needs onnxruntime, which is not installed", "pip install 'kinema[pose]'"
            ) from error
        self.path = path
        file = path / "end2end.onnx" if path.is_dir() else path
        wanted = [*(["CUDAExecutionProvider"] if device.startswith("cuda") else []), "CPUExecutionProvider"]
        providers = [provider for provider in wanted if provider in onnxruntime.get_available_providers()]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ALONE
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # onnxruntime has a class for each fault, and no base of them
            raise CheckpointError(
                f"{file} cannot be read as an ONNX file: {error}", "download it again", path=str(file)
            ) from error
        self.runs_on = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())

    def picture_size(self, usual: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the picture that is its first input; `usual` where the file leaves them open."""
        shape = self._session.get_inputs()[0].shape
        if len(shape) != 4 or shape[1] == 1:
            raise CheckpointError(
                f"{self.path} takes no pictures [1, 3, h, w] but {shape}",
                "give an ONNX file of that kind",
                path=str(self.path),
            )
        rows, columns = (side if isinstance(side, int) else use for side, use in zip(shape[2:], usual, strict=True))
        return rows, columns

    def __call__(self, *values: Tensor) -> dict[str, Tensor]:
        """Return its outputs by name; `values` are its first inputs, in order."""
        given = {name: value.contiguous().numpy() for name, value in zip(self.inputs, values, strict=False)}
        found = self._session.run(None, given)
        return {name: torch.as_tensor(value) for name, value in zip(self.outputs, found, strict=True)}


def planes(frame_HWC: Tensor) -> Tensor:
    """Return a frame as float32 [1, 3, H, W], its values as they are."""
    return frame_HWC.permute(2, 0, 1)[None].float()


def normalised(picture_BCHW: Tensor) -> Tensor:
    """Return a picture of values 0 to 255 with the mean and spread of ImageNet's taken out."""
    return (picture_BCHW / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
