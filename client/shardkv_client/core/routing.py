"""Where a call goes: the range it belongs to, the node that is asked, and what is learned when that was wrong.

The order is: the leader as last seen or hinted, then the voters in turn, with a jittered backoff once an attempt was no
better than the one before. Follower and stale reads go to a near replica that is connected. A range whose replicas
refuse is looked up again. Nothing here touches a call's outcome.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from shardkv.types import RangeDescriptor
from shardkv.wire.requests import Method
from shardkv_client.core.cache import RangeCache, Reads, Route
from shardkv_client.core.calls import LINEARIZABLE, AdminCall, Call
from shardkv_client.core.links import Links, NodeInfo, Peer
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers

HINTS_FOLLOWED_MAX: Final = 2
"""Hints followed at once, one after the other; two nodes that name each other are not believed for longer."""
NEAR_SECONDS: Final = 0.001
"""How much longer than twice the shortest a round trip may be for its node to count as near: noise, within a site."""


class Router:
    def __init__(
        self,
        *,
        settings: Settings,
        links: Links,
        timers: Timers,
        backoff: Callable[[int], float],
        random: Callable[[], float],
        send: Callable[[AdminCall, float], None],
        requeue: Callable[[list[Any]], None],
    ) -> None:
        self._settings = settings
        self._links = links
        self._timers = timers
        self._backoff = backoff
        self._random = random
        self._send = send
        self._requeue = requeue
        self.cache: RangeCache = RangeCache(settings.ranges_cached_max)
        self.homeless: list[Call] = []
        """Calls whose range is not known; a lookup is under way or due."""
        self._lookups: dict[bytes | None, AdminCall] = {}
        self._lookups_fruitless = 0
        self._lookup_blocked_until = 0.0
        self._asking_nodes = False
        self._nodes_asked_at: float | None = None
        self._blocked: dict[Route, None] = {}

    # --- which node ---------------------------------------------------------------------------------------------

    def peer_for(self, route: Route, consistency: int, now: float) -> Peer | None:
        """The peer to hand calls for ``route`` to, dialled if need be; None: the route is blocked, keep them."""
        if consistency != LINEARIZABLE:
            reads = route.reads_of(consistency)
            if reads.blocked_until > now:
                return None
            return self._reader_of(route, reads, now) or self._peer_by_turns(route, consistency, now)
        if route.blocked_until > now:
            return None
        peer = None if route.leader is None else self._links.peer_of(route.leader)
        if peer is not None and peer.link is not None:
            return peer
        return self._peer_by_turns(route, consistency, now)

    def _reader_of(self, route: Route, reads: Reads, now: float) -> Peer | None:
        """One of the connected replicas that are nearest and have not just refused; the others are dialled for the
        reads to come. Nobody waits for a dial while there is a replica that answers."""
        links = self._links
        willing, ready, absent = [], [], []
        for node_id in route.nodes:
            peer = links.peer_of(node_id)
            if peer is None:
                self.want_nodes(now, known=True)
            elif peer.link is None:
                absent.append(peer)
            elif peer.link.greeted:
                ready.append(peer)
                if reads.refused.get(node_id, 0.0) <= now:
                    willing.append((peer.link.round_trip_seconds, peer))
        for peer in absent:
            # Where somebody else serves, not as often as when it is waited for.
            if now >= peer.dial_after + (self._settings.moved_seconds if peer.failures and willing else 0.0):
                links.dial(peer, now)
        if willing:
            near_max = 2 * min(seconds for seconds, _ in willing) + NEAR_SECONDS
            ready = [peer for seconds, peer in willing if seconds <= near_max]
        return ready[self._turn(route) % len(ready)] if ready else None

    def _turn(self, route: Route) -> int:
        """Which replica serves this client's follower and stale reads, as far as any will do."""
        if route.reader is None:
            # Clients that all took the first one would leave the others idle.
            route.reader = int(self._random() * len(route.nodes))
        return route.reader

    def _peer_by_turns(self, route: Route, consistency: int, now: float) -> Peer | None:
        links = self._links
        if consistency == LINEARIZABLE:
            nodes, first = route.voters or route.nodes, route.next_voter
        else:
            nodes, first = route.nodes, self._turn(route)
        candidates = [nodes[(first + step) % len(nodes)] for step in range(len(nodes))]
        if consistency == LINEARIZABLE and route.leader is not None:
            candidates.insert(0, route.leader)
        retry_at = now + self._settings.backoff_seconds_max
        for node_id in candidates:
            peer = links.peer_of(node_id)
            if peer is None:
                self.want_nodes(now)
            elif links.usable(peer, now):
                if peer.link is None:
                    links.dial(peer, now)
                return peer
            else:
                retry_at = min(retry_at, peer.dial_after)
        # None of them can be reached: perhaps the range has long been elsewhere, and nobody is left to say so.
        self.refresh(route, now)
        self._block(route, consistency, retry_at)
        return None

    def _block(self, route: Route, consistency: int, until: float) -> None:
        # Apart, so that stale reads go on while there is no leader.
        if consistency == LINEARIZABLE:
            route.blocked_until = until
        else:
            route.reads_of(consistency).blocked_until = until
        self._blocked[route] = None
        self._timers.at(until, partial(self._unblock, route))

    def _unblock(self, route: Route, now: float) -> None:
        """Let go of what is due; the rest is found to be blocked still, and kept."""
        if all(until <= now for until in (route.blocked_until, *(each.blocked_until for each in route.reads.values()))):
            self._blocked.pop(route, None)
        pending, route.pending = route.pending, []
        self._requeue(pending)

    def _release(self, route: Route) -> None:
        """Let go of everything."""
        route.blocked_until = 0.0
        for reads in route.reads.values():
            reads.blocked_until = 0.0
        self._blocked.pop(route, None)
        pending, route.pending = route.pending, []
        self._requeue(pending)

    # --- what was learned ---------------------------------------------------------------------------------------

    def succeeded(self, route: Route, node_id: int | None, consistency: int) -> None:
        if consistency != LINEARIZABLE:
            route.reads_of(consistency).failures = 0
            return
        route.failures = 0
        if node_id is not None and node_id != route.leader and node_id in route.nodes:
            route.leader = node_id

    def failed(
        self, route: Route, mark: int, now: float, *, node_id: int | None, consistency: int, hint: int | None = None
    ) -> None:
        """The node asked was the wrong one. ``mark`` is the route's at the time of asking: one lesson an attempt."""
        if route.evicted or mark != route.mark:
            return
        route.mark += 1
        if consistency != LINEARIZABLE:
            self._read_failed(route, consistency, now, node_id, hint)
            return
        route.failures += 1
        if hint is not None and hint != node_id:
            route.leader = hint
            if self._links.peer_of(hint) is None:
                self.want_nodes(now)
            if route.failures <= HINTS_FOLLOWED_MAX:
                return
        else:
            route.leader = None
            if node_id in route.voters:
                route.next_voter = route.voters.index(node_id) + 1
            else:
                route.next_voter += 1
        self._hold_back(route, consistency, route.failures, now)

    def _read_failed(self, route: Route, consistency: int, now: float, node_id: int | None, hint: int | None) -> None:
        """A replica did not serve a read: it is too old, knows no leader, or has nothing of the range yet. It is passed
        over for a while, so that not every read goes by way of it, however near it is."""
        reads = route.reads_of(consistency)
        reads.failures += 1
        refused = [] if node_id is None else [node_id]
        if hint in route.nodes and reads.failures > 1:
            refused = [other for other in route.nodes if other != hint]  # two were too old; the leader is not
        reads.refused.update(dict.fromkeys(refused, now + self._settings.moved_seconds))
        route.reader = self._turn(route) + 1
        self._hold_back(route, consistency, reads.failures, now)

    def _hold_back(self, route: Route, consistency: int, failures: int, now: float) -> None:
        if failures > 1:
            self._block(route, consistency, now + self._backoff(failures - 1))
        if failures % max(len(route.nodes), 2) == 0:
            self.refresh(route, now)

    def busy(self, route: Route, mark: int, now: float, *, node_id: int | None, consistency: int) -> None:
        """The node asked is the right one but does not take more; it is left alone for a while."""
        if consistency != LINEARIZABLE:
            self.failed(route, mark, now, node_id=node_id, consistency=consistency)
            return
        if route.evicted or mark != route.mark:
            return
        route.mark += 1
        route.failures += 1
        self._block(route, consistency, now + self._backoff(route.failures))
        if route.failures % (len(route.nodes) + 3) == 0:
            route.leader = None  # it may have lost its leadership without knowing
            route.next_voter += 1
            self.refresh(route, now)

    def learn(self, descriptor: RangeDescriptor, leader: int | None) -> bool:
        """Take a descriptor. Whether it was news."""
        evicted = self.cache.insert(descriptor, leader)
        for route in evicted or ():
            self._release(route)
        return evicted is not None

    # --- lookups ------------------------------------------------------------------------------------------------

    def lose(self, call: Call, now: float) -> None:
        """Nobody knows the range of ``call``'s key, or the placement group: keep it and look up."""
        self.homeless.append(call)
        if not self._lookups and now >= self._lookup_blocked_until:
            self._look_up(call.key, now)

    def refresh(self, route: Route, now: float) -> None:
        """What is cached about the range may be stale."""
        self._look_up(None if route is self.cache.placement else route.start, now)

    def _look_up(self, start: bytes | None, now: float) -> None:
        if start in self._lookups or len(self._lookups) >= self._settings.lookups_at_once_max:
            return
        limit = 1 if start is None else self._settings.routes_per_lookup
        call = AdminCall(Method.ROUTES, (start, limit), now + self._settings.lookup_seconds, repeatable=True)
        call.internal = True
        self._lookups[start] = call
        self._send(call, now)

    def looked_up(self, call: AdminCall, now: float) -> None:
        """A lookup ended, with routes or without."""
        start = call.arguments[0]
        assert start is None or isinstance(start, bytes), f"a lookup from {start!r}"
        del self._lookups[start]
        news = False
        if call.error is None:
            for descriptor, leader in call.result:
                news = self.learn(descriptor, leader) or news
        route = self.cache.placement if start is None else self.cache.find(start)
        if route is not None:
            self._lookups_fruitless = 0
            if not news:
                self._links.another_next()  # this one may be cut off from the others, who know better
        else:
            self._lookups_fruitless += 1
            self._links.another_next()
            self._links.dial_any(now)
            self._lookup_blocked_until = now + self._backoff(self._lookups_fruitless)
            self._timers.at(self._lookup_blocked_until, self._retry_homeless)
            return
        homeless, self.homeless = self.homeless, []
        self._requeue(homeless)

    def _retry_homeless(self, now: float) -> None:
        homeless, self.homeless = self.homeless, []
        self._requeue(homeless)

    def want_nodes(self, now: float, *, known: bool = False) -> None:
        """The address of some node is not known, or is ``known`` but nobody answers there: it may have moved."""
        if self._asking_nodes:
            return
        asked_at = self._nodes_asked_at
        pause = self._settings.moved_seconds if known else self._settings.backoff_seconds_max
        if asked_at is not None and now < asked_at + pause:
            return  # whoever waits blocks for as long, and asks again
        self._asking_nodes = True
        self._nodes_asked_at = now
        call = AdminCall(Method.NODES, (), now + self._settings.lookup_seconds, repeatable=True)
        call.internal = True
        self._send(call, now)

    def nodes_listed(self, call: AdminCall, now: float) -> None:
        """The list of nodes came, or did not."""
        self._asking_nodes = False
        self._timers.at(now + self._settings.nodes_refresh_seconds, self.refresh_nodes)
        self._links.measure(now)
        if call.error is None:
            if call.result == list(self._links.nodes.values()):
                self._links.another_next()  # as after a lookup that brings no news
            self._links.learn_nodes(call.result)
            for route in list(self._blocked):
                self._release(route)

    def refresh_nodes(self, now: float) -> None:
        """Ask again where the nodes are, if that is long ago and there is somebody to ask; else when there is."""
        asked_at = self._nodes_asked_at
        old = asked_at is None or now >= asked_at + self._settings.nodes_refresh_seconds
        if old and self._links.any_ready() is not None:
            self.want_nodes(now)

    @property
    def asking_nodes(self) -> bool:
        """Whether the list of nodes is out."""
        return self._asking_nodes

    def check(self) -> None:
        """Walk every invariant."""
        self.cache.check()
        assert len(self._lookups) <= self._settings.lookups_at_once_max, f"{len(self._lookups)} lookups are out"
        for route in self.cache:
            assert not route.pending or route in self._blocked, f"calls wait for range {route.range_id}, unblocked"
        assert all(not call.done for call in self._lookups.values()), "a lookup is done but still listed"


def parse_routes(result: object) -> list[tuple[RangeDescriptor, int | None]]:
    """The answer to ROUTES. Raises ValueError for another shape."""
    if not isinstance(result, list):
        raise ValueError("routes must come as an array")
    routes = []
    for item in result:
        match item:
            case [fields, int() | None as leader]:
                routes.append((RangeDescriptor.from_wire(fields), leader))
            case _:
                raise ValueError(f"not a route: {item!r:.100}")
    return routes


def parse_nodes(result: object) -> list[NodeInfo]:
    """The answer to NODES. Raises ValueError for another shape."""
    if not isinstance(result, list):
        raise ValueError("nodes must come as an array")
    nodes = []
    for item in result:
        match item:
            case [int(node_id), str(name), str(address), *_]:
                nodes.append(NodeInfo(node_id, name, address))
            case _:
                raise ValueError(f"not a node: {item!r:.100}")
    return nodes
