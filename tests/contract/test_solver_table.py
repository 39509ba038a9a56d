"""What every row of the SOLVERS table must do."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kinema.sampling.schedule import GRID_STARTS, schedule
from kinema.sampling.solvers import SOLVERS

ORDERS = {"unipc": 2, "dpmpp": 2, "euler": 1}


def decay(solver, steps, rate=-1.5, start=0.9, end=0.2):
    """Error of dx/dsigma = rate * x from sigma 0.9 to 0.2, whose solution is x * exp(-0.7 * rate)."""
    sigmas = [start + (end - start) * i / steps for i in range(steps + 1)]
    x = torch.tensor([1.0, -0.4])
    *_, last = SOLVERS[solver](lambda x, index: rate * x, x, sigmas)
    return (last.x - x * math.exp((end - start) * rate)).abs().max().item()


def test_the_tables_name_the_same_solvers():
    assert set(SOLVERS) == set(GRID_STARTS) == set(ORDERS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_at_its_order(solver):
    errors = [decay(solver, steps) for steps in (16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - ORDERS[solver]) < 0.15, errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_step_to_sigma_zero_lands_on_the_clean_sample(solver):
    sigmas, _ = schedule(solver, 40, 5)
    *_, last = SOLVERS[solver](lambda x, index: torch.cos(x), torch.ones(3), sigmas)
    assert sigmas[-1] == 0 and torch.allclose(last.x, last.x0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_straight_flow_is_exact(solver, steps):
    """velocity = noise - x0, constant along the path: every step count must land on x0."""
    noise, x0 = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    sigmas, _ = schedule(solver, steps, 5)
    start = (1 - sigmas[0]) * x0 + sigmas[0] * noise
    done = list(SOLVERS[solver](lambda x, index: noise - x0, start, sigmas))
    assert [step.index for step in done] == list(range(steps))
    assert torch.allclose(done[-1].x, x0, atol=1e-5)
    for step in done:
        path = (1 - sigmas[step.index + 1]) * x0 + sigmas[step.index + 1] * noise
        assert torch.allclose(step.x, path, atol=1e-5) and torch.allclose(step.x0, x0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_is_deterministic_and_leaves_its_input_alone(solver):
    sigmas, _ = schedule(solver, 6, 3)
    start = torch.linspace(-2, 2, 9)
    kept = start.clone()
    one, two = (list(SOLVERS[solver](lambda x, index: torch.sin(x + index), start, sigmas)) for _ in range(2))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) for a, b in zip(one, two, strict=True))
    assert torch.equal(start, kept)


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_is_float32_whatever_the_model_answers(solver):
    sigmas, _ = schedule(solver, 3, 3)
    start = torch.zeros(4, dtype=torch.bfloat16)
    for step in SOLVERS[solver](lambda x, index: x.bfloat16() + 1, start, sigmas):
        assert step.x.dtype == step.x0.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_closing_early_asks_no_more_of_the_model(solver):
    asked = []
    steps = SOLVERS[solver](lambda x, index: asked.append(index) or x, torch.ones(3), schedule(solver, 9, 5).sigmas)
    next(steps), next(steps)
    steps.close()
    assert asked == [0, 1]
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_survives_a_grid_that_starts_at_pure_noise(solver):
    *_, last = SOLVERS[solver](lambda x, index: torch.cos(x), torch.ones(3), [1.0, 0.9, 0.5, 0.2, 0.0])
    assert torch.isfinite(last.x).all()
