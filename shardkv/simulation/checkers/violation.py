"""What a checker raises, and what all checkers have in common."""

from typing import Protocol


class Violation(AssertionError):
    """Something that must hold did not. The message says what, with the values; ``checker`` is which rule."""

    def __init__(self, checker: str, message: str) -> None:
        super().__init__(f"{checker}: {message}")
        self.checker = checker


class Checker(Protocol):
    """A rule, judged as a run goes on.

    What it needs to see it is told by its own ``saw`` methods, which raise :class:`Violation` at once where one look
    is enough.
    """

    name: str

    def check(self) -> None:
        """Judge what only the whole shows, as far as it is known. Called from time to time, and at the end."""
        ...
