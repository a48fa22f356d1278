"""Running the commands of a WRITE entry: checks, effects, outcomes, records.

Lives here: the order of the checks and what each command does. Does not live here: entries' layout, the rows of the
session table, time. The rules (DESIGN §4.6):

* Checks in this order: age and window, acknowledged_below, table, epoch, then conditions.
* An executed command's outcome is recorded, failures too; what was refused before it was executed never is, and moves
  nothing.
* Everything follows from the entry and replicated state: replicas and replays come to the same rows.

New plain puts, the common case, take :func:`_run_plain_put` (a group of one) or :func:`_run_plain_puts` (column by
column at C speed); whatever they do not recognise at a glance goes through :class:`_General`, one command at a time.
All come to the same outcomes and rows that say the same.
"""

import re
from itertools import repeat
from operator import add, lt
from struct import error as StructError
from typing import Any, Final

from shardkv import errors
from shardkv.errors import Corruption
from shardkv.machine import keys
from shardkv.machine.entries import BODY, GENERATION
from shardkv.machine.envelope import FORMAT as ENVELOPE_FORMAT
from shardkv.machine.envelope import HEAD_BYTES, pack_head, unpack, version_of
from shardkv.machine.sessions import (
    BOOLEAN,
    DIGEST_MASK,
    NOT_AN_INTEGER,
    NUMBER,
    PLAIN,
    VERSION,
    VERSION_MISMATCH,
    Record,
    Session,
    SessionTable,
    outcome,
    pack_mixed,
    pack_plain_one,
    pack_row,
    packed_number,
    plain_struct,
)
from shardkv.storage.engine import MISSING, Reader, WriteBatch
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_WINDOW_MAX, RangeDescriptor
from shardkv.wire.commands import Op

Group = list[Any]
"""One session's commands, decoded."""

_PUT, _DELETE, _INCREMENT, _DELETE_RANGE = (int(op) for op in (Op.PUT, Op.DELETE, Op.INCREMENT, Op.DELETE_RANGE))
_USER: Final = keys.USER_PREFIX
_ENVELOPE_OVERHEAD: Final = len(_USER) + HEAD_BYTES
ISSUED_AHEAD_MS_MAX: Final = 500
"""How far a command may be issued ahead of replicated time. It is the default of ``clock_offset_max_ms``, but no
setting: replicas with different settings would come to different rows."""
_FIND_MAX: Final = 8
"""A group of up to this many commands looks its records up one by one."""
_DECIMAL: Final = re.compile(rb"-?[0-9]{1,19}", re.ASCII)
_INT64_MIN: Final = -(1 << 63)
_INT64_MAX: Final = (1 << 63) - 1


class WriteRun:
    """One WRITE entry on its way through the state machine; made for each entry and dropped after it."""

    __slots__ = (
        "batch",
        "descriptor",
        "issued_at",
        "newest",
        "oldest",
        "pieces",
        "reader",
        "row",
        "same_generation",
        "table",
        "touched",
        "version",
    )

    def __init__(
        self,
        descriptor: RangeDescriptor,
        table: SessionTable,
        row: int,
        version: int,
        now_ms: int,
        batch: WriteBatch,
        reader: Reader,
    ) -> None:
        """``row`` is the entry's index; ``version`` its stamp as raised above everything the range has seen, and
        ``now_ms`` the time in that."""
        self.descriptor = descriptor
        self.table = table
        self.row = row
        self.version = version
        """What the next command gets, executed or not."""
        self.batch = batch
        self.reader = reader
        self.oldest = now_ms - SESSION_AGE_MS_MAX
        self.newest = now_ms + ISSUED_AHEAD_MS_MAX
        self.same_generation = True
        self.pieces: list[bytes] = []
        self.touched: list[bytes] = []
        self.issued_at = 0

    def run(self, entry: list[Any]) -> list[list[Any]]:
        """The outcomes of each group; afterwards ``version`` is one above the last used."""
        self.same_generation = same_generation = entry[GENERATION] == self.descriptor.epoch.span
        body = entry[BODY]
        outcomes: list[list[Any]] = []
        for position in range(0, len(body), 2):
            session_id, commands = body[position], body[position + 1]
            found = None
            if same_generation:
                run = _run_plain_put if len(commands) == 1 else _run_plain_puts
                found = run(self, session_id, commands)
            if found is None:
                found = _General(self, session_id).run(commands)
            outcomes.append(found)
        if self.pieces:
            value = pack_row(self.issued_at, self.pieces)
            self.batch.put(keys.session_key(self.descriptor.range_id, self.row), value)
            self.table.remember_row(self.row, self.issued_at, tuple(self.touched))
        return outcomes

    def record(self, session: Session, below: int, lowest: int, highest: int, issued_at: int, piece: bytes) -> None:
        session.add(self.row, below, lowest, highest, piece)
        self.pieces.append(piece)
        self.touched.append(session.id)
        if issued_at > self.issued_at:
            self.issued_at = issued_at


def _run_plain_put(run: WriteRun, session_id: bytes, commands: Group) -> list[Any] | None:
    """:func:`_run_plain_puts` for a group of one, which spares it the columns."""
    try:
        op, sequence, issued_at, below, digest, key, value, condition = commands[0]
    except ValueError:
        return None
    span = run.descriptor.span
    table = run.table
    session = table.sessions.get(session_id)
    if (
        op != _PUT
        or condition is not None
        or not below <= sequence <= below + SESSION_WINDOW_MAX
        or not run.oldest <= issued_at <= run.newest
        or (session is not None and sequence <= session.highest)
        or key < span.start
        or (span.end is not None and key >= span.end)
        or digest > DIGEST_MASK
    ):
        return None
    if session is None:
        session = table.session(session_id)
    elif session.acknowledged_below > below:
        below = session.acknowledged_below
    version = run.version
    run.version = version + 1
    batch = run.batch
    batch.changes[_USER + key] = pack_head(ENVELOPE_FORMAT, version) + value
    batch.bytes += len(key) + len(value) + _ENVELOPE_OVERHEAD
    piece = pack_plain_one(PLAIN, session_id, below, 1, version, sequence, digest)
    run.record(session, below, sequence, sequence, issued_at, piece)
    return [version]


def _run_plain_puts(run: WriteRun, session_id: bytes, commands: Group) -> list[Any] | None:
    """Execute a group of unconditional puts with new, rising sequences inside the span; None, with nothing done, if it
    is anything else.

    Each test below is one pass in C. They are sufficient, not necessary: a group that fails one may be fine, and is
    then run by :class:`_General`.
    """
    try:
        ops, sequences, issued, belows, digests, user_keys, values, conditions = zip(*commands)
    except ValueError:
        return None  # an empty group, or fields of other commands
    count = len(commands)
    first, highest, below = sequences[0], sequences[-1], max(belows)
    span = run.descriptor.span
    table = run.table
    session = table.sessions.get(session_id)
    if (
        any(ops)
        or conditions.count(None) != count
        or below > first
        or highest - min(belows) > SESSION_WINDOW_MAX
        or min(issued) < run.oldest
        or max(issued) > run.newest
        or (session is not None and first <= session.highest)
        or not all(map(lt, sequences, sequences[1:]))
        or min(user_keys) < span.start
        or (span.end is not None and max(user_keys) >= span.end)
    ):
        return None
    if session is not None and session.acknowledged_below > below:
        below = session.acknowledged_below
    version = run.version
    try:
        piece = plain_struct(count).pack(PLAIN, session_id, below, count, version, *sequences, *digests)
    except StructError:
        return None  # a digest of more than 32 bits, which the wire does not let in
    if session is None:
        session = table.session(session_id)
    run.version = after = version + count
    versions = range(version, after)
    batch = run.batch
    batch.changes.update(
        zip(
            map(add, repeat(_USER), user_keys),
            map(add, map(pack_head, repeat(ENVELOPE_FORMAT), versions), values),
        )
    )
    batch.bytes += sum(map(len, user_keys)) + sum(map(len, values)) + count * _ENVELOPE_OVERHEAD
    run.record(session, below, first, highest, max(issued), piece)
    return list(versions)


class _General:
    """A group of any commands, one at a time."""

    __slots__ = ("below", "count", "fresh", "issued_at", "kept", "run_", "session_id")

    def __init__(self, run: WriteRun, session_id: bytes) -> None:
        self.run_ = run
        self.count = 0
        self.session_id = session_id
        session = run.table.sessions.get(session_id)
        self.below = 0 if session is None else session.acknowledged_below
        self.kept: dict[int, Record] | None = None
        """The session's records from before this group, fetched when first needed."""
        self.fresh: dict[int, Record] = {}
        """This group's own."""
        self.issued_at = 0

    def run(self, commands: Group) -> list[Any]:
        run = self.run_
        self.count = len(commands)
        outcomes = []
        for command in commands:
            outcomes.append(self._outcome(command))
            run.version += 1
        fresh = self.fresh
        if fresh:
            piece = pack_mixed(self.session_id, self.below, fresh)
            session = run.table.session(self.session_id)
            run.record(session, self.below, min(fresh), max(fresh), self.issued_at, piece)
        return outcomes

    def _outcome(self, command: list[Any]) -> Any:
        run = self.run_
        _, sequence, issued_at, acknowledged_below, digest = command[:5]
        digest &= DIGEST_MASK
        if issued_at < run.oldest or issued_at > run.newest:
            return errors.to_wire(errors.TooOld(f"issued at {issued_at} ms, outside {run.oldest} to {run.newest}"))
        if not acknowledged_below <= sequence <= acknowledged_below + SESSION_WINDOW_MAX:
            return errors.to_wire(
                errors.MalformedRequest(
                    f"sequence {sequence} is not within {SESSION_WINDOW_MAX} of the lowest unsettled, "
                    f"{acknowledged_below}"
                )
            )
        if sequence < self.below:
            return errors.to_wire(errors.SequenceReused(f"sequence {sequence} was settled; {self.below} is the next"))
        record = self._recorded(sequence)
        if record is not None:
            if record.digest != digest:
                return errors.to_wire(errors.SequenceReused(f"sequence {sequence} was used for another command"))
            return outcome(record.kind, record.value)
        if not run.same_generation or not _inside(run.descriptor, command):
            return errors.to_wire(errors.EpochMismatch(current=(run.descriptor,)))
        kind, value = self._execute(command)
        self.fresh[sequence] = Record(digest, kind, value)
        if acknowledged_below > self.below:
            self.below = acknowledged_below
        if issued_at > self.issued_at:
            self.issued_at = issued_at
        return outcome(kind, value)

    def _recorded(self, sequence: int) -> Record | None:
        found = self.fresh.get(sequence)
        if found is not None:
            return found
        if self.kept is None:
            session = self.run_.table.sessions.get(self.session_id)
            if session is None or sequence > session.highest:
                return None
            if self.count <= _FIND_MAX:
                return session.find(sequence)
            self.kept = session.records()
        return self.kept.get(sequence)

    def _execute(self, command: list[Any]) -> tuple[int, int]:
        """The effect of a command; kind and value of its outcome."""
        op = command[0]
        run = self.run_
        batch = run.batch
        if op == _PUT:
            key, value, condition = _USER + command[5], command[6], command[7]
            if condition is not None and (current := self._current_version(key)) != condition:
                return VERSION_MISMATCH, current
            batch.put(key, pack_head(ENVELOPE_FORMAT, run.version) + value)
            return VERSION, run.version
        if op == _DELETE:
            key, condition = _USER + command[5], command[6]
            current = self._current_version(key)
            if condition is not None and current != condition:
                return VERSION_MISMATCH, current
            if current:
                batch.delete(key)
            return BOOLEAN, int(current != 0)
        if op == _INCREMENT:
            return self._increment(_USER + command[5], command[6])
        if op == _DELETE_RANGE:
            end = command[6]
            batch.delete_range(_USER + command[5], keys.USER_END if end is None else _USER + end)
            return BOOLEAN, 1
        raise Corruption(f"a log entry holds a command with the unknown operation {op!r}; upgrade this node")

    def _increment(self, key: bytes, delta: int) -> tuple[int, int]:
        envelope = self._current(key)
        number = 0
        if envelope is not None:
            text = unpack(envelope)[1]
            if _DECIMAL.fullmatch(text) is None:
                return NOT_AN_INTEGER, 0
            number = int(text)
        total = number + delta
        if not (_INT64_MIN <= number <= _INT64_MAX and _INT64_MIN <= total <= _INT64_MAX):
            return NOT_AN_INTEGER, 0
        self.run_.batch.put(key, pack_head(ENVELOPE_FORMAT, self.run_.version) + b"%d" % total)
        return NUMBER, packed_number(total)

    def _current(self, key: bytes) -> bytes | None:
        found = self.run_.batch.get(key)
        return self.run_.reader.get(key) if found is MISSING else found

    def _current_version(self, key: bytes) -> int:
        """0 for an absent key."""
        envelope = self._current(key)
        return 0 if envelope is None else version_of(envelope)


def _inside(descriptor: RangeDescriptor, command: list[Any]) -> bool:
    """Whether a command touches keys of the span only."""
    span = descriptor.span
    if command[0] != _DELETE_RANGE:
        return span.contains(command[5])
    start, end = command[5], command[6]
    # One without an end is for the last range: whoever sent it to a range that has been split since must hear of it.
    return start >= span.start and (span.end is None or (start < span.end and end is not None and end <= span.end))
