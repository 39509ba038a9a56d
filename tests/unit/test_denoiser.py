"""Which model runs when, what is held clean, and that a value that is not finite stops the run where it appears."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kinema.errors import NumericsError
from kinema.sampling.denoiser import cfg, noise, sample
from kinema.sampling.schedule import expert_of, schedule
from kinema.schema import PlanStep

SHAPE = (1, 4, 3, 2, 2)


def plan_steps(solver="unipc", steps=8, shift=5.0, boundary=0.9, guidance=(3.0, 4.0), late=0):
    """The steps a plan would hold; `late` switches the expert that many steps late."""
    sigmas, timesteps = schedule(solver, steps, shift)
    experts = [expert_of(timestep, boundary) for timestep in timesteps]
    experts = (experts[:1] * late + experts)[:steps]
    low, high = guidance
    return [
        PlanStep(sigma=sigma, timestep=timestep, expert=expert, guidance=high if expert == "high" else low)
        for sigma, timestep, expert in zip(sigmas, timesteps, experts, strict=False)
    ]


def velocity(step, branch, x):
    """Two small experts, non-linear and mixing positions, each with two branches."""
    gain = {"high": 0.8, "low": 1.1, "model": 1.0}[step.expert]
    push = 0.3 if branch == "cond" else -0.1
    return torch.tanh(gain * x + push) + 0.1 * x.mean() + step.timestep / 5000


def each(model):
    """What the denoiser asks: the velocities of several branches."""
    return lambda step, branches, x: [model(step, branch, x) for branch in branches]


def finished(steps, model=velocity, clean=None, solver="unipc"):
    *_, last = sample(steps, solver, noise(7, SHAPE), each(model), clean)
    return last.x


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        ((3.0, 4.0), {("high", "cond"): 3, ("high", "uncond"): 3, ("low", "cond"): 5, ("low", "uncond"): 5}),
        ((1.0, 4.0), {("high", "cond"): 3, ("high", "uncond"): 3, ("low", "cond"): 5}),
        ((3.0, 1.0), {("high", "cond"): 3, ("low", "cond"): 5, ("low", "uncond"): 5}),
        ((1.0, 1.0), {("high", "cond"): 3, ("low", "cond"): 5}),
        ((0.0, 1.0001), {("high", "cond"): 3, ("high", "uncond"): 3, ("low", "cond"): 5, ("low", "uncond"): 5}),
    ],
)
def test_each_branch_runs_as_often_as_guidance_asks(guidance, expected):
    ran = Counter()

    def counting(step, branch, x):
        ran[step.expert, branch] += 1
        return velocity(step, branch, x)

    finished(plan_steps(guidance=guidance), counting)
    assert ran == expected


def test_cfg_is_the_official_formula():
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    assert torch.equal(cfg(cond, uncond, 3.0), torch.tensor([2.0, 8.0]))
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)


def test_the_model_sees_the_timesteps_of_the_plan():
    seen = []

    def watching(step, branch, x):
        seen.append((step.expert, step.timestep))
        return velocity(step, branch, x)

    steps = plan_steps(guidance=(1.0, 1.0))
    finished(steps, watching)
    assert seen == [(step.expert, step.timestep) for step in steps]
    assert seen[0] == ("high", 999.0)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
def test_an_expert_switched_one_step_late_changes_the_result(solver):
    right, late = (finished(plan_steps(solver, late=late), solver=solver) for late in (0, 1))
    assert (right - late).abs().max() > 1e-3
    assert torch.equal(right, finished(plan_steps(solver), solver=solver))


def test_history_runs_across_the_switch():
    """Equal experts under two names give the same result as one model: nothing is reset at the switch."""
    same = lambda step, branch, x: velocity(step.model_copy(update={"expert": "model"}), branch, x)  # noqa: E731
    assert torch.equal(
        finished(plan_steps(guidance=(3, 3)), same), finished(plan_steps(boundary=None, guidance=(3, 3)), same)
    )


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize("bad_step", range(8))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_planted_non_finite_value_is_caught_at_its_step(solver, bad_step, value):
    calls = []

    def planted(step, branch, x):
        v = velocity(step, branch, x)
        if branch == "uncond":
            calls.append(step.timestep)
            if len(calls) == bad_step + 1:
                v[0, 1, 2, 0, 1] = value
        return v

    steps, done = plan_steps(solver), []
    with pytest.raises(NumericsError) as caught:
        done.extend(sample(steps, solver, noise(7, SHAPE), each(planted)))
    details = caught.value.details
    assert len(done) == bad_step == details["step"]
    assert (details["sigma"], details["expert"]) == (steps[bad_step].sigma, steps[bad_step].expert)
    assert f"step {bad_step + 1} of 8" in caught.value.message and "uncond" in caught.value.message


def test_an_overflow_of_the_guidance_itself_is_caught():
    huge = lambda step, branch, x: torch.full_like(x, 3e38 if branch == "cond" else -3e38)  # noqa: E731
    with pytest.raises(NumericsError, match="step 1 of"):
        finished(plan_steps(), huge)


def test_clean_latents_are_in_everything_seen_and_everything_yielded():
    clean = noise(1, (1, 4, 1, 2, 2))
    seen = []

    def watching(step, branch, x):
        seen.append(x[:, :, :1].clone())
        return velocity(step, branch, x)

    steps = plan_steps(boundary=None)
    done = list(sample(steps, "unipc", noise(7, SHAPE), each(watching), clean))
    assert len(seen) == 2 * len(steps) and all(torch.equal(x, clean) for x in seen)
    assert all(torch.equal(step.x[:, :, :1], clean) and torch.equal(step.x0[:, :, :1], clean) for step in done)
    assert (done[-1].x - finished(steps)).abs()[:, :, 1:].max() > 1e-3, "the clean frame must reach the others"


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
def test_reimposition_equals_overwriting_the_state_after_every_step(solver):
    """The official loop overwrites the solver's own state; here only what is seen and yielded is."""
    from kinema.sampling.solvers import SOLVERS

    clean, steps = noise(1, (1, 4, 1, 2, 2)), plan_steps(solver, boundary=None, guidance=(1.0, 1.0))

    def overwrite(x):
        x[:, :, :1] = clean  # in place: the generator's own state

    start = noise(7, SHAPE)
    overwrite(start)
    sigmas = (*(step.sigma for step in steps), 0.0)
    for step in SOLVERS[solver](lambda x, i: velocity(steps[i], "cond", x), start, sigmas):
        overwrite(step.x)
    assert torch.equal(step.x, finished(steps, clean=clean, solver=solver))


def test_noise_is_float32_and_a_seed_means_the_same_everywhere():
    x = noise(42, (16, 3, 2, 2))
    assert x.dtype == torch.float32 and x.device.type == "cpu"
    assert torch.allclose(x.flatten()[:4], torch.tensor([1.9269, 1.4873, 0.9007, -2.1055]), atol=1e-4)
    assert torch.equal(x, noise(42, (16, 3, 2, 2))) and not torch.equal(x, noise(43, (16, 3, 2, 2)))
    torch.manual_seed(0)
    assert torch.equal(x, noise(42, (16, 3, 2, 2))), "the global generator must not matter"
    assert torch.isfinite(noise(2**63 - 1, (4,))).all()
