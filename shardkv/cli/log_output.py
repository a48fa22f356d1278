"""The node's log as a text file that never makes its writer wait.

Whoever reads the log may stand still without closing it: a terminal after Ctrl-S, a pipe to a program that is stuck.
A write to it then takes as long as that, and the node's one loop must not. So a thread of its own does the writing,
and between the two stands a queue with a bound, beyond which the oldest lines are lost and counted. The rule: nothing
that is wrong with the log, be it a full disk or a reader that has ended, is the node's failure.
"""

import contextlib
import os
import queue
import threading
from typing import Final

LINES_MAX: Final = 10_000
"""Lines that wait to be written; a few megabytes."""
CLOSE_SECONDS: Final = 2.0
"""What still waits at the end of the process is given so long to be read."""


class LogOutput:
    """Writes to the file ``descriptor``, which stays the caller's. May be written to from any thread.

    The newest lines are the ones kept, so that what a node says last, why it ends, is there when its log is read again.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lost = 0
        # Below Python's own files: one of their locks, held by a thread that is stuck, would abort the process's end.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Take whole lines, to be written soon."""
        if self._lines.qsize() >= LINES_MAX:
            with contextlib.suppress(queue.Empty):
                self._lines.get_nowait()
                self._lost += 1
        self._lines.put(text)

    def flush(self) -> None:
        """Nothing: the thread holds no line back, and to wait for it is what must not be."""

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until everything is written, or the time is over."""
        self._lines.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        told = 0
        while (text := self._lines.get()) is not None:
            lost = self._lost
            if lost > told:
                self._put_out(f'level=warning event="the log was not read in time" lines_lost={lost - told}\n')
                told = lost
            self._put_out(text)

    def _put_out(self, text: str) -> None:
        data = text.encode(self._encoding, "backslashreplace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]
