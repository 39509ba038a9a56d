"""Facts of this machine, memory that was really used, and a calibration that survives nonsense."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from kinema.errors import MachineError, RequestError
from kinema.runtime import machine
from kinema.runtime.machine import (
    PeakMemory,
    keep_within,
    probe_machine,
    read_calibration,
    record_calibration,
)
from kinema.schema import calibration_key

MEGABYTE = 2**20


def test_the_cpu_as_it_is():
    facts = probe_machine("cpu")
    assert facts.device == "cpu" and facts.name
    assert 0 < facts.ram_free <= facts.ram_total <= psutil.virtual_memory().total
    assert (facts.memory_total, facts.calibration) == (facts.ram_total, {})
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert facts.memory_free > 0


def test_none_takes_the_best_present():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert probe_machine().device == best


def test_a_device_that_is_not_here_is_named_with_those_that_are():
    count = torch.cuda.device_count()
    with pytest.raises(MachineError, match="only cpu") as caught:
        probe_machine(f"cuda:{count}")
    assert "cpu" in caught.value.details["have"]
    with pytest.raises(RequestError) as refused:
        probe_machine("gpu")
    assert refused.value.details["field"] == "device"


def fill(megabytes):
    return torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


@pytest.mark.parametrize("way", ["high-water mark", "sampling"])
def test_peak_memory_sees_what_came_and_went(way, monkeypatch):
    if way == "sampling":
        monkeypatch.setattr(machine, "_reset_high_water_mark", lambda: False)
    before = psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        block = fill(200)
        assert block[-1] == 1
        if way == "sampling":
            time.sleep(0.1)  # long enough to be seen
        del block
    with PeakMemory() as after:
        pass
    assert 190 * MEGABYTE < peak.bytes - before < 300 * MEGABYTE
    assert after.bytes < peak.bytes - 150 * MEGABYTE, "a stage's peak is not the next one's"


def test_nested_peaks_cover_each_other():
    with PeakMemory() as outer:
        block = fill(200)
        del block
        with PeakMemory() as inner:
            block = fill(50)
            del block
    assert outer.bytes > inner.bytes + 100 * MEGABYTE
    with PeakMemory() as outer, PeakMemory() as inner:
        block = fill(100)
        del block
    assert abs(outer.bytes - inner.bytes) < 5 * MEGABYTE


def test_peak_memory_lets_errors_through_and_is_reusable():
    with pytest.raises(ZeroDivisionError), PeakMemory() as peak:
        1 / 0  # noqa: B018
    assert peak.bytes > 0 and PeakMemory._open == []


def test_torch_is_held_to_a_limit_of_the_card_for_a_while(monkeypatch):
    """The card is made up; what the cap does is held in tests/gpu."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: asked.append((share, index))
    )
    with keep_within("cpu", 10**9), keep_within("cuda", 0):
        assert not asked, "a CPU cannot be held, and 0 is no limit"
    with pytest.raises(ZeroDivisionError), keep_within("cuda", 12 * 10**9):
        assert asked == ["empty", (0.15, 1)]
        1 / 0  # noqa: B018
    assert asked[2:] == [(1.0, 1)]
    with keep_within("cuda:0", 100 * 10**9):
        assert asked[-1] == (1.0, 0)


def test_calibration_round_trip(tmp_path):
    path = tmp_path / "cache" / "calibration.json"
    record_calibration(path, "cpu", {"sample": 3e12, "decode": 5e9, "load": 1e6}, {"sample": 30.0, "decode": 5.0})
    assert read_calibration(path, "cpu") == {"sample 1e12": 1e11, "decode 1e9": 1e9}
    record_calibration(path, "cuda", {"sample": 3e12}, {"sample": 1.0})
    record_calibration(path, "cpu", {"sample": 3e12}, {"sample": 10.0})
    assert read_calibration(path, "cpu")[calibration_key("sample", 9e12)] == 2e11, "half old, half new"
    assert read_calibration(path, "cuda") == {"sample 1e12": 3e12}
    assert probe_machine("cpu", path).calibration == read_calibration(path, "cpu")
    assert os.listdir(path.parent) == ["calibration.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cpu": 3}', '{"cpu": {"sample 1e9": "fast"}}', "\x00\xff"])
def test_a_broken_calibration_is_as_none_and_is_replaced(content, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    assert read_calibration(path, "cpu") == {}
    record_calibration(path, "cpu", {"sample": 2e9}, {"sample": 1.0})
    assert json.loads(path.read_text()) == {"cpu": {"sample 1e9": 2e9}}


def test_nothing_to_measure_and_nowhere_to_write_are_no_errors(tmp_path):
    (tmp_path / "file").write_text("")
    record_calibration(tmp_path / "file" / "calibration.json", "cpu", {"sample": 2e9}, {"sample": 1.0})
    record_calibration(tmp_path / "c.json", "cpu", {"sample": 0.0, "decode": 1.0}, {"sample": 1.0, "decode": 0.0})
    assert read_calibration(tmp_path / "c.json", "cpu") == {}
    (tmp_path / "taken.json").mkdir()
    record_calibration(tmp_path / "taken.json", "cpu", {"sample": 2e9}, {"sample": 1.0})
    assert sorted(os.listdir(tmp_path)) == ["c.json", "file", "taken.json"]
