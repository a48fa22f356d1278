"""Deliberate bugs in what a stale read says of its age."""

from shardkv.multiraft.replica import Replica
from shardkv.raft import freshness
from shardkv.raft.messages import Message
from shardkv.raft.progress import Progress
from shardkv.raft.state import Raft
from tests.simulation.bugs.table import Bug, Patches, patch


def served_past_its_bound() -> Patches:
    """Whoever has ever known its age goes on as if it were still young."""
    original = Replica.age_us

    def age_us(replica: Replica, now_ns: int) -> int | None:
        found = original(replica, now_ns)
        return None if found is None else min(found, 150_000)

    return [patch.object(Replica, "age_us", age_us)]


def as_young_as_the_last_heartbeat() -> Patches:
    """A leader was heard of, so all must be well: what this replica lacks is not asked."""

    def learn(raft: Raft, heartbeat: Message) -> None:
        raft.proof = freshness.Proof(0, raft.now)

    return [patch.object(freshness, "learn", learn)]


def proved_by_what_the_follower_has() -> Patches:
    """The commit index of a heartbeat never exceeds the follower's match."""

    def prove(raft: Raft, peer: Progress, heartbeat: Message) -> None:
        if peer.follower_stamp:
            heartbeat.index, heartbeat.follower_stamp = heartbeat.commit, peer.follower_stamp

    return [patch.object(freshness, "prove", prove)]


BUGS = (
    Bug(
        "stale-past-its-bound",
        "a replica without proof within the bound refuses (DESIGN 4.5)",
        served_past_its_bound,
        ("partition", "lag", "depose"),
        1,
        workload="stale",
        rate=60,
    ),
    Bug(
        "age-by-the-last-heartbeat",
        "that a leader was heard of says nothing of what was applied (DESIGN 2.3)",
        as_young_as_the_last_heartbeat,
        ("stall", "slow-disk"),
        1,
        workload="stale",
        rate=60,
    ),
    Bug(
        "age-by-the-followers-match",
        "an age is proved by the leader's own commit index (DESIGN 2.3)",
        proved_by_what_the_follower_has,
        ("stall", "slow-disk"),
        1,
        workload="stale",
        rate=60,
    ),
)
