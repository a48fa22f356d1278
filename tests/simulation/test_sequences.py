"""Faults in sequence, and errands: a sound database withstands each, and what they are to provoke does happen."""

import pytest

from shardkv.simulation import run_deterministically, simulated_cluster
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.faults import KINDS, Faults
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.runner import RunSettings, run
from shardkv.simulation.sequences import SEQUENCES


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_of_faults_alone_is_withstood(name: str) -> None:
    settings = RunSettings(5, minutes=0.06, faults=(name,))
    result = run(settings)
    assert result.violation is None, f"{result.violation}\nto repeat it: {settings.command()}"
    assert result.faults > 0


def test_errands_alone_are_withstood() -> None:
    result = run(RunSettings(6, minutes=0.2, workload="errands", rate=60, faults=()))
    assert result.violation is None, result.violation
    assert result.answered > 50


@pytest.mark.parametrize("name", ["rot", "reborn"])
def test_a_node_on_a_wrong_disk_refuses_and_goes_on_with_its_own(name: str) -> None:
    """Traps 20 and 24: damage below the synced mark, and an empty disk under an old name."""
    noted: list[str] = []

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            faults = Faults(cluster, 1, [name], lambda: b"k")
            node = cluster.nodes["n3"]
            await SEQUENCES[name](faults, node, node)
            noted.extend(faults.history)
            await node.ready.wait()
            await kv.put(b"k", b"w")

    run_deterministically(main, seed=1)
    assert any("n3 refused" in line for line in noted), noted


def test_a_disk_that_was_full_is_put_back_with_room() -> None:
    """Whoever fills a disk makes room on that one only: full for ever, the node would never start again."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            faults = Faults(cluster, 1, ["reborn"], lambda: b"k")
            node = cluster.nodes["n3"]
            node.environment.disk.leave(0)
            await SEQUENCES["reborn"](faults, node, node)
            await cluster.sleep(5)
            assert node.ready.is_set()

    run_deterministically(main, seed=1)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_passes_over_a_node_that_is_only_just_started(name: str) -> None:
    """In a cluster that grows there is always one, and of more than three nodes the others are enough to act on."""

    async def main() -> None:
        async with simulated_cluster(4, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            cluster.add("n5").start_soon()
            faults = Faults(cluster, 1, [name], lambda: b"k")
            await SEQUENCES[name](faults, cluster.nodes["n3"], cluster.nodes["n2"])
            await faults.heal_for_good()
            found = await kv.get(b"k", timeout=30)
            assert found is not None
            assert found.value == b"v"

    run_deterministically(main, seed=1)


def test_a_node_that_was_never_let_in_may_come_with_an_empty_disk() -> None:
    """It has forgotten nothing: the cluster takes it for a new one, and that it served was a false alarm."""

    async def main() -> None:
        async with simulated_cluster(2, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            node = cluster.add("n3")
            node.start_soon()
            faults = Faults(cluster, 1, ["reborn"], lambda: b"k")
            await SEQUENCES["reborn"](faults, node, cluster.nodes["n1"])
            await faults.heal_for_good()
            found = await kv.get(b"k", timeout=30)
            assert found is not None
            assert found.value == b"v"

    run_deterministically(main, seed=1)


@pytest.mark.parametrize("seconds", [0, 0.0002])
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_may_happen_to_a_node_that_is_only_just_started(name: str, seconds: float) -> None:
    """It has no directory for its log yet, or no log."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            await kv.put(b"k", b"v")
            node = cluster.add("n4")
            node.start_soon()
            await cluster.sleep(seconds)
            faults = Faults(cluster, 1, [name], lambda: b"k")
            await SEQUENCES[name](faults, node, cluster.nodes["n1"])
            await faults.heal_for_good()
            found = await kv.get(b"k", timeout=30)
            assert found is not None
            assert found.value == b"v"

    run_deterministically(main, seed=1)


def test_a_violation_while_a_disk_stalls_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left who would end the stall, and a log that is being closed waits for its disk."""

    async def stalled(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
        for node in faults.cluster.nodes.values():
            node.environment.disk.stall()
        async with faults.cluster.client() as kv:
            with pytest.raises(Exception, match="timeout"):
                await kv.put(b"k", b"v", timeout=0.2)
        raise Violation("a-rule", "it does not hold")

    monkeypatch.setitem(KINDS, "drop", stalled)
    result = run(RunSettings(1, minutes=0.1, faults=("drop",)))
    assert result.violation is not None
    assert "a-rule" in result.violation
