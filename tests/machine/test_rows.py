"""Reads, measuring, snapshots, loading, and the order of persistence."""

import pytest

from shardkv.errors import Corruption, EpochMismatch
from shardkv.machine import RangeMachine, keys
from shardkv.machine.reads import get, scan_page
from shardkv.machine.size import CUTS_MAX, RangeMeasure, separator
from shardkv.machine.snapshot import (
    begin_install,
    engine_spans,
    installing,
    snapshot_rows,
)
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import EVERY_KEY, KeyRange, RangeId

from . import world
from .world import Client, World, dump

ALL = (100, 1 << 20)


def filled(span: KeyRange = EVERY_KEY, names: str = "abcdefgh") -> World:
    range_, client = World(world.descriptor(span)), Client()
    range_.do(client, *(client.put(name.encode(), b"v" * 10) for name in names))
    return range_


# Reads


def test_gets_come_in_the_order_asked_with_none_for_the_absent() -> None:
    range_ = filled(names="ab")
    found = get(range_.machine, range_.engine, [b"b", b"x", b"a", b"b"])
    assert [entry and entry[0] for entry in found] == [b"v" * 10, None, b"v" * 10, b"v" * 10]
    assert get(range_.machine, range_.engine, []) == []


def test_a_get_outside_the_span_is_refused_with_the_descriptor() -> None:
    range_ = World(world.descriptor(KeyRange(b"b", b"m")))
    for foreign in (b"a", b"m", b"z"):
        with pytest.raises(EpochMismatch) as refused:
            get(range_.machine, range_.engine, [b"c", foreign])
        assert refused.value.current == (range_.machine.descriptor,)


def test_a_value_of_an_unknown_format_is_never_served() -> None:
    range_ = World()
    batch = WriteBatch()
    batch.put(keys.user_key(b"k"), b"\x21" + b"\0" * 8 + b"encrypted")
    range_.engine.write(batch)
    with pytest.raises(Corruption):
        get(range_.machine, range_.engine, [b"k"])
    with pytest.raises(Corruption):
        scan_page(range_.machine, range_.engine, b"", None, *ALL)


def test_a_scan_gives_triples_in_order_both_ways() -> None:
    range_ = filled(names="abc")
    found, more = scan_page(range_.machine, range_.engine, b"", None, *ALL)
    assert found[0::3] == [b"a", b"b", b"c"]
    assert found[1::3] == [b"v" * 10] * 3
    assert found[2::3] == [range_.get(key)[1] for key in (b"a", b"b", b"c")]  # type: ignore[index]
    assert not more
    backwards, _ = scan_page(range_.machine, range_.engine, b"", None, *ALL, reverse=True)
    assert backwards[0::3] == [b"c", b"b", b"a"]
    names, _ = scan_page(range_.machine, range_.engine, b"", None, *ALL, keys_only=True)
    assert names[1::3] == [None] * 3


def test_a_scan_is_cut_to_the_ranges_span() -> None:
    range_ = filled(KeyRange(b"b", b"g"), "bcdef")
    stray = WriteBatch()
    stray.put(b"\x10a", b"x")
    stray.put(b"\x10g", b"x")
    range_.engine.write(stray)
    for start, end, expected in (
        (b"", None, b"bcdef"),
        (b"c", b"e", b"cd"),
        (b"", b"c", b"b"),
        (b"e", b"z", b"ef"),
        (b"x", None, b""),
        (b"", b"a", b""),
        (b"d", b"c", b""),
    ):
        found, more = scan_page(range_.machine, range_.engine, start, end, *ALL)
        assert b"".join(found[0::3]) == expected
        assert not more


def test_more_says_whether_keys_remain() -> None:
    range_ = filled(names="abcd")
    for limit, more in ((3, True), (4, False), (5, False)):
        assert scan_page(range_.machine, range_.engine, b"", None, limit, 1 << 20)[1] is more
    found, more = scan_page(range_.machine, range_.engine, b"", None, 100, 25)
    assert (found[0::3], more) == ([b"a", b"b"], True)
    found, more = scan_page(range_.machine, range_.engine, b"", None, 100, 1)
    assert (found[0::3], more) == ([b"a"], True), "one key always fits, else a scan would stand still"
    found, _ = scan_page(range_.machine, range_.engine, b"", b"c", 1, 1 << 20, reverse=True)
    assert found[0::3] == [b"b"]
    for room, expected in ((21, [b"a"]), (22, [b"a", b"b"])):
        assert scan_page(range_.machine, range_.engine, b"", None, 100, room)[0][0::3] == expected
    for room, expected in ((2, [b"a"]), (3, [b"a", b"b"])):
        found, more = scan_page(range_.machine, range_.engine, b"", None, 100, room, keys_only=True)
        assert (found[0::3], more) == (expected, True), "keys fill a page, too"


# Size


def measured(range_: World, step: int) -> RangeMeasure:
    measure = RangeMeasure(range_.engine, range_.machine.descriptor.span)
    steps = 0
    while not measure.step(step):
        steps += 1
        assert steps < 10_000
    return measure


@pytest.mark.parametrize("step", [1, 3, 1_000])
def test_a_measure_counts_the_same_whatever_its_steps(step: int) -> None:
    range_ = filled()
    measure = measured(range_, step)
    assert measure.keys == 8
    assert measure.bytes == 8 * (2 + 9 + 10)


def test_the_split_key_lies_inside_and_near_the_middle_by_bytes() -> None:
    range_, client = World(world.descriptor(KeyRange(b"k", None))), Client()
    names = [b"k%05d" % number for number in range(800)]
    for position, name in enumerate(names):
        range_.do(client, client.put(name, b"v" * (4_000 if position >= 600 else 10)))
        client.below = client.sequence
    measure = measured(range_, 100)
    key = measure.split_key
    assert key is not None
    below = sum(2 + 5 + 9 + (4_000 if name >= names[600] else 10) for name in names if name < key)
    assert 0.45 < below / measure.bytes < 0.55
    assert range_.machine.descriptor.span.contains(key)


def test_a_measure_keeps_a_bounded_number_of_cuts() -> None:
    engine, batch, value = MemoryEngine(), WriteBatch(), b"v" * 5_000
    for number in range(20 * CUTS_MAX):
        batch.put(keys.user_key(b"%06d" % number), value)
    engine.write(batch)
    measure = RangeMeasure(engine, EVERY_KEY)
    while not measure.step(500):
        assert len(measure._cuts) <= CUTS_MAX
    assert measure.split_key is not None
    assert 0.45 < int(measure.split_key.ljust(6, b"0")) / (20 * CUTS_MAX) < 0.55


def test_a_range_of_under_two_keys_has_no_split_key() -> None:
    for names in ("", "a"):
        assert measured(filled(names=names), 10).split_key is None
    range_ = filled(KeyRange(b"a", b"c"), "ab")
    assert measured(range_, 10).split_key == b"b"


@pytest.mark.parametrize(
    "left, right, expected",
    [(b"a", b"b", b"b"), (b"aaaa", b"aabb", b"aab"), (b"a", b"ab", b"ab"), (b"a", b"abc", b"ab"), (b"", b"xyz", b"x")],
)
def test_the_separator_is_the_shortest_key_between_two(left: bytes, right: bytes, expected: bytes) -> None:
    found = separator(left, right)
    assert found == expected
    assert left < found <= right


# Snapshots and installs


def test_a_snapshot_carries_a_range_to_another_node_whole() -> None:
    range_, client = filled(), Client(b"bob")
    attempt = client.increment(b"n")
    range_.do(client, attempt)
    target = MemoryEngine()
    batch = WriteBatch()
    batch.put(keys.user_key(b"old"), b"stale")
    batch.put(keys.session_key(1, 3), b"stale")
    batch.put(keys.applied_key(2), b"another range's")
    target.write(batch)
    rows = list(snapshot_rows(range_.engine, range_.machine.descriptor))
    assert rows == sorted(rows)
    install = WriteBatch()
    begin_install(install, range_.machine.descriptor, 40, 6, None, target)
    for key, value in rows:
        install.put(key, value)
    target.write(install)
    assert [row for row in dump(target) if row[0] != keys.applied_key(2)] == range_.rows()
    assert target.get(keys.applied_key(2)) == b"another range's"
    copy = RangeMachine.load(RangeId(1), target)
    assert copy is not None
    assert copy.applied_index == range_.machine.applied_index
    assert copy.snapshot_metadata() == range_.machine.snapshot_metadata()
    twin = World(machine=copy)
    twin.engine = target
    assert twin.do(client, attempt) == 1


def test_a_snapshot_goes_on_after_any_of_its_rows_with_none_of_another_range() -> None:
    """Between a range's own rows and its keys lie those of the ranges after it, and the keys of those before it."""
    range_ = filled(KeyRange(b"c", b"g"), "cdef")
    others = WriteBatch()
    for key in (keys.applied_key(0), keys.applied_key(2), keys.session_key(2, 3), b"\x10a", b"\x10g"):
        others.put(key, b"another range's")
    range_.engine.write(others)
    descriptor = range_.machine.descriptor
    rows = list(snapshot_rows(range_.engine, descriptor))
    assert len(rows) > 5
    for position, (key, _) in enumerate(rows):
        assert list(snapshot_rows(range_.engine, descriptor, after=key)) == rows[position + 1 :]


def test_an_install_over_a_wider_replica_leaves_nothing_of_it() -> None:
    """A replica that missed a split is replaced by its narrower successor."""
    range_ = filled()
    narrow = range_.machine.descriptor.with_span(KeyRange(b"", b"d"), world.FIRST_EPOCH)
    batch = WriteBatch()
    begin_install(batch, narrow, 40, 6, range_.machine.descriptor, range_.engine)
    range_.engine.write(batch)
    assert [key for key, _ in range_.rows()] == [keys.applied_key(1)]


def test_trap_19_a_crash_between_mark_and_ingest_leaves_the_mark_and_no_machine() -> None:
    """TRAPS 19: the deletes and the mark are one batch, flushed before the ingest, whose applied row takes the mark's
    place. At every moment a replica has its old state, the mark, or the whole new state."""
    range_ = filled()
    descriptor = range_.machine.descriptor
    rows = list(snapshot_rows(range_.engine, descriptor))
    mark = WriteBatch()
    begin_install(mark, descriptor, 40, 6, descriptor, range_.engine)
    range_.engine.write(mark)
    assert RangeMachine.load(RangeId(1), range_.engine) is None
    found = installing(range_.engine, RangeId(1))
    assert found is not None
    assert (found.descriptor, found.index, found.term) == (descriptor, 40, 6)
    assert range_.engine.get(keys.user_key(b"a")) is None
    ingested = WriteBatch()
    for key, value in rows:
        ingested.put(key, value)
    range_.engine.write(ingested)
    assert installing(range_.engine, RangeId(1)) is None
    assert RangeMachine.load(RangeId(1), range_.engine) is not None
    assert installing(range_.engine, RangeId(9)) is None


def test_the_placement_groups_empty_span_takes_no_user_keys() -> None:
    assert engine_spans(world.descriptor(KeyRange(b"", b""), range_id=0)) == [keys.system_span(0)]


# Loading and persistence


def test_a_range_that_is_not_there_does_not_load() -> None:
    assert RangeMachine.load(RangeId(1), MemoryEngine()) is None


def test_an_applied_row_without_a_descriptor_is_corruption() -> None:
    range_ = World()
    batch = WriteBatch()
    batch.delete(keys.descriptor_key(1))
    range_.engine.write(batch)
    with pytest.raises(Corruption):
        range_.reload()


def test_trap_10_the_applied_index_is_in_the_same_batch_as_the_data() -> None:
    """TRAPS 10: after any prefix of batches, applied index and data tell the same story."""
    range_, client = World(), Client()
    data = range_.machine.encode_write_entry(
        [(client.session, b"\x81" + client.put(b"k", b"v"), [])], world.NOW_MS << 18
    )[0]
    batch = WriteBatch()
    range_.machine.apply(11, world.TERM, data, batch, range_.engine)
    range_.machine.finish(batch)
    assert keys.user_key(b"k") in batch.changes
    range_.engine.write(batch)
    range_.reload()
    assert (range_.machine.applied_index, range_.value(b"k")) == (11, b"v")


def test_entries_apply_in_order_and_never_twice() -> None:
    machine, batch = World().machine, WriteBatch()
    for index in (10, 12):
        with pytest.raises(AssertionError, match="entry"):
            machine.apply(index, world.TERM, b"", batch, MemoryEngine())
    with pytest.raises(AssertionError, match="term"):
        machine.apply(11, world.TERM - 1, b"", batch, MemoryEngine())
