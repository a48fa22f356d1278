"""What clients (and nodes, as clients of each other) ask of a node, and how it answers.

A REQUEST frame holds a CBOR array of requests, a RESPONSE frame a CBOR array of responses; answers come in any order.

    request   [id, method, range_id, span_generation, timestamp, *arguments]
    response  [id, 0, timestamp, result]  or  [id, code, timestamp, [code, message, details]]

``timestamp`` is the highest that the sender has seen (from a server: its clock reading as well), so that versions
respect causality across ranges. ``range_id`` and ``span_generation`` say which range the sender believes it speaks
to; methods that are about the node or the cluster carry zeros there.

    method            arguments                                        result
    WRITE             session, commands (the bytes of commands.join)   [outcome, ...]
    GET               consistency, [key, ...]                          [[value, version] | None, ...]
    SCAN              consistency, start, end, limit, bytes_max,       [[key, value, version, ...], more]
                      reverse, keys_only                               (flat triples; value None if keys_only)
    ROUTES            start, limit                                     [[descriptor, leader node id | None], ...]
    NODES             -                                                [[node id, name, address], ...]
    RANGES            after: a start or null                           [[range, ...], more]
    everything else   one CBOR value                                   one CBOR value

A GET or SCAN of consistency STALE may have one argument more: the age that the answer may have at most, in
microseconds, or null for any. Its result is then ``[age, result]``: what the answer is read from holds every write that
had been answered so many microseconds before the request came in. Nodes that cannot say so much refuse with NotLeader.

RANGES names the ranges that start above ``after``, or all from the first one, as many as a page holds. Without its
argument, as older tools ask, it is answered with all ranges in one array, if they fit an answer.

A SCAN page stays inside its range: ``start`` and ``end`` are cut to the range by the server; ``more`` says that keys of
the span may remain in this range above the last one returned (below it when ``reverse``).
"""

from enum import IntEnum
from struct import Struct
from struct import error as StructError
from typing import Any, Final, NamedTuple

from shardkv import codec, errors

REQUESTS_PER_FRAME_MAX: Final = 4_096
SCAN_PAGE_ENTRIES_MAX: Final = 10_000
SCAN_PAGE_BYTES_MAX: Final = 4 * 1024 * 1024
GET_KEYS_MAX: Final = 10_000
_ANSWERED: Final = Struct(">BBQBBQ")
"""An answer but for its result: valid CBOR, packed in a third of the time that CBOR itself takes."""
_ARRAY_OF_4, _UNSIGNED_64 = 0x84, 0x1B


class Method(IntEnum):
    WRITE = 1
    GET = 2
    SCAN = 3
    ROUTES = 4
    NODES = 5
    # The cluster as a person sees it.
    STATUS = 10
    RANGES = 11
    NODE_STATUS = 12
    # Operations, sent to the leader of the range they name.
    SPLIT = 20
    TRANSFER = 21
    SNAPSHOT = 22
    CHANGE_REPLICAS = 23
    # Between nodes and the placement group's leader.
    JOIN = 30
    PLACEMENT = 31
    HEARTBEAT = 32


class Consistency(IntEnum):
    LINEARIZABLE = 0
    FOLLOWER = 1
    STALE = 2


class Request(NamedTuple):
    id: int
    method: int
    range_id: int
    span_generation: int
    timestamp: int
    arguments: list[Any]


def encode_request(
    request_id: int, method: int, range_id: int, span_generation: int, timestamp: int, *arguments: object
) -> bytes:
    return codec.dumps([request_id, method, range_id, span_generation, timestamp, *arguments])


def join(parts: list[bytes]) -> bytes:
    """Encoded requests, or encoded responses, as the payload of one frame."""
    return codec.array_head(len(parts)) + b"".join(parts)


def decode_requests(payload: bytes) -> list[Request]:
    """The requests in a frame. Raises MalformedRequest when any has the wrong outer shape."""
    items = codec.loads_bounded(payload)
    if not isinstance(items, list) or len(items) > REQUESTS_PER_FRAME_MAX:
        raise codec.malformed(f"a request frame must hold an array of at most {REQUESTS_PER_FRAME_MAX} requests")
    requests = []
    for item in items:
        match item:
            case [int(request_id), int(method), int(range_id), int(generation), int(timestamp), *arguments]:
                requests.append(Request(request_id, method, range_id, generation, timestamp, arguments))
            case _:
                raise codec.malformed("a request must be [id, method, range, generation, timestamp, ...]")
    return requests


def encode_response(request_id: int, timestamp: int, result: object) -> bytes:
    try:
        head = _ANSWERED.pack(_ARRAY_OF_4, _UNSIGNED_64, request_id, 0, _UNSIGNED_64, timestamp)
    except StructError:  # a client may number its requests as it likes, below zero too
        return codec.dumps([request_id, 0, timestamp, result])
    return head + codec.dumps(result)


def encode_error(request_id: int, timestamp: int, error: errors.ShardKVError) -> bytes:
    return codec.dumps([request_id, error.code, timestamp, errors.to_wire(error)])


class RangesListing:
    """Puts the pages of RANGES together: ask with ``after`` for as long as :meth:`take` says that there is more.

    A range that is split between two pages may be shown as it was before, and what it gave away as well.
    """

    def __init__(self) -> None:
        self.after: bytes | None = None
        self.rows: list[dict[str, Any]] = []

    def take(self, answer: Any) -> bool:
        """Whether there are more pages. Raises MalformedRequest."""
        match answer:
            case [[*rows], bool(more)]:
                pass
            case [*rows]:  # an older node's: all of them
                more = False
            case _:
                raise codec.malformed("a page of ranges must be [[range, ...], more]")
        self.rows.extend(rows)
        if more:
            start = rows[-1].get("start") if rows and isinstance(rows[-1], dict) else None
            if not isinstance(start, bytes) or (self.after is not None and start <= self.after):
                raise codec.malformed("a page of ranges that is not the last must go on behind the one before")
            self.after = start
        return more


class Response(NamedTuple):
    id: int
    timestamp: int
    result: Any
    error: errors.ShardKVError | None


def decode_responses(payload: bytes) -> list[Response]:
    """The responses in a frame. Raises MalformedRequest when any has the wrong shape."""
    items = codec.loads(payload)
    if not isinstance(items, list):
        raise codec.malformed("a response frame must hold an array")
    responses = []
    for item in items:
        match item:
            case [int(request_id), 0, int(timestamp), result]:
                responses.append(Response(request_id, timestamp, result, None))
            case [int(request_id), int(), int(timestamp), [*fields]]:
                try:
                    error = errors.from_wire(fields)
                except ValueError as problem:
                    raise codec.malformed(str(problem)) from problem
                responses.append(Response(request_id, timestamp, None, error))
            case _:
                raise codec.malformed("a response must be [id, status, timestamp, result]")
    return responses
