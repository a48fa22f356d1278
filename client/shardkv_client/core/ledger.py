"""The ledger: which calls there are, which of them count against the bounds, and how each one ends.

Every call enters here once and ends here once, whatever happened to it in between. Three rules stand here: callers
beyond the bounds wait; a command's sequence is settled when, and only when, it will not be sent again; and a cancelled
command that was sent keeps its place until then.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from shardkv.errors import ClientClosed
from shardkv_client.core.calls import AdminCall, Call, Kind, WriteCall
from shardkv_client.core.session import Session
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers


class Ledger:
    def __init__(
        self,
        settings: Settings,
        timers: Timers,
        session: Session,
        wake_flush: Callable[[], None],
        internal_done: Callable[[AdminCall], None],
    ) -> None:
        self._settings = settings
        self._timers = timers
        self._session = session
        self._wake_flush = wake_flush
        self._internal_done = internal_done
        self.closed = False
        self.flush_wanted = False
        self.ready: list[Any] = []
        """Calls for the next flush."""
        self._backlog: deque[Any] = deque()
        """Calls beyond the in-flight bounds."""
        self.held: deque[WriteCall] = deque()
        """New commands that the session's window has no place for."""
        self.calls_active = 0
        """Calls within the bounds: sent, or on their way to be; abandoned ones too, until they are settled."""
        self.bytes_active = 0

    def submit(self, call: Call) -> None:
        """Take a call. ``call.notify`` is called, with it, from a later event; never from within this one."""
        if self.closed:
            raise ClientClosed("the client is closed; open a new one with connect()")
        self._timers.add_deadline(call)
        settings = self._settings
        if self.calls_active >= settings.calls_in_flight_max or self.bytes_active >= settings.bytes_in_flight_max:
            self._backlog.append(call)
            return
        call.admitted = True
        self.calls_active += 1
        self.bytes_active += call.size
        self.ready.append(call)
        if not self.flush_wanted:
            self.flush_wanted = True
            self._wake_flush()

    def _admit_backlog(self) -> None:
        settings = self._settings
        backlog = self._backlog
        admitted = []
        while (
            backlog
            and self.calls_active < settings.calls_in_flight_max
            and self.bytes_active < settings.bytes_in_flight_max
        ):
            call = backlog.popleft()
            if not call.done:
                call.admitted = True
                self.calls_active += 1
                self.bytes_active += call.size
                admitted.append(call)
        self.requeue(admitted)

    def submit_internal(self, call: AdminCall, now: float) -> None:
        self._timers.add_deadline(call)
        self.requeue([call])

    def cancel(self, call: Call) -> None:
        """Nobody waits for the call any more. A command that was sent stays registered until it is settled."""
        if call.done:
            return
        call.notify = None
        if not (call.kind is Kind.WRITE and call.attempts):
            self.finish(call, None, None)

    def requeue(self, calls: list[Any]) -> None:
        if calls:
            self.ready.extend(calls)
            if not self.flush_wanted:
                self.flush_wanted = True
                self._wake_flush()

    def finish(self, call: Any, result: object, error: Exception | None) -> None:
        assert not call.done, f"a {call.kind.name} call ended twice"
        call.done = True
        call.result = result
        call.error = error
        if call.internal:
            self._internal_done(call)
            call.result = None
            return
        if call.kind is Kind.WRITE:
            if call.sealed is not None:
                self.settle(call)
            call.body = b""  # the deadline heap may keep the call for a while yet, but not its bytes
        if call.admitted:
            self.calls_active -= 1
            self.bytes_active -= call.size
            if self._backlog:
                self._admit_backlog()
        notify = call.notify
        if notify is not None:
            call.notify = None
            notify(call)
        else:
            call.result = None  # nobody will take it

    def settle(self, call: WriteCall) -> None:
        """The command, as it was sealed, will never be sent again."""
        call.sealed = None
        if self._session.settle(call.sequence) and self.held:
            held = list(self.held)
            self.held.clear()
            self.requeue(held)

    def renew(self, call: WriteCall) -> None:
        """Issue a command again that was certainly not applied, as a new one."""
        self.settle(call)
        call.attempts = 0

    def take_back(self, call: WriteCall | AdminCall) -> None:
        """An attempt came to nothing. If none is left that may not have, a command is issued anew: what waits for a
        leader does not grow too old, and when time runs out its outcome is known."""
        call.attempts -= 1
        if not call.attempts and isinstance(call, WriteCall):
            self.settle(call)

    def flushed(self) -> None:
        """A flush is over; what it left ready asks for another."""
        self.flush_wanted = bool(self.ready)
        if self.ready:
            self._wake_flush()

    def close(self) -> None:
        """Take no calls any more; those there are must be finished next."""
        self.closed = True
        self._backlog.clear()
        self.held.clear()

    def check(self) -> None:
        """Walk every invariant."""
        live = [call for call in self._timers.live() if not call.internal]
        admitted = [call for call in live if call.admitted]
        assert len(admitted) == self.calls_active, f"{len(admitted)} calls are admitted, {self.calls_active} counted"
        size = sum(call.size for call in admitted)
        assert size == self.bytes_active, f"{size} bytes are admitted, {self.bytes_active} counted"
        assert self.calls_active <= self._settings.calls_in_flight_max, f"{self.calls_active} calls are in flight"
        sealed = {call.sequence for call in live if isinstance(call, WriteCall) and call.sealed is not None}
        assert sealed == self._session.unsettled, f"sealed {sorted(sealed)[:5]}, unsettled differs"
