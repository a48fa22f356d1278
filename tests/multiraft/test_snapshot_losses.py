"""A replica that has lost its data, or a part of them: what it does until a snapshot brings them back."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, RangeMachine, conf_state_of
from shardkv.machine.snapshot import begin_install, installing
from shardkv.multiraft import snapshot_install
from shardkv.multiraft.space import Space
from shardkv.raft import Role
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.wal import CreateGroup, LogUpdate
from shardkv.types import RangeDescriptor, RangeId, ReplicaId
from tests.multiraft.scenes import Stream, behind, compact, led_by_another, spelled, split_on_two
from tests.multiraft.world import RANGE, Host, Hosts, world

MIB = 1024 * 1024
STEPS = ("after the mark", "after the flush", "after the ingest", "after the record", "after all")


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("step", STEPS)
async def test_trap_19_a_crash_at_any_step_of_an_install(
    autojump_clock: MockClock, step: str, power: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old state, the new one, or the mark: never a mixture, and in the end the cluster's state."""
    async with world(3) as hosts:
        late = await behind(hosts)
        reached = trio.Event()

        def stop_after(target: Any, name: str) -> None:
            original: Callable[..., Any] = getattr(target, name)

            def stopping(*args: Any) -> Any:
                if reached.is_set():
                    raise trio.ClosedResourceError("this node is dead")
                result = original(*args)
                reached.set()
                return result

            monkeypatch.setattr(target, name, stopping)

        match step:
            case "after the mark":
                stop_after(late.engine, "write")
            case "after the flush":
                stop_after(late.engine, "flush")
            case "after the ingest":
                stop_after(late.engine, "ingest")
            case "after the record":
                stop_after(late.driver, "log_snapshot")
            case _:
                late.replica()
        hosts.tolerant = True
        hosts.down = {pair for pair in hosts.down if 3 in pair}
        leader = hosts.leader()
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        if step == "after all":
            await hosts.until(lambda: late.replica().machine and not late.replica().installing)
        else:
            with trio.fail_after(5):
                await reached.wait()
        await late.crash(power=power)
        machine, mark = RangeMachine.load(RANGE, late.engine), installing(late.engine, RANGE)
        assert (machine is None) != (mark is None)
        await late.start()
        hosts.check()
        hosts.heal()
        await hosts.write(b"after", b"3")
        await hosts.agreed()
        assert late.value(b"new4") == b"2"
        assert not late.replica().needs_snapshot


@pytest.mark.parametrize("marked", [True, False], ids=["with-a-mark", "with-a-log-alone"])
async def test_trap_19_a_replica_whose_install_ended_half_way_serves_nothing_and_asks_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    """TRAPS 19: by the mark, which keeps its span, too; and should there be none, by a log without a state."""
    if not marked:

        def begun(batch: WriteBatch, descriptor: RangeDescriptor, *rest: Any) -> None:
            begin_install(batch, descriptor, *rest)
            del batch.changes[keys.applied_key(descriptor.range_id)]

        monkeypatch.setattr(snapshot_install, "begin_install", begun)
    async with world(3) as hosts:
        late = await behind(hosts)
        hosts.tolerant = True
        leader = hosts.leader()
        await late.snapshots.receive(Stream(*spelled(leader, 3)), leader.node_id)
        late.workers.hold_others()
        await hosts.until(lambda: late.replica().machine is None)
        await trio.sleep(0.01)
        late.engine.flush()
        await late.restart(power=True)
        replica = late.replica()
        assert replica.needs_snapshot
        assert replica.machine is None
        assert (late.catalog.replica_for_key(b"new1") is replica) == marked, "its span must be nobody else's"
        roles = set()
        for _ in range(40):
            await trio.sleep(0.05)
            roles.add(replica.raft.role)
        assert roles == {Role.FOLLOWER}, "it campaigned with a log and no state (trap 2)"
        hosts.opens = lambda source, target: False
        hosts.heal()
        await trio.sleep(2)
        assert late.replica() is replica
        assert replica.raft.term == leader.replica().raft.term, "it campaigned"
        hosts.opens = lambda source, target: True
        await hosts.until(lambda: not late.replica().needs_snapshot, "the snapshot it asked for")
        await hosts.agreed()
        assert late.snapshots.statistics().installing == 0, "it could never be sent another"


async def test_trap_20_a_split_that_was_lost_and_will_not_be_replayed_leaves_a_group_that_asks_for_its_data(
    autojump_clock: MockClock,
) -> None:
    """TRAPS 1 and 20: the right half's log is on disk and its rows are not; the left half gets a snapshot from behind
    the split. What the leader sends fits the log, so nobody else would ever think of a snapshot."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        leader = hosts.leader(2)
        members = leader.machine(2).descriptor
        created = CreateGroup(ReplicaId(103), INITIAL_INDEX, INITIAL_TERM, conf_state_of(members))
        late.catalog.log([LogUpdate(RangeId(2), create=created)])
        await trio.sleep(0.1)
        late.engine.flush()
        await late.restart(power=True)
        assert late.replica(2).machine is None
        for node_id in (1, 2):
            compact(hosts[node_id], 1)
        hosts.passes = lambda source, target, range_id, message: 3 not in (source, target) or range_id == 2
        await trio.sleep(1)
        assert late.replica(2).machine is None, "the left half still owns its span"
        assert late.replica(2).raft.leader, "nobody leads it"
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"2"
        assert not late.replica(2).needs_snapshot
        hosts.check()


async def test_trap_20_a_split_applied_behind_a_snapshot_does_not_revive_a_right_half_whose_log_begins_later(
    autojump_clock: MockClock,
) -> None:
    """A node's engine is gone, which the others make up for. The left half comes from a leader that has not applied the
    split yet, so the split is applied here once more; the right half's log has let go of what followed it."""
    async with world(3) as hosts:
        await hosts.write(b"a", b"1")
        await hosts.write(b"z", b"1")
        leader = await led_by_another(hosts, 3)
        for host in hosts.values():
            host.engine.flush()
        await leader.split(b"m", 2).wait()
        for number in range(5):
            await hosts.write(b"z", b"%d" % number, 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        late = hosts[3]
        late.engine.flush()
        compact(late, 2)
        await trio.sleep(0.1)
        for host in hosts.values():
            await host.crash(power=True)
        late.engine = MemoryEngine(crashable=True)
        for node_id in (1, 2):
            assert hosts[node_id].engine.get(keys.applied_key(2)) is None, "the split is flushed"
            hosts[node_id].engine.stall = True
            await hosts[node_id].start()
        hosts.passes = lambda source, target, range_id, message: 3 not in (source, target) or range_id == 1
        await late.start()
        assert late.replica(1).needs_snapshot
        assert late.replica(2).needs_snapshot
        await hosts.until(lambda: late.replica(1).machine is not None, "the left half")
        assert late.engine.get(keys.user_key(b"z")), "not split yet"
        for node_id in (1, 2):
            hosts[node_id].engine.stall = False
        await hosts.until(lambda: late.machine(1).descriptor.span.end == b"m", "the split")
        assert late.engine.get(keys.user_key(b"z")) is None, "nobody's"
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.write(b"z", b"new", 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"new"
        assert late.value(b"a", 1) == b"1"


async def that_waits_for_its_data(hosts: Hosts) -> Host:
    """The third of three hosts, which has lost its engine; no stream of a snapshot begins."""
    await hosts.write(b"k", b"v")
    await led_by_another(hosts, 3)
    late = hosts[3]
    await late.crash(power=True)
    late.engine = MemoryEngine(crashable=True)
    hosts.opens = lambda source, target: False
    await late.start()
    assert late.replica().needs_snapshot
    return late


async def test_a_replica_that_waits_for_its_data_keeps_what_it_logs_meanwhile_on_disk_and_not_in_memory(
    autojump_clock: MockClock,
) -> None:
    """Its snapshot may be hours away: its node lacks room, or waits for those of a thousand other ranges."""
    async with world(3) as hosts:
        late = await that_waits_for_its_data(hosts)
        log = late.replica().raft.raft.log
        value = bytes(250_000)
        for _ in range(100):
            await hosts.write(b"k", value)
        await hosts.until(lambda: log.committed == hosts.leader().replica().raft.committed, "all that was written")
        kept = sum(len(entry.data) for entry in log.tail)
        assert kept <= 2 * log.applying_bytes_max, f"{kept} of {100 * len(value)} bytes are in memory"
        hosts.opens = lambda source, target: True
        await hosts.agreed()


async def test_a_replica_that_waits_for_its_data_leaves_the_disk_room_for_them(autojump_clock: MockClock) -> None:
    """What it logs meanwhile it can let go of only once it has them. It logged until its node had no room to take them:
    then it waited for ever.
    """
    async with world(3) as hosts:
        late = await that_waits_for_its_data(hosts)
        await hosts.write(b"k", b"it takes part")
        log = late.replica().raft.raft.log
        await hosts.until(lambda: log.last_index == hosts.leader().replica().raft.last_index, "all that was written")
        space = late.driver.space = Space(100 * MIB)
        space.measured(149 * MIB)
        assert (space.short, space.low) == (True, False)
        before = log.last_index
        for number in range(20):
            await hosts.write(b"k%d" % number, b"v")
        await trio.sleep(2)
        assert log.last_index == before
        hosts.opens = lambda source, target: True
        await hosts.agreed()
        await hosts.write(b"k", b"it takes part again")
        await hosts.agreed()
