"""What is said of all ranges comes in pages: a cluster may have more of them than one answer of a node holds."""

import pytest
from trio.testing import MockClock

from shardkv.cli.cluster import fetch_ranges
from shardkv.errors import MalformedRequest
from shardkv.server import overview, placement_leader
from shardkv.server.answer_budget import ANSWER_BYTES_MAX
from shardkv.types import (
    KEY_BYTES_MAX,
    PLACEMENT_RANGE,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
)
from shardkv.wire.requests import Method, RangesListing, Request
from shardkv_placement.commands import ReportRanges, encode
from shardkv_placement.router import ROUTES_MAX
from shardkv_placement.statistics import RangeStatistics
from shardkv_placement.view import RangeView, ViewBuilder
from tests.placement.worlds import a_view
from tests.server.world import Cluster, world

REPORTED_AT_ONCE = 256
COUNT = ANSWER_BYTES_MAX // (2 * KEY_BYTES_MAX) + REPORTED_AT_ONCE


def boundary(number: int) -> bytes:
    return b"%06d" % number + b"." * (KEY_BYTES_MAX - 6)


def halves() -> list[RangeDescriptor]:
    """Ranges with the longest keys, as many as splits would have left."""
    members = (Member(NodeId(1), ReplicaId(1 << 20)),)
    spans = [KeyRange(boundary(number), boundary(number + 1)) for number in range(COUNT)]
    return [RangeDescriptor(RangeId(1000 + index), span, Epoch(9, 9), members) for index, span in enumerate(spans)]


async def report(cluster: Cluster, descriptors: list[RangeDescriptor]) -> None:
    async with cluster.client() as kv:
        for index in range(0, len(descriptors), REPORTED_AT_ONCE):
            command = encode(ReportRanges(tuple(descriptors[index : index + REPORTED_AT_ONCE])))
            await cluster.ask(kv, Method.PLACEMENT, command, range_id=PLACEMENT_RANGE)


async def test_a_cluster_of_more_ranges_than_one_answer_holds_is_listed_by_every_node(
    autojump_clock: MockClock,
) -> None:
    """One answer of all of them was refused as Busy, for ever."""
    async with world(nodes=3, seed=1) as cluster:
        made = halves()
        await report(cluster, made)
        wanted = {descriptor.range_id: descriptor.span for descriptor in made}
        for name, node in cluster.nodes.items():
            async with cluster.client(name) as kv:
                rows = await fetch_ranges(kv, 10.0)
                assert len(await kv.call(Method.ROUTES, b"", ROUTES_MAX)) == ROUTES_MAX, "the most that a lookup gets"
            assert [row["start"] for row in rows] == sorted({row["start"] for row in rows}), name
            listed = {row["id"]: KeyRange(row["start"], row["end"]) for row in rows if row["id"] >= 1000}
            assert listed == wanted, name
            placement = node.inside.placement
            whole = await placement.ranges(Request(1, Method.RANGES, 0, 0, 0, []))
            assert whole == rows, f"what the admin endpoint of {name} shows"


async def test_a_page_looks_at_no_more_ranges_than_it_holds(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page put all ranges in order anew: with 100,000 of them a node's loop stood still for longer at each than
    the page took."""
    async with world(nodes=1, seed=1) as cluster:
        (node,) = cluster.nodes.values()
        made = halves()[:REPORTED_AT_ONCE]
        await report(cluster, made)
        looked_at: list[RangeId] = []

        class Seen(RangeView):
            def __init__(self, descriptor: RangeDescriptor, statistics: RangeStatistics | None) -> None:
                super().__init__(descriptor, statistics)
                looked_at.append(descriptor.range_id)

        request = Request(1, Method.RANGES, 0, 0, 0, [made[9].span.start])
        with monkeypatch.context() as patch:
            patch.setattr(ViewBuilder, "build", None)  # a view is of all ranges
            patch.setattr(placement_leader, "RangeView", Seen)
            patch.setattr(overview, "PAGE_BYTES_MAX", 3 * (overview.ROW_BYTES + 2 * KEY_BYTES_MAX))
            rows, more = await node.inside.placement.ranges(request)
        assert ([row["id"] for row in rows], more) == ([each.range_id for each in made[10:13]], True)
        assert looked_at == [each.range_id for each in made[10:14]], "the next tells that there is more"


def test_pages_hold_every_range_once_in_the_order_of_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item for range_id, item in a_view(3, dict.fromkeys(range(1, 8), "1* 2 3")).ranges.items() if range_id]
    monkeypatch.setattr(overview, "PAGE_BYTES_MAX", 2 * (overview.ROW_BYTES + 12))
    listing, pages, left = RangesListing(), 1, items
    while listing.take(overview.ranges_page(left)):
        left = [item for item in items if item.descriptor.span.start > (listing.after or b"")]
        pages += 1
    assert (pages, listing.rows) == (4, overview.ranges(items))


def test_a_range_that_alone_is_more_than_a_page_is_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(a_view(3, {1: "1* 2 3", 2: "1* 2 3"}).ranges.values())
    monkeypatch.setattr(overview, "PAGE_BYTES_MAX", 1)
    first, second = overview.ranges_page(items), overview.ranges_page(items[1:])
    assert ([row["id"] for row in first[0]], first[1]) == ([1], True)
    assert ([row["id"] for row in second[0]], second[1]) == ([2], False)


def test_an_older_node_answers_with_all_ranges_at_once() -> None:
    listing = RangesListing()
    assert not listing.take([{"start": b""}, {"start": b"m"}])
    assert listing.rows == [{"start": b""}, {"start": b"m"}]


@pytest.mark.parametrize("answer", [None, [[], True], [[{"id": 1}], True], [[{"start": b"k"}], True]])
def test_a_listing_ends_even_if_its_pages_do_not_go_on(answer: object) -> None:
    listing = RangesListing()
    assert listing.take([[{"start": b"k"}], True])
    with pytest.raises(MalformedRequest):
        listing.take(answer)
