"""A client's session: which sequence numbers are out, and when a command was issued (DESIGN §4.6).

Rules that the server relies on: a sequence is used for one command only; ``acknowledged_below`` never passes a command
that may still be retried; ``issued_at`` never comes from our wall clock, and decreases while the sequence grows only
where every command before is settled and a server has refused one that was issued ahead of its time.
"""

from typing import Final

from shardkv.types import SESSION_BYTES, SESSION_WINDOW_MAX, timestamp_ms

FIRST_SEQUENCE: Final = 1
_NOTHING: Final = -1
"""A window that is not even open to the first command."""


class Session:
    __slots__ = ("_base_at", "_base_ms", "_issued_at_ms", "_window_max", "id", "lowest", "next_sequence", "unsettled")

    def __init__(self, session_id: bytes) -> None:
        assert len(session_id) == SESSION_BYTES, f"a session id has {SESSION_BYTES} bytes, not {len(session_id)}"
        self.id: bytes = session_id
        self.next_sequence: int = FIRST_SEQUENCE
        self.lowest: int = FIRST_SEQUENCE
        """The lowest unsettled sequence, or ``next_sequence`` when all are settled."""
        self.unsettled: set[int] = set()
        self._base_ms: int | None = None
        self._base_at = 0.0
        self._issued_at_ms = 0
        self._window_max = SESSION_WINDOW_MAX
        """Or ``_NOTHING``."""

    @property
    def open(self) -> bool:
        """Whether another command may be issued: the server knows a window's sequences only."""
        return self.next_sequence - self.lowest <= self._window_max

    @property
    def ahead(self) -> bool:
        """Whether no command may be issued, for the next would come to nothing; see :meth:`too_old`."""
        return self._window_max == _NOTHING

    def rebase(self, timestamp: int, now: float) -> None:
        """A server answered with ``timestamp`` at ``now``, seconds of the client's monotonic clock."""
        self._base_ms = timestamp_ms(timestamp)
        self._base_at = now

    def issued_at_ms(self, now: float) -> int:
        """What to stamp a command with that is issued now."""
        assert self._base_ms is not None, "a command was issued before any server told the time"
        stamp = self._base_ms + int((now - self._base_at) * 1_000)
        if stamp < self._issued_at_ms and (not self.ahead or self.unsettled):
            return self._issued_at_ms
        self._window_max = SESSION_WINDOW_MAX
        self._issued_at_ms = stamp
        return stamp

    def too_old(self, now: float) -> None:
        """A server has refused to execute a command for the time at which it was issued, and then told its own.

        If that is the earlier one (most nodes stood still for a while, and this client did not), it may be so for as
        long as they stood still. So no command is issued until all are settled, and then by the servers' time; or
        until that has caught up, if it is sooner.
        """
        assert self._base_ms is not None, "a command was refused before any server told the time"
        if self._base_ms + int((now - self._base_at) * 1_000) < self._issued_at_ms:
            self._window_max = _NOTHING

    def issue(self) -> int:
        """A new sequence, unsettled from here on."""
        sequence = self.next_sequence
        assert sequence - self.lowest <= SESSION_WINDOW_MAX, f"sequence {sequence} leaves the window at {self.lowest}"
        self.unsettled.add(sequence)
        self.next_sequence = sequence + 1
        return sequence

    def settle(self, sequence: int) -> bool:
        """The command will not be sent again. Whether ``lowest`` moved."""
        unsettled = self.unsettled
        unsettled.remove(sequence)
        if sequence != self.lowest:
            return False
        # Each sequence is passed once, so this is constant per command over the session's life.
        lowest = sequence + 1
        end = self.next_sequence
        while lowest < end and lowest not in unsettled:
            lowest += 1
        self.lowest = lowest
        return True

    def check(self) -> None:
        """Walk every invariant."""
        assert self.lowest <= self.next_sequence, f"lowest {self.lowest} is beyond {self.next_sequence}"
        assert self.lowest == min(self.unsettled, default=self.next_sequence), (
            f"lowest {self.lowest}, unsettled {sorted(self.unsettled)[:5]}"
        )
        assert max(self.unsettled, default=0) < self.next_sequence, "a sequence is out that was never issued"
        assert self.next_sequence - 1 - self.lowest <= SESSION_WINDOW_MAX, "the window is exceeded"
