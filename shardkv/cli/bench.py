"""``shardkv bench run``: the load generator against a cluster that runs already."""

import math
import sys
from typing import Final

import click

from shardkv.cli.progress import Progress
from shardkv.cli.root import Example, ExampleGroup
from shardkv.cli.session import connect_option, json_option, required
from shardkv.cli.table import render
from shardkv.program import Finite

WORKLOAD_NAMES = ("a", "b", "c", "d", "e", "f", "write", "read", "bulk")
RECORDS_MAX: Final = 1_000_000_000
"""A tenth of those that keys of 16 bytes can number: the rest is for inserts."""


@click.group(cls=ExampleGroup, example="shardkv bench run --connect 127.0.0.1:7001 --workload a --inflight 64")
def bench() -> None:
    """Generate load and measure."""


@bench.command(
    cls=Example,
    example="""
    shardkv bench run --connect 127.0.0.1:7001 --workload a --inflight 64 --seconds 10
    shardkv bench run --connect 127.0.0.1:7001 --workload write --inflight 256 --processes 2 --json
    """,
)
@connect_option
@click.option("--workload", type=click.Choice(WORKLOAD_NAMES), default="a", show_default=True, help="What to do.")
@click.option("--inflight", type=click.IntRange(1, 65_536), default=64, show_default=True, help="Operations at a time.")
@click.option("--seconds", type=Finite(0.1), default=10.0, show_default=True, help="How long to measure.")
@click.option("--warmup", type=Finite(0), default=1.0, show_default=True, help="Seconds before that.")
@click.option(
    "--records",
    type=click.IntRange(1, RECORDS_MAX),
    default=100_000,
    show_default=True,
    help="Records in the data set.",
)
@click.option("--value-bytes", type=click.IntRange(0, 1 << 20), default=100, show_default=True, help="Size of a value.")
@click.option("--connections", type=click.IntRange(1, 1024), default=4, show_default=True, help="Clients to share.")
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Client processes.")
@click.option("--seed", type=int, default=1, show_default=True, help="Equal seeds draw equal operations.")
@click.option("--load/--no-load", default=True, show_default=True, help="Write all records first.")
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    addresses: str | None,
    workload: str,
    inflight: int,
    seconds: float,
    warmup: float,
    records: int,
    value_bytes: int,
    connections: int,
    processes: int,
    seed: int,
    load: bool,
    as_json: bool,
) -> None:
    """Run a workload: YCSB's a to f, or plain write, read and bulk (put_many).

    It writes keys that begin with bench/ into the cluster, and leaves them there for a later run with --no-load.
    `shardkv delete-range --prefix bench/` removes them, and any of yours that begin so.

    The load is a closed loop: each of the operations in flight begins when one has ended. A cluster that stalls is
    asked less meanwhile, so a stall shows in throughput and max_ms, and hardly in the percentiles. What is under way at
    the end counts as a latency if it took longer than all that ended. Failed operations count as errors only.

    Records are inserted in the order of their keys and have one field. A read-modify-write is one operation. Bulk
    counts keys, and its latencies are those of put_many of 1,000. Workload d reads most what was inserted last; with
    several processes, each what it has inserted itself.

    Prints throughput and latencies. With --json: workload, inflight, seconds, ops, errors, throughput, p50_ms,
    p95_ms, p99_ms, p999_ms, max_ms, client_cpu_s.
    """
    from shardkv_bench import runner
    from shardkv_bench.worker import ABSENT, Task

    task = Task(
        driver="shardkv",
        action="run",
        addresses=required(ctx, addresses),
        workload=workload,
        records=records,
        value_bytes=value_bytes,
        inflight=inflight,
        connections=connections,
        warmup_seconds=warmup,
        seconds=seconds,
        seed=seed,
    )
    try:
        if load and workload != "bulk":
            click.echo(f"loading {records:,} records", err=True)
            with Progress("loading") as progress:
                runner.run(runner.loading(task), processes, waiting=progress.update_by_time)
        click.echo(f"running workload {workload} for {seconds:g} s", err=True)
        with Progress("running", total=math.ceil(warmup + seconds)) as progress:
            result = runner.run(task, processes, waiting=progress.update_by_time)
    except runner.WorkerFailed as failure:
        click.echo(f"Error: {failure}", err=True)
        ctx.exit(failure.code)
    _show(runner.report_fields(task, result), as_json)
    if result.client_bound:
        click.echo("note: the client was busy throughout; more --processes may show a higher throughput", err=True)
    for kind, count in result.error_kinds.items():
        click.echo(f"note: {count:,} operations failed with: {kind}", err=True)
    if ABSENT in result.error_kinds and not load:
        click.echo(f"note: not all of {records:,} records were loaded before; leave out --no-load", err=True)
    if not result.ops:
        if not result.errors:
            click.echo(f"note: nothing ended within {seconds:g} s; give more --seconds, or less --inflight", err=True)
        ctx.exit(1)


def _show(fields: dict[str, object], as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps(fields, indent=2))
    else:
        sys.stdout.write(render(list(fields), [[str(value) for value in fields.values()]], numeric=fields))
