"""What is wrong for a while, as a log should tell of it: once when it has lasted, once when it is over.

Pure: whoever looks brings the time, monotonic seconds. The rule: no number of attempts, and no coming and going, makes
more than a line per ``apart_seconds`` and one that ends it.
"""

from typing import Final

UNANSWERED_SECONDS: Final = 10.0
"""Until it is told that the placement group does not answer a node: elections are over long before."""
APART_SECONDS: Final = 30.0
"""Between two lines that say that the same thing is wrong: one that comes and goes fills no log."""


class Outage:
    """One thing that may be wrong, and is told of once it has been wrong for ``lasting_seconds``."""

    __slots__ = ("_apart_seconds", "_lasting_seconds", "_since", "_told", "_told_at")

    def __init__(self, lasting_seconds: float, apart_seconds: float = APART_SECONDS) -> None:
        self._lasting_seconds = lasting_seconds
        self._apart_seconds = apart_seconds
        self._since: float | None = None
        self._told = False
        self._told_at: float | None = None

    def begin(self, now: float) -> None:
        """It is wrong now, and may have been before."""
        if self._since is None:
            self._since = now

    def lasts(self, now: float) -> bool:
        """It is wrong still; whether that is to be told."""
        self.begin(now)
        assert self._since is not None, "begun"
        if self._told or now - self._since < self._lasting_seconds:
            return False
        if self._told_at is not None and now - self._told_at < self._apart_seconds:
            return False
        self._told, self._told_at = True, now
        return True

    def end(self) -> bool:
        """All is well; whether that is to be told, for the opposite was."""
        told, self._told, self._since = self._told, False, None
        return told
