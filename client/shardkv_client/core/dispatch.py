"""Dispatch: which calls that are ready go where.

Lives here: the calls of one flush, by range, by kind, by node; calls that any node will do for; what is issued again
not at once. Does not live here: where a range is (``routing``), what a request looks like (``packing``), and what
becomes of answers (``engine``).
"""

from math import inf
from typing import Any, Final

from shardkv.errors import NotFound
from shardkv_client.core.cache import Route
from shardkv_client.core.calls import LINEARIZABLE, AdminCall, Kind, ReadCall, ScanCall, routed_as
from shardkv_client.core.ledger import Ledger
from shardkv_client.core.links import Links, LinkState
from shardkv_client.core.packing import Packer
from shardkv_client.core.routing import Router
from shardkv_client.core.session import Session
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers

FLUSH_ROUNDS_MAX: Final = 8
"""How often one flush looks for calls that became ready through it; more are left to the next."""


class Dispatcher:
    """Hands the ledger's calls to the packer. One of a core's parts; see there for who calls what."""

    def __init__(
        self,
        settings: Settings,
        timers: Timers,
        session: Session,
        ledger: Ledger,
        links: Links,
        packer: Packer,
        router: Router,
    ) -> None:
        self._settings = settings
        self._timers = timers
        self._session = session
        self._ledger = ledger
        self._links = links
        self._packer = packer
        self._router = router
        self._anywhere: list[AdminCall] = []
        """Calls for any node, while none is connected."""
        self._anywhere_at = inf
        """When they are looked at again, whatever happens."""
        self._later: list[Any] = []
        """Commands to be issued together and not at once: one that is ahead of its node's time is so for a while, and
        each attempt is in the range's log."""

    def flush(self, now: float) -> None:
        """Send everything that is ready: the calls of one moment share requests and frames."""
        ledger = self._ledger
        for _ in range(FLUSH_ROUNDS_MAX):
            # Calls that were found to have nowhere to go may have started lookups; those go out in the same flush.
            ready, ledger.ready = ledger.ready, []
            for route in self._group(ready, now):
                calls, route.batch = route.batch, []
                self._dispatch(route, calls, now)
            if not ledger.ready:
                break
        self._packer.finish()
        ledger.flushed()

    def _group(self, ready: list[Any], now: float) -> list[Route]:
        routes: list[Route] = []
        find = self._router.cache.find
        for call in ready:
            if call.done:
                continue
            if call.notify is None and not call.internal:
                self._ledger.finish(call, None, None)  # abandoned, and not to be sent again
                continue
            key = call.key
            if key is not None:
                route = find(key)
            elif call.kind is Kind.ADMIN and call.range_id is not None:
                route = self._router.cache.find_id(call.range_id)
                if route is None and call.range_id:
                    self._ledger.finish(call, None, NotFound(f"there is no range {call.range_id}; list the ranges"))
                    continue
            else:
                self._unrouted(call, now)
                continue
            if route is None:
                self._router.lose(call, now)
                continue
            batch = route.batch
            if not batch:
                routes.append(route)
            batch.append(call)
        return routes

    def _dispatch(self, route: Route, calls: list[Any], now: float) -> None:
        kind = calls[0].kind
        if (kind is Kind.WRITE and all(call.kind is kind for call in calls)) or (
            kind is Kind.READ and all(call.kind is kind and call.consistency == LINEARIZABLE for call in calls)
        ):
            self._dispatch_alike(route, kind, LINEARIZABLE, calls, now)  # as nearly always
            return
        groups: dict[tuple[Kind, int, int | None], list[Any]] = {}
        for call in calls:
            consistency, bound = LINEARIZABLE, None
            if isinstance(call, (ReadCall, ScanCall)):
                consistency, bound = call.consistency, call.age_us_max
            groups.setdefault((call.kind, consistency, bound), []).append(call)
        for (kind, consistency, _), group in groups.items():
            self._dispatch_alike(route, kind, consistency, group, now)

    def _dispatch_alike(self, route: Route, kind: Kind, consistency: int, calls: list[Any], now: float) -> None:
        peer = self._router.peer_for(route, routed_as(calls, consistency), now)
        if peer is None:
            route.pending.extend(calls)
            return
        link = peer.link
        assert link is not None, f"{peer.address} was chosen without a link"
        packer = self._packer
        if link.state is not LinkState.READY or not packer.room(link):
            peer.waiting.extend(calls)
        elif kind is Kind.WRITE:
            held, rest = packer.writes(link, route, calls, now)
            if held:
                if self._session.ahead:
                    self.later(held, now)
                else:
                    self._ledger.held.extend(held)
            peer.waiting.extend(rest)
        elif kind is Kind.READ:
            peer.waiting.extend(packer.reads(link, route, calls, consistency, now))
        else:
            for call in calls:
                if not packer.room(link):
                    peer.waiting.append(call)
                elif kind is Kind.SCAN:
                    packer.scan(link, route, call, now)
                else:
                    packer.admin(link, route, call, now)

    def _unrouted(self, call: AdminCall, now: float) -> None:
        """A call for one node, or for any."""
        links = self._links
        if call.node_id is None:
            link = links.any_ready()
            if link is not None and self._packer.room(link):
                self._packer.admin(link, None, call, now)
                return
            self._anywhere.append(call)
            retry_at = links.dial_any(now) if link is None else now + self._settings.backoff_seconds_min
            if retry_at is not None and retry_at < self._anywhere_at:
                self._anywhere_at = retry_at  # one timer for all that wait
                self._timers.at(retry_at, self.retry_anywhere)
            return
        peer = links.peer_of(call.node_id)
        if peer is None:
            self._node_unknown(call, now)
        elif peer.link is None and peer.dial_after > now:
            self._timers.at(peer.dial_after, lambda _: self._ledger.requeue([call]))
        else:
            if peer.link is None:
                links.dial(peer, now)
            link = peer.link
            if link is not None and link.state is LinkState.READY and self._packer.room(link):
                self._packer.admin(link, None, call, now)
            else:
                peer.waiting.append(call)

    def _node_unknown(self, call: AdminCall, now: float) -> None:
        self._router.want_nodes(now)
        nodes = self._links.nodes
        # One that is listed has moved: another lives at its address, and the next list says where it is.
        if nodes and call.node_id not in nodes and not self._router.asking_nodes:
            self._ledger.finish(call, None, NotFound(f"there is no node {call.node_id}; list the nodes"))
        else:
            self._timers.at(now + self._settings.backoff_seconds_min, lambda _: self._ledger.requeue([call]))

    def retry_anywhere(self, now: float) -> None:
        """There may be a node now for the calls that any will do for."""
        if now >= self._anywhere_at:
            self._anywhere_at = inf
        calls, self._anywhere = self._anywhere, []
        self._ledger.requeue(calls)

    def later(self, calls: list[Any], now: float) -> None:
        """Issue commands together and not at once, as if they had become ready then."""
        if not self._later:
            self._timers.at(now + self._settings.backoff_seconds_max, self._issue_now)
        self._later += calls

    def _issue_now(self, now: float) -> None:
        calls, self._later = self._later, []
        self._ledger.requeue(calls)
