"""Progress on stderr: a bar where that is a terminal, a line now and then where it is not. Only bars load rich."""

import sys
import time
from types import TracebackType
from typing import Any, Final

import click

LINE_SECONDS: Final = 5.0
"""Without a terminal, a line at most this often."""


class Progress:
    """A context manager. ``unit`` is what is counted; ``total`` None means that nobody knows."""

    def __init__(self, title: str, *, unit: str = "keys", total: int | None = None) -> None:
        self.title = title
        self.unit = unit
        self.total = total
        self.done = 0
        self._bar: Any = None
        self._task: Any = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=32),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """``done`` of ``total`` is behind us; ``text`` overrides the words beside the bar."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text or self._words())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            click.echo(f"{self.title}: {text or self._words()}", err=True)

    def update_by_time(self) -> None:
        """For work that tells nothing of itself: done is, of ``total`` seconds, what has passed."""
        seconds = int(time.monotonic() - self._started)
        of = f" of {self.total:,}" if self.total is not None else ""
        self.update(seconds, f"{seconds:,}{of} s")

    def _words(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        of = f" of {self.total:,}" if self.total is not None else ""
        return f"{self.done:,}{of} {self.unit} ({self.done / seconds:,.0f}/s)"
