"""Blocks that pass through two slots give the bits of blocks that stay, at every level of residency, on a CPU.

Pinned memory, the copy stream and its overlap are in tests/gpu/test_streaming.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from checkpoints import TINY, tiny
from kinema.models.encoders import UMT5, ClipVision
from kinema.models.layers import HELD_AS
from kinema.models.wan import WanDiT
from kinema.runtime.blocks import BlockStream, Ring, Unit, streamed
from kinema.tensors import Conditions

NUM_LAYERS = 5
DIT = {**TINY["dit"], "num_layers": NUM_LAYERS, "in_channels": 16, "has_clip_tokens": False, "num_clip_positions": 0}


@pytest.fixture
def ring():
    ring = Ring("cpu")
    yield ring
    ring.close()


def velocities(model: WanDiT, together: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 2, 4, 6, generator=generator)
    texts = [torch.randn(rows, DIT["text_dim"], generator=generator) for rows in (7, 3)]
    contexts = [model.prepare(Conditions((text,))) for text in texts]
    timesteps = torch.tensor([700.0])
    if together:
        return model(x, timesteps, *contexts)
    return torch.cat([model(x, timesteps, context) for context in contexts])


@pytest.mark.parametrize("resident", range(NUM_LAYERS + 1))
@pytest.mark.parametrize("together", [False, True])
@torch.inference_mode()
def test_every_level_of_residency_gives_the_same_bits(resident: int, together: bool, ring: Ring) -> None:
    want = velocities(tiny("dit", DIT), together)
    model = tiny("dit", DIT)
    model.run_blocks = BlockStream(model.block_groups(), ring, resident)
    for _ in range(2):
        assert torch.equal(velocities(model, together), want)
    there = sum(not any(p.is_meta for p in block.parameters()) for block in model.blocks)
    assert there == resident, "between visits, blocks that pass are nowhere"


@torch.inference_mode()
def test_encoders_stream_too(ring: Ring) -> None:
    ids, pixels = torch.tensor([[3, 5, 9, 1]]), torch.rand(1, 3, 40, 30) * 2 - 1
    for model, args in ((tiny("text_encoder"), ids), (tiny("clip_vision"), pixels)):
        assert isinstance(model, UMT5 | ClipVision)
        want = model.encode(args)
        model.run_blocks = BlockStream(model.block_groups(), ring)
        assert torch.equal(model.encode(args), want)


class Counting(Ring):
    """Counts the copies of each unit, and how many slots are held at once."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.fills: Counter[int] = Counter()

    def _fill(self, slot, unit) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.fills[id(unit)] += 1
        super()._fill(slot, unit)


@torch.inference_mode()
def test_a_block_is_copied_once_for_all_branches_and_resident_ones_once_for_good() -> None:
    model, ring = tiny("dit", DIT), Counting()
    for parameter in model.parameters():
        setattr(parameter, HELD_AS, torch.float64)  # so that even a block that stays has to be made first
    stream = model.run_blocks = BlockStream(model.block_groups(), ring, resident=2)
    contexts = model.prepare_branches([Conditions((torch.ones(rows, DIT["text_dim"]),)) for rows in (2, 3)])
    assert not ring.fills, "no block is brought to prepare contexts"
    for passes in range(1, 4):
        model(torch.ones(1, 16, 1, 4, 4), torch.tensor([500.0]), *contexts)
        ring._thread.submit(lambda: None).result()
        assert all(ring.fills[id(unit)] == 1 for unit in stream.units if unit.stays)
        # The first block of the next pass is on its way already: one copy more.
        first = next(unit for unit in stream.units if not unit.stays)
        copies = [ring.fills[id(unit)] - (unit is first) for unit in stream.units if not unit.stays]
        assert copies == [passes] * 3
    ring.close()


@torch.inference_mode()
def test_the_next_expert_comes_through_the_same_ring_while_the_last_blocks_run() -> None:
    high, low, ring = tiny("dit", DIT, salt=1), tiny("dit", DIT, salt=2), Counting()
    streams = [BlockStream(model.block_groups(), ring) for model in (high, low)]
    high.run_blocks, low.run_blocks = streams
    want = velocities(tiny("dit", DIT, salt=2), True)
    velocities(high, True)
    first = id(streams[1].units[0])
    assert ring.fills[first] == 0
    streams[0].then = streams[1]
    velocities(high, True)
    velocities(high, True)
    ring._thread.submit(lambda: None).result()
    assert ring.fills[first] == 1, "once, in the next pass, and not in those behind it"
    streams[0].then = streams[1]
    velocities(high, True)
    ring._thread.submit(lambda: None).result()
    filled = ring.fills[first]
    assert torch.equal(velocities(low, True), want)
    ring._thread.submit(lambda: None).result()
    assert ring.fills[first] == filled + 1, "its pass found it there, and the next one begins with it"
    ring.close()


def test_resident_blocks_are_spread_evenly() -> None:
    assert [sorted(streamed(8, resident)) for resident in (0, 4, 6, 8, 11)] == [
        list(range(8)), [1, 3, 5, 7], [3, 7], [], [],
    ]  # fmt: skip
    for resident in range(41):
        passing = sorted(streamed(40, resident))
        assert len(passing) == 40 - resident
        gaps = {b - a for a, b in pairwise(passing)}
        assert len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)


class Odd(nn.Module):
    """Leaves such as quantised ones: buffers of bytes, scalars, nothing, and a wrapped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.register_buffer("packed", torch.arange(7, dtype=torch.uint8))
        self.register_buffer("small", torch.tensor(2.5))
        self.register_buffer("tiny", torch.ones(2, 3).to(torch.float8_e4m3fn))
        self.register_buffer("absent", None)
        self.register_buffer("empty", torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.small + self.packed.float().sum() + self.tiny.float().sum()


@torch.inference_mode()
def test_whatever_a_block_holds_travels(ring: Ring) -> None:
    blocks = [Odd() for _ in range(3)]
    x = torch.ones(2, 3)
    want = [block(x) for block in blocks]
    stream = BlockStream([[block] for block in blocks], ring)
    got = stream(blocks, lambda block, _, done: [*done, block(x)], [])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(place.offset % 256 == 0 for unit in stream.units for place in unit.places)


@torch.inference_mode()
def test_a_parameter_is_held_in_the_dtype_asked_for(ring: Ring) -> None:
    block = nn.Linear(4, 4)
    want = block.weight.to(torch.bfloat16)
    setattr(block.weight, HELD_AS, torch.bfloat16)
    stream = BlockStream([[block]], ring)
    seen = stream([block], lambda block, _, __: (block.weight.clone(), block.bias.dtype), None)
    assert torch.equal(seen[0], want) and seen[1] == torch.float32


@torch.inference_mode()
def test_a_visit_that_fails_leaves_the_ring_usable(ring: Ring) -> None:
    blocks = [nn.Linear(4, 4) for _ in range(4)]
    x = torch.ones(1, 4)
    want = x
    for block in blocks:
        want = block(want)
    stream = BlockStream([[block] for block in blocks], ring, resident=1)

    def failing(block, index, x):
        if index == 2:
            raise KeyboardInterrupt
        return block(x)

    with pytest.raises(KeyboardInterrupt):
        stream(blocks, failing, x)
    assert torch.equal(stream(blocks, lambda block, _, x: block(x), x), want)


@torch.inference_mode()
def test_a_copy_that_fails_is_an_error_of_the_visit_and_is_tried_again(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [nn.Linear(4, 4) for _ in range(4)]
    stream = BlockStream([[block] for block in blocks], ring)

    def fill(unit, slab):
        raise OSError("the disk went away")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="went away"):
        patch.setattr(Unit, "fill", fill)
        stream(blocks, lambda block, _, x: block(x), torch.ones(1, 4))
    assert stream(blocks, lambda block, _, x: block(x), torch.ones(1, 4)).shape == (1, 4)


def test_a_block_used_outside_its_visit_is_an_error_on_any_device(ring: Ring) -> None:
    block = nn.Linear(4, 4)
    BlockStream([[block]], ring)
    with pytest.raises(RuntimeError), torch.no_grad():
        block(torch.ones(1, 4)).sum().item()
