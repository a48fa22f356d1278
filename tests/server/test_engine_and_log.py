"""The engine and the log of one node, crashed at every moment between a flush of the one and a collection of the other.

TRAPS 20 and DESIGN 4.3: RocksDB's own log is off, so what was applied since the last flush is only in the Raft log. The
simulated engine forgets as much of it as a crash may take: all, a half, nothing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv.errors import Busy, Corruption, RequestError
from shardkv.machine.keys import user_key
from shardkv.multiraft import maintenance
from shardkv.multiraft.snapshot_receiver import Receiver
from shardkv.server import missing_data
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.disk import Call
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.workers import SimulatedWorkers
from shardkv.types import FIRST_RANGE, PLACEMENT_RANGE
from shardkv.wire.requests import Method
from tests.server.lives import Life, in_a_cluster, live, started
from tests.server.world import lose_engine, world

KEPT: dict[str, Callable[[int], int]] = {
    "no batch": lambda count: 0,
    "half of the batches": lambda count: count // 2,
    "every batch": lambda count: count,
}


@cache
def moments_of_a_collection() -> list[int]:
    """The numbers of the node's calls around the removal of its first segments, of a life without a crash."""
    removals: list[int] = []

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        calls = node.environment.calls

        def note(call: Call) -> None:
            if call.operation == "unlink" and call.path.endswith(".wal"):
                removals.append(calls.count)

        node.environment.disk.on_call = note
        await live(cluster, node, Life())

    in_a_cluster(main)
    assert removals, "no segment was ever removed"
    return list(range(removals[0] - 16, removals[0] + 8))


@pytest.mark.parametrize("kept", KEPT)
def test_trap_20_a_crash_between_flush_and_collection_loses_nothing_applied(kept: str) -> None:
    """An entry leaves the log only after an engine flush that covers the batch in which it was applied."""
    for number in moments_of_a_collection()[:: 1 if kept == "no batch" else 4]:
        life = Life()

        async def main(cluster: Cluster, node: SimulatedNode) -> None:
            node.crash_at_call(number, power=number % 2 == 0, kept_batches=KEPT[kept])  # noqa: B023
            await live(cluster, node, life)  # noqa: B023
            assert not node.alive, "the crash did not come"
            await node.buried()
            assert await started(node)
            await life.check_all_there(cluster)  # noqa: B023
            for replica in node.inside.catalog.replicas.values():
                assert replica.machine is not None
                assert replica.machine.applied_index >= replica.log.compact_index
            node.check()

        in_a_cluster(main)


def test_trap_20_the_log_is_collected_only_up_to_what_the_engine_has_flushed() -> None:
    """A crash a while after a collection, which takes every batch since the last flush."""
    life = Life()

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        assert await started(node)
        await life.write(cluster, node, 340)
        await trio.sleep(2)
        assert node.inside.wal.statistics().oldest_segment_id > 1
        await node.power_off()
        assert await started(node)
        await life.check_all_there(cluster)
        node.check()

    in_a_cluster(main)


async def test_a_node_alone_whose_engine_is_gone_says_so_at_every_start(autojump_clock: MockClock) -> None:
    """Its log and identity are there, so it was nobody's first start: it said that it was ready and waited for ever."""
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        await node.power_off()
        kept = node.copied_engine()
        lose_engine(node)
        for _ in range(2):
            with pytest.raises(Corruption, match=r"data of this node's ranges are gone.*--join HOST:PORT"):
                await node.run_to_its_end()
        node.engine = kept
        await node.start()
        async with cluster.client() as kv:
            entry = await kv.get(b"k")
            assert entry is not None
            assert entry.value == b"v"


async def test_a_node_whose_engine_is_gone_gets_its_ranges_from_the_others_and_says_so(
    autojump_clock: MockClock,
) -> None:
    with capture_logs() as lines:
        async with world(3) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            node = cluster.nodes["n1"]
            await node.power_off()
            lose_engine(node)
            await node.start()
            await cluster.sleep(5)
            assert node.engine.get(user_key(b"k")) is not None
    assert len([line for line in lines if "are copied from other nodes" in line["event"]]) == 1


async def test_no_leadership_is_moved_to_a_replica_that_waits_for_its_data(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It acknowledges whatever it is sent, so it seems to follow closely. It cannot lead, nor does it answer the offer:
    the range took no writes for an election timeout, again and again, and had no lease for the rest of the term."""

    def refuse(self: Receiver, begin: Any, sender: Any) -> Any:
        raise Busy("others are received")

    async with world(3) as cluster, cluster.client() as kv:
        leader = await cluster.leader_of(kv, b"k")
        replica = leader.inside.catalog.replicas[FIRST_RANGE]
        node = next(each for each in cluster.nodes.values() if each is not leader)
        target = node.inside.catalog.node_id
        await node.power_off()
        lose_engine(node)
        monkeypatch.setattr(Receiver, "_admit", refuse)
        await node.start()
        await cluster.sleep(2)
        stateless = node.inside.catalog.replicas[FIRST_RANGE]
        assert stateless.needs_snapshot
        peer = replica.raft.status().progress[stateless.replica_id]
        assert peer.recent_active
        assert peer.match == replica.raft.last_index
        with pytest.raises(RequestError, match="waits for the range's data"):
            await kv.call(Method.TRANSFER, FIRST_RANGE, int(target), range_id=FIRST_RANGE)
        assert replica.leads
        now_ns = leader.environment.clock.monotonic_ns()
        assert replica.raft.lease_valid(now_ns)
        successors = [replica_id for replica_id, _ in replica.successors(now_ns)]
        assert len(successors) == 1
        assert stateless.replica_id not in successors
        report = leader.inside.placement.reporting._report_of(replica)
        assert {each.replica_id: each.active for each in report.progress}[stateless.replica_id] is False
        monkeypatch.undo()
        await cluster.sleep(5)
        assert node.inside.catalog.replicas[FIRST_RANGE].machine is not None
        await cluster.ask(kv, Method.TRANSFER, FIRST_RANGE, int(target), range_id=FIRST_RANGE)


async def test_ranges_whose_data_nobody_has_are_named_again_and_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their only replicas were here. Another node is known, so it might have had one; they waited for ever, quietly."""
    monkeypatch.setattr(missing_data, "LOOK_SECONDS", 4.0)

    def named(lines: list[Any]) -> list[Any]:
        return [line["ranges"] for line in lines if "no other node brings them" in line["event"]]

    with capture_logs() as lines:
        async with world(2) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            node = cluster.nodes["n1"]
            await cluster.sleep(10)
            await node.power_off()
            assert not named(lines)
            lose_engine(node)
            await node.start()
            await cluster.sleep(10)
    assert named(lines) == [[PLACEMENT_RANGE, FIRST_RANGE]] * 2


async def test_nothing_is_said_of_ranges_whose_data_are_on_their_way(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing_data, "LOOK_SECONDS", 4.0)
    with capture_logs() as lines:
        async with world(3) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            node = cluster.nodes["n1"]
            await node.power_off()
            lose_engine(node)
            await node.start()
            for replica in node.inside.catalog.replicas.values():
                replica.needs_snapshot = True  # as if the snapshot took very long
            await cluster.sleep(6)
    assert not [line for line in lines if "no other node brings them" in line["event"]]


def test_trap_20_what_is_applied_while_the_engine_is_flushed_stays_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush covers what was written before it was called: what comes while it runs is only in the log."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 0)
    plain_run = SimulatedWorkers.run

    async def run(self: SimulatedWorkers, function: Any, *arguments: Any) -> Any:
        result = await plain_run(self, function, *arguments)
        if getattr(function, "__name__", "") == "flush":
            await trio.sleep(0.1)  # it is known only a while after the moment of which it is
        return result

    monkeypatch.setattr(SimulatedWorkers, "run", run)
    life = Life()

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        assert await started(node)
        await life.write(cluster, node, 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.write, cluster, node, 30)
            await node.inside.maintenance.flush_and_compact()
        await trio.sleep(0.1)
        assert any(replica.log.compact_index > 20 for replica in node.inside.catalog.replicas.values())
        await node.power_off()
        assert await started(node)
        await life.check_all_there(cluster)
        node.check()

    in_a_cluster(main)


async def test_an_engine_from_a_copy_is_refused_and_what_the_error_advises_brings_the_node_back(
    autojump_clock: MockClock,
) -> None:
    """To remove the data directory, as it once said, loses the log, its votes and what it alone may hold, and no node
    joins anew under its name."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        await kv.put(b"k", b"v")
        node = cluster.nodes["n3"]
        await node.kill(kept_batches=lambda count: count)
        copy = node.copied_engine()
        await node.start()
        for number in range(20):
            await kv.put(b"k%d" % number, b"w")
        await cluster.sleep(2)
        node.inside.maintenance.kept = (0, 0)
        await node.inside.maintenance.flush_and_compact()
        await cluster.sleep(1)
        await node.power_off()
        node.engine = copy
        with pytest.raises(Corruption, match="move the folder engine out of its data directory, and nothing else"):
            await node.run_to_its_end()
        lose_engine(node)
        await node.start()
        await cluster.sleep(5)
        assert node.engine.get(user_key(b"k19")) is not None
