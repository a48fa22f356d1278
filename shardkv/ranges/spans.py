"""The span map: which range owns which keys on this node, installs on their way included.

One per node. Lives here: ownership and reservations. Does not live here: replicas, descriptors' epochs, data. The rule
(trap 1): no key ever has two owners on a node, and a snapshot that is on its way counts as an owner of its span, so
that a split that was not applied yet and a snapshot of the half it will make cannot both write there.

A range *owns* at most one span: that of its applied state. It may *reserve* one more for a snapshot on its way, which
may overlap its own but no one else's; :meth:`SpanMap.fulfil` makes it the owned one. Replicas without state own
nothing. The placement group has no keys and no place here.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from shardkv.types import KeyRange, RangeId


class SpanTaken(Exception):
    """Another range holds part of the span: refuse, or wait until it has let go. Never reaches users."""

    def __init__(self, span: KeyRange, holders: list[RangeId]) -> None:
        super().__init__(f"{span.start!r} to {span.end!r} is held by ranges {holders}")
        self.holders = holders


class _Spans:
    """Disjoint spans, at most one of each range, in order of their starts."""

    __slots__ = ("by_range", "owners", "starts")

    def __init__(self) -> None:
        self.starts: list[bytes] = []
        self.owners: list[RangeId] = []
        self.by_range: dict[RangeId, KeyRange] = {}

    def add(self, range_id: RangeId, span: KeyRange) -> None:
        position = bisect_left(self.starts, span.start)
        self.starts.insert(position, span.start)
        self.owners.insert(position, range_id)
        self.by_range[range_id] = span

    def remove(self, range_id: RangeId) -> None:
        span = self.by_range.pop(range_id, None)
        if span is not None:
            position = bisect_left(self.starts, span.start)
            assert self.owners[position] == range_id, f"range {range_id} stands under {self.owners[position]}"
            del self.starts[position]
            del self.owners[position]

    def owner_at(self, key: bytes) -> RangeId | None:
        position = bisect_right(self.starts, key) - 1
        if position < 0:
            return None
        owner = self.owners[position]
        return owner if self.by_range[owner].contains(key) else None

    def overlapping(self, span: KeyRange) -> list[RangeId]:
        if span.empty:
            return []
        first = max(bisect_right(self.starts, span.start) - 1, 0)
        last = len(self.starts) if span.end is None else bisect_left(self.starts, span.end)
        return [owner for owner in self.owners[first:last] if self.by_range[owner].overlaps(span)]

    def check(self) -> None:
        assert len(self.starts) == len(self.owners) == len(self.by_range), (
            f"{len(self.starts)} starts, {len(self.owners)} owners, {len(self.by_range)} spans"
        )
        previous: KeyRange | None = None
        for start, owner in zip(self.starts, self.owners):
            span = self.by_range[owner]
            assert span.start == start, f"range {owner} starts at {span.start!r}, not at {start!r}"
            assert not span.empty, f"range {owner} has the empty span {span}"
            assert previous is None or not previous.overlaps(span), f"{previous} overlaps {span} of range {owner}"
            previous = span


class SpanMap:
    """See the module's docstring. Costs of a change: two bisections and a shift of two lists of pointers."""

    __slots__ = ("_owned", "_reserved")

    def __init__(self) -> None:
        self._owned = _Spans()
        self._reserved = _Spans()

    def claim(self, range_id: RangeId, span: KeyRange) -> None:
        """``range_id``, which owned nothing, owns ``span`` from now on. Raises SpanTaken, and changes nothing."""
        assert range_id not in self._owned.by_range, f"range {range_id} owns {self._owned.by_range[range_id]} already"
        self._require_free(range_id, span)
        self._owned.add(range_id, span)

    def reserve(self, range_id: RangeId, span: KeyRange) -> None:
        """A snapshot that gives ``range_id`` this span is on its way. Raises SpanTaken, and changes nothing."""
        assert range_id not in self._reserved.by_range, f"range {range_id} has reserved a span already"
        self._require_free(range_id, span)
        self._reserved.add(range_id, span)

    def cancel(self, range_id: RangeId) -> None:
        """The snapshot does not come; what the range owned it keeps."""
        self._reserved.remove(range_id)

    def fulfil(self, range_id: RangeId, span: KeyRange) -> None:
        """The snapshot is in place: the range owns ``span``, and neither what it owned before nor a reservation.

        Raises SpanTaken, and changes nothing.
        """
        self._require_free(range_id, span)
        self._reserved.remove(range_id)
        self._owned.remove(range_id)
        self._owned.add(range_id, span)

    def replace(self, changes: Sequence[tuple[RangeId, KeyRange]]) -> None:
        """Give each range its new span, all at once, as a split does. Raises SpanTaken, changing nothing.

        ``changes`` may name a range that owned nothing. The new spans must not overlap each other (our own bug).
        """
        changing = {range_id for range_id, _ in changes}
        assert len(changing) == len(changes), f"a range is named twice: {changes}"
        for position, (range_id, span) in enumerate(changes):
            others = [other for _, other in changes[position + 1 :]]
            assert not any(span.overlaps(other) for other in others), f"{changes} overlap each other"
            self._require_free_of_others(changing, span)
            # A reservation of one of them bars the others from its span too.
            self._require_unreserved(range_id, span)
        for range_id, _ in changes:
            self._owned.remove(range_id)
        for range_id, span in changes:
            self._owned.add(range_id, span)

    def owned(self, range_id: RangeId) -> KeyRange | None:
        return self._owned.by_range.get(range_id)

    def owner_at(self, key: bytes) -> RangeId | None:
        """The range whose applied span holds ``key``; a reservation does not count."""
        return self._owned.owner_at(key)

    def overlapping(self, span: KeyRange) -> list[RangeId]:
        """Every range that owns or has reserved part of ``span``, in ascending order of id."""
        return sorted({*self._owned.overlapping(span), *self._reserved.overlapping(span)})

    def _require_free(self, range_id: RangeId, span: KeyRange) -> None:
        assert not span.empty, f"range {range_id} asks for the empty span {span}"
        self._require_free_of_others({range_id}, span)

    def _require_free_of_others(self, asking: set[RangeId], span: KeyRange) -> None:
        holders = [range_id for range_id in self.overlapping(span) if range_id not in asking]
        if holders:
            raise SpanTaken(span, holders)

    def _require_unreserved(self, asking: RangeId, span: KeyRange) -> None:
        holders = [range_id for range_id in self._reserved.overlapping(span) if range_id != asking]
        if holders:
            raise SpanTaken(span, holders)

    def check(self) -> None:
        self._owned.check()
        self._reserved.check()
        for range_id, span in self._reserved.by_range.items():
            others = [other for other in self._owned.overlapping(span) if other != range_id]
            assert not others, f"range {range_id} has reserved {span}, of which ranges {others} own parts"
