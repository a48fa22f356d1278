"""Links: the connections to nodes, as far as they can be decided about without doing I/O.

A *peer* is an address; a *link* is one connection to it, from the dial to its end. Here live dialling with backoff, the
greeting, the question whether a silent node still lives, and the knowledge of which node is where. What travels over a
link is the engine's. ``dials``, ``drops`` and ``outputs`` are orders to whoever does the I/O, who empties them, and so
are ``warnings``, which people should see although calls go well.
"""

import errno
from collections.abc import Callable, Iterable
from enum import Enum
from math import inf
from typing import Final, NamedTuple

from shardkv.errors import ProtocolError, ShardKVError, WrongCluster
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, Welcome, decode_refused, decode_welcome, encode_hello
from shardkv_client.core.calls import Call, Sent
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers

LAST_LOOK_SECONDS: Final = 0.01
"""Between the end of the time that a silent node has and the end of its connection: more than one round of the loop."""
SLOWEST_BYTES_PER_SECOND: Final = 250_000
"""What is sent may take so long to get to the node before its silence counts."""
CARRYING_SECONDS_MAX: Final = 4.0
"""But no longer, however much it is: calls are to find another node before their timeout."""
PROBLEMS_MAX: Final = 5
"""Nodes whose problems are named together."""
PROBLEM_CHARACTERS_MAX: Final = 200
REFUSAL_SECONDS: Final = 10.0
"""For so long a node's refusal, or the end of its connection, says what keeps it from answering; then only what comes
of dialling it."""
NO_FILES: Final = "this process may open no more files"
_PING: Final = encode_frame(FrameKind.PING, b"")


class NodeInfo(NamedTuple):
    """A node of the cluster, as the cluster lists it."""

    id: int
    name: str
    address: str


class LinkState(Enum):
    DIALING = "dialing"
    GREETING = "greeting"
    READY = "ready"
    CLOSED = "closed"


class Peer:
    __slots__ = ("address", "dial_after", "failures", "link", "node_id", "problem", "problem_at", "waiting")

    def __init__(self, address: str) -> None:
        self.address: str = address
        self.node_id: int | None = None
        self.link: Link | None = None
        self.dial_after: float = 0.0
        self.failures: int = 0
        self.problem: str | None = None
        """Why the last link ended, or what the node refused since, in words for a person."""
        self.problem_at: float = -inf
        self.waiting: list[Call] = []
        """Calls for this node that wait for the link to become ready, or to have room."""


class Link:
    __slots__ = (
        "address",
        "decoder",
        "draining",
        "inflight",
        "inflight_max",
        "opened_at",
        "output",
        "overdue",
        "owed_since",
        "parts",
        "parts_bytes",
        "peer",
        "pinged_at",
        "pings_out",
        "received_at",
        "round_trip_seconds",
        "state",
        "watched",
    )

    def __init__(self, peer: Peer, now: float) -> None:
        self.peer: Peer = peer
        self.address: str = peer.address
        self.state: LinkState = LinkState.DIALING
        self.decoder: FrameDecoder = FrameDecoder()
        self.inflight: dict[int, Sent] = {}
        self.inflight_max: int = 1
        self.parts: list[bytes] = []
        """Requests of the frame that is being filled."""
        self.parts_bytes: int = 0
        self.output: list[bytes] = []
        """Whole frames for whoever does the I/O."""
        self.opened_at: float = now
        self.round_trip_seconds: float = inf
        """Of the quickest PING yet: how near the node is."""
        self.received_at: float = now
        self.owed_since: float = now
        """Since when the node has owed at least one answer."""
        self.pinged_at: float = -inf
        self.pings_out: int = 0
        """Without an answer yet."""
        self.overdue: bool = False
        """The time for an answer to the ping is over; one last look is to come."""
        self.watched: bool = False
        """A timer looks after its silence; one at a time."""
        self.draining: bool = False
        """The node said GOODBYE: it still answers, but gets nothing new."""

    @property
    def greeted(self) -> bool:
        return self.state is LinkState.READY

    def is_closed(self) -> bool:
        return self.state is LinkState.CLOSED


class Links:
    def __init__(
        self,
        seeds: list[str],
        *,
        settings: Settings,
        backoff: Callable[[int], float],
        timers: Timers,
        on_ready: Callable[[Link, Welcome, float], None],
        on_lost: Callable[[Link, list[Sent], list[Call], float], None],
    ) -> None:
        self._settings = settings
        self._backoff = backoff
        self._timers = timers
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._seeds = frozenset(seeds)
        self.peers: dict[str, Peer] = {address: Peer(address) for address in seeds}
        self._by_node: dict[int, Peer] = {}
        self.nodes: dict[int, NodeInfo] = {}
        self.cluster_id = settings.cluster_id
        self.problem: str | None = None
        """The last thing that went wrong with any node."""
        self._any_turn = 0
        self._draining: list[Link] = []
        self.dials: list[Link] = []
        self.drops: list[Link] = []
        self.outputs: list[Link] = []
        self.warnings: list[str] = []
        self._foreign: set[str] = set()
        """Addresses of which it was told that they are another cluster's."""

    @property
    def several_owe(self) -> bool:
        """Whether more than one node owes answers."""
        owing = 0
        for peer in self.peers.values():
            if peer.link is not None and peer.link.inflight:
                owing += 1
        return owing > 1

    # --- who is where -------------------------------------------------------------------------------------------

    def peer_of(self, node_id: int) -> Peer | None:
        """The peer of a node; None while its address is not known."""
        return self._by_node.get(node_id)

    def learn_nodes(self, nodes: Iterable[NodeInfo]) -> None:
        """The whole list of nodes, as one of them gave it."""
        self.nodes = {node.id: node for node in nodes}
        for node in self.nodes.values():
            current = self._by_node.get(node.id)
            if current is not None and current.link is not None and current.link.state is LinkState.READY:
                continue
            # It may have moved; or it is known by another name than it advertises, which leads nowhere from here.
            advertised = self.peers.get(node.address)
            if advertised is None:
                advertised = self.peers[node.address] = Peer(node.address)
            known = [peer for peer in self.peers.values() if peer.node_id == node.id]
            connected = advertised.link is not None and advertised.link.greeted
            if not connected or advertised.node_id in (None, node.id):
                known.append(advertised)  # else another node lives there by now
            if known:
                self._by_node[node.id] = min(known, key=lambda peer: peer.failures)
        for node_id, peer in list(self._by_node.items()):
            # One that is connected is there, whatever a node says that is cut off from the others.
            if node_id not in self.nodes and (peer.link is None or not peer.link.greeted):
                del self._by_node[node_id]
        listed = {node.address for node in self.nodes.values()} | self._seeds
        for address in [known for known in self.peers if known not in listed]:
            peer = self.peers[address]
            if peer.link is None and not peer.waiting and peer not in self._by_node.values():
                del self.peers[address]  # so that a client outlives any number of nodes

    def note(self, peer: Peer, problem: object, now: float) -> None:
        """A node has gone away, or has refused a request for the moment."""
        self.problem = peer.problem = f"{peer.address}: {problem!s:.{PROBLEM_CHARACTERS_MAX}}"
        peer.problem_at = now

    def problems(self, now: float) -> str | None:
        """What keeps each node from answering, in words for a person; or the last thing that went wrong."""
        found = []
        for peer in self.peers.values():
            # One that nobody has needed since it went away may be well.
            tried = peer.dial_after > now or (peer.link is not None and not peer.link.greeted)
            if peer.problem is not None and (tried or now - peer.problem_at <= REFUSAL_SECONDS):
                found.append(peer.problem)
        if not found:
            return self.problem and f"last problem: {self.problem}"
        more = f"; and {len(found) - PROBLEMS_MAX} more nodes" if len(found) > PROBLEMS_MAX else ""
        return "; ".join(found[:PROBLEMS_MAX]) + more

    # --- choosing -----------------------------------------------------------------------------------------------

    def usable(self, peer: Peer, now: float) -> bool:
        """Whether it makes sense to hand a call to this peer now: it is connected, or may be dialled."""
        return peer.link is not None or peer.dial_after <= now

    def any_ready(self) -> Link | None:
        """Some link that is ready, the same one until :meth:`another_next`."""
        ready = [
            peer.link for peer in self.peers.values() if peer.link is not None and peer.link.state is LinkState.READY
        ]
        return ready[self._any_turn % len(ready)] if ready else None

    def another_next(self) -> None:
        """The node that :meth:`any_ready` gave was of no use."""
        self._any_turn += 1

    def dial_any(self, now: float) -> float | None:
        """Dial, as no link is ready. When to come back should none be by then; None: there is nobody else to try.

        A dial that takes long keeps its link but not its place: some nodes accept and do not greet, for they hang or
        have not joined yet, and whoever else would serve must not wait until they are given up.
        """
        patience = self._settings.dial_patience_seconds
        places = [peer.link.opened_at + patience for peer in self.peers.values() if peer.link is not None]
        places = [until for until in places if until > now]
        come_back = inf
        for peer in self.peers.values():
            if peer.link is not None:
                continue
            if peer.dial_after > now:
                come_back = min(come_back, peer.dial_after)
            elif len(places) < self._settings.dials_at_once_max:
                self.dial(peer, now)
                places.append(now + patience)
            else:
                come_back = min(come_back, *places)
        return None if come_back == inf else come_back

    # --- the life of a link -------------------------------------------------------------------------------------

    def dial(self, peer: Peer, now: float) -> None:
        assert peer.link is None, f"{peer.address} has a link already"
        link = peer.link = Link(peer, now)
        self.dials.append(link)
        self._timers.at(now + self._settings.dial_seconds, lambda at: self._give_up_dial(link, at))

    def _give_up_dial(self, link: Link, now: float) -> None:
        if link.state in (LinkState.DIALING, LinkState.GREETING):
            self.drop(link, f"no greeting within {self._settings.dial_seconds:g} s", now)

    def opened(self, link: Link, now: float) -> None:
        """The connection stands; greet."""
        if link.state is not LinkState.DIALING:
            return  # given up in the meantime
        link.state = LinkState.GREETING
        link.received_at = now
        self.write(link, encode_hello(Hello(Role.CLIENT, cluster_id=self.cluster_id, node_id=self._settings.node_id)))

    def write(self, link: Link, frame: bytes) -> None:
        if not link.output:
            self.outputs.append(link)
        link.output.append(frame)

    def control(self, link: Link, kind: FrameKind, payload: bytes, now: float) -> None:
        """A frame other than a response. Raises ProtocolError."""
        if kind is FrameKind.PONG:
            if link.pings_out == 1:  # else it answers an earlier one
                link.round_trip_seconds = min(link.round_trip_seconds, now - link.pinged_at)
            link.pings_out = max(0, link.pings_out - 1)
            return
        if kind is FrameKind.PING:
            self.write(link, encode_frame(FrameKind.PONG, payload))
        elif kind is FrameKind.GOODBYE:
            self._drain(link)
        elif kind is FrameKind.REFUSED:
            error = decode_refused(payload).error
            if link.state is not LinkState.GREETING:
                self.drop(link, f"refused to go on: {error}", now)
            elif isinstance(error, WrongCluster):
                self._drop_foreign(link, f"refused this client: {error}", now)
            else:
                self.drop(link, f"refused this client: {error}", now)
        elif link.state is not LinkState.GREETING:
            raise ProtocolError(f"a {kind.name} frame that no client expects")
        elif kind is FrameKind.WELCOME:
            self._welcomed(link, decode_welcome(payload), now)
        else:
            raise ProtocolError(f"a {kind.name} frame instead of a greeting")

    def _welcomed(self, link: Link, welcome: Welcome, now: float) -> None:
        if welcome.cluster_id is not None:
            if self.cluster_id is None:
                self.cluster_id = welcome.cluster_id
            elif self.cluster_id != welcome.cluster_id:
                problem = f"belongs to cluster {welcome.cluster_id.hex()}, this client to {self.cluster_id.hex()}"
                self._drop_foreign(link, problem, now)
                return
        link.state = LinkState.READY
        link.inflight_max = welcome.inflight_max
        peer = link.peer
        peer.failures = 0
        peer.problem = None
        if welcome.node_id is not None:
            for node_id in [known for known, other in self._by_node.items() if other is peer]:
                if node_id != welcome.node_id:
                    del self._by_node[node_id]  # another node lives at this address
            peer.node_id = welcome.node_id
        if peer.node_id is not None:
            current = self._by_node.get(peer.node_id)
            if current is None or current.link is None:
                self._by_node[peer.node_id] = peer
        # Its greeting may have waited until the node knew what it has to know, and says nothing of how near it is.
        self._ping(link, now)
        self._on_ready(link, welcome, now)

    def _drop_foreign(self, link: Link, problem: str, now: float) -> None:
        """Somebody of another cluster is there: which of the two this client speaks to is who answered first."""
        problem = f"{problem}; connect to the nodes of one cluster only"
        if link.address not in self._foreign and link.address in self._seeds:
            self._foreign.add(link.address)
            self.warnings.append(f"{link.address} {problem}")
        self.drop(link, problem, now)

    def _ping(self, link: Link, now: float) -> None:
        link.pinged_at = now
        link.overdue = False
        link.pings_out += 1
        self.write(link, _PING)

    def measure(self, now: float) -> None:
        """Find out anew how near the nodes are: something may have held up the answer before."""
        for peer in self.peers.values():
            link = peer.link
            if link is not None and link.greeted and not link.pings_out:
                self._ping(link, now)

    def _drain(self, link: Link) -> None:
        if link.draining or link.state is LinkState.CLOSED:
            return
        link.draining = True
        if link.peer.link is link:
            link.peer.link = None
        self._draining.append(link)
        # A node on its way out is not dialled at once; others lead its ranges by then.
        link.peer.dial_after = link.received_at + self._settings.backoff_seconds_max

    def owe(self, link: Link, sent: Sent, now: float) -> None:
        """The node owes an answer from now on."""
        if not link.inflight:
            link.owed_since = now
            if not link.watched:
                link.watched = True
                self._timers.at(now + self._settings.ping_after_seconds, lambda at: self._look_after(link, at))
        link.inflight[sent.id] = sent

    def _look_after(self, link: Link, now: float) -> None:
        """Ask a silent node whether it lives, and give it up when it does not say."""
        if link.state is not LinkState.READY or not link.inflight:
            link.watched = False
            return
        settings = self._settings
        heard_at = max(link.received_at, link.owed_since)
        if link.pinged_at <= heard_at:  # the node has spoken since, or was never asked
            ping_at = heard_at + settings.ping_after_seconds
            if now < ping_at:
                self._timers.at(ping_at, lambda at: self._look_after(link, at))
                return
            self._ping(link, now)
        # Counted from the question: where this program stood still, what the node said meanwhile was not read yet.
        # The question stands behind what was sent before it, which a slow network has still to carry.
        bytes_owed = sum(sent.size for sent in link.inflight.values())
        carrying = min(bytes_owed / SLOWEST_BYTES_PER_SECOND, CARRYING_SECONDS_MAX)
        lost_at = link.pinged_at + settings.silence_seconds_max - settings.ping_after_seconds + carrying
        if now < lost_at:
            self._timers.at(lost_at, lambda at: self._look_after(link, at))
        elif not link.overdue:
            # Where it stood still after the question, the answer may lie in the socket: its reader has a turn first.
            link.overdue = True
            self._timers.at(now + LAST_LOOK_SECONDS, lambda at: self._look_after(link, at))
        else:
            self.drop(link, f"silent for {now - heard_at:.1f} s while it owed an answer", now)

    def drop(self, link: Link, problem: str, now: float) -> None:
        """Give a link up; whoever does the I/O closes it."""
        if link.state is not LinkState.CLOSED:
            self.drops.append(link)
            self.lost(link, problem, now)

    def lost(self, link: Link, problem: str, now: float) -> None:
        """The connection is gone, or is as good as gone."""
        if link.state is LinkState.CLOSED:
            return
        link.state = LinkState.CLOSED
        peer = link.peer
        self.note(peer, problem, now)
        if link.draining:
            self._draining.remove(link)
        waiting: list[Call] = []
        if peer.link is link:
            peer.link = None
            peer.failures += 1
            peer.dial_after = now + self._backoff(peer.failures)
        if peer.link is None:
            # Also what waited for room on a link that drained: perhaps nobody dials this node again.
            waiting, peer.waiting = peer.waiting, []
        requests = list(link.inflight.values())
        link.inflight.clear()
        link.parts.clear()
        link.output.clear()
        self._on_lost(link, requests, waiting, now)

    def close(self) -> list[Link]:
        """Every link there is, for the end of the client."""
        links = [peer.link for peer in self.peers.values() if peer.link is not None]
        return links + self._draining

    def check(self) -> None:
        """Walk every invariant."""
        for address, peer in self.peers.items():
            assert address == peer.address, f"{peer.address} is filed under {address}"
            link = peer.link
            if link is not None:
                assert link.state is not LinkState.CLOSED, f"{address} keeps a closed link"
                assert not link.draining, f"{address} keeps a link that drains"
                assert link.state is LinkState.READY or not link.inflight, f"{address} owes before it was greeted"
        for node_id, peer in self._by_node.items():
            assert self.peers.get(peer.address) is peer, f"{peer.address} serves a node but is no peer"
            here = peer.link is not None and peer.link.greeted
            assert not here or peer.node_id in (None, node_id), f"{peer.address} is node {peer.node_id}, not {node_id}"


def describe(error: BaseException) -> str:
    """What went wrong, in words for a person."""
    text = str(error)
    if isinstance(error, ShardKVError):
        return text
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return NO_FILES  # the system's words do not say whose are too many: the node has such a limit, too
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
