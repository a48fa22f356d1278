"""Each checker takes a right history and refuses a wrong one: a rule that cannot fail proves nothing."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from shardkv.simulation.checkers.acknowledged import NoWriteLost
from shardkv.simulation.checkers.counters import ExactlyOnce
from shardkv.simulation.checkers.growth import NothingGrows
from shardkv.simulation.checkers.leaders import Leader, OneLeaderPerTerm
from shardkv.simulation.checkers.linearizability import UNKNOWN, Operation, Outcome
from shardkv.simulation.checkers.logs import LogMatching, Seen
from shardkv.simulation.checkers.machines import IdenticalMachines
from shardkv.simulation.checkers.ranges import RangesTile, Span
from shardkv.simulation.checkers.registers import Registers
from shardkv.simulation.checkers.sessions import SessionsBounded
from shardkv.simulation.checkers.staleness import NoOlderThanSaid
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.checkers.voters import VotersHaveData
from shardkv.simulation.observing import Observing
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_WINDOW_MAX


def assert_refused(call: Callable[[], object], rule: str) -> None:
    with pytest.raises(Violation) as caught:
        call()
    assert caught.value.checker == rule


def test_a_term_has_one_leader() -> None:
    """Raft paper 5.2."""
    leaders = OneLeaderPerTerm()
    leaders.saw_leader(1, 5, Leader(1, 1, 10))
    leaders.saw_leader(1, 5, Leader(1, 1, 10))
    leaders.saw_leader(1, 6, Leader(2, 1, 15))
    leaders.saw_leader(2, 5, Leader(4, 3, 2))
    leaders.check()
    for second in Leader(2, 1, 10), Leader(1, 2, 10), Leader(1, 1, 11):
        assert_refused(lambda second=second: leaders.saw_leader(1, 5, second), "one-leader-per-term")


def test_a_learner_has_data_when_it_gets_its_vote() -> None:
    """Raft thesis 4.2.1."""
    voters = VotersHaveData()
    voters.saw_learner(1, 12)
    voters.saw_learner(1, 13)
    assert voters.waits(1, 12)
    assert not voters.waits(2, 12)
    voters.saw_vote(1, 12, has_data=True)
    assert not voters.waits(1, 12)
    voters.check()
    assert_refused(lambda: voters.saw_vote(1, 13, has_data=False), "voters-have-data")


def test_an_entry_of_one_index_and_term_is_the_same_everywhere() -> None:
    """Raft paper 5.3."""
    logs = LogMatching()
    logs.saw_entry(1, 11, 5, Seen(10, 77, 5), "n1")
    logs.saw_entry(1, 11, 5, Seen(10, 77, None), "n2")
    logs.saw_entry(1, 11, 6, Seen(12, 78, 5), "n3")
    assert_refused(lambda: logs.saw_entry(1, 11, 5, Seen(10, 99, 5), "n2"), "log-matching")
    assert_refused(lambda: logs.saw_entry(1, 11, 5, Seen(11, 77, 5), "n2"), "log-matching")


def test_what_stands_before_equal_entries_is_equal() -> None:
    logs = LogMatching()
    logs.saw_entry(1, 11, 5, Seen(10, 77, None), "n1")
    logs.saw_entry(1, 11, 5, Seen(10, 77, 4), "n2")
    assert_refused(lambda: logs.saw_entry(1, 11, 5, Seen(10, 77, 3), "n3"), "log-matching")


def test_a_committed_entry_is_never_another() -> None:
    """Raft paper 5.4.3."""
    logs = LogMatching()
    logs.saw_committed(1, 11, 5, "n1")
    logs.saw_committed(1, 11, 5, "n2")
    assert_refused(lambda: logs.saw_committed(1, 11, 6, "n3"), "log-matching")


def test_an_entry_that_is_committed_after_it_was_looked_at_is_one_that_was_committed() -> None:
    """Two replicas commit entries 10 and 11 of different terms, and never stand at the same commit index when somebody
    looks."""
    observing: Any = Observing.__new__(Observing)
    observing.logs, observing._read_to, observing._committed_to = LogMatching(), {}, {}
    for name, term, commits in (("n1", 3, (9, 11)), ("n2", 4, (9, 12))):
        for commit in commits:
            log = SimpleNamespace(
                first_index=lambda: 1,
                last_index=lambda: 12,
                term=lambda index, term=term: 2 if index < 10 else term,
                fingerprint=lambda index, term=term: (2 if index < 10 else term, 1, 1),
                hard_state=SimpleNamespace(commit=commit),
            )
            look = partial(
                observing._see_log, SimpleNamespace(name=name, starts=1), 1, SimpleNamespace(log=log, replica_id=term)
            )
            if commit == 12:
                assert_refused(look, "log-matching")
            else:
                look()


def test_terms_never_fall_along_the_committed_log() -> None:
    logs = LogMatching()
    logs.saw_committed(1, 11, 6, "n1")
    logs.saw_committed(1, 12, 5, "n1")
    assert_refused(logs.check, "log-matching")


def test_replicas_that_applied_the_same_hold_the_same() -> None:
    machines = IdenticalMachines()
    machines.saw_state(1, 20, "aa", "n1")
    machines.saw_state(1, 21, "bb", "n1")
    machines.saw_state(1, 20, "aa", "n2")
    machines.check()
    assert_refused(lambda: machines.saw_state(1, 21, "cc", "n2"), "identical-machines")


def test_ranges_cover_every_key_once() -> None:
    """DESIGN 4.9."""
    ranges = RangesTile()
    ranges.saw_spans([Span(1, b"", b"m", 2), Span(2, b"m", None, 2)], complete=True)
    ranges.saw_spans([Span(1, b"", None, 1), Span(1, b"", b"m", 2), Span(2, b"m", None, 2)], complete=True)
    for wrong in (
        [Span(1, b"", b"k", 3), Span(2, b"m", None, 2)],
        [Span(1, b"", b"m", 2)],
        [Span(2, b"m", None, 2)],
        [Span(1, b"", b"n", 4), Span(2, b"m", None, 2)],
        [],
    ):
        assert_refused(lambda wrong=wrong: RangesTile().saw_spans(wrong, complete=True), "ranges-tile")  # type: ignore[misc]


def test_a_gap_is_no_gap_while_a_node_is_down_but_a_contradiction_is_one() -> None:
    ranges = RangesTile()
    ranges.saw_spans([Span(1, b"", b"m", 2)], complete=False)
    ranges.saw_spans([Span(1, b"", b"m", 2), Span(3, b"a", b"c", 5)], complete=False)
    assert_refused(lambda: ranges.saw_spans([Span(1, b"", b"k", 2)], complete=False), "ranges-tile")
    assert_refused(
        lambda: RangesTile().saw_spans([Span(1, b"", b"m", 2), Span(2, b"k", b"z", 2)], complete=False), "ranges-tile"
    )
    assert_refused(lambda: RangesTile().saw_spans([Span(1, b"m", b"m", 2)], complete=False), "ranges-tile")


def test_an_increment_counts_once() -> None:
    """DESIGN 4.6."""
    counters = ExactlyOnce()
    tickets = [counters.called(b"n") for _ in range(3)]
    counters.answered(b"n", tickets[0], 1)
    counters.unknown(b"n", tickets[1])
    counters.answered(b"n", tickets[2], 3)
    counters.saw_total(b"n", 3, counters.floor(b"n"))
    counters.check()
    assert_refused(lambda: counters.saw_total(b"n", 4), "exactly-once")
    assert_refused(lambda: counters.saw_total(b"n", 2, counters.floor(b"n")), "exactly-once")


def test_two_increments_are_never_answered_the_same() -> None:
    counters = ExactlyOnce()
    one, two = counters.called(b"n"), counters.called(b"n")
    counters.answered(b"n", one, 1)
    assert_refused(lambda: counters.answered(b"n", two, 1), "exactly-once")


def test_an_increment_that_is_counted_twice_is_seen_by_the_next() -> None:
    counters = ExactlyOnce()
    counters.answered(b"n", counters.called(b"n"), 1)
    assert_refused(lambda: counters.answered(b"n", counters.called(b"n"), 3), "exactly-once")


def test_an_increment_that_is_counted_twice_is_not_hidden_by_a_later_one_of_unknown_outcome() -> None:
    """Others are under way all the while, so that no more is counted at any moment than was called."""
    counters = ExactlyOnce()
    counters.answered(b"n", counters.called(b"n"), 1)
    slow, twice = counters.called(b"n"), counters.called(b"n")
    counters.answered(b"n", twice, 3)
    later = counters.called(b"n")
    counters.answered(b"n", slow, 4)
    counters.unknown(b"n", later)
    counters.saw_total(b"n", 4, counters.floor(b"n"))
    assert_refused(counters.check, "exactly-once")


def test_an_increment_of_unknown_outcome_counts_for_what_was_answered_after_its_call() -> None:
    counters = ExactlyOnce()
    doubtful = counters.called(b"n")
    counters.answered(b"n", counters.called(b"n"), 2)
    counters.unknown(b"n", doubtful)
    counters.answered(b"n", counters.called(b"n"), 3)
    counters.called(b"n")  # still under way
    counters.saw_total(b"n", 4)
    counters.check()


def test_an_increment_that_was_refused_counts_for_nothing() -> None:
    counters = ExactlyOnce()
    counters.refused(b"n", counters.called(b"n"))
    assert_refused(lambda: counters.saw_total(b"n", 1), "exactly-once")


def test_an_increment_that_was_lost_is_seen_by_the_next() -> None:
    counters = ExactlyOnce()
    counters.answered(b"n", counters.called(b"n"), 1)
    assert_refused(lambda: counters.answered(b"n", counters.called(b"n"), 1), "exactly-once")
    later = counters.called(b"m")
    assert counters.floor(b"m") == 0
    counters.unknown(b"m", later)
    counters.check()


def test_an_acknowledged_write_is_there_or_something_newer_is() -> None:
    ledger = NoWriteLost()
    for value in (b"v", b"w", b"x", b"other"):
        ledger.called(b"k", value)
    ledger.acknowledged(b"k", 7, b"v", ledger.floor(b"k"))
    floor = ledger.floor(b"k")
    ledger.read(b"k", 7, b"v", floor)
    ledger.read(b"k", 9, b"w", floor)
    ledger.read(b"k", 7, b"v", floor)  # called before 9 was seen, answered after
    assert_refused(lambda: ledger.read(b"k", 7, b"v", ledger.floor(b"k")), "no-write-lost")
    assert_refused(lambda: ledger.read(b"k", 0, None, floor), "no-write-lost")
    assert_refused(lambda: ledger.acknowledged(b"k", 8, b"x", ledger.floor(b"k")), "no-write-lost")
    assert_refused(lambda: ledger.read(b"k", 9, b"other", ledger.floor(b"k")), "no-write-lost")


def test_a_put_of_unknown_outcome_shows_what_was_put_and_shows_it_once() -> None:
    """A value that nobody put, or that a duplicate put once more, is no newer state of the key (DESIGN 4.6)."""
    ledger = NoWriteLost()
    ledger.called(b"k", b"v")
    ledger.called(b"k", b"w")
    ledger.called(b"other", b"x")
    ledger.acknowledged(b"k", 7, b"v", 0)
    ledger.read(b"k", 9, b"w", 7)
    assert_refused(lambda: ledger.read(b"k", 11, b"v", 9), "no-write-lost")
    assert_refused(lambda: ledger.read(b"k", 11, b"w", 9), "no-write-lost")
    assert_refused(lambda: ledger.read(b"k", 11, b"x", 9), "no-write-lost")
    assert_refused(lambda: ledger.acknowledged(b"k", 11, b"v", 9), "no-write-lost")


def test_a_put_of_unknown_outcome_comes_before_the_next_one_of_its_client_or_never() -> None:
    """What the client's guide promises to whoever must know; another client's put settles nothing, nor does one that
    was out together with the doubtful one."""
    for settles, turn, early in (("one", 4, False), ("two", 4, False), ("one", 3, False), ("one", 4, True)):
        ledger = NoWriteLost()
        ledger.called(b"k", b"doubtful")
        ledger.unknown(b"k", b"doubtful", "one", 3)
        ledger.called(b"k", b"next")
        ledger.acknowledged(b"k", 7, b"next", 0, settles, turn)
        late = partial(ledger.read, b"k", 5 if early else 9, b"doubtful", 0)
        if settles == "one" and turn > 3 and not early:
            assert_refused(late, "no-write-lost")
        else:
            late()


def test_a_session_stays_within_its_window_and_its_age() -> None:
    sessions = SessionsBounded(sessions_max=4)
    sessions.saw_session(1, 10, 10 + SESSION_WINDOW_MAX, SESSION_WINDOW_MAX, "n1")
    sessions.saw_table(1, 4, 1_000, 1_000 + SESSION_AGE_MS_MAX, "n1")
    sessions.saw_table(1, 0, None, 10**9, "n1")
    assert_refused(lambda: sessions.saw_session(1, 10, 11 + SESSION_WINDOW_MAX, 1, "n1"), "sessions-bounded")
    assert_refused(lambda: sessions.saw_session(1, 10, 11, 3 * SESSION_WINDOW_MAX, "n1"), "sessions-bounded")
    assert_refused(lambda: sessions.saw_table(1, 5, None, 0, "n1"), "sessions-bounded")
    assert_refused(lambda: sessions.saw_table(1, 1, 0, SESSION_AGE_MS_MAX + 10_000, "n1"), "sessions-bounded")


def test_what_grows_past_its_limit_is_seen_and_the_highest_is_kept() -> None:
    growth = NothingGrows({"queue": 10})
    growth.saw_size("queue", 10, "n1")
    growth.saw_size("queue", 3, "n2")
    assert growth.highest == {"queue": 10}
    assert_refused(lambda: growth.saw_size("queue", 11, "n1"), "nothing-grows")
    with pytest.raises(AssertionError, match="no limit"):
        growth.saw_size("something else", 1, "n1")


def written(key: bytes) -> list[Operation]:
    """``one`` with version 7, then ``two`` with version 8."""
    values = enumerate((b"one", b"two"))
    return [Operation("put", value, None, 2 * at, 2 * at + 1, Outcome(7 + at), key) for at, value in values]


def shown(**keys: tuple[bytes, int]) -> dict[bytes, Any]:
    return {key.encode(): SimpleNamespace(value=value, version=version) for key, (value, version) in keys.items()}


@pytest.mark.parametrize("in_bulk", [False, True])
def test_what_a_scan_shows_of_a_key_is_what_it_held(in_bulk: bool) -> None:
    for found, right in (shown(k=(b"two", 8)), True), (shown(k=(b"one", 7)), False), (shown(), False):
        registers = Registers()
        for operation in written(b"k"):
            if in_bulk:
                registers.put_in_bulk(b"k", operation)
            else:
                registers.history(b"k").append(operation)
        registers.scanned({}, lambda key: key != b"k", (), 4, 5)
        registers.scanned(found, lambda key: key == b"k", (), 4, 5)
        registers.judge(lambda key: key != b"k")
        assert not registers.lasting, "judged before its time"
        if right:
            registers.judge(lambda key: key == b"k")
            assert list(registers.lasting) == [b"k"]
        else:
            assert_refused(lambda registers=registers: registers.judge(lambda key: key == b"k"), "linearizability")


def test_a_key_that_was_judged_stays_as_it_was_written_last() -> None:
    registers = Registers()
    doubtful = Operation("put", b"three", called=2.5, outcome=UNKNOWN, key=b"k")
    delete = Operation("delete", called=4, returned=5, outcome=Outcome(True), key=b"gone")
    registers.history(b"k").extend([*written(b"k"), doubtful])
    registers.history(b"gone").extend([*written(b"gone"), delete])
    registers.judge(lambda key: True)

    def scan(found: dict[bytes, Any], *covered: bytes) -> None:
        registers.scanned(found, covered.__contains__, list(registers.lasting), 9, 10)

    scan(shown(k=(b"two", 8)), b"k", b"gone")
    scan(shown(k=(b"three", 9)), b"k", b"gone")
    scan(shown(), b"gone")
    assert_refused(lambda: scan(shown(k=(b"two", 9)), b"k"), "linearizability")
    assert_refused(lambda: scan(shown(k=(b"one", 7)), b"k"), "linearizability")
    assert_refused(lambda: scan(shown(), b"k"), "linearizability")
    assert_refused(lambda: scan(shown(gone=(b"two", 8)), b"gone"), "linearizability")


def test_an_answer_is_no_older_than_it_says() -> None:
    """DESIGN 2.3: what was known its age before it was called, it shows."""
    staleness = NoOlderThanSaid()
    staleness.answered(b"k", 0, 9.0, 5.0, None, 9.0)
    staleness.known(b"k", 7, 10.0)
    staleness.known(b"k", 9, 12.0)
    staleness.known(b"k", 8, 13.0)  # of a put that was answered late
    assert staleness.judged == 0
    staleness.answered(b"k", 7, 13.0, 1.001, 2.0, 13.1)
    staleness.answered(b"k", 0, 13.0, 3.001, None, 13.1)
    assert staleness.judged == 2
    staleness.answered(b"k", 9, 13.0, 0.0, 0.0, 13.1)
    assert_refused(lambda: staleness.answered(b"k", 7, 13.0, 1.0, 2.0, 13.1), "no-older-than-said")
    assert_refused(lambda: staleness.answered(b"k", 0, 13.0, 3.0, None, 13.1), "no-older-than-said")
    assert_refused(lambda: staleness.answered(b"k", 9, 13.0, 2.5, 2.0, 13.1), "no-older-than-said")
    staleness.check()


def test_what_a_stale_answer_has_shown_is_known_from_then_on() -> None:
    """Only what is committed is ever shown, so nobody may be told later that it was not there."""
    staleness = NoOlderThanSaid()
    staleness.answered(b"k", 7, 10.0, 5.0, None, 10.2)
    staleness.answered(b"k", 0, 10.1, 0.0, None, 10.3)
    assert_refused(lambda: staleness.answered(b"k", 0, 10.3, 0.05, None, 10.4), "no-older-than-said")
