"""Who may lead: terms, votes, and what has to be on disk before they count (paper 5.2 and 5.4.1; thesis 3.8)."""

import random

import pytest

from shardkv.raft import ProgressState, Role, encode_conf_change
from shardkv.raft.core import TERM_JUMP_MAX
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState, Message, Snapshot, SnapshotMetadata
from tests.raft.cluster import Cluster, M, after_write, change, fresh, sent


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


def test_who_follows_the_leader_of_a_term_votes_for_nobody_else_in_it() -> None:
    """It may not have voted for that leader; yet there is one."""
    node = fresh(2)
    node.step(Message(M.HEARTBEAT, 2, 1, 1))
    node.step(Message(M.VOTE, 2, 3, 1))
    assert [answer.reject for answer in after_write(node.ready())] == [True]


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
