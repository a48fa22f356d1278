"""What each method of the client does, takes and refuses, on trio and on asyncio alike (DESIGN §2.3, §2.4)."""

import asyncio
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import anyio
import pytest
import trio

from shardkv import errors
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX, Entry
from shardkv.wire.requests import Method
from shardkv_client import Client, Settings, batches, connect
from shardkv_client.batches import CHUNK_BYTES_MAX, Gathering
from tests.client.loopback import with_client

# --- what each method does ------------------------------------------------------------------------------------------


def test_single_keys_are_written_read_and_deleted(backend, server):
    async def body(kv: Client) -> None:
        version = await kv.put(b"k", b"v")
        assert await kv.get(b"k") == Entry(b"k", b"v", version)
        assert await kv.get(b"other") is None
        newer = await kv.put(b"k", b"w", if_version=version)
        assert newer > version
        with pytest.raises(errors.VersionMismatch) as caught:
            await kv.put(b"k", b"x", if_version=version)
        assert caught.value.current == newer
        with pytest.raises(errors.VersionMismatch):
            await kv.delete(b"k", if_version=version)
        assert await kv.delete(b"k", if_version=newer) is True
        assert await kv.delete(b"k") is False
        assert await kv.increment(b"n", 5) == 5
        assert await kv.increment(b"n", -7) == -2
        assert await kv.increment(b"n") == -1
        assert (await kv.get(b"n", consistency="follower")).value == b"-1"
        assert (await kv.get(b"n", consistency="stale")).value == b"-1"
        await check_ages(kv)
        await kv.put(b"empty", b"")
        assert (await kv.get(b"empty")).value == b""

    with_client(backend, server, body)


def test_get_many_keeps_the_order_asked_and_leaves_absent_keys_out(backend, server):
    async def body(kv: Client) -> None:
        server.cluster.split(b"05", leader=2)
        await kv.put_many({b"%02d" % i: b"%d" % i for i in range(10)})
        found = await kv.get_many([b"09", b"xx", b"01", b"09"])
        assert list(found) == [b"09", b"01"]
        assert found[b"09"].value == b"9"
        assert await kv.get_many([]) == {}
        assert len(await kv.get_many(b"%02d" % (i % 50) for i in range(5_000))) == 10

    with_client(backend, server, body)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit": 7},
        {"limit": 0},
        {"limit": 60},
        {"prefix": b"1"},
        {"prefix": b"1", "limit": 3},
        {"prefix": b""},
        {"start": b"15", "end": b"75"},
        {"start": b"50"},
        {"end": b"50"},
        {"start": b"20", "end": b"20"},
        {"keys_only": True},
    ],
    ids=repr,
)
def test_scans_go_from_range_to_range_in_both_directions(backend, server, options, reverse):
    """Strict order, nothing twice, from page to page and from range to range."""
    for key, leader in ((b"20", 2), (b"50", 3), (b"75", 1)):
        server.cluster.split(key, leader=leader)

    async def body(kv: Client) -> None:
        await kv.put_many({b"%02d" % i: b"v%d" % i for i in range(100)})
        found = [entry async for entry in kv.scan(**options, reverse=reverse)]
        keys = [b"%02d" % i for i in range(100)]
        start, end, prefix = options.get("start", b""), options.get("end"), options.get("prefix", b"")
        keys = [key for key in keys if key >= start and (end is None or key < end) and key.startswith(prefix)]
        if reverse:
            keys.reverse()
        assert [entry.key for entry in found] == keys[: options.get("limit")]
        wanted = b"" if options.get("keys_only") else None
        assert all(entry.value == (b"v%d" % int(entry.key) if wanted is None else wanted) for entry in found)

    with_client(backend, server, body, settings=Settings(scan_page_entries_max=8))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_range_that_splits_between_two_pages_shows_nothing_twice(backend, server, reverse):
    async def body(kv: Client) -> None:
        await kv.put_many({b"%02d" % i: b"v" for i in range(100)})
        found = []
        async for entry in kv.scan(reverse=reverse):
            found.append(entry.key)
            if len(found) == 12:
                server.cluster.split(b"15", leader=2)
                server.cluster.split(b"90", leader=3)
            if len(found) == 45:
                server.cluster.merge(b"00")
        assert found == sorted(server.cluster.data, reverse=reverse)

    with_client(backend, server, body, settings=Settings(scan_page_entries_max=10))


def test_a_scan_may_be_closed_early_and_read_on_after_a_cancelled_page(backend, server):
    """DESIGN §2.3: an object, no async generator; nothing of it spans two entries."""

    async def body(kv: Client) -> None:
        await kv.put_many({b"%02d" % i: b"v" for i in range(20)})
        async with kv.scan() as scan:
            assert (await anext(scan)).key == b"00"
        with pytest.raises(StopAsyncIteration):
            await anext(scan)
        scan = kv.scan()
        for _ in range(5):
            await anext(scan)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(scan)
        assert scope.cancelled_caught
        assert [entry.key async for entry in scan] == [b"%02d" % i for i in range(5, 20)]
        await scan.aclose()

    with_client(backend, server, body, settings=Settings(scan_page_entries_max=5))


@pytest.mark.parametrize("shape", ["mapping", "list", "iterator", "async"])
def test_put_many_takes_mappings_and_iterables(backend, server, shape):
    pairs = {b"%04d" % i: b"%d" % i for i in range(2_000)}
    server.cluster.split(b"1000", leader=2)

    async def asynchronously():
        for pair in pairs.items():
            yield pair

    async def body(kv: Client) -> None:
        written: list[int] = []
        source: Any = {
            "mapping": pairs,
            "list": list(pairs.items()),
            "iterator": iter(pairs.items()),
            "async": asynchronously(),
        }[shape]
        assert await kv.put_many(source, progress=written.append) == 2_000
        assert written == sorted(written)
        assert written[-1] == 2_000
        assert {key: value for key, (value, _) in server.cluster.data.items()} == pairs

    with_client(backend, server, body)


def test_the_last_pair_of_a_key_wins_even_when_attempts_are_repeated(backend, server):
    """DESIGN §2.3: within a chunk the later pair replaces the earlier; a key that is out is waited for."""

    async def body(kv: Client) -> None:
        await kv.put(b"x", b"x")
        server.send_cut = None
        pairs = [(b"%03d" % (i % 400), b"%d" % i) for i in range(4_000)]
        server.drop_connections(listeners=False)
        assert await kv.put_many(pairs) == 4_000
        for key, (value, _) in server.cluster.data.items():
            if key != b"x":
                assert int(value) == 3_600 + int(key)

    with_client(backend, server, body)


def test_a_call_that_ended_keeps_no_answer(backend, server):
    """It stays in the heap of deadlines for as long as one with an earlier deadline waits."""

    async def body(kv: Client) -> None:
        await kv.put(b"k", bytes(10_000))
        for _ in range(3):
            assert await kv.get(b"k") is not None
            assert await kv.get_many([b"k", b"l"])
            assert [entry.key async for entry in kv.scan()] == [b"k"]
        assert kv._host is not None
        ended = [entry[2] for entry in kv._host.core.timers._deadlines if entry[2].done]
        assert len(ended) >= 12, "the heap keeps them"
        assert all(call.result is None for call in ended)

    with_client(backend, server, body)


def test_put_many_has_few_bytes_out_at_once(backend, server, monkeypatch):
    """Of large values a generator would else be read far ahead, and all deadlines run from then on."""
    highest = 0
    original = Gathering.submit

    def counted(gathering: Gathering, call: Any) -> None:
        nonlocal highest
        original(gathering, call)
        highest = max(highest, gathering.bytes_out)

    monkeypatch.setattr(Gathering, "submit", counted)

    async def body(kv: Client) -> None:
        assert await kv.put_many((b"%04d" % number, bytes(200_000)) for number in range(60)) == 60
        assert len(server.cluster.data) == 60

    with_client(backend, server, body)
    assert 2 * CHUNK_BYTES_MAX < highest < 5 * CHUNK_BYTES_MAX


def test_put_many_names_what_is_not_known_to_be_written(backend, server):
    """BatchError: it stops sending, waits for what is out, and counts."""
    refuse = b"0777"
    for node in server.cluster.nodes.values():
        node.faults.append(
            lambda request: (
                errors.OutOfSpace("full") if request.method == Method.WRITE and refuse in request.arguments[1] else None
            )
        )

    async def body(kv: Client) -> None:
        with pytest.raises(errors.BatchError, match="full") as caught:
            await kv.put_many((b"%04d" % i, b"v") for i in range(5_000))
        error = caught.value
        assert isinstance(error.__cause__, errors.OutOfSpace)
        assert refuse in error.failed
        assert 778 <= error.consumed < 5_000
        consumed = {b"%04d" % i for i in range(error.consumed)}
        assert set(server.cluster.data) == consumed - set(error.failed)

    with_client(backend, server, body)


def fails_after(pairs, error):
    yield from pairs
    raise error


def test_of_several_failures_put_many_names_the_one_that_may_have_been_applied(backend, server):
    """By its cause callers decide what to do, and the command line its exit code."""
    server.cluster.split(b"m", leader=2)

    async def body(kv: Client) -> None:
        host = kv._open_host()
        for problems in (
            [errors.Unavailable("nobody"), errors.OutcomeUnknown("lost")],
            [errors.OutcomeUnknown("lost"), errors.Unavailable("nobody")],
        ):
            writer = await kv.begin_put_many(10.0)
            for key in (b"a", b"z"):
                writer.add((key, b"v"))
            with patch.object(host.core, "submit", lambda call: None):
                await writer.send()
            for call, problem in zip(list(writer._gathering.out), problems):
                call.done, call.error = True, problem
                call.notify(call)
            with pytest.raises(errors.BatchError, match="lost") as caught:
                await writer.end()
            assert isinstance(caught.value.__cause__, errors.OutcomeUnknown)
            assert caught.value.failed == (b"a", b"z")

    with_client(backend, server, body)


def test_a_client_of_another_loop_of_the_same_thread_is_refused_and_stays_whole(server):
    """As when the fixtures of a test session have a loop of their own. Nothing is written behind the error's back."""
    kv = connect(server.addresses)
    home, abroad = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        home.run_until_complete(kv.__aenter__())
        for call in (lambda: kv.put(b"k", b"v"), lambda: kv.put_many({b"k": b"v"}), kv.aclose):
            with pytest.raises(RuntimeError, match="another event loop"):
                abroad.run_until_complete(call())
        assert home.run_until_complete(kv.get(b"k")) is None
        home.run_until_complete(kv.aclose())
        abroad.run_until_complete(kv.aclose())
    finally:
        home.close()
        abroad.close()


def test_a_task_of_the_loop_that_trio_is_a_guest_of_is_refused(server):
    """Both loops run in one thread, and a task of the one finds what belongs to the other."""
    refused: list[str] = []

    async def guest(hosts: asyncio.AbstractEventLoop) -> None:
        async def hosts_task(kv: Client) -> None:
            with pytest.raises(RuntimeError, match="another event loop") as caught:
                await kv.put(b"k", b"v")
            refused.append(str(caught.value))

        async with connect(server.addresses) as kv:
            await kv.put(b"k", b"trio's")
            task = hosts.create_task(hosts_task(kv))
            while not task.done():
                await trio.lowlevel.checkpoint()
            task.result()
            entry = await kv.get(b"k")
            assert entry is not None
            assert entry.value == b"trio's"

    async def host() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest, loop, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=ended.set_result
        )
        (await ended).unwrap()

    asyncio.run(host())
    assert len(refused) == 1


def test_a_client_whose_loop_has_ended_is_closed(server):
    """What is raised tells what to do, and a second close in another loop is none."""
    kv = connect(server.addresses)

    async def body() -> None:
        await kv.__aenter__()
        await kv.put(b"k", b"v")

    asyncio.run(body())

    async def later() -> None:
        with pytest.raises(errors.ClientClosed, match="open a new one"):
            await kv.get(b"k")
        await kv.aclose()

    asyncio.run(later())
    trio.run(later)


def test_get_many_leaves_places_to_other_calls(backend, server):
    async def body(kv: Client) -> None:
        out: list[int] = []
        submit = kv._open_host().core.submit

        def noted(call: Any) -> None:
            submit(call)
            out.append(kv._open_host().core.ledger.calls_active)

        with patch.object(kv._open_host().core, "submit", noted):
            assert await kv.get_many(b"%05d" % i for i in range(5_000)) == {}
        assert len(out) == 5_000
        assert max(out) <= 768 < kv._settings.calls_in_flight_max

    with_client(backend, server, body)


def test_a_get_many_that_fails_does_not_begin_the_rest(backend, server):
    for node in server.cluster.nodes.values():
        node.faults.append(lambda request: errors.OutOfSpace("full") if request.method == Method.GET else None)

    async def body(kv: Client) -> None:
        with pytest.raises(errors.OutOfSpace):
            await kv.get_many(b"%05d" % i for i in range(100_000))
        asked = [request for node in server.cluster.nodes.values() for request in node.requests]
        assert sum(len(request.arguments[1]) for request in asked if request.method == Method.GET) <= 2_000

    with_client(backend, server, body)


def test_every_key_is_deleted_only_if_the_caller_says_so(backend, server):
    """The prefix of a tenant whose name is missing is None, or empty."""

    async def body(kv: Client) -> None:
        await kv.put_many({b"a": b"1", b"b": b"2"})
        for arguments in ({}, {"prefix": None}, {"prefix": b""}):
            with pytest.raises(errors.InvalidRange, match="every key"):
                await kv.delete_range(**arguments)
        assert len(server.cluster.data) == 2
        await kv.delete_range(end=b"b")
        assert list(server.cluster.data) == [b"b"]
        await kv.delete_range(b"")
        assert not server.cluster.data

    with_client(backend, server, body)


def test_bad_input_in_put_many_sends_nothing_or_says_what_was_sent(backend, server):
    async def body(kv: Client) -> None:
        for bad in ({b"a": b"1", "b": b"2"}, [(b"a", b"1"), (b"b", 2)], iter([(b"b",), (b"a", b"1")]), 5, [b"ab"]):
            with pytest.raises(TypeError):
                await kv.put_many(bad)
        with pytest.raises(errors.KeyTooLarge):
            await kv.put_many([(b"a", b"1"), (b"", b"2")])
        with pytest.raises(errors.BatchError, match="put_many stopped: TimeoutError; 2 keys of the 2") as caught:
            await kv.put_many(fails_after([(b"a", b"1"), (b"b", b"2")], TimeoutError()))
        assert (caught.value.consumed, caught.value.failed) == (2, (b"a", b"b"))
        assert not server.cluster.data
        with pytest.raises(errors.BatchError) as caught:
            await kv.put_many((b"%04d" % i, b"v") if i != 3_000 else ("no", b"v") for i in range(5_000))
        assert caught.value.consumed == 3_000
        assert isinstance(caught.value.__cause__, TypeError)
        assert len(server.cluster.data) + len(caught.value.failed) == 3_000

    with_client(backend, server, body)


@pytest.mark.parametrize(
    ("pair", "error"),
    [
        ((b"", b"v"), errors.KeyTooLarge),
        ((bytes(KEY_BYTES_MAX + 1), b"v"), errors.KeyTooLarge),
        ((b"k", bytes(VALUE_BYTES_MAX + 1)), errors.ValueTooLarge),
        (("k", b"v"), TypeError),
        ((b"k", "v"), TypeError),
        ((b"k", bytearray(b"v")), TypeError),
        ((b"k",), TypeError),
        (7, TypeError),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_no_pair_that_a_node_would_refuse_is_taken(pair, error):
    with pytest.raises(error):
        batches.checked_pair(pair)
    good = (bytes(KEY_BYTES_MAX), bytes(VALUE_BYTES_MAX))
    assert batches.checked_pair(good) == good
    chunk, problem = batches.read_chunk(iter([(b"k", b"v"), pair, (b"l", b"w")]))
    assert chunk == [(b"k", b"v")]
    assert isinstance(problem, error)


def test_a_chunk_is_read_up_to_its_bounds_and_no_further(monkeypatch):
    """What is read is in memory, whatever the input holds."""
    monkeypatch.setattr(batches, "CHUNK_PAIRS_MAX", 10)
    monkeypatch.setattr(batches, "CHUNK_BYTES_MAX", 1_000)
    for value_bytes, count in ((1, 10), (299, 4), (5_000, 1)):
        source = iter([(b"k", bytes(value_bytes))] * 30)
        chunk, problem = batches.read_chunk(source)
        assert (len(chunk), problem) == (count, None)
        assert len(list(source)) == 30 - count


@pytest.mark.parametrize("count", [1, 3_000])
def test_put_many_whose_progress_fails_says_what_is_written(backend, server, count):
    async def body(kv: Client) -> None:
        with pytest.raises(errors.BatchError, match="division by zero") as caught:
            await kv.put_many(((b"%04d" % i, b"v") for i in range(count)), progress=lambda done: done / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.value.consumed - len(caught.value.failed) == len(server.cluster.data) > 0
        server.cluster.data.clear()
        with pytest.raises(TypeError, match="progress"):
            await kv.put_many({b"k": b"v"}, progress=5)  # type: ignore[arg-type]
        assert not server.cluster.data

    with_client(backend, server, body)


def test_a_client_of_another_threads_loop_is_refused_and_stays_whole(backend, server):
    """Its tasks ended, as if by a bug, and every later call with them."""

    async def body(kv: Client) -> None:
        await kv.put(b"k", b"v")

        async def abroad() -> None:
            for call in (
                lambda: kv.get(b"k"),
                lambda: kv.get_many([b"k"]),
                lambda: kv.put_many({b"k": b"w"}),
                lambda: kv.delete_range(b""),
                lambda: kv.aclose(),
                lambda: kv.scan().next_page(),
            ):
                with pytest.raises(RuntimeError, match="another event loop"):
                    await call()

        for run in (trio.run, lambda main: asyncio.run(main())):
            await anyio.to_thread.run_sync(run, abroad)
        entry = await kv.get(b"k")
        assert entry is not None
        assert entry.value == b"v"

    with_client(backend, server, body)


def test_delete_range_deletes_from_range_to_range(backend, server):
    for key in (b"20", b"50", b"75"):
        server.cluster.split(key, leader=2)

    async def body(kv: Client) -> None:
        await kv.put_many({b"%02d" % i: b"v" for i in range(100)})
        await kv.delete_range(b"10", b"80")
        assert list(server.cluster.data) == [b"%02d" % i for i in range(100) if i < 10 or i >= 80]
        await kv.delete_range(prefix=b"0")
        assert list(server.cluster.data) == [b"%02d" % i for i in range(80, 100)]
        await kv.delete_range(b"85", b"85")
        await kv.delete_range(b"")
        assert not server.cluster.data

    with_client(backend, server, body)


def test_a_delete_range_that_ends_half_way_is_of_unknown_outcome(backend, server):
    """Unavailable promises that nothing was applied; here something was."""
    server.cluster.split(b"50", leader=2)
    server.cluster.nodes[2].faults.append(
        lambda request: errors.PermissionDenied("not yours") if request.method == Method.WRITE else None
    )

    async def body(kv: Client) -> None:
        with pytest.raises(errors.OutcomeUnknown, match="not yours"):
            await kv.delete_range(b"10", b"80")

    with_client(backend, server, body)


def test_the_cluster_can_be_listed(backend, server):
    server.cluster.split(b"m", leader=2)

    async def body(kv: Client) -> None:
        assert [node.name for node in await kv.nodes()] == ["node1", "node2", "node3"]
        ranges = await kv.ranges()
        assert [(descriptor.span, leader) for descriptor, leader in ranges] == [((b"", b"m"), 1), ((b"m", None), 2)]
        assert (await kv.status())["node"] in (1, 2, 3)
        assert (await kv.call(Method.SPLIT, b"x", range_id=2))["node"] == 2
        assert (await kv.call(Method.NODE_STATUS, node_id=3))["node"] == 3
        with pytest.raises(errors.NotFound, match="list the ranges"):
            await kv.call(Method.SPLIT, b"x", range_id=99)
        with pytest.raises(errors.UnknownMethod):
            await kv.call(999)

    with_client(backend, server, body)


def test_a_call_by_range_id_has_one_timeout_for_the_list_of_ranges_and_itself(backend, server):
    """DESIGN §2.3: timeout covers one call, and a cluster may have many pages of ranges."""
    for number in range(300):
        server.cluster.split(b"%04d" % number, leader=1)

    async def body(kv: Client) -> None:
        timeouts: list[float] = []
        call = kv.call

        async def counted(*arguments: Any, timeout: float, **options: Any) -> Any:
            timeouts.append(timeout)
            return await call(*arguments, timeout=timeout, **options)

        kv.call = counted  # type: ignore[method-assign]
        assert (await call(Method.SPLIT, b"x", range_id=300, timeout=20.0))["node"] == 1
        assert len(timeouts) == 2
        assert timeouts[1] < timeouts[0] <= 20.0

    with_client(backend, server, body)


async def check_ages(kv: Client) -> None:
    """DESIGN 2.3: the answer of a stale read says how stale it is at most, also of keys that are absent."""
    ages: list[float] = []
    assert await kv.get(b"absent", consistency="stale", max_age=0, on_age=ages.append) is None
    assert await kv.get(b"n", on_age=ages.append) is not None
    assert ages == [0.0, 0.0]
    many: list[float] = []
    await kv.get_many([b"n", b"absent"], consistency="stale", max_age=2.5, on_age=many.append)
    await kv.get_many([], consistency="stale", on_age=many.append)
    assert len(many) == 2
    assert many[0] in (0.0, 0.0015)
    pages: list[float] = []
    async for _ in kv.scan(consistency="stale", max_age=2.5, on_age=pages.append):
        assert pages
    assert set(pages) <= {0.0, 0.0015}


@pytest.mark.parametrize("max_age", [1.7e308, 10**308], ids=repr)
async def test_an_age_however_large_is_allowed(autojump_clock, max_age):
    """docs/client.md: any number of seconds; Unavailable, as nobody is there to answer."""
    async with connect("127.0.0.1:1") as kv:
        with pytest.raises(errors.Unavailable):
            await kv.get(b"k", consistency="stale", max_age=max_age, timeout=0)


# --- types and limits -----------------------------------------------------------------------------------------------


def test_types_come_first_then_limits_and_nothing_is_sent():
    """DESIGN §2.3. No server: whatever is sent would fail with Unavailable."""
    wrong: list[tuple[type[Exception], Callable[[Client], Any]]] = [
        (TypeError, lambda kv: kv.put("k", b"v")),
        (TypeError, lambda kv: kv.put_many(b"")),
        (TypeError, lambda kv: kv.put_many("")),
        (TypeError, lambda kv: kv.get_many(bytearray())),
        (TypeError, lambda kv: kv.get_many(memoryview(b""))),
        (TypeError, lambda kv: kv.put(b"k", "v")),
        (TypeError, lambda kv: kv.put(bytearray(b"k"), b"v")),
        (TypeError, lambda kv: kv.put(b"", "v")),
        (TypeError, lambda kv: kv.put(b"k", b"v", if_version="1")),
        (TypeError, lambda kv: kv.put(b"k", b"v", if_version=True)),
        (TypeError, lambda kv: kv.put(b"k", b"v", timeout=None)),
        (errors.RequestError, lambda kv: kv.put(b"k", b"v", if_version=-1)),
        (errors.RequestError, lambda kv: kv.put(b"k", b"v", timeout=float("inf"))),
        (errors.KeyTooLarge, lambda kv: kv.put(b"", b"v")),
        (errors.KeyTooLarge, lambda kv: kv.put(b"k" * (KEY_BYTES_MAX + 1), b"v")),
        (errors.ValueTooLarge, lambda kv: kv.put(b"k", b"v" * (VALUE_BYTES_MAX + 1))),
        (TypeError, lambda kv: kv.get(5)),
        (TypeError, lambda kv: kv.get(b"k", consistency=1)),
        (errors.RequestError, lambda kv: kv.get(b"k", consistency="eventual")),
        (TypeError, lambda kv: kv.get(b"k", consistency="stale", max_age="1")),
        (TypeError, lambda kv: kv.get(b"k", consistency="stale", max_age=True)),
        (errors.RequestError, lambda kv: kv.get(b"k", consistency="stale", max_age=-1)),
        (errors.RequestError, lambda kv: kv.get(b"k", consistency="stale", max_age=float("nan"))),
        (errors.RequestError, lambda kv: kv.get(b"k", consistency="follower", max_age=1)),
        (errors.RequestError, lambda kv: kv.get_many([b"k"], max_age=1)),
        (TypeError, lambda kv: kv.get(b"k", on_age=5)),
        (TypeError, lambda kv: kv.get_many([b"k"], on_age=5)),
        (TypeError, lambda kv: kv.get_many([], on_age="age")),
        (TypeError, lambda kv: kv.delete(None)),
        (TypeError, lambda kv: kv.increment(b"n", "1")),
        (errors.RequestError, lambda kv: kv.increment(b"n", 1 << 63)),
        (TypeError, lambda kv: kv.get_many(b"ab")),
        (TypeError, lambda kv: kv.get_many([b"a", "b"])),
        (TypeError, lambda kv: kv.get_many([bytearray(b"a")])),
        (errors.RequestError, lambda kv: kv.get(b"k", timeout=10**400)),
        (errors.RequestError, lambda kv: kv.get(b"k", consistency="stale", max_age=10**400)),
        (TypeError, lambda kv: kv.delete_range("a", b"b")),
        (errors.InvalidRange, lambda kv: kv.delete_range(b"b", b"a")),
        (errors.InvalidRange, lambda kv: kv.delete_range(b"b", prefix=b"a")),
        (errors.InvalidRange, lambda kv: kv.call(1, key=b"k", node_id=1)),
        (TypeError, lambda kv: kv.call(Method.STATUS, key="k")),
        (TypeError, lambda kv: kv.call(Method.STATUS, node_id=[])),
        (TypeError, lambda kv: kv.call("status")),
        (TypeError, lambda kv: kv.call(None)),
        (TypeError, lambda kv: kv.call(Method.SPLIT, b"m", key=b"m", repeatable="no")),
        (TypeError, lambda kv: kv.delete_range(prefix="")),
        (TypeError, lambda kv: kv.put_many([], progress=5)),
        (TypeError, lambda kv: kv.call(Method.STATUS, object())),
        (TypeError, lambda kv: kv.call(Method.STATUS, "\ud800")),
        (errors.RequestError, lambda kv: kv.call(Method.STATUS, 1 << 64)),
        (errors.RequestError, lambda kv: kv.call(Method.SNAPSHOT, 1, range_id=1 << 63)),
        (errors.RequestError, lambda kv: kv.call(Method.STATUS, node_id=-1)),
        (errors.RequestError, lambda kv: kv.call(Method.STATUS, {1, 2})),
        (errors.RequestError, lambda kv: kv.call(Method.STATUS, b"v" * (16 << 20))),
    ]
    scans: list[tuple[type[Exception], Callable[[Client], Any]]] = [
        (TypeError, lambda kv: kv.scan("a")),
        (TypeError, lambda kv: kv.scan(prefix="a")),
        (TypeError, lambda kv: kv.scan(limit="a")),
        (TypeError, lambda kv: kv.scan(reverse=1)),
        (TypeError, lambda kv: kv.scan(keys_only="x")),
        (TypeError, lambda kv: kv.scan(on_age=5)),
        (errors.RequestError, lambda kv: kv.scan(limit=-1)),
        (errors.RequestError, lambda kv: kv.scan(max_age=1)),
        (errors.InvalidRange, lambda kv: kv.scan(b"b", b"a")),
        (errors.InvalidRange, lambda kv: kv.scan(b"b", prefix=b"a")),
        (errors.KeyTooLarge, lambda kv: kv.scan(prefix=b"k" * (KEY_BYTES_MAX + 1))),
    ]

    async def main() -> None:
        async with connect("127.0.0.1:1") as kv:
            for expected, call in wrong:
                with pytest.raises(expected):
                    await call(kv)
            for expected, call in scans:
                with pytest.raises(expected):
                    call(kv)

    trio.run(main)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda kv: kv.put("k", b"v"), "a key must be bytes, not str; encode text first, for example key.encode()"),
        (lambda kv: kv.put(b"k", bytearray()), "a value must be bytes, not bytearray; copy it first, bytes(value)"),
        (lambda kv: kv.put(b"k", None), "a value must be bytes, not NoneType"),
        (lambda kv: kv.put_many([(5, b"v")]), "a key must be bytes, not int"),
        (lambda kv: kv.get_many(None), "a list of keys is wanted, not NoneType"),
        (lambda kv: kv.get(b"k", on_age=5), "on_age must be a function or None, not int"),
        (lambda kv: kv.call(None), "method must be an int, not NoneType"),
    ],
)
async def test_what_a_type_error_says_fits_what_was_passed(call, words):
    async with connect("127.0.0.1:1") as kv:
        with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
            await call(kv)


async def test_an_empty_end_is_not_told_to_swap_places_with_the_start():
    """Who follows that advice deletes all that comes before the start."""
    async with connect("127.0.0.1:1") as kv:
        with pytest.raises(errors.InvalidRange, match="leave it out") as caught:
            await kv.delete_range(b"m", b"")
        assert "swap" not in str(caught.value)
        with pytest.raises(errors.InvalidRange, match="leave it out"):
            kv.scan(b"m", b"")
        await kv.delete_range(b"", b"")


def test_addresses_are_checked_when_the_client_is_made():
    for bad in ("", "nowhere", "h:99999", ","):
        with pytest.raises(errors.ConfigError):
            connect(bad)
    with pytest.raises(TypeError, match="settings"):
        connect("127.0.0.1:1", settings={})  # type: ignore[arg-type]
