"""The cluster as it is: status, nodes, ranges, leader. Read-only."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import anyio
import click

from shardkv.amounts import human_bytes
from shardkv.cli import text
from shardkv.cli.root import Example
from shardkv.cli.session import Client, Session, all_shown, base64_option, connected, json_option, read_key, shown_json
from shardkv.cli.table import render
from shardkv.wire.requests import Method, RangesListing

NODE_COLUMNS: Final = ("id", "name", "address", "state", "replicas", "leaders")
RANGE_COLUMNS: Final = ("id", "start", "end", "leader", "replicas", "epoch", "bytes")
LEARNER_MARK: Final = "*"
OPERATORS_SHOWN_MAX: Final = 20
LEADER_ASKS_MAX: Final = 10
LEADER_ASK_SECONDS: Final = 0.1
"""While leadership passes from one node to another nobody is known to lead; an election takes about a second."""
LEADER_COLUMNS: Final = ("range", "leader", "name", "address")
UNBOUNDED: Final = "∞"
"""Shown for an unbounded end where it can be; in JSON it is null."""


async def fetch_status(client: Client, timeout: float) -> dict[str, Any]:
    answer = await client.call(Method.STATUS, timeout=timeout)
    return dict(answer)


async def fetch_nodes(client: Client, timeout: float) -> list[dict[str, Any]]:
    """Each node's row, by id."""
    status = await fetch_status(client, timeout)
    return sorted((dict(row) for row in status["node_table"]), key=lambda row: int(row["id"]))


async def fetch_ranges(client: Client, timeout: float) -> list[dict[str, Any]]:
    """Each range's row, by start. ``timeout`` is for each page."""
    listing = RangesListing()
    while listing.take(await client.call(Method.RANGES, listing.after, timeout=timeout)):
        pass
    return sorted((dict(row) for row in listing.rows), key=lambda row: bytes(row["start"]))


def print_rows(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], as_json: bool, numeric: Sequence[str]
) -> None:
    """A table, or a JSON array of objects with the same fields."""
    if as_json:
        click.echo(shown_json([{column: row.get(column) for column in columns} for row in rows]))
        return
    shown = [[cell(column, row.get(column)) for column in columns] for row in rows]
    sys.stdout.write(render(columns, shown, numeric))


def cell(column: str, value: object) -> str:
    """A table cell."""
    if value is None:
        return UNBOUNDED if column == "end" and all_shown() else "-"
    if isinstance(value, bytes):
        return text.escape(value) or '""'
    if column == "bytes" and isinstance(value, int):
        return human_bytes(value)
    if column == "epoch" and isinstance(value, Sequence) and not isinstance(value, str):
        return ".".join(str(part) for part in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(str(part) for part in value)
    return str(value)


@click.command(cls=Example, example="shardkv status --connect 127.0.0.1:7001")
@json_option
@connected
def status(session: Session, as_json: bool) -> None:
    """Show the cluster in short: its id and version, how many nodes and ranges, who leads the placement.

    It is settled once every range has as many voters as it should and there are live nodes for, and nothing is about
    to move; if not, it says why. What is being done about ranges follows, with the reason.
    """

    async def body(client: Client) -> dict[str, Any]:
        return await fetch_status(client, session.timeout)

    answer = session.run(body)
    if isinstance(answer.get("cluster_id"), bytes):
        answer["cluster_id"] = answer["cluster_id"].hex()
    if as_json:
        click.echo(shown_json(answer))
        return
    plain = {name: value for name, value in answer.items() if not isinstance(value, list | dict)}
    why = plain.pop("unsettled", None)
    if why is not None:
        plain["settled"] = f"{plain['settled']}, {why}"
    widest = max(map(len, plain), default=0)
    for name, value in plain.items():
        click.echo(f"{name.replace('_', ' '):<{widest}}  {cell(name, value)}")
    operators = answer.get("operators", ())
    for each in operators[:OPERATORS_SHOWN_MAX]:
        click.echo(f"operator {each['id']}: {each['kind']} range {each['range']}, {each['reason']}")
    if len(operators) > OPERATORS_SHOWN_MAX:
        click.echo(f"and {len(operators) - OPERATORS_SHOWN_MAX} more operators, with --json all of them")


@click.command(cls=Example, example="shardkv nodes --connect 127.0.0.1:7001 --json")
@json_option
@connected
def nodes(session: Session, as_json: bool) -> None:
    """List the nodes, with how many replicas each holds and how many of these lead.

    The placement group's replicas count like those of ranges.

    A node is live; suspect, when it has been silent for 3 s; down, after 10 s; draining, while it stops; or its disk
    stalls (slow disk) or has little room left (nearly full): others lead its ranges then.
    """

    async def body(client: Client) -> list[dict[str, Any]]:
        return await fetch_nodes(client, session.timeout)

    print_rows(NODE_COLUMNS, session.run(body), as_json, numeric=("id", "replicas", "leaders"))


@click.command(cls=Example, example="shardkv ranges --connect 127.0.0.1:7001")
@json_option
@connected
def ranges(session: Session, as_json: bool) -> None:
    """List the ranges: their keys, leader and replicas (node ids), epoch and size.

    A replica with a * is a learner: it has no vote yet, and does not count for what the range survives. With --json a
    range that has some names their nodes as learners.
    """

    async def body(client: Client) -> list[dict[str, Any]]:
        return await fetch_ranges(client, session.timeout)

    rows = session.run(body)
    if as_json:
        # Tools know a range by its columns; in the table learners are marked among the replicas.
        shown = [{each: row.get(each) for each in (*RANGE_COLUMNS, *_also(row))} for row in rows]
        click.echo(shown_json(shown))
        return
    print_rows(RANGE_COLUMNS, [{**row, "replicas": marked(row)} for row in rows], as_json, ("id", "leader", "bytes"))
    if any(row.get("learners") for row in rows):
        click.echo(f"{LEARNER_MARK} a learner: it has no vote (yet)")


def _also(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row of ``ranges --json`` has beside its columns."""
    return ("learners",) if row.get("learners") else ()


def marked(row: Mapping[str, Any]) -> list[str]:
    """A range's replicas, the learners with a mark."""
    learners = row.get("learners", ())
    return [f"{node_id}{LEARNER_MARK if node_id in learners else ''}" for node_id in row["replicas"]]


@click.command(cls=Example, example="shardkv leader --connect 127.0.0.1:7001 greeting")
@click.argument("key", required=False)
@json_option
@base64_option
@connected
def leader(session: Session, key: str | None, as_json: bool, base64_text: bool) -> None:
    """Show which node leads the range that holds KEY; without KEY, which one leads the placement.

    Waits a moment for a change of leaders to end. Exit code 1 when there is no leader after that.
    """
    wanted = None if key is None else read_key(key, base64_text)

    async def body(client: Client) -> dict[str, Any]:
        row = await ask(client)
        for _ in range(LEADER_ASKS_MAX):
            if row["leader"] is not None:
                break
            await anyio.sleep(LEADER_ASK_SECONDS)
            row = await ask(client)
        return row

    async def ask(client: Client) -> dict[str, Any]:
        cluster = await fetch_status(client, session.timeout)
        if wanted is None:
            return leader_row(0, cluster.get("placement_leader"), cluster["node_table"])
        rows = await fetch_ranges(client, session.timeout)
        found = next(row for row in reversed(rows) if bytes(row["start"]) <= wanted)
        return leader_row(found["id"], found["leader"], cluster["node_table"])

    row = session.run(body)
    print_rows(LEADER_COLUMNS, [row], as_json, numeric=("range", "leader"))
    if row["leader"] is None:
        click.echo("no leader is known now", err=True)
        click.get_current_context().exit(1)


def leader_row(range_id: int, node_id: object, node_table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    node = next((row for row in node_table if row["id"] == node_id), {})
    return {"range": range_id, "leader": node_id, "name": node.get("name"), "address": node.get("address")}


async def resolve_node(client: Client, name_or_id: str, timeout: float) -> int:
    """A node's id from its name or id. Raises a usage error when no node is called that."""
    rows = await fetch_nodes(client, timeout)
    for row in rows:
        if name_or_id in (str(row["id"]), row["name"]):
            return int(row["id"])
    known = ", ".join(f"{row['id']} ({row['name']})" for row in rows)
    raise click.BadParameter(f"there is no node {name_or_id!r}; there are {known}", param_hint="NODE")
