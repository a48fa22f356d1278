"""Leadership that is handed over (thesis 3.10)."""

from shardkv.raft import Role
from tests.raft.cluster import Cluster, M, sent


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
