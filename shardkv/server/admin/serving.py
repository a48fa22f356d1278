"""Binding the admin endpoint's address and keeping the web server up.

Lives here: the socket, the web server's bounds, and what happens when it fails. The rule: a failure of the web server,
whoever provoked it, is logged; it ends the connection that it came from, or else the web server is started again, and
the node goes on. What cannot be helped at the start, a port in use, is an error that says what to do.
"""

import errno
import logging
import resource
from typing import Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, LifespanState
from hypercorn.utils import wrap_app

from shardkv.address import Address, parse_address
from shardkv.environment import Environment
from shardkv.errors import ConfigError
from shardkv.server.admin.app import Application
from shardkv.server.parts import Parts

RETRY_SECONDS: Final = 0.25
"""Before a web server that failed is started again."""
CONNECTIONS_MAX: Final = 64
"""At once. Whoever comes then waits in the system's queue until one ends: open files are for clients, nodes and data.
"""
FILES_PER_CONNECTION: Final = 16
"""Nor more than one for so many files that the process may open: they are taken from those that the node keeps for the
log and the engine."""
BACKLOG: Final = 64
IDLE_SECONDS: Final = 10
"""A connection on which no request is complete for so long is closed, one that trickles its request among them."""
UNTAKEN_MS: Final = 10_000
"""A connection whose other side takes nothing for so long is broken by the system: the web server's sends cannot be
cancelled, so one asker who does not read could otherwise keep the node from stopping."""
REQUEST_BYTES_MAX: Final = 16 * 1024
"""Of the request line and headers together."""


class Admin:
    """The endpoint: a service. It answers that the node is starting until :meth:`observe` was called."""

    def __init__(self, environment: Environment, log: Any) -> None:
        self._environment = environment
        self._log = log
        self._application = Application(environment)

    def observe(self, parts: Parts) -> None:
        """The node stands: show it from now on."""
        self._application.parts = parts

    async def run(self, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: answer at ``address`` until cancelled; the status is the address as bound. Raises ConfigError."""
        listening, bound = await _bind(address)
        with listening:
            task_status.started(bound)
            while True:
                try:
                    # A copy, for it is closed at the end: who connects while the web server is away just waits.
                    await self._serve(trio.SocketListener(listening.dup()))
                except Exception as error:  # noqa: BLE001  # whatever it was, the node must not end with it
                    self._log.error("the admin endpoint failed and is started again", reason=repr(error))
                await self._environment.clock.sleep(RETRY_SECONDS)

    async def _serve(self, listener: trio.SocketListener) -> None:
        """The web server on a bounded number of connections: its own ``serve`` takes as many as come."""
        config = _web_server()
        # Two libraries' names for the same protocol, ASGI.
        application = wrap_app(cast(ASGIFramework, self._application), config.wsgi_max_body_size, "asgi")
        context = WorkerContext(None)
        bounded = _BoundedListener(listener)

        async def serve(stream: trio.SocketStream) -> None:
            try:
                await TCPServer(application, config, context, LifespanState({}), stream)  # type: ignore[arg-type]
            except* Exception as errors:  # noqa: BLE001  # clients provoke them, and the others must not end with theirs
                self._log.warning("a connection to the admin endpoint failed", reason=repr(errors))
            finally:
                bounded.free.release()

        await trio.serve_listeners(serve, [bounded])


class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection when there is room for it. Whoever ends one gives ``free`` its place back."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self.free = trio.Semaphore(_connections_max())

    async def accept(self) -> trio.SocketStream:
        await self.free.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self.free.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()


def _connections_max() -> int:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS_MAX if most == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, most // FILES_PER_CONNECTION)


def _web_server() -> Config:
    """The web server's settings."""
    config = Config()
    config.keep_alive_timeout = IDLE_SECONDS
    config.read_timeout = IDLE_SECONDS
    config.h11_max_incomplete_size = REQUEST_BYTES_MAX
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


async def _bind(address: str) -> tuple[trio.socket.SocketType, str]:
    """A bound socket and its address. Raises ConfigError that says what to do."""
    host, port = parse_address(address, port_zero=True)
    try:
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the admin endpoint cannot listen on {address}: {host} is not known ({error})") from error
    listening, target = _socket_for(found, address)
    try:
        listening.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        if hasattr(trio.socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it.
            listening.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_USER_TIMEOUT, UNTAKEN_MS)
        await listening.bind(target)
        # Here, not only by the web server: two sockets that do not listen yet may share a port.
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"the admin endpoint cannot listen on {address}: {_advice(error, port)}") from error
    except BaseException:
        listening.close()
        raise
    return listening, str(Address(*listening.getsockname()[:2]))


def _socket_for(found: list[tuple[Any, ...]], address: str) -> tuple[trio.socket.SocketType, Any]:
    """A socket for the first of these addresses that is of a kind which this machine has, and that address."""
    problem: OSError | None = None
    for family, kind, protocol, _, target in found:
        try:
            return trio.socket.socket(family, kind, protocol), target
        except OSError as error:
            problem = error
    raise ConfigError(
        f"the admin endpoint cannot listen on {address}: this machine has no address of its kind ({problem})"
    )


def _advice(error: OSError, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use; choose another with --admin HOST:PORT, or 0 for any free one"
        case errno.EADDRNOTAVAIL:
            return "that is no address of this machine; give --admin one that is, such as 127.0.0.1"
        case errno.EACCES:
            return f"port {port} needs privileges; choose one above 1023 with --admin HOST:PORT"
        case _:
            return error.strerror or str(error)
