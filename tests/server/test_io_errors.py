"""A node whose disk reports an error: it stops, says which file and what to do, and starts again without loss.

Every kind of call that a node's life makes on its disk (a first start, a run with rotations and collections, a stop, a
second start) fails in virtual time, one call a run. After a failed fsync the node must not trust the page cache: what
was not synced is lost in one half of the runs, and still there in the other.
"""

import errno
import posixpath
import re
from collections import defaultdict
from functools import cache

import pytest

from shardkv.environment.real.disk import storage_error
from shardkv.errors import StorageError
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.disk import Call
from shardkv.simulation.node import SimulatedNode
from shardkv.storage.wal import Wal
from tests.server.lives import Life, in_a_cluster, live, started

ADVICE = "check the system's log and replace the disk"
CHANGES = ("open", "pwrite", "allocate", "truncate", "sync", "rename", "unlink", "sync_directory")


def kind_of(call: Call) -> str:
    """A call without its numbers."""
    return f"{call.operation} {re.sub('[0-9a-f]{16}|[0-9]+', 'N', posixpath.basename(call.path))}"


@cache
def calls_of_a_life() -> dict[str, list[int]]:
    """The numbers of all calls that change something, by kind, of a life in which nothing fails."""
    trace: list[Call] = []

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        node.environment.disk.trace = trace
        await live(cluster, node, Life())
        assert node.error is None

    in_a_cluster(main)
    kinds: dict[str, list[int]] = defaultdict(list)
    for call in trace:
        if call.operation in CHANGES:
            kinds[kind_of(call)].append(call.number)
    return kinds


KINDS = [
    "allocate N.wal",
    "allocate reserve-N",
    "allocate spare-N",
    "allocate spare-ahead-N",
    "allocate spare-now-N",
    "open N.wal",
    "open identity",
    "open identity.temporary",
    "open log-mark",
    "open log-mark.temporary",
    "open peers",
    "open peers.temporary",
    "open promise",
    "open promise.temporary",
    "open reserve-N",
    "open spare-N",
    "open spare-ahead-N",
    "open spare-now-N",
    "pwrite N.wal",
    "pwrite identity.temporary",
    "pwrite log-mark.temporary",
    "pwrite peers.temporary",
    "pwrite promise.temporary",
    "pwrite spare-N",
    "rename identity.temporary",
    "rename log-mark.temporary",
    "rename peers.temporary",
    "rename promise.temporary",
    "rename spare-N",
    "rename spare-ahead-N",
    "rename spare-now-N",
    "sync N.wal",
    "sync identity.temporary",
    "sync log-mark.temporary",
    "sync peers.temporary",
    "sync promise.temporary",
    "sync spare-N",
    "sync_directory nN",
    "sync_directory wal",
    "truncate identity.temporary",
    "truncate log-mark.temporary",
    "truncate peers.temporary",
    "truncate promise.temporary",
    "truncate reserve-N",
    "truncate spare-ahead-N",
    "truncate spare-now-N",
    "unlink N.wal",
    "unlink spare-ahead-N",
]


def test_the_life_makes_every_kind_of_call() -> None:
    assert set(KINDS) == set(calls_of_a_life())


def check_life_with_a_failing_call(number: int, *, power: bool) -> None:
    """One run: the call fails, the node ends and says why; started again it has everything that it acknowledged."""
    life = Life()

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        cluster.tolerant = True
        failed: list[Call] = []
        die = node._die
        node._die = lambda **how: die(**{**how, "power": power})  # type: ignore[method-assign]

        def fail(call: Call) -> None:
            if call.number == number:
                failed.append(call)
                raise storage_error(OSError(errno.EIO, "Input/output error"), call.operation, call.path)

        node.environment.disk.on_call = fail
        await live(cluster, node, life)
        assert failed, f"there was no call {number}"
        what = f"call {number}, {kind_of(failed[0])}"
        assert not node.alive, f"{what} failed, and the node went on"
        assert isinstance(node.error, StorageError), what
        assert failed[0].path in str(node.error), what
        assert ADVICE in str(node.error), what
        node.environment.disk.on_call = None
        await node.start()
        await life.check_all_there(cluster)
        node.check()

    in_a_cluster(main)


@pytest.mark.parametrize("kind", KINDS)
def test_an_io_error_ends_the_node_with_advice_and_costs_nothing_acknowledged(kind: str) -> None:
    """TRAPS 10 and DESIGN 4.3: a failed write or fsync is final. The first and the last call of each kind, and some of
    those in between."""
    numbers = calls_of_a_life()[kind]
    chosen = {numbers[0], numbers[-1], *(numbers[len(numbers) * part // 4] for part in (1, 2, 3) if len(numbers) > 20)}
    for position, number in enumerate(sorted(chosen)):
        check_life_with_a_failing_call(number, power=position % 2 == 0)


@pytest.mark.parametrize("by", ["the engine", "the log", "both"])
def test_what_ended_the_node_is_said_though_closing_fails_too(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dying disk fails the engine's last flush as well, and that says nothing of what happened."""

    def refuse(*_: object) -> None:
        raise StorageError("closing: fails too")

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        cluster.tolerant = True
        if by != "the log":
            monkeypatch.setattr(node.engine, "close", refuse)
        if by != "the engine":
            monkeypatch.setattr(Wal, "close", refuse)
        assert await started(node)

        def fail(call: Call) -> None:
            if call.operation == "sync":
                raise storage_error(OSError(errno.EIO, "Input/output error"), call.operation, call.path)

        node.environment.disk.on_call = fail
        await Life().write(cluster, node, 1)
        assert not node.alive
        assert "cannot sync " in str(node.error)
        assert ADVICE in str(node.error)
        node.environment.disk.on_call = None

    in_a_cluster(main)


def test_a_clean_stop_says_so_when_closing_fails_and_closes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def refuse(*_: object) -> None:
        closed.append("log")
        raise StorageError("closing: fails")

    async def main(cluster: Cluster, node: SimulatedNode) -> None:
        cluster.tolerant = True
        monkeypatch.setattr(Wal, "close", refuse)
        monkeypatch.setattr(node.engine, "close", lambda: closed.append("engine"))
        assert await started(node)
        await node.shut_down()
        assert str(node.error) == "closing: fails"
        assert closed == ["log", "engine"]

    in_a_cluster(main)
