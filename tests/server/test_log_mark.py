"""A node notes how far its log is on disk, so that a start tells a log that has lost its end from one that a crash cut
off in the middle of a record.
"""

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import Corruption, OutOfSpace
from shardkv.multiraft.maintenance import IDLE_MEASURES, INTERVAL_SECONDS, MARK_SECONDS
from shardkv.simulation.disk import SimulatedDisk
from shardkv.simulation.node import SimulatedNode
from tests.server.world import world

NOTED_SECONDS = MARK_SECONDS + 2 * IDLE_MEASURES * INTERVAL_SECONDS
"""After this what was written is noted, also by a node with nothing more to do."""
LOG, MARK = "/n1/wal", "/n1/log-mark"

STOPPED, LATER, TWICE = "stopped", "powered off a while after the last write", "powered off twice"


def log_of(disk: SimulatedDisk) -> dict[str, bytes]:
    return {name: disk.read(f"{LOG}/{name}") for name in disk.list(LOG)}


def put_log(disk: SimulatedDisk, files: dict[str, bytes]) -> None:
    for name in disk.list(LOG):
        disk.unlink(f"{LOG}/{name}")
    for name, data in files.items():
        file = disk.open(f"{LOG}/{name}", create=True)
        file.pwrite(data, 0)
        file.sync()
        file.close()


def everything(batches: int) -> int:
    return batches


async def end(node: SimulatedNode, how: str) -> None:
    if how == STOPPED:
        await node.shut_down()
    elif how == LATER:
        await trio.sleep(NOTED_SECONDS)
        await node.power_off(kept_batches=everything)
    else:
        await node.power_off(kept_batches=everything)
        await node.start()
        await node.power_off(kept_batches=everything)


@pytest.mark.parametrize("how", [STOPPED, LATER, TWICE])
async def test_a_node_whose_log_is_an_older_copy_is_not_started(autojump_clock: MockClock, how: str) -> None:
    """It took the loss for a torn tail, and would have voted again, and acknowledged what it no longer had."""
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        older = log_of(node.environment.disk)
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        await end(node, how)
        newer = log_of(node.environment.disk)
        put_log(node.environment.disk, older)
        for _ in range(2):
            with pytest.raises(Corruption, match=r"or this is an older copy\. Put back what was there"):
                await node.run_to_its_end()
        put_log(node.environment.disk, newer)
        await node.start()
        async with cluster.client() as kv:
            assert await kv.get(b"k") is not None


async def test_a_log_taken_away_under_a_node_ends_it_and_every_start_after_it(autojump_clock: MockClock) -> None:
    """The node ends within a second; its supervisor starts it again."""
    async with world(1) as cluster:
        cluster.tolerant = True
        node = cluster.nodes["n1"]
        older = log_of(node.environment.disk)
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        put_log(node.environment.disk, older)
        with trio.fail_after(5):
            await node.ended.wait()
        assert "was removed" in str(node.error)
        with pytest.raises(Corruption, match="or this is an older copy"):
            await node.run_to_its_end()


async def test_a_full_disk_keeps_no_node_from_starting_or_stopping(autojump_clock: MockClock) -> None:
    async with world(1) as cluster, cluster.client() as kv:
        node = cluster.nodes["n1"]
        await kv.put(b"k", b"v")
        await node.kill(kept_batches=everything)
        before = node.environment.disk.read(MARK)
        node.environment.disk.fail("pwrite", OutOfSpace("full"), times=1_000, path_part=MARK)
        await node.start()
        await trio.sleep(NOTED_SECONDS)
        assert node.serving
        await node.shut_down()
        assert node.error is None
        assert node.environment.disk.read(MARK) == before
        node.environment.disk.mend()
        await node.start()
        assert node.environment.disk.read(MARK) != before
