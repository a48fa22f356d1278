"""Decides which segments of the shared log may go, and which entries must move for that.

Pure: looks at the state and answers; :class:`shardkv.storage.wal.Wal` performs. The rule: only the oldest segments go,
so what is left is always a run, and a segment goes only when no group's only copy of an entry lies in it. All metadata
stand in the checkpoint at the start of every segment, so only entries hold a segment back.
"""

from typing import NamedTuple

from shardkv.storage.group_log import GroupLog
from shardkv.storage.log_state import LogState
from shardkv.storage.segment import Segment


class Move(NamedTuple):
    """Entries of one group that stand together in the log, to be written again."""

    log: GroupLog
    first: int
    last: int


def holder_of(state: LogState, segment: Segment) -> GroupLog | None:
    """A group with live entries in ``segment``, or None. Those that are found to have none there are forgotten.

    Each group is forgotten once, so a segment is not walked from its start every time.
    """
    last_index = segment.last_index
    for range_id in list(last_index):
        log = state.groups.get(range_id)
        if log is not None and log.first_index() <= last_index[range_id] and log.live_in(segment):
            return log
        del last_index[range_id]
    return None


def dead_segments(state: LogState) -> list[Segment]:
    """The oldest segments that hold nothing live, never the one that is written to."""
    dead = []
    for segment in list(state.segments.values())[:-1]:
        if holder_of(state, segment) is not None:
            break
        dead.append(segment)
    return dead


def moves_from(state: LogState, segment: Segment, entries_max: int, bytes_max: int) -> list[Move]:
    """The first live entries of ``segment``, at least one if there is any, up to about the bounds given."""
    moves: list[Move] = []
    entries, size = 0, 0
    for range_id in list(segment.last_index):
        log = state.groups.get(range_id)
        for index in log.live_in(segment) if log is not None else ():
            assert log is not None, f"range {range_id} is gone"
            if entries >= entries_max or (entries and size >= bytes_max):
                return moves
            entries += 1
            size += log.entry_bytes(index)
            if moves and moves[-1].log is log and moves[-1].last == index - 1:
                moves[-1] = Move(log, moves[-1].first, index)
            else:
                moves.append(Move(log, index, index))
    return moves


def live_bytes(state: LogState, segment: Segment, enough: int) -> int:
    """How much of ``segment`` is live; stops counting at ``enough``."""
    size = 0
    for range_id in segment.last_index:
        log = state.groups.get(range_id)
        if log is not None:
            size += sum(log.entry_bytes(index) for index in log.live_in(segment))
            if size >= enough:
                break
    return size
