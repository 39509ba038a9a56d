"""Runs that were stopped go on, runs that do not fit end alone: kills, memory that runs out, jobs after jobs."""

from __future__ import annotations

import errno
import gc
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinema.engine import Engine
from kinema.errors import CheckpointError
from kinema.models.encoders import UMT5
from kinema.runtime.machine import is_out_of_memory
from kinema.schema import Note, Progress, Request, Result
from kinema.text_cache import TextCache
from tiny_world import TinyWorld, picture


def request(save: Path, model: str = "tiny-t2v", **fields: object) -> Request:
    return Request(model=model, prompt="a cat walks", seed=3, device="cpu", save=save, **fields)


def finish(engine: Engine, asked: Request) -> Result:
    return [event for event in engine.run(engine.plan(asked)) if isinstance(event, Result)][-1]


# --- steps that are done stay done -----------------------------------------------------------------

RUN = """
import os, signal, sys
from pathlib import Path
from kinema.engine import Engine
from kinema.schema import Progress, Request, Settings
root, save, solver, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with Engine(Settings(models=(root,), catalogs=(root / "tiny.toml",))) as engine:
    plan = engine.plan(Request(model="tiny-t2v-two", prompt="a cat walks", device="cpu", save=save, solver=solver,
                               steps=6, save_steps=0, seeds=(3, 4)))
    for event in engine.run(plan):
        if isinstance(event, Progress) and event.stage == "sample" and event.seed == 4 and event.done == stop:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("solver", "stop"), [("unipc", 1), ("unipc", 4), ("dpmpp", 3), ("euler", 5)])
def test_a_killed_run_goes_on_to_the_same_bits(
    tiny_world: TinyWorld, engine: Engine, tmp_path: Path, solver: str, stop: int
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = subprocess.run([sys.executable, "-c", RUN, str(tiny_world.root), str(killed / "x.latents.safetensors"),
                           solver, str(stop)], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (steps,) = killed.glob("*.steps.safetensors")
    assert (killed / "x-3.latents.safetensors").exists() and not (killed / "x-4.latents.safetensors").exists()
    told = [event for event in engine.resume(steps) if isinstance(event, Progress) and event.stage == "sample"]
    assert told[0].total == 6 - stop, "only what was left"
    asked = Request(model="tiny-t2v-two", prompt="a cat walks", device="cpu", solver=solver, steps=6, seed=4,
                    save=whole / "x.latents.safetensors")  # fmt: skip
    finish(engine, asked)
    assert torch.equal(
        load_file(killed / "x-4.latents.safetensors")["latents"], load_file(whole / "x.latents.safetensors")["latents"]
    )
    assert not steps.exists()


def test_steps_of_changed_files_and_foreign_files_are_refused(tiny_world: TinyWorld, engine: Engine, tmp_path: Path):
    copy = tmp_path / "dit.safetensors"
    copy.write_bytes(tiny_world.file("diffusion_models/t2v.safetensors").read_bytes())
    running = engine.run(engine.plan(request(tmp_path / "x.mp4", dit=copy, save_steps=0, steps=4)))
    for event in running:
        if isinstance(event, Progress) and event.stage == "sample" and event.done == 2:
            break
    running.close()
    (steps,) = tmp_path.glob("*.steps.safetensors")
    copy.write_bytes(copy.read_bytes())
    with pytest.raises(CheckpointError, match="has changed since"):
        list(engine.resume(steps))
    with pytest.raises(CheckpointError, match="no saved steps"):
        list(engine.resume(copy))
    newer = {"plan": {"from": "2030"}, "files": {}, "index": 0, "step": 0}
    save_file({"memory.0": torch.zeros(1)}, steps, metadata={"kinema_steps": json.dumps(newer)})
    with pytest.raises(CheckpointError, match="holds a plan that this version cannot read"):
        list(engine.resume(steps))


def test_a_run_of_seconds_leaves_no_steps(engine: Engine, tmp_path: Path) -> None:
    finish(engine, request(tmp_path / "x.mp4"))
    assert not list(tmp_path.glob("*.steps.safetensors"))


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(None)
    outer = ValueError("x")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "mapping")) and not is_out_of_memory(OSError(errno.ENOSPC, "full"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))


# --- texts on disk ---------------------------------------------------------------------------------


def test_encoded_texts_are_kept_on_disk_by_content(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_world.settings.model_copy(update={"cache": tmp_path / "cache"})
    with Engine(settings) as engine:
        want = finish(engine, request(tmp_path / "a.latents.safetensors")).paths[0]
    entries = sorted((tmp_path / "cache/texts").iterdir())
    assert len(entries) == 2, "the prompt and the negative prompt"
    used = []
    original = UMT5.encode
    monkeypatch.setattr(UMT5, "encode", lambda self, *args: used.append(1) or original(self, *args))
    with Engine(settings) as engine:
        # Hashes come out of their cache in a moment, but in a thread.
        engine._hashes.begin(engine.plan(request(tmp_path / "b.latents.safetensors")).files)
        engine._hashes.collect(engine.plan(request(tmp_path / "b.latents.safetensors")).files)
        got = finish(engine, request(tmp_path / "b.latents.safetensors")).paths[0]
    assert not used and torch.equal(load_file(got)["latents"], load_file(want)["latents"])
    entries[0].write_bytes(entries[0].read_bytes()[:-1] + b"\x55")
    with Engine(settings) as engine:
        plan = engine.plan(request(tmp_path / "c.latents.safetensors"))
        engine._hashes.begin(plan.files)
        engine._hashes.collect(plan.files)
        (note,) = (event for event in engine.run(plan) if isinstance(event, Note) and event.about == "text cache")
        assert entries[0].name in note.text and "damaged" in note.text
        assert not any("damaged" in event.text for event in engine.run(plan) if isinstance(event, Note)), "told once"
    assert used and torch.equal(load_file(tmp_path / "c.latents.safetensors")["latents"], load_file(want)["latents"])


def test_the_text_cache_keeps_within_bounds(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, limit=10_000)
    for number in range(20):
        cache.put(f"{number:02}", torch.full((10, 20), float(number)))
    kept = sorted(path.stem for path in tmp_path.iterdir())
    assert 5 < len(kept) < 12 and kept[-1] == "19" and cache.get("19").mean() == 19 and cache.get("00") is None
    assert TextCache(None).get("x") is None


# --- jobs after jobs -------------------------------------------------------------------------------


def anonymous() -> int:
    gc.collect()
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


KINDS = {
    "tiny-t2v": {},
    "tiny-t2v-two": {"blocks_to_swap": 1, "steps": 2},
    "tiny-clip": {"first": "first.png", "frames": 5},
}
"""Jobs of three kinds, in turn: plain, streamed with a switch of experts, with an image."""


class ManyJobs:
    """Runs tiny jobs, one after the other; every tenth is planned anew, which takes longer than running.

    leak   keep 5 MB of every eighth job: the planted fault. Smaller pieces would fill what the heap still holds of
           earlier tests, and not show.
    """

    def __init__(self, engine: Engine, folder: Path, leak: bool = False) -> None:
        self.engine, self.folder, self.leak = engine, folder, leak
        self.done, self.held, self.plans = 0, [], {}
        picture(folder / "first.png", 32, 32)

    def run(self, count: int) -> None:
        for number in range(self.done, self.done + count):
            model = [*KINDS][number % len(KINDS)]
            if model not in self.plans or number % 10 == 0:
                self.plans[model] = self.engine.plan(self.request(model))
            fresh = {"prompt": f"a cat {number % 40}", "seeds": (number,)}
            assert any(isinstance(e, Result) for e in self.engine.run(self.plans[model].model_copy(update=fresh)))
            self.held += [torch.ones(5_000_000, dtype=torch.uint8)] if self.leak and number % 8 == 0 else []
        self.done += count

    def request(self, model: str) -> Request:
        more = {role: self.folder / value if role == "first" else value for role, value in KINDS[model].items()}
        return Request(model=model, prompt="a cat", device="cpu", size="32x32", overwrite=True,
                       save=self.folder / f"{model}.latents.safetensors",
                       **{"steps": 1, "guidance": 1.0, "frames": 1, **more})  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts anonymous memory here")
@pytest.mark.parametrize("leak", [False, True])
def test_memory_is_flat_over_a_thousand_jobs(tiny_world: TinyWorld, tmp_path: Path, leak: bool) -> None:
    """As many of the planted leak as show it."""
    with Engine(tiny_world.settings) as engine:
        jobs = ManyJobs(engine, tmp_path, leak)
        jobs.run(100)
        before = anonymous()
        jobs.run(60 if leak else 1000)
        grown = anonymous() - before
    assert (grown > 10_000_000) == leak, f"{grown} bytes over {jobs.done} jobs"
