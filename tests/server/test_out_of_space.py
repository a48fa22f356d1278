"""A node whose disk fills up: it refuses writes, serves reads, keeps its part in the cluster, and recovers by itself.

DESIGN 4.11. The disks are simulated, so is time; ``tests/cluster/test_full_disk.py`` has a real process on a real file
system without room.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import trio

from shardkv.config import StorageConfig
from shardkv.errors import OutcomeUnknown, OutOfSpace, ShardKVError, StorageError
from shardkv.simulation import run_deterministically
from shardkv.wire.requests import Method
from shardkv_client import Client
from tests.server.world import FREE_BYTES_MIN, STORAGE, Cluster, SimulatedNode, leave, world


def simulated(main: Any, seed: int = 1) -> None:
    run_deterministically(main, seed=seed)


async def states(cluster: Cluster, kv: Client) -> dict[str, str]:
    """What the cluster says of each node."""
    status = await cluster.ask(kv, Method.STATUS)
    return {str(row["name"]): str(row["state"]) for row in status["node_table"]}


async def until_refused(kv: Any, key: bytes) -> OutOfSpace:
    with trio.fail_after(10):
        while True:
            try:
                await kv.put(key, b"too much")
            except OutOfSpace as error:
                return error
            await trio.sleep(0.1)


async def until_taken(kv: Any, key: bytes) -> None:
    with trio.fail_after(20):
        while True:
            try:
                await kv.put(key, b"there is room")
            except (OutOfSpace, ShardKVError):
                await trio.sleep(0.1)
            else:
                return


def test_a_cluster_without_room_refuses_writes_serves_reads_and_deletes_and_recovers() -> None:
    """Low on space: the error says how much is missing where, and what to do."""

    async def main() -> None:
        async with world(3, seed=1, storage=STORAGE) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            await kv.put(b"gone", b"v")
            for node in cluster.nodes.values():
                leave(node, FREE_BYTES_MIN - 1)
            error = await until_refused(kv, b"k")
            await trio.sleep(2)  # each has looked how much room it has
            assert "free space or enlarge the disk" in str(error)
            assert "reads and deletes are served" in str(error)
            entry = await kv.get(b"k")
            assert entry is not None
            assert entry.value == b"v" or entry.value == b"too much"
            assert await kv.delete(b"gone")
            for node in cluster.nodes.values():
                leave(node, FREE_BYTES_MIN + 1)
            await trio.sleep(2)
            with pytest.raises(OutOfSpace):  # not before there is a quarter more: else it would flicker
                await kv.put(b"k", b"w")
            for node in cluster.nodes.values():
                leave(node, 2 * FREE_BYTES_MIN)
            await until_taken(kv, b"k")
            for node in cluster.nodes.values():
                node.check()

    simulated(main)


def test_a_disk_that_is_full_at_once_costs_nothing_acknowledged_and_no_node() -> None:
    """Not a byte left, on every node, in the middle of a load: no node ends, reads go on, an election works."""

    async def main() -> None:
        async with world(3, seed=2, storage=STORAGE) as cluster, cluster.client() as kv:
            acknowledged: dict[bytes, bytes] = {}
            for number in range(50):
                key = b"k%03d" % number
                await kv.put(key, bytes(2000))
                acknowledged[key] = bytes(2000)
            for node in cluster.nodes.values():
                leave(node, 0)
            refused = 0
            for number in range(50, 400):
                key, value = b"k%03d" % number, bytes(2000)
                try:
                    await kv.put(key, value)
                    acknowledged[key] = value
                except OutOfSpace:
                    refused += 1
                except OutcomeUnknown:
                    pass  # the leader had room for it still, and no follower had
            assert refused > 100
            for key, value in acknowledged.items():
                entry = await kv.get(key)
                assert entry is not None
                assert entry.value == value
            leader = await cluster.leader_of(kv, b"k000")
            await leader.power_off()
            # A vote and the new leader's first entry have room in the segment that was made ahead.
            entry = await kv.get(b"k000", timeout=20)
            assert entry is not None
            assert all(node.alive or node is leader for node in cluster.nodes.values())
            for node in cluster.nodes.values():
                leave(node, 4 * FREE_BYTES_MIN)
            await leader.start()
            await until_taken(kv, b"after")
            for key, value in acknowledged.items():
                entry = await kv.get(key)
                assert entry is not None, key
                assert entry.value == value, key
            for node in cluster.nodes.values():
                assert node.error is None
                node.check()

    simulated(main, seed=2)


def test_a_node_short_of_room_leads_nothing_while_others_have_room_and_no_write_is_refused() -> None:
    async def main() -> None:
        async with world(3, seed=3, storage=STORAGE) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            leader = await cluster.leader_of(kv, b"k")
            leave(leader, FREE_BYTES_MIN + 100_000)
            with trio.fail_after(10):
                while any(replica.leads for replica in leader.inside.catalog.replicas.values()):
                    await kv.put(b"k", b"on the way")
                    await trio.sleep(0.05)
            leave(leader, FREE_BYTES_MIN // 2 + 100_000)
            await trio.sleep(3)
            await kv.put(b"k", b"elsewhere")
            assert leader.inside.driver.space.low
            assert not any(replica.leads for replica in leader.inside.catalog.replicas.values())
            assert await states(cluster, kv) == {**dict.fromkeys(cluster.nodes, "live"), leader.name: "nearly full"}
            leave(leader, 8 * FREE_BYTES_MIN)
            await trio.sleep(3)
            assert await states(cluster, kv) == dict.fromkeys(cluster.nodes, "live")
            for node in cluster.nodes.values():
                node.check()

    simulated(main, seed=3)


KEYS = [b"k%02d" % number for number in range(9)]


async def spread(cluster: Cluster, kv: Client) -> None:
    """A range for each key, led by three nodes."""
    for key in KEYS[1:]:
        await cluster.ask(kv, Method.SPLIT, key, key=key)
    await until(cluster, lambda: min(len(led(node)) for node in cluster.nodes.values()) >= len(KEYS) // 3)


async def until(cluster: Cluster, holds: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not holds():
            await cluster.sleep(0.5)


def led(node: SimulatedNode) -> list[int]:
    return [int(each.range_id) for each in node.inside.catalog.replicas.values() if each.leads]


def test_writes_go_to_nodes_that_take_them_however_short_of_room_they_are() -> None:
    """Two nodes are short of room, so the third leads all; then that refuses writes, and the two are still short."""

    async def main() -> None:
        async with world(3, seed=4, storage=STORAGE) as cluster, cluster.client() as kv:
            await spread(cluster, kv)
            first, second, third = cluster.nodes.values()
            for node in (first, second):
                leave(node, FREE_BYTES_MIN + FREE_BYTES_MIN // 4)
            await until(cluster, lambda: not led(first) and not led(second))
            leave(third, FREE_BYTES_MIN * 3 // 4)
            await until(cluster, lambda: not led(third))
            for key in KEYS:
                await kv.put(key, b"taken")
            assert {node.inside.driver.space.fullness for node in (first, second)} == {1}

    simulated(main, seed=4)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_node_that_refuses_writes_takes_over_nothing_while_another_takes_them(how: str) -> None:
    async def main() -> None:
        async with world(3, seed=5, storage=STORAGE) as cluster, cluster.client() as kv:
            await spread(cluster, kv)
            going, second, third = cluster.nodes.values()
            leave(third, FREE_BYTES_MIN * 3 // 4)
            await until(cluster, lambda: not led(third))
            await (going.shut_down() if how == "stop" else going.kill())
            for _ in range(20):
                for key in KEYS:
                    await kv.put(key, b"taken")  # OutOfSpace would come out of it
                await trio.sleep(0.1)
            assert len(led(second)) >= len(KEYS)
            assert not led(third)

    simulated(main, seed=5)


LOW, FULL, NOTHING = FREE_BYTES_MIN * 3 // 4, FREE_BYTES_MIN // 4, 0


@pytest.mark.parametrize(
    "left",
    [[LOW] * 3, [NOTHING] * 3, [8 * FREE_BYTES_MIN, FULL, FULL], [LOW, FULL, NOTHING]],
    ids=["low", "nothing", "one has room", "each has less"],
)
def test_a_range_that_splits_while_the_disks_fill_up_has_two_halves_that_serve_reads(left: Sequence[int]) -> None:
    """Whenever they do: nodes that heard of the right half before they had split need no snapshot afterwards.

    They would have no room for it, and the right half, which only its leader believes to have, no quorum.
    """
    for moment in range(-1200, 400, 200):

        async def main(moment: int = moment) -> None:
            async with world(3, seed=6, storage=STORAGE) as cluster, cluster.client() as kv:
                await check_halves_serve_when_filled_up(cluster, kv, moment / 1000, left)

        simulated(main, seed=6)


async def check_halves_serve_when_filled_up(cluster: Cluster, kv: Any, moment: float, left: Sequence[int]) -> None:
    """Leave the nodes so much room so long after a split is asked for, while a client writes; what is read then, and
    after there is room again, is what was written, and every key takes writes again."""
    values = {b"k%02d" % number: {b"old"} for number in range(20)}
    for key in values:
        await kv.put(key, b"old")

    async def fill() -> None:
        await trio.sleep(2 + moment)
        for node, free_bytes in zip(cluster.nodes.values(), left, strict=True):
            leave(node, free_bytes)

    async def split() -> None:
        await trio.sleep(2)
        with suppress(ShardKVError):
            await kv.call(Method.SPLIT, b"k10", key=b"k10", timeout=2)

    async def write() -> None:
        for number in range(100):
            key, value = b"k%02d" % (number % 20), b"%d" % number
            values[key].add(value)
            with suppress(ShardKVError):
                await kv.put(key, value, timeout=1)
                values[key] = {value}
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        for task in (fill, split, write):
            nursery.start_soon(task)
    await trio.sleep(1)

    async def read() -> None:
        for key, possible in values.items():
            entry = await kv.get(key, timeout=5)
            assert entry is not None, key
            assert entry.value in possible, key

    await read()
    for node in cluster.nodes.values():
        assert node.alive
        leave(node, 8 * FREE_BYTES_MIN)
    for key, possible in values.items():
        await until_taken(kv, key)
        possible.add(b"there is room")
    await read()
    for node in cluster.nodes.values():
        node.check()


def test_a_log_write_that_finds_no_room_is_done_again_and_nobody_hears_of_it_before() -> None:
    """The guard is late and there is no spare: the append itself meets the full disk. It is no failed sync."""

    async def main() -> None:
        async with world(3, seed=3, storage=STORAGE) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"old")
            leader = await cluster.leader_of(kv, b"k")
            disk = leader.environment.disk
            full = OutOfSpace("no space left while trying to write the log; free space or enlarge the disk")
            disk.fail("pwrite", full, times=1_000_000, path_part="/wal/")
            disk.fail("allocate", full, times=1_000_000, path_part="/wal/")
            # Its sync does not end, so it gives its leadership away; another node may well take the write in time.
            with suppress(ShardKVError):
                await kv.put(b"k", b"there is room", timeout=2)
            assert leader.alive
            assert leader.error is None
            assert leader.inside.driver.space.full
            await trio.sleep(5)
            assert leader.alive
            assert leader.error is None
            disk._faults.clear()
            await until_taken(kv, b"k")
            await trio.sleep(1)
            assert not leader.inside.driver.space.low
            assert not leader.inside.wal.statistics().failed
            leader.check()
            await leader.power_off()
            await leader.start()
            entry = await kv.get(b"k")
            assert entry is not None
            assert entry.value == b"there is room"

    simulated(main, seed=3)


def test_a_full_follower_holds_up_nobody_and_catches_up_when_it_has_room() -> None:
    """It takes no entries of client data, still hears its leader and votes; the others go on by themselves."""

    async def main() -> None:
        async with world(3, seed=4, storage=STORAGE) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            leader = await cluster.leader_of(kv, b"k")
            follower = next(node for node in cluster.nodes.values() if node is not leader)
            leave(follower, FREE_BYTES_MIN // 4)
            await trio.sleep(1)
            written = follower.inside.wal.statistics().written_bytes
            for number in range(300):
                await kv.put(b"k%03d" % number, bytes(3000))
            assert follower.inside.wal.statistics().written_bytes - written < 300_000
            third = next(node for node in cluster.nodes.values() if node not in (leader, follower))
            leave(follower, 4 * FREE_BYTES_MIN)
            await trio.sleep(10)
            await third.kill()
            entry = await kv.get(b"k299", timeout=20)
            assert entry is not None
            await kv.put(b"with the follower's vote", b"v", timeout=20)
            follower.check()

    simulated(main, seed=4)


@pytest.mark.parametrize("operation", ["sync", "sync_directory"])
def test_a_sync_that_finds_no_room_ends_the_node(operation: str) -> None:
    """Some file systems find out at the sync. That is a failed fsync: the page cache is not to be trusted (trap 10)."""

    async def main() -> None:
        async with world(3, seed=5, storage=STORAGE) as cluster, cluster.client() as kv:
            cluster.tolerant = True
            await kv.put(b"k", b"v")
            leader = await cluster.leader_of(kv, b"k")
            full = OutOfSpace("no space left while trying to sync /x; free space or enlarge the disk")
            leader.environment.disk.fail(operation, full, path_part="/wal")
            for number in range(200):
                await kv.put(b"k%03d" % number, bytes(3000), timeout=20)
                if not leader.alive:
                    break
            with trio.fail_after(10):
                await leader.ended.wait()
            assert isinstance(leader.error, StorageError)
            assert not isinstance(leader.error, OutOfSpace)
            assert "restart the node" in str(leader.error)

    simulated(main, seed=5)


def test_nodes_that_start_on_full_disks_elect_a_leader_and_serve_reads() -> None:
    """Not a byte is left. A start has the room of the log's next segment, made ahead of time, and the reserve stays."""

    async def main() -> None:
        async with world(3, seed=3, storage=STORAGE) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            await trio.sleep(2)
            for node in cluster.nodes.values():
                leave(node, 0)
                await node.kill()
            for node in cluster.nodes.values():
                await node.start()
            for _ in range(3):
                entry = await kv.get(b"k", timeout=20)
                assert entry is not None
                assert entry.value == b"v"
                leader = await cluster.leader_of(kv, b"k")
                await leader.kill()
                await leader.start()
            for node in cluster.nodes.values():
                assert node.error is None
                assert "reserve-1" in node.environment.disk.list(f"/{node.name}/wal")
                leave(node, 0)
                node.check()
            error = await until_refused(kv, b"k")
            assert "reads are served" in str(error)

    simulated(main, seed=3)


@pytest.mark.parametrize("value_bytes", [2_000, 20_000, 200_000])
def test_a_disk_that_is_full_at_once_under_a_load_leaves_room_for_votes(value_bytes: int) -> None:
    """However fast the log is written and however small its segments are: the spare is not for client data."""
    storage = StorageConfig(engine="memory", segment_bytes=64 * 1024, free_bytes_min=FREE_BYTES_MIN)

    async def main(seed: int) -> None:
        async with world(3, seed=seed, storage=storage) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")

            async def write(number: int) -> None:
                for turn in range(200):
                    with suppress(ShardKVError):
                        await kv.put(b"w%d %d" % (number, turn % 5), bytes(value_bytes), timeout=1)

            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(write, number)
                await trio.sleep(0.5 + seed / 40)
                for node in cluster.nodes.values():
                    leave(node, 0)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
            leader = await cluster.leader_of(kv, b"k")
            await leader.power_off()
            entry = await kv.get(b"k", timeout=10)
            assert entry is not None
            for node in cluster.nodes.values():
                leave(node, 8 * FREE_BYTES_MIN)
            await leader.start()
            await until_taken(kv, b"k")
            for node in cluster.nodes.values():
                assert node.error is None
                node.check()

    for seed in range(6):
        simulated(lambda seed=seed: main(seed), seed=seed)
