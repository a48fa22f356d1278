"""Elections where disks are slow: what waits for them, and for how long."""

from typing import Any

import pytest

from shardkv.raft import RaftNode, Role
from shardkv.raft.election import PATIENCE
from shardkv.raft.messages import ConfState, Message, Snapshot, SnapshotMetadata
from tests.raft.cluster import M, after_write, fresh, sent


def patient(**changed: Any) -> RaftNode:
    return fresh(pre_vote=True, check_quorum=True, patient_elections=True, **changed)


def ticked(node: RaftNode, ticks: int) -> list[Message]:
    """What it has sent meanwhile without waiting for its disk."""
    messages = []
    for _ in range(ticks):
        node.tick()
        messages += node.ready().messages
    return messages


def test_a_pre_vote_waits_for_no_disk() -> None:
    """It promises nothing. Where syncs take long, answers that wait for them come to all who campaign at the same
    moment, and the votes are split."""
    node = patient()
    node.step(Message(M.PRE_VOTE, 1, 2, 1))
    ready = node.ready()
    assert [(answer.to, answer.reject) for answer in sent(ready, M.PRE_VOTE_RESP)] == [(2, False)]
    assert not after_write(ready)
    node.campaign()
    assert not after_write(node.ready()), "nor does its own"
    node.step(Message(M.PRE_VOTE_RESP, 1, 3, 1))
    ready = node.ready()
    assert (node.role, node.term) == (Role.CANDIDATE, 1)
    assert [each.type for each in after_write(ready)] == [M.VOTE, M.VOTE, M.VOTE_RESP], "but its vote does"
    alone = patient(voters=1)
    alone.campaign()
    assert alone.role is Role.CANDIDATE


@pytest.mark.parametrize("ticks", [5, 30, 300])
def test_a_candidate_whose_own_vote_takes_long_to_the_disk_waits_for_it_and_as_long_again(ticks: int) -> None:
    """The other votes may take as long; an election that is begun anew makes void those on their way."""
    node = patient()
    node.campaign()
    node.step(Message(M.PRE_VOTE_RESP, 1, 2, 1))
    *_, own = after_write(node.ready())
    assert not ticked(node, ticks)
    node.campaign()
    assert node.role is Role.CANDIDATE, "nor when its host asks for an election"
    node.step(own)
    waits = min(ticks, PATIENCE * 10) + node.raft.randomized_election_timeout
    assert not ticked(node, waits - 1)
    node.step(Message(M.VOTE_RESP, 1, 3, 1))
    assert (node.role, node.term) == (Role.LEADER, 1)


@pytest.mark.parametrize("ticks", [20, 300])
def test_a_candidate_asks_anew_when_the_others_have_had_their_time(ticks: int) -> None:
    node = patient()
    node.campaign()
    node.step(Message(M.PRE_VOTE_RESP, 1, 2, 1))
    *_, own = after_write(node.ready())
    ticked(node, ticks)
    node.step(own)
    waits = min(ticks, PATIENCE * 10) + node.raft.randomized_election_timeout
    assert {message.type for message in ticked(node, waits)} == {M.PRE_VOTE}
    assert (node.role, node.term) == (Role.PRE_CANDIDATE, 1)


def test_a_candidate_waits_twice_as_long_for_the_others_each_time() -> None:
    """Whoever needs longer for a vote than an election timeout would be too late in every term. A leader ends that."""
    node = patient()

    def stand() -> int:
        """Win the pre-vote, and count the ticks until the votes are given up."""
        node.step(Message(M.PRE_VOTE_RESP, 1, 2, node.term + 1))
        *_, own = after_write(node.ready())
        node.step(own)
        assert node.role is Role.CANDIDATE
        ticks, timeout = 0, node.raft.randomized_election_timeout
        while node.role is Role.CANDIDATE:
            ticked(node, 1)
            ticks += 1
        assert ticks % timeout == 0
        return ticks // timeout

    node.campaign()
    assert [stand() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 32, 32]
    node.step(Message(M.HEARTBEAT, 1, 3, node.term))
    ticked(node, 20)
    assert node.role is Role.PRE_CANDIDATE
    assert [stand(), stand()] == [1, 2]
    node.step(Message(M.PRE_VOTE_RESP, 1, 2, node.term + 1))
    node.step(after_write(node.ready())[-1])
    for voter in (2, 3):
        node.step(Message(M.VOTE_RESP, 1, voter, node.term, reject=True))
    assert node.role is Role.FOLLOWER, "it has lost, and waits for whoever has won"
    node.step(Message(M.HEARTBEAT, 1, 3, node.term))
    ticked(node, 20)
    assert stand() == 1


def test_who_has_given_its_vote_begins_no_election_before_that_is_on_disk() -> None:
    """It would depose whom it has just helped to be elected."""
    node = patient()
    node.step(Message(M.VOTE, 1, 2, 1))
    answers = after_write(node.ready())
    assert [answer.to for answer in answers] == [2, 1]
    node.step(Message(M.VOTE_RESP, 1, 3, 1))
    assert not ticked(node, 30), "a late answer of another says nothing of its own disk"
    node.step(answers[1])
    assert not ticked(node, 30 + node.raft.randomized_election_timeout - 1)
    assert {message.type for message in ticked(node, 1)} == {M.PRE_VOTE}


def test_who_has_given_its_vote_in_an_earlier_term_waits_for_that_no_more() -> None:
    """What says that it is on disk is of that term and is not looked at: this replica would never campaign again."""
    node = patient()
    node.step(Message(M.VOTE, 1, 2, 1))
    answers = after_write(node.ready())
    node.step(Message(M.HEARTBEAT, 1, 3, 2))
    node.step(answers[1])
    assert {message.type for message in ticked(node, node.raft.randomized_election_timeout)} >= {M.PRE_VOTE}


def test_a_pre_candidate_that_gives_its_vote_wants_to_lead_no_more() -> None:
    """It would go on over the head of whom it has just helped; and as it waits for its vote to get to the disk, nothing
    that it hears as a pre-candidate may keep it waiting for ever."""
    node = patient()
    node.step(Message(M.PRE_VOTE_RESP, 1, 3, 1, reject=True))
    node.campaign()
    assert (node.role, node.term) == (Role.PRE_CANDIDATE, 1)
    node.ready()
    node.step(Message(M.VOTE, 1, 2, 1))
    assert node.role is Role.FOLLOWER
    node.check()
    node.step(Message(M.PRE_VOTE_RESP, 1, 3, 2))
    assert node.term == 1, "a late answer begins no election"
    to_candidate, own = after_write(node.ready())
    assert (to_candidate.to, to_candidate.reject, own.to) == (2, False, 1)
    node.step(own)
    assert {message.type for message in ticked(node, 40)} == {M.PRE_VOTE}, "nobody came to lead, so it tries again"


def test_a_leader_may_hand_over_to_one_whose_vote_is_not_on_disk_yet() -> None:
    node = patient()
    node.step(Message(M.VOTE, 1, 2, 1))
    node.ready()
    node.step(Message(M.TIMEOUT_NOW, 1, 2, 1))
    assert (node.role, node.term) == (Role.CANDIDATE, 2)


def test_who_voted_before_it_was_a_member_campaigns_like_any_other_once_it_is() -> None:
    """Its own answer never came back to it, for it did not know itself."""
    node = patient(voters=0)
    node.step(Message(M.VOTE, 1, 2, 1))
    for answer in after_write(node.ready()):
        if answer.to == 1:
            node.step(answer)
    metadata = SnapshotMetadata(7, 1, ConfState((1, 2, 3)))
    node.step(Message(M.SNAP, 1, 2, 1, snapshot=Snapshot(metadata)))
    for response in after_write(node.ready()):
        if response.to == 1:
            node.step(response)
    assert M.PRE_VOTE in {message.type for message in ticked(node, 20)}
