"""How much of its log a leader keeps for those who lack it, so that they need no snapshot."""

import pytest
import trio
from trio.testing import MockClock

from shardkv.multiraft import maintenance
from shardkv.raft import ProgressState
from tests.multiraft.scenes import behind, led_by_another
from tests.multiraft.world import RANGE, world


async def test_trap_11_the_log_keeps_what_the_receiver_of_a_snapshot_needs_next(autojump_clock: MockClock) -> None:
    """While it installs it answers nothing, so that it looks as if it were away."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        late.workers.hold_others()
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        await trio.sleep(0.05)
        for number in range(maintenance.ENTRIES_KEPT + 50):
            leader.put(b"more%d" % (number % 7), b"3")
            await trio.sleep(0.003)
        peer = leader.replica().raft.status().progress[3]
        await leader.maintenance.flush_and_compact()
        needs = peer.pending_snapshot if peer.state is ProgressState.SNAPSHOT else peer.next - 1
        assert leader.wal.groups[RANGE].compact_index <= needs
        late.workers.release()
        await hosts.agreed()


async def test_trap_11_a_follower_one_entry_behind_a_new_leader_needs_no_snapshot(autojump_clock: MockClock) -> None:
    """As a follower, the new leader did not know what others lack, and cut its log by itself."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        other = next(host for host in hosts.values() if host.node_id not in (leader.node_id, 3))
        hosts.isolate(3)
        await hosts.write(b"k", b"w")
        index = leader.machine().applied_index
        await hosts.until(lambda: other.machine().applied_index == index and not other.driver.applier.held)
        await trio.sleep(0.2)
        await other.maintenance.flush_and_compact()
        leader.replica().raft.transfer_leader(other.replica().replica_id)
        leader.driver.touch(leader.replica())
        await hosts.until(lambda: other.replica().leads, "the transfer")
        hosts.heal()
        await hosts.agreed()
        assert hosts.leader().snapshots.statistics().chunks_sent == 0
        assert hosts[3].snapshots.statistics().chunks_received == 0


async def test_trap_11_a_follower_a_little_behind_needs_no_snapshot_and_one_far_behind_does_not_stop_compaction(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(3) as hosts:
        await led_by_another(hosts, 3)
        monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 10)
        monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 60)
        leader = hosts.leader()
        hosts.isolate(3)

        async def write(count: int) -> None:
            for number in range(count):
                await hosts.write(b"k%d" % (number % 5), b"v")
            await trio.sleep(0.1)
            await leader.maintenance.flush_and_compact()

        held = hosts[3].replica().raft.last_index
        await write(40)
        assert leader.wal.groups[RANGE].compact_index <= held
        await write(60)
        assert leader.wal.groups[RANGE].compact_index > held
        applied = leader.machine().applied_index
        assert leader.wal.groups[RANGE].compact_index == applied - 10 - 60
        hosts.heal()
        await hosts.agreed()


async def test_trap_11_a_follower_that_lacks_large_values_does_not_stop_compaction_for_long(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for it is bounded in bytes as well: a few entries may be as much as many."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 2)
    monkeypatch.setattr(maintenance, "LAG_BYTES_MAX", 50_000)
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        hosts.isolate(3)
        held = hosts[3].replica().raft.last_index

        async def write(count: int) -> None:
            for _ in range(count):
                await hosts.write(b"k", bytes(10_000))
            await trio.sleep(0.1)
            await leader.maintenance.flush_and_compact()

        await write(4)
        assert leader.wal.groups[RANGE].compact_index <= held
        await write(6)
        assert leader.wal.groups[RANGE].compact_index > held
        hosts.heal()
        await hosts.agreed()
