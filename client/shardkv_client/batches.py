"""Batches: many keys in one call. They are sent as single commands and gets; the core packs them together.

``put_many`` promises that the last pair of a key wins. Commands that are out at once may be applied in any order, so a
key is never out twice: pairs of one chunk replace each other, and a key that is still out is waited for.
"""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from math import inf
from typing import Any, Final

from trio.lowlevel import enable_ki_protection

from shardkv.errors import BatchError
from shardkv.wire.commands import Op, pack_put
from shardkv_client.core import Call, Core, WriteCall
from shardkv_client.limits import check_key_size, check_key_type, check_value_size, check_value_type
from shardkv_client.waiter import Waiter

Pairs = Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] | AsyncIterable[tuple[bytes, bytes]]
Progress = Callable[[int], object]

CHUNK_PAIRS_MAX: Final = 256
CHUNK_BYTES_MAX: Final = 1024 * 1024
"""A chunk is sent once it holds this much; its last pair may take it past by its own size."""
CHUNKS_OUT_MAX: Final = 3
"""With the chunk that is being filled, as many commands as a session's window holds."""


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
        self.bytes_out = 0
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
        del self.out[call]
        self.bytes_out -= call.size
        self.ended.append(call)
        parked = self._parked
        if parked is not None and self._has_room():
            self._parked = None
            self._waiter.notify(parked)

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
    """Wait for all of ``calls``; the first error is raised once all have ended."""
    try:
        for call in calls:
            gathering.submit(call)
    except BaseException:
        gathering.abandon()
        raise
    await gathering.until(0)
    for call in calls:
        if call.error is not None:
            raise call.error


class PutMany:
    """One ``put_many``: reads pairs, sends chunks, keeps the books that a BatchError needs."""

    def __init__(
        self, core: Core, waiter: Waiter, now: Callable[[], float], timeout: float, progress: Progress | None
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
        self._sending = False
        self._written = 0
        self.consumed = 0

    async def run(self, pairs: Pairs) -> int:
        """The count of pairs, all of them written.

        Raises:
            BatchError: not all of them are.
            Exception: whatever was wrong with the input, if nothing had been sent.
        """
        try:
            await self._consume(pairs)
        except Exception as error:
            if not self._sending:
                raise
            self._problem = self._problem or error
        except BaseException:
            self._gathering.abandon()
            raise
        await self._gathering.until(0)
        self._collect()
        if self._problem is not None:
            self._failed.update(dict.fromkeys(self._chunk))
            raise BatchError(
                f"put_many stopped: {self._problem}; {len(self._failed)} keys of the {self.consumed} pairs consumed "
                "are not known to be written: put those again, then go on after the pairs consumed",
                consumed=self.consumed,
                failed=tuple(self._failed),
            ) from self._problem
        return self.consumed

    async def _consume(self, pairs: Pairs) -> None:
        """Send what the input holds, chunk by chunk, until its end or a problem."""
        async with aclosing(_iterate(pairs)) as source:
            async for pair in source:
                self._add(pair)
                if len(self._chunk) >= CHUNK_PAIRS_MAX or self._chunk_bytes >= CHUNK_BYTES_MAX:
                    await self._send_chunk()
                    if self._problem is not None:
                        return
            await self._send_chunk()

    def _add(self, pair: tuple[bytes, bytes]) -> None:
        key, value = _checked(pair)
        self.consumed += 1
        self._chunk[key] = value
        self._chunk_pairs[key] += 1
        self._chunk_bytes += len(key) + len(value)

    async def _send_chunk(self) -> None:
        chunk, gathering = self._chunk, self._gathering
        if not chunk:
            return
        await gathering.until(CHUNKS_OUT_MAX * CHUNK_PAIRS_MAX, CHUNKS_OUT_MAX * CHUNK_BYTES_MAX)
        self._collect()
        if any(key in self._out for key in chunk):
            await gathering.until(0)
            self._collect()
        if self._problem is not None:
            return
        self._sending = True
        self._out.update(self._chunk_pairs)
        deadline = self._now() + self._timeout
        for key, value in chunk.items():
            # From here on the key is out: were the submission to fail, it would count as not written.
            self._failed[key] = None
            gathering.submit(WriteCall(Op.PUT, key, pack_put(key, value), deadline))
        self._chunk = {}
        self._chunk_pairs = Counter()
        self._chunk_bytes = 0

    def _collect(self) -> None:
        """Book what has ended."""
        ended, self._gathering.ended = self._gathering.ended, []
        written = self._written
        for call in ended:
            pairs = self._out.pop(call.key)
            if call.error is None:
                del self._failed[call.key]
                self._written += pairs
            else:
                self._problem = self._problem or call.error
        if self._progress is not None and self._written > written:
            self._progress(self._written)


def _checked(pair: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    try:
        key, value = pair
    except (TypeError, ValueError):
        raise TypeError(f"put_many takes pairs of a key and a value, not {pair!r:.60}") from None
    check_key_type(key)
    check_value_type(value)
    check_key_size(key)
    check_value_size(value)
    return key, value


async def _iterate(pairs: Pairs) -> AsyncGenerator[tuple[bytes, bytes], None]:
    if isinstance(pairs, AsyncIterable):
        async for pair in pairs:
            yield pair
        return
    for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
        yield pair


def check_pairs(pairs: Pairs) -> None:
    """Check input that can be looked at more than once as a whole, so that nothing is sent if any of it is wrong."""
    if isinstance(pairs, Mapping):
        for pair in pairs.items():
            _checked(pair)
    elif isinstance(pairs, (list, tuple)):
        for pair in pairs:
            _checked(pair)
    elif not isinstance(pairs, (Iterable, AsyncIterable)):
        raise TypeError(f"put_many takes a mapping or an iterable of pairs, not {type(pairs).__name__}")
