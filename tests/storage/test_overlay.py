"""Reads through batches that wait for room: exactly what the store will hold once it has taken them."""

from hypothesis import example, given
from hypothesis import strategies as st

from shardkv.storage import overlay
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine

from .test_engine import CHANGES, HIGH, KEYS, LOW, SPANS, VALUES, changed


@given(
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.lists(st.lists(CHANGES, max_size=5), min_size=1, max_size=3),
    SPANS,
    st.lists(KEYS, max_size=4),
)
@example({b"a": b"1", b"b": b"2"}, [[("delete_range", b"a", b"b")]], (b"a", b"c"), [b"a", b"b"])
@example({b"a": b"1", b"b": b"2"}, [[("put", b"b", b"3")], [("delete_range", b"a", b"b")]], (b"a", b"b"), [b"b"])
def test_a_read_through_waiting_batches_is_a_read_after_them(stored, waiting, span, keys) -> None:  # type: ignore[no-untyped-def]
    engine = MemoryEngine()
    batch = WriteBatch()
    for key, value in stored.items():
        batch.put(key, value)
    engine.write(batch)
    batches, model = [], stored
    for changes in waiting:
        batch = WriteBatch()
        for kind, first, second in changes:
            batch.delete(first) if kind == "delete" else getattr(batch, kind)(first, second)
        batches.append(batch)
        model = changed(changes, model)
    snapshot = overlay.OverlaidSnapshot(engine.snapshot(), batches)
    for start, end in (span, (LOW, HIGH)):
        expected = sorted(pair for pair in model.items() if start <= pair[0] < end)
        for reverse in (False, True):
            pairs = engine.scan(start, end, reverse=reverse)
            found = list(overlay.scan(batches, pairs, start, end, reverse=reverse))
            assert found == (expected[::-1] if reverse else expected)
            assert list(snapshot.scan(start, end, reverse=reverse)) == found
    assert snapshot.get_many(keys) == [model.get(key) for key in keys]
    assert [overlay.get(batches, key, engine.get) for key in keys] == [model.get(key) for key in keys]
    snapshot.close()
