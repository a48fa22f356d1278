"""Followers whose connection to the leader's node broke elect another soon, and none too early (DESIGN 4.11)."""

from typing import Any

from shardkv.raft import Role
from shardkv.raft.election import STAGGER_TICKS
from shardkv.raft.messages import Message
from tests.raft.cluster import TICK_NS, Cluster, M, fresh, settings_for


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


def leaderless(**settings: Any) -> Cluster:
    """1 has died; 3, whose turn is first, lacks an entry that 2 has."""
    cluster = Cluster(pre_vote=True, check_quorum=True, **settings)
    cluster.elect(1)
    cluster.cut = {(1, 3), (3, 1)}
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.hosts[1].crash()
    return cluster


def test_a_doubting_follower_whose_log_is_too_short_gives_its_turn_to_the_one_that_tells_it() -> None:
    """The first in turn may not be able to win; the group must not wait for the second turn because of it."""
    cluster = leaderless()
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.settle()
    assert cluster.leaders() == [2]


def test_of_those_that_tell_it_only_the_next_in_turn_begins() -> None:
    """Two that began in the same moment would split the votes of the others, and then wait for a timeout."""
    cluster = Cluster(5, pre_vote=True, check_quorum=True)
    cluster.elect(1)
    cluster.isolate(4, 5)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.heal()
    cluster.hosts[1].crash()
    for id_ in (2, 3, 4, 5):
        cluster[id_].doubt(cluster.now)
    assert cluster[5].role is Role.PRE_CANDIDATE, "its turn is first, and it lacks an entry"
    cluster.settle()
    assert cluster.leaders() == [2]
    assert cluster[3].vote == 2, "it did not ask for its own election"


def test_each_that_cannot_win_brings_a_waiting_replicas_turn_one_nearer() -> None:
    cluster = Cluster(5, pre_vote=True, check_quorum=True)
    cluster.elect(1)
    three = cluster[3]
    three.doubt(cluster.now)
    before = three.raft.eager_ticks
    assert before == 2 * STAGGER_TICKS
    too_short = Message(M.PRE_VOTE, 3, 5, three.term + 1)
    three.step(too_short, cluster.now)
    assert three.raft.eager_ticks == before - STAGGER_TICKS
    three.tick()
    three.step(too_short, cluster.now)
    assert three.role is Role.PRE_CANDIDATE, "less than a turn was left"


def test_a_doubting_follower_whose_log_is_too_short_leaves_the_next_one_its_turn() -> None:
    """Nor for a timeout, when nobody tells it."""
    cluster = leaderless()
    cluster.cut |= {(2, 3), (3, 2)}
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.settle()
    cluster.cut.clear()
    cluster.tick(count=STAGGER_TICKS + 1)
    assert cluster.leaders() == [2]


def test_a_follower_that_does_not_doubt_its_leader_begins_nothing_when_a_candidate_lacks_entries() -> None:
    cluster = leaderless(lease=None)
    for _ in range(settings_for(2).election_ticks):
        cluster[2].tick(cluster.now)
        if cluster[2].raft.election_elapsed >= settings_for(2).election_ticks:
            break
    term, elapsed = cluster[2].term, cluster[2].raft.election_elapsed
    cluster[3].doubt(cluster.now)
    cluster.settle()
    assert cluster[2].role is Role.FOLLOWER
    assert (cluster[2].term, cluster[2].raft.election_elapsed) == (term, elapsed)


def test_a_late_request_of_one_that_could_win_gives_nobody_else_its_turn() -> None:
    cluster = leaderless()
    cluster[2].doubt(cluster.now)
    late = Message(M.PRE_VOTE, 2, 3, cluster[2].term, log_term=cluster[2].term, index=cluster[2].last_index)
    cluster[2].step(late, cluster.now)
    assert cluster[2].role is Role.FOLLOWER


def test_a_reluctant_follower_leaves_that_turn_to_others_too() -> None:
    """Trap 14: its disk stalls."""
    cluster = leaderless(own_settings={2: {"reluctant": lambda: True}})
    for id_ in (2, 3):
        cluster[id_].doubt(cluster.now)
    cluster.settle()
    assert cluster.leaders() == []


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
