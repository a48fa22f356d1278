"""How old a replica's state is at most (DESIGN 2.3, 4.5). Times are in ticks of the test's clock."""

import random
from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from shardkv.raft import LeaseSettings, Role
from shardkv.raft.messages import Entry, Message
from tests.raft.cluster import TICK_NS, Cluster, M, change, fresh, sent

DRIFT = 0.2
LEASE = LeaseSettings(promise_ns=5 * TICK_NS, drift=DRIFT)


def led(voters: int = 3, **changed: Any) -> Cluster:
    """A group whose replica 1 leads, and whose followers have heard three of its heartbeats."""
    defaults: dict[str, Any] = {"lease": LEASE, "pre_vote": True, "check_quorum": True}
    cluster = Cluster(voters, **(defaults | changed))
    cluster.elect(1)
    cluster.tick(1, count=3)
    return cluster


def age(cluster: Cluster, id_: int) -> int | None:
    """What a replica says of its own age now."""
    node = cluster[id_]
    return node.age_ns(node.applied, cluster.clock(id_))


def stretched(ticks: float) -> int:
    return ceil(ticks * TICK_NS / (1 - DRIFT))


def test_a_followers_age_counts_from_its_answer_to_the_heartbeat_before_the_last() -> None:
    """The last heartbeat's index is surely newer than the answer that it carries back; it came one tick later."""
    cluster = led()
    assert [age(cluster, id_) for id_ in (2, 3)] == [stretched(1)] * 2
    cluster.now += 7 * TICK_NS
    assert age(cluster, 2) == stretched(8)


def test_nothing_is_known_before_a_heartbeat_has_carried_an_answer_back() -> None:
    """A leader that was heard of proves nothing: its heartbeat may have been under way for any time."""
    cluster = Cluster(lease=LEASE)
    cluster.elect(1)
    assert age(cluster, 2) is None
    cluster.tick(1)
    assert age(cluster, 2) is None
    cluster.tick(1)
    assert age(cluster, 2) == stretched(1)


def test_a_follower_that_is_cut_off_grows_older_and_keeps_what_it_knows() -> None:
    """Silence, a candidacy and a new term do not undo what was proved."""
    cluster = led()
    cluster.isolate(2)
    cluster.tick(count=30)
    assert cluster[2].role is not Role.FOLLOWER
    assert age(cluster, 2) == stretched(31)
    cluster.heal()
    cluster.tick(count=12)
    assert age(cluster, 2) == stretched(1)


def test_a_follower_that_hears_heartbeats_but_lags_in_its_log_does_not_seem_fresh() -> None:
    """The commit index of a heartbeat never exceeds what the follower has, so that alone would say: up to date."""
    cluster = led()
    cluster.dropped = lambda message: message.type is M.APP and message.to == 2
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.tick(1, count=6)
    assert cluster[2].leader == 1
    assert age(cluster, 2) == stretched(1 + 6), "it hears the leader every tick, and is as old as the write"
    assert age(cluster, 3) == stretched(1)
    cluster.dropped = lambda message: False
    cluster.tick(1, count=2)
    assert age(cluster, 2) == stretched(1)


def test_a_follower_that_has_the_log_but_has_not_applied_it_does_not_seem_fresh() -> None:
    """What counts is what a read would see: the state machine, which the host speaks for."""
    cluster = led()
    before = cluster[2].applied
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.tick(1, count=4)
    assert cluster[2].age_ns(cluster[2].applied, cluster.now) == stretched(1)
    old = cluster[2].age_ns(before, cluster.now)
    assert old is None or old >= stretched(4)


def test_a_follower_that_always_lags_a_little_still_learns_its_age() -> None:
    """A proof is not given up for the next one before its index is applied."""
    cluster = led()
    cluster.isolate(2)
    term, first, begun = cluster[2].term, cluster[2].applied, cluster.now
    for tick in range(1, 21):
        cluster.now += TICK_NS
        reading = cluster.now - TICK_NS + cluster[2].raft.stamp_offset
        promised = {"lease_stamp": cluster.now, "lease_promise": LEASE.promise_ns, "follower_stamp": reading}
        cluster.hosts[2].step(Message(M.HEARTBEAT, 2, 1, term, index=first + tick, **promised))
        if tick > 3:  # the entry that the leader had committed three ticks ago
            at = first + tick - 3
            entries = (Entry(term, at, data=b"x"),)
            cluster.hosts[2].step(Message(M.APP, 2, 1, term, term, at - 1, entries, at))
        cluster.settle()
        known = age(cluster, 2)
        assert known is not None
        if cluster.now > begun + 5 * TICK_NS:
            assert stretched(4) <= known <= stretched(8), f"{tick} ticks"


def test_a_deposed_leader_that_does_not_know_it_proves_nothing() -> None:
    """It is still followed by a replica that cannot hear the others; without a quorum's promise it has no lease."""
    cluster = led(voters=5)
    for inside in (1, 2):
        for outside in (3, 4, 5):
            cluster.cut |= {(inside, outside), (outside, inside)}
    for _ in range(8):
        cluster.tick(1)
        cluster.now -= TICK_NS  # the two sides live at the same time
        cluster.tick(3, 4, 5)
    assert cluster[1].role is Role.LEADER
    assert cluster[2].leader == 1
    known = age(cluster, 2)
    assert known is not None
    assert known >= stretched(4), "five ticks of promise, less the drift, are all that it could be proved for"


def test_a_leader_proves_nothing_before_the_terms_first_commit() -> None:
    """It does not know yet how far its predecessor has committed (trap 8)."""
    cluster = Cluster(lease=LEASE)
    cluster.dropped = lambda message: message.type is M.APP
    cluster[1].campaign(cluster.now)
    cluster.settle()
    cluster.tick(1, count=3)
    assert cluster[1].role is Role.LEADER
    assert age(cluster, 2) is None


def test_a_heartbeat_that_was_long_under_way_makes_nobody_younger() -> None:
    """The delay lies between the follower's reading and now, whichever way it took."""
    cluster = led()
    held: list[Message] = []
    cluster.dropped = lambda message: message.to == 2 and (held.append(message) is None)
    cluster.tick(1)
    cluster.dropped = lambda message: message.to == 2
    cluster.tick(1, count=20)
    (heartbeat,) = [message for message in held if message.type is M.HEARTBEAT]
    cluster.hosts[2].step(heartbeat)
    assert age(cluster, 2) == stretched(21)


@pytest.mark.parametrize("reading", [49, 70])
def test_a_reading_that_is_not_this_replicas_own_is_ignored(reading: int) -> None:
    """From before it was made, or beyond its clock: the machine, and with it the clock, was started again."""
    node = fresh(2, lease=LEASE)
    node.raft.made_at = 50 * TICK_NS
    promised = {"lease_stamp": 1, "lease_promise": TICK_NS}
    offset = node.raft.stamp_offset
    node.step(Message(M.HEARTBEAT, 2, 1, 1, follower_stamp=reading * TICK_NS + offset, **promised), 60 * TICK_NS)
    assert node.age_ns(0, 60 * TICK_NS) is None
    node.step(Message(M.HEARTBEAT, 2, 1, 1, follower_stamp=55 * TICK_NS + offset, **promised), 60 * TICK_NS)
    assert node.age_ns(0, 60 * TICK_NS) == stretched(5)


def test_a_reading_of_another_start_is_ignored_though_the_clock_shows_the_same_again() -> None:
    """A clock that counts from the machine's start does so after each."""
    before, node = (fresh(2, lease=LEASE, randrange=random.Random(seed).randrange) for seed in (1, 2))
    beat = Message(M.HEARTBEAT, 2, 1, 1, lease_stamp=1, lease_promise=TICK_NS)
    before.step(beat, 55 * TICK_NS)
    (answer,) = sent(before.ready(), M.HEARTBEAT_RESP)
    node.step(replace(beat, follower_stamp=answer.follower_stamp), 60 * TICK_NS)
    assert node.age_ns(0, 60 * TICK_NS) is None


def test_a_restarted_replica_knows_nothing_until_it_is_told() -> None:
    """And the reading that its leader still has is of the life before."""
    cluster = led()
    cluster.hosts[2].crash()
    cluster.now += TICK_NS
    cluster.hosts[2].restart()
    cluster.tick(1)
    assert age(cluster, 2) is None
    cluster.tick(1)
    assert age(cluster, 2) == stretched(1)


def test_a_leader_that_steps_down_was_fresh_as_long_as_its_lease_lasted() -> None:
    """Nobody else can have committed anything before that."""
    cluster = led()
    cluster.isolate(1)
    cluster.tick(1, count=20)
    assert cluster[1].role is not Role.LEADER
    assert age(cluster, 1) == stretched(16), "20 ticks, less a lease of 5 shortened by the drift"


def test_a_leader_that_hands_over_was_fresh_until_then() -> None:
    """Trap 6: from TIMEOUT_NOW on the lease is worth nothing, and up to then it was."""
    cluster = led()
    cluster[1].transfer_leader(2)
    cluster.settle()
    assert cluster.leaders() == [2]
    cluster.isolate(1)
    cluster.tick(1, count=3)
    assert age(cluster, 1) == stretched(3)


def test_a_leader_that_steps_down_before_the_terms_first_commit_knows_nothing() -> None:
    """It may lack the commit index of its predecessor (trap 8), lease or not."""
    cluster = Cluster(lease=LEASE)
    cluster.dropped = lambda message: message.type is M.APP
    cluster[1].campaign(cluster.now)
    cluster.settle()
    cluster.tick(1)
    assert cluster[1].raft.lease_until > cluster.now
    cluster[1].step(Message(M.APP, 1, 2, 9), cluster.now)
    assert cluster[1].role is Role.FOLLOWER
    assert age(cluster, 1) is None


def test_trap_06_a_leader_that_steps_down_after_a_timeout_now_was_fresh_until_that_left() -> None:
    """Whoever got it leads and commits while the promises of the old leader still run."""
    cluster = led(lease=LeaseSettings(promise_ns=100 * TICK_NS, drift=DRIFT), check_quorum=False)
    held: list[Message] = []
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW and held.append(message) is None
    cluster[1].transfer_leader(3)
    cluster.settle()
    cluster.dropped = lambda message: False
    cluster.isolate(1)
    cluster.hosts[3].step(held[0])
    cluster.settle()
    assert cluster.leaders() == [1, 3]
    cluster.now += 10 * TICK_NS
    cluster[1].step(Message(M.APP, 1, 3, cluster[3].term), cluster.now)
    assert cluster[1].role is Role.FOLLOWER
    assert age(cluster, 1) == stretched(10)


def test_trap_06_after_a_timeout_now_nothing_is_proved_in_that_term() -> None:
    """It may arrive at any time, and elects another leader over every promise."""
    cluster = led()
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW
    cluster[1].transfer_leader(3)
    cluster.settle()
    cluster.tick(count=20)
    assert cluster[1].role is Role.LEADER
    known = age(cluster, 2)
    assert known is not None
    assert known >= stretched(20)


def test_learners_learn_their_age_too() -> None:
    """They hold all the data, and a stale read may go to any replica."""
    cluster = led()
    cluster.add(4)
    cluster[1].propose_conf_change(change("l4"))
    cluster.tick(1, count=4)
    assert age(cluster, 4) == stretched(1)


def test_without_lease_settings_nothing_is_sent_and_nothing_known() -> None:
    """As in etcd, for the transcripts."""
    cluster = led(lease=None)
    cluster[1].tick(cluster.now)
    beats = sent(cluster[1].ready(), M.HEARTBEAT)
    assert [(beat.index, beat.follower_stamp) for beat in beats] == [(0, 0)] * 2
    assert age(cluster, 2) is None


@pytest.mark.parametrize("follower,others", [(1.0, 1.2), (0.85, 1.0)])
def test_the_age_holds_by_the_clock_of_whoever_is_told(follower: float, others: float) -> None:
    """DESIGN 4.5: clocks drift apart within a bound; a slow follower's seconds are longer than it thinks."""
    cluster = Cluster(lease=LEASE)
    cluster.clocks = {1: lambda now: int(now * others), 2: lambda now: int(now * follower)}
    for host in cluster.hosts.values():
        host.restart()
    cluster.elect(1)
    cluster.tick(1, count=3)
    cluster.isolate(2)
    cluster[1].propose(b"x")
    cluster.settle()
    written = cluster.clock(1)
    cluster.now += 50 * TICK_NS
    known = age(cluster, 2)
    assert known is not None
    assert known >= cluster.clock(1) - written, "by the writer's clock the write is older than the age"
