"""What leaves for other nodes: the messages of a turn as one frame per peer.

Lives here: which node a message is for, what shares a frame, and how large one gets. Does not live here: when a turn
sends (``driver``), nor connections (``transport``).
"""

from collections.abc import Iterable
from typing import Final, Protocol

from shardkv.multiraft.replica import Replica
from shardkv.raft.messages import Entry, Message, MessageType
from shardkv.types import NodeId
from shardkv.wire import raft_codec
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.raft_codec import MESSAGES_PER_FRAME_MAX, ReplicaNotice

PEER_FRAME_BYTES: Final = 4 * 1024 * 1024
"""A turn's messages for one peer are cut into frames of about this size."""

_URGENT: Final = frozenset(
    {
        MessageType.HEARTBEAT,
        MessageType.HEARTBEAT_RESP,
        MessageType.VOTE,
        MessageType.VOTE_RESP,
        MessageType.PRE_VOTE,
        MessageType.PRE_VOTE_RESP,
        MessageType.TIMEOUT_NOW,
    }
)


class Peers(Protocol):
    """How frames reach other nodes. Never waits; what cannot be sent is dropped, as Raft allows."""

    def send(self, node_id: NodeId, frame: bytes, *, urgent: bool) -> None: ...

    def flush(self) -> None: ...


class Outgoing:
    """Makes frames and hands them to ``peers``, who keep them until they are flushed."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def messages(self, messages: list[tuple[Replica, Message]]) -> None:
        """One frame per peer for everything in ``messages``, urgent ones apart."""
        frames: dict[tuple[NodeId, bool], list[bytes]] = {}
        entries: tuple[Entry, ...] = ()
        encoded_entries = raft_codec.encode_entries(entries)
        for replica, message in messages:
            node_id = replica.node_of(message.to)
            if node_id is None:
                continue
            key = (node_id, message.type in _URGENT)
            if message.entries != entries:
                # Followers are sent the same entries one after the other.
                entries = message.entries
                encoded_entries = raft_codec.encode_entries(entries)
            encoded = raft_codec.encode_message(replica.range_id, message, encoded_entries)
            parts = frames.get(key)
            if parts is None:
                frames[key] = [encoded]
            else:
                parts.append(encoded)
        for (node_id, urgent), parts in frames.items():
            for piece in _pieces(parts) if len(parts) > 1 else (parts,):
                self._peers.send(node_id, encode_frame(FrameKind.RAFT, raft_codec.join(piece)), urgent=urgent)

    def snapshot_wanted(self, replica: Replica) -> None:
        """Ask the leader, if one is known, for the data that a replica waits for."""
        leader = replica.raft.leader
        node_id = replica.node_of(leader)
        if node_id is not None:
            notice = raft_codec.encode_notice(replica.range_id, ReplicaNotice.NEED_SNAPSHOT, leader, replica.replica_id)
            self._peers.send(node_id, encode_frame(FrameKind.RAFT, raft_codec.join([notice])), urgent=False)


def _pieces(parts: list[bytes]) -> Iterable[list[bytes]]:
    """Encoded messages cut into frames' worth."""
    if len(parts) <= MESSAGES_PER_FRAME_MAX and sum(map(len, parts)) <= PEER_FRAME_BYTES:
        yield parts
        return
    piece: list[bytes] = []
    size = 0
    for part in parts:
        if piece and (size + len(part) > PEER_FRAME_BYTES or len(piece) >= MESSAGES_PER_FRAME_MAX):
            yield piece
            piece, size = [], 0
        piece.append(part)
        size += len(part)
    yield piece
