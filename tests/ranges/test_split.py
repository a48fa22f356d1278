"""Planning splits, and what becomes of the right half on a node."""

import pytest

from shardkv import errors
from shardkv.machine.split import divide, problem, raised
from shardkv.ranges.split import RightHalf, adopt, plan_split
from shardkv.types import (
    EVERY_KEY,
    KEY_BYTES_MAX,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
)

DESCRIPTOR = RangeDescriptor(
    RangeId(1),
    EVERY_KEY,
    Epoch(3, 8),
    tuple(Member(NodeId(node), ReplicaId(10 + node)) for node in (1, 2, 3)),
)
IDS = {NodeId(node): ReplicaId(20 + node) for node in (3, 2, 1)}


def test_a_planned_split_divides_the_range_it_was_planned_for() -> None:
    command = plan_split(DESCRIPTOR, b"m", RangeId(2), IDS)
    left, right = divide(DESCRIPTOR, command)
    assert (left.span, right.span) == (KeyRange(b"", b"m"), KeyRange(b"m", None))
    assert left.epoch == right.epoch == Epoch(4, 9)
    assert [tuple(replica) for replica in right.replicas] == [(1, 21, 0), (2, 22, 0), (3, 23, 0)]
    assert left.newer_than(DESCRIPTOR)
    assert right.newer_than(DESCRIPTOR)


def test_epochs_are_raised_above_all_sides_in_both_generations() -> None:
    """DESIGN §4.9: so that nothing decided at any earlier epoch of any side fits again."""
    assert raised(Epoch(3, 8)) == Epoch(4, 9)
    assert raised(Epoch(3, 8), Epoch(7, 2)) == Epoch(8, 9)


def test_a_plan_for_what_cannot_be_split_is_refused_to_the_user() -> None:
    with pytest.raises(errors.InvalidRange):
        plan_split(DESCRIPTOR, b"", RangeId(2), IDS)
    with pytest.raises(errors.InvalidRange):
        plan_split(DESCRIPTOR, b"m", RangeId(2), {NodeId(1): ReplicaId(21)})
    with pytest.raises(errors.KeyTooLarge):
        plan_split(DESCRIPTOR, b"m" * (KEY_BYTES_MAX + 1), RangeId(2), IDS)
    with pytest.raises(errors.Unavailable):
        plan_split(DESCRIPTOR, b"m", RangeId(2), IDS, joint=True)


def test_trap_04_a_plan_does_not_fit_the_range_after_it_was_split_and_merged_back() -> None:
    """TRAPS 4: the span looks the same again, and the epoch tells them apart."""
    command = plan_split(DESCRIPTOR, b"m", RangeId(2), IDS)
    left, right = divide(DESCRIPTOR, command)
    merged = left.with_span(EVERY_KEY, raised(left.epoch, right.epoch))
    assert merged.span == DESCRIPTOR.span
    assert isinstance(problem(merged, command, joint=False), errors.EpochMismatch)


def decide(local: int | None, tombstone: int | None = None, *, initialised: bool = False) -> RightHalf:
    return adopt(
        ReplicaId(21),
        local=None if local is None else ReplicaId(local),
        initialised=initialised,
        tombstone=None if tombstone is None else ReplicaId(tombstone),
    )


def test_a_right_half_that_is_not_here_is_made() -> None:
    assert decide(None) is RightHalf.CREATE
    assert decide(None, 20) is RightHalf.CREATE


def test_trap_02_a_split_adopts_the_replica_that_a_message_made_before_it() -> None:
    """TRAPS 2: it may have voted; what it has promised stays."""
    assert decide(21) is RightHalf.ADOPT


def test_trap_20_a_replayed_split_never_overwrites_the_childs_state() -> None:
    """TRAPS 20: the parent applies its split again after a crash; the child has gone on since."""
    assert decide(21, initialised=True) is RightHalf.KEEP


def test_trap_03_a_split_does_not_bring_back_a_removed_replica() -> None:
    assert decide(None, 21) is RightHalf.DROP
    assert decide(None, 30) is RightHalf.DROP


@pytest.mark.parametrize("initialised", [False, True])
def test_a_newer_replica_of_the_right_half_is_left_alone(initialised: bool) -> None:
    assert decide(30, initialised=initialised) is RightHalf.DROP
    assert decide(30, 21, initialised=initialised) is RightHalf.DROP


def test_a_replica_older_than_its_range_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        decide(20)
