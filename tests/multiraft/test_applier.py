"""Who gets what of the entries that are applied, and in which order, on one node's parts."""

from typing import Any

import pytest
from trio.testing import MockClock

from shardkv.errors import Busy, NotLeader
from shardkv.machine import entries, keys
from shardkv.machine.machine import INITIAL_INDEX
from shardkv.machine.rows import unpack_applied
from shardkv.multiraft import applier as applier_module
from shardkv.multiraft.replica import Proposal, Replica, WriteGroup
from shardkv.raft.messages import Entry, Message, MessageType
from shardkv.storage.engine import WriteBatch
from shardkv.wire import commands
from tests.multiraft.world import RANGE, SESSION, Answer, Host, world


def committed(replica: Replica, entry: Entry) -> Message:
    return Message(MessageType.STORAGE_APPLY, to=replica.replica_id, entries=(entry,))


def put_entry(host: Host, ahead: int, key: bytes) -> Entry:
    """A put that stands so many entries behind what is applied."""
    machine = host.machine()
    command = host.world.command(commands.Op.PUT, commands.pack_put(key, b"v", None))
    stamp = host.hybrid_clock.now()
    data = entries.encode_write_entry([(SESSION, command)], stamp, machine.descriptor.epoch.span)
    return Entry(machine.applied_term, machine.applied_index + ahead, data=data)


async def test_nothing_is_applied_before_what_is_held_back_though_the_engine_goes_on_meanwhile(
    autojump_clock: MockClock,
) -> None:
    """An engine that has just made room takes writes in the middle of a turn."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        replica, applier = host.replica(), host.driver.applier
        first, second = put_entry(host, 1, b"a"), put_entry(host, 2, b"b")
        host.engine.stall = True
        applier._apply([(replica, committed(replica, first))])
        host.engine.stall = False
        applier._apply([(replica, committed(replica, second))])
        assert [message.entries for _, message in applier.held] == [(first,), (second,)]
        applier.catch_up()
        assert (host.value(b"a"), host.value(b"b")) == (b"v", b"v")


async def test_trap_10_a_batch_that_is_cut_between_entries_says_how_far_each_part_goes(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash would leave what the second part holds, and have it applied once more."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        replica = host.replica()
        puts = tuple(put_entry(host, ahead, b"%d" % ahead) for ahead in range(1, 6))
        message = Message(MessageType.STORAGE_APPLY, to=replica.replica_id, entries=puts)
        monkeypatch.setattr(applier_module, "BATCH_KEYS_MAX", 4)
        batches: list[WriteBatch] = []
        monkeypatch.setattr(host.engine, "write", batches.append)
        host.driver.applier._apply([(replica, message)])
        parts = [
            (
                [index for index, _ in enumerate(puts, 1) if keys.user_key(b"%d" % index) in batch.changes],
                unpack_applied(batch.changes[keys.applied_key(RANGE)] or b"").index - INITIAL_INDEX,
            )
            for batch in batches
        ]
        assert parts == [([1, 2], 2), ([3, 4], 4), ([5], 5)]


async def test_who_is_answered_is_told_a_time_that_is_not_behind_the_versions_in_the_answer(
    autojump_clock: MockClock,
) -> None:
    """DESIGN 4.4: the client hands it on, and what it writes to another range then gets a higher version."""
    async with world(1) as hosts:
        host = hosts[1]

        class Told(Answer):
            time = 0

            def answer(self, request_id: int, result: Any) -> None:
                self.time = host.hybrid_clock.last
                super().answer(request_id, result)

        issued = host.clock.wall_ms()
        puts = [commands.pack_put(b"%d" % sequence, b"v", None) for sequence in range(1, 101)]
        data = commands.join([commands.seal(commands.Op.PUT, each, at, issued, 1) for at, each in enumerate(puts, 1)])
        told = Told()
        host.replica().enqueue(WriteGroup(told, 0, SESSION, data, commands.decode(data)))
        host.driver.proposer.later(host.replica())
        versions = await told.wait()
        assert len(versions) == 100
        assert told.time >= max(versions)


async def test_what_was_committed_for_a_replica_that_has_ended_changes_nothing(autojump_clock: MockClock) -> None:
    """Its successor has the same machine, and another log to apply to it."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        ended, machine, entry = host.replica(), host.machine(), put_entry(host, 1, b"k")
        del host.catalog.replicas[RANGE]
        applied = machine.applied_index
        host.driver.applier._apply([(ended, committed(ended, entry))])
        assert machine.applied_index == applied


async def test_a_proposal_is_never_answered_with_the_outcome_of_another_leaders_entry(
    autojump_clock: MockClock,
) -> None:
    """They stand at the same index, in other terms. Whether its own command applied, its retry will find out."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        replica = host.replica()
        entry = put_entry(host, 1, b"k")
        beaten = Answer()
        replica.proposals[entry.index] = Proposal(entry.term - 1, ((beaten, 0),))
        host.driver.applier._apply([(replica, committed(replica, entry))])
        assert host.value(b"k") == b"v"
        assert isinstance(beaten.error, NotLeader)
        assert (beaten.result, beaten.count, replica.proposals) == (None, 1, {})


async def test_a_read_that_waits_for_what_is_never_applied_is_refused_in_time(autojump_clock: MockClock) -> None:
    """Its confirmation has come; nothing else would ever answer it."""
    async with world(3) as hosts:
        host = await hosts.led()
        await hosts.write(b"k", b"v")
        host.engine.stall = True
        host.put(b"k", b"w")
        await hosts.until(lambda: host.driver.applier.held, "an entry that is held back")
        answer = host.read(b"k")
        await hosts.until(lambda: host.replica().confirmed, "a confirmed read")
        with pytest.raises(Busy, match="did not come in time"):
            await answer.wait()
        assert host.replica().confirmed is None


async def test_whoever_has_applied_a_write_gives_no_stamp_below_its_version(autojump_clock: MockClock) -> None:
    """DESIGN 4.4: else what it answers from that state would be told to be older than what is in it."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        for host in hosts.values():
            assert host.hybrid_clock.last >= host.machine().last_timestamp


async def test_answers_leave_before_the_engine_is_written_and_the_write_is_there_before_the_next_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed needs no engine to last; whoever is answered works while the engine does."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        replica = host.replica()
        entry = put_entry(host, 1, b"k")
        answer = Answer()
        replica.proposals[entry.index] = Proposal(entry.term, ((answer, 0),))
        at_flush: list[tuple[bool, bool, bytes | None]] = []

        def flush() -> None:
            stamped = host.hybrid_clock.last >= host.machine().last_timestamp
            at_flush.append((answer.arrived, stamped, host.value(b"k")))

        monkeypatch.setattr(host.driver.applier, "_flush", flush)
        host.driver.applier._apply([(replica, committed(replica, entry))])
        assert at_flush == [(True, True, None)]
        assert host.value(b"k") == b"v"
        host.driver.applier._apply([(replica, committed(replica, put_entry(host, 1, b"l")))])
        assert len(at_flush) == 1, "nobody waits for this one"


async def test_a_node_that_dies_between_an_answer_and_the_engine_has_the_write_when_it_is_back(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the log, from which the next start applies it."""
    async with world(1) as hosts:
        host = await hosts.led()
        await hosts.write(b"k", b"v")
        monkeypatch.setattr(host.engine, "write", lambda batch: None)
        await host.put(b"k", b"w").wait()
        assert host.value(b"k") == b"v"
        await host.restart()
        host = await hosts.led()
        assert await host.read(b"k").wait() == b"w"
