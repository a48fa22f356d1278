"""Deadlines and timers in two heaps, and the one moment at which something is next due.

No clock here: ``now`` is handed in. Most calls end long before their deadline, so their entries are not removed but
skipped; the heap is rebuilt whenever most of it is dead, which keeps the cost per call constant.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Final

from shardkv_client.core.calls import Call

DEAD_ENTRIES_MIN: Final = 1_024
"""Below this a rebuild is not worth its while."""
LINGER_SECONDS: Final = 0.5
"""While calls come, the next look is no further off: hardly any is due earlier then, and would set the timer anew."""


class Timers:
    __slots__ = ("_actions", "_deadlines", "_rebuild_at", "_tie", "_used", "_wake", "due")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.due: float = inf
        """When :meth:`run` must be called at the latest."""
        self._wake = wake
        self._actions: list[tuple[float, int, Callable[[float], None]]] = []
        self._deadlines: list[tuple[float, int, Call]] = []
        self._rebuild_at = 2 * DEAD_ENTRIES_MIN
        self._tie = count()
        self._used = False
        """Since the last look."""

    def add_deadline(self, call: Call) -> None:
        deadlines = self._deadlines
        deadline = call.deadline
        heappush(deadlines, (deadline, next(self._tie), call))
        if len(deadlines) >= self._rebuild_at:
            deadlines[:] = [entry for entry in deadlines if not entry[2].done]
            heapify(deadlines)
            self._rebuild_at = 2 * (len(deadlines) + DEAD_ENTRIES_MIN)
        self._used = True
        if deadline < self.due:
            self.due = deadline
            self._wake()

    def at(self, when: float, action: Callable[[float], None]) -> None:
        """Call ``action(now)`` once ``when`` has come."""
        heappush(self._actions, (when, next(self._tie), action))
        self._used = True
        if when < self.due:
            self.due = when
            self._wake()

    def run(self, now: float, expire: Callable[[Call], None]) -> None:
        """Perform everything that is due, and find out what is next."""
        actions = self._actions
        deadlines = self._deadlines
        while actions and actions[0][0] <= now:
            heappop(actions)[2](now)
        while deadlines and (deadlines[0][2].done or deadlines[0][0] <= now):
            call = heappop(deadlines)[2]
            if not call.done and call.deadline > now:
                heappush(deadlines, (call.deadline, next(self._tie), call))  # it was put off
            elif not call.done:
                expire(call)
        next_action = actions[0][0] if actions else inf
        next_deadline = deadlines[0][0] if deadlines else inf
        self.due = min(next_action, next_deadline, now + LINGER_SECONDS if self._used else inf)
        self._used = False

    def live(self) -> list[Call]:
        """Every call that is not done, the earliest deadline first, as it was when the call was made."""
        return [entry[2] for entry in sorted(self._deadlines) if not entry[2].done]

    def check(self) -> None:
        """Walk every invariant."""
        earliest = min(
            [entry[0] for entry in self._actions] + [entry[0] for entry in self._deadlines if not entry[2].done],
            default=inf,
        )
        assert self.due <= earliest, f"due at {self.due}, but something is at {earliest}"
