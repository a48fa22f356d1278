"""Drives shardkv through its public Python client: what a user's program would pay, this pays.

Each of ``inflight`` lanes does one operation after another; lanes share ``connections`` clients.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import trio

from shardkv.errors import ShardKVError
from shardkv_bench.worker import ABSENT, Measurement, Task, wait_for_go
from shardkv_bench.workloads import KEYS_END, WORKLOADS, Kind, Operation, Plan, key_of, values_of

if TYPE_CHECKING:
    from shardkv_client import Client

BULK_KEYS: Final = 1_000
"""Keys of one ``put_many`` of the bulk workload."""


def connect(addresses: str) -> "contextlib.AbstractAsyncContextManager[Client]":
    """A client. Imported here, for what only drives etcd needs none."""
    import shardkv_client

    return shardkv_client.connect(addresses)


def perform(task: Task) -> Measurement:
    """Do what the task says. Errors of single operations are counted, others escape."""
    return trio.run(_load if task.action == "load" else _run, task)


async def _run(task: Task) -> Measurement:
    plan = Plan(WORKLOADS[task.workload], task.records, task.seed, task.process, task.processes)
    measurement = Measurement()
    values = values_of(task.value_bytes)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connect(task.addresses))
            for _ in range(min(task.connections, task.inflight))
        ]
        for client in clients:
            await client.get(key_of(0))
        wait_for_go()
        started = [time.perf_counter_ns()] * task.inflight
        async with trio.open_nursery() as nursery:
            for lane in range(task.inflight):
                perform_kind = _performers(clients[lane % len(clients)], plan, values, task)
                nursery.start_soon(_lane, lane, started, plan, perform_kind, measurement)
            await trio.sleep(task.warmup_seconds)
            measurement.begin()
            await trio.sleep(task.seconds)
            measurement.end(started)
            nursery.cancel_scope.cancel()
    return measurement


async def _lane(
    lane: int,
    started: list[int],
    plan: Plan,
    perform_kind: dict[Kind, Callable[[Operation], Awaitable[int]]],
    measurement: Measurement,
) -> None:
    """One operation after another. ``started`` has when each lane's newest began."""
    next_operation, clock, done = plan.next, time.perf_counter_ns, measurement.done
    while True:
        operation = next_operation()
        started[lane] = clock()
        try:
            count = await perform_kind[operation.kind](operation)
        except ShardKVError as error:
            if operation.kind is Kind.INSERT:
                plan.not_inserted(operation.record)
            measurement.failed(type(error).__name__)
        else:
            if count:
                done(started[lane], count)
            else:
                measurement.failed(ABSENT)


def _performers(
    client: "Client", plan: Plan, values: list[bytes], task: Task
) -> dict[Kind, Callable[[Operation], Awaitable[int]]]:
    """A function for each kind of operation; it returns how many operations that was, 0 without a record."""

    async def read(operation: Operation) -> int:
        return 0 if await client.get(key_of(operation.record)) is None else 1

    async def update(operation: Operation) -> int:
        await client.put(key_of(operation.record), values[operation.record % len(values)])
        return 1

    async def insert(operation: Operation) -> int:
        await client.put(key_of(operation.record), values[operation.record % len(values)])
        plan.inserted(operation.record)
        return 1

    async def scan(operation: Operation) -> int:
        missing = min(operation.scan_records, plan.records - operation.record)
        async with client.scan(key_of(operation.record), KEYS_END, limit=operation.scan_records) as entries:
            async for _ in entries:
                missing -= 1
        return 0 if missing > 0 else 1

    async def read_modify_write(operation: Operation) -> int:
        key = key_of(operation.record)
        if await client.get(key) is None:
            return 0
        await client.put(key, values[operation.record % len(values)])
        return 1

    async def bulk(operation: Operation) -> int:
        records = ((operation.record + number) % task.records for number in range(BULK_KEYS))
        await client.put_many([(key_of(record), values[record % len(values)]) for record in records])
        return BULK_KEYS

    return {
        Kind.READ: read,
        Kind.UPDATE: update,
        Kind.INSERT: insert,
        Kind.SCAN: scan,
        Kind.READ_MODIFY_WRITE: read_modify_write,
        Kind.BULK: bulk,
    }


async def _load(task: Task) -> Measurement:
    """Write every record once with ``put_many``. Errors escape: a half-loaded run would measure something else."""
    measurement = Measurement()
    values = values_of(task.value_bytes)
    async with connect(task.addresses) as client:
        await client.get(key_of(0))
        wait_for_go()
        measurement.begin()
        await client.put_many(pairs_of(range(task.process, task.records, task.processes), values))
        measurement.done(time.perf_counter_ns())
        measurement.end()
    measurement.ops = len(range(task.process, task.records, task.processes))
    return measurement


def pairs_of(records: range, values: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for record in records:
        yield key_of(record), values[record % len(values)]
