"""Real disks that stall or fail under running nodes: a kernel that takes a second for a write, and one that says EIO.

Each node's data lie on a block device of their own (``block_devices``). Skipped where the machine makes none for us.
"""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from shardkv.errors import OutcomeUnknown, Unavailable
from shardkv_bench.local_cluster import NODE_COMMAND
from shardkv_client import Client
from tests.cluster.block_devices import BlockDevice, block_devices, obstacle
from tests.cluster.harness import (
    SECONDS_MAX,
    LocalCluster,
    client,
    eventually,
    leader_of,
    node_names,
    ranges_of,
    restart,
    settled,
    transfer,
)

pytestmark = pytest.mark.cluster

OPTIONS = ("--segment-bytes", "4MiB", "--cache-bytes", "4MiB", "--free-bytes-min", "16MiB", "--admin", "127.0.0.1:0")
WRITERS = 4


class World:
    """A cluster whose nodes have a device each."""

    def __init__(self, cluster: LocalCluster, devices: dict[str, BlockDevice]) -> None:
        self.cluster = cluster
        self.devices = devices


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    missing = obstacle(tmp_path)
    if missing:
        pytest.skip(missing)
    directory = tmp_path / "cluster"
    directory.mkdir()
    names = [f"n{number}" for number in range(1, request.param + 1)]
    with block_devices(directory, names) as devices:
        cluster = LocalCluster(directory, nodes=request.param, options=OPTIONS)
        cluster.node_command = [*devices["n1"].enter, *NODE_COMMAND]
        with cluster:
            cluster.start(SECONDS_MAX)
            yield World(cluster, devices)


class Writers:
    """Puts new keys all the time; remembers which were acknowledged."""

    def __init__(self, kv: Client) -> None:
        self.kv = kv
        self.acknowledged: set[bytes] = set()
        self.stopped = False

    async def run(self, writer: int) -> None:
        number = 0
        while not self.stopped:
            key = b"%d/%06d" % (writer, number)
            try:
                await self.kv.put(key, key, timeout=2)
            except (OutcomeUnknown, Unavailable):
                await trio.sleep(0.05)
            else:
                self.acknowledged.add(key)
            number += 1

    async def more(self, what: str) -> None:
        wanted = len(self.acknowledged) + 50

        async def so_many() -> bool:
            return len(self.acknowledged) >= wanted

        await eventually(f"50 more writes are acknowledged {what}", so_many)

    async def check_all_there(self) -> None:
        for key in sorted(self.acknowledged):
            entry = await self.kv.get(key)
            assert entry is not None, key
            assert entry.value == key


async def state_of(kv: Client, name: str) -> str:
    table = (await kv.status())["node_table"]
    return next(row["state"] for row in table if row["name"] == name)


async def given_away(world: LocalCluster, name: str) -> float:
    """How many leaderships others took because of the node's disk."""
    address = re.findall(r'event="admin endpoint".* address=(\S+)', world.processes[name].log.read_text())[-1]

    def metrics() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            return str(answer.read(), "utf-8")

    text = await trio.to_thread.run_sync(metrics)
    found = re.search(r"^shardkv_leaderships_given_away_total (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


@pytest.mark.parametrize("made", [3], indirect=True)
async def test_trap_14_a_leader_whose_disk_really_stalls_gives_its_leaderships_away(made: World) -> None:
    """The kernel lets it write once a second: its syncs take longer than the bound, and nothing fails.

    First it may write a little more often: a disk that goes from quick to standing still holds up the loop with its
    first sync, which costs the leaderships by itself; one that was slow before is synced in a thread, and heartbeats
    go on.
    """
    world = made.cluster
    async with client(world) as kv, trio.open_nursery() as nursery:
        await settled(kv)
        writers = Writers(kv)
        for writer in range(WRITERS):
            nursery.start_soon(writers.run, writer)
        await writers.more("before")
        sick = await leader_of(kv, b"0/")
        number = next(number for number, name in (await node_names(kv)).items() if name == sick)

        async def gave_away() -> bool:
            return await given_away(world, sick) > 0

        async def leads_nothing() -> bool:
            leaders = [leader for _, leader in await ranges_of(kv)]
            return None not in leaders and number not in leaders

        async def stalls() -> bool:
            return await state_of(kv, sick) == "slow disk"

        async def is_well() -> bool:
            return await state_of(kv, sick) == "live"

        with made.devices[sick].slow(world.processes[sick].pid) as limit:
            limit(8)
            await writers.more("by a disk that is a little slow")
            await transfer(kv, b"0/", sick)  # it may have lost the range while it was synced in the loop
            limit(1)
            await eventually(f"{sick} has given something away", gave_away)
            await eventually(f"{sick} leads nothing", leads_nothing)
            await eventually(f"{sick} says that its disk is slow", stalls)
            await writers.more("under other leaders")
        assert "the disk is slow" in world.processes[sick].log.read_text()
        await eventually(f"{sick} is well again", is_well)
        await writers.more("after it")
        writers.stopped = True
        await writers.check_all_there()
    assert world.running == world.names


@pytest.mark.parametrize("made", [1, 3], indirect=True, ids=["one node", "one of three nodes"])
async def test_a_node_whose_sync_really_fails_ends_and_loses_nothing_acknowledged(made: World) -> None:
    """After a failed fsync the page cache says that all is well, and the disk has what it had (trap 10)."""
    world = made.cluster
    async with client(world) as kv, trio.open_nursery() as nursery:
        await settled(kv, len(world.names))
        writers = Writers(kv)
        for writer in range(WRITERS):
            nursery.start_soon(writers.run, writer)
        await writers.more("before")
        sick = await leader_of(kv, b"0/")
        made.devices[sick].break_down()

        async def has_ended() -> bool:
            return sick not in world.running

        await eventually(f"{sick} has ended by itself", has_ended)
        process = world.processes[sick]
        assert process.exit_code not in (0, None)
        assert "replace the disk" in process.stderr_tail()
        if len(world.names) > 1:
            await writers.more("by the others")
        made.devices[sick].repair()
        await restart(world, sick)
        await writers.more("after it")
        writers.stopped = True
        await settled(kv, len(world.names))
        await writers.check_all_there()
