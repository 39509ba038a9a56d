"""A block runner for weights that do not fit: blocks pass, one after the other, through two slots of device memory.

The bytes of a block lie together, so that it moves in one copy, always from the host to the device. A thread takes them
from the mapped file to a small (on CUDA pinned) buffer and from there, on a stream of its own, to the slot that is
free, while the other slot's block computes; the thread that computes never waits for the device. Host memory stays near
two blocks, however large the model. On a CPU buffer and slot are one.

Owns slots and when they are filled. Knows nothing of models: all parameters and buffers of a block travel, whatever
leaves (quantised, LoRA) hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kinema.models.layers import HELD_AS

ALIGNMENT = 256
"""Bytes; tensors begin at multiples of it in a slot, as those of torch's own allocator do."""

State = TypeVar("State")


@dataclass(frozen=True)
class Place:
    """One tensor of a unit: the dictionary of its module it hangs in, what it is made from, where in a slot it goes.

    given   what hung there before, of which `source` is the data.
    """

    owner: dict[str, Any]
    name: str
    given: Tensor
    source: Tensor
    dtype: torch.dtype
    offset: int

    def view(self, slot: Tensor) -> Tensor:
        stop = self.offset + self.source.numel() * self.dtype.itemsize
        return slot[self.offset : stop].view(self.dtype).view(self.source.shape)


class Unit:
    """The tensors of one block, and of the modules that run with it, as one run of bytes.

    Between visits the modules hold meta tensors: whoever uses a block that is not there hears of it, on any device.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, stays: bool) -> None:
        self.stays, self.settled = stays, False
        places, offset = [], 0
        for module in dict.fromkeys(inner for outer in modules for inner in outer.modules()):
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is not None:
                        dtype = getattr(tensor, HELD_AS, tensor.dtype)
                        places.append(Place(owner, name, tensor, tensor.detach(), dtype, offset))
                        offset += -(-tensor.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.places, self.bytes = tuple(places), offset
        if stays and all(place.source.device == device and place.source.dtype == place.dtype for place in places):
            self.settled = True
        else:
            self.leave()

    def fill(self, slab: Tensor) -> None:
        """Copy everything into `slab`, bytes on the host, converting to the dtypes held."""
        for place in self.places:
            place.view(slab).copy_(place.source)

    def enter(self, slot: Tensor) -> None:
        """Make the modules use the tensors in `slot`."""
        for place in self.places:
            place.owner[place.name] = place.view(slot)

    def leave(self) -> None:
        for place in self.places:
            place.owner[place.name] = torch.empty(place.source.shape, dtype=place.dtype, device="meta")

    def restore(self) -> None:
        """Give the modules back what they held before they were streamed."""
        for place in self.places:
            place.owner[place.name] = place.given
        self.settled = False

    def settle(self, slot: Tensor) -> None:
        """Stay on the device for good, in a copy of the slot."""
        self.enter(slot[: self.bytes].clone())
        self.settled = True


class Slot:
    """Room for one unit: on the device, and before that on the host. On a CPU the two are the same bytes.

    filled   the copy of `unit` under way or done.
    ready    on CUDA, recorded when the device has the unit.
    free     on CUDA, recorded when the last computation that reads the unit is through.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=cuda)
        self.device = torch.empty(num_bytes, dtype=torch.uint8, device=device) if device.type != "cpu" else self.host
        self.unit: Unit | None = None
        self.filled: Future[None] | None = None
        self.ready: torch.cuda.Event | None = torch.cuda.Event() if cuda else None
        self.free: torch.cuda.Event | None = torch.cuda.Event() if cuda else None
        if self.free is not None:  # its memory was somebody else's, whose computation may not be through
            self.free.record(torch.cuda.current_stream(device))


class Ring:
    """The two slots of one device. Several runners may share it, one after the other."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._slots: tuple[Slot, ...] = ()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks")
        self._copies = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    def reserve(self, num_bytes: int) -> None:
        """Make the slots at least this large."""
        if not self._slots or self._slots[0].host.numel() < num_bytes:
            self.clear()
            self._slots = (Slot(num_bytes, self.device), Slot(num_bytes, self.device))

    @contextmanager
    def hold(self, unit: Unit, following: Unit | None) -> Iterator[None]:
        """Have the tensors of `unit` on the device within the block, while `following` is on its way."""
        slot = self._claim(unit, None)
        if following is not None and following is not unit:
            self._claim(following, slot)
        assert slot.filled is not None
        slot.filled.result()
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        if unit.stays:
            unit.settle(slot.device)
        else:
            unit.enter(slot.device)
        try:
            yield
        finally:
            if not unit.stays:
                unit.leave()
            if slot.free is not None:
                slot.free.record(torch.cuda.current_stream(self.device))
            # The other slot is claimed first next time, unless what is in it is wanted.
            self._slots = (*(other for other in self._slots if other is not slot), slot)

    def forget(self, units: Iterable[Unit]) -> None:
        """Let go of units whose model leaves: a slot would keep its tensors alive."""
        leaving = set(units)
        for slot in self._slots:
            if slot.unit in leaving:
                if slot.filled is not None:
                    slot.filled.exception()
                slot.unit = slot.filled = None

    def clear(self) -> None:
        """Wait for copies under way and give the slots back."""
        for slot in self._slots:
            if slot.filled is not None:
                slot.filled.exception()
        if self._copies is not None:
            self._copies.synchronize()
        self._slots = ()

    def close(self) -> None:
        self.clear()
        self._thread.shutdown()

    def _claim(self, unit: Unit, busy: Slot | None) -> Slot:
        """Return the slot that holds `unit`, or the one longest unused, which begins to be filled with it."""
        for slot in self._slots:
            if slot.unit is unit and not (slot.filled and slot.filled.done() and slot.filled.exception()):
                return slot
        slot = next(slot for slot in self._slots if slot is not busy)
        slot.unit = unit
        slot.filled = self._thread.submit(self._fill, slot, unit)
        return slot

    @torch.no_grad()
    def _fill(self, slot: Slot, unit: Unit) -> None:
        if self._copies is None:
            unit.fill(slot.host)
            if slot.device is not slot.host:
                slot.device[: unit.bytes].copy_(slot.host[: unit.bytes])
            return
        assert slot.ready is not None and slot.free is not None
        slot.ready.synchronize()  # in this thread only: the copy out of the buffer, long past as a rule
        unit.fill(slot.host)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.free)
            slot.device[: unit.bytes].copy_(slot.host[: unit.bytes], non_blocking=True)
            slot.ready.record(self._copies)


class BlockStream:
    """The block runner of one model, to be set as its `run_blocks`.

    groups     each block, and the modules that run with it, such as a side block of VACE.
    resident   how many of them stay on the device once they have been there, spread evenly among those that pass, so
               that copies have the longest time to hide in. None of them moves before it is first used.
    then       the runner whose first block is fetched while the last one of the next pass computes; None: this one's.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], ring: Ring, resident: int = 0) -> None:
        self.ring = ring
        self.then: BlockStream | None = None
        passing = streamed(len(groups), resident)
        self.units = [Unit(group, ring.device, index not in passing) for index, group in enumerate(groups)]
        self._unit_of = {module: unit for unit, group in zip(self.units, groups, strict=True) for module in group}
        if any(not unit.settled for unit in self.units):
            ring.reserve(max(unit.bytes for unit in self.units if not unit.settled))

    def __call__(
        self, blocks: Iterable[nn.Module], step: Callable[[nn.Module, int, State], State], state: State
    ) -> State:
        """Return the state after step(block, index, state) of every block in order; its weights are there meanwhile."""
        blocks = list(blocks)
        units = [self._unit_of[block] for block in blocks]
        after, self.then = self.then or self, None
        coming = [*units, *after.units]
        for index, (block, unit) in enumerate(zip(blocks, units, strict=True)):
            if unit.settled:
                state = step(block, index, state)
            else:
                with self.ring.hold(unit, next((unit for unit in coming[index + 1 :] if not unit.settled), None)):
                    state = step(block, index, state)
        return state

    def close(self) -> None:
        """Leave the ring to others, and the modules with the tensors they had."""
        self.ring.forget(self.units)
        for unit in self.units:
            unit.restore()


def streamed(num_blocks: int, resident: int) -> frozenset[int]:
    """Return which of `num_blocks` are not resident, spread evenly."""
    passing = max(num_blocks - resident, 0)
    return frozenset(i for i in range(num_blocks) if (i + 1) * passing // num_blocks > i * passing // num_blocks)
