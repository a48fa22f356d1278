"""How long a simulation waits for what should come, in virtual time, and what it says when it does not."""

from typing import Any, Final

from shardkv.simulation import determinism

FORMING_SECONDS: Final = 30.0
"""How long a cluster may take to get where a method waits for it to be."""


class within:  # a function in all but its shape
    """Raise an AssertionError that says ``what`` when the body takes longer than ``seconds`` of virtual time."""

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._scope = determinism.deadline_after(seconds)

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        handled = self._scope.__exit__(*error)
        if self._scope.cancelled_caught:
            raise AssertionError(f"{self._what} within {self._seconds:g} s")
        return handled
