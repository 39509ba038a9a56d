"""Make a video clip by clip: condition on the frames so far, sample, decode, show, remember the last frames.

Owns the order and the bookkeeping of frames. What conditions a clip and how its latents are decoded is a task's;
sampling, progress and cancelling are the caller's. Frames are handed on as floats, never re-encoded in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from kinema.sampling.denoiser import Branch
from kinema.schema import ClipPlan, Event, ModelRef, Note
from kinema.tensors import Conditions

Branches = Mapping[Branch, Conditions]
Models = Callable[[ModelRef], nn.Module]
"""models(ref) -> the loaded model of a recipe."""


class ClipTask(Protocol):
    """What is particular to one kind of video made clip by clip. Holds what is constant over its clips.

    history_frames   how many of the last frames a clip is conditioned on.
    """

    history_frames: int

    def opening(self) -> Tensor:
        """Return frames_THWC, float32 in [0, 1], that stand before the first clip; T = 0 where there are none."""
        ...

    def before(self, number: int, history_THWC: Tensor) -> Tensor | None:
        """Return what clip `number` needs of the frames before it, in any form; the other two are given it.

        history_THWC   at most `history_frames` of them, newest last.
        """
        ...

    def conditions(self, number: int, clip: ClipPlan, before: Tensor | None) -> Branches:
        """Return what the clip is told, by branch. Not called for a clip whose latents are there already."""
        ...

    def notes(self) -> Iterable[Note]:
        """Return what there is to tell of the clip whose conditions were made last."""
        ...

    def noise(self, number: int, seed: int) -> Tensor:
        """Return noise_BCFhw, float32, of clip `number` of a video of this seed."""
        ...

    def decode(self, clip: ClipPlan, latents_CFhw: Tensor, before: Tensor | None) -> Iterator[Tensor]:
        """Yield `clip.frames` frames_THWC in all, float32 in [0, 1], some at a time: skipped ones included."""
        ...


Sample = Callable[[int, Callable[[], Branches]], Generator[Event, None, Tensor]]
"""sample(number, conditions) yields what happens and returns latents_CFhw of the clip."""

Measure = Callable[[str], AbstractContextManager[None]]
"""measure(stage): a context in which that stage runs."""


def make_clips(clips: Sequence[ClipPlan], task: ClipTask, sample: Sample, measure: Measure) -> Iterator[Event | Tensor]:
    """Yield what happens, and between it the frames_THWC to show, in order, as soon as they are there.

    Of each clip `skip` frames are left out and then `shown` are shown; these alone are history to the next clip.
    """
    history_THWC = task.opening()
    for number, clip in enumerate(clips):
        with measure("encode inputs"):
            before = task.before(number, history_THWC)
        latents_CFhw = yield from sample(number, partial(task.conditions, number, clip, before))
        yield from task.notes()
        made: list[Tensor] = []
        with measure("decode"):
            for frames_THWC in _shown(task.decode(clip, latents_CFhw, before), clip):
                made.append(frames_THWC)
                yield frames_THWC
        if number + 1 < len(clips):
            history_THWC = _last([history_THWC, *made], task.history_frames)


def _shown(chunks: Iterable[Tensor], clip: ClipPlan) -> Iterator[Tensor]:
    """Cut a clip's frames to those that are shown."""
    begin, end, done = clip.skip, clip.skip + clip.shown, 0
    for chunk_THWC in chunks:
        part_THWC = chunk_THWC[max(begin - done, 0) : max(end - done, 0)]
        done += len(chunk_THWC)
        if len(part_THWC):
            yield part_THWC
    assert done == clip.frames, f"a clip of {clip.frames} frames was decoded to {done}"


def _last(frames: Sequence[Tensor], count: int) -> Tensor:
    """Return the last `count` frames, or all where there are fewer."""
    joined_THWC = torch.cat(list(frames))
    return joined_THWC[max(0, len(joined_THWC) - count) :].clone()
