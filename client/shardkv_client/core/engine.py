"""The client's heart, without I/O: calls and bytes go in, bytes and outcomes come out.

Whoever does the I/O calls ``submit``, ``flush``, ``link_*`` and ``tick``, each with the time, and afterwards performs
the orders in ``links.dials``, ``links.drops`` and ``links.outputs``. Nothing here waits, reads a clock or rolls dice:
that is what lets a simulation run this very code.
"""

from collections.abc import Callable
from math import inf
from typing import Any, Final

from shardkv.errors import (
    EpochMismatch,
    MalformedRequest,
    NotLeader,
    OutcomeUnknown,
    ProtocolError,
    RangeNotFound,
    RequestError,
    ShardKVError,
    TooOld,
)
from shardkv.errors import from_wire as error_from_wire
from shardkv.types import EVERY_KEY
from shardkv.wire.commands import Op
from shardkv.wire.frames import FrameKind
from shardkv.wire.handshake import Welcome
from shardkv.wire.requests import Method, Response, decode_responses
from shardkv_client.core import answers
from shardkv_client.core.answers import Verdict, check_page, next_start
from shardkv_client.core.calls import (
    LINEARIZABLE,
    STALE,
    AdminCall,
    Call,
    DeleteRangeCall,
    Kind,
    Sent,
    WriteCall,
)
from shardkv_client.core.dispatch import Dispatcher
from shardkv_client.core.ledger import Ledger
from shardkv_client.core.links import NO_FILES, Link, Links, LinkState
from shardkv_client.core.packing import Packer
from shardkv_client.core.routing import Router, parse_nodes, parse_routes
from shardkv_client.core.session import Session
from shardkv_client.core.settings import Settings
from shardkv_client.core.timers import Timers

_OUTCOMES: Final[dict[Op, type]] = {Op.PUT: int, Op.DELETE: bool, Op.INCREMENT: int, Op.DELETE_RANGE: bool}


class Core:
    """One client. ``wake_flush`` and ``wake_timer`` are called when ``flush`` and ``tick`` have something to do.

    Args:
        seeds: addresses of any nodes, ``host:port``.
        session: 16 unpredictable bytes.
        random: numbers from 0 to below 1, for jitter.
    """

    def __init__(
        self,
        seeds: list[str],
        *,
        settings: Settings,
        session: bytes,
        random: Callable[[], float],
        wake_flush: Callable[[], None],
        wake_timer: Callable[[], None],
    ) -> None:
        self.settings = settings
        self._random = random
        self.timers: Timers = Timers(wake_timer)
        self.session: Session = Session(session)
        self.ledger: Ledger = Ledger(settings, self.timers, self.session, wake_flush, self._internal_done)
        ledger = self.ledger
        self.submit: Callable[[Call], None] = ledger.submit
        self.cancel: Callable[[Call], None] = ledger.cancel
        self.links: Links = Links(
            seeds,
            settings=settings,
            backoff=self._backoff,
            timers=self.timers,
            on_ready=self._link_ready,
            on_lost=self._link_lost,
        )
        self.packer: Packer = Packer(settings, self.session, self.links)
        self.router: Router = Router(
            settings=settings,
            links=self.links,
            timers=self.timers,
            backoff=self._backoff,
            random=random,
            send=ledger.submit_internal,
            requeue=ledger.requeue,
        )
        self._dispatcher = Dispatcher(settings, self.timers, self.session, ledger, self.links, self.packer, self.router)
        self._now = 0.0
        """The time of the event under way."""

    def _backoff(self, failures: int) -> float:
        settings = self.settings
        seconds = min(settings.backoff_seconds_max, settings.backoff_seconds_min * 2.0 ** min(failures - 1, 16))
        return seconds * (0.5 + 0.5 * self._random())

    # --- time ---------------------------------------------------------------------------------------------------

    def _internal_done(self, call: AdminCall) -> None:
        if self.ledger.closed:
            return
        if call.method == Method.ROUTES:
            self.router.looked_up(call, self._now)
        else:
            self.router.nodes_listed(call, self._now)

    @property
    def due(self) -> float:
        """When :meth:`tick` must be called at the latest."""
        return inf if self.ledger.closed else self.timers.due

    @property
    def flush_wanted(self) -> bool:
        """Whether :meth:`flush` has something to do."""
        return self.ledger.flush_wanted and not self.ledger.closed

    @property
    def closed(self) -> bool:
        return self.ledger.closed

    def tick(self, now: float) -> None:
        self._now = now
        if self.ledger.closed:
            return
        self.timers.run(now, self._expire)

    def _expire(self, call: Call) -> None:
        if not call.admitted and not call.internal:
            reason = f"{call.lane.calls_active} calls of this client were in flight until the timeout"
            error = answers.failure(call, reason, "make fewer at once, or give them more time")
        else:
            problems = self.links.problems(self._now)
            reason = "no answer before the timeout" if call.attempts else "no node took the request before the timeout"
            advice = "try again with backoff"
            if problems and NO_FILES in problems:
                advice = "raise the limit on its open files (ulimit -n) or close some, and try again"
            elif self.links.any_ready() is None:
                advice = "check that the addresses are right, and try again with backoff"
            error = answers.failure(call, f"{reason} ({problems})" if problems else reason, advice)
        self.ledger.finish(call, None, error)

    def close(self, now: float, reason: str = "the client was closed") -> None:
        """End every pending call as its deadline would; later ones raise ClientClosed."""
        if self.ledger.closed:
            return
        self._now = now
        self.ledger.close()
        for call in self.timers.live():
            if not call.done:
                self.ledger.finish(call, None, answers.failure(call, reason, "open a new one with connect()"))
        for link in self.links.close():
            link.state = LinkState.CLOSED
            self.links.drops.append(link)

    def disown(self) -> None:
        """The session belongs to another process: send nothing more under it. Nobody is told, not even who waits: the
        call may come from any thread."""
        self.ledger.closed = True

    def flush(self, now: float) -> None:
        """Send everything that is ready: the calls of one moment share requests and frames."""
        self._now = now
        if not self.ledger.closed:
            self._dispatcher.flush(now)

    # --- links --------------------------------------------------------------------------------------------------

    def link_up(self, link: Link, now: float) -> None:
        """The connection that ``link`` asked for stands."""
        self._now = now
        if not self.ledger.closed:
            self.links.opened(link, now)

    def link_down(self, link: Link, problem: str, now: float) -> None:
        """The connection could not be made, or has ended."""
        self._now = now
        if not self.ledger.closed:
            self.links.lost(link, problem, now)

    def link_bytes(self, link: Link, data: bytes, now: float) -> None:
        """Bytes came from the node."""
        self._now = now
        if link.is_closed() or self.ledger.closed:
            return
        try:
            frames = link.decoder.feed(data)
            link.received_at = now
            for kind, payload in frames:
                if kind is FrameKind.RESPONSE and link.greeted:
                    self._responses(link, decode_responses(payload), now)
                else:
                    self.links.control(link, kind, payload, now)
                if link.is_closed():
                    return
        except (ProtocolError, MalformedRequest) as error:
            self.links.drop(link, f"broke the protocol: {error}", now)

    def _link_ready(self, link: Link, welcome: Welcome, now: float) -> None:
        self._saw(welcome.timestamp, now)
        if not self.links.nodes:
            self.router.want_nodes(now)
        self.router.refresh_nodes(now)
        waiting, link.peer.waiting = link.peer.waiting, []
        self.ledger.requeue(waiting)
        self._dispatcher.retry_anywhere(now)

    def _link_lost(self, link: Link, requests: list[Sent], waiting: list[Call], now: float) -> None:
        """Nobody knows how far the requests came: what may be sent again goes elsewhere, with the same bytes."""
        node_id = link.peer.node_id
        self.links.another_next()
        if link.peer.failures > 1 and self.links.nodes:
            self.router.want_nodes(now, known=True)
        for sent in requests:
            if sent.route is not None:
                self.router.failed(sent.route, sent.mark, now, node_id=node_id, consistency=sent.routed_as)
            for call in sent.calls:
                if call.done:
                    continue
                if answers.may_repeat(call):
                    self.ledger.requeue([call])
                else:
                    self.ledger.finish(call, None, answers.failure(call, f"the connection to {link.address} was lost"))
        self.ledger.requeue(waiting)
        self._dispatcher.retry_anywhere(now)

    def _saw(self, timestamp: int, now: float) -> None:
        if timestamp > self.packer.timestamp:
            self.packer.timestamp = timestamp
        self.session.rebase(timestamp, now)

    # --- answers ------------------------------------------------------------------------------------------------

    def _responses(self, link: Link, responses: list[Response], now: float) -> None:
        for request_id, timestamp, result, error in responses:
            sent = link.inflight.pop(request_id, None)
            if sent is None:
                raise ProtocolError(f"an answer to request {request_id}, which is not out")
            self._saw(timestamp, now)
            try:
                if error is not None:
                    self._refused(link, sent, error, now)
                elif sent.kind is Kind.WRITE:
                    self._written(link, sent, result, now)
                elif sent.kind is Kind.READ:
                    self._read(link, sent, result)
                else:
                    self._answered(link, sent, result)
            except BaseException:
                # A bad answer ends the link, and with it every request that is out: this one among them.
                link.inflight[request_id] = sent
                raise
        peer = link.peer
        if peer.waiting and link.state is LinkState.READY:
            waiting, peer.waiting = peer.waiting, []
            self.ledger.requeue(waiting)

    def _written(self, link: Link, sent: Sent, outcomes: object, now: float) -> None:
        calls = sent.calls
        if type(outcomes) is not list or len(outcomes) != len(calls):
            raise ProtocolError("a write was answered with another number of outcomes")
        for call, outcome in zip(calls, outcomes):
            if type(outcome) is not list and type(outcome) is not _OUTCOMES[call.op]:
                raise ProtocolError(f"the outcome of a {call.op.name} cannot be {outcome!r:.40}")
        self.router.succeeded(sent.route, link.peer.node_id, LINEARIZABLE)
        finish = self.ledger.finish
        for call, outcome in zip(calls, outcomes):
            if call.done:
                continue  # ended by its deadline; its sequence is settled
            if type(outcome) is list:
                try:
                    error = error_from_wire(outcome)
                except ValueError as problem:
                    raise ProtocolError(f"an outcome that cannot be read: {problem}") from problem
                self._failed(link, sent, call, error, now, recorded=True)
            elif call.op is Op.DELETE_RANGE:
                finish(call, next_start(call), None)
            else:
                finish(call, outcome, None)

    def _read(self, link: Link, sent: Sent, results: object) -> None:
        calls = sent.calls
        if sent.consistency == STALE:
            results = answers.take_age(calls, results)
        if type(results) is not list or len(results) != len(calls):
            raise ProtocolError("a get was answered with another number of values")
        for result in results:
            if result is None:
                continue
            if (
                type(result) is not list
                or len(result) != 2
                or type(result[0]) is not bytes
                or type(result[1]) is not int
            ):
                raise ProtocolError(f"a get cannot be answered with {result!r:.40}")
        self.router.succeeded(sent.route, link.peer.node_id, sent.routed_as)
        finish = self.ledger.finish
        for call, result in zip(calls, results):
            if not call.done:
                finish(call, result, None)

    def _answered(self, link: Link, sent: Sent, result: Any) -> None:
        (call,) = sent.calls
        if sent.kind is Kind.SCAN:
            if sent.consistency == STALE:
                result = answers.take_age(sent.calls, result)
            result = check_page(call, result, sent)
        elif call.internal:
            try:
                result = parse_routes(result) if call.method == Method.ROUTES else parse_nodes(result)
            except ValueError as problem:
                raise ProtocolError(str(problem)) from problem
        if sent.route is not None:
            self.router.succeeded(sent.route, link.peer.node_id, sent.routed_as)
        if not call.done:
            self.ledger.finish(call, result, None)

    def _refused(self, link: Link, sent: Sent, error: ShardKVError, now: float) -> None:
        """A whole request failed."""
        if sent.kind is Kind.READ and len(sent.calls) > 1 and isinstance(error, RequestError):
            # The answer may only be too large together; one at a time it cannot be.
            for call in sent.calls:
                call.batch_max = max(1, len(sent.calls) // 2)
            self.ledger.requeue([call for call in sent.calls if not call.done])
            return
        for call in sent.calls:
            if not call.done:
                self._failed(link, sent, call, error, now, recorded=False)

    def _failed(self, link: Link, sent: Sent, call: Any, error: ShardKVError, now: float, *, recorded: bool) -> None:
        verdict = answers.judge(call, error, recorded=recorded)
        if verdict is Verdict.FINAL:
            self.ledger.finish(call, None, answers.copy(error))
            return
        if verdict is Verdict.UNKNOWN:
            unknown = OutcomeUnknown(f"an earlier attempt had been sent, and now: {error}; {answers.DOUBT}")
            self.ledger.finish(call, None, unknown)
            return
        if verdict is Verdict.ANEW:
            if isinstance(error, TooOld):
                self.session.too_old(now)
            self.ledger.renew(call)
            self.links.note(link.peer, error, now)
            self._dispatcher.later([call], now)
            return
        if isinstance(call, WriteCall | AdminCall) and not recorded and answers.came_to_nothing(call, error):
            self.ledger.take_back(call)
        if sent.route is None:
            self._failed_anywhere(link, call, error, now)
            return
        self.links.note(link.peer, error, now)
        if verdict is Verdict.ELSEWHERE:
            self._reroute(link, sent, call, error, now)
        else:
            self.router.busy(sent.route, sent.mark, now, node_id=link.peer.node_id, consistency=sent.routed_as)
        self.ledger.requeue([call])

    def _failed_anywhere(self, link: Link, call: AdminCall, error: ShardKVError, now: float) -> None:
        """A node refused a call that was for it, or for any node, for the moment."""
        self.links.note(link.peer, error, now)
        self.links.another_next()
        if call.node_id is None:
            self.links.dial_any(now)  # none of those that are connected may be able to answer
        call.failures += 1
        self.timers.at(now + self._backoff(call.failures), lambda _: self.ledger.requeue([call]))

    def _reroute(self, link: Link, sent: Sent, call: Any, error: ShardKVError, now: float) -> None:
        router = self.router
        route = sent.route
        node_id = link.peer.node_id
        if isinstance(error, EpochMismatch):
            # The children of a split are led, at first, by whoever led their parent.
            known = sent.descriptor.span if sent.descriptor is not None else EVERY_KEY
            news = [
                router.learn(descriptor, route.leader if descriptor.span.overlaps(known) else None)
                for descriptor in error.current
            ]
            if isinstance(call, DeleteRangeCall) and call.sealed is not None:
                self._recut(link, call, error)
            if not any(news) and not route.evicted and route.descriptor is sent.descriptor:
                # The node knows no better than we do: it lags behind, or the range is about to change.
                router.busy(route, sent.mark, now, node_id=node_id, consistency=sent.routed_as)
                router.refresh(route, now)
            return
        hint = error.hint if isinstance(error, NotLeader) else None
        router.failed(route, sent.mark, now, node_id=node_id, consistency=sent.routed_as, hint=hint)
        if isinstance(error, RangeNotFound):
            router.refresh(route, now)

    def _recut(self, link: Link, call: DeleteRangeCall, error: EpochMismatch) -> None:
        """Cut a sealed piece anew if a replica that owns its start at a newer epoch refused it as too wide.

        Only then is it certain that the old bytes neither were applied nor ever will be (DESIGN §4.6).
        """
        assert call.key is not None, "a delete_range without a start"
        for descriptor in error.current:
            if (
                descriptor.span.contains(call.key)
                and descriptor.epoch.span > call.cut_generation
                and any(replica.node_id == link.peer.node_id for replica in descriptor.replicas)
            ):
                end = descriptor.span.end
                if end is not None and (call.sealed_end is None or call.sealed_end > end):
                    self.ledger.renew(call)
                return

    def check(self) -> None:
        """Walk every invariant."""
        self.session.check()
        self.timers.check()
        self.links.check()
        self.router.check()
        self.ledger.check()
