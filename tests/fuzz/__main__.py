"""Random and damaged input for every decoder, over and over.

    python -m tests.fuzz --frames 1000000              a run from seed 1
    python -m tests.fuzz --frames 20000 --seed 7       another, which repeats itself exactly
    python -m tests.fuzz --target raft --target wal    some decoders only

Ends with 0 if every input ended in a clean error or a valid message and the memory did not grow; prints how many of
which, a digest of all outcomes in order, the memory before and after, and for each kind of failure its first input.
"""

import argparse
import gc
import sys
import time

from shardkv.program import run_program
from tests.fuzz.run import GROWTH_BYTES_MAX, Report, fuzz, resident_bytes
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="how many inputs")
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

    report = fuzz(arguments.frames, arguments.seed, targets, progress)
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
