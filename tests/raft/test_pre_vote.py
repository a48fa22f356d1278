"""Pre-vote and check-quorum: a leader with a quorum is not disturbed, one without ends (thesis 4.2.3, 6.2, 9.6)."""

import pytest

from shardkv.raft import Role
from shardkv.raft.election import CAMPAIGN_TRANSFER
from shardkv.raft.messages import Message
from tests.raft.cluster import Cluster, M, after_write, fresh


def test_a_pre_vote_changes_no_term_and_no_vote() -> None:
    """Thesis 9.6: a candidate increments its term only after a majority would vote for it."""
    node = fresh(pre_vote=True)
    node.campaign()
    assert (node.role, node.term, node.vote) == (Role.PRE_CANDIDATE, 0, 0)
    voter = fresh(2, pre_vote=True)
    voter.step(Message(M.PRE_VOTE, 2, 1, 1))
    assert (voter.term, voter.vote) == (0, 0)
    (answer,) = after_write(voter.ready())
    assert (answer.reject, answer.term) == (False, 1)
    for response in after_write(node.ready()):
        node.step(response)
    node.step(answer)
    assert (node.role, node.term, node.vote) == (Role.CANDIDATE, 1, 1)


def test_a_late_pre_vote_answer_is_no_vote() -> None:
    """Thesis 9.6: granting a pre-vote promises nothing, so it must not count in the election."""
    node = fresh(pre_vote=True, voters=5)
    node.campaign()
    for response in after_write(node.ready()):
        node.step(response)
    node.step(Message(M.PRE_VOTE_RESP, 1, 2, 1))
    node.step(Message(M.PRE_VOTE_RESP, 1, 3, 1))
    assert node.role is Role.CANDIDATE
    for late in (2, 3, 4, 5):
        node.step(Message(M.PRE_VOTE_RESP, 1, late, 1))
    assert node.role is Role.CANDIDATE


def test_one_with_the_longer_log_and_one_with_the_later_term_find_a_leader() -> None:
    """Thesis 9.6: else, each refused by the other, they would wait for ever."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"a")
    cluster.settle()
    cluster[3].step(Message(M.VOTE_RESP, 3, 2, 5, reject=True))
    cluster.settle()
    cluster.hosts[1].crash()
    cluster.heal()
    assert (cluster[2].term, cluster[3].term) == (1, 5)
    cluster.tick(count=100)
    assert cluster.leaders() == [2]
    assert cluster.hosts[3].applied == [b"a"]


def test_answers_to_an_earlier_pre_vote_do_not_count_in_the_next() -> None:
    """Thesis 9.6: who refused then, for it heard of a leader, may grant now, and the other way round."""
    node = fresh(voters=5, pre_vote=True)
    node.campaign()
    for voter in (2, 3):
        node.step(Message(M.PRE_VOTE_RESP, 1, voter, 0, reject=True))
    node.campaign()
    node.step(after_write(node.ready())[-1])
    for voter in (2, 3):
        assert node.role is Role.PRE_CANDIDATE
        node.step(Message(M.PRE_VOTE_RESP, 1, voter, 1))
    assert node.role is Role.CANDIDATE


def test_a_replica_that_was_cut_off_comes_back_without_disturbing_the_leader() -> None:
    """Thesis 9.6: with pre-vote its term did not grow while it was away."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(count=60)
    cluster.heal()
    cluster.tick(count=5)
    assert cluster.leaders() == [1]
    assert {cluster[id_].term for id_ in cluster.hosts} == {1}


def test_a_leader_without_a_quorum_steps_down() -> None:
    """Thesis 6.2: a leader steps down if an election timeout elapses without a round of heartbeats to a majority."""
    cluster = Cluster(check_quorum=True, pre_vote=True)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.tick(1, count=25)
    assert cluster[1].role is Role.PRE_CANDIDATE or cluster[1].role is Role.FOLLOWER


def test_a_vote_is_not_given_while_the_leader_is_heard_of() -> None:
    """Thesis 4.2.3: a removed server must not disrupt the group; its request does not even change the term."""
    cluster = Cluster(check_quorum=True)
    cluster.elect(1)
    cluster[2].step(Message(M.VOTE, 2, 3, 9, index=99, log_term=9))
    assert (cluster[2].term, cluster[2].leader) == (1, 1)
    assert not cluster[2].has_ready()
    cluster[2].step(Message(M.VOTE, 2, 3, 9, index=99, log_term=9, context=CAMPAIGN_TRANSFER))
    assert cluster[2].term == 9, "a transfer has the leader's word"


@pytest.mark.parametrize("kind", [M.APP, M.HEARTBEAT])
def test_a_leader_of_an_earlier_term_is_told_so_where_votes_may_be_ignored(kind: M) -> None:
    """etcd-io/raft #5451, #6277: else a replica that went ahead could neither win nor join again."""
    for changed in ({"pre_vote": True}, {"check_quorum": True}, {}):
        node = fresh(2, **changed)
        node.step(Message(M.APP, 2, 1, 5))
        node.ready()
        node.step(Message(kind, 2, 3, 4))
        told = [(answer.to, answer.term) for answer in after_write(node.ready())] if node.has_ready() else []
        assert told == ([(3, 5)] if changed else [])


def test_no_pre_vote_for_a_term_in_which_another_has_the_vote() -> None:
    """The vote itself would be refused: the campaign could only depose whoever is being elected."""
    node = fresh(pre_vote=True)
    node.step(Message(M.VOTE, 1, 2, 4))
    node.ready()
    node.step(Message(M.PRE_VOTE, 1, 3, 4))
    assert [message.reject for message in after_write(node.ready())] == [True]


def test_forgetting_the_leader_lets_others_be_elected() -> None:
    """etcd-io/raft, MsgForgetLeader: a follower that forgot its leader grants votes again, and does not campaign."""
    cluster = Cluster(check_quorum=True, pre_vote=True)
    cluster.elect(1)
    cluster.isolate(1)
    cluster[2].campaign()
    cluster.settle()
    assert cluster[2].role is not Role.LEADER
    cluster[3].forget_leader()
    cluster[2].campaign()
    cluster.settle()
    assert cluster[2].role is Role.LEADER
