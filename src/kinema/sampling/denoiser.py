"""From noise to latents: which expert and which guidance at each step, and the clean frames held fixed.

Owns the loop around a solver. Knows models only as a callable, and the plan only as its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from kinema.errors import NumericsError
from kinema.sampling.solvers import SOLVERS, Step
from kinema.schema import PlanStep, Solver

Branch = Literal["cond", "uncond"]


class ExpertVelocity(Protocol):
    """velocity(step, branches, x_BCFhw) -> velocity_BCFhw of each branch, by the model that `step` names."""

    def __call__(self, step: PlanStep, branches: Sequence[Branch], x_BCFhw: Tensor, /) -> Sequence[Tensor]: ...


class Denoiser:
    """The velocity a solver asks for: `denoiser(x_BCFhw, index)` runs step `index` of the plan.

    steps        expert, guidance, timestep and sigma of each step.
    velocity     the models, as one callable.
    clean_BCFhw  latents of the first frames, known without noise (TI2V); None where there are none.

    A guidance of exactly 1.0 runs the conditional branch alone; every other scale, 0 too, runs both.
    Raises NumericsError where the model's answer is not finite.
    """

    def __init__(self, steps: Sequence[PlanStep], velocity: ExpertVelocity, clean_BCFhw: Tensor | None = None) -> None:
        self.steps = tuple(steps)
        self.velocity = velocity
        self.clean_BCFhw = clean_BCFhw

    def __call__(self, x_BCFhw: Tensor, index: int) -> Tensor:
        step = self.steps[index]
        branches: tuple[Branch, ...] = ("cond",) if step.guidance == 1.0 else ("cond", "uncond")
        velocities = [v_BCFhw.float() for v_BCFhw in self.velocity(step, branches, self.impose(x_BCFhw))]
        for branch, v_BCFhw in zip(branches, velocities, strict=True):
            self.check(v_BCFhw, index, f"the {branch} velocity")
        return velocities[0] if len(velocities) == 1 else cfg(velocities[0], velocities[1], step.guidance)

    def impose(self, x_BCFhw: Tensor) -> Tensor:
        """Return x with its first latent frames replaced by the clean ones."""
        if self.clean_BCFhw is None:
            return x_BCFhw
        clean_BCFhw = self.clean_BCFhw.to(x_BCFhw).expand(x_BCFhw.shape[0], -1, -1, -1, -1)
        return torch.cat([clean_BCFhw, x_BCFhw[:, :, clean_BCFhw.shape[2] :]], dim=2)

    def check(self, tensor: Tensor, index: int, what: str) -> None:
        """Raise NumericsError naming step, sigma and expert unless every value is finite."""
        if bool(torch.isfinite(tensor).all()):
            return
        step = self.steps[index]
        raise NumericsError(
            f"{what} of step {index + 1} of {len(self.steps)} is not finite "
            f"(sigma {step.sigma:.4f}, timestep {step.timestep:g}, expert {step.expert})",
            "run with --precision reference; if it stays, check the weight file with: kinema inspect FILE",
            stage="sample",
            step=index,
            sigma=step.sigma,
            expert=step.expert,
            what=what,
        )


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Return uncond + scale * (cond - uncond): classifier-free guidance, arXiv:2207.12598."""
    return uncond + scale * (cond - uncond)


def sample(
    plan_steps: Sequence[PlanStep],
    solver: Solver,
    noise_BCFhw: Tensor,
    velocity: ExpertVelocity,
    clean_BCFhw: Tensor | None = None,
    after: Step | None = None,
) -> Iterator[Step]:
    """Yield each denoising step; the `x` of the last one is the finished latents, normalised, float32.

    noise_BCFhw  float32 on the device to run on.
    after        a step yielded by such a run before: this one goes on behind it, with the same numbers.

    The solver's history runs on across the switch of experts, as in the official code. Clean latents
    are in every x the model sees and every x yielded; the solver's own values under them are free,
    which changes nothing elsewhere, since its update is elementwise.
    Raises NumericsError at the first step whose values are not finite.
    """
    denoiser = Denoiser(plan_steps, velocity, clean_BCFhw)
    sigmas = (*(step.sigma for step in plan_steps), 0.0)
    for step in SOLVERS[solver](denoiser, noise_BCFhw, sigmas, after):
        denoiser.check(step.x, step.index, "the result")
        yield replace(step, x=denoiser.impose(step.x), x0=denoiser.impose(step.x0))


def noised(clean_BCFhw: Tensor, noise_BCFhw: Tensor, sigma: float) -> Tensor:
    """Return clean latents with the noise that a step at `sigma` expects: (1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean_BCFhw.float() + sigma * noise_BCFhw


def noise(seed: int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Return standard normal float32 noise from a CPU generator: a seed means the same on every device.

    seed  0 to 2**63 - 1.
    draw  how many tensors of this shape the generator has made before.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(draw):
        torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
