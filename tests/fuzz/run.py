"""Runs of the fuzzer: inputs one after the other, all from one seed, and what became of them.

A run repeats itself exactly: same seed, same inputs, same digest of outcomes.
"""

import random
import resource
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import TARGETS, Target

FAILURES_SHOWN_MAX: Final = 20
GROWTH_BYTES_MAX: Final = 8 * 1024 * 1024
"""From the first tenth of a run, when every decoder has been through, to its end."""
WARM_SHARE: Final = 0.1
_PAGE_BYTES: Final = resource.getpagesize()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


@dataclass(frozen=True)
class Failure:
    """The first input that ended in another way than it should, of its kind."""

    target: str
    number: int
    data: bytes
    error: BaseException

    @property
    def kind(self) -> tuple[str, str, int]:
        """Where it came from: failures of one kind are shown once."""
        frames = traceback.extract_tb(self.error.__traceback__)
        last = frames[-1] if frames else None
        return (
            self.target,
            f"{type(self.error).__name__} {last.filename if last else ''}",
            last.lineno or 0 if last else 0,
        )

    def describe(self) -> str:
        shown = self.data.hex() if len(self.data) <= 2000 else f"{self.data[:2000].hex()}... of {len(self.data)} bytes"
        trace = "".join(traceback.format_exception(self.error))
        return f"{self.target}, input {self.number}: {shown}\n{trace}"


@dataclass
class Report:
    count: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[tuple[str, str, int], Failure] = field(default_factory=dict)
    failed: int = 0
    digest: str = ""
    resident_warm: int = 0
    resident_end: int = 0

    @property
    def growth_bytes(self) -> int:
        return self.resident_end - self.resident_warm


def fuzz(
    count: int,
    seed: int | str,
    targets: Sequence[Target] = TARGETS,
    progress: Callable[[Report], None] | None = None,
    progress_every: int = 50_000,
    stopped: Callable[[], bool] = lambda: False,
) -> Report:
    """Try ``count`` inputs.

    Raises KeyboardInterrupt once ``stopped`` says so, between two of them: what is tried may swallow one of its own, or
    make an exit code of it.
    """
    chance = random.Random(f"fuzz {seed}")
    wheel = [target for target in targets for _ in range(target.weight)]
    report, digest = Report(), sha256()
    warm = max(1, int(count * WARM_SHARE))
    for number in range(count):
        if stopped():
            raise KeyboardInterrupt
        if number == warm:
            report.resident_warm = resident_bytes()
        target = chance.choice(wheel)
        data = mutated(chance, chance.choice(target.corpus), target.corpus)
        try:
            outcome = target.outcome(data, chance)
        except Exception as error:
            outcome = f"FAILED {type(error).__name__}"
            failure = Failure(target.name, number, data, error)
            report.failed += 1
            if len(report.failures) < FAILURES_SHOWN_MAX:
                report.failures.setdefault(failure.kind, failure)
        report.outcomes[target.name, outcome] += 1
        digest.update(f"{target.name} {outcome}\n".encode())
        report.count = number + 1
        if progress is not None and report.count % progress_every == 0:
            progress(report)
    report.digest = digest.hexdigest()[:16]
    report.resident_end = resident_bytes()
    return report
