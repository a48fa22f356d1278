"""Deliberate bugs in who counts while a cluster grows."""

from shardkv.raft import replication
from shardkv.raft.quorum import majority_value
from shardkv.raft.state import Raft
from shardkv.server import operations
from shardkv.simulation import runner
from shardkv_placement import operators
from tests.simulation.bugs.table import Bug, Patches, patch


def learners_counted() -> Patches:
    """Two learners that have an entry outweigh the only voter that has not."""

    def maybe_commit(raft: Raft) -> bool:
        index = majority_value([peer.match for peer in raft.progress.values()])
        if raft.log.committed < index <= raft.log.last_index and index >= raft.term_start:
            raft.log.commit_to(index)
            return True
        return False

    return [patch.object(replication, "maybe_commit", maybe_commit)]


def votes_before_data() -> Patches:
    """A learner is promoted as soon as it is there: one that a split gave a new range, or one that was just added."""
    return [
        patch.object(operators, "caught_up", lambda view, replica_id: True),
        patch.object(operations, "_follows_closely", lambda replica, replica_id: True),
    ]


def growing() -> Patches:
    """In each run the cluster grows."""
    return [patch.object(runner, "GROWING_SHARE", 1.0)]


def growing_quickly() -> Patches:
    """And learners soon have what they could be counted for."""
    return [*growing(), patch.object(runner, "SLOW_SNAPSHOTS", (None,))]


BUGS = (
    Bug(
        "learners-counted",
        "a learner counts for no quorum (thesis, 4.2.1; trap 9)",
        learners_counted,
        ("stall", "power", "heal", "flush"),
        36,
        minutes=0.3,
        rate=100,
        tuning=growing_quickly,
    ),
    Bug(
        "votes-before-data",
        "a learner gets its vote when it follows closely (thesis, 4.2.1)",
        votes_before_data,
        ("kill", "heal"),
        3,
        minutes=0.5,
        rate=100,
        tuning=growing,
    ),
)
