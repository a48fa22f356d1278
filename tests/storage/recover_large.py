"""Builds a large log on a real disk, and recovers it in a fresh process: how fast, and in how much memory.

Run it alone as ``python -m tests.storage.recover_large --gib 1 [--entry small|mixed|large] [--directory DIR]``. It
prints one line of figures and exits with 1 when recovery took more memory than the bound. A small version of it is a
test (``test_recovery.py``). The acceptance: 1 GiB of log within 256 MiB over a process that has only imported the code.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from random import Random
from typing import NamedTuple

from shardkv.environment.real.disk import RealDisk
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.storage.record import CreateGroup, LogUpdate
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

MEMORY_BYTES_MAX = 256 * 1024 * 1024
"""Over a bare process, for 1 GiB of log."""
RANGES = 64
GROUPS_PER_TURN = 4
COMMAND_BYTES = 170
"""A put of 100 bytes, as an entry holds it."""
TOKEN = b"token"
JOB_BYTES = 4 * 1024 * 1024

COMMANDS = {
    # How many commands an entry holds: one client that waits for each write, a mixed load, a load as bulk writers make.
    "small": (1,),
    "mixed": (1, 1, 2, 4, 8, 16),
    "large": (64, 256),
}

CHILD = """
import json, sys, time
from shardkv.environment.real.disk import RealDisk
from shardkv.storage.wal import Wal, WalSettings

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak_bytes()
began = time.perf_counter()
wal = Wal.open(RealDisk(), sys.argv[1], WalSettings(segment_bytes=int(sys.argv[2])), token=b"token", create=False)
seconds = time.perf_counter() - began
entries = sum(log.last_index() - log.compact_index for log in wal.groups.values())
ends = {int(range_id): log.last_index() for range_id, log in wal.groups.items()}
print(json.dumps([seconds, peak_bytes() - before, entries, ends]))
"""


class Figures(NamedTuple):
    log_bytes: int
    entries: int
    seconds: float
    memory_bytes: int
    """The peak, over what the process held before it opened the log."""

    @property
    def mib_per_second(self) -> float:
        return self.log_bytes / self.seconds / (1 << 20)


def build(
    directory: str, log_bytes: int, *, entry: str = "mixed", segment_bytes: int = 64 << 20
) -> tuple[int, dict[int, int]]:
    """A log of at least so many bytes, nothing of it compacted; how many, and the last index of each range."""
    random = Random(1)
    filler = random.randbytes(1 << 20)
    wal = Wal.open(RealDisk(), directory, WalSettings(segment_bytes=segment_bytes, cache_bytes_max=0), token=TOKEN)
    voters = ConfState((1, 2, 3))
    ranges = [RangeId(number) for number in range(1, RANGES + 1)]
    wal.append([LogUpdate(each, create=CreateGroup(ReplicaId(1), 5, 5, voters)) for each in ranges])()
    last = dict.fromkeys(ranges, 5)
    pending = 0
    while wal.statistics().written_bytes + pending < log_bytes:
        updates = []
        for range_id in random.sample(ranges, GROUPS_PER_TURN):
            index = last[range_id] + 1
            size = random.choice(COMMANDS[entry]) * (COMMAND_BYTES + random.randrange(-8, 9))
            start = random.randrange(len(filler) - size)
            data = filler[start : start + size]
            updates.append(LogUpdate(range_id, HardState(7, 1, index - 1), (Entry(7, index, EntryType.NORMAL, data),)))
            last[range_id] = index
            pending += size
        job = wal.append(updates)
        if pending >= JOB_BYTES:
            pending = 0
            job()
    wal.close()
    return wal.statistics().written_bytes, {int(range_id): index for range_id, index in last.items()}


def recover(directory: str, log_bytes: int, ends: dict[int, int], *, segment_bytes: int = 64 << 20) -> Figures:
    """Recover the log in a process of its own, and compare what it found with what was written."""
    command = [sys.executable, "-c", CHILD, directory, str(segment_bytes)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    seconds, memory_bytes, entries, found = json.loads(output)
    assert {int(range_id): index for range_id, index in found.items()} == ends, "the recovered log ends elsewhere"
    return Figures(log_bytes, entries, seconds, memory_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--entry", choices=sorted(COMMANDS), default="mixed")
    parser.add_argument("--directory", help="where the log is built; a temporary directory by default")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="shardkv-log-", dir=options.directory)
    try:
        began = time.perf_counter()
        log_bytes, ends = build(directory, int(options.gib * (1 << 30)), entry=options.entry)
        built = time.perf_counter() - began
        figures = recover(directory, log_bytes, ends)
    finally:
        shutil.rmtree(directory)
    bound = MEMORY_BYTES_MAX * options.gib
    print(
        f"{options.entry}: {figures.log_bytes / (1 << 20):.0f} MiB, {figures.entries} entries "
        f"(built in {built:.0f} s): "
        f"recovered in {figures.seconds:.1f} s, {figures.mib_per_second:.0f} MiB/s, "
        f"{figures.memory_bytes / (1 << 20):.0f} MiB of memory (at most {bound / (1 << 20):.0f})"
    )
    return 0 if figures.memory_bytes <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
