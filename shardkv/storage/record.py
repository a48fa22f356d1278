"""The format of the shared Raft log: updates, and the records they are packed into.

Lives here: what one group changes in one turn (:class:`LogUpdate`), and bytes from and to it. Does not live here: where
a record goes, what the groups make of it, I/O. The rule: nothing is decided, and nothing that was decoded is trusted
before its checksum has been compared.

A record is a header, a meta section (every field of every group) and a data section (the entries' data, one after
another). The header's checksum covers header and meta; the meta holds a checksum of each entry's data, so one entry can
be read back and checked alone, and every byte is summed once. See docs/internals/storage.md for the tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Final, NamedTuple
from zlib import crc32

from shardkv.raft.messages import ConfState, Entry, HardState
from shardkv.types import RangeId, ReplicaId

FORMAT: Final = 1

MAGIC: Final = b"\xf5kvR"
HEADER: Final = Struct("<4sIIIQQQ")
"""magic, checksum, meta bytes, data bytes, segment id, sequence number, highest sequence number known to be synced."""
HEADER_BYTES: Final = HEADER.size
_HEADER_START: Final = Struct("<4sI")
_HEADER_SUMMED: Final = Struct("<IIQQQ")
"""The checksum covers the second part of the header, then the meta section."""
_SUMMED: Final = _HEADER_START.size

META_BYTES_MAX: Final = 1 << 30
DATA_BYTES_MAX: Final = 1 << 30
"""Far above what a turn may hold; a header that says more is damaged."""


class RecordKind:
    """The first byte of the meta section."""

    TURN: Final = 1
    CHECKPOINT: Final = 2


class CreateGroup(NamedTuple):
    """A group begins on this node, with a log that continues after ``index``. ``payload`` is the owner's."""

    replica_id: ReplicaId
    index: int  # type: ignore[assignment]  # the domain name wins over tuple.index
    term: int
    conf_state: ConfState
    payload: bytes = b""


class ResetLog(NamedTuple):
    """A snapshot was installed: the whole log is dropped and continues after ``index``."""

    index: int  # type: ignore[assignment]
    term: int
    conf_state: ConfState


class CompactLog(NamedTuple):
    """Entries up to and with ``index`` are needed no more."""

    index: int  # type: ignore[assignment]
    term: int


class Tombstone(NamedTuple):
    """Replicas of the range up to and with ``replica_id`` have ended on this node. ``payload`` is the owner's."""

    replica_id: ReplicaId
    payload: bytes = b""


@dataclass(slots=True)
class LogUpdate:
    """What one group changes in one turn. Made once and not changed after.

    Applied in this order: create, reset, entries, hard state, compact, tombstone, release. ``release`` frees the log of
    a group that a tombstone has ended; it may come only after an engine flush that covers the batch which ended it.
    """

    range_id: RangeId
    hard_state: HardState | None = None
    entries: Sequence[Entry] = ()
    create: CreateGroup | None = None
    reset: ResetLog | None = None
    compact: CompactLog | None = None
    tombstone: Tombstone | None = None
    release: bool = False


class EntryPlace(NamedTuple):
    """An entry without its data: how large it is and where in the segment it lies."""

    term: int
    type: int
    bytes: int
    crc: int
    offset: int
    """Of the data, from the start of the data section."""


class DecodedUpdate(NamedTuple):
    """A :class:`LogUpdate` as recovery meets it: the entries' data are still in the file."""

    range_id: RangeId
    create: CreateGroup | None
    reset: ResetLog | None
    hard_state: HardState | None
    entries_start: int
    entries: list[EntryPlace]
    rewritten: bool
    """The entries are copies of what the log held already, moved here from an old segment."""
    compact: CompactLog | None
    tombstone: Tombstone | None
    release: bool


class GroupMeta(NamedTuple):
    """All of a group but its entries, as a checkpoint holds it."""

    range_id: RangeId
    replica_id: ReplicaId
    hard_state: HardState
    compact_index: int
    compact_term: int
    last_index: int
    conf_state: ConfState
    payload: bytes
    tombstone: Tombstone | None


class Checkpoint(NamedTuple):
    groups: list[GroupMeta]
    tombstones: dict[RangeId, ReplicaId]


class Header(NamedTuple):
    crc: int
    meta_bytes: int
    data_bytes: int
    segment_id: int
    sequence: int
    synced_sequence: int

    @property
    def record_bytes(self) -> int:
        return HEADER_BYTES + self.meta_bytes + self.data_bytes


class Malformed(Exception):
    """A meta section whose checksum is right says nonsense."""


# Flags of a group's block in a turn; the fields follow in this order.
_CREATE: Final = 1
_RESET: Final = 2
_HARD_STATE: Final = 4
_ENTRIES: Final = 8
_REWRITTEN: Final = 16
_COMPACT: Final = 32
_TOMBSTONE: Final = 64
_RELEASE: Final = 128

_KIND = Struct("<BB")
_BLOCK = Struct("<QB")
_HARD = Struct("<QQQ")
_RUN = Struct("<QI")
_ENTRY = Struct("<QBII")
_PAIR = Struct("<QQ")
_REPLICA = Struct("<QI")
_COUNT = Struct("<I")
_BEGIN = Struct("<QQQI")
_GROUP = Struct("<QQQQQQQQBI")

# The two shapes that nearly every block has, packed in one call.
_HARD_BLOCK = Struct("<QBQQQ")
_HARD_ONE = Struct("<QBQQQQIQBII")
_ONE = Struct("<QBQIQBII")
_FLAGS_AT: Final = 8
"""Where a block's flags stand in it."""

_TURN_START: Final = _KIND.pack(RecordKind.TURN, FORMAT)
_CHECKPOINT_START: Final = _KIND.pack(RecordKind.CHECKPOINT, FORMAT)


def seed_of(token: bytes) -> int:
    """What every checksum starts from, so that a record of another data directory is never taken for one of this."""
    return crc32(token)


def pack_header(seed: int, meta: bytes, data_bytes: int, segment_id: int, sequence: int, synced_sequence: int) -> bytes:
    assert len(meta) <= META_BYTES_MAX, f"a record with a meta section of {len(meta)} bytes"
    assert data_bytes <= DATA_BYTES_MAX, f"a record with {data_bytes} bytes of data"
    summed = _HEADER_SUMMED.pack(len(meta), data_bytes, segment_id, sequence, synced_sequence)
    return _HEADER_START.pack(MAGIC, crc32(meta, crc32(summed, seed))) + summed


def unpack_header(data: bytes, segment_id: int) -> Header | None:
    """The header at the start of ``data``, or None if that cannot be one of this segment. Nothing is summed yet."""
    if len(data) < HEADER_BYTES:
        return None
    magic, crc, meta_bytes, data_bytes, segment, sequence, synced_sequence = HEADER.unpack_from(data)
    if magic != MAGIC or segment != segment_id or not 2 <= meta_bytes <= META_BYTES_MAX or data_bytes > DATA_BYTES_MAX:
        return None
    return Header(crc, meta_bytes, data_bytes, segment, sequence, synced_sequence)


def header_sums_up(seed: int, header: bytes, meta: bytes, crc: int) -> bool:
    """Whether the checksum is that of this header (its bytes) and meta section."""
    return crc32(meta, crc32(header[_SUMMED:HEADER_BYTES], seed)) == crc


def _pack_conf_state(conf_state: ConfState) -> bytes:
    lists = (conf_state.voters, conf_state.learners, conf_state.voters_outgoing, conf_state.learners_next)
    counts = [len(ids) for ids in lists]
    ids = [replica_id for members in lists for replica_id in members]
    return Struct(f"<BBBBB{len(ids)}Q").pack(*counts, conf_state.auto_leave, *ids)


def encode_turn(updates: Sequence[LogUpdate], *, rewritten: bool = False) -> tuple[bytes, list[bytes], list[int], int]:
    """The meta section, the data section in pieces, the checksum of each entry in order, and the data's size.

    ``rewritten`` marks the entries of all updates as copies.
    """
    parts = [_TURN_START]
    pieces: list[bytes] = []
    crcs: list[int] = []
    size = 0
    for update in updates:
        entries = update.entries
        hard_state = update.hard_state
        plain = (
            update.create is None
            and update.reset is None
            and update.compact is None
            and update.tombstone is None
            and not update.release
            and not rewritten
        )
        if plain and len(entries) == 1:
            term, index, kind, data = entries[0]
            crc = crc32(data)
            length = len(data)
            if hard_state is not None:
                parts.append(
                    _HARD_ONE.pack(
                        update.range_id, _HARD_STATE | _ENTRIES, *hard_state, index, 1, term, kind, length, crc
                    )
                )
            else:
                parts.append(_ONE.pack(update.range_id, _ENTRIES, index, 1, term, kind, length, crc))
            crcs.append(crc)
            pieces.append(data)
            size += length
        elif plain and not entries and hard_state is not None:
            parts.append(_HARD_BLOCK.pack(update.range_id, _HARD_STATE, *hard_state))
        else:
            _pack_block(update, rewritten, parts)
            for term, _index, kind, data in entries:
                crc = crc32(data)
                length = len(data)
                parts.append(_ENTRY.pack(term, kind, length, crc))
                crcs.append(crc)
                pieces.append(data)
                size += length
            _pack_block_end(update, parts)
    return b"".join(parts), pieces, crcs, size


def _pack_block(update: LogUpdate, rewritten: bool, parts: list[bytes]) -> None:
    """A block up to its entries."""
    flags = (
        (_CREATE if update.create is not None else 0)
        | (_RESET if update.reset is not None else 0)
        | (_HARD_STATE if update.hard_state is not None else 0)
        | ((_REWRITTEN if rewritten else _ENTRIES) if update.entries else 0)
        | (_COMPACT if update.compact is not None else 0)
        | (_TOMBSTONE if update.tombstone is not None else 0)
        | (_RELEASE if update.release else 0)
    )
    parts.append(_BLOCK.pack(update.range_id, flags))
    if update.create is not None:
        create = update.create
        parts.append(_BEGIN.pack(create.replica_id, create.index, create.term, len(create.payload)))
        parts.append(_pack_conf_state(create.conf_state))
        parts.append(create.payload)
    if update.reset is not None:
        parts.append(_PAIR.pack(update.reset.index, update.reset.term))
        parts.append(_pack_conf_state(update.reset.conf_state))
    if update.hard_state is not None:
        parts.append(_HARD.pack(*update.hard_state))
    if update.entries:
        parts.append(_RUN.pack(update.entries[0].index, len(update.entries)))


def _pack_block_end(update: LogUpdate, parts: list[bytes]) -> None:
    """A block's fields after its entries."""
    if update.compact is not None:
        parts.append(_PAIR.pack(update.compact.index, update.compact.term))
    if update.tombstone is not None:
        parts.append(_REPLICA.pack(update.tombstone.replica_id, len(update.tombstone.payload)))
        parts.append(update.tombstone.payload)


def pack_group_tail(conf_state: ConfState, payload: bytes, tombstone: Tombstone | None) -> bytes:
    """The part of a group's checkpoint that seldom changes; groups keep it packed."""
    tail = _pack_conf_state(conf_state) + payload
    if tombstone is not None:
        tail += _REPLICA.pack(tombstone.replica_id, len(tombstone.payload)) + tombstone.payload
    return tail


def pack_group(meta_head: Sequence[int], ended: bool, payload_bytes: int, tail: bytes) -> bytes:
    """A group in a checkpoint. ``meta_head``: range, replica, term, vote, commit, compact index, compact term, last."""
    return _GROUP.pack(*meta_head, ended, payload_bytes) + tail


def encode_checkpoint(groups: Sequence[bytes], tombstones: dict[RangeId, ReplicaId]) -> bytes:
    """The meta section of a checkpoint, of groups packed by :func:`pack_group`. It has no data section."""
    ids = [number for pair in tombstones.items() for number in pair]
    return b"".join(
        (
            _CHECKPOINT_START,
            _COUNT.pack(len(groups)),
            *groups,
            _COUNT.pack(len(tombstones)),
            Struct(f"<{len(ids)}Q").pack(*ids),
        )
    )


class _Reader:
    """A cursor over a meta section."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, struct: Struct) -> tuple[int, ...]:
        fields = struct.unpack_from(self.data, self.position)
        self.position += struct.size
        return fields

    def blob(self, count: int) -> bytes:
        start = self.position
        if start + count > len(self.data):
            raise Malformed(f"{count} bytes at {start} of {len(self.data)}")
        self.position = start + count
        return self.data[start : start + count]

    def conf_state(self) -> ConfState:
        voters, learners, outgoing, learners_next, auto_leave = self.take(Struct("<BBBBB"))
        ids = self.take(Struct(f"<{voters + learners + outgoing + learners_next}Q"))
        first, second = voters + learners, voters + learners + outgoing
        return ConfState(ids[:voters], ids[voters:first], ids[first:second], ids[second:], bool(auto_leave))

    def tombstone(self) -> Tombstone:
        replica_id, count = self.take(_REPLICA)
        return Tombstone(ReplicaId(replica_id), self.blob(count))


def decode_meta(meta: bytes) -> list[DecodedUpdate] | Checkpoint:
    """The inverse of :func:`encode_turn` and :func:`encode_checkpoint`. Raises Malformed."""
    kind, version = _KIND.unpack_from(meta)
    if version != FORMAT:
        raise Malformed(f"its format is {version}, this program reads {FORMAT}")
    reader = _Reader(meta, _KIND.size)
    try:
        if kind == RecordKind.TURN:
            return _decode_turn(reader)
        if kind == RecordKind.CHECKPOINT:
            return _decode_checkpoint(reader)
    except (StructError, ValueError) as error:
        raise Malformed(str(error)) from error
    raise Malformed(f"a record of kind {kind}")


def _decode_turn(reader: _Reader) -> list[DecodedUpdate]:
    updates = []
    data_bytes = 0
    data, position = reader.data, reader.position
    last = len(data) - _HARD_ONE.size
    while position < len(data):
        # The shape that nearly every block has, in one call.
        if position <= last and data[position + _FLAGS_AT] == _HARD_STATE | _ENTRIES:
            fields = _HARD_ONE.unpack_from(data, position)
            range_id, _, term, vote, commit, start, count, entry_term, kind, length, crc = fields
            if count == 1:
                entries = [EntryPlace(entry_term, kind, length, crc, data_bytes)]
                hard_state = HardState(term, vote, commit)
                updates.append(
                    DecodedUpdate(range_id, None, None, hard_state, start, entries, False, None, None, False)
                )
                data_bytes += length
                position += _HARD_ONE.size
                continue
        reader.position = position
        update = _decode_block(reader, data_bytes)
        updates.append(update)
        if update.entries:
            data_bytes = update.entries[-1].offset + update.entries[-1].bytes
        position = reader.position
    return updates


def _decode_block(reader: _Reader, offset: int) -> DecodedUpdate:
    """One block of a turn, whose entries' data begin at ``offset`` in the data section."""
    range_id, flags = reader.take(_BLOCK)
    create = reset = hard_state = compact = tombstone = None
    start = 0
    entries: list[EntryPlace] = []
    if flags & _CREATE:
        replica_id, index, term, count = reader.take(_BEGIN)
        conf_state = reader.conf_state()
        create = CreateGroup(ReplicaId(replica_id), index, term, conf_state, reader.blob(count))
    if flags & _RESET:
        index, term = reader.take(_PAIR)
        reset = ResetLog(index, term, reader.conf_state())
    if flags & _HARD_STATE:
        hard_state = HardState(*reader.take(_HARD))
    if flags & (_ENTRIES | _REWRITTEN):
        start, count = reader.take(_RUN)
        for _ in range(count):
            term, kind, length, crc = reader.take(_ENTRY)
            entries.append(EntryPlace(term, kind, length, crc, offset))
            offset += length
    if flags & _COMPACT:
        compact = CompactLog(*reader.take(_PAIR))
    if flags & _TOMBSTONE:
        tombstone = reader.tombstone()
    return DecodedUpdate(
        RangeId(range_id),
        create,
        reset,
        hard_state,
        start,
        entries,
        bool(flags & _REWRITTEN),
        compact,
        tombstone,
        bool(flags & _RELEASE),
    )


def _decode_checkpoint(reader: _Reader) -> Checkpoint:
    (count,) = reader.take(_COUNT)
    groups = []
    for _ in range(count):
        range_id, replica_id, term, vote, commit, index, index_term, last, ended, payload_bytes = reader.take(_GROUP)
        conf_state = reader.conf_state()
        payload = reader.blob(payload_bytes)
        tombstone = reader.tombstone() if ended else None
        hard_state = HardState(term, vote, commit)
        groups.append(
            GroupMeta(
                RangeId(range_id),
                ReplicaId(replica_id),
                hard_state,
                index,
                index_term,
                last,
                conf_state,
                payload,
                tombstone,
            )
        )
    (count,) = reader.take(_COUNT)
    ids = reader.take(Struct(f"<{2 * count}Q"))
    tombstones = {RangeId(range_id): ReplicaId(replica_id) for range_id, replica_id in zip(ids[::2], ids[1::2])}
    if reader.position != len(reader.data):
        raise Malformed(f"{len(reader.data) - reader.position} bytes too many")
    return Checkpoint(groups, tombstones)
