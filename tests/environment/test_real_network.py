"""TCP on loopback: addresses, closing, and an accept loop that nothing ends but its cancellation."""

import errno
import os
import resource
import socket
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from shardkv.environment import Listener, Stream
from shardkv.environment.real import real_environment
from shardkv.environment.real.network import (
    DIALLED_KEPT,
    FILES_KEPT,
    FILES_KEPT_MIN,
    RealNetwork,
    connection_files_max,
)
from shardkv.errors import ConfigError, ProtocolError
from shardkv.transport.pool import PoolSettings

ENVIRONMENT = real_environment()


@pytest.fixture
def network() -> RealNetwork:
    return RealNetwork(ENVIRONMENT.clock)


async def echo(stream: Stream) -> None:
    while data := await stream.receive(65536):
        await stream.send_all(data)


async def test_bytes_go_there_and_back(network: RealNetwork, nursery: trio.Nursery) -> None:
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    assert not listener.address.endswith(":0")
    stream = await network.dial(listener.address)
    assert stream.remote == listener.address
    assert stream.send_nowait(b"hello") == 5
    assert await stream.receive(100) == b"hello"
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive(1)
    with pytest.raises(trio.ClosedResourceError):
        stream.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"x")
    nursery.cancel_scope.cancel()


async def test_an_ipv6_address_stands_in_brackets(network: RealNetwork, nursery: trio.Nursery) -> None:
    try:
        listener: Listener = await nursery.start(network.listen, "[::1]:0", echo)
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    assert listener.address.startswith("[::1]:")
    stream = await network.dial(listener.address)
    await stream.send_all(b"six")
    assert await stream.receive(100) == b"six"
    stream.close_now()
    nursery.cancel_scope.cancel()


async def test_a_port_in_use_is_a_config_error_that_says_what_to_do(
    network: RealNetwork, nursery: trio.Nursery
) -> None:
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    with pytest.raises(ConfigError, match=r"in use by another process; stop it .* or choose another port"):
        await network.listen(listener.address, echo)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("address", ["192.0.2.1:7001", "name.invalid:7001", "nonsense"])
async def test_an_address_that_is_not_ours_is_a_config_error(network: RealNetwork, address: str) -> None:
    with pytest.raises(ConfigError):
        await network.listen(address, echo)


@pytest.mark.parametrize("host", ["db..example", ".", "x" * 64, "ü" * 80, "\u2603.example"])
async def test_what_no_host_can_be_called_is_an_address_where_nobody_answers(network: RealNetwork, host: str) -> None:
    """One node that said so of itself, by a slip of the keyboard, ended every node that was told to dial it."""
    with pytest.raises((OSError, ConfigError), match=r"is no name of a host|has no valid host"):
        await network.dial(f"{host}:7001")
    with pytest.raises(ConfigError, match=r"cannot listen|has no valid host"):
        await network.listen(f"{host}:7001", echo)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
async def test_a_dialled_connection_does_not_outlast_a_partition(network: RealNetwork, nursery: trio.Nursery) -> None:
    """Keepalive asks only where nothing is on its way. What is, the system sends again after ever longer pauses: after
    a partition of a minute, two nodes would not hear each other for most of another one (seen: 28 s cut, 26 s more)."""
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    stream = await network.dial(listener.address)
    given_up_ms = stream._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert 0 < given_up_ms <= 10_000
    stream.close_now()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    network: RealNetwork, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, silent: int
) -> None:
    """A name with an IPv6 address that is dropped on the way and an IPv4 address that works: nodes find each other."""
    targets = [("127.0.0.1", 7001 + number) for number in range(3)]
    tried: list[tuple[str, int]] = []

    async def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", target) for target in targets]

    class Dialling:
        def setsockopt(self, *_: object) -> None: ...

        async def connect(self, target: tuple[str, int]) -> None:
            tried.append(target)
            if targets.index(target) < silent:
                await trio.sleep_forever()

        def detach(self) -> int:
            return ours.detach()

        def close(self) -> None: ...

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(trio.socket, "socket", lambda *_: Dialling())
    with theirs, ours, trio.fail_after(PoolSettings().dial_seconds_max):
        stream = await network.dial("name:7001")
        stream.close_now()
    assert tried == targets[: silent + 1]


NO_FAMILY = 46
"""No system knows it, as one without IPv6 knows nothing of that."""


async def test_a_name_is_listened_on_at_its_next_address_where_the_first_is_not_the_machines(
    network: RealNetwork, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``::1`` is where IPv6 is switched off by a setting."""

    async def getaddrinfo(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in ("192.0.2.1", "127.0.0.1")]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    listener: Listener = await nursery.start(network.listen, "name:0", echo)
    assert listener.address.startswith("127.0.0.1:")
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("known", [True, False])
async def test_addresses_of_a_kind_that_the_machine_has_not_are_passed_over(
    network: RealNetwork, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """``localhost`` has an IPv6 address first, on machines, too, that know nothing of that."""

    async def getaddrinfo(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        families = [NO_FAMILY, socket.AF_INET] if known else [NO_FAMILY]
        return [(family, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for family in families]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    if known:
        listener: Listener = await nursery.start(network.listen, "name:0", echo)
        stream = await network.dial(listener.address)
        stream.close_now()
    else:
        with pytest.raises(ConfigError, match="no address of its kind"):
            await network.listen("name:0", echo)
        with pytest.raises(OSError):
            await network.dial("name:7001")
    nursery.cancel_scope.cancel()


async def test_dialling_where_nobody_listens_is_an_os_error(network: RealNetwork) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(OSError):
            await network.dial(f"127.0.0.1:{port}")


async def test_more_than_the_system_takes_is_sent_by_waiting(network: RealNetwork, nursery: trio.Nursery) -> None:
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    stream = await network.dial(listener.address)
    whole = os.urandom(1 << 20) * 8
    taken = 0
    while (sent := stream.send_nowait(memoryview(whole)[taken:])) > 0:
        taken += sent
    assert taken < len(whole)
    nursery.start_soon(stream.send_all, memoryview(whole)[taken:])
    received = bytearray()
    while len(received) < len(whole):
        received += await stream.receive(1 << 20)
    assert received == whole
    stream.close_now()
    nursery.cancel_scope.cancel()


async def test_closing_now_wakes_the_reader(network: RealNetwork, nursery: trio.Nursery) -> None:
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    stream = await network.dial(listener.address)
    async with trio.open_nursery() as inner:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive(1)

        inner.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        stream.close_now()
    nursery.cancel_scope.cancel()


async def test_a_reset_is_a_broken_resource(network: RealNetwork, nursery: trio.Nursery) -> None:
    streams: list[Stream] = []
    held = trio.Event()

    async def hold(stream: Stream) -> None:
        streams.append(stream)
        await held.wait()

    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", hold)
    stream = await network.dial(listener.address)
    stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.close_now()
    while not streams:
        await trio.lowlevel.checkpoint()
    with pytest.raises(trio.BrokenResourceError, match="is lost"):
        await streams[0].receive(1)
    held.set()
    nursery.cancel_scope.cancel()


async def test_last_words_arrive_although_the_other_side_spoke_last(
    network: RealNetwork, nursery: trio.Nursery
) -> None:
    """Closing over unread bytes resets the connection; a refusal would be lost with it."""
    heard = trio.Event()

    async def refuse(stream: Stream) -> None:
        await heard.wait()
        stream.send_nowait(b"refused")
        await stream.aclose()

    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", refuse)
    stream = await network.dial(listener.address)
    await stream.send_all(bytes(1000))
    heard.set()
    assert await stream.receive(100) == b"refused"
    assert await stream.receive(100) == b""
    stream.close_now()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("problem", [trio.BrokenResourceError("gone"), ProtocolError("garbage"), OSError("odd")])
async def test_one_bad_connection_does_not_end_the_listener(
    network: RealNetwork, nursery: trio.Nursery, problem: Exception
) -> None:
    served = 0

    async def handler(stream: Stream) -> None:
        nonlocal served
        served += 1
        if served == 1:
            raise problem
        await echo(stream)

    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", handler)
    bad = await network.dial(listener.address)
    assert await bad.receive(1) == b""
    bad.close_now()
    good = await network.dial(listener.address)
    await good.send_all(b"still here")
    assert await good.receive(100) == b"still here"
    good.close_now()
    nursery.cancel_scope.cancel()


async def test_a_bug_in_the_handler_is_not_hidden(network: RealNetwork) -> None:
    async def handler(stream: Stream) -> None:
        raise AssertionError("our own bug")

    with pytest.RaisesGroup(pytest.RaisesGroup(AssertionError), allow_unwrapped=False):
        async with trio.open_nursery() as nursery:
            listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", handler)
            stream = await network.dial(listener.address)
            with trio.fail_after(60):
                await stream.receive(1)
            stream.close_now()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.EPROTO])
async def test_accepting_goes_on_after_an_error(
    network: RealNetwork, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Out of file handles is a matter of time: the loop backs off and tries again."""
    failures = 3
    pauses = 0
    real = socket.socket.accept

    def accept(self: socket.socket) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(number, os.strerror(number))
        return real(self)

    async def sleep(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        await trio.lowlevel.checkpoint()

    class Clock:
        pass

    clock = Clock()
    clock.sleep = sleep  # type: ignore[attr-defined]
    network = RealNetwork(clock)  # type: ignore[arg-type]
    monkeypatch.setattr(socket.socket, "accept", accept)
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    stream = await network.dial(listener.address)
    await stream.send_all(b"in the end")
    assert await stream.receive(100) == b"in the end"
    assert failures == 0
    assert pauses == (3 if number in (errno.EMFILE, errno.ENFILE) else 0)
    stream.close_now()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("most", "connections"), [(FILES_KEPT_MIN + 8, 8), (256, 128), (1_000, 500), (4_096, 4_096 - FILES_KEPT)]
)
def test_connections_leave_files_for_what_is_none(most: int, connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most, most))
    assert connection_files_max() == RealNetwork(ENVIRONMENT.clock).connections_max() == connections


async def test_so_many_connections_are_taken_as_there_is_said_to_be_room_for(
    network: RealNetwork, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many files the node itself has open, for they have room of their own. Clients took the last file that the
    node could open, and its log the next; then its own files took the room of connections, and with many of them it was
    deaf."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (FILES_KEPT_MIN + 3, FILES_KEPT_MIN + 3))
    own = [os.dup(0) for _ in range(FILES_KEPT_MIN)]
    ended = trio.Event()

    async def handler(stream: Stream) -> None:
        await stream.send_all(b"served")
        await stream.receive(1)
        ended.set()

    async def answer() -> tuple[Stream, bytes]:
        stream = await network.dial(listener.address)
        try:
            return stream, await stream.receive(100)
        except trio.BrokenResourceError:
            return stream, b""

    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", handler)
    streams, answers = zip(*[await answer() for _ in range(5)])
    assert answers == (b"served",) * 3 + (b"",) * 2
    await streams[0].aclose()
    await ended.wait()
    stream, late = await answer()
    assert late == b"served"
    for each in (*streams, stream):
        each.close_now()
    for descriptor in own:
        os.close(descriptor)
    nursery.cancel_scope.cancel()


async def test_connections_that_the_node_has_dialled_take_the_room_of_others_and_not_that_of_its_log(
    network: RealNetwork, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two to each other node: with hundreds of those, clients that came besides took the last file of the log."""
    other = RealNetwork(ENVIRONMENT.clock)
    elsewhere: Listener = await nursery.start(other.listen, "127.0.0.1:0", echo)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (FILES_KEPT_MIN + 3, FILES_KEPT_MIN + 3))
    listener: Listener = await nursery.start(network.listen, "127.0.0.1:0", echo)
    dialled = [await network.dial(elsewhere.address) for _ in range(DIALLED_KEPT + 2)]

    async def taken() -> Stream | None:
        stream = await other.dial(listener.address)
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"in")
            if await stream.receive(100):
                return stream
        stream.close_now()
        return None

    first = await taken()
    assert first is not None
    assert await taken() is None
    dialled.pop().close_now()
    second = await taken()
    assert second is not None
    assert await taken() is None
    for each in (first, second, *dialled):
        each.close_now()
        each.close_now()
    assert network._dialled == 0
    nursery.cancel_scope.cancel()
