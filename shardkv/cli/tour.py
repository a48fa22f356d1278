"""The tour of a demo cluster: real data, ranges that split and spread, reads, a compare-and-set, a killed leader.

The data is the Unicode character database that every Python carries: each named code point under its name and under
its number. Whether anything acknowledged was lost is checked, not claimed: :func:`run_tour` says what it found.
"""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import click
import trio

from shardkv.amounts import human_bytes
from shardkv.cli import session
from shardkv.cli.cluster import NODE_COLUMNS, RANGE_COLUMNS, cell, fetch_nodes, fetch_ranges
from shardkv.cli.local_cluster import LocalCluster
from shardkv.cli.progress import Progress
from shardkv.cli.session import Client
from shardkv.cli.table import render
from shardkv.errors import OutcomeUnknown, Unavailable, VersionMismatch

SPLIT_BYTES: Final = 3 * 1024 * 1024
"""Small, so that the data makes a dozen ranges."""
RANGES_MIN: Final = 8
SETTLE_SECONDS_MAX: Final = 30.0
TIMEOUT_SECONDS: Final = 20.0
WRITERS: Final = 16
WRITE_SECONDS_BEFORE: Final = 1.0
"""Writes run this long before the leader is killed, and this long after they go on."""
RESUME_SECONDS_MAX: Final = 30.0
WRITE_PREFIX: Final = b"tour/write/"


def characters() -> Iterator[tuple[str, str, bytes]]:
    """Every named code point: its hexadecimal number, its name, and its properties as JSON."""
    for number in range(0x110000):
        character = chr(number)
        name = unicodedata.name(character, "")
        if name:
            yield f"{number:04X}", name, json.dumps(properties(character, name), ensure_ascii=False).encode()


def properties(character: str, name: str) -> dict[str, object]:
    """What the database says of a character, without what is empty."""
    found: dict[str, object] = {
        "character": character,
        "code": f"U+{ord(character):04X}",
        "name": name,
        "category": unicodedata.category(character),
        "bidirectional": unicodedata.bidirectional(character),
        "width": unicodedata.east_asian_width(character),
        "combining": unicodedata.combining(character),
        "mirrored": unicodedata.mirrored(character),
        "decomposition": unicodedata.decomposition(character),
    }
    found = {key: value for key, value in found.items() if value not in ("", 0)}
    numeric = unicodedata.numeric(character, None)
    return found if numeric is None else {**found, "numeric": numeric}


def pairs() -> Iterator[tuple[bytes, bytes]]:
    """What is loaded: two keys for each named code point."""
    for number, name, document in characters():
        yield f"name/{name}".encode(), document
        yield f"cp/{number}".encode(), document


@dataclass
class Failover:
    """What was seen around the death of a leader."""

    acknowledged: list[bytes] = field(default_factory=list)
    unknown: int = 0
    refused: int = 0
    """Certainly not applied."""
    resumed: bool = False
    """Whether writes went on under a new leader."""
    pause_seconds: float = 0.0
    missing: list[bytes] = field(default_factory=list)


def title(words: str) -> None:
    click.secho(f"\n{words}", bold=True)


async def run_tour(cluster: LocalCluster) -> bool:
    """Show everything on a cluster that serves. Whether it did what it says: every acknowledged write was found again,
    writes went on after a leader's death, and the data lies in ranges that all nodes have a part in leading."""
    async with session.connect(cluster.connect) as client:
        loaded = await load(client)
        spread = await show_ranges(client)
        await show_reads(client)
        await show_compare_and_set(client)
        failover = await show_failover(client, cluster)
        kept = await show_what_is_kept(client, loaded)
    return spread and failover.resumed and not failover.missing and kept


async def load(client: Client) -> int:
    """The count of keys written."""
    title("Loading the Unicode character database")
    total = 2 * sum(1 for number in range(0x110000) if unicodedata.name(chr(number), ""))
    started = trio.current_time()
    with Progress("load", total=total) as progress:
        count: int = await client.put_many(pairs(), timeout=TIMEOUT_SECONDS, progress=progress.update)
    seconds = trio.current_time() - started
    click.echo(f"{count:,} keys in {seconds:.1f} s ({count / seconds:,.0f} a second), each on three nodes and synced")
    return count


async def show_what_is_kept(client: Client, loaded: int) -> bool:
    """Count what was loaded before the leader died, and look at the ranges once more. Whether all is as it was."""
    title("What was loaded is still there")
    kept = 0
    for prefix in (b"name/", b"cp/"):
        async with client.scan(prefix=prefix, keys_only=True, timeout=TIMEOUT_SECONDS) as entries:
            async for _ in entries:
                kept += 1
    whole = kept == loaded
    click.secho(f"{kept:,} of {loaded:,} keys", fg="green" if whole else "red")
    nodes = await fetch_nodes(client, TIMEOUT_SECONDS)
    ranges, spread = await settled(client, len(nodes))
    leading = len({row["leader"] for row in ranges} - {None})
    click.secho(f"{len(ranges)} ranges, {leading} of {len(nodes)} nodes lead some", fg=None if spread else "red")
    return whole and spread


async def settled(client: Client, nodes: int) -> tuple[list[dict[str, Any]], bool]:
    """The ranges, once there are enough, every one has a leader and every node leads some; or as they are when the
    time is over. And whether it is so."""
    ranges: list[dict[str, Any]] = []
    with trio.move_on_after(SETTLE_SECONDS_MAX):
        while True:
            try:
                ranges = await fetch_ranges(client, TIMEOUT_SECONDS)
            except Unavailable:
                continue
            leaders = {row["leader"] for row in ranges}
            if len(ranges) >= RANGES_MIN and None not in leaders and len(leaders) >= nodes:
                return ranges, True
            await trio.sleep(0.25)
    return ranges, False


async def show_ranges(client: Client) -> bool:
    """Whether there are as many as there should be, led by all nodes."""
    title("The data has split into ranges; their leaders are spread over the nodes")
    nodes = await fetch_nodes(client, TIMEOUT_SECONDS)
    ranges, spread = await settled(client, len(nodes))
    names = {row["id"]: row["name"] for row in nodes}
    shown = [{**row, "leader": names.get(row["leader"], row["leader"])} for row in ranges]
    click.echo(_table(RANGE_COLUMNS, shown))
    click.echo(f"{len(ranges)} ranges, {human_bytes(sum(row['bytes'] for row in ranges))}\n")
    click.echo(_table(NODE_COLUMNS, await fetch_nodes(client, TIMEOUT_SECONDS)), nl=False)
    if not spread:
        wanted = f"{RANGES_MIN} ranges or more, led by all nodes"
        click.secho(f"after {SETTLE_SECONDS_MAX:g} s these are not yet {wanted}", fg="red")
    return spread


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    return render(columns, [[cell(column, row.get(column)) for column in columns] for row in rows], ("id", "bytes"))


async def show_reads(client: Client) -> None:
    title("Reads are linearizable")
    started = trio.current_time()
    entry = await client.get(b"name/SNOWMAN", timeout=TIMEOUT_SECONDS)
    milliseconds = (trio.current_time() - started) * 1000
    assert entry is not None
    click.echo(f"get name/SNOWMAN         {entry.value.decode()}  ({milliseconds:.1f} ms)")
    click.echo("scan --prefix 'name/GREEK SMALL LETTER O'")
    async with client.scan(prefix=b"name/GREEK SMALL LETTER O", limit=5, timeout=TIMEOUT_SECONDS) as entries:
        async for entry in entries:
            click.echo(f"    {json.loads(entry.value)['character']}  {entry.key.decode()}")
    click.echo("scan cp/1F600 cp/1F650")
    faces = []
    async with client.scan(b"cp/1F600", b"cp/1F650", timeout=TIMEOUT_SECONDS) as entries:
        async for entry in entries:
            if len(entry.key) == len(b"cp/1F600"):  # keys are ordered as bytes: cp/1F61 lies in between
                faces.append(json.loads(entry.value)["character"])
    click.echo(f"    {len(faces)} faces: {' '.join(faces[:24])} …")


async def show_compare_and_set(client: Client) -> None:
    title("A compare-and-set writes only at the version that was read")
    key = b"tour/greeting"
    version = await client.put(key, b"hello", timeout=TIMEOUT_SECONDS)
    click.echo(f"put {key.decode()} hello              version {version}")
    newer = await client.put(key, b"hello again", if_version=version, timeout=TIMEOUT_SECONDS)
    click.echo(f"cas at that version              version {newer}")
    try:
        await client.put(key, b"too late", if_version=version, timeout=TIMEOUT_SECONDS)
    except VersionMismatch as refused:
        click.echo(f"cas at the first version again   refused: the key is at version {refused.current}")
    numbers = [await client.increment(b"tour/visits", timeout=TIMEOUT_SECONDS) for _ in range(3)]
    click.echo(f"incr tour/visits, three times    {', '.join(map(str, numbers))}")


async def show_failover(client: Client, cluster: LocalCluster) -> Failover:
    """Kill the leader of the range that is written to, in the middle of the writes."""
    title("A leader is killed while 16 writers write")
    found = Failover()
    stop, resumed = trio.Event(), trio.Event()
    killed_at: float | None = None
    acknowledged_at: list[float] = []

    async def write(writer: int) -> None:
        number = 0
        while not stop.is_set():
            key = WRITE_PREFIX + b"%02d/%06d" % (writer, number)
            number += 1
            try:
                await client.put(key, key, timeout=TIMEOUT_SECONDS)
            except OutcomeUnknown:
                found.unknown += 1
            except Unavailable:
                found.refused += 1
            else:
                found.acknowledged.append(key)
                acknowledged_at.append(trio.current_time())
                if killed_at is not None and _resumed(acknowledged_at, killed_at):
                    resumed.set()

    victim = await leader_of(client, WRITE_PREFIX)
    async with trio.open_nursery() as nursery:
        for writer in range(WRITERS):
            nursery.start_soon(write, writer)
        await trio.sleep(WRITE_SECONDS_BEFORE)
        before = len(acknowledged_at)
        killed_at = trio.current_time()
        cluster.kill(victim)
        click.echo(f"kill -9 {victim}, which led the range, after {before:,} acknowledged writes")
        with trio.move_on_after(RESUME_SECONDS_MAX):
            await resumed.wait()
            await trio.sleep(WRITE_SECONDS_BEFORE)
        ended_at = trio.current_time()
        stop.set()
    found.resumed = resumed.is_set()
    found.pause_seconds = longest_gap([at for at in acknowledged_at if killed_at < at < ended_at], killed_at, ended_at)
    if found.resumed:
        click.echo(f"writes paused for {found.pause_seconds:.2f} s and went on under a new leader")
    else:
        click.secho(f"writes DID NOT GO ON within {RESUME_SECONDS_MAX:g} s", fg="red")
    found.missing = await missing(client, found.acknowledged)
    verdict = "none is missing" if not found.missing else f"{len(found.missing):,} ARE MISSING"
    click.secho(
        f"{len(found.acknowledged):,} writes were acknowledged ({found.unknown} of unknown outcome, {found.refused} "
        f"refused): {verdict}",
        fg="red" if found.missing else "green",
    )
    started = trio.current_time()
    await trio.to_thread.run_sync(cluster.restart, victim)
    click.echo(f"{victim} restarted and serves again after {trio.current_time() - started:.1f} s")
    return found


def _resumed(acknowledged_at: list[float], killed_at: float) -> bool:
    """Whether a write that had to wait for a new leader was acknowledged: the first ones after a kill may be answers
    that were on their way."""
    recent = [at for at in acknowledged_at[-4 * WRITERS :] if at > killed_at]
    return len(recent) > 2 * WRITERS


def longest_gap(moments: Sequence[float], begin: float, end: float) -> float:
    """The longest time without one of ``moments`` (in order), from ``begin`` to ``end``."""
    return max(later - earlier for earlier, later in pairwise([begin, *moments, end]))


async def leader_of(client: Client, key: bytes) -> str:
    """The name of the node that leads the range of ``key``. Raises Unavailable when none does for too long."""
    with trio.move_on_after(SETTLE_SECONDS_MAX):
        while True:
            ranges = await fetch_ranges(client, TIMEOUT_SECONDS)
            row = next(row for row in reversed(ranges) if bytes(row["start"]) <= key)
            for node in await fetch_nodes(client, TIMEOUT_SECONDS):
                if node["id"] == row["leader"]:
                    return str(node["name"])
            await trio.sleep(0.1)
    raise Unavailable(f"the range of {key!r} has no leader")


async def missing(client: Client, acknowledged: Sequence[bytes]) -> list[bytes]:
    """Which of the acknowledged writes cannot be read back."""
    there: set[bytes] = set()
    async with client.scan(prefix=WRITE_PREFIX, timeout=TIMEOUT_SECONDS) as entries:
        async for entry in entries:
            if entry.value == entry.key:
                there.add(entry.key)
    return [key for key in acknowledged if key not in there]
