"""Every call that a simulated node makes of the world, numbered: disk, network and sleep, in the order it makes them.

The rule: a number means the same call in every run of a seed up to the moment of a fault, so that a crash can be put
at each one in turn.
"""

from collections.abc import Callable


class Calls:
    """The calls of one node, counted from 1 over all its lives."""

    __slots__ = ("_crash_at", "_on_crash", "count")

    def __init__(self) -> None:
        self.count: int = 0
        self._crash_at = 0
        self._on_crash: Callable[[], None] | None = None

    @property
    def armed(self) -> bool:
        return self._on_crash is not None

    def crash_at(self, number: int, on_crash: Callable[[], None]) -> None:
        """Call ``on_crash``, once, from inside call ``number``: it has to fence the node before it returns."""
        assert number > self.count, f"call {number} has been made already; the node is at {self.count}"
        self._crash_at = number
        self._on_crash = on_crash

    def disarm(self) -> None:
        self._on_crash = None

    def hit(self) -> bool:
        """Count a call that is about to be made (a write: that is under way); whether the node has crashed at it."""
        self.count += 1
        if self._on_crash is not None and self.count >= self._crash_at:
            on_crash, self._on_crash = self._on_crash, None
            on_crash()
            return True
        return False
