"""Sessions bounded (DESIGN 4.6): what is kept to recognise a retry has an end, in number and in age.

A session's records span no more sequences than its window. A record goes when replicated time has passed its command's
``issued_at`` by the age limit, so the oldest row of a range that is written to is no older than that.
"""

from typing import Final

from shardkv.simulation.checkers.violation import Violation
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_WINDOW_MAX

SLACK_MS: Final = 2_000
"""Replicated time moves in entries; a row is looked at when the next write is applied."""


class SessionsBounded:
    name = "sessions-bounded"

    def __init__(self, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        """How many different sessions can have written to one range within the age limit."""

    def saw_session(self, range_id: int, acknowledged_below: int, highest: int, records: int, where: str) -> None:
        """One session of a replica's table: the highest sequence in it, and how many records it holds."""
        span = highest - acknowledged_below
        if span > SESSION_WINDOW_MAX or records > 2 * SESSION_WINDOW_MAX:
            raise Violation(
                self.name,
                f"range {range_id} on {where}: a session of {records} records spans {span} sequences beyond "
                f"{acknowledged_below}; the window is {SESSION_WINDOW_MAX}",
            )

    def saw_table(self, range_id: int, sessions: int, oldest_ms: int | None, now_ms: int, where: str) -> None:
        """A replica's table: how many sessions, the oldest row's ``issued_at``, replicated time at the last write."""
        if sessions > self._sessions_max:
            raise Violation(
                self.name, f"range {range_id} on {where}: {sessions} sessions, {self._sessions_max} can have written"
            )
        if oldest_ms is not None and now_ms - oldest_ms > SESSION_AGE_MS_MAX + SLACK_MS:
            raise Violation(
                self.name, f"range {range_id} on {where}: a row is {now_ms - oldest_ms} ms old and is still kept"
            )

    def check(self) -> None:
        """Nothing is left to judge."""
