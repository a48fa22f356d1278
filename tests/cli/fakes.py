"""A client without a cluster: a dict, versions that grow, and switches for what may go wrong."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import IO, Any

import pytest
import trio
from click.testing import CliRunner, Result

from shardkv import errors
from shardkv.cli import session
from shardkv.cli.root import shardkv
from shardkv.types import Entry
from shardkv.wire.requests import Method

FIRST_VERSION = 467_213_411_123_200_000
"""Above 2**53, as real versions are."""
STDOUT_FULL = (
    b"Error: standard output cannot be written: No space left on device; give it another file or a pipe (OSError)\n"
)
"""What a command tells whose stdout is /dev/full."""


class FakeScan:
    def __init__(self, entries: list[Entry]) -> None:
        self._entries = iter(entries)

    async def __aenter__(self) -> "FakeScan":
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    def __aiter__(self) -> "FakeScan":
        return self

    async def __anext__(self) -> Entry:
        await trio.lowlevel.checkpoint()
        entry = next(self._entries, None)
        if entry is None:
            raise StopAsyncIteration
        if isinstance(entry, Exception):
            raise entry
        return entry


class FakeClient:
    """``fail`` is raised by every call; ``fail_after`` lets so many batches or entries through first."""

    def __init__(self) -> None:
        self.data: dict[bytes, Entry] = {}
        self.version = FIRST_VERSION
        self.addresses: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        self.asks_until_elected: int | None = None
        """So often the ranges are asked for before the right one has a leader; None: it never has."""
        self.status: dict[str, Any] = {}
        """Further fields of the answer to STATUS."""
        self.learners: list[int] = []
        self.fail: BaseException | None = None
        self.fail_after: int | None = None
        self.batches: list[list[tuple[bytes, bytes]]] = []

    def _check(self) -> None:
        if self.fail is not None and self.fail_after is None:
            raise self.fail

    def set(self, key: bytes, value: bytes) -> None:
        self.version += 1
        self.data[key] = Entry(key, value, self.version)

    async def get(
        self,
        key: bytes,
        *,
        timeout: float,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: Any = None,
    ) -> Entry | None:
        self.calls.append(("get", key, consistency, timeout) if max_age is None else ("get", key, max_age))
        self._check()
        if on_age is not None:
            on_age(0.25)
        return self.data.get(key)

    def _compare(self, key: bytes, if_version: int | None) -> None:
        current = self.data[key].version if key in self.data else 0
        if if_version is not None and if_version != current:
            raise errors.VersionMismatch(current=current)

    async def put(self, key: bytes, value: bytes, *, timeout: float, if_version: int | None = None) -> int:
        self._check()
        self._compare(key, if_version)
        self.set(key, value)
        return self.version

    async def delete(self, key: bytes, *, timeout: float, if_version: int | None = None) -> bool:
        self._check()
        self._compare(key, if_version)
        return self.data.pop(key, None) is not None

    async def increment(self, key: bytes, delta: int, *, timeout: float) -> int:
        self._check()
        number = (int(self.data[key].value) if key in self.data else 0) + delta
        self.set(key, str(number).encode())
        return number

    async def put_many(self, pairs: Iterable[tuple[bytes, bytes]], *, timeout: float) -> int:
        batch = list(pairs)
        if self.fail is not None and (self.fail_after is None or len(self.batches) >= self.fail_after):
            raise self.fail
        self.batches.append(batch)
        for key, value in batch:
            self.set(key, value)
        return len(batch)

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        timeout: float,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: Any = None,
    ) -> FakeScan:
        if on_age is not None:
            self.calls.append(("scan", consistency, max_age))
            on_age(0.25)
            on_age(0.5)
        found: list[Any] = [
            entry
            for key, entry in sorted(self.data.items(), reverse=reverse)
            if (key.startswith(prefix) if prefix is not None else key >= start and (end is None or key < end))
        ][:limit]
        if self.fail is not None and (self.fail_after is None or self.fail_after < len(found)):
            found[self.fail_after or 0 :] = [self.fail]
        return FakeScan(found)

    async def delete_range(self, start: bytes, end: bytes | None, *, timeout: float) -> None:
        self._check()
        self.calls.append(("delete_range", start, end))
        for key in [key for key in self.data if key >= start and (end is None or key < end)]:
            del self.data[key]

    async def call(self, method: Method, *arguments: object, timeout: float, **target: object) -> Any:
        self._check()
        self.calls.append((method, arguments, target))
        match method:
            case Method.STATUS:
                return {
                    "cluster_id": b"\x01\xff",
                    "version": 7,
                    "nodes": 2,
                    "live": 1,
                    "ranges": 2,
                    "placement_leader": 1,
                    **self.status,
                    "node_table": [
                        {"id": 2, "name": "n2", "address": "h:2", "state": "up", "replicas": 2, "leaders": 0},
                        {"id": 1, "name": "n1", "address": "h:1", "state": "up", "replicas": 2, "leaders": 1},
                    ],
                }
            case Method.RANGES:
                row = {"replicas": [1, 2], "learners": self.learners, "epoch": [1, 2], "bytes": 3 * 1024 * 1024}
                asks = sum(call[0] is Method.RANGES for call in self.calls)
                elected = self.asks_until_elected is not None and asks > self.asks_until_elected
                return [
                    {"id": 3, "start": b"m\xff", "end": None, "leader": 2 if elected else None, **row},
                    {"id": 1, "start": b"", "end": b"m\xff", "leader": 1, **row},
                ]
            case Method.SPLIT:
                [key] = arguments
                return [[1, b"", key, 1, 2, [[1, 5, 0]]], [4, key, None, 1, 2, [[1, 6, 0]]]]
        return None


class World:
    """Runs command lines against one fake client."""

    def __init__(self, client: FakeClient) -> None:
        self.client = client

    def run(self, *arguments: str, input: bytes | str | IO[bytes] | None = None, connect: bool = True) -> Result:
        env = {"SHARDKV_CONNECT": "127.0.0.1:7001"} if connect else {}
        return CliRunner(env=env).invoke(shardkv, list(arguments), input=input)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    client = FakeClient()

    @asynccontextmanager
    async def connect(addresses: str) -> AsyncIterator[FakeClient]:
        client.addresses.append(addresses)
        yield client

    monkeypatch.setattr(session, "connect", connect)
    return World(client)
