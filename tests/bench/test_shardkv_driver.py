"""The driver of shardkv: what it counts, and when it makes what it writes. The client is a stand-in; no cluster."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest
import trio
import trio.testing

from shardkv_bench import shardkv_driver, workloads
from shardkv_bench.worker import Measurement, Task

TASK = Task("shardkv", "run", "", "write", 1_000, 100, inflight=8, connections=4, warmup_seconds=0.01, seconds=0.02)


class Client:
    """Answers after a millisecond of virtual time."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.written: dict[bytes, bytes] = {}

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def get(self, key: bytes) -> bytes | None:
        await trio.sleep(0.001)
        return self.written.get(key)

    async def put(self, key: bytes, value: bytes) -> int:
        await trio.sleep(0.001)
        self.written[key] = value
        return 1


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The only client of a driver, and in its log what happened: ``value`` made, ``go`` said."""
    client = Client([])

    class Random(workloads.Random):
        def randbytes(self, n: int) -> bytes:
            client.log.append("value")
            return super().randbytes(n)

    monkeypatch.setattr(workloads, "Random", Random)
    monkeypatch.setattr(shardkv_driver, "connect", lambda addresses: client)
    monkeypatch.setattr(shardkv_driver, "wait_for_go", lambda: client.log.append("go"))
    yield client


def driven(**changes: Any) -> Measurement:
    task = Task(**{**{name: getattr(TASK, name) for name in Task.__slots__}, **changes})
    return trio.run(shardkv_driver._run, task, clock=trio.testing.MockClock(autojump_threshold=0))


def test_values_are_made_once_and_before_operations_begin(client: Client) -> None:
    """Each lane made its own: 256 lanes took longer than the warm-up, and large values all memory."""
    driven(inflight=64)
    assert client.log == ["value"] * workloads.VALUES_MAX + ["go"]


def test_large_values_are_fewer() -> None:
    assert len(workloads.values_of(100)) == len(set(workloads.values_of(100))) == workloads.VALUES_MAX
    large = workloads.values_of(1 << 20)
    assert 1 < len(large) * (1 << 20) <= workloads.VALUES_BYTES_MAX
    assert len(workloads.values_of(workloads.VALUES_BYTES_MAX + 1)) == 1
    assert len(workloads.values_of(0)) == workloads.VALUES_MAX
