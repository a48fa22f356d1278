"""Splits as the state machine applies them, membership changes, extensions."""

from collections.abc import Iterator
from typing import Any

import pytest

from shardkv import codec, errors
from shardkv.machine import RangeMachine, keys
from shardkv.machine.entries import ENTRY_FORMAT, encode_membership
from shardkv.machine.reads import get, scan_page
from shardkv.machine.sessions import CONSOLIDATED_ROWS_MAX, Record, SessionTable, pack_mixed
from shardkv.machine.split import SplitCommand, problem
from shardkv.raft.messages import ConfState
from shardkv.storage.engine import WriteBatch
from shardkv.types import SESSION_AGE_MS_MAX, Epoch, KeyRange, Member, NodeId, RangeId, ReplicaId, ReplicaRole

from . import world
from .world import Client, World, split_command


def code(outcome: Any) -> int:
    return outcome[0] if type(outcome) is list else 0


def test_a_split_divides_span_and_keys_and_raises_both_generations() -> None:
    range_, client = World(world.descriptor(epoch=Epoch(4, 7))), Client()
    range_.do(client, *(client.put(key, key) for key in (b"a", b"m", b"z")))
    applied = range_.split(b"m")
    assert applied.split is not None
    left, right = applied.split.left, applied.split.right
    assert left == range_.machine.descriptor
    assert (left.range_id, left.span) == (1, KeyRange(b"", b"m"))
    assert (right.range_id, right.span) == (2, KeyRange(b"m", None))
    assert left.epoch == right.epoch == Epoch(5, 8)
    assert left.replicas == world.descriptor().replicas
    assert [(replica.node_id, replica.replica_id) for replica in right.replicas] == [(1, 200), (2, 201), (3, 202)]
    assert applied.outcomes == [[left.to_wire(), right.to_wire()]]
    other = range_.other(applied.split)
    assert range_.value(b"a") == b"a"
    assert other.value(b"m") == b"m"
    assert other.value(b"z") == b"z"


def test_trap_21_the_left_half_serves_nothing_of_the_moved_span() -> None:
    """TRAPS 21: the keys are still in the same engine, and reads must stop at the span all the same."""
    range_, client = World(), Client()
    range_.do(client, *(client.put(key, key) for key in (b"a", b"m", b"z")))
    range_.split(b"m")
    with pytest.raises(errors.EpochMismatch):
        get(range_.machine, range_.engine, [b"a", b"m"])
    assert scan_page(range_.machine, range_.engine, b"", None, 100, 1 << 20)[0][0::3] == [b"a"]
    assert code(range_.do(client, client.put(b"m", b"late"))) == errors.EpochMismatch.code


def test_both_halves_are_there_after_a_restart() -> None:
    range_, client = World(), Client()
    range_.do(client, client.put(b"m", b"1"))
    split = range_.split(b"m").split
    assert split is not None
    other = range_.other(split)
    for half in (range_, other):
        before = half.machine
        half.reload()
        assert half.machine.descriptor == before.descriptor
        assert half.machine.conf_state == before.conf_state
        assert half.machine.last_timestamp == before.last_timestamp
        half.machine.check()
    assert other.machine.conf_state == ConfState((200, 201, 202))


def test_versions_go_on_rising_in_the_right_half() -> None:
    """DESIGN §4.4: split children inherit the replicated time."""
    range_, client = World(), Client()
    version = range_.do(client, client.put(b"m", b"1"))
    split = range_.split(b"m").split
    assert split is not None
    other = range_.other(split)
    other.now_ms -= 400
    assert other.do(client, client.put(b"m", b"2")) > version


@pytest.mark.parametrize("reload", [False, True])
def test_trap_12_a_split_copies_the_sessions_to_both_halves(reload: bool) -> None:
    """TRAPS 12: a retry that is routed to the other half must find its record there, and its settled ones refused."""
    range_, client, other_client = World(), Client(b"alice"), Client(b"bob")
    settled = client.increment(b"z")
    range_.do(client, settled)
    attempt = client.increment(b"z")
    client.below = 2
    failed = client.put(b"z", b"", if_version=1)
    quiet = other_client.put(b"y", b"")
    outcomes = range_.write((client, [attempt, failed]), (other_client, [quiet]))
    split = range_.split(b"m").split
    assert split is not None
    for half in (range_, range_.other(split)):
        if reload:
            half.reload()
        generation = half.machine.descriptor.epoch.span
        again = half.write((client, [attempt, failed]), (other_client, [quiet]), generation=generation)
        assert again == outcomes
        assert code(half.do(client, settled)) == errors.SequenceReused.code
    assert range_.other(split).value(b"z") == b"2"


def test_trap_25_a_failed_outcome_goes_over_to_the_right_half() -> None:
    """TRAPS 12, 25: the retry comes to a range that never saw the first attempt, and where nothing is in its way."""
    range_, client, other = World(), Client(b"a"), Client(b"b")
    range_.do(client, client.put(b"x", b"1"))
    attempt = client.put(b"z", b"mine", if_version=0)
    range_.do(other, other.put(b"z", b"theirs"))
    failed = range_.do(client, attempt)
    assert code(failed) == errors.VersionMismatch.code
    split = range_.split(b"m").split
    assert split is not None
    right = range_.other(split)
    right.do(other, other.delete(b"z"))
    assert right.do(client, attempt) == failed
    assert right.get(b"z") is None


def test_the_copied_sessions_are_the_same_bytes_whatever_memory_held() -> None:
    """A replica that ran on and one that has just restarted write the same rows for the right half."""

    def run(restart: bool) -> World:
        range_, clients = World(), [Client(b"%d" % number) for number in (3, 1, 2)]
        for turn in range(6):
            for client in clients:
                range_.do(client, client.put(b"k", b""), client.increment(b"n"))
                client.below = client.sequence if turn % 2 else client.below
        if restart:
            range_.reload()
        range_.split(b"m")
        return range_

    assert run(True).rows() == run(False).rows()


def test_the_copied_sessions_are_the_same_bytes_after_rows_have_expired() -> None:
    """Expiry leaves memory in another order than the rows, and with settled records that loading them would drop."""

    def run(restart: bool) -> World:
        range_, late, early = World(), Client(b"z"), Client(b"a")
        sealed = [late.increment(b"n") for _ in range(10)]
        range_.do(late, sealed[0], sealed[9])
        range_.now_ms += 30_000
        late.now_ms = early.now_ms = range_.now_ms
        range_.do(early, early.increment(b"n"))
        late.sequence = 1
        range_.do(late, late.increment(b"n"))
        late.sequence, late.below = 10, 5
        range_.do(late, late.increment(b"n"))
        range_.now_ms += 40_000
        range_.write()
        if restart:
            range_.reload()
        split = range_.split(b"m").split
        assert split is not None
        sessions = split.machine.sessions(range_.engine).sessions
        assert list(sessions[late.session].records()) == [11], "settled and expired records are not copied"
        return range_

    assert run(True).rows() == run(False).rows()


def test_trap_12_the_copied_sessions_live_as_long_as_their_newest_command() -> None:
    range_, client = World(), Client()
    range_.do(client, client.increment(b"z"))
    range_.now_ms = client.now_ms = world.NOW_MS + 50_000
    attempt = client.increment(b"z")
    assert range_.do(client, attempt) == 2
    split = range_.split(b"m").split
    assert split is not None
    right = range_.other(split)
    right.now_ms += 55_000
    assert right.do(client, attempt) == 2
    assert right.value(b"z") == b"2"


def test_trap_04_a_split_planned_at_another_epoch_is_refused_when_applied() -> None:
    """TRAPS 4: even when the span looks the same again, and whichever generation has moved."""
    range_ = World(world.descriptor(epoch=Epoch(3, 5)))
    for epoch in (Epoch(2, 5), Epoch(3, 4), Epoch(4, 5), Epoch(3, 6)):
        before = range_.rows()
        applied = range_.split(b"m", epoch=epoch)
        assert applied.split is None
        (error,) = applied.outcomes
        assert isinstance(error, errors.EpochMismatch)
        assert error.current == (range_.machine.descriptor,)
        assert len([row for row in range_.rows() if row not in before]) == 1, "only the applied row moved"
    assert range_.split(b"m", epoch=Epoch(3, 5)).split is not None


def test_trap_04_the_same_split_proposed_twice_divides_once() -> None:
    range_ = World()
    epoch = range_.machine.descriptor.epoch
    assert range_.split(b"m", epoch=epoch).split is not None
    assert range_.split(b"m", epoch=epoch).split is None


@pytest.mark.parametrize("key", [b"", b"b", b"a", b"m", b"z"])
def test_a_split_key_must_lie_strictly_inside(key: bytes) -> None:
    range_ = World(world.descriptor(KeyRange(b"b", b"m")))
    assert isinstance(range_.split(key).outcomes[0], errors.InvalidRange)


def test_a_split_must_give_each_node_one_new_replica() -> None:
    descriptor = world.descriptor()
    good = split_command(descriptor, b"m")
    assert problem(descriptor, good, joint=False) is None
    one, two, three = good.right_replicas
    for replicas in (
        (one, two),
        (one, two, (NodeId(4), ReplicaId(9))),
        (one, two, three, three),
        (one, two, (three[0], one[1])),
        (one, two, (three[0], ReplicaId(1))),
    ):
        bad = SplitCommand(good.epoch, good.split_key, good.right_range_id, replicas)
        assert isinstance(problem(descriptor, bad, joint=False), errors.InvalidRange), replicas
    itself = SplitCommand(good.epoch, good.split_key, RangeId(1), good.right_replicas)
    assert isinstance(problem(descriptor, itself, joint=False), errors.InvalidRange)


def test_a_range_between_two_replica_sets_is_not_split() -> None:
    range_ = World()
    batch = WriteBatch()
    machine = range_.machine
    joint = ConfState((1, 2, 4), (), (1, 2, 3), (), True)
    machine.apply_conf_change(11, world.TERM, encode_membership([(4, 4)]), joint, batch)
    assert machine.joint
    assert isinstance(range_.split(b"m").outcomes[0], errors.Unavailable)


def test_a_dropped_right_half_loses_its_keys_and_nothing_is_overwritten() -> None:
    """TRAPS 2, 20: the right half's replica here is newer, or gone for good."""
    range_, client = World(), Client()
    range_.do(client, client.put(b"a", b""), client.put(b"m", b""))
    newer = WriteBatch()
    newer.put(keys.applied_key(2), b"a newer replica's")
    range_.engine.write(newer)
    range_.split(b"m", keep_right=False)
    assert range_.engine.get(keys.applied_key(2)) == b"a newer replica's"
    assert range_.engine.get(keys.user_key(b"m")) is None
    assert range_.value(b"a") == b""


def test_a_kept_right_half_begins_without_rows_of_an_earlier_life() -> None:
    range_ = World()
    stale = WriteBatch()
    stale.put(keys.session_key(2, 999), b"stale")
    range_.engine.write(stale)
    range_.split(b"m")
    assert range_.engine.get(keys.session_key(2, 999)) is None


def test_roles_go_over_to_the_right_half() -> None:
    descriptor = world.descriptor()
    one, two, three = descriptor.replicas
    learner = Member(three.node_id, three.replica_id, ReplicaRole.LEARNER)
    descriptor = type(descriptor)(descriptor.range_id, descriptor.span, descriptor.epoch, (one, two, learner))
    range_ = World(descriptor)
    split = range_.split(b"m").split
    assert split is not None
    assert [replica.role for replica in split.right.replicas] == [0, 0, 1]
    assert split.machine.conf_state == ConfState((200, 201), (202,))


def test_a_membership_change_updates_descriptor_and_configuration_together() -> None:
    """While joint the leaving replicas are still named: they have a vote, so they must be reachable."""
    range_ = World()
    machine = range_.machine

    def change(context: bytes, conf_state: ConfState) -> None:
        batch = WriteBatch()
        machine.apply_conf_change(machine.applied_index + 1, world.TERM, context, conf_state, batch)
        machine.finish(batch)
        range_.engine.write(batch)
        machine.check()

    change(encode_membership([(4, 40)]), ConfState((1, 2, 3), (40,)))
    assert machine.descriptor.epoch == Epoch(2, 1)
    assert machine.descriptor.replica(ReplicaId(40)) == Member(NodeId(4), ReplicaId(40), ReplicaRole.LEARNER)
    change(b"", ConfState((1, 2, 40), (), (1, 2, 3), (), True))
    assert [replica.replica_id for replica in machine.descriptor.replicas] == [1, 2, 3, 40]
    assert {replica.role for replica in machine.descriptor.replicas} == {ReplicaRole.VOTER}
    change(b"", ConfState((1, 2, 40)))
    assert [replica.replica_id for replica in machine.descriptor.replicas] == [1, 2, 40]
    assert machine.descriptor.epoch == Epoch(4, 1)
    range_.reload()
    assert range_.machine.conf_state == ConfState((1, 2, 40))
    assert range_.machine.descriptor == machine.descriptor


def test_a_member_whose_node_nobody_named_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="where replicas"):
        World().machine.apply_conf_change(11, world.TERM, b"", ConfState((1, 2, 3, 9)), WriteBatch())


class Counter:
    """An extension that adds numbers up."""

    def __init__(self) -> None:
        self.total = 0
        self.stamps: list[int] = []

    def load(self, rows: Iterator[tuple[bytes, bytes]]) -> None:
        self.total = sum(int(value) for _, value in rows)

    def apply(self, command: Any, timestamp: int, batch: WriteBatch) -> Any:
        self.stamps.append(timestamp)
        if command == "refuse":
            raise errors.NotFound("no such thing")
        if command == "break":
            raise errors.Corruption("the extension's rows are damaged")
        self.total += command
        batch.put(keys.extension_prefix(0) + b"total", b"%d" % self.total)
        return self.total


def test_an_extension_applies_its_commands_and_loads_its_rows() -> None:
    counter = Counter()
    range_ = World(world.descriptor(KeyRange(b"", b""), range_id=0), extension=counter)
    assert range_.extend(2).outcomes == [2]
    assert range_.extend(3).outcomes == [5]
    assert counter.stamps == sorted(set(counter.stamps))
    (refused,) = range_.extend("refuse").outcomes
    assert isinstance(refused, errors.NotFound)
    again = Counter()
    assert RangeMachine.load(RangeId(0), range_.engine, again) is not None
    assert again.total == 5


def test_a_storage_error_of_an_extension_is_no_outcome() -> None:
    """A damaged disk is this node's trouble; answering it as the command's outcome would hide it."""
    range_ = World(world.descriptor(KeyRange(b"", b""), range_id=0), extension=Counter())
    with pytest.raises(errors.Corruption):
        range_.extend("break")
    with pytest.raises(errors.Corruption):
        World().extend(1)


def test_an_entry_of_an_unknown_kind_is_not_taken_for_the_extensions() -> None:
    """Of a newer version: it stops the node instead of letting it diverge."""
    range_ = World(world.descriptor(KeyRange(b"", b""), range_id=0), extension=Counter())
    with pytest.raises(errors.Corruption, match="unknown kind"):
        range_.apply(codec.dumps([ENTRY_FORMAT, 9, world.NOW_MS << 18, 1, 5]))


def test_a_session_goes_with_its_time_however_often_its_range_splits() -> None:
    """Keys written in order: the right half is the one that is written, and splits again within a minute."""
    range_, once = World(), Client(b"once")
    range_.do(once, once.put(b"zz", b""))
    for number in range(4):
        writer = Client(b"%d" % number, now_ms=range_.now_ms)
        range_.do(writer, writer.put(b"z", b""))
        split = range_.split(b"m%d" % number, right=2 + number).split
        assert split is not None
        range_ = range_.other(split)
        range_.now_ms += 50_000
    assert once.session not in range_.machine.sessions(range_.engine).sessions


def test_what_has_had_its_time_is_not_copied() -> None:
    range_, client = World(), Client()
    range_.do(client, client.put(b"z", b""))
    range_.now_ms += SESSION_AGE_MS_MAX + 1
    split = range_.split(b"m").split
    assert split is not None
    assert not split.machine.sessions(range_.engine).sessions
    assert not list(range_.engine.scan(*keys.kind_span(range_.machine.range_id, keys.SESSIONS)))


@pytest.mark.parametrize(
    ("sessions", "records", "rows_min", "spread_ms"),
    [
        (30, 1, 1, 2 * SESSION_AGE_MS_MAX),
        (64, 1_000, 2, 2 * SESSION_AGE_MS_MAX),
        (600, 1_000, 5, 2 * SESSION_AGE_MS_MAX),
        (100, 1_000, 2, 0),
    ],
    ids=["few", "some", "many", "some at once"],
)
def test_many_sessions_are_copied_in_rows_that_a_snapshot_can_send(
    sessions: int, records: int, rows_min: int, spread_ms: int
) -> None:
    table = SessionTable()
    for number in range(sessions):
        session_id = b"%016d" % number
        piece = pack_mixed(session_id, 0, {each: Record(each, 0, each) for each in range(records)})
        table.session(session_id).add(number, 0, 0, records - 1, piece)
        table.remember_row(number, world.NOW_MS + spread_ms * number // sessions, (session_id,))
    made = table.consolidated()
    copy = SessionTable.load(enumerate(made))
    copy.check()
    assert {each: session.records() for each, session in copy.sessions.items()} == {
        each: session.records() for each, session in table.sessions.items()
    }
    assert rows_min <= len(made) <= CONSOLIDATED_ROWS_MAX
    size = sum(map(len, made))
    assert max(map(len, made)) <= max(1 << 20, size // 2) + (1 << 15)
    assert [row.issued_at for row in copy.rows] == sorted(row.issued_at for row in copy.rows)
    for row in copy.rows:
        oldest = min(table.rows[int(session_id)].issued_at for session_id in row.sessions)
        assert row.issued_at - oldest < 30_000


@pytest.mark.parametrize("gap", [5_000, 40_000])
def test_trap_12_a_session_is_copied_with_the_time_of_its_newest_command_not_of_its_last_row(gap: int) -> None:
    range_, client = World(), Client()
    client.now_ms = range_.now_ms
    early = client.put(b"a", b"")
    range_.now_ms += gap
    client.now_ms = range_.now_ms
    late = client.increment(b"z")
    assert range_.do(client, late) == 1
    assert range_.do(client, early), "its first attempt was lost"
    split = range_.split(b"m").split
    assert split is not None
    range_ = range_.other(split)
    range_.now_ms = world.NOW_MS + SESSION_AGE_MS_MAX + 100
    other = Client(b"other", now_ms=range_.now_ms)
    range_.do(other, other.put(b"zz", b""))
    assert range_.do(client, late) == 1, "executed twice"


def test_after_a_rest_what_has_had_its_time_goes_unread() -> None:
    """However much it is, it is gone with the next entry, which need not be kept waiting for it."""
    range_, client = World(), Client()
    range_.do(client, client.put(b"a", b""))
    range_.engine.write(damaged_sessions(range_))
    range_.now_ms += SESSION_AGE_MS_MAX + 1
    range_.machine.rest(range_.now_ms)
    other = Client(b"other", now_ms=range_.now_ms)
    range_.do(other, other.put(b"b", b""))
    assert list(range_.machine.sessions(range_.engine).sessions) == [other.session]
    assert len(list(range_.engine.scan(*keys.kind_span(range_.machine.range_id, keys.SESSIONS)))) == 1


def damaged_sessions(range_: World) -> WriteBatch:
    """Rows whose heads alone can be read."""
    batch = WriteBatch()
    for key, value in range_.engine.scan(*keys.kind_span(range_.machine.range_id, keys.SESSIONS)):
        batch.put(key, value[:9] + b"?")
    return batch
