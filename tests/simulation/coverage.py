"""``python -m tests.simulation.coverage``: which lines of the product the swarm alone reaches.

Runs seeds of a swarm in this process, under all faults, each workload in turn. Left out, for they cannot run in
virtual time: the client's blocking and asyncio faces and its real clock, dialler and random source.
Not counted, for nothing executes them: bodies of protocols and what only type checkers read. The rule: no test runs
here, only what ``python -m shardkv.simulation --swarm`` does.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click
import coverage

from shardkv.program import run_program

ROOT: Final = Path(__file__).resolve().parents[2]
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "multiraft": ("shardkv/multiraft/*.py",),
    "the WAL": tuple(
        f"shardkv/storage/{name}.py"
        for name in ("wal", "record", "segment", "group_log", "recovery", "collection", "log_state")
    ),
    "the server's routing": tuple(
        f"shardkv/server/{name}.py"
        for name in ("requests", "client_connection", "listener", "operations", "peers", "intake")
    ),
    "the client": ("client/shardkv_client/*.py", "client/shardkv_client/core/*.py"),
}
OUTSIDE: Final = frozenset({"client/shardkv_client/blocking.py", "client/shardkv_client/environment.py"})
"""What cannot run in virtual time: threads, sockets, the system's clock."""
NOT_EXECUTED: Final = [r"class Asyncio", r"if TYPE_CHECKING:", r"^\s*\.\.\.$", r"\) -> .*: \.\.\.$"]
ENOUGH: Final = 90.0


def files(patterns: Iterable[str]) -> list[Path]:
    return [
        path
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
        if str(path.relative_to(ROOT)) not in OUTSIDE
    ]


def spans(lines: list[int]) -> str:
    """``1-3 7 9-10``."""
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return " ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in found)


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--first", type=int, default=1, show_default=True)
@click.option("--minutes", type=float, default=1.0, show_default=True, help="Of virtual time for each.")
@click.option("--missing/--no-missing", default=True, show_default=True, help="List the lines that were not reached.")
def main(seeds: int, first: int, minutes: float, missing: bool) -> None:
    """Line coverage of the swarm alone. Exits with 1 below 90 % in a group, or at a violation."""
    wanted = [str(path) for patterns in GROUPS.values() for path in files(patterns)]
    counting = coverage.Coverage(data_file=None, include=wanted, config_file=False, messages=False)
    for pattern in NOT_EXECUTED:
        counting.exclude(pattern)
    counting.start()
    violations = _swarm(range(first, first + seeds), minutes)
    counting.stop()
    low = False
    for name, patterns in GROUPS.items():
        low = _report(counting, name, files(patterns), missing=missing) < ENOUGH or low
    sys.exit(1 if violations or low else 0)


def _swarm(seeds: range, minutes: float) -> int:
    # Imported here: what a module does when it is imported counts.
    from shardkv.simulation.runner import RunSettings, run
    from shardkv.simulation.workload import WORKLOADS

    violations = 0
    names = list(WORKLOADS)
    for seed in seeds:
        result = run(RunSettings(seed, minutes=minutes, workload=names[seed % len(names)], rate=40))
        if result.violation is not None:
            violations += 1
            click.echo(f"{result.violation}\nto repeat it: {result.settings.command()}", err=True)
    return violations


def _report(counting: coverage.Coverage, name: str, paths: list[Path], *, missing: bool) -> float:
    total = reached = 0
    lines = []
    for path in paths:
        _, statements, _, left, _ = counting.analysis2(str(path))
        total += len(statements)
        reached += len(statements) - len(left)
        share = 100 * (1 - len(left) / max(len(statements), 1))
        lines.append(f"  {path.relative_to(ROOT)}: {share:.0f} % of {len(statements)}")
        if missing and left:
            lines[-1] += f"; not {spans(left)}"
    percent = 100 * reached / max(total, 1)
    click.echo(f"{name}: {percent:.1f} % of {total} lines")
    click.echo("\n".join(lines))
    return percent


if __name__ == "__main__":
    run_program(lambda: main.main(prog_name="python -m tests.simulation.coverage", standalone_mode=False))
