"""The algorithms: what one change adds to a layer's answer, and to its weight. One class each, tensors as buffers.

A branch at strength 1 turns the weight W (as a matrix [out, in]) into W + change(W), and the answer W x into
W x + branch(x). Knows nothing of names, files, models or strengths.
Source of the formulas: arXiv:2106.09685 (LoRA), arXiv:2108.06098 (LoHa), KohakuBlueleaf/LyCORIS docs (LoKr, the Tucker
cores of convolutions), arXiv:2402.09353 (DoRA).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import finest

CHUNK = 2**22
"""Weights of a whole matrix that are made at a time."""

LinearMap = Callable[[Tensor], Tensor]
"""x [..., in] -> W x [..., out] of the layer underneath, without its bias."""


def tucker(core: Tensor, outward: Tensor, inward: Tensor) -> Tensor:
    """Return the matrix [out, in * ...] of core [i, j, ...], outward [i, out] and inward [j, in].

    Only convolutions have such cores; for them `...` is the kernel.
    """
    whole: Tensor = torch.einsum("ij...,ip,jr->pr...", core, outward, inward)
    return whole.flatten(1)


class Branch(nn.Module):
    """One change of one weight matrix, of tensors held as buffers. Subclasses have `delta`, and override what can be
    had without it.
    """

    def __init__(self, scale: float = 1.0, **tensors: Tensor) -> None:
        super().__init__()
        self.scale = scale
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def delta(self) -> Tensor:
        """Return the matrix added to the weight, float32 [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        """Return what is added to the layer's answer, in the branch's own dtype."""
        return F.linear(x.to(self.dtype), self.delta().to(self.dtype))

    def change(self, weight: Tensor) -> Tensor:
        """Return how the matrix `weight`, float32 [out, in], changes at strength 1."""
        return self.delta()

    def norm(self, weight: Tensor) -> float:
        """Return the Frobenius norm of `change(weight)`."""
        return float(self.change(weight).norm())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.buffers()).dtype


class LowRank(Branch):
    """scale * up @ down.

    down [rank, in], up [out, rank].
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__(scale, down=down, up=up)

    def delta(self) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        return F.linear(F.linear(x.to(self.dtype), self.down) * self.scale, self.up)

    def norm(self, weight: Tensor) -> float:
        # |up down|^2 is the sum over the products of two rank x rank matrices: nothing of the weight's size is made.
        fine = finest(self.up.device)
        up, down = self.up.to(fine), self.down.to(fine)
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


class Hadamard(Branch):
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), the outer product element by element.

    w1_a, w2_a [out, rank], w1_b, w2_b [rank, in]. The matrix is made anew at every use, CHUNK weights of it at a time:
    it would fill memory.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> None:
        super().__init__(scale, w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)

    def delta(self) -> Tensor:
        return self._rows(slice(None))

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        x, height = x.to(self.dtype), len(self.w1_a)
        y = x.new_empty(*x.shape[:-1], height)
        step = max(1, CHUNK // self.w1_b.shape[1])
        for start in range(0, height, step):
            rows = slice(start, start + step)
            y[..., rows] = F.linear(x, self._rows(rows).to(self.dtype))
        return y

    def _rows(self, rows: slice) -> Tensor:
        first = self.w1_a[rows].float() @ self.w1_b.float()
        return first.mul_(self.w2_a[rows].float() @ self.w2_b.float()).mul_(self.scale)


class Kronecker(Branch):
    """LoKr: scale * kron(w1, w2). Element [a p + b, c q + d] is w1[a, c] * w2[b, d]; w2 is [p, q]."""

    w1: Tensor
    w2: Tensor

    def __init__(self, w1: Tensor, w2: Tensor, scale: float) -> None:
        super().__init__(scale, w1=w1, w2=w2)

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.w1.float().contiguous(), self.w2.float().contiguous())

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        blocks = x.to(self.dtype).unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        inner = F.linear(blocks, self.w2).transpose(-1, -2)
        return F.linear(inner, self.w1).transpose(-1, -2).flatten(-2) * self.scale

    def norm(self, weight: Tensor) -> float:
        fine = finest(self.w1.device)
        return abs(self.scale) * float(self.w1.to(fine).norm() * self.w2.to(fine).norm())


class Difference(Branch):
    """A whole matrix (or vector, for biases and norms), added as it is."""

    full: Tensor

    def __init__(self, full: Tensor, scale: float) -> None:
        super().__init__(scale, full=full)

    def delta(self) -> Tensor:
        return self.scale * self.full.float()

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        return F.linear(x.to(self.dtype), self.full) * self.scale


class Rotated(Branch):
    """Diagonal OFT: rows of the weight turned in blocks, W + change = rescale * R W, R orthogonal.

    blocks   [count, size, size]: R of each block is the Cayley transform of blocks - blocks.T.
    limit    to which the norm of that difference is brought down; 0 is none.
    rescale  [count * size, 1], lengths of the rows afterwards; None leaves them.
    Source: arXiv:2306.07280; KohakuBlueleaf/LyCORIS diag_oft (which R is transposed, what is limited).
    """

    rotation: Tensor
    rescale: Tensor

    def __init__(self, blocks: Tensor, limit: float = 0.0, rescale: Tensor | None = None) -> None:
        skew, eye = blocks.float() - blocks.float().mT, torch.eye(blocks.shape[-1], device=blocks.device)
        if 0 < limit < (norm := float(skew.norm()) + 1e-8):
            skew = skew * (limit / norm)
        ones = torch.ones(blocks.shape[0] * blocks.shape[1], 1, device=blocks.device)
        rotation = torch.linalg.solve(eye - skew, eye + skew)  # (1 + skew) / (1 - skew), whose factors commute
        super().__init__(rotation=rotation, rescale=ones if rescale is None else rescale)

    def change(self, weight: Tensor) -> Tensor:
        return self._turned(weight.T).T - weight

    def delta(self) -> Tensor:
        raise TypeError("the change that OFT makes depends on the weight: ask `change`")

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        y = linear(x).float()
        return self._turned(y) - y

    def _turned(self, columns: Tensor) -> Tensor:
        """Turn the last axis."""
        blocks = columns.unflatten(-1, self.rotation.shape[:2])
        turned: Tensor = torch.einsum("knm,...kn->...km", self.rotation, blocks).flatten(-2)
        return turned * self.rescale.flatten()


class Decomposed(Branch):
    """DoRA: the changed weight brought to learned lengths, gain * (W + inner), gain = magnitude / |W + inner|.

    magnitude [out, 1] gives the lengths of the rows, [1, in] those of the columns.
    weight    of the layer, float32 [out, in]; only the gain made of it is kept.
    """

    gain: Tensor

    def __init__(self, inner: Branch, magnitude: Tensor, weight: Tensor) -> None:
        by_row = magnitude.shape[1] == 1
        length = (weight + inner.delta()).norm(dim=1 if by_row else 0, keepdim=True)
        gain = magnitude.float() / length.clamp(min=torch.finfo(torch.float32).tiny)
        super().__init__(gain=gain.to(weight.device))
        self.inner, self.by_row = inner, by_row

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def change(self, weight: Tensor) -> Tensor:
        return self.gain * (weight + self.inner.delta()) - weight

    def delta(self) -> Tensor:
        raise TypeError("the change that DoRA makes depends on the weight: ask `change`")

    def forward(self, x: Tensor, linear: LinearMap) -> Tensor:
        gain = self.gain.flatten()
        if self.by_row:
            return (gain - 1) * linear(x).float() + gain * self.inner.forward(x, linear).float()
        x = x.float()
        return linear(x * (gain - 1)).float() + self.inner.forward(x * gain, linear).float()
