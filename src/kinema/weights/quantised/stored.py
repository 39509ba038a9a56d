"""A packed weight still on disk: which tensors of a file make it up, read when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.weights.mapped import StoredTensor
from kinema.weights.quantised.packed import Packed


@dataclass(frozen=True)
class StoredPacked:
    """Where a packed weight of `shape` lies; fields as in Packed, `scale` in whatever shape the file has it."""

    kind: str
    shape: tuple[int, ...]
    data: StoredTensor
    scale: StoredTensor | None = None
    rotation: int = 0
    weight_only: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def bytes(self) -> int:
        return self.data.bytes + (self.scale.bytes if self.scale else 0)

    def packed(self) -> Packed:
        """Return the weight packed, its data memory-mapped. Raises CheckpointError for scales that are not numbers."""
        scale = None
        if self.scale is not None:
            scale = self.scale.open().float()
            if not bool(scale.isfinite().all()):
                path = self.data.file.path
                raise CheckpointError(f"{path}: a scale is not finite", "Download it again.", path=path)
            scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(self.shape[0], -1)
        return Packed(self.kind, self.shape, self.data.open(), scale, self.rotation, self.weight_only)

    def open(self) -> Tensor:
        """Return the weight unpacked, float32."""
        return self.packed().dequantised()
