"""A TCP proxy between a client and the nodes that cuts connections after exactly so many bytes, one way or the other.

Lives here: the proxies of all nodes of a cluster, and the client environment whose dials go through them. The bytes
before the cut arrive, followed by an orderly end; what comes after it is lost. While the gate is shut, nothing gets
through at all, as in a partition between the client and every node. While the nodes are silenced, requests get through
and answers do not: whatever answer a cut falls into (a late greeting, one to "are you there?"), no request is lost.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from functools import partial

import trio

from shardkv_client.environment import RealEnvironment, Stream
from tests.cluster.harness import LocalCluster


class Way(Enum):
    REQUEST = "request"
    ANSWER = "answer"


class Proxies:
    """One proxy in front of each node. The byte counts and cuts are over all of them together."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        """By the node's own address."""
        self.passed = dict.fromkeys(Way, 0)
        """Bytes that came through, each way."""
        self.cuts = 0
        self._cut_at: tuple[Way, int] | None = None
        self._shut = False
        self._silent = False
        self._after_cut: Callable[[], None] | None = None
        self._open: dict[trio.CancelScope, None] = {}

    def cut_after(self, way: Way, count: int, then: Callable[[], None] | None = None) -> None:
        """Cut the connection that carries the ``count``-th byte from now right behind it; ``then`` :meth:`shut` the
        gate or :meth:`silence` the nodes, which leaves that connection standing, too.

        After 0 bytes means: the first thing that comes is lost.
        """
        self._cut_at = (way, count)
        self._after_cut = then

    def forget_cut(self) -> None:
        self._cut_at = None

    def silence(self) -> None:
        """Lose every answer from now on. :meth:`shut` comes before :meth:`open`: the connections have lost bytes."""
        self._silent = True

    def shut(self) -> None:
        """Cut every connection and let no new one through."""
        self._shut = True
        for scope in list(self._open):
            scope.cancel()

    def open(self) -> None:
        assert self._shut or not self._silent, "connections that have lost bytes are still open"
        self._shut = self._silent = False

    async def serve(self, target: str, client: trio.SocketStream) -> None:
        if self._shut:
            await client.aclose()
            return
        with trio.CancelScope() as scope:
            self._open[scope] = None  # before the dial, for one that is under way does not outlast a shut gate either
            try:
                node = await self._dial(target)
                if node is not None:
                    async with node, trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, client, node, Way.REQUEST, scope)
                        nursery.start_soon(self._pump, node, client, Way.ANSWER, scope)
            finally:
                del self._open[scope]
                with trio.CancelScope(shield=True):
                    await client.aclose()

    async def _dial(self, target: str) -> trio.SocketStream | None:
        """A connection to the node; None if there is nobody."""
        host, _, port = target.rpartition(":")
        try:
            return await trio.open_tcp_stream(host, int(port))
        except OSError:
            return None

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, way: Way, scope: trio.CancelScope
    ) -> None:
        try:
            while data := await source.receive_some(65536):
                if way is Way.ANSWER and self._silent:
                    continue
                kept = self._before_cut(way, data)
                if kept:
                    self.passed[way] += len(kept)
                    await sink.send_all(kept)
                if len(kept) < len(data) or self._cut_at == (way, 0):
                    self._cut_at = None
                    self.cuts += 1
                    if self._after_cut is not None:
                        self._after_cut()
                    if not self._silent:
                        break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    def _before_cut(self, way: Way, data: bytes) -> bytes:
        if self._cut_at is None or self._cut_at[0] is not way:
            return data
        count = self._cut_at[1]
        self._cut_at = (way, max(0, count - len(data)))
        return data[:count]


class ThroughProxies(RealEnvironment):
    """A client's environment that dials each node through its proxy."""

    def __init__(self, proxies: Proxies) -> None:
        super().__init__()
        self._proxies = proxies

    async def dial(self, address: str) -> Stream:
        return await super().dial(f"127.0.0.1:{self._proxies.ports[address]}")


@asynccontextmanager
async def proxies_of(world: LocalCluster) -> AsyncIterator[Proxies]:
    proxies = Proxies()
    async with trio.open_nursery() as nursery:
        for address in world.addresses.values():
            serve = partial(trio.serve_tcp, partial(proxies.serve, address), 0, host="127.0.0.1")
            listeners = await nursery.start(serve)
            proxies.ports[address] = listeners[0].socket.getsockname()[1]
        yield proxies
        nursery.cancel_scope.cancel()
