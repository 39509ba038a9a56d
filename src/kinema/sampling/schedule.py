"""Sigma grids and timesteps of the solvers, and which expert a step belongs to.

Pure Python, so that planning needs no torch; the values are those the official code has in float32.
Knows nothing of models, guidance or tensors.

Flow matching: x_sigma = (1 - sigma) * x0 + sigma * noise, velocity = noise - x0, timestep = 1000 * sigma.
Source: Wan-Video/Wan2.2 wan/utils/fm_solvers_unipc.py, fm_solvers.py (Apache-2.0).
Parity: tests/parity/test_solvers.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from kinema.errors import RequestError
from kinema.schema import Expert, Solver

TRAIN_TIMESTEPS = 1000


class Schedule(NamedTuple):
    """sigmas has one entry a step and the final 0; timesteps has one entry a step, as the DiT sees it."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """Return the official grid of `solver`.

    steps  at least 1.
    shift  above 0; 1 leaves the grid linear, larger values spend more steps at high noise.

    UniPC starts from the largest training sigma, 0.999; DPM++ and Euler from 1. UniPC and DPM++ show
    the model whole timesteps (truncated), Euler fractional ones; the update uses the exact sigma.
    Raises RequestError for steps below 1 or a shift of 0 or less.
    """
    if steps < 1:
        raise RequestError(f"steps {steps} is below 1", "pass --steps 20", field="steps", got=steps, allowed=">= 1")
    if not 0 < shift < float("inf"):
        raise RequestError(f"shift {shift} is not above 0", "pass --shift 5", field="shift", got=shift, allowed="> 0")
    start = GRID_STARTS[solver]
    exact = [_shifted(index * ((0.0 - start) / steps) + start, shift) for index in range(steps)]
    sigmas = (*_float32(exact), 0.0)
    if solver == "euler":
        return Schedule(sigmas, _float32([sigma * TRAIN_TIMESTEPS for sigma in exact]))
    return Schedule(sigmas, tuple(float(int(sigma * TRAIN_TIMESTEPS)) for sigma in exact))


def flux_shift(tokens: int) -> float:
    """Return FLUX.1's shift for an image of `tokens` tokens: its exponent grows linearly with them, 0.5 at 256 (a
    256 x 256 image) and 1.15 at 4096 (1024 x 1024), and on beyond both.

    Source: black-forest-labs/flux src/flux/sampling.py get_schedule (Apache-2.0).
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (tokens - 256))


def expert_of(timestep: float, boundary: float | None) -> Expert:
    """Return "high" where timestep >= boundary * 1000, else "low"; "model" where there is no boundary.

    boundary  share of the 1000 training timesteps, 0.875 or 0.9 in the official two-expert models.
    """
    if boundary is None:
        return "model"
    return "high" if timestep >= boundary * TRAIN_TIMESTEPS else "low"


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    layout = f"{len(values)}f"
    return struct.unpack(layout, struct.pack(layout, *values))


GRID_STARTS: dict[str, float] = {
    "unipc": _float32([1 - 1 / TRAIN_TIMESTEPS])[0],  # the official code takes it from a float32 table
    "dpmpp": 1.0,
    "euler": 1.0,
}
