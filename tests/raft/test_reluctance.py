"""A replica whose host is in no state to lead leaves that to others (trap 14)."""

from typing import Any

from shardkv.raft import Role
from shardkv.raft.election import stagger_ticks
from shardkv.raft.messages import Message
from tests.raft.cluster import Cluster, M


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
