"""Solvers of the flow ODE as generators: history is local variables; stopping early is closing the generator.

Owns the update formulas. Knows nothing of models, experts or guidance: it receives `velocity(x, index)`.
Coefficients are Python floats (float64); the state is float32.

Notation: alpha = 1 - sigma; lambda = log(alpha / sigma); h = step in lambda; phi = exp(-h) - 1; m = x0 prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from kinema.schema import Solver

Velocity = Callable[[Tensor, int], Tensor]
"""velocity(x, index) -> d x / d sigma at step `index`, of the shape of x."""


@dataclass(frozen=True)
class Step:
    """One step done. `x` is the state at sigmas[index + 1], `x0` the clean sample predicted at sigmas[index].

    memory   all that the solver needs to go on after it: passed back as `after`, it gives the same steps bit for bit.
    """

    index: int
    x: Tensor
    x0: Tensor
    memory: tuple[Tensor, ...] = ()


def unipc(velocity: Velocity, x: Tensor, sigmas: Sequence[float], after: Step | None = None) -> Iterator[Step]:
    """UniPC of order 2 with the B2(h) = exp(h) - 1 variant, predicting x0; first and last step of order 1.

    Each model output first corrects the step that led to it, then predicts the next. The x0
    prediction is formed from the sample the model saw, before its correction.
    Source: Wan-Video/Wan2.2 wan/utils/fm_solvers_unipc.py (Apache-2.0); arXiv:2302.04867.
    """
    x = x.float()
    before = x  # the sample the last prediction started from
    history: list[Tensor] = []  # x0 predictions, newest last, two at most
    order = 1
    last = len(sigmas) - 2
    if after is not None:
        x, before, *history = after.memory
        order = 1 if after.index in (0, last) else 2
    for index in range(_first(after), last + 1):
        m = x - sigmas[index] * velocity(x, index).float()
        if index > 0:
            x = _unipc_correct(before, m, history, sigmas[: index + 1], order)
        history = [*history[-1:], m]
        before = x
        order = 1 if index in (0, last) else 2
        x = _multistep(x, history, sigmas[: index + 2], order)
        yield Step(index, x, m, (x, before, *history))


def dpmpp(velocity: Velocity, x: Tensor, sigmas: Sequence[float], after: Step | None = None) -> Iterator[Step]:
    """DPM-Solver++ 2M, midpoint; first and last step of order 1.

    Source: Wan-Video/Wan2.2 wan/utils/fm_solvers.py (Apache-2.0); arXiv:2211.01095.
    """
    x = x.float()
    history: list[Tensor] = []
    last = len(sigmas) - 2
    if after is not None:
        x, *history = after.memory
    for index in range(_first(after), last + 1):
        history = [*history[-1:], x - sigmas[index] * velocity(x, index).float()]
        x = _multistep(x, history, sigmas[: index + 2], 1 if index in (0, last) else 2)
        yield Step(index, x, history[-1], (x, *history))


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], after: Step | None = None) -> Iterator[Step]:
    """Plain Euler steps in sigma, order 1, no history."""
    x = x.float() if after is None else after.memory[0]
    for index in range(_first(after), len(sigmas) - 1):
        v = velocity(x, index).float()
        x0 = x - sigmas[index] * v
        x = x + (sigmas[index + 1] - sigmas[index]) * v
        yield Step(index, x, x0, (x,))


def _first(after: Step | None) -> int:
    return 0 if after is None else after.index + 1


def _multistep(x: Tensor, history: Sequence[Tensor], sigmas: Sequence[float], order: int) -> Tensor:
    """One step from sigmas[-2] to sigmas[-1]: the midpoint 2M rule, which is UniPC's predictor too."""
    start, end = sigmas[-2], sigmas[-1]
    m = history[-1]
    if end == 0:
        return m
    h = _lambda(end) - _lambda(start)
    gain = -(1 - end) * math.expm1(-h)
    if order == 1:
        return (end / start) * x + gain * m
    r = (_lambda(start) - _lambda(sigmas[-3])) / h  # infinite after sigma 1: then the order drops by itself
    return (end / start) * x + gain * m + (gain / 2 / r) * (m - history[-2])


def _unipc_correct(
    before: Tensor, m_end: Tensor, history: Sequence[Tensor], sigmas: Sequence[float], order: int
) -> Tensor:
    """Redo the step sigmas[-2] -> sigmas[-1] from `before`, now that the model has spoken at its end."""
    start, end = sigmas[-2], sigmas[-1]
    m = history[-1]
    h = _lambda(end) - _lambda(start)
    phi = math.expm1(-h)
    gain = -(1 - end) * phi
    x = (end / start) * before + gain * m
    if order == 1:
        return x + (gain / 2) * (m_end - m)
    r = (_lambda(sigmas[-3]) - _lambda(start)) / h
    b1 = (phi / -h - 1) / phi
    b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    rho1 = (b1 - b2) / (1 - r)
    rho2 = b1 - rho1
    return x + (gain * rho1 / r) * (history[-2] - m) + (gain * rho2) * (m_end - m)


def _lambda(sigma: float) -> float:
    """Half the log signal-to-noise ratio; -inf at sigma 1."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SOLVERS: dict[Solver, Callable[[Velocity, Tensor, Sequence[float], Step | None], Iterator[Step]]] = {
    "unipc": unipc,
    "dpmpp": dpmpp,
    "euler": euler,
}
