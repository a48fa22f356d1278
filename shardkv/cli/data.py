"""The one-shot data commands: get, put, del, scan, cas, incr, delete-range. The shell runs the same ones."""

import sys
from typing import Any

import click

from shardkv.cli import text
from shardkv.cli.root import Example
from shardkv.cli.session import (
    Client,
    Session,
    base64_option,
    connected,
    json_option,
    read_bytes,
    read_key,
    shown_json,
)
from shardkv.cli.table import TableWriter
from shardkv.errors import InvalidRange, ValueTooLarge
from shardkv.program import Finite
from shardkv.types import TIMESTAMP_MAX, VALUE_BYTES_MAX

consistency_option = click.option(
    "--consistency",
    type=click.Choice(["linearizable", "follower", "stale"]),
    help="Which replica may answer.  [default: linearizable]",
)
max_age_option = click.option(
    "--max-age",
    type=Finite(min=0),
    metavar="SECONDS",
    help="With --consistency stale: how old the answer may be.  [default: any age]",
)
version_type = click.IntRange(0, TIMESTAMP_MAX)


def _reading(session: Session, consistency: str | None, max_age: float | None, ages: list[float]) -> dict[str, Any]:
    """The options of a read. Raises a usage error for an age of reads that have none.

    Args:
        ages: filled with how old the answers to a stale read are at most, in seconds.
    """
    options: dict[str, Any] = {"timeout": session.timeout}
    if consistency is not None:
        options["consistency"] = consistency
    if consistency == "stale":
        options |= {"max_age": max_age, "on_age": ages.append}
    elif max_age is not None:
        raise click.UsageError("--max-age goes with --consistency stale")
    return options


def _say_age(ages: list[float]) -> None:
    if ages:
        click.echo(f"at most {max(ages):.3f} s old", err=True)


def _absent(key: bytes, base64_text: bool) -> None:
    click.echo(f"no such key: {text.show(key, base64_text)}", err=True)
    click.get_current_context().exit(1)


@click.command(cls=Example, example="shardkv get --connect 127.0.0.1:7001 greeting")
@click.argument("key")
@click.option("--raw", is_flag=True, help="Write the value's bytes as they are, without a newline.")
@consistency_option
@max_age_option
@json_option
@base64_option
@connected
def get(
    session: Session,
    key: str,
    raw: bool,
    consistency: str | None,
    max_age: float | None,
    as_json: bool,
    base64_text: bool,
) -> None:
    """Print the value of KEY. Exit code 1 when it is absent.

    How old a stale answer is at most is told on stderr.
    """
    if raw and as_json:
        raise click.UsageError("--raw excludes --json")
    wanted = read_key(key, base64_text)
    ages: list[float] = []
    options = _reading(session, consistency, max_age, ages)

    async def body(client: Client) -> Any:
        return await client.get(wanted, **options)

    entry = session.run(body)
    _say_age(ages)
    if entry is None:
        if as_json:
            click.echo("null")
        _absent(wanted, base64_text)
    elif raw:
        sys.stdout.buffer.write(entry.value)
        sys.stdout.buffer.flush()
    elif as_json:
        click.echo(shown_json({"key": entry.key, "value": entry.value, "version": entry.version}))
    else:
        print(text.show(entry.value, base64_text))  # click would have its own way with an encoding that lacks something


def _value(session: Session, typed: str, base64_text: bool) -> bytes:
    if typed == "-":
        value = session.stdin().read(VALUE_BYTES_MAX + 1)
        if len(value) > VALUE_BYTES_MAX:
            raise ValueTooLarge(
                f"a value may have {VALUE_BYTES_MAX} bytes; stdin has more: spread it over several keys"
            )
        return value
    return read_bytes(typed, base64_text, "VALUE")


def _print_version(version: int, as_json: bool) -> None:
    click.echo(shown_json({"version": version}) if as_json else str(version))


@click.command(
    cls=Example,
    example="shardkv put --connect 127.0.0.1:7001 greeting hello\nshardkv put picture - < picture.png",
)
@click.argument("key")
@click.argument("value")
@click.option("--if-version", type=version_type, metavar="VERSION", help="Only if KEY is at this version; 0: absent.")
@json_option
@base64_option
@connected
def put(session: Session, key: str, value: str, if_version: int | None, as_json: bool, base64_text: bool) -> None:
    """Set KEY to VALUE and print its new version. A VALUE of - is read from stdin, byte for byte."""
    _put(session, key, value, if_version, as_json, base64_text)


@click.command(cls=Example, example="shardkv cas --connect 127.0.0.1:7001 greeting 467213411123200001 hi")
@click.argument("key")
@click.argument("version", type=version_type)
@click.argument("value")
@json_option
@base64_option
@connected
def cas(session: Session, key: str, version: int, value: str, as_json: bool, base64_text: bool) -> None:
    """Set KEY to VALUE if KEY is at VERSION (0: if it is absent), and print its new version.

    A VALUE of - is read from stdin, byte for byte. Exit code 1 when KEY is at another version, which is printed on
    stderr.
    """
    _put(session, key, value, version, as_json, base64_text)


def _put(session: Session, key: str, value: str, if_version: int | None, as_json: bool, base64_text: bool) -> None:
    wanted, data = read_key(key, base64_text), _value(session, value, base64_text)

    async def body(client: Client) -> Any:
        return await client.put(wanted, data, if_version=if_version, timeout=session.timeout)

    _print_version(session.run(body), as_json)


@click.command(cls=Example, example="shardkv incr --connect 127.0.0.1:7001 visits\nshardkv incr stock -5")
@click.argument("key")
@click.argument("delta", type=click.IntRange(-(1 << 63), (1 << 63) - 1), default=1)
@json_option
@base64_option
@connected
def incr(session: Session, key: str, delta: int, as_json: bool, base64_text: bool) -> None:
    """Add DELTA (1 if not given) to the decimal number at KEY and print the sum. An absent key counts as 0."""
    wanted = read_key(key, base64_text)

    async def body(client: Client) -> Any:
        return await client.increment(wanted, delta, timeout=session.timeout)

    number = session.run(body)
    click.echo(shown_json({"value": str(number)}) if as_json else str(number))


@click.command("del", cls=Example, example="shardkv del --connect 127.0.0.1:7001 greeting")
@click.argument("key")
@click.option("--if-version", type=version_type, metavar="VERSION", help="Only if KEY is at this version.")
@json_option
@base64_option
@connected
def delete(session: Session, key: str, if_version: int | None, as_json: bool, base64_text: bool) -> None:
    """Delete KEY. Exit code 1 when it was absent."""
    wanted = read_key(key, base64_text)

    async def body(client: Client) -> Any:
        return await client.delete(wanted, if_version=if_version, timeout=session.timeout)

    deleted = session.run(body)
    if as_json:
        click.echo(shown_json({"deleted": deleted}))
    if not deleted:
        _absent(wanted, base64_text)
    elif not as_json:
        click.echo("deleted")


@click.command(
    cls=Example,
    example="shardkv scan --connect 127.0.0.1:7001 a m --limit 10\nshardkv scan --prefix user/ --keys-only --json",
)
@click.argument("start", default="")
@click.argument("end", required=False)
@click.option("--prefix", help="All keys that begin with this, instead of START and END.")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many keys.")
@click.option("--reverse", is_flag=True, help="From the last key to the first.")
@click.option("--keys-only", is_flag=True, help="Leave the values out.")
@consistency_option
@max_age_option
@json_option
@base64_option
@connected
def scan(
    session: Session,
    start: str,
    end: str | None,
    prefix: str | None,
    limit: int | None,
    reverse: bool,
    keys_only: bool,
    consistency: str | None,
    max_age: float | None,
    as_json: bool,
    base64_text: bool,
) -> None:
    """List keys from START (included) to END (excluded) with values and versions, in order.

    How old the oldest of stale answers is at most is told on stderr.
    """
    ages: list[float] = []
    options = span_options(start, end, prefix, base64_text)
    options |= {
        "limit": limit,
        "reverse": reverse,
        "keys_only": keys_only,
        **_reading(session, consistency, max_age, ages),
    }

    async def as_rows(client: Client) -> None:
        columns = ["key", "version"] if keys_only else ["key", "value", "version"]
        table = TableWriter(columns, sys.stdout.write, numeric=["version"])
        async with client.scan(**options) as entries:
            async for entry in entries:
                cells = [text.show(entry.key, base64_text), str(entry.version)]
                if not keys_only:
                    cells.insert(1, text.show(entry.value, base64_text))
                table.add(cells)
        table.close()

    async def as_document(client: Client) -> None:
        separator = "["
        async with client.scan(**options) as entries:
            async for entry in entries:
                fields = {"key": entry.key, "value": entry.value, "version": entry.version}
                if keys_only:
                    del fields["value"]
                click.echo(separator + shown_json(fields, compact=True), nl=False)
                separator = ",\n "
        click.echo("[]" if separator == "[" else "]")

    session.run(as_document if as_json else as_rows)
    _say_age(ages)


def span_options(
    start: str, end: str | None, prefix: str | None, base64_text: bool, *, to_end: str = "leave END out"
) -> dict[str, Any]:
    """The keys a command is about, as ``scan`` takes them. Raises a usage error for a prefix with bounds, and for an
    empty END, which says how else to go ``to_end``; InvalidRange for bounds in the wrong order."""
    if prefix is not None:
        if start or end is not None:
            raise click.UsageError("--prefix excludes START and END")
        return {"prefix": read_bytes(prefix, base64_text, "--prefix")}
    first = read_bytes(start, base64_text, "START")
    if end == "":
        raise click.BadParameter(f"no key comes before an empty one; to go to the last key, {to_end}", param_hint="END")
    last = None if end is None else read_key(end, base64_text, "END")
    if last is not None and last < first:
        raise InvalidRange(
            f"END, {text.show(last, base64_text)}, comes before START, {text.show(first, base64_text)}; swap them"
        )
    return {"start": first, "end": last}


@click.command("delete-range", cls=Example, example="shardkv delete-range --connect 127.0.0.1:7001 a m")
@click.argument("start", required=False)
@click.argument("end", required=False)
@click.option("--prefix", help="All keys that begin with this, instead of START and END.")
@click.option("--to-end", is_flag=True, help="From START on, without an END.")
@base64_option
@connected
def delete_range(
    session: Session, start: str | None, end: str | None, prefix: str | None, to_end: bool, base64_text: bool
) -> None:
    """Delete every key from START (included) to END (excluded). Atomic within each range."""
    if prefix is None and (start is None or (end is None) != to_end):
        raise click.UsageError("give START and END, or START and --to-end, or --prefix")
    if prefix is not None and to_end:
        raise click.UsageError("--prefix excludes --to-end")
    options = span_options(start or "", end, prefix, base64_text, to_end="give --to-end in its place")
    first, last = options.get("start"), options.get("end")
    if "prefix" in options:
        first, last = options["prefix"], after_prefix(options["prefix"])
        if not first:
            raise click.BadParameter(
                "an empty prefix would delete everything; say START '' --to-end", param_hint="--prefix"
            )

    async def body(client: Client) -> None:
        await client.delete_range(first, last, timeout=session.timeout)

    session.run(body)
    click.echo("deleted")


def after_prefix(prefix: bytes) -> bytes | None:
    """The first key above every key that begins with ``prefix``; None when there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else None
