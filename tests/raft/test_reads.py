"""ReadIndex: linearizable reads without a log entry (thesis 6.4; trap 8)."""

from shardkv.raft import ReadOnly, ReadState, Role
from shardkv.raft.messages import ConfChangeTransition, HardState, Message
from tests.raft.cluster import Cluster, M, change, led, sent


def elected_but_nothing_committed(cluster: Cluster) -> None:
    """Let 1 win its election while every append is lost."""
    cluster.dropped = lambda message: message.type is M.APP
    cluster[1].campaign()
    cluster.settle()
    assert cluster[1].role is Role.LEADER
    assert not cluster[1].committed_in_term


def test_a_read_is_confirmed_by_a_round_of_heartbeats() -> None:
    """Thesis 6.4: the leader makes sure that it has not been superseded, after the read came in."""
    cluster = led()
    assert cluster[1].read_index(b"r")
    ready = cluster[1].ready()
    assert ready.read_states == ()
    beats = sent(ready, M.HEARTBEAT)
    assert [beat.to for beat in beats] == [2, 3]
    cluster.send(ready.messages)
    cluster.settle()
    assert cluster.hosts[1].read_states == [ReadState(1, b"r")]


def test_a_leader_that_was_deposed_confirms_nothing() -> None:
    """Thesis 6.4: without the round a leader cut off from the rest would serve what is long overwritten."""
    cluster = led()
    cluster.isolate(1)
    cluster.elect(2)
    cluster[2].propose(b"newer")
    cluster.settle()
    cluster[1].read_index(b"r")
    cluster.tick(1, count=3)
    assert cluster.hosts[1].read_states == []
    cluster.heal()
    cluster.tick(count=3)
    assert cluster.hosts[1].read_states == []


def test_an_answer_from_before_the_read_does_not_confirm_it() -> None:
    """Thesis 6.4: the heartbeat must be sent after the read came in, so its answer names the read."""
    cluster = led()
    cluster[1].tick()
    old = [
        Message(M.HEARTBEAT_RESP, 1, beat.to, 1, context=beat.context) for beat in sent(cluster[1].ready(), M.HEARTBEAT)
    ]
    cluster[1].read_index(b"r")
    cluster[1].ready()
    for answer in old:
        cluster[1].step(answer)
    assert not cluster[1].raft.read_states


def test_an_answer_to_the_round_of_an_earlier_read_does_not_confirm_a_later_one() -> None:
    """Thesis 6.4: another leader may have been elected, and have committed something, between the two reads."""
    cluster = led()
    cluster[1].read_index(b"earlier")
    answers = [
        Message(M.HEARTBEAT_RESP, 1, beat.to, 1, context=beat.context) for beat in sent(cluster[1].ready(), M.HEARTBEAT)
    ]
    cluster[1].read_index(b"later")
    cluster[1].ready()
    for answer in answers:
        cluster[1].step(answer)
    assert cluster[1].raft.read_states == [ReadState(1, b"earlier")]


def test_trap_08_a_new_leader_answers_no_read_before_its_first_commit() -> None:
    """It may not know yet what is committed (thesis 6.4, step 1; etcd #20418)."""
    cluster = Cluster()
    elected_but_nothing_committed(cluster)
    cluster.tick(1)
    cluster[1].read_index(b"r")
    assert cluster[2].read_index(b"from a follower")
    cluster.settle()
    cluster.tick(1)
    assert cluster.hosts[1].read_states == []
    cluster.dropped = lambda message: False
    cluster.tick(1, count=3)
    assert cluster.hosts[1].read_states == [ReadState(1, b"r")]
    assert cluster.hosts[2].read_states == [ReadState(1, b"from a follower")]


def test_a_read_that_waits_for_the_first_commit_is_confirmed_by_a_change_that_needs_fewer_votes_for_it() -> None:
    """Nothing else may be committed for a long time."""
    cluster = Cluster(voters=2)
    elected_but_nothing_committed(cluster)
    cluster[1].read_index(b"r")
    cluster.settle()
    assert cluster.hosts[1].read_states == []
    cluster[1].apply_conf_change(change("r2"))
    cluster.settle()
    assert cluster.hosts[1].read_states == [ReadState(1, b"r")]


def test_trap_08_pending_reads_are_dropped_when_the_leader_changes() -> None:
    """A read that was not confirmed in the term it came in must not be confirmed in another."""
    cluster = Cluster()
    elected_but_nothing_committed(cluster)
    cluster[1].read_index(b"postponed")
    cluster.dropped = lambda message: False
    cluster.isolate(1)
    cluster.messages.clear()
    cluster.elect(2)
    cluster[2].read_index(b"unconfirmed")
    cluster.heal()
    cluster.isolate(2)
    cluster.settle()
    cluster.heal()
    cluster.elect(3)
    cluster.elect(1)
    cluster.elect(2)
    cluster.tick(2, count=3)
    assert cluster.hosts[1].read_states == []
    assert cluster.hosts[2].read_states == []


def test_trap_08_an_answer_of_an_earlier_term_confirms_no_read() -> None:
    """Reads are numbered anew in each term: what confirmed the first one of that would confirm the first of this."""
    cluster = led()
    late: list[Message] = []
    cluster.dropped = lambda message: message.type is M.HEARTBEAT_RESP and late.append(message) is None
    cluster[1].read_index(b"of the first term")
    cluster.settle()
    assert [answer.from_ for answer in late] == [2, 3]
    cluster.dropped = lambda message: False
    cluster.elect(2)
    cluster.elect(1)
    cluster.isolate(1)
    cluster[1].read_index(b"of the third")
    cluster.settle()
    for answer in late:
        cluster.hosts[1].step(answer)
    cluster.settle()
    assert cluster[1].role is Role.LEADER
    assert cluster.hosts[1].read_states == []


def test_a_follower_reads_at_the_leaders_index() -> None:
    """Thesis 6.4: followers ask the leader for a read index and serve when they have applied it."""
    cluster = led()
    cluster[1].propose(b"x")
    cluster.settle()
    assert cluster[3].read_index(b"r")
    cluster.settle()
    assert cluster.hosts[3].read_states == [ReadState(2, b"r")]


def test_a_replica_that_leads_no_longer_passes_no_read_of_another_on() -> None:
    """Its node would speak for a replica that is not its own, for which a connection is closed."""
    for forwarding in (True, False):
        cluster = led(disable_proposal_forwarding=not forwarding)
        cluster.elect(2)
        cluster[1].step(Message(M.READ_INDEX, 1, 3, context=b"late"))
        passed_on = sent(cluster[1].ready(), M.READ_INDEX) if cluster[1].has_ready() else []
        assert [(each.to, each.from_) for each in passed_on] == ([(2, 3)] if forwarding else [])
        assert cluster[1].read_index(b"its own")
        assert [(each.to, each.from_) for each in sent(cluster[1].ready(), M.READ_INDEX)] == [(2, 1)]


def test_a_follower_that_is_about_to_wait_for_a_commit_is_told_of_it_once() -> None:
    """Where commits are not told to all at once. An append tells it, which covers also what is in flight."""
    cluster = led(commit_broadcast=False)
    cluster.tick(1)
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.heal()
    assert (cluster[1].raft.log.committed, cluster[2].raft.log.committed) == (2, 1)
    for name in (b"r", b"s"):
        cluster[1].step(Message(M.READ_INDEX, 1, 2, context=name))
    appends = sent(cluster[1].ready(), M.APP)
    assert [(append.to, append.index, append.commit) for append in appends] == [(2, 2, 2)]
    cluster[2].step(appends[0])
    assert cluster[2].raft.log.committed == 2


def test_a_follower_that_is_told_of_every_commit_is_told_nothing_more_by_its_read() -> None:
    cluster = led()
    cluster[1].propose(b"x")
    cluster.settle()
    cluster[1].step(Message(M.READ_INDEX, 1, 2, context=b"r"))
    assert not sent(cluster[1].ready(), M.APP)


def test_one_round_confirms_every_read_that_came_before_it() -> None:
    """Thesis 6.4: many reads share one confirmation."""
    cluster = led()
    for name in (b"a", b"b", b"c"):
        cluster[1].read_index(name)
    beats = sent(cluster[1].ready(), M.HEARTBEAT)
    newest = [beat for beat in beats if beat.to == 2][-1]
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 2, 1, context=newest.context))
    assert [state.context for state in cluster[1].ready().read_states] == [b"a", b"b", b"c"]


def test_a_lost_round_is_made_up_for_by_the_next_heartbeat() -> None:
    """Every heartbeat carries the newest unconfirmed read."""
    cluster = led()
    cluster.dropped = lambda message: message.type is M.HEARTBEAT
    cluster[1].read_index(b"r")
    cluster.settle()
    assert cluster.hosts[1].read_states == []
    cluster.dropped = lambda message: False
    cluster.tick(1)
    assert cluster.hosts[1].read_states == [ReadState(1, b"r")]


def test_a_joint_configuration_confirms_reads_with_both_majorities() -> None:
    """Thesis 4.3: a leader of either half alone could have been superseded in the other."""
    cluster = led()
    for id_ in (4, 5):
        cluster.add(id_)
    cluster[1].propose_conf_change(change("v4 v5 r2 r3", ConfChangeTransition.JOINT_EXPLICIT))
    cluster.tick(1, count=3)
    cluster.isolate(2, 3)
    cluster[1].read_index(b"r")
    cluster.tick(1, count=2)
    assert cluster.hosts[1].read_states == []
    cluster.heal()
    cluster.tick(1)
    assert [state.context for state in cluster.hosts[1].read_states] == [b"r"]


def test_learners_do_not_confirm_reads() -> None:
    """They do not vote, so they cannot know that nobody else was elected."""
    cluster = Cluster(voters=3, learners=2)
    cluster.elect(1)
    cluster.isolate(2, 3)
    cluster[1].read_index(b"r")
    cluster.tick(1, count=2)
    assert cluster.hosts[1].read_states == []


def test_a_quorum_that_has_confirmed_less_than_the_one_before_it_confirms_nothing() -> None:
    """The members have changed: what the new quorum says of earlier reads says nothing of those that came since."""
    cluster = Cluster(voters=3, learners=1)
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].read_index(b"before")
    cluster.settle()
    cluster[1].propose_conf_change(change("r2"))
    cluster.tick(1)
    assert cluster[1].configuration.voters == (1, 3)
    for context in (b"first", b"second"):
        cluster[1].read_index(context)
    cluster.tick(1, count=2)
    assert [state.context for state in cluster.hosts[1].read_states] == [b"before"]
    cluster.heal()
    cluster.tick(1)
    assert [state.context for state in cluster.hosts[1].read_states] == [b"before", b"first", b"second"]


def test_a_group_of_one_confirms_at_once() -> None:
    """There is nobody to ask."""
    cluster = led(voters=1)
    cluster[1].read_index(b"r")
    assert cluster[1].ready().read_states == [ReadState(1, b"r")]


def test_trap_08_a_leader_alone_answers_no_read_before_its_first_commit() -> None:
    """A restart may have forgotten how far was committed, for a commit alone is not synced; its first entry tells.

    Here etcd answers at once: with what the restarted replica happens to remember.
    """
    cluster = led(voters=1)
    cluster[1].propose(b"acknowledged")
    cluster.settle()
    assert cluster[1].committed == 2
    host = cluster.hosts[1]
    host.crash()
    host.storage.set_hard_state(HardState(cluster[1].term, cluster[1].vote, 1))
    host.restart()
    host.hold_writes = True
    cluster[1].campaign()
    cluster.settle()
    host.write()
    assert cluster[1].role is Role.LEADER
    cluster[1].read_index(b"early")
    cluster.settle()
    assert not cluster[1].committed_in_term
    assert host.read_states == [], "answered from before what was acknowledged"
    while host.work:
        host.write()
        cluster.settle()
    assert host.read_states == [ReadState(3, b"early")]
    assert host.applied == [b"acknowledged"]


def test_a_leader_that_is_no_voter_asks_the_one_that_is() -> None:
    """Removed, and the term not over: the only voter that is left may have elected itself since."""
    cluster = Cluster(2)
    cluster.elect(1)
    cluster[1].propose_conf_change(change("r1"))
    cluster.settle()
    assert (cluster[1].role, cluster[1].configuration.voters) == (Role.LEADER, (2,))
    cluster.isolate(1)
    cluster.elect(2)
    cluster[2].propose(b"newer")
    cluster.settle()
    cluster[1].read_index(b"r")
    cluster.tick(1, count=3)
    assert cluster.hosts[1].read_states == []


def test_without_a_leader_a_read_is_not_taken() -> None:
    """The host has to try again later; nothing would ever answer it."""
    assert not Cluster()[1].read_index(b"r")


def test_reads_that_wait_are_bounded() -> None:
    """``reads_pending_max``: a leader without a quorum must not collect reads for ever."""
    cluster = led(reads_pending_max=3)
    cluster.isolate(1)
    for number in range(10):
        cluster[1].read_index(b"%d" % number)
    cluster.heal()
    cluster.tick(1)
    assert [state.context for state in cluster.hosts[1].read_states] == [b"0", b"1", b"2"]


def test_lease_based_reads_ask_nobody() -> None:
    """etcd-io/raft, ReadOnlyLeaseBased: kept for its transcripts; nodes use the lease by promise."""
    cluster = led(read_only=ReadOnly.LEASE_BASED, check_quorum=True)
    cluster[1].read_index(b"r")
    assert cluster[1].ready().read_states == [ReadState(1, b"r")]


def test_an_answer_cannot_confirm_reads_that_have_not_come_in_yet() -> None:
    """A number that this leader never sent is worth no more than the newest it did send."""
    cluster = led()
    cluster[1].read_index(b"now")
    for sender in (2, 3):
        cluster[1].step(Message(M.HEARTBEAT_RESP, 1, sender, 1, context=(99).to_bytes(8, "little")))
    assert [state.context for state in cluster[1].ready().read_states] == [b"now"]
    cluster.isolate(1)
    cluster[1].read_index(b"later")
    cluster.settle()
    assert cluster.hosts[1].read_states == []
    cluster[1].step(Message(M.HEARTBEAT_RESP, 1, 2, 1, context=b"not a number"))
    cluster[1].check()
