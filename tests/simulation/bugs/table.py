"""What a deliberate bug is. The bugs themselves are in the modules named after what they break; ``ALL`` has them all.

The rules: a bug is switched on from outside, by patching the product while a run lasts, and never has a switch in the
product; and what a run says of a bug is only what the checkers of every run say.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Final
from unittest.mock import patch

from shardkv.simulation.faults import KINDS
from shardkv.simulation.runner import RunResult, RunSettings, run

SEEDS_TRIED: Final = 60
"""By the tests of every change, should the known seed not find a bug any more."""
MISFIT: Final = frozenset({"AttributeError", "ImportError", "NameError", "RuntimeError", "TypeError"})
"""What ends a run when it is not the product that is wrong, but the patch."""
Patches = list[AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Bug:
    """One deliberate bug, and the runs that should find it."""

    name: str
    breaks: str
    """The rule that it breaks, and where that stands."""
    patches: Callable[[], Patches]
    """What switches it on."""
    faults: tuple[str, ...]
    seed: int
    """One that found it when it was last looked for; a change of the product moves every run a little."""
    workload: str = "mixed"
    minutes: float = 0.2
    rate: float = 40.0
    tuning: Callable[[], Patches] = list
    """Of the product's own limits, with the bug and without: what is legal and makes it show sooner."""

    def settings(self, seed: int | None = None) -> RunSettings:
        return RunSettings(
            self.seed if seed is None else seed,
            minutes=self.minutes,
            workload=self.workload,
            rate=self.rate,
            faults=self.faults,
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Where to look for it in a hurry: the known one first."""
        return (self.seed, *(seed for seed in range(1, SEEDS_TRIED + 1) if seed != self.seed))

    def changed(self, minutes: float | None, *, all_faults: bool) -> "Bug":
        """The same with runs of another length, or with every kind of fault."""
        return replace(
            self,
            minutes=self.minutes if minutes is None else minutes,
            faults=tuple(KINDS) if all_faults else self.faults,
        )

    def run(self, seed: int | None = None, *, switched_on: bool = True) -> RunResult:
        """One run of these settings; the bug's own seed if none is given."""
        with ExitStack() as stack:
            for each in self.tuning():
                stack.enter_context(each)
            for each in self.patches() if switched_on else ():
                stack.enter_context(each)
            return run(self.settings(seed))


def checker(result: RunResult) -> str:
    """Which checker, assertion or error ended a run."""
    assert result.violation is not None, "nothing was found"
    first = result.violation.splitlines()[0]
    kind, _, rest = first.partition(": ")
    assert kind not in MISFIT, f"the bug no longer fits the product: {first}"
    name = rest.partition(": ")[0]
    if kind == "Violation":
        return name
    return f"{kind} at {first.rpartition('(')[2].rstrip(')')}" if first.endswith(")") else kind


__all__ = ["Bug", "Patches", "checker", "patch"]
