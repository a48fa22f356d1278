"""The checker itself: it must find the faults that it is there to find."""

import random
from dataclasses import replace
from itertools import combinations, permutations
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkv.simulation.checkers.linearizability import (
    REGISTER,
    Operation,
    Outcome,
    Undecided,
    Verdict,
    check,
    linearizable,
)


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


def test_a_conditional_write_on_a_version_that_nobody_told_is_held_to_what_was_told_before() -> None:
    """A put whose answer was lost leaves a version above all earlier ones, and certainly no absent key."""
    for version, possible in ((0, False), (5, False), (10, True), (12, True)):
        conditional = Operation("put", b"c", version, called=5, returned=6, outcome=Outcome(20))
        assert linearizable([put(b"a", 10, 0, 1), put(b"b", None, 2), conditional]) is possible


def test_what_a_conditional_write_found_is_below_every_later_version() -> None:
    """The put whose answer was lost had version 100, says who replaced or deleted it."""
    for version in (50, 100, 101):
        replaced = Operation("put", b"b", 100, called=2, returned=3, outcome=Outcome(version))
        assert linearizable([put(b"a", None, 0), replaced]) is (version > 100)
        deleted = Operation("delete", None, 100, called=2, returned=3, outcome=Outcome(True))
        assert linearizable([put(b"a", None, 0), deleted, put(b"b", version, 4, 5)]) is (version > 100)


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
    value: bytes | None = None
    version, now = 0, 0.0
    history: list[Operation] = []
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


def test_a_version_that_falls_across_a_delete_is_found() -> None:
    """Versions grow with every write of the key, across deletes too."""
    delete = Operation("delete", called=2, returned=3, outcome=Outcome(True))
    assert linearizable([put(b"a", 5, 0, 1), delete, put(b"b", 6, 4, 5)])
    assert not linearizable([put(b"a", 5, 0, 1), delete, put(b"b", 4, 4, 5)])


def test_a_search_without_an_end_is_undecided_and_never_guesses() -> None:
    """Fourteen increments of unknown outcome and a read that none explains: more states than the bound allows."""
    history = [Operation("increment", 1 << each) for each in range(14)] + [get((b"0", 1), 2, 3)]
    result = check(history, steps_max=10_000)
    assert result.verdict is Verdict.UNDECIDED
    assert result.findings[0].steps <= 10_000 + len(history)
    with pytest.raises(Undecided):
        linearizable(history, steps_max=10_000)


def test_keys_are_judged_apart_and_one_that_fails_decides() -> None:
    good = [replace(put(b"a", 1, 0, 1), key=b"good"), replace(get((b"a", 1), 2, 3), key=b"good")]
    bad = [replace(put(b"a", 1, 0, 1), key=b"bad"), replace(get(None, 2, 3), key=b"bad")]
    assert check(good).verdict is Verdict.LINEARIZABLE
    result = check(good + bad)
    assert result.verdict is Verdict.NOT_LINEARIZABLE
    assert [each.key for each in result.failing] == [b"bad"]


def test_the_longest_order_explains_what_can_be_explained() -> None:
    history = [put(b"a", 1, 0, 1), put(b"b", 2, 2, 3), get((b"a", 1), 4, 5)]
    (finding,) = check(history).findings
    assert finding.longest == tuple(history[:2])


def _explained(history: list[Operation]) -> bool:
    """By trying every order of every choice of the unknown operations: the definition, word for word."""
    certain = [each for each in history if each.outcome is not None]
    unknown = [each for each in history if each.outcome is None]
    for count in range(len(unknown) + 1):
        for chosen in combinations(unknown, count):
            if any(_fits(order) for order in permutations([*certain, *chosen])):
                return True
    return False


def _fits(order: tuple[Operation, ...]) -> bool:
    for position, operation in enumerate(order):
        if any(later.returned < operation.called for later in order[position + 1 :]):
            return False
    state = REGISTER.initial
    for operation in order:
        after = REGISTER.step(state, operation)
        if after is None:
            return False
        state = after
    return True


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    found: list[Operation] = []
    for client in range(draw(st.integers(1, 6))):
        called = draw(st.integers(0, 8))
        returned: float = called + draw(st.integers(0, 6))
        kind = draw(st.sampled_from(["get", "put", "put", "delete", "delete-range", "increment", "cas"]))
        value, version = draw(st.sampled_from([b"1", b"2"])), draw(st.integers(1, 4))
        operation = Operation("put" if kind == "cas" else kind, called=called, returned=returned, client=client)
        if kind == "get":
            operation.outcome = Outcome(draw(st.sampled_from([None, (value, version)])))
        else:
            if kind in ("put", "cas"):
                operation.argument = value
            if kind == "increment":
                operation.argument = 1
            if kind == "cas":
                operation.if_version = draw(st.integers(0, 3))
            answers: dict[str, Outcome] = {
                "put": draw(st.sampled_from([Outcome(version), Outcome()])),
                "cas": draw(st.sampled_from([Outcome(version), Outcome(mismatch=version)])),
                "delete": Outcome(draw(st.booleans())),
                "delete-range": Outcome(),
                "increment": Outcome(draw(st.integers(1, 3))),
            }
            operation.outcome = draw(st.sampled_from([None, answers[kind], answers[kind]]))
            if operation.outcome is None:
                operation.returned = inf
        found.append(operation)
    return found


def test_a_write_without_a_version_may_come_behind_a_read_between_it_and_one_alike() -> None:
    """It leaves what it finds, as far as anybody knows, and yet another version."""
    reads = [get((b"a", 1), 0, 9), get((b"a", 2), 11, 12)]
    for call in (Operation("put", b"a"), Operation("increment", 0)):
        twice = [replace(call, called=at, returned=8, outcome=Outcome(None)) for at in (1, 2)]
        if call.kind == "increment":
            twice = [replace(each, outcome=Outcome(0)) for each in twice]
            reads = [get((b"0", 1), 0, 9), get((b"0", 2), 11, 12)]
        assert linearizable([*twice, *reads])


def test_a_delete_without_an_answer_may_come_behind_a_write_that_it_overlaps() -> None:
    """Where the key is absent before, it leaves that so, and is not to be taken early for that."""
    put = Operation("put", b"v", called=2.0, returned=3.0, outcome=Outcome(5))
    for after, possible in ((None, True), ((b"v", 5), True), ((b"w", 6), False)):
        got = Operation("get", called=5.0, returned=6.0, outcome=Outcome(after))
        delete = Operation("delete-range", called=1.0, returned=4.0, outcome=Outcome())
        assert linearizable([delete, put, got]) == possible


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(histories())
def test_the_search_agrees_with_trying_every_order(history: list[Operation]) -> None:
    assert linearizable(history) == _explained(history)
