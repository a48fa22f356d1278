"""A cluster that grows, splits, spreads its leaders, and brings replicas that were away up to date."""

import itertools
import shutil
from pathlib import Path

import pytest
import trio

from shardkv.multiraft.maintenance import ENTRIES_KEPT
from shardkv.wire.requests import Method
from shardkv_client.client import Client
from tests.cluster.harness import (
    SECONDS_MAX,
    LocalCluster,
    client,
    cluster,
    eventually,
    kill,
    leader_of,
    node_names,
    ranges_of,
    restart,
    settled,
    transfer,
)

pytestmark = pytest.mark.cluster

RANGES = 8
KEYS = 500
"""Of about 920 bytes each with their values: too much for fewer ranges."""
SMALL_SPLIT = ("--split-bytes", "64KiB")


async def serves_itself(world: LocalCluster, name: str, written: dict[bytes, bytes]) -> None:
    """Wait until the node, asked alone and for what it has itself, has every key."""
    async with client(world, addresses=world.addresses[name]) as direct:

        async def whole() -> bool:
            entries = await direct.get_many(written, consistency="stale")
            return {key: entry.value for key, entry in entries.items()} == written

        await eventually(f"{name} holds everything", whole)


async def log_begins(kv: Client, range_id: int = 1) -> int:
    """Flush the engine and compact the range's log at its leader; the index at which the log begins."""
    answer = await kv.call(Method.SNAPSHOT, range_id, range_id=range_id)
    return int(answer["log_begins"])


async def test_a_new_cluster_grows_from_one_replica_to_three_as_nodes_join(tmp_path: Path) -> None:
    """DESIGN 4.10: one node serves at once; with two more, every range has three voters; what was written stays."""
    async with cluster(tmp_path, start=False) as world:
        world.start_node("n1")
        await trio.to_thread.run_sync(world.wait_ready, ["n1"], SECONDS_MAX)
        async with client(world, addresses=world.addresses["n1"]) as kv:
            written = {b"early/%03d" % number: b"%d" % number for number in range(200)}
            assert await kv.put_many(written) == 200
            assert [len(each.replicas) for each, _ in await ranges_of(kv)] == [1, 1]
            await restart(world, "n2")
            assert await kv.put(b"with two nodes", b"1") > 0
            await restart(world, "n3")
            await settled(kv, 3)
            for name in world.names:
                await serves_itself(world, name, written)
            assert sorted((await node_names(kv)).values()) == ["n1", "n2", "n3"]


async def test_ranges_split_by_size_their_leaders_spread_evenly_and_a_node_that_was_away_catches_up(
    tmp_path: Path,
) -> None:
    """DESIGN 4.9 and 4.10: data written around the splits is all there, on every node, also on one that slept."""
    async with cluster(tmp_path, options=SMALL_SPLIT) as world, client(world) as kv:
        await settled(kv)
        leader = await leader_of(kv, b"")
        sleeper = next(name for name in world.names if name != leader)
        await kill(world, sleeper)
        written: dict[bytes, bytes] = {}
        batches = itertools.count()

        async def enough_ranges() -> bool:
            """Write on, around the splits: over and over the same keys, however long the splits take."""
            batch = next(batches)
            numbers = range(50 * batch % KEYS, 50 * batch % KEYS + 50)
            more = {b"key/%06d" % number: b"%d " % batch * 300 for number in numbers}
            assert await kv.put_many(more) == len(more)
            written.update(more)
            return len(written) == KEYS and len(await kv.ranges()) >= RANGES

        await eventually("the ranges have split", enough_ranges)
        assert [entry.key async for entry in kv.scan(prefix=b"key/", keys_only=True)] == sorted(written)
        await restart(world, sleeper)
        await settled(kv)
        await serves_itself(world, sleeper, written)

        async def spread() -> bool:
            leaders = [leader for _, leader in await kv.ranges()]
            counts = sorted(leaders.count(node_id) for node_id in await node_names(kv))
            return counts[-1] - counts[0] <= 1 and sum(counts) == len(leaders)

        await eventually("every range has a leader, and these are spread evenly", spread)
        entries = await kv.get_many(written)
        assert len(entries) == len(written)

        async def all_listed() -> bool:
            """A range that has just split off is listed once the placement group has heard of it."""
            spans = [each.span for each, _ in await kv.ranges()]
            follow = all(left.end == right.start for left, right in itertools.pairwise(spans))
            return follow and spans[0].start == b"" and spans[-1].end is None

        await eventually("every key has its range, and each only one", all_listed)


async def away_until_the_log_is_cut(world: LocalCluster, kv: Client, name: str) -> dict[bytes, bytes]:
    """Write, while a node is down, until the leader's log has let go of what that node needs. What was written."""
    await settled(kv)
    if await leader_of(kv, b"snap/") == name:
        await transfer(kv, b"snap/")
    status = await kv.call(Method.SNAPSHOT, 1, range_id=1)
    await kill(world, name)
    # More bytes than a leader keeps for followers that lag, and behind them more entries than it always keeps.
    written = {b"snap/big/%03d" % number: bytes([number]) * 500_000 for number in range(40)}
    await kv.put_many(written)
    for number in range(ENTRIES_KEPT + 50):
        written[b"snap/%05d" % number] = b"%d" % number * 50
        await kv.put(b"snap/%05d" % number, written[b"snap/%05d" % number])

    async def cut() -> bool:
        return await log_begins(kv) > int(status["applied"]) + 1

    await eventually("the log is cut", cut)
    return written


async def test_a_node_that_is_behind_the_log_gets_a_snapshot_and_serves_afterwards(tmp_path: Path) -> None:
    """DESIGN 4.3; then both others die in turn, so that what it got is what answers."""
    async with cluster(tmp_path) as world, client(world) as kv:
        written = await away_until_the_log_is_cut(world, kv, "n3")
        await restart(world, "n3")
        await serves_itself(world, "n3", written)
        await settled(kv)
        for victim in ("n1", "n2"):
            await kill(world, victim)
            entries = await kv.get_many(written)
            assert {key: entry.value for key, entry in entries.items()} == written
            await kv.put(b"without " + victim.encode(), b"1")
            await restart(world, victim)
            await settled(kv)


async def test_trap_19_a_node_killed_while_it_installs_a_snapshot_recovers(tmp_path: Path) -> None:
    """DESIGN 4.3: a replica found with the mark asks for its snapshot again. Killed while the file comes in, then as
    soon as the engine has taken it; in the end it has everything."""
    # Slow enough to be seen on its way.
    options = ("--snapshot-send-bytes-per-second", "4MiB")
    async with cluster(tmp_path, options=options) as world, client(world) as kv:
        written = await away_until_the_log_is_cut(world, kv, "n3")
        incoming = world.directory / "n3" / "ingest"

        async def arriving() -> bool:
            return incoming.exists() and any(incoming.iterdir())

        async def taken() -> bool:
            return not await arriving()

        for moment in ("coming in", "coming in again", "taken"):
            # What a crash left there goes at the start, and is no sign of a new one.
            await trio.to_thread.run_sync(shutil.rmtree, incoming, True)
            world.start_node("n3")
            await eventually(f"a snapshot is {moment}", arriving)
            if moment == "taken":
                await eventually("the engine has the file", taken)
            await kill(world, "n3")
            assert await taken() is (moment == "taken"), f"it was not killed with a snapshot {moment}"
        await restart(world, "n3")
        await serves_itself(world, "n3", written)
        await settled(kv)
