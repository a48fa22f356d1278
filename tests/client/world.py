"""The core and a fake cluster in virtual time: bytes travel with a delay, and tests say what breaks."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf
from random import Random
from typing import Any

from shardkv import errors
from shardkv.types import NodeId
from shardkv.wire import requests
from shardkv.wire.commands import Op, pack_delete, pack_increment, pack_put
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Welcome, decode_hello, encode_refused, encode_welcome
from shardkv.wire.requests import Method, Request
from shardkv_client.core import AdminCall, Call, Core, DeleteRangeCall, Link, ReadCall, ScanCall, Settings, WriteCall
from shardkv_client.limits import before
from tests.client.fake_cluster import FakeCluster, FakeNode

LATENCY = 0.001


class World:
    """``put`` and the like submit a call; :meth:`run` lets time pass until it is done, :meth:`pass_time` for a while.

    ``lose_requests`` and ``lose_answers`` count frames to swallow, each with its connection; ``down`` are nodes that
    accept no connection, ``mute`` nodes that accept everything and answer nothing, ``dead`` addresses that do not even
    refuse a connection; ``seconds_away`` are nodes whose answers take longer,
    ``greeting_seconds`` nodes whose greetings do.
    """

    def __init__(
        self, nodes: int = 3, *, seeds: list[int] | None = None, seed: int = 0, settings: Settings | None = None
    ) -> None:
        self.cluster = FakeCluster(nodes)
        self.now = 100.0
        self.down: set[int] = set()
        self.mute: set[int] = set()
        self.dead: set[str] = set()
        self.seconds_away: dict[int, float] = {}
        self.greeting_seconds: dict[int, float] = {}
        self.bytes_per_second = inf
        """Of what the client sends on one connection."""
        self._carried_at: dict[Link, float] = {}
        self.lose_requests = 0
        self.lose_answers = 0
        self.cluster_ids: dict[int, bytes] = {}
        """Of nodes of another cluster."""
        self.refusal: errors.ShardKVError | None = None
        self.inflight_max = 1_000
        self.frames: list[tuple[int, list[Request]]] = []
        """Every request frame that reached a node."""
        self.dials: list[str] = []
        self.open: dict[Link, FakeNode] = {}
        self._decoders: dict[Link, FrameDecoder] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = count()
        self.latency: Callable[[], float] = lambda: LATENCY
        self.core = Core(
            [self.cluster.nodes[node].address for node in (seeds or [1])],
            settings=settings or Settings(),
            session=b"s" * 16,
            random=Random(seed).random,
            wake_flush=lambda: None,
            wake_timer=lambda: None,
        )

    # --- calls ------------------------------------------------------------------------------------------------------

    def submit(self, call: Any) -> Any:
        call.notify = lambda done: None
        self.core.submit(call)
        return call

    def put(self, key: bytes, value: bytes, if_version: int | None = None, timeout: float = 10.0) -> WriteCall:
        return self.submit(WriteCall(Op.PUT, key, pack_put(key, value, if_version), self.now + timeout))

    def delete(self, key: bytes, timeout: float = 10.0) -> WriteCall:
        return self.submit(WriteCall(Op.DELETE, key, pack_delete(key), self.now + timeout))

    def increment(self, key: bytes, delta: int = 1, timeout: float = 10.0) -> WriteCall:
        return self.submit(WriteCall(Op.INCREMENT, key, pack_increment(key, delta), self.now + timeout))

    def get(self, key: bytes, consistency: int = 0, timeout: float = 10.0, age_us_max: int | None = None) -> ReadCall:
        keys_max = self.core.settings.keys_per_get_max
        return self.submit(ReadCall(key, consistency, self.now + timeout, keys_max, age_us_max))

    def scan(
        self, start: bytes, end: bytes, *, consistency: int = 0, limit: int = 10, reverse: bool = False
    ) -> ScanCall:
        """One page."""
        return self.submit(
            ScanCall(
                before(end) if reverse else start,
                start,
                end,
                consistency=consistency,
                limit=limit,
                bytes_max=1_000,
                reverse=reverse,
                keys_only=False,
                deadline=self.now + 5,
            )
        )

    def delete_range(self, start: bytes, end: bytes | None, timeout: float = 10.0) -> DeleteRangeCall:
        return self.submit(DeleteRangeCall(start, end, self.now + timeout))

    def admin(self, method: int, *arguments: object, timeout: float = 10.0, **where: Any) -> AdminCall:
        return self.submit(AdminCall(method, arguments, self.now + timeout, **where))

    # --- time -------------------------------------------------------------------------------------------------------

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heappush(self._events, (self.now + delay, next(self._tie), action))

    def step(self) -> bool:
        """Perform the next thing that happens; False if nothing ever will."""
        core = self.core
        if core.flush_wanted:
            core.flush(self.now)
        elif self._events and self._events[0][0] <= max(core.due, self.now):
            when, _, action = heappop(self._events)
            self._move_to(when)
            action()
        elif core.due != float("inf"):
            self._move_to(core.due)
            core.tick(self.now)
        else:
            return False
        self._perform()
        core.check()
        return True

    def _move_to(self, when: float) -> None:
        self.now = max(self.now, when)
        self.cluster.now_ms = (self.now - 100.0) * 1_000

    def run(self, *calls: Call) -> Any:
        """Let time pass until the calls are done; the result of the first, or its error raised."""
        for _ in range(200_000):
            if all(call.done for call in calls):
                break
            assert self.step(), "nothing will ever happen, but a call is not done"
        else:
            raise AssertionError("the calls do not end")
        if calls[0].error is not None:
            raise calls[0].error
        return calls[0].result

    def settle(self) -> None:
        """Let everything that is under way arrive, without waiting for timers."""
        while self.core.flush_wanted or self._events:
            if not self.core.flush_wanted and self.core.due < self._events[0][0]:
                self.core.tick(self.core.due)
                self._perform()
                continue
            assert self.step()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            next_event = self._events[0][0] if self._events else float("inf")
            if not self.core.flush_wanted and min(next_event, self.core.due) > end:
                self._move_to(end)
                return
            assert self.step()

    # --- the network ------------------------------------------------------------------------------------------------

    def _perform(self) -> None:
        links = self.core.links
        outputs, links.outputs = links.outputs, []
        for link in outputs:
            data = b"".join(link.output)
            link.output.clear()
            free_at = max(self.now, self._carried_at.get(link, 0.0)) + len(data) / self.bytes_per_second
            self._carried_at[link] = free_at
            self._at(free_at - self.now + self.latency(), lambda link=link, data=data: self._arrive(link, data))
        drops, links.drops = links.drops, []
        for link in drops:
            self.open.pop(link, None)
        dials, links.dials = links.dials, []
        for link in dials:
            self.dials.append(link.address)
            self._at(self.latency(), lambda link=link: self._dial(link))

    def _dial(self, link: Link) -> None:
        if link.address in self.dead:
            return
        node = next((each for each in self.cluster.nodes.values() if each.address == link.address), None)
        if node is None or node.id in self.down:
            self.core.link_down(link, "connection refused", self.now)
            return
        self.open[link] = node
        self._decoders[link] = FrameDecoder()
        self.core.link_up(link, self.now)

    def cut(self, link: Link) -> None:
        """The connection breaks."""
        if self.open.pop(link, None) is not None:
            self.core.link_down(link, "connection reset", self.now)

    def crash(self, node_id: int) -> None:
        """The node is gone, and its connections with it."""
        self.down.add(node_id)
        for link in [link for link, node in self.open.items() if node.id == node_id]:
            self.cut(link)
        self._perform()

    def _arrive(self, link: Link, data: bytes) -> None:
        node = self.open.get(link)
        if node is None or node.id in self.mute:
            return
        for kind, payload in self._decoders[link].feed(data):
            answer = self._answer(link, node, kind, payload)
            if answer is not None and link in self.open:
                delay = self.latency() + self.seconds_away.get(node.id, 0.0)
                if kind is FrameKind.HELLO:
                    delay += self.greeting_seconds.get(node.id, 0.0)
                self._at(delay, lambda answer=answer: self._back(link, answer))

    def _answer(self, link: Link, node: FakeNode, kind: FrameKind, payload: bytes) -> bytes | None:
        if kind is FrameKind.HELLO:
            decode_hello(payload)
            if self.refusal is not None:
                return encode_refused(self.refusal)
            clock = self.cluster.clock
            cluster_id = self.cluster_ids.get(node.id, self.cluster.cluster_id)
            return encode_welcome(Welcome(1, cluster_id, NodeId(node.id), 1, clock, self.inflight_max))
        if kind is FrameKind.PING:
            return encode_frame(FrameKind.PONG, payload)
        asked = requests.decode_requests(payload)
        writes = any(request.method == Method.WRITE for request in asked)
        if writes and self.lose_requests:
            self.lose_requests -= 1
            self.cut(link)
            return None
        self.frames.append((node.id, asked))
        answers = node.serve(payload)
        if writes and self.lose_answers:
            self.lose_answers -= 1
            self.cut(link)
            return None
        return encode_frame(FrameKind.RESPONSE, requests.join(answers))

    def _back(self, link: Link, answer: bytes) -> None:
        if link in self.open:
            self.core.link_bytes(link, answer, self.now)

    # --- what was seen ------------------------------------------------------------------------------------------------

    def requests_to(self, node_id: int, method: Method) -> list[Request]:
        return [each for each in self.cluster.nodes[node_id].requests if each.method == method]


IN_DOUBT = [errors.NotLeader(logged=True), errors.OutcomeUnknown("stepped down"), errors.RangeNotFound("gone")]
"""Refusals of a write that may be applied all the same."""
CAME_TO_NOTHING = [errors.NotLeader(), errors.Busy("full"), errors.Unavailable("check the clocks")]
"""Refusals of one that is certainly not."""


def refusing(*refusals: errors.ShardKVError) -> World:
    """Nodes that refuse the next writes so, whoever is asked; after those they take them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    left = list(refusals)
    for node in world.cluster.nodes.values():
        node.faults.append(lambda request: left.pop(0) if request.method == Method.WRITE and left else None)
    return world
