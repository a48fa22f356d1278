"""Tables for people: aligned columns, the same on a terminal and in a pipe. No library, so commands start fast.

Columns are padded to the widest cell of the first rows; later rows may be wider and then simply stick out, so that a
long scan streams instead of being held in memory.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Final

WIDTH_ROWS_MAX: Final = 500
"""Rows held back to find the column widths."""
CELL_WIDTH_MAX: Final = 60
"""No column is padded beyond this; a longer cell pushes the rest of its own row to the right."""


def width(text: str) -> int:
    """Terminal columns that ``text`` takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


class TableWriter:
    """Writes rows as they come. ``numeric`` columns are aligned right. Call :meth:`close` at the end."""

    def __init__(self, columns: Sequence[str], write: Callable[[str], object], numeric: Iterable[str] = ()) -> None:
        self.columns = list(columns)
        self._write = write
        self._right = [column in set(numeric) for column in columns]
        self._held: list[list[str]] | None = []
        self._widths: list[int] = []

    def add(self, cells: Sequence[str]) -> None:
        assert len(cells) == len(self.columns), (cells, self.columns)
        if self._held is None:
            self._line(cells)
            return
        self._held.append(list(cells))
        if len(self._held) >= WIDTH_ROWS_MAX:
            self._release()

    def close(self) -> None:
        if self._held is not None:
            self._release()

    def _release(self) -> None:
        assert self._held is not None
        rows, self._held = self._held, None
        self._widths = [
            min(CELL_WIDTH_MAX, max(width(row[index]) for row in [self.columns, *rows]))
            for index in range(len(self.columns))
        ]
        self._line([column.upper() for column in self.columns])
        for row in rows:
            self._line(row)

    def _line(self, cells: Sequence[str]) -> None:
        parts = []
        for cell, column_width, right in zip(cells, self._widths, self._right):
            padding = " " * max(0, column_width - width(cell))
            parts.append(padding + cell if right else cell + padding)
        self._write("  ".join(parts).rstrip() + "\n")


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[str] = ()) -> str:
    """A whole table as text."""
    lines: list[str] = []
    writer = TableWriter(columns, lines.append, numeric)
    for row in rows:
        writer.add(row)
    writer.close()
    return "".join(lines)
