"""The durable engine: RocksDB through rocksdict, in raw mode, with its own log off.

Lives here: options, the calls, and the translation of errors. Does not live here: what keys mean, and when to flush.
The rule: one column family and no log of its own, so that a crash leaves a prefix of the batches (several column
families would be flushed apart); the Raft log is the log.

RocksDB opens its own files; it is handed a path and nothing else of the environment.

What rocksdict 0.3.29 and its RocksDB do otherwise than they say; a test stands behind each:

* The iterators of rocksdict's ``Snapshot`` see later writes. A plain iterator stays at the moment at which it was made,
  so a snapshot here is an iterator (for scans) beside a RocksDB snapshot (for gets).
* ``items()`` ends early and silently at a damaged block; only an iterator's ``status()`` tells.
* The bounds in ``ReadOptions`` lie in memory that is freed while the iterator is in use, so none are set and every scan
  compares its keys with its end.
* A snapshot taken at sequence number 0, where nothing was written but files were ingested, makes the next compaction
  drop live keys. So an engine at 0 makes an empty deletion first.
* A background flush that finds no room makes every later ``write`` and ``flush`` raise, until RocksDB, which looks
  about every five seconds, has found room and flushed. Reads go on, and what was written stays readable. Only a write
  tells whether it is over; the property ``background-errors`` only counts.
* Where the file CURRENT is missing, the first opening fails, but leaves a new one, by which the next finds an empty
  store and removes what the old one held. So none is opened where there are tables without it.
* Where the end of the file MANIFEST is missing, the store is an older one without a word, or an empty one, and the
  opening removes the tables that are newer. So whoever can tell sees what there is, read only, before it is opened.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import rocksdict

from shardkv.errors import Corruption, OutOfSpace, StorageError
from shardkv.storage import overlay
from shardkv.storage.engine import REPLACE_ADVICE, Reader, Snapshot, WriteBatch

SCAN_CHUNK_KEYS: Final = 256
"""A snapshot's scan takes this many pairs at a time from the iterator that all its scans share."""
SCAN_CHUNK_BYTES: Final = 256 * 1024
"""And no more than this of values, but for the last: 256 of the largest would fill the memory and hold up the loop."""
INGEST_FILE_BYTES: Final = 256 * 1024 * 1024
"""What is built to be ingested is cut into files of this size. A writer keeps its file's index and filter in memory,
about 4 % of the data. Where they replace other data the files stand in level 0 at first, and of those there must not be
so many that writes are held back."""
DELETIONS_IN_A_ROW: Final = 15_000
"""More than a memtable has of rows of sessions that have had their time."""
DELETIONS_WINDOW: Final = 16_384

_ABSENT: Final = "key not found"
_NO_KEY: Final = b"\0"


@dataclass(frozen=True, slots=True)
class RocksSettings:
    """Memory: a few write buffers and the block cache, whatever the amount of data."""

    write_buffer_bytes: int = 4 * 1024 * 1024
    """Small enough for the processor's caches: inserting into a buffer of 32 MiB costs twice as much (2.5 to 1.2 µs a
    key, flush not counted; 3.6 to 2.8 with flushes and compactions)."""
    write_buffers_max: int = 8
    """Writes stall when so many are full and waiting to be flushed."""
    block_cache_bytes: int = 32 * 1024 * 1024
    open_files_max: int = 256
    """No more than a quarter of those that the process may open, either."""
    background_jobs_max: int = 2
    level0_compaction_files: int = 8
    level0_slowdown_files: int = 24
    level0_stop_files: int = 36


def _options(settings: RocksSettings) -> rocksdict.Options:
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(rocksdict.Cache(settings.block_cache_bytes))
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    table.set_bloom_filter(10, False)
    table.set_format_version(5)
    table.set_data_block_index_type(rocksdict.DataBlockIndexType.binary_and_hash())
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(settings.write_buffer_bytes)
    options.set_max_write_buffer_number(settings.write_buffers_max)
    # Most reads are of keys that were written a moment ago or never: the memtable's own filter answers the latter.
    options.set_memtable_prefix_bloom_ratio(0.02)
    options.set_memtable_whole_key_filtering(True)
    options.set_level_zero_file_num_compaction_trigger(settings.level0_compaction_files)
    options.set_level_zero_slowdown_writes_trigger(settings.level0_slowdown_files)
    options.set_level_zero_stop_writes_trigger(settings.level0_stop_files)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_max_background_jobs(settings.background_jobs_max)
    options.set_max_open_files(min(settings.open_files_max, _open_files_quarter()))
    options.set_bytes_per_sync(1024 * 1024)
    options.set_compression_type(rocksdict.DBCompressionType.lz4())
    options.set_paranoid_checks(True)
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(4 * 1024 * 1024)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    # A file with so many deletions in a row is compacted although nothing else calls for it: a scan from where they
    # are steps over each of them, in the loop. Their share of the whole file decides nothing (0).
    options.add_compact_on_deletion_collector_factory(DELETIONS_WINDOW, DELETIONS_IN_A_ROW, 0.0)
    return options


def _open_files_quarter() -> int:
    """Of what the process may open: another quarter is kept for the log and for what the node dials."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if most == resource.RLIM_INFINITY else most // 4


def _translated(error: Exception, what: str) -> StorageError:
    """RocksDB's errors arrive as plain ``Exception`` with a text; this is the one place that reads it."""
    text = str(error)
    # What an opening does not find is as good as damaged, and the disk may be sound.
    gone = what.startswith("opening ") and "No such file or directory" in text
    if gone or "Corruption" in text:
        return Corruption(f"engine: {what}: {text}; {REPLACE_ADVICE}")
    if "No space left" in text or "NoSpace" in text:
        return OutOfSpace(f"engine: {what}: {text}; free some space on the node's disk")
    advice = "check the system's log and replace the disk if it reports errors; then restart the node"
    if "quota exceeded" in text:
        # Not OutOfSpace: RocksDB takes it for a broken disk, and does not go on by itself as after a full one.
        advice = "raise the quota of the node's user or free some of it; then restart the node"
    elif "Permission denied" in text or "Operation not permitted" in text:
        advice = "check the owner and the permissions; then restart the node"
    elif "Too many open files" in text:
        advice = "raise the limit on open files (ulimit -n); then restart the node"
    elif "File too large" in text:
        advice = "raise the limit on the size of files (ulimit -f); then restart the node"
    return StorageError(f"engine: {what}: {text}; {advice}")


def _require_current(path: str) -> None:
    """Raise Corruption if what says which of the files are the store is gone and tables of it are not."""
    try:
        tables = _tables(path)
    except OSError:
        return  # RocksDB makes it, or says why it cannot be read
    if tables and not os.path.exists(f"{path}/CURRENT"):
        raise Corruption(
            f"engine: {path} holds {tables[0]} and no file CURRENT, which was lost; put that one file back, or "
            f"{REPLACE_ADVICE}"
        )


def _tables(path: str) -> list[str]:
    return [name for name in os.listdir(path) if name.endswith(".sst")]


def _show(path: str, options: rocksdict.Options, admit: Callable[[Reader], bool]) -> None:
    """Show ``admit`` what the store at ``path`` holds, and leave it as it is. Raises Corruption if nothing is there of
    what must be, and there are tables that the store does not know."""
    read_only = rocksdict.AccessType.read_only()
    try:
        database: Any = rocksdict.Rdict(
            path, options=options, column_families={"default": options}, access_type=read_only
        )
    except Exception as error:
        raise _translated(error, f"opening {path}") from error
    store = RocksSnapshot(database.snapshot(), database.iter())
    try:
        if not admit(store):
            known = {file["name"].lstrip("/") for file in database.live_files()}
            unknown = sorted(set(_tables(path)) - known)
            if unknown:
                raise Corruption(
                    f"engine: {path} holds {unknown[0]}, of which its file MANIFEST tells nothing, nor of any range: "
                    f"its end was lost; put that one file back, or {REPLACE_ADVICE}"
                )
    finally:
        store.close()
        database.close()


class RocksEngine:
    """See :class:`shardkv.storage.engine.Engine`."""

    def __init__(
        self, path: str, settings: RocksSettings = RocksSettings(), admit: Callable[[Reader], bool] | None = None
    ) -> None:
        """Open the store in the directory ``path``, or make it. Blocks. Raises StorageError or Corruption.

        ``admit`` is shown a store that is there before anything in it is changed, and tells whether it holds anything
        of what it must; what it raises ends the opening.
        """
        _require_current(path)
        self._options = _options(settings)
        if admit is not None and os.path.exists(f"{path}/CURRENT"):
            _show(path, self._options, admit)
        try:
            # Without the explicit column family, the options found on disk would win without a word.
            self._db: Any = rocksdict.Rdict(path, options=self._options, column_families={"default": self._options})
        except Exception as error:
            raise _translated(error, f"opening {path}") from error
        # rocksdict's stub takes this property for a method.
        write_options: Any = rocksdict.WriteOptions()
        write_options.disable_wal = True
        self._write_options = write_options
        self._db.set_write_options(self._write_options)
        if not self._db.latest_sequence_number():
            self._db.delete(_NO_KEY, write_options)
        self._snapshots: WeakSet[RocksSnapshot] = WeakSet()
        self._built: dict[str, list[str]] = {}
        """The files of what was built and is not ingested yet, by the path that stands for them."""
        self._written_bytes = 0
        self._flushed_bytes = 0
        self._closed = False
        self._pending: list[WriteBatch] = []
        """What RocksDB had no room for, in order; everything reads through it. It is written before anything else, and
        callers that look at :meth:`stalled` add no more to it than they had at hand."""
        self.full = False
        """As in the protocol."""
        self._errors_over = 0
        """So many background errors are known to be over."""

    # Reads

    def get(self, key: bytes) -> bytes | None:
        if self._pending:
            return overlay.get(self._pending, key, self._get)
        return self._get(key)

    def _get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise _translated(error, "reading") from error
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._pending:
            return [self.get(key) for key in keys]
        try:
            values: list[bytes | None] = self._db.get(list(keys))
        except Exception as error:
            raise _translated(error, "reading") from error
        return values

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        if start >= end:
            return iter(())
        # No upper bound in the iterator's options: their memory is freed under the iterator, which then runs past it.
        try:
            iterator = self._db.iter()
            _begin(iterator, start, end, reverse)
        except Exception as error:
            raise _translated(error, "scanning") from error
        pairs = _backward(iterator, start) if reverse else _forward(iterator, end)
        if self._pending:
            return overlay.scan(self._pending, pairs, start, end, reverse=reverse)
        return pairs

    def snapshot(self) -> Snapshot:
        try:
            snapshot = RocksSnapshot(self._db.snapshot(), self._db.iter())
        except Exception as error:
            raise _translated(error, "taking a snapshot") from error
        self._snapshots.add(snapshot)
        return overlay.OverlaidSnapshot(snapshot, self._pending) if self._pending else snapshot

    # Writes

    def write(self, batch: WriteBatch) -> None:
        """Never raises OutOfSpace: a batch that finds no room waits in memory, and is seen as if it were written."""
        if self._pending or self.full:
            self._pending.append(batch)
            self._write_pending()
        else:
            # Not among those that wait before it has to: a flush in another thread would take the disk for full.
            try:
                self._write(batch)
            except OutOfSpace:
                self._pending.append(batch)
        self._written_bytes += batch.bytes

    def _write_pending(self) -> bool:
        """Write what waits; whether there was room for all of it."""
        while self._pending:
            try:
                self._write(self._pending[0])
            except OutOfSpace:
                return False
            del self._pending[0]
        return True

    def _write(self, batch: WriteBatch) -> None:
        try:
            raw = rocksdict.WriteBatch(raw_mode=True)
            for start, end in batch.deleted:
                raw.delete_range(start, end)
            changes = batch.changes
            # In key order, neighbours share most of their way into the write buffer.
            for key in sorted(changes):
                value = changes[key]
                if value is None:
                    del raw[key]
                else:
                    raw[key] = value
            self._db.write(raw, self._write_options)
        except Exception as error:
            raise _translated(error, "writing") from error

    def flush(self) -> None:
        written_bytes = self._written_bytes
        self._require_room("flushing")
        try:
            self._db.flush(wait=True)
        except Exception as error:
            raise _translated(error, "flushing") from error
        self._flushed_bytes = max(self._flushed_bytes, written_bytes)

    @property
    def unflushed_bytes(self) -> int:
        return self._written_bytes - self._flushed_bytes

    def _require_room(self, what: str) -> None:
        """Nothing is durable before what was written earlier. For the threads that may not write it themselves."""
        if self._pending:
            raise OutOfSpace(f"engine: {what}: earlier writes wait for room; free some space on the node's disk")

    def stalled(self) -> bool:
        number = self._db.property_int_value
        self.full = bool(self._pending) and not self._write_pending()
        if not self.full and number("rocksdb.background-errors") != self._errors_over:
            self.full = self._out_of_space()
        if self.full:
            return True
        return bool(number("rocksdb.is-write-stopped") or number("rocksdb.actual-delayed-write-rate"))

    def _out_of_space(self) -> bool:
        """Whether RocksDB takes no writes now for lack of room. Raises for any other reason."""
        errors = self._db.property_int_value("rocksdb.background-errors")
        try:
            self._db.write(rocksdict.WriteBatch(raw_mode=True), self._write_options)
        except Exception as error:
            translated = _translated(error, "writing in the background")
            if isinstance(translated, OutOfSpace):
                return True
            raise translated from error
        self._errors_over = errors
        return False

    # Ingest

    def builder(self, path: str) -> "RocksIngestBuilder":
        return RocksIngestBuilder(self._options, path, self._built)

    def ingest(self, path: str) -> None:
        options = rocksdict.IngestExternalFileOptions()
        options.set_move_files(True)
        self._require_room(f"ingesting {path}")
        try:
            # Several files at once are one change of the store: all of them are there after a crash, or none.
            self._db.ingest_external_file(self._built.get(path, [path]), options)
        except Exception as error:
            raise _translated(error, f"ingesting {path}") from error
        self._built.pop(path, None)

    # Ends

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # An iterator that is alive keeps the database open behind our back.
        for snapshot in list(self._snapshots):
            snapshot.close()
        self._write_pending()
        database, self._db = self._db, None
        try:
            database.flush(wait=True)
            database.close()
        except Exception as error:
            translated = _translated(error, "closing")
            if not isinstance(translated, OutOfSpace):
                raise translated from error
            # What is not flushed is still in the Raft log. rocksdict does not close without a flush; letting go of the
            # handle, at the end of this call, does.

    def check(self) -> None:
        assert self._flushed_bytes <= self._written_bytes, f"flushed {self._flushed_bytes} of {self._written_bytes}"
        previous: bytes | None = None
        iterator = self._db.iter()
        iterator.seek(b"")
        for key, _ in _forward(iterator):
            assert previous is None or previous < key, f"{key!r} comes after {previous!r}"
            previous = key


def _begin(iterator: Any, start: bytes, end: bytes, reverse: bool) -> None:
    """Stand at the first key of a span, in ``reverse`` at the last."""
    if reverse:
        iterator.seek_for_prev(end)
        if iterator.valid() and iterator.key() == end:
            iterator.prev()
    else:
        iterator.seek(start)


def _forward(iterator: Any, end: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    valid, read_key, read_value, following = iterator.valid, iterator.key, iterator.value, iterator.next
    while valid():
        key = read_key()
        if end is not None and key >= end:
            return
        yield key, read_value()
        following()
    _ended_well(iterator)


def _backward(iterator: Any, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    while iterator.valid():
        key = iterator.key()
        if key < start:
            return
        yield key, iterator.value()
        iterator.prev()
    _ended_well(iterator)


def _ended_well(iterator: Any) -> None:
    """An iterator also ends where it cannot read on."""
    try:
        iterator.status()
    except Exception as error:
        raise _translated(error, "scanning") from error


class RocksSnapshot:
    """See :class:`shardkv.storage.engine.Snapshot`. It pins the write buffers and files of its moment."""

    def __init__(self, snapshot: Any, iterator: Any) -> None:
        self._snapshot = snapshot
        self._iterator = iterator

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes = self._snapshot[key]
        except Exception as error:
            if str(error) == _ABSENT:
                return None
            raise _translated(error, "reading a snapshot") from error
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        while start < end:
            chunk, ended = self._chunk(start, end, reverse)
            yield from chunk
            if ended:
                return
            if reverse:
                end = chunk[-1][0]
            else:
                start = chunk[-1][0] + b"\0"

    def _chunk(self, start: bytes, end: bytes, reverse: bool) -> tuple[list[tuple[bytes, bytes]], bool]:
        """The first pairs, in ``reverse`` the last, and whether they are all."""
        iterator = self._open_iterator()
        _begin(iterator, start, end, reverse)
        go_on = iterator.prev if reverse else iterator.next
        chunk: list[tuple[bytes, bytes]] = []
        size = 0
        while iterator.valid():
            key = iterator.key()
            if not start <= key < end:
                return chunk, True
            value = iterator.value()
            chunk.append((key, value))
            size += len(value)
            if len(chunk) >= SCAN_CHUNK_KEYS or size >= SCAN_CHUNK_BYTES:
                return chunk, False
            go_on()
        _ended_well(iterator)
        return chunk, True

    def _open_iterator(self) -> Any:
        if self._iterator is None:
            raise StorageError("engine: the snapshot is closed")
        return self._iterator

    def close(self) -> None:
        self._snapshot = self._iterator = None


class RocksIngestBuilder:
    """See :class:`shardkv.storage.engine.IngestBuilder`."""

    def __init__(self, options: rocksdict.Options, path: str, built: dict[str, list[str]]) -> None:
        self._options = options
        self._path = path
        self._built = built
        self._cut_bytes = INGEST_FILE_BYTES
        self.paths: list[str] = []
        self.written_bytes = 0
        self._open()

    def _open(self) -> None:
        path = f"{self._path}.{len(self.paths)}" if self.paths else self._path
        self._writer = rocksdict.SstFileWriter(self._options)
        try:
            self._writer.open(path)
        except Exception as error:
            raise _translated(error, f"creating {path}") from error
        self.paths.append(path)

    def put(self, key: bytes, value: bytes) -> None:
        if self.written_bytes >= self._cut_bytes:
            # Most of the file is on the disk by now (bytes_per_sync), so this takes milliseconds.
            self._finish_file()
            self._open()
            self._cut_bytes = self.written_bytes + INGEST_FILE_BYTES
        try:
            self._writer[key] = value
        except Exception as error:
            raise _translated(error, f"building {self._path}") from error
        self.written_bytes += len(key) + len(value)

    def _finish_file(self) -> None:
        try:
            self._writer.finish()
        except Exception as error:
            raise _translated(error, f"finishing {self.paths[-1]}") from error

    def finish(self) -> None:
        self._finish_file()
        self._built[self._path] = self.paths

    def abandon(self) -> None:
        """The unfinished files stay until their names are used again or the owner unlinks them."""
        self._built.pop(self._path, None)
