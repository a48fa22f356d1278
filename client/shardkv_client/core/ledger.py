"""The ledger: which calls there are, which of them count against the bounds, and how each one ends.

Every call enters here once and ends here once, whatever happened to it in between. Three rules stand here: callers
beyond the bounds wait; a command's sequence is settled when, and only when, it will not be sent again; and a cancelled
command that was sent keeps its place until it is answered.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from shardkv.errors import ClientClosed
from shardkv_client.core.calls import STALE, AdminCall, Call, Kind, WriteCall
from shardkv_client.core.session import Session
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers

_WRITE: Final = Kind.WRITE
_ADMIN: Final = Kind.ADMIN
DEAD_CALLS_MIN: Final = 256
"""Below this a backlog is not worth a rebuild."""


class Lane:
    """The places that calls of one sort share, and those that wait for one.

    Calls that wait for one thing have a lane of their own, or a thousand of them would keep out those that do not: a
    stale read needs no leader.
    """

    __slots__ = ("_dead", "backlog", "bytes_active", "bytes_max", "calls_active", "calls_max")

    def __init__(self, settings: Settings) -> None:
        self.calls_max: int = settings.calls_in_flight_max
        self.bytes_max: int = settings.bytes_in_flight_max
        self.calls_active: int = 0
        """Calls within the bounds: sent, or on their way to be; abandoned ones too, until they are settled."""
        self.bytes_active: int = 0
        self.backlog: deque[Any] = deque()
        """Calls beyond the bounds. Those that ended there are skipped."""
        self._dead = 0
        """How many of them."""

    def admit_backlog(self) -> list[Any]:
        """Whoever has a place now."""
        admitted = []
        while self.backlog and self.calls_active < self.calls_max and self.bytes_active < self.bytes_max:
            call = self.backlog.popleft()
            if call.done:
                self._dead -= 1
            else:
                call.admitted = True
                self.calls_active += 1
                self.bytes_active += call.size
                admitted.append(call)
        return admitted

    def ended_in_backlog(self) -> None:
        """One of those that wait has given up. Most of them may, and the places stay taken."""
        self._dead += 1
        if self._dead >= DEAD_CALLS_MIN and 2 * self._dead >= len(self.backlog):
            self.backlog = deque(call for call in self.backlog if not call.done)
            self._dead = 0

    def clear(self) -> None:
        self.backlog.clear()
        self._dead = 0

    def check(self, live: list[Any]) -> None:
        """Walk every invariant; ``live`` are all calls that are not done."""
        admitted = [call for call in live if call.admitted and call.lane is self]
        assert len(admitted) == self.calls_active, f"{len(admitted)} calls are admitted, {self.calls_active} counted"
        size = sum(call.size for call in admitted)
        assert size == self.bytes_active, f"{size} bytes are admitted, {self.bytes_active} counted"
        assert self.calls_active <= self.calls_max, f"{self.calls_active} calls are in flight"
        dead = sum(call.done for call in self.backlog)
        assert dead == self._dead, f"{dead} calls in the backlog have ended, {self._dead} counted"


class Ledger:
    def __init__(
        self,
        settings: Settings,
        timers: Timers,
        session: Session,
        wake_flush: Callable[[], None],
        internal_done: Callable[[AdminCall], None],
    ) -> None:
        self._timers = timers
        self._session = session
        self._wake_flush = wake_flush
        self._internal_done = internal_done
        self.closed: bool = False
        self.flush_wanted: bool = False
        self.ready: list[Any] = []
        """Calls for the next flush."""
        self._writes = Lane(settings)
        self._reads = Lane(settings)
        """Linearizable and follower reads and scans, and what else needs a leader."""
        self._others = Lane(settings)
        self.held: deque[WriteCall] = deque()
        """New commands that the session's window has no place for."""

    @property
    def calls_active(self) -> int:
        """Calls within the bounds, of all lanes."""
        return self._writes.calls_active + self._reads.calls_active + self._others.calls_active

    def _lane_of(self, call: Any) -> Lane:
        kind = call.kind
        if kind is _WRITE:
            return self._writes
        if kind is _ADMIN:
            return self._others if call.key is None and call.range_id is None else self._reads
        return self._others if call.consistency == STALE else self._reads

    def submit(self, call: Call) -> None:
        """Take a call. ``call.notify`` is called, with it, from a later event; never from within this one."""
        if self.closed:
            raise ClientClosed("the client is closed; open a new one with connect()")
        self._timers.add_deadline(call)
        lane = call.lane = self._lane_of(call)
        # Counted here and in `finish`, without a call for it: this is done for every call that is made.
        if lane.calls_active >= lane.calls_max or lane.bytes_active >= lane.bytes_max:
            lane.backlog.append(call)
            return
        call.admitted = True
        lane.calls_active += 1
        lane.bytes_active += call.size
        self.ready.append(call)
        if not self.flush_wanted:
            self.flush_wanted = True
            self._wake_flush()

    def submit_internal(self, call: AdminCall, now: float) -> None:
        self._timers.add_deadline(call)
        self.requeue([call])

    def cancel(self, call: Call) -> None:
        """Nobody waits for the call any more. A command that was sent keeps its place until it is answered, but is
        settled: it will not be sent again, and a further write of the same caller must rule out that it comes late."""
        if call.done:
            return
        call.notify = None
        if isinstance(call, WriteCall) and call.attempts:
            self.settle(call)
        else:
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
        lane = call.lane
        if call.admitted:
            lane.calls_active -= 1
            lane.bytes_active -= call.size
            if lane.backlog:
                self.requeue(lane.admit_backlog())
        elif not self.closed:
            lane.ended_in_backlog()
        notify = call.notify
        if notify is not None:
            call.notify = None
            notify(call)
        else:
            call.result = None  # nobody will take it

    def settle(self, call: WriteCall) -> None:
        """The command, as it was sealed, will never be sent again."""
        if call.sealed is None:
            return  # it was cancelled, and has been settled since
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
        for lane in (self._writes, self._reads, self._others):
            lane.clear()
        self.held.clear()

    def check(self) -> None:
        """Walk every invariant."""
        live = [call for call in self._timers.live() if not call.internal]
        for lane in (self._writes, self._reads, self._others):
            lane.check(live)
        sealed = {call.sequence for call in live if isinstance(call, WriteCall) and call.sealed is not None}
        assert sealed == self._session.unsettled, f"sealed {sorted(sealed)[:5]}, unsettled differs"
