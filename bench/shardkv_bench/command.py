"""``python -m shardkv_bench compare``: shardkv and etcd side by side. How it ends is in ``shardkv.program``."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shardkv.errors import ShardKVError
from shardkv.program import Finite
from shardkv_bench.compare import INFLIGHT, SPREAD_RANGES, Options, compare
from shardkv_bench.etcd import EtcdMissing, find_etcd
from shardkv_bench.local_cluster import NodeFailed
from shardkv_bench.machine import describe
from shardkv_bench.report import HEADER, MARKS, budgets_of, lines_of, markdown, markdown_table
from shardkv_bench.runner import WorkerFailed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measurements of whole clusters."""


@bench.command("compare")
@click.option("--leaders", type=click.Choice(["one", "spread", "both"]), default="one", show_default=True)
@click.option("--ranges", type=click.IntRange(2, 1024), default=SPREAD_RANGES, show_default=True, help="For spread.")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(["write", "read"]), default=("write", "read"))
@click.option("--inflight", multiple=True, type=click.IntRange(1, 4096), default=INFLIGHT, show_default=True)
@click.option("--seconds", type=Finite(0.2), default=3.0, show_default=True, help="Of each round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="For each system and row.")
@click.option(
    "--processes", type=click.IntRange(1), default=1, show_default=True, help="Client processes of each load."
)
@click.option(
    "--failovers", type=click.IntRange(0), default=0, show_default=True, help="kill -9 trials of each system."
)
@click.option("--cold-starts", type=click.IntRange(0), default=1, show_default=True)
@click.option("--data", type=click.Path(file_okay=False), help="Put data here instead of a temporary directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--output", type=click.Path(dir_okay=False), help="Write a Markdown page as well.")
def compare_command(
    leaders: str,
    ranges: int,
    workloads: tuple[str, ...],
    inflight: tuple[int, ...],
    seconds: float,
    rounds: int,
    processes: int,
    failovers: int,
    cold_starts: int,
    data: str | None,
    as_json: bool,
    output: str | None,
) -> None:
    """Drive shardkv and a three-node etcd with the same load.

    Example: python -m shardkv_bench compare --leaders both --failovers 10 --output docs/benchmarks.md
    """
    try:
        find_etcd()
    except EtcdMissing as missing:
        raise click.ClickException(str(missing)) from None
    options = Options(
        workloads=workloads,
        inflight=inflight,
        seconds=seconds,
        rounds=rounds,
        processes=processes,
        failover_trials=failovers,
        cold_starts=cold_starts,
    )
    plans = {"one": [options], "spread": [replace(options, ranges=ranges)]}.get(leaders)
    if plans is None:
        plans = [options, replace(options, ranges=ranges, failover_trials=0, cold_starts=0)]
    if output:
        _check_writable(Path(output))
    directory = _directory(data)
    try:
        machine = describe(directory)
        documents = []
        for number, plan in enumerate(plans):
            report = compare(directory / str(number), plan, machine, lambda line: click.echo(line, err=True))
            documents.append(report.to_json())
    except (NodeFailed, WorkerFailed, ShardKVError) as failed:
        raise click.ClickException(str(failed)) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if output:
        words = [each for each in sys.argv[1:] if each != "--json"]
        Path(output).write_text(markdown(documents, f"python -m shardkv_bench {' '.join(words)}"))
    _show(documents, as_json)


def _show(documents: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        # The rows stand at the top whatever was compared; leaders on all nodes, where that is more, stand beside them.
        click.echo(json.dumps(documents[0] | ({"spread": documents[1]} if len(documents) > 1 else {}), indent=2))
        return
    for document in documents:
        click.echo(f"\n{document['ranges']} range{'s' * (document['ranges'] != 1)}\n")
        click.echo(markdown_table(HEADER, lines_of(document["rows"])))
        click.echo(MARKS)
        for budget in budgets_of(document):
            verdict = "" if budget.met is None else "met" if budget.met else "MISSED"
            click.echo(f"{budget.what}: {budget.found}, budget {budget.budget} {verdict}")


def _directory(data: str | None) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="shardkv-compare-", dir=data))
    except OSError as problem:
        raise click.UsageError(
            f"no data can be put into {data}: {problem.strerror}; name another with --data"
        ) from None


def _check_writable(path: Path) -> None:
    """Before hours of measuring, not after them."""
    try:
        path.open("a").close()
    except OSError as problem:
        raise click.UsageError(f"{path} cannot be written: {problem.strerror}; name another with --output") from None
