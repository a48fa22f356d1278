"""Which record an operation touches: uniform, zipfian (scrambled) and latest, as YCSB defines them.

After Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994), and Cooper et al.,
"Benchmarking cloud serving systems with YCSB" (SoCC 2010). A chooser is a function without arguments that returns a
record number; everything random comes from the ``random.Random`` that is handed in.
"""

from collections.abc import Callable
from random import Random
from typing import Final

Chooser = Callable[[], int]

ZIPFIAN_CONSTANT: Final = 0.99
SCRAMBLED_ITEMS: Final = 10_000_000_000
"""YCSB draws scrambled zipfian numbers from this many items and hashes them onto the records."""
SCRAMBLED_ZETA: Final = 26.46902820178302
"""The sum of 1/i**0.99 for i up to SCRAMBLED_ITEMS, which takes minutes to compute."""
_MASK: Final = (1 << 64) - 1


def zeta(count: int, theta: float, already: int = 0, total: float = 0.0) -> float:
    """The sum of 1/i**theta for i up to ``count``, carried on from ``already`` summed terms."""
    for item in range(already + 1, count + 1):
        total += 1 / item**theta
    return total


def scramble(value: int) -> int:
    """A 64-bit mix of ``value`` (the finaliser of splitmix64): popular numbers end up far apart."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Zipfian:
    """Numbers from 0 to ``count`` - 1, where number i is drawn in proportion to 1/(i+1)**theta."""

    def __init__(
        self, count: int, random: Random, theta: float = ZIPFIAN_CONSTANT, zeta_of_count: float | None = None
    ) -> None:
        assert count >= 1, count
        self.count = count
        self._random = random.random
        self._theta = theta
        self._zeta_of_two = zeta(2, theta)
        self._alpha = 1 / (1 - theta)
        self._zeta = zeta(count, theta) if zeta_of_count is None else zeta_of_count
        self._settle()

    def _settle(self) -> None:
        if self.count <= 2:
            self._eta = 0.0
            return
        self._eta = (1 - (2 / self.count) ** (1 - self._theta)) / (1 - self._zeta_of_two / self._zeta)

    def grow(self, count: int) -> None:
        """Draw from ``count`` numbers from now on; it only grows."""
        assert count >= self.count, (count, self.count)
        self._zeta = zeta(count, self._theta, self.count, self._zeta)
        self.count = count
        self._settle()

    def __call__(self) -> int:
        chance = self._random()
        scaled = chance * self._zeta
        if scaled < 1:
            return 0
        if scaled < self._zeta_of_two:
            return min(1, self.count - 1)
        return min(self.count - 1, int(self.count * (self._eta * chance - self._eta + 1) ** self._alpha))


def uniform(count: int, random: Random) -> Chooser:
    """Every record alike."""
    draw = random.random
    return lambda: int(draw() * count)


def scrambled_zipfian(count: int, random: Random) -> Chooser:
    """A few records are popular, and those lie all over the key space."""
    draw = Zipfian(SCRAMBLED_ITEMS, random, zeta_of_count=SCRAMBLED_ZETA)
    return lambda: scramble(draw()) % count


class Latest:
    """The newest record is the most popular. ``newest`` is the count of records now, and grows with inserts."""

    def __init__(self, count: int, random: Random, newest: Callable[[], int]) -> None:
        self._draw = Zipfian(count, random)
        self._newest = newest

    def __call__(self) -> int:
        count = self._newest()
        if count > self._draw.count:
            self._draw.grow(count)
        return count - 1 - self._draw()
