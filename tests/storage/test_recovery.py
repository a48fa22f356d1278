"""Recovery of a log that is much larger than memory should be: see ``recover_large`` for the full size."""

from pathlib import Path

import pytest

from tests.storage.recover_large import MEMORY_BYTES_MAX, build, recover

LOG_BYTES = 48 * 1024 * 1024
FIXED_BYTES = 6 * 1024 * 1024
"""One window, what the allocator rounds up, and code that is met for the first time."""


@pytest.mark.parametrize("entry", ["small", "mixed", "large"])
def test_recovery_takes_a_quarter_of_the_logs_size_in_memory_at_most(tmp_path: Path, entry: str) -> None:
    """1 GiB within 256 MiB, whatever the size of its entries, over a process that has only imported the code."""
    directory = str(tmp_path / "wal")
    log_bytes, ends = build(directory, LOG_BYTES, entry=entry, segment_bytes=8 << 20)
    figures = recover(directory, log_bytes, ends, segment_bytes=8 << 20)
    assert figures.entries == sum(ends.values()) - 5 * len(ends)
    assert figures.memory_bytes <= LOG_BYTES * MEMORY_BYTES_MAX // (1 << 30) + FIXED_BYTES
