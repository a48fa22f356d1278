"""What the shared log should say, kept the plain way, and a driver that walks a log and its model in step."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate, ResetLog, Tombstone
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .support import MemoryDisk

SMALL = WalSettings(
    segment_bytes=2048,
    reserve_bytes=2048,
    cache_bytes_max=2000,
    move_bytes_max=300,
    move_entries_max=5,
    closed_segments_max=3,
)
DIRECTORY = "/data/wal"


class Group(NamedTuple):
    replica_id: int
    hard_state: HardState
    compact: tuple[int, int]
    conf_state: ConfState
    payload: bytes
    entries: tuple[Entry, ...]
    tombstone: Tombstone | None

    @property
    def last(self) -> int:
        return self.compact[0] + len(self.entries)

    def term(self, index: int) -> int:
        return self.compact[1] if index == self.compact[0] else self.entries[index - self.compact[0] - 1].term


State = tuple[tuple[tuple[int, Group], ...], tuple[tuple[int, int], ...]]


class Model:
    def __init__(self, state: State = ((), ())) -> None:
        self.groups: dict[int, Group] = dict(state[0])
        self.tombstones: dict[int, int] = dict(state[1])

    def state(self) -> State:
        return tuple(sorted(self.groups.items())), tuple(sorted(self.tombstones.items()))

    def apply(self, update: LogUpdate) -> None:
        range_id = update.range_id
        if update.create is not None:
            made = update.create
            hard_state = HardState(made.term, 0, made.index)
            compact = (made.index, made.term)
            self.groups[range_id] = Group(made.replica_id, hard_state, compact, made.conf_state, made.payload, (), None)
        group = self.groups.get(range_id)
        if group is not None:
            self.groups[range_id] = group = self._changed(group, update)
        if update.tombstone is not None:
            ended = update.tombstone
            self.tombstones[range_id] = max(self.tombstones.get(range_id, 0), ended.replica_id)
            if group is not None and group.tombstone is None and group.replica_id <= ended.replica_id:
                self.groups[range_id] = group._replace(tombstone=ended)
        if update.release:
            del self.groups[range_id]

    @staticmethod
    def _changed(group: Group, update: LogUpdate) -> Group:
        if update.reset is not None:
            index, term, conf_state = update.reset
            now = group.hard_state
            hard_state = HardState(max(now.term, term), now.vote if now.term >= term else 0, index)
            group = group._replace(compact=(index, term), conf_state=conf_state, entries=(), hard_state=hard_state)
        if update.entries:
            kept = update.entries[0].index - group.compact[0] - 1
            group = group._replace(entries=group.entries[:kept] + tuple(update.entries))
        if update.hard_state is not None:
            group = group._replace(hard_state=update.hard_state)
        if update.compact is not None and update.compact.index > group.compact[0]:
            dropped = update.compact.index - group.compact[0]
            group = group._replace(compact=tuple(update.compact), entries=group.entries[dropped:])
        return group


def state_of(wal: Wal) -> State:
    """What a log says, read through what the Raft core reads it by."""
    groups = {}
    for range_id, log in wal.groups.items():
        hard_state, conf_state = log.initial_state()
        first, last = log.first_index(), log.last_index()
        entries = tuple(log.entries(first, last + 1, 1 << 40))
        assert [entry.term for entry in entries] == [log.term(index) for index in range(first, last + 1)]
        compact = (first - 1, log.term(first - 1))
        groups[int(range_id)] = Group(
            log.replica_id, hard_state, compact, conf_state, log.payload, entries, log.tombstone
        )
    return tuple(sorted(groups.items())), tuple(sorted((int(a), int(b)) for a, b in wal.tombstones.items()))


class Driver:
    """Takes random, valid steps. ``history`` holds the state after each record; ``acknowledged`` is the last synced."""

    def __init__(
        self, disk: MemoryDisk, random: Random, settings: WalSettings = SMALL, state: State = ((), ())
    ) -> None:
        self.disk = disk
        self.random = random
        self.model = Model(state)
        self.history: list[tuple[int, State]] = [(0, state)]
        self.jobs: list[tuple[int, Callable[[], None]]] = []
        self.acknowledged = 0
        self.dropped = 0
        self.wal = Wal.open(disk, DIRECTORY, settings, token=b"token")
        self.note()
        self.acknowledged = self.wal.synced_sequence

    def note(self) -> None:
        self.history.append((self.wal.statistics().sequence, self.model.state()))

    def at(self, sequence: int) -> State:
        """What the log says after record ``sequence``."""
        return [state for number, state in self.history if number <= sequence][-1]

    def append(self, *updates: LogUpdate) -> None:
        for update in updates:
            self.model.apply(update)
        # Noted before the log gets it: a crash inside leaves it in doubt, not unheard of.
        job = self.wal.append(updates)
        self.note()
        self.jobs.append((self.wal.statistics().sequence, job))

    def sync(self) -> None:
        """Run the jobs that wait, in order, as the writer thread does."""
        while self.jobs:
            sequence, job = self.jobs.pop(0)
            job()
            self.acknowledged = max(self.acknowledged, sequence)

    def collect(self) -> None:
        before = self.wal.statistics().segments
        job = self.wal.collect()
        if job is not None:
            self.dropped += max(before - self.wal.statistics().segments, 0)
            self.note()
            self.jobs.append((self.wal.statistics().sequence, job))

    def prepare(self) -> None:
        job = self.wal.prepare()
        if job is not None:
            job()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
        self.sync()

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.2:
            self.sync()
        elif choice < 0.3:
            self.collect()
        elif choice < 0.35:
            self.prepare()
        else:
            ranges = self.random.sample(range(1, 6), self.random.randrange(1, 4))
            updates = [self.update(RangeId(range_id)) for range_id in ranges]
            self.append(*updates)
        self.wal.check()

    def update(self, range_id: RangeId) -> LogUpdate:
        random = self.random
        group = self.model.groups.get(range_id)
        ended = self.model.tombstones.get(range_id, 0)
        if group is None:
            if random.random() < 0.1:
                return LogUpdate(range_id, tombstone=Tombstone(ReplicaId(ended + 1)))
            index, term = random.choice([(0, 0), (5, 5), (10, 3)])
            conf_state = ConfState((1, 2, 3), (4,)) if index else ConfState()
            create = CreateGroup(ReplicaId(ended + 1), index, term, conf_state, b"made %d" % range_id)
            return LogUpdate(range_id, create=create)
        if group.tombstone is not None:
            return LogUpdate(range_id, release=True)
        choice = random.random()
        hard_state = group.hard_state
        if choice < 0.02:
            return LogUpdate(range_id, tombstone=Tombstone(ReplicaId(group.replica_id), b"over"))
        if choice < 0.06:
            index = hard_state.commit + random.randrange(1, 8)
            return LogUpdate(range_id, reset=ResetLog(index, hard_state.term + 1, ConfState((7, 8, 9))))
        if choice < 0.25 and hard_state.commit > group.compact[0]:
            index = random.randrange(group.compact[0] + 1, hard_state.commit + 1)
            return LogUpdate(range_id, compact=CompactLog(index, group.term(index)))
        if choice < 0.35:
            return LogUpdate(
                range_id, hard_state=HardState(hard_state.term + 1, random.randrange(4), hard_state.commit)
            )
        first = random.randrange(hard_state.commit, group.last + 1) + 1 if random.random() < 0.3 else group.last + 1
        term = max(hard_state.term, 1)
        entries = tuple(
            Entry(term, index, random.choice(tuple(EntryType)), random.randbytes(random.choice((0, 3, 40, 200))))
            for index in range(first, first + random.randrange(1, 4))
        )
        commit = random.randrange(hard_state.commit, entries[-1].index + 1)
        new = HardState(term, hard_state.vote if term == hard_state.term else 0, commit)
        return LogUpdate(
            range_id, hard_state=new if term > hard_state.term or random.random() < 0.8 else None, entries=entries
        )
