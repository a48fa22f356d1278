"""A disk whose syncs stall: how it is judged, and who leads meanwhile (DESIGN 4.11; trap 14)."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from shardkv.errors import OutcomeUnknown
from shardkv.raft import RaftNode
from shardkv.server.admin.metrics import _disk
from shardkv.server.disk_health import (
    WELL_SECONDS,
    WELL_SECONDS_MAX,
    DiskHealth,
)
from shardkv.simulation import run_deterministically
from shardkv.types import PLACEMENT_RANGE, NodeId
from shardkv.wire.requests import Method
from shardkv_client import Client
from shardkv_placement.commands import SetSetting, encode
from tests.server.world import Cluster, SimulatedNode, world

MS = 1_000_000
SECOND = 1000 * MS


class Log:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, text: str, **values: Any) -> None:
        self.said.append(text)

    info = warning


def judged(stall_seconds: float = 1.0) -> tuple[DiskHealth, Log]:
    log = Log()
    return DiskHealth(None, stall_seconds, log), log  # type: ignore[arg-type]


# The judgement.


def test_a_sync_that_takes_longer_than_the_bound_makes_the_disk_slow_and_the_node_says_so() -> None:
    """DESIGN 4.11. One that has not ended counts as it runs, so the first probe past the bound finds it."""
    health, log = judged()
    for tenth in range(1, 10):
        health.observe(tenth * 100 * MS, tenth * 100 * MS)
        assert not health.slow
    health.observe(SECOND, SECOND)
    assert health.slow
    assert [text.partition(":")[0] for text in log.said] == ["the disk is slow"]
    health.observe(2 * SECOND, 2 * SECOND)
    assert len(log.said) == 1, "said once, not with every probe"
    health.check()


def test_the_disk_is_well_again_only_after_a_while_of_syncs_far_below_the_bound() -> None:
    """Hysteresis: leaderships must not come and go with each stall of a failing disk."""
    health, log = judged()
    health.observe(3 * SECOND, 0)
    now = 0
    while now < 9 * SECOND:
        now += 100 * MS
        health.observe(5 * MS, now)
        assert health.slow
    health.observe(600 * MS, now)
    ends = now + int(WELL_SECONDS * SECOND)
    while now < ends - 100 * MS:
        now += 100 * MS
        health.observe(5 * MS, now)
        assert health.slow, "more than half of the bound counts"
    health.observe(5 * MS, ends)
    assert not health.slow
    assert len(log.said) == 2
    health.check()


def test_a_disk_that_becomes_slow_again_soon_must_be_well_for_longer_each_time() -> None:
    health, _ = judged()
    now, waits = 0, []
    for _ in range(8):
        health.observe(2 * SECOND, now)
        since = now
        while health.slow:
            now += SECOND
            health.observe(0, now)
        waits.append((now - since) / SECOND)
    assert waits == [min(WELL_SECONDS * 2**number, WELL_SECONDS_MAX) for number in range(8)]
    now += 1000 * SECOND
    health.observe(2 * SECOND, now)
    since = now
    while health.slow:
        now += SECOND
        health.observe(0, now)
    assert (now - since) / SECOND == WELL_SECONDS, "after a long time without trouble it begins anew"
    assert health.statistics().slow_count == 9


def test_a_process_that_was_suspended_does_not_blame_its_disk() -> None:
    """Whether the sync's end or the probe is seen first after it, the time that the process slept is not the disk's."""
    health, _ = judged()
    assert health.disk_ns(3100 * MS, 3 * SECOND, 100 * SECOND) == 100 * MS, "still under way at the late probe"
    assert health.disk_ns(3150 * MS, 0, 100 * SECOND + 100 * MS) == 150 * MS, "ended just after it"
    assert health.disk_ns(3000 * MS, 0, 200 * SECOND) == 3000 * MS, "another one, later"
    assert health.disk_ns(5 * MS, 10 * MS, 201 * SECOND) == 5 * MS


# The leaderships.

KEYS = (b"a", b"n")


async def spread(cluster: Cluster, kv: Client) -> SimulatedNode:
    """Two ranges that one node leads, which nobody evens out; that node."""
    await cluster.ask(kv, Method.PLACEMENT, encode(SetSetting("leader_balance", False)), range_id=PLACEMENT_RANGE)
    await kv.call(Method.SPLIT, b"m", key=b"m")
    for key in KEYS:
        await kv.put(key, b"before")
    leader = await cluster.leader_of(kv, b"a")
    await led_by(cluster, kv, leader)
    return leader


async def led_by(cluster: Cluster, kv: Client, node: SimulatedNode, *keys: bytes | None) -> None:
    """Make a node lead everything, or the ranges of these keys; None stands for the placement group."""
    node_id = next(each[0] for each in await kv.call(Method.NODES) if each[1] == node.name)
    for key in keys or KEYS:
        while True:
            ((descriptor, leader),) = await cluster.ask(kv, Method.ROUTES, key, 1)
            if leader == node_id:
                break
            await cluster.ask(kv, Method.TRANSFER, descriptor[0], node_id, range_id=descriptor[0])
    await trio.sleep(1)


def leads(node: SimulatedNode) -> list[int]:
    return sorted(each.range_id for each in node.inside.catalog.replicas.values() if each.leads)


async def state_of(cluster: Cluster, kv: Client, node: SimulatedNode) -> str:
    status = await cluster.ask(kv, Method.STATUS)
    return str(next(row["state"] for row in status["node_table"] if row["name"] == node.name))


@contextmanager
def stalled(node: SimulatedNode) -> Iterator[None]:
    """Its disk neither answers nor fails. At the end it does again, so that a test that failed can end."""
    node.environment.disk.stall()
    try:
        yield
    finally:
        node.environment.disk.resume()


def slowed(node: SimulatedNode, seconds: float) -> None:
    """Every job of its disk takes so long, and none is done in the loop."""
    node.environment.workers.latency_seconds = lambda: seconds
    node.environment.workers.at_once = lambda: False


async def until(condition: Any, seconds: float = 10.0) -> float:
    """How long it took to come true."""
    began = trio.current_time()
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
    return trio.current_time() - began


def test_trap_14_a_leader_whose_disk_stalls_gives_its_leaderships_away_and_writes_go_on() -> None:
    """The disk neither fails nor answers; heartbeats go on, so nobody would campaign (CockroachDB #129579)."""

    async def main() -> None:
        async with world(3, seed=14) as cluster, cluster.client() as kv:
            sick = await spread(cluster, kv)
            led = leads(sick)
            assert len(led) >= 2
            with stalled(sick):
                began = trio.current_time()
                for key in KEYS:
                    await kv.put(key, b"meanwhile", timeout=5)
                assert trio.current_time() - began < 2.0, "a second of stall, a probe, a transfer"
                await until(lambda: not leads(sick), 1.0)
                for _ in range(50):
                    for key in KEYS:
                        await kv.put(key, b"and on", timeout=1)
                    await trio.sleep(0.1)
                    assert not leads(sick)
                assert await state_of(cluster, kv, sick) == "slow disk"
                assert sick.alive
            await until(lambda: not sick.inside.disk_health.slow, 30)
            await trio.sleep(1)
            assert await state_of(cluster, kv, sick) == "live"
            statistics = sick.inside.disk_health.statistics()
            assert statistics.slow_count == 1
            assert statistics.given_away == len(led)
            await led_by(cluster, kv, sick)
            assert (await kv.get(b"a")).value == b"and on"  # type: ignore[union-attr]

    run_deterministically(main, seed=14)


def test_trap_14_a_node_whose_disk_is_slow_holds_up_its_loop_with_no_sync() -> None:
    """The worker would try one in the loop now and then, to see whether the disk has become quick."""

    async def main() -> None:
        async with world(3, seed=14) as cluster, cluster.client() as kv:
            sick = await spread(cluster, kv)
            workers, health = sick.environment.workers, sick.inside.disk_health
            writer = sick.inside.driver.log_writer
            with stalled(sick):
                for key in KEYS:
                    await kv.put(key, b"meanwhile", timeout=5)
                await until(lambda: health.slow, 1)
            workers.at_once = lambda: True
            await trio.sleep(1)
            assert health.slow
            assert not writer.at_once
            await until(lambda: not health.slow, 30)
            await until(lambda: writer.at_once, 1)

    run_deterministically(main, seed=14)


def test_trap_14_a_stall_that_shows_nothing_of_the_others_ends_in_an_offer_all_the_same() -> None:
    """It began with another leader's entries, and while it lasts nothing is proposed: nobody can show to be quicker."""

    async def main() -> None:
        async with world(3, seed=19) as cluster, cluster.client() as kv:
            sick = await spread(cluster, kv)
            other = next(node for node in cluster.nodes.values() if node is not sick)
            await led_by(cluster, kv, other, b"n")
            await led_by(cluster, kv, other, None)
            with stalled(sick):
                await kv.put(b"n", b"of the other's")
                await trio.sleep(0.1)
                began = trio.current_time()
                await kv.put(b"a", b"waits", timeout=10)
                assert trio.current_time() - began < 4.5, "three times the bound, an election"
                assert not leads(sick)

    run_deterministically(main, seed=19)


def test_trap_14_a_node_that_has_shown_nothing_is_tried_with_one_leadership(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may stall as well, and a leadership on its way takes no writes; the rest follow when it leads."""

    async def main() -> None:
        async with world(3, seed=19) as cluster, cluster.client() as kv:
            sick = await spread(cluster, kv)
            for key in (b"c", b"e", b"g"):
                await kv.call(Method.SPLIT, key, key=key)
            other = next(node for node in cluster.nodes.values() if node is not sick)
            await led_by(cluster, kv, other, b"n", None)
            await led_by(cluster, kv, sick, b"a", b"c", b"e", b"g")
            rafts = {replica.raft: replica for replica in sick.inside.catalog.replicas.values()}
            offered: list[tuple[float, NodeId | None]] = []
            transfer = RaftNode.transfer_leader

            def noted(raft: RaftNode, to: int) -> None:
                if raft in rafts:
                    offered.append((trio.current_time(), rafts[raft].node_of(to)))
                transfer(raft, to)

            monkeypatch.setattr(RaftNode, "transfer_leader", noted)
            with stalled(sick):
                await kv.put(b"n", b"of the other's")
                await until(lambda: not leads(sick))
            first = [node_id for at, node_id in offered if at == offered[0][0]]
            assert len(first) == len(set(first)), "a node was offered two at once before it had shown anything"
            assert len(offered) >= 4

    run_deterministically(main, seed=19)


def test_trap_14_a_slow_node_takes_no_leadership_until_it_is_well() -> None:
    """Not by a transfer, which it declines at once, nor by an election while anybody else can win it."""

    async def main() -> None:
        async with world(3, seed=15) as cluster, cluster.client() as kv:
            leader = await spread(cluster, kv)
            sick, other = (node for node in cluster.nodes.values() if node is not leader)
            sick.inside.disk_health.observe(2 * SECOND, sick.environment.clock.monotonic_ns())
            assert sick.inside.disk_health.slow
            ((descriptor, _),) = await kv.call(Method.ROUTES, b"a", 1)
            replica = leader.inside.catalog.replicas[descriptor[0]]
            target = next(
                each.replica_id
                for each in replica.machine.descriptor.replicas
                if replica.node_of(each.replica_id) == sick.inside.catalog.node_id
            )
            assert replica.leads
            replica.raft.transfer_leader(target)
            leader.inside.driver.touch(replica)
            took = await until(lambda: not replica.raft.transferee)
            assert took < 0.1, "declined, not timed out: the range must not be without writes for an election timeout"
            assert replica.leads
            await kv.put(b"a", b"goes on", timeout=0.5)
            for _ in range(3):
                await leader.kill()
                await until(lambda: len(leads(other)) >= 2 and not leads(sick))
                await leader.start()
                await trio.sleep(1)
                sick.inside.disk_health.observe(2 * SECOND, sick.environment.clock.monotonic_ns())
                await led_by(cluster, kv, leader)

    run_deterministically(main, seed=15)


def test_a_client_waits_for_a_slow_write_as_long_as_the_node_says_that_it_lives() -> None:
    """The node's word must not wait for the answer; else the client gives its connection up after 1.5 s, and the
    write it sends again waits behind the first one.
    """

    async def main() -> None:
        async with world(3, seed=17) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"before")
            for node in cluster.nodes.values():
                slowed(node, 1.2)
            for number in range(5):
                began = trio.current_time()
                await kv.put(b"k", b"%d" % number, timeout=12)
                assert trio.current_time() - began < 4.0, "three rounds of a slow log, one of another write's"

    run_deterministically(main, seed=17)


@pytest.mark.parametrize("quick", [0, 1])
def test_trap_14_where_most_disks_are_slow_nobody_loses_availability(quick: int) -> None:
    """Too few are known to be quicker to elect another, so whoever leads leads on; the writes are slow and no worse."""

    async def main() -> None:
        async with world(3, seed=16) as cluster, cluster.client() as kv:
            leader = await spread(cluster, kv)
            led = leads(leader)
            others = [node for node in cluster.nodes.values() if node is not leader]
            for node in [leader, *others[quick:]]:
                slowed(node, 1.2)
            for number in range(12):
                for key in KEYS:
                    await kv.put(key, b"%d" % number, timeout=5)
                    entry = await kv.get(key, timeout=5)
                    assert entry is not None
                    assert entry.value == b"%d" % number
            assert leader.inside.disk_health.slow
            assert leads(leader) == led

    run_deterministically(main, seed=16)


def test_trap_14_a_slow_leader_that_dies_is_replaced_though_all_are_slow() -> None:
    """Nobody is left that is not reluctant."""

    async def main() -> None:
        async with world(3, seed=18) as cluster, cluster.client() as kv:
            leader = await spread(cluster, kv)
            for node in cluster.nodes.values():
                slowed(node, 0.6)
                node.inside.disk_health._stall_ns = 300 * MS
            for key in KEYS:
                await kv.put(key, b"before", timeout=10)
            await until(lambda: all(node.inside.disk_health.slow for node in cluster.nodes.values()))
            await leader.kill()
            for key in KEYS:
                await kv.put(key, b"after", timeout=30)
                entry = await kv.get(key, timeout=10)
                assert entry is not None
                assert entry.value == b"after"
                assert await cluster.leader_of(kv, key) is not leader

    run_deterministically(main, seed=18)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9])
def test_a_leader_that_dies_is_replaced_where_a_sync_takes_longer_than_an_election_timeout(seconds: float) -> None:
    """No disk counts as slow by these. A campaign must not be given up while the votes for it are on their way."""

    async def main() -> None:
        async with world(3, seed=20) as cluster, cluster.client() as kv, trio.open_nursery() as nursery:
            leader = await spread(cluster, kv)
            for node in cluster.nodes.values():
                slowed(node, seconds)

            async def writer(key: bytes) -> None:
                while True:
                    with suppress(OutcomeUnknown):
                        await kv.put(key, b"more", timeout=60)

            for key in KEYS * 2:
                nursery.start_soon(writer, key + b"more")
            await trio.sleep(5)
            assert not any(node.inside.disk_health.slow for node in cluster.nodes.values())
            await leader.kill()
            began = trio.current_time()
            for key in KEYS:
                await kv.put(key, b"after", timeout=60)
            took = trio.current_time() - began
            assert took < 1.0 + 16 * seconds, "doubt, two elections at most, a first entry, two writes"
            nursery.cancel_scope.cancel()

    run_deterministically(main, seed=20)


@pytest.mark.parametrize("seconds", [1.2, 2.5])
def test_a_leader_that_dies_is_replaced_where_only_the_voters_disk_is_slow(seconds: float) -> None:
    """The candidate's own vote is on disk at once; the other one's must not come too late in each of its terms."""

    async def main() -> None:
        async with world(3, seed=7) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"before", timeout=60)
            leader = await cluster.leader_of(kv, b"k")
            slowed(next(node for node in cluster.nodes.values() if node is not leader), seconds)
            await leader.kill()
            began = trio.current_time()
            await kv.put(b"k", b"after", timeout=60)
            assert trio.current_time() - began < 1.0 + 8 * seconds, "doubt, three elections, a first entry, a write"

    run_deterministically(main, seed=7)


async def test_the_metrics_show_a_slow_disk() -> None:
    """docs/admin.md names every one of them."""
    health, _ = judged()
    health.observe(1500 * MS, SECOND)
    parts = SimpleNamespace(disk_health=health)
    shown = {
        sample.name: sample.value
        for metric in _disk(parts)  # type: ignore[arg-type]
        for sample in metric.samples
    }
    assert shown == {
        "shardkv_disk_slow": 1,
        "shardkv_disk_slow_times_total": 1,
        "shardkv_log_sync_seconds_max": 1.5,
        "shardkv_leaderships_given_away_total": 0,
    }
    documented = (Path(__file__).parents[2] / "docs/admin.md").read_text()
    assert all(name in documented for name in shown)
