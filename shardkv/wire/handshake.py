"""The first messages on a connection: who speaks, to whom, which protocol. Values and bytes; transport exchanges them.

These three payloads can never change their meaning, since they are read before a version is agreed. Later versions may
append fields; readers ignore what they do not know. The magic makes sure that nothing else is taken for a greeting.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shardkv import codec, errors
from shardkv.errors import MalformedRequest, ProtocolError, ShardKVError, VersionUnsupported
from shardkv.types import CLUSTER_ID_BYTES, LINEAGE_MAX, TOKEN_BYTES, NodeId
from shardkv.wire.frames import FrameKind, encode_frame

PROTOCOL_VERSION_MIN: Final = 1
PROTOCOL_VERSION_MAX: Final = 1
"""The versions that this program speaks, both included."""

MAGIC: Final = b"SHARDKV\n"
GREETING_BYTES_MAX: Final = 64 * 1024
"""No greeting is larger; a decoder needs no more until the greeting is over."""
ADDRESS_CHARACTERS_MAX: Final = 512
_UINT64_MAX: Final = (1 << 64) - 1


class Role(IntEnum):
    """What a connection is for."""

    CLIENT = 0
    PEER = 1
    """Raft messages in bulk: appends and their answers."""
    PEER_URGENT = 2
    """Heartbeats and votes, which must not stand behind bulk."""
    SNAPSHOT = 3


@dataclass(frozen=True, slots=True)
class Hello:
    """The dialler's greeting. A client may not know the cluster yet; a peer names everything."""

    role: Role
    cluster_id: bytes | None = None
    node_id: NodeId | None = None
    """Of a client: the node whose own calls these are; None for everybody else's."""
    destination_node_id: NodeId | None = None
    boot: int = 0
    """How often the sender's data directory has been started; a lower one than seen before is a restored disk."""
    address: str | None = None
    """Where the sender listens in this start, so that whom it dials can dial it back after it has moved."""
    start_token: bytes = b""
    """Random, made at this start: two starts of the same count are not taken for one. Empty: not told."""
    earlier_tokens: tuple[bytes, ...] = ()
    """Of the starts right before this one, newest first: what was started on a copy does not pass for its original."""
    protocol_version_min: int = PROTOCOL_VERSION_MIN
    protocol_version_max: int = PROTOCOL_VERSION_MAX


@dataclass(frozen=True, slots=True)
class Welcome:
    """The listener's answer to a greeting that it accepts."""

    protocol_version: int
    cluster_id: bytes | None
    """None while the node belongs to no cluster yet."""
    node_id: NodeId | None
    boot: int
    timestamp: int
    """The node's hybrid timestamp, the client's first base for its own stamps; 0 for another node, which has a clock of
    its own."""
    inflight_max: int
    """How many requests the connection may have unanswered before the node stops reading it."""
    start_token: bytes = b""
    """As in :class:`Hello`; a client has no use for it."""
    earlier_tokens: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The listener's answer to a greeting that it does not accept; it closes after it."""

    error: ShardKVError


def negotiate(hello: Hello) -> int:
    """The highest protocol version that both sides speak. Raises VersionUnsupported."""
    version = min(hello.protocol_version_max, PROTOCOL_VERSION_MAX)
    if version < max(hello.protocol_version_min, PROTOCOL_VERSION_MIN):
        raise VersionUnsupported(
            f"the other side speaks protocol versions {hello.protocol_version_min} to {hello.protocol_version_max}, "
            f"this one {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}; upgrade the older one"
        )
    return version


def encode_hello(hello: Hello) -> bytes:
    """The whole frame."""
    fields = [
        hello.protocol_version_min,
        hello.protocol_version_max,
        int(hello.role),
        hello.cluster_id,
        hello.node_id,
        hello.destination_node_id,
        hello.boot,
        hello.address,
        hello.start_token,
        list(hello.earlier_tokens),
    ]
    return encode_frame(FrameKind.HELLO, MAGIC, codec.dumps(fields))


def decode_hello(payload: bytes) -> Hello:
    """Raises ProtocolError for anything but a complete greeting."""
    fields = _fields(payload, "greeting")
    match fields:
        case [int(low), int(high), int(role), bytes() | None as cluster, node, destination, int(boot), *later]:
            if not 0 <= low <= high:
                raise ProtocolError(f"a greeting with protocol versions from {low} to {high}")
            hello = Hello(
                role=_role(role),
                cluster_id=_cluster_id(cluster),
                node_id=_node_id(node),
                destination_node_id=_node_id(destination),
                boot=_unsigned(boot, "boot counter"),
                address=_address(later[0]) if later else None,
                start_token=_start_token(later[1]) if len(later) > 1 else b"",
                earlier_tokens=_earlier_tokens(later[2]) if len(later) > 2 else (),
                protocol_version_min=low,
                protocol_version_max=high,
            )
        case _:
            raise ProtocolError(f"a greeting of another shape: {fields!r:.200}")
    if hello.role is not Role.CLIENT and None in (hello.cluster_id, hello.node_id, hello.destination_node_id):
        raise ProtocolError(f"a greeting for {hello.role.name} must name its cluster and both nodes")
    return hello


def encode_welcome(welcome: Welcome) -> bytes:
    """The whole frame."""
    fields = [
        welcome.protocol_version,
        welcome.cluster_id,
        welcome.node_id,
        welcome.boot,
        welcome.timestamp,
        welcome.inflight_max,
        welcome.start_token,
        list(welcome.earlier_tokens),
    ]
    return encode_frame(FrameKind.WELCOME, MAGIC, codec.dumps(fields))


def decode_welcome(payload: bytes) -> Welcome:
    """Raises ProtocolError for anything but a complete welcome."""
    fields = _fields(payload, "welcome")
    match fields:
        case [int(version), bytes() | None as cluster, node, int(boot), int(timestamp), int(inflight_max), *later]:
            if not PROTOCOL_VERSION_MIN <= version <= PROTOCOL_VERSION_MAX:
                raise VersionUnsupported(f"the node chose protocol version {version}, which was not offered")
            return Welcome(
                protocol_version=version,
                cluster_id=_cluster_id(cluster),
                node_id=_node_id(node),
                boot=_unsigned(boot, "boot counter"),
                timestamp=_unsigned(timestamp, "timestamp"),
                inflight_max=max(1, _unsigned(inflight_max, "in-flight bound")),
                start_token=_start_token(later[0]) if later else b"",
                earlier_tokens=_earlier_tokens(later[1]) if len(later) > 1 else (),
            )
    raise ProtocolError(f"a welcome of another shape: {fields!r:.200}")


def encode_refused(error: ShardKVError) -> bytes:
    """The whole frame."""
    return encode_frame(FrameKind.REFUSED, MAGIC, codec.dumps(errors.to_wire(error)))


def decode_refused(payload: bytes) -> Refused:
    """Raises ProtocolError for anything but a complete refusal."""
    try:
        return Refused(errors.from_wire(_fields(payload, "refusal")))
    except ValueError as problem:
        raise ProtocolError(f"a refusal of another shape: {problem}") from problem


def _fields(payload: bytes, what: str) -> object:
    if not payload.startswith(MAGIC):
        raise ProtocolError(f"a {what} without shardkv's magic: the other side is not shardkv")
    if len(payload) > GREETING_BYTES_MAX:
        raise ProtocolError(f"a {what} of {len(payload)} bytes; at most {GREETING_BYTES_MAX} are allowed")
    try:
        return codec.loads(payload[len(MAGIC) :])
    except MalformedRequest as error:
        raise ProtocolError(f"a {what} that cannot be read: {error}") from error


def _role(number: int) -> Role:
    try:
        return Role(number)
    except ValueError:
        raise ProtocolError(f"a greeting with unknown role {number}") from None


def _cluster_id(value: bytes | None) -> bytes | None:
    if value is not None and len(value) != CLUSTER_ID_BYTES:
        raise ProtocolError(f"a cluster id of {len(value)} bytes instead of {CLUSTER_ID_BYTES}")
    return value


def _node_id(value: object) -> NodeId | None:
    if value is None:
        return None
    if not isinstance(value, int):
        raise ProtocolError(f"a node id that is no number: {value!r:.40}")
    return NodeId(_unsigned(value, "node id"))


def _address(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= ADDRESS_CHARACTERS_MAX:
        raise ProtocolError(f"an address that cannot be one: {value!r:.80}")
    return value


def _start_token(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) not in (0, TOKEN_BYTES):
        raise ProtocolError(f"a start's token that cannot be one: {value!r:.80}")
    return value


def _earlier_tokens(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) >= LINEAGE_MAX:
        raise ProtocolError(f"tokens of earlier starts that cannot be some: {value!r:.80}")
    return tuple(map(_start_token, value))


def _unsigned(value: int, what: str) -> int:
    if isinstance(value, bool) or not 0 <= value <= _UINT64_MAX:
        raise ProtocolError(f"a {what} out of bounds: {value}")
    return value
