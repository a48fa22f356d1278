"""Which nodes there are, at which address each of them is, and whose word is taken for it."""

import pytest

from shardkv import errors
from shardkv.wire.requests import Method, Request
from tests.client.world import World


def cut_off(node):
    """From the others, not from clients: it answers lookups by what it knows now, whatever becomes of that."""
    up_to_date, remembered = node._handle, {}
    for method, arguments in ((Method.ROUTES, [b"k", 256]), (Method.NODES, [])):
        remembered[method] = up_to_date(Request(0, method, 0, 0, 0, arguments))
    node._handle = lambda request: remembered.get(request.method) or up_to_date(request)


@pytest.mark.parametrize("moved_to", [[2, 4, 5], [4, 5]], ids=["one stays", "all are new"])
@pytest.mark.parametrize("new_nodes", [False, True])
def test_a_node_that_is_cut_off_from_the_others_does_not_keep_a_client_with_what_it_knew(moved_to, new_nodes):
    """It still answers lookups, by what it had of the placement group's state; others know better."""
    world = World(nodes=5, seeds=[1, 2, 3])
    world.cluster.move(b"", [1, 2, 3], leader=2)
    added = {number: world.cluster.nodes.pop(number) for number in (4, 5)} if new_nodes else {}
    world.run(world.put(b"k", b"v"))
    cut_off(world.cluster.nodes[1])
    world.cluster.nodes |= added
    world.cluster.move(b"", moved_to, leader=5)
    world.run(world.put(b"k", b"w", timeout=10.0))
    assert world.requests_to(5, Method.WRITE)


def test_what_a_cut_off_node_lists_does_not_make_a_client_forget_a_node_that_serves_it():
    """Lists that bring no news are asked for elsewhere, so now and then of that one, too."""
    world = World(nodes=5, seeds=[1, 2, 3])
    world.cluster.move(b"", [1, 2, 3], leader=2)
    added = {number: world.cluster.nodes.pop(number) for number in (4, 5)}
    world.run(world.put(b"k", b"v"))
    cut_off(world.cluster.nodes[1])
    world.cluster.nodes |= added
    world.cluster.move(b"", [4, 5], leader=5)
    world.run(world.put(b"k", b"w"))
    seconds = []
    for _ in range(2_000):
        world.pass_time(0.1)
        started = world.now
        world.run(world.put(b"k", b"w"))
        seconds.append(world.now - started)
    assert len(world.requests_to(1, Method.NODES)) > 2
    assert max(seconds) == pytest.approx(min(seconds))


def test_the_list_of_nodes_is_asked_for_again_while_somebody_is_there_to_ask():
    """A cluster grows, and then loses every node that the client was told of: nobody would be left to ask."""
    world = World(nodes=2, seeds=[1])
    world.run(world.put(b"k", b"v"))
    seconds = world.core.settings.nodes_refresh_seconds
    for number in range(1, 5):
        world.pass_time(seconds + 1)
        asked = len(world.requests_to(1, Method.NODES)) + len(world.requests_to(2, Method.NODES))
        assert asked == number + 1
    world.down = {1, 2}
    world.crash(1)
    world.crash(2)
    world.pass_time(3 * seconds)
    world.down = set()
    world.run(world.put(b"k", b"w"))
    world.core.check()


def test_all_seeds_are_tried_until_one_answers():
    world = World(seeds=[1, 2, 3])
    world.down = {1, 2}
    world.cluster.range_of(b"").leader = 3
    version = world.run(world.put(b"k", b"v"))
    assert world.cluster.data[b"k"] == (b"v", version)
    assert {world.cluster.nodes[node].address for node in (1, 2, 3)} == set(world.dials)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "without an answer"])
def test_a_node_that_moved_is_found_at_its_new_address(seeds, silent):
    """A node may come back under another address; whoever has known it before must not dial the old one for ever."""
    world = World(seeds=seeds)
    for range_id in world.cluster.ranges:
        world.cluster.ranges[range_id].leader = 2
    world.run(world.put(b"a", b"1"))
    world.crash(2)
    node = world.cluster.nodes[2]
    if silent:
        world.dead.add(node.address)
    node.address = "elsewhere:7002"
    world.down.remove(2)
    dialled = len(world.dials)
    call = world.put(b"a", b"2", timeout=10.0)
    world.run(call)
    assert call.error is None
    assert "elsewhere:7002" in world.dials[dialled:]
    assert len(world.dials) - dialled < 60
    assert (
        sum(request.method == Method.NODES for each in (1, 2, 3) for request in world.cluster.nodes[each].requests) < 6
    )


def test_a_node_that_is_known_by_another_name_than_it_tells_is_found_again_by_that_name():
    """Seen from outside, what nodes tell of their addresses may lead nowhere."""
    world = World(seeds=[1, 2, 3])
    for range_id in world.cluster.ranges:
        world.cluster.ranges[range_id].leader = 2
    world.cluster.told = {node.id: f"inside{node.id}:7000" for node in world.cluster.nodes.values()}
    world.run(world.put(b"a", b"1"))
    world.crash(2)
    with pytest.raises(errors.Unavailable):
        world.run(world.put(b"a", b"1", timeout=3.0))
    world.down.remove(2)
    call = world.put(b"a", b"2", timeout=3.0)
    world.run(call)
    assert call.error is None


def test_what_is_meant_for_a_node_does_not_go_to_another_that_took_over_its_address():
    world = World(seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    for node_id in (2, 3):
        assert world.run(world.admin(Method.NODE_STATUS, node_id=node_id))["node"] == node_id
    two, three = world.cluster.nodes[2], world.cluster.nodes[3]
    two.address, three.address = "elsewhere:1", two.address
    for link in [link for link, node in world.open.items() if node in (two, three)]:
        world.cut(link)
    assert world.run(world.admin(Method.NODE_STATUS, node_id=2, repeatable=True))["node"] == 2
    for node_id in (3, 2):
        assert world.run(world.admin(Method.NODE_STATUS, node_id=node_id))["node"] == node_id


def with_node_3_at_the_address_of_node_2() -> World:
    """Both have moved; lists still tell where node 2 was. Node 3 has been asked there."""
    world = World(seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    for node_id in (2, 3):
        assert world.run(world.admin(Method.NODE_STATUS, node_id=node_id))["node"] == node_id
    two, three = world.cluster.nodes[2], world.cluster.nodes[3]
    world.cluster.told[2] = two.address
    two.address, three.address = "elsewhere:1", two.address
    for link in [link for link, node in world.open.items() if node in (two, three)]:
        world.cut(link)
    assert world.run(world.admin(Method.NODE_STATUS, node_id=3, repeatable=True))["node"] == 3
    return world


def two_is_found_once_it_is_told_of(world: World) -> None:
    """Until then nobody answers for it."""
    with pytest.raises(errors.Unavailable):
        world.run(world.admin(Method.NODE_STATUS, node_id=2, timeout=2.0))
    del world.cluster.told[2]
    assert world.run(world.admin(Method.NODE_STATUS, node_id=2))["node"] == 2


def test_a_list_that_is_behind_sends_nothing_to_a_node_that_took_over_anothers_address():
    """Who asks about a node must not be told about another; what is known of that one is not lost either."""
    world = with_node_3_at_the_address_of_node_2()
    two_is_found_once_it_is_told_of(world)


def test_a_node_that_had_no_id_when_it_greeted_is_found_by_its_address_once_it_is_listed():
    """It had not joined yet; its connection stays."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    links = world.core.links
    peer = links.peer_of(1)
    peer.node_id = None
    links._by_node.clear()
    links.learn_nodes(list(links.nodes.values()))
    assert links.peer_of(1) is peer


def test_addresses_of_nodes_that_are_gone_are_forgotten():
    """A client outlives any number of nodes; its seeds stay."""
    world = World(seeds=[1])
    world.run(world.put(b"k", b"v"))
    world.cluster.move(b"", [1], leader=1)
    for node_id in range(2, 4):
        del world.cluster.nodes[node_id]
    world.core.router._nodes_asked_at = None
    world.core.router.want_nodes(world.now)
    world.settle()
    assert list(world.core.links.peers) == ["n1:1"]


def test_a_list_that_is_behind_and_comes_while_who_took_over_an_address_is_away_sends_it_nothing_meant_for_another():
    """The address is taken for the other's again only until it is seen, once more, who is there."""
    world = with_node_3_at_the_address_of_node_2()
    for link in [link for link, node in world.open.items() if node is world.cluster.nodes[3]]:
        world.cut(link)
    links = world.core.links
    links.learn_nodes(list(links.nodes.values()))
    assert world.run(world.admin(Method.NODE_STATUS, node_id=3, repeatable=True))["node"] == 3
    two_is_found_once_it_is_told_of(world)
