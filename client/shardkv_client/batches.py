"""Batches: many keys in one call. They are sent as single commands and gets; the core packs them together.

``put_many`` promises that the last pair of a key wins. Commands that are out at once may be applied in any order, so a
key is never out twice: pairs of one chunk replace each other, and a key that is still out is waited for.
"""

from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, Final

from trio.lowlevel import enable_ki_protection

from shardkv.errors import BatchError, OutcomeUnknown, Unavailable
from shardkv.wire.commands import Op, pack_put
from shardkv_client.core import Call, Core, WriteCall
from shardkv_client.core.links import describe
from shardkv_client.limits import TEXT_LIKE, check_function, check_pair
from shardkv_client.waiter import Waiter

Pairs = Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] | AsyncIterable[tuple[bytes, bytes]]
Progress = Callable[[int], object]

CHUNK_PAIRS_MAX: Final = 256
"""Of a get_many, keys."""
CHUNK_BYTES_MAX: Final = 1024 * 1024
"""A chunk is sent once it holds this much; its last pair may take it past by its own size."""
CHUNKS_OUT_MAX: Final = 3
"""With the chunk that is being filled, as many commands as a session's window holds."""

SLOW_INPUT_SECONDS: Final = 0.1
"""An iterable that takes so long for a chunk is read on only when nothing is out: meanwhile the loop stands still, so
nothing is sent and no answer is heard."""


class Gathering:
    """Waits for a group of calls as if it were one: what a caller is parked on while they are out.

    Whoever interrupts a program does so between two calls, not half way into one.
    """

    def __init__(self, core: Core, waiter: Waiter) -> None:
        self._core = core
        self._waiter = waiter
        self._parked: Call | None = None
        self._room = 0
        self._room_bytes = 0.0
        self.out: dict[Call, None] = {}
        self.bytes_out: int = 0
        """Of the calls in ``out``."""
        self.ended: list[Any] = []
        """Calls that ended since the caller last looked."""

    @enable_ki_protection
    def submit(self, call: Call) -> None:
        call.notify = self._end
        self._core.submit(call)
        self.out[call] = None
        self.bytes_out += call.size

    def _end(self, call: Call) -> None:
        if call not in self.out:
            return  # under asyncio an interrupt may come amid its submission
        del self.out[call]
        self.bytes_out -= call.size
        self.ended.append(call)
        parked = self._parked
        if parked is not None and self._has_room():
            self._parked = None
            self._waiter.notify(parked)

    def put_off(self, seconds: float) -> None:
        """The loop stood still for so long: nobody could have been answered in that time."""
        for call in self.out:
            call.deadline += seconds

    def _has_room(self) -> bool:
        return len(self.out) <= self._room and self.bytes_out <= self._room_bytes

    async def until(self, room: int, room_bytes: float = inf) -> None:
        """Wait until at most ``room`` calls of ``room_bytes`` in all are out. A cancelled caller cancels every call."""
        self._room, self._room_bytes = room, room_bytes
        if self._has_room():
            return
        parked = self._parked = Call(None, 0.0, 0)
        await self._waiter.wait(parked, self._cancel)

    def _cancel(self, _: Call) -> None:
        self._parked = None
        self.abandon()

    def abandon(self) -> None:
        """Nobody waits for these calls any more."""
        for call in list(self.out):
            self._core.cancel(call)
        self.out.clear()
        self.bytes_out = 0


async def get_many(gathering: Gathering, calls: Sequence[Call]) -> None:
    """Wait for all of ``calls``. Once one has failed the rest are not begun; its error is raised when all have ended.

    A few chunks are out at a time: other calls of the client find places between them.
    """
    try:
        for first in range(0, len(calls), CHUNK_PAIRS_MAX):
            await gathering.until((CHUNKS_OUT_MAX - 1) * CHUNK_PAIRS_MAX)
            ended, gathering.ended = gathering.ended, []
            if any(call.error is not None for call in ended):
                break
            for call in calls[first : first + CHUNK_PAIRS_MAX]:
                gathering.submit(call)
    except BaseException:
        gathering.abandon()
        raise
    await gathering.until(0)
    for call in calls:
        if call.error is not None:
            raise call.error


class PutMany:
    """One ``put_many``: takes pairs, sends chunks, keeps the books that a BatchError needs.

    :meth:`run` does it all. Whoever reads the pairs in another thread adds and sends a chunk at a time instead, and
    calls :meth:`end`; only what awaits must run in the client's loop, and one at a time.
    """

    def __init__(
        self, core: Core, waiter: Waiter, now: Callable[[], float], timeout: float, progress: Progress | None = None
    ) -> None:
        self._gathering = Gathering(core, waiter)
        self._now = now
        self._timeout = timeout
        self._progress = progress
        self._chunk: dict[bytes, bytes] = {}
        """The pairs that the next chunk consists of, the last of each key."""
        self._chunk_bytes = 0
        self._chunk_pairs: Counter[bytes] = Counter()
        """How many pairs each of its keys stands for."""
        self._out: dict[bytes, int] = {}
        """Keys that are out, and how many pairs each stands for."""
        self._failed: dict[bytes, None] = {}
        """Consumed keys that are not known to be written; a dict, for its order."""
        self._problem: Exception | None = None
        self.written: int = 0
        self.consumed: int = 0

    async def run(self, pairs: Pairs) -> int:
        """The count of pairs, all of them written. Raises as :meth:`end`."""
        problem = None
        began = inf
        try:
            if isinstance(pairs, AsyncIterable):
                async for pair in pairs:
                    self.add(pair)
                    if self.chunk_is_full and not await self.send():
                        break
            else:
                began = self._now()
                for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
                    self.add(pair)
                    if self.chunk_is_full:
                        spent = self._now() - began
                        slow = spent >= SLOW_INPUT_SECONDS
                        self._gathering.put_off(spent)
                        if not await self.send():
                            break
                        if slow:
                            await self._gathering.until(0)
                        began = self._now()
                else:
                    self._gathering.put_off(self._now() - began)
        except Exception as error:  # noqa: BLE001 - the caller's input may raise anything
            problem = error
            self._gathering.put_off(max(0.0, self._now() - began))
        except BaseException:
            self.abandon()
            raise
        return await self.end(problem)

    def add(self, pair: tuple[bytes, bytes]) -> None:
        """Take one pair. Raises TypeError or RequestError for one that is wrong, which then is not consumed."""
        key, value = checked_pair(pair)
        self.consumed += 1
        self._chunk[key] = value
        self._chunk_pairs[key] += 1
        self._chunk_bytes += len(key) + len(value)

    @property
    def chunk_is_full(self) -> bool:
        return len(self._chunk) >= CHUNK_PAIRS_MAX or self._chunk_bytes >= CHUNK_BYTES_MAX

    async def send(self) -> bool:
        """Send the chunk, as soon as few enough are out; whether all is well so far."""
        chunk, gathering = self._chunk, self._gathering
        await gathering.until(CHUNKS_OUT_MAX * CHUNK_PAIRS_MAX, CHUNKS_OUT_MAX * CHUNK_BYTES_MAX)
        self._collect()
        if any(key in self._out for key in chunk):
            await gathering.until(0)
            self._collect()
        if self._problem is not None:
            return False
        self._out.update(self._chunk_pairs)
        deadline = self._now() + self._timeout
        for key, value in chunk.items():
            # From here on the key is out: were the submission to fail, it would count as not written.
            self._failed[key] = None
            gathering.submit(WriteCall(Op.PUT, key, pack_put(key, value), deadline))
        self._chunk = {}
        self._chunk_pairs = Counter()
        self._chunk_bytes = 0
        return True

    async def finish(self, problem: Exception | None = None) -> None:
        """Send what is left, unless there is a problem, and wait for all that is out."""
        self._problem = self._problem or problem
        if self._chunk and self._problem is None:
            await self.send()
        await self._gathering.until(0)
        self._collect()

    async def end(self, problem: Exception | None = None) -> int:
        """The count of pairs, all of them written. ``problem``: what the input or the progress callback raised.

        Raises:
            BatchError: not all of them are, or there was a problem.
            Exception: the problem, if no pair had been consumed.
        """
        await self.finish(problem)
        return self.outcome(problem)

    def outcome(self, problem: Exception | None = None) -> int:
        """What :meth:`end` comes to, by what is known now. Raises as it does."""
        if problem is not None and not self.consumed:
            raise problem
        self._problem = self._problem or problem
        if self._problem is None:
            return self.consumed
        self._failed.update(dict.fromkeys(self._chunk))
        raise BatchError(
            f"put_many stopped: {describe(self._problem)}; {len(self._failed)} keys of the {self.consumed} pairs "
            "consumed are not known to be written: put those again, then go on after the pairs consumed",
            consumed=self.consumed,
            failed=tuple(self._failed),
        ) from self._problem

    def abandon(self) -> None:
        """Nobody waits any more."""
        self._gathering.abandon()

    def _collect(self) -> None:
        """Book what has ended."""
        ended, self._gathering.ended = self._gathering.ended, []
        written = self.written
        for call in ended:
            pairs = self._out.pop(call.key)
            if call.error is None:
                del self._failed[call.key]
                self.written += pairs
            elif self._problem is None or (
                isinstance(self._problem, Unavailable) and isinstance(call.error, OutcomeUnknown)
            ):
                self._problem = call.error  # of one that nobody took it is sure that it was not applied
        if self._progress is not None and self.written > written:
            try:
                self._progress(self.written)
            except Exception as error:  # noqa: BLE001 - the caller's function may raise anything
                self._problem = self._problem or error


def checked_pair(pair: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    try:
        key, value = pair
    except (TypeError, ValueError):
        raise TypeError(f"put_many takes pairs of a key and a value, not {pair!r:.60}") from None
    check_pair(key, value)
    return key, value


def read_chunk(source: Iterator[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], Exception | None]:
    """As many pairs as a chunk holds, none at the end, and what kept it from reading more, if anything did."""
    chunk: list[tuple[bytes, bytes]] = []
    size = 0
    try:
        for given in source:
            pair = checked_pair(given)
            chunk.append(pair)
            size += len(pair[0]) + len(pair[1])
            if len(chunk) >= CHUNK_PAIRS_MAX or size >= CHUNK_BYTES_MAX:
                break
    except Exception as error:  # noqa: BLE001 - the caller's input may raise anything
        return chunk, error
    return chunk, None


def check_pairs(pairs: Pairs, progress: Progress | None) -> None:
    """Check input that can be looked at more than once as a whole, so that nothing is sent if any of it is wrong."""
    check_function("progress", progress)
    if isinstance(pairs, Mapping):
        for pair in pairs.items():
            checked_pair(pair)
    elif isinstance(pairs, (list, tuple)):
        for pair in pairs:
            checked_pair(pair)
    elif isinstance(pairs, TEXT_LIKE) or not isinstance(pairs, (Iterable, AsyncIterable)):
        raise TypeError(f"put_many takes a mapping or an iterable of pairs, not {type(pairs).__name__}")
