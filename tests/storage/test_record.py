"""Records: what goes in comes out, and what was not written by us is refused."""

from itertools import product
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.storage.record import (
    Checkpoint,
    CompactLog,
    CreateGroup,
    LogUpdate,
    Malformed,
    ResetLog,
    Tombstone,
    decode_meta,
    encode_turn,
    header_sums_up,
    pack_header,
    seed_of,
    unpack_header,
)
from shardkv.types import RangeId, ReplicaId

NUMBERS = st.integers(0, (1 << 64) - 1)
IDS = st.lists(NUMBERS, max_size=4).map(tuple)
CONF_STATES = st.builds(ConfState, IDS, IDS, IDS, IDS, st.booleans())
DATA = st.binary(max_size=20)
REPLICAS = NUMBERS.map(ReplicaId)
RUNS = st.tuples(
    st.integers(0, 1 << 60), st.lists(st.tuples(NUMBERS, st.sampled_from(EntryType), DATA), max_size=4)
).map(lambda run: tuple(Entry(term, run[0] + number, kind, data) for number, (term, kind, data) in enumerate(run[1])))
UPDATES = st.builds(
    LogUpdate,
    NUMBERS.map(RangeId),
    st.none() | st.builds(HardState, NUMBERS, NUMBERS, NUMBERS),
    RUNS,
    st.none() | st.builds(CreateGroup, REPLICAS, NUMBERS, NUMBERS, CONF_STATES, DATA),
    st.none() | st.builds(ResetLog, NUMBERS, NUMBERS, CONF_STATES),
    st.none() | st.builds(CompactLog, NUMBERS, NUMBERS),
    st.none() | st.builds(Tombstone, REPLICAS, DATA),
    st.booleans(),
)


@settings(deadline=None, derandomize=True)
@given(st.lists(UPDATES, max_size=4), st.booleans())
def test_what_is_encoded_is_decoded(updates: list[LogUpdate], rewritten: bool) -> None:
    meta, pieces, crcs, size = encode_turn(updates, rewritten=rewritten)
    data = b"".join(pieces)
    assert len(data) == size
    decoded = decode_meta(meta)
    assert not isinstance(decoded, Checkpoint)
    found_crcs = []
    for update, found in zip(updates, decoded, strict=True):
        entries = []
        for index, place in enumerate(found.entries, found.entries_start):
            content = data[place.offset : place.offset + place.bytes]
            assert crc32(content) == place.crc
            found_crcs.append(place.crc)
            entries.append(Entry(place.term, index, EntryType(place.type), content))
        again = LogUpdate(
            found.range_id,
            found.hard_state,
            tuple(entries),
            found.create,
            found.reset,
            found.compact,
            found.tombstone,
            found.release,
        )
        assert again == update
        assert found.rewritten == (rewritten and bool(update.entries))
    assert found_crcs == crcs


@settings(deadline=None, derandomize=True)
@given(st.lists(UPDATES, min_size=1, max_size=2), st.data())
def test_a_meta_section_cut_short_is_malformed_or_shorter(updates: list[LogUpdate], data: st.DataObject) -> None:
    meta, *_ = encode_turn(updates)
    cut = meta[: data.draw(st.integers(2, len(meta) - 1))]
    try:
        decoded = decode_meta(cut)
    except Malformed:
        return
    assert not isinstance(decoded, Checkpoint)
    assert len(decoded) < len(updates)


def test_a_header_counts_only_with_its_token_segment_and_meta() -> None:
    seed = seed_of(b"mine")
    meta = b"\x01\x01"
    raw = pack_header(seed, meta, 10, 3, 7, 6)
    header = unpack_header(raw, 3)
    assert header is not None
    assert (header.sequence, header.synced_sequence, header.data_bytes) == (7, 6, 10)
    assert header_sums_up(seed, raw, meta, header.crc)
    assert not header_sums_up(seed_of(b"theirs"), raw, meta, header.crc)
    assert not header_sums_up(seed, raw, b"\x01\x02", header.crc)
    assert unpack_header(raw, 4) is None
    assert unpack_header(raw[:-1], 3) is None
    assert unpack_header(bytes(len(raw)), 3) is None


@pytest.mark.parametrize("meta", [b"\x01\x02", b"\x03\x01", b"\x02\x01", b"\x02\x01" + bytes(9)])
def test_nonsense_under_a_right_checksum_is_malformed(meta: bytes) -> None:
    with pytest.raises(Malformed):
        decode_meta(meta)


def decoded_as_update(update: LogUpdate, rewritten: bool = False) -> LogUpdate:
    meta, pieces, _, _ = encode_turn([update], rewritten=rewritten)
    decoded = decode_meta(meta)
    assert not isinstance(decoded, Checkpoint)
    (found,) = decoded
    data = b"".join(pieces)
    entries = tuple(
        Entry(place.term, index, EntryType(place.type), data[place.offset : place.offset + place.bytes])
        for index, place in enumerate(found.entries, found.entries_start)
    )
    assert found.rewritten == (rewritten and bool(entries))
    return LogUpdate(
        found.range_id,
        found.hard_state,
        entries,
        found.create,
        found.reset,
        found.compact,
        found.tombstone,
        found.release,
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_every_shape_of_an_update_comes_out_whole(count: int) -> None:
    """Two shapes have short forms of their own; whatever else an update says must not be lost for them."""
    entries = tuple(Entry(3, 7 + each, EntryType.NORMAL, b"data") for each in range(count))
    for hard_state, create, reset, compact, tombstone, release, rewritten in product(
        (None, HardState(3, 1, 6)),
        (None, CreateGroup(ReplicaId(1), 6, 2, ConfState((1, 2)), b"made")),
        (None, ResetLog(6, 2, ConfState((1, 3)))),
        (None, CompactLog(6, 2)),
        (None, Tombstone(ReplicaId(1), b"over")),
        (False, True),
        (False, True),
    ):
        update = LogUpdate(RangeId(9), hard_state, entries, create, reset, compact, tombstone, release)
        assert decoded_as_update(update, rewritten) == update


def test_a_payload_that_ends_with_the_section_is_malformed() -> None:
    meta, *_ = encode_turn([LogUpdate(RangeId(9), tombstone=Tombstone(ReplicaId(1), b"over"))])
    for size in range(len(meta) - 4, len(meta)):
        with pytest.raises(Malformed):
            decode_meta(meta[:size])
