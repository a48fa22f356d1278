"""A scan of the durable engine ends where it was told to, however many others are begun meanwhile."""

from pathlib import Path

from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine


def test_scans_under_way_at_once_each_keep_their_own_end(tmp_path: Path) -> None:
    """An upper bound in RocksDB's read options lives in memory that the binding frees while the iterator is in use;
    the next scan's bound then lands there and the first scan runs on to it."""
    engine = RocksEngine(str(tmp_path / "engine"))
    batch = WriteBatch()
    for number in range(2_000):
        batch.put(b"key/%05d" % number, b"value")
    engine.write(batch)
    for reverse in (False, True):
        scans = [
            engine.scan(b"key/%05d" % start, b"key/%05d" % (start + 10), reverse=reverse)
            for start in range(0, 1_900, 50)
        ]
        for start, scan in zip(range(0, 1_900, 50), scans):
            expected = [b"key/%05d" % number for number in range(start, start + 10)]
            assert [key for key, _ in scan] == (expected[::-1] if reverse else expected)
    engine.close()
