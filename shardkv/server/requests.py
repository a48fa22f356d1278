"""What a node does with each request.

Lives here: the checks that every request gets, reads and writes (answered without a task), and the table of methods.
Does not live here: operations that take several steps (``operations``), placement (``placement_service``). Whatever is
wrong with a request is answered to its sender, and to nobody else.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from shardkv.environment import Clock
from shardkv.errors import (
    Busy,
    EpochMismatch,
    InvalidRange,
    KeyTooLarge,
    MalformedRequest,
    NotLeader,
    OutOfSpace,
    RangeNotFound,
    ShardKVError,
    StorageError,
    Unavailable,
    UnknownMethod,
    ValueTooLarge,
)
from shardkv.machine import reads
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica, Requester, WaitingRead, WriteGroup
from shardkv.storage.engine import Engine
from shardkv.types import KEY_BYTES_MAX, SESSION_BYTES, VALUE_BYTES_MAX
from shardkv.wire import commands
from shardkv.wire.requests import (
    GET_KEYS_MAX,
    SCAN_PAGE_BYTES_MAX,
    SCAN_PAGE_ENTRIES_MAX,
    Consistency,
    Method,
    Request,
)

COMMANDS_PER_REQUEST_MAX: Final = 1_024
SCAN_ARGUMENTS: Final = 7
UNSTATED: Final = -1
"""The age of a stale read that allows any and does not ask for it."""
GET_SLICE_KEYS: Final = 16
"""Keys looked up at once: with the largest values, so much is in memory before the answer's bound is looked at."""
GET_BYTES_MAX: Final = 8 * 1024 * 1024
"""Values in one answer; half of what a frame holds."""
GET_ALWAYS_KEYS: Final = GET_BYTES_MAX // VALUE_BYTES_MAX
"""So many of the largest values are within the bound."""

_FREES_SPACE: Final = frozenset((commands.Op.DELETE, commands.Op.DELETE_RANGE))

SCAN_BYTES_CROWDED: Final = 8 * 1024
"""A page's bound while clients leave so much unread that only small answers are made at once."""


class Asker(Requester, Protocol):
    """A requester whose answers may find no room."""

    @property
    def later(self) -> Requester:
        """For reads that are answered later; one that finds no room then is refused with Busy."""
        ...

    @property
    def crowded(self) -> bool:
        """Whether a read that comes due now should be refused without being done."""
        ...

    def fits(self, answer_bytes: int) -> bool:
        """Whether there is room for an answer of this size."""
        ...

    def offer(self, request_id: int, result: Any) -> int:
        """Answer a read that can be done again; 0, or if there is no room for the answer, its size in bytes."""
        ...


class NoRoom(Exception):
    """A read was done, but its answer finds no room: hand it on again later. Not answered yet."""

    def __init__(self, answer_bytes: int) -> None:
        super().__init__(f"no room for an answer of {answer_bytes} bytes")
        self.answer_bytes = answer_bytes


Slow = Callable[[Asker, Request], None]
"""Starts a task for a request that takes several steps."""


class Requests:
    """The method table of a node. :meth:`dispatch` never waits, and raises nothing but NoRoom."""

    def __init__(self, driver: Driver, clock: Clock, hybrid_clock: HybridClock, slow: Slow) -> None:
        self._driver = driver
        # Looked up by the bare number of each request: making a RangeId of it would be a call.
        self._replicas = cast("dict[int, Replica]", driver.catalog.replicas)
        self._engine: Engine = driver.engine
        self._clock = clock
        self._hybrid_clock = hybrid_clock
        self._slow = slow
        self._methods: dict[int, Callable[[Asker, Request], None]] = {
            Method.WRITE: self._write,
            Method.GET: self._get,
            Method.SCAN: self._scan,
        }
        for method in Method:
            self._methods.setdefault(method, slow)

    def dispatch(self, requester: Asker, request: Request) -> None:
        """Answer a request, now or later. Raises NoRoom for a read that must be handed on again."""
        try:
            if self._driver.failure is not None:
                raise Unavailable("this node's log or engine has failed, and it ends")
            if not self._hybrid_clock.observe(request.timestamp):
                # Not the caller's mistake: some node's clock is wrong, and this one's gets there in time.
                raise Unavailable(
                    f"the request's timestamp {request.timestamp} lies further ahead of this node's clock than it "
                    "accepts; check the clocks"
                )
            method = self._methods.get(request.method)
            if method is None:
                raise UnknownMethod(f"this node knows no method {request.method}; it may be older than the client")
            method(requester, request)
        except ShardKVError as error:
            requester.refuse(request.id, self._said(error))

    def _said(self, error: ShardKVError) -> ShardKVError:
        """What the caller is told of an error. One of the engine ends the node: others have the same data, and lead."""
        if not isinstance(error, StorageError) or isinstance(error, OutOfSpace):
            return error
        self._driver.fail(error)
        return Unavailable(f"this node cannot read its data, and ends: {error}")

    def _replica(self, request: Request) -> Replica:
        replica = self._replicas.get(request.range_id)
        if replica is None:
            raise RangeNotFound(f"this node holds no replica of range {request.range_id}")
        return replica

    # Writes

    def _write(self, requester: Asker, request: Request) -> None:
        match request.arguments:
            case [bytes(session), bytes(data)] if len(session) == SESSION_BYTES:
                pass
            case _:
                raise MalformedRequest("a write's arguments are a session of 16 bytes and its commands")
        replica = self._replica(request)
        decoded = commands.decode(data)
        if not 0 < len(decoded) <= COMMANDS_PER_REQUEST_MAX:
            raise MalformedRequest(f"a write has 1 to {COMMANDS_PER_REQUEST_MAX} commands, not {len(decoded)}")
        for command in decoded:
            problem = commands.validate(command, KEY_BYTES_MAX, VALUE_BYTES_MAX)
            if problem is not None:
                raise MalformedRequest(problem)
        try:
            machine = replica.check_route(request.span_generation)
            start, end = machine.descriptor.span
            for command in decoded:
                key = command[commands.KEY]
                if key < start or (end is not None and key >= end):
                    raise EpochMismatch(current=(machine.descriptor,))
        except EpochMismatch:
            # A client cuts a range delete anew when it is told so, which is right only if no earlier attempt was
            # executed here; the log knows: applying looks at the records first and at the span then.
            if not any(command[commands.OP] == commands.Op.DELETE_RANGE for command in decoded):
                raise
        space = self._driver.space
        if (
            space.low
            and replica.leads  # else the client is told who does, whose disk may have room
            and (space.full or any(command[commands.OP] not in _FREES_SPACE for command in decoded))
        ):
            raise space.refusal()
        replica.enqueue(WriteGroup(requester, request.id, session, data, decoded))
        self._driver.proposer.later(replica)

    # Reads

    def _get(self, requester: Asker, request: Request) -> None:
        age_us_max: int | None = UNSTATED
        match request.arguments:
            case [int(consistency), [*keys]] if len(keys) <= GET_KEYS_MAX:
                pass
            case [Consistency.STALE as consistency, [*keys], int() | None as age_us_max] if len(
                keys
            ) <= GET_KEYS_MAX and (age_us_max is None or age_us_max >= 0):
                pass
            case _:
                raise MalformedRequest(f"a get's arguments are a consistency and at most {GET_KEYS_MAX} keys")
        for key in keys:
            if type(key) is not bytes or not 0 < len(key) <= KEY_BYTES_MAX:
                raise KeyTooLarge(f"a key is 1 to {KEY_BYTES_MAX} bytes")
        generation, engine = request.span_generation, self._engine

        def serve(replica: Replica) -> Any:
            machine = replica.check_route(generation)
            if len(keys) <= GET_ALWAYS_KEYS:
                return reads.get(machine, engine, keys)
            found: list[Any] = []
            size = 0
            for position in range(0, len(keys), GET_SLICE_KEYS):
                found += reads.get(machine, engine, keys[position : position + GET_SLICE_KEYS])
                size += sum(len(each[0]) for each in found[position:] if each is not None)
                if size > GET_BYTES_MAX:
                    raise ValueTooLarge(
                        f"the values of these keys are over {GET_BYTES_MAX} bytes: ask for fewer at once"
                    )
            return found

        self._read(requester, request, consistency, serve, age_us_max)

    def _scan(self, requester: Asker, request: Request) -> None:
        arguments, age_us_max = request.arguments, UNSTATED
        if len(arguments) == SCAN_ARGUMENTS + 1 and arguments[0] == Consistency.STALE:
            *arguments, age_us_max = arguments
            if age_us_max is not None and (type(age_us_max) is not int or age_us_max < 0):
                raise MalformedRequest("the age of a stale read is a number of microseconds, or null")
        match arguments:
            case [
                int(consistency),
                bytes(start),
                bytes() | None as end,
                int(limit),
                int(bytes_max),
                bool(reverse),
                bool(keys_only),
            ] if limit > 0 and bytes_max > 0:
                pass
            case _:
                raise MalformedRequest("a scan's arguments are out of shape")
        if end is not None and end < start:
            raise InvalidRange("a scan's end lies below its start")
        limit, bytes_max = min(limit, SCAN_PAGE_ENTRIES_MAX), min(bytes_max, SCAN_PAGE_BYTES_MAX)
        generation, engine = request.span_generation, self._engine

        def serve(replica: Replica) -> Any:
            machine = replica.check_route(generation)
            page_bytes = bytes_max if requester.fits(bytes_max) else SCAN_BYTES_CROWDED
            return reads.scan_page(machine, engine, start, end, limit, page_bytes, reverse, keys_only)

        self._read(requester, request, consistency, serve, age_us_max)

    def _read(
        self,
        requester: Asker,
        request: Request,
        consistency: int,
        serve: Callable[[Replica], Any],
        age_us_max: int | None,
    ) -> None:
        """Serve a read at the moment at which its consistency allows it."""
        if not Consistency.LINEARIZABLE <= consistency <= Consistency.STALE:
            raise MalformedRequest(f"there is no consistency {consistency}")
        replica = self._replica(request)
        replica.check_route(request.span_generation)
        if consistency == Consistency.STALE:
            serve = self._aged(replica, serve, age_us_max)
            if not replica.leads:
                answer_bytes = requester.offer(request.id, serve(replica))
                if answer_bytes:
                    raise NoRoom(answer_bytes)
                return
        if replica.leads:
            # The clock is read after the request came in, and nothing is awaited between it and the read.
            if replica.can_read(self._clock.monotonic_ns()):
                answer_bytes = requester.offer(request.id, serve(replica))
                if answer_bytes:
                    raise NoRoom(answer_bytes)
                return
        elif consistency != Consistency.FOLLOWER:
            raise replica.not_leader()
        elif not replica.raft.leader:
            raise Busy("this replica knows no leader to ask for a read index")

        def serve_later(replica: Replica) -> Any:
            # Many come due at once: each is looked at only if its client has taken what it was given before.
            if requester.crowded:
                raise Busy("the answers that this client was given already are still unread")
            try:
                return serve(replica)
            except StorageError as error:
                raise self._said(error) from error

        replica.await_read(WaitingRead(requester.later, request.id, serve_later))
        self._driver.proposer.later(replica)

    def _aged(
        self, replica: Replica, serve: Callable[[Replica], Any], age_us_max: int | None
    ) -> Callable[[Replica], Any]:
        """How a stale read is served here. Raises NotLeader when this replica may be older than the read allows.

        That a leader was heard of lately says nothing of how far this replica has applied; its age does. A leader's
        answers have none: it serves them as it serves linearizable ones.
        """
        age_us: int | None = 0
        if not replica.leads:
            age_us = replica.age_us(self._clock.monotonic_ns())
            if age_us is None:
                raise NotLeader("this replica does not know how old its state is", hint=replica.not_leader().hint)
            if age_us_max is not None and age_us > age_us_max != UNSTATED:
                raise NotLeader(
                    f"this replica may be {age_us} µs old, the read allows {age_us_max}", hint=replica.not_leader().hint
                )
        if age_us_max == UNSTATED:
            return serve
        return lambda replica: [age_us, serve(replica)]
