"""What the client says of nodes that did not serve it: in the errors of calls, and in warnings."""

import pytest

from shardkv import errors
from shardkv.wire.handshake import encode_refused
from shardkv_client.core import Settings
from shardkv_client.core.links import PROBLEMS_MAX, REFUSAL_SECONDS
from tests.client.world import World


def test_a_node_that_nobody_has_needed_since_it_went_away_is_not_blamed():
    world = World(nodes=3, seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    links = world.core.links
    for peer in links.peers.values():
        if peer.link is not None and peer.node_id != 1:
            links.drop(peer.link, "the node went away", world.now)
    assert "went away" in str(links.problems(world.now))
    world.now += 3600.0
    world.run(world.put(b"k", b"w"))
    assert ";" not in str(links.problems(world.now)), "no node is named"
    assert str(links.problems(world.now)).startswith(("None", "last problem"))


def test_why_a_node_will_not_go_on_is_kept():
    world = World()
    world.run(world.get(b"k"))
    link = next(link for link, node in world.open.items() if node.id == 1)
    world.core.link_bytes(link, encode_refused(errors.ProtocolError("a frame stands still")), world.now)
    assert "refused to go on: a frame stands still" in str(world.core.links.problem)


def test_nodes_of_another_cluster_are_not_spoken_to():
    world = World(nodes=2, seeds=[1])
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    world.cluster.range_of(b"k").leader = 2
    world.cluster.cluster_id = b"x" * 16
    call = world.get(b"k", timeout=1.0)
    with pytest.raises(errors.Unavailable, match=r"another cluster|refused"):
        world.run(call)


def test_an_address_of_another_cluster_is_warned_of_once_with_both_ids():
    """Which of two clusters a client speaks to is who answers first; calls go well, and nobody noticed."""
    world = World(nodes=2, seeds=[1, 2])
    world.cluster_ids[2] = b"x" * 16
    world.greeting_seconds[2] = 0.01
    world.run(world.put(b"k", b"v"))
    world.pass_time(1.0)
    (warning,) = world.core.links.warnings
    address = world.cluster.nodes[2].address
    assert warning.startswith(f"{address} belongs to cluster {(b'x' * 16).hex()}, this client to {(b'c' * 16).hex()}")
    world.crash(1)
    with pytest.raises(errors.Unavailable, match="connect to the nodes of one cluster only"):
        world.run(world.get(b"k"))
    assert world.core.links.warnings == [warning]


def test_an_address_whose_node_refuses_a_client_of_another_cluster_is_warned_of():
    """As when that cluster is the one that answers later."""
    world = World(nodes=2, seeds=[1, 2], settings=Settings(cluster_id=b"c" * 16))
    world.refusal = errors.WrongCluster("this one belongs to another")
    with pytest.raises(errors.Unavailable, match="belongs to another"):
        world.run(world.get(b"k", timeout=1.0))
    warned = [warning.partition(" ")[0] for warning in world.core.links.warnings]
    assert warned == [world.cluster.nodes[number].address for number in (1, 2)]
    assert all("this one belongs to another" in warning for warning in world.core.links.warnings)


def test_a_node_that_refuses_a_client_for_another_reason_is_not_warned_of():
    world = World(nodes=1, seeds=[1])
    world.refusal = errors.Busy("not now")
    with pytest.raises(errors.Unavailable, match="not now"):
        world.run(world.get(b"k", timeout=1.0))
    assert not world.core.links.warnings


def test_what_keeps_each_node_from_answering_is_named():
    """With two of three nodes down the last problem alone was that of the one that runs, or of either of the others."""
    world = World(nodes=3, seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    world.crash(2)
    world.cluster.range_of(b"k").leader = None
    with pytest.raises(errors.Unavailable) as caught:
        world.run(world.put(b"k", b"w", timeout=2.0))
    problems = str(caught.value).partition("(")[2].partition(")")[0].split("; ")
    for number, why in ((1, "connection refused"), (2, "connection refused"), (3, "does not lead")):
        address = world.cluster.nodes[number].address
        assert [problem for problem in problems if problem.startswith(f"{address}: ")], (why, problems)
        assert any(why in problem for problem in problems if problem.startswith(address)), problems


def test_the_problems_of_very_many_nodes_are_not_all_named():
    world = World(nodes=12, seeds=list(range(1, 13)))
    world.down.update(range(1, 13))
    with pytest.raises(errors.Unavailable) as caught:
        world.run(world.get(b"k", timeout=5.0))
    assert str(caught.value).count("connection refused") == PROBLEMS_MAX
    assert f"and {12 - PROBLEMS_MAX} more nodes" in str(caught.value)


def test_what_a_node_refused_long_ago_does_not_keep_it_from_answering_now():
    world = World(nodes=2, seeds=[1, 2])
    world.run(world.put(b"k", b"v"))
    links = world.core.links
    connected = next(peer for peer in links.peers.values() if peer.link is not None and peer.link.greeted)
    links.note(connected, "it was full", world.now)
    assert links.problems(world.now + 1.0) == f"{connected.address}: it was full"
    assert links.problems(world.now + REFUSAL_SECONDS + 1.0) == f"last problem: {connected.address}: it was full"


def test_a_refusal_is_named_when_the_call_fails():
    world = World(nodes=1)
    world.refusal = errors.Unauthenticated("show a certificate")
    with pytest.raises(errors.Unavailable, match="show a certificate"):
        world.run(world.get(b"k", timeout=1.0))
