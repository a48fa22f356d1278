"""SIGTERM: leaderships are handed over, clients sent elsewhere, data flushed, and the process ends with 0 in time."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from shardkv_client.client import Client
from tests.cluster.harness import (
    SECONDS_MAX,
    LocalCluster,
    client,
    cluster,
    eventually,
    leader_of,
    restart,
    settled,
    started,
    terminate,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started(tmp_path_factory.mktemp("shutdown")) as running:
        yield running


async def count_up(kv: Client, key: bytes, sums: list[int], stop: trio.Event) -> None:
    while not stop.is_set():
        sums.append(await kv.increment(key))


async def more_than(sums: list[int], count: int) -> None:
    async def enough() -> bool:
        return len(sums) > count

    await eventually(f"more than {count} increments were answered", enough)


async def test_a_leader_that_is_terminated_hands_over_and_ends_with_zero_and_no_client_sees_an_error(
    world: LocalCluster,
) -> None:
    """DESIGN 2.2: SIGTERM drains and stops cleanly. Eight clients' tasks write on without a single error."""
    async with client(world) as kv:
        await settled(kv)
        await kv.put(b"drained", b"1")
        victim = await leader_of(kv, b"drained")
        sums: list[list[int]] = [[] for _ in range(8)]
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(count_up, kv, b"drained/%d" % number, sums[number], stop)
            await more_than(sums[0], 20)
            assert await terminate(world, victim) == 0

            async def led_by_another() -> bool:
                """Whoever is asked may not have heard of it yet."""
                return await leader_of(kv, b"drained") != victim

            await eventually(f"another node than {victim} leads", led_by_another)
            await more_than(sums[0], len(sums[0]) + 20)
            await restart(world, victim)
            await more_than(sums[0], len(sums[0]) + 20)
            stop.set()
        for each in sums:
            assert each == list(range(1, len(each) + 1))


async def test_all_nodes_terminated_at_once_end_with_zero_and_keep_everything(world: LocalCluster) -> None:
    """There is nobody left to hand over to, which must not hold the last ones up."""
    async with client(world) as kv:
        await settled(kv)
        written = {b"stop/%03d" % number: bytes(1000) for number in range(200)}
        await kv.put_many(written)
        codes = await trio.to_thread.run_sync(world.stop, SECONDS_MAX)
        assert codes == dict.fromkeys(world.names, 0)
        await restart(world, *world.names)
        assert len(await kv.get_many(written)) == 200


async def test_a_second_signal_ends_a_node_at_once(tmp_path: Path) -> None:
    """DESIGN 2.2. The peers are frozen, so that the first one has somebody to hand over to, in vain."""
    async with cluster(tmp_path) as world, client(world) as kv:
        await settled(kv)
        await kv.put(b"a", b"1")
        leader = await leader_of(kv, b"a")
        for name in world.names:
            if name != leader:
                world.pause(name)
        process = world.processes[leader]
        # Both at once: before long the leader knows that nobody follows it, and ends by itself.
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            process.signal(number)
        code = await trio.to_thread.run_sync(process.wait, SECONDS_MAX)
        assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        for name in world.names:
            if name != leader:
                world.resume(name)
        assert await kv.put(b"a", b"2") > 0
        await restart(world, leader)
