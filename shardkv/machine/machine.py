"""The state machine of one replica of one range: committed entries in, changes to a write batch and outcomes out.

Lives here: what a replica keeps in memory of its range, and the dispatch of entries by kind. Does not live here: Raft,
I/O, and how commands run (:mod:`execution`). The rules:

* Applying follows from the entry and replicated state alone: no clock, no chance, no setting of this node.
* Rows change only through the batch that is handed in; :meth:`RangeMachine.finish` puts the applied index into the
  same batch (trap 10). Memory moves ahead of the batch: once a batch is lost, so is the machine; load it anew.
* Small: a node has 10,000 of these. The session table is loaded when an entry first needs it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

from shardkv.errors import Corruption, ShardKVError, StorageError
from shardkv.machine import entries, keys, rows
from shardkv.machine.entries import BODY, ENTRY_FORMAT, KIND, STAMP, DecodedEntry, EntryKind
from shardkv.machine.execution import WriteRun
from shardkv.machine.sessions import SessionTable
from shardkv.machine.split import divide, problem
from shardkv.raft.messages import ConfState, SnapshotMetadata
from shardkv.storage.engine import Reader, WriteBatch
from shardkv.types import (
    Epoch,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    ReplicaRole,
    timestamp_ms,
)

INITIAL_INDEX: Final = 10
INITIAL_TERM: Final = 5
"""Where the log of a new range stands, as if it came from a snapshot. Not 0: a replica that has nothing must be sent
the range's state, never its log from the first entry."""

_WRITE, _SPLIT, _EXTENSION = (int(kind) for kind in (EntryKind.WRITE, EntryKind.SPLIT, EntryKind.EXTENSION))


class Extension(Protocol):
    """Replicated state beside the keys of a range: the placement group's, in range 0.

    The keys of its rows begin with :func:`shardkv.machine.keys.extension_prefix`; they travel in the range's snapshots.
    """

    def load(self, rows: Iterator[tuple[bytes, bytes]]) -> None:
        """Begin from these rows, whole keys in their order. What was in memory before is void."""
        ...

    def apply(self, command: Any, timestamp: int, batch: WriteBatch) -> Any:
        """Execute a command; its outcome, a value that CBOR holds. ``timestamp`` rises with every entry.

        A ShardKVError that it raises, before it has changed anything, is the outcome. Deterministic.
        """
        ...


class SplitResult:
    """A split as the left half applied it. The caller must call :meth:`keep` or :meth:`drop`, in the same batch."""

    __slots__ = ("_sessions", "left", "machine", "right")

    def __init__(
        self, left: RangeDescriptor, right: RangeDescriptor, machine: "RangeMachine", sessions: Sequence[bytes]
    ) -> None:
        self.left = left
        self.right = right
        self.machine = machine
        """The right half's, with the sessions of both (trap 12)."""
        self._sessions = sessions

    def keep(self, batch: WriteBatch) -> None:
        """This node's replica of the right half begins with this state."""
        batch.delete_range(*keys.system_span(self.right.range_id))
        self.machine.write(batch, self._sessions)

    def drop(self, batch: WriteBatch) -> None:
        """This node's replica of the right half is gone, or newer, or waits for a snapshot that is: its rows stay as
        they are, its keys go."""
        batch.delete_range(*keys.user_span(self.right.span))


class Applied(NamedTuple):
    """What applying one entry came to."""

    outcomes: Sequence[Any] = ()
    """One for each who waits for the entry. WRITE: for each group the list of its commands' outcomes (see
    :mod:`shardkv.wire.commands`). SPLIT: one, ``[left, right]``, the descriptors as they travel. EXTENSION: one, what
    the extension answered. Where nothing was done: the error."""
    split: SplitResult | None = None


NOTHING_APPLIED: Final = Applied()


class RangeMachine:
    """See the module's docstring. Make one with :meth:`create` or :meth:`load`."""

    __slots__ = (
        "_conf_bytes",
        "_conf_state",
        "_sessions",
        "applied_index",
        "applied_term",
        "bytes_written",
        "descriptor",
        "extension",
        "last_timestamp",
    )

    def __init__(
        self,
        descriptor: RangeDescriptor,
        *,
        applied_index: int,
        applied_term: int,
        last_timestamp: int,
        conf_state: ConfState,
        sessions: SessionTable | None,
        extension: Extension | None,
    ) -> None:
        self.descriptor = descriptor
        self.applied_index = applied_index
        self.applied_term = applied_term
        self.last_timestamp = last_timestamp
        """Replicated time: the highest version used, or stamp seen. Every entry that has a stamp raises it."""
        self._conf_state = conf_state
        self._conf_bytes = rows.pack_conf_state(conf_state)
        self._sessions = sessions
        """None: as the engine's rows say, not loaded yet."""
        self.extension = extension
        self.bytes_written = 0
        """Since the range was last measured; whoever measures sets it back to 0. Not replicated."""

    @classmethod
    def create(
        cls,
        descriptor: RangeDescriptor,
        *,
        applied_index: int = INITIAL_INDEX,
        applied_term: int = INITIAL_TERM,
        last_timestamp: int = 0,
        sessions: Sequence[bytes] = (),
        extension: Extension | None = None,
    ) -> "RangeMachine":
        """A range at its beginning; call :meth:`write` to put its rows into a batch. ``sessions`` are session rows."""
        table = SessionTable.load(_indexed(sessions, applied_index))
        if extension is not None:
            extension.load(iter(()))
        return cls(
            descriptor,
            applied_index=applied_index,
            applied_term=applied_term,
            last_timestamp=last_timestamp,
            conf_state=conf_state_of(descriptor),
            sessions=table,
            extension=extension,
        )

    @classmethod
    def load(cls, range_id: RangeId, reader: Reader, extension: Extension | None = None) -> "RangeMachine | None":
        """The range as its rows say; None if there are none, or only the mark of an unfinished install (see
        :func:`shardkv.machine.snapshot.installing`). Raises Corruption."""
        state_row, descriptor_row = reader.get_many([keys.applied_key(range_id), keys.descriptor_key(range_id)])
        if state_row is None:
            return None
        state = rows.unpack_applied(state_row)
        if isinstance(state, rows.InstallMark):
            return None
        if descriptor_row is None:
            raise Corruption(f"range {range_id} has applied entry {state.index} but has no descriptor")
        descriptor = rows.unpack_descriptor(descriptor_row)
        if extension is not None:
            span = keys.kind_span(range_id, keys.EXTENSION)
            extension.load(reader.scan(*span))
        return cls(
            descriptor,
            applied_index=state.index,
            applied_term=state.term,
            last_timestamp=state.last_timestamp,
            conf_state=state.conf_state,
            sessions=None,
            extension=extension,
        )

    @property
    def range_id(self) -> RangeId:
        return self.descriptor.range_id

    @property
    def conf_state(self) -> ConfState:
        """The Raft configuration as of the applied index."""
        return self._conf_state

    @property
    def joint(self) -> bool:
        """Whether the range is between two replica sets."""
        return bool(self._conf_state.voters_outgoing)

    def snapshot_metadata(self) -> SnapshotMetadata:
        """What Raft has to know of a snapshot of the state as it is now."""
        return SnapshotMetadata(self.applied_index, self.applied_term, self._conf_state)

    def sessions(self, reader: Reader) -> SessionTable:
        """The session table, loaded from ``reader`` if need be; not to be changed."""
        table = self._sessions
        if table is None:
            span = keys.kind_span(self.range_id, keys.SESSIONS)
            table = SessionTable.load((keys.session_key_index(key), value) for key, value in reader.scan(*span))
            self._sessions = table
        return table

    def encode_write_entry(
        self, groups: Sequence[tuple[bytes, bytes, list[list[Any]]]], timestamp: int
    ) -> tuple[bytes, DecodedEntry]:
        """A WRITE entry at this range's span generation, and the same decoded, for :meth:`apply` on this node.

        ``groups`` are (session, the bytes of the commands array, the same decoded and checked), run in this order.
        """
        generation = self.descriptor.epoch.span
        raw: list[tuple[bytes, bytes]] = []
        body: list[Any] = []
        for session, commands, decoded in groups:
            raw.append((session, commands))
            body += (session, decoded)
        data = entries.encode_write_entry(raw, timestamp, generation)
        return data, [ENTRY_FORMAT, _WRITE, timestamp, generation, body]

    def encode_extension_entry(self, command: object, timestamp: int) -> bytes:
        return entries.encode_extension_entry(command, timestamp, self.descriptor.epoch.span)

    def apply(
        self,
        index: int,
        term: int,
        data: bytes,
        batch: WriteBatch,
        reader: Reader,
        decoded: DecodedEntry | None = None,
    ) -> Applied:
        """Apply the next entry. Changes go to ``batch``; ``reader`` shows the state before it.

        ``decoded``, where the caller has it, is ``data`` as :func:`shardkv.machine.entries.decode` gives it. Empty
        ``data`` is a new leader's first entry. Raises Corruption for bytes that no version wrote: stop the node.
        """
        self._advance(index, term)
        if not data:
            return NOTHING_APPLIED
        entry = entries.decode(data) if decoded is None else decoded
        stamp = self.last_timestamp + 1
        if entry[STAMP] > stamp:
            stamp = entry[STAMP]
        self.last_timestamp = stamp
        kind = entry[KIND]
        if kind == _WRITE:
            return self._apply_write(index, entry, len(data), stamp, batch, reader)
        if kind == _SPLIT:
            return self._apply_split(entry, stamp, batch, reader)
        if kind == _EXTENSION:
            return self._apply_extension(entry, len(data), stamp, batch)
        raise Corruption(f"entry {index} of range {self.range_id} has the unknown kind {kind!r}; upgrade this node")

    def apply_conf_change(
        self, index: int, term: int, context: bytes, conf_state: ConfState, batch: WriteBatch
    ) -> RangeDescriptor:
        """Apply a membership change: ``conf_state`` is what Raft made of it, ``context`` says where the replicas it
        brings in are (:func:`shardkv.machine.entries.encode_membership`); empty when it leaves a joint configuration.

        The descriptor then names every replica of the configuration, so while joint the leaving ones too, and its
        membership generation is one higher.
        """
        self._advance(index, term)
        nodes = {replica.replica_id: replica.node_id for replica in self.descriptor.replicas}
        for node_id, replica_id in entries.decode_membership(context):
            nodes.setdefault(ReplicaId(replica_id), NodeId(node_id))
        voters = {*conf_state.voters, *conf_state.voters_outgoing}
        members = {*voters, *conf_state.learners, *conf_state.learners_next}
        assert members <= nodes.keys(), f"nobody said where replicas {sorted(members - nodes.keys())} are"
        old = self.descriptor
        self.descriptor = RangeDescriptor(
            old.range_id,
            old.span,
            Epoch(old.epoch.membership + 1, old.epoch.span),
            tuple(
                Member(node_id, replica_id, ReplicaRole.VOTER if replica_id in voters else ReplicaRole.LEARNER)
                for replica_id, node_id in sorted(nodes.items())
                if replica_id in members
            ),
        )
        self._conf_state = conf_state
        self._conf_bytes = rows.pack_conf_state(conf_state)
        batch.put(keys.descriptor_key(self.range_id), rows.pack_descriptor(self.descriptor))
        return self.descriptor

    def finish(self, batch: WriteBatch) -> None:
        """Put the applied row into ``batch``: once for all entries applied to it, before it is written (trap 10)."""
        batch.put(
            keys.applied_key(self.range_id),
            rows.pack_applied(self.applied_index, self.applied_term, self.last_timestamp, self._conf_bytes),
        )

    def write(self, batch: WriteBatch, sessions: Sequence[bytes] = ()) -> None:
        """Put every system row of a machine that :meth:`create` made, of these ``sessions``, into ``batch``."""
        batch.put(keys.descriptor_key(self.range_id), rows.pack_descriptor(self.descriptor))
        assert self._sessions is not None, f"range {self.range_id} was loaded: its rows are written already"
        for index, row in _indexed(sessions, self.applied_index):
            batch.put(keys.session_key(self.range_id, index), row)
        self.finish(batch)

    def rest(self, now_ms: int) -> None:
        """Let go of what is only in memory of commands that have had their time: a range that is not written any more
        would keep it for ever."""
        if self._sessions is not None and self._sessions.idle(now_ms):
            self._sessions = None

    def _advance(self, index: int, term: int) -> None:
        assert index == self.applied_index + 1, f"entry {index} after {self.applied_index} of range {self.range_id}"
        assert term >= self.applied_term, f"term {term} after {self.applied_term} of range {self.range_id}"
        self.applied_index = index
        self.applied_term = term

    def _apply_write(
        self, index: int, entry: DecodedEntry, size: int, stamp: int, batch: WriteBatch, reader: Reader
    ) -> Applied:
        now_ms = timestamp_ms(stamp)
        table = self._living_sessions(now_ms, batch, reader)
        run = WriteRun(self.descriptor, table, index, stamp, now_ms, batch, reader)
        outcomes = run.run(entry)
        if run.version > stamp:
            self.last_timestamp = run.version - 1
        self.bytes_written += size
        return Applied(outcomes)

    def _living_sessions(self, now_ms: int, batch: WriteBatch, reader: Reader) -> SessionTable:
        """The session table without what has had its time by then; its rows go with the batch."""
        table = self._sessions
        if table is None:
            table = self._sessions = SessionTable.load(self._living_rows(now_ms, batch, reader))
        for expired in table.expire(now_ms):
            batch.delete(keys.session_key(self.range_id, expired))
        return table

    def _living_rows(self, now_ms: int, batch: WriteBatch, reader: Reader) -> Iterator[tuple[int, bytes]]:
        """After a rest all of them may have had their time, and be too many to be looked at more closely."""
        living = False
        for key, value in reader.scan(*keys.kind_span(self.range_id, keys.SESSIONS)):
            living = living or not SessionTable.expired(value, now_ms)
            if living:
                yield keys.session_key_index(key), value
            else:
                batch.delete(key)

    def _apply_split(self, entry: DecodedEntry, stamp: int, batch: WriteBatch, reader: Reader) -> Applied:
        command = entries.split_command(entry)
        error = problem(self.descriptor, command, joint=self.joint)
        if error is not None:
            return Applied([error])
        left, right = divide(self.descriptor, command)
        sessions = self._living_sessions(timestamp_ms(stamp), batch, reader).consolidated()
        child = RangeMachine.create(right, last_timestamp=self.last_timestamp, sessions=sessions)
        self.descriptor = left
        batch.put(keys.descriptor_key(self.range_id), rows.pack_descriptor(left))
        return Applied([[left.to_wire(), right.to_wire()]], SplitResult(left, right, child, sessions))

    def _apply_extension(self, entry: DecodedEntry, size: int, stamp: int, batch: WriteBatch) -> Applied:
        if self.extension is None:
            raise Corruption(f"range {self.range_id} has no extension, but an entry for one")
        self.bytes_written += size
        try:
            result = self.extension.apply(entry[BODY], stamp, batch)
        except StorageError:
            raise
        except ShardKVError as error:
            return Applied([error])
        return Applied([result])

    def check(self) -> None:
        descriptor = self.descriptor
        assert self.applied_index >= INITIAL_INDEX, f"applied index {self.applied_index}"
        assert self.applied_term >= INITIAL_TERM, f"applied term {self.applied_term}"
        assert self.last_timestamp >= 0, f"replicated time {self.last_timestamp}"
        assert self._conf_bytes == rows.pack_conf_state(self._conf_state), "the packed configuration is an old one"
        ids = [replica.replica_id for replica in descriptor.replicas]
        assert len(set(ids)) == len(ids), f"replica ids {ids} of range {self.range_id} repeat"
        conf_state = self._conf_state
        members = {*conf_state.voters, *conf_state.voters_outgoing, *conf_state.learners, *conf_state.learners_next}
        assert members == set(ids), f"range {self.range_id} has members {sorted(members)}, its descriptor {sorted(ids)}"
        if self._sessions is not None:
            self._sessions.check()


def _indexed(sessions: Sequence[bytes], last: int) -> Iterator[tuple[int, bytes]]:
    """Session rows with the indices they have, of which the newest has the ``last``."""
    return enumerate(sessions, last - len(sessions) + 1)


def conf_state_of(descriptor: RangeDescriptor) -> ConfState:
    """The configuration of a range whose replicas are as its descriptor says, none on its way in or out."""
    by_role: dict[ReplicaRole, list[int]] = {ReplicaRole.VOTER: [], ReplicaRole.LEARNER: []}
    for replica in descriptor.replicas:
        by_role[replica.role].append(replica.replica_id)
    return ConfState(tuple(sorted(by_role[ReplicaRole.VOTER])), tuple(sorted(by_role[ReplicaRole.LEARNER])))
