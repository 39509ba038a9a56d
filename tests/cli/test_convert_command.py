"""`kinema convert` from the command line: what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.weights.convert import FORMATS
from kinema.weights.detect import inspect


@pytest.fixture
def dit(tiny_world) -> Path:
    return tiny_world.file("diffusion_models/t2v.safetensors")


def test_it_says_what_was_written_and_what_that_changed(tiny, dit: Path, tmp_path: Path):
    ran = tiny("convert", dit, tmp_path / "a.gguf", "--to", "Q8_0")
    assert ran.code == 0 and "Q8_0, official names" in ran.out and "numbers changed by 0." in ran.out
    ran = tiny("convert", tmp_path / "a.gguf", tmp_path / "b.safetensors", "--to", "float32", "--names", "diffusers")
    assert ran.code == 0 and "float32, diffusers names" in ran.out and "every number as it was" in ran.out
    ran = tiny("convert", dit, tmp_path / "c.safetensors", "--to", "fp8_scaled", "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert {line["stage"] for line in lines if line["event"] == "progress"} == {"convert", "read back"}
    assert lines[-1]["paths"] == [str(tmp_path / "c.safetensors")] and 0 < lines[-1]["error"] < 0.05
    assert inspect(tmp_path / "c.safetensors").quantisation == "fp8_e4m3, a scale per tensor, weight only"
    ran = tiny("inspect", tmp_path / "c.safetensors")
    assert "quantised    fp8_e4m3, a scale per tensor" in ran.out


def test_faults_say_what_to_type(tiny, dit: Path, tmp_path: Path):
    for words, code, said in (
        (["a.gguf", "--to", "fp8_scaled"], 2, "a.safetensors"),
        (["a.safetensors", "--to", "Q4_K"], 2, ", ".join(FORMATS)),
        (["a.safetensors", "--names", "kohya"], 2, "pass --names comfyui or diffusers or official"),
        (["a.zip"], 2, "a.safetensors"),
    ):
        ran = tiny("convert", dit, tmp_path / words[0], *words[1:])
        assert ran.code == code and said in ran.out + ran.err, ran.err
    ran = tiny("convert", tmp_path / "none.safetensors", tmp_path / "a.safetensors")
    assert ran.code == 4 and "does not exist" in ran.err
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
