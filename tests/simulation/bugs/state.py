"""Deliberate bugs in what is kept: state machine, sessions, splits, snapshots, the log on disk, versions."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from shardkv.errors import StorageError
from shardkv.machine import execution, keys
from shardkv.machine.clock import HybridClock
from shardkv.machine.entries import GENERATION
from shardkv.machine.execution import WriteRun
from shardkv.machine.machine import Applied, RangeMachine
from shardkv.machine.snapshot import snapshot_rows
from shardkv.multiraft import maintenance, snapshot_parts
from shardkv.multiraft import replica as replica_module
from shardkv.multiraft.applier import Applier
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.maintenance import Maintenance
from shardkv.multiraft.proposer import Proposer
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_install import Installer
from shardkv.raft.messages import Message
from shardkv.server import requests
from shardkv.simulation.runner import Run
from shardkv.storage import segment, wal
from shardkv.storage.engine import Reader, WriteBatch
from shardkv.storage.log_state import LogState
from shardkv.storage.recovery import _Recovery
from shardkv.storage.segment import Segment, Spares
from shardkv.storage.wal import LogUpdate, Wal
from shardkv.transport.handshake import KnownBoots
from shardkv.types import EVERY_KEY, RangeDescriptor, RangeId
from shardkv_placement import commands
from shardkv_placement.state import PlacementState
from tests.simulation.bugs.table import Bug, Patches, patch

# Sessions


def sessions_left_out_of_snapshots() -> Patches:
    def rows(reader: Reader, descriptor: RangeDescriptor, **how: Any) -> Iterator[tuple[bytes, bytes]]:
        start, end = keys.kind_span(descriptor.range_id, keys.SESSIONS)
        return (row for row in snapshot_rows(reader, descriptor, **how) if not start <= row[0] < end)

    return [patch.object(snapshot_parts, "snapshot_rows", rows)]


def sessions_left_behind_by_a_split() -> Patches:
    original = RangeMachine.create

    def create(descriptor: RangeDescriptor, *, sessions: Sequence[bytes] = (), **how: Any) -> RangeMachine:
        return original(descriptor, **how)

    return [patch.object(RangeMachine, "create", create)]


def retries_are_new() -> Patches:
    return [
        patch.object(execution._General, "_recorded", lambda general, sequence: None),
        patch.object(execution, "_run_plain_put", lambda run, session_id, commands: None),
        patch.object(execution, "_run_plain_puts", lambda run, session_id, commands: None),
    ]


def settled_commands_are_new() -> Patches:
    """What a client has said that it is done with is forgotten, and not refused."""
    original_init, original = execution._General.__init__, execution._General._recorded

    def init(general: Any, run: WriteRun, session_id: bytes) -> None:
        original_init(general, run, session_id)
        general.below = 0

    def recorded(general: Any, sequence: int) -> Any:
        session = general.run_.table.sessions.get(general.session_id)
        if session is not None and sequence < session.acknowledged_below:
            return None
        return original(general, sequence)

    return [
        patch.object(execution._General, "__init__", init),
        patch.object(execution._General, "_recorded", recorded),
    ]


# Conditions and spans


def deletes_on_any_condition() -> Patches:
    original = execution._General._execute

    def execute(general: Any, command: list[Any]) -> tuple[int, int]:
        if command[0] == execution._DELETE:
            command = [*command[:6], None, *command[7:]]
        return original(general, command)

    return [patch.object(execution._General, "_execute", execute)]


def range_deletes_that_delete_nothing() -> Patches:
    original = execution._General._execute

    def execute(general: Any, command: list[Any]) -> tuple[int, int]:
        if command[0] == execution._DELETE_RANGE:
            return execution.BOOLEAN, 1
        return original(general, command)

    return [patch.object(execution._General, "_execute", execute)]


# Applying


def batch_loses_its_last_pair() -> Patches:
    original = execution._run_plain_puts

    def run_plain_puts(run: WriteRun, session_id: bytes, commands: list[Any]) -> list[Any] | None:
        before = dict(run.batch.changes)
        found = original(run, session_id, commands)
        if found is not None:
            last = keys.USER_PREFIX + commands[-1][5]
            del run.batch.changes[last]
            run.batch.changes.update((key, value) for key, value in before.items() if key == last)
        return found

    return [patch.object(execution, "_run_plain_puts", run_plain_puts)]


def epoch_checked_only_when_proposed() -> Patches:
    original = WriteRun.run

    def run_anyway(run: WriteRun, entry: list[Any]) -> list[list[Any]]:
        anyway = list(entry)
        anyway[GENERATION] = run.descriptor.epoch.span
        run.descriptor = run.descriptor.with_span(EVERY_KEY, run.descriptor.epoch)
        return original(run, anyway)

    return [patch.object(WriteRun, "run", run_anyway)]


def applied_index_apart() -> Patches:
    def finish(self: Applier, batch: WriteBatch, touched: dict[RangeId, Replica]) -> None:
        indices = WriteBatch()
        for replica in touched.values():
            if replica.machine is not None:
                replica.machine.finish(indices)
        if indices:
            self._engine.write(indices)

    return [patch.object(Applier, "_finish", finish)]


def applied_index_left_out() -> Patches:
    return [patch.object(Applier, "_finish", lambda applier, batch, touched: None)]


def versions_as_proposed() -> Patches:
    original = RangeMachine.apply

    def apply(machine: RangeMachine, *arguments: Any, **how: Any) -> Applied:
        machine.last_timestamp = 0
        return original(machine, *arguments, **how)

    return [patch.object(RangeMachine, "apply", apply)]


def wall_clock_believed() -> Patches:
    def ms(clock: Any) -> int:
        wall_ms: int = clock._clock.wall_ms()
        return wall_ms

    return [patch.object(HybridClock, "ms", ms), patch.object(HybridClock, "check", lambda clock: None)]


def reads_of_a_span_that_moved() -> Patches:
    def check_route(replica: Replica, span_generation: int) -> RangeMachine:
        if replica.machine is None:
            raise replica.not_leader()
        return replica.machine

    original = requests.reads.get

    def get(machine: RangeMachine, reader: Reader, user_keys: list[bytes]) -> list[list[Any] | None]:
        anything: Any = SimpleNamespace(descriptor=SimpleNamespace(span=EVERY_KEY))
        return original(anything, reader, user_keys)

    return [patch.object(Replica, "check_route", check_route), patch.object(requests.reads, "get", get)]


def entries_follow_at_once() -> Patches:
    return [patch.object(replica_module, "PIPELINE_NS", 0)]


# Ids


def range_id_used_twice() -> Patches:
    original = PlacementState._allocate

    def allocate(state: PlacementState, command: commands.Allocate, *arguments: Any) -> list[int]:
        first_range, first_replica = original(state, command, *arguments)
        return [first_range - (first_range > 3), first_replica]

    return [patch.object(PlacementState, "_allocate", allocate)]


def replica_id_used_twice() -> Patches:
    """A node that comes back with nothing is taken for the one that had its name, and gets its replicas' ids."""
    register, started = PlacementState._register_node, PlacementState._node_started

    def register_node(state: PlacementState, command: commands.RegisterNode, *arguments: Any) -> int:
        named = state.node_named(command.name)
        return named.node_id if named is not None else register(state, command, *arguments)

    def node_started(state: PlacementState, command: commands.NodeStarted, *arguments: Any) -> bool:
        return command.boot < state.nodes[command.node_id].boot or started(state, command, *arguments)

    return [
        patch.object(PlacementState, "_register_node", register_node),
        patch.object(PlacementState, "_node_started", node_started),
        patch.object(KnownBoots, "observe", lambda known, node_id, boot, start_token, earlier_tokens: None),
    ]


# Snapshots


def lost_state_unnoticed() -> Patches:
    """An install that did not come to its end, or a split that was lost, leaves a log and no state. Leaving out the
    install's mark alone does nothing: the log says as much."""
    original = Catalog.recover

    def recover(self: Catalog, *arguments: Any, **how: Any) -> None:
        original(self, *arguments, **how)
        for replica in self.replicas.values():
            replica.needs_snapshot = False

    return [patch.object(Catalog, "recover", recover)]


def ingest_without_flush() -> Patches:
    original = Installer._when_room

    async def when_room(self: Installer, step: Any, *arguments: Any) -> None:
        if self._engine.flush not in arguments:
            await original(self, step, *arguments)

    return [patch.object(Installer, "_when_room", when_room)]


def install_without_a_new_log() -> Patches:
    original = Driver.log_snapshot

    def log_snapshot(self: Driver, replica: Replica, update: LogUpdate, message: Message) -> None:
        update.reset = None
        original(self, replica, update, message)

    return [patch.object(Driver, "log_snapshot", log_snapshot)]


# The log on disk


def no_fsync() -> Patches:
    def sync(self: Wal, segment: Segment, sequence: int, end: int) -> None:
        self._syncs += 1
        self._synced_place = wal._place(segment, end)
        self._synced_sequence = sequence

    return [patch.object(Wal, "_sync", sync)]


def failed_sync_ignored() -> Patches:
    """The system is asked once, says no, and is believed to have done it all the same."""
    original = Wal._sync

    def sync(self: Wal, segment: Segment, sequence: int, end: int) -> None:
        try:
            original(self, segment, sequence, end)
        except StorageError:
            self._synced_place = wal._place(segment, end)
            self._synced_sequence = sequence

    return [patch.object(Wal, "_sync", sync)]


def damage_is_cut_off() -> Patches:
    return [patch.object(_Recovery, "_judge", lambda recovery, damage, later: None)]


def segments_dropped_too_early() -> Patches:
    def dead_segments(state: LogState) -> list[Segment]:
        return list(state.segments.values())[:-1]

    return [patch.object(wal, "dead_segments", dead_segments)]


def compacted_before_the_flush() -> Patches:
    async def flush_and_compact(self: Maintenance) -> None:
        self._driver.log_writer.write_all()
        updates = []
        for replica in self._driver.catalog.replicas.values():
            if replica.machine is not None and not replica.installing:
                update = self._compaction(replica, replica.machine.applied_index, False)
                if update is not None:
                    updates.append(update)
        if updates:
            self._driver.log_writer.append(updates)

    return [patch.object(Maintenance, "flush_and_compact", flush_and_compact)]


def new_segment_not_in_its_directory() -> Patches:
    original = Spares.install

    def install(self: Spares, of: Segment) -> None:
        disk = self._disk
        self._disk = _WithoutDirectories(disk)
        try:
            original(self, of)
        finally:
            self._disk = disk

    return [patch.object(segment.Spares, "install", install)]


class _WithoutDirectories:
    """A disk whose directories are never synced."""

    def __init__(self, disk: Any) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def sync_directory(self, path: str) -> None:
        pass


def refusals_call_for_a_turn() -> Patches:
    """Each turn refuses what waits on a full disk, and each refusal wants a turn."""
    original = Proposer.refuse_waiting

    def refuse_waiting(proposer: Proposer) -> None:
        original(proposer)
        proposer._wake()

    return [patch.object(Proposer, "refuse_waiting", refuse_waiting)]


def one_confirmation_at_once() -> Patches:
    return [patch.object(replica_module, "CONFIRMATIONS_MAX", 1)]


def short_logs() -> Patches:
    """Who is away for a moment needs a snapshot, in every run."""
    return [
        patch.object(maintenance, "ENTRIES_KEPT", 0),
        patch.object(maintenance, "LAG_ENTRIES_MAX", 4),
        patch.object(Run, "_short_logs", lambda run, cluster: None),
    ]


def small_segments() -> Patches:
    """What is small turns over often."""
    original = Wal.open.__func__  # type: ignore[attr-defined]

    def opened(cls: type[Wal], disk: Any, directory: str, settings: wal.WalSettings, **how: Any) -> Wal:
        return original(cls, disk, directory, wal.WalSettings(segment_bytes=16 * 1024), **how)  # type: ignore[no-any-return]

    return [patch.object(Wal, "open", classmethod(opened))]


_POWER = ("blackout", "sudden", "power")

BUGS = (
    Bug(
        "snapshot-without-sessions",
        "the dedupe table is in snapshots (trap 12)",
        sessions_left_out_of_snapshots,
        ("lag", "flush", "lost-answers"),
        2,
        workload="counters",
    ),
    Bug(
        "split-without-sessions",
        "the dedupe table is copied on a split (trap 12)",
        sessions_left_behind_by_a_split,
        ("split-retry", "slow-disk"),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "retry-applied-twice",
        "a command is applied once, however often it comes (DESIGN 4.6)",
        retries_are_new,
        ("lost-answers",),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "settled-applied-again",
        "what lies below a session's lowest unsettled sequence is refused (trap 12)",
        settled_commands_are_new,
        ("late-requests",),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "batch-loses-its-last-pair",
        "a put_many that ends has written every pair (DESIGN 2.3)",
        batch_loses_its_last_pair,
        ("kill",),
        1,
        workload="bulk",
    ),
    Bug(
        "epoch-checked-at-propose-only",
        "the epoch is checked again when an entry is applied (trap 4)",
        epoch_checked_only_when_proposed,
        ("split-retry", "split", "slow"),
        4,
        rate=100,
        tuning=entries_follow_at_once,
    ),
    Bug(
        "applied-index-apart",
        "the applied index is in the batch of its data (trap 10)",
        applied_index_apart,
        ("kill", "sudden", "call"),
        1,
    ),
    Bug(
        "applied-index-left-out",
        "a batch holds the applied index (trap 10)",
        applied_index_left_out,
        ("kill", "blink", "flush"),
        1,
    ),
    Bug(
        "version-not-raised",
        "a version is above all the range has seen (DESIGN 4.4)",
        versions_as_proposed,
        ("step", "handover"),
        4,
        workload="ledger",
        rate=100,
    ),
    Bug(
        "wall-clock-believed",
        "a clock that jumps makes no command too old (trap 23)",
        wall_clock_believed,
        ("step", "transfer"),
        1,
    ),
    Bug(
        "read-of-a-moved-span",
        "a read's epoch is the applied one (trap 21)",
        reads_of_a_span_that_moved,
        ("split", "split-retry", "transfer"),
        1,
        rate=100,
    ),
    Bug("range-id-used-twice", "ids are never used twice (DESIGN 4.10)", range_id_used_twice, ("split",), 1),
    Bug(
        "replica-id-used-twice",
        "a node on an empty disk is not who had its name (traps 3, 24)",
        replica_id_used_twice,
        ("reborn",),
        1,
    ),
    Bug(
        "lost-state-unnoticed",
        "a replica that comes back without its state asks for it (traps 19, 20)",
        lost_state_unnoticed,
        ("lag",),
        3,
        workload="registers",
        minutes=0.4,
        rate=100,
        tuning=short_logs,
    ),
    Bug(
        "ingest-without-flush",
        "what came before an ingest is flushed before it (trap 19)",
        ingest_without_flush,
        ("lag", "flush"),
        4,
        workload="registers",
        rate=100,
        tuning=short_logs,
    ),
    Bug(
        "install-without-a-new-log",
        "after an install the log begins anew (DESIGN 4.3)",
        install_without_a_new_log,
        ("lag", "flush", "kill"),
        1,
    ),
    Bug(
        "delete-on-any-condition",
        "a conditional delete looks at the version (DESIGN 2.3)",
        deletes_on_any_condition,
        ("transfer",),
        1,
        workload="registers",
    ),
    Bug(
        "range-delete-deletes-nothing",
        "delete_range deletes every key of its span (DESIGN 2.3)",
        range_deletes_that_delete_nothing,
        ("transfer",),
        1,
        workload="registers",
    ),
    Bug("no-fsync", "nothing is said before it is synced (trap 10)", no_fsync, _POWER, 1),
    Bug(
        "failed-sync-ignored",
        "a failed sync ends the process (DESIGN 4.3)",
        failed_sync_ignored,
        ("fail", *_POWER),
        1,
    ),
    Bug(
        "damage-below-the-synced-mark-cut-off",
        "recovery cuts off nothing that was synced (DESIGN 4.3)",
        damage_is_cut_off,
        ("rot",),
        1,
    ),
    Bug(
        "segment-dropped-while-needed",
        "a segment lives as long as an entry in it (trap 20)",
        segments_dropped_too_early,
        ("kill", "flush", "blink"),
        1,
        workload="bulk",
        tuning=small_segments,
    ),
    Bug(
        "compacted-before-the-flush",
        "an entry leaves the log after the engine has flushed it (trap 20)",
        compacted_before_the_flush,
        ("flush", "kill", "power"),
        6,
    ),
    Bug(
        "directory-not-synced",
        "a new segment's name is synced before anything in it counts (DESIGN 4.3)",
        new_segment_not_in_its_directory,
        _POWER,
        1,
        workload="bulk",
        tuning=small_segments,
    ),
    Bug(
        "refusals-call-for-a-turn",
        "a node that waits keeps no processor busy (DESIGN 4.2)",
        refusals_call_for_a_turn,
        ("full", "stall", "slow", "partition"),
        1,
        tuning=one_confirmation_at_once,
    ),
)
