"""A range on one node in a few lines: a machine, an engine, clients, and a log that can be replayed elsewhere."""

from collections.abc import Sequence
from typing import Any

from shardkv.machine import RangeMachine, SplitCommand, SplitResult
from shardkv.machine.entries import encode_extension_entry, encode_split_entry, encode_write_entry
from shardkv.machine.machine import Applied, Extension
from shardkv.machine.reads import get
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import (
    EVERY_KEY,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    timestamp_at,
)
from shardkv.wire import commands

NOW_MS = 1_700_000_000_000
TERM = 5
FIRST_EPOCH = Epoch(1, 1)


def descriptor(
    span: KeyRange = EVERY_KEY, *, range_id: int = 1, epoch: Epoch = FIRST_EPOCH, first_replica: int = 1
) -> RangeDescriptor:
    """A range on nodes 1 to 3, with replicas from ``first_replica`` on."""
    replicas = tuple(Member(NodeId(node), ReplicaId(first_replica + node - 1)) for node in (1, 2, 3))
    return RangeDescriptor(RangeId(range_id), span, epoch, replicas)


class Client:
    """Makes commands of one session. ``below`` is acknowledged_below; it follows the sequence unless it is held."""

    def __init__(self, name: bytes = b"alice", *, now_ms: int = NOW_MS) -> None:
        self.session = name.ljust(16, b".")
        self.sequence = 0
        self.below = 1
        self.now_ms = now_ms

    def _seal(self, op: int, body: bytes) -> bytes:
        self.sequence += 1
        return commands.seal(op, body, self.sequence, self.now_ms, self.below)

    def put(self, key: bytes, value: bytes, if_version: int | None = None) -> bytes:
        return self._seal(commands.Op.PUT, commands.pack_put(key, value, if_version))

    def delete(self, key: bytes, if_version: int | None = None) -> bytes:
        return self._seal(commands.Op.DELETE, commands.pack_delete(key, if_version))

    def increment(self, key: bytes, delta: int = 1) -> bytes:
        return self._seal(commands.Op.INCREMENT, commands.pack_increment(key, delta))

    def delete_range(self, start: bytes, end: bytes | None) -> bytes:
        return self._seal(commands.Op.DELETE_RANGE, commands.pack_delete_range(start, end))


Change = tuple[int, int, bytes]
"""Index, term, data."""


class World:
    """One replica and the log it has applied; every entry is a batch of its own."""

    def __init__(
        self,
        range_descriptor: RangeDescriptor | None = None,
        *,
        now_ms: int = NOW_MS,
        extension: Extension | None = None,
        machine: RangeMachine | None = None,
    ) -> None:
        self.engine = MemoryEngine()
        self.now_ms = now_ms
        self.log: list[Change] = []
        if machine is None:
            machine = RangeMachine.create(range_descriptor or descriptor(), extension=extension)
            batch = WriteBatch()
            machine.write(batch)
            self.engine.write(batch)
        self.machine = machine

    def apply(self, data: bytes, *, keep_right: bool = True) -> Applied:
        """Append an entry, apply it, write its batch."""
        index = self.machine.applied_index + 1
        self.log.append((index, TERM, data))
        batch = WriteBatch()
        applied = self.machine.apply(index, TERM, data, batch, self.engine)
        if applied.split is not None:
            (applied.split.keep if keep_right else applied.split.drop)(batch)
        self.machine.finish(batch)
        self.engine.write(batch)
        self.machine.check()
        return applied

    def write(self, *groups: tuple[Client, Sequence[bytes]], generation: int | None = None) -> list[list[Any]]:
        """Apply one entry of these groups; their outcomes."""
        if generation is None:
            generation = self.machine.descriptor.epoch.span
        raw = [(client.session, commands.join(list(sealed))) for client, sealed in groups]
        applied = self.apply(encode_write_entry(raw, timestamp_at(self.now_ms), generation))
        return list(applied.outcomes)

    def do(self, client: Client, *sealed: bytes, generation: int | None = None) -> Any:
        """Apply one client's commands as one entry: the outcome of one, or a list of the outcomes of several."""
        [outcomes] = self.write((client, sealed), generation=generation)
        return outcomes[0] if len(sealed) == 1 else outcomes

    def split(self, key: bytes, *, right: int = 2, epoch: Epoch | None = None, keep_right: bool = True) -> Applied:
        return self.apply(
            encode_split_entry(split_command(self.machine.descriptor, key, right, epoch), timestamp_at(self.now_ms)),
            keep_right=keep_right,
        )

    def extend(self, command: object) -> Applied:
        return self.apply(encode_extension_entry(command, timestamp_at(self.now_ms)))

    def other(self, split: SplitResult) -> "World":
        """The right half of a split, on the same engine."""
        world = World.__new__(World)
        world.engine, world.now_ms, world.log, world.machine = self.engine, self.now_ms, [], split.machine
        return world

    def reload(self) -> None:
        """Forget the machine and load it from its rows."""
        machine = RangeMachine.load(self.machine.range_id, self.engine)
        assert machine is not None
        self.machine = machine

    def get(self, key: bytes) -> list[Any] | None:
        return get(self.machine, self.engine, [key])[0]

    def value(self, key: bytes) -> bytes | None:
        found = self.get(key)
        return None if found is None else found[0]

    def rows(self) -> list[tuple[bytes, bytes]]:
        return dump(self.engine)


def split_command(of: RangeDescriptor, key: bytes, right: int = 2, epoch: Epoch | None = None) -> SplitCommand:
    """A split whose right replicas are numbered from 100 times the right range's id."""
    replicas = tuple(
        (replica.node_id, ReplicaId(100 * right + position)) for position, replica in enumerate(of.replicas)
    )
    return SplitCommand(epoch or of.epoch, key, RangeId(right), replicas)


def dump(engine: MemoryEngine) -> list[tuple[bytes, bytes]]:
    """Every row of an engine."""
    return list(engine.scan(b"", b"\xff" * 8))
