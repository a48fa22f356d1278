"""Single moments rather than loads: cold start to the first write, and a leader's death to the next write.

Both systems are probed alike: a new write every PROBE_SECONDS, each on its own, and what counts is the first that is
acknowledged. So neither is blamed for a write that waits for a timeout of its client.
"""

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from shardkv.errors import ShardKVError
from shardkv_bench import grpc_wire
from shardkv_bench.etcd import EtcdConnection
from shardkv_bench.shardkv_driver import connect
from shardkv_bench.systems import Etcd, ShardKV, System
from shardkv_bench.workloads import key_of

if TYPE_CHECKING:
    from shardkv_client import Client

PROBE_SECONDS: Final = 0.02
TRIAL_SECONDS_MAX: Final = 30.0
CALM_SECONDS: Final = 2.0
"""Between a node's return and the next kill, so that it has caught up and terms have settled."""
PROBE_KEY: Final = key_of(0)
"""In the range whose leader is killed, however many ranges there are."""
PROBE_VALUE: Final = b"probe"


def cold_start(system: ShardKV | Etcd) -> float:
    """Seconds from starting three processes on empty directories to the first acknowledged write."""
    started = time.perf_counter()
    for name in system.cluster.names:
        system.cluster.start_node(name)
    if isinstance(system, ShardKV):
        trio.run(_first_shardkv_write, system.addresses)
    else:
        deadline = time.perf_counter() + TRIAL_SECONDS_MAX
        while not system.put_once(PROBE_KEY, PROBE_VALUE, 1.0):
            if time.perf_counter() > deadline:
                raise TimeoutError(f"etcd took no write within {TRIAL_SECONDS_MAX:g} s")
            time.sleep(PROBE_SECONDS / 2)
    return time.perf_counter() - started


def failover(system: System) -> float:
    """Seconds from SIGKILL of the leader to the first write acknowledged that was sent after it. The node is
    restarted afterwards."""
    leader = system.leader()
    if isinstance(system, ShardKV):
        seconds = trio.run(_shardkv_failover, system, leader)
    else:
        assert isinstance(system, Etcd), system
        seconds = _etcd_failover(system, leader)
    system.restart(leader)
    system.prepare()
    time.sleep(CALM_SECONDS)
    return seconds


async def _first_shardkv_write(addresses: str) -> None:
    """Probe until a write is acknowledged; the client dials anew for as long as nobody listens."""
    async with connect(addresses) as client:
        await _probe(client)


async def _probe(client: "Client") -> None:
    done = trio.Event()

    async def put() -> None:
        try:
            await client.put(PROBE_KEY, PROBE_VALUE, timeout=TRIAL_SECONDS_MAX)
        except ShardKVError:
            return
        done.set()

    async with trio.open_nursery() as nursery:

        async def probe() -> None:
            while True:
                nursery.start_soon(put)
                await trio.sleep(PROBE_SECONDS)

        nursery.start_soon(probe)
        with trio.move_on_after(TRIAL_SECONDS_MAX):
            await done.wait()
        nursery.cancel_scope.cancel()
    if not done.is_set():
        raise TimeoutError(f"shardkv took no write within {TRIAL_SECONDS_MAX:g} s")


async def _shardkv_failover(system: ShardKV, leader: str) -> float:
    async with connect(system.addresses) as client:
        await client.put(PROBE_KEY, PROBE_VALUE, timeout=TRIAL_SECONDS_MAX)
        process = system.cluster.processes[leader]
        killed = time.perf_counter()
        process.signal(9)
        await _probe(client)
        seconds = time.perf_counter() - killed
    process.wait()
    return seconds


def _etcd_failover(system: Etcd, leader: str) -> float:
    survivors = [address for name, address in system.cluster.addresses.items() if name != leader]
    done = threading.Event()
    acknowledged: list[float] = []

    def probe(address: str) -> None:
        try:
            with EtcdConnection(address, TRIAL_SECONDS_MAX) as connection:
                answer = connection.request(
                    grpc_wire.PUT_PATH, grpc_wire.put_request(PROBE_KEY, PROBE_VALUE), TRIAL_SECONDS_MAX
                )
        except OSError:
            return
        if answer is not None:
            acknowledged.append(time.perf_counter())
            done.set()

    process = system.cluster.processes[leader]
    killed = time.perf_counter()
    process.signal(9)
    number = 0
    while not done.is_set() and time.perf_counter() - killed < TRIAL_SECONDS_MAX:
        threading.Thread(target=probe, args=(survivors[number % 2],), daemon=True).start()
        number += 1
        done.wait(PROBE_SECONDS)
    process.wait()
    if not acknowledged:
        raise TimeoutError("etcd took no write after its leader was killed")
    return min(acknowledged) - killed


def fsync_seconds(directory: Path, count: int = 200) -> tuple[float, float]:
    """The median and the 99th percentile of a 4 KiB append and fdatasync in ``directory``."""
    import os

    path = directory / "fsync-probe"
    block = b"\0" * 4096
    taken = []
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            started = time.perf_counter()
            file.write(block)
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - started)
    path.unlink()
    taken.sort()
    return taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
