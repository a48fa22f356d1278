"""RocksDB on a file system that is really full: what the engine says of it, and that it goes on by itself.

A tmpfs in a mount namespace of a child process; skipped where the machine allows none.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardkv.errors import OutOfSpace, StorageError
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys, time
from shardkv.errors import OutOfSpace
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine, RocksSettings

directory = sys.argv[1]
engine = RocksEngine(directory + "/engine", RocksSettings(write_buffer_bytes=1 << 20))
written = 0

def write(count):
    global written
    for _ in range(count):
        if engine.stalled():
            return
        batch = WriteBatch()
        batch.put(b"%08d" % written, os.urandom(1000))
        engine.write(batch)
        written += 1

def wait_until(stalled):
    deadline = time.monotonic() + 600
    while engine.stalled() != stalled and time.monotonic() < deadline:
        time.sleep(0.05)
    return engine.stalled() == stalled

def flush():
    try:
        engine.flush()
    except OutOfSpace:
        return "out of space"
    return "flushed"

def all_there():
    return [int(key) for key, _ in engine.scan(b"", b"z")] == list(range(written))

found = {}
write(500)
found["before"] = [engine.stalled(), flush()]
with open(directory + "/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
write(3000)  # the write buffers are switched, and their flush finds no room
batch = WriteBatch()  # of somebody who had asked a moment before
batch.put(b"%08d" % written, b"waits for room")
engine.write(batch)
written += 1
found["full"] = [wait_until(True), flush(), all_there(), written > 500]
os.unlink(directory + "/filler")
found["room"] = [wait_until(False), flush(), all_there()]
write(100)
found["after"] = [flush(), all_there(), engine.get(b"%08d" % (written - 101)) == b"waits for room"]
with open(directory + "/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
flushed = written
write(500)
engine.close()  # not flushed, and closed all the same
os.unlink(directory + "/filler")
engine = RocksEngine(directory + "/engine")
keys = [int(key) for key, _ in engine.scan(b"", b"z")]
found["reopened"] = [keys == list(range(len(keys))), len(keys) >= flushed]
engine.close()
print(json.dumps(found))
"""


def test_an_engine_without_room_holds_writes_back_serves_reads_and_resumes_by_itself(tmp_path: Path) -> None:
    """DESIGN 4.11. RocksDB looks for room about every five seconds."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    mount = 'mount -t tmpfs -o size=12m none "$1" || exit 77; shift; exec "$@"'
    command = ["unshare", *user, "--mount", "sh", "-c", mount, "sh", str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"this machine mounts no tmpfs for us: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before": [False, "flushed"],
        "full": [True, "out of space", True, True],
        "room": [True, "flushed", True],
        "after": ["flushed", True, True],
        "reopened": [True, True],
    }


class Failing:
    """RocksDB's handle, with background errors and a write that tells of them."""

    def __init__(self, database: Any, text: str) -> None:
        self._database = database
        self._text = text
        self.writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def property_int_value(self, name: str) -> int:
        return 3 if name == "rocksdb.background-errors" else 0

    def write(self, *_: Any) -> None:
        self.writes += 1
        if self._text:
            raise Exception(self._text)  # as rocksdict does


def test_a_background_error_for_another_reason_than_room_ends_the_node(tmp_path: Path) -> None:
    engine = RocksEngine(f"{tmp_path}/engine")
    database = engine._db
    engine._db = Failing(database, "IO error: Input/output error: While appending to file: 000007.sst")
    with pytest.raises(StorageError, match=r"000007\.sst") as caught:
        engine.stalled()
    assert not isinstance(caught.value, OutOfSpace)
    engine._db = Failing(database, "IO error: No space left on device: While appending to file: 000007.sst")
    assert engine.stalled()
    engine._db = database
    engine.close()


class Filled(Failing):
    """RocksDB's handle on a disk that has room for so many more batches."""

    def __init__(self, database: Any) -> None:
        super().__init__(database, "")
        self.room = 0

    def property_int_value(self, name: str) -> int:
        return 0

    def write(self, *arguments: Any) -> None:
        if not self.room:
            raise Exception("IO error: No space left on device: While appending to file: 000007.sst")
        self.room -= 1
        self._database.write(*arguments)


def batch_of(**values: bytes | None) -> WriteBatch:
    batch = WriteBatch()
    for key, value in values.items():
        batch.delete(key.encode()) if value is None else batch.put(key.encode(), value)
    return batch


def test_what_has_no_room_is_read_at_once_and_written_in_its_order_when_there_is_room(tmp_path: Path) -> None:
    """DESIGN 4.11. The state machines have applied it; what they read must not be older than what they wrote."""
    engine = RocksEngine(f"{tmp_path}/engine")
    engine.write(batch_of(a=b"1", b=b"1"))
    database = engine._db
    engine._db = filled = Filled(database)
    engine.write(batch_of(a=b"2", c=b"2"))
    engine.write(batch_of(b=None, c=b"3"))
    expected = [(b"a", b"2"), (b"c", b"3")]
    snapshot = engine.snapshot()
    for reader in (engine, snapshot):
        assert [reader.get(key) for key in (b"a", b"b", b"c")] == [b"2", None, b"3"]
        assert reader.get_many([b"c", b"b", b"a"]) == [b"3", None, b"2"]
        assert list(reader.scan(b"", b"z")) == expected
        assert list(reader.scan(b"", b"z", reverse=True)) == expected[::-1]
    builder = engine.builder(f"{tmp_path}/ingest")
    builder.put(b"a", b"ingested")
    builder.finish()
    for blocked in (engine.flush, lambda: engine.ingest(f"{tmp_path}/ingest")):
        with pytest.raises(OutOfSpace, match="earlier writes wait"):
            blocked()
    assert engine.stalled()
    assert engine.full
    assert list(zip((b"a", b"b", b"c"), map(database.get, (b"a", b"b", b"c")))) == [
        (b"a", b"1"),
        (b"b", b"1"),
        (b"c", None),
    ]
    filled.room = 1
    assert engine.stalled(), "there was room for the first of them"
    assert [database.get(key) for key in (b"a", b"b", b"c")] == [b"2", b"1", b"2"]
    assert list(engine.scan(b"", b"z")) == expected
    filled.room = 100
    engine.write(batch_of(a=b"4"))
    assert [database.get(key) for key in (b"a", b"b", b"c")] == [b"4", None, b"3"]
    assert not engine.stalled()
    assert not engine.full
    assert list(snapshot.scan(b"", b"z")) == expected, "as it was"
    snapshot.close()
    engine.flush()
    filled.room = 0
    engine.write(batch_of(a=b"5"))
    filled.room = 1
    engine.close()
    again = RocksEngine(f"{tmp_path}/engine")
    assert again.get(b"a") == b"5", "what waited is written before the end"
    again.close()


def test_background_errors_that_are_over_cost_no_write_each_time(tmp_path: Path) -> None:
    engine = RocksEngine(f"{tmp_path}/engine")
    database = engine._db
    engine._db = failing = Failing(database, "")
    assert not engine.stalled()
    assert not engine.stalled()
    assert failing.writes == 1
    engine._db = database
    engine.write(WriteBatch())
    engine.close()
