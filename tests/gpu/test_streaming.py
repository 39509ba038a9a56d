"""Block streaming where there is a copy engine: the same bits, no synchronisation of the computing thread, overlap.

None of this has been run yet: no CUDA device was at hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kinema.runtime.blocks import BlockStream, Ring

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
