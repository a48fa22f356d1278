"""Disks that are not what they should be: slow, damaged, or empty under an old name.

Lives here: what a node must do on such a disk, as sequences of faults (``sequences`` has the others). The rule: a node
that would serve what it has lost must refuse to start.
"""

from typing import TYPE_CHECKING, Final

import trio

from shardkv.errors import ShardKVError
from shardkv.simulation import determinism
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.crash_choosers import LoseAll
from shardkv.simulation.disk import CAPACITY_BYTES, SimulatedDisk
from shardkv.simulation.node import SimulatedNode
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.record import HEADER_BYTES, Header, unpack_header
from shardkv.storage.segment import segment_id_of

if TYPE_CHECKING:
    from shardkv.simulation.faults import Faults

REFUSING_SECONDS: Final = 3.0
"""For so long a node that must not serve is watched."""


async def slow_disk(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """Every job of a disk takes long: what is written waits behind what is being synced, and may never get there."""
    if one.name in faults.slow_disks:
        return
    faults.slow_disks.add(one.name)
    usual = one.environment.workers.latency_seconds
    seconds = faults.chance.choice([0.005, 0.03, 0.1])
    one.environment.workers.latency_seconds = lambda: seconds

    async def quicken() -> None:
        await determinism.sleep(faults.chance.uniform(0.3, 3))
        if faults.chance.random() < 0.4 and one.alive and not faults.healing:
            await one.power_off(chooser=LoseAll())
            faults.soon(faults.restart_later, one)
        await one.buried()
        one.environment.workers.latency_seconds = usual
        faults.slow_disks.discard(one.name)

    faults.soon(quicken)


async def _refused(faults: "Faults", node: SimulatedNode, disk: SimulatedDisk, engine: MemoryEngine, why: str) -> None:
    """Start a node that is down on a disk on which it must not serve, watch it refuse, and put its own one back."""
    good, good_engine = node.environment.disk, node.copied_engine()
    node.restore(disk, engine)
    node.out_of_service = True
    node.ready = trio.Event()
    try:
        with determinism.deadline_after(REFUSING_SECONDS):
            await node.run_to_its_end()
    except ShardKVError as error:
        faults.note(f"{node.name} refused: {type(error).__name__}")
    finally:
        node.out_of_service = False
    if node.ready.is_set():
        raise Violation("serves-on-a-wrong-disk", f"{node.name} serves, with {why}")
    node.environment.kill()
    node.restore(good.copy(), good_engine)
    node.environment.disk.capacity_bytes = CAPACITY_BYTES  # who had filled the other disk does not find this one
    node.start_soon()


async def rot(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A record of the log that was synced is damaged for good while the node is down."""
    if not one.alive or faults.healing:
        return
    await one.power_off(kept_batches=faults.kept)
    damaged = one.environment.disk.copy()
    where = _damage(faults, damaged, f"{one.config.data}/wal")
    if where is None:
        faults.soon(faults.restart_later, one)
        return
    faults.note(f"{one.name} {where}")
    await _refused(faults, one, damaged, one.copied_engine(), f"{where} damaged")


def _damage(faults: "Faults", disk: SimulatedDisk, directory: str) -> str | None:
    """Flip a bit of a record of which a later one says that it was synced; which, or None if there is none."""
    names = disk.list(directory) if disk.exists(directory) else []
    segments = sorted((segment_id_of(name), name) for name in names if segment_id_of(name) is not None)
    if not segments:
        return None  # it was only just started for the first time
    path = f"{directory}/{segments[-1][1]}"
    content = disk.read(path)
    records: list[tuple[int, Header]] = []
    offset = 0
    while (header := unpack_header(content[offset : offset + HEADER_BYTES], segments[-1][0] or 0)) is not None:
        records.append((offset, header))
        offset += header.record_bytes
    synced = max((header.synced_sequence for _, header in records), default=0)
    known = [(offset, header) for offset, header in records[1:] if header.sequence <= synced]
    if not known:
        return None
    offset, header = faults.chance.choice(known)
    position = offset + HEADER_BYTES + faults.chance.randrange(header.record_bytes - HEADER_BYTES)
    file = disk.open(path)
    file.pwrite(bytes([content[position] ^ (1 << faults.chance.randrange(8))]), position)
    file.sync()
    file.close()
    return f"record {header.sequence} of {path}"


async def reborn(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A node that is down is started on an empty disk: under its name comes one that has forgotten all its votes."""
    if not one.composed or faults.healing or not one.config.join:
        return  # the cluster may not have let it in yet, and would take any disk
    await one.kill(kept_batches=faults.kept)
    await _refused(faults, one, SimulatedDisk(), MemoryEngine(crashable=True), "an empty disk under an old name")
