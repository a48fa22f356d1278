"""Random and damaged input for every decoder, over and over.

    python -m tests.fuzz --frames 1000000              a run from seed 1
    python -m tests.fuzz --frames 20000 --seed 7       another, which repeats itself exactly
    python -m tests.fuzz --target raft --target wal    some decoders only

Ends with 0 if every input ended in a clean error or a valid message and the memory did not grow; prints how many of
which, a digest of all outcomes in order, the memory before and after, and for each kind of failure its first input.
"""

import argparse
import gc
import signal
import sys
import time
from types import FrameType

from shardkv.program import run_program
from tests.fuzz.run import GROWTH_BYTES_MAX, Report, fuzz, resident_bytes
from tests.fuzz.targets import TARGETS


def _count(typed: str) -> int:
    if not typed.isascii() or not typed.isdigit() or int(typed) == 0:
        raise argparse.ArgumentTypeError(f"{typed!r} is no count of inputs; give 1 or more")
    return int(typed)


class Interrupts:
    """Lets the input that is under way end; at the second interrupt it is given up."""

    received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=_count, default=100_000, help="how many inputs")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--target", action="append", choices=[each.name for each in TARGETS])
    arguments = parser.parse_args()
    targets = [each for each in TARGETS if not arguments.target or each.name in arguments.target]
    begun, before = time.perf_counter(), resident_bytes()

    def progress(report: Report) -> None:
        seconds = time.perf_counter() - begun
        print(
            f"{report.count} inputs, {report.failed} failed, {report.count / seconds:.0f}/s, "
            f"{resident_bytes() / 1024:.0f} KiB resident",
            file=sys.stderr,
        )

    interrupts = Interrupts()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts)
    report = fuzz(arguments.frames, arguments.seed, targets, progress, stopped=lambda: interrupts.received)
    gc.collect()
    for failure in report.failures.values():
        print(failure.describe())
    for target in targets:
        found = {outcome: count for (name, outcome), count in sorted(report.outcomes.items()) if name == target.name}
        print(f"{target.name:16} " + ", ".join(f"{outcome} {count}" for outcome, count in found.items()))
    grown = report.growth_bytes > GROWTH_BYTES_MAX
    print(
        f"{report.count} inputs in {time.perf_counter() - begun:.0f} s from seed {arguments.seed}, "
        f"digest {report.digest}; "
        f"{report.failed} ended otherwise than in a clean error or a valid message"
    )
    print(
        f"memory: {before / 1024:.0f} KiB at the start, {report.resident_warm / 1024:.0f} warm, "
        f"{report.resident_end / 1024:.0f} at the end{': it GREW' if grown else ''}"
    )
    return 1 if report.failed or grown else 0


if __name__ == "__main__":
    run_program(main)
