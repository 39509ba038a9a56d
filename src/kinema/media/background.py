"""Write a video while its frames are still being made: a thread a file, a short queue between.

Owns the hand-over of chunks; what a file looks like is in `video`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from types import TracebackType

from torch import Tensor

from kinema.errors import Cancelled

DEPTH = 2  # chunks waiting for a file
WAIT_SECONDS = 0.1


class BackgroundWriter:
    """Runs `write(chunks)` in a thread; chunks are what `add` is given. A context manager.

    Leaving it normally waits for the file and raises what `write` raised; leaving it by an exception makes
    the chunks end in Cancelled, so that `write` removes what it began.
    """

    def __init__(self, write: Callable[[Iterator[Tensor]], None]) -> None:
        self._queue: Queue[Tensor | None] = Queue(DEPTH)
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(write,), name="write", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def add(self, chunk_THWC: Tensor) -> None:
        """Hand over frames; waits while the queue is full. Raises what `write` raised, if it has."""
        self._put(chunk_THWC)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandoned.set()
        elif self._error is None:
            self._put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _put(self, item: Tensor | None) -> None:
        while True:
            if not self._thread.is_alive():
                raise self._error or RuntimeError("the writer ended before its frames did")
            try:
                return self._queue.put(item, timeout=WAIT_SECONDS)
            except Full:
                continue

    def _work(self, write: Callable[[Iterator[Tensor]], None]) -> None:
        try:
            write(self._chunks())
        except BaseException as error:
            self._error = error

    def _chunks(self) -> Iterator[Tensor]:
        while True:
            if self._abandoned.is_set():
                raise Cancelled("the frames ended early")
            try:
                chunk = self._queue.get(timeout=WAIT_SECONDS)
            except Empty:
                continue
            if chunk is None:
                return
            yield chunk
