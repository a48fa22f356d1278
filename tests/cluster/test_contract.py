"""The contract of DESIGN 2.3 once against a real cluster: under trio, under asyncio, and through the blocking face."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

from shardkv.errors import ClientClosed, InvalidRange, KeyTooLarge, NotAnInteger, ValueTooLarge, VersionMismatch
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX
from shardkv_client import connect, connect_blocking
from tests.cluster.harness import LocalCluster, client, eventually, settled, started

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    async def settle(running: LocalCluster) -> None:
        """Several ranges before the tests begin, so that their calls and scans cross from one to another."""
        async with client(running) as kv:
            await settled(kv)
            # What the tests write lies between these keys and beyond the first.
            await kv.put_many((b"%s/%03d" % (name, n), bytes(1000)) for name in (b"a", b"c", b"z") for n in range(100))

            async def split() -> bool:
                return len(await kv.ranges()) > 2

            await eventually("the ranges have split", split)
            await settled(kv)

    with started(tmp_path_factory.mktemp("contract"), options=["--split-bytes", "64KiB"]) as running:
        trio.run(settle, running)
        yield running


class Awaited:
    """The blocking face in the shape of the async one, so that one contract serves all three."""

    def __init__(self, blocking: Any) -> None:
        self._blocking = blocking

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._blocking, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return method(*arguments, **options)

        return call

    async def scan(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        for entry in self._blocking.scan(*arguments, **options):
            yield entry


async def raises(kind: type[Exception], call: Awaitable[object]) -> Any:
    with pytest.raises(kind) as caught:
        await call
    return caught.value


async def contract(kv: Any, prefix: bytes) -> None:
    await single_keys(kv, prefix)
    await numbers(kv, prefix)
    await many_keys(kv, prefix)


async def single_keys(kv: Any, prefix: bytes) -> None:
    key = prefix + b"one"
    assert await kv.get(key) is None
    first = await kv.put(key, b"v")
    entry = await kv.get(key)
    assert (entry.key, entry.value, entry.version) == (key, b"v", first)
    error = await raises(VersionMismatch, kv.put(key, b"w", if_version=0))
    assert error.current == first
    second = await kv.put(key, b"w", if_version=first)
    assert second > first
    assert (await raises(VersionMismatch, kv.delete(key, if_version=first))).current == second
    assert await kv.delete(key) is True
    assert await kv.delete(key) is False
    assert await kv.put(key, b"", if_version=0) > second
    assert (await kv.get(key, consistency="follower")).value == b""
    await raises(TypeError, kv.put("text", b"v"))


async def numbers(kv: Any, prefix: bytes) -> None:
    key = prefix + b"number"
    assert await kv.increment(key) == 1
    assert await kv.increment(key, 41) == 42
    assert await kv.increment(key, -50) == -8
    assert (await kv.get(key)).value == b"-8"
    await kv.put(key, b"%d" % ((1 << 63) - 1))
    await raises(NotAnInteger, kv.increment(key, 1))
    await kv.put(key, b"seven")
    await raises(NotAnInteger, kv.increment(key, 1))


async def many_keys(kv: Any, prefix: bytes) -> None:
    base = prefix + b"many/"
    pairs = {base + b"%04d" % number: bytes(1000) for number in range(500)}
    written: list[int] = []
    assert await kv.put_many(pairs, progress=written.append) == 500
    assert written[-1] == 500
    assert await kv.put_many([(base + b"twice", b"1"), (base + b"twice", b"2")]) == 2
    assert (await kv.get(base + b"twice")).value == b"2"
    keys = sorted(pairs)
    asked = [keys[400], base + b"absent", keys[3], keys[400]]
    assert list(await kv.get_many(asked)) == [keys[400], keys[3]]
    everything = [*keys, base + b"twice"]
    assert [entry.key async for entry in kv.scan(prefix=base)] == everything
    assert [entry.key async for entry in kv.scan(prefix=base, reverse=True)] == everything[::-1]
    assert [entry.key async for entry in kv.scan(keys[10], keys[20])] == keys[10:20]
    assert [entry.key async for entry in kv.scan(keys[10], limit=3, keys_only=True)] == keys[10:13]
    assert [entry.value async for entry in kv.scan(prefix=base, limit=1, keys_only=True)] == [b""]
    with pytest.raises(InvalidRange):
        async for _ in kv.scan(b"a", prefix=b"b"):
            pass
    await kv.delete_range(keys[100], keys[400])
    assert [entry.key async for entry in kv.scan(prefix=base)] == keys[:100] + keys[400:] + [base + b"twice"]
    await kv.delete_range(prefix=base)
    assert [entry.key async for entry in kv.scan(prefix=base)] == []


async def test_the_contract_holds_under_trio(world: LocalCluster) -> None:
    async with client(world) as kv:
        await contract(kv, b"trio/")
    with pytest.raises(ClientClosed):
        await kv.get(b"a")


def test_the_contract_holds_under_asyncio(world: LocalCluster) -> None:
    async def main() -> None:
        async with connect(world.connect) as kv:
            await contract(kv, b"asyncio/")
        with pytest.raises(ClientClosed):
            await kv.get(b"a")

    asyncio.run(main())


def test_the_contract_holds_through_the_blocking_face(world: LocalCluster) -> None:
    with connect_blocking(world.connect) as kv:
        coroutine = contract(Awaited(kv), b"blocking/")
        assert inspect.iscoroutine(coroutine)
        with pytest.raises(StopIteration):
            coroutine.send(None)  # nothing in it ever waits for a loop
    with pytest.raises(ClientClosed):
        kv.get(b"a")


async def test_many_tasks_of_one_client_count_together_without_losing_one(world: LocalCluster) -> None:
    """One client serves many tasks; a bounded number in flight, and every increment applied once."""
    async with client(world) as kv, trio.open_nursery() as nursery:
        sums: list[int] = []

        async def count() -> None:
            for _ in range(10):
                sums.append(await kv.increment(b"together"))

        for _ in range(100):
            nursery.start_soon(count)
    assert sorted(sums) == list(range(1, 1001))


async def test_the_largest_keys_and_values_are_taken_and_larger_ones_refused_by_name(world: LocalCluster) -> None:
    """DESIGN 2.3: keys of 1 to 4,096 bytes, values of up to 1 MiB."""
    small, key, value = (
        b"largest/",
        b"largest/".ljust(KEY_BYTES_MAX, b"k"),
        bytes(range(256)) * (VALUE_BYTES_MAX // 256),
    )
    async with client(world) as kv:
        version = await kv.put(key, value)
        assert await kv.put(small, b"") > 0
        entry = await kv.get(key)
        assert entry is not None
        assert (entry.value, entry.version) == (value, version)
        assert [each.key async for each in kv.scan(prefix=small, keys_only=True)] == [small, key]
        assert [each.key async for each in kv.scan(prefix=small, keys_only=True, reverse=True)] == [key, small]
        assert [each.key async for each in kv.scan(start=key, limit=1)] == [key]
        with pytest.raises(KeyTooLarge):
            await kv.put(key + b"k", b"")
        with pytest.raises(KeyTooLarge):
            await kv.put(b"", b"")
        with pytest.raises(ValueTooLarge):
            await kv.put(small, value + b"x")
        assert await kv.delete(key, if_version=version)
        assert [each.key async for each in kv.scan(prefix=small)] == [small]


async def test_conditional_writes_of_rivals_never_both_succeed(world: LocalCluster) -> None:
    """Read, then write if unchanged, from 16 tasks over two clients: the counter ends at the number of successes."""
    async with client(world) as one, client(world) as other:
        await one.put(b"rivals", b"0")
        successes = 0

        async def rival(kv: Any) -> None:
            nonlocal successes
            for _ in range(10):
                entry = await kv.get(b"rivals")
                try:
                    await kv.put(b"rivals", b"%d" % (int(entry.value) + 1), if_version=entry.version)
                except VersionMismatch:
                    continue
                successes += 1

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(rival, one if number % 2 else other)
        entry = await one.get(b"rivals")
        assert entry is not None
        assert int(entry.value) == successes > 0
