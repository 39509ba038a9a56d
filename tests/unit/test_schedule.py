"""The official schedule table, and the boundary rule where a wrong comparison shows."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from kinema.errors import RequestError
from kinema.sampling.schedule import expert_of, schedule

# (solver, steps, shift, head, tail) from the official UniPC grid.
TIMESTEPS = [
    ("unipc", 40, 12, (999, 997, 995, 993), (492, 386, 235)),
    ("unipc", 40, 5, (999, 994, 989, 983), (288, 208, 113)),
    ("unipc", 40, 3, (999, 991, 982), (195, 136, 71)),
    ("unipc", 50, 5, (999, 995, 991, 987), (241, 172, 92)),
    ("unipc", 20, 5, (999, 989, 978), (468, 356, 208)),
    ("unipc", 50, 16, (999, 998, 997, 995), (504, 399, 245)),
    ("unipc", 4, 12, (999, 972, 922, 799), ()),
    ("unipc", 4, 5, (999, 937, 833, 624), ()),
    ("unipc", 4, 8, (999, 959, 888, 727), ()),
    ("unipc", 4, 3, (999, 899, 749, 499), ()),
]

# (solver, steps, shift, boundary, steps of the high-noise expert).
HIGH_STEPS = [
    ("unipc", 40, 12, 0.875, 26),
    ("unipc", 40, 5, 0.9, 15),
    ("unipc", 40, 3, 0.9, 10),
    ("dpmpp", 40, 3, 0.9, 11),
    ("unipc", 4, 12, 0.875, 3),
    ("unipc", 4, 5, 0.9, 2),
    ("unipc", 4, 8, 0.875, 3),
    ("unipc", 4, 3, 0.9, 1),
    ("unipc", 8, 12, 0.875, 6),
    ("unipc", 8, 5, 0.9, 3),
    ("unipc", 8, 8, 0.875, 5),
    ("unipc", 8, 3, 0.9, 2),
    ("unipc", 20, 12, 0.875, 13),
    ("unipc", 20, 5, 0.9, 8),
    ("unipc", 20, 8, 0.875, 11),
    ("unipc", 20, 3, 0.9, 5),
]


@pytest.mark.parametrize(("solver", "steps", "shift", "head", "tail"), TIMESTEPS)
def test_timesteps_of_the_official_table(solver, steps, shift, head, tail):
    sigmas, timesteps = schedule(solver, steps, shift)
    assert len(timesteps) == steps and len(sigmas) == steps + 1
    assert timesteps[: len(head)] == head
    assert not tail or timesteps[-len(tail) :] == tail


@pytest.mark.parametrize(("solver", "steps", "shift", "boundary", "high"), HIGH_STEPS)
def test_number_of_high_noise_steps(solver, steps, shift, boundary, high):
    experts = [expert_of(timestep, boundary) for timestep in schedule(solver, steps, shift).timesteps]
    assert experts == ["high"] * high + ["low"] * (steps - high)


@pytest.mark.parametrize(("timestep", "boundary"), [(875, 0.875), (875.0, 0.875), (900, 0.9), (900.0, 0.900)])
def test_the_boundary_itself_is_high_noise(timestep, boundary):
    assert expert_of(timestep, boundary) == "high"
    assert expert_of(timestep - 1, boundary) == "low"
    assert expert_of(np.nextafter(timestep, 0), boundary) == "low"


def test_every_thousandth_as_boundary_means_its_whole_timestep():
    for i in range(1, 1001):
        assert (expert_of(i, i / 1000), expert_of(i - 1, i / 1000)) == ("high", "low")


def test_without_a_boundary_there_is_one_model():
    assert expert_of(999, None) == "model"


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 13, 50, 101, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.7])
def test_grids_equal_numpy_as_the_official_code_writes_them(steps, shift):
    starts = {"unipc": float(np.float32(1 - 1 / 1000)), "dpmpp": 1.0}
    for solver, start in starts.items():
        base = np.linspace(start, 0, steps + 1)[:-1]
        exact = shift * base / (1 + (shift - 1) * base)
        want = np.concatenate([exact, [0]]).astype(np.float32)
        got = schedule(solver, steps, shift)
        assert np.array_equal(np.array(got.sigmas), want.astype(np.float64))
        assert np.array_equal(np.array(got.timesteps), (exact * 1000).astype(np.int64))


def test_euler_shares_the_sigmas_of_dpmpp_with_fractional_timesteps():
    euler, dpmpp = schedule("euler", 4, 5), schedule("dpmpp", 4, 5)
    assert euler.sigmas == dpmpp.sigmas
    assert euler.timesteps == pytest.approx((1000, 937.5, 833.33333, 625), abs=1e-4)
    assert dpmpp.timesteps == (1000, 937, 833, 625)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize("shift", [0.1, 1, 5, 1000])
def test_sigmas_fall_strictly_to_zero(solver, shift):
    sigmas = schedule(solver, 50, shift).sigmas
    assert sigmas[-1] == 0 and sigmas[0] <= 1
    assert all(a > b for a, b in pairwise(sigmas))


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "field"),
    [
        ("unipc", 0, 5, "steps"),
        ("unipc", 20, 0, "shift"),
        ("euler", 20, float("nan"), "shift"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(solver, steps, shift, field):
    with pytest.raises(RequestError) as caught:
        schedule(solver, steps, shift)
    assert caught.value.details["field"] == field and caught.value.hint


def test_needs_neither_torch_nor_numpy():
    code = "import sys, kinema.sampling.schedule; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
