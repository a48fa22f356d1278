"""What a snapshot holds in memory does not grow with the range: DESIGN 4.3, over RocksDB on a real disk."""

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1024 * 1024
RANGE_MIB = 64


@pytest.mark.parametrize("value_bytes, growth_max", [(1024, 16 * MIB), (MIB, 40 * MIB)], ids=["small", "large"])
def test_the_memory_of_both_ends_is_bounded_whatever_the_size_of_the_range(
    tmp_path: Path, value_bytes: int, growth_max: int
) -> None:
    """A range of 64 MiB, of small rows and of the largest: neither end ever holds a large part of it."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.multiraft.snapshot_memory", str(tmp_path), str(RANGE_MIB), str(value_bytes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    grown, chunks = map(int, ran.stdout.split())
    assert chunks >= RANGE_MIB * MIB // (2 * MIB)
    assert grown < growth_max, f"grew by {grown / MIB:.0f} MiB"
