"""How the members of a group change (thesis 4; trap 9). The conformance suite has the tables of single changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.raft import DropReason, InvalidConfChange, ProposalDropped, Role, decode_conf_change, encode_conf_change
from shardkv.raft.membership import Changer, check_configuration
from shardkv.raft.messages import (
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfState,
    Entry,
    EntryType,
    Message,
)
from tests.raft.cluster import Cluster, M, change, led, single

EXPLICIT = ConfChangeTransition.JOINT_EXPLICIT
LEAVE = ConfChange()


def refusal(cluster: Cluster, wanted: ConfChange) -> DropReason:
    with pytest.raises(ProposalDropped) as caught:
        cluster[1].propose_conf_change(wanted)
    return caught.value.reason


conf_changes = st.builds(
    ConfChange,
    st.lists(st.builds(ConfChangeSingle, st.sampled_from(ConfChangeType), st.integers(0, (1 << 64) - 1))).map(tuple),
    st.sampled_from(ConfChangeTransition),
    st.binary(),
)


@given(conf_changes)
def test_a_change_survives_its_encoding(wanted: ConfChange) -> None:
    """The entry's data is ours to define; the change that leaves is no bytes, so that it is never too large."""
    assert decode_conf_change(encode_conf_change(wanted)) == wanted
    assert encode_conf_change(LEAVE) == b""


@pytest.mark.parametrize("cut", [1, 9, 10, 18])
def test_a_change_that_was_cut_short_is_refused(cut: int) -> None:
    """Also where a part of it ends: what is left would be another change."""
    data = encode_conf_change(change("v4 r3"))
    with pytest.raises(InvalidConfChange):
        decode_conf_change(data[:-cut])


@given(st.binary(min_size=1))
def test_what_is_no_change_is_refused(data: bytes) -> None:
    """Bytes from elsewhere either decode to what encodes to them, or are refused; nothing else escapes."""
    try:
        decoded = decode_conf_change(data)
    except InvalidConfChange:
        return
    assert decode_conf_change(encode_conf_change(decoded)) == decoded


def test_a_voter_is_added_and_brought_up_to_date() -> None:
    """Thesis 4.1: one server at a time."""
    cluster = led()
    cluster[1].propose(b"before")
    cluster.add(4)
    cluster[1].propose_conf_change(change("v4"))
    cluster.tick(1, count=3)
    cluster[1].propose(b"after")
    cluster.settle()
    assert cluster[1].configuration.voters == (1, 2, 3, 4)
    assert cluster.hosts[4].applied == [b"before", b"after"]
    assert cluster[4].configuration == cluster[1].configuration


def test_a_learner_gets_everything_and_decides_nothing() -> None:
    """Thesis 4.2.1: a non-voting member is caught up without being counted."""
    cluster = led(voters=2)
    cluster.add(3)
    cluster[1].propose_conf_change(change("l3"))
    cluster.tick(1, count=3)
    cluster.isolate(2)
    cluster[1].propose(b"x")
    cluster.settle()
    assert cluster[1].status().progress[3].match == cluster[1].last_index
    assert cluster[1].committed < cluster[1].last_index, "a learner made up the majority"
    cluster.heal()
    cluster.tick(1, count=2)
    assert cluster.hosts[3].applied == [b"x"]


def test_trap_09_no_second_change_before_the_first_is_applied() -> None:
    """Two at once could have majorities that do not meet (thesis 4.1)."""
    cluster = led()
    cluster[1].propose_conf_change(change("l4"))
    assert refusal(cluster, change("l5")) is DropReason.CHANGE_PENDING
    cluster.settle()
    cluster[1].propose_conf_change(change("l5"))
    cluster.settle()
    assert cluster[1].configuration.learners == (4, 5)


def test_trap_09_a_second_change_that_comes_as_a_message_becomes_an_empty_entry() -> None:
    """etcd-io/raft: the same rule for proposals that were passed on."""
    cluster = led()
    for text in ("l4", "l5"):
        entry = Entry(0, 0, EntryType.CONF_CHANGE_V2, encode_conf_change(change(text)))
        cluster[1].step(Message(M.PROP, 1, 2, entries=(entry,)))
    cluster.settle()
    assert cluster[1].configuration.learners == (4,)
    assert cluster[1].last_index == 3


def test_trap_09_no_change_before_the_terms_first_entry_is_committed() -> None:
    """Ongaro's bug report of 2015: a new leader may not know of a change that was committed before it."""
    cluster = led()
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.tick(1)
    cluster.isolate(1)
    cluster[2].campaign()
    for _ in range(3):
        cluster.process_all()
        votes = [message for message in cluster.messages if message.type in (M.VOTE, M.VOTE_RESP)]
        cluster.messages.clear()
        for vote in votes:
            cluster.deliver(vote)
    assert cluster[2].role is Role.LEADER
    assert cluster[2].applied == 2
    with pytest.raises(ProposalDropped) as caught:
        cluster[2].propose_conf_change(change("l4"))
    assert caught.value.reason is DropReason.TERM_NOT_COMMITTED


def test_a_new_leader_waits_for_changes_that_may_stand_in_its_log() -> None:
    """etcd-io/raft, becomeLeader: everything before its term counts as a change that is not applied."""
    cluster = led()
    host = cluster.hosts[1]
    host.hold_writes = True
    assert host.node.raft.pending_conf_index == 0
    cluster[1].propose(b"x")
    cluster.settle()
    cluster.elect(2)
    assert cluster[2].raft.pending_conf_index == 2


@pytest.mark.parametrize("joint,wanted,reason", [(True, "v9", DropReason.JOINT), (False, "", DropReason.NOT_JOINT)])
def test_a_change_that_does_not_fit_is_refused(joint: bool, wanted: str, reason: DropReason) -> None:
    """Thesis 4.3: out of a joint configuration leads only leaving it."""
    cluster = led()
    if joint:
        cluster[1].propose_conf_change(change("l4", EXPLICIT))
        cluster.settle()
    assert refusal(cluster, change(wanted)) is reason


def test_a_joint_configuration_needs_both_majorities_to_commit() -> None:
    """Thesis 4.3: agreement requires separate majorities from both the old and the new configuration."""
    cluster = led()
    for id_ in (4, 5, 6):
        cluster.add(id_)
    cluster[1].propose_conf_change(change("v4 v5 v6 r2 r3", EXPLICIT))
    cluster.tick(1, count=3)
    configuration = cluster[1].configuration
    assert (configuration.voters, configuration.voters_outgoing) == ((1, 4, 5, 6), (1, 2, 3))
    committed = cluster[1].committed
    for away in ((2, 3), (4, 5)):
        cluster.heal()
        cluster.tick(1, count=2)
        committed = cluster[1].committed
        cluster.isolate(*away)
        cluster[1].propose(b"x")
        cluster.settle()
        assert cluster[1].committed == committed, f"committed without {away}"
    cluster.heal()
    cluster.tick(1, count=2)
    assert cluster[1].committed == cluster[1].last_index


def test_a_joint_configuration_needs_both_majorities_to_elect() -> None:
    """Thesis 4.3: the same for elections."""
    cluster = led()
    for id_ in (4, 5):
        cluster.add(id_)
    cluster[1].propose_conf_change(change("v4 v5 r2 r3", EXPLICIT))
    cluster.tick(1, count=3)
    cluster.isolate(1, 4, 5)
    cluster[4].campaign()
    cluster.settle()
    assert cluster[4].role is not Role.LEADER
    cluster.heal()
    cluster.elect(4)


@pytest.mark.parametrize("away", [(2, 3), (4, 5)])
def test_a_joint_configuration_needs_both_majorities_to_go_on_leading(away: tuple[int, int]) -> None:
    """Thesis 6.2: a leader that can commit nothing must not keep its clients."""
    cluster = led(check_quorum=True)
    for id_ in (4, 5):
        cluster.add(id_)
    cluster[1].propose_conf_change(change("v4 v5 r2 r3", EXPLICIT))
    cluster.tick(1, count=3)
    assert cluster[1].configuration == ConfState((1, 4, 5), (), (1, 2, 3))
    ticks = 2 * cluster[1].raft.settings.election_ticks
    cluster.tick(1, count=ticks)
    assert cluster[1].role is Role.LEADER
    cluster.isolate(*away)
    cluster.tick(1, count=ticks)
    assert cluster[1].role is Role.FOLLOWER


def test_new_voters_that_were_not_heard_of_yet_do_not_depose_the_leader() -> None:
    """The quorum may be checked in the next moment."""
    cluster = led(1, check_quorum=True)
    ticks = cluster[1].raft.settings.election_ticks
    cluster.tick(1, count=ticks - 1 - cluster[1].raft.election_elapsed)
    cluster[1].propose_conf_change(change("v2 v3", EXPLICIT))
    cluster.settle()
    assert cluster[1].configuration == ConfState((1, 2, 3), (), (1,))
    cluster.tick(1)
    assert (cluster[1].role, cluster[1].raft.election_elapsed) == (Role.LEADER, 0)
    cluster.tick(1, count=ticks)
    assert cluster[1].role is Role.FOLLOWER


def test_a_joint_configuration_needs_both_majorities_to_read() -> None:
    """Thesis 6.4: also where the leader is to be alone, it is not yet."""
    cluster = led()
    cluster[1].propose_conf_change(change("r2 r3", EXPLICIT))
    cluster.tick(1, count=3)
    assert cluster[1].configuration == ConfState((1,), (), (1, 2, 3))
    cluster.isolate(1)
    cluster[1].read_index(b"r")
    cluster.tick(1, count=3)
    assert cluster.hosts[1].read_states == []
    cluster.heal()
    cluster.tick(1, count=2)
    assert [state.context for state in cluster.hosts[1].read_states] == [b"r"]


def test_a_change_of_many_members_leaves_by_itself_when_it_is_applied() -> None:
    """Thesis 4.3: once C_old,new is committed the leader proposes C_new."""
    cluster = led()
    cluster.add(4)
    cluster[1].propose_conf_change(change("v4 r3"))
    cluster.tick(1, count=4)
    assert cluster[1].configuration == ConfState((1, 2, 4))
    assert cluster[4].configuration == ConfState((1, 2, 4))


def test_a_joint_configuration_is_left_after_a_transfer_that_failed() -> None:
    """Meanwhile the change that leaves was refused, and a group at rest applies nothing that tries again."""
    cluster = led()
    cluster.add(4)
    cluster.isolate(2)
    cluster[1].propose_conf_change(change("v4 r3"))
    cluster[1].transfer_leader(2)
    cluster.settle()
    assert cluster[1].configuration.auto_leave
    cluster.heal()
    cluster.dropped = lambda message: message.type is M.TIMEOUT_NOW
    cluster.tick(1, count=2 * cluster[1].raft.settings.election_ticks)
    assert (cluster[1].role, cluster[1].transferee) == (Role.LEADER, 0)
    assert cluster[1].configuration == cluster[4].configuration == ConfState((1, 2, 4))


def test_to_leave_a_joint_configuration_is_proposed_once() -> None:
    """Else the log would grow with each tick for as long as no quorum answers."""
    cluster = led()
    cluster.add(4)
    cluster.dropped = lambda message: (
        any(entry.type is not EntryType.NORMAL for entry in message.entries[1:])
        or any(not entry.data and entry.type is not EntryType.NORMAL for entry in message.entries)
    )
    cluster[1].propose_conf_change(change("v4 r3"))
    cluster.tick(1, count=2)
    assert cluster[1].configuration.auto_leave
    last = cluster[1].last_index
    cluster.tick(1, count=20)
    assert cluster[1].last_index == last
    cluster.dropped = lambda message: False
    cluster.tick(1, count=4)
    assert cluster[1].configuration == ConfState((1, 2, 4))


def test_a_change_with_explicit_transition_leaves_when_it_is_told_to() -> None:
    """etcd-io/raft: the host may want to do something while both configurations stand."""
    cluster = led()
    cluster[1].propose_conf_change(change("l3", EXPLICIT))
    cluster.tick(1, count=4)
    assert cluster[1].configuration == ConfState((1, 2), (), (1, 2, 3), (3,))
    cluster[1].propose_conf_change(LEAVE)
    cluster.tick(1, count=2)
    assert cluster[1].configuration == ConfState((1, 2), (3,))
    assert cluster[3].raft.progress[3].is_learner


def test_a_group_that_starts_joint_goes_on_from_there() -> None:
    """The configuration is part of what a restart or a snapshot brings back."""
    cluster = led()
    cluster[1].propose_conf_change(change("l3", EXPLICIT))
    cluster.tick(1, count=4)
    host = cluster.hosts[2]
    host.compact()
    host.crash()
    host.restart()
    assert host.node.configuration == cluster[1].configuration
    assert host.node.raft.progress[3].is_learner is False


def test_trap_09_a_removed_leader_steps_down_after_the_commit_not_before() -> None:
    """Thesis 4.2.2: it leads a group that it does not belong to until its removal is committed."""
    cluster = led(step_down_on_removal=True)
    cluster.isolate(1)
    cluster[1].propose_conf_change(change("r1"))
    cluster.settle()
    assert cluster[1].role is Role.LEADER
    cluster.heal()
    cluster.tick(1, count=2)
    assert (cluster[1].role, cluster[1].configuration.voters) == (Role.FOLLOWER, (2, 3))
    cluster.elect(2)
    cluster[1].campaign()
    assert cluster[1].role is Role.FOLLOWER


def test_a_removed_leader_that_goes_on_takes_no_proposals() -> None:
    """etcd-io/raft: without ``step_down_on_removal`` it leads until another is elected, but adds nothing."""
    cluster = led()
    cluster[1].propose_conf_change(change("r1"))
    cluster.settle()
    assert cluster[1].role is Role.LEADER
    with pytest.raises(ProposalDropped) as caught:
        cluster[1].propose(b"x")
    assert caught.value.reason is DropReason.NOT_A_MEMBER


def test_removing_a_voter_may_commit_what_waited_for_it() -> None:
    """A smaller majority: the change itself can complete what it was proposed behind."""
    cluster = led(voters=2)
    cluster[1].propose_conf_change(change("r2"))
    cluster[1].propose(b"x")
    cluster.dropped = lambda message: message.type is M.APP and message.index >= 2
    cluster.settle()
    assert cluster[1].configuration.voters == (1,)
    assert cluster.hosts[1].applied == [b"x"]


def test_a_transfer_to_a_member_that_is_removed_is_given_up() -> None:
    """It could never succeed, and proposals would wait for it."""
    cluster = led()
    cluster[1].propose_conf_change(change("r3"))
    cluster.isolate(3)
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster[1].transferee == 0


def test_a_change_that_does_not_apply_changes_nothing() -> None:
    """The host may carry on, or stop the replica; half a change would be the worst."""
    cluster = led()
    before = (cluster[1].configuration, cluster[1].raft.progress)
    for wanted in (LEAVE, change("r1 r2 r3")):
        with pytest.raises(InvalidConfChange):
            cluster[1].apply_conf_change(wanted)
        assert (cluster[1].configuration, cluster[1].raft.progress) == before
    cluster[1].check()


members = st.lists(st.integers(1, 6), unique=True, min_size=1, max_size=5)
letters = st.sampled_from("vlr")
parts = st.lists(st.tuples(letters, st.integers(1, 6)), max_size=4)
taken = st.lists(st.tuples(st.sampled_from(["simple", "joint", "leave"]), parts))


@given(members, taken)
def test_every_sequence_of_changes_keeps_the_invariants(
    start: list[int], steps: list[tuple[str, list[tuple[str, int]]]]
) -> None:
    """etcd-io/raft, confchange quick tests: valid changes lead to valid configurations, others change nothing."""
    changer = Changer(last_index=5, inflight_limits=(10, 1000))
    changer.restore(ConfState(tuple(start)))
    for kind, wanted in steps:
        singles = [single(f"{letter}{id_}") for letter, id_ in wanted]
        before, progress = changer.configuration, changer.progress
        try:
            if kind == "simple":
                changer.simple(singles)
            elif kind == "joint":
                changer.enter_joint(singles, auto_leave=True)
            else:
                changer.leave_joint()
        except InvalidConfChange:
            assert (changer.configuration, changer.progress) == (before, progress)
        after = changer.configuration
        check_configuration(after, changer.progress)
        assert after.voters, "nobody is left to decide"
        if kind == "simple":
            assert len(set(before.voters) ^ set(after.voters)) <= 1
        again = Changer(last_index=5, inflight_limits=(10, 1000))
        again.restore(after)
        assert again.configuration == after


def test_everybody_knows_of_a_change_as_soon_as_it_is_committed() -> None:
    """A replica acts by what it has applied: while it takes the joint configuration to be in force, it asks for the old
    one's votes, too, and these may be those of one node that has just died."""
    cluster = led(commit_broadcast=False)
    cluster[1].propose_conf_change(change("l2 l3"))
    cluster.settle()
    for host in cluster.hosts.values():
        configuration = host.node.configuration
        assert (set(configuration.voters), set(configuration.voters_outgoing)) == ({1}, set())
