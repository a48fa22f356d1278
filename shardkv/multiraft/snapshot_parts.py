"""What a snapshot's stream is made of, and the state of either end of it. Pure: no connection, no task.

Lives here: the messages, cutting a range into chunks, what each end must remember so that a stream that broke can go
on, the check of every row, and the pace. Does not live here: when to do what (``snapshot_sender`` and
``snapshot_receiver``).

The messages, each the payload of one SNAPSHOT frame:

    ["begin", id, range_id, to, from, term, index, log_term, conf_state, descriptor]
                                        answered by  ["from", chunks, checksum] or ["refused", reason]
    ["rows", number, rows, checksum]    answered by  ["have", number]
    ["end", chunks, rows, checksum, term]
                                        answered by  ["done"] or ["refused", reason]

``rows`` is the CBOR of ``[key, value, key, value, ...]`` in key order, so that what is summed is what was sent. A
checksum is that of all chunks so far. ``id`` names one stream of rows: one state of one range as one sender cut it.
After a break the sender says "begin" again under the same id; the receiver answers how much it has.

The rules: the receiver never believes a chunk that does not follow what it has, the sender goes on only from a place
where both agree on everything before it, and each end keeps a bounded amount whatever the range's size.
"""

from collections import deque
from itertools import chain
from typing import Any, Final, NamedTuple
from zlib import crc32

from shardkv import codec
from shardkv.environment import Clock
from shardkv.errors import Corruption, MalformedRequest, ProtocolError
from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM
from shardkv.machine.rows import InstallMark, unpack_applied, unpack_descriptor
from shardkv.machine.snapshot import engine_spans, snapshot_rows
from shardkv.raft.messages import ConfState, Message, MessageType, Snapshot, SnapshotMetadata
from shardkv.storage.engine import IngestBuilder, Reader
from shardkv.types import PLACEMENT_RANGE, RangeDescriptor, RangeId

CHUNK_BYTES: Final = 128 * 1024
"""Rows travel in chunks of about this size (or of one larger row): one is cut, packed and checked in one go."""
CHUNK_ROWS_MAX: Final = 500
"""A chunk of small rows takes the loop no longer than one of large ones, about a millisecond."""
WINDOW_CHUNKS: Final = 8
"""So many chunks may be on their way without having been acknowledged."""
ID_BYTES: Final = 16
SLOW_BYTES_PER_SECOND: Final = 128 * 1024
"""A stream that is slower takes no other's place: its other end is behind a slow link, or a slow disk."""
RATE_SECONDS: Final = 10.0
"""Over which a stream's rate is measured."""
PACE_CREDIT_NS: Final = 50_000_000
"""Who was late may catch up on this much."""


class Pace:
    """Keeps all streams of one direction together under a rate."""

    __slots__ = ("_clock", "_due_ns", "bytes_per_second")

    def __init__(self, clock: Clock, bytes_per_second: int) -> None:
        self._clock = clock
        self._due_ns = clock.monotonic_ns()
        self.bytes_per_second = bytes_per_second

    async def spend(self, count: int) -> None:
        """Wait until ``count`` bytes, and what was spent before them, fit the rate. Always a checkpoint."""
        now = self._clock.monotonic_ns()
        self._due_ns = max(self._due_ns, now - PACE_CREDIT_NS) + count * 1_000_000_000 // self.bytes_per_second
        await self._clock.sleep(max(0, self._due_ns - now) / 1e9)


class Rate:
    """How fast a stream gets on."""

    __slots__ = ("_measured", "_slow")

    def __init__(self, now_ns: int) -> None:
        self._slow = False
        self._measured = (now_ns, 0)
        """When it was measured last, and how many chunks had arrived."""

    def is_slow(self, arrived: int, now_ns: int, bytes_per_second_min: int) -> bool:
        """Whether it is, so many chunks having arrived; as it was last measured, until it can be told anew."""
        measured_ns, chunks = self._measured
        seconds = (now_ns - measured_ns) / 1e9
        if seconds >= RATE_SECONDS:
            self._slow = (arrived - chunks) * CHUNK_BYTES < bytes_per_second_min * seconds
            self._measured = (now_ns, arrived)
        return self._slow


def slow_rate(pace: Pace, places: int) -> int:
    """Below how many bytes in a second a stream is slow. Where the bound on the rate is low and the places are many,
    none is that has its share."""
    return min(SLOW_BYTES_PER_SECOND, pace.bytes_per_second // (4 * places))


class Chunk(NamedTuple):
    number: int
    """From 1."""
    rows: bytes
    checksum: int
    """Of all chunks up to and with this one."""


class Mark(NamedTuple):
    """A place between two chunks from which a stream can go on."""

    chunks: int
    rows: int
    checksum: int
    key: bytes
    """The last key before it."""


START: Final = Mark(0, 0, 0, b"")


class Outgoing:
    """A range on its way out of an engine snapshot.

    Invariant: the marks are those of every chunk from the last one acknowledged to the last one cut, in order.
    """

    __slots__ = ("_descriptor", "_marks", "_pairs", "_reader", "acknowledged_max", "begun")

    def __init__(self, reader: Reader, descriptor: RangeDescriptor) -> None:
        self._reader = reader
        self._descriptor = descriptor
        self._marks = deque([START])
        self._pairs = snapshot_rows(reader, descriptor)
        self.acknowledged_max = 0
        """The most chunks that the receiver was ever known to have: whether a resumed stream gets anywhere."""
        self.begun = False
        """Whether a chunk was ever cut: the receiver may have something."""

    @property
    def end(self) -> Mark:
        """Where the next chunk begins."""
        return self._marks[-1]

    @property
    def unacknowledged(self) -> int:
        return len(self._marks) - 1

    def next_chunk(self) -> Chunk | None:
        """Cut the next chunk; None at the end of the range."""
        pairs: list[bytes] = []
        size = 0
        for key, value in self._pairs:
            pairs += (key, value)
            size += len(key) + len(value)
            if size >= CHUNK_BYTES or len(pairs) >= 2 * CHUNK_ROWS_MAX:
                break
        if not pairs:
            return None
        self.begun = True
        rows = codec.dumps(pairs)
        before = self._marks[-1]
        mark = Mark(before.chunks + 1, before.rows + len(pairs) // 2, crc32(rows, before.checksum), pairs[-2])
        self._marks.append(mark)
        return Chunk(mark.chunks, rows, mark.checksum)

    def acknowledge(self, chunks: int) -> None:
        """The receiver has everything up to this chunk. Raises ProtocolError if it cannot."""
        if not self._marks[0].chunks < chunks <= self._marks[-1].chunks:
            raise ProtocolError(f"chunk {chunks} of a snapshot was acknowledged out of turn")
        while self._marks[0].chunks < chunks:
            self._marks.popleft()
        self.acknowledged_max = max(self.acknowledged_max, chunks)

    def resume(self, chunks: int, checksum: int) -> bool:
        """Go on after so many chunks, which sum up to this at the receiver; False if that was never sent like that."""
        marks = (START, *self._marks)
        for mark in marks:
            if mark.chunks == chunks and mark.checksum == checksum:
                self._marks = deque([mark])
                self.acknowledged_max = max(self.acknowledged_max, chunks)
                self._pairs = snapshot_rows(self._reader, self._descriptor, after=mark.key)
                return True
        return False

    def check(self) -> None:
        assert len(self._marks) <= WINDOW_CHUNKS + 1, f"{len(self._marks)} marks are kept"
        for one, other in zip(self._marks, list(self._marks)[1:]):
            assert other.chunks == one.chunks + 1, f"{other} follows {one}"
            assert other.key > one.key, f"{other} follows {one}"


class Incoming:
    """A snapshot that is arriving: its file so far, and how much of the stream that is."""

    __slots__ = ("_checker", "builder", "checksum", "chunks", "descriptor", "id", "metadata", "path", "rows")

    def __init__(
        self, id_: bytes, descriptor: RangeDescriptor, metadata: SnapshotMetadata, path: str, builder: IngestBuilder
    ) -> None:
        self.id = id_
        self.descriptor = descriptor
        self.metadata = metadata
        self.path = path
        self.builder = builder
        self.chunks = 0
        self.rows = 0
        self.checksum = 0
        self._checker = RowChecker(descriptor)

    @property
    def range_id(self) -> RangeId:
        return self.descriptor.range_id

    def is_resumed_by(self, id_: bytes, descriptor: RangeDescriptor, metadata: SnapshotMetadata) -> bool:
        return self.id == id_ and self.descriptor == descriptor and self.metadata == metadata

    def absorb(self, number: int, rows: bytes, checksum: int) -> None:
        """Put a chunk into the file.

        Raises ProtocolError for what does not follow, or is not that range's, and StorageError; either way part of the
        chunk may be in the file, which is of no more use.
        """
        if number != self.chunks + 1:
            raise ProtocolError(f"chunk {number} of a snapshot follows chunk {self.chunks}")
        summed = crc32(rows, self.checksum)
        if summed != checksum:
            raise ProtocolError(f"chunk {number} of a snapshot is damaged")
        pairs = _decode_rows(rows)
        look_at, put = self._checker.look_at, self.builder.put
        for position in range(0, len(pairs), 2):
            key, value = pairs[position], pairs[position + 1]
            look_at(key, value)
            put(key, value)
        self.chunks = number
        self.rows += len(pairs) // 2
        self.checksum = summed

    def require_whole(self, chunks: int, rows: int, checksum: int) -> None:
        """Raises ProtocolError unless this is all that was sent, and it holds the state that was announced."""
        if (chunks, rows, checksum) != (self.chunks, self.rows, self.checksum):
            raise ProtocolError(
                f"{chunks} chunks with {rows} rows were sent and {self.chunks} with {self.rows} have arrived"
                if (chunks, rows) != (self.chunks, self.rows)
                else "a snapshot has arrived as something else than what was sent"
            )
        self._checker.require_state(self.metadata)


def _decode_rows(rows: bytes) -> list[Any]:
    try:
        pairs = codec.loads(rows)
    except MalformedRequest as error:
        raise ProtocolError(f"the rows of a snapshot are malformed: {error}") from error
    if not isinstance(pairs, list) or len(pairs) % 2 or not pairs:
        raise ProtocolError("the rows of a snapshot are no pairs")
    return pairs


class RowChecker:
    """Looks at the rows of a snapshot as they come: they go into the engine unseen, and it holds other ranges too."""

    __slots__ = ("_descriptor", "_last", "_spans", "_state", "_stated")

    def __init__(self, descriptor: RangeDescriptor) -> None:
        self._descriptor = descriptor
        self._spans = engine_spans(descriptor)
        self._last = b""
        self._state: bytes | None = None
        self._stated: bytes | None = None

    def look_at(self, key: object, value: object) -> None:
        """Raises ProtocolError for what is no row of this range, or comes out of order."""
        if type(key) is not bytes or type(value) is not bytes or key <= self._last:
            raise ProtocolError(f"the rows of a snapshot of range {self._descriptor.range_id} are out of order")
        self._last = key
        start, end = self._spans[0]
        if not start <= key < end:
            if len(self._spans) == 1:
                raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} has a row of somebody else's")
            # The rows of the next span; they are in key order, and so are the spans.
            del self._spans[0]
            self._last = b""
            self.look_at(key, value)
        elif key == keys.applied_key(self._descriptor.range_id):
            self._state = value
        elif key == keys.descriptor_key(self._descriptor.range_id):
            self._stated = value

    def require_state(self, metadata: SnapshotMetadata) -> None:
        """Raises ProtocolError unless the rows hold the state that the snapshot was announced as."""
        try:
            state = unpack_applied(self._state or b"")
            descriptor = unpack_descriptor(self._stated or b"")
        except Corruption as error:
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} has no state: {error}") from error
        if isinstance(state, InstallMark) or descriptor != self._descriptor:
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} holds another state than announced")
        if (state.index, state.term, state.conf_state) != tuple(metadata):
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} holds another index than announced")


class Begin(NamedTuple):
    """What a stream announces."""

    id: bytes
    message: Message
    """The SNAP message that the group is given once everything has arrived."""
    descriptor: RangeDescriptor

    @property
    def range_id(self) -> RangeId:
        return self.descriptor.range_id

    @property
    def metadata(self) -> SnapshotMetadata:
        assert self.message.snapshot is not None, f"a snapshot of range {self.range_id} without one"
        return self.message.snapshot.metadata


def encode_begin(
    id_: bytes, to: int, from_: int, term: int, metadata: SnapshotMetadata, descriptor: RangeDescriptor
) -> list[Any]:
    return [
        "begin",
        id_,
        descriptor.range_id,
        to,
        from_,
        term,
        metadata.index,
        metadata.term,
        [list(part) if isinstance(part, tuple) else part for part in metadata.conf_state],
        descriptor.to_wire(),
    ]


def decode_begin(begin: list[Any]) -> Begin:
    """Raises ProtocolError or MalformedRequest for what is not the beginning of a snapshot."""
    match begin:
        case [
            "begin",
            bytes(id_),
            int(range_id),
            int(to),
            int(from_),
            int(term),
            int(index),
            int(log_term),
            [[*voters], [*learners], [*outgoing], [*learners_next], bool(auto_leave)],
            fields,
        ] if len(id_) == ID_BYTES:
            conf_state = ConfState(tuple(voters), tuple(learners), tuple(outgoing), tuple(learners_next), auto_leave)
            try:
                descriptor = RangeDescriptor.from_wire(fields)
            except ValueError as error:
                raise codec.malformed(str(error)) from error
            members = {replica.replica_id for replica in descriptor.replicas}
            ids = tuple(chain(voters, learners, outgoing, learners_next))
            if (
                descriptor.range_id == range_id
                and type(range_id) is int
                and 0 <= range_id < 1 << 63
                and descriptor.span.empty == (range_id == PLACEMENT_RANGE)
                and voters
                and all(type(each) is int and 0 < each < 1 << 63 for each in (*ids, from_))
                and set(ids) == members
                and not {*learners, *learners_next} & set(voters)
                and not set(learners) & set(outgoing)
                and set(learners_next) <= set(outgoing)
                and to in members
                and INITIAL_TERM <= log_term <= term < 1 << 63
                and INITIAL_INDEX <= index < 1 << 63
            ):
                snapshot = Snapshot(SnapshotMetadata(index, log_term, conf_state))
                return Begin(id_, Message(MessageType.SNAP, to, from_, term, snapshot=snapshot), descriptor)
    raise ProtocolError(f"not the beginning of a snapshot: {str(begin)[:100]}")
