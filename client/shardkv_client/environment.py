"""What the client takes from outside: time, chance, connections. The real ones live here and nowhere else.

A simulation, a test, or a node that is itself a client hands in another :class:`Environment`. This is the only module
of the client that may import a clock, a random source or sockets.
"""

import os
import random
import socket
import time
from collections.abc import Callable
from math import inf
from typing import Final, Protocol
from weakref import WeakSet

import anyio

from shardkv.address import parse_address

RECEIVE_BUFFER_BYTES: Final = 64 * 1024
ADDRESS_SECONDS: Final = 0.5
"""How long one address of a name may keep the next from being tried; a dial has about 2 s for all of them."""


class Stream(Protocol):
    """A reliable, ordered byte stream to a node. A call on a broken or closed one raises some exception."""

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Hand over as much of ``data`` as fits without waiting; the count of bytes taken, 0 if none."""
        ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...

    async def receive(self, count_max: int) -> bytes:
        """The next bytes, or ``b""`` once the node has closed."""
        ...

    async def aclose(self) -> None: ...


class Environment(Protocol):
    """What a client lives in: time, chance, and connections to nodes. Called in the client's event loop only."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def random(self) -> float:
        """From 0 to below 1."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """``count`` unpredictable bytes: a session's id."""
        ...

    async def dial(self, address: str) -> Stream:
        """Connect to ``host:port``. Raises OSError when nobody answers."""
        ...


class SocketStream:
    """A TCP connection under trio or asyncio: a plain non-blocking socket, and the loop only where it would block."""

    __slots__ = ("_closed", "_socket")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._closed = False

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            await anyio.wait_writable(self._socket)
            view = view[self.send_nowait(view) :]

    async def receive(self, count_max: int) -> bytes:
        while True:
            await anyio.wait_readable(self._socket)
            try:
                return self._socket.recv(count_max)
            except (BlockingIOError, InterruptedError):
                continue

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            anyio.notify_closing(self._socket)
            self._socket.close()


class RealEnvironment:
    """The operating system's clock, chance and network."""

    def __init__(self) -> None:
        # Jitter wants a sequence of its own: a program that seeds the global one must not line its clients up.
        self.random: Callable[[], float] = random.Random(os.urandom(16)).random

    monotonic: Final = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)

    async def dial(self, address: str) -> Stream:
        host, port = parse_address(address)
        problem: OSError | None = None
        try:
            infos = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{host} is no name of a host: {error}") from error
        except socket.gaierror:
            socket.socket().close()  # without a file to look it up in no name is known either: then this raises why
            raise
        for position, (family, kind, protocol, _, target) in enumerate(infos, 1):
            # Often the first address is of a family that some firewall on the way drops without a word.
            with anyio.CancelScope(deadline=inf if position == len(infos) else anyio.current_time() + ADDRESS_SECONDS):
                try:
                    return SocketStream(await _connect(socket.socket(family, kind, protocol), target))
                except OSError as error:
                    problem = error
        raise problem or OSError(f"{host} has no address")


async def _connect(sock: socket.socket, target: tuple[str, int]) -> socket.socket:
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(target)
        except BlockingIOError:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except BaseException:
        sock.close()
        raise
    return sock


class Forkable(Protocol):
    def forked(self) -> None:
        """This process is a child: the object belongs to the parent."""
        ...


_forkable: "WeakSet[Forkable]" = WeakSet()


def tell_when_forked(instance: Forkable) -> None:
    """Call ``instance.forked()`` in every child process, as long as the instance lives."""
    _forkable.add(instance)


def _in_child() -> None:
    for instance in list(_forkable):
        instance.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
