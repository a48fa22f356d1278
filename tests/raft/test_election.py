"""Who may lead, and when (paper 5.2 and 5.4.1; thesis 3.8, 4.2.3, 6.2 and 9.6)."""

import random
from typing import Any

import pytest

from shardkv.raft import ProgressState, RaftNode, Role, encode_conf_change
from shardkv.raft.core import TERM_JUMP_MAX
from shardkv.raft.election import CAMPAIGN_TRANSFER, PATIENCE, STAGGER_TICKS, stagger_ticks
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState, Message, Snapshot, SnapshotMetadata
from tests.raft.cluster import TICK_NS, Cluster, M, after_write, change, fresh, sent


def test_a_replica_starts_as_follower() -> None:
    """Paper 5.2: when servers start up, they begin as followers."""
    node = fresh()
    assert (node.role, node.leader, node.term) == (Role.FOLLOWER, 0, 0)


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_a_message_of_a_later_term_makes_any_role_a_follower_of_it(role: Role) -> None:
    """Paper 5.1: if one server's current term is smaller, it updates; candidates and leaders become followers."""
    node = fresh()
    if role is not Role.FOLLOWER:
        node.campaign()
        if role is Role.LEADER:
            node.step(Message(M.VOTE_RESP, 1, 2, 1))
            node.step(Message(M.VOTE_RESP, 1, 3, 1))
    assert node.role is role
    node.step(Message(M.APP, 1, 2, 5))
    assert (node.role, node.term, node.leader) == (Role.FOLLOWER, 5, 2)


@pytest.mark.parametrize("kind", [M.APP, M.HEARTBEAT, M.APP_RESP, M.VOTE, M.PRE_VOTE, M.VOTE_RESP, M.TIMEOUT_NOW])
def test_a_term_that_no_election_reaches_is_not_taken_for_one(kind: M) -> None:
    """Whoever followed would soon campaign in a term that no message carries, and the group would be lost for good."""
    node = fresh()
    node.step(Message(M.APP, 1, 2, 5))
    node.ready()
    node.step(Message(kind, 1, 3, 5 + TERM_JUMP_MAX + 1))
    assert (node.term, node.leader) == (5, 2)
    assert not node.has_ready()
    node.step(Message(M.APP, 1, 3, 5 + TERM_JUMP_MAX))
    assert node.term == 5 + TERM_JUMP_MAX


def test_a_message_of_an_earlier_term_changes_nothing() -> None:
    """Paper 5.1: a request with a stale term is rejected."""
    node = fresh()
    node.step(Message(M.APP, 1, 2, 3))
    node.ready()
    node.step(Message(M.VOTE, 1, 3, 2, index=9, log_term=2))
    node.step(Message(M.APP, 1, 3, 2, index=0))
    assert (node.term, node.leader) == (3, 2)
    assert not node.has_ready()


def test_a_follower_that_hears_nothing_campaigns_and_votes_for_itself() -> None:
    """Paper 5.2: it increments its term, votes for itself and asks all others in parallel."""
    node = fresh(voters=5)
    for _ in range(2 * 10):
        node.tick()
    assert (node.role, node.term, node.vote) == (Role.CANDIDATE, 1, 1)
    ready = node.ready()
    assert [message.to for message in after_write(ready)] == [2, 3, 4, 5, 1], "when its own vote is on disk"


def test_trap_10_a_candidate_that_forgets_its_term_in_a_crash_never_leads_it_twice() -> None:
    """Paper 5.2, at most one leader a term; trap 10. Two votes of others are enough to lead with: were they asked for
    before its own was on disk, it could lead, crash, and ask anew for the same term, to be given the same votes."""
    cluster = Cluster()
    candidate = cluster.hosts[1]
    candidate.hold_writes = True
    candidate.node.campaign()
    cluster.settle()
    if candidate.node.role is Role.LEADER:
        candidate.node.propose(b"of the first time")
        cluster.settle()
    candidate.crash()
    candidate.restart()
    candidate.hold_writes = False
    cluster.elect(1).propose(b"of the second time")
    cluster.settle()
    logs = [host.logged() for host in cluster.hosts.values()]
    assert logs == [[(1, b""), (1, b"of the second time")]] * 3


@pytest.mark.parametrize("transfer", [False, True])
def test_trap_10_votes_are_asked_for_when_term_vote_and_log_are_on_disk(transfer: bool) -> None:
    """DESIGN 4.2: what follows from an unsynced term, vote or entry waits. After a crash no vote may count that was
    given for entries which are gone."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 3, entries=(Entry(3, 1),)))
    node.ready()
    if transfer:
        node.step(Message(M.TIMEOUT_NOW, 2, 1, 3))
    else:
        node.campaign()
    assert (node.role, node.term) == (Role.CANDIDATE, 4)
    ready = node.ready()
    assert not sent(ready, M.VOTE)
    asked = [(each.to, each.index, each.log_term) for each in after_write(ready) if each.type is M.VOTE]
    assert asked == [(1, 1, 3), (3, 1, 3)]


def test_a_host_that_answers_for_it_may_have_votes_asked_for_at_once() -> None:
    """As etcd does, whose hosts sync a changed term before they send anything."""
    node = fresh(durable_candidacy=False)
    node.campaign()
    assert [message.to for message in sent(node.ready(), M.VOTE)] == [2, 3]


def test_election_timeouts_are_spread_over_one_to_two_timeouts() -> None:
    """Paper 5.2: timeouts are chosen randomly from a fixed interval, so that votes are rarely split."""
    waited = set()
    for seed in range(200):
        node = fresh(randrange=random.Random(seed).randrange)
        ticks = 0
        while node.role is Role.FOLLOWER:
            node.tick()
            ticks += 1
        waited.add(ticks)
    assert waited == set(range(10, 20))


def test_a_leader_that_is_heard_of_keeps_followers_from_campaigning() -> None:
    """Paper 5.2: a server remains follower as long as it receives valid RPCs from a leader."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.tick(count=60)
    assert cluster.leaders() == [1]
    assert cluster[1].term == 1


@pytest.mark.parametrize(
    "voters,granted,rejected,outcome",
    [
        (1, [], [], Role.LEADER),
        (3, [2], [], Role.LEADER),
        (3, [], [2], Role.CANDIDATE),
        (3, [], [2, 3], Role.FOLLOWER),
        (5, [2], [3], Role.CANDIDATE),
        (5, [2, 3], [4, 5], Role.LEADER),
        (5, [2], [3, 4, 5], Role.FOLLOWER),
    ],
)
def test_a_majority_decides_the_election(voters: int, granted: list[int], rejected: list[int], outcome: Role) -> None:
    """Paper 5.2: a candidate wins with votes from a majority of the servers for the same term."""
    node = fresh(voters=voters)
    node.campaign()
    for response in after_write(node.ready()):
        node.step(response)
    for voter in granted:
        node.step(Message(M.VOTE_RESP, 1, voter, 1))
    for voter in rejected:
        node.step(Message(M.VOTE_RESP, 1, voter, 1, reject=True))
    assert node.role is outcome


def test_a_voter_counts_once_however_often_it_answers() -> None:
    """Paper 5.2: each server votes for at most one candidate; a repeated answer is no second vote."""
    node = fresh(voters=5)
    node.campaign()
    for _ in range(3):
        node.step(Message(M.VOTE_RESP, 1, 2, 1))
    assert node.role is Role.CANDIDATE


def test_a_vote_is_given_once_in_a_term_and_only_after_it_is_on_disk() -> None:
    """Paper 5.2 and figure 2; thesis 3.8: term and vote are persisted before an RPC is answered. Trap 10."""
    node = fresh()
    node.step(Message(M.VOTE, 1, 2, 1))
    node.step(Message(M.VOTE, 1, 3, 1))
    node.step(Message(M.VOTE, 1, 2, 1))
    ready = node.ready()
    assert not sent(ready, M.VOTE_RESP), "an answer left before the vote was on disk"
    assert ready.hard_state is not None
    assert ready.hard_state.vote == 2
    assert ready.must_sync
    assert [(answer.to, answer.reject) for answer in after_write(ready)] == [(2, False), (3, True), (2, False)]


def test_trap_10_a_vote_of_a_term_that_is_on_disk_already_is_written_before_it_is_given() -> None:
    """Else a crash would let it be given twice in that term."""
    node = fresh(terms=[1])
    node.step(Message(M.VOTE, 1, 3, 2))
    ready = node.ready()
    assert ready.hard_state == HardState(2, 0, 0), "the log of 3 is too short"
    node.step(Message(M.VOTE, 1, 2, 2, index=1, log_term=1))
    ready = node.ready()
    assert ready.hard_state == HardState(2, 2, 0)
    assert ready.must_sync
    assert [(answer.to, answer.reject) for answer in after_write(ready)] == [(2, False)]


def test_trap_10_a_single_replica_leads_only_after_its_vote_is_on_disk() -> None:
    """Order of persistence, on a group of one too: no shortcut past the disk."""
    node = fresh(voters=1)
    node.campaign()
    assert node.role is Role.CANDIDATE
    ready = node.ready()
    assert ready.must_sync
    for response in after_write(ready):
        node.step(response)
    assert node.role is Role.LEADER
    ready = node.ready()
    assert node.committed == 0, "its first entry is not on disk yet"
    for response in after_write(ready):
        node.step(response)
    assert node.committed == 1


def test_trap_10_term_and_vote_survive_a_restart() -> None:
    """Trap 10: they never move back. A restarted voter does not vote again in the same term."""
    cluster = Cluster(pre_vote=False)
    cluster.elect(1)
    host = cluster.hosts[2]
    host.crash()
    host.restart()
    assert (host.node.term, host.node.vote) == (1, 1)
    host.node.step(Message(M.VOTE, 2, 3, 1, index=99, log_term=1))
    assert [answer.reject for answer in after_write(host.node.ready())] == [True]


@pytest.mark.parametrize(
    "last_index,last_term,granted",
    [(2, 2, True), (3, 2, True), (1, 3, True), (1, 2, False), (9, 1, False)],
)
def test_a_vote_goes_only_to_a_log_that_is_as_up_to_date(last_index: int, last_term: int, granted: bool) -> None:
    """Paper 5.4.1: the later last term wins; with the same term the longer log does."""
    node = fresh(terms=[1, 2])
    node.step(Message(M.VOTE, 1, 2, 3, index=last_index, log_term=last_term))
    (answer,) = after_write(node.ready())
    assert answer.reject is not granted


@pytest.mark.parametrize("pre_vote", [True, False])
def test_a_candidate_takes_the_snapshot_of_a_leader_of_its_term(pre_vote: bool) -> None:
    """Paper 5.2 and 7: it may be the first that it hears of that leader."""
    node = fresh(2, pre_vote=pre_vote)
    node.campaign()
    snapshot = Snapshot(SnapshotMetadata(5, 1, ConfState((1, 2, 3))), b"state")
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot))
    assert (node.role, node.leader, node.term) == (Role.FOLLOWER, 1, 1)
    assert node.ready().snapshot is snapshot


def test_a_candidate_yields_to_a_leader_of_its_term() -> None:
    """Paper 5.2: if the leader's term is at least as large, the candidate recognises it and returns to follower."""
    node = fresh()
    node.campaign()
    node.step(Message(M.APP, 1, 2, 1))
    assert (node.role, node.leader) == (Role.FOLLOWER, 2)


def test_a_new_leader_has_every_committed_entry() -> None:
    """Paper 5.4: leader completeness. A replica that missed a committed entry is not elected."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"committed")
    cluster.settle()
    assert cluster[1].committed == 2
    cluster.heal()
    cluster.isolate(1)
    cluster[3].campaign()
    cluster.settle()
    assert cluster.leaders() == [1], "only the old leader, on its own side, still thinks that it leads"
    cluster.elect(2)
    assert cluster.hosts[2].applied == [b"committed"]
    assert cluster.hosts[3].applied == [b"committed"]


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


def test_who_follows_the_leader_of_a_term_votes_for_nobody_else_in_it() -> None:
    """It may not have voted for that leader; yet there is one."""
    node = fresh(2)
    node.step(Message(M.HEARTBEAT, 2, 1, 1))
    node.step(Message(M.VOTE, 2, 3, 1))
    assert [answer.reject for answer in after_write(node.ready())] == [True]


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


def test_a_leader_that_is_elected_again_begins_with_each_peer_anew() -> None:
    """Paper figure 2, volatile state of leaders. One that was being sent a snapshot would else be sent nothing."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"a")
    cluster.settle()
    cluster.hosts[1].compact()
    cluster[1].report_unreachable(3)
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 3, 1))
    assert cluster[1].status().progress[3].state is ProgressState.SNAPSHOT
    cluster[1].propose(b"b")
    cluster[1].step(Message(M.VOTE, 1, 2, 2))
    cluster.elect(1)
    progress = cluster[1].status().progress
    assert (progress[3].match, progress[3].next, progress[3].state) == (0, 4, ProgressState.PROBE)
    assert (progress[3].pending_snapshot, progress[3].inflight_messages, progress[3].recent_active) == (0, 0, False)


def test_a_vote_is_not_given_while_the_leader_is_heard_of() -> None:
    """Thesis 4.2.3: a removed server must not disrupt the group; its request does not even change the term."""
    cluster = Cluster(check_quorum=True)
    cluster.elect(1)
    cluster[2].step(Message(M.VOTE, 2, 3, 9, index=99, log_term=9))
    assert (cluster[2].term, cluster[2].leader) == (1, 1)
    assert not cluster[2].has_ready()
    cluster[2].step(Message(M.VOTE, 2, 3, 9, index=99, log_term=9, context=CAMPAIGN_TRANSFER))
    assert cluster[2].term == 9, "a transfer has the leader's word"


def test_trap_09_a_learner_never_campaigns_but_votes_when_it_is_asked() -> None:
    """Trap 9: it may have been made a voter and not have heard of it (etcd #7625)."""
    cluster = Cluster(voters=2, learners=1)
    learner = cluster[3]
    learner.campaign()
    for _ in range(50):
        learner.tick()
    assert learner.role is Role.FOLLOWER
    learner.step(Message(M.VOTE, 3, 2, 1))
    (answer,) = after_write(learner.ready())
    assert not answer.reject


def test_trap_02_a_replica_without_a_configuration_never_campaigns() -> None:
    """The uninitialised replica: a message created it, nobody told it who belongs to the group."""
    cluster = Cluster()
    node = cluster.add(4, ConfState()).node
    node.campaign()
    for _ in range(50):
        node.tick()
    assert (node.role, node.term) == (Role.FOLLOWER, 0)


def test_trap_09_no_campaign_with_a_change_committed_but_not_applied() -> None:
    """Whoever does not know the configuration in force cannot tell a majority of it (etcd-io/raft, hup)."""
    node = fresh(2)
    entry = Entry(1, 1, EntryType.CONF_CHANGE_V2, encode_conf_change(change("v4")))
    node.step(Message(M.APP, 2, 1, 1, entries=(entry,), commit=1))
    for response in after_write(node.ready()):
        if response.to == 2:
            node.step(response)
    assert (node.committed, node.applied) == (1, 0)
    node.campaign()
    assert node.role is Role.FOLLOWER
    (apply,) = sent(node.ready(), M.STORAGE_APPLY)
    node.campaign()
    assert node.role is Role.FOLLOWER, "handed out to be applied is not applied yet"
    node.apply_conf_change(change("v4"))
    node.step(apply.responses[0])
    node.campaign()
    assert node.role is Role.CANDIDATE


def test_leadership_is_handed_over_without_waiting_for_a_timeout() -> None:
    """Thesis 3.10: the target is brought up to date and told to campaign at once; proposals wait."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster.leaders() == [3]
    assert {cluster[id_].leader for id_ in cluster.hosts} == {3}


def test_leadership_is_not_handed_to_a_learner_nor_to_a_stranger() -> None:
    """Thesis 3.10: the target must be able to win; else proposals would wait for nothing."""
    cluster = Cluster(voters=2, learners=1)
    cluster.elect(1)
    for target in (3, 9, 1):
        cluster[1].transfer_leader(target)
        assert cluster[1].transferee == 0
    assert cluster[1].propose(b"x") == (1, 2)


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


def test_a_transfer_waits_for_the_target_to_catch_up() -> None:
    """Thesis 3.10: the target must have all entries before it is told to campaign."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.heal()
    cluster[1].transfer_leader(3)
    ready = cluster[1].ready()
    assert not sent(ready, M.TIMEOUT_NOW)
    assert [message.to for message in sent(ready, M.APP)] == [3], "it is asked at once where its log ends"
    cluster.tick(1, count=2)
    assert cluster.leaders() == [3]
    assert cluster.hosts[3].applied == [b"x"]


def test_a_transfer_that_does_not_succeed_is_given_up_after_an_election_timeout() -> None:
    """Thesis 3.10: the prior leader resumes after about an election timeout."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster[1].transfer_leader(3)
    assert cluster[1].transferee == 3
    cluster.tick(1, count=10)
    assert (cluster[1].transferee, cluster[1].role) == (0, Role.LEADER)


def test_a_transfer_that_is_asked_for_again_and_again_takes_no_longer() -> None:
    """etcd-io/raft: the one under way goes on. Proposals wait for it, so whoever is impatient must not prolong that."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    for _ in range(10):
        cluster[1].transfer_leader(3)
        assert cluster[1].transferee == 3
        cluster.tick(1)
    assert (cluster[1].transferee, cluster[1].role) == (0, Role.LEADER)


def test_who_has_given_its_vote_waits_a_whole_timeout_for_what_comes_of_it() -> None:
    """Paper 5.2: granting a vote restarts the timeout; the candidate needs time to be elected and say so."""
    node = fresh(terms=[1])
    while node.raft.election_elapsed < node.raft.randomized_election_timeout - 1:
        node.tick()
    assert node.role is Role.FOLLOWER
    node.step(Message(M.VOTE, 1, 2, 1, index=1, log_term=1))
    assert node.vote == 2
    node.tick()
    assert (node.role, node.term) == (Role.FOLLOWER, 1)


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


# Doubt: the connection to the leader's node broke (DESIGN 4.11).


def test_followers_that_doubt_elect_a_leader_long_before_the_timeout() -> None:
    """A process that dies closes its connections; its peers campaign at once, one after the other."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.hosts[1].crash()
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.settle()
    assert cluster.leaders() == [3], "whose turn is first need not wait, and the other helps it at once"
    assert cluster[3].term == 2


def test_a_doubting_follower_whose_log_is_too_short_leaves_the_next_one_its_turn() -> None:
    """The first in turn may not be able to win; the group must not wait for a timeout because of it."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.cut = {(1, 3), (3, 1)}
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.hosts[1].crash()
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.tick(count=STAGGER_TICKS + 1)
    assert cluster.leaders() == [2]


def test_doubting_followers_take_turns_and_the_order_changes_with_the_term() -> None:
    """Two that begin at once split the vote; with the same order in every group one node would lead them all."""
    first = []
    for term in range(1, 5):
        cluster = Cluster(voters=5, pre_vote=True)
        for id_ in (2, 3, 4, 5):
            cluster[id_].step(Message(M.HEARTBEAT, id_, 1, term))
        waits = {}
        for id_ in (2, 3, 4, 5):
            node = cluster[id_]
            node.doubt(cluster.now)
            ticks = 0
            while node.role is Role.FOLLOWER:
                node.tick()
                ticks += 1
            waits[id_] = ticks
        assert len(set(waits.values())) == 4
        first.append(min(waits, key=waits.__getitem__))
    assert len(set(first)) == 4


def test_doubt_ends_when_the_leader_is_heard_of_again() -> None:
    """A connection breaks for many reasons; most of them leave the leader alive."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    slow = next(id_ for id_ in (2, 3) if (cluster[id_].doubt(cluster.now), cluster[id_].role)[1] is Role.FOLLOWER)
    cluster.tick(1)
    assert not cluster[slow].raft.doubted
    cluster.tick(count=30)
    assert cluster.leaders() == [1]


def test_without_a_leader_there_is_nothing_to_doubt() -> None:
    """An election that is due comes at its time; haste would only make it collide with another's."""
    node = fresh(pre_vote=True)
    for _ in range(STAGGER_TICKS * 3):
        node.doubt(0)
        node.tick()
    assert (node.role, node.raft.doubted) == (Role.FOLLOWER, False)


def test_one_follower_that_doubts_alone_does_not_depose_the_leader() -> None:
    """Check-quorum still protects a leader that the others hear (thesis 4.2.3)."""
    cluster = Cluster(pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.cut = {(1, 3), (3, 1)}
    cluster[3].doubt(cluster.now)
    cluster.tick(count=30)
    assert cluster.leaders() == [1]
    assert cluster[1].term == 1


def test_a_doubting_follower_waits_for_its_promise_to_run_out() -> None:
    """DESIGN 4.11: campaign as soon as the leader's promise has run out, not before."""
    node = fresh(2, voters=3, pre_vote=True)
    start = 100 * TICK_NS
    node.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=5 * TICK_NS), start)
    node.doubt(start)
    for elapsed in range(1, 5):
        node.tick(start + elapsed * TICK_NS)
        assert node.role is Role.FOLLOWER, f"campaigned {elapsed} ticks into a promise of 5"
    for elapsed in range(5, 5 + 3 * STAGGER_TICKS):
        node.tick(start + elapsed * TICK_NS)
    assert node.role is Role.PRE_CANDIDATE


# Elections where disks are slow.


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


# Trap 14: a replica whose host is in no state to lead.


def reluctant(*ids: int, voters: int = 3, **changed: Any) -> Cluster:
    """A group in which these replicas leave leading to others."""
    own = {id_: {"reluctant": lambda: True} for id_ in ids}
    return Cluster(voters, own_settings=own, pre_vote=True, check_quorum=True, **changed)


def test_trap_14_a_reluctant_replica_declines_a_transfer_at_once() -> None:
    """The leader leads on without waiting for an election timeout; its lease stays away, for it sent a TimeoutNow."""
    cluster = reluctant(2)
    cluster.elect(1)
    term = cluster[1].term
    cluster[1].transfer_leader(2)
    cluster.settle()
    assert (cluster.leaders(), cluster[1].term, cluster[1].transferee) == ([1], term, 0)
    assert cluster[1].raft.lease_suspended
    cluster[1].propose(b"goes on")
    cluster.settle()
    assert cluster.hosts[3].applied == [b"goes on"]
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster.leaders() == [3]


def test_a_refusal_that_comes_late_ends_no_other_transfer_and_is_passed_on_to_nobody() -> None:
    cluster = reluctant(2)
    cluster.elect(1)
    refusal = Message(M.TRANSFER_LEADER, 1, 2, cluster[1].term, reject=True)
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster[1].transfer_leader(3)
    cluster[1].step(refusal)
    assert cluster[1].transferee == 3
    cluster[3].step(Message(M.TRANSFER_LEADER, 3, 2, cluster[3].term, reject=True))
    assert not cluster[3].has_ready(), "a follower passed a refusal on, as a wish"


def test_trap_14_a_reluctant_replica_leaves_elections_to_the_others() -> None:
    """It waits four times as long, so that anybody else is elected before it."""
    cluster = reluctant(2, 3, voters=5)
    cluster.elect(1)
    cluster.hosts[1].crash()
    cluster.tick(2, 3, 4, 5, count=10)
    assert cluster.leaders() == [], "nobody has noticed yet"
    for id_ in (2, 3):
        cluster[id_].campaign(cluster.now)
        cluster.settle()
        assert cluster[id_].role is Role.FOLLOWER, "not on its host's word either"
    cluster.tick(2, 3, 4, 5, count=50)
    assert cluster.leaders() in ([4], [5])


def test_trap_14_where_all_are_reluctant_one_of_them_leads_all_the_same() -> None:
    """Nobody's range goes without a leader for it; and one that is alone has nobody to leave leading to."""
    cluster = reluctant(1, 2, 3)
    cluster.tick(count=20)
    assert cluster.leaders() == [], "not at once"
    cluster.tick(count=100)
    assert len(cluster.leaders()) == 1
    alone = reluctant(1, voters=1)
    alone.tick(count=25)
    assert alone.leaders() == [1]


def test_trap_14_doubt_does_not_make_a_reluctant_replica_hurry() -> None:
    """Not even the one whose turn it is to begin."""
    cluster = reluctant(3)
    cluster.elect(1)
    cluster.tick(count=2)
    cluster.isolate(1)
    assert stagger_ticks(cluster[3].raft) == 0 < stagger_ticks(cluster[2].raft)
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.settle()
    assert cluster[3].role is Role.FOLLOWER
    cluster.tick(2, 3, count=8)
    assert 2 in cluster.leaders()
    assert 3 not in cluster.leaders()


def test_nobody_campaigns_while_its_log_is_being_replaced() -> None:
    """What it would stand for is not on its disk, and its state machine has nothing of it yet."""
    cluster = Cluster()
    leader = cluster.elect(1)
    cluster.isolate(3)
    leader.propose(b"x")
    cluster.settle()
    cluster.hosts[1].compact()
    leader.report_unreachable(3)
    cluster.heal()
    host = cluster.hosts[3]
    host.hold_writes = True
    cluster.tick(1, count=3)
    assert host.node.raft.log.snapshot is not None
    host.step(Message(M.TIMEOUT_NOW, 3, 1, leader.term))
    assert host.node.role is Role.FOLLOWER
    # Whoever asks for its vote meanwhile begins a term, and what is written then is of an earlier one.
    host.step(Message(M.VOTE, 3, 2, leader.term + 1))
    host.hold_writes = False
    host.write()
    assert host.node.raft.log.snapshot is None
    cluster.settle()
    cluster.elect(3)
