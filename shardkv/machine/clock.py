"""The hybrid logical clock of a node: stamps that grow, follow wall time, and carry causality between nodes.

One object per node; ranges share it. It holds two ints and asks the environment's clock; what a range makes of a stamp
is the state machine's matter. The rule (trap 23): a stamp from outside that lies further ahead of this node's own wall
clock than the bound is refused and leaves no trace, so that one bad peer or token cannot carry a cluster into the
future. Stamps cannot be refused when an entry is applied (replicas would differ): refuse them where they come in.
"""

from typing import Final

from shardkv.environment import Clock
from shardkv.types import TIMESTAMP_COUNTER_BITS, TIMESTAMP_MAX, timestamp_ms

CLOCK_OFFSET_MS_MAX: Final = 500
"""The default of the setting ``clock_offset_max``."""


class HybridClock:
    """Gives this node's timestamps (see :mod:`shardkv.types` for their layout)."""

    __slots__ = ("_clock", "_last", "_offset_ms_max")

    def __init__(self, clock: Clock, offset_ms_max: int = CLOCK_OFFSET_MS_MAX) -> None:
        self._clock = clock
        self._offset_ms_max = offset_ms_max
        self._last = 0

    @property
    def last(self) -> int:
        """The highest stamp given or absorbed so far."""
        return self._last

    def now(self) -> int:
        """A stamp above every stamp given or absorbed before, and not below the wall clock."""
        stamp = self._clock.wall_ms() << TIMESTAMP_COUNTER_BITS
        if stamp <= self._last:
            # The wall clock stood still, jumped back, or is behind what was observed: count on from there.
            stamp = self._last + 1
        self._last = stamp
        return stamp

    def observe(self, timestamp: int) -> bool:
        """Raise the clock to a stamp from another node or client. False: too far ahead, refused, nothing changed."""
        if timestamp <= self._last:
            return True
        if not self.believable(timestamp):
            return False
        self._last = timestamp
        return True

    def believable(self, timestamp: int) -> bool:
        """Whether ``timestamp`` lies at most the bound ahead of this node's wall clock."""
        return timestamp_ms(timestamp) <= self._clock.wall_ms() + self._offset_ms_max

    def check(self) -> None:
        assert 0 <= self._last <= TIMESTAMP_MAX, f"the clock stands at {self._last}"
