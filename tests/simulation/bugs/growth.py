"""Deliberate bugs by which something grows for as long as a node runs, or outlives what it is for."""

from shardkv.environment import Stream
from shardkv.machine.sessions import SessionTable
from shardkv.multiraft.maintenance import Maintenance
from shardkv.server.listener import Listener
from shardkv.simulation import determinism, observing
from tests.simulation.bugs.table import Bug, Patches, patch


def never_compacted() -> Patches:
    return [patch.object(Maintenance, "_compaction", lambda maintenance, replica, applied, long: None)]


def rows_kept_for_ever() -> Patches:
    return [patch.object(SessionTable, "expire", lambda table, now_ms: [])]


def tasks_left_behind() -> Patches:
    """A connection is gone, and its task waits for something that nobody sends any more."""
    original = Listener.handle

    async def handle(listener: Listener, stream: Stream) -> None:
        await original(listener, stream)
        await determinism.hang()

    return [patch.object(Listener, "handle", handle)]


def limits(**tighter: int) -> Patches:
    """Limits for runs of seconds, still above what such runs come to."""
    return [patch.dict(observing.LIMITS, {name.replace("_", " "): limit for name, limit in tighter.items()})]


BUGS = (
    Bug(
        "log-never-compacted",
        "what every replica has applied leaves the log (DESIGN 4.3)",
        never_compacted,
        ("kill",),
        2,
        minutes=0.7,
        rate=200,
        tuning=lambda: limits(log_entries_of_a_range=600),
    ),
    Bug(
        "records-never-expire",
        "a session's records go with their age (DESIGN 4.6)",
        rows_kept_for_ever,
        ("kill",),
        2,
        minutes=1.6,
        rate=20,
    ),
    Bug(
        "connection-leaves-its-task",
        "what a connection took goes with it (DESIGN 4.8)",
        tasks_left_behind,
        ("drop", "kill", "lost-answers"),
        6,
        minutes=0.6,
        tuning=lambda: limits(tasks=300),
    ),
)
