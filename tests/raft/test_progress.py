"""What a leader believes of a follower, and which answers it must not believe (etcd-io/raft, tracker)."""

import pytest

from shardkv.raft.progress import Inflights, Progress, ProgressState


def peer(state: ProgressState, *, match: int, next_index: int, pending: int = 0) -> Progress:
    made = Progress(next_index, Inflights(4, 1000), is_learner=False, recent_active=True)
    made.match = match
    made.state = state
    made.pending_snapshot = pending
    return made


@pytest.mark.parametrize("rejected,taken,next_index", [(4, False, 10), (5, False, 10), (9, True, 6)])
def test_a_replicating_peer_ignores_a_rejection_of_what_it_has_acknowledged(
    rejected: int, taken: bool, next_index: int
) -> None:
    """Such an answer was overtaken on its way; believing it would send everything again."""
    made = peer(ProgressState.REPLICATE, match=5, next_index=10)
    assert made.maybe_decrease_to(rejected, 0) is taken
    assert made.next == next_index


@pytest.mark.parametrize(
    "rejected,hint,taken,next_index", [(5, 5, False, 10), (9, 2, True, 3), (9, 9, True, 9), (9, 0, True, 1)]
)
def test_a_probed_peer_heeds_only_the_answer_to_its_probe(
    rejected: int, hint: int, taken: bool, next_index: int
) -> None:
    """One append is out at a time, so an answer to another index is an old one."""
    made = peer(ProgressState.PROBE, match=0, next_index=10)
    made.flow_paused = True
    assert made.maybe_decrease_to(rejected, hint) is taken
    assert made.next == next_index
    assert made.flow_paused is not taken


def test_probing_never_goes_below_what_is_known_to_match() -> None:
    """Invariant: match < next."""
    made = peer(ProgressState.PROBE, match=4, next_index=10)
    assert made.maybe_decrease_to(9, 1)
    assert made.next == 5


@pytest.mark.parametrize(
    "state,pending,next_index",
    [(ProgressState.REPLICATE, 0, 2), (ProgressState.SNAPSHOT, 10, 11), (ProgressState.SNAPSHOT, 0, 2)],
)
def test_probing_begins_behind_what_is_known_to_have_arrived(
    state: ProgressState, pending: int, next_index: int
) -> None:
    """After a snapshot behind it; after one that failed (none pending any more) behind the match."""
    made = peer(state, match=1, next_index=5, pending=pending)
    made.become_probe()
    assert (made.state, made.match, made.next) == (ProgressState.PROBE, 1, next_index)
    made.check()


def test_old_acknowledgements_never_move_a_peer_back() -> None:
    """Appends are pipelined and answers may overtake one another."""
    made = peer(ProgressState.REPLICATE, match=3, next_index=5)
    assert [made.maybe_update(index) for index in (2, 3, 4, 5)] == [False, False, True, True]
    assert (made.match, made.next) == (5, 6)


def test_the_window_frees_what_was_answered_and_knows_its_bytes() -> None:
    """Bytes must not leak: a window that only seems full stops a follower for ever."""
    window = Inflights(4, 100)
    for index, size in ((1, 10), (3, 20), (4, 30)):
        window.add(index, size)
    window.free_to(0)
    assert (len(window), window.bytes) == (3, 60)
    window.free_to(3)
    assert (len(window), window.bytes) == (1, 30)
    window.add(5, 90)
    assert window.full
    window.free_to(9)
    assert (len(window), window.bytes, window.full) == (0, 0, False)
    window.check()


def test_a_change_of_the_members_forgets_nothing_of_those_who_stay() -> None:
    """Among it what the lease rests on, and that a snapshot is on its way."""
    made = Progress(9, Inflights(4, 1000), is_learner=True, recent_active=False)
    made.state, made.match, made.pending_snapshot, made.sent_commit = ProgressState.SNAPSHOT, 7, 8, 6
    made.flow_paused, made.probes_unanswered, made.heartbeats_waited = True, 2, 3
    made.lease_stamp, made.follower_stamp = 4, 5
    made.spare, made.held_bytes = True, 6
    unlike = Progress(1, Inflights(4, 1000), is_learner=False, recent_active=True)
    copy = made.copy()
    for name in Progress.__slots__:
        assert getattr(made, name) != getattr(unlike, name), f"{name} might as well be a new member's"
        assert getattr(copy, name) == getattr(made, name), name
