"""The hybrid logical clock of a node: stamps that grow, follow wall time, and carry causality between nodes.

One object per node; ranges share it. What a range makes of a stamp is the state machine's matter; how a node's time and
its peers' are kept together is :mod:`shardkv.server.clock_health`'s. The rules (trap 23):

- Time goes on with the monotonic clock. The wall clock says where it starts and is followed after that only as far as
  :meth:`HybridClock.follow` is told, so that a jump of it cannot carry a range into the future: a range's time never
  goes back, and a command issued by the right time would be too old for it.
- A stamp from outside that lies further ahead of this node's own time than the bound is refused and leaves no trace, so
  that one bad peer or token cannot carry a cluster into the future.
- What a range has applied cannot be refused any more (replicas would differ). A node's time never lies further behind
  it than the bound, and what rounding adds: it would tell clients a time by which their commands are too old.
"""

from typing import Final

from shardkv.environment import Clock
from shardkv.types import TIMESTAMP_COUNTER_BITS, TIMESTAMP_MAX, timestamp_ms

CLOCK_OFFSET_MS_MAX: Final = 500
"""The default of the setting ``clock_offset_max_ms``."""
_COUNTED_MS_MAX: Final = 2
"""By so much more than the bound a stamp that was counted on from one at the bound may seem to be ahead, for another
node reads its clock in whole milliseconds, too. Time that gave way to that would run faster with each write."""
_NS_PER_MS: Final = 1_000_000


class HybridClock:
    """Gives this node's timestamps (see :mod:`shardkv.types` for their layout)."""

    __slots__ = ("_ahead_ms", "_applied", "_clock", "_held", "_last", "_offset_ms_max")

    def __init__(self, clock: Clock, offset_ms_max: int = CLOCK_OFFSET_MS_MAX) -> None:
        self._clock = clock
        self._offset_ms_max = offset_ms_max
        self._ahead_ms = clock.wall_ms() - clock.monotonic_ns() // _NS_PER_MS
        """Of the monotonic clock."""
        self._held = False
        self._applied = 0
        """The highest stamp that a range here has applied."""
        self._last = 0

    @property
    def last(self) -> int:
        """The highest stamp given or absorbed so far."""
        return self._last

    @property
    def held(self) -> bool:
        """Whether stamps go by what ranges here have applied, for nobody has confirmed the wall clock yet."""
        return self._held

    def ms(self) -> int:
        """The time that stamps go by, milliseconds since 1970."""
        return self._clock.monotonic_ns() // _NS_PER_MS + self._ahead_ms

    def guess_ms(self) -> int:
        """What time it is, as far as this node knows: by its wall clock while stamps are held back."""
        return max(self.ms(), self._clock.wall_ms()) if self._held else self.ms()

    def now(self) -> int:
        """A stamp above every stamp given or absorbed before, and not below the time."""
        stamp = self.ms() << TIMESTAMP_COUNTER_BITS
        if stamp <= self._last:
            # Time was set back, or is behind what was observed: count on from there.
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
        if self._held:
            # Clients have it from this cluster, and they count on from there: so does this node.
            self._ahead_ms += max(0, timestamp_ms(timestamp) - self.ms())
        return True

    def believable(self, timestamp: int) -> bool:
        """Whether ``timestamp`` lies at most the bound ahead of this node's time."""
        return timestamp_ms(timestamp) <= self.guess_ms() + self._offset_ms_max

    def absorb(self, timestamp: int) -> None:
        """Raise the clock to a stamp that a range has applied, wherever it lies."""
        if timestamp <= self._applied:
            return
        self._applied = timestamp
        if timestamp > self._last:
            self._last = timestamp
        too_far_ms = self._behind_applied_ms() - self._offset_ms_max - _COUNTED_MS_MAX
        if too_far_ms > 0:
            self._ahead_ms += too_far_ms

    def follow(self, ms: int) -> bool:
        """Set the time to ``ms``. False: a range here is further ahead than the bound, and time goes on as it is."""
        self._held = False
        if timestamp_ms(self._applied) > ms + self._offset_ms_max:
            return False
        self._ahead_ms += ms - self.ms()
        return True

    def hold(self) -> None:
        """Give stamps by the latest time that a range here has applied, which goes on from there, until
        :meth:`follow`: a stamp that is behind harms nobody, and what is given out cannot be taken back."""
        self._ahead_ms += timestamp_ms(self._applied) - self.ms()
        self._held = True

    def _behind_applied_ms(self) -> int:
        return timestamp_ms(self._applied) - self.ms()

    def check(self) -> None:
        assert 0 <= self._last <= TIMESTAMP_MAX, f"the clock stands at {self._last}"
        assert self._applied <= self._last, f"{self._applied} was applied, and {self._last} is the highest stamp seen"
        behind_ms = self._behind_applied_ms()
        assert behind_ms <= self._offset_ms_max + _COUNTED_MS_MAX, (
            f"the time is {behind_ms} ms behind what a range has applied"
        )
