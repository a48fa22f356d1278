"""What the shared log says, all groups together: the one place where an update takes effect.

The running log and recovery both come through here, record by record in the same order, so that they agree. Does not
live here: bytes, files, sequence numbers.
"""

from collections.abc import Sequence

from shardkv.raft.messages import Entry
from shardkv.storage.group_log import ABSENT, GroupLog, Stub
from shardkv.storage.record import Checkpoint, CreateGroup, DecodedUpdate, LogUpdate, Tombstone, encode_checkpoint
from shardkv.storage.segment import Segment
from shardkv.types import RangeId, ReplicaId


class LogState:
    __slots__ = ("freed", "groups", "segments", "tombstones")

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        """By id, oldest first; the last one is written to."""
        self.groups: dict[RangeId, GroupLog] = {}
        """Every group that was created and not released yet, the ended ones among them."""
        self.tombstones: dict[RangeId, ReplicaId] = {}
        """The highest replica id that has ended here, for each range; no replica up to it may be created again."""
        self.freed = 0
        """How often a group has let go of entries: unchanged, there is nothing new to collect."""

    def apply(
        self,
        update: LogUpdate | DecodedUpdate,
        segment: Segment,
        first: int,
        items: Sequence[Entry | Stub],
        places: Sequence[int],
    ) -> GroupLog | None:
        """Carry out an update whose entries (``items``, from index ``first``) lie at ``places`` in ``segment``.

        Returns the group, or None for a tombstone of a group that is not here.
        """
        range_id = update.range_id
        if update.create is not None:
            self._create(range_id, update.create)
        log = self.groups.get(range_id)
        if log is None:
            assert update.tombstone is not None, f"range {range_id} is not in the log: {update}"
            self._bury(range_id, update.tombstone)
            return None
        if update.reset is not None:
            log.reset(update.reset)
            self.freed += 1
        if items:
            log.append(first, items, places)
            segment.last_index[range_id] = first + len(items) - 1
        if update.hard_state is not None:
            log.set_hard_state(update.hard_state)
        if update.compact is not None:
            log.compact(update.compact)
            self.freed += 1
        if update.tombstone is not None:
            self._bury(range_id, update.tombstone)
        if update.release:
            assert log.ended, f"range {range_id} is released and has not ended"
            del self.groups[range_id]
            self.freed += 1
        return log

    def move(
        self, range_id: RangeId, segment: Segment, first: int, items: Sequence[Entry | Stub], places: Sequence[int]
    ) -> GroupLog:
        """Entries that the log holds already were copied to ``segment``."""
        log = self.groups[range_id]
        log.move(first, items, places)
        last = first + len(items) - 1
        segment.last_index[range_id] = max(segment.last_index.get(range_id, 0), last)
        return log

    def _create(self, range_id: RangeId, create: CreateGroup) -> None:
        held = self.groups.get(range_id)
        assert held is None, (
            f"range {range_id}: replica {create.replica_id} is created while the log of replica "
            f"{held.replica_id if held else 0} is not released"
        )
        ended = self.tombstones.get(range_id, 0)
        assert create.replica_id > ended, f"range {range_id}: replica {create.replica_id} is created, {ended} has ended"
        self.groups[range_id] = GroupLog(self.segments, range_id, create)

    def _bury(self, range_id: RangeId, tombstone: Tombstone) -> None:
        log = self.groups.get(range_id)
        if log is not None and not log.ended and log.replica_id <= tombstone.replica_id:
            log.end(tombstone)
        self.tombstones[range_id] = max(self.tombstones.get(range_id, ReplicaId(0)), tombstone.replica_id)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint says, where nothing is known yet."""
        self.groups = {meta.range_id: GroupLog.from_meta(self.segments, meta) for meta in checkpoint.groups}
        self.tombstones = checkpoint.tombstones

    def encode_checkpoint(self) -> bytes:
        return encode_checkpoint([log.pack() for log in self.groups.values()], self.tombstones)

    def absent(self) -> list[tuple[RangeId, list[int]]]:
        """The entries that should be there and were in no segment."""
        return [(log.range_id, missing) for log in self.groups.values() if (missing := log.absent())]

    def check(self) -> None:
        assert ABSENT.term == -1, f"{ABSENT} was changed"
        ids = list(self.segments)
        assert ids == list(range(ids[0], ids[0] + len(ids))), f"the segments have gaps: {ids}"
        for log in self.groups.values():
            log.check()
            ended = self.tombstones.get(log.range_id, 0)
            assert log.ended == (log.replica_id <= ended), (
                f"range {log.range_id}: replica {log.replica_id}, ended {log.ended}, tombstone {ended}"
            )
