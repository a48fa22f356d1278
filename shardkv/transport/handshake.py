"""The exchange of greetings, on the side that listens and on the side that dials; what they mean is in ``wire``.

The rule: nothing else is said on a connection before both sides know the cluster, the nodes and the version, and a side
that refuses says why before it closes.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from shardkv.environment import Clock
from shardkv.errors import ProtocolError, ShardKVError, WrongCluster
from shardkv.transport.connection import Connection
from shardkv.types import NodeId, branches_off
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind
from shardkv.wire.handshake import (
    GREETING_BYTES_MAX,
    Hello,
    Role,
    Welcome,
    decode_hello,
    decode_refused,
    decode_welcome,
    encode_hello,
    encode_refused,
    encode_welcome,
    negotiate,
)

GREETING_SECONDS_MAX: Final = 5.0
"""A connection that has not greeted by then is closed, so that strangers cannot hold file handles."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who this node, a member of a cluster, is to others, and where they reach it."""

    cluster_id: bytes
    node_id: NodeId
    boot: int
    address: str
    start_token: bytes = b""
    """Random, made at this start."""
    earlier_tokens: tuple[bytes, ...] = ()
    """Of the starts right before it, newest first."""

    def hello(self, role: Role, destination: NodeId) -> Hello:
        """Its greeting for another node of the cluster."""
        return Hello(
            role,
            cluster_id=self.cluster_id,
            node_id=self.node_id,
            destination_node_id=destination,
            boot=self.boot,
            address=self.address,
            start_token=self.start_token,
            earlier_tokens=self.earlier_tokens,
        )


class KnownBoots:
    """The newest start of each node that is known: its boot counter, and the tokens of it and of those before it.

    A lower counter, or the same with another token, means that a data directory was restored from a copy: it has
    forgotten votes (trap 24). A copy from just before the last start counts up to the same number; one that was started
    apart from the others may have counted further, but does not name the start that the placement group has agreed on.
    What was only heard is held against nobody for so long: it may be the copy that was heard first.
    """

    __slots__ = ("_agreed", "_heard")

    def __init__(self) -> None:
        self._heard: dict[NodeId, tuple[int, tuple[bytes, ...]]] = {}
        """The newest start, with its token and those of the starts before it, as far as they are known."""
        self._agreed: dict[NodeId, tuple[int, bytes]] = {}
        """The newest that the placement group has agreed on."""

    def observe(self, node_id: NodeId, boot: int, start_token: bytes, earlier_tokens: Sequence[bytes] = ()) -> None:
        """Remember the start that a node greets with. Raises WrongCluster when another one is known to be its last."""
        self.require_newest(node_id, boot, start_token, earlier_tokens)
        if start_token or boot != self._heard.get(node_id, _NO_START)[0]:
            self._heard[node_id] = (boot, (start_token, *earlier_tokens))

    def require_newest(
        self, node_id: NodeId, boot: int, start_token: bytes, earlier_tokens: Sequence[bytes] = ()
    ) -> None:
        """Raises WrongCluster when another start than this one is known to be the node's last."""
        known, tokens = self._heard.get(node_id, _NO_START)
        agreed, agreed_token = self._agreed.get(node_id, (0, b""))
        other = (boot == known and branches_off(boot, (start_token,), known, tokens[0])) or branches_off(
            boot, (start_token, *earlier_tokens), agreed, agreed_token
        )
        if boot < known or other:
            seen = "in a start that it knows nothing of" if other else f"with {known}"
            raise WrongCluster(
                f"node {node_id} comes with boot counter {boot} but was seen {seen}: its data directory is an "
                "old copy; put the newest one back, or start on an empty directory under another name"
            )

    def is_newest(self, node_id: NodeId, boot: int, start_token: bytes) -> bool:
        """Whether this start is the newest that is known."""
        known, tokens = self._heard.get(node_id, _NO_START)
        return (boot, start_token) == (known, tokens[0])

    def learn(self, node_id: NodeId, boot: int, start_token: bytes, earlier_tokens: Sequence[bytes] = ()) -> None:
        """What was noted in an earlier start of this node; it may be older than what was seen."""
        known = self._heard.get(node_id, _NO_START)[0]
        if boot > known or (boot == known and start_token):
            self._heard[node_id] = (boot, (start_token, *earlier_tokens))

    def agree(self, node_id: NodeId, boot: int, start_token: bytes) -> None:
        """The placement group has agreed on this start; what was seen may be newer.

        Of two starts of the same count it is right, and where what was seen did not come of it, that was a copy.
        """
        known, tokens = self._heard.get(node_id, _NO_START)
        if boot >= self._agreed.get(node_id, (0, b""))[0]:
            self._agreed[node_id] = (boot, start_token)
        if boot > known or (boot == known and start_token) or branches_off(known, tokens, boot, start_token):
            self._heard[node_id] = (boot, (start_token,))


_NO_START: Final = (0, (b"",))


async def _admit_all(hello: Hello) -> None:
    """Take whoever greets as a node of this cluster, or a client of it, should."""


def _ignore(hello: Hello) -> None:
    """A node of another cluster is refused, and that is all."""


async def accept(
    connection: Connection,
    decoder: FrameDecoder,
    *,
    clock: Clock,
    identity: NodeIdentity,
    known_boots: KnownBoots,
    timestamp: Callable[[], int],
    inflight_max: int,
    seconds_max: float = GREETING_SECONDS_MAX,
    admit: Callable[[Hello], Awaitable[None]] = _admit_all,
    foreign: Callable[[Hello], None] = _ignore,
) -> tuple[Hello, list[Frame]]:
    """Greet whoever has connected. ``admit`` raises, as a ShardKVError, why the node does not take this one.
    ``foreign`` hears of a node of another cluster before it is refused.

    Returns the greeting and the frames that came right behind it, to be handled before the next read.

    Raises:
        ShardKVError: the greeting was refused (and the other side told why), or did not come in time.
        trio.BrokenResourceError: the other side went away first.
    """
    try:
        hello, frames = await _accept(connection, decoder, clock, identity, known_boots, seconds_max, foreign)
        version = negotiate(hello)
        await admit(hello)
    except ShardKVError as error:
        connection.write(encode_refused(error))
        await connection.aclose(str(error))
        raise
    welcome = Welcome(
        protocol_version=version,
        cluster_id=identity.cluster_id,
        node_id=identity.node_id,
        boot=identity.boot,
        timestamp=timestamp() if hello.role is Role.CLIENT else 0,
        inflight_max=inflight_max,
        start_token=identity.start_token,
        earlier_tokens=identity.earlier_tokens,
    )
    connection.write(encode_welcome(welcome))
    connection.flush()
    return hello, frames


async def _accept(
    connection: Connection,
    decoder: FrameDecoder,
    clock: Clock,
    identity: NodeIdentity,
    known_boots: KnownBoots,
    seconds_max: float,
    foreign: Callable[[Hello], None],
) -> tuple[Hello, list[Frame]]:
    first, frames = await _first_frame(connection, decoder, clock, seconds_max)
    if first.kind is not FrameKind.HELLO:
        raise ProtocolError(f"the first frame must be HELLO, not {first.kind.name}")
    hello = decode_hello(first.payload)
    if hello.role is not Role.CLIENT and hello.cluster_id not in (None, identity.cluster_id):
        foreign(hello)
    _check_cluster(hello.cluster_id, identity.cluster_id)
    if hello.destination_node_id is not None and hello.destination_node_id != identity.node_id:
        raise WrongCluster(
            f"this is node {identity.node_id}, not {hello.destination_node_id}: the address belongs to another node now"
        )
    if hello.role is not Role.CLIENT:
        assert hello.node_id is not None, "decode_hello lets no peer through without its node id"
        if hello.node_id == identity.node_id:
            raise WrongCluster(f"this is node {identity.node_id} too: one of the two runs on a copied data directory")
        try:
            known_boots.observe(hello.node_id, hello.boot, hello.start_token, hello.earlier_tokens)
        except WrongCluster as error:
            # Said to whom it is about: it must stop, for with every start it would count further.
            raise WrongCluster(str(error), old_copy=True) from None
    return hello, frames


async def greet(
    connection: Connection,
    decoder: FrameDecoder,
    hello: Hello,
    *,
    clock: Clock,
    known_boots: KnownBoots,
    seconds_max: float = GREETING_SECONDS_MAX,
) -> tuple[Welcome, list[Frame]]:
    """Introduce ourselves as ``hello`` on a connection that we dialled.

    Returns the welcome and the frames that came right behind it.

    Raises:
        ShardKVError: we are refused, for that reason; or the other side is not whom we meant.
        trio.BrokenResourceError: the connection was lost.
    """
    connection.write(encode_hello(hello))
    connection.flush()
    first, frames = await _first_frame(connection, decoder, clock, seconds_max)
    if first.kind is FrameKind.REFUSED:
        raise decode_refused(first.payload).error
    if first.kind is not FrameKind.WELCOME:
        raise ProtocolError(f"the answer to HELLO must be WELCOME, not {first.kind.name}")
    welcome = decode_welcome(first.payload)
    if hello.cluster_id is not None:
        _check_cluster(welcome.cluster_id, hello.cluster_id)
    if hello.destination_node_id is not None:
        if welcome.node_id != hello.destination_node_id:
            raise WrongCluster(f"{connection.remote} is node {welcome.node_id}, not {hello.destination_node_id}")
        node_id = hello.destination_node_id
        known_boots.observe(node_id, welcome.boot, welcome.start_token, welcome.earlier_tokens)
    return welcome, frames


async def _first_frame(
    connection: Connection, decoder: FrameDecoder, clock: Clock, seconds_max: float
) -> tuple[Frame, list[Frame]]:
    with clock.deadline(seconds_max):
        while data := await connection.receive(GREETING_BYTES_MAX):
            if frames := decoder.feed(data):
                return frames[0], frames[1:]
            if decoder.unfinished_bytes > GREETING_BYTES_MAX:
                raise ProtocolError(
                    f"a greeting of {decoder.unfinished_bytes} bytes; at most {GREETING_BYTES_MAX} are allowed"
                )
        raise trio.BrokenResourceError(f"{connection.remote} closed the connection before the greeting was over")
    raise ProtocolError(f"{connection.remote} did not finish its greeting within {seconds_max:g} s")


def _check_cluster(theirs: bytes | None, ours: bytes) -> None:
    if theirs is not None and theirs != ours:
        raise WrongCluster(f"the other side belongs to cluster {theirs.hex()}, this one to cluster {ours.hex()}")
