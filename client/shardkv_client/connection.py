"""The I/O around the core: one task that flushes, one for time, one reader for each connection.

Everything is decided by the core; here its orders are performed. No exception leaves a connection's task: a broken
connection is an event for the core, and a bug of our own is logged and treated as one. Tasks grow with connections,
never with calls.
"""

import logging
from collections.abc import Callable
from math import inf
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel
from trio.lowlevel import enable_ki_protection

from shardkv.errors import ConfigError
from shardkv_client.core import Core, Link, Settings
from shardkv_client.core.links import describe
from shardkv_client.environment import RECEIVE_BUFFER_BYTES, Environment, Stream
from shardkv_client.waiter import AsyncioWaiter, Doorbell, TrioWaiter

_log: Final = logging.getLogger("shardkv_client")
_EXPECTED: Final = frozenset({"BrokenResourceError", "ClosedResourceError", "EndOfStream"})
"""What a stream raises when its connection ends; trio's and anyio's are different classes of the same names."""


class _Pipe:
    """A link's stream, and what did not fit into it."""

    __slots__ = ("backlog", "scope", "stream", "writing")

    def __init__(self, scope: anyio.CancelScope) -> None:
        self.scope = scope
        self.stream: Stream | None = None
        self.backlog = bytearray()
        self.writing = False


class Host:
    """Runs a core. :meth:`run` must be running in a task while the client is open.

    Under trio its tasks are protected from KeyboardInterrupt, which the body gets in their place.
    """

    def __init__(
        self, seeds: list[str], settings: Settings, environment: Environment, waiter: TrioWaiter | AsyncioWaiter
    ) -> None:
        self._environment = environment
        self._flush_bell: Doorbell = waiter.doorbell()
        # Shielded: under trio a cancellation of the task that opened the client would end the connections at once,
        # under the calls with which that task tidies up.
        self._scope = anyio.CancelScope(shield=True)
        self._ended = anyio.Event()
        self.ended: bool = False
        """Whether no task of it is left. Beside the event, which belongs to the loop."""
        self._timer_scope: anyio.CancelScope | None = None
        self._group: anyio.abc.TaskGroup | None = None
        self._pipes: dict[Link, _Pipe] = {}
        self.monotonic: Callable[[], float] = environment.monotonic
        self.core: Core = Core(
            seeds,
            settings=settings,
            session=environment.random_bytes(16),
            random=environment.random,
            wake_flush=self._flush_bell.ring,
            wake_timer=self._wake_timer,
        )

    @enable_ki_protection
    async def run(self) -> None:
        """Until closed, or until its own task is cancelled by asyncio. Lets out nothing but that."""
        try:
            with self._scope:
                async with anyio.create_task_group() as self._group:
                    self._group.start_soon(self._keep_time)
                    await self._keep_flushing()
        except Exception:  # noqa: BLE001 - the body of `async with` must not see our bugs
            _log.exception("the client ends because of a bug in it; please report it")
        except BaseExceptionGroup as group:
            # An interrupt that met one of its tasks. asyncio has raised it where the loop is run, and would tell of it
            # once more as part of a group.
            if group.split(KeyboardInterrupt)[1] is not None:
                raise
        finally:
            self.close("the client's tasks have ended")
            self.ended = True
            self._ended.set()

    def close(self, reason: str = "the client was closed") -> None:
        """End every pending call and every connection. Nothing is waited for."""
        try:
            self.core.close(self.monotonic(), reason)
        finally:
            self._scope.cancel()

    async def aclose(self) -> None:
        """The same, and wait until no task is left."""
        self.close()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    async def _keep_flushing(self) -> None:
        bell = self._flush_bell
        core = self.core
        while True:
            await bell.wait()
            if core.links.several_owe:
                # Once round the loop: what was answered by another node meanwhile makes the next frames fuller.
                await anyio.lowlevel.checkpoint()
            core.flush(self.monotonic())
            self._perform()

    def _wake_timer(self) -> None:
        if self._timer_scope is not None:
            self._timer_scope.cancel()

    @enable_ki_protection
    async def _keep_time(self) -> None:
        core = self.core
        while True:
            delay = core.due - self.monotonic()
            if delay > 0:
                with anyio.CancelScope() as self._timer_scope:
                    if delay == inf:
                        await anyio.sleep_forever()
                    else:
                        await self._environment.sleep(delay)
                self._timer_scope = None
            else:
                await anyio.lowlevel.checkpoint()
            core.tick(self.monotonic())
            self._perform()

    def _perform(self) -> None:
        """Carry out the core's orders."""
        links = self.core.links
        if links.outputs:
            outputs, links.outputs = links.outputs, []
            for link in outputs:
                self._send(link)
        if links.warnings:
            warnings, links.warnings = links.warnings, []
            for warning in warnings:
                _log.warning("%s", warning)
        if links.drops:
            drops, links.drops = links.drops, []
            for link in drops:
                pipe = self._pipes.get(link)
                if pipe is not None:
                    pipe.scope.cancel()
        if links.dials:
            dials, links.dials = links.dials, []
            assert self._group is not None, "a dial before the tasks run"
            for link in dials:
                pipe = self._pipes[link] = _Pipe(anyio.CancelScope())
                self._group.start_soon(self._serve, link, pipe)

    def _send(self, link: Link) -> None:
        output = link.output
        data = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        pipe = self._pipes.get(link)
        if pipe is None or pipe.stream is None or not data:
            return  # the link ended first
        if pipe.writing:
            pipe.backlog += data
            return
        try:
            taken = pipe.stream.send_nowait(data)
        except Exception as error:  # noqa: BLE001 - a stream that is handed in may raise anything
            self._broken(link, error)
            pipe.scope.cancel()
            return
        if taken < len(data):
            pipe.backlog += memoryview(data)[taken:]
            pipe.writing = True
            assert self._group is not None, "output before the tasks run"
            self._group.start_soon(self._drain, link, pipe)

    @enable_ki_protection
    async def _drain(self, link: Link, pipe: _Pipe) -> None:
        """Write what the socket had no room for, until it has."""
        try:
            with anyio.CancelScope() as scope:
                while pipe.backlog and pipe.stream is not None:
                    data, pipe.backlog = pipe.backlog, bytearray()
                    await pipe.stream.send_all(data)
            assert not scope.cancelled_caught, "nobody cancels a writer but the end of the client"
        except Exception as error:  # noqa: BLE001 - a stream that is handed in may raise anything
            self._broken(link, error)
            pipe.scope.cancel()
        finally:
            pipe.writing = False

    @enable_ki_protection
    async def _serve(self, link: Link, pipe: _Pipe) -> None:
        """One connection, from the dial to its end."""
        core = self.core
        monotonic = self.monotonic
        try:
            with pipe.scope:
                stream = pipe.stream = await self._environment.dial(link.address)
                core.link_up(link, monotonic())
                self._perform()
                while data := await stream.receive(RECEIVE_BUFFER_BYTES):
                    core.link_bytes(link, data, monotonic())
                    self._perform()
                core.link_down(link, "the node closed the connection", monotonic())
        except Exception as error:  # noqa: BLE001 - a stream that is handed in may raise anything
            self._broken(link, error)
        finally:
            # Whatever ended it, cancellation included: the core must know, and the socket must not stay.
            core.link_down(link, "the connection was given up", monotonic())
            self._pipes.pop(link, None)
            stream_now, pipe.stream = pipe.stream, None
            if stream_now is not None:
                with anyio.CancelScope(shield=True):
                    await stream_now.aclose()
            self._perform_if_running()

    def _broken(self, link: Link, error: Exception) -> None:
        if not isinstance(error, OSError | ConfigError) and type(error).__name__ not in _EXPECTED:
            _log.error("the connection to %s ends because of a bug", link.address, exc_info=error)
        self.core.link_down(link, describe(error), self.monotonic())

    def _perform_if_running(self) -> None:
        if not self.core.closed:
            self._perform()
