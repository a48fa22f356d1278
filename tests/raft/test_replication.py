"""How entries get everywhere and when they count (paper 5.3 and 5.4.2; thesis 3.8, 10.2.1; flow control)."""

import pytest

from shardkv.raft import DropReason, Inconsistent, ProgressState, ProposalDropped, RaftNode, Role, encode_conf_change
from shardkv.raft.election import CAMPAIGN_TRANSFER
from shardkv.raft.messages import APPLY_THREAD, Entry, EntryType, HardState, Message
from shardkv.raft.storage import ENTRY_OVERHEAD_BYTES, entries_bytes
from tests.raft.cluster import Cluster, M, after_write, change, fresh, led, sent, settings_for, stored


def test_a_leader_appends_and_sends_without_waiting_for_its_own_disk() -> None:
    """Paper 5.3; thesis 10.2.1: the leader may write its own log in parallel with replicating."""
    cluster = led()
    assert cluster[1].propose(b"x") == (1, 2)
    ready = cluster[1].ready()
    assert ready.entries == (Entry(1, 2, data=b"x"),)
    assert [(message.to, message.index, message.entries) for message in sent(ready, M.APP)] == [
        (2, 1, (Entry(1, 2, data=b"x"),)),
        (3, 1, (Entry(1, 2, data=b"x"),)),
    ]
    assert [(message.type, message.to) for message in after_write(ready)] == [
        (M.APP_RESP, 1),
        (M.STORAGE_APPEND_RESP, 1),
    ]


def test_trap_10_the_leader_counts_itself_only_when_its_disk_has_the_entry() -> None:
    """Thesis 10.2.1: an entry is committed when a majority has it on disk; the leader's own copy is no exception."""
    cluster = led()
    cluster.hosts[1].hold_writes = True
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    assert cluster[1].status().progress[2].match == 2
    assert cluster[1].committed == 1, "two of three have it, but the leader only in memory"
    cluster.hosts[1].write()
    assert cluster[1].committed == 2


@pytest.mark.parametrize(
    "voters,acknowledging,committed", [(1, 0, True), (3, 0, False), (3, 1, True), (5, 1, False), (5, 2, True)]
)
def test_an_entry_is_committed_by_a_majority(voters: int, acknowledging: int, committed: bool) -> None:
    """Paper 5.3: a log entry is committed once it is replicated on a majority of the servers."""
    cluster = led(voters)
    cluster.isolate(*range(2 + acknowledging, voters + 1))
    cluster[1].propose(b"x")
    cluster.settle()
    assert (cluster[1].committed == 2) is committed


def test_only_entries_of_the_leaders_own_term_are_committed_by_counting() -> None:
    """Paper 5.4.2 and figure 8: an entry of an earlier term on a majority may still be overwritten."""
    node = fresh(1, terms=[1, 2])
    node.campaign()
    for voter in (1, 2):
        node.step(Message(M.VOTE_RESP, 1, voter, 3))
    assert (node.role, node.last_index) == (Role.LEADER, 3)
    node.step(Message(M.APP_RESP, 1, 1, 3, index=2))
    node.step(Message(M.APP_RESP, 1, 2, 3, index=2))
    assert node.committed == 0
    node.step(Message(M.APP_RESP, 1, 1, 3, index=3))
    node.step(Message(M.APP_RESP, 1, 2, 3, index=3))
    assert node.committed == 3, "the entries before it are committed with it"


def test_followers_learn_what_is_committed_and_apply_it_in_order() -> None:
    """Paper 5.3: once a follower learns that an entry is committed, it applies it, in log order."""
    cluster = led()
    for value in (b"a", b"b", b"c"):
        cluster[1].propose(value)
    cluster.settle()
    assert [host.applied for host in cluster.hosts.values()] == [[b"a", b"b", b"c"]] * 3


def test_without_commit_broadcast_followers_learn_of_it_with_the_next_heartbeat() -> None:
    """The setting saves two messages a commit, and costs followers a heartbeat's time."""
    cluster = led(commit_broadcast=False)
    cluster[1].propose(b"x")
    cluster.settle()
    assert [host.applied for host in cluster.hosts.values()] == [[b"x"], [], []]
    cluster.tick(1)
    assert [host.applied for host in cluster.hosts.values()] == [[b"x"]] * 3


def test_a_commit_index_rides_with_what_is_written_anyway_or_waits_for_a_tick() -> None:
    """The setting saves a leader one record an entry. What a crash may forget need not be written at once."""
    cluster = led(commit_rides=True, commit_broadcast=False)
    leader, storage = cluster[1], cluster.hosts[1].storage
    written = leader.committed
    for _ in range(3):
        leader.propose(b"x")
        cluster.settle()
        assert storage.initial_state()[0].commit == written, "with the entry, as far as was known then"
        written = leader.committed
        assert not leader.has_ready()
    cluster.tick(1)
    assert storage.initial_state()[0].commit == leader.committed
    leader.propose(b"y")
    cluster.settle()
    assert storage.initial_state()[0].commit == leader.committed - 1, "one tick, one hand-out"


def test_a_commit_index_rides_with_a_vote() -> None:
    cluster = led(commit_rides=True, commit_broadcast=False)
    cluster[1].propose(b"x")
    cluster.settle()
    follower = cluster[2]
    follower.step(Message(M.APP, 2, 1, 1, 1, follower.last_index, commit=follower.last_index))
    assert follower.committed == follower.last_index
    follower.step(Message(M.VOTE, 2, 3, 9, 1, follower.last_index, context=CAMPAIGN_TRANSFER))
    assert follower.ready().hard_state == HardState(9, 3, follower.committed)


def test_a_commit_index_rides_again_after_a_vote_that_took_what_a_tick_has_found() -> None:
    node = fresh(2, commit_rides=True)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1), Entry(1, 2))))
    node.ready()
    node.step(Message(M.HEARTBEAT, 2, 1, 1, commit=1))
    node.tick()
    node.step(Message(M.VOTE, 2, 3, 9, 1, 2, context=CAMPAIGN_TRANSFER))
    assert node.ready().hard_state == HardState(9, 3, 1)
    node.step(Message(M.HEARTBEAT, 2, 3, 9, commit=2))
    assert node.ready().hard_state is None


def test_an_answer_to_an_append_waits_until_the_entries_are_on_disk() -> None:
    """Thesis 3.8: entries are persisted before they are acknowledged. Trap 10."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1, data=b"x"),)))
    ready = node.ready()
    assert not sent(ready, M.APP_RESP)
    assert [(answer.type, answer.index) for answer in after_write(ready) if answer.to == 1] == [(M.APP_RESP, 1)]


def test_only_what_is_committed_and_on_this_disk_is_applied() -> None:
    """DESIGN 4.2: only min(committed, locally persisted); else a crash could lose what was applied."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1), Entry(1, 2)), commit=2))
    ready = node.ready()
    assert (node.committed, ready.committed_entries) == (2, ())
    for response in after_write(ready):
        if response.to == 2:
            node.step(response)
    assert [entry.index for entry in node.ready().committed_entries] == [1, 2]


def test_what_is_committed_but_only_in_memory_waits_while_the_rest_is_applied() -> None:
    """DESIGN 4.2: the hand-out ends where the disk does, not where the commit index does."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1),)))
    answers = after_write(node.ready())
    node.step(Message(M.APP, 2, 1, 1, 1, 1, (Entry(1, 2),), 2))
    for response in answers:
        if response.to == 2:
            node.step(response)
    assert node.committed == 2
    assert [entry.index for entry in node.ready().committed_entries] == [1]


def test_an_append_from_before_the_commit_index_is_answered_with_it() -> None:
    """etcd-io/raft: what is committed agrees, so the log need not be asked; it may even be compacted there."""
    cluster = led()
    for _ in range(3):
        cluster[1].propose(b"x")
    cluster.settle()
    cluster.tick(1)
    host = cluster.hosts[2]
    host.compact()
    host.node.step(Message(M.APP, 2, 1, 1, 1, 1, (Entry(1, 2, data=b"x"),), 2))
    (answer,) = after_write(host.node.ready())
    assert (answer.reject, answer.index) == (False, 4)


def test_an_append_from_before_the_commit_index_vouches_for_nothing_behind_that() -> None:
    """What stands there may be another leader's, and would count for this one's."""
    node = fresh(2, terms=[1, 1, 1])
    node.step(Message(M.APP, 2, 1, 2, 1, 2, commit=2))
    node.ready()
    node.step(Message(M.APP, 2, 1, 2, 1, 1, commit=2))
    answers = [(message.reject, message.index) for message in after_write(node.ready()) if message.type is M.APP_RESP]
    assert answers == [(False, 2)]


def test_a_follower_refuses_entries_that_do_not_follow_its_log() -> None:
    """Paper 5.3: the consistency check on the preceding entry's index and term."""
    node = fresh(2, terms=[1, 1])
    node.step(Message(M.APP, 2, 1, 2, index=2, log_term=2, entries=(Entry(2, 3),)))
    (answer,) = after_write(node.ready())
    assert (answer.reject, answer.index, answer.reject_hint, answer.log_term) == (True, 2, 2, 1)
    assert node.last_index == 2


@pytest.mark.parametrize(
    "index,term,entries,expected",
    [
        (2, 2, [3], [1, 2, 3]),
        (1, 1, [3, 4], [1, 3, 4]),
        (0, 0, [1], [1, 2]),
        (0, 0, [3], [3]),
    ],
)
def test_a_follower_drops_its_own_entries_only_where_they_conflict(
    index: int, term: int, entries: list[int], expected: list[int]
) -> None:
    """Paper 5.3: conflicting entries are overwritten; an append that came late truncates nothing."""
    node = fresh(2, terms=[1, 2])
    new = tuple(Entry(own, index + at) for at, own in enumerate(entries, 1))
    node.step(Message(M.APP, 2, 1, 4, index=index, log_term=term, entries=new))
    assert [node.raft.log.term(at) for at in range(1, node.last_index + 1)] == expected


# Paper figure 7: the leader's log, and the followers' logs that may meet it.
LEADER = [1, 1, 1, 4, 4, 5, 5, 6, 6, 6]
FOLLOWERS = {
    "missing one": [1, 1, 1, 4, 4, 5, 5, 6, 6],
    "missing many": [1, 1, 1, 4],
    "one extra": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
    "a later term extra": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
    "missing and extra": [1, 1, 1, 4, 4, 4, 4],
    "long ago": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
}


@pytest.mark.parametrize("follower", FOLLOWERS.values(), ids=FOLLOWERS.keys())
def test_a_leader_brings_every_log_in_line_with_its_own(follower: list[int]) -> None:
    """Paper 5.3 and figure 7; a probe for each term at most, not for each entry (end of 5.3)."""
    cluster = Cluster(3)
    for id_, terms in ((1, LEADER), (2, follower), (3, LEADER)):
        host = cluster.hosts[id_]
        host.storage.append(tuple(Entry(term, index) for index, term in enumerate(terms, 1)))
        host.storage.set_hard_state(host.storage.hard_state._replace(term=7))
        host.restart()
    cluster.elect(1)
    cluster.tick(1, count=3)
    assert cluster.hosts[2].logged() == cluster.hosts[1].logged()


def test_a_long_divergent_tail_is_found_in_one_probe_a_term() -> None:
    """Paper end of 5.3: a rejection names a term, so that one round suffices for each conflicting term."""
    cluster = Cluster(3)
    shared = [1] * 10
    for id_, tail in ((1, [3] * 200), (2, [2] * 300), (3, [3] * 200)):
        host = cluster.hosts[id_]
        host.storage.append(tuple(Entry(term, index) for index, term in enumerate(shared + tail, 1)))
        host.storage.set_hard_state(host.storage.hard_state._replace(term=3))
        host.restart()
    probes = 0

    def count(message: Message) -> bool:
        nonlocal probes
        probes += message.type is M.APP_RESP and message.reject
        return False

    cluster.dropped = count
    cluster.elect(1)
    assert cluster.hosts[2].logged() == cluster.hosts[1].logged()
    assert probes <= 2


def test_trap_10_an_acknowledgement_of_overwritten_entries_does_not_count() -> None:
    """The ABA race of asynchronous log writes (etcd-io/raft, newStorageAppendResp).

    Entries are written, overwritten and written again the same. When the first write is reported, the second, which
    brings other entries, is still under way.
    """
    node = fresh(1, voters=5)
    first = (Entry(1, 1, data=b"first"),)
    node.step(Message(M.APP, 1, 2, 1, entries=first))
    stale = [answer for answer in after_write(node.ready()) if answer.type is M.STORAGE_APPEND_RESP]
    node.step(Message(M.APP, 1, 3, 2, entries=(Entry(2, 1, data=b"other"),)))
    node.ready()
    node.step(Message(M.APP, 1, 2, 3, entries=first, commit=1))
    ready = node.ready()
    assert ready.committed_entries == ()
    node.step(stale[0])
    assert not node.has_ready(), "a write that may still be overwritten was taken as done"
    assert node.raft.log.stable == 0
    for answer in after_write(ready):
        if answer.type is M.STORAGE_APPEND_RESP:
            node.step(answer)
    assert node.ready().committed_entries == first


def test_trap_10_an_acknowledgement_names_the_entry_that_it_is_for() -> None:
    """The same race within one term: entries of an earlier term are overwritten while their write is reported."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1),)))
    node.step(Message(M.HEARTBEAT, 2, 3, 2))
    late = [answer for answer in after_write(node.ready()) if answer.type is M.STORAGE_APPEND_RESP]
    node.step(Message(M.APP, 2, 3, 2, entries=(Entry(2, 1),)))
    assert [answer.term for answer in late] == [node.term]
    node.step(late[0])
    assert node.raft.log.stable == 0


def test_entries_stay_in_memory_while_their_write_is_not_acknowledged() -> None:
    """With synchronous writes entries are applied in the same step; a change of term may drop the acknowledgement."""
    node = fresh(2, async_storage_writes=False)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1),), commit=1))
    node.ready()
    node.step(Message(M.HEARTBEAT, 2, 3, 2))
    node.advance()
    assert (node.applied, node.raft.log.stable) == (1, 0)
    assert node.raft.log.tail == [Entry(1, 1)]
    node.check()


def test_an_acknowledgement_lost_to_a_change_of_term_is_made_up_for() -> None:
    """etcd-io/raft: every storage message acknowledges the log as it is, else the entries would stay in memory."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1),)))
    node.ready()
    node.step(Message(M.VOTE, 2, 3, 2, index=5, log_term=1))
    answers = after_write(node.ready())
    node.step(answers[-1])
    assert (answers[-1].type, node.raft.log.stable) == (M.STORAGE_APPEND_RESP, 1)


def test_a_heartbeat_never_commits_what_the_follower_may_not_have() -> None:
    """etcd-io/raft: a heartbeat carries min(match, commit), for what lies behind the match may be something else."""
    cluster = led()
    cluster.isolate(3)
    cluster[1].propose(b"x")
    cluster.settle()
    assert cluster[1].committed == 2
    cluster[1].tick()
    heartbeats = sent(cluster[1].ready(), M.HEARTBEAT)
    assert {message.to: message.commit for message in heartbeats} == {2: 2, 3: 1}


@pytest.mark.parametrize("entries", [(), (Entry(1, 1),)], ids=["none", "one that is there"])
def test_an_append_commits_nothing_behind_what_it_shows_to_agree(entries: tuple[Entry, ...]) -> None:
    """Paper figure 2: no further than the last new entry. What a follower has behind it may be another leader's."""
    node = fresh(2, terms=[1, 1, 1])
    node.step(Message(M.APP, 2, 1, 2, 1 if not entries else 0, 1 - len(entries), entries, commit=3))
    assert (node.last_index, node.committed) == (3, 1)


def test_a_commit_past_the_end_of_the_log_is_reported_not_followed() -> None:
    """Trap 24: a replica whose log was lost must not go on as if nothing had happened."""
    node = fresh(2)
    with pytest.raises(Inconsistent, match="was it lost"):
        node.step(Message(M.HEARTBEAT, 2, 1, 1, commit=5))


def test_entries_that_would_overwrite_a_committed_one_are_reported() -> None:
    """Paper figure 3: state machine safety; two leaders of one group would have to exist."""
    node = fresh(2)
    node.step(Message(M.APP, 2, 1, 1, entries=(Entry(1, 1), Entry(1, 2)), commit=1))
    with pytest.raises(Inconsistent, match="overwrite"):
        node.raft.log.append((Entry(2, 1),))


def test_trap_20_a_replica_that_starts_hands_out_nothing_that_its_host_has_applied() -> None:
    """A membership change among it would be made to a configuration that has it already."""
    node = RaftNode(settings_for(2), stored([1, 1, 1], HardState(1, 0, 3)), applied=2)
    assert (node.applied, node.committed) == (2, 3)
    (work,) = [message for message in node.ready().messages if message.to == APPLY_THREAD]
    assert work.entries == (Entry(1, 3),)


@pytest.mark.parametrize(
    "commit,applied",
    [pytest.param(4, 0, id="commit past the end"), pytest.param(3, 4, id="applied more than is committed")],
)
def test_trap_24_a_start_from_storage_that_contradicts_itself_is_refused(commit: int, applied: int) -> None:
    """What was committed here was lost, or is another log's: the replica must not go on as if nothing had happened."""
    with pytest.raises(Inconsistent):
        RaftNode(settings_for(2), stored([1, 1, 1], HardState(1, 0, commit)), applied=applied)


def test_trap_24_a_start_with_less_committed_than_compacted_is_refused() -> None:
    """Only what is committed is ever compacted, so the hard state is an old one: its term and vote are, too."""
    storage = stored([1, 1, 1], HardState(1, 0, 1))
    storage.compact(2)
    with pytest.raises(Inconsistent, match="commit 1"):
        RaftNode(settings_for(2), storage)


# Flow control.


def test_a_probed_follower_is_sent_one_append_at_a_time() -> None:
    """etcd-io/raft, StateProbe: where its log ends is not known, so more would be wasted."""
    node = fresh(1)
    node.campaign()
    node.step(Message(M.VOTE_RESP, 1, 1, 1))
    node.step(Message(M.VOTE_RESP, 1, 2, 1))
    assert len(sent(node.ready(), M.APP)) == 2
    for _ in range(5):
        node.propose(b"x")
    assert not sent(node.ready(), M.APP)
    node.step(Message(M.HEARTBEAT_RESP, 1, 2, 1))
    assert [message.to for message in sent(node.ready(), M.APP)] == [2]


def test_a_follower_that_answers_heartbeats_alone_is_sent_entries_less_often_each_time() -> None:
    """Its disk is full, say: it drops what it is sent, up to a megabyte with each answer to a heartbeat."""
    node = fresh(1, terms=[1], probe_heartbeats_max=16)
    node.campaign()
    node.step(Message(M.VOTE_RESP, 1, 1, 2))
    node.step(Message(M.VOTE_RESP, 1, 2, 2))
    node.ready()

    def waits(count: int) -> list[int]:
        """How many heartbeats it answers each time until it is sent something."""
        answered, found = 0, []
        while len(found) < count:
            node.step(Message(M.HEARTBEAT_RESP, 1, 2, 2))
            answered += 1
            if sent(node.ready(), M.APP):
                found.append(answered)
                answered = 0
        return found

    assert waits(7) == [1, 2, 4, 8, 16, 16, 16]
    node.propose(b"x")
    assert not sent(node.ready(), M.APP), "nor is it by the way"
    node.step(Message(M.APP_RESP, 1, 2, 2, index=1, reject=True))
    node.ready()
    assert waits(3) == [1, 2, 4], "an answer to an append shows that it takes some"
    node.report_unreachable(2)
    assert waits(3) == [1, 1, 2], "what is known to be lost says nothing"


def test_a_follower_that_refuses_what_it_acknowledged_is_asked_once_a_heartbeat() -> None:
    """Its log contradicts what it said, so nothing further down is left to try: the same append would be refused again.

    The two would go on exchanging it for ever, as fast as the network lets them.
    """
    cluster = led()
    cluster.isolate(3)
    leader = cluster[1]
    leader.propose(b"x")
    cluster.settle()
    match = leader.status().progress[2].match
    assert match == leader.last_index
    cluster.isolate(2, 3)
    leader.propose(b"y")
    assert [message.index for message in sent(leader.ready(), M.APP) if message.to == 2] == [match]
    refusal = Message(M.APP_RESP, 1, 2, leader.term, index=match + 1, reject=True, reject_hint=match - 1, log_term=1)
    leader.step(refusal)
    assert [message.index for message in sent(leader.ready(), M.APP) if message.to == 2] == [match]
    refusal.index = match
    for heartbeats in range(3):
        leader.step(refusal)
        assert not sent(leader.ready(), M.APP), f"after {heartbeats} heartbeats"
        leader.step(Message(M.HEARTBEAT_RESP, 1, 2, leader.term))
        assert [message.index for message in sent(leader.ready(), M.APP) if message.to == 2] == [match]
    leader.step(Message(M.APP_RESP, 1, 2, leader.term, index=match + 1))
    assert leader.status().progress[2].state is ProgressState.REPLICATE


def test_the_window_is_bounded_in_messages() -> None:
    """A follower that does not answer is sent no more than ``inflight_messages_max`` appends."""
    cluster = led(inflight_messages_max=4)
    cluster.dropped = lambda message: message.to == 3
    for _ in range(20):
        cluster[1].propose(b"x")
    assert len([message for message in sent(cluster[1].ready(), M.APP) if message.to == 3]) == 4
    assert cluster[1].status().progress[3].inflight_full


def test_the_window_is_bounded_in_bytes() -> None:
    """The append that crosses the bound still goes; the next one waits."""
    cluster = led(inflight_bytes_max=1000, message_bytes_max=1000)
    cluster.dropped = lambda message: message.to == 3
    for _ in range(20):
        cluster[1].propose(b"x" * 300)
    assert len([message for message in sent(cluster[1].ready(), M.APP) if message.to == 3]) == 4
    assert cluster[1].status().progress[3].inflight_bytes == 1200


def test_a_full_window_recovers_after_everything_in_it_was_lost() -> None:
    """etcd-io/raft: a heartbeat answer lets an empty append through, whose answer frees the window."""
    cluster = led(inflight_messages_max=2)
    cluster.dropped = lambda message: message.to == 3
    for value in (b"a", b"b", b"c", b"d"):
        cluster[1].propose(value)
    cluster.settle()
    assert cluster[1].status().progress[3].paused
    cluster.dropped = lambda message: False
    cluster.tick(1, count=3)
    assert cluster.hosts[3].applied == [b"a", b"b", b"c", b"d"]


def test_an_append_is_bounded_in_bytes_but_never_empty() -> None:
    """``message_bytes_max`` cuts a long log into messages; an entry larger than that goes alone."""
    size = 100 + ENTRY_OVERHEAD_BYTES
    cluster = led(message_bytes_max=2 * size)
    cluster.isolate(3)
    for _ in range(6):
        cluster[1].propose(b"x" * 100)
    cluster[1].propose(b"y" * 1000)
    cluster.settle()
    cluster.heal()
    sizes: list[int] = []

    def note(message: Message) -> bool:
        if message.type is M.APP and message.to == 3 and message.entries:
            sizes.append(entries_bytes(message.entries))
        return False

    cluster.dropped = note
    cluster[1].report_unreachable(3)
    cluster.tick(1, count=2)
    assert sizes == [2 * size, 2 * size, 2 * size, 1000 + ENTRY_OVERHEAD_BYTES]
    assert cluster.hosts[3].node.last_index == cluster[1].last_index


def test_what_is_handed_out_to_be_applied_is_bounded_across_readys() -> None:
    """``committed_bytes_per_ready_max`` counts everything out and not yet acknowledged, as in etcd."""
    size = 100 + ENTRY_OVERHEAD_BYTES
    node = fresh(2, committed_bytes_per_ready_max=2 * size + 10)
    entries = tuple(Entry(1, index, data=b"x" * 100) for index in range(1, 6))
    node.step(Message(M.APP, 2, 1, 1, entries=entries, commit=5))
    for answer in after_write(node.ready()):
        if answer.to == 2:
            node.step(answer)
    applied = []
    while node.has_ready():
        ready = node.ready()
        applied.append([entry.index for entry in ready.committed_entries])
        assert not node.has_ready()
        for work in sent(ready, M.STORAGE_APPLY):
            node.step(work.responses[0])
    assert applied == [[1, 2], [3, 4], [5]]


def test_proposals_are_dropped_when_too_much_is_uncommitted() -> None:
    """``uncommitted_bytes_max`` keeps the log from growing without bound when a quorum is away (etcd #9985)."""
    cluster = led(uncommitted_bytes_max=250)
    cluster.isolate(1)
    cluster[1].propose(b"x" * 100)
    cluster[1].propose(b"x" * 100)
    with pytest.raises(ProposalDropped) as caught:
        cluster[1].propose(b"x" * 100)
    assert caught.value.reason is DropReason.UNCOMMITTED_LIMIT
    cluster[1].propose(b"")
    cluster.heal()
    cluster.tick(1, count=3)
    assert cluster[1].propose(b"x" * 100) == (1, 5)


def test_a_membership_change_that_was_dropped_for_want_of_room_bars_no_other() -> None:
    """Trap 9 bars changes while one may be under way. In a group at rest that would have been for ever."""
    cluster = led(uncommitted_bytes_max=10)
    cluster[1].propose(b"x" * 10)
    with pytest.raises(ProposalDropped) as caught:
        cluster[1].propose_conf_change(change("l4"))
    assert caught.value.reason is DropReason.UNCOMMITTED_LIMIT
    entry = Entry(0, 0, EntryType.CONF_CHANGE_V2, encode_conf_change(change("l4")))
    with pytest.raises(ProposalDropped):
        cluster[1].step(Message(M.PROP, 1, 2, entries=(entry,)))
    cluster.settle()
    assert cluster[1].propose_conf_change(change("l4")) == (1, 3)


def test_what_has_no_data_is_taken_however_much_is_uncommitted() -> None:
    """Leaving a joint configuration must go in, though one entry was larger than the bound."""
    cluster = led(uncommitted_bytes_max=10)
    cluster.isolate(1)
    cluster[1].propose(b"x" * 100)
    assert cluster[1].propose(b"") == (1, 3)


def test_a_proposal_larger_than_the_bound_is_taken_when_nothing_else_waits() -> None:
    """etcd-io/raft: else it could never be proposed."""
    cluster = led(uncommitted_bytes_max=10)
    assert cluster[1].propose(b"x" * 100) == (1, 2)


@pytest.mark.parametrize(
    "prepare,reason",
    [
        (lambda cluster: cluster[2], DropReason.NOT_LEADER),
        (lambda cluster: Cluster()[2], DropReason.NO_LEADER),
        (lambda cluster: (cluster.isolate(3), cluster[1].transfer_leader(3), cluster[1])[-1], DropReason.TRANSFERRING),
    ],
)
def test_a_dropped_proposal_says_why(prepare: object, reason: DropReason) -> None:
    """What the host tells its client depends on it; in every case nothing was appended."""
    cluster = led(disable_proposal_forwarding=True)
    node = prepare(cluster)  # type: ignore[operator]
    before = node.last_index
    with pytest.raises(ProposalDropped) as caught:
        node.propose(b"x")
    assert caught.value.reason is reason
    assert node.last_index == before


def test_a_follower_passes_a_proposal_on_when_it_may() -> None:
    """etcd-io/raft: forwarding is on unless it is disabled; where it ends up is not known then."""
    cluster = led()
    assert cluster[2].propose(b"x") == (1, 0)
    cluster.settle()
    assert cluster.hosts[2].applied == [b"x"]


def test_an_unreachable_follower_is_probed_again() -> None:
    """etcd-io/raft, MsgUnreachable: what was in flight to it is probably lost."""
    cluster = led()
    assert cluster[1].status().progress[2].state is ProgressState.REPLICATE
    cluster[1].report_unreachable(2)
    assert cluster[1].status().progress[2].state is ProgressState.PROBE
    cluster.tick(1)
    assert cluster[1].status().progress[2].state is ProgressState.REPLICATE


def test_entries_leave_memory_when_they_are_written_and_applied() -> None:
    """The entry cache is bounded by what is under way, not by the length of the log."""
    cluster = led()
    for _ in range(50):
        cluster[1].propose(b"x")
    assert len(cluster[1].raft.log.tail) == 50
    cluster.settle()
    assert [len(host.node.raft.log.tail) for host in cluster.hosts.values()] == [0, 0, 0]


def test_synchronous_writes_give_the_same_result() -> None:
    """Both ways of storage stand behind the same rules; transcripts mostly use the synchronous one."""
    cluster = led(async_storage_writes=False)
    for value in (b"a", b"b"):
        cluster[1].propose(value)
    cluster.settle()
    assert [host.applied for host in cluster.hosts.values()] == [[b"a", b"b"]] * 3


def test_local_messages_are_not_taken_from_the_network() -> None:
    """etcd-io/raft, RawNode.Step: a peer cannot make us campaign, nor say that our disk is done."""
    node = fresh(1)
    node.step(Message(M.HUP, 1, 2))
    node.step(Message(M.STORAGE_APPLY_RESP, 1, 2, entries=(Entry(1, 1),)))
    assert (node.role, node.applied) == (Role.FOLLOWER, 0)
    node.step(Message(M.VOTE_RESP, 1, 99, 5))
    assert node.term == 0, "an answer from a stranger"


def test_acknowledged_entries_alone_show_a_leader_that_it_has_a_quorum() -> None:
    """Thesis 6.2: a leader steps down when it hears of no quorum, whatever it is that it hears."""
    cluster = Cluster(check_quorum=True)
    cluster.elect(1)
    cluster.dropped = lambda message: message.type is M.HEARTBEAT_RESP
    for _ in range(50):
        cluster[1].propose(b"x")
        cluster.tick(1)
    assert cluster.leaders() == [1]
