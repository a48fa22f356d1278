"""Raft messages on the wire: what goes in comes out, however it was put together."""

from shardkv.raft.messages import Entry, EntryType, Message, MessageType
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
