"""TCP with the options that a cluster wants. What is said over it is not known here.

The rule: an accept loop ends only when it is cancelled. One bad connection, or no file handle left for the next, must
not take the node off the network.
"""

import errno
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Final

import trio

from shardkv.address import Address, parse_address
from shardkv.environment import Clock, Listener, Stream
from shardkv.errors import ConfigError, ShardKVError

BACKLOG: Final = 1024
"""Connections that the system keeps until they are accepted: all clients of a node that was away come at once."""
ADDRESS_SECONDS: Final = 0.5
"""How long one address of a name may keep the next from being tried: who dials gives up after about 2 s."""
ACCEPT_RETRY_SECONDS: Final = 0.1
"""The pause after an accept failed for want of a resource, as trio.serve_listeners has it."""
FILES_KEPT: Final = 512
"""Of the files that the process may open, so many stay for what is no connection that others have opened: the log, the
engine, snapshots. Where it may open few, half of them do, but no fewer than the next."""
FILES_KEPT_MIN: Final = 64
"""A node of three has 30 open with little data."""
DIALLED_KEPT: Final = 16
"""So many of the files kept are for connections that the node has dialled itself, two to each other node and a few to
ask or to send a snapshot. With more of them it takes fewer of others: in a cluster of hundreds of nodes they alone
would use up what the log and the engine need."""
ACCEPTS_BEFORE_CHECKPOINT: Final = 32
_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_LISTENER_GONE: Final = frozenset((errno.EBADF, errno.ENOTSOCK, errno.EINVAL))
_CLOSE_DISCARD_BYTES_MAX: Final = 1024 * 1024

# A peer whose machine vanished is noticed after about 25 s even where nothing is being sent.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
UNACKNOWLEDGED_MS: Final = 10_000
"""A dialled connection whose data nobody acknowledges for so long is broken by the system, and can be dialled again.
Keepalive does not ask while data are on their way; they are sent again after pauses that double up to two minutes, so
a connection would stay deaf for as long again as a partition had lasted."""


class RealStream:
    """Implements :class:`shardkv.environment.Stream` on a connected socket."""

    __slots__ = ("_closed", "_drained", "_local", "_on_close", "_remote", "_socket")

    def __init__(self, connected: socket.socket, on_close: Callable[[], None] | None = None) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._on_close = on_close
        self._closed = False
        self._drained = False
        """The last read took all there was: the next one waits before it tries."""
        self._remote = _name_of(connected.getpeername) or "(gone)"
        self._local = _name_of(connected.getsockname) or "(gone)"
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                if hasattr(socket, option):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    @property
    def remote(self) -> str:
        return self._remote

    @property
    def local(self) -> str:
        return self._local

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._lost(error) from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        with memoryview(data).cast("B") as whole:
            sent = self.send_nowait(whole)
            while sent < len(whole):
                await self._writable()
                with whole[sent:] as rest:
                    sent += self.send_nowait(rest)

    async def receive(self, count_max: int) -> bytes:
        # The same steps as trio's own, without its wrappers: a checkpoint on each path, and never a wait when there is
        # something to read.
        if not self._drained:
            await trio.lowlevel.checkpoint_if_cancelled()
            data = self._take(count_max)
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
        while True:
            await self._readable()
            data = self._take(count_max)
            if data is not None:
                return data

    def _take(self, count_max: int) -> bytes | None:
        """What is there to read; None if there is nothing now."""
        try:
            data = self._socket.recv(count_max)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._lost(error) from error
        self._drained = 0 < len(data) < count_max
        return data

    async def aclose(self) -> None:
        if not self._closed:
            try:
                # The end of our data, then what the other side said meanwhile: closing over unread bytes would reset
                # the connection and could take our last words (a refusal, say) with it.
                self._socket.shutdown(socket.SHUT_WR)
                discarded = 0
                while discarded < _CLOSE_DISCARD_BYTES_MAX and (data := self._socket.recv(65536)):
                    discarded += len(data)
            except OSError:
                pass  # It is being closed; that the other side was first, or has nothing to say, is no news.
            self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            if self._on_close is not None:
                self._on_close()

    async def _readable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        await trio.lowlevel.wait_readable(self._socket)

    async def _writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        await trio.lowlevel.wait_writable(self._socket)

    def _lost(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if self._closed:
            return trio.ClosedResourceError("this stream is closed")
        return trio.BrokenResourceError(f"the connection to {self._remote} is lost: {error.strerror or error}")


class RealListener:
    """Implements :class:`shardkv.environment.Listener`."""

    __slots__ = ("_address",)

    def __init__(self, address: str) -> None:
        self._address = address

    @property
    def address(self) -> str:
        return self._address


class RealNetwork:
    """Implements :class:`shardkv.environment.Network`."""

    __slots__ = ("_clock", "_connections", "_dialled")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._connections = 0
        """Accepted and not ended."""
        self._dialled = 0
        """Dialled and not closed."""

    async def listen(
        self,
        address: str,
        handler: Callable[[Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Listener] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        listening = await _bind(parse_address(address, port_zero=True))
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(RealListener(_name_of(listening.getsockname)))
                connections_max = connection_files_max()
                while True:
                    await trio.lowlevel.wait_readable(listening)
                    if not self._accept(listening, connections_max, nursery, handler):
                        await self._clock.sleep(ACCEPT_RETRY_SECONDS)
        finally:
            trio.lowlevel.notify_closing(listening)
            listening.close()

    def _accept(
        self,
        listening: socket.socket,
        connections_max: int,
        nursery: trio.Nursery,
        handler: Callable[[Stream], Awaitable[None]],
    ) -> bool:
        """Start a task for each connection that is waiting; False when a resource has run out."""
        for _ in range(ACCEPTS_BEFORE_CHECKPOINT):
            try:
                connected, _peer = listening.accept()
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno in _LISTENER_GONE:
                    raise
                # Anything else says only that this one connection came to nothing.
                if error.errno in _OUT_OF_RESOURCES:
                    return False
                continue
            if self._connections + max(0, self._dialled - DIALLED_KEPT) >= connections_max:
                connected.close()
                continue
            try:
                stream = RealStream(connected)
            except OSError:
                connected.close()  # It was gone before its options could be set.
                continue
            self._connections += 1
            nursery.start_soon(self._serve, stream, handler)
        return True

    async def _serve(self, stream: RealStream, handler: Callable[[Stream], Awaitable[None]]) -> None:
        """One connection's task. What the other side did wrong ends it; anything else is our bug and rises."""
        try:
            await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ShardKVError):
            pass
        finally:
            self._connections -= 1
            stream.close_now()

    async def dial(self, address: str) -> RealStream:
        host, port = parse_address(address)
        found = await _resolve(host, port)
        problem: OSError | None = None
        for position, (family, kind, protocol, _, target) in enumerate(found, 1):
            try:
                dialling = trio.socket.socket(family, kind, protocol)
            except OSError as error:  # this machine has no such addresses, though a name may have one
                problem = error
                continue
            try:
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    dialling.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
                # Often the first address is of a family that some firewall on the way drops without a word.
                with trio.move_on_after(inf if position == len(found) else ADDRESS_SECONDS):
                    await dialling.connect(target)
                    stream = RealStream(socket.socket(fileno=dialling.detach()), self._hung_up)
                    self._dialled += 1
                    return stream
            except OSError as error:
                problem = error
            finally:
                dialling.close()
        raise problem or OSError(errno.EHOSTUNREACH, f"{host} has no address")

    def connections_max(self) -> int:
        return connection_files_max()

    def _hung_up(self) -> None:
        self._dialled -= 1


def connection_files_max() -> int:
    """So many connections may others have open here, or the node's own files could not be opened any more. 0 or less
    where the process may not even open those."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return sys.maxsize
    return most - min(FILES_KEPT, max(most // 2, FILES_KEPT_MIN))


async def _resolve(host: str, port: int, flags: int = 0) -> list[Any]:
    """Where a host is, as ``getaddrinfo`` has it. Raises OSError, also for a text that no host can be called."""
    try:
        return await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, f"{host} is no name of a host: {error}") from error


async def _bind(address: Address) -> socket.socket:
    try:
        found = await _resolve(address.host, address.port, socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: the host {address.host} is not known ({error})") from error
    problem: OSError | None = None
    for family, kind, protocol, _, target in found:
        try:
            listening = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine has no such addresses, though a name may have one
            problem = error
            continue
        try:
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(target)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRNOTAVAIL and target is not found[-1][-1]:
                continue  # where the kind of addresses is switched off
            raise ConfigError(f"cannot listen on {address}: {_bind_advice(error, address)}") from error
        return listening
    raise ConfigError(f"cannot listen on {address}: this machine has no address of its kind ({problem})")


def _bind_advice(error: OSError, address: Address) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {address.port} is in use by another process; stop it "
                f"(`ss -ltnp 'sport = :{address.port}'` names it) or choose another port"
            )
        case errno.EADDRNOTAVAIL:
            return f"{address.host} is not an address of this machine; listen on one that is, or on 0.0.0.0"
        case errno.EACCES:
            return f"port {address.port} needs privileges; choose one above 1023"
        case _:
            return f"{error.strerror or error}"


def _name_of(getter: Callable[[], object]) -> str:
    try:
        name = getter()
    except OSError:
        return ""
    match name:
        case (str(host), int(port), *_):
            return str(Address(host, port))
        case _:
            return os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
