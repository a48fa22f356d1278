"""Entries that are not committed in the usual time: ask further followers for their acknowledgement.

A leader relies on as many followers as it needs, and the others hear of an entry later (``raft.thrift``). One of those
that it relies on may be busy, stalled or gone. Lives here: how long that is borne. Does not live here: on whom it
relies.
"""

from collections.abc import Callable
from typing import Final

import trio

from shardkv.environment import Clock
from shardkv.multiraft.replica import Replica
from shardkv.types import RangeId

PATIENCE_NS_MIN: Final = 5_000_000
USUAL_TIMES: Final = 4
"""An entry may take so many times as long as others did lately."""


class Hedger:
    """Everything but :meth:`run` is called in the loop and returns at once.

    Args:
        patience_seconds_max: an entry is never left to its first followers for longer than twice this.
        touch: called with a group that was stepped.
    """

    def __init__(self, clock: Clock, *, patience_seconds_max: float, touch: Callable[[Replica], None]) -> None:
        self._clock = clock
        self._patience_ns_max = round(patience_seconds_max * 1e9)
        self._touch = touch
        self._watched: dict[RangeId, tuple[Replica, int]] = {}
        """Groups with entries under way, and the last of those that should be committed by the next look."""
        self._wanted = trio.Event()
        self._usual_ns = 0
        """How long entries took lately."""

    def proposed(self, replica: Replica) -> None:
        """A group has an entry under way."""
        if replica.range_id not in self._watched:
            if not self._watched:
                self._wanted.set()
            self._watched[replica.range_id] = (replica, replica.raft.last_index)

    def committed(self, took_ns: int) -> None:
        """A group's last entry is answered. One that took very long counts for less, or soon nothing would."""
        if took_ns > 0:
            self._usual_ns += (min(took_ns, 2 * self._usual_ns + PATIENCE_NS_MIN) - self._usual_ns) // 8

    @property
    def _patience_ns(self) -> int:
        return min(max(USUAL_TIMES * self._usual_ns, PATIENCE_NS_MIN), self._patience_ns_max)

    async def run(self) -> None:
        """Service. Ends only by cancellation."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._watched:
                await self._clock.sleep(self._patience_ns / 1e9)
                self._look()

    def _look(self) -> None:
        for range_id, (replica, index) in list(self._watched.items()):
            raft = replica.raft
            if replica.leads and raft.committed < index:
                raft.hedge()
                if raft.has_ready():
                    self._touch(replica)
            elif replica.leads and raft.committed < raft.last_index:
                self._watched[range_id] = (replica, raft.last_index)
                continue
            # Nothing is left to be watched: whoever proposes more says so.
            del self._watched[range_id]
