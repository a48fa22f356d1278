"""The blocking face: the same client for programs without an event loop, from any thread.

One thread runs trio and the async client in it; a call of any other thread is handed over and waited for. Threads and
event loops do not survive a fork, so a child process gets an error instead of a hang.
"""

import os
import threading
import warnings
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import trio

from shardkv.address import parse_addresses
from shardkv.errors import ClientClosed
from shardkv.types import Entry, RangeDescriptor
from shardkv_client.batches import Pairs, Progress, PutMany, check_pairs, read_chunk
from shardkv_client.client import Client, connect
from shardkv_client.core import TIMEOUT_SECONDS, NodeInfo, Settings
from shardkv_client.environment import Environment
from shardkv_client.limits import check_timeout, distinct
from shardkv_client.scan import OnAge, Scan

T = TypeVar("T")

_CLOSED: Final = "the client is closed; open a new one with connect_blocking()"


def connect_blocking(
    addresses: str, *, environment: Environment | None = None, settings: Settings | None = None
) -> "BlockingClient":
    """As :func:`shardkv_client.connect`, for use from any thread: ``with connect_blocking("127.0.0.1:7001") as kv``.

    The client is open when this returns; close it with :meth:`BlockingClient.close` or by leaving the ``with`` block.
    """
    return BlockingClient(addresses, environment=environment, settings=settings)


class BlockingClient:
    """The methods of :class:`shardkv_client.Client`, without ``await``; see there for what they mean and raise.

    Any number of threads may share it; a task of an event loop must not wait for it, but has its own kind of client.
    After a fork every method raises ClientClosed in the child.

    What is handed in is called in the thread of the caller (an iterable of keys or pairs, ``progress``), but for
    ``on_age``, an async iterable and the progress of one: those are called in the client's thread.
    """

    def __init__(
        self, addresses: str, *, environment: Environment | None = None, settings: Settings | None = None
    ) -> None:
        parse_addresses(addresses)  # a ConfigError belongs to the caller's thread
        self._process = os.getpid()
        self._closing = False
        self._client = connect(addresses, environment=environment, settings=settings)
        self._loop = _Loop(self._client)
        self._loop.start()

    def __del__(self) -> None:
        loop: _Loop | None = getattr(self, "_loop", None)  # absent where the arguments were wrong
        if loop is None or loop.stopping or os.getpid() != self._process:
            return
        loop.stop()
        warnings.warn(
            "a client was not closed: use `with connect_blocking(…)`", ResourceWarning, stacklevel=2, source=self
        )

    def _perform(self, function: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        if os.getpid() != self._process:
            raise ClientClosed("the client was opened before a fork; open a new one in the child process")
        if self._closing:
            raise ClientClosed(_CLOSED)

        async def perform() -> T:
            return await function(*arguments, **options)

        try:
            return trio.from_thread.run(perform, trio_token=self._loop.token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise ClientClosed(_CLOSED) from error

    def _perform_all(self, function: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """As :meth:`_perform`, for calls that no timeout bounds as a whole: an interrupt of this thread ends them."""
        scope = trio.CancelScope()

        async def perform() -> T:
            with scope:
                return await function(*arguments, **options)
            raise ClientClosed("interrupted")  # nobody hears it: whoever called has gone

        try:
            return self._perform(perform)
        except Exception:
            raise
        except BaseException:
            self._loop.run_soon(scope.cancel)
            raise

    def close(self) -> None:
        """End pending calls as their deadlines would, and the thread. May be called again, and after a fork.

        Called in the client's thread, by ``progress``, say, it returns at once, and the client ends when that has.
        """
        if self._closing or os.getpid() != self._process:
            return
        self._closing = True
        self._loop.stop()
        self._loop.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def put(self, key: bytes, value: bytes, *, if_version: int | None = None, timeout: float = TIMEOUT_SECONDS) -> int:
        return self._perform(self._client.put, key, value, if_version=if_version, timeout=timeout)

    def get(
        self,
        key: bytes,
        *,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: OnAge | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Entry | None:
        return self._perform(
            self._client.get, key, consistency=consistency, max_age=max_age, on_age=on_age, timeout=timeout
        )

    def delete(self, key: bytes, *, if_version: int | None = None, timeout: float = TIMEOUT_SECONDS) -> bool:
        return self._perform(self._client.delete, key, if_version=if_version, timeout=timeout)

    def increment(self, key: bytes, delta: int = 1, *, timeout: float = TIMEOUT_SECONDS) -> int:
        return self._perform(self._client.increment, key, delta, timeout=timeout)

    def get_many(
        self,
        keys: Iterable[bytes],
        *,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: OnAge | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> dict[bytes, Entry]:
        wanted = distinct(keys)  # the caller's iterable runs in the caller's thread
        return self._perform(
            self._client.get_many, wanted, consistency=consistency, max_age=max_age, on_age=on_age, timeout=timeout
        )

    def put_many(self, pairs: Pairs, *, timeout: float = TIMEOUT_SECONDS, progress: Progress | None = None) -> int:
        if isinstance(pairs, AsyncIterable):
            return self._perform_all(self._client.put_many, pairs, timeout=timeout, progress=progress)
        check_timeout(timeout)
        check_pairs(pairs, progress)
        writer = self._perform(self._client.begin_put_many, timeout)
        try:
            return self._put_all(writer, iter(pairs.items() if isinstance(pairs, Mapping) else pairs), progress)
        except BaseException:
            self._loop.run_soon(writer.abandon)
            raise

    def _put_all(self, writer: PutMany, source: Iterator[tuple[bytes, bytes]], progress: Progress | None) -> int:
        told = 0

        def tell() -> Exception | None:
            nonlocal told
            if progress is not None and writer.written > told:
                told = writer.written
                try:
                    progress(told)
                except Exception as error:  # noqa: BLE001 - the caller's function may raise anything
                    return error
            return None

        problem = None
        try:
            while problem is None:
                chunk, problem = read_chunk(source)
                for pair in chunk:
                    writer.add(pair)
                if problem is not None or not chunk or not self._perform_all(writer.send):
                    break
                problem = tell()
            if problem is None:
                self._perform_all(writer.finish)
                return writer.outcome(tell())
            return self._perform_all(writer.end, problem)
        except ClientClosed as closed:
            return writer.outcome(problem or closed)

    def delete_range(
        self,
        start: bytes | None = None,
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._perform_all(self._client.delete_range, start, end, prefix=prefix, timeout=timeout)

    def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: OnAge | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> "BlockingScan":
        scan = self._client.scan(
            start,
            end,
            prefix=prefix,
            limit=limit,
            reverse=reverse,
            keys_only=keys_only,
            consistency=consistency,
            max_age=max_age,
            on_age=on_age,
            timeout=timeout,
        )
        return BlockingScan(self._perform, scan)

    def call(
        self,
        method: int,
        *arguments: object,
        key: bytes | None = None,
        range_id: int | None = None,
        node_id: int | None = None,
        repeatable: bool | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Any:
        return self._perform(
            self._client.call,
            method,
            *arguments,
            key=key,
            range_id=range_id,
            node_id=node_id,
            repeatable=repeatable,
            timeout=timeout,
        )

    def status(self, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        return self._perform(self._client.status, timeout=timeout)

    def nodes(self, *, timeout: float = TIMEOUT_SECONDS) -> list[NodeInfo]:
        return self._perform(self._client.nodes, timeout=timeout)

    def ranges(self, *, timeout: float = TIMEOUT_SECONDS) -> list[tuple[RangeDescriptor, int | None]]:
        return self._perform(self._client.ranges, timeout=timeout)


for _name, _method in vars(BlockingClient).items():
    if not _name.startswith("_") and _method.__doc__ is None:
        _method.__doc__ = getattr(Client, _name).__doc__  # what it means is the same


class _Loop:
    """The thread that runs the client. It does not hold on to the BlockingClient, which ends it when forgotten."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        self.stopping = False
        """Or it has stopped."""
        self._started = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shardkv client", daemon=True)

    def start(self) -> None:
        """Return once the client is open. An interrupt on the way leaves nothing behind."""
        try:
            self._thread.start()
            self._started.wait()
        except BaseException:
            self.stop()
            raise
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that opens the client
            self._problem = error
        finally:
            self.stopping = True
            self._started.set()

    async def _main(self) -> None:
        async with self._client:
            self.token = trio.lowlevel.current_trio_token()
            self._started.set()
            # Whoever stops says so before he looks for the token, so that one of the two sees the other.
            if not self.stopping:
                await self._stop.wait()

    def run_soon(self, function: Callable[[], object]) -> None:
        """Call it in the thread, if that still runs."""
        if self.token is not None:
            with suppress(trio.RunFinishedError):
                self.token.run_sync_soon(function)

    def stop(self) -> None:
        """Have the thread end. Does not wait for it."""
        self.stopping = True
        self.run_soon(self._stop.set)

    def join(self) -> None:
        """Wait for its end, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join()


class BlockingScan:
    """An iterator over a scan's entries, a page for each hand-over between threads. One thread at a time."""

    def __init__(self, perform: Callable[[Callable[[], Awaitable[None]]], None], scan: Scan) -> None:
        self._perform = perform
        self._scan = scan
        self._page: list[Entry] = []
        self._fetching = trio.Lock()
        self._ended = False
        """No page comes after the one at hand. It is set after that, and looked at before it."""
        self._closed = False

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        ended = self._ended
        if not self._page:
            if ended or self._closed:
                raise StopIteration
            self._perform(self._fetch)
            if not self._page:
                raise StopIteration
        return self._page.pop()

    async def _fetch(self) -> None:
        """In the client's thread. What an interrupted caller did not wait for is here, or comes, when it goes on."""
        async with self._fetching:
            if self._page or self._closed:
                return
            page = await self._scan.next_page()
            page.reverse()
            if not self._closed:
                self._page = page
                self._ended = self._scan.finished

    def close(self) -> None:
        """End the scan: the next entry asked for is its end."""
        self._closed = True
        self._page = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
