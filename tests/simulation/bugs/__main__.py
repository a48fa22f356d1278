"""``python -m tests.simulation.bugs``: switch each bug on, run seeds until it is found, and say what it took.

Exits with 1 if a bug is not found, or if the run that finds it is not clean without it.
"""

import json
import sys
import time

import click

from shardkv.program import run_program
from tests.simulation.bugs import ALL
from tests.simulation.bugs.table import Bug, checker


@click.command()
@click.option("--bug", "names", multiple=True, type=click.Choice(list(ALL)), help="Only this one; may be repeated.")
@click.option("--seeds", type=click.IntRange(min=1), default=200, show_default=True, help="How many to try, from 1 on.")
@click.option("--first", type=int, default=1, show_default=True, help="The first seed.")
@click.option("--minutes", type=float, help="Of virtual time for each run; by default what the table says.")
@click.option("--all-faults", is_flag=True, help="With every kind of fault instead of the bug's own mix.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each bug.")
def main(
    names: tuple[str, ...], seeds: int, first: int, minutes: float | None, all_faults: bool, as_json: bool
) -> None:
    """Look for every deliberate bug."""
    missed = 0
    for name in names or ALL:
        found = _search(ALL[name], range(first, first + seeds), minutes, all_faults=all_faults)
        missed += not found["found"] or not found["clean"]
        if as_json:
            click.echo(json.dumps(found))
        elif found["found"]:
            control = "clean without it" if found["clean"] else f"NOT CLEAN WITHOUT IT: {found['control']}"
            click.echo(
                f"{name}: seed {found['seed']}, after {found['tried']} of {seeds} seeds and {found['seconds']:.1f} s, "
                f"by {found['checker']}; {control}"
            )
        else:
            click.echo(f"{name}: NOT FOUND in {seeds} seeds and {found['seconds']:.1f} s")
        sys.stdout.flush()
    sys.exit(1 if missed else 0)


def _search(bug: Bug, seeds: range, minutes: float | None, *, all_faults: bool) -> dict[str, object]:
    if minutes is not None or all_faults:
        bug = bug.changed(minutes, all_faults=all_faults)
    began = time.process_time()
    found: dict[str, object] = {"bug": bug.name, "found": False, "clean": True}
    for tried, seed in enumerate(seeds, 1):
        result = bug.run(seed)
        if result.violation is not None:
            control = bug.run(seed, switched_on=False).violation
            found.update(
                found=True,
                seed=seed,
                tried=tried,
                checker=checker(result),
                violation=result.violation.splitlines()[0],
                clean=control is None,
                control=control.splitlines()[0] if control else None,
            )
            break
    found["seconds"] = round(time.process_time() - began, 2)
    return found


if __name__ == "__main__":
    run_program(lambda: main.main(prog_name="python -m tests.simulation.bugs", standalone_mode=False))
