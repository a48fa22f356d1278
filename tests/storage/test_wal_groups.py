"""What the shared log keeps of each group: votes, entries, snapshots, ends (DESIGN 4.3; traps 2, 3, 10, 11, 20)."""

import pytest

from shardkv.raft.errors import SnapshotTemporarilyUnavailable
from shardkv.raft.messages import ConfState, HardState, Snapshot, SnapshotMetadata
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate, ResetLog, Tombstone
from shardkv.types import ReplicaId

from .support import MemoryDisk
from .updates import NODES, R1, R2, create, entry, opened


def test_the_owner_answers_for_snapshots_and_the_applied_configuration() -> None:
    wal = opened()
    wal.append([create(R1)])()
    log = wal.groups[R1]
    with pytest.raises(SnapshotTemporarilyUnavailable):
        log.snapshot()
    made = Snapshot(SnapshotMetadata(3, 1, NODES), b"state")
    log.snapshot_source = lambda: made
    assert log.snapshot() is made
    assert log.initial_state() == (HardState(0, 0, 0), NODES)
    log.applied_conf_state = ConfState((1, 2))
    assert log.initial_state() == (HardState(0, 0, 0), ConfState((1, 2)))


def test_trap_10_term_and_vote_never_move_back() -> None:
    """TRAPS 10: a vote given twice in a term elects two leaders."""
    for second in (HardState(4, 2, 1), HardState(5, 3, 1), HardState(5, 0, 1), HardState(6, 0, 0)):
        wal = opened()
        wal.append([create(R1)])()
        wal.append([LogUpdate(R1, HardState(5, 2, 1), (entry(1),))])()
        with pytest.raises(AssertionError, match=r"moves back|vote changes"):
            wal.append([LogUpdate(R1, second)])
    wal = opened()
    wal.append([create(R1)])()
    for allowed in (HardState(5, 0, 0), HardState(5, 2, 0), HardState(5, 2, 0), HardState(6, 0, 0)):
        wal.append([LogUpdate(R1, allowed)])()
    assert wal.groups[R1].hard_state == HardState(6, 0, 0)


def test_trap_10_a_committed_entry_is_never_overwritten() -> None:
    for update in (LogUpdate(R1, entries=(entry(2, term=3),)), LogUpdate(R1, reset=ResetLog(1, 3, NODES))):
        wal = opened()
        wal.append([create(R1)])()
        wal.append([LogUpdate(R1, HardState(1, 0, 2), (entry(1), entry(2), entry(3)))])()
        with pytest.raises(AssertionError, match="commit"):
            wal.append([update])


def test_trap_10_an_overwritten_tail_does_not_come_back() -> None:
    """TRAPS 10, ABA: entries of an old term that a new leader replaced are gone, whatever is still in the segments."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 1), tuple(entry(index, b"old") for index in range(1, 6)))])()
    wal.append([LogUpdate(R1, HardState(2, 0, 1), (entry(2, b"new", term=2),))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.last_index() == 2
        assert [(found.term, found.data) for found in log.entries(1, 3, 1 << 30)] == [(1, b"old"), (2, b"new")]


def test_trap_11_compaction_keeps_every_entry_after_its_index() -> None:
    """TRAPS 11: a follower one entry behind must not need a snapshot; the term before the first entry stays known."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    entries = tuple(entry(index, b"%d" % index) for index in range(1, 11))
    wal.append([LogUpdate(R1, HardState(1, 0, 10), entries)])()
    wal.append([LogUpdate(R1, compact=CompactLog(9, 1))])()
    wal.append([LogUpdate(R1, compact=CompactLog(4, 1))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert (log.first_index(), log.last_index(), log.term(9)) == (10, 10, 1)
        assert log.entries(10, 11, 0)[0].data == b"10"


def test_trap_11_only_committed_entries_are_compacted() -> None:
    wal = opened()
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 1), (entry(1), entry(2)))])()
    with pytest.raises(AssertionError, match="committed 1"):
        wal.append([LogUpdate(R1, compact=CompactLog(2, 1))])


def test_trap_20_creation_tombstone_and_hard_state_survive_without_the_engine() -> None:
    """TRAPS 20: the engine may have lost the split's or the removal's batch; the log has the truth and says so."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1, 11), create(R2, 22, index=5, term=4)])()
    wal.append([LogUpdate(R2, HardState(9, 22, 5)), LogUpdate(R1, tombstone=Tombstone(ReplicaId(11), b"merged"))])()
    again = opened(disk.lost())
    child = again.groups[R2]
    assert (child.replica_id, child.payload, child.hard_state) == (22, b"payload", HardState(9, 22, 5))
    assert (child.first_index(), child.last_index(), child.term(5)) == (6, 5, 4)
    assert again.groups[R1].tombstone == Tombstone(ReplicaId(11), b"merged")
    assert again.tombstones == {R1: 11}


def test_trap_20_an_ended_groups_log_stays_until_it_is_released() -> None:
    """TRAPS 20: freed before the engine was flushed past the batch that ended the group, its log could not be
    replayed."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1, 11)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 2), (entry(1), entry(2)))])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11), b"why"))])()
    ended = opened(disk.lost()).groups[R1]
    assert ended.ended
    assert [found.index for found in ended.entries(1, 3, 1 << 30)] == [1, 2]
    with pytest.raises(AssertionError, match="has ended"):
        opened(disk.copy()).append([LogUpdate(R1, entries=(entry(3),))])
    with pytest.raises(AssertionError, match="has ended"):
        opened(disk.copy()).append([LogUpdate(R1, HardState(2, 0, 2))])
    with pytest.raises(AssertionError, match="is not released"):
        opened(disk.copy()).append([create(R1, 12)])
    wal.append([LogUpdate(R1, release=True)])()
    assert (dict(wal.groups), wal.tombstones) == ({}, {R1: 11})
    wal.append([create(R1, 12)])()
    assert opened(disk.lost()).groups[R1].replica_id == 12


def test_trap_20_only_an_ended_group_is_released() -> None:
    wal = opened()
    wal.append([create(R1, 11)])()
    with pytest.raises(AssertionError, match="has not ended"):
        wal.append([LogUpdate(R1, release=True)])


@pytest.mark.parametrize("known", [True, False])
def test_trap_03_an_ended_replica_is_not_created_again(known: bool) -> None:
    """TRAPS 3: replica ids are never reused; the tombstone counts for replicas that were never here, too."""
    disk = MemoryDisk()
    wal = opened(disk)
    if known:
        wal.append([create(R1, 11)])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11)))])()
    if known:
        wal.append([LogUpdate(R1, release=True)])()
    for range_id in (10, 11):
        with pytest.raises(AssertionError, match="11 has ended"):
            opened(disk.lost()).append([create(R1, range_id)])
    opened(disk.lost()).append([create(R1, 12)])()


def test_trap_03_a_late_tombstone_of_an_older_replica_does_not_end_the_newer_one() -> None:
    wal = opened()
    wal.append([create(R1, 12)])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11)))])()
    assert not wal.groups[R1].ended
    assert wal.tombstones == {R1: 11}
    wal.check()


def test_trap_02_an_adopted_child_keeps_the_vote_it_gave_before_the_split() -> None:
    """TRAPS 2 and DESIGN 4.3: a split resets the log of a replica that a message had created, never its hard state."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([LogUpdate(R2, create=CreateGroup(ReplicaId(22), 0, 0, ConfState()))])()
    wal.append([LogUpdate(R2, HardState(7, 3, 0))])()
    wal.append([LogUpdate(R2, reset=ResetLog(5, 5, NODES))])()
    for log in (wal.groups[R2], opened(disk.lost()).groups[R2]):
        assert log.initial_state() == (HardState(7, 3, 5), NODES)
        assert (log.first_index(), log.term(5)) == (6, 5)


def test_an_installed_snapshot_replaces_the_log() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 2, 1), (entry(1), entry(2), entry(3)))])()
    wal.append([LogUpdate(R1, HardState(4, 0, 20), reset=ResetLog(20, 3, ConfState((4, 5, 6))))])()
    wal.append([LogUpdate(R1, HardState(4, 0, 20), (entry(21, term=4),))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state() == (HardState(4, 0, 20), ConfState((4, 5, 6)))
        assert (log.first_index(), log.last_index(), log.term(20), log.term(21)) == (21, 21, 3, 4)


@pytest.mark.parametrize(
    "term, expected", [(2, HardState(3, 10, 5)), (3, HardState(3, 10, 5)), (4, HardState(4, 0, 5))]
)
def test_a_reset_forgets_a_vote_only_where_its_snapshot_is_of_a_later_term(term: int, expected: HardState) -> None:
    """Raft paper, figure 2: one vote a term. A snapshot may come in the very term in which this node has voted."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(3, 10, 0))])()
    wal.append([LogUpdate(R1, reset=ResetLog(5, term, NODES))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state()[0] == expected


def test_a_checkpoint_says_the_configuration_of_the_last_reset() -> None:
    """Groups keep what seldom changes packed."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1), create(R2)])()
    after = ConfState((7, 8), (9,))
    for index in (1, 2):
        large = LogUpdate(R2, HardState(1, 0, index), (entry(index, bytes(1990)),), compact=CompactLog(index, 1))
        wal.append([large])()
        if index == 1:
            wal.append([LogUpdate(R1, reset=ResetLog(5, 3, after))])()
    drop = wal.collect()
    assert drop is not None
    drop()
    assert wal.statistics().segments == 1, "what was said before its checkpoint is gone"
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state()[1] == after


def test_trap_03_a_tombstone_of_an_earlier_replica_lets_no_later_one_come_again() -> None:
    """TRAPS 3: news of an earlier life may come after that of a later one."""
    disk = MemoryDisk()
    wal = opened(disk)
    for replica_id in (5, 3):
        wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(replica_id)))])()
    for each in (wal, opened(disk.lost())):
        assert each.tombstones == {R1: 5}
        with pytest.raises(AssertionError, match="5 has ended"):
            each.append([create(R1, 4)])
