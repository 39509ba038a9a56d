"""A long video in clips that overlap: which frames each is made from, and what of it is kept. Pure arithmetic."""

from __future__ import annotations

from kinema.schema import ClipPlan


def overlapping_clips(frames: int, length: int, overlap: int) -> tuple[ClipPlan, ...]:
    """Return the clips of `length` frames that make `frames`; each but the first begins with the last `overlap` ones.

    The last clip may reach beyond the end: what it adds is cut there.
    """
    clips = []
    for start in range(0, max(frames - overlap, 1), length - overlap):
        skip = overlap if start else 0
        clips.append(ClipPlan(start=start, frames=length, skip=skip, shown=min(start + length, frames) - start - skip))
    return tuple(clips)


def back_and_forth(count: int, start: int, length: int) -> tuple[int, ...]:
    """Return which of `count` frames stand for `length` ones from `start` on, where time runs on beyond their end.

    There it runs backwards to the beginning, then forwards again, and so on; a single frame stays.
    """
    period = max(2 * (count - 1), 1)
    places = ((start + place) % period for place in range(length))
    return tuple(min(place, period - place) if count > 1 else 0 for place in places)
