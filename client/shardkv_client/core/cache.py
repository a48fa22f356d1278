"""The range cache: which range holds a key, and who is thought to lead it.

A cache may be stale, never contradictory: cached spans do not overlap, and of two descriptors that would, the one with
the larger span generation stays (DESIGN §4.9). The placement group, range 0, owns no keys and has a place of its own.
"""

from collections.abc import Iterator
from typing import Any

from sortedcontainers import SortedDict

from shardkv.types import PLACEMENT_RANGE, RangeDescriptor, ReplicaRole


class Reads:
    """How a route's follower reads fare, its stale ones, or its stale ones with a bound on their age: who cannot serve
    the ones may serve the others."""

    __slots__ = ("blocked_until", "failures", "refused")

    def __init__(self) -> None:
        self.failures: int = 0
        """Changes of mind since the last success."""
        self.blocked_until: float = 0.0
        """Until when they wait, after a failure."""
        self.refused: dict[int, float] = {}
        """Nodes that did not serve one, and until when they are passed over."""


class Route:
    """A cached range. Mutable: what is learned about its leader, and the calls that wait for it."""

    __slots__ = (
        "batch",
        "blocked_until",
        "descriptor",
        "end",
        "evicted",
        "failures",
        "generation",
        "leader",
        "mark",
        "next_voter",
        "nodes",
        "pending",
        "range_id",
        "reader",
        "reads",
        "start",
        "voters",
    )

    def __init__(self, descriptor: RangeDescriptor, leader: int | None) -> None:
        self.range_id: int = descriptor.range_id
        self.leader = leader
        """The node that answers for the range, as far as is known."""
        self.next_voter: int = 0
        """Which of them is tried next while no leader is known; counted on, round and round."""
        self.reader: int | None = None
        """Which of several replicas serves this client's follower and stale reads; counted on, round and round."""
        self.reads: dict[int, Reads] = {}
        """By what they are to routing (``calls.routed_as``), for those that were asked for."""
        self.mark: int = 0
        """Grows with every change of mind about where to send; answers to what was sent before it teach nothing."""
        self.failures: int = 0
        """Changes of mind since the last success, of what needs the leader."""
        self.blocked_until: float = 0.0
        """Until when linearizable reads and writes wait, after a failure."""
        self.batch: list[Any] = []
        """Calls of the flush that is under way."""
        self.pending: list[Any] = []
        """Calls that are held back."""
        self.evicted: bool = False
        self.update(descriptor)

    def update(self, descriptor: RangeDescriptor) -> None:
        """Take a newer descriptor of the same range and span."""
        self.descriptor: RangeDescriptor = descriptor
        self.start: bytes = descriptor.span.start
        self.end: bytes | None = descriptor.span.end
        self.generation: int = descriptor.epoch.span
        self.voters: tuple[int, ...] = tuple(
            replica.node_id for replica in descriptor.replicas if replica.role is ReplicaRole.VOTER
        )
        self.nodes: tuple[int, ...] = tuple(replica.node_id for replica in descriptor.replicas)
        if self.leader not in self.nodes:
            self.leader = None

    def reads_of(self, consistency: int) -> Reads:
        """How follower or stale reads fare."""
        reads = self.reads.get(consistency)
        if reads is None:
            reads = self.reads[consistency] = Reads()
        return reads


class RangeCache:
    __slots__ = ("_by_id", "_by_start", "_last", "_ranges_max", "placement")

    def __init__(self, ranges_max: int) -> None:
        self._ranges_max = ranges_max
        self._by_start: SortedDict[bytes, Route] = SortedDict()
        self._by_id: dict[int, Route] = {}
        self._last: Route | None = None
        self.placement: Route | None = None

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[Route]:
        """The cached ranges in the order of their keys."""
        return iter(self._by_start.values())

    def find(self, key: bytes) -> Route | None:
        """The cached range that holds ``key``."""
        route = self._last
        if route is not None and route.start <= key and (route.end is None or key < route.end):
            return route
        index = self._by_start.bisect_right(key) - 1
        if index < 0:
            return None
        route = self._by_start.peekitem(index)[1]
        if route.end is not None and key >= route.end:
            return None
        self._last = route
        return route

    def find_id(self, range_id: int) -> Route | None:
        return self.placement if range_id == PLACEMENT_RANGE else self._by_id.get(range_id)

    def insert(self, descriptor: RangeDescriptor, leader: int | None) -> list[Route] | None:
        """Take a descriptor from a node. The routes it evicted; None if what was known is as new or newer.

        ``leader`` is who leads it in the eyes of that node; it fills a gap but never overrides what was seen.
        """
        if descriptor.range_id == PLACEMENT_RANGE:
            return self._insert_placement(descriptor, leader)
        known = self._by_id.get(descriptor.range_id)
        if known is not None:
            if not descriptor.newer_than(known.descriptor):
                if known.leader is None and leader in known.nodes:
                    known.leader = leader
                return None
            if known.descriptor.span == descriptor.span:
                known.update(descriptor)
                if known.leader is None and leader in known.nodes:
                    known.leader = leader
                return []
        overlapped = self._overlapping(descriptor)
        if any(not descriptor.newer_than(route.descriptor) for route in overlapped):
            return None
        evicted = overlapped if known is None or known in overlapped else [*overlapped, known]
        for route in evicted:
            self._evict(route)
        if len(self._by_start) >= self._ranges_max:
            oldest = next(iter(self._by_id.values()))
            self._evict(oldest)
            evicted = [*evicted, oldest]
        route = Route(descriptor, leader)
        self._by_start[route.start] = route
        self._by_id[route.range_id] = route
        return evicted

    def _insert_placement(self, descriptor: RangeDescriptor, leader: int | None) -> list[Route] | None:
        known = self.placement
        if known is None:
            self.placement = Route(descriptor, leader)
            return []
        newer = descriptor.newer_than(known.descriptor)
        if newer:
            known.update(descriptor)
        if known.leader is None and leader in known.nodes:
            known.leader = leader
        return [] if newer else None

    def _overlapping(self, descriptor: RangeDescriptor) -> list[Route]:
        start, end = descriptor.span
        routes = self._by_start
        index = max(routes.bisect_right(start) - 1, 0)
        found = []
        while index < len(routes):
            route = routes.peekitem(index)[1]
            if end is not None and route.start >= end:
                break
            if route.descriptor.span.overlaps(descriptor.span):
                found.append(route)
            index += 1
        return found

    def _evict(self, route: Route) -> None:
        del self._by_start[route.start]
        del self._by_id[route.range_id]
        route.evicted = True
        if self._last is route:
            self._last = None

    def check(self) -> None:
        """Walk every invariant."""
        previous: Route | None = None
        for start, route in self._by_start.items():
            assert start == route.start, f"range {route.range_id} is filed under {start!r}, starts at {route.start!r}"
            assert self._by_id.get(route.range_id) is route, f"range {route.range_id} is not filed under its id"
            assert not route.evicted, f"range {route.range_id} is cached and evicted"
            if previous is not None:
                assert previous.end is not None, f"range {previous.range_id} has no end but {route.range_id} follows"
                assert previous.end <= route.start, f"ranges {previous.range_id} and {route.range_id} overlap"
            previous = route
        assert len(self._by_id) == len(self._by_start), "the two indexes differ"
        assert self._last is None or not self._last.evicted, "the last range found has been evicted"
