"""Short runs of the soaks: crashes, standstills and partitions of real processes, judged by the checker.

The long ones are ``python -m tests.cluster.soak kills|stops|partitions``.
"""

import errno
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import kills, partitions, soak, stops
from tests.cluster.harness import cluster
from tests.cluster.namespaces import Net, Place, net, obstacle

pytestmark = pytest.mark.cluster

OBSTACLE = obstacle()
needs_namespaces = pytest.mark.skipif(OBSTACLE is not None, reason=f"no network namespaces: {OBSTACLE}")


async def test_histories_stay_linearizable_while_nodes_are_killed_at_random_moments(tmp_path: Path) -> None:
    """DESIGN 2.3, 4.3 and 4.6: kill -9 loses nothing that was acknowledged, and nothing is done twice."""
    done = kills.Kills(5, seed=2)
    async with cluster(tmp_path, options=kills.OPTIONS) as world:
        workload = await kills.run(world, done)
    assert done.done >= 5
    assert workload.judged >= len(workload.rounds)


async def test_trap_07_histories_stay_linearizable_while_leaders_stand_still(tmp_path: Path) -> None:
    """DESIGN 4.5: a leader that was stopped for longer than its lease serves nothing from before when it goes on."""
    done = stops.Stops(4, seed=2)
    async with cluster(tmp_path, options=stops.OPTIONS) as world:
        workload = await stops.run(world, done)
    assert done.leaders >= 1
    assert workload.answered > 100


@needs_namespaces
async def test_histories_stay_linearizable_while_the_network_is_cut(tmp_path: Path) -> None:
    """DESIGN 2.3 and 4.5, traps 7: with the leader cut off, alone or with a client on its side, and twice from its
    peers only, while its clients go on asking it."""
    done = partitions.Partitions(4, seed=2)
    async with partitions.namespaced(tmp_path) as (made, world):
        workload = await partitions.run(made, world, done)
    assert done.done == 4
    assert done.kinds[partitions.FROM_PEERS] == 2
    assert workload.answered > 100


@pytest.mark.parametrize("name", sorted(soak.OWN))
def test_a_soak_with_arguments_of_its_own_says_which(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``flood --help`` was a flood of that name, started a cluster and ended with a traceback."""
    with pytest.raises(SystemExit) as end:
        soak.main(name, "--help")
    assert end.value.code == 0
    assert f"usage: python -m tests.cluster.soak {name}" in capsys.readouterr().out


def test_a_flood_that_there_is_not_is_refused_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        soak.main("flood", "puts?")
    assert end.value.code == 2
    assert "there is no flood 'puts?'; there are " in capsys.readouterr().err


# The network that the partitions are made in.


@pytest.fixture
def two_places() -> Iterator[tuple[Net, Place, Place]]:
    with net("one", "two") as made:
        yield made, made.places["one"], made.places["two"]


def connected(one: Place, two: Place) -> tuple[socket.socket, socket.socket]:
    with two.socket() as listener:
        listener.bind((two.address, 0))
        listener.listen()
        there = one.socket()
        there.connect(listener.getsockname())
        here, _ = listener.accept()
    return there, here


def hears(target: socket.socket, seconds: float) -> bool:
    readable, _, _ = select.select([target], [], [], seconds)
    return bool(readable)


@needs_namespaces
def test_a_cut_takes_one_direction_of_connections_that_stand_and_healing_gives_it_back(
    two_places: tuple[Net, Place, Place],
) -> None:
    """What is sent into a cut is neither refused nor heard; TCP sends it again when the cut is gone."""
    made, one, two = two_places
    there, here = connected(one, two)
    with there, here:
        made.cut("one", "two")
        there.send(b"unheard")
        assert not hears(here, 0.3)
        made.heal()
        assert hears(here, 120)
        assert here.recv(100) == b"unheard"
        made.unplug("two")
        here.send(b"unplugged")
        assert not hears(there, 0.3)
        made.heal()
        assert hears(there, 120)


@needs_namespaces
def test_who_is_refused_is_told_at_once_and_healing_gives_the_way_back(two_places: tuple[Net, Place, Place]) -> None:
    """A client that shall find another leader must not wait for one that it cannot reach."""
    made, one, two = two_places
    with two.socket() as listener:
        listener.bind((two.address, 0))
        listener.listen()
        made.refuse("one", "two")
        with one.socket() as there, pytest.raises(OSError) as failed:
            there.settimeout(60)
            there.connect(listener.getsockname())
        assert failed.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        made.heal()
        with one.socket() as there:
            there.settimeout(60)
            there.connect(listener.getsockname())


@needs_namespaces
def test_nothing_of_the_network_is_seen_outside_or_left_behind(two_places: tuple[Net, Place, Place]) -> None:
    made, one, two = two_places
    with socket.socket() as outside, two.socket() as listener:
        listener.bind((two.address, 0))
        listener.listen()
        outside.settimeout(1)
        with pytest.raises(OSError) as failed:
            outside.connect(listener.getsockname())
        assert failed.value.errno in (None, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)
    made.close()
    assert not Path(one.path).exists()
