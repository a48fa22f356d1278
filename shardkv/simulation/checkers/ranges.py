"""Ranges tile the key space: every key belongs to exactly one range, at every moment (DESIGN 4.9).

Nodes learn of a split at different times, so what is judged is the newest that anybody knows of each range. Of two
ranges that overlap the one with the larger span generation wins; two of the same generation contradict each other.
"""

from collections.abc import Iterable
from typing import NamedTuple

from shardkv.simulation.checkers.violation import Violation


class Span(NamedTuple):
    """A range as some node holds it; ``end`` None has no end."""

    range_id: int
    start: bytes
    end: bytes | None
    generation: int


class RangesTile:
    name = "ranges-tile"

    def __init__(self) -> None:
        self._spans: dict[tuple[int, int], Span] = {}

    def saw_spans(self, spans: Iterable[Span], *, complete: bool) -> None:
        """The ranges of all nodes that can be looked at; ``complete`` if that is every node: then none is missing."""
        newest: dict[int, Span] = {}
        for span in spans:
            if self._spans.setdefault((span.range_id, span.generation), span) != span:
                raise Violation(self.name, f"two spans of one generation: {self._spans[span[0], span[3]]} and {span}")
            if span.end is not None and span.start >= span.end:
                raise Violation(self.name, f"an empty range: {span}")
            held = newest.get(span.range_id)
            if held is None or held.generation < span.generation:
                newest[span.range_id] = span
        ordered = sorted(newest.values(), key=lambda each: (each.start, each.generation))
        reached: bytes | None = b""
        before: Span | None = None
        for span in ordered:
            overlaps = reached is None or span.start < reached
            if overlaps and before is not None and before.generation == span.generation:
                raise Violation(self.name, f"{before} and {span} overlap")
            if complete and overlaps:
                raise Violation(self.name, f"{before} and {span} overlap, with every node looked at")
            if complete and reached is not None and span.start > reached:
                raise Violation(self.name, f"nobody has the keys from {reached!r} to {span.start!r}")
            if not overlaps or (reached is not None and (span.end is None or span.end > reached)):
                reached, before = span.end, span
        if complete and reached is not None:
            raise Violation(self.name, f"nobody has the keys from {reached!r} on")

    def check(self) -> None:
        """Nothing is left to judge."""
