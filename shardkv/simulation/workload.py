"""What clients do during a run, and what becomes of every call: real clients, drawn calls, checkers that hear answers.

Keys come in generations, so that a run of any length has histories that a search can judge: each generation is written
for a while, then only read. There are four families of keys: *registers* take every operation and are judged for
linearizability; *counters* are only incremented, *ledgers* only put, and both are judged as each answer comes, stale
reads of ledgers by the age that they state; *bulk* keys are put many at a time, and judged as registers that are read
by scans. The rule: what a client was told is what is judged; nothing is asked of a node.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import trio

from shardkv.errors import (
    BatchError,
    NotAnInteger,
    OutcomeUnknown,
    OutOfSpace,
    Unavailable,
    VersionMismatch,
)
from shardkv.simulation import determinism, errands
from shardkv.simulation.checkers.acknowledged import NoWriteLost
from shardkv.simulation.checkers.counters import ExactlyOnce
from shardkv.simulation.checkers.linearizability import Operation, Outcome
from shardkv.simulation.checkers.registers import Registers
from shardkv.simulation.checkers.staleness import NoOlderThanSaid
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.cluster import Cluster
from shardkv_client import Client

CLIENTS: Final = 6
READERS: Final = 2
"""Of the clients. They never wait for a write that goes nowhere, so they see what a leader that is cut off answers."""
CALL_SECONDS: Final = 3.0
PAGE_SECONDS: Final = CALL_SECONDS / 4
"""For each page of a scan."""
ERRAND_SECONDS: Final = 40.0
"""More than the timeouts of an errand's calls come to, one after the other: past it one of them hangs."""
LATE_SECONDS: Final = 0.6
"""What a call may take beyond its timeout, clocks that drift included."""
HASTY_SHARE: Final = 0.04
"""Of the calls that clients work with. Their callers give up after this long, most of them while the call is out:"""
HASTY_SECONDS: Final = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.5)
BURST_MAX: Final = 5
"""Calls that a client makes together,"""
APART_SECONDS: Final = (0.0, 0.001, 0.01, 0.1)
"""each so long after the first."""
LINGERING_SHARE: Final = 0.04
"""Of the pauses between a client's calls. After one the client turns to the leaders that it knew before it:"""
LINGERING_SECONDS_MAX: Final = 2.5
GENERATION_SECONDS: Final = 20.0
REGISTERS, COUNTERS, LEDGERS, BULK = 6, 2, 4, 24
"""Keys of each family in a generation."""
SETTLED_SECONDS: Final = 2 * CALL_SECONDS + LATE_SECONDS
"""After this no call that could touch a generation's registers is under way."""

WORKLOADS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "mixed": {
            "get": 4, "near-get": 2, "put": 4, "delete": 1, "cas": 2, "increment": 4, "count": 1,
            "ledger-put": 3, "ledger-get": 2, "stale": 2, "scan": 1, "bulk": 1, "many": 1, "burst": 1,
            "errand": 2,
        },
        "errands": {"errand": 8, "put": 2, "get": 2, "increment": 1},
        "counters": {"increment": 8, "count": 2, "burst": 1},
        "registers": {"get": 5, "near-get": 3, "put": 4, "delete": 2, "cas": 3, "burst": 1},
        "ledger": {"ledger-put": 6, "ledger-get": 4, "scan": 1, "bulk": 1, "many": 1, "burst": 1},
        "stale": {"stale": 8, "ledger-put": 4, "ledger-get": 1},
        "bulk": {"bulk": 4, "ledger-put": 2, "many": 2, "scan": 1, "get": 1, "put": 1},
    }
)  # fmt: skip
"""How often each kind of call is drawn, by the workload's name."""
READS: Final = frozenset({"get", "near-get", "count", "ledger-get", "stale", "scan", "many"})
SINGLY: Final = frozenset({"scan", "errand", "burst"})
"""What is no part of a burst: a scan takes long, and an errand is many calls."""
AGES_MAX: Final = (None, 0.15, 0.3, 1.0, 5.0)
"""How old stale reads may be; followers are at least a heartbeat interval old, and within the first hardly ever."""

_patience: ContextVar[float | None] = ContextVar("patience", default=None)
"""How long a task waits for each call that it makes; None: as long as the call may take."""
_turn: ContextVar[int | None] = ContextVar("turn", default=None)
"""Of the calls that a task makes together with others of the same client; None: it makes them one after the other."""


class Workload:
    """The clients of one run.

    Args:
        rate: calls per second of all clients together, as far as answers come in time.
    """

    def __init__(self, cluster: Cluster, seed: int | str, name: str, rate: float) -> None:
        self.cluster = cluster
        self.registers = Registers()
        self.counters = ExactlyOnce()
        self.ledger = NoWriteLost()
        self.staleness = NoOlderThanSaid()
        self.calls = self.answered = self.unknown = self.refused = 0
        self.stopped = False
        self._seed = seed
        weights = WORKLOADS[name]
        self._weights = weights
        self._pause_seconds = CLIENTS / rate
        self._began = cluster.now
        self._hot = determinism.seeded_random("workload", seed).choice([0.0, 0.3, 0.8])
        """How much of what is done to registers is done to a single one."""

    @property
    def generation(self) -> int:
        return int((self.cluster.now - self._began) / GENERATION_SECONDS)

    def keys(self, family: str, count: int, generation: int) -> list[bytes]:
        """Spread over the whole key space, so that splits come between them."""
        return [b"%c%s-%03d-%02d" % (97 + number * 26 // count, family.encode(), generation, number)
                for number in range(count)]  # fmt: skip

    def register(self, chance: determinism.SeededRandom) -> bytes:
        keys = self.keys("r", REGISTERS, self.generation)
        return keys[0] if chance.random() < self._hot else chance.choice(keys)

    def some_key(self, chance: determinism.SeededRandom) -> bytes:
        """A key that is in use now, or what it begins with: a split there takes the key to the right once more."""
        now = self.generation
        keys = self.keys("r", REGISTERS, now) + self.keys("c", COUNTERS, now) * 2 + self.keys("l", LEDGERS, now)
        key = chance.choice(keys)
        return key[: chance.randint(1, len(key))]

    # Clients

    async def work(self, number: int) -> None:
        """One client, until the workload is stopped."""
        chance = determinism.seeded_random("client", self._seed, number)
        weights = {kind: often for kind, often in self._weights.items() if number >= READERS or kind in READS}
        kinds, often = list(weights), list(weights.values())
        together = {kind: often for kind, often in weights.items() if kind not in SINGLY}
        async with self.cluster.client() as kv:
            while not self.stopped:
                kind = chance.choices(kinds, often)[0]
                calls = 1
                if kind == "burst":
                    calls = chance.randint(2, BURST_MAX)
                    await self._burst(kv, chance, chance.choices([*together], [*together.values()], k=calls))
                else:
                    await self._one(kv, chance, kind)
                _check(kv)
                pause = calls * chance.expovariate(1 / self._pause_seconds)
                if chance.random() < LINGERING_SHARE:
                    pause += chance.uniform(0, LINGERING_SECONDS_MAX)
                await determinism.sleep(pause)

    async def _one(self, kv: Client, chance: determinism.SeededRandom, kind: str) -> None:
        """A call, or what belongs together; some callers do not wait for it to end."""
        hasty = chance.random() < HASTY_SHARE
        token = _patience.set(chance.choice(HASTY_SECONDS) if hasty else None)
        try:
            await getattr(self, "_" + kind.replace("-", "_"))(kv, chance)
        finally:
            _patience.reset(token)

    async def _burst(self, kv: Client, chance: determinism.SeededRandom, kinds: list[str]) -> None:
        """Several calls of one client at the same time."""

        async def later(kind: str) -> None:
            await determinism.sleep(chance.choice(APART_SECONDS))
            await self._one(kv, chance, kind)

        token = _turn.set(self.calls)
        try:
            async with trio.open_nursery() as nursery:
                for kind in kinds:
                    nursery.start_soon(later, kind)
        finally:
            _turn.reset(token)

    @property
    def turn(self) -> int:
        """A number that grows from call to call of a client, but is one for those that it makes together."""
        turn = _turn.get()
        return self.calls if turn is None else turn

    async def call(self, what: str, key: object, call: Awaitable[Any]) -> tuple[str, Any]:
        """What became of a call: ``("ok" | "mismatch" | "unknown" | "refused", …)``."""
        self.calls += 1
        trace = self.cluster.trace
        began = self.cluster.now
        how, result = "late", None
        patience = _patience.get()
        with determinism.deadline_after(CALL_SECONDS + LATE_SECONDS if patience is None else patience):
            try:
                how, result = "ok", await call
            except VersionMismatch as error:
                how, result = "mismatch", error.current
            except (Unavailable, OutOfSpace, NotAnInteger):
                how = "refused"
            except OutcomeUnknown:
                how = "unknown"
            except BatchError as error:
                how, result = "batch", error
        if how == "late" and patience is not None and self.cluster.now - began <= patience + LATE_SECONDS:
            how = "unknown"
        if how == "late":
            raise Violation("every-call-ends", f"{what} {key!r} has no answer {self.cluster.now - began:.2f} s later")
        self.answered += how in ("ok", "mismatch")
        self.unknown += how == "unknown"
        self.refused += how == "refused"
        if trace is not None:
            trace.record("call", what, key, how, _traced(result))
        return how, result

    # Registers

    async def _register(self, kv: Client, chance: determinism.SeededRandom, operation: Operation) -> None:
        key = self.register(chance)
        await self.register_call(kv, key, operation, chance.random() < 0.5)

    async def register_call(self, kv: Client, key: bytes, operation: Operation, near: bool = False) -> bool:
        """Make a call of a register and remember it; whether it was answered."""
        history = self.registers.history(key)
        operation.key = key
        operation.called = self.cluster.now
        how, result = await self.call(operation.kind, key, _perform(kv, key, operation, near))
        if how == "refused" or (how == "unknown" and operation.kind == "get"):
            return False
        if how == "mismatch":
            operation.outcome = Outcome(mismatch=result)
        elif how == "ok":
            if operation.kind == "get" and result is not None:
                result = (result.value, result.version)
            operation.outcome = Outcome(result)
        if how != "unknown":
            operation.returned = self.cluster.now
        history.append(operation)
        return how != "unknown"

    def _value(self, chance: determinism.SeededRandom) -> bytes:
        return b"%d " % self.calls + bytes(chance.randrange(400))

    async def _get(self, kv: Client, chance: determinism.SeededRandom) -> None:
        key = self.register(chance)
        await self.register_call(kv, key, Operation("get"))

    async def _near_get(self, kv: Client, chance: determinism.SeededRandom) -> None:
        key = self.register(chance)
        await self.register_call(kv, key, Operation("get"), near=True)

    async def _put(self, kv: Client, chance: determinism.SeededRandom) -> None:
        await self._register(kv, chance, Operation("put", self._value(chance)))

    async def _delete(self, kv: Client, chance: determinism.SeededRandom) -> None:
        """Of a key, of a version of it that may be over, or of a span that holds no other."""
        key = self.register(chance)
        operations = (
            Operation("delete"),
            Operation("delete", None, self._version(key, chance)),
            Operation("delete-range"),
        )
        await self.register_call(kv, key, chance.choice(operations))

    async def _cas(self, kv: Client, chance: determinism.SeededRandom) -> None:
        key = self.register(chance)
        version = self._version(key, chance)
        await self.register_call(kv, key, Operation("put", self._value(chance), version))

    def _version(self, key: bytes, chance: determinism.SeededRandom) -> int:
        """One that a register has had lately; 0 is an absent key's."""
        return chance.choice([0, *self.registers.versions(key)])

    def judge(self, *, everything: bool = False) -> None:
        """Have every register and bulk key judged whose generation is over."""
        now = self.generation
        settled = (self.cluster.now - self._began) % GENERATION_SECONDS > SETTLED_SECONDS

        def over(key: bytes) -> bool:
            generation = int(key.split(b"-")[1])
            return everything or generation < now - 1 or (generation < now and settled)

        self.registers.judge(over)

    # Counters

    async def _increment(self, kv: Client, chance: determinism.SeededRandom) -> None:
        await self.increment(kv, chance.choice(self.keys("c", COUNTERS, self.generation)))

    async def increment(self, kv: Client, key: bytes) -> bool:
        ticket = self.counters.called(key)
        how, total = await self.call("increment", key, kv.increment(key, timeout=CALL_SECONDS))
        if how == "ok":
            self.counters.answered(key, ticket, total)
        elif how == "refused":
            self.counters.refused(key, ticket)
        else:
            self.counters.unknown(key, ticket)
        return how == "ok"

    async def _count(self, kv: Client, chance: determinism.SeededRandom) -> None:
        generation = chance.randint(max(0, self.generation - 2), self.generation)
        await self.count(kv, chance.choice(self.keys("c", COUNTERS, generation)))

    async def count(self, kv: Client, key: bytes) -> bool:
        floor = self.counters.floor(key)
        how, entry = await self.call("count", key, kv.get(key, timeout=CALL_SECONDS))
        if how == "ok":
            self.counters.saw_total(key, int(entry.value) if entry is not None else 0, floor)
        return how == "ok"

    # Ledgers, and many keys at once

    async def _ledger_put(self, kv: Client, chance: determinism.SeededRandom) -> None:
        await self.ledger_put(kv, chance.choice(self.keys("l", LEDGERS, self.generation)), self._value(chance))

    async def ledger_put(self, kv: Client, key: bytes, value: bytes) -> bool:
        floor, turn = self.ledger.floor(key), self.turn
        self.ledger.called(key, value)
        how, version = await self.call("ledger-put", key, kv.put(key, value, timeout=CALL_SECONDS))
        if how == "ok":
            self.ledger.acknowledged(key, version, value, floor, kv, turn)
            self.staleness.known(key, version, self.cluster.now)
        elif how == "unknown":
            self.ledger.unknown(key, value, kv, turn)
        return how == "ok"

    async def _ledger_get(self, kv: Client, chance: determinism.SeededRandom) -> None:
        generation = chance.randint(max(0, self.generation - 3), self.generation)
        key = chance.choice(self.keys("l", LEDGERS, generation))
        await self.ledger_get(kv, key, near=chance.random() < 0.3)

    async def ledger_get(self, kv: Client, key: bytes, *, near: bool = False) -> bool:
        floor = self.ledger.floor(key)
        consistency = "follower" if near else "linearizable"
        how, entry = await self.call("ledger-get", key, kv.get(key, consistency=consistency, timeout=CALL_SECONDS))
        if how == "ok":
            self._seen(key, entry, floor)
        return how == "ok"

    def _seen(self, key: bytes, entry: Any, floor: int) -> None:
        version = entry.version if entry is not None else 0
        self.ledger.read(key, version, entry.value if entry is not None else None, floor)
        self.staleness.known(key, version, self.cluster.now)

    async def _stale(self, kv: Client, chance: determinism.SeededRandom) -> None:
        """A stale read of one ledger or of a generation's, by key or by scan."""
        keys = self.keys("l", LEDGERS, chance.randint(max(0, self.generation - 1), self.generation))
        if chance.random() < 0.6:
            keys = [chance.choice(keys)]
        await self.stale(kv, keys, chance.choice(AGES_MAX), scan=chance.random() < 0.2)

    async def stale(self, kv: Client, keys: list[bytes], age_max: float | None, *, scan: bool) -> bool:
        ages: list[float] = []
        options: dict[str, Any] = {"consistency": "stale", "max_age": age_max}

        async def walk(page: Callable[[float], object]) -> dict[bytes, Any]:
            found: dict[bytes, Any] = {}
            for key in keys:
                # The largest age holds for every page, counted from before the first.
                async with kv.scan(prefix=key, on_age=page, timeout=PAGE_SECONDS, **options) as entries:
                    found |= {entry.key: entry async for entry in entries}
            return found

        async def collect() -> dict[bytes, Any]:
            if len(keys) > 1:
                return await kv.get_many(keys, on_age=ages.append, timeout=CALL_SECONDS, **options)
            return {key: await kv.get(key, on_age=ages.append, timeout=CALL_SECONDS, **options) for key in keys}

        called = self.cluster.now
        how, found = await self.call("stale", len(keys), self._paged(walk, ages) if scan else collect())
        if how != "ok":
            return False
        for key in keys:
            entry = found.get(key)
            version = entry.version if entry is not None else 0
            self.staleness.answered(key, version, called, max(ages), age_max, self.cluster.now)
            self.ledger.read(key, version, entry.value if entry is not None else None, 0)
        return True

    async def _bulk(self, kv: Client, chance: determinism.SeededRandom) -> None:
        """Each pair is a put of its key, at a moment of the call; of one that fails it says which puts are in doubt."""
        pairs = {
            key: self._value(chance)
            for key in chance.sample(self.keys("b", BULK, self.generation), chance.randint(1, BULK))
        }
        called = self.cluster.now
        how, result = await self.call("bulk", len(pairs), kv.put_many(pairs, timeout=CALL_SECONDS))
        if how == "ok" and result != len(pairs):
            raise Violation("no-write-lost", f"put_many of {len(pairs)} pairs says that it wrote {result}")
        doubtful = {*result.failed} if how == "batch" else () if how == "ok" else pairs
        consumed = result.consumed if how == "batch" else len(pairs)
        for key in list(pairs)[:consumed]:
            operation = Operation("put", pairs[key], key=key, called=called)
            if key not in doubtful:
                operation.outcome, operation.returned = Outcome(), self.cluster.now
            self.registers.put_in_bulk(key, operation)

    async def _many(self, kv: Client, chance: determinism.SeededRandom) -> None:
        generation = chance.randint(max(0, self.generation - 1), self.generation)
        keys = self.keys("l", LEDGERS, generation)
        floors = {key: self.ledger.floor(key) for key in keys}
        consistency = "follower" if chance.random() < 0.3 else "linearizable"
        call = kv.get_many(keys, consistency=consistency, timeout=CALL_SECONDS)
        how, found = await self.call("many", len(keys), call)
        if how == "ok":
            for key in keys:
                self._seen(key, found.get(key), floors[key])

    async def _scan(self, kv: Client, chance: determinism.SeededRandom) -> None:
        limit = chance.choice([None, 7, 50])
        await self.scan(kv, limit, reverse=chance.random() < 0.3, near=chance.random() < 0.3)

    async def scan(self, kv: Client, limit: int | None, *, reverse: bool = False, near: bool = False) -> bool:
        """Strict order, nothing twice, no more than was asked for, every ledger key that was acknowledged before it
        began, what was counted by then, and registers and bulk keys as they can be at a moment of the scan; of
        followers no less than of leaders."""
        called = self.cluster.now
        floors = {key: self.ledger.floor(key) for key in self.ledger.keys}
        counted = {key: self.counters.floor(key) for key in self.counters.keys}
        judged = list(self.registers.lasting)

        async def walk(page: Callable[[float], object]) -> list[Any]:
            found = []
            consistency = "follower" if near else "linearizable"
            async with kv.scan(
                limit=limit, reverse=reverse, consistency=consistency, on_age=page, timeout=PAGE_SECONDS
            ) as entries:
                async for entry in entries:
                    found.append(entry)
            return found

        how, entries = await self.call("scan", limit, self._paged(walk, []))
        if how != "ok":
            return False
        keys = [entry.key for entry in entries]
        if any(one >= two for one, two in pairwise(keys[::-1] if reverse else keys)):
            raise Violation("scan-order", f"a scan in {'reverse' if reverse else 'order'} gave {keys}")
        if limit is not None and len(keys) > limit:
            raise Violation("scan-order", f"a scan of {limit} keys at most gave {len(keys)}")
        whole = limit is None or len(keys) < limit

        def covered(key: bytes) -> bool:
            return whole or (key >= keys[-1] if reverse else key <= keys[-1])

        found = {entry.key: entry for entry in entries}
        for key, floor in floors.items():
            if covered(key):
                self._seen(key, found.get(key), floor)
        for key, floor in counted.items():
            if covered(key):
                self.counters.saw_total(key, int(found[key].value) if key in found else 0, floor)
        self.registers.scanned(found, covered, judged, called, self.cluster.now)
        return True

    async def _errand(self, kv: Client, chance: determinism.SeededRandom) -> None:
        self.calls += 1
        began = self.cluster.now
        with determinism.deadline_after(ERRAND_SECONDS):
            await errands.run(self.cluster, kv, chance, self.generation)
        if self.cluster.now - began >= ERRAND_SECONDS:
            raise Violation("every-call-ends", f"an errand took {self.cluster.now - began:.2f} s")

    async def _paged(self, walk: Callable[[Callable[[float], object]], Awaitable[Any]], ages: list[float]) -> Any:
        """A scan's timeout is for each page, of which ``walk`` tells the ages; here it is given up as a whole like any
        other call, and may be in the middle of a page then, but not of one that is late."""
        answered = self.cluster.now

        def page(age: float) -> None:
            nonlocal answered
            answered = self.cluster.now
            ages.append(age)

        with determinism.deadline_after(CALL_SECONDS):
            return await walk(page)
        silent = self.cluster.now - answered
        if silent > PAGE_SECONDS + LATE_SECONDS:
            raise Violation("every-call-ends", f"the next page of a scan has not come {silent:.2f} s later")
        raise Unavailable("the scan took too long")


def _check(kv: Client) -> None:
    """Every invariant of a client that is in use."""
    if kv._host is not None and not kv._host.core.closed:
        kv._host.core.check()


def _traced(result: object) -> int:
    """What a trace holds of an answer: a number, or how much it is."""
    if isinstance(result, int):
        return result
    return len(result) if isinstance(result, (bytes, tuple, list, dict)) else 0


async def _perform(kv: Client, key: bytes, operation: Operation, near: bool) -> Any:
    match operation.kind:
        case "get":
            return await kv.get(key, consistency="follower" if near else "linearizable", timeout=CALL_SECONDS)
        case "delete":
            return await kv.delete(key, if_version=operation.if_version, timeout=CALL_SECONDS)
        case "delete-range":
            return await kv.delete_range(key, key + b"\0", timeout=CALL_SECONDS)
        case _:
            return await kv.put(key, operation.argument, if_version=operation.if_version, timeout=CALL_SECONDS)
