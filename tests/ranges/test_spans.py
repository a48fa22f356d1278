"""The span map: no key has two owners on a node, installs on their way included."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.ranges.spans import SpanMap, SpanTaken
from shardkv.types import EVERY_KEY, KeyRange, RangeId


def r(number: int) -> RangeId:
    return RangeId(number)


def split_map() -> SpanMap:
    """Ranges 1 and 2, split at ``m``."""
    spans = SpanMap()
    spans.claim(r(1), KeyRange(b"", b"m"))
    spans.claim(r(2), KeyRange(b"m", None))
    return spans


def test_every_key_has_the_owner_that_claimed_it() -> None:
    spans = split_map()
    for key, owner in ((b"", 1), (b"lzz", 1), (b"m", 2), (b"z" * 100, 2)):
        assert spans.owner_at(key) == owner
    spans.check()


def test_a_span_that_another_range_owns_cannot_be_claimed() -> None:
    spans = SpanMap()
    spans.claim(r(1), KeyRange(b"c", b"m"))
    for taken in (EVERY_KEY, KeyRange(b"", b"d"), KeyRange(b"l", None), KeyRange(b"d", b"e"), KeyRange(b"c", b"m")):
        with pytest.raises(SpanTaken) as refused:
            spans.claim(r(2), taken)
        assert refused.value.holders == [1]
    spans.claim(r(2), KeyRange(b"m", None))
    spans.claim(r(3), KeyRange(b"", b"c"))
    spans.check()


def test_trap_01_a_snapshot_of_a_split_off_range_waits_until_the_split_is_applied_here() -> None:
    """TRAPS 1: this replica of range 1 has not applied the split that made range 2; both would write range 2's keys."""
    spans = SpanMap()
    spans.claim(r(1), EVERY_KEY)
    with pytest.raises(SpanTaken):
        spans.reserve(r(2), KeyRange(b"m", None))
    spans.replace([(r(1), KeyRange(b"", b"m"))])
    spans.reserve(r(2), KeyRange(b"m", None))
    spans.check()


def test_trap_01_of_two_overlapping_snapshots_on_their_way_one_is_refused() -> None:
    """TRAPS 1: neither is installed yet, so neither owns the span; the reservation stands for the install."""
    spans = SpanMap()
    spans.reserve(r(1), EVERY_KEY)
    assert spans.owner_at(b"x") is None
    assert spans.overlapping(KeyRange(b"x", b"y")) == [1]
    with pytest.raises(SpanTaken):
        spans.reserve(r(2), KeyRange(b"m", None))
    with pytest.raises(SpanTaken):
        spans.claim(r(2), KeyRange(b"m", None))
    spans.cancel(r(1))
    spans.reserve(r(2), KeyRange(b"m", None))


def test_trap_01_a_split_cannot_give_its_right_half_a_span_that_a_snapshot_has_reserved() -> None:
    spans = SpanMap()
    spans.claim(r(1), KeyRange(b"", b"m"))
    spans.reserve(r(9), KeyRange(b"m", None))
    with pytest.raises(SpanTaken):
        spans.replace([(r(1), KeyRange(b"", b"c")), (r(2), KeyRange(b"c", b"n"))])
    assert spans.owner_at(b"d") == 1, "a refusal changes nothing"


def test_a_range_reserves_over_its_own_span_and_then_owns_the_new_one() -> None:
    """A lagging replica's snapshot may be narrower or wider than what it has."""
    spans = SpanMap()
    spans.claim(r(1), EVERY_KEY)
    spans.reserve(r(1), KeyRange(b"", b"m"))
    spans.check()
    assert spans.owner_at(b"z") == 1
    spans.fulfil(r(1), KeyRange(b"", b"m"))
    assert spans.owner_at(b"z") is None
    spans.claim(r(2), KeyRange(b"m", None))
    spans.check()


def test_a_cancelled_snapshot_leaves_the_owned_span() -> None:
    spans = split_map()
    spans.reserve(r(1), KeyRange(b"", b"c"))
    spans.cancel(r(1))
    spans.cancel(r(1))
    assert spans.owned(r(1)) == KeyRange(b"", b"m")


def test_a_snapshot_may_be_fulfilled_without_a_reservation_only_where_it_is_free() -> None:
    spans = split_map()
    with pytest.raises(SpanTaken):
        spans.fulfil(r(1), KeyRange(b"", b"n"))
    spans.fulfil(r(2), KeyRange(b"n", None))
    spans.fulfil(r(1), KeyRange(b"", b"n"))
    assert spans.owner_at(b"m") == 1


def test_spans_are_replaced_all_at_once() -> None:
    """A split in one step, and spans that overlap the old ones of the other range."""
    spans = SpanMap()
    spans.claim(r(1), EVERY_KEY)
    spans.replace([(r(1), KeyRange(b"", b"m")), (r(2), KeyRange(b"m", None))])
    assert [spans.owner_at(b"a"), spans.owner_at(b"m")] == [1, 2]
    spans.replace([(r(1), KeyRange(b"", b"s")), (r(2), KeyRange(b"s", None))])
    assert [spans.owner_at(b"m"), spans.owner_at(b"s")] == [1, 2]
    spans.check()


def test_a_replacement_takes_nothing_from_ranges_that_it_does_not_name() -> None:
    spans = split_map()
    with pytest.raises(SpanTaken):
        spans.replace([(r(1), KeyRange(b"", b"c")), (r(3), KeyRange(b"c", b"n"))])
    assert spans.owned(r(1)) == KeyRange(b"", b"m")


def test_trap_01_a_replacement_gives_no_range_what_another_of_them_has_reserved() -> None:
    spans = SpanMap()
    spans.claim(r(1), KeyRange(b"", b"m"))
    spans.reserve(r(2), KeyRange(b"m", None))
    with pytest.raises(SpanTaken):
        spans.replace([(r(1), KeyRange(b"", b"s")), (r(2), KeyRange(b"s", None))])
    spans.check()


def test_misuse_is_our_own_bug() -> None:
    spans = split_map()
    with pytest.raises(AssertionError):
        spans.claim(r(1), KeyRange(b"", b"m"))
    with pytest.raises(AssertionError):
        spans.claim(r(3), KeyRange(b"x", b"x"))
    with pytest.raises(AssertionError):
        spans.replace([(r(1), KeyRange(b"", b"n")), (r(2), KeyRange(b"m", None))])
    spans.reserve(r(1), KeyRange(b"", b"m"))
    with pytest.raises(AssertionError):
        spans.reserve(r(1), KeyRange(b"", b"m"))


BOUNDS = st.integers(0, 12)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("crfx"), st.integers(1, 5), BOUNDS, BOUNDS), max_size=40))
def test_the_map_agrees_with_one_owner_for_each_key(steps: list[tuple[str, int, int, int]]) -> None:
    """Against a model that writes the owner beside every key."""
    spans = SpanMap()
    owned: dict[int, set[int]] = {}
    reserved: dict[int, set[int]] = {}
    for step, number, low, high in steps:
        if low >= high:
            continue
        span, cells = KeyRange(b"%02d" % low, b"%02d" % high), set(range(low, high))
        others = set().union(*(held for held_by in (owned, reserved) for n, held in held_by.items() if n != number))
        free = not (cells & others)
        assert bool([other for other in spans.overlapping(span) if other != number]) is not free
        try:
            if step == "c" and number not in owned:
                spans.claim(r(number), span)
                owned[number] = cells
            elif step == "r" and number not in reserved:
                spans.reserve(r(number), span)
                reserved[number] = cells
            elif step == "f":
                spans.fulfil(r(number), span)
                owned[number] = cells
                reserved.pop(number, None)
            elif step == "x":
                spans.cancel(r(number))
                reserved.pop(number, None)
                continue
            else:
                continue
        except SpanTaken:
            assert not free
        else:
            assert free
        spans.check()
        for cell in range(12):
            owner = next((n for n, held in owned.items() if cell in held), None)
            assert spans.owner_at(b"%02d" % cell) == owner
