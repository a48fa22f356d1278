"""The simulated cluster as tests of the server use it: see :mod:`shardkv.simulation.cluster`."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs

from shardkv.config import StorageConfig
from shardkv.errors import ShardKVError
from shardkv.simulation.cluster import PORT, Cluster
from shardkv.simulation.cluster import simulated_cluster as world
from shardkv.simulation.disk import CAPACITY_BYTES
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.patience import FORMING_SECONDS
from shardkv.storage.memory import MemoryEngine
from shardkv.wire.requests import Request

__all__ = [
    "FORMING_SECONDS",
    "FREE_BYTES_MIN",
    "MIB",
    "PORT",
    "STORAGE",
    "Cluster",
    "Recorder",
    "SimulatedNode",
    "ask",
    "heard",
    "leave",
    "lose_engine",
    "three_nodes",
    "world",
]

MIB = 1024 * 1024
FREE_BYTES_MIN = 2 * MIB
STORAGE = StorageConfig(engine="memory", segment_bytes=256 * 1024, free_bytes_min=FREE_BYTES_MIN)


class Recorder:
    """A requester that remembers what it was told."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: ShardKVError | None = None
        self.count = 0

    def answer(self, request_id: int, result: Any) -> None:
        self.result = result
        self.count += 1

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self.error = error
        self.count += 1

    @property
    def later(self) -> "Recorder":
        return self

    @property
    def crowded(self) -> bool:
        return False

    def fits(self, answer_bytes: int) -> bool:
        return True

    def offer(self, request_id: int, result: Any) -> int:
        self.answer(request_id, result)
        return 0


async def ask(node: SimulatedNode, method: int, *arguments: Any, range_id: int = 1, timestamp: int = 0) -> Recorder:
    """Hand a request to a node's dispatcher as its connections do; who was answered."""
    inside = node.inside
    recorder = Recorder()
    replica = inside.catalog.replicas.get(range_id)
    generation = replica.machine.descriptor.epoch.span if replica is not None and replica.machine else 0
    request = Request(1, method, range_id, generation, timestamp, list(arguments))
    inside.listener._requests.dispatch(recorder, request)
    return recorder


def leave(node: SimulatedNode, free_bytes: int) -> None:
    """Somebody else fills the node's disk up to so much."""
    disk = node.environment.disk
    disk.capacity_bytes = CAPACITY_BYTES
    disk.capacity_bytes = CAPACITY_BYTES - disk.free_bytes("/") + free_bytes


def lose_engine(node: SimulatedNode) -> None:
    """Somebody deletes the engine of a node that is down, and leaves the log."""
    node.engine = MemoryEngine(crashable=True)


@contextmanager
def heard() -> Iterator[list[Any]]:
    """What nodes that are started in this context log."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(20))
    try:
        with capture_logs() as lines:
            yield lines
    finally:
        structlog.reset_defaults()


@asynccontextmanager
async def three_nodes() -> AsyncIterator[tuple[Cluster, list[Any]]]:
    """A formed cluster, and what its nodes log from then on."""
    with heard() as lines:
        async with world(seed=1) as cluster:
            lines.clear()
            yield cluster, lines
