"""Many seeds, each in a process of its own: what has run is kept in a file, so that a swarm resumes where it stopped.

Lives here: processes, the file and what people see of it. Does not live here: a run (``runner``). The rules: a seed's
verdict is written before it is shown; results of other code or other settings are never taken for this one's; and a
file that is no swarm's is left as it is.
"""

import contextlib
import fcntl
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final

import trio

import shardkv
import shardkv_client
import shardkv_placement
from shardkv.simulation.runner import RunResult, RunSettings

FILE_VERSION: Final = 1
SECONDS_MAX: Final = 900.0
"""Of real time for one seed: one that takes longer has stopped in the middle of a virtual moment."""
ENDED_BY_SOMEBODY: Final = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
"""What a run's process says that was told to end; it says nothing about the seed."""


class SwarmFileError(Exception):
    """The file cannot be read or written, or is not of this swarm. The message says what to do."""


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

    Raises SwarmFileError if the file is of other code or other settings, or no swarm's at all.
    """
    return _read(settings)[0]


def _read(settings: SwarmSettings) -> tuple[dict[int, dict[str, Any]], int]:
    """The results, and how many bytes of the file are whole lines."""
    path = settings.path
    try:
        data = path.read_bytes() if path.is_file() else b""  # a device may have no end
    except OSError as problem:
        raise SwarmFileError(f"{path} cannot be read: {problem.strerror}; name another with --resume") from None
    whole, _, cut = data.rpartition(b"\n")
    if not whole and not _header(settings).startswith(cut):
        raise SwarmFileError(f"{path} has no results of a swarm; name another with --resume")
    found: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(whole.splitlines()):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if not isinstance(record, dict) or (number > 0 and not isinstance(record.get("seed"), int)):
            raise SwarmFileError(
                f"line {number + 1} of {path} is no result of a swarm; remove the file, or name another with --resume"
            )
        if number > 0:
            found[record["seed"]] = record
        elif record != settings.parameters():
            raise SwarmFileError(
                f"{path} has results of other code or other settings; remove it, or name another with --resume"
            )
    return found, len(data) - len(cut)


def _header(settings: SwarmSettings) -> bytes:
    return json.dumps(settings.parameters()).encode() + b"\n"


@contextlib.contextmanager
def _results(settings: SwarmSettings) -> Iterator[tuple[dict[int, dict[str, Any]], BinaryIO]]:
    """What the file has, and the file to add to, for this swarm alone. Raises SwarmFileError."""
    path = settings.path
    try:
        file = path.open("a+b", buffering=0)
    except OSError as problem:
        raise _unwritten(path, problem) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SwarmFileError(
                f"another swarm is writing to {path}; let it end, or name another file with --resume"
            ) from None
        except OSError:
            pass  # Not every file system has locks.
        found, whole = _read(settings)
        if file.seek(0, 2) > whole:
            file.truncate(whole)
        if not whole:
            _write(path, file, _header(settings))
        yield found, file


def _write(path: Path, file: BinaryIO, line: bytes) -> None:
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as problem:
        raise _unwritten(path, problem) from None


def _unwritten(path: Path, problem: OSError) -> SwarmFileError:
    return SwarmFileError(f"{path} cannot be written: {problem.strerror}; name another with --resume")


async def swarm(settings: SwarmSettings, show: Callable[[str], object]) -> list[dict[str, Any]]:
    """Run every seed that the file does not have yet; all results, in order of their seeds.

    Raises SwarmFileError, perhaps in a group, if the file cannot be used or the code changes meanwhile.
    """
    with _results(settings) as (found, file):
        seeds = range(settings.run.seed, settings.run.seed + settings.count)
        done = {seed: found[seed] for seed in seeds if seed in found}
        todo = [seed for seed in seeds if seed not in done]
        if done:
            show(f"resuming: {len(done)} of {settings.count} seeds are done")
        if any(each["violation"] for each in done.values()) and not settings.keep_going:
            todo = []
        state = _Swarm(settings, done, todo, file, show)
        async with trio.open_nursery() as nursery:
            for _ in range(min(settings.jobs, len(todo))):
                nursery.start_soon(state.work)
    if state.code_changed:
        raise SwarmFileError(
            f"the sources changed while the swarm ran; what {settings.path} has is of what they were before: go on "
            "with those, or remove the file"
        )
    return [done[seed] for seed in seeds if seed in done]


class _Swarm:
    def __init__(
        self,
        settings: SwarmSettings,
        done: dict[int, dict[str, Any]],
        todo: list[int],
        file: BinaryIO,
        show: Callable[[str], object],
    ) -> None:
        self.settings = settings
        self.done = done
        self.todo = todo[::-1]
        self.file = file
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
            _write(self.settings.path, self.file, json.dumps(found).encode() + b"\n")
            self.done[seed] = found
            self.show(f"[{len(self.done)}/{self.settings.count}] {line(found)}")
            if found["violation"] and not self.settings.keep_going:
                self.todo.clear()

    async def _one(self, run: RunSettings) -> dict[str, Any]:
        command = [sys.executable, *run.command().split()[1:], "--json"]
        with trio.move_on_after(SECONDS_MAX):
            # In a group of its own: an interrupt from the terminal is for the swarm, which ends what it has started.
            process = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False, process_group=0
            )
            if process.returncode in ENDED_BY_SOMEBODY:
                raise KeyboardInterrupt
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
