"""No answer is older than it says (DESIGN 2.3): a stale read shows all that was known its age before it was called.

For keys whose level only rises: the version of a key that is put and never deleted. What an answer has shown is known
from then on, whoever asked, for only what is committed is ever shown.
"""

from bisect import bisect_right
from typing import Any

from shardkv.simulation.checkers.violation import Violation


class NoOlderThanSaid:
    name = "no-older-than-said"

    def __init__(self) -> None:
        self._times: dict[Any, list[float]] = {}
        """When each level became known, in order."""
        self._levels: dict[Any, list[int]] = {}
        self.judged = 0
        """Answers that were old enough for something newer to be known when they came."""

    def known(self, key: Any, level: int, now: float) -> None:
        """A put that gave this level was answered, or a read showed it."""
        levels = self._levels.setdefault(key, [0])
        if level > levels[-1]:
            self._times.setdefault(key, []).append(now)
            levels.append(level)

    def level_at(self, key: Any, time: float) -> int:
        """The level that was known at a moment; 0 if none was."""
        known = bisect_right(self._times.get(key, []), time)
        return self._levels[key][known] if known else 0

    def answered(self, key: Any, level: int, called: float, age: float, age_max: float | None, now: float) -> None:
        """A stale read was answered; level 0 is an absent key. ``age`` and ``age_max`` in seconds."""
        if age_max is not None and age > age_max:
            raise Violation(self.name, f"{key!r}: {age:.6f} s old, and at most {age_max:g} s were allowed")
        wanted = self.level_at(key, called - age)
        if level < wanted:
            raise Violation(
                self.name,
                f"{key!r}: a read called at {called:.6f} shows {level}, at most {age:.6f} s old as it says; but before "
                f"that {wanted} was known",
            )
        self.judged += level < self.level_at(key, called)
        self.known(key, level, now)

    def check(self) -> None:
        for key, levels in self._levels.items():
            assert levels == sorted(set(levels)), f"{key!r}: {levels} do not rise"
            times = self._times.get(key, [])
            assert len(times) == len(levels) - 1, f"{key!r}: {len(times)} times, {len(levels)} levels"
