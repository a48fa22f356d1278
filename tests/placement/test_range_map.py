"""The range map: for every key the newest descriptor that was ever reported, in whatever order (design 4.9, 4.10)."""

from hypothesis import given
from hypothesis import strategies as st

from shardkv.types import EVERY_KEY, Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId
from shardkv_placement.range_map import RangeMap
from tests.placement.worlds import descriptor

KEYS = [b""] + [bytes([letter]) for letter in b"abcdefgh"]


def reported(*descriptors: RangeDescriptor) -> RangeMap:
    ranges = RangeMap()
    for each in descriptors:
        ranges.accept(each)
        ranges.check()
    return ranges


def spans(ranges: RangeMap) -> list[tuple[int, bytes, bytes | None]]:
    return [(each.descriptor.range_id, each.span.start, each.span.end) for each in ranges.segments]


class History:
    """A true history of splits, merges and membership changes, and every descriptor that ever held in it."""

    def __init__(self, choices: list[tuple[int, int]]) -> None:
        self.now = [descriptor(1, b"", None, (1, 1))]
        self.all = list(self.now)
        self.next_range = 2
        for kind, choice in choices:
            (self._split, self._merge, self._change)[kind](choice)

    def _put(self, position: int, taken: int, *descriptors: RangeDescriptor) -> None:
        self.now[position : position + taken] = descriptors
        self.all.extend(descriptors)

    def _split(self, choice: int) -> None:
        position = choice % len(self.now)
        old = self.now[position]
        keys = [key for key in KEYS if old.span.contains(key) and key != old.span.start]
        if not keys:
            return
        key, generation = keys[choice % len(keys)], max(old.epoch) + 1
        epoch = Epoch(generation, generation)
        child = descriptor(self.next_range, key, old.span.end, epoch)
        self.next_range += 1
        self._put(position, 1, old.with_span(KeyRange(old.span.start, key), epoch), child)

    def _merge(self, choice: int) -> None:
        if len(self.now) > 1:
            position = choice % (len(self.now) - 1)
            left, right = self.now[position : position + 2]
            generation = max(*left.epoch, *right.epoch) + 1
            span = KeyRange(left.span.start, right.span.end)
            self._put(position, 2, left.with_span(span, Epoch(generation, generation)))

    def _change(self, choice: int) -> None:
        position = choice % len(self.now)
        old = self.now[position]
        epoch = old.epoch._replace(membership=old.epoch.membership + 1)
        self._put(position, 1, old.with_span(old.span, epoch))


HISTORIES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1_000)), max_size=14).map(History)


@given(history=HISTORIES, data=st.data())
def test_any_reports_in_any_order_give_each_key_the_newest_descriptor_reported_for_it(
    history: History, data: st.DataObject
) -> None:
    """Design 4.9: of two descriptors that overlap, the larger span generation wins. Compared with a map key by key."""
    some = data.draw(st.lists(st.sampled_from(history.all), max_size=20))
    ranges = reported(history.all[0], *some)
    ranges.check(tiled=True)
    for key in KEYS:
        covering = [each for each in [history.all[0], *some] if each.span.contains(key)]
        newest = max(covering, key=lambda each: (each.epoch.span, each.epoch.membership))
        found = ranges.segments_from(key, 1)[0]
        assert found.span.contains(key)
        assert found.descriptor == newest
    for start in (None, *KEYS):
        above = [each for each in ranges.descriptors() if start is None or each.span.start > start]
        above.sort(key=lambda each: (each.span.start, each.range_id))
        assert list(ranges.descriptors_above(start)) == above


@given(history=HISTORIES, data=st.data())
def test_once_all_is_reported_the_map_is_the_truth_whatever_the_order(history: History, data: st.DataObject) -> None:
    """Reports may be lost, late and repeated; the last word on every range is enough."""
    order = data.draw(st.permutations(history.all))
    ranges = reported(*order)
    assert [each.descriptor for each in ranges.segments] == history.now
    assert all(each.whole for each in ranges.segments)
    assert {each.range_id for each in ranges.descriptors()} == {each.range_id for each in history.now}


def test_half_a_split_leaves_the_rest_with_the_parent() -> None:
    """A child may report before its parent's other half does; its keys must keep a route meanwhile."""
    ranges = reported(descriptor(1, b"", None, (1, 1)), descriptor(2, b"c", b"e", (2, 2)))
    assert spans(ranges) == [(1, b"", b"c"), (2, b"c", b"e"), (1, b"e", None)]
    assert not next(iter(ranges.segments)).whole
    assert ranges.segments_from(b"e", 1)[0].shown == descriptor(1, b"e", None, (1, 1))
    assert ranges.descriptor(RangeId(1)) == descriptor(1, b"", None, (1, 1))


def test_an_old_descriptor_does_not_come_back() -> None:
    """The parent's last leader reports late, after both halves have."""
    ranges = reported(
        descriptor(1, b"", None, (1, 1)), descriptor(1, b"", b"c", (2, 2)), descriptor(2, b"c", None, (2, 2))
    )
    assert ranges.accept(descriptor(1, b"", None, (1, 1))) is None
    assert ranges.accept(descriptor(1, b"", None, (9, 1))) is None  # Span generation first, membership after.
    assert spans(ranges) == [(1, b"", b"c"), (2, b"c", None)]


def test_a_merged_range_is_forgotten() -> None:
    """The swallowed range's id leads nowhere any more."""
    ranges = reported(
        descriptor(1, b"", b"c", (2, 2)), descriptor(2, b"c", None, (2, 2)), descriptor(1, b"", None, (3, 3))
    )
    assert ranges.descriptor(RangeId(2)) is None
    assert len(ranges) == 1
    assert spans(ranges) == [(1, b"", None)]


def test_a_membership_change_replaces_the_same_range() -> None:
    """Of one range and span, the larger membership generation is the newer."""
    ranges = reported(descriptor(1, b"", None, (1, 1)))
    assert ranges.accept(descriptor(1, b"", None, (2, 1), 1, 2, 3)) is not None
    assert ranges.accept(descriptor(1, b"", None, (1, 1))) is None
    newest = ranges.descriptor(RangeId(1))
    assert newest is not None
    assert [replica.node_id for replica in newest.replicas] == [1, 2, 3]


def test_a_different_range_of_the_same_generation_changes_nothing() -> None:
    """Cannot happen by the rules of range generations; the one that stands, stands."""
    ranges = reported(descriptor(1, b"", None, (3, 3)))
    assert ranges.accept(descriptor(2, b"a", b"b", (3, 3))) is None


def test_a_lookup_begins_with_the_segment_that_holds_the_key() -> None:
    ranges = reported(
        descriptor(1, b"", b"c", (1, 1)), descriptor(2, b"c", b"e", (1, 1)), descriptor(3, b"e", None, (1, 1))
    )
    for key, expected in ((b"", [1, 2]), (b"b", [1, 2]), (b"c", [2, 3]), (b"d", [2, 3]), (b"zz", [3])):
        assert [each.descriptor.range_id for each in ranges.segments_from(key, 2)] == expected, key


def test_a_change_names_the_rows_to_write_and_to_delete() -> None:
    """A merge deletes the right side's row; a split writes two and deletes none."""
    ranges = reported(descriptor(1, b"", None, (1, 1)))
    change = ranges.accept(descriptor(2, b"c", None, (2, 2)))
    assert change is not None
    assert ([each.span.start for each in change.written], change.removed) == ([b"", b"c"], [])
    change = ranges.accept(RangeDescriptor(RangeId(1), EVERY_KEY, Epoch(3, 3), (Member(NodeId(1), ReplicaId(9)),)))
    assert change is not None
    assert ([each.span.start for each in change.written], change.removed) == ([b""], [b"c"])
