"""What a comparison waits for, and says when it waited in vain. Virtual time; the cluster is a stand-in."""

from typing import Any

import pytest
import trio
import trio.testing

from shardkv_bench import systems, trials
from shardkv_bench.local_cluster import NodeFailed
from shardkv_bench.workloads import key_of


class Client:
    """Of a cluster whose only range has no leader: it answers at once what it knows, and takes no write."""

    async def call(self, *arguments: object, **how: object) -> list[dict[str, Any]]:
        await trio.lowlevel.checkpoint()
        return [{"id": 1, "start": b"", "leader": None, "replicas": [1, 2, 3]}]

    async def put(self, key: bytes, value: bytes, *, timeout: float) -> int:
        await trio.sleep_forever()
        raise AssertionError


async def wait_for_replicas() -> None:
    system = systems.ShardKV.__new__(systems.ShardKV)
    await system._wait_replicas(Client())  # type: ignore[arg-type]


async def probe() -> None:
    await trials._probe(Client())  # type: ignore[arg-type]


def test_a_wait_for_the_cluster_that_is_over_says_for_what() -> None:
    with pytest.raises(NodeFailed, match="not every range has a leader and three replicas after 30 s"):
        trio.run(wait_for_replicas, clock=trio.testing.MockClock(autojump_threshold=0))


def test_probes_write_to_the_range_whose_leader_was_killed() -> None:
    """Later ones went to the next range, whose leader had not died."""
    keys = set()

    class Recording(Client):
        async def put(self, key: bytes, value: bytes, *, timeout: float) -> int:
            keys.add(key)
            return await super().put(key, value, timeout=timeout)

    with pytest.raises(TimeoutError):
        trio.run(trials._probe, Recording(), clock=trio.testing.MockClock(autojump_threshold=0))
    assert keys == {key_of(0)}


def test_a_cluster_that_takes_no_write_is_said_to_be_one() -> None:
    with pytest.raises(TimeoutError, match="shardkv took no write within 30 s"):
        trio.run(probe, clock=trio.testing.MockClock(autojump_threshold=0))
