"""``shardkv admin``: operations on ranges. Each is one request to the range's leader."""

import click

from shardkv.cli import text
from shardkv.cli.cluster import resolve_node
from shardkv.cli.root import Example, ExampleGroup
from shardkv.cli.session import Client, Session, base64_option, connected, read_key
from shardkv.errors import InvalidRange
from shardkv.types import RangeDescriptor
from shardkv.wire.requests import Method

range_type = click.IntRange(0, (1 << 63) - 1)


@click.group(cls=ExampleGroup, example="shardkv admin split --connect 127.0.0.1:7001 m")
def admin() -> None:
    """Operate on the cluster."""


@admin.command(cls=Example, example="shardkv admin split --connect 127.0.0.1:7001 m")
@click.argument("key")
@base64_option
@connected
def split(session: Session, key: str, base64_text: bool) -> None:
    """Split the range that holds KEY, so that KEY becomes the first key of a range of its own."""
    wanted = read_key(key, base64_text)

    async def body(client: Client) -> list[RangeDescriptor]:
        try:
            answer = await client.call(Method.SPLIT, wanted, key=wanted, timeout=session.timeout)
        except InvalidRange as refused:  # which is the cluster's answer here, not what was typed
            raise click.ClickException(str(refused)) from None
        return [RangeDescriptor.from_wire(fields) for fields in answer]

    left, right = session.run(body)
    click.echo(f"range {left.range_id} ends at {text.show(wanted, base64_text)}, where range {right.range_id} begins")


@admin.command(cls=Example, example="shardkv admin transfer --connect 127.0.0.1:7001 4 n2")
@click.argument("range_id", metavar="RANGE", type=range_type)
@click.argument("node")
@connected
def transfer(session: Session, range_id: int, node: str) -> None:
    """Make NODE (an id or a name) the leader of RANGE. It must hold a replica of it."""

    async def body(client: Client) -> int:
        node_id = await resolve_node(client, node, session.timeout)
        await client.call(Method.TRANSFER, range_id, node_id, range_id=range_id, timeout=session.timeout)
        return node_id

    click.echo(f"node {session.run(body)} leads range {range_id}")


@admin.command(cls=Example, example="shardkv admin snapshot --connect 127.0.0.1:7001 4")
@click.argument("range_id", metavar="RANGE", type=range_type)
@connected
def snapshot(session: Session, range_id: int) -> None:
    """Write RANGE's state to the engine's disk now and let its Raft log be cut."""

    async def body(client: Client) -> object:
        return await client.call(Method.SNAPSHOT, range_id, range_id=range_id, timeout=session.timeout)

    session.run(body)
    click.echo("done")
