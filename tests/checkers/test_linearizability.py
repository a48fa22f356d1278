"""The checker itself: it must find the faults that it is there to find."""

import random

import pytest

from shardkv.simulation.checkers.linearizability import Operation, Outcome, linearizable


def put(value: bytes, version: int | None, called: float, returned: float = 1e9, **fields: int) -> Operation:
    outcome = None if version is None else Outcome(version)
    return Operation("put", value, called=called, returned=returned, outcome=outcome, **fields)


def get(found: tuple[bytes, int] | None, called: float, returned: float) -> Operation:
    return Operation("get", called=called, returned=returned, outcome=Outcome(found))


def increment(total: int | None, called: float, returned: float = 1e9) -> Operation:
    return Operation(
        "increment", 1, called=called, returned=returned, outcome=None if total is None else Outcome(total)
    )


def test_one_after_the_other_is_fine() -> None:
    assert linearizable([put(b"a", 1, 0, 1), get((b"a", 1), 2, 3), put(b"b", 2, 4, 5), get((b"b", 2), 6, 7)])


def test_a_stale_read_is_found() -> None:
    assert not linearizable([put(b"a", 1, 0, 1), put(b"b", 2, 2, 3), get((b"a", 1), 4, 5)])


def test_a_read_during_a_write_may_see_either() -> None:
    for found in ((b"a", 1), (b"b", 2)):
        assert linearizable([put(b"a", 1, 0, 1), put(b"b", 2, 2, 9), get(found, 4, 5)])


def test_two_reads_that_see_a_write_come_and_go_are_found() -> None:
    writes = [put(b"a", 1, 0, 1), put(b"b", 2, 2, 20)]
    assert linearizable([*writes, get((b"a", 1), 4, 5), get((b"b", 2), 6, 7)])
    assert not linearizable([*writes, get((b"b", 2), 4, 5), get((b"a", 1), 6, 7)])


def test_a_lost_write_is_found_and_one_of_unknown_outcome_may_be_lost_or_late() -> None:
    assert not linearizable([put(b"a", 1, 0, 1), get(None, 2, 3)])
    assert linearizable([put(b"a", None, 0), get(None, 2, 3)])
    assert linearizable([put(b"a", None, 0), get(None, 2, 3), get((b"a", 7), 4, 5)])
    assert not linearizable([put(b"a", None, 0), get((b"a", 7), 2, 3), get(None, 4, 5)])


def test_an_increment_that_counts_twice_is_found() -> None:
    assert linearizable([increment(1, 0, 1), increment(None, 0), increment(3, 4, 5)])
    assert not linearizable([increment(1, 0, 1), increment(3, 4, 5)])
    assert not linearizable([increment(1, 0, 2), increment(1, 1, 3)])


def test_a_compare_and_swap_wins_once() -> None:
    first = put(b"a", 1, 0, 1, if_version=0)
    assert linearizable([first, put(b"b", 2, 2, 3, if_version=1)])
    assert not linearizable([first, put(b"b", 2, 2, 3, if_version=0)])
    failed = Operation("put", b"b", 0, 2, 3, Outcome(mismatch=1))
    assert linearizable([first, failed])
    assert not linearizable([failed, put(b"a", 1, 4, 5)])


def test_a_version_that_falls_is_found() -> None:
    assert not linearizable([put(b"a", 5, 0, 1), put(b"b", 4, 2, 3)])


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_of_a_real_register_pass_and_a_changed_answer_does_not(seed: int) -> None:
    chance = random.Random(seed)
    value, version, now = None, 0, 0.0
    history = []
    for _ in range(40):
        at = now = now + 1
        called, returned = at - chance.random() * 3, at + chance.random() * 3
        if chance.random() < 0.5:
            found = None if value is None else (value, version)
            history.append(get(found, called, returned))
        else:
            value, version = b"%d" % chance.randrange(1000), version + 1
            history.append(put(value, version if chance.random() < 0.9 else None, called, returned))
            if history[-1].outcome is None:
                history[-1].returned = 1e9
    assert linearizable(history)
    reads = [each for each in history if each.kind == "get"]
    chance.choice(reads).outcome = Outcome((b"never written", 999))
    assert not linearizable(history)
