"""The simulated cluster as tests of the server use it: see :mod:`shardkv.simulation.cluster`."""

from typing import Any

from shardkv.errors import ShardKVError
from shardkv.simulation.cluster import FORMING_SECONDS, PORT, Cluster, SimulatedNode
from shardkv.simulation.cluster import simulated_cluster as world

__all__ = ["FORMING_SECONDS", "PORT", "Cluster", "Recorder", "SimulatedNode", "world"]


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
