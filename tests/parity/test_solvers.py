"""Solvers against the official code's own numbers, and against diffusers on the same grid."""

from __future__ import annotations

import pytest
import torch

from golden_weights import golden, input_tensor
from kinema.sampling.schedule import schedule
from kinema.sampling.solvers import SOLVERS

SPEC, TENSORS = golden("solvers")


def toy(x, timestep):
    """The velocity the golden runs used."""
    return torch.sin(1.3 * x) + 0.5 * x * (timestep / 1000) - 0.2


def run(solver, steps, shift, x):
    sigmas, timesteps = schedule(solver, steps, shift)
    return list(SOLVERS[solver](lambda x, index: toy(x, timesteps[index]), x, sigmas))


@pytest.mark.parametrize("name", SPEC["config"]["runs"])
def test_golden(name):
    solver, steps, shift = name.split("_")
    sigmas, timesteps = schedule(solver, int(steps), float(shift))
    assert torch.allclose(torch.tensor(sigmas), TENSORS[f"{name}.sigmas"], rtol=0, atol=1e-6)
    assert torch.equal(torch.tensor(timesteps), TENSORS[f"{name}.timesteps"])
    x = input_tensor("noise", SPEC["inputs"]["noise"], SPEC["salt"], 1.7)
    final = run(solver, int(steps), float(shift), x)[-1].x
    assert (final - TENSORS[f"{name}.final"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["unipc_20_5", "unipc_4_5"])
@pytest.mark.parametrize("fault", ["no corrector", "truncated sigmas", "sigma in place of the whole timestep"])
def test_a_wrong_unipc_misses_the_golden(name, fault):
    _, steps, shift = name.split("_")
    sigmas, timesteps = schedule("unipc", int(steps), float(shift))
    solver = SOLVERS["dpmpp" if fault == "no corrector" else "unipc"]  # the predictor of UniPC alone is DPM++ 2M
    if fault == "truncated sigmas":
        sigmas = (*(timestep / 1000 for timestep in timesteps), 0.0)
    elif fault == "sigma in place of the whole timestep":
        timesteps = tuple(1000 * sigma for sigma in sigmas)
    x = input_tensor("noise", SPEC["inputs"]["noise"], SPEC["salt"], 1.7)
    *_, last = solver(lambda x, index: toy(x, timesteps[index]), x, sigmas)
    assert (last.x - TENSORS[f"{name}.final"]).abs().max() > 5e-5


def diffusers_scheduler(solver):
    diffusers = pytest.importorskip("diffusers")
    common = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(**common, solver_type="bh2")
    return diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_type="midpoint")


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
@pytest.mark.parametrize("steps", [1, 2, 5, 16, 30])
def test_diffusers_agrees_on_the_same_grid(solver, steps):
    sigmas, timesteps = schedule(solver, steps, 7)
    scheduler = diffusers_scheduler(solver)
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigmas), torch.tensor(timesteps)
    start = input_tensor("start", (3, 7), 4)
    x = start
    for index, timestep in enumerate(scheduler.timesteps):
        if index == 0:
            scheduler._step_index = 0
        x = scheduler.step(toy(x, timestep), timestep, x, return_dict=False)[0]
    final = run(solver, steps, 7, start)[-1].x
    assert (final - x).abs().max() < 2e-5
