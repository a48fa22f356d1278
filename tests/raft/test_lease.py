"""The lease by promise (DESIGN 4.5; traps 6, 7 and 8). Times are in ticks of the test's clock."""

from typing import Any

import pytest

from shardkv.raft import LeaseSettings, Role
from shardkv.raft.election import CAMPAIGN_TRANSFER
from shardkv.raft.messages import ConfChange, ConfChangeTransition, Message, MessageType
from tests.raft.cluster import TICK_NS, Cluster, M, after_write, change, fresh, sent

PROMISE = 5
DRIFT = 0.2
USABLE = 4
LEASE = LeaseSettings(promise_ns=PROMISE * TICK_NS, drift=DRIFT)


def led(voters: int = 3, **changed: Any) -> Cluster:
    """A group whose replica 1 leads and has a lease since now."""
    defaults: dict[str, Any] = {"lease": LEASE, "pre_vote": True, "check_quorum": True}
    cluster = Cluster(voters, **(defaults | changed))
    cluster.elect(1)
    cluster.tick(1)
    return cluster


def valid(cluster: Cluster, id_: int = 1, later: float = 0) -> bool:
    return cluster[id_].lease_valid(cluster.now + int(later * TICK_NS))


def test_a_leader_has_a_lease_from_the_stamp_that_a_quorum_echoed() -> None:
    """It ends a promise after the stamp was taken, shortened by the drift bound, to the nanosecond."""
    cluster = led()
    assert valid(cluster)
    start = cluster.now
    assert cluster[1].lease_valid(start + USABLE * TICK_NS - 1)
    assert not cluster[1].lease_valid(start + USABLE * TICK_NS)


def test_heartbeats_renew_the_lease_and_silence_ends_it() -> None:
    """A leader that is cut off loses its lease on its own."""
    cluster = led()
    cluster.tick(1, count=20)
    assert valid(cluster)
    cluster.isolate(1)
    cluster.tick(1, count=USABLE - 1)
    assert valid(cluster)
    cluster.tick(1)
    assert not valid(cluster)


def test_trap_07_what_was_promised_before_a_restart_is_not_shortened_by_a_later_promise() -> None:
    """The settings of before the start may have asked for more, and of a leader that still counts on it."""
    voter = fresh(2, terms=[1], lease=LEASE, vote_refusal_ns=3 * PROMISE * TICK_NS)
    refuses_until = voter.raft.refuse_until
    voter.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=PROMISE * TICK_NS), TICK_NS)
    assert voter.raft.refuse_until == refuses_until
    late = refuses_until - PROMISE * TICK_NS + 1
    voter.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=2, lease_promise=PROMISE * TICK_NS), late)
    assert voter.raft.refuse_until == refuses_until + 1


def test_without_settings_there_is_no_lease_and_nothing_on_the_wire() -> None:
    """etcd's behaviour exactly, for the transcripts."""
    cluster = led(lease=None)
    cluster[1].tick(cluster.now)
    assert [(beat.lease_stamp, beat.lease_promise) for beat in sent(cluster[1].ready(), M.HEARTBEAT)] == [(0, 0)] * 2
    assert not valid(cluster)


def test_only_leaders_have_a_lease() -> None:
    """And a leader that steps down has none, at once."""
    cluster = led()
    assert not valid(cluster, 2)
    cluster[1].step(Message(M.APP, 1, 2, 9), cluster.now)
    assert not valid(cluster)


@pytest.mark.parametrize("echoing,expected", [((), False), ((2,), False), ((2, 3), True), ((4, 5), True)])
def test_a_quorum_must_echo_and_the_leader_counts_as_one_of_it(echoing: tuple[int, ...], expected: bool) -> None:
    """The newest stamp that a quorum has echoed, the leader's own being now."""
    cluster = led(voters=5)
    cluster.tick(1, count=3)
    cluster.dropped = lambda message: message.type is M.HEARTBEAT_RESP and message.from_ not in echoing
    cluster.tick(1, count=USABLE)
    assert valid(cluster) is expected


def test_learners_never_count_for_the_lease() -> None:
    """They do not vote, so that their promise is worth nothing."""
    cluster = Cluster(3, learners=2, lease=LEASE)
    cluster.elect(1)
    cluster.tick(1)
    cluster.isolate(2, 3)
    cluster.tick(1, count=USABLE)
    assert not valid(cluster)


def test_both_halves_of_a_joint_configuration_must_echo() -> None:
    """A leader could be elected over the head of either half alone (thesis 4.3)."""
    cluster = led()
    for id_ in (4, 5):
        cluster.add(id_)
    cluster[1].propose_conf_change(change("v4 v5 r2 r3", ConfChangeTransition.JOINT_EXPLICIT))
    cluster.tick(1, count=4)
    assert valid(cluster)
    for away in ((2, 3), (4, 5)):
        cluster.isolate(*away)
        cluster.tick(1, count=USABLE)
        assert not valid(cluster), f"a lease without {away}"
        cluster.heal()
        cluster.tick(1)
        assert valid(cluster)


def test_a_new_voter_counts_as_soon_as_the_change_is_applied() -> None:
    """Who must have promised is who may vote: the lease is found anew with each configuration."""
    cluster = led(voters=1)
    assert valid(cluster, later=1000), "alone nobody else can be elected"
    cluster[1].propose_conf_change(change("v2"))
    cluster.settle()
    assert cluster[1].configuration.voters == (1, 2)
    assert not valid(cluster)
    cluster.add(2)
    cluster.tick(1)
    assert valid(cluster)
    cluster[1].propose_conf_change(change("r2"))
    cluster.settle()
    assert valid(cluster, later=1000)
    assert cluster[1].configuration.voters == (1,)


def test_a_leader_that_was_removed_does_not_count_itself() -> None:
    """It is no voter any more; nobody needs its vote to be elected."""
    cluster = led()
    cluster[1].propose_conf_change(change("r1"))
    cluster.tick(1)
    assert cluster[1].configuration.voters == (2, 3)
    cluster.dropped = lambda message: message.from_ == 3
    cluster.tick(1, count=USABLE)
    assert not valid(cluster), "one of two voters echoed"


def test_trap_08_no_lease_before_the_terms_first_commit() -> None:
    """A new leader does not know yet what is committed, whatever was promised to it."""
    cluster = Cluster(lease=LEASE)
    cluster.dropped = lambda message: message.type is M.APP
    cluster[1].campaign(cluster.now)
    cluster.settle()
    cluster.tick(1)
    assert cluster[1].role is Role.LEADER
    assert cluster[1].raft.lease_until > cluster.now
    assert not valid(cluster)
    cluster.dropped = lambda message: False
    cluster.tick(1, count=2)
    assert valid(cluster)


def test_trap_22_under_a_lease_a_followers_read_waits_for_what_is_committed_not_for_what_is_applied() -> None:
    """Another follower may have applied it, and served a read of it, before the leader itself has."""
    cluster = led()
    leader = cluster.hosts[1]
    leader.hold_writes = True
    leader.node.propose(b"x")
    cluster.tick(1)
    assert cluster.hosts[2].applied == [b"x"]
    assert (leader.node.committed, leader.node.applied) == (2, 1)
    assert valid(cluster)
    leader.step(Message(M.READ_INDEX, 1, 3, context=b"r"))
    (answer,) = sent(leader.node.ready(), M.READ_INDEX_RESP)
    assert (answer.to, answer.index) == (3, 2)


# The promise.


@pytest.mark.parametrize("kind", [M.VOTE, M.PRE_VOTE])
@pytest.mark.parametrize("role", ["follower", "learner"])
def test_whoever_promised_ignores_requests_for_votes_for_that_long(kind: M, role: str) -> None:
    """By the clock handed in, not by ticks; check-quorum is off here, so nothing else protects the leader."""
    node = fresh(3 if role == "follower" else 4)
    start = 50 * TICK_NS
    node.step(Message(M.HEARTBEAT, node.replica_id, 1, 1, lease_stamp=1, lease_promise=PROMISE * TICK_NS), start)
    node.ready()
    request = Message(kind, node.replica_id, 2, 2, index=9, log_term=1)
    node.step(request, start + PROMISE * TICK_NS - 1)
    assert node.term == 1
    assert not node.has_ready()
    node.step(request, start + PROMISE * TICK_NS)
    assert [answer.reject for answer in after_write(node.ready())] == [False]


def test_a_promise_holds_in_whatever_term_the_request_comes() -> None:
    """A replica may learn of a later term without a leader; its promise to the leader of the old one stands."""
    node = fresh(3)
    start = 50 * TICK_NS
    node.step(Message(M.HEARTBEAT, 3, 1, 1, lease_stamp=1, lease_promise=PROMISE * TICK_NS), start)
    node.step(Message(M.PRE_VOTE_RESP, 3, 2, 4, reject=True), start)
    assert (node.term, node.leader) == (4, 0)
    node.ready()
    node.step(Message(M.VOTE, 3, 2, 4, index=9, log_term=1), start + TICK_NS)
    assert node.vote == 0
    assert not node.has_ready()


def test_whoever_promised_does_not_campaign_for_that_long() -> None:
    """Neither by a timeout nor on its host's word; it campaigns soon after the promise has run out."""
    node = fresh(2, election_ticks=2)
    start = 50 * TICK_NS
    node.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=40 * TICK_NS), start)
    for elapsed in range(40):
        node.tick(start + elapsed * TICK_NS)
        node.campaign(start + elapsed * TICK_NS)
        assert node.role is Role.FOLLOWER, f"campaigned {elapsed} ticks into a promise of 40"
    elapsed = 40
    while node.role is Role.FOLLOWER:
        node.tick(start + elapsed * TICK_NS)
        elapsed += 1
    assert elapsed < 50


def test_a_campaign_that_is_promised_away_begins_soon_after_the_promise_and_not_by_the_timeout() -> None:
    """Its host has asked for it once and does not ask again."""
    node = fresh(2, election_ticks=50)
    start = 50 * TICK_NS
    node.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=4 * TICK_NS), start)
    node.campaign(start)
    for elapsed in range(4):
        node.tick(start + elapsed * TICK_NS)
        assert node.role is Role.FOLLOWER
    for elapsed in range(4, 10):
        node.tick(start + elapsed * TICK_NS)
    assert node.role is Role.CANDIDATE


def test_a_heartbeat_of_an_earlier_term_is_promised_nothing() -> None:
    """A promise is made to the leader of the term only."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 3, 5), TICK_NS)
    node.step(Message(M.HEARTBEAT, 2, 1, 4, lease_stamp=1, lease_promise=PROMISE * TICK_NS), TICK_NS)
    assert node.raft.refuse_until == 0
    assert not sent(node.ready(), M.HEARTBEAT_RESP)


def test_a_candidate_that_meets_the_leader_promises_too() -> None:
    """A replica of any role that accepts a heartbeat in that term (DESIGN 4.5)."""
    node = fresh(2, pre_vote=True)
    node.step(Message(M.APP, 2, 1, 1), TICK_NS)
    node.campaign(TICK_NS)
    assert node.role is Role.PRE_CANDIDATE
    node.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=7, lease_promise=PROMISE * TICK_NS), TICK_NS)
    assert node.raft.refuse_until == TICK_NS * (1 + PROMISE)
    (answer,) = sent(node.ready(), M.HEARTBEAT_RESP)
    assert (answer.lease_stamp, answer.lease_promise) == (7, PROMISE * TICK_NS)


def test_a_stamp_that_was_never_sent_does_not_count() -> None:
    """A stamp ahead of the leader's own clock would make a lease that nobody promised."""
    cluster = led()
    cluster.isolate(1)
    cluster.tick(1, count=USABLE)
    ahead = Message(M.HEARTBEAT_RESP, 1, 2, 1, lease_stamp=cluster.now + 100 * TICK_NS, lease_promise=PROMISE * TICK_NS)
    cluster[1].step(ahead, cluster.now)
    assert not valid(cluster)
    short = Message(M.HEARTBEAT_RESP, 1, 2, 1, lease_stamp=cluster.now, lease_promise=PROMISE * TICK_NS - 1)
    cluster[1].step(short, cluster.now)
    assert not valid(cluster), "a shorter promise than the lease rests on"


def test_echoes_that_come_out_of_order_never_shorten_the_lease() -> None:
    """The newest stamp counts, whatever comes after it."""
    cluster = led()
    until = cluster[1].status().lease_until
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 2, 1, lease_stamp=1, lease_promise=PROMISE * TICK_NS), cluster.now)
    assert cluster[1].status().lease_until == until


# Trap 6: the lease against transfers.


def test_trap_06_no_lease_while_a_transfer_is_pending() -> None:
    """The target may be told to campaign at any moment."""
    cluster = led()
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    assert valid(cluster)
    cluster[1].transfer_leader(3)
    assert not valid(cluster)


def test_trap_06_a_transfer_that_never_sent_timeout_now_gives_the_lease_back() -> None:
    """Nobody was freed of a promise."""
    cluster = led()
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster[1].transfer_leader(3)
    cluster.tick(1, count=10)
    assert cluster[1].transferee == 0
    assert valid(cluster)


def test_trap_06_after_timeout_now_there_is_no_lease_in_that_term() -> None:
    """It may arrive long after the transfer was given up, and it bypasses every promise (raft-rs #234, etcd #12704)."""
    cluster = led()
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW
    cluster[1].transfer_leader(3)
    cluster.settle()
    cluster.tick(count=20)
    assert (cluster[1].role, cluster[1].transferee) == (Role.LEADER, 0)
    assert not valid(cluster)
    cluster[1].read_index(b"r")
    cluster.settle()
    assert [state.context for state in cluster.hosts[1].read_states] == [b"r"], "reads go on, by ReadIndex"
    cluster.dropped = lambda message: False
    cluster.hosts[3].step(Message(M.TIMEOUT_NOW, 3, 1, cluster[1].term))
    cluster.settle()
    assert cluster.leaders() == [3]
    cluster.tick(3)
    assert valid(cluster, 3), "the next term has a lease of its own"


def test_trap_06_a_lease_that_still_runs_is_not_resumed_when_the_transfer_is_given_up() -> None:
    """With a promise longer than the transfer, time alone would not have ended the lease."""
    cluster = led(lease=LeaseSettings(promise_ns=100 * TICK_NS, drift=DRIFT))
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW
    cluster[1].transfer_leader(3)
    cluster.tick(1, count=10)
    assert cluster[1].transferee == 0
    assert cluster[1].status().lease_until > cluster.now
    assert not valid(cluster)


def test_trap_06_a_transfer_that_takes_the_place_of_another_does_not_give_the_lease_back() -> None:
    """The second sent nobody a TimeoutNow, but the first one's may still arrive."""
    cluster = led(lease=LeaseSettings(promise_ns=100 * TICK_NS, drift=DRIFT))
    cluster.isolate(2)
    cluster[1].propose(b"2 lacks it")
    cluster.settle()
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW
    for target in (3, 2):
        cluster[1].transfer_leader(target)
        cluster.settle()
    cluster.tick(1, count=10)
    assert (cluster[1].role, cluster[1].transferee) == (Role.LEADER, 0)
    assert cluster[1].status().lease_until > cluster.now
    assert not valid(cluster)


def test_a_later_term_of_the_same_leader_has_a_lease_again() -> None:
    """The freedom that TimeoutNow gave was for one term."""
    cluster = led()
    cluster[1].transfer_leader(3)
    cluster.settle()
    cluster[3].transfer_leader(1)
    cluster.settle()
    assert cluster.leaders() == [1]
    assert not valid(cluster), "nobody has promised anything in this term yet"
    cluster.tick(1)
    assert valid(cluster)


def test_a_transfer_bypasses_the_promise_of_target_and_voters() -> None:
    """Thesis 3.10: it has the leader's own word; else a transfer would take as long as a failover."""
    cluster = led()
    assert cluster[2].raft.refuse_until > cluster.now
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster.leaders() == [3]
    voter = fresh(2)
    voter.step(Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=PROMISE * TICK_NS), TICK_NS)
    voter.step(Message(M.VOTE, 2, 3, 2, context=CAMPAIGN_TRANSFER), TICK_NS)
    assert voter.vote == 3


# Trap 7: the lease against restarts and clocks.


def test_trap_07_a_restarted_voter_refuses_votes_for_the_longest_promise() -> None:
    """It has forgotten what it promised (tikv #15035)."""
    cluster = led()
    cluster.settings["vote_refusal_ns"] = PROMISE * TICK_NS
    cluster.isolate(1)
    for id_ in (2, 3):
        cluster.hosts[id_].crash()
        cluster.hosts[id_].restart()
    for _ in range(USABLE - 1):
        cluster.tick(2, 3)
        cluster[2].campaign(cluster.now)
        cluster.settle()
        assert valid(cluster), "the old leader's lease still runs"
        assert not {2, 3} & set(cluster.leaders()), "and another was elected"
    cluster.tick(2, 3, count=20)
    assert {2, 3} & set(cluster.leaders())


@pytest.mark.parametrize("kind", [M.VOTE, M.PRE_VOTE])
def test_trap_07_a_restarted_voter_refuses_votes_of_its_own_term_too(kind: MessageType) -> None:
    """It may have entered the term before it was restarted, without a vote, while a leader of an earlier one lives."""
    voter = fresh(2, terms=[3], vote_refusal_ns=PROMISE * TICK_NS)
    assert (voter.term, voter.vote) == (3, 0)
    request = Message(kind, 2, 3, 3, log_term=3, index=1)
    voter.step(request, PROMISE * TICK_NS - 1)
    assert voter.vote == 0
    assert not voter.has_ready(), "an answer, although everything is refused"
    voter.step(request, PROMISE * TICK_NS)
    assert after_write(voter.ready()), "and none when nothing is promised any more"


def test_trap_07_nobody_promises_longer_than_it_refuses_votes_after_a_restart() -> None:
    """Where settings differ, as while they are changed node by node, a leader may ask for more than that."""
    short = LeaseSettings(promise_ns=PROMISE * TICK_NS // 2, drift=DRIFT)
    own = {"lease": short, "vote_refusal_ns": short.promise_ns}
    cluster = Cluster(own_settings={2: own, 3: own}, lease=LEASE, pre_vote=True, check_quorum=True)
    cluster.tick(count=PROMISE)  # until the restarts that made these replicas are over
    cluster.elect(1)
    cluster.tick(1)
    assert not valid(cluster), "a lease would outlive a refusal after a restart"
    assert cluster[2].raft.refuse_until - cluster.now <= short.promise_ns
    cluster[1].transfer_leader(2)
    cluster.settle()
    cluster.tick(2)
    assert valid(cluster, 2), "who asks for no more than others give has one"


def test_trap_07_without_the_refusal_two_leaders_would_overlap() -> None:
    """The same run with the guard off: what it protects from does happen, so the test above can fail."""
    cluster = led(check_quorum=False)
    cluster.isolate(1)
    for id_ in (2, 3):
        cluster.hosts[id_].crash()
        cluster.hosts[id_].restart()
    cluster.elect(2)
    assert valid(cluster)


def test_trap_07_a_lease_from_before_a_restart_is_not_resumed() -> None:
    """A leader comes back as follower, and its next lease rests on promises of its next term."""
    cluster = led()
    cluster.hosts[1].crash()
    cluster.hosts[1].restart()
    assert not valid(cluster)


@pytest.mark.parametrize("fast,slow", [(1.0, 0.85), (1.15, 1.0)])
def test_trap_07_a_lease_ends_before_the_promises_do_when_clocks_drift(fast: float, slow: float) -> None:
    """Voters' clocks run fast or the leader's runs slow, within the bound: the promise still outlives the lease."""
    cluster = Cluster(lease=LEASE)
    cluster.clocks[1] = lambda now: int(now * slow)
    for id_ in (2, 3):
        cluster.clocks[id_] = lambda now: int(now * fast)
    for host in cluster.hosts.values():
        host.restart()
    cluster.elect(1)
    cluster.tick(1)
    cluster.isolate(1)
    for _ in range(100):
        cluster.now += TICK_NS // 10
        cluster[2].campaign(cluster.clock(2))
        cluster.settle()
        if cluster[2].role is Role.LEADER:
            break
    assert cluster[2].role is Role.LEADER
    assert not cluster[1].lease_valid(cluster.clock(1))


FASTEST = 1 / (1 - DRIFT)
"""How much faster than another a clock may run at most: a promise is then over as soon as the lease is."""


@pytest.mark.parametrize(
    "leader,voters",
    [(1.0, FASTEST), (1 / FASTEST, 1.0), (FASTEST**-0.5, FASTEST**0.5), (FASTEST, FASTEST**2), (FASTEST, 1.0)],
)
def test_trap_07_at_the_very_bound_of_drift_no_two_leaders_may_serve_at_once(leader: float, voters: float) -> None:
    """DESIGN 4.5, "shortened by the drift bound": in steps of a thousandth of a tick, with the voters as eager as can
    be, there is no moment at which another leads and the lease still holds. Without the shortening there are many.
    """
    cluster = Cluster(lease=LEASE)
    rates = {1: leader, 2: voters, 3: voters}
    for id_, rate in rates.items():
        cluster.clocks[id_] = lambda now, rate=rate: int(now * rate)
    for host in cluster.hosts.values():
        host.restart()
    cluster.elect(1)
    cluster.tick(1)
    assert valid_at(cluster, 1)
    cluster.isolate(1)
    step = TICK_NS // 1000
    cluster.now += int((USABLE - 1) * TICK_NS / leader)
    assert valid_at(cluster, 1), "the lease has not run out yet"
    for _ in range(3000):
        cluster.now += step
        if cluster[2].role is not Role.LEADER:
            cluster[2].campaign(cluster.clock(2))
            cluster.settle()
        elif not valid_at(cluster, 1):
            return
        assert cluster[2].role is not Role.LEADER or not valid_at(cluster, 1), "two may serve at once"
    assert not valid_at(cluster, 1)


def valid_at(cluster: Cluster, id_: int) -> bool:
    """Whether the replica's lease holds by its own clock."""
    return cluster[id_].lease_valid(cluster.clock(id_))


def test_trap_07_the_lease_is_checked_against_the_clock_of_the_moment() -> None:
    """A process that was suspended finds its lease gone, whatever it knew before."""
    cluster = led()
    assert valid(cluster)
    assert not valid(cluster, later=1000)


def test_a_follower_that_asks_for_a_read_index_is_answered_at_once_under_a_lease() -> None:
    """The leader's clock was read after the question came in; no round of heartbeats is needed."""
    cluster = led()
    cluster[1].step(Message(M.READ_INDEX, 1, 2, context=b"r"), cluster.now)
    ready = cluster[1].ready()
    assert [(answer.to, answer.index) for answer in sent(ready, M.READ_INDEX_RESP)] == [(2, 1)]
    assert not sent(ready, M.HEARTBEAT)
    cluster[1].step(Message(M.READ_INDEX, 1, 2, context=b"r"), cluster.now + 1000 * TICK_NS)
    ready = cluster[1].ready()
    assert not sent(ready, M.READ_INDEX_RESP)
    assert sent(ready, M.HEARTBEAT)


@pytest.mark.parametrize(
    "changed", [{"promise_ns": 0}, {"promise_ns": 5, "drift": 1.0}, {"promise_ns": 5, "drift": -1}]
)
def test_lease_settings_that_make_no_sense_are_refused(changed: dict[str, Any]) -> None:
    """Validate where it comes in."""
    with pytest.raises(ValueError):
        LeaseSettings(**changed)


def test_leaving_a_joint_configuration_recomputes_the_lease() -> None:
    """The outgoing half counts until the change that ends it is applied, and not after."""
    cluster = led()
    cluster[1].propose_conf_change(change("r2 r3", ConfChangeTransition.JOINT_EXPLICIT))
    cluster.tick(1, count=2)
    assert not valid(cluster, later=1000)
    cluster[1].propose_conf_change(ConfChange())
    cluster.settle()
    assert valid(cluster, later=1000)
