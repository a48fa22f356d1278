"""A simulated node's clock, workers and death; and that a run repeats from its seed."""

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import trio

from shardkv.environment import Clock, Disk, Environment, Ids, Network, Random, SerialWorker, Workers
from shardkv.errors import StorageError
from shardkv.simulation import (
    KeepAll,
    PowerCut,
    SimulatedEnvironment,
    SimulatedNetwork,
    SimulationClock,
    run_deterministically,
    simulated_environment,
)
from tests.virtual_time import simulated


def world(name: str = "a", seed: int = 1, **settings: object) -> SimulatedEnvironment:
    return simulated_environment(name, seed=seed, network=SimulatedNetwork(seed), **settings)  # type: ignore[arg-type]


def test_the_seams_fit() -> None:
    """mypy holds the protocols; this line is what it checks."""
    e = world()
    seams: tuple[Environment, Clock, Random, Ids, Disk, Workers, Network] = (
        *(e, e.clock, e.random),
        *(e.ids, e.disk, e.workers, e.network),
    )
    assert len(seams) == 7


@simulated
async def test_hours_pass_in_no_time_and_each_clock_drifts_its_own_way(nursery: trio.Nursery) -> None:
    right, fast, slow = SimulationClock(), SimulationClock(drift=0.01), SimulationClock(drift=-0.01)
    await right.sleep(3600)
    assert right.monotonic_ns() == pytest.approx(3600e9)
    assert fast.monotonic_ns() == pytest.approx(3636e9)
    assert slow.monotonic_ns() == pytest.approx(3564e9)
    assert fast.wall_ms() - right.wall_ms() == pytest.approx(36_000)


@simulated
async def test_a_node_sleeps_by_its_own_clock(nursery: trio.Nursery) -> None:
    fast = SimulationClock(drift=0.25)
    await fast.sleep(10)
    assert trio.current_time() == pytest.approx(8)
    with fast.deadline(10) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(16)


@simulated
async def test_a_clock_never_goes_back_when_its_rate_changes(nursery: trio.Nursery) -> None:
    clock = SimulationClock(drift=0.1, monotonic_offset_ns=5)
    readings = []
    for drift in (0.1, -0.1, 0.0, 0.2):
        clock.set_drift(drift)
        readings.append(clock.monotonic_ns())
        await trio.sleep(1)
    steps = [after - before for before, after in pairwise([*readings, clock.monotonic_ns()])]
    assert steps == pytest.approx([1.1e9, 0.9e9, 1.0e9, 1.2e9])


@simulated
async def test_the_wall_clock_may_jump(nursery: trio.Nursery) -> None:
    clock = SimulationClock()
    before, monotonic = clock.wall_ms(), clock.monotonic_ns()
    clock.wall_offset_ms = -70_000
    assert clock.wall_ms() == before - 70_000
    assert clock.monotonic_ns() == monotonic


@simulated
async def test_jobs_take_virtual_time_and_run_in_order(nursery: trio.Nursery) -> None:
    e = world(latency_seconds=lambda: 0.5)
    worker: SerialWorker = await nursery.start(e.workers.serial, "log")
    results: list[object] = []
    finished = trio.Event()
    worker.submit(lambda: "first", lambda result, error: results.append((trio.current_time(), result)))
    worker.submit(lambda: 1 // 0, lambda result, error: results.append(type(error)))
    worker.submit(lambda: "last", lambda result, error: (results.append(result), finished.set()))
    assert results == []
    await finished.wait()
    assert results == [(0.5, "first"), ZeroDivisionError, "last"]
    assert await e.workers.run(divmod, 7, 2) == (3, 1)
    assert trio.current_time() == pytest.approx(2.0)


@simulated
async def test_cancelling_a_worker_finishes_its_jobs(nursery: trio.Nursery) -> None:
    """As the real one does."""
    e = world(latency_seconds=lambda: 0.5)
    results: list[object] = []
    async with trio.open_nursery() as inner:
        worker: SerialWorker = await inner.start(e.workers.serial, "log")
        for number in range(3):
            worker.submit(partial(int, number), lambda result, error: results.append(result))
        inner.cancel_scope.cancel()
    assert results == [0, 1, 2]
    with pytest.raises(trio.ClosedResourceError):
        worker.submit(lambda: None, lambda result, error: None)


@simulated
async def test_jobs_wait_while_the_disk_stalls(nursery: trio.Nursery) -> None:
    """A disk that answers nothing is trap 14's; it fails nothing either."""
    e = world()
    worker: SerialWorker = await nursery.start(e.workers.serial, "log")
    done = trio.Event()
    e.disk.stall()
    worker.submit(lambda: None, lambda result, error: done.set())
    await trio.sleep(60)
    assert not done.is_set()
    e.disk.resume()
    await done.wait()


@simulated
async def test_the_jobs_of_a_crashed_node_do_not_run(nursery: trio.Nursery) -> None:
    """First the fence, then the cancellation: nothing of it counts (DESIGN 3)."""
    e = world(latency_seconds=lambda: 0.5)
    ran: list[str] = []
    async with trio.open_nursery() as node:
        worker: SerialWorker = await node.start(e.workers.serial, "log")
        worker.submit(lambda: ran.append("serial"), lambda result, error: ran.append("called back"))
        node.start_soon(e.workers.run, ran.append, "general")
        await trio.sleep(0.1)
        e.power_off()
        node.cancel_scope.cancel()
    await trio.sleep(10)
    assert ran == []


@simulated
async def test_a_fenced_node_that_still_runs_is_called_back_by_nothing(nursery: trio.Nursery) -> None:
    e = world(latency_seconds=lambda: 0.5)
    ran: list[str] = []
    worker: SerialWorker = await nursery.start(e.workers.serial, "log")
    worker.submit(lambda: ran.append("serial"), lambda result, error: ran.append("called back"))
    nursery.start_soon(e.workers.run, ran.append, "general")
    await trio.sleep(0.1)
    e.fence()
    await trio.sleep(10)
    worker.submit(lambda: ran.append("later"), lambda result, error: ran.append("called back"))
    await trio.sleep(10)
    assert ran == []


@simulated
async def test_a_crash_ends_a_node_whose_disk_stalls(nursery: trio.Nursery) -> None:
    e = world()
    ran: list[str] = []
    async with trio.open_nursery() as node:
        e.disk.stall()
        node.start_soon(e.workers.run, ran.append, "job")
        await trio.sleep(1)
        e.kill()
        node.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(1), "the job held the node up"
    await trio.sleep(10)
    assert ran == []


@simulated
async def test_a_power_cut_in_a_job_fences_the_node(nursery: trio.Nursery) -> None:
    e = world()
    e.disk.make_directory("/data")
    e.disk.cut_power_at(e.disk.calls + 1)
    with pytest.raises(PowerCut):
        e.disk.open("/data/f", create=True)
    assert e.network.fenced
    e.disk.open("/data/g", create=True)
    e.disk.crash(KeepAll())
    assert e.disk.restart().files() == {}


@simulated
async def test_a_killed_node_keeps_what_it_wrote_and_a_dead_machine_does_not(nursery: trio.Nursery) -> None:
    for die, expected in ((SimulatedEnvironment.kill, b"new"), (SimulatedEnvironment.power_off, b"old")):
        e = world()
        e.disk.make_directory("/data")
        e.disk.write_atomically("/data/f", b"old")
        e.disk.open("/data/f").pwrite(b"new", 0)
        die(e)
        again = e.restart()
        assert again.disk.read("/data/f") == expected
        assert again.incarnation == 1
        assert again.ids.random_bytes(16) != e.ids.random_bytes(16)
        assert not again.network.fenced


@simulated
async def test_an_error_of_the_disk_reaches_the_callback(nursery: trio.Nursery) -> None:
    e = world()
    e.disk.make_directory("/data")
    file = e.disk.open("/data/f", create=True)
    e.disk.fail("sync", StorageError("broken"))
    worker: SerialWorker = await nursery.start(e.workers.serial, "log")
    errors: list[BaseException | None] = []
    done = trio.Event()
    worker.submit(file.sync, lambda result, error: (errors.append(error), done.set()))
    await done.wait()
    assert isinstance(errors[0], StorageError)


def test_each_node_has_chance_of_its_own_and_a_seed_repeats_it() -> None:
    draws = {name: [world(name, seed).random.randrange(1 << 30) for seed in (1, 2)] for name in "ab"}
    assert len({draw for each in draws.values() for draw in each}) == 4
    assert draws == {name: [world(name, seed).random.randrange(1 << 30) for seed in (1, 2)] for name in "ab"}
    assert world("a").ids.random_bytes(16) == world("a").ids.random_bytes(16)
    assert world("a").ids.random_bytes(16) != world("b").ids.random_bytes(16)


ORDER = """
import trio
from shardkv.simulation import run_deterministically
order = []
async def main():
    async def note(number):
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            order.append(number)
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(note, number)
import sys
run_deterministically(main, seed=int(sys.argv[1]))
print(order)
"""


def test_the_order_of_ready_tasks_follows_from_the_seed_in_every_process() -> None:
    """Trio shuffles them; without the seed a failed run would not repeat."""

    def order(seed: int, hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", ORDER, str(seed)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert order(1, "1") == order(1, "2")
    assert order(1, "1") != order(2, "1")


def test_the_scheduler_is_left_as_it_was_found() -> None:
    from trio._core import _run

    before = (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)

    async def fail() -> None:
        raise KeyError("out")

    with pytest.raises(KeyError):
        run_deterministically(fail, seed=1)
    assert (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING) == before
