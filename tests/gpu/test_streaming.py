"""Block streaming where there is a copy engine: the same bits, no synchronisation of the computing thread, overlap.

None of this has been run yet: no CUDA device was at hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.test_memory import Ways
from kinema.engine import Engine
from kinema.errors import MachineError
from kinema.models.wan import WanDiT
from kinema.runtime.blocks import BlockStream, Ring
from kinema.runtime.machine import keep_within
from kinema.schema import Request, Result
from tiny_world import TinyWorld

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WIDTH, COUNT = 4096, 12


def blocks() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(COUNT):
        block = nn.Linear(WIDTH, WIDTH, bias=False).to(torch.bfloat16).requires_grad_(False)
        block.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        made.append(block)
    return made


def step(block: nn.Module, _: int, x: torch.Tensor) -> torch.Tensor:
    return block(x)


@pytest.mark.parametrize("resident", [0, 1, 5, COUNT - 1])
@torch.inference_mode()
def test_streamed_blocks_give_the_bits_of_resident_ones(resident: int) -> None:
    x = torch.ones(64, WIDTH, dtype=torch.bfloat16, device="cuda")
    want = x
    for block in blocks():
        want = block.to("cuda")(want)
    streamed = blocks()
    runner = BlockStream([[block] for block in streamed], Ring("cuda"), resident)
    for _ in range(3):
        assert torch.equal(runner(streamed, step, x), want)
    assert all(slot.host.is_pinned() for slot in runner.ring._slots)
    runner.ring.close()


@torch.inference_mode()
def test_the_computing_thread_never_waits_for_the_device() -> None:
    streamed = blocks()
    runner = BlockStream([[block] for block in streamed], Ring("cuda"))
    x = torch.ones(64, WIDTH, dtype=torch.bfloat16, device="cuda")
    runner(streamed, step, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(streamed, step, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    runner.ring.close()


@torch.inference_mode()
def test_copies_hide_behind_computation() -> None:
    """Blocks that compute far longer than they take to copy: streamed may cost a tenth more than resident."""
    x = torch.randn(65536, WIDTH, dtype=torch.bfloat16, device="cuda")

    def seconds(run) -> float:
        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    here = [block.to("cuda") for block in blocks()]

    def resident() -> None:
        y = x
        for block in here:
            y = block(y)

    streamed = blocks()
    runner = BlockStream([[block] for block in streamed], Ring("cuda"))
    assert seconds(lambda: runner(streamed, step, x)) < 1.1 * seconds(resident)
    runner.ring.close()


def latents(engine: Engine, save: Path, **fields: object) -> torch.Tensor:
    request = Request.model_validate({"prompt": "a cat", "seed": 3, "device": "cuda", "save": save, **fields})
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return load_file(result.paths[0])["latents"]


def test_the_next_expert_comes_through_the_ring_at_the_switch(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with Engine(tiny_world.settings) as engine:
        want = latents(engine, tmp_path / "a.latents.safetensors", model="tiny-t2v-two")
    with Engine(tiny_world.settings) as engine, pytest.MonkeyPatch.context() as patch:
        ways = Ways(engine, patch)
        got = latents(engine, tmp_path / "b.latents.safetensors", model="tiny-t2v-two", blocks_to_swap=2)
        seen = ways.seen
    assert torch.equal(got, want)
    left = max(index for index, (word, unit) in enumerate(seen) if word == "leave" and "high" in unit)
    assert seen.index(("copy", "low 0")) < left


def test_tensors_keep_within_the_limit_and_no_longer_than_asked() -> None:
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2**28
    with keep_within("cuda", room):
        torch.empty(2**27, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**29, dtype=torch.uint8, device="cuda")
    torch.empty(2**29, dtype=torch.uint8, device="cuda")


def test_a_run_keeps_to_its_vram_on_a_larger_card(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned for 2 GB, a run that takes as much more ends as it would on a card of 2 GB."""
    original = WanDiT.forward

    def greedy(*arguments: object) -> torch.Tensor:
        torch.empty(2_000_000_000, dtype=torch.uint8, device="cuda")
        return original(*arguments)

    monkeypatch.setattr(WanDiT, "forward", greedy)
    with Engine(tiny_world.settings) as engine:
        latents(engine, tmp_path / "a.latents.safetensors", model="tiny-t2v")
        with pytest.raises(MachineError) as caught:
            latents(engine, tmp_path / "b.latents.safetensors", model="tiny-t2v", vram="2GB")
        assert caught.value.details["have"] <= 2_000_000_000
        latents(engine, tmp_path / "c.latents.safetensors", model="tiny-t2v")


def test_vram_returns_to_its_baseline(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with Engine(tiny_world.settings) as engine:

        def job(number: int) -> int:
            latents(engine, tmp_path / "x.latents.safetensors", model="tiny-t2v-two", steps=2, overwrite=True,
                    blocks_to_swap=number % 3)  # fmt: skip
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()

        first = [job(number) for number in range(12)][-3:]
        last = [job(number) for number in range(300)][-3:]
    assert max(last) <= max(first)
