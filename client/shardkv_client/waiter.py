"""How a caller waits for its call, on trio and on asyncio.

An ``anyio.Event`` for each request would cost more than the rest of a put together, so callers are parked with the
event loop's own primitives. What is parked is kept in the call; the core only ever calls ``notify``.
"""

import asyncio
from collections.abc import Callable
from threading import get_ident  # noqa: TID251 - it starts none
from typing import Any, Protocol

from trio import lowlevel

from shardkv_client.core import Call


class Waiter(Protocol):
    """One event loop's way to wait."""

    def notify(self, call: Call) -> None:
        """The call is done: its caller goes on. For ``call.notify``."""
        ...

    async def wait(
        self, call: Call, cancel: Callable[[Call], None], submit: Callable[[Call], None] | None = None
    ) -> Any:
        """Submit a call, unless that was done just now, and wait for it; its result, or its error raised.

        When the caller is cancelled, ``cancel(call)`` is called first. Raises AnotherLoop, and submits nothing, where
        the caller runs in another event loop.
        """
        ...

    def is_here(self) -> bool:
        """Whether the caller runs in this event loop."""
        ...

    def doorbell(self) -> "Doorbell": ...


class Doorbell(Protocol):
    """Wakes one task, however often it is rung before that task looks."""

    def ring(self) -> None: ...

    async def wait(self) -> None: ...


class AnotherLoop(RuntimeError):
    """Two event loops must not touch what one of them runs."""


class TrioWaiter:
    def __init__(self) -> None:
        self._thread = get_ident()
        self._token = lowlevel.current_trio_token()

    def is_here(self) -> bool:
        # A task's: where trio is the guest of another loop, that one's tasks find trio's token, too.
        return lowlevel.in_trio_task() and lowlevel.current_trio_token() is self._token

    def notify(self, call: Call) -> None:
        lowlevel.reschedule(call.task)

    async def wait(
        self, call: Call, cancel: Callable[[Call], None], submit: Callable[[Call], None] | None = None
    ) -> Any:
        try:
            call.task = lowlevel.current_task()
        except RuntimeError:  # of a caller that is not trio's
            raise AnotherLoop from None
        # A thread has one run of trio at a time, and a client whose run is over takes no calls.
        if get_ident() != self._thread:
            raise AnotherLoop
        if submit is not None:
            submit(call)

        def abort(_: object) -> lowlevel.Abort:
            cancel(call)
            return lowlevel.Abort.SUCCEEDED

        await lowlevel.wait_task_rescheduled(abort)
        call.task = None
        if call.error is not None:
            raise call.error
        result, call.result = call.result, None  # the deadline heap may keep the call for a while yet
        return result

    def doorbell(self) -> Doorbell:
        return TrioDoorbell()


class TrioDoorbell:
    __slots__ = ("_rung", "_task")

    def __init__(self) -> None:
        self._rung = False
        self._task: lowlevel.Task | None = None

    def ring(self) -> None:
        self._rung = True
        task = self._task
        if task is not None:
            self._task = None
            lowlevel.reschedule(task)

    async def wait(self) -> None:
        if self._rung:
            self._rung = False
            await lowlevel.checkpoint()
            return
        self._task = lowlevel.current_task()

        def abort(_: object) -> lowlevel.Abort:
            self._task = None
            return lowlevel.Abort.SUCCEEDED

        await lowlevel.wait_task_rescheduled(abort)
        self._rung = False


class AsyncioWaiter:
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop and not lowlevel.in_trio_task()
        except RuntimeError:  # of a caller that is trio's
            return False

    def notify(self, call: Call) -> None:
        future = call.task
        if future is not None and not future.done():  # None: an interrupt came before its caller waited
            future.set_result(None)

    async def wait(
        self, call: Call, cancel: Callable[[Call], None], submit: Callable[[Call], None] | None = None
    ) -> Any:
        if not self.is_here():
            raise AnotherLoop
        if submit is not None:
            submit(call)
        future = call.task = self._loop.create_future()
        try:
            await future
        except asyncio.CancelledError:
            cancel(call)
            raise
        call.task = None
        if call.error is not None:
            raise call.error
        result, call.result = call.result, None  # the deadline heap may keep the call for a while yet
        return result

    def doorbell(self) -> Doorbell:
        return AsyncioDoorbell(self._loop)


class AsyncioDoorbell:
    __slots__ = ("_future", "_loop", "_rung")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung = False
        self._future: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self) -> None:
        if self._rung:
            self._rung = False
            await asyncio.sleep(0)
            return
        self._future = self._loop.create_future()
        try:
            await self._future
        finally:
            self._future = None
        self._rung = False


def on_trio() -> bool:
    """Whether the caller is a trio task; else it must be an asyncio one."""
    return lowlevel.in_trio_task()


def current_waiter() -> TrioWaiter | AsyncioWaiter:
    """The waiter of the event loop that this task runs in."""
    return TrioWaiter() if on_trio() else AsyncioWaiter()
