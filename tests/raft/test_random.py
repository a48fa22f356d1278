"""What random runs of a group must show, by the settings of its replicas (see ``runs``)."""

from typing import Any

import pytest

from shardkv.raft import InvalidConfChange
from tests.raft.runs import LEASE, Moving, Rounds, Run

NODES: dict[str, Any] = {
    "pre_vote": True,
    "check_quorum": True,
    "lease": LEASE,
    "patient_elections": True,
    "spare_entries_max": 3,
    "commit_rides": True,
}
MEMBERSHIP = NODES | {"membership": True, "step_down_on_removal": True}
TIGHT: dict[str, Any] = {
    "message_bytes_max": 1,
    "inflight_messages_max": 2,
    "inflight_bytes_max": 8,
    "committed_bytes_per_ready_max": 1,
    "uncommitted_bytes_max": 64,
}


def check_run(seed: int, kind: type[Run] = Run, **settings: Any) -> Run:
    group = kind(seed, **settings)
    try:
        for _ in range(group.STEPS):
            group.step()
        group.recover()
    except (AssertionError, InvalidConfChange) as error:
        error.add_note(f"{kind.__name__}, seed {seed}, settings {settings}")
        raise
    return group


@pytest.mark.parametrize("seed", range(8))
def test_a_group_with_plain_settings_stays_safe_and_recovers(seed: int) -> None:
    """Paper figure 3, all five properties, with asynchronous log writes."""
    check_run(seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_group_with_synchronous_writes_stays_safe_and_recovers(seed: int) -> None:
    """The same with every write done before anything else happens."""
    check_run(seed, async_storage_writes=False)


@pytest.mark.parametrize("seed", range(8))
def test_a_group_with_the_nodes_settings_stays_safe_and_recovers(seed: int) -> None:
    """Pre-vote, check-quorum and the lease, with drifting clocks: whoever has a lease is alone. Traps 6 and 7."""
    check_run(seed, **NODES, commit_broadcast=False)


@pytest.mark.parametrize("seed", range(8))
def test_a_group_with_changing_members_stays_safe_and_recovers(seed: int) -> None:
    """Trap 9: learners, simple and joint changes, crashes in between, and the lease."""
    check_run(seed, **MEMBERSHIP)


@pytest.mark.parametrize("seed", range(4))
def test_a_group_with_tight_bounds_stays_safe_and_recovers(seed: int) -> None:
    """One entry a message, two messages in flight, one entry handed out at a time."""
    check_run(seed, **TIGHT)


@pytest.mark.parametrize("seed", range(30))
def test_a_group_whose_leaders_die_all_the_time_stays_safe_and_recovers(seed: int) -> None:
    """Trap 10: what others act on is on disk, or dies without a trace."""
    check_run(seed, Rounds)
    check_run(seed, Rounds, pre_vote=True, check_quorum=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_with_changing_members_that_die_all_the_time_stays_safe_and_recovers(seed: int) -> None:
    """Traps 6, 7, 9 and 10 together."""
    check_run(seed, Rounds, **MEMBERSHIP, commit_broadcast=bool(seed % 2))


@pytest.mark.parametrize("seed", range(8))
def test_a_group_whose_voters_move_while_it_is_divided_stays_safe_and_recovers(seed: int) -> None:
    """Trap 9: joint configurations that last, partitions along them, and replicas that apply a change late."""
    check_run(seed, Moving, **NODES, commit_broadcast=bool(seed % 2))


def test_the_random_runs_do_what_they_are_for() -> None:
    """Checkers that never saw a lease, a read or a change of leaders would prove nothing."""
    groups = [check_run(seed, **MEMBERSHIP) for seed in range(100, 105)]
    assert sum(group.checkers.leases_seen for group in groups) > 100
    assert sum(group.checkers.ages_seen for group in groups) > 1_000
    assert sum(group.checkers.reads_seen for group in groups) > 10
    assert sum(len(group.checkers.leader_of_term) for group in groups) > 6
    assert sum(len(group.checkers.committed) for group in groups) > 40
