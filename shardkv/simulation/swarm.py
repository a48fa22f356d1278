"""Many seeds, each in a process of its own: what has run is kept in a file, so that a swarm resumes where it stopped.

Lives here: processes, the file and what people see of it. Does not live here: a run (``runner``). The rules: a seed's
verdict is written before it is shown; and results of other code or other settings are never taken for this one's.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import trio

import shardkv
import shardkv_client
import shardkv_placement
from shardkv.simulation.runner import RunResult, RunSettings

FILE_VERSION: Final = 1
SECONDS_MAX: Final = 900.0
"""Of real time for one seed: one that takes longer has stopped in the middle of a virtual moment."""


class SwarmFileError(Exception):
    """The results in the file are not of this swarm. The message says what to do."""


@dataclass(frozen=True, slots=True)
class SwarmSettings:
    """A swarm: the seeds ``first`` to ``first + count`` of one kind of run."""

    run: RunSettings
    """Its seed is the first."""
    count: int
    jobs: int
    path: Path
    keep_going: bool = False
    """Whether to go on after a violation."""

    def parameters(self) -> dict[str, Any]:
        """What results in a file must have been made with to count."""
        parameters = asdict(self.run)
        del parameters["seed"]
        return {"version": FILE_VERSION, "code": code_fingerprint(), **parameters, "faults": list(self.run.faults)}


def code_fingerprint() -> str:
    """Of the sources that a run executes: two swarms with the same are of the same code."""
    digest = blake2b(digest_size=8)
    for package in (shardkv, shardkv_client, shardkv_placement):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def result_as_json(result: RunResult, real_seconds: float) -> dict[str, Any]:
    """One line of the file."""
    return {
        "seed": result.settings.seed,
        "violation": result.violation,
        "digest": result.digest,
        "virtual_seconds": round(result.virtual_seconds, 3),
        "real_seconds": round(real_seconds, 3),
        "calls": result.calls,
        "answered": result.answered,
        "unknown": result.unknown,
        "faults": result.faults,
        "events": result.events,
        "heal_seconds": round(result.heal_seconds, 3),
        "highest": result.highest,
    }


def line(found: dict[str, Any]) -> str:
    """One seed's verdict for people."""
    if found["violation"]:
        return f"seed {found['seed']} VIOLATION {found['violation'].splitlines()[0]}"
    speed = found["virtual_seconds"] / max(found["real_seconds"], 0.001)
    return (
        f"seed {found['seed']} ok {found['digest']}: {found['calls']} calls, {found['answered']} answered, "
        f"{found['unknown']} unknown, {found['faults']} faults, writing again after {found['heal_seconds']:.2f} s, "
        f"{speed:.0f} times real time"
    )


def load(settings: SwarmSettings) -> dict[int, dict[str, Any]]:
    """What the file has of this swarm, by seed; a line that a crash cut short is not there.

    Raises SwarmFileError if the file is of other code or other settings.
    """
    if not settings.path.exists():
        return {}
    found: dict[int, dict[str, Any]] = {}
    lines = settings.path.read_text().splitlines()
    for number, text in enumerate(lines):
        try:
            record = json.loads(text)
        except ValueError:
            if number == len(lines) - 1:
                break
            raise SwarmFileError(f"{settings.path}: line {number + 1} is no JSON; remove the file") from None
        if number == 0:
            if record != settings.parameters():
                raise SwarmFileError(
                    f"{settings.path} has results of other code or other settings; remove it, or name another with "
                    "--resume"
                )
        else:
            found[record["seed"]] = record
    return found


async def swarm(settings: SwarmSettings, show: Callable[[str], object]) -> list[dict[str, Any]]:
    """Run every seed that the file does not have yet; all results, in order of their seeds.

    Raises SwarmFileError if the file is of other code or other settings, or the code changes meanwhile.
    """
    done = load(settings)
    seeds = range(settings.run.seed, settings.run.seed + settings.count)
    todo = [seed for seed in seeds if seed not in done]
    if len(todo) < settings.count:
        show(f"resuming: {settings.count - len(todo)} of {settings.count} seeds are done")
    whole = [f"{text}\n" for text in _kept(settings, done)]
    settings.path.write_text("".join(whole))
    if any(done[seed]["violation"] for seed in seeds if seed in done) and not settings.keep_going:
        todo = []
    state = _Swarm(settings, done, todo, show)
    async with trio.open_nursery() as nursery:
        for _ in range(min(settings.jobs, len(todo))):
            nursery.start_soon(state.work)
    if state.code_changed:
        raise SwarmFileError(
            f"the sources changed while the swarm ran; what {settings.path} has is of what they were before: go on "
            "with those, or remove the file"
        )
    return [done[seed] for seed in seeds if seed in done]


def _kept(settings: SwarmSettings, done: dict[int, dict[str, Any]]) -> Iterable[str]:
    yield json.dumps(settings.parameters())
    for record in done.values():
        yield json.dumps(record)


class _Swarm:
    def __init__(
        self,
        settings: SwarmSettings,
        done: dict[int, dict[str, Any]],
        todo: list[int],
        show: Callable[[str], object],
    ) -> None:
        self.settings = settings
        self.done = done
        self.todo = todo[::-1]
        self.show = show
        self.code = code_fingerprint()
        self.code_changed = False
        """While a seed ran: nobody knows of which code its result is, and it was not kept."""

    async def work(self) -> None:
        """One process after another, until there is nothing to do."""
        while self.todo:
            seed = self.todo.pop()
            found = await self._one(replace(self.settings.run, seed=seed))
            if self.code_changed or code_fingerprint() != self.code:
                self.code_changed = True
                self.todo.clear()
                return
            with self.settings.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            self.done[seed] = found
            self.show(f"[{len(self.done)}/{self.settings.count}] {line(found)}")
            if found["violation"] and not self.settings.keep_going:
                self.todo.clear()

    async def _one(self, run: RunSettings) -> dict[str, Any]:
        command = [sys.executable, *run.command().split()[1:], "--json"]
        with trio.move_on_after(SECONDS_MAX):
            process = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
            try:
                found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
                return found
            except (ValueError, IndexError):
                last = process.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
                return _failed(run, f"the run's process ended with {process.returncode}: {last[0]}")
        return _failed(run, f"the run did not end within {SECONDS_MAX:g} s of real time")


def _failed(run: RunSettings, why: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("calls", "answered", "unknown", "faults", "events"), 0)
    times = dict.fromkeys(("virtual_seconds", "real_seconds", "heal_seconds"), 0.0)
    return {"seed": run.seed, "violation": why, "digest": "", **nothing, **times, "highest": {}}
