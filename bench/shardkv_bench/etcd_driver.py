"""Drives etcd with as little client work as possible: packed requests, a poll loop, no task for an operation.

So what limits an etcd run is etcd. Only puts, linearizable gets and bulk loads: what both systems have.
"""

import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from shardkv_bench import grpc_wire
from shardkv_bench.worker import ABSENT, Measurement, Task, wait_for_go
from shardkv_bench.workloads import WORKLOADS, Kind, Plan, key_of, values_of

TRANSACTION_PUTS: Final = 128
"""etcd's default limit of operations in one transaction."""
LOAD_TRANSACTIONS: Final = 16
"""Transactions that a load has under way; more did not make it faster."""
RECEIVE_BYTES: Final = 1 << 18
POLL_MS: Final = 20

Source = Callable[[], tuple[str, bytes, int] | None]
"""The next call as (path, message, operations in it), or None when there is nothing more to do."""


class _Connection:
    """A non-blocking connection with some calls under way."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.calls = grpc_wire.Calls(address)
        self.under_way: dict[int, tuple[int, int]] = {}
        """Stream number to (start in ns, operations)."""
        self.owed = 0
        """Calls that are to be started once the server's window takes them."""
        self._following: tuple[str, bytes, int] | None = None
        """The first of them."""

    def start(self, source: Source, count: int) -> bool:
        """Start ``count`` more calls, as far as the window goes; False when the source has no more."""
        clock = time.perf_counter_ns
        self.owed += count
        while self.owed:
            following = self._following or source()
            if following is None:
                self.owed = 0
                return False
            path, message, operations = following
            if not self.calls.fits(message):
                self._following = following
                return True
            self._following = None
            self.owed -= 1
            self.under_way[self.calls.call(path, message)] = (clock(), operations)
        return True

    def send(self) -> bool:
        """Send what fits; whether all of it did."""
        outgoing = self.calls.outgoing
        while outgoing:
            try:
                del outgoing[: self.socket.send(outgoing)]
            except BlockingIOError:
                return False
        return True

    def receive(self) -> Iterator[tuple[tuple[int, int], bytes | None]]:
        """The calls that ended, with what :meth:`start` noted of each and its answer."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise grpc_wire.CallsRefused("the server closed the connection")
        for stream, answer in self.calls.feed(data):
            noted = self.under_way.pop(stream, None)
            if noted is not None:
                yield noted, answer


def perform(task: Task) -> Measurement:
    """Do what the task says."""
    return _load(task) if task.action == "load" else _run(task)


def _run(task: Task) -> Measurement:
    plan = Plan(WORKLOADS[task.workload], task.records, task.seed, task.process, task.processes)
    values = values_of(task.value_bytes)
    next_operation = plan.next
    if task.workload == "bulk":
        source: Source = lambda: (  # noqa: E731
            grpc_wire.TXN_PATH,
            _transaction(next_operation().record, task, values),
            TRANSACTION_PUTS,
        )
    else:

        def source() -> tuple[str, bytes, int]:
            operation = next_operation()
            key = key_of(operation.record)
            if operation.kind is Kind.READ:
                return grpc_wire.RANGE_PATH, grpc_wire.range_request(key), 1
            return grpc_wire.PUT_PATH, grpc_wire.put_request(key, values[operation.record % len(values)]), 1

    measurement = Measurement()
    connections = _connect(task)
    wait_for_go()
    loop = _Loop(connections, source, measurement, reads=task.workload == "read")
    loop.fill(task.inflight)
    loop.run(time.perf_counter() + task.warmup_seconds)
    measurement.begin()
    loop.run(time.perf_counter() + task.seconds)
    measurement.end(loop.under_way())
    loop.close()
    return measurement


def _transaction(first: int, task: Task, values: list[bytes]) -> bytes:
    records = [(first + number) % task.records for number in range(TRANSACTION_PUTS)]
    return grpc_wire.put_transaction([(key_of(record), values[record % len(values)]) for record in records])


def _load(task: Task) -> Measurement:
    values = values_of(task.value_bytes)
    records = range(task.process, task.records, task.processes)
    starts = iter(range(0, len(records), TRANSACTION_PUTS))

    def source() -> tuple[str, bytes, int] | None:
        start = next(starts, None)
        if start is None:
            return None
        piece = records[start : start + TRANSACTION_PUTS]
        pairs = [(key_of(record), values[record % len(values)]) for record in piece]
        return grpc_wire.TXN_PATH, grpc_wire.put_transaction(pairs), len(pairs)

    measurement = Measurement()
    connections = _connect(task)
    wait_for_go()
    measurement.begin()
    loop = _Loop(connections, source, measurement)
    loop.fill(LOAD_TRANSACTIONS)
    loop.run(None)
    measurement.end()
    loop.close()
    if measurement.errors:
        raise grpc_wire.CallsRefused(f"loading failed: {dict(measurement.errors)}")
    return measurement


def _connect(task: Task) -> list[_Connection]:
    addresses = task.addresses.split(",")
    wanted = task.connections if task.action == "load" else min(task.connections, task.inflight)
    return [_Connection(addresses[number % len(addresses)]) for number in range(wanted)]


class _Loop:
    """Keeps calls under way: for each that ends, one begins. ``reads`` says that each is to find a record."""

    def __init__(
        self, connections: list[_Connection], source: Source, measurement: Measurement, *, reads: bool = False
    ) -> None:
        self._source = source
        self._reads = reads
        self._measurement = measurement
        self._by_descriptor = {connection.socket.fileno(): connection for connection in connections}
        self._poll = select.poll()
        for descriptor in self._by_descriptor:
            self._poll.register(descriptor, select.POLLIN)

    def fill(self, inflight: int) -> None:
        """Start ``inflight`` calls, spread over the connections."""
        connections = list(self._by_descriptor.values())
        for number, connection in enumerate(connections):
            connection.start(self._source, len(range(number, inflight, len(connections))))
            self._send(connection)

    def run(self, until: float | None) -> None:
        """Carry on until that moment of the performance counter, or until the source is empty and all is answered."""
        measurement = self._measurement
        exhausted = False
        while until is None or time.perf_counter() < until:
            connections = self._by_descriptor.values()
            if until is None and exhausted and not any(each.under_way or each.owed for each in connections):
                return
            for descriptor, _ in self._poll.poll(POLL_MS):
                connection = self._by_descriptor[descriptor]
                ended = 0
                for (started, operations), answer in connection.receive():
                    ended += 1
                    if answer is None:
                        measurement.failed("refused")
                    elif self._reads and not grpc_wire.found(answer):
                        measurement.failed(ABSENT)
                    else:
                        measurement.done(started, operations)
                if (ended or connection.owed) and not connection.start(self._source, ended):
                    exhausted = True
                self._send(connection)

    def _send(self, connection: _Connection) -> None:
        complete = connection.send()
        events = select.POLLIN if complete else select.POLLIN | select.POLLOUT
        self._poll.modify(connection.socket.fileno(), events)

    def under_way(self) -> list[int]:
        """When the calls began that are not answered."""
        return [started for each in self._by_descriptor.values() for started, _ in each.under_way.values()]

    def close(self) -> None:
        for connection in self._by_descriptor.values():
            connection.socket.close()
