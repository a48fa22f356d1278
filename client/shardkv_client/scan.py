"""Scans: an ordered walk over a span, page by page, from range to range.

The only state is the rest of the span and the page at hand, so nothing is held open between two entries: no task, no
cancel scope, nothing on a server. Strict order and "nothing twice" follow: each page asks only for what is beyond the
last key that was given out, whatever split or merged meanwhile.
"""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from trio.lowlevel import enable_ki_protection

from shardkv.types import Entry
from shardkv_client.core import ScanCall, Settings
from shardkv_client.limits import before

OnAge = Callable[[float], object]
"""Is told how many seconds old an answer is at most."""


class Scan:
    """What :meth:`Client.scan` returns: ``async for`` over it, or ``async with`` to close it early.

    Each page is linearizable; the whole is no snapshot. A page that fails raises and can be asked for again by going
    on; entries already given out are not repeated. Of a client that was closed meanwhile it gives out what it has read.
    One task at a time.
    """

    def __init__(
        self,
        check_open: Callable[[], object],
        perform: Callable[[ScanCall], Awaitable[Any]],
        now: Callable[[], float],
        settings: Settings,
        start: bytes,
        end: bytes | None,
        *,
        limit: int | None,
        reverse: bool,
        keys_only: bool,
        consistency: int,
        age_us_max: int | None,
        on_age: OnAge | None,
        timeout: float,
    ) -> None:
        self._check_open = check_open
        self._perform = perform
        self._now = now
        self._settings = settings
        self._start = start
        self._end = end
        self._left = limit
        self._reverse = reverse
        self._keys_only = keys_only
        self._consistency = consistency
        self._age_us_max = age_us_max
        self._on_age = on_age
        self._timeout = timeout
        self._page: list[Entry] = []
        """What is left of the page at hand, the next entry last."""
        self.finished: bool = False
        """Whether no page comes after the one at hand."""
        self._fetching = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Entry:
        """The next entry.

        Raises:
            Unavailable: no page came within the timeout; call again to go on.
        """
        if not self._page and not await self._fetch():
            raise StopAsyncIteration
        return self._page.pop()

    async def next_page(self) -> list[Entry]:
        """The rest of the page at hand, or the next one; empty at the end."""
        if not self._page and not await self._fetch():
            return []
        page, self._page = self._page, []
        page.reverse()
        return page

    async def _fetch(self) -> bool:
        """Make a page with entries the one at hand; False at the end."""
        if self._fetching:
            raise RuntimeError("two tasks read one scan at once; give each its own")
        self._fetching = True
        try:
            while not self._page:
                if self.finished:
                    return False
                self._check_open()
                if self._nothing_is_left():
                    self.finished = True
                    return False
                call = self._next_call()
                answer = await self._perform(call)
                if self._on_age is not None and not self.finished:
                    self._on_age(call.age_us / 1e6)
                self._take(answer)
        finally:
            self._fetching = False
        return True

    def _nothing_is_left(self) -> bool:
        return (self._left is not None and self._left <= 0) or (self._end is not None and self._start >= self._end)

    def _next_call(self) -> ScanCall:
        settings = self._settings
        limit = settings.scan_page_entries_max
        if self._left is not None:
            limit = min(limit, self._left)
        return ScanCall(
            before(self._end) if self._reverse else self._start,
            self._start,
            self._end,
            consistency=self._consistency,
            limit=limit,
            bytes_max=settings.scan_page_bytes_max,
            reverse=self._reverse,
            keys_only=self._keys_only,
            deadline=self._now() + self._timeout,
            age_us_max=self._age_us_max,
        )

    @enable_ki_protection
    def _take(self, answer: Any) -> None:
        """Note a page and cut what it covers off the span."""
        flat, more, descriptor = answer
        if self.finished:
            return  # closed while the page was under way
        entries = [Entry(key, value or b"", version) for key, value, version in zip(flat[::3], flat[1::3], flat[2::3])]
        if self._left is not None:
            self._left -= len(entries)
        if more and entries:
            last = entries[-1].key
            if self._reverse:
                self._end = last
            else:
                self._start = last + b"\0"
        elif self._reverse:
            self._end = descriptor.span.start
        else:
            reached = descriptor.span.end
            if reached is None or (self._end is not None and reached >= self._end):
                self.finished = True
            else:
                self._start = reached
        self.finished = self.finished or self._nothing_is_left()
        entries.reverse()
        self._page = entries

    async def aclose(self) -> None:
        """End the scan: the next entry asked for is its end. Nothing is waited for."""
        self.finished = True
        self._page = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
