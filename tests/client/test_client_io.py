"""The client's connections, tasks and ends over loopback, on trio and on asyncio: the same contract (DESIGN §2.3)."""

import asyncio
import errno
import gc
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from types import FrameType
from typing import Any

import anyio
import pytest
import trio
import trio.testing

from shardkv import errors
from shardkv.types import VALUE_BYTES_MAX, Entry
from shardkv.wire.requests import Method
from shardkv_client import Client, RealEnvironment, Settings, Stream, connect
from shardkv_client.batches import Gathering
from shardkv_client.connection import Host
from shardkv_client.core import Core
from shardkv_client.core.ledger import Ledger
from shardkv_client.core.timers import Timers
from shardkv_client.scan import Scan
from shardkv_client.waiter import AsyncioWaiter
from tests.client.fake_server import FakeServer
from tests.client.loopback import run, with_client

# --- opening, closing, cancelling -----------------------------------------------------------------------------------


def test_the_bodys_exception_leaves_as_itself(backend, server):
    """DESIGN §2.3: connect() never wraps, with connections open or not."""

    async def main() -> None:
        for first in (True, False):
            with pytest.raises(ZeroDivisionError):
                async with connect(server.addresses) as kv:
                    if first:
                        await kv.put(b"k", b"v")
                    1 / 0  # noqa: B018

    run(backend, main)


def test_a_cancelled_body_is_cancelled_and_nothing_else(backend, server):
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with connect(server.addresses) as kv:
                await kv.put(b"k", b"v")
                scope.cancel()
                await kv.put(b"k", b"v")
        assert scope.cancelled_caught

    run(backend, main)


def test_later_calls_raise_client_closed_and_pending_ones_end(backend, server):
    async def main() -> None:
        async with connect(server.addresses) as kv:
            await kv.put(b"k", b"v")
            outcomes: list[Exception] = []

            async def pending(call: Callable[[], Awaitable[Any]]) -> None:
                try:
                    await call()
                except errors.ShardKVError as error:
                    outcomes.append(error)

            server.let_go.clear()
            async with anyio.create_task_group() as group:
                group.start_soon(pending, lambda: kv.put(b"k", b"w"))
                await anyio.to_thread.run_sync(server.held.wait)
                group.start_soon(pending, lambda: kv.get(b"k"))
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                await kv.aclose()
            server.let_go.set()
            assert sorted(type(each).__name__ for each in outcomes) == ["OutcomeUnknown", "Unavailable"]
            with pytest.raises(errors.ClientClosed, match="open a new one"):
                await kv.put(b"k", b"v")
            await kv.aclose()
        with pytest.raises(errors.ClientClosed):
            async with kv:
                pass

    run(backend, main)


EVERY_CALL: dict[str, Callable[[Client], Any]] = {
    "put": lambda kv: kv.put(b"k", b"v"),
    "get": lambda kv: kv.get(b"k"),
    "delete": lambda kv: kv.delete(b"k"),
    "increment": lambda kv: kv.increment(b"n"),
    "get_many": lambda kv: kv.get_many([]),
    "put_many": lambda kv: kv.put_many([]),
    "delete_range": lambda kv: kv.delete_range(b"a", b"a"),
    "call": lambda kv: kv.call(Method.STATUS),
    "call of a range": lambda kv: kv.call(Method.SNAPSHOT, 1, range_id=1),
    "status": lambda kv: kv.status(),
    "nodes": lambda kv: kv.nodes(),
    "ranges": lambda kv: kv.ranges(),
    "scan": lambda kv: anext(kv.scan()),
    "scan of no entries": lambda kv: anext(kv.scan(limit=0)),
    "scan of no keys": lambda kv: kv.scan(b"a", b"a").next_page(),
}
"""Also those for which no node would be asked."""


@pytest.mark.parametrize("name", EVERY_CALL)
def test_every_call_of_a_closed_client_says_that_it_is_closed(backend, server, name):
    async def main() -> None:
        kv = connect(server.addresses)
        with pytest.raises(errors.ClientClosed, match="async with"):
            await EVERY_CALL[name](kv)
        async with kv:
            pass
        with pytest.raises(errors.ClientClosed, match="open a new one"):
            await EVERY_CALL[name](kv)

    run(backend, main)


def test_a_scan_gives_out_what_it_has_read_after_its_client_was_closed(backend, server):
    """And ends, where that was the last page; else its next page is a call of a closed client."""

    async def main() -> None:
        async with connect(server.addresses, settings=Settings(scan_page_entries_max=3)) as kv:
            await kv.put_many({b"%d" % number: b"v" for number in range(6)})
            begun, whole, ended, left = kv.scan(), kv.scan(limit=3), kv.scan(limit=0), kv.scan()
            for scan in (begun, whole, left):
                assert (await anext(scan)).key == b"0"
            with pytest.raises(StopAsyncIteration):
                await anext(ended)
            await left.aclose()
        for scan in (begun, whole):
            assert [(await anext(scan)).key for _ in range(2)] == [b"1", b"2"]
        for _ in range(2):
            with pytest.raises(errors.ClientClosed, match="open a new one"):
                await anext(begun)
            for scan in (whole, ended, left):
                with pytest.raises(StopAsyncIteration):
                    await anext(scan)

    run(backend, main)


def test_a_client_that_was_never_opened_says_so():
    async def main() -> None:
        with pytest.raises(errors.ClientClosed, match="async with"):
            await connect("127.0.0.1:1").get(b"k")

    trio.run(main)


def test_under_asyncio_a_client_may_be_closed_in_another_task(server):
    """DESIGN §2.3: the I/O tasks live in a task of the client's own."""

    async def main() -> None:
        kv = connect(server.addresses)
        await asyncio.create_task(kv.__aenter__())
        await asyncio.create_task(kv.put(b"k", b"v"))
        await asyncio.create_task(kv.aclose())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_under_asyncio_a_client_whose_task_never_began_can_be_closed(server):
    """DESIGN §2.3: nothing hangs. A loop that shuts down cancels the client's task even before its first step."""

    async def main() -> None:
        kv = connect(server.addresses)
        await kv.__aenter__()
        (own,) = asyncio.all_tasks() - {asyncio.current_task()}
        own.cancel()
        await asyncio.wait_for(kv.aclose(), 10)
        await kv.aclose()
        with pytest.raises(errors.ClientClosed):
            await kv.get(b"k")

    asyncio.run(main())


def test_an_async_generator_may_hold_the_client_open_on_asyncio(server):
    """As test fixtures and web frameworks do, which close it from another task."""

    async def opened():
        async with connect(server.addresses) as kv:
            yield kv

    async def main() -> None:
        source = opened()
        kv = await asyncio.create_task(anext(source))
        version = await kv.put(b"k", b"v")
        assert await kv.get(b"k") == Entry(b"k", b"v", version)
        await asyncio.create_task(source.aclose())
        with pytest.raises(errors.ClientClosed):
            await kv.get(b"k")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_one_client_serves_many_tasks(backend, server):
    async def body(kv: Client) -> None:
        async def count() -> None:
            for _ in range(20):
                await kv.increment(b"n")

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(count)
        assert (await kv.get(b"n")).value == b"1000"

    with_client(backend, server, body, settings=Settings(calls_in_flight_max=16))


def test_cancelling_callers_at_any_moment_leaves_the_client_whole(backend, server):
    """Cancellation is safe at every await; what was sent stays registered until it is answered."""

    async def body(kv: Client) -> None:
        for steps in range(12):
            async with anyio.create_task_group() as group:
                for index in range(5):
                    group.start_soon(kv.put, b"k%d" % index, b"v")
                    group.start_soon(kv.get, b"k%d" % index)
                group.start_soon(kv.put_many, {b"%03d" % i: b"v" for i in range(600)})
                group.start_soon(kv.get_many, [b"%03d" % i for i in range(600)])
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            kv._open_host().core.check()
            version = await kv.put(b"last", b"v")
            assert await kv.get(b"last") == Entry(b"last", b"v", version)
        while kv._open_host().core.session.unsettled:
            await kv.get(b"last")

    with_client(backend, server, body)


class EndingWithADial(RealEnvironment):
    """Where every timeout is over as soon as a dial has failed, and no sooner."""

    failed = False

    def monotonic(self) -> float:  # type: ignore[override]
        return time.monotonic() + 3_600 * self.failed

    async def dial(self, address: str) -> Stream:
        try:
            return await super().dial(address)
        except OSError:
            self.failed = True
            raise


def test_nobody_there_is_unavailable_in_time(backend):
    """Nothing hangs: the timeout covers the dialling too."""

    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"
            async with connect(address, environment=EndingWithADial()) as kv:
                with pytest.raises(errors.Unavailable, match=address):
                    await kv.put(b"k", b"v", timeout=600)

    run(backend, main)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_client_whose_process_may_open_no_more_files_is_told_so(backend, server, monkeypatch, by_name):
    """It was told to check the addresses, which were right, and of too many open files, which may be the node's. To
    look up a name takes files, too, and without them none is known."""
    addresses = server.addresses.replace("127.0.0.1", "localhost") if by_name else server.addresses

    def no_files(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    def no_names(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def main() -> None:
        async with connect(addresses, environment=EndingWithADial()) as kv:
            with monkeypatch.context() as short:
                short.setattr(socket, "socket", no_files)
                if by_name:
                    short.setattr(socket, "getaddrinfo", no_names)
                with pytest.raises(errors.Unavailable, match=r"this process may open no more files.*ulimit -n") as told:
                    await kv.put(b"k", b"v", timeout=600)
            assert "addresses" not in str(told.value)
            await kv.put(b"k", b"v")

    run(backend, main)


def test_large_values_pass_when_the_socket_is_full(backend, server):
    """More than a socket buffer: the rest is written by a writer that runs only then."""

    async def body(kv: Client) -> None:
        value = bytes(range(256)) * 4096
        assert await kv.put_many({b"%02d" % i: value for i in range(24)}) == 24
        found = await kv.get_many([b"%02d" % i for i in range(8)])
        assert all(entry.value == value for entry in found.values())

    with_client(backend, server, body, settings=Settings(keys_per_get_max=4))


# --- broken connections ---------------------------------------------------------------------------------------------


def exchange_bytes(backend: str) -> tuple[int, int]:
    """How many bytes a connection carries for one increment: received and sent by the server."""
    with FakeServer() as server:
        received: list[int] = []
        sent: list[int] = []
        answer = server._answer

        def counted(node, kind, payload):
            received.append(len(payload) + 6)
            result = answer(node, kind, payload)
            sent.append(len(result))
            return result

        server._answer = counted  # type: ignore[method-assign]
        with_client(backend, server, lambda kv: kv.increment(b"n"))
        return sum(received), sum(sent)


@pytest.mark.parametrize("side", ["receive", "send"])
def test_a_connection_may_break_at_every_byte(backend, side):
    """DESIGN §4.6: whatever was lost of the request or of the answer, the increment is applied once."""
    total = exchange_bytes(backend)[side == "send"]
    settings = Settings(backoff_seconds_min=0.0001, backoff_seconds_max=0.0002)
    with FakeServer() as server:

        async def main() -> None:
            for cut in range(1, total + 1):
                setattr(server, f"{side}_cut", cut)
                async with connect(server.addresses, settings=settings) as kv:
                    assert await kv.increment(b"n") == cut
                    assert server.cuts == cut, "the connection was not cut"

        run(backend, main)
        assert len(server.cluster.applied) == total


def test_a_connection_that_broke_while_idle_is_made_anew(backend, server):
    async def body(kv: Client) -> None:
        await kv.put(b"k", b"v")
        server.drop_connections(listeners=False)
        await kv.put(b"k", b"w")
        assert (await kv.get(b"k")).value == b"w"

    with_client(backend, server, body)


def open_sockets() -> set[socket.socket]:
    return {each for each in gc.get_objects() if type(each) is socket.socket and each.fileno() != -1}


def test_no_socket_and_no_task_is_left_behind(backend, server):
    """A socket that only the garbage collector closes is a ResourceWarning, and these are errors here."""

    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living if backend == "trio" else len(asyncio.all_tasks())

    async def main() -> None:
        before = tasks()
        for _ in range(3):
            async with connect(server.addresses) as kv:
                await kv.put(b"k", b"v")
                assert tasks() > before
            assert tasks() == before

    before = open_sockets()
    run(backend, main)
    gc.collect()
    assert open_sockets() - before <= set(server._sockets)


async def test_trio_sees_no_abandoned_generators(server):
    """put_many stops reading early without leaving a generator to the collector."""
    async with connect(server.addresses) as kv:

        async def pairs():
            for i in range(10_000):
                yield (b"k%d" % i if i != 700 else "bad"), b"v"

        async with aclosing(pairs()) as source:
            with pytest.raises(errors.BatchError):
                await kv.put_many(source)
    gc.collect()


def test_what_a_cancelled_body_raises_leaves_as_itself(backend, server):
    """The cancellation must not take its place."""

    async def main() -> None:
        left: list[type[BaseException]] = []
        with anyio.CancelScope() as scope:
            try:
                async with connect(server.addresses) as kv:
                    await kv.put(b"k", b"v")
                    scope.cancel()
                    try:
                        await kv.put(b"k", b"v")
                    finally:
                        with anyio.CancelScope(shield=True):
                            for _ in range(100):
                                await anyio.lowlevel.checkpoint()
                        1 / 0  # noqa: B018
            except BaseException as error:
                left.append(type(error))
        assert left == [ZeroDivisionError]

    run(backend, main)


def test_a_cancelled_body_may_tidy_up_with_the_client(backend, server):
    """DESIGN §2.3: the same on both. What is shielded is not cancelled, and neither are the connections under it."""

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with connect(server.addresses) as kv:
                await kv.put(b"lock", b"mine")
                scope.cancel()
                try:
                    await kv.get(b"lock")
                finally:
                    with anyio.CancelScope(shield=True):
                        for _ in range(100):
                            await anyio.lowlevel.checkpoint()
                        assert await kv.delete(b"lock")
        assert scope.cancelled_caught
        assert not server.cluster.data

    run(backend, main)


def test_an_interrupt_is_raised_in_the_body_and_not_in_the_clients_own_tasks(server):
    """DESIGN §2.3: connect() never wraps. Most moments of a busy program lie in the client's tasks."""

    async def main(task_name: str) -> None:
        class Interrupting(RealEnvironment):
            def monotonic(self) -> float:  # type: ignore[override]
                task = trio.lowlevel.current_task()
                if task.name.endswith(task_name) and not interrupted:
                    interrupted.append(task.name)
                    signal.raise_signal(signal.SIGINT)
                return time.monotonic()

        interrupted: list[str] = []
        async with connect(server.addresses, environment=Interrupting()) as kv:
            with pytest.raises(KeyboardInterrupt):
                for _ in range(100):
                    await kv.put(b"k", b"v")
            assert interrupted
            await kv.put(b"k", b"after")

    for task_name in ("shardkv client", "_serve", "_keep_time"):
        trio.run(main, task_name)


@pytest.mark.parametrize("caught", [False, True], ids=["at the end", "in the body"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", ["put", "put_many", "get_many"])
def test_an_interrupt_half_way_into_a_call_leaves_the_client_whole(server, monkeypatch, method, count, caught):
    """The call is known to the client by then, and nobody waits for it yet."""
    left = -1
    submit = Timers.add_deadline

    def interrupting(timers: Timers, call: Any) -> None:
        nonlocal left
        submit(timers, call)
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)

    async def call(kv: Client) -> None:
        if method == "put":
            for _ in range(5):
                await kv.put(b"k", b"v")
        elif method == "put_many":
            await kv.put_many((b"%d" % number, b"v") for number in range(1_000))
        else:
            await kv.get_many([b"%d" % number for number in range(10)])

    async def main() -> None:
        nonlocal left
        async with connect(server.addresses) as kv:
            await kv.put(b"first", b"v")
            left = count
            if caught:
                with pytest.raises(KeyboardInterrupt):
                    await call(kv)
                await kv.put(b"k", b"after")
                assert await kv.get(b"k") is not None
            else:
                await call(kv)

    monkeypatch.setattr(Timers, "add_deadline", interrupting)
    if caught:
        trio.run(main)
    else:
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)


class Interrupt:
    """Comes, while it is entered, at the ``line``-th line that runs of some functions, and at those that follow it."""

    def __init__(self, functions: Iterable[Callable[..., Any]], line: int, count: int) -> None:
        self._code = {function.__code__ for function in functions}
        self._left = line
        self._count = count

    @property
    def came(self) -> bool:
        return self._left <= 0

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code in self._code and event == "line":
            self._left -= 1
            if -self._count < self._left <= 0:
                signal.raise_signal(signal.SIGINT)
        return self._trace


def interrupts_at_each_line(*functions: Callable[..., Any], count: int = 1) -> Iterator[Interrupt]:
    """One after the other, up to that which does not come any more, for want of lines."""
    for line in range(1, 1_000):
        interrupt = Interrupt(functions, line, count)
        yield interrupt
        if not interrupt.came:
            return
    raise AssertionError("more lines than were tried")


@pytest.mark.parametrize("interrupts", [1, 2, 3])
def test_an_interrupt_amid_opening_or_closing_leaves_as_itself(server, interrupts):
    """DESIGN §2.3: connect() never wraps. Whoever interrupts twice meets the way out with the second: at any line
    of it, and at those that follow."""

    async def main() -> None:
        async with connect(server.addresses) as kv:
            await kv.put(b"k", b"v")

    ways_in_and_out = (Client.__aenter__, Client.__aexit__, Client.aclose, Host.close, Host.aclose)
    for interrupt in interrupts_at_each_line(*ways_in_and_out, count=interrupts):
        try:
            with interrupt:
                trio.run(main)
        except KeyboardInterrupt:
            continue
        assert not interrupt.came, "it was lost"


@pytest.mark.parametrize(
    "functions",
    [
        (AsyncioWaiter.wait, Gathering.submit, Gathering.until, Ledger.submit),
        (Host._keep_flushing, Core.flush, Core.link_bytes),
    ],
    ids=["calls", "tasks"],
)
def test_two_interrupts_under_asyncio_leave_as_one(server, caplog, functions):
    """asyncio raises the second wherever its loop is. In one of the client's tasks it was told once more, in a
    traceback, and amid a call it had the client raise KeyError or AttributeError as it closed."""

    async def main(interrupt: Interrupt) -> None:
        async with connect(server.addresses) as kv:
            await kv.put(b"k", b"v")
            with interrupt:
                await kv.put(b"k", b"v")
                await kv.put_many({b"k": b"v"})

    for interrupt in interrupts_at_each_line(*functions, count=2):
        try:
            asyncio.run(main(interrupt))
        except KeyboardInterrupt:
            continue
        assert not interrupt.came, "it was lost"
    gc.collect()
    assert caplog.messages == []


def test_what_ends_the_clients_tasks_and_is_no_interrupt_is_not_passed_over(server):
    class Odd(BaseException):
        pass

    class Failing(RealEnvironment):
        async def sleep(self, seconds: float) -> None:
            raise Odd

    async def main() -> None:
        async with connect(server.addresses, environment=Failing()) as kv:
            with pytest.raises(errors.Unavailable, match="tasks have ended"):
                await kv.get(b"k")
            assert kv._task is not None
            await asyncio.wait([kv._task])
            group = kv._task.exception()
            assert isinstance(group, BaseExceptionGroup)
            assert [type(each) for each in group.exceptions] == [Odd]

    asyncio.run(main())


def test_an_interrupt_amid_aclose_ends_the_pending_calls_all_the_same():
    """DESIGN §2.3: closing fails pending calls as a deadline would. A closed client keeps none."""

    async def pending(kv: Client) -> None:
        with pytest.raises(errors.Unavailable):
            await kv.get(b"k", timeout=3_600)

    async def main(interrupt: Interrupt) -> None:
        with trio.fail_after(30):
            async with connect("127.0.0.1:1") as kv, trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(pending, kv)
                await trio.testing.wait_all_tasks_blocked()
                try:
                    with interrupt:
                        await kv.aclose()
                        await trio.lowlevel.checkpoint()  # one that came with the last line is raised here
                except KeyboardInterrupt:
                    assert interrupt.came
                else:
                    assert not interrupt.came

    for interrupt in interrupts_at_each_line(Client.aclose, Host.close, Host.aclose, Core.close):
        trio.run(main, interrupt)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_that_goes_on_after_an_interrupt_has_missed_nothing(server, reverse):
    """Whenever it comes: also at each line by which a page is taken apart."""
    wanted = [b"%02d" % number for number in range(40)]

    async def main(interrupt: Interrupt) -> None:
        async with connect(server.addresses, settings=Settings(scan_page_entries_max=15)) as kv:
            await kv.put_many((key, b"v") for key in wanted)
            keys, interrupts, scan = [], 0, kv.scan(reverse=reverse)
            with interrupt:
                while interrupts <= 1:
                    try:
                        async for each in scan:
                            keys.append(each.key)
                        await trio.lowlevel.checkpoint()  # one that came with the last page is raised here
                        break
                    except KeyboardInterrupt:
                        interrupts += 1
            assert interrupts == interrupt.came
            assert keys == sorted(wanted, reverse=reverse)

    for interrupt in interrupts_at_each_line(Scan._take):
        trio.run(main, interrupt)


def test_a_list_is_checked_to_its_end_before_anything_is_sent(backend, server):
    """DESIGN §2.3: limits are checked before anything is sent, where the input can be looked at twice."""

    async def body(kv: Client) -> None:
        pairs = [(b"%04d" % i, b"v") for i in range(2_000)]
        for bad in ([*pairs, ("no", b"v")], dict(pairs) | {b"big": b"v" * (VALUE_BYTES_MAX + 1)}):
            with pytest.raises((TypeError, errors.ValueTooLarge)):
                await kv.put_many(bad)
        assert not server.cluster.data

    with_client(backend, server, body)


def test_a_put_many_that_is_cancelled_while_it_reads_lets_go_of_what_is_out(backend, server):
    async def body(kv: Client) -> None:
        await kv.put(b"k", b"v")
        server.let_go.clear()

        async def pairs():
            for i in range(300):
                yield b"%04d" % i, b"v"
            await anyio.to_thread.run_sync(server.held.wait)
            scope.cancel()
            await anyio.sleep_forever()

        with anyio.CancelScope() as scope:
            async with aclosing(pairs()) as source:
                await kv.put_many(source)
        ledger = kv._open_host().core.ledger
        assert ledger.calls_active == 256
        assert all(call.notify is None for call in kv._open_host().core.timers.live())
        server.let_go.set()
        await kv.get(b"k")
        assert ledger.calls_active == 0

    with_client(backend, server, body)
