"""Packing: calls for one range become requests, requests become frames.

Here is what batching means: the commands of one flush share a WRITE, its keys a GET, all requests for a node a frame.
Bytes only; whom they go to was decided before, and what their answers mean is decided elsewhere.
"""

from itertools import count

from shardkv.wire import commands, requests
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.requests import Method
from shardkv_client.core.cache import Route
from shardkv_client.core.calls import (
    LINEARIZABLE,
    STALE,
    AdminCall,
    DeleteRangeCall,
    Kind,
    ReadCall,
    ScanCall,
    Sent,
    WriteCall,
)
from shardkv_client.core.links import Link, Links
from shardkv_client.core.session import Session
from shardkv_client.core.settings import Settings


class Packer:
    __slots__ = ("_dirty", "_ids", "_links", "_settings", "session", "timestamp")

    def __init__(self, settings: Settings, session: Session, links: Links) -> None:
        self._settings = settings
        self._links = links
        self._ids = count(1)
        self._dirty: list[Link] = []
        """Links with requests that no frame holds yet."""
        self.session: Session = session
        self.timestamp: int = 0
        """The highest that any server has told; every request carries it."""

    def room(self, link: Link) -> bool:
        """Whether the node still reads requests from this link."""
        return len(link.inflight) < link.inflight_max

    def _put(self, link: Link, sent: Sent, method: int, route: Route | None, now: float, *arguments: object) -> None:
        range_id, generation = (route.range_id, route.generation) if route is not None else (0, 0)
        part = requests.encode_request(sent.id, method, range_id, generation, self.timestamp, *arguments)
        sent.size = len(part)
        for call in sent.calls:
            call.attempts += 1
        self._links.owe(link, sent, now)
        if not link.parts:
            self._dirty.append(link)
        elif (
            link.parts_bytes + len(part) > self._settings.frame_bytes_target
            or len(link.parts) >= self._settings.requests_per_frame_max
        ):
            self._close_frame(link)
        link.parts.append(part)
        link.parts_bytes += len(part)

    def _close_frame(self, link: Link) -> None:
        self._links.write(link, encode_frame(FrameKind.REQUEST, requests.join(link.parts)))
        link.parts = []
        link.parts_bytes = 0

    def finish(self) -> None:
        """Close the frames of this flush."""
        for link in self._dirty:
            if link.parts:
                self._close_frame(link)
        self._dirty.clear()

    # --- the kinds of calls -------------------------------------------------------------------------------------

    def writes(
        self, link: Link, route: Route, calls: list[WriteCall], now: float
    ) -> tuple[list[WriteCall], list[WriteCall]]:
        """Send commands, sealing those that are new.

        Returns:
            The calls that were not sent: those that the session's window has no place for, and those there was no
            room for. Apart, for the one that the window waits for may be among the latter.
        """
        session = self.session
        settings = self._settings
        commands_max = settings.commands_per_write_max
        bytes_max = settings.bytes_per_write_max
        position = 0
        held: list[WriteCall] = []
        while position < len(calls):
            if not self.room(link):
                return held, calls[position:]
            blobs: list[bytes] = []
            batch: list[WriteCall] = []
            size = 0
            issued_at = session.issued_at_ms(now)
            while position < len(calls) and len(blobs) < commands_max and size < bytes_max:
                call = calls[position]
                position += 1
                if isinstance(call, DeleteRangeCall):
                    _cut(call, route)
                sealed = call.sealed
                if sealed is None:
                    if not session.open:
                        held.append(call)
                        continue
                    sequence = call.sequence = session.issue()
                    sealed = call.sealed = commands.seal(call.op, call.body, sequence, issued_at, session.lowest)
                blobs.append(sealed)
                batch.append(call)
                size += len(sealed)
            if blobs:
                sent = Sent(next(self._ids), Kind.WRITE, batch, route, LINEARIZABLE)
                self._put(link, sent, Method.WRITE, route, now, session.id, commands.join(blobs))
        return held, []

    def reads(self, link: Link, route: Route, calls: list[ReadCall], consistency: int, now: float) -> list[ReadCall]:
        """Send gets of one consistency and bound. The calls there was no room for."""
        position = 0
        while position < len(calls):
            if not self.room(link):
                return calls[position:]
            batch_max = calls[position].batch_max
            batch = calls[position : position + batch_max]
            position += len(batch)
            sent = Sent(next(self._ids), Kind.READ, batch, route, consistency)
            keys = [call.key for call in batch]
            if consistency == STALE:
                self._put(link, sent, Method.GET, route, now, consistency, keys, batch[0].age_us_max)
            else:
                self._put(link, sent, Method.GET, route, now, consistency, keys)
        return []

    def scan(self, link: Link, route: Route, call: ScanCall, now: float) -> None:
        """Ask for a page of what lies in the range. For no more: the next page begins where the route ends, and in the
        moment of a split a replica that lags may still have the keys behind it."""
        end = call.end
        if route.end is not None and (end is None or route.end < end):
            end = route.end
        sent = Sent(next(self._ids), Kind.SCAN, [call], route, call.consistency)
        self._put(
            link,
            sent,
            Method.SCAN,
            route,
            now,
            call.consistency,
            max(call.start, route.start),
            end,
            call.limit,
            call.bytes_max,
            call.reverse,
            call.keys_only,
            *((call.age_us_max,) if call.consistency == STALE else ()),
        )

    def admin(self, link: Link, route: Route | None, call: AdminCall, now: float) -> None:
        sent = Sent(next(self._ids), Kind.ADMIN, [call], route, LINEARIZABLE)
        self._put(link, sent, call.method, route, now, *call.arguments)


def _cut(call: DeleteRangeCall, route: Route) -> None:
    """Cut the piece to the range, once: what was sent is sent again as it was, and done whole or not at all."""
    if call.sealed is not None:
        return
    end = call.end
    if route.end is not None and (end is None or route.end < end):
        end = route.end
    assert call.key is not None, "a delete_range without a start"
    call.body = commands.pack_delete_range(call.key, end)
    call.sealed_end = end
    call.cut_generation = route.generation
