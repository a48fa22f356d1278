"""Thrift: who is sent an entry at once, who later, and that nobody is forgotten."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from shardkv.raft import ProgressState, RaftNode, Role
from shardkv.raft.messages import ConfChange, ConfChangeTransition
from shardkv.raft.settings import UNBOUNDED
from shardkv.raft.thrift import HELD_BYTES_MAX, RACES_LOST_MAX
from tests.raft.cluster import Cluster, M, change, settings_for

ENTRIES_MAX = 4


def thrifty(voters: int = 3, leader: int = 1, **changed: Any) -> Cluster:
    """A group with a leader whose followers are all known to have its first entry."""
    cluster = Cluster(voters, spare_entries_max=ENTRIES_MAX, commit_broadcast=False, **changed)
    cluster.elect(leader)
    cluster.tick(leader)
    assert all(peer.state is ProgressState.REPLICATE for peer in cluster[leader].status().progress.values())
    return cluster


def propose(cluster: Cluster, count: int = 1, leader: int = 1) -> None:
    """One entry after the other, each carried as far as it gets."""
    for _ in range(count):
        cluster[leader].propose(b"x")
        cluster.settle()


def lacking(cluster: Cluster, leader: int = 1) -> dict[int, int]:
    """How many of the leader's entries each of the others has not."""
    last = cluster[leader].last_index
    return {id_: last - cluster[id_].last_index for id_ in cluster.hosts if id_ != leader}


@pytest.mark.parametrize(
    "voters,leader,spares", [(3, 1, {3}), (3, 2, {1}), (3, 3, {2}), (5, 1, {4, 5}), (5, 4, {2, 3}), (4, 1, {4})]
)
def test_an_entry_goes_to_a_quorum_at_once_and_is_committed(voters: int, leader: int, spares: set[int]) -> None:
    """Each leader relies on those whose ids follow its own, so that not all rely on the same."""
    cluster = thrifty(voters, leader)
    propose(cluster, leader=leader)
    assert cluster[leader].committed == cluster[leader].last_index
    assert {id_ for id_, count in lacking(cluster, leader).items() if count} == spares


def test_without_the_setting_an_entry_goes_to_everybody() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 0}


@pytest.mark.parametrize("voters", [1, 2])
def test_two_voters_are_a_quorum_only_together(voters: int) -> None:
    cluster = Cluster(voters, spare_entries_max=ENTRIES_MAX)
    cluster.elect(1)
    propose(cluster)
    assert not any(lacking(cluster).values())


def test_entries_collect_for_a_spare_and_go_in_one_append() -> None:
    cluster = thrifty()
    seen = []
    cluster.dropped = lambda message: bool(
        message.type is M.APP and message.to == 3 and seen.append(len(message.entries))
    )
    propose(cluster, ENTRIES_MAX - 1)
    assert seen == []
    assert lacking(cluster)[3] == ENTRIES_MAX - 1
    propose(cluster)
    assert seen == [ENTRIES_MAX]
    assert lacking(cluster) == {2: 0, 3: 0}
    propose(cluster, ENTRIES_MAX)
    assert seen == [ENTRIES_MAX] * 2, "its answer did not bring it the next one alone"


def test_a_spares_answer_does_not_bring_it_the_next_entry_alone() -> None:
    cluster = thrifty()
    propose(cluster, ENTRIES_MAX - 1)
    cluster.hosts[3].hold_writes = True
    propose(cluster, 2)
    cluster.hosts[3].hold_writes = False
    cluster.hosts[3].write()
    cluster.settle()
    assert cluster[1].raft.progress[3].match == cluster[1].last_index - 1
    assert lacking(cluster)[3] == 1


def test_much_payload_does_not_wait() -> None:
    cluster = thrifty()
    cluster[1].propose(bytes(HELD_BYTES_MAX - 1))
    cluster.settle()
    assert lacking(cluster)[3] == 1
    propose(cluster)
    assert lacking(cluster)[3] == 0
    propose(cluster)
    assert lacking(cluster)[3] == 1, "it counts anew once everything has left"


def test_much_payload_does_not_wait_for_what_an_append_has_no_room_for() -> None:
    cluster = thrifty(message_bytes_max=HELD_BYTES_MAX)
    for _ in range(2):
        cluster[1].propose(bytes(HELD_BYTES_MAX * 3 // 4))
        cluster.settle()
    assert lacking(cluster)[3] == 0
    propose(cluster)
    assert lacking(cluster)[3] == 1, "it counts anew once everything has left"


def test_a_heartbeats_answer_brings_a_spare_what_it_lacks() -> None:
    cluster = thrifty()
    propose(cluster)
    cluster.tick(1)
    assert lacking(cluster)[3] == 0


def test_a_heartbeats_answer_brings_all_however_many_appends_that_takes() -> None:
    cluster = thrifty(message_bytes_max=1)
    propose(cluster, ENTRIES_MAX - 1)
    cluster.tick(1)
    assert lacking(cluster)[3] == 0


def test_a_spare_whose_log_has_to_be_probed_is_sent_all_that_it_lacks() -> None:
    cluster = thrifty(message_bytes_max=1)
    propose(cluster, ENTRIES_MAX - 1)
    cluster[1].raft.progress[3].become_probe()
    cluster.tick(1)
    assert lacking(cluster)[3] == 0


def test_a_spare_that_is_about_to_read_is_sent_what_is_committed() -> None:
    """Thesis 6.4: a follower waits until it has applied what the leader had committed; not for a heartbeat, too."""
    cluster = thrifty()
    propose(cluster)
    cluster[3].read_index(b"read")
    cluster.settle()
    assert cluster.hosts[3].applied == [b"x"]
    assert [state.context for state in cluster.hosts[3].read_states] == [b"read"]


def test_a_spare_that_is_about_to_read_is_sent_all_however_many_appends_that_takes() -> None:
    cluster = thrifty(message_bytes_max=1)
    propose(cluster, ENTRIES_MAX - 1)
    cluster[3].read_index(b"read")
    cluster.settle()
    assert cluster.hosts[3].applied == [b"x"] * (ENTRIES_MAX - 1)


def test_a_spare_can_take_over_the_leadership() -> None:
    """Thesis 3.10: the leader brings the target's log up to date first."""
    cluster = thrifty()
    propose(cluster, 2)
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster[3].role is Role.LEADER


def test_a_spare_that_is_to_lead_is_sent_all_however_many_appends_that_takes() -> None:
    cluster = thrifty(message_bytes_max=1, inflight_messages_max=1)
    propose(cluster, ENTRIES_MAX - 1)
    cluster[1].transfer_leader(3)
    cluster.settle()
    assert cluster[3].role is Role.LEADER


def test_a_leader_that_leads_no_more_keeps_nothing_back() -> None:
    cluster = thrifty()
    propose(cluster)
    assert cluster[1].raft.progress[3].held_bytes
    cluster.elect(2)
    assert not cluster[1].raft.progress[3].held_bytes


def test_when_a_leader_dies_whoever_has_its_entries_takes_over() -> None:
    """Paper 5.4.1: the spare lacks what is committed, so it is not elected."""
    cluster = thrifty()
    propose(cluster, 2)
    cluster.hosts[1].crash()
    cluster[3].campaign(cluster.now)
    cluster.settle()
    assert cluster[3].role is not Role.LEADER
    cluster.elect(2)
    cluster.tick(2)
    assert cluster.hosts[3].applied == [b"x", b"x"]


def test_a_follower_that_cannot_be_sent_entries_is_not_relied_on() -> None:
    cluster = thrifty()
    cluster[1].raft.progress[2].become_probe()
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 0}


def test_a_follower_with_a_full_window_is_not_relied_on() -> None:
    cluster = thrifty(inflight_messages_max=2)
    cluster.isolate(2)
    propose(cluster, 2)
    assert cluster[1].committed < cluster[1].last_index
    propose(cluster)
    assert cluster[1].committed == cluster[1].last_index


def test_whoever_is_needed_is_sent_all_that_fits_into_its_window() -> None:
    cluster = thrifty(inflight_messages_max=1)
    cluster.isolate(2)
    cluster[1].raft.progress[2].become_probe()
    cluster.hosts[3].hold_writes = True
    propose(cluster, 2)
    cluster.hosts[3].hold_writes = False
    cluster.hosts[3].write()
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index


def test_without_a_quorum_of_reliable_followers_nobody_is_spared() -> None:
    cluster = thrifty(5)
    for id_ in (2, 3, 4):
        cluster[1].raft.progress[id_].become_probe()
    propose(cluster)
    assert lacking(cluster)[5] == 0


def test_learners_are_sent_everything() -> None:
    """They may be needed soon, and are few."""
    cluster = thrifty(3, learners=1)
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 1, 4: 0}


def test_a_joint_configuration_spares_nobody() -> None:
    cluster = thrifty()
    cluster[1].propose_conf_change(change("v2", ConfChangeTransition.JOINT_EXPLICIT))
    cluster.settle()
    assert cluster[1].configuration.voters_outgoing
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 0}


def test_other_voters_are_other_followers_to_rely_on() -> None:
    cluster = thrifty()
    cluster.add(4)
    cluster[1].propose_conf_change(change("v4 r2"))
    cluster.tick(count=2)
    assert cluster[1].configuration.voters == (1, 3, 4)
    propose(cluster)
    assert lacking(cluster) == {2: 1, 3: 0, 4: 1}


# Followers that are slow or gone


def test_a_hedge_sends_spares_what_they_lack_and_they_make_the_quorum() -> None:
    cluster = thrifty()
    cluster.isolate(2)
    propose(cluster)
    assert cluster[1].committed < cluster[1].last_index
    cluster[1].hedge()
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index
    assert lacking(cluster) == {2: 1, 3: 0}


def test_a_hedge_sends_nothing_twice_and_nobody_but_a_leader_hedges() -> None:
    cluster = thrifty()
    propose(cluster)
    cluster[1].hedge()
    assert [message.to for message in cluster[1].ready().messages if message.type is M.APP] == [3]
    cluster[1].hedge()
    cluster[2].hedge()
    cluster[3].hedge()
    assert not any(cluster[id_].has_ready() for id_ in (1, 2, 3))


def test_a_hedge_sends_all_however_many_appends_that_takes() -> None:
    cluster = thrifty(message_bytes_max=1)
    cluster.isolate(2)
    propose(cluster, ENTRIES_MAX - 1)
    cluster[1].hedge()
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index


def test_a_spare_with_a_full_window_is_sent_the_rest_with_its_answer() -> None:
    cluster = thrifty(inflight_messages_max=2)
    cluster.hosts[3].hold_writes = True
    for _ in range(2):
        propose(cluster)
        cluster[1].hedge()
    cluster.isolate(2)
    propose(cluster)
    cluster[1].hedge()
    cluster.hosts[3].hold_writes = False
    cluster.hosts[3].write()
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index


def test_a_spare_that_had_all_it_lacked_in_one_probe_is_one_again() -> None:
    cluster = thrifty()
    propose(cluster, 2)
    cluster[1].raft.progress[3].become_probe()
    cluster.tick(1)
    assert lacking(cluster)[3] == 0
    propose(cluster)
    assert lacking(cluster)[3] == 1


@pytest.mark.parametrize("ask", [lambda node: node.hedge(), lambda node: node.distrust(2)])
def test_a_spare_that_cannot_be_sent_more_when_it_is_asked_is_sent_it_with_its_answer(
    ask: Callable[[RaftNode], None],
) -> None:
    """Not with the next heartbeat's: the entries wait for it alone."""
    cluster = thrifty()
    cluster.isolate(2)
    cluster[1].raft.progress[3].become_probe()
    cluster.hosts[3].hold_writes = True
    propose(cluster, 2)
    ask(cluster[1])
    cluster.hosts[3].hold_writes = False
    cluster.hosts[3].write()
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index


@pytest.mark.parametrize("told", ["distrust", "report_unreachable"])
def test_a_follower_that_may_be_gone_is_not_waited_for(told: str) -> None:
    cluster = thrifty()
    cluster.isolate(2)
    propose(cluster)
    getattr(cluster[1], told)(2)
    cluster.settle()
    assert cluster[1].committed == cluster[1].last_index, "what waited for it alone went to the other"
    propose(cluster)
    assert cluster[1].committed == cluster[1].last_index, "the other one is relied on now"
    cluster.heal()
    cluster.tick(1, count=3)
    propose(cluster)
    assert lacking(cluster) == {2: 1, 3: 0}


def test_distrust_of_who_is_no_voter_changes_nothing() -> None:
    cluster = thrifty(3, learners=1)
    cluster[1].distrust(4)
    cluster[1].distrust(9)
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 1, 4: 0}


def race(cluster: Cluster, *, slow: int) -> None:
    """Entries until everybody has been sent the same, of which one follower answers the last only after the others."""
    while True:
        before = cluster[1].raft.race
        cluster[1].propose(b"x")
        if cluster[1].raft.race != before:
            break
        cluster.settle()
    cluster.hosts[slow].hold_writes = True
    cluster.settle()
    cluster.hosts[slow].hold_writes = False
    cluster.hosts[slow].write()
    cluster.settle()


def relied_on(cluster: Cluster) -> set[int]:
    cluster.tick(1)
    propose(cluster)
    found = {id_ for id_, count in lacking(cluster).items() if not count}
    cluster.tick(1)
    return found


def test_whoever_loses_races_in_a_row_is_relied_on_no_more() -> None:
    cluster = thrifty()
    for _ in range(RACES_LOST_MAX - 1):
        race(cluster, slow=2)
    assert relied_on(cluster) == {2}
    race(cluster, slow=2)
    assert relied_on(cluster) == {3}


def test_a_race_that_is_won_makes_up_for_those_lost() -> None:
    cluster = thrifty()
    for _ in range(RACES_LOST_MAX - 1):
        race(cluster, slow=2)
    race(cluster, slow=3)
    race(cluster, slow=2)
    assert relied_on(cluster) == {2}


def test_of_five_the_slow_one_loses_its_place_and_the_quick_one_keeps_it() -> None:
    cluster = thrifty(5)
    for _ in range(RACES_LOST_MAX):
        race(cluster, slow=3)
    assert relied_on(cluster) == {2, 4}


def test_a_hedge_is_a_race() -> None:
    cluster = thrifty()
    for _ in range(RACES_LOST_MAX):
        cluster.tick(1)
        cluster.hosts[2].hold_writes = True
        propose(cluster)
        cluster[1].hedge()
        cluster.settle()
        cluster.hosts[2].hold_writes = False
        cluster.hosts[2].write()
        cluster.settle()
    assert relied_on(cluster) == {3}


def test_few_entries_do_not_keep_a_slow_follower_its_place() -> None:
    """They never collect; so one that follows a heartbeat which has met one under way goes to everybody."""
    cluster = thrifty()
    two = cluster.hosts[2]
    for _ in range(RACES_LOST_MAX):
        for lacks in (1, 0):
            two.hold_writes = True
            propose(cluster)
            assert lacking(cluster)[3] == lacks
            cluster.tick(1)
            two.hold_writes = False
            two.write()
            cluster.settle()
    assert relied_on(cluster) == {3}


def test_a_heartbeat_that_meets_nothing_under_way_calls_for_no_race() -> None:
    cluster = thrifty()
    propose(cluster)
    cluster.tick(1)
    propose(cluster)
    assert lacking(cluster) == {2: 0, 3: 1}


def test_a_new_leader_knows_nothing_of_the_last_ones_races() -> None:
    cluster = thrifty()
    for _ in range(RACES_LOST_MAX):
        race(cluster, slow=2)
    cluster[1].transfer_leader(2)
    cluster.settle()
    cluster.tick(2)
    cluster[2].transfer_leader(1)
    cluster.settle()
    assert relied_on(cluster) == {2}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_has_happened_two_heartbeats_bring_everybody_everything(seed: int) -> None:
    """The first finds out what was lost. It takes as long without thrift, whatever one append has room for."""
    draw = random.Random(seed)
    voters = draw.choice([3, 4, 5])
    cluster = thrifty(
        voters,
        learners=draw.choice([0, 1]),
        message_bytes_max=draw.choice([1, 3, UNBOUNDED]),
        inflight_messages_max=draw.choice([2, 256]),
        inflight_bytes_max=UNBOUNDED,
    )
    leader = cluster[1]
    for _ in range(30):
        follower = draw.randrange(2, voters + 1)
        match draw.choice(["propose", "propose", "propose", "hold", "go on", "cut", "heal", "hedge", "lost", "joint"]):
            case "propose":
                propose(cluster, draw.choice([1, 1, 2, 5]))
            case "hold":
                cluster.hosts[follower].hold_writes = True
            case "go on":
                cluster.hosts[follower].hold_writes = False
                cluster.hosts[follower].write()
            case "cut":
                cluster.isolate(follower)
            case "heal":
                cluster.heal()
            case "hedge":
                leader.hedge()
            case "lost":
                draw.choice([leader.distrust, leader.report_unreachable])(follower)
            case "joint" if leader.raft.pending_conf_index <= leader.applied:
                enter = change(f"v{follower}", ConfChangeTransition.JOINT_EXPLICIT)
                leader.propose_conf_change(ConfChange() if leader.configuration.voters_outgoing else enter)
        cluster.settle()
    cluster.heal()
    for host in cluster.hosts.values():
        host.hold_writes = False
        host.write()
    cluster.tick(1, count=2)
    assert leader.committed == leader.last_index
    assert not any(lacking(cluster).values())


def test_a_setting_without_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="spare_entries_max must be positive, not 0"):
        settings_for(1, spare_entries_max=0)
