"""What is told before and during a run, against what the run then takes: memory, and the time that is left."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinema.engine import Engine
from kinema.schema import Progress, Request, Settings

SCRIPT = Path(__file__).parents[2] / "bench/memory.py"


# --- memory ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory):
    """(predicted, measured) peak of one run in a fresh process, of a bf16 DiT of 1.1 GB. hold: MB nobody planned."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("anonymous memory is measured on Linux")
    folder = tmp_path_factory.mktemp("large")
    setting = ["--model", "t2v", "--layers", "1", "--vae-dim", "24", "--size", "448x448", "--frames", "5", "--json"]
    subprocess.run([sys.executable, str(SCRIPT), *setting, "--write", str(folder)], check=True)

    def measured(hold: int = 0) -> dict[str, tuple[int, int]]:
        command = [sys.executable, str(SCRIPT), *setting, "--folder", str(folder), "--hold", str(hold)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {stage: (predicted, taken) for stage, (predicted, taken) in found.items()}

    return measured


def within_a_tenth(stages: dict[str, tuple[int, int]]) -> bool:
    predicted, measured = (max(column) for column in zip(*stages.values(), strict=True))
    return abs(predicted - measured) <= 0.1 * measured


def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(peaks) -> None:
    found = peaks()
    assert within_a_tenth(found), found
    more = round(0.25 * max(measured for _, measured in found.values()) / 1e6)
    assert not within_a_tenth(peaks(hold=more)), "a tensor nobody planned goes unseen"


# --- time ------------------------------------------------------------------------------------------


def error_of_time_left(tmp_path: Path, steps: int = 12) -> float:
    """The median error, as a share, of the time left that is told after the second step and up to half of the run."""
    request = Request(
        model="demo", prompt="a large red circle moves left on a blue ground", seed=1, steps=steps, size="64x64",
        frames=9, device="cpu", save=tmp_path / "x.latents.safetensors", overwrite=True,
    )  # fmt: skip
    told = []
    with Engine(Settings()) as engine:
        for event in engine.run(engine.plan(request)):
            if isinstance(event, Progress) and event.stage == "sample":
                told.append((event, time.perf_counter()))
    end = told[-1][1]
    return statistics.median(
        abs(event.eta_seconds / (end - now) - 1) for event, now in told if 2 <= event.done <= steps // 2
    )


def test_the_time_left_is_within_a_fifth_after_the_second_step(tmp_path: Path, monkeypatch) -> None:
    """In one of a few runs at least: other work on the machine takes its share. A fault is there in all of them."""
    assert any(error_of_time_left(tmp_path) < 0.2 for _ in range(6))
    monkeypatch.setattr("kinema.engine.step_work", lambda plan: tuple(0.8**index for index in range(len(plan.steps))))
    assert all(error_of_time_left(tmp_path) > 0.2 for _ in range(2))
