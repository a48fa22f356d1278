"""The session table of a range: which commands were executed, with what outcome, so that a retry applies once.

Lives here: the table in memory, its rows in the engine, and how records become outcomes. Does not live here: the checks
that consult it (:mod:`execution`). The rules:

* Replicated state: it moves only with recorded outcomes, and everything in memory follows from the rows alone, so that
  a replica that has just loaded them answers as one that never stopped.
* One row per log entry holds every session's records of that entry (a *piece* each) and each session's
  acknowledged_below after it. Rows expire oldest first, once replicated time has passed the newest ``issued_at`` in
  them by :data:`~shardkv.types.SESSION_AGE_MS_MAX`: from then on age alone refuses their commands.
* Records hold outcomes and digests, never values.

Bounds: a session's sequences stay within :data:`~shardkv.types.SESSION_WINDOW_MAX` of its acknowledged_below, so it has
at most that many live records (those below it are dropped piece by piece). Sessions are as many as wrote in the
window. In memory a record is the 12 bytes of its row (21 where a piece holds anything but plain puts).
"""

from collections.abc import Iterable
from struct import Struct
from struct import error as StructError
from typing import Any, Final, NamedTuple

from shardkv.errors import Corruption, NotAnInteger, VersionMismatch, to_wire
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_BYTES

ROW_FORMAT: Final = 1
_ROW_HEAD: Final = Struct(">BQ")  # format, newest issued_at
_PIECE_HEAD: Final = Struct(f">B{SESSION_BYTES}sQI")  # form, session, acknowledged_below, records
_U64: Final = Struct(">Q")

PLAIN, MIXED = 0, 1
"""Forms of a piece. PLAIN: plain puts with consecutive versions; first version, sequences, digests. MIXED: sequences,
digests, outcome kinds, outcome values."""

VERSION, BOOLEAN, NUMBER, VERSION_MISMATCH, NOT_AN_INTEGER = range(5)
"""Kinds of outcome; each keeps one 64-bit value (a NUMBER in two's complement)."""

CONSOLIDATED_ROWS_MAX: Final = 10
"""Of the other half of a split: so many indices lie before its first entry."""
_CONSOLIDATED_BYTES: Final = 1024 * 1024
"""A consolidated row that has grown to this gets no further session, unless they would be too many rows."""
_CONSOLIDATED_MS: Final = 30_000
"""Sessions whose newest commands were issued further apart never share one, so that however often a range splits, none
is kept for longer than this beyond its time. What lives was issued within twice SESSION_AGE_MS_MAX, for a row waits for
those before it."""
_CUTS_MAX: Final = CONSOLIDATED_ROWS_MAX - (2 * SESSION_AGE_MS_MAX // _CONSOLIDATED_MS + 2)
"""What is left of the rows for cutting those that are too large."""

DIGEST_MASK: Final = 0xFFFF_FFFF
_U64_MASK: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63
_NOT_AN_INTEGER_TEXT: Final = "the value is not decimal text of a signed 64-bit integer, or the sum would not be one"


class Record(NamedTuple):
    """What is kept of an executed command."""

    digest: int
    kind: int
    value: int


Piece = tuple[int, int, int, bytes]
"""Row index, lowest and highest sequence, packed records."""


def outcome(kind: int, value: int) -> Any:
    """The outcome as a WRITE answers it (see :mod:`shardkv.wire.commands`)."""
    if kind == VERSION:
        return value
    if kind == BOOLEAN:
        return value != 0
    if kind == NUMBER:
        return value - (1 << 64) if value & _SIGN else value
    if kind == VERSION_MISMATCH:
        return to_wire(VersionMismatch(current=value))
    assert kind == NOT_AN_INTEGER, f"unknown kind of outcome: {kind}"
    return to_wire(NotAnInteger(_NOT_AN_INTEGER_TEXT))


def packed_number(number: int) -> int:
    """A signed 64-bit number as the value of a NUMBER outcome."""
    return number & _U64_MASK


_plain_structs: dict[int, Struct] = {}
_mixed_structs: dict[int, Struct] = {}
_STRUCTS_MAX: Final = 4_096


def plain_struct(count: int) -> Struct:
    """Packs a PLAIN piece: form, session, acknowledged_below, count, first version, *sequences, *digests."""
    found = _plain_structs.get(count)
    if found is None:
        found = Struct(f">B{SESSION_BYTES}sQIQ{count}Q{count}I")
        if len(_plain_structs) < _STRUCTS_MAX:
            _plain_structs[count] = found
    return found


pack_plain_one: Final = plain_struct(1).pack


def _mixed_struct(count: int) -> Struct:
    found = _mixed_structs.get(count)
    if found is None:
        found = Struct(f">B{SESSION_BYTES}sQI{count}Q{count}I{count}s{count}Q")
        if len(_mixed_structs) < _STRUCTS_MAX:
            _mixed_structs[count] = found
    return found


def pack_mixed(session: bytes, acknowledged_below: int, records: dict[int, Record]) -> bytes:
    """A piece of any records, by sequence."""
    kept = records.values()
    return _mixed_struct(len(records)).pack(
        MIXED,
        session,
        acknowledged_below,
        len(records),
        *records,
        *(record.digest for record in kept),
        bytes(record.kind for record in kept),
        *(record.value for record in kept),
    )


def _piece_end(row: bytes, offset: int) -> int:
    form, _, _, count = _PIECE_HEAD.unpack_from(row, offset)
    if form == PLAIN:
        return offset + plain_struct(count).size
    if form == MIXED:
        return offset + _mixed_struct(count).size
    raise Corruption(f"a session row holds a piece of the unknown form {form}")


def piece_records(piece: bytes) -> dict[int, Record]:
    """Every record of a piece, by sequence."""
    form, _, _, count = _PIECE_HEAD.unpack_from(piece)
    if form == PLAIN:
        fields = plain_struct(count).unpack(piece)
        first, columns = fields[4], fields[5:]
        return {
            columns[position]: Record(columns[count + position], VERSION, first + position) for position in range(count)
        }
    fields = _mixed_struct(count).unpack(piece)
    columns, kinds, values = fields[4:-1], fields[4 + 2 * count], fields[5 + 2 * count :]
    return {
        columns[position]: Record(columns[count + position], kinds[position], values[position])
        for position in range(count)
    }


class Session:
    """One client's recent commands on this range."""

    __slots__ = ("acknowledged_below", "highest", "id", "last_row", "pieces")

    def __init__(self, session_id: bytes) -> None:
        self.id = session_id
        self.acknowledged_below = 0
        """Every sequence below it is settled: its client will not ask again."""
        self.highest = -1
        """No record has a sequence above it, nor is any settled sequence: a command tells of lower ones only."""
        self.last_row = -1
        """Index of the newest row that names this session; when it expires the session goes."""
        self.pieces: list[Piece] = []
        """Oldest first; row indices never fall."""

    def find(self, sequence: int) -> Record | None:
        """The record of one command, if it is kept."""
        for _, lowest, highest, piece in self.pieces:
            if lowest <= sequence <= highest:
                found = piece_records(piece).get(sequence)
                if found is not None:
                    return found
        return None

    def records(self) -> dict[int, Record]:
        """Every record that is kept, by sequence; cheaper than :meth:`find` for more than a few."""
        found: dict[int, Record] = {}
        for _, _, _, piece in self.pieces:
            found.update(piece_records(piece))
        return found

    def add(self, row: int, acknowledged_below: int, lowest: int, highest: int, piece: bytes) -> None:
        """Take in a piece of the entry at index ``row``; let go what the client has settled."""
        self.pieces.append((row, lowest, highest, piece))
        if highest > self.highest:
            self.highest = highest
        self.last_row = row
        if acknowledged_below > self.acknowledged_below:
            self.acknowledged_below = acknowledged_below
            pieces = self.pieces
            while pieces and pieces[0][2] < acknowledged_below:
                del pieces[0]


class Row(NamedTuple):
    """What memory keeps of a row until it expires."""

    index: int  # type: ignore[assignment]  # the domain name wins over tuple.index
    issued_at: int
    """The newest among its commands."""
    sessions: tuple[bytes, ...]


class SessionTable:
    """All sessions of a range. Changed only by applying entries, and only together with rows in the same batch."""

    __slots__ = ("_first", "_rows", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[bytes, Session] = {}
        self._rows: list[Row] = []
        self._first = 0
        """Position of the oldest row in ``_rows``; what stands before it has expired."""

    @classmethod
    def load(cls, rows: Iterable[tuple[int, bytes]]) -> "SessionTable":
        """From rows as (entry index, value) in order of index. Raises Corruption."""
        table = cls()
        for index, value in rows:
            table.add_row(index, value)
        return table

    @staticmethod
    def expired(value: bytes, now_ms: int) -> bool:
        """Whether a row that is the oldest has had its time. Raises Corruption."""
        if len(value) < _ROW_HEAD.size:
            raise Corruption(f"a session row of {len(value)} bytes")
        _, issued_at = _ROW_HEAD.unpack_from(value)
        return bool(issued_at + SESSION_AGE_MS_MAX < now_ms)

    @property
    def rows(self) -> list[Row]:
        """The living rows, oldest first."""
        return self._rows[self._first :]

    def session(self, session_id: bytes) -> Session:
        """The session, made if it is new."""
        found = self.sessions.get(session_id)
        if found is None:
            found = self.sessions[session_id] = Session(session_id)
        return found

    def remember_row(self, index: int, issued_at: int, sessions: tuple[bytes, ...]) -> None:
        """Note a row whose pieces its sessions already have."""
        self._rows.append(Row(index, issued_at, sessions))

    def add_row(self, index: int, value: bytes) -> None:
        """Take in a row of the engine. Raises Corruption."""
        try:
            self._add_row(index, value)
        except StructError as problem:
            raise Corruption(f"session row {index} is damaged: {value[:64].hex()}") from problem

    def _add_row(self, index: int, value: bytes) -> None:
        form, issued_at = _ROW_HEAD.unpack_from(value)
        if form != ROW_FORMAT:
            raise Corruption(f"session row {index} has format {form}; this version knows {ROW_FORMAT}")
        offset, named = _ROW_HEAD.size, []
        while offset < len(value):
            end = _piece_end(value, offset)
            piece = value[offset:end]
            _, session_id, below, count = _PIECE_HEAD.unpack_from(piece)
            session = self.session(session_id)
            if not count:
                raise Corruption(f"session row {index} names session {session_id.hex()} without a record")
            sequences = piece_records(piece)
            session.add(index, below, min(sequences), max(sequences), piece)
            named.append(session.id)
            offset = end
        self.remember_row(index, issued_at, tuple(named))

    def expire(self, now_ms: int) -> list[int]:
        """Forget what ``now_ms`` has left behind; the indices of the rows to delete."""
        rows, first = self._rows, self._first
        if first == len(rows) or rows[first].issued_at + SESSION_AGE_MS_MAX >= now_ms:
            return []
        expired = []
        while first < len(rows) and rows[first].issued_at + SESSION_AGE_MS_MAX < now_ms:
            row = rows[first]
            for session_id in row.sessions:
                self._forget(session_id, row.index)
            expired.append(row.index)
            first += 1
        if first * 2 > len(rows):
            del rows[:first]
            first = 0
        self._first = first
        return expired

    def _forget(self, session_id: bytes, row: int) -> None:
        session = self.sessions.get(session_id)
        if session is None:
            return  # the same row named it twice
        if session.last_row <= row:
            del self.sessions[session_id]
            return
        pieces = session.pieces
        forgotten = -1
        while pieces and pieces[0][0] <= row:
            forgotten = max(forgotten, pieces.pop(0)[2])
        if forgotten == session.highest:
            # As a replica that loads the rows that are left would have it.
            session.highest = max(piece[2] for piece in pieces)

    def idle(self, now_ms: int) -> bool:
        """Whether everything here has had its time: the table may be dropped, and loaded again from the rows."""
        return all(row.issued_at + SESSION_AGE_MS_MAX < now_ms for row in reversed(self._rows))

    def consolidated(self) -> list[bytes]:
        """The whole table as a few rows, oldest first, for the other half of a split: at most CONSOLIDATED_ROWS_MAX.

        Call it right after :meth:`expire`. Made from what the rows say and nothing else (not from how much memory still
        holds), sorted, so that every replica makes the same bytes.
        """
        issued = {row.index: row.issued_at for row in self.rows}
        found: list[tuple[int, bytes, bytes]] = []
        for session_id, session in self.sessions.items():
            below = session.acknowledged_below
            living = {sequence: record for sequence, record in session.records().items() if sequence >= below}
            # The row that last named the session holds at least one record that it has not settled.
            assert living, f"session {session_id.hex()} has settled all it has, below {below}"
            # Not its last row's: a command may be issued later than one whose retry was executed after it.
            newest = max(issued[row] for row, _, highest, _ in session.pieces if highest >= below)
            found.append((newest, session_id, pack_mixed(session_id, below, living)))
        found.sort()
        large = max(_CONSOLIDATED_BYTES, -(-sum(len(piece) for _, _, piece in found) // _CUTS_MAX))
        made: list[bytes] = []
        pieces: list[bytes] = []
        size = newest = 0
        for issued_at, _, piece in found:
            if pieces and (size >= large or issued_at // _CONSOLIDATED_MS != newest // _CONSOLIDATED_MS):
                made.append(pack_row(newest, pieces))
                pieces, size = [], 0
            pieces.append(piece)
            size += len(piece)
            newest = issued_at
        if pieces:
            made.append(pack_row(newest, pieces))
        assert len(made) <= CONSOLIDATED_ROWS_MAX, f"{len(found)} sessions make {len(made)} rows"
        return made

    def check(self) -> None:
        rows = self.rows
        indices = [row.index for row in rows]
        assert indices == sorted(set(indices)), f"rows out of order: {indices}"
        named = {session_id for row in rows for session_id in row.sessions}
        assert named == set(self.sessions), f"rows name {len(named)} sessions, the table has {len(self.sessions)}"
        for session_id, session in self.sessions.items():
            _check_session(session_id, session, set(indices))


def _check_session(session_id: bytes, session: Session, indices: set[int]) -> None:
    assert session.id == session_id, f"session {session.id.hex()} is filed under {session_id.hex()}"
    assert session.last_row in indices, f"session {session_id.hex()} was last in row {session.last_row}, which is gone"
    assert session.acknowledged_below <= session.highest, (
        f"session {session_id.hex()} has settled all below {session.acknowledged_below}, above {session.highest}"
    )
    previous = -1
    for row, lowest, highest, piece in session.pieces:
        assert row in indices, f"session {session_id.hex()} holds a piece of row {row}, which is gone"
        assert row >= previous, f"session {session_id.hex()} holds row {row} after row {previous}"
        previous = row
        sequences = list(piece_records(piece))
        assert min(sequences) == lowest, f"a piece of {session_id.hex()} starts at {min(sequences)}, not {lowest}"
        assert max(sequences) == highest, f"a piece of {session_id.hex()} ends at {max(sequences)}, not {highest}"
        assert highest <= session.highest, f"sequence {highest} lies above the highest, {session.highest}"


def pack_row(issued_at: int, pieces: list[bytes]) -> bytes:
    """The row of one entry: ``issued_at`` is the newest of its commands."""
    return _ROW_HEAD.pack(ROW_FORMAT, issued_at) + b"".join(pieces)
