"""The driver of shardkv: what it counts, and when it makes what it writes. The client is a stand-in; no cluster."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import pytest
import trio
import trio.testing

from shardkv.errors import OutcomeUnknown
from shardkv_bench import shardkv_driver, workloads
from shardkv_bench.worker import ABSENT, Measurement, Task

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

    @asynccontextmanager
    async def scan(self, start: bytes, end: bytes | None, *, limit: int) -> AsyncIterator[AsyncIterator[bytes]]:
        async def entries() -> AsyncIterator[bytes]:
            for key in sorted(key for key in self.written if start <= key < (end or b"\xff"))[:limit]:
                yield key

        await trio.sleep(0.001)
        yield entries()

    async def put(self, key: bytes, value: bytes) -> int:
        await trio.sleep(0.001)
        self.written[key] = value
        return 1


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """The only client of a driver. Its log says when values were made (``value``) and the parent said ``go``."""
    client = Client([])

    class Random(workloads.Random):
        def randbytes(self, n: int) -> bytes:
            client.log.append("value")
            return super().randbytes(n)

    monkeypatch.setattr(workloads, "Random", Random)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(trio.current_time() * 1e9))
    monkeypatch.setattr(shardkv_driver, "connect", lambda addresses: client)
    monkeypatch.setattr(shardkv_driver, "wait_for_go", lambda: client.log.append("go"))
    return client


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


def test_a_stall_that_outlasts_the_measurement_is_seen_in_the_latencies(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who still waited was dropped, and the longest latency was that of before."""
    put = client.put

    async def stalls(key: bytes, value: bytes) -> int:
        if "go" in client.log and len(client.written) > 50:
            await trio.sleep_forever()
        return await put(key, value)

    monkeypatch.setattr(client, "put", stalls)
    found = driven(warmup_seconds=0.0, seconds=1.0)
    assert found.histogram.count == found.ops + TASK.inflight
    assert found.histogram.maximum > 0.9e9
    assert not found.errors


@pytest.mark.parametrize("workload", ["read", "c", "d", "e", "f"])
def test_a_record_that_is_not_there_is_no_success(client: Client, workload: str) -> None:
    """Where nothing was loaded, what is found missing costs less than what was asked."""
    absent = driven(workload=workload, records=1_000)
    assert absent.errors[ABSENT] > 0
    if workload not in "de":  # whose inserts succeed
        assert absent.ops == 0
    client.written |= {workloads.key_of(record): b"v" for record in range(1_000)}
    loaded = driven(workload=workload, records=1_000, seed=2)
    assert loaded.ops > 0
    assert not loaded.errors


def test_a_scan_that_misses_records_is_no_success(client: Client) -> None:
    client.written |= {workloads.key_of(record): b"v" for record in range(50)}
    found = driven(workload="e", records=100)
    assert found.errors[ABSENT] > found.ops


def test_scans_keep_to_the_keys_of_the_load_generator(client: Client) -> None:
    """On a cluster that holds other data, too: what comes behind is not measured, nor taken for records."""
    client.written |= {b"bench0%d" % number: b"v" for number in range(100)}
    found = driven(workload="e", records=1_000)
    assert found.errors[ABSENT] > 0


def test_inserts_that_overtake_each_other_are_not_read_before_they_are_there(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YCSB D: the newest of the records that are there is the most popular."""
    put, number = client.put, 0

    async def slow_at_times(key: bytes, value: bytes) -> int:
        nonlocal number
        number += 1
        if number % 2:
            await trio.sleep(0.01)
        if number % 7 == 0:
            raise OutcomeUnknown("its answer was lost")
        return await put(key, value)

    monkeypatch.setattr(client, "put", slow_at_times)
    client.written |= {workloads.key_of(record): b"v" for record in range(1_000)}
    found = driven(workload="d", seconds=0.3)
    assert found.errors.keys() == {"OutcomeUnknown"}
    assert len(client.written) > 1_000
