"""A running workload on a few keys whose history is judged as it goes, for faults that come while it runs.

Lives here: the client tasks, what they saw, and the checks; when faults come, not which. The rule: the keys change
every few hundred operations, so that each key's history is short enough for the checker; a round's keys are read once
more when nothing of it is in flight, judged, and read again at the very end, so that a loss that comes later is seen.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import trio

from shardkv.errors import BatchError, OutcomeUnknown, Unavailable, VersionMismatch
from shardkv.simulation.checkers.failing_window import explain_result
from shardkv.simulation.checkers.linearizability import REGISTER, Operation, Outcome, Verdict, check
from shardkv_client.client import Client
from tests.cluster.harness import SECONDS_MAX, settled

CALL_SECONDS: Final = 4.0
"""What one call may take; past it a write's outcome is unknown."""
LATE_SECONDS: Final = SECONDS_MAX
"""A call that has not returned by then, many times its timeout, hangs; the machine may be slow and busy."""
PROGRESS_SECONDS: Final = SECONDS_MAX
"""How long the workload may stand still with every node up before the run fails."""
ROUND_OPERATIONS: Final = 240
"""Of all keys together; then the next round begins."""
RECENT: Final = 12
SEVERAL_SHARE: Final = 0.1
"""Of the calls those that are of several keys at once."""
HASTY_SHARE: Final = 0.04
HASTY_SECONDS_MAX: Final = 0.02
"""Some callers wait no longer."""
HUNT_SECONDS: Final = 0.03
VALUE_BYTES_MAX: Final = 6_000
PREFIXES: Final = (b"a", b"f", b"k", b"p", b"u", b"z")
"""One key each in every round; the last of them counts, so that increments are seen, too."""
NUMERIC: Final = frozenset({b"f", b"z"})


class Faults(Protocol):
    """What is done to the cluster meanwhile, and how much of it has been done."""

    count: int
    seed: int
    done: int

    def describe(self) -> str: ...


@dataclass(slots=True)
class Round:
    """A set of keys and all that was done to them."""

    number: int
    histories: dict[bytes, list[Operation]]
    started: int = 0
    in_flight: int = 0
    last: dict[bytes, tuple[bytes, int] | None] = field(default_factory=dict)
    """What was read of each key when nothing was in flight any more."""


class Workload:
    """Runs until :attr:`stopped` is set. The counts are what a report shows.

    ``clients`` are used in turn by ``tasks`` tasks. Any error that a client must not see ends the run with it.
    """

    def __init__(self, seed: int, clients: Sequence[Client], *, tasks: int = 8, pause_seconds: float = 0.04) -> None:
        self.stopped = False
        self.answered = 0
        self.unknown = 0
        """Writes whose outcome nobody can tell."""
        self.unavailable = 0
        """Reads that timed out, and writes that were never sent."""
        self.rounds: list[Round] = []
        self.judged = 0
        """Keys whose history was judged."""
        self._clients = clients
        self._tasks = tasks
        self._pause_seconds = pause_seconds
        self._seed = seed
        self._next_round()

    @property
    def operations(self) -> int:
        return self.answered + self.unknown + self.unavailable

    def key(self, chance: random.Random) -> bytes:
        """A key that is in use."""
        return chance.choice(list(self.rounds[-1].histories))

    async def run(self) -> None:
        """Work until stopped; then the rounds still open are judged."""
        async with trio.open_nursery() as nursery:
            for number in range(self._tasks):
                nursery.start_soon(self._work, number)
            closed = 0
            while not self.stopped:
                while closed < len(self.rounds) - 1 and not self.rounds[closed].in_flight:
                    await self._close(self.rounds[closed])
                    closed += 1
                await trio.sleep(0.05)
        for each in self.rounds[closed:]:
            await self._close(each)

    async def more_than(self, count: int, seconds: float) -> None:
        """Wait until more operations were answered than ``count``; fails after ``seconds``."""
        with trio.move_on_after(seconds):
            while self.answered <= count:  # noqa: ASYNC110  the workload sets no event for each of its calls
                await trio.sleep(0.02)
        assert self.answered > count, f"only {self.answered} operations were answered after {seconds:g} s more"

    async def run_under(
        self, faults: Faults, strike: Callable[[random.Random], Awaitable[None]], kv: Client, *, show: bool = False
    ) -> None:
        """Run while ``strike`` does its harm so often, and goes on after each; then judge everything once more.

        ``strike`` counts in ``faults.done`` what it has done, and leaves every node up.
        """
        chance = random.Random(f"{type(faults).__name__.lower()} {faults.seed}")
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            await self.more_than(50, PROGRESS_SECONDS)
            while faults.done < faults.count:
                before = self.answered
                await strike(chance)
                await self.more_than(before + 20, PROGRESS_SECONDS)
                await trio.sleep(chance.uniform(0.0, 1.0))
                if show:
                    passed = trio.current_time() - began
                    print(f"{passed:6.0f} s: {faults.describe()}; {self.describe()}", flush=True)
            await settled(kv)
            await self.more_than(self.answered + 50, PROGRESS_SECONDS)
            self.stopped = True
        await self.judge_all_again()

    async def judge_all_again(self) -> None:
        """Nothing that a client was told may have been lost since: read every key of the run once more."""
        for each in self.rounds:
            for key, history in each.histories.items():
                found = await self._final_read(key)
                if found != each.last[key]:
                    # Only a write whose outcome was unknown may have changed it.
                    self._judge(key, history)

    async def hunt(self, key: bytes, writer: Client, readers: Sequence[Client], over: trio.Event) -> None:
        """Until then: write one key, and read it through clients that may still believe in an older leader."""
        current = self.rounds[int(key.rpartition(b"/")[2])]
        history = current.histories[key]
        current.in_flight += 1

        async def get(kv: Client) -> None:
            await self._record(history, Operation("get"), partial(kv.get, key, timeout=CALL_SECONDS))

        async def read(kv: Client) -> None:
            while not over.is_set():
                await get(kv)
                await trio.sleep(HUNT_SECONDS)

        async def write() -> None:
            while not over.is_set():
                value = b"%d" % (1_000_000 + len(history))
                put = partial(writer.put, key, value, timeout=CALL_SECONDS)
                await self._record(history, Operation("put", value), put)
                for kv in readers:
                    nursery.start_soon(get, kv)
                await trio.sleep(5 * HUNT_SECONDS)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                for kv in readers:
                    nursery.start_soon(read, kv)
        finally:
            current.in_flight -= 1

    # Inside

    def _next_round(self) -> None:
        number = len(self.rounds)
        self.rounds.append(Round(number, {b"%b/%06d" % (prefix, number): [] for prefix in PREFIXES}))

    async def _work(self, number: int) -> None:
        chance = random.Random(f"workload {self._seed} {number}")
        kv = self._clients[number % len(self._clients)]
        while not self.stopped:
            current = self.rounds[-1]
            if current.started >= ROUND_OPERATIONS:
                self._next_round()
                current = self.rounds[-1]
            current.started += 1
            current.in_flight += 1
            try:
                await self._one_call(kv, chance, current)
            finally:
                current.in_flight -= 1
            await trio.sleep(chance.uniform(0, 2 * self._pause_seconds))

    async def _one_call(self, kv: Client, chance: random.Random, current: Round) -> None:
        if chance.random() < SEVERAL_SHARE:
            with trio.fail_after(LATE_SECONDS):
                await chance.choice((self._put_many, self._get_many, self._scan))(kv, chance, current)
            return
        key = chance.choice(list(current.histories))
        history = current.histories[key]
        numeric = key[:1] in NUMERIC
        value = b"%d" % chance.randrange(1000)
        if not numeric:
            value = b"%d " % len(history) + bytes(chance.randrange(VALUE_BYTES_MAX))
        calls: list[tuple[Operation, Callable[[], Awaitable[Any]]]] = [
            (Operation("get"), lambda: kv.get(key, timeout=CALL_SECONDS)),
            (Operation("get"), lambda: kv.get(key, consistency="follower", timeout=CALL_SECONDS)),
            (Operation("put", value), lambda: kv.put(key, value, timeout=CALL_SECONDS)),
        ]
        if numeric:
            calls[2:] = [(Operation("increment", 1), lambda: kv.increment(key, timeout=CALL_SECONDS))] * 2
        else:
            known = [each.outcome.result for each in history[-RECENT:] if each.kind == "put" and each.outcome]
            version = chance.choice([0, *(each for each in known if each)])
            operation = Operation("put", value, version)
            calls.append((operation, lambda: kv.put(key, value, if_version=version, timeout=CALL_SECONDS)))
            calls.append((Operation("delete"), lambda: kv.delete(key, timeout=CALL_SECONDS)))
            span = (key, key + b"\0")
            calls.append((Operation("delete-range"), lambda: kv.delete_range(*span, timeout=CALL_SECONDS)))
        operation, call = chance.choice(calls)
        patience = chance.uniform(0, HASTY_SECONDS_MAX) if chance.random() < HASTY_SHARE else None
        await self._record(history, operation, call, patience)

    async def _put_many(self, kv: Client, chance: random.Random, current: Round) -> None:
        """Each pair is a put of its key; of a call that fails it is known which of them are in doubt."""
        keys = [key for key in current.histories if key[:1] not in NUMERIC]
        pairs = {key: b"%d many" % len(current.histories[key]) for key in chance.sample(keys, chance.randint(1, 3))}
        called, doubtful, consumed = trio.current_time(), frozenset[bytes](), len(pairs)
        try:
            await kv.put_many(pairs, timeout=CALL_SECONDS)
            self.answered += 1
        except BatchError as error:
            doubtful, consumed = frozenset(error.failed), error.consumed
            self.unknown += 1
        for key in list(pairs)[:consumed]:
            operation = Operation("put", pairs[key], called=called)
            if key not in doubtful:
                operation.outcome, operation.returned = Outcome(), trio.current_time()
            current.histories[key].append(operation)

    async def _get_many(self, kv: Client, chance: random.Random, current: Round) -> None:
        called = trio.current_time()
        try:
            found = await kv.get_many(current.histories, timeout=CALL_SECONDS)
        except Unavailable:
            self.unavailable += 1
        else:
            self.answered += 1
            for key in current.histories:
                _note_read(current.histories[key], called, found.get(key))

    async def _scan(self, kv: Client, chance: random.Random, current: Round) -> None:
        """Of a letter's keys, downwards; those of later rounds may come before the one that is looked for."""
        key = chance.choice(list(current.histories))
        called = trio.current_time()
        found = None
        try:
            async with kv.scan(prefix=key[:2], reverse=True, timeout=CALL_SECONDS) as entries:
                async for entry in entries:
                    if entry.key <= key:
                        found = entry if entry.key == key else None
                        break
        except Unavailable:
            self.unavailable += 1
        else:
            self.answered += 1
            _note_read(current.histories[key], called, found)

    async def _record(
        self,
        history: list[Operation],
        operation: Operation,
        call: Callable[[], Awaitable[Any]],
        patience: float | None = None,
    ) -> bool:
        """Make a call, given up after ``patience`` seconds, and remember it; whether it was answered."""
        operation.called = trio.current_time()
        result: Any = None
        with trio.move_on_after(LATE_SECONDS if patience is None else patience) as late:
            try:
                result = await call()
            except VersionMismatch as error:
                operation.outcome = Outcome(mismatch=error.current)
            except Unavailable:
                self.unavailable += 1
                return False
            except OutcomeUnknown:
                self.unknown += 1
                history.append(operation)
                return False
            else:
                if operation.kind == "get" and result is not None:
                    result = (result.value, result.version)
                operation.outcome = Outcome(result)
        if late.cancelled_caught and patience is not None:
            self.unknown += 1
            if operation.kind != "get":
                history.append(operation)
            return False
        assert not late.cancelled_caught, f"{operation} was not answered in {LATE_SECONDS:g} s"
        operation.returned = trio.current_time()
        self.answered += 1
        history.append(operation)
        return True

    async def _close(self, each: Round) -> None:
        for key, history in each.histories.items():
            each.last[key] = await self._final_read(key)
            self._judge(key, history)

    async def _final_read(self, key: bytes) -> tuple[bytes, int] | None:
        """Read a key, however long the cluster is without a quorum, and add that to its history."""
        history = self._history_of(key)
        turn = 0
        while True:
            kv = self._clients[turn % len(self._clients)]
            if await self._record(history, Operation("get"), lambda kv=kv: kv.get(key, timeout=CALL_SECONDS)):  # type: ignore[misc]
                outcome = history[-1].outcome
                assert outcome is not None, "an answered read has an outcome"
                found: tuple[bytes, int] | None = outcome.result
                return found
            turn += 1
            await trio.sleep(0.1)

    def _history_of(self, key: bytes) -> list[Operation]:
        return self.rounds[int(key.rpartition(b"/")[2])].histories[key]

    def _judge(self, key: bytes, history: list[Operation]) -> None:
        self.judged += 1
        result = check(history, REGISTER)
        assert result.verdict is Verdict.LINEARIZABLE, f"{key!r}: {explain_result(result, REGISTER)}"

    def describe(self) -> str:
        return (
            f"{self.operations} operations ({self.unknown} of unknown outcome, {self.unavailable} unavailable) "
            f"on {len(self.rounds) * len(PREFIXES)} keys, {self.judged} histories judged linearizable"
        )


def _note_read(history: list[Operation], called: float, entry: Any) -> None:
    found = (entry.value, entry.version) if entry is not None else None
    history.append(Operation("get", called=called, returned=trio.current_time(), outcome=Outcome(found)))
