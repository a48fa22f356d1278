"""The blocking face (DESIGN §2.3): the same methods from any thread, and an error after a fork."""

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio

from shardkv import errors
from shardkv_client import BlockingClient, Client, Settings, connect_blocking
from tests.client.fake_cluster import FakeCluster
from tests.client.fake_server import FakeServer
from tests.client.processes import in_subprocess


@pytest.fixture
def server():
    with FakeServer(FakeCluster(nodes=2)) as running:
        yield running


def test_every_method_works_without_await(server):
    server.cluster.split(b"05", leader=2)
    with connect_blocking(server.addresses, settings=Settings(scan_page_entries_max=3)) as kv:
        version = kv.put(b"k", b"v")
        assert kv.get(b"k").version == version
        with pytest.raises(errors.VersionMismatch):
            kv.put(b"k", b"w", if_version=0)
        assert kv.delete(b"k", if_version=version) is True
        assert kv.increment(b"n", 3) == 3
        kv.delete_range(b"")
        assert kv.put_many((b"%02d" % i, b"v") for i in range(10)) == 10
        assert list(kv.get_many(b"%02d" % i for i in (7, 2))) == [b"07", b"02"]
        assert [entry.key for entry in kv.scan()] == [b"%02d" % i for i in range(10)]
        ages = []
        assert kv.get(b"07", consistency="stale", max_age=5, on_age=ages.append) is not None
        assert len(kv.get_many([b"07", b"x"], consistency="stale", max_age=5, on_age=ages.append)) == 1
        assert len(list(kv.scan(consistency="stale", max_age=5, on_age=ages.append))) == 10
        assert len(ages) >= 4
        assert set(ages) <= {0.0, 0.0015}
        with kv.scan(reverse=True, limit=7) as scan:
            assert next(scan).key == b"09"
        assert list(scan) == []
        assert len(kv.nodes()) == 2
        assert len(kv.ranges()) == 2
        assert "node" in kv.status()
        assert kv.call(12, node_id=2)["node"] == 2
        with pytest.raises(TypeError):
            kv.put("k", b"v")
        for read in (kv.get, lambda key, **options: kv.get_many([key], **options), kv.scan):
            with pytest.raises(TypeError, match="on_age must be a function"):
                read(b"07", on_age=5)
        with pytest.raises(errors.BatchError):
            kv.put_many((b"%04d" % i if i < 900 else i, b"v") for i in range(1_000))


def test_put_many_reads_its_input_and_tells_its_progress_in_the_callers_thread(server):
    """Either may use the client itself."""
    with connect_blocking(server.addresses, settings=Settings(scan_page_entries_max=50)) as kv:
        assert kv.put_many({b"src/%04d" % i: b"v" for i in range(700)}) == 700
        told = []

        def tell(count):
            told.append(count)
            kv.put(b"told", b"%d" % count)

        copied = kv.put_many(((b"dst" + each.key[3:], each.value) for each in kv.scan(prefix=b"src/")), progress=tell)
        assert copied == 700
        assert len(list(kv.scan(prefix=b"dst/"))) == 700
        assert told == sorted(told)
        assert told[-1] == 700
        assert kv.get(b"told").value == b"700"


def test_an_input_that_waits_holds_up_no_other_thread(server):
    with connect_blocking(server.addresses) as kv, ThreadPoolExecutor(1) as pool:
        kv.put(b"k", b"v")
        reading, answered = threading.Event(), threading.Event()

        def slowly():
            yield b"a", b"1"
            reading.set()
            assert answered.wait(180), "the other thread's call has not been answered"
            yield b"b", b"2"

        writing = pool.submit(kv.put_many, slowly())
        assert reading.wait(180)
        assert kv.get(b"k", timeout=60).value == b"v"
        answered.set()
        assert writing.result() == 2


@pytest.mark.parametrize("count", [1, 3_000])
def test_put_many_whose_progress_or_input_fails_says_what_is_written(server, count):
    with connect_blocking(server.addresses) as kv:
        with pytest.raises(errors.BatchError, match="division by zero") as caught:
            kv.put_many(((b"%04d" % i, b"v") for i in range(count)), progress=lambda done: 1 / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        written = caught.value.consumed - len(caught.value.failed)
        assert written == len(server.cluster.data) > 0
        with pytest.raises(errors.BatchError, match="division by zero") as caught:
            kv.put_many((b"x%04d" % (i if i < 900 else 1 / 0), b"v") for i in range(1_000))
        assert caught.value.consumed == 900
        with pytest.raises(errors.BatchError, match="division by zero") as caught:
            kv.put_many((b"z%04d" % (i if i < 9 else 1 / 0), b"v") for i in range(1_000))
        assert (caught.value.consumed, len(caught.value.failed)) == (9, 9)
        with pytest.raises(ZeroDivisionError):
            kv.put_many((b"y%04d" % (1 / 0), b"v") for i in range(1_000))


def test_an_interrupt_while_put_many_reads_its_input_gives_up_what_is_out(server):
    def interrupted():
        for number in range(600):
            yield b"%04d" % number, b"v"
        raise KeyboardInterrupt

    with connect_blocking(server.addresses) as kv:
        with pytest.raises(KeyboardInterrupt):
            kv.put_many(interrupted())
        kv.put(b"k", b"v")
        assert kv._perform(_calls_out, kv) == 0


async def _calls_out(kv):
    return kv._client._host.core.ledger.calls_active


def test_many_threads_share_one_client(server):
    with connect_blocking(server.addresses) as kv:

        def count(_):
            return [kv.increment(b"n") for _ in range(25)]

        with ThreadPoolExecutor(16) as pool:
            results = [number for numbers in pool.map(count, range(16)) for number in numbers]
        assert sorted(results) == list(range(1, 401))


def test_after_closing_calls_raise_client_closed_and_pending_ones_end(server):
    kv = connect_blocking(server.addresses)
    kv.put(b"k", b"v")
    server.let_go.clear()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(kv.put, b"k", b"w")
        server.held.wait()
        kv.close()
        server.let_go.set()
        with pytest.raises(errors.OutcomeUnknown):
            pending.result()
    kv.close()
    with pytest.raises(errors.ClientClosed):
        kv.get(b"k")
    assert not [thread for thread in threading.enumerate() if thread.name == "shardkv client"]


def test_every_call_of_a_closed_client_says_that_it_is_closed(server):
    """Also those for which no node would be asked."""
    with connect_blocking(server.addresses) as kv:
        pass
    for call in (
        lambda: kv.put(b"k", b"v"),
        lambda: kv.get(b"k"),
        lambda: kv.delete(b"k"),
        lambda: kv.increment(b"n"),
        lambda: kv.get_many([]),
        lambda: kv.put_many([]),
        lambda: kv.delete_range(b"a", b"a"),
        lambda: kv.call(12),
        lambda: kv.status(),
        lambda: kv.nodes(),
        lambda: kv.ranges(),
        lambda: next(kv.scan()),
        lambda: next(kv.scan(limit=0)),
    ):
        with pytest.raises(errors.ClientClosed, match="open a new one"):
            call()


def test_a_scan_gives_out_what_it_has_read_after_its_client_was_closed(server):
    """And ends, where that was the last page; else its next page is a call of a closed client."""
    with connect_blocking(server.addresses, settings=Settings(scan_page_entries_max=3)) as kv:
        kv.put_many({b"%d" % number: b"v" for number in range(6)})
        begun, whole, ended, left = kv.scan(), kv.scan(limit=3), kv.scan(limit=0), kv.scan()
        for scan in (begun, whole, left):
            assert next(scan).key == b"0"
        with pytest.raises(StopIteration):
            next(ended)
        left.close()
    for scan in (begun, whole):
        assert [next(scan).key for _ in range(2)] == [b"1", b"2"]
    for _ in range(2):
        with pytest.raises(errors.ClientClosed, match="open a new one"):
            next(begun)
        for scan in (whole, ended, left):
            with pytest.raises(StopIteration):
                next(scan)


def test_a_client_that_is_closed_by_its_own_progress_callback_ends(server):
    kv = connect_blocking(server.addresses)
    with pytest.raises(errors.BatchError) as caught:
        kv.put_many(((b"%04d" % i, b"v") for i in range(5_000)), progress=lambda done: kv.close())
    written = {b"%04d" % i for i in range(caught.value.consumed)} - set(caught.value.failed)
    assert written <= set(server.cluster.data)
    kv._loop.join()
    with pytest.raises(errors.ClientClosed):
        kv.get(b"k")
    kv.close()


def test_a_client_that_is_forgotten_ends_its_thread(server, monkeypatch):
    """A worker that opens one for each of its tasks would run out of files."""
    kv = connect_blocking(server.addresses)
    kv.put(b"k", b"v")
    loop, held = kv._loop, [kv]
    del kv
    with pytest.warns(ResourceWarning, match="not closed"):
        held.clear()  # the last that holds it
    loop.join()
    held = [connect_blocking(server.addresses)]
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is raised where nobody hears it
        loop = held[0]._loop
        held.clear()
    loop.join()
    with connect_blocking(server.addresses) as kv, warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = kv.scan()
        assert [entry.key for entry in scan] == [b"k"]


@pytest.mark.parametrize("before", [0, 1], ids=["while the thread begins", "while the client opens"])
def test_an_interrupt_while_it_opens_leaves_no_thread_behind(server, monkeypatch, before):
    waits = 0
    wait = threading.Event.wait

    def interrupted(event, timeout=None):
        nonlocal waits
        if threading.current_thread() is threading.main_thread():
            waits += 1
            if waits > before:
                raise KeyboardInterrupt
        return wait(event, timeout)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Event, "wait", interrupted)
        connect_blocking(server.addresses)
    given_up_at = time.monotonic() + 180
    while [thread for thread in threading.enumerate() if thread.name == "shardkv client"]:
        assert time.monotonic() < given_up_at, "its thread stays"
        time.sleep(0.001)


def test_the_exception_of_the_block_leaves_as_itself(server):
    with pytest.raises(ZeroDivisionError), connect_blocking(server.addresses) as kv:
        kv.put(b"k", b"v")
        1 / 0  # noqa: B018


def test_a_scan_that_goes_on_after_an_interrupt_has_missed_nothing(server, monkeypatch):
    """DESIGN §2.3: an untouched key exactly once. The interrupt comes when the page does."""
    perform = trio.from_thread.run

    def interrupted(*args, **options):
        perform(*args, **options)
        raise KeyboardInterrupt

    with connect_blocking(server.addresses, settings=Settings(scan_page_entries_max=3)) as kv:
        kv.put_many((b"%02d" % number, b"v") for number in range(10))
        scan = kv.scan()
        keys = [next(scan).key for _ in range(3)]
        monkeypatch.setattr(trio.from_thread, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(scan)
        monkeypatch.undo()
        keys += [entry.key for entry in scan]
        assert keys == [b"%02d" % number for number in range(10)]


def test_a_scan_that_goes_on_while_the_page_of_an_interrupted_caller_is_under_way_has_missed_nothing(
    server, monkeypatch
):
    perform = trio.from_thread.run
    late: list[threading.Thread] = []

    def interrupted(*args, **options):
        late.append(threading.Thread(target=perform, args=args, kwargs=options))
        late[-1].start()
        raise KeyboardInterrupt

    with connect_blocking(server.addresses, settings=Settings(scan_page_entries_max=3)) as kv:
        kv.put_many((b"%02d" % number, b"v") for number in range(60))
        scan = kv.scan()
        keys = []
        for _ in range(15):
            keys += [next(scan).key for _ in range(3)]
            monkeypatch.setattr(trio.from_thread, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(scan)
            monkeypatch.undo()
        keys += [entry.key for entry in scan]
        assert keys == [b"%02d" % number for number in range(60)]
        for thread in late:
            thread.join(30)


def test_an_interrupt_ends_a_put_many_and_not_only_the_wait_for_it(server):
    """It went on in the client's thread, reading the caller's iterable, for as long as that had pairs."""
    taken: list[int] = []
    interrupted = threading.Event()

    def pairs():
        for i in range(50_000):
            if i == 300:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                interrupted.wait(30)
            taken.append(i)
            yield b"%05d" % i, b"v"

    with connect_blocking(server.addresses) as kv:
        with pytest.raises(KeyboardInterrupt):
            kv.put_many(pairs())
        interrupted.set()
        kv.put(b"k", b"v")  # by now the interrupted call has met its cancellation
        before = len(taken)
        for _ in range(20):
            kv.put(b"k", b"v")
        assert len(taken) == before


def test_a_bad_address_is_refused_in_the_callers_thread():
    with pytest.raises(errors.ConfigError):
        connect_blocking("nowhere")


CHILD = """
import os, sys
from shardkv import errors
from shardkv_client import connect_blocking

with connect_blocking(sys.argv[1]) as kv:
    kv.put(b"k", b"parent")
    sessions = {kv._client._host.core.session.id}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            kv.put(b"k", b"child")
        except errors.ClientClosed as error:
            assert "fork" in str(error), error
            kv.close()
            with connect_blocking(sys.argv[1]) as own:
                own.put(b"c", b"child")
                assert own._client._host.core.session.id not in sessions
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    kv.put(b"k", b"parent again")
print("done")
"""


def test_after_a_fork_the_child_gets_an_error_and_may_open_its_own(server):
    """A forked thread does not exist; without this the call would hang. The child's client has a new session."""
    assert in_subprocess(CHILD, server.addresses) == "done"
    assert server.cluster.data[b"k"][0] == b"parent again"
    assert server.cluster.data[b"c"][0] == b"child"


ASYNC_CHILD = """
import asyncio, os, sys
from shardkv import errors
from shardkv_client import connect

async def main():
    async with connect(sys.argv[1]) as kv:
        await kv.put(b"k", b"v")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                await kv.put(b"k", b"w")
            except errors.ClientClosed as error:
                code = 0 if "fork" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        await kv.put(b"k", b"x")
asyncio.run(main())
print("done")
"""


def test_after_a_fork_the_async_client_does_not_use_its_parents_session(server):
    assert in_subprocess(ASYNC_CHILD, server.addresses) == "done"


IMPORTS = """
import sys
import shardkv_client
heavy = [name for name in sys.modules if name.split(".")[0] in
         ("rocksdict", "click", "rich", "starlette", "hypercorn", "prompt_toolkit", "structlog", "shardkv_placement")]
heavy += [name for name in sys.modules if name.startswith("shardkv.")
          and name.split(".")[1] not in ("errors", "types", "codec", "wire", "address")]
print(heavy)
"""


def test_importing_the_client_loads_neither_the_engine_nor_the_server():
    """DESIGN §2.3: a program that talks to a cluster does not pay for running one."""
    assert in_subprocess(IMPORTS) == "[]"


PURE = """
import sys
sys.modules["trio"] = sys.modules["anyio"] = None
import importlib.util, pathlib, types
package = types.ModuleType("shardkv_client")
package.__path__ = [str(pathlib.Path(sys.argv[1]))]
sys.modules["shardkv_client"] = package
import shardkv_client.core
print(sorted(name for name in ("trio", "anyio") if sys.modules.get(name)))
"""


def test_the_core_needs_no_event_loop():
    """DESIGN §3: sans-IO, so that a simulation runs the real logic."""
    import shardkv_client

    assert in_subprocess(PURE, os.path.dirname(shardkv_client.__file__)) == "[]"


def test_every_public_method_says_what_it_does() -> None:
    """``help(kv.put)`` is where people look first."""
    for face in (Client, BlockingClient):
        silent = [name for name, it in vars(face).items() if not name.startswith("_") and not it.__doc__]
        assert silent == []
