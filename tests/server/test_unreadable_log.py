"""A node that cannot read back what its log or its engine holds ends, whoever it was that made it read."""

from typing import Any

import pytest

from shardkv.errors import Corruption, StorageError
from shardkv.server import stores
from shardkv.simulation import run_deterministically, simulated_cluster
from shardkv.simulation.node import SimulatedNode
from shardkv.types import FIRST_RANGE

ADVICE = {"corrupt": "check its disk", "io": "replace the disk"}


def spoil(node: SimulatedNode, how: str) -> None:
    disk = node.environment.disk
    if how == "io":
        disk.fail("pread", StorageError("cannot read the log; the disk reports an error; replace the disk"), times=1000)
    else:
        disk.on_read = lambda path, found: bytes([found[0] ^ 1]) + found[1:] if found else found


@pytest.mark.parametrize("how", ["corrupt", "io"])
def test_a_leader_that_cannot_read_back_an_entry_for_a_follower_ends_and_another_one_leads(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer's message makes it read, so the error comes up in that peer's connection: closing that is no answer.

    The follower would ask again and again, and be without what it lacks for as long as this node leads.
    """
    monkeypatch.setattr(stores, "LOG_CACHE_BYTES_MAX", 0)

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"0")
            leader = await cluster.leader_of(kv, b"k")
            behind = next(node for node in cluster.nodes.values() if node is not leader)
            await behind.kill()
            for number in range(20):
                await kv.put(b"k", b"%d" % number)
            leader = await cluster.leader_of(kv, b"k")
            cluster.tolerates = lambda node, error: node is leader and isinstance(error, StorageError)
            spoil(leader, how)
            await behind.start()
            await cluster.sleep(2)
            assert not leader.alive, "it ends instead of closing the connection of the peer that asks"
            assert isinstance(leader.error, Corruption if how == "corrupt" else StorageError)
            assert ADVICE[how] in str(leader.error), "it says what to do"
            entry = await kv.get(b"k")
            assert entry is not None
            assert entry.value == b"19"
            await kv.put(b"k", b"20")
            assert await cluster.leader_of(kv, b"k") is not leader

    run_deterministically(main, seed=1)


def test_whoever_reads_the_node_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's request may make a leader read as well; its task answers with the error, and must not hide it."""
    monkeypatch.setattr(stores, "LOG_CACHE_BYTES_MAX", 0)

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"0")
            leader = await cluster.leader_of(kv, b"k")
            replica = leader.inside.catalog.replica_for_key(b"k")
            assert replica is not None
            cluster.tolerates = lambda node, error: node is leader and isinstance(error, StorageError)
            await cluster.sleep(1)
            spoil(leader, "corrupt")
            with pytest.raises(Corruption):
                replica.log.entries(replica.log.first_index(), replica.log.last_index() + 1, 1 << 20)
            await cluster.sleep(0.1)
            assert not leader.alive
            assert isinstance(leader.error, Corruption)

    run_deterministically(main, seed=1)


@pytest.mark.parametrize("read", ["leased", "confirmed", "scan"])
def test_a_leader_that_cannot_read_its_engine_ends_and_another_one_answers(read: str) -> None:
    """Two others have the value; told of the error, the client would take it for the cluster's."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            leader = await cluster.leader_of(kv, b"k")
            cluster.tolerates = lambda node, error: node is leader and isinstance(error, Corruption)

            def damaged(*_: object, **__: object) -> Any:
                raise Corruption("engine: reading: a block's checksum does not match; stop the node")

            for name in ("get", "get_many", "scan"):
                setattr(leader.engine, name, damaged)
            if read == "confirmed":
                leader.inside.catalog.replicas[FIRST_RANGE].raft.raft.lease_suspended = True
            if read == "scan":
                found = [entry.value async for entry in kv.scan(b"", None)]
            else:
                entry = await kv.get(b"k")
                found = [] if entry is None else [entry.value]
            assert found == [b"v"]
            assert not leader.alive
            assert "checksum does not match" in str(leader.error)

    run_deterministically(main, seed=1)
