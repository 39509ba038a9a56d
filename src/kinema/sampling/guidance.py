"""How the branches of one step become one velocity. Tensors in, tensor out; knows no models."""

from __future__ import annotations

from torch import Tensor


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Return uncond + scale * (cond - uncond), float32: classifier-free guidance, arXiv:2207.12598."""
    return uncond.float() + scale * (cond.float() - uncond.float())
