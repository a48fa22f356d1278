"""The durable engine alone: what a killed process leaves, its memory, its errors, and rocksdict's two surprises."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rocksdict

from shardkv.errors import Corruption, OutOfSpace, StorageError
from shardkv.storage.engine import Reader, WriteBatch
from shardkv.storage.rocks import DELETIONS_IN_A_ROW, RocksEngine, RocksSettings, _translated

LOW, HIGH = b"", b"\xff" * 8
ROOT = Path(__file__).parents[2]

WRITER = """
import sys
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine, RocksSettings
engine = RocksEngine(sys.argv[1], RocksSettings(write_buffer_bytes=64 * 1024))
number = 0
while True:
    for _ in range(50):
        number += 1
        batch = WriteBatch()
        batch.put(b"last", b"%d" % number)
        batch.put(b"own %08d" % number, b"x" * 100)
        batch.delete(b"own %08d" % (number - 20))
        batch.delete_range(b"own %08d" % (number - 40), b"own %08d" % (number - 30))
        engine.write(batch)
    if number % 200 == 0:
        engine.flush()
        print(number, flush=True)
"""

INGESTER = """
import os, signal, sys
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine
path, flush = sys.argv[1:]
engine = RocksEngine(path)
batch = WriteBatch()
batch.put(b"a", b"a batch before")
engine.write(batch)
if flush == "flush":
    engine.flush()
builder = engine.builder(path + ".sst")
builder.put(b"m", b"ingested")
builder.finish()
engine.ingest(path + ".sst")
os.kill(os.getpid(), signal.SIGKILL)
"""

FILLER = """
import sys
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine
engine = RocksEngine(sys.argv[1])
for start in range(0, 100_000, 500):
    batch = WriteBatch()
    for number in range(start, start + 500):
        batch.put(b"key %012d" % number, b"v" * 100)
    engine.write(batch)
for start in range(0, 100_000, 50):
    engine.get(b"key %012d" % start)
engine.flush()
for pair in engine.scan(b"", b"z"):
    assert engine._db.latest_sequence_number() > 0
rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(int(rss.split()[1]))
engine.close()
"""


def child(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/engine"


@pytest.mark.parametrize("flushes", [1, 4])
def test_a_killed_process_leaves_a_prefix_of_the_batches_no_older_than_the_last_flush(path: str, flushes: int) -> None:
    """DESIGN 4.3: with RocksDB's own log off and one column family."""
    flushed = 0
    with child(WRITER, path) as process:
        assert process.stdout is not None
        for _ in range(flushes):
            flushed = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    engine = RocksEngine(path)
    last = int(engine.get(b"last") or 0)
    assert last >= flushed
    expected = [b"own %08d" % number for number in range(max(last - 19, 1), last + 1)]
    between = [b"own %08d" % number for number in range(max(last - 30, 1), max(last - 19, 1)) if number > last - 20]
    assert [key for key, _ in engine.scan(b"own", b"owo")] == between + expected
    engine.check()
    engine.close()


@pytest.mark.parametrize("flush", ["flush", "no flush"])
def test_trap_19_an_ingested_file_survives_a_kill_where_an_earlier_batch_does_not(path: str, flush: str) -> None:
    """TRAPS 19: why a flush must come before an ingest. If this ever fails, RocksDB has become kinder."""
    with child(INGESTER, path, flush) as process:
        assert process.wait() == -signal.SIGKILL
    engine = RocksEngine(path)
    expected = {b"m": b"ingested"}
    if flush == "flush":
        expected[b"a"] = b"a batch before"
    assert dict(engine.scan(LOW, HIGH)) == expected
    assert not os.path.exists(f"{path}.sst")
    engine.close()


def test_a_hundred_thousand_keys_fit_into_150_mib(path: str) -> None:
    with child(FILLER, path) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) < 150 * 1024
        assert process.wait() == 0


def test_closing_keeps_what_was_not_flushed(path: str) -> None:
    engine = RocksEngine(path)
    batch = WriteBatch()
    batch.put(b"k", b"v")
    engine.write(batch)
    engine.close()
    engine.close()
    engine = RocksEngine(path)
    assert engine.get(b"k") == b"v"
    engine.close()


def test_settings_given_at_reopening_win_over_those_on_disk(path: str) -> None:
    """rocksdict takes the column family's options from disk unless they are named."""
    RocksEngine(path, RocksSettings(write_buffer_bytes=8 * 1024 * 1024)).close()
    RocksEngine(path, RocksSettings(write_buffer_bytes=4 * 1024 * 1024)).close()
    newest = max(Path(path).glob("OPTIONS-*"))
    assert "write_buffer_size=4194304" in newest.read_text()


@pytest.mark.parametrize(("most", "files"), [(200, 50), (100_000, 256), (resource.RLIM_INFINITY, 256)])
def test_the_engine_keeps_no_more_files_open_than_the_process_can_spare(
    path: str, most: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With much data it opened all that the process might, and the log could not open its next file."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most, most))
    RocksEngine(path).close()
    (options,) = Path(path).glob("OPTIONS-*")
    assert f"max_open_files={files}\n" in options.read_text()


def test_rocksdicts_own_snapshot_iterators_are_not_used(path: str) -> None:
    """They see later writes in 0.3.29. When this fails, they have been mended and ours may become simpler."""
    database = rocksdict.Rdict(path, options=rocksdict.Options(raw_mode=True))
    database[b"a"] = b"1"
    snapshot, iterator = database.snapshot(), database.iter()
    database[b"b"] = b"2"
    assert [key for key, _ in snapshot.items()] == [b"a", b"b"]
    iterator.seek(b"")
    iterator.next()
    assert not iterator.valid()
    del snapshot, iterator
    database.close()


def test_a_snapshot_of_an_engine_that_was_only_ingested_into_costs_no_keys(path: str) -> None:
    """RocksDB's compaction drops live keys while a snapshot of sequence number 0 is held."""
    engine = RocksEngine(path)
    assert engine._db.latest_sequence_number() > 0
    snapshots = []
    for keys in (b"bad", b"cef", b"bde"):
        builder = engine.builder(f"{path}.sst")
        for key in sorted(keys):
            builder.put(bytes([key]), b"ingested")
        builder.finish()
        engine.ingest(f"{path}.sst")
        snapshots.append(engine.snapshot())
    for key in b"bcde":
        batch = WriteBatch()
        batch.put(bytes([key]), b"written")
        engine.write(batch)
        engine.flush()
    engine._db.compact_range(None, None)
    found = {key: engine.get(key) for key in map(bytes, zip(b"abcdef"))}
    assert found == dict.fromkeys((b"a", b"f"), b"ingested") | dict.fromkeys((b"b", b"c", b"d", b"e"), b"written")
    engine.close()


def test_a_second_opening_is_refused(path: str) -> None:
    engine = RocksEngine(path)
    with pytest.raises(StorageError, match=r"opening .*engine"):
        RocksEngine(path)
    engine.close()


def test_a_damaged_table_is_corruption_when_read(path: str) -> None:
    engine = RocksEngine(path)
    batch = WriteBatch()
    for number in range(1000):
        batch.put(b"key %d" % number, os.urandom(50))
    engine.write(batch)
    engine.close()
    (table,) = Path(path).glob("*.sst")
    content = bytearray(table.read_bytes())
    content[100:30_000] = bytes(29_900)
    table.write_bytes(content)
    engine = RocksEngine(path)
    reads: list[Callable[[], object]] = [
        lambda: [engine.get(b"key %d" % number) for number in range(1000)],
        lambda: engine.get_many([b"key %d" % number for number in range(1000)]),
        lambda: list(engine.scan(LOW, HIGH)),
        lambda: list(engine.scan(LOW, HIGH, reverse=True)),
        lambda: list(engine.snapshot().scan(LOW, HIGH)),
        lambda: list(engine.snapshot().scan(LOW, HIGH, reverse=True)),
        lambda: [engine.snapshot().get(b"key %d" % number) for number in range(1000)],
    ]
    for read in reads:
        with pytest.raises(Corruption, match="move the folder engine out of its data directory, and nothing else"):
            read()


@pytest.mark.parametrize("pattern", ["*.sst", "CURRENT", "MANIFEST-*"])
def test_a_store_of_which_a_file_is_gone_is_no_new_one_and_no_broken_disk(path: str, pattern: str) -> None:
    """Without CURRENT, RocksDB made an empty store at the second start, and removed the tables."""
    engine = RocksEngine(path)
    batch = WriteBatch()
    batch.put(b"k", b"v")
    engine.write(batch)
    engine.close()
    (file,) = Path(path).glob(pattern)
    content = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(Corruption, match="move the folder engine out") as caught:
            RocksEngine(path)
        assert "replace the disk" not in str(caught.value)
    file.write_bytes(content)
    engine = RocksEngine(path)
    assert engine.get(b"k") == b"v"
    engine.close()


@pytest.mark.parametrize("fits", [True, False])
def test_a_store_that_has_lost_the_end_of_its_manifest_is_shown_before_anything_newer_is_removed(
    path: str, fits: bool
) -> None:
    """RocksDB takes it for one that never got further, and removes the tables that it does not know of."""
    engine = RocksEngine(path)
    (manifest,) = Path(path).glob("MANIFEST-*")
    for number in range(3):
        batch = WriteBatch()
        batch.put(b"number", b"%d" % number)
        engine.write(batch)
        engine.flush()
        if number == 0:
            size = manifest.stat().st_size
    engine.close()
    whole = manifest.read_bytes()
    os.truncate(manifest, size)
    seen = []

    def admit(reader: Reader) -> bool:
        seen.append((reader.get(b"number"), list(reader.scan(LOW, HIGH))))
        if not fits:
            raise Corruption("older than what was logged")
        return True

    before = sorted(os.listdir(path))
    if fits:
        engine = RocksEngine(path, admit=admit)
        assert engine.get(b"number") == b"0"
        engine.close()
    else:
        for _ in range(2):
            with pytest.raises(Corruption, match="older than"):
                RocksEngine(path, admit=admit)
            assert sorted(os.listdir(path)) == before
        manifest.write_bytes(whole)
        engine = RocksEngine(path, admit=lambda reader: True)
        assert engine.get(b"number") == b"2"
        engine.close()
    assert seen == [(b"0", [(b"number", b"0")])] * len(seen) != []


@pytest.mark.parametrize("missed", [True, False])
def test_a_store_whose_manifest_has_lost_all_its_tables_is_refused_where_something_is_missed(
    path: str, missed: bool
) -> None:
    """To RocksDB it is an empty one, and its tables are remains. Which they are where a crash came into the first
    flush; then nothing is missed."""
    engine = RocksEngine(path)
    (manifest,) = Path(path).glob("MANIFEST-*")
    empty = manifest.stat().st_size
    batch = WriteBatch()
    batch.put(b"k", b"v")
    engine.write(batch)
    engine.close()
    whole, before = manifest.read_bytes(), sorted(os.listdir(path))
    os.truncate(manifest, empty)
    if missed:
        for _ in range(2):
            with pytest.raises(Corruption, match=r"000008\.sst.*MANIFEST.*move the folder engine out"):
                RocksEngine(path, admit=lambda reader: False)
            assert sorted(os.listdir(path)) == before
        manifest.write_bytes(whole)
    engine = RocksEngine(path, admit=lambda reader: not missed or reader.get(b"k") is not None)
    assert engine.get(b"k") == (b"v" if missed else None)
    engine.close()


def test_a_store_that_holds_nothing_yet_is_admitted_though_something_is_missed(path: str) -> None:
    """It was moved out, and made anew: others bring what it held. What tables it has are its own."""
    RocksEngine(path).close()
    assert list(Path(path).glob("*.sst"))
    RocksEngine(path, admit=lambda reader: False).close()


def test_a_store_that_is_not_there_yet_is_shown_to_nobody(path: str) -> None:
    RocksEngine(path, admit=lambda reader: pytest.fail("there is nothing to show")).close()


def test_a_store_whose_making_was_cut_short_is_made_again(path: str) -> None:
    RocksEngine(path).close()
    Path(path, "CURRENT").unlink()
    for file in (*Path(path).glob("*.log"), *Path(path).glob("*.sst")):
        file.unlink()
    assert list(Path(path).glob("MANIFEST-*"))
    RocksEngine(path).close()


def test_a_full_disk_and_other_errors_keep_their_kind() -> None:
    assert type(_translated(Exception("IO error: No space left on device: while appending"), "writing")) is OutOfSpace
    assert type(_translated(Exception("Corruption: block checksum mismatch"), "reading")) is Corruption
    assert type(_translated(Exception("IO error: whatever"), "reading")) is StorageError
    assert "replace the disk" in str(_translated(Exception("IO error: Input/output error"), "flushing"))


def test_a_limit_on_files_that_the_engine_meets_is_not_said_to_be_a_broken_disk() -> None:
    error = _translated(
        Exception("IO error: While appending to file: /data/engine/000009.sst: File too large"), "flushing"
    )
    assert type(error) is StorageError
    assert "ulimit -f" in str(error)
    assert "replace" not in str(error)


def test_a_quota_that_the_engine_meets_is_not_said_to_be_a_broken_disk() -> None:
    """As RocksDB words it when a write of a flush fails with EDQUOT. The node ends all the same."""
    error = _translated(
        Exception("IO error: While appending to file: /data/engine/000009.sst: Disk quota exceeded"), "flushing"
    )
    assert type(error) is StorageError
    assert "raise the quota" in str(error)
    assert "replace" not in str(error)


@pytest.mark.parametrize("refusal", ["Permission denied", "Operation not permitted"])
def test_a_file_of_somebody_elses_is_not_said_to_be_a_broken_disk(refusal: str) -> None:
    """As after a start by root; the log says the same of its files."""
    error = _translated(Exception(f"IO error: While open a file for random read: /d/engine/CURRENT: {refusal}"), "open")
    assert type(error) is StorageError
    assert "check the owner and the permissions" in str(error)
    assert "replace" not in str(error)


def test_a_directory_that_cannot_be_listed_is_a_storage_error(path: str) -> None:
    """Here it is a file; root, who may run tests, may list any directory."""
    Path(path).write_bytes(b"")
    with pytest.raises(StorageError, match=f"opening {path}"):
        RocksEngine(path)


def test_too_many_open_files_are_not_said_to_be_a_broken_disk() -> None:
    refusal = "IO error: While open a file for appending: /d/engine/000018.sst: Too many open files"
    error = _translated(Exception(refusal), "flushing")
    assert type(error) is StorageError
    assert "raise the limit on open files" in str(error)
    assert "replace" not in str(error)


@pytest.mark.parametrize("stopped, delayed", [(0, 0), (1, 0), (0, 1000)])
def test_a_stall_shows_before_a_write_would_wait(path: str, stopped: int, delayed: int) -> None:
    """A stalled write blocks with the interpreter lock held (LIBRARIES), so the caller asks first."""

    class Stalling:
        def property_int_value(self, name: str) -> int:
            return {"rocksdb.is-write-stopped": stopped, "rocksdb.actual-delayed-write-rate": delayed}.get(name, 0)

    engine = RocksEngine(path)
    assert not engine.stalled()
    database = engine._db
    engine._db = Stalling()
    assert engine.stalled() == bool(stopped or delayed)
    engine._db = database
    engine.close()


def test_closing_the_engine_closes_its_snapshots(path: str) -> None:
    """An iterator that is alive keeps the database open, and its lock held."""
    engine = RocksEngine(path)
    snapshot = engine.snapshot()
    engine.close()
    with pytest.raises(StorageError, match="closed"):
        list(snapshot.scan(LOW, HIGH))
    RocksEngine(path).close()


def test_a_closed_snapshot_is_refused(path: str) -> None:
    engine = RocksEngine(path)
    snapshot = engine.snapshot()
    snapshot.close()
    with pytest.raises(StorageError, match="closed"):
        list(snapshot.scan(LOW, HIGH))
    engine.close()


def test_a_flush_in_another_thread_does_not_take_a_write_under_way_for_one_that_waits_for_room(path: str) -> None:
    """The interpreter changes threads in the middle of a write; the flush must not report a full disk then."""
    engine = RocksEngine(path)
    original = engine._write

    refusals: list[StorageError] = []

    def interrupted(batch: WriteBatch) -> None:
        try:
            engine.flush()
        except StorageError as error:
            refusals.append(error)
        original(batch)

    engine._write = interrupted  # type: ignore[method-assign]
    batch = WriteBatch()
    batch.put(b"k", b"v")
    engine.write(batch)
    assert refusals == []
    assert engine.get(b"k") == b"v"
    engine.close()


def test_what_was_deleted_key_by_key_is_compacted_away_though_nothing_else_is_written(tmp_path: Path) -> None:
    """A queue that was emptied: whoever looks whether there is something in it would step over all of it, each time."""
    engine = RocksEngine(str(tmp_path / "engine"))
    try:
        for change in (lambda batch, key: batch.put(key, b"v"), WriteBatch.delete):
            for first in range(0, 60_000, 1_000):
                batch = WriteBatch()
                for number in range(first, first + 1_000):
                    change(batch, b"queue/%012d" % number)
                engine.write(batch)
            engine.flush()
        end = time.monotonic() + 600

        def deletions() -> int:
            return sum(file["num_deletions"] for file in engine._db.live_files())

        while deletions() >= DELETIONS_IN_A_ROW and time.monotonic() < end:
            time.sleep(0.05)
        assert deletions() < DELETIONS_IN_A_ROW
    finally:
        engine.close()
