"""Frames of a video by number, for those who go through it in clips that overlap: only the newest are held."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from torch import Tensor

from kinema.errors import RequestError


class Window:
    """The last `length` frames of an iterator that have been asked for, and those before them no more.

    name   what the frames are, for the error.
    """

    def __init__(self, frames: Iterator[Tensor], length: int, name: str) -> None:
        self._frames, self._name = frames, name
        self._held: deque[Tensor] = deque(maxlen=length)
        self._read = 0

    def take(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return these frames, counted from 0, reading on as far as the last of them.

        Raises RequestError where the video ends before that.
        """
        wanted = max(numbers) + 1
        for frame in islice(self._frames, max(wanted - self._read, 0)):
            self._held.append(frame)
            self._read += 1
        if self._read < wanted:
            raise RequestError(
                f"{self._name} ends after {self._read} frames; {wanted} were planned",
                "check that the file is whole, or pass fewer --frames",
                got=self._read,
            )
        oldest = self._read - len(self._held)
        assert min(numbers) >= oldest, "asked for a frame that has left the window"
        return [self._held[number - oldest] for number in numbers]
