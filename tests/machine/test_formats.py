"""The bytes that can never change: engine keys, value envelopes, log entries, a range's rows."""

import pytest

from shardkv import codec
from shardkv.errors import Corruption
from shardkv.machine import envelope, keys, rows
from shardkv.machine.entries import (
    EntryKind,
    decode,
    decode_membership,
    encode_extension_entry,
    encode_membership,
    encode_split_entry,
    encode_write_entry,
    split_command,
)
from shardkv.raft.messages import ConfState
from shardkv.types import EVERY_KEY, KeyRange

from . import world


def test_system_rows_of_ranges_and_user_keys_never_mix() -> None:
    """Each range's rows lie in its own span, and every user key, even the empty one's neighbour, above them all."""
    for range_id in (0, 1, 2, 255, 256, (1 << 64) - 1):
        start, end = keys.system_span(range_id)
        for key in (
            keys.applied_key(range_id),
            keys.descriptor_key(range_id),
            keys.session_key(range_id, 7),
            keys.extension_prefix(range_id) + b"\xff",
        ):
            assert start <= key < end
        assert end <= keys.USER_PREFIX
    assert keys.system_span(1)[1] == keys.system_span(2)[0]


def test_session_rows_sort_by_entry_index() -> None:
    indices = [0, 1, 255, 256, 1 << 40]
    row_keys = [keys.session_key(9, index) for index in indices]
    assert row_keys == sorted(row_keys)
    assert [keys.session_key_index(key) for key in row_keys] == indices
    start, end = keys.kind_span(9, keys.SESSIONS)
    assert all(start <= key < end for key in row_keys)


def test_the_user_span_of_an_unbounded_range_stops_before_the_reserved_history() -> None:
    start, end = keys.user_span(EVERY_KEY)
    assert start <= keys.user_key(b"") < keys.user_key(b"\xff" * 4096) < end <= keys.HISTORY_PREFIX
    assert keys.user_span(KeyRange(b"a", b"b")) == (b"\x10a", b"\x10b")


def test_node_local_rows_lie_below_all_that_snapshots_carry() -> None:
    assert keys.system_span(0)[0] > keys.LOCAL_PREFIX + b"t"


def test_an_envelope_gives_back_version_and_value() -> None:
    packed = envelope.pack(1 << 60, b"value")
    assert envelope.unpack(packed) == (1 << 60, b"value")
    assert envelope.version_of(packed) == 1 << 60
    assert packed[0] == 1, "the format byte is fixed for good"
    assert len(packed) == 1 + 8 + 5


@pytest.mark.parametrize("head", [0x00, 0x02, 0x11, 0x21, 0x41, 0x81])
def test_an_envelope_with_an_unknown_format_or_flag_is_refused(head: int) -> None:
    """DESIGN §4.3: a flag that this version does not know changes what the bytes mean."""
    packed = bytes((head,)) + envelope.pack(1, b"v")[1:]
    with pytest.raises(Corruption):
        envelope.unpack(packed)


def test_a_truncated_envelope_is_corruption() -> None:
    with pytest.raises(Corruption):
        envelope.version_of(b"\x01\x00")


def test_a_write_entry_copies_the_clients_bytes_and_is_one_cbor_value() -> None:
    client = world.Client()
    raw = client.put(b"k", b"v") + client.increment(b"n", -3)
    raw = codec.array_head(2) + raw
    data = encode_write_entry([(client.session, raw), (b"b" * 16, b"\x80")], 77, 9)
    assert raw in data
    entry = codec.loads(data)
    assert entry == decode(data)
    assert entry[:4] == [1, EntryKind.WRITE, 77, 9]
    assert entry[4][0::2] == [client.session, b"b" * 16]
    assert [len(group) for group in entry[4][1::2]] == [2, 0]


def test_a_decoded_entry_from_the_leader_equals_the_one_decoded_from_bytes() -> None:
    """The leader applies what it decoded on arrival; followers decode the entry; both must see the same."""
    machine = world.World().machine
    client = world.Client()
    raw = codec.array_head(1) + client.put(b"k", b"v")
    data, decoded = machine.encode_write_entry([(client.session, raw, codec.loads(raw))], 77)
    assert decode(data) == decoded


def test_split_and_extension_entries_come_back_as_they_were() -> None:
    command = world.split_command(world.descriptor(), b"m" * 300)
    assert split_command(decode(encode_split_entry(command, 5))) == command
    assert decode(encode_extension_entry({"a": [1]}, 5))[1:] == [EntryKind.EXTENSION, 5, 0, {"a": [1]}]


@pytest.mark.parametrize("data", [b"\x01", b"\x80", b"\x85\x01", codec.dumps([2, 0, 1, 1, []]), codec.dumps({})])
def test_bytes_that_are_no_entry_of_this_format_are_corruption(data: bytes) -> None:
    with pytest.raises(Corruption):
        decode(data)


def test_a_membership_context_names_who_comes_and_where() -> None:
    assert decode_membership(encode_membership([(4, 40), (5, 50)])) == [(4, 40), (5, 50)]
    assert decode_membership(b"") == []
    with pytest.raises(Corruption):
        decode_membership(codec.dumps([9, []]))
    for strange in ([-1, 4], [4, -1], [True, 4], [4, True], ["n", 4], [4]):
        with pytest.raises(Corruption):
            decode_membership(codec.dumps([1, [strange]]))


def test_the_applied_row_comes_back_as_it_was_or_as_corruption() -> None:
    conf_state = ConfState((1, 2), (3,), (1, 4), (4,), True)
    packed = rows.pack_applied(10, 5, 1 << 63, rows.pack_conf_state(conf_state))
    assert rows.unpack_applied(packed) == rows.AppliedState(10, 5, 1 << 63, conf_state)
    for damaged in (b"", packed[:20], packed[:-1], b"\x07" + packed[1:], packed[:1] + b"\x07" + packed[2:]):
        with pytest.raises(Corruption):
            rows.unpack_applied(damaged)
    for strange in (-1, True, "1", None):
        for position in range(4):
            parts: list[object] = [[], [], [], [], False]
            parts[position] = [1, strange]
            with pytest.raises(Corruption):
                rows.unpack_applied(rows.pack_applied(10, 5, 1, codec.dumps(parts)))
    mark = rows.pack_mark(rows.InstallMark(world.descriptor(), 10, 5))
    assert rows.unpack_applied(mark) == rows.InstallMark(world.descriptor(), 10, 5)
    with pytest.raises(Corruption):
        rows.unpack_applied(b"\x07" + mark[1:])


def test_the_descriptor_row_comes_back_as_it_was_or_as_corruption() -> None:
    packed = rows.pack_descriptor(world.descriptor())
    assert rows.unpack_descriptor(packed) == world.descriptor()
    for damaged in (b"", packed[:-1], codec.dumps([2, []]), codec.dumps([1, []]), b"\x01"):
        with pytest.raises(Corruption):
            rows.unpack_descriptor(damaged)
