"""The client that programs use, for trio and asyncio.

Methods check what they are given, make a call of it, and wait; everything else is the core's. One client serves any
number of tasks of one event loop.
"""

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
from trio.lowlevel import enable_ki_protection

from shardkv.address import parse_addresses
from shardkv.errors import ClientClosed, InvalidRange, NotFound, OutcomeUnknown, ShardKVError
from shardkv.types import PLACEMENT_RANGE, Entry, RangeDescriptor
from shardkv.wire.commands import Op, pack_delete, pack_increment, pack_put
from shardkv.wire.requests import Method
from shardkv_client.batches import Gathering, Pairs, Progress, PutMany, check_pairs, get_many
from shardkv_client.connection import Host
from shardkv_client.core import (
    REPEATABLE_METHODS,
    TIMEOUT_SECONDS,
    AdminCall,
    Call,
    DeleteRangeCall,
    NodeInfo,
    ReadCall,
    Settings,
    WriteCall,
)
from shardkv_client.core.routing import parse_nodes, parse_routes
from shardkv_client.environment import Environment, RealEnvironment, tell_when_forked
from shardkv_client.limits import (
    age_us_of,
    check_delta,
    check_flag,
    check_function,
    check_key_size,
    check_key_type,
    check_limit,
    check_pair,
    check_request,
    check_timeout,
    check_version,
    consistency_of,
    deleted_span_of,
    distinct,
    span_of,
)
from shardkv_client.scan import OnAge, Scan
from shardkv_client.waiter import AnotherLoop, current_waiter, on_trio

if TYPE_CHECKING:
    import trio

ROUTES_PER_PAGE = 256


def connect(addresses: str, *, environment: Environment | None = None, settings: Settings | None = None) -> "Client":
    """A client of the cluster that any of ``addresses`` (``"h1:7001,h2:7001"``) belongs to.

    Use it as ``async with connect(…) as kv``. Nothing is sent before the first call, so a cluster that is down shows
    as the first call's Unavailable.

    Args:
        environment: clock, chance and connections, where they are not to be the real ones.
        settings: bounds and delays.

    Raises:
        ConfigError: the addresses cannot be read.
    """
    return Client(addresses, environment=environment, settings=settings)


class Client:
    """See :func:`connect`. Every method but :meth:`scan` is a coroutine.

    ``timeout`` is in seconds and covers one call. At its end a read, or a write that no leader can have logged,
    raises Unavailable, another write OutcomeUnknown. Beside what a method names, each may raise TypeError for an
    argument of the wrong type, RequestError (KeyTooLarge, ValueTooLarge, InvalidRange) for one out of bounds, both
    before anything is sent; StorageError (OutOfSpace) when a node's disk does not let it; and ClientClosed.
    """

    def __init__(self, addresses: str, *, environment: Environment | None, settings: Settings | None) -> None:
        self._seeds = [str(address) for address in parse_addresses(addresses)]
        if not isinstance(settings, Settings | None):
            raise TypeError(f"settings must be Settings or None, not {type(settings).__name__}")
        self._environment: Environment = environment if environment is not None else RealEnvironment()
        self._settings = settings if settings is not None else Settings()
        self._host: Host | None = None
        self._closed_because = "the client is not open; use it as `async with connect(…) as kv`"
        self._task: asyncio.Task[None] | None = None
        self._nursery_manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._now = self._environment.monotonic

    # --- opening and closing ------------------------------------------------------------------------------------

    # Opening and closing are protected: an interrupt half way would leave trio with a nursery that nobody ends.

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._host is not None:
            raise ClientClosed("a client is opened once; make another with connect()")
        waiter = self._waiter = current_waiter()
        host = Host(self._seeds, self._settings, self._environment, waiter)
        if on_trio():
            import trio

            self._nursery_manager = trio.open_nursery()
            self._nursery = await self._nursery_manager.__aenter__()
            self._nursery.start_soon(host.run, name="shardkv client")
        else:
            # In a task of its own, so that the client may be closed in another task than it was opened in.
            self._task = asyncio.create_task(host.run(), name="shardkv client")
        self._host = host
        self._closed_because = "the client is closed; open a new one with connect()"
        self._is_here = waiter.is_here
        self._notify = waiter.notify
        self._wait = waiter.wait
        self._submit = host.core.submit
        self._cancel = host.core.cancel
        tell_when_forked(self)
        return self

    @enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except KeyboardInterrupt:  # trio raises it where its main task waits, protected or not
            await self._end_nursery()
            raise
        await self._end_nursery()

    async def _end_nursery(self) -> None:
        nursery, self._nursery = self._nursery, None
        if nursery is None:
            return
        # The body is over. Shielded and cancelled, the nursery lets out nothing, not even a cancellation that ended
        # the body: what leaves is the body's own exception, or an interrupt that comes now.
        nursery.cancel_scope.shield = True
        nursery.cancel_scope.cancel()
        interrupt = None
        try:
            await self._nursery_manager.__aexit__(None, None, None)
        except BaseExceptionGroup as group:
            interrupt = group.exceptions[0]
        if interrupt is not None:
            raise interrupt

    @enable_ki_protection
    async def aclose(self) -> None:
        """End pending calls as their deadlines would, and close every connection. May be called again.

        Under trio ``async with`` must still be left where it was entered; under asyncio this is all that is needed.
        """
        host = self._host
        if host is None:
            return
        if not self._is_here():
            if host.ended or (self._task is not None and self._task.done()):
                return  # its loop has ended, and the client with it
            raise self._not_here()
        if self._task is None:
            await host.aclose()
            return
        # The task itself is waited for: a loop that shuts down also cancels tasks that have not begun, and such a task
        # never says that it has ended.
        host.close()
        with anyio.CancelScope(shield=True):  # else a cancellation here would replace the body's own exception
            await asyncio.wait([self._task])

    def forked(self) -> None:
        """This process is a child of the one that opened the client, whose session and connections it must not use."""
        self._closed_because = "the client was opened before a fork; open a new one in the child process"
        host, self._host = self._host, None
        if host is not None:
            host.core.disown()

    def _open_host(self) -> Host:
        if self._host is None or self._host.core.closed:
            raise ClientClosed(self._closed_because)
        if not self._is_here():
            raise self._not_here()
        return self._host

    def _not_here(self) -> Exception:
        """For a caller that runs in another event loop: two must not touch what one of them runs."""
        if self._host is not None and self._host.ended:
            return ClientClosed(self._closed_because)
        return RuntimeError(
            "this client belongs to another event loop: open one in this loop, or share one that connect_blocking() "
            "opens between threads"
        )

    @enable_ki_protection
    async def _perform(self, call: Call) -> Any:
        # Protected: a call whose caller is interrupted before it waits would be answered to nobody.
        if self._host is None:
            raise ClientClosed(self._closed_because)
        call.notify = self._notify
        try:
            return await self._wait(call, self._cancel, self._submit)
        except AnotherLoop:
            raise self._not_here() from None

    # --- single keys --------------------------------------------------------------------------------------------

    async def put(
        self, key: bytes, value: bytes, *, if_version: int | None = None, timeout: float = TIMEOUT_SECONDS
    ) -> int:
        """Write a key; its new version, which is larger than any that the key has had.

        Args:
            if_version: write only if the key is at this version; 0: only if it is absent.

        Raises:
            VersionMismatch: it is not; ``current`` is the version it is at.
            OutcomeUnknown: the write was sent but not answered in time.
        """
        check_pair(key, value)
        if if_version is not None:
            check_version(if_version)
        check_timeout(timeout)
        call = WriteCall(Op.PUT, key, pack_put(key, value, if_version), self._now() + timeout)
        version: int = await self._perform(call)
        return version

    async def get(
        self,
        key: bytes,
        *,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: OnAge | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Entry | None:
        """Read a key; None if it is absent.

        Args:
            consistency: ``"linearizable"``; ``"follower"``: the same, served by a near replica; ``"stale"``: by one
                from what it has, which may lag behind.
            max_age: of a stale read: how many seconds old the answer may be at most. Replicas that may be older do not
                answer; when none can, in the end, that is Unavailable. None: any age that a replica can vouch for.
            on_age: called before the answer is returned, with the seconds that it is old at most: it holds every write
                that had been answered so long before the call was made. 0.0 for the reads that are never old.
        """
        check_key_type(key)
        number = consistency_of(consistency)
        age_us_max = age_us_of(max_age, number) if max_age is not None else None
        if on_age is not None:
            check_function("on_age", on_age)
        check_timeout(timeout)
        check_key_size(key)
        call = ReadCall(key, number, self._now() + timeout, self._settings.keys_per_get_max, age_us_max)
        found: list[Any] | None = await self._perform(call)
        if on_age is not None:
            on_age(call.age_us / 1e6)
        return None if found is None else Entry(key, found[0], found[1])

    async def delete(self, key: bytes, *, if_version: int | None = None, timeout: float = TIMEOUT_SECONDS) -> bool:
        """Delete a key; whether it was there. ``if_version`` as in :meth:`put`, and what it raises."""
        check_key_type(key)
        if if_version is not None:
            check_version(if_version)
        check_timeout(timeout)
        check_key_size(key)
        call = WriteCall(Op.DELETE, key, pack_delete(key, if_version), self._now() + timeout)
        was_there: bool = await self._perform(call)
        return was_there

    async def increment(self, key: bytes, delta: int = 1, *, timeout: float = TIMEOUT_SECONDS) -> int:
        """Add to the number a key holds, as decimal text of a signed 64-bit integer; the sum. Absent counts as 0.

        Raises:
            NotAnInteger: the key holds something else, or the sum would not fit; nothing is changed.
        """
        check_key_type(key)
        check_delta(delta)
        check_timeout(timeout)
        check_key_size(key)
        call = WriteCall(Op.INCREMENT, key, pack_increment(key, delta), self._now() + timeout)
        number: int = await self._perform(call)
        return number

    # --- many keys ----------------------------------------------------------------------------------------------

    async def get_many(
        self,
        keys: Iterable[bytes],
        *,
        consistency: str = "linearizable",
        max_age: float | None = None,
        on_age: OnAge | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> dict[bytes, Entry]:
        """Read keys, in the order asked; absent ones are left out. Each is read on its own: it is no snapshot.

        ``consistency``, ``max_age`` and ``on_age`` as in :meth:`get`; the age told is that of the oldest answer.
        """
        wanted = distinct(keys)
        check_timeout(timeout)
        number = consistency_of(consistency)
        age_us_max = age_us_of(max_age, number)
        check_function("on_age", on_age)
        host = self._open_host()
        deadline = self._now() + timeout
        batch_max = self._settings.keys_per_get_max
        calls = [ReadCall(key, number, deadline, batch_max, age_us_max) for key in wanted]
        await get_many(Gathering(host.core, self._waiter), calls)
        if on_age is not None:
            on_age(max((call.age_us for call in calls), default=0) / 1e6)
        found = {}
        for key, call in zip(wanted, calls):
            result, call.result = call.result, None
            if result is not None:
                found[key] = Entry(key, result[0], result[1])
        return found

    async def put_many(
        self, pairs: Pairs, *, timeout: float = TIMEOUT_SECONDS, progress: Progress | None = None
    ) -> int:
        """Write pairs of a key and a value, from a mapping or an (async) iterable; the count of pairs taken from it.

        Not atomic. Grouped by range and pipelined; the last pair of a key wins.

        Args:
            timeout: covers one batch of a few hundred pairs.
            progress: called with the count of pairs written so far.

        Raises:
            BatchError: it stopped early; see there what is written.
        """
        check_timeout(timeout)
        check_pairs(pairs, progress)
        return await (await self.begin_put_many(timeout, progress)).run(pairs)

    async def begin_put_many(self, timeout: float, progress: Progress | None = None) -> PutMany:
        """For the blocking face, which reads the pairs in another thread."""
        return PutMany(self._open_host().core, self._waiter, self._now, timeout, progress)

    async def delete_range(
        self,
        start: bytes | None = None,
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """Delete every key from ``start`` (included) to ``end`` (excluded; None: to the last), or under ``prefix``.

        Every key there is goes by ``delete_range(b"")``, but not for want of arguments or by an empty prefix. Atomic in
        each range, not across ranges, which are taken in the order of their keys. ``timeout`` covers one.

        Raises:
            OutcomeUnknown: the part that was under way may be deleted; those before it are.
        """
        start, end = deleted_span_of(start, end, prefix)
        check_timeout(timeout)
        self._open_host()
        if end is not None and start >= end:
            return
        cursor: bytes | None = start
        while cursor is not None:
            try:
                cursor = await self._perform(DeleteRangeCall(cursor, end, self._now() + timeout))
            except OutcomeUnknown:
                raise
            except ShardKVError as error:
                if cursor == start:
                    raise
                raise OutcomeUnknown(
                    f"every key from {start!r:.60} to {cursor!r:.60} is deleted, but then: {error}; call again to go on"
                ) from error

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
    ) -> Scan:
        """Walk the entries from ``start`` (included) to ``end`` (excluded; None: to the last), or under ``prefix``.

        Strictly in order, upwards or in ``reverse``; nothing twice, and a key that nobody touches exactly once. Each
        page is read at one moment, the whole is no snapshot. With ``keys_only`` values are empty. ``timeout`` covers
        one page. ``consistency``, ``max_age`` and ``on_age`` as in :meth:`get`, for each page: an age counts from the
        moment at which its page was asked for, and is told before the page's first entry is given out.
        """
        start, end = span_of(start, end, prefix)
        check_limit(limit)
        check_flag("reverse", reverse)
        check_flag("keys_only", keys_only)
        check_timeout(timeout)
        check_function("on_age", on_age)
        number = consistency_of(consistency)
        return Scan(
            self._open_host,
            self._perform,
            self._now,
            self._settings,
            start,
            end,
            limit=limit,
            reverse=reverse,
            keys_only=keys_only,
            consistency=number,
            age_us_max=age_us_of(max_age, number),
            on_age=on_age,
            timeout=timeout,
        )

    # --- the cluster --------------------------------------------------------------------------------------------

    async def call(
        self,
        method: int,
        *arguments: object,
        key: bytes | None = None,
        range_id: int | None = None,
        node_id: int | None = None,
        repeatable: bool | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Any:
        """Any other request of :mod:`shardkv.wire.requests`, and its result.

        It goes to the leader of the range that holds ``key``, or of the range ``range_id`` (0: the placement group),
        or to the node ``node_id``, or, with none of them, to any node.

        Args:
            repeatable: whether it may be sent again when its answer was lost; by default as the method is known to be.

        Raises:
            NotFound: there is no such range or node.
            OutcomeUnknown: it was sent, is not repeatable, and its answer was lost.
        """
        if sum(target is not None for target in (key, range_id, node_id)) > 1:
            raise InvalidRange("a call goes by key, by range_id or by node_id; pass one of them")
        check_request(method, arguments, key=key, range_id=range_id, node_id=node_id)
        if repeatable is not None:
            check_flag("repeatable", repeatable)
        check_timeout(timeout)
        deadline = self._now() + timeout
        if range_id is not None:
            await self._know_range(range_id, deadline)
        call = AdminCall(
            method,
            arguments,
            deadline,
            key=key,
            range_id=range_id,
            node_id=node_id,
            repeatable=method in REPEATABLE_METHODS if repeatable is None else repeatable,
        )
        return await self._perform(call)

    async def _know_range(self, range_id: int, deadline: float) -> None:
        """Have the range in the cache, if it exists."""
        cache = self._open_host().core.router.cache
        if range_id != PLACEMENT_RANGE and cache.find_id(range_id) is None:
            await self._list_ranges(lambda: max(0.0, deadline - self._now()))
            if cache.find_id(range_id) is None:
                raise NotFound(f"there is no range {range_id}; list the ranges")

    async def status(self, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        """The cluster as the leader of the placement group sees it.

        A dict: ``cluster_id`` (hexadecimal), ``version``, ``nodes``, ``live`` and ``ranges`` (counts: of the nodes in
        service, of those among them that are heard of, of the ranges), ``placement_leader`` (a node id), ``settled``
        (whether every range has the voters that it should have and there are live nodes for, and nothing is about to
        move), ``unsettled`` (why not, in words, or None), ``operators`` (``id, kind, range, reason`` of what is under
        way) and ``node_table`` (``name, id, address, state, replicas, leaders`` of each node).
        """
        return await self.call(Method.STATUS, timeout=timeout)

    async def nodes(self, *, timeout: float = TIMEOUT_SECONDS) -> list[NodeInfo]:
        """The nodes that are in service, by id, with their names and addresses."""
        nodes = parse_nodes(await self.call(Method.NODES, timeout=timeout))
        return sorted(nodes)

    async def ranges(self, *, timeout: float = TIMEOUT_SECONDS) -> list[tuple[RangeDescriptor, int | None]]:
        """Every range in the order of their keys, each with the node id of its leader as far as it is known.

        ``timeout`` covers one page of the list.
        """
        return await self._list_ranges(lambda: timeout)

    async def _list_ranges(self, page_seconds: Callable[[], float]) -> list[tuple[RangeDescriptor, int | None]]:
        router = self._open_host().core.router
        found: list[tuple[RangeDescriptor, int | None]] = []
        start = b""
        while True:
            page = parse_routes(await self.call(Method.ROUTES, start, ROUTES_PER_PAGE, timeout=page_seconds()))
            for descriptor, leader in page:
                router.learn(descriptor, leader)
                if not found or descriptor.span.start >= start:
                    found.append((descriptor, leader))
                    start = max(start, descriptor.span.end or start)
            if len(page) < ROUTES_PER_PAGE or page[-1][0].span.end is None:
                return found
