"""Raft messages on the wire: what goes in comes out, however it was put together."""

import pytest

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


def test_the_stamps_of_heartbeats_and_their_answers_survive() -> None:
    stamps = {"lease_stamp": 1 << 62, "lease_promise": 400_000_000, "follower_stamp": (1 << 62) + 1}
    for kind in (MessageType.HEARTBEAT, MessageType.HEARTBEAT_RESP):
        message = Message(kind, 3, 1, 5, index=9, commit=6, **stamps)
        ((_, decoded, _),) = decode(join([encode_message(9, message)]))
        assert decoded == message


@pytest.mark.parametrize("field", ["to", "from_", "term", "log_term", "index", "commit", "vote", "reject_hint"])
def test_numbers_of_any_size_survive_in_either_form(field: str) -> None:
    """Usual numbers are packed at once, larger ones encoded one by one; both are the same CBOR to a reader."""
    for value in (0, 1, 23, 24, (1 << 32) - 1, 1 << 32, (1 << 64) - 1):
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
