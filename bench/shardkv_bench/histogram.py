"""Latencies in logarithmic buckets: constant memory, a bounded relative error, exact maximum, and sums of histograms.

Sixty-four buckets for each power of two, so a quantile is at most 1/64 (1.6 %) above the true one and never below it.
"""

from collections.abc import Iterable
from typing import Final

SUB_BITS: Final = 6
"""2**6 buckets for each power of two."""
_LINEAR: Final = 1 << (SUB_BITS + 1)
"""Below this a bucket holds one value."""
BUCKETS_MAX: Final = (64 - SUB_BITS) << SUB_BITS
"""Enough for 64-bit values."""


def bucket_of(value: int) -> int:
    """The bucket that holds ``value``, which must not be negative."""
    shift = value.bit_length() - SUB_BITS - 1
    return value if shift <= 0 else (shift << SUB_BITS) + (value >> shift)


def highest_in(bucket: int) -> int:
    """The largest value that ``bucket`` holds."""
    if bucket < _LINEAR:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    return (((bucket & (1 << SUB_BITS) - 1) + (1 << SUB_BITS) + 1) << shift) - 1


class Histogram:
    """Counts values, here nanoseconds."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.maximum = 0

    def record(self, value: int, times: int = 1) -> None:
        assert value >= 0, value
        shift = value.bit_length() - SUB_BITS - 1
        bucket = value if shift <= 0 else (shift << SUB_BITS) + (value >> shift)
        self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.count += times
        if value > self.maximum:
            self.maximum = value

    def add(self, other: "Histogram") -> None:
        """Count everything that ``other`` counted as well."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.maximum = max(self.maximum, other.maximum)

    def quantile(self, fraction: float) -> int:
        """The smallest bucket's upper end that at least ``fraction`` of the values do not exceed; 0 without values."""
        assert 0 <= fraction <= 1, fraction
        wanted = max(1, -int(-self.count * fraction // 1))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(highest_in(bucket), self.maximum)
        return 0

    def to_json(self) -> dict[str, object]:
        return {"maximum": self.maximum, "counts": sorted(self.counts.items())}

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> "Histogram":
        """The inverse of :meth:`to_json`, after a trip through JSON. Raises ValueError for another shape."""
        maximum, pairs = fields.get("maximum"), fields.get("counts")
        if not isinstance(maximum, int) or not isinstance(pairs, list):
            raise ValueError(f"not a histogram: {fields!r:.200}")
        histogram = cls()
        histogram.counts = {int(bucket): int(count) for bucket, count in pairs}
        histogram.count = sum(histogram.counts.values())
        histogram.maximum = maximum
        return histogram

    def check(self) -> None:
        """Assert that the totals agree with the buckets."""
        assert self.count == sum(self.counts.values()), (self.count, self.counts)
        assert all(0 <= bucket < BUCKETS_MAX for bucket in self.counts), sorted(self.counts)[-1:]
        assert all(count > 0 for count in self.counts.values()), self.counts
        assert not self.counts or bucket_of(self.maximum) == max(self.counts), (self.maximum, max(self.counts))


def merged(histograms: Iterable[Histogram]) -> Histogram:
    total = Histogram()
    for histogram in histograms:
        total.add(histogram)
    return total
