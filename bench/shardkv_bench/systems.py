"""The two systems that a comparison drives, behind one small interface: real processes, fsync on, loopback.

Each knows how to start, which addresses a load should use, how to find the leader to kill, and what one write is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from shardkv.errors import ShardKVError
from shardkv.wire.requests import Method
from shardkv_bench import grpc_wire
from shardkv_bench.etcd import EtcdCluster, EtcdConnection
from shardkv_bench.local_cluster import LocalCluster, NodeFailed, check_running
from shardkv_bench.shardkv_driver import connect
from shardkv_bench.workloads import key_of

if TYPE_CHECKING:
    from shardkv_client import Client

SPLIT_BYTES: Final = 1 << 30
"""Ranges split only where the comparison splits them."""
CALL_SECONDS: Final = 20.0
SETTLE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05


class System(Protocol):
    """A cluster of three nodes."""

    name: str

    def start(self) -> None: ...

    def prepare(self) -> None:
        """Bring leaders where the comparison wants them, if they are not there."""
        ...

    @property
    def addresses(self) -> str:
        """Where a load connects."""
        ...

    def cpu_seconds(self) -> float: ...

    def check_running(self) -> None:
        """Raise NodeFailed when a node that was started has ended."""
        ...

    def leader(self) -> str:
        """The node that leads the first record's range."""
        ...

    def kill(self, name: str) -> None: ...

    def restart(self, name: str) -> None: ...

    def stop(self) -> object: ...


@contextlib.contextmanager
def _settling(what: str) -> Iterator[None]:
    """Bounds a wait of the body. Raises NodeFailed, which says that ``what``, at its end."""
    try:
        with trio.fail_after(SETTLE_SECONDS):
            yield
    except trio.TooSlowError:
        raise NodeFailed(f"shardkv: {what} after {SETTLE_SECONDS:g} s") from None


class ShardKV:
    """shardkv with ``ranges`` ranges over the records, their leaders dealt out to the nodes in turn."""

    name = "shardkv"

    def __init__(self, directory: Path, records: int, ranges: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.cluster = LocalCluster(directory, options=["--split-bytes", str(SPLIT_BYTES), "--log-level", "warning"])
        self._records = records
        self._ranges = ranges

    @property
    def addresses(self) -> str:
        return self.cluster.connect

    def start(self) -> None:
        self.cluster.start()

    def prepare(self) -> None:
        trio.run(self._prepare)

    async def _prepare(self) -> None:
        async with connect(self.addresses) as client:
            await self._wait_replicas(client)
            for number in range(1, self._ranges):
                key = key_of(self._records * number // self._ranges)
                ranges = await self._rows(client)
                if not any(bytes(row["start"]) == key for row in ranges):
                    await client.call(Method.SPLIT, key, key=key, timeout=CALL_SECONDS)
            await self._wait_replicas(client)
            if self._ranges > 1:
                await self._spread(client)

    async def _spread(self, client: "Client") -> None:
        """Deal the leaders out: range *i* to node *i* modulo the count of nodes."""
        with _settling("the ranges are not led by the nodes in turn"):
            while True:
                rows = await self._rows(client)
                nodes = sorted({node for row in rows for node in row["replicas"]})
                wrong = [
                    (row["id"], nodes[index % len(nodes)])
                    for index, row in enumerate(rows)
                    if row["leader"] != nodes[index % len(nodes)]
                ]
                if not wrong:
                    return
                for range_id, node_id in wrong:
                    try:
                        await client.call(Method.TRANSFER, range_id, node_id, range_id=range_id, timeout=CALL_SECONDS)
                    except ShardKVError:
                        await trio.sleep(POLL_SECONDS)
                await trio.sleep(POLL_SECONDS)

    async def _wait_replicas(self, client: "Client") -> None:
        """Wait until every range has a leader and as many replicas as there are nodes."""
        with _settling("not every range has a leader and three replicas"):
            while True:
                rows = await self._rows(client)
                if all(row["leader"] is not None and len(row["replicas"]) >= 3 for row in rows):
                    return
                await trio.sleep(POLL_SECONDS)

    async def _rows(self, client: "Client") -> list[dict[str, Any]]:
        answer = await client.call(Method.RANGES, timeout=CALL_SECONDS)
        return sorted((dict(row) for row in answer), key=lambda row: bytes(row["start"]))

    def cpu_seconds(self) -> float:
        return self.cluster.cpu_seconds()

    def check_running(self) -> None:
        check_running(self.cluster.processes)

    def leader(self) -> str:
        return trio.run(self._leader)

    async def _leader(self) -> str:
        async with connect(self.addresses) as client:
            with _settling("the first record's range has no leader"):
                while True:
                    name = await self._leader_seen(client)
                    if name is not None:
                        return name
                    await trio.sleep(POLL_SECONDS)

    async def _leader_seen(self, client: "Client") -> str | None:
        """The name of the node that leads the first record's range, if the cluster knows one now."""
        rows = await self._rows(client)
        row = next(row for row in reversed(rows) if bytes(row["start"]) <= key_of(0))
        status = await client.call(Method.STATUS, timeout=CALL_SECONDS)
        names = {node["id"]: str(node["name"]) for node in status["node_table"]}
        return names.get(row["leader"])

    def kill(self, name: str) -> None:
        self.cluster.kill(name)

    def restart(self, name: str) -> None:
        self.cluster.restart(name)

    def stop(self) -> object:
        return self.cluster.stop()


class Etcd:
    """etcd with its defaults. A load connects to its leader, which spares it the forwarding: its best case."""

    name = "etcd"

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.cluster = EtcdCluster(directory)

    @property
    def addresses(self) -> str:
        return self.cluster.addresses[self.leader()]

    def start(self) -> None:
        self.cluster.start()

    def prepare(self) -> None:
        self.cluster.wait_leader()

    def cpu_seconds(self) -> float:
        return self.cluster.cpu_seconds()

    def check_running(self) -> None:
        check_running(self.cluster.processes)

    def leader(self) -> str:
        return self.cluster.wait_leader()

    def kill(self, name: str) -> None:
        self.cluster.kill(name)

    def restart(self, name: str) -> None:
        self.cluster.restart(name)

    def stop(self) -> object:
        self.cluster.stop()
        return None

    def endpoints(self) -> Sequence[str]:
        """The addresses of the members that run."""
        return [self.cluster.addresses[name] for name in self.cluster.running]

    def put_once(self, key: bytes, value: bytes, seconds: float) -> bool:
        """One write to any member that runs; whether it was acknowledged."""
        for address in self.endpoints():
            try:
                with EtcdConnection(address, seconds) as connection:
                    answer = connection.request(grpc_wire.PUT_PATH, grpc_wire.put_request(key, value), seconds)
            except OSError:
                continue
            if answer is not None:
                return True
        return False
