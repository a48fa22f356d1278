"""The range map: for every key, the newest descriptor known to cover it.

The map is made of *segments*, which never overlap and, once a first range spans every key, leave no gap. A reported
descriptor takes exactly those keys where it is newer than what stood there. So the map is the same whatever the order
of the reports, and a half of a split that is reported before the other half does not tear a hole: what is left of the
parent stays as a shortened segment that routes to the parent's replicas, who know both halves.

Only the map lives here; rows and commands are :mod:`.state`'s.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from sortedcontainers import SortedDict, SortedList

from shardkv.types import KeyRange, RangeDescriptor, RangeId

_ABOVE_RANGES: Final = RangeId(1 << 63)


class Segment(NamedTuple):
    """The keys in ``span`` belong to ``descriptor``, as far as is known."""

    span: KeyRange
    descriptor: RangeDescriptor

    @property
    def whole(self) -> bool:
        """Whether the descriptor's own span is all here; a shortened one waits for its successors' reports."""
        return self.span == self.descriptor.span

    @property
    def shown(self) -> RangeDescriptor:
        """The descriptor cut to the segment: what routing may be told."""
        if self.whole:
            return self.descriptor
        return self.descriptor.with_span(self.span, self.descriptor.epoch)


class Change(NamedTuple):
    """What an accepted report did: segments to write, and starts of segments that are gone."""

    written: list[Segment]
    removed: list[bytes]


class RangeMap:
    """Segments by start key, and the newest descriptor of each range that is still somewhere in force."""

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._segments: SortedDict[bytes, Segment] = SortedDict()
        self._starts: dict[RangeId, list[bytes]] = {}
        self._newest: dict[RangeId, RangeDescriptor] = {}
        self._in_order: SortedList[tuple[bytes, RangeId]] = SortedList()
        """Where the newest descriptor of each range starts."""
        for segment in segments:
            self._add(segment)

    def __len__(self) -> int:
        return len(self._newest)

    @property
    def segments(self) -> Iterable[Segment]:
        """In the order of their keys."""
        return self._segments.values()

    def descriptor(self, range_id: RangeId) -> RangeDescriptor | None:
        """The newest descriptor of a range, or None when others have taken all its keys, or it never was."""
        return self._newest.get(range_id)

    def descriptors(self) -> Iterator[RangeDescriptor]:
        """The newest descriptor of each range, in no particular order (that of first sight)."""
        return iter(self._newest.values())

    def descriptors_above(self, start: bytes | None) -> Iterator[RangeDescriptor]:
        """The newest descriptor of each range that starts above ``start``, or of each if that is None, in the order of
        their keys. What is not taken costs nothing; the map must not change meanwhile."""
        first = 0 if start is None else self._in_order.bisect_right((start, _ABOVE_RANGES))
        return (self._newest[range_id] for _, range_id in self._in_order.islice(first))

    def segments_from(self, start: bytes, limit: int) -> list[Segment]:
        """Up to ``limit`` segments in key order, beginning with the one that holds ``start``."""
        first = self._index_at(start)
        keys = self._segments.keys()
        return [self._segments[key] for key in keys[first : first + limit]]

    def accept(self, descriptor: RangeDescriptor) -> Change | None:
        """Let ``descriptor`` take the keys where it is newer. None when there are none."""
        before = self._overlapping(descriptor.span)
        after = _laid_over(before, descriptor)
        if after == before:
            return None
        kept = set(after)
        old = set(before)
        starts = {segment.span.start for segment in after}
        for segment in before:
            if segment not in kept:
                self._remove(segment)
        written = [segment for segment in after if segment not in old]
        for segment in written:
            self._add(segment)
        return Change(written, [segment.span.start for segment in before if segment.span.start not in starts])

    def check(self, *, tiled: bool = False) -> None:
        """Every invariant; with ``tiled`` also that no key is without a range."""
        end: bytes | None = b""
        before: Segment | None = None
        found: dict[RangeId, list[bytes]] = {}
        for start, segment in self._segments.items():
            span, descriptor = segment
            assert span.start == start, (start, segment)
            assert not span.empty, segment
            assert descriptor.span.covers(span), segment
            assert end is not None, (before, segment)
            assert start >= end, (before, segment)
            assert not tiled or start == end, (before, segment)
            assert before is None or before.span.end != start or before.descriptor != descriptor, (before, segment)
            found.setdefault(descriptor.range_id, []).append(start)
            end, before = span.end, segment
        assert not tiled or end is None, before
        assert {key: sorted(starts) for key, starts in self._starts.items()} == found, (self._starts, found)
        assert self._newest.keys() == found.keys(), (self._newest.keys(), found.keys())
        for range_id, starts in found.items():
            newest = self._newest[range_id]
            for start in starts:
                assert _rank(self._segments[start].descriptor) <= _rank(newest), (self._segments[start], newest)
            assert any(self._segments[start].descriptor == newest for start in starts), (newest, starts)
        in_order = sorted((newest.span.start, range_id) for range_id, newest in self._newest.items())
        assert list(self._in_order) == in_order, (self._in_order, in_order)

    def _index_at(self, key: bytes) -> int:
        """The position of the segment that holds ``key``, or of the first above it."""
        position = self._segments.bisect_right(key)
        if position:
            span = self._segments.peekitem(position - 1)[1].span
            if span.contains(key):
                return position - 1
        return position

    def _overlapping(self, span: KeyRange) -> list[Segment]:
        first = self._index_at(span.start)
        last = len(self._segments) if span.end is None else self._segments.bisect_left(span.end)
        return [self._segments[key] for key in self._segments.keys()[first:last]]

    def _add(self, segment: Segment) -> None:
        start, descriptor = segment.span.start, segment.descriptor
        self._segments[start] = segment
        range_id = descriptor.range_id
        self._starts.setdefault(range_id, []).append(start)
        newest = self._newest.get(range_id)
        if newest is None or _rank(descriptor) > _rank(newest):
            self._set_newest(range_id, descriptor)

    def _remove(self, segment: Segment) -> None:
        start, descriptor = segment.span.start, segment.descriptor
        range_id = descriptor.range_id
        del self._segments[start]
        starts = self._starts[range_id]
        starts.remove(start)
        if not starts:
            del self._starts[range_id]
            self._set_newest(range_id, None)
        elif self._newest[range_id] == descriptor:
            left = [self._segments[other].descriptor for other in starts]
            self._set_newest(range_id, max(left, key=_rank))

    def _set_newest(self, range_id: RangeId, descriptor: RangeDescriptor | None) -> None:
        before = self._newest.get(range_id)
        if before is not None:
            self._in_order.remove((before.span.start, range_id))
        if descriptor is None:
            del self._newest[range_id]
        else:
            self._newest[range_id] = descriptor
            self._in_order.add((descriptor.span.start, range_id))


def _rank(descriptor: RangeDescriptor) -> tuple[object, ...]:
    """Newest last, among descriptors of one range. Two of the same epoch cannot both be true; should they be reported
    all the same, every replica, restarted or not, still takes the same one."""
    start, end = descriptor.span
    return (descriptor.epoch.span, descriptor.epoch.membership, start, end is None, end or b"", descriptor.replicas)


def _laid_over(segments: list[Segment], descriptor: RangeDescriptor) -> list[Segment]:
    """``segments`` (in order, each overlapping the descriptor's span) with ``descriptor`` over them where newer."""
    start, end = descriptor.span
    after: list[Segment] = []

    def append(piece_start: bytes, piece_end: bytes | None, owner: RangeDescriptor) -> None:
        if after and after[-1].span.end == piece_start and after[-1].descriptor == owner:
            piece_start = after.pop().span.start
        after.append(Segment(KeyRange(piece_start, piece_end), owner))

    cursor: bytes | None = start
    for span, owner in segments:
        assert cursor is not None, (segments, descriptor)
        if span.start > cursor:
            append(cursor, span.start, descriptor)
        if span.start < start:
            append(span.start, start, owner)
        beyond = end is not None and (span.end is None or span.end > end)
        cursor = end if beyond else span.end
        append(max(span.start, start), cursor, descriptor if descriptor.newer_than(owner) else owner)
        if beyond:
            assert end is not None
            append(end, span.end, owner)
    if cursor is not None and cursor != end:
        append(cursor, end, descriptor)
    return after
