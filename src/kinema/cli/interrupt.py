"""Ctrl-C: the first one asks the run to stop after its step, the second one ends the program at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from kinema.errors import Cancelled


class Interruption:
    """While entered, SIGINT and SIGTERM only set a flag, which is asked by calling this object."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only; elsewhere the caller has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(Cancelled.exit_code)
        self._asked = True
        # Not through the buffered stream: a signal may come while it is being written.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping after this step; once more stops at once\n"
        )
