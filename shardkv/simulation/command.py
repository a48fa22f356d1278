"""``python -m shardkv.simulation``: one seed, or a swarm of them. Exits with 1 at a violation, with 0 if all held.

Lives here: options, progress and what is printed. Does not live here: a run (``runner``), a swarm's processes and file
(``swarm``), how the process ends (``shardkv.program``).
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import trio
from click.core import ParameterSource

from shardkv.program import Finite, leaf, tell
from shardkv.simulation.faults import KINDS
from shardkv.simulation.runner import RunResult, RunSettings, run
from shardkv.simulation.swarm import SwarmFileError, SwarmSettings, line, result_as_json, swarm
from shardkv.simulation.workload import WORKLOADS

FAULTS_SHOWN_MAX: Final = 40
PROGRESS_SECONDS: Final = 5.0
"""Of real time between two lines that say how far a run is."""
CALLS_PER_SECOND_MAX: Final = 10_000.0
OF_A_SWARM: Final = ("jobs", "resume", "keep_going")
OF_ONE_RUN: Final = ("trace", "as_json")


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
@click.option("--minutes", type=Finite(min=0.01), default=1.0, show_default=True, help="Of virtual time.")
@click.option("--nodes", type=click.IntRange(1, 9), default=3, show_default=True)
@click.option("--workload", type=click.Choice(list(WORKLOADS)), default="mixed", show_default=True)
@click.option(
    "--rate", type=Finite(0.1, CALLS_PER_SECOND_MAX), default=20.0, show_default=True, help="Calls per second."
)
@click.option(
    "--faults", default="all", callback=_faults, show_default=True, help="all, none, or names with commas between them."
)
@click.option("--swarm", "count", type=click.IntRange(min=1), help="Run so many seeds, in processes of their own.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="one for each processor",
    help="Processes of a swarm at once.",
)
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
@click.pass_context
def simulation(
    context: click.Context,
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
) -> int:
    """Run a cluster in virtual time under faults, and judge it.

    \b
    python -m shardkv.simulation --seed 7 --minutes 5
    python -m shardkv.simulation --swarm 1000 --minutes 5
    """
    for name in OF_A_SWARM if count is None else OF_ONE_RUN:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(each.opts[0] for each in context.command.params if each.name == name)
            raise click.UsageError(
                f"{option} goes with --swarm" if count is None else f"{option} is of one run: leave --swarm out"
            )
    if seed is None:
        seed = 1 if count else int.from_bytes(os.urandom(4), "big")  # the one draw that no seed decides
    settings = RunSettings(seed, minutes=minutes, nodes=nodes, workload=workload, rate=rate, faults=faults)
    if count is not None:
        return _swarm(SwarmSettings(settings, count, jobs=jobs, path=resume, keep_going=keep_going))
    return _one(settings, trace, as_json)


class _TraceFile:
    """The file of ``--trace``. That it cannot be written is no violation: the run goes on, and it is told then."""

    def __init__(self, path: Path) -> None:
        self.problem: OSError | None = None
        try:
            self._file = path.open("w")
        except OSError as problem:
            raise click.UsageError(f"{path} cannot be written: {problem.strerror}; name another with --trace") from None

    def write(self, text: str) -> None:
        if self.problem is None:
            self._try(lambda: self._file.write(text))

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as problem:
            self.problem = self.problem or problem


class _Progress:
    """A line on stderr now and then."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._shown = time.perf_counter()

    def __call__(self, virtual_seconds: float) -> None:
        now = time.perf_counter()
        if now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            settings = self._settings
            tell(f"seed {settings.seed}: {virtual_seconds:.0f} of about {settings.minutes * 60:.0f} virtual seconds")


def _one(settings: RunSettings, trace: Path | None, as_json: bool) -> int:
    lines = None if trace is None else _TraceFile(trace)
    if not as_json:
        click.echo(f"seed {settings.seed}")
    began = time.perf_counter()
    try:
        result = run(settings, lines=lines, progress=None if as_json else _Progress(settings))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"to run it again from its beginning: {settings.command()}") from None
    finally:
        if lines is not None:
            lines.close()
    code = _verdict(settings, result, time.perf_counter() - began, as_json)
    if lines is not None and lines.problem is not None:
        raise click.ClickException(f"{trace} is not whole: {lines.problem.strerror}; name another with --trace")
    return code


def _verdict(settings: RunSettings, result: RunResult, real_seconds: float, as_json: bool) -> int:
    found = result_as_json(result, real_seconds)
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
    except BaseException as error:
        match leaf(error):
            case SwarmFileError() as problem:
                raise click.ClickException(str(problem)) from None
            case KeyboardInterrupt():
                raise KeyboardInterrupt(f"the same command goes on from what {settings.path} has") from None
        raise
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
