"""A write whose connection is cut anywhere is applied once, and its outcome is never told wrong (DESIGN 2.4, 4.6)."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from shardkv.errors import OutcomeUnknown, Unavailable
from shardkv.wire.requests import Method
from shardkv_client.client import Client
from tests.cluster.harness import (
    LocalCluster,
    client,
    eventually,
    kill,
    leader_of,
    restart,
    settled,
    started,
    transfer,
)
from tests.cluster.proxy import Proxies, ThroughProxies, Way, proxies_of

pytestmark = pytest.mark.cluster

SAMPLES = 9
"""Positions tried in each direction; `python -m tests.cluster.soak cuts` tries every one."""
MEASUREMENTS = 4
TIMEOUT = 30.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started(tmp_path_factory.mktemp("retries")) as running:
        yield running


@asynccontextmanager
async def both(world: LocalCluster) -> AsyncIterator[tuple[Client, Client, Proxies]]:
    """A client behind proxies, one with connections of its own, and the proxies."""
    async with (
        proxies_of(world) as proxies,
        client(world) as direct,
        client(world, environment=ThroughProxies(proxies)) as cut,
    ):
        await settled(direct)
        yield cut, direct, proxies


def positions(length: int, samples: int = SAMPLES) -> list[int]:
    """Places to cut in ``length`` bytes: both ends, what lies around a frame's head, and some between."""
    if samples > length:
        return list(range(length + 1))
    return sorted({0, 1, 6, 7, length - 1, length, *range(0, length, max(1, length // (samples - 5)))})


async def lengths(proxies: Proxies, operation: Callable[[], Awaitable[object]]) -> dict[Way, int]:
    """How many bytes an operation takes each way, once everything about the cluster is known.

    The least of a few: a client whose answer is late asks whether its node lives, with bytes that are not the
    operation's.
    """
    await operation()
    taken: dict[Way, list[int]] = {way: [] for way in Way}
    for _ in range(MEASUREMENTS):
        before = dict(proxies.passed)
        await operation()
        for way in Way:
            taken[way].append(proxies.passed[way] - before[way])
    return {way: min(taken[way]) for way in Way}


async def cut_everywhere(proxies: Proxies, operation: Callable[[], Awaitable[object]], samples: int) -> int:
    """Perform the operation with a cut at each place of either way. How many cuts there were."""
    cuts = proxies.cuts
    for way, length in (await lengths(proxies, operation)).items():
        for position in positions(length, samples):
            proxies.cut_after(way, position)
            await operation()
            proxies.forget_cut()
    return proxies.cuts - cuts


async def cut_increments(cut: Client, direct: Client, proxies: Proxies, samples: int = SAMPLES) -> int:
    """Increments with a cut at each place. How many cuts there were."""
    expected = 0

    async def increment() -> None:
        nonlocal expected
        expected += 1
        assert await cut.increment(b"cut/counter", 1, timeout=TIMEOUT) == expected

    await direct.delete(b"cut/counter")
    cuts = await cut_everywhere(proxies, increment, samples)
    entry = await direct.get(b"cut/counter")
    assert entry is not None
    assert entry.value == b"%d" % expected
    return cuts


async def cut_conditional_puts(cut: Client, direct: Client, proxies: Proxies, samples: int = SAMPLES) -> int:
    """Conditional puts with a cut at each place: applied twice, the second would find another version."""
    version = 0

    async def put() -> None:
        nonlocal version
        version = await cut.put(b"cut/conditional", b"value", if_version=version, timeout=TIMEOUT)
        entry = await direct.get(b"cut/conditional")
        assert entry is not None
        assert entry.version == version

    await direct.delete(b"cut/conditional")
    return await cut_everywhere(proxies, put, samples)


async def cut_puts(cut: Client, direct: Client, proxies: Proxies, samples: int = SAMPLES) -> int:
    """Puts with a cut in the answer, and another's write before the retry, which must not undo it."""

    async def put() -> int:
        return await cut.put(b"cut/put", b"mine", timeout=TIMEOUT)

    cuts = proxies.cuts
    length = (await lengths(proxies, put))[Way.ANSWER]
    for position in positions(length - 1, samples):
        await direct.put(b"cut/put", b"before")
        proxies.cut_after(Way.ANSWER, position, then=proxies.silence)
        versions: list[int] = []

        async def put_once(found: list[int] = versions) -> None:
            found.append(await put())

        async with trio.open_nursery() as nursery:
            seen = proxies.cuts
            nursery.start_soon(put_once)

            async def answer_lost(seen: int = seen) -> bool:
                entry = await direct.get(b"cut/put")
                return proxies.cuts > seen and entry is not None and entry.value == b"mine"

            await eventually("the put is applied and its answer cut", answer_lost)
            proxies.shut()
            theirs = await direct.put(b"cut/put", b"theirs")
            proxies.open()
        entry = await direct.get(b"cut/put")
        assert entry is not None
        assert (entry.value, entry.version) == (b"theirs", theirs)
        assert versions[0] < theirs
    return proxies.cuts - cuts


@pytest.mark.parametrize("writes", [cut_increments, cut_conditional_puts, cut_puts])
async def test_a_write_is_applied_once_wherever_its_connection_is_cut(
    world: LocalCluster, writes: Callable[[Client, Client, Proxies], Awaitable[int]]
) -> None:
    """DESIGN 4.6: the retry is byte-identical under the same (session, sequence), and finds its outcome recorded."""
    async with both(world) as (cut, direct, proxies):
        assert await writes(cut, direct, proxies) >= SAMPLES - 2


async def check_applied_once(world: LocalCluster, key: bytes, meanwhile: Callable[[Client], Awaitable[None]]) -> None:
    """Lose the answers to a write of each kind, do something to the cluster, let the retries through: each was applied
    once, and a put not over what another has written since."""
    counter, conditional, plain = key + b"/counter", key + b"/conditional", key + b"/plain"
    async with both(world) as (cut, direct, proxies):
        for each in (counter, conditional, plain):
            await direct.delete(each)
        assert await cut.increment(counter, 7, timeout=TIMEOUT) == 7
        before = await cut.put(conditional, b"before", timeout=TIMEOUT)
        proxies.cut_after(Way.ANSWER, 0, then=proxies.silence)
        outcomes: dict[bytes, int] = {}

        async def increment() -> None:
            outcomes[counter] = await cut.increment(counter, 1, timeout=TIMEOUT)

        async def put_if() -> None:
            outcomes[conditional] = await cut.put(conditional, b"after", if_version=before, timeout=TIMEOUT)

        async def put() -> None:
            outcomes[plain] = await cut.put(plain, b"mine", timeout=TIMEOUT)

        async def values() -> list[bytes | None]:
            found = await direct.get_many([counter, conditional, plain])
            return [found[each].value if each in found else None for each in (counter, conditional, plain)]

        async with trio.open_nursery() as nursery:
            for write in (increment, put_if, put):
                nursery.start_soon(write)

            async def applied() -> bool:
                return await values() == [b"8", b"after", b"mine"]

            await eventually("the writes whose answers are lost are applied", applied)
            proxies.shut()
            await meanwhile(direct)
            theirs = await direct.put(plain, b"theirs", timeout=TIMEOUT)
            proxies.open()
        assert await values() == [b"8", b"after", b"theirs"]
        found = await direct.get_many([conditional, plain])
        assert outcomes[counter] == 8
        assert outcomes[conditional] == found[conditional].version
        assert outcomes[plain] < theirs == found[plain].version


async def test_a_retry_after_a_split_finds_its_outcome_on_the_other_side(world: LocalCluster) -> None:
    """Trap 12: the dedupe table is copied on a split; the key lies in the right half by the time of the retry."""

    async def split(direct: Client) -> None:
        await direct.call(Method.SPLIT, b"moved/", key=b"moved/", timeout=TIMEOUT)

    await check_applied_once(world, b"moved/key", split)


async def test_a_retry_after_a_transfer_finds_its_outcome_at_the_new_leader(world: LocalCluster) -> None:
    """Trap 12: the dedupe table is replicated state."""
    await check_applied_once(world, b"transferred", lambda direct: transfer(direct, b"transferred"))


async def test_a_retry_after_the_leaders_crash_finds_its_outcome_at_the_new_leader(world: LocalCluster) -> None:
    """Trap 12, with kill -9 instead of a transfer."""
    victims: list[str] = []

    async def crash(direct: Client) -> None:
        victims.append(await leader_of(direct, b"orphaned"))
        await kill(world, victims[0])

    try:
        await check_applied_once(world, b"orphaned", crash)
    finally:
        await restart(world, *victims)


async def test_a_write_whose_outcome_cannot_be_known_says_so_and_nothing_else(world: LocalCluster) -> None:
    """DESIGN 2.4: of bytes that were handed to a connection and not answered nothing else is true, applied or not."""
    async with both(world) as (cut, direct, proxies):

        async def put() -> None:
            await cut.put(b"unknown", b"value", timeout=TIMEOUT)

        sizes = await lengths(proxies, put)
        # Not the request's last byte: numbers in it grow, and with them a later request.
        places = [(Way.REQUEST, position) for position in (0, sizes[Way.REQUEST] // 2)]
        places += [(Way.ANSWER, position) for position in (0, sizes[Way.ANSWER] - 1)]
        for number, (way, position) in enumerate(places):
            await put()
            proxies.cut_after(way, position, then=proxies.shut if way is Way.REQUEST else proxies.silence)
            with pytest.raises(OutcomeUnknown):
                await cut.put(b"unknown", b"%05d" % number, timeout=0.7)
            proxies.shut()
            with pytest.raises(Unavailable):
                await cut.get(b"unknown", timeout=0.3)
            with pytest.raises(Unavailable):
                await cut.put(b"unknown", b"never sent", timeout=0.3)
            proxies.open()
            applied = way is Way.ANSWER
            expected = b"%05d" % number if applied else b"value"

            async def as_expected(expected: bytes = expected) -> bool:
                entry = await direct.get(b"unknown")
                return entry is not None and entry.value == expected

            # What the node has received it may not have carried out yet.
            await eventually(f"{expected!r} is there, cut at byte {position} of the {way.name}", as_expected)
