"""``python -m shardkv.simulation``: one seed, or a swarm of them. Exits with 1 at a violation, with 0 if all held."""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from shardkv.simulation.faults import KINDS
from shardkv.simulation.runner import RunSettings, run
from shardkv.simulation.swarm import SwarmFileError, SwarmSettings, line, result_as_json, swarm
from shardkv.simulation.workload import WORKLOADS

FAULTS_SHOWN_MAX = 40


def _faults(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    if value == "all":
        return tuple(KINDS)
    names = [name for name in value.split(",") if name and name != "none"]
    for name in names:
        if name not in KINDS:
            raise click.BadParameter(f"no fault {name!r}; there are {', '.join(KINDS)}")
    return tuple(name for name in KINDS if name in names)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="What the run follows from; drawn if not given. A swarm's first.")
@click.option("--minutes", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Of virtual time.")
@click.option("--nodes", type=click.IntRange(1, 9), default=3, show_default=True)
@click.option("--workload", type=click.Choice(list(WORKLOADS)), default="mixed", show_default=True)
@click.option("--rate", type=click.FloatRange(min=0.1), default=20.0, show_default=True, help="Calls per second.")
@click.option("--faults", default="all", callback=_faults, help="all, none, or names with commas between them.")
@click.option("--swarm", "count", type=click.IntRange(min=1), help="Run so many seeds, in processes of their own.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes of a swarm at once.")
@click.option(
    "--resume",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("simulation-swarm.jsonl"),
    show_default=True,
    help="A swarm's results; one that was stopped goes on from them.",
)
@click.option("--keep-going", is_flag=True, help="Let a swarm go on after a violation.")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write every event to this file.")
@click.option("--json", "as_json", is_flag=True, help="The result as one line of JSON.")
def main(
    seed: int | None,
    minutes: float,
    nodes: int,
    workload: str,
    rate: float,
    faults: tuple[str, ...],
    count: int | None,
    jobs: int,
    resume: Path,
    keep_going: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Run a cluster in virtual time under faults, and judge it.

    \b
    python -m shardkv.simulation --seed 7 --minutes 5
    python -m shardkv.simulation --swarm 1000 --minutes 5
    """
    if seed is None:
        seed = 1 if count else int.from_bytes(os.urandom(4), "big")  # the one draw that no seed decides
    settings = RunSettings(seed, minutes=minutes, nodes=nodes, workload=workload, rate=rate, faults=faults)
    if count is not None:
        sys.exit(_swarm(SwarmSettings(settings, count, jobs=jobs, path=resume, keep_going=keep_going)))
    sys.exit(_one(settings, trace, as_json))


def _one(settings: RunSettings, trace: Path | None, as_json: bool) -> int:
    if not as_json:
        click.echo(f"seed {settings.seed}")
    began = time.perf_counter()
    if trace is None:
        result = run(settings)
    else:
        with trace.open("w") as lines:
            result = run(settings, lines=lines)
    found = result_as_json(result, time.perf_counter() - began)
    if as_json:
        click.echo(json.dumps(found))
        return 1 if result.violation else 0
    click.echo(line(found))
    if result.violation:
        click.echo(f"{result.violation}\n\nthe last faults:", err=True)
        for each in result.history[-FAULTS_SHOWN_MAX:]:
            click.echo(f"  {each}", err=True)
        click.echo(f"\nto repeat it: {settings.command()}", err=True)
        return 1
    return 0


def _swarm(settings: SwarmSettings) -> int:
    try:
        results = trio.run(partial(swarm, settings, click.echo))
    except SwarmFileError as error:
        raise click.ClickException(str(error)) from error
    failed: list[dict[str, Any]] = [each for each in results if each["violation"]]
    virtual = sum(each["virtual_seconds"] for each in results)
    real = sum(each["real_seconds"] for each in results)
    click.echo(
        f"{len(results)} seeds, {virtual / 60:.0f} virtual minutes, {virtual / max(real, 0.001):.0f} times real time "
        f"in each process, {sum(each['faults'] for each in results)} faults, {len(failed)} violations"
    )
    for each in failed:
        click.echo(f"\n{each['violation']}\nto repeat it: {replace(settings.run, seed=each['seed']).command()}")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
