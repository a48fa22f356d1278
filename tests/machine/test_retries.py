"""Exactly once: retries, duplicates that come late, and what is recorded (DESIGN §4.6)."""

from typing import Any

import pytest

from shardkv import errors
from shardkv.machine import keys
from shardkv.machine.execution import ISSUED_AHEAD_MS_MAX
from shardkv.machine.sessions import PLAIN, Record, SessionTable, pack_mixed, pack_plain_one, pack_row
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_WINDOW_MAX, Epoch
from shardkv.wire import commands

from . import world
from .world import Client, World


def code(outcome: Any) -> int:
    return outcome[0] if type(outcome) is list else 0


def every_command(client: Client) -> list[bytes]:
    return [
        client.put(b"a", b"1"),
        client.put(b"b", b"x", if_version=0),
        client.increment(b"n", -7),
        client.increment(b"b"),
        client.put(b"a", b"2", if_version=1),
        client.delete(b"a"),
        client.delete(b"a"),
        client.delete_range(b"b", b"c"),
    ]


@pytest.mark.parametrize("reload", [False, True])
def test_a_retry_gets_the_first_outcome_and_changes_nothing(reload: bool) -> None:
    """Of every command and every kind of outcome, from memory and from rows."""
    range_, client = World(), Client()
    sealed = every_command(client)
    first = range_.do(client, *sealed)
    assert [code(outcome) for outcome in first] == [0, 0, 0, 14, 20, 0, 0, 0]
    kept = [row for row in range_.rows() if row[0] != keys.applied_key(1)]
    if reload:
        range_.reload()
    assert range_.do(client, *sealed) == first
    for position, one in enumerate(sealed):
        assert range_.do(client, one) == first[position]
    assert [row for row in range_.rows() if row[0] != keys.applied_key(1)] == kept


@pytest.mark.parametrize("reload", [False, True])
def test_a_large_group_that_was_applied_in_part_is_completed(reload: bool) -> None:
    """After a change of leader a client sends everything unsettled again; some of it had been applied."""
    range_, client = World(), Client()
    sealed = [client.increment(b"n") for _ in range(40)]
    first = range_.do(client, *sealed[0::3])
    if reload:
        range_.reload()
    again = range_.do(client, *sealed)
    assert again[0::3] == first
    assert sorted(again) == list(range(1, 41))


def test_a_retry_in_the_same_entry_is_applied_once() -> None:
    range_, client = World(), Client()
    one = client.increment(b"n")
    assert range_.do(client, one, one) == [1, 1]
    assert range_.write((client, [one]), (client, [one])) == [[1], [1]]
    put = client.put(b"k", b"")
    outcomes = range_.write((client, [put]), (client, [put, client.put(b"l", b"")]))
    assert outcomes[0][0] == outcomes[1][0]


def test_a_record_is_kept_for_as_long_as_the_youngest_command_of_its_entry_may_come_again() -> None:
    """A request may hold one that was issued long before: the row must not go when only that one has grown too old."""
    range_, client = World(), Client()
    aged = client.put(b"a", b"1")
    client.now_ms += SESSION_AGE_MS_MAX // 2
    range_.now_ms = client.now_ms
    young = client.put(b"k", b"1")
    first = range_.do(client, aged, young)
    other = Client(b"bob", now_ms=client.now_ms)
    range_.now_ms += SESSION_AGE_MS_MAX // 2 + 1_000
    other.now_ms = range_.now_ms
    range_.do(other, other.put(b"k", b"2"))
    assert range_.do(client, young) == first[1]
    assert range_.value(b"k") == b"2"


def test_each_command_of_a_group_must_lie_in_the_window_that_it_states_itself() -> None:
    """Also where all are plain puts, and a later one states that more is settled."""
    range_, client = World(), Client()
    client.sequence = SESSION_WINDOW_MAX + 1
    beyond = client.put(b"a", b"1")
    client.below = 10
    within = client.put(b"b", b"1")
    refused, done = range_.do(client, beyond, within)
    assert isinstance(errors.from_wire(refused), errors.MalformedRequest)
    assert type(done) is int
    assert (range_.value(b"a"), range_.value(b"b")) == (None, b"1")


def test_trap_12_a_late_first_attempt_after_its_retry_does_not_apply() -> None:
    """TRAPS 12: the first attempt lingers in the network while its retry is applied and another client writes."""
    range_, client, other = World(), Client(b"a"), Client(b"b")
    attempt = client.put(b"k", b"old")
    version = range_.do(client, attempt)
    range_.do(other, other.put(b"k", b"new"))
    assert range_.do(client, attempt) == version
    assert range_.value(b"k") == b"new"


def test_trap_25_a_failed_outcome_is_recorded() -> None:
    """TRAPS 25: a conditional write fails, the key changes, and its duplicate must not succeed."""
    range_, client, other = World(), Client(b"a"), Client(b"b")
    attempt = client.put(b"k", b"mine", if_version=0)
    range_.do(other, other.put(b"k", b"theirs"))
    failed = range_.do(client, attempt)
    assert code(failed) == errors.VersionMismatch.code
    range_.do(other, other.delete(b"k"))
    assert range_.do(client, attempt) == failed
    range_.reload()
    assert range_.do(client, attempt) == failed
    assert range_.get(b"k") is None


def test_trap_25_a_failed_increment_is_recorded() -> None:
    range_, client, other = World(), Client(b"a"), Client(b"b")
    range_.do(other, other.put(b"n", b"text"))
    attempt = client.increment(b"n")
    failed = range_.do(client, attempt)
    range_.do(other, other.put(b"n", b"1"))
    assert code(failed) == errors.NotAnInteger.code
    assert range_.do(client, attempt) == failed
    assert range_.value(b"n") == b"1"


def test_trap_25_a_delete_that_found_nothing_is_recorded() -> None:
    """It changed nothing, and its duplicate must not delete what somebody has written since."""
    range_, client, other = World(), Client(b"a"), Client(b"b")
    attempt = client.delete(b"k")
    assert range_.do(client, attempt) is False
    range_.do(other, other.put(b"k", b"theirs"))
    assert range_.do(client, attempt) is False
    assert range_.value(b"k") == b"theirs"


def test_trap_25_a_conditional_delete_that_failed_is_recorded() -> None:
    """Also when the key then happens to have the version that it asked for."""
    range_, client, other = World(), Client(b"a"), Client(b"b")
    first = range_.do(other, other.put(b"k", b"theirs"))
    attempt = client.delete(b"k", if_version=first + 2)
    failed = range_.do(client, attempt)
    assert code(failed) == errors.VersionMismatch.code
    assert range_.do(other, other.put(b"k", b"newer")) == first + 2
    assert range_.do(client, attempt) == failed
    assert range_.value(b"k") == b"newer"


def test_an_epoch_mismatch_is_not_recorded_so_that_the_command_can_still_apply() -> None:
    range_, client = World(world.descriptor(epoch=Epoch(1, 4))), Client()
    attempt = client.put(b"k", b"v")
    assert code(range_.do(client, attempt, generation=3)) == errors.EpochMismatch.code
    assert code(range_.do(client, attempt)) == 0
    assert range_.value(b"k") == b"v"


def test_a_record_answers_before_the_epoch_is_looked_at() -> None:
    """DESIGN §4.6: a client cuts a piece anew only after an EpochMismatch of a replica that has no record of it."""
    range_, client = World(), Client()
    attempt = client.put(b"k", b"v")
    version = range_.do(client, attempt)
    assert range_.do(client, attempt, generation=7) == version


def test_the_same_sequence_with_other_content_is_refused() -> None:
    range_, client = World(), Client()
    range_.do(client, client.put(b"k", b"1"))
    client.sequence -= 1
    assert code(range_.do(client, client.put(b"k", b"2"))) == errors.SequenceReused.code
    assert range_.value(b"k") == b"1"


def test_what_lies_below_acknowledged_below_is_refused_recorded_or_not() -> None:
    """A settled sequence never applies, even if its record is gone or never was here."""
    range_, client = World(), Client()
    lost = client.put(b"k", b"lost")
    first = client.put(b"k", b"first")
    range_.do(client, first)
    client.below = 3
    range_.do(client, client.put(b"k", b"second"))
    for settled in (lost, first):
        assert code(range_.do(client, settled)) == errors.SequenceReused.code
    range_.reload()
    for settled in (lost, first):
        assert code(range_.do(client, settled)) == errors.SequenceReused.code
    assert range_.value(b"k") == b"second"


def test_acknowledged_below_lets_the_records_go() -> None:
    range_, client = World(), Client()
    for _ in range(100):
        range_.do(client, client.put(b"k", b""))
        client.below = client.sequence + 1
    assert len(range_.machine.sessions(range_.engine).sessions[client.session].records()) <= 2


@pytest.mark.parametrize("reload", [False, True])
def test_records_above_acknowledged_below_stay_although_older_ones_of_their_entry_go(reload: bool) -> None:
    range_, client = World(), Client()
    old, living = client.increment(b"n"), [client.increment(b"n") for _ in range(4)]
    range_.do(client, old, *living)
    client.below = 3
    range_.do(client, client.put(b"k", b""))
    if reload:
        range_.reload()
    assert range_.do(client, living[-1]) == 5
    assert code(range_.do(client, old)) == errors.SequenceReused.code


def test_an_outcome_that_is_not_recorded_moves_no_session() -> None:
    """Else memory would know of an acknowledged_below that no row has, and replicas would differ after a restart."""
    range_, client = World(world.descriptor(epoch=Epoch(1, 2))), Client()
    first = client.put(b"k", b"1")
    client.below = 2
    refused = client.put(b"k", b"2")
    assert code(range_.do(client, refused, generation=1)) == errors.EpochMismatch.code
    assert code(range_.do(client, first)) == 0


def test_out_of_order_sequences_of_a_session_each_apply_once() -> None:
    """A lost message comes again after its successors."""
    range_, client = World(), Client()
    one, two, three, four = (client.increment(b"n") for _ in range(4))
    assert range_.do(client, two, four) == [1, 2]
    assert range_.do(client, one, three) == [3, 4]
    assert range_.do(client, one, two, three, four) == [3, 1, 4, 2]
    range_.reload()
    assert range_.do(client, four, one) == [2, 3]


def test_a_sequence_beyond_the_window_is_refused() -> None:
    range_, client = World(), Client()
    client.sequence = SESSION_WINDOW_MAX
    inside = client.put(b"k", b"inside")
    outside = client.put(b"k", b"outside")
    outcomes = range_.do(client, inside, outside)
    assert code(outcomes[0]) == 0
    assert code(outcomes[1]) == errors.MalformedRequest.code
    assert range_.value(b"k") == b"inside"


def test_a_sequence_below_its_own_acknowledged_below_is_refused() -> None:
    range_, client = World(), Client()
    client.below = 5
    assert code(range_.do(client, client.put(b"k", b""))) == errors.MalformedRequest.code
    assert range_.get(b"k") is None


def test_trap_23_commands_outside_the_age_window_are_refused() -> None:
    """TRAPS 23 and DESIGN §4.6: 60 s behind replicated time, and the clock offset ahead of it, are the bounds."""
    range_ = World()
    bounds = (
        (-SESSION_AGE_MS_MAX, 0),
        (-SESSION_AGE_MS_MAX - 1, errors.TooOld.code),
        (ISSUED_AHEAD_MS_MAX, 0),
        (ISSUED_AHEAD_MS_MAX + 1, errors.TooOld.code),
        ((1 << 64) - 1 - world.NOW_MS, errors.TooOld.code),
    )
    for number, (offset, expected) in enumerate(bounds):
        client = Client(b"%d" % number, now_ms=world.NOW_MS + offset)
        attempt = client.put(b"%d" % offset, b"")
        assert code(range_.do(client, attempt)) == expected, offset
        general = client.increment(b"n%d" % offset)
        assert code(range_.do(client, general)) == expected, offset
        assert (range_.get(b"%d" % offset) is None) == (expected != 0)


def test_age_is_measured_by_the_stamp_of_the_entry_itself() -> None:
    range_, client = World(), Client()
    attempt = client.put(b"k", b"")
    range_.now_ms += SESSION_AGE_MS_MAX + 1
    assert code(range_.do(client, attempt)) == errors.TooOld.code


@pytest.mark.parametrize("reload", [False, True])
def test_a_duplicate_never_applies_however_late_it_comes(reload: bool) -> None:
    """A record may go only when age refuses its command: at every moment, one or the other stands in the way."""
    range_, client = World(), Client()
    attempt = client.increment(b"n")
    assert range_.do(client, attempt) == 1
    for _ in range(5):
        range_.now_ms += SESSION_AGE_MS_MAX // 4
        for moment in (-1, 0, 1):
            range_.now_ms += moment
            if reload:
                range_.reload()
            outcome = range_.do(client, attempt)
            assert outcome == 1 or code(outcome) == errors.TooOld.code
    assert range_.value(b"n") == b"1"


def test_rows_and_sessions_go_when_their_age_has_passed() -> None:
    range_, client = World(), Client()
    for _ in range(10):
        client.now_ms = range_.now_ms
        range_.do(client, client.put(b"k", b""))
        range_.now_ms += SESSION_AGE_MS_MAX // 10
    start, end = keys.kind_span(1, keys.SESSIONS)
    assert len(list(range_.engine.scan(start, end))) == 10
    range_.now_ms += SESSION_AGE_MS_MAX // 2
    range_.write()
    assert len(list(range_.engine.scan(start, end))) == 5
    assert len(range_.machine.sessions(range_.engine).sessions[client.session].pieces) == 5
    range_.now_ms += SESSION_AGE_MS_MAX
    range_.write()
    assert list(range_.engine.scan(start, end)) == []
    table = range_.machine.sessions(range_.engine)
    assert not table.sessions
    assert not table.rows


def test_memory_and_rows_agree_after_an_expiry_although_a_hostile_client_dates_a_duplicate_anew() -> None:
    """A sequence may come again with a fresh ``issued_at``: whether its record is still known must not depend on
    whether a replica was restarted."""
    restarted, steady = World(), World()
    outcomes = []
    for range_ in (restarted, steady):
        client = Client()
        range_.do(client, client.increment(b"n"))
        client.now_ms = range_.now_ms = world.NOW_MS + SESSION_AGE_MS_MAX // 2
        range_.do(client, client.increment(b"n"))
        client.now_ms = range_.now_ms = world.NOW_MS + SESSION_AGE_MS_MAX + 10
        range_.write()
        if range_ is restarted:
            range_.reload()
        client.sequence = 0
        outcomes.append(range_.do(client, client.increment(b"n")))
    assert outcomes[0] == outcomes[1]
    assert restarted.rows() == steady.rows()


def test_a_digest_of_more_than_32_bits_is_cut_and_not_a_crash() -> None:
    range_, client = World(), Client()
    client.put(b"k", b"")
    body = commands.pack_put(b"k", b"v")
    sealed = commands.seal(commands.Op.PUT, body, 1, world.NOW_MS, 1)
    wide = sealed[: -len(body) - 5] + b"\x1b" + b"\x00\x00\x00\x01" + sealed[-len(body) - 4 :]
    version = range_.do(client, wide)
    assert code(version) == 0
    assert range_.do(client, wide) == version
    other, same = World(), Client()
    same.sequence = 1
    assert [code(outcome) for outcome in other.do(same, wide, same.put(b"l", b""))] == [0, 0]


def test_the_general_path_and_the_fast_one_come_to_the_same() -> None:
    """The fast path is an optimisation: an increment in the group sends the same puts down the other."""
    fast, general = World(), World()
    alice, bob = Client(b"alice"), Client(b"alice")
    puts = [(b"k%d" % number, b"v" * number) for number in range(20)]
    first = fast.do(alice, *(alice.put(*pair) for pair in puts))
    second = general.do(bob, *(bob.put(*pair) for pair in puts), bob.increment(b"n"))
    assert first == second[:-1]
    assert [fast.get(key) for key, _ in puts] == [general.get(key) for key, _ in puts]
    one = fast.machine.sessions(fast.engine).sessions[alice.session].records()
    other = general.machine.sessions(general.engine).sessions[bob.session].records()
    assert one == {sequence: record for sequence, record in other.items() if sequence <= 20}


def test_trap_12_the_table_is_in_the_snapshot() -> None:
    """TRAPS 12: rows carry the table, so that a replica made from a snapshot knows the retry."""
    range_, client = World(), Client()
    attempt = client.increment(b"n")
    range_.do(client, attempt)
    machine = range_.machine
    range_.reload()
    assert range_.machine is not machine
    assert range_.do(client, attempt) == 1


def test_records_hold_outcomes_and_never_values() -> None:
    range_, client = World(), Client()
    range_.do(client, client.put(b"k", b"SECRET" * 100), client.put(b"l", b"SECRET" * 100, if_version=0))
    start, end = keys.kind_span(1, keys.SESSIONS)
    [(_, row)] = range_.engine.scan(start, end)
    assert b"SECRET" not in row
    assert len(row) < 120
    (session,) = range_.machine.sessions(range_.engine).sessions.values()
    assert sorted(session.records()) == [1, 2]


def test_expired_rows_are_let_go_from_memory() -> None:
    """An hour of writes leaves a minute's rows."""
    range_ = World()
    for _ in range(600):
        range_.now_ms += 6_000
        client = Client(now_ms=range_.now_ms)
        client.sequence = client.below = range_.machine.applied_index
        range_.do(client, client.put(b"k", b""))
    table = range_.machine.sessions(range_.engine)
    assert len(table.rows) == 11
    assert len(table._rows) <= 2 * 11


def test_a_session_that_one_entry_names_twice_goes_once() -> None:
    """Two requests of a client may share an entry; their row names its session for each."""
    range_, client = World(), Client()
    range_.write((client, [client.put(b"a", b"")]), (client, [client.increment(b"n")]))
    range_.now_ms += SESSION_AGE_MS_MAX + 1
    other = Client(b"other", now_ms=range_.now_ms)
    range_.do(other, other.put(b"b", b""))
    table = range_.machine.sessions(range_.engine)
    assert list(table.sessions) == [other.session]
    assert len(table.rows) == 1


def test_a_range_at_rest_keeps_no_sessions_in_memory_and_knows_them_when_it_is_written_again() -> None:
    range_, client = World(), Client()
    attempt = client.increment(b"n")
    range_.do(client, attempt)
    range_.machine.rest(range_.now_ms + SESSION_AGE_MS_MAX)
    assert range_.machine._sessions is not None
    range_.machine.rest(range_.now_ms + SESSION_AGE_MS_MAX + 1)
    assert range_.machine._sessions is None
    assert range_.do(client, attempt) == 1
    range_.now_ms += SESSION_AGE_MS_MAX + 1
    range_.machine.rest(range_.now_ms)
    other = Client(b"other", now_ms=range_.now_ms)
    range_.do(other, other.increment(b"n"))
    assert list(range_.machine.sessions(range_.engine).sessions) == [other.session]
    assert len(list(range_.engine.scan(*keys.kind_span(range_.machine.range_id, keys.SESSIONS)))) == 1


@pytest.mark.parametrize("sequence", [60, 120])
def test_a_replica_that_has_restarted_writes_the_same_rows(sequence: int) -> None:
    """What decides how a command is recorded follows from the rows alone, not from those that have expired."""

    def run(restart: bool) -> World:
        range_, client, other = World(), Client(), Client(b"other")

        def put(sequence: int) -> None:
            client.sequence, client.below, client.now_ms = sequence - 1, 10, range_.now_ms
            range_.do(client, client.put(b"k", b""))

        put(100)
        range_.now_ms += 30_000
        put(50)
        range_.now_ms = world.NOW_MS + SESSION_AGE_MS_MAX + 1
        other.now_ms = range_.now_ms
        range_.do(other, other.put(b"k", b""))
        if restart:
            range_.reload()
        put(sequence)
        return range_

    assert run(True).rows() == run(False).rows()


def test_a_row_behind_one_that_lives_stays_although_its_own_time_has_passed() -> None:
    """Rows go oldest first, on a replica that has just loaded them too. A retry that comes late makes a row of an old
    command behind one of a young command."""

    def run(restart: bool) -> World:
        range_, old = World(), Client(b"old")
        range_.now_ms += 30_000
        young, other = Client(b"young", now_ms=range_.now_ms), Client(b"other")
        range_.do(young, young.put(b"k", b""))
        range_.do(old, old.put(b"k", b""))
        other.now_ms = range_.now_ms = world.NOW_MS + SESSION_AGE_MS_MAX + 1
        if restart:
            range_.reload()
        range_.do(other, other.put(b"k", b""))
        assert len(list(range_.engine.scan(*keys.kind_span(1, keys.SESSIONS)))) == 3
        return range_

    assert run(True).rows() == run(False).rows()


def test_a_row_that_is_damaged_or_of_an_unknown_format_is_corruption() -> None:
    row = pack_row(1, [pack_mixed(b"s" * 16, 1, {3: Record(7, 0, 9)})])
    assert SessionTable.load([(1, row)]).sessions[b"s" * 16].records() == {3: Record(7, 0, 9)}
    empty = pack_row(1, [pack_mixed(b"s" * 16, 1, {})])
    for damaged in (b"\x07" + row[1:], row[:9] + b"\x07" + row[10:], empty):
        with pytest.raises(errors.Corruption):
            SessionTable.load([(1, damaged)])


def test_a_row_that_was_cut_short_is_corruption() -> None:
    head = len(pack_row(1, []))
    for piece in (pack_mixed(b"s" * 16, 1, {3: Record(7, 0, 9)}), pack_plain_one(PLAIN, b"s" * 16, 1, 1, 9, 3, 7)):
        row = pack_row(1, [piece])
        assert SessionTable.load([(1, row)]).sessions.keys() == {b"s" * 16}
        for size in [*range(head), *range(head + 1, len(row))]:
            with pytest.raises(errors.Corruption):
                SessionTable.load([(1, row[:size])])
    for size in range(head):
        with pytest.raises(errors.Corruption):
            SessionTable.expired(row[:size], 0)
