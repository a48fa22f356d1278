"""Messages for replicas that are here, were here, or never were."""

import pytest

from shardkv.raft.messages import MessageType
from shardkv.ranges.admission import Admission, admit_message
from shardkv.types import ReplicaId

FROM_LEADER = (MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP)
VOTES = (MessageType.PRE_VOTE, MessageType.VOTE)
ANSWERS = tuple(message for message in MessageType if message not in FROM_LEADER + VOTES)


def admit(
    message: MessageType, to: int, local: int | None = None, tombstone: int | None = None, *, initialised: bool = True
) -> Admission:
    return admit_message(
        message,
        to=ReplicaId(to),
        local=None if local is None else ReplicaId(local),
        tombstone=None if tombstone is None else ReplicaId(tombstone),
        initialised=initialised,
    )


@pytest.mark.parametrize("message", list(MessageType))
def test_a_message_for_the_replica_that_is_here_is_delivered(message: MessageType) -> None:
    assert admit(message, 5, 5) is Admission.DELIVER
    assert admit(message, 5, 5, 4) is Admission.DELIVER


@pytest.mark.parametrize("message", FROM_LEADER)
def test_a_leaders_message_makes_a_replica(message: MessageType) -> None:
    assert admit(message, 5) is Admission.CREATE
    assert admit(message, 5, tombstone=4) is Admission.CREATE


@pytest.mark.parametrize("message", ANSWERS)
def test_trap_03_answers_never_make_a_replica(message: MessageType) -> None:
    """TRAPS 3: what answers a replica that is not here answers one that is gone."""
    assert admit(message, 5) is Admission.IGNORE
    assert admit(message, 5, tombstone=4) is Admission.IGNORE
    assert admit(message, 5, 3) is Admission.IGNORE


@pytest.mark.parametrize("message", VOTES)
def test_a_vote_makes_a_replica_where_none_ever_was(message: MessageType) -> None:
    """The voter got the left half of a split by a snapshot, and the right half's leader died before its first word."""
    assert admit(message, 5) is Admission.CREATE
    assert admit(message, 5, tombstone=4) is Admission.CREATE


@pytest.mark.parametrize("message", VOTES)
def test_trap_03_a_vote_makes_no_replica_under_or_at_a_tombstone_or_in_place_of_another(message: MessageType) -> None:
    """TRAPS 3: a late vote must not bring a removed replica back, and is no proof that the one here was removed."""
    assert admit(message, 5, tombstone=5) is Admission.GONE
    assert admit(message, 4, tombstone=5) is Admission.GONE
    assert admit(message, 5, 3) is Admission.IGNORE
    assert admit(message, 5, 3, 2) is Admission.IGNORE
    assert admit(message, 3, 5) is Admission.GONE


@pytest.mark.parametrize("message", list(MessageType))
def test_trap_03_removed_replica_stays_removed(message: MessageType) -> None:
    """TRAPS 3: a message to a tombstone, or to a lower id, is answered by telling the sender."""
    assert admit(message, 5, tombstone=5) is Admission.GONE
    assert admit(message, 4, tombstone=5) is Admission.GONE
    assert admit(message, 4, 6, 5) is Admission.GONE
    assert admit(message, 5, 6) is Admission.GONE, "a newer replica is here, so the older one was removed"


@pytest.mark.parametrize("message", FROM_LEADER)
def test_a_leaders_message_for_a_higher_id_ends_the_replica_here(message: MessageType) -> None:
    assert admit(message, 6, 5) is Admission.SUPERSEDE
    assert admit(message, 6, 5, 4) is Admission.SUPERSEDE


def test_trap_02_an_uninitialised_replica_never_campaigns() -> None:
    """TRAPS 2: it was made by a message, knows no members, and may be about to be made by a split."""
    assert admit(MessageType.TIMEOUT_NOW, 5, 5, initialised=False) is Admission.IGNORE
    assert admit(MessageType.TIMEOUT_NOW, 5, 5) is Admission.DELIVER
    assert admit(MessageType.VOTE, 5, 5, initialised=False) is Admission.DELIVER


def test_a_replica_at_or_below_its_tombstone_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        admit(MessageType.APP, 5, 5, 5)
