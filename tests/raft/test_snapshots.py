"""Snapshots: when one is sent, what it replaces, and what must not need one (paper 7)."""

import pytest

from shardkv.raft import ProgressState, Role
from shardkv.raft.messages import APPEND_THREAD, ConfState, Entry, Message, Snapshot, SnapshotMetadata
from tests.raft.cluster import Cluster, M, after_write, fresh, sent


def led(**changed: object) -> Cluster:
    cluster = Cluster(**changed)
    cluster.elect(1)
    return cluster


def snapshot_at(index: int, *, voters: tuple[int, ...], learners: tuple[int, ...] = ()) -> Snapshot:
    return Snapshot(SnapshotMetadata(index, 1, ConfState(voters, learners)), b"state")


def test_a_follower_that_needs_compacted_entries_is_sent_a_snapshot() -> None:
    """Paper 7: the leader sends a snapshot when it no longer has the next entry."""
    cluster = led()
    cluster.isolate(3)
    for value in (b"a", b"b"):
        cluster[1].propose(value)
    cluster.settle()
    cluster.hosts[1].compact()
    cluster.heal()
    cluster.tick(1, count=2)
    assert cluster.hosts[3].applied == [b"a", b"b"]
    assert cluster[1].status().progress[3].state is ProgressState.REPLICATE
    cluster[1].propose(b"c")
    cluster.settle()
    assert cluster.hosts[3].applied == [b"a", b"b", b"c"]


@pytest.mark.parametrize("arrived", [True, False])
def test_news_of_a_snapshot_that_come_late_do_not_disturb_a_follower_that_goes_on_with_the_log(arrived: bool) -> None:
    """It may have answered before the host did, and takes entries again: a probe would only hold it up."""
    cluster = led()
    cluster[1].report_snapshot(3, arrived)
    assert cluster[1].status().progress[3].state is ProgressState.REPLICATE
    for value in (b"a", b"b"):
        cluster[1].propose(value)
    cluster.settle()
    assert cluster.hosts[3].storage.last_index() == cluster[1].last_index


def test_trap_11_a_follower_one_entry_behind_needs_no_snapshot() -> None:
    """The entry before the first still has a known term, so a log may begin right behind what a follower has."""
    cluster = led()
    cluster[1].propose(b"a")
    cluster.settle()
    cluster.isolate(3)
    cluster[1].propose(b"b")
    cluster.settle()
    cluster.hosts[1].compact(cluster[3].last_index)
    cluster.heal()
    kinds = []
    cluster.dropped = lambda message: bool(kinds.append(message.type))
    cluster.tick(1, count=2)
    assert cluster.hosts[3].applied == [b"a", b"b"]
    assert M.SNAP not in kinds


def test_nothing_is_sent_to_a_follower_that_waits_for_a_snapshot() -> None:
    """etcd-io/raft, StateSnapshot; and the host's report decides how it goes on."""
    cluster = led()
    cluster.isolate(3)
    cluster[1].propose(b"a")
    cluster.settle()
    cluster.hosts[1].compact()
    cluster[1].report_unreachable(3)
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 3, 1))
    (snap,) = sent(cluster[1].ready(), M.SNAP)
    assert snap.to == 3
    cluster[1].propose(b"b")
    assert [message.to for message in sent(cluster[1].ready(), M.APP)] == [2]
    cluster[1].report_snapshot(3, ok=False)
    peer = cluster[1].status().progress[3]
    assert (peer.state, peer.paused, peer.next) == (ProgressState.PROBE, True, 2)
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 3, 1))
    assert sent(cluster[1].ready(), M.SNAP), "the next try comes with the next heartbeat"
    cluster[1].report_snapshot(3, ok=True)
    peer = cluster[1].status().progress[3]
    assert (peer.state, peer.next) == (ProgressState.PROBE, 3)


def test_a_snapshot_replaces_log_and_configuration_and_is_acknowledged_when_written() -> None:
    """Paper 7; trap 10: the answer rests on the snapshot's being on disk."""
    cluster = led()
    node = cluster.add(9).node
    node.step(Message(M.SNAP, 9, 1, 1, snapshot=snapshot_at(2, voters=(1, 2, 3), learners=(9,))))
    assert (node.committed, node.applied, node.configuration.learners) == (2, 0, (9,))
    ready = node.ready()
    assert ready.snapshot is not None
    assert not sent(ready, M.APP_RESP)
    assert [work.to for work in ready.messages] == [APPEND_THREAD]
    for answer in after_write(ready):
        if answer.to == 9:
            node.step(answer)
    assert node.applied == 2
    assert node.raft.log.snapshot is None


@pytest.mark.parametrize("index,voters", [(1, (1, 2)), (5, (1, 3))])
def test_an_old_or_foreign_snapshot_is_not_taken(index: int, voters: tuple[int, ...]) -> None:
    """Paper 7: a snapshot of a prefix of the log changes nothing; one of a group without us is not for us."""
    cluster = led()
    node = cluster[2]
    before = (node.last_index, node.committed, node.configuration)
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot_at(index, voters=voters)))
    assert (node.last_index, node.committed, node.configuration) == before
    (answer,) = [answer for answer in after_write(node.ready()) if answer.to == 1]
    assert answer.index == node.committed


@pytest.mark.parametrize("index,voters", [(2, (1, 2, 3)), (5, (1, 3))])
def test_the_answer_to_a_snapshot_that_is_not_taken_vouches_for_nothing_uncommitted(
    index: int, voters: tuple[int, ...]
) -> None:
    """What follows the commit index may not be in the leader's log, and would count towards its commits."""
    node = fresh(2, terms=[1, 1, 1])
    node.step(Message(M.HEARTBEAT, 2, 1, 1, commit=2))
    node.ready()
    node.step(Message(M.SNAP, 2, 3, 2, snapshot=snapshot_at(index, voters=voters)))
    assert [answer.index for answer in after_write(node.ready()) if answer.to == 3] == [2]


def test_a_replica_with_a_snapshot_to_write_does_not_campaign() -> None:
    """etcd-io/raft, promotable: its log is about to be replaced."""
    node = fresh(2)
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot_at(9, voters=(1, 2, 3))))
    node.campaign()
    assert node.role is Role.FOLLOWER


def test_no_snapshot_is_made_for_a_follower_that_is_away() -> None:
    """etcd-io/raft: making one is expensive, and whoever is away cannot take it."""
    cluster = led(check_quorum=True)
    cluster.isolate(3)
    cluster[1].propose(b"a")
    cluster.settle()
    cluster[1].report_unreachable(3)
    cluster.tick(1, count=25)
    assert not cluster[1].status().progress[3].recent_active
    cluster.hosts[1].compact()
    cluster[1].propose(b"b")
    assert cluster[1].status().progress[3].state is ProgressState.PROBE
    cluster.heal()
    cluster.tick(1, count=3)
    assert cluster.hosts[3].applied == [b"a", b"b"]


def test_a_snapshot_that_is_not_ready_yet_is_asked_for_again() -> None:
    """``SnapshotTemporarilyUnavailable``: nothing waits for it, and the next heartbeat answer tries again."""
    cluster = led()
    cluster.isolate(3)
    cluster[1].propose(b"a")
    cluster.settle()
    cluster.hosts[1].compact()
    cluster.hosts[1].storage.busy = True
    cluster.heal()
    cluster.tick(1, count=3)
    assert cluster[1].status().progress[3].state is ProgressState.PROBE
    cluster.hosts[1].storage.busy = False
    cluster.tick(1, count=2)
    assert cluster.hosts[3].applied == [b"a"]


def test_a_snapshot_older_than_a_compacted_log_never_moves_the_replica_back() -> None:
    """Paper 7: it comes late; nothing in the log can tell any more that it agrees."""
    cluster = led()
    for _ in range(5):
        cluster[1].propose(b"x")
    cluster.settle()
    cluster.tick(1)
    host = cluster.hosts[2]
    host.compact()
    host.node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot_at(2, voters=(1, 2, 3))))
    assert (host.node.committed, host.node.last_index) == (6, 6)
    assert host.node.raft.log.snapshot is None


def test_a_snapshot_of_what_the_log_already_holds_only_commits_it() -> None:
    """Paper 7: if the follower has the snapshot's last entry, what follows it is still valid and is kept."""
    node = fresh(2, terms=[1, 1, 1])
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot_at(2, voters=(1, 2, 3))))
    assert (node.committed, node.last_index) == (2, 3)
    ready = node.ready()
    assert ready.snapshot is None
    assert [answer.index for answer in after_write(ready) if answer.to == 1] == [2], "the rest may be another leader's"


def test_a_snapshot_that_is_written_takes_no_newer_one_for_written() -> None:
    """Paper 7: the newer one is in nobody's storage yet, and the log must not go on as if it were."""
    node = fresh(2)
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=snapshot_at(5, voters=(1, 2, 3))))
    written = [answer for answer in after_write(node.ready()) if answer.to == 2]
    newer = snapshot_at(9, voters=(1, 2, 3))
    node.step(Message(M.SNAP, 2, 1, 1, snapshot=newer))
    for answer in written:
        node.step(answer)
    assert node.raft.log.snapshot is newer
    assert node.ready().snapshot is newer


def test_entries_that_follow_a_snapshot_are_taken_while_it_is_not_written() -> None:
    """The old log is still in the storage, and what it holds there says nothing of the new one."""
    node = fresh(2, terms=[1, 1, 1, 1, 1, 1, 1])
    node.step(Message(M.SNAP, 2, 1, 2, snapshot=Snapshot(SnapshotMetadata(5, 2, ConfState((1, 2, 3))), b"state")))
    for last in (6, 7):
        entries = tuple(Entry(2, index) for index in range(6, last + 1))
        node.step(Message(M.APP, 2, 1, 2, index=5, log_term=2, entries=entries))
    ready = node.ready()
    assert [entry.index for entry in ready.entries] == [6, 7], "the old log's 6 and 7 are on disk, these are not"
    answers = [answer for answer in after_write(ready) if answer.to == 1]
    assert [(answer.index, answer.reject) for answer in answers] == [(5, False), (6, False), (7, False)]
