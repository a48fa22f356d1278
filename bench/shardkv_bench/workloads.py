"""Workloads: which operations, in which proportion, on which records. Pure; drivers perform what a plan says.

YCSB's core workloads A to F, and plain ones: ``write`` and ``read`` touch records uniformly, ``bulk`` is ``put_many``.
Where they differ from YCSB's defaults: records lie in the order of their numbers (its insertorder=ordered), have one
field, and zipfian choices are among the loaded ones. Several client processes share one plan: each inserts record
numbers of its own, and the latest records are to each those that were loaded and its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Final, NamedTuple

from shardkv_bench.distributions import Chooser, Latest, scrambled_zipfian, uniform

KEY_PREFIX: Final = b"bench/"
"""Begins every key, so that whoever measured on a cluster of theirs can remove what it left."""
KEYS_END: Final = b"bench0"
"""The first key above all that begin so."""
SCAN_RECORDS_MAX: Final = 100
PREPARED_MAX: Final = 1 << 17
"""Operations drawn before a run starts, so that drawing them is not measured; then they repeat. Of more records than
this they would touch a small part only, which caches hold: there each is drawn when it is needed."""


VALUES_MAX: Final = 256
"""Different values that are written."""
VALUES_BYTES_MAX: Final = 16 << 20
"""What all of them may take of a client process's memory; there are fewer of large ones."""


class Kind(IntEnum):
    READ = 0
    UPDATE = 1
    INSERT = 2
    SCAN = 3
    READ_MODIFY_WRITE = 4
    BULK = 5


class Operation(NamedTuple):
    kind: Kind
    record: int
    scan_records: int = 1
    """How many a scan asks for."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``mix`` pairs kinds with their shares, which add up to 1."""

    name: str
    title: str
    mix: tuple[tuple[Kind, float], ...]
    distribution: str

    def __post_init__(self) -> None:
        assert abs(sum(share for _, share in self.mix) - 1) < 1e-9, self.mix
        assert self.distribution in ("uniform", "zipfian", "latest"), self.distribution


WORKLOADS: Final[dict[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("a", "half reads, half updates", ((Kind.READ, 0.5), (Kind.UPDATE, 0.5)), "zipfian"),
        Workload("b", "mostly reads", ((Kind.READ, 0.95), (Kind.UPDATE, 0.05)), "zipfian"),
        Workload("c", "only reads", ((Kind.READ, 1.0),), "zipfian"),
        Workload("d", "reads of what is new", ((Kind.READ, 0.95), (Kind.INSERT, 0.05)), "latest"),
        Workload("e", "short scans", ((Kind.SCAN, 0.95), (Kind.INSERT, 0.05)), "zipfian"),
        Workload("f", "reads and read-modify-writes", ((Kind.READ, 0.5), (Kind.READ_MODIFY_WRITE, 0.5)), "zipfian"),
        Workload("write", "only puts", ((Kind.UPDATE, 1.0),), "uniform"),
        Workload("read", "only gets", ((Kind.READ, 1.0),), "uniform"),
        Workload("bulk", "put_many", ((Kind.BULK, 1.0),), "uniform"),
    )
}


def key_of(record: int) -> bytes:
    """The 16-byte key of a record."""
    return KEY_PREFIX + b"%010d" % record


def value_of(record: int, size: int) -> bytes:
    """``size`` bytes that compress badly and are the same whenever they are made for a record."""
    return Random(record).randbytes(size)


def values_of(size: int) -> list[bytes]:
    """The values that a client process writes, made once: making one for each operation would be measured too."""
    return [value_of(number, size) for number in range(max(1, min(VALUES_MAX, VALUES_BYTES_MAX // max(1, size))))]


class Plan:
    """The stream of operations of one client process.

    Args:
        workload: What to do.
        records: How many are loaded, numbered from 0.
        seed: Two plans with the same seed are the same.
        process, processes: Which client process this is, from 0, of how many.
    """

    def __init__(self, workload: Workload, records: int, seed: int, process: int = 0, processes: int = 1) -> None:
        assert records >= 1, records
        assert 0 <= process < processes, (process, processes)
        self.records = records
        """So many this process chooses from: what was loaded, then its own inserts up to the first that is missing."""
        self._loaded = records
        self._first = self._following = records + process
        self._again: list[int] = []
        self._ahead: set[int] = set()
        """Inserted, but not all of its own before them."""
        self._processes = processes
        random = Random(seed * 1_000_003 + process)
        self._choose = _chooser(workload, records, random, lambda: self.records)
        kinds = [kind for kind, _ in workload.mix]
        shares = [share for _, share in workload.mix]
        live = workload.distribution == "latest" or Kind.INSERT in kinds or records > PREPARED_MAX
        self._drawn = random.choices(kinds, shares, k=PREPARED_MAX)
        self._counts = (
            [random.randint(1, SCAN_RECORDS_MAX) for _ in range(PREPARED_MAX)] if Kind.SCAN in kinds else None
        )
        self._prepared = None if live else [self._draw(index) for index in range(PREPARED_MAX)]
        self._next = 0

    def next(self) -> Operation:
        index = self._next
        self._next = (index + 1) & (PREPARED_MAX - 1)
        return self._draw(index) if self._prepared is None else self._prepared[index]

    def _draw(self, index: int) -> Operation:
        kind = self._drawn[index]
        if kind is Kind.INSERT:
            if self._again:
                return Operation(kind, self._again.pop())
            self._following += self._processes
            return Operation(kind, self._following - self._processes)
        count = self._counts[index] if self._counts is not None and kind is Kind.SCAN else 1
        return Operation(kind, self._record(self._choose()), count)

    def _record(self, position: int) -> int:
        """The record at a position among those that this process chooses from."""
        own = position - self._loaded
        return position if own < 0 else self._first + own * self._processes

    def inserted(self, record: int) -> None:
        """An insert was acknowledged: the latest distribution may choose it once all before it are there, too.

        Those before it of this process, that is. What others insert is never chosen: nobody tells when it is there.
        """
        self._ahead.add(record)
        while (following := self._record(self.records)) in self._ahead:
            self._ahead.remove(following)
            self.records += 1

    def not_inserted(self, record: int) -> None:
        """An insert failed: a later one has its number, which would be a hole."""
        self._again.append(record)


def _chooser(workload: Workload, records: int, random: Random, newest: Callable[[], int]) -> Chooser:
    if workload.distribution == "zipfian":
        return scrambled_zipfian(records, random)
    if workload.distribution == "latest":
        return Latest(records, random, newest)
    return uniform(records, random)
