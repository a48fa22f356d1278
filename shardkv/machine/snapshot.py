"""A range as rows: what a snapshot of it holds, and how a replica takes one in.

Lives here: which spans of the engine make up a range, and how they are replaced. Does not live here: chunks,
compression, flow control, files. The rule (trap 19): a crash at any moment leaves the old state, the new one, or the
install mark; never a mixture that looks whole. Rows of a snapshot include the applied row, so whatever makes them
visible makes the applied index visible with them.

:func:`begin_install` in a batch of its own, flush, ingest all the rows as one; the applied row among them overwrites
the mark. A replica that is found with the mark (:func:`installing`) owns its span, serves nothing, and asks for its
snapshot again.
"""

from collections.abc import Iterator

from shardkv.machine import keys, rows
from shardkv.machine.rows import InstallMark
from shardkv.storage.engine import Reader, WriteBatch
from shardkv.types import RangeDescriptor, RangeId


def engine_spans(descriptor: RangeDescriptor) -> list[tuple[bytes, bytes]]:
    """The engine's half-open spans that make up a range, in key order."""
    spans = [keys.system_span(descriptor.range_id)]
    if not descriptor.span.empty:
        spans.append(keys.user_span(descriptor.span))
    return spans


def snapshot_rows(reader: Reader, descriptor: RangeDescriptor, *, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """The rows of a range in key order: all, or those whose key in the engine comes after one.

    ``reader`` is an engine snapshot unless this is run to its end at once.
    """
    for start, end in engine_spans(descriptor):
        if after < end:
            yield from reader.scan(max(start, after + b"\0") if after else start, end)


def begin_install(
    batch: WriteBatch,
    descriptor: RangeDescriptor,
    index: int,
    term: int,
    previous: RangeDescriptor | None,
    reader: Reader,
) -> None:
    """The batch that goes before an ingest: the old rows go, the mark stands. Flush it before ingesting.

    ``previous`` is the descriptor of the replica that is replaced: its span goes too, where it was wider. A span in
    which ``reader``, the engine, holds nothing is left alone: files that are ingested over no deletion need no
    compaction.
    """
    spans = engine_spans(descriptor)
    if previous is not None and not previous.span.empty and previous.span != descriptor.span:
        spans.append(keys.user_span(previous.span))
    for start, end in spans:
        if next(reader.scan(start, end), None) is not None:
            batch.delete_range(start, end)
    mark = InstallMark(descriptor, index, term)
    batch.put(keys.applied_key(descriptor.range_id), rows.pack_mark(mark))


def installing(reader: Reader, range_id: RangeId) -> InstallMark | None:
    """The mark of an install that did not come to its end, if there is one."""
    state = rows.read_applied(reader, range_id)
    return state if isinstance(state, InstallMark) else None
