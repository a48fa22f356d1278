"""Raft messages on the wire: what goes in comes out, however it was put together."""

import pytest

from shardkv import codec
from shardkv.errors import MalformedRequest
from shardkv.raft.messages import Entry, EntryType, Message, MessageType
from shardkv.wire import raft_codec
from shardkv.wire.raft_codec import decode, encode_entries, encode_message, join


def test_a_message_without_entries_survives() -> None:
    message = Message(MessageType.APP_RESP, 3, 1, 5, index=6, reject=True, reject_hint=4, context=b"c", commit=6)
    ((range_id, decoded, notice),) = decode(join([encode_message(9, message)]))
    assert (range_id, decoded, notice) == (9, message, None)


def test_entries_that_are_encoded_once_make_the_same_message_for_every_follower() -> None:
    entries = (Entry(3, 7, EntryType.NORMAL, b"x" * 300), Entry(4, 8, EntryType.NORMAL, b""))
    shared = encode_entries(entries)
    for to in (2, 3):
        message = Message(MessageType.APP, to, 1, 5, log_term=3, index=6, entries=entries, commit=6)
        assert encode_message(9, message, shared) == encode_message(9, message)
        ((_, decoded, _),) = decode(join([encode_message(9, message, shared)]))
        assert decoded.entries == entries
        assert decoded.to == to


@pytest.mark.parametrize("term", [1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1])
def test_entries_of_any_term_survive_in_either_form(term: int) -> None:
    entries = (Entry(1, 7, EntryType.NORMAL, b"x"), Entry(term, 8, EntryType.CONF_CHANGE, bytes(1 << 17)))
    message = Message(MessageType.APP, 2, 1, term, log_term=1, index=6, entries=entries)
    assert decode(join([encode_message(9, message)])) == [(9, message, None)]


def test_the_stamps_of_heartbeats_and_their_answers_survive() -> None:
    stamps = {"lease_stamp": 1 << 62, "lease_promise": 400_000_000, "follower_stamp": (1 << 62) + 1}
    for kind in (MessageType.HEARTBEAT, MessageType.HEARTBEAT_RESP):
        message = Message(kind, 3, 1, 5, index=9, commit=6, **stamps)
        ((_, decoded, _),) = decode(join([encode_message(9, message)]))
        assert decoded == message


@pytest.mark.parametrize("field", ["to", "from_", "term", "log_term", "index", "commit", "vote", "reject_hint"])
def test_numbers_of_any_size_survive_in_either_form(field: str) -> None:
    """Usual numbers are packed at once, larger ones encoded one by one; both are the same CBOR to a reader."""
    for value in (0, 1, 23, 24, (1 << 32) - 1, 1 << 32, (1 << 63) - 1):
        if value == 0 and field in ("to", "from_"):
            continue  # no replica
        message = Message(MessageType.APP_RESP, 3, 1, 5, index=6, commit=6)
        setattr(message, field, value)
        ((range_id, decoded, _),) = decode(join([encode_message(9, message)]))
        assert (range_id, decoded) == (9, message)


@pytest.mark.parametrize("range_id", [1, (1 << 32) - 1, 1 << 32])
@pytest.mark.parametrize("context", [b"", b"c", bytes(300)])
def test_every_kind_of_message_survives_in_either_form(range_id: int, context: bytes) -> None:
    entries = (Entry(3, 7, EntryType.CONF_CHANGE_V2, b"x" * 300), Entry(4, 8, EntryType.NORMAL, b""))
    stamps = {"lease_stamp": (1 << 63) + 1, "lease_promise": 1 << 40, "follower_stamp": 1 << 50}
    for kind in raft_codec._FROM_PEERS:
        for reject in (False, True):
            message = Message(kind, 3, 1, 5, index=6, reject=reject, context=context, entries=entries, **stamps)  # type: ignore[arg-type]
            assert decode(join([encode_message(range_id, message)])) == [(range_id, message, None)]


PLAIN = [9, 3, 1, int(MessageType.APP_RESP), 5, 4, 6, 6, False, 0, 0, b"", 0, 0, 0, []]


@pytest.mark.parametrize("value", [-1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("position", [0, 1, 2, 4, 5, 6, 7, 9, 10])
def test_ids_terms_and_indexes_that_no_group_can_go_on_from_are_malformed(position: int, value: int) -> None:
    """A replica id above all made a group that no start could take up again, a term above all one without elections."""
    assert decode(codec.dumps([PLAIN]))
    bad = list(PLAIN)
    bad[position] = value
    with pytest.raises(MalformedRequest, match="below 2\\^63"):
        decode(codec.dumps([bad]))


@pytest.mark.parametrize("position", [1, 2])
def test_a_message_to_or_from_no_replica_is_malformed(position: int) -> None:
    bad = list(PLAIN)
    bad[position] = 0
    with pytest.raises(MalformedRequest, match="0 is none"):
        decode(codec.dumps([bad]))


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("position", [12, 13, 14])
def test_stamps_are_unsigned_numbers_of_64_bits(position: int, value: int) -> None:
    bad = list(PLAIN)
    bad[position] = value
    with pytest.raises(MalformedRequest):
        decode(codec.dumps([bad]))


def test_an_entry_of_a_term_above_all_is_malformed() -> None:
    with pytest.raises(MalformedRequest, match="a log entry"):
        decode(codec.dumps([[*PLAIN[:15], [[1 << 63, 0, b"x"]]]]))


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, True), (3, False), (4, 5.0), (8, 0), (8, None), (11, "c"), (11, None), (15, {}), (15, None), (15, b"")],
)
def test_a_field_of_another_type_is_malformed(position: int, value: object) -> None:
    bad: list[object] = list(PLAIN)
    bad[position] = value
    with pytest.raises(MalformedRequest):
        decode(codec.dumps([bad]))


@pytest.mark.parametrize(
    "entry", [[1.0, 0, b"x"], [True, 0, b"x"], [-1, 0, b"x"], [1, False, b"x"], [1, 9, b"x"], [1, 0, "x"], [1, 0], 1]
)
def test_an_entry_of_another_shape_is_malformed(entry: object) -> None:
    assert decode(codec.dumps([[*PLAIN[:15], [[1, 0, b"x"]]]]))
    with pytest.raises(MalformedRequest, match="a log entry"):
        decode(codec.dumps([[*PLAIN[:15], [[1, 0, b"x"], entry]]]))


def test_entries_behind_the_last_index_there_is_are_malformed() -> None:
    for index, fits in (((1 << 63) - 3, True), ((1 << 63) - 2, False), ((1 << 63) - 1, False)):
        message = [*PLAIN[:6], index, *PLAIN[7:15], [[1, 0, b"x"], [1, 0, b"y"]]]
        if fits:
            ((_, decoded, _),) = decode(codec.dumps([message]))
            assert decoded.entries[-1].index == (1 << 63) - 1
        else:
            with pytest.raises(MalformedRequest, match="the last index"):
                decode(codec.dumps([message]))


def test_a_message_of_a_kind_that_nodes_do_not_send_each_other_is_malformed() -> None:
    """Some exist within a node: one that tells a replica to campaign must not come from outside."""
    known = {kind for kind in range(256) if kind in raft_codec._TYPES or kind in raft_codec._NOTICES}
    for kind in [*range(256), 1 << 40]:
        frame = codec.dumps([[*PLAIN[:3], kind, *PLAIN[4:]]])
        if kind in known:
            assert decode(frame)
        else:
            with pytest.raises(MalformedRequest, match="not one that nodes send"):
                decode(frame)
    assert int(MessageType.HUP) not in known


def test_a_frame_holds_no_more_messages_than_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raft_codec, "MESSAGES_PER_FRAME_MAX", 3)
    assert len(decode(codec.dumps([PLAIN] * 3))) == 3
    for payload in (codec.dumps([PLAIN] * 4), codec.dumps({}), codec.dumps(1)):
        with pytest.raises(MalformedRequest, match="at most 3 messages"):
            decode(payload)
