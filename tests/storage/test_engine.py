"""What both engines promise: one machine of random steps against a dict, and the cases that it seldom meets."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardkv.errors import StorageError
from shardkv.storage.engine import MISSING, Engine, Snapshot, WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine, RocksSettings

LOW, HIGH = b"", b"\xff" * 8
KEYS = st.binary(min_size=1, max_size=2).map(lambda key: bytes(byte % 4 for byte in key))
VALUES = st.binary(max_size=6)
SPANS = st.tuples(KEYS, KEYS)
CHANGES = st.one_of(
    st.tuples(st.just("put"), KEYS, VALUES),
    st.tuples(st.just("delete"), KEYS, st.none()),
    st.tuples(st.just("delete_range"), KEYS, KEYS),
)


def put(**pairs: bytes) -> WriteBatch:
    batch = WriteBatch()
    for key, value in pairs.items():
        batch.put(key.encode(), value)
    return batch


Change = Callable[[dict[bytes, bytes]], dict[bytes, bytes]]

UNCOMPACTED = RocksSettings(level0_compaction_files=1_000, level0_slowdown_files=2_000, level0_stop_files=3_000)
"""No compaction goes on in the background."""


def changed(changes: list[tuple[str, bytes, Any]], state: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """What a batch makes of a state."""
    after = dict(state)
    for kind, first, second in changes:
        if kind == "put":
            after[first] = second
        elif kind == "delete":
            after.pop(first, None)
        else:
            after = {key: value for key, value in after.items() if not first <= key < second}
    return after


class EngineMachine(RuleBasedStateMachine):
    """Both engines walk through this."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, bytes] = {}
        self.flushed: dict[bytes, bytes] = {}
        self.since: list[tuple[bool, Change]] = []
        """What was written since the last flush, in order, and whether it was ingested."""
        self.snapshots: list[tuple[Snapshot, dict[bytes, bytes]]] = []
        self.files = itertools.count()

    def open(self) -> Engine:
        raise NotImplementedError

    def crashed(self, data: st.DataObject) -> Engine:
        """What a process finds that starts after this one's died."""
        raise NotImplementedError

    def ingest_path(self) -> str:
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.engine = self.open()

    @rule(changes=st.lists(CHANGES, max_size=8))
    def write(self, changes: list[tuple[str, bytes, Any]]) -> None:
        batch = WriteBatch()
        after = changed(changes, self.model)
        for kind, first, second in changes:
            if kind == "put":
                batch.put(first, second)
            elif kind == "delete":
                batch.delete(first)
            else:
                batch.delete_range(first, second)
        batch.check()
        for key in {*self.model, *after}:
            found = batch.get(key)
            assert after.get(key) == (self.model.get(key) if found is MISSING else found)
        self.engine.write(batch)
        self.model = after
        self.since.append((False, partial(changed, changes)))

    @rule(pairs=st.dictionaries(KEYS, VALUES, min_size=1, max_size=5))
    def ingest(self, pairs: dict[bytes, bytes]) -> None:
        path = self.ingest_path()
        builder = self.engine.builder(path)
        for key in sorted(pairs):
            builder.put(key, pairs[key])
        builder.finish()
        self.engine.ingest(path)
        self.model = {**self.model, **pairs}
        self.since.append((True, lambda state: {**state, **pairs}))

    @rule()
    def flush(self) -> None:
        self.engine.flush()
        assert self.engine.unflushed_bytes == 0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Everything is durable."""
        self.flushed = self.model
        self.since.clear()

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """DESIGN 4.3: a prefix of the batches is left, no older than the last flush, and every ingested file."""
        for snapshot, _ in self.snapshots:
            snapshot.close()
        self.snapshots.clear()
        self.engine = self.crashed(data)
        found = dict(self.engine.scan(LOW, HIGH))
        batches = sum(not ingested for ingested, _ in self.since)
        assert found in [self.left(kept) for kept in range(batches + 1)]
        self.model = found
        self.begin_anew()

    def left(self, kept: int) -> dict[bytes, bytes]:
        """The state with the first ``kept`` batches since the last flush, and every ingested file."""
        state = self.flushed
        for ingested, change in self.since:
            if ingested or kept:
                state = change(state)
                kept -= not ingested
        return state

    @rule()
    def snapshot(self) -> None:
        if len(self.snapshots) < 4:
            self.snapshots.append((self.engine.snapshot(), dict(self.model)))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def close_snapshot(self, data: st.DataObject) -> None:
        self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))[0].close()

    @rule(span=SPANS, reverse=st.booleans(), keys=st.lists(KEYS, max_size=5))
    def read(self, span: tuple[bytes, bytes], reverse: bool, keys: list[bytes]) -> None:
        for reader, model in [(self.engine, self.model), *self.snapshots]:
            expected = sorted((pair for pair in model.items() if span[0] <= pair[0] < span[1]), reverse=reverse)
            assert list(reader.scan(*span, reverse=reverse)) == expected
            assert reader.get_many(keys) == [model.get(key) for key in keys]
            assert [reader.get(key) for key in keys] == [model.get(key) for key in keys]

    @invariant()
    def everything_is_there(self) -> None:
        for reader, model in [(self.engine, self.model), *self.snapshots]:
            assert list(reader.scan(LOW, HIGH)) == sorted(model.items())
        self.engine.check()

    def teardown(self) -> None:
        for snapshot, _ in self.snapshots:
            snapshot.close()
        self.engine.close()


class MemoryMachine(EngineMachine):
    def open(self) -> Engine:
        return MemoryEngine(crashable=True)

    def ingest_path(self) -> str:
        return f"file{next(self.files)}"

    def crashed(self, data: st.DataObject) -> Engine:
        assert isinstance(self.engine, MemoryEngine)
        return self.engine.crash(lambda count: data.draw(st.integers(0, count)))


class RocksMachine(EngineMachine):
    def open(self) -> Engine:
        self.directory = TemporaryDirectory()
        self.path = f"{self.directory.name}/engine"
        return RocksEngine(self.path, UNCOMPACTED)

    def crashed(self, data: st.DataObject) -> Engine:
        """A copy of the directory, taken while the engine is open: exactly what ``kill -9`` leaves of it."""
        copy = f"{self.directory.name}/copy{next(self.files)}"
        # A process dies at one moment, a copy takes a while: nothing may delete files meanwhile.
        self.engine._db.cancel_all_background(True)  # type: ignore[attr-defined]
        shutil.copytree(self.path, copy)
        with suppress(StorageError):
            self.engine.close()  # it cannot flush any more, and need not
        self.path = copy
        return RocksEngine(copy, UNCOMPACTED)

    def ingest_path(self) -> str:
        return f"{self.directory.name}/{next(self.files)}.sst"

    @rule()
    def reopen(self) -> None:
        for snapshot, _ in self.snapshots:
            snapshot.close()
        self.snapshots.clear()
        self.engine.close()
        self.engine = RocksEngine(self.path, UNCOMPACTED)
        self.begin_anew()

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestRocksMachine = RocksMachine.TestCase
TestRocksMachine.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)


def test_a_deleted_span_that_ends_before_it_begins_is_no_change() -> None:
    batch = WriteBatch()
    batch.put(b"b", b"1")
    for start, end in ((b"c", b"a"), (b"b", b"b")):
        batch.delete_range(start, end)
    assert (batch.changes, batch.deleted) == ({b"b": b"1"}, [])


@pytest.fixture(params=["memory", "rocks"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    opened: Engine = MemoryEngine(crashable=True) if request.param == "memory" else RocksEngine(f"{tmp_path}/engine")
    yield opened
    opened.close()


def test_a_deleted_span_spares_what_the_batch_puts_after_it() -> None:
    batch = put(a=b"1", c=b"3")
    batch.delete_range(b"a", b"c")
    assert batch.get(b"a") is None
    assert batch.get(b"c") == b"3"
    batch.put(b"b", b"2")
    assert batch.get(b"b") == b"2"
    assert batch.get(b"d") is MISSING
    assert (len(batch), bool(batch), bool(WriteBatch())) == (3, True, False)


def test_a_snapshot_stays_while_the_engine_moves_on_under_its_scan(engine: Engine) -> None:
    """Also across the border of the chunks in which it reads, forward and backward."""
    batch = WriteBatch()
    before = {b"%05d" % number: b"old" for number in range(0, 2000, 2)}
    for key, value in before.items():
        batch.put(key, value)
    engine.write(batch)
    for reverse in (False, True):
        snapshot = engine.snapshot()
        found = []
        for position, pair in enumerate(snapshot.scan(LOW, HIGH, reverse=reverse)):
            found.append(pair)
            if position % 100 == 0:
                change = WriteBatch()
                change.delete_range(b"%05d" % (position * 2), b"%05d" % (position * 2 + 60))
                change.put(b"%05d" % (position + 1), b"new")
                change.put(b"%05d" % (1998 - position), b"changed")
                engine.write(change)
        assert found == sorted(before.items(), reverse=reverse)
        snapshot.close()
        before = dict(engine.scan(LOW, HIGH))


def test_a_scan_of_a_snapshot_has_its_start_and_not_its_end(engine: Engine) -> None:
    engine.write(put(a=b"1", b=b"2", c=b"3", d=b"4"))
    snapshot = engine.snapshot()
    for reverse in (False, True):
        found = list(snapshot.scan(b"b", b"d", reverse=reverse))
        assert found == sorted([(b"b", b"2"), (b"c", b"3")], reverse=reverse)
    snapshot.close()


def test_two_scans_of_one_snapshot_do_not_disturb_each_other(engine: Engine) -> None:
    batch = WriteBatch()
    for number in range(600):
        batch.put(b"%05d" % number, b"")
    engine.write(batch)
    snapshot = engine.snapshot()
    pairs = list(zip(snapshot.scan(LOW, HIGH), snapshot.scan(LOW, HIGH, reverse=True)))
    assert [int(first[0]) for first, _ in pairs] == list(range(600))
    assert [int(second[0]) for _, second in pairs] == list(range(599, -1, -1))
    snapshot.close()


def test_unflushed_bytes_counts_what_was_written_since_the_flush(engine: Engine) -> None:
    engine.write(put(a=b"12345"))
    engine.write(put(b=b"1"))
    assert engine.unflushed_bytes == 8
    engine.flush()
    assert engine.unflushed_bytes == 0


def test_ingesting_a_file_that_was_not_built_is_a_storage_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing"):
        engine.ingest(f"{tmp_path}/nothing")


def test_an_abandoned_file_can_be_built_again(engine: Engine, tmp_path: Path) -> None:
    path = f"{tmp_path}/file.sst"
    for value in (b"1", b"2"):
        builder = engine.builder(path)
        builder.put(b"k", value)
        if value == b"1":
            builder.abandon()
        else:
            builder.finish()
    engine.ingest(path)
    assert engine.get(b"k") == b"2"


def test_keys_out_of_order_are_refused_by_a_builder(engine: Engine, tmp_path: Path) -> None:
    builder = engine.builder(f"{tmp_path}/file.sst")
    builder.put(b"b", b"")
    with pytest.raises((AssertionError, StorageError)):
        builder.put(b"a", b"")


def test_the_memory_engine_notices_a_write_during_a_scan_of_it() -> None:
    engine = MemoryEngine()
    engine.write(put(a=b"1", b=b"2"))
    scan = engine.scan(LOW, HIGH)
    next(scan)
    engine.write(put(c=b"3"))
    with pytest.raises(AssertionError, match="scan a snapshot"):
        next(scan)


def keep(count: int) -> Callable[[int], int]:
    return lambda batches: min(count, batches)


@pytest.mark.parametrize("kept", range(4))
def test_a_crash_of_the_memory_engine_keeps_a_prefix_of_its_batches(kept: int) -> None:
    """DESIGN 4.3: what a crash leaves is a prefix of the batches, no older than the last flush."""
    engine = MemoryEngine(crashable=True)
    engine.write(put(a=b"1", b=b"1"))
    engine.flush()
    states = [dict(engine.scan(LOW, HIGH))]
    for batch in (put(a=b"2"), WriteBatch(), put(c=b"3")):
        if not batch:
            batch.delete_range(b"a", b"c")
        engine.write(batch)
        states.append(dict(engine.scan(LOW, HIGH)))
    survivor = engine.crash(keep(kept))
    assert dict(survivor.scan(LOW, HIGH)) == states[kept]
    with pytest.raises(StorageError, match="closed"):
        engine.write(put(a=b"4"))


def test_trap_19_an_ingested_file_survives_where_earlier_batches_do_not() -> None:
    """TRAPS 19, and DESIGN 4.3 on ingest: the model must not be kinder than RocksDB is."""
    engine = MemoryEngine(crashable=True)
    engine.write(put(a=b"applied 7", m=b"old"))
    builder = engine.builder("file")
    builder.put(b"m", b"from the snapshot")
    builder.finish()
    engine.ingest("file")
    engine.write(put(m=b"newer"))
    survivor = engine.crash(keep(0))
    assert dict(survivor.scan(LOW, HIGH)) == {b"m": b"from the snapshot"}


def test_trap_19_a_flush_before_the_ingest_keeps_both() -> None:
    engine = MemoryEngine(crashable=True)
    engine.write(put(a=b"installing"))
    engine.flush()
    builder = engine.builder("file")
    builder.put(b"m", b"from the snapshot")
    builder.finish()
    engine.ingest("file")
    survivor = engine.crash(keep(0))
    assert dict(survivor.scan(LOW, HIGH)) == {b"a": b"installing", b"m": b"from the snapshot"}
