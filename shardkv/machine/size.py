"""Measuring a range step by step: bytes, keys, and where it would split into halves.

Lives here: the measuring. Does not live here: when to measure or split, or any I/O of its own: each step reads a
bounded number of keys from the reader it is given and returns, so that a loop may run others in between. Bounded: it
keeps at most :data:`CUTS_MAX` candidates for the split key.
"""

from typing import Final

from shardkv.machine import keys
from shardkv.storage.engine import Reader
from shardkv.types import KeyRange

CUTS_MAX: Final = 512
"""Candidates kept. When there are more, every other goes and new ones come half as often."""
_CUT_BYTES_MIN: Final = 4 * 1024
"""How far candidates lie apart at first."""


class RangeMeasure:
    """One walk over a range's user keys.

    The keys may change between steps unless ``reader`` is a snapshot; the figures are then of no single moment, which
    is good enough to decide on a split.
    """

    __slots__ = (
        "_cuts",
        "_next_cut",
        "_position",
        "_previous",
        "_reader",
        "_spacing",
        "_span",
        "bytes",
        "done",
        "keys",
    )

    def __init__(self, reader: Reader, span: KeyRange) -> None:
        self._reader = reader
        self._span = span
        self._position, _ = keys.user_span(span)
        self._previous: bytes | None = None
        """The last key seen, as the user knows it."""
        self._cuts: list[tuple[int, bytes]] = []
        """Bytes before the key, and a key that divides there; ascending."""
        self._spacing = _CUT_BYTES_MIN
        self._next_cut = 0
        self.bytes = 0
        """Keys and values as the engine holds them."""
        self.keys = 0
        self.done = span.empty

    def step(self, keys_max: int) -> bool:
        """Read up to ``keys_max`` more keys; whether the range is measured."""
        if self.done:
            return True
        _, end = keys.user_span(self._span)
        left = keys_max
        total, previous, key = self.bytes, self._previous, b""
        for key, value in self._reader.scan(self._position, end):
            if total >= self._next_cut and previous is not None:
                self._cut(total, previous, key[1:])
            total += len(key) + len(value)
            previous = key[1:]
            left -= 1
            if left <= 0:
                break
        else:
            self.done = True
        self.keys += keys_max - left
        self.bytes, self._previous = total, previous
        if key:
            self._position = key + b"\x00"
        return self.done

    def _cut(self, before: int, previous: bytes, key: bytes) -> None:
        self._cuts.append((before, separator(previous, key)))
        if len(self._cuts) > CUTS_MAX:
            del self._cuts[::2]
            self._spacing *= 2
        self._next_cut = before + self._spacing

    @property
    def split_key(self) -> bytes | None:
        """A key above the first and up to the last with about half the bytes on each side; None for under two keys.

        It lies strictly inside the range.
        """
        assert self.done, "the range is not measured yet"
        if not self._cuts:
            return None
        half = self.bytes / 2
        return min(self._cuts, key=lambda cut: abs(cut[0] - half))[1]


def separator(left: bytes, right: bytes) -> bytes:
    """The shortest key above ``left`` and not above ``right``, which is higher."""
    assert left < right, f"{left!r} is not below {right!r}"
    common = 0
    for one, other in zip(left, right):
        if one != other:
            break
        common += 1
    return right[: common + 1]
