"""The core finds the node that serves a key, and finds it again when it moves (DESIGN §4.6, §4.9)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv import errors
from shardkv.types import KEY_BYTES_MAX, Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId
from shardkv.wire import commands, requests
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import encode_refused
from shardkv.wire.requests import Method, Request
from shardkv_client.core import Settings
from shardkv_client.core.links import PROBLEMS_MAX, REFUSAL_SECONDS
from shardkv_client.limits import before
from tests.client.world import World


def test_the_first_call_looks_up_the_range_and_asks_its_leader():
    """Seeds are any nodes: routes and addresses come from whichever answers."""
    world = World(seeds=[2])
    version = world.run(world.put(b"k", b"v"))
    assert world.cluster.data[b"k"] == (b"v", version)
    assert len(world.requests_to(2, Method.ROUTES)) == 1
    assert len(world.requests_to(1, Method.WRITE)) == 1
    assert not world.requests_to(2, Method.WRITE)


def test_later_calls_need_no_lookup():
    world = World()
    world.run(world.put(b"k", b"v"))
    frames = len(world.frames)
    world.run(world.get(b"k"))
    assert len(world.frames) == frames + 1


def test_calls_of_one_moment_share_a_request_and_a_frame():
    """DESIGN §5: the cost is per batch. Writes of one range share a WRITE, gets a GET, both a frame."""
    world = World()
    world.run(world.put(b"k", b"v"))
    before = len(world.frames)
    calls = [world.put(b"p%d" % i, b"v") for i in range(50)] + [world.get(b"p%d" % i) for i in range(50)]
    world.run(*calls)
    ((node, asked),) = world.frames[before:]
    assert node == 1
    assert sorted(each.method for each in asked) == [Method.WRITE, Method.GET]


def test_it_is_known_whether_more_than_one_node_owes_answers():
    """Only then does a flush wait once round the loop for what others answer."""
    world = World()
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    assert not world.core.links.several_owe
    one = [world.get(b"a"), world.get(b"b")]
    world.core.flush(world.now)
    assert not world.core.links.several_owe
    other = world.get(b"z")
    world.core.flush(world.now)
    assert world.core.links.several_owe
    world.run(*one, other)
    assert not world.core.links.several_owe


def test_a_hint_is_followed_at_once():
    """NotLeader names the leader: the next attempt goes there, without backoff."""
    world = World()
    world.run(world.get(b"k"))
    world.cluster.range_of(b"k").leader = 3
    started = world.now
    world.run(world.put(b"k", b"v"))
    assert len(world.requests_to(1, Method.WRITE)) == 1
    assert len(world.requests_to(3, Method.WRITE)) == 1
    assert world.now - started < 0.008  # one answer, one dial with its greeting, one answer
    world.run(world.put(b"k", b"w"))
    assert len(world.requests_to(1, Method.WRITE)) == 1, "the new leader is remembered"


def test_without_a_hint_the_replicas_are_tried_in_turn():
    world = World()
    world.run(world.get(b"k"))
    target = world.cluster.range_of(b"k")
    for node in world.cluster.nodes.values():
        node.faults.append(
            lambda request, node=node: (
                errors.NotLeader() if request.method == Method.WRITE and target.leader != node.id else None
            )
        )
    target.leader = 3
    world.run(world.put(b"k", b"v"))
    assert [node for node, asked in world.frames if asked[0].method == Method.WRITE] == [1, 2, 3]


def test_two_nodes_that_name_each_other_are_not_asked_in_a_tight_circle():
    """Hints are believed twice; then there is a backoff between attempts."""
    world = World()
    world.run(world.get(b"k"))
    target = world.cluster.range_of(b"k")
    for node, other in ((1, 2), (2, 1)):
        world.cluster.nodes[node].faults.append(
            lambda request, other=other: errors.NotLeader(hint=other) if request.method == Method.WRITE else None
        )
    target.leader = None
    call = world.put(b"k", b"v", timeout=2.0)
    with pytest.raises(errors.Unavailable):
        world.run(call)
    assert 4 < sum(asked[0].method == Method.WRITE for _, asked in world.frames) < 60


def test_a_leaders_death_sends_the_same_call_to_the_others():
    world = World()
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(world.put(b"k", b"w"))
    assert world.now - started < 0.1
    assert world.cluster.data[b"k"][0] == b"w"


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


def test_a_mute_leader_is_given_up_after_its_silence():
    """A node that hangs keeps its connections: a ping that is not answered ends them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(world.put(b"k", b"w"))
    assert 1.4 < world.now - started < 2.0


@pytest.mark.parametrize("pauses", [(5.0,), (0.6, 5.0)], ids=["before the ping", "after the ping"])
def test_a_program_that_stood_still_asks_a_node_and_reads_before_it_gives_it_up(pauses: tuple[float, ...]):
    """Its timers come due before it has read the answers that lie in the socket; one that computes in long pieces
    meets its timer and the answer to its ping at the same moment, every time."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world._perform()
    for pause in pauses:
        world.now += pause
        world.core.tick(world.now)
        world._perform()
    world.run(call)
    assert call.attempts == 1
    assert len(world.dials) == 1


def test_a_slow_node_that_answers_pings_is_kept():
    """Silence means no bytes at all, not a late answer."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answer = world._answer
    world._answer = lambda link, node, kind, payload: (  # type: ignore[method-assign]
        answer(link, node, kind, payload) if kind is not FrameKind.REQUEST else None
    )
    call = world.put(b"k", b"w", timeout=8.0)
    with pytest.raises(errors.OutcomeUnknown):
        world.run(call)
    assert len(world.dials) == 1
    assert call.attempts == 1


def test_a_split_is_learned_from_the_answer():
    """EpochMismatch carries the newer descriptors; no lookup is needed."""
    world = World()
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    lookups = len(world.requests_to(1, Method.ROUTES))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"z", b"w"))
    world.run(world.put(b"a", b"w"))
    assert [route.start for route in world.core.router.cache] == [b"", b"m"]
    assert len(world.requests_to(1, Method.ROUTES)) == lookups
    assert world.cluster.data[b"z"][0] == b"w"


def test_a_merge_is_learned_from_the_answer():
    world = World()
    world.cluster.split(b"m")
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    world.cluster.merge(b"a")
    world.run(world.put(b"z", b"w"), world.put(b"a", b"w"))
    assert [route.start for route in world.core.router.cache] == [b""]


def test_a_range_that_moved_away_is_looked_up_again():
    """RangeNotFound from a replica that is gone."""
    world = World(nodes=5)
    world.cluster.move(b"", [1, 2], leader=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.move(b"", [4, 5], leader=5)
    world.run(world.put(b"k", b"w"))
    assert world.cluster.data[b"k"][0] == b"w"
    assert world.requests_to(5, Method.WRITE)


def test_a_range_whose_known_replicas_are_all_gone_is_looked_up_again():
    """What a node that was behind said of a range names one voter; that has died, and is all that would be asked."""
    world = World(seeds=[2, 3])
    world.cluster.move(b"k", [1], leader=1)
    world.run(world.get(b"k"))
    world.cluster.move(b"k", [2, 3], leader=3)
    world.crash(1)
    call = world.put(b"k", b"v", timeout=2.0)
    world.run(call)
    assert call.error is None


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


def test_a_node_that_lags_behind_is_asked_again_later():
    """EpochMismatch with nothing new teaches nothing; a backoff keeps the client from asking in a circle."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    stale = [True]
    world.cluster.nodes[1].faults.append(
        lambda request: errors.EpochMismatch() if request.method == Method.WRITE and stale[0] else None
    )
    call = world.put(b"k", b"w")
    world.pass_time(1.0)
    assert not call.done
    assert 3 < call.attempts < 40
    stale[0] = False
    world.run(call)


def test_busy_is_retried_until_it_works():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    busy = [5]

    def fault(request):
        if request.method == Method.WRITE and busy[0]:
            busy[0] -= 1
            return errors.Busy("full")
        return None

    world.cluster.nodes[1].faults.append(fault)
    world.run(world.put(b"k", b"w"))
    assert busy == [0]


def test_reads_and_writes_respect_each_others_timestamps():
    """DESIGN §4.4: every request carries the highest timestamp that the client has seen."""
    world = World()
    version = world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k"))
    assert world.cluster.nodes[1].timestamps[-1] >= version


def test_admin_calls_go_where_they_are_told():
    world = World()
    world.cluster.split(b"m", leader=2)
    world.cluster.add_range(b"", b"").descriptor  # noqa: B018 - the next id is taken
    del world.cluster.ranges[3]
    placement = world.cluster.ranges[1].descriptor
    world.cluster.ranges[0] = type(world.cluster.ranges[1])(
        RangeDescriptor(RangeId(0), KeyRange(b"", b""), Epoch(1, 1), placement.replicas), 3
    )
    assert world.run(world.admin(Method.SPLIT, b"x", key=b"z"))["node"] == 2
    assert world.run(world.admin(Method.SPLIT, b"x", range_id=2))["node"] == 2
    assert world.run(world.admin(Method.PLACEMENT, 1, range_id=0)) == {"node": 3, "range": 0, "arguments": [1]}
    assert world.run(world.admin(Method.NODE_STATUS, node_id=3))["node"] == 3
    assert "node" in world.run(world.admin(Method.STATUS))
    with pytest.raises(errors.NotFound):
        world.run(world.admin(Method.NODE_STATUS, node_id=77))
    with pytest.raises(errors.NotFound):
        world.run(world.admin(Method.SPLIT, b"x", range_id=77))


def test_an_admin_call_that_is_not_repeatable_is_never_sent_twice():
    """Its outcome is unknown as soon as its answer is lost."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.admin(Method.SPLIT, b"x", key=b"k")
    world.core.flush(world.now)
    (link,) = world.open
    world.cut(link)
    with pytest.raises(errors.OutcomeUnknown):
        world.run(call)
    again = world.admin(Method.STATUS, repeatable=True)
    world.core.flush(world.now)
    assert world.run(again)["node"] == 1


@pytest.mark.parametrize(
    "refusal", [errors.Busy("full"), errors.EpochMismatch(), errors.NotLeader(), errors.RangeNotFound("gone")]
)
def test_an_admin_call_that_every_node_refused_was_certainly_not_carried_out(refusal):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(lambda request: refusal if request.method == Method.SPLIT else None)
    call = world.admin(Method.SPLIT, b"x", key=b"k", timeout=2.0)
    with pytest.raises(errors.Unavailable):
        world.run(call)
    assert len(world.requests_to(1, Method.SPLIT)) > 1
    world.core.check()


@pytest.mark.parametrize("doubtful", [errors.NotLeader(logged=True), errors.Unavailable("not over in time")])
def test_an_admin_call_that_a_node_had_begun_may_have_been_carried_out(doubtful):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answers = [doubtful]
    world.cluster.nodes[1].faults.append(
        lambda request: (answers.pop() if answers else errors.Busy("full")) if request.method == Method.SPLIT else None
    )
    with pytest.raises(errors.OutcomeUnknown):
        world.run(world.admin(Method.SPLIT, b"x", key=b"k", timeout=2.0))


@pytest.mark.parametrize("repeatable", [False, True])
def test_an_admin_call_whose_outcome_a_node_does_not_know_is_only_sent_again_where_that_is_safe(repeatable):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answers = [errors.OutcomeUnknown("it was under way")]
    world.cluster.nodes[1].faults.append(
        lambda request: answers.pop() if request.method == Method.SPLIT and answers else None
    )
    call = world.admin(Method.SPLIT, b"x", key=b"k", repeatable=repeatable)
    if repeatable:
        assert world.run(call)["node"] == 1
    else:
        with pytest.raises(errors.OutcomeUnknown):
            world.run(call)
    assert len(world.requests_to(1, Method.SPLIT)) == 1 + repeatable


def test_an_admin_call_that_may_be_repeated_outlives_its_connection():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.admin(Method.STATUS, repeatable=True)
    world.core.flush(world.now)
    (link,) = world.open
    assert link.inflight
    world.cut(link)
    assert world.run(call)["node"] == 1


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


@pytest.mark.parametrize("refusal", [errors.RangeNotFound("ask another"), errors.Unavailable("nobody answers")])
def test_a_lookup_that_the_connected_nodes_cannot_answer_goes_to_others(refusal: errors.ShardKVError):
    """A node that is cut off from the placement group knows who else there is; that it is connected is not enough."""
    world = World(nodes=4, seeds=[1])
    for node in (1, 2, 3):
        faults = world.cluster.nodes[node].faults
        faults.append(lambda request: refusal if request.method == Method.ROUTES else None)
    world.run(world.put(b"k", b"v", timeout=2.0))
    assert world.requests_to(4, Method.ROUTES)


def test_a_lookup_that_a_connected_node_leaves_unanswered_goes_to_others():
    """It passes lookups on to a node that is away, say, and waits as long as the client does."""
    world = World(nodes=2, seeds=[1], settings=Settings(lookup_seconds=1.0))
    node = world.cluster.nodes[1]
    serve = node.serve

    def serve_others(payload: bytes) -> list[bytes]:
        answered = zip(requests.decode_requests(payload), serve(payload), strict=True)
        return [answer for request, answer in answered if request.method != Method.ROUTES]

    node.serve = serve_others  # type: ignore[method-assign]
    version = world.run(world.put(b"k", b"v", timeout=3.0))
    assert world.cluster.data[b"k"] == (b"v", version)
    assert world.requests_to(1, Method.ROUTES)
    assert world.requests_to(2, Method.ROUTES)


def test_a_node_that_says_goodbye_gets_nothing_new_but_may_answer():
    world = World()
    world.run(world.put(b"k", b"v"))
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    world.cluster.range_of(b"k").leader = 1
    world._perform()
    world.run(call)
    assert call.attempts == 1
    world.cluster.range_of(b"k").leader = 2
    written = len(world.requests_to(1, Method.WRITE))
    dialled = world.dials.count(link.address)
    world.run(world.put(b"k", b"x"))
    assert world.requests_to(2, Method.WRITE)
    assert len(world.requests_to(1, Method.WRITE)) == written
    assert world.dials.count(link.address) == dialled, "nor is it dialled at once"


def test_a_link_that_drains_is_kept_once_and_until_it_ends():
    """Else a client would outlive its nodes' restarts with more and more of them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    links = world.core.links
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    for _ in range(2):
        world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
        assert links.close().count(link) == 1
    world.cut(link)
    assert link not in links.close()
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    assert link not in links.close()


def test_a_node_that_asks_whether_this_client_lives_is_answered():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    (link,) = world.open
    world.core.link_bytes(link, encode_frame(FrameKind.PING, b"7"), world.now)
    assert link.output == [encode_frame(FrameKind.PONG, b"7")]


@pytest.mark.parametrize(
    "bound",
    [
        {"commands_per_write_max": 7},
        {"bytes_per_write_max": 5_000},
        {"bytes_per_write_max": 1, "requests_per_frame_max": 7},
        {"bytes_per_write_max": 1, "frame_bytes_target": 5_000},
    ],
    ids=str,
)
def test_requests_and_frames_hold_no_more_than_set(bound):
    """Nodes refuse those that hold more than they take, whole."""
    world = World(nodes=1, settings=Settings(**bound))
    world.run(world.put(b"k", b"v"))
    frames, bytes_of_frames = len(world.frames), []
    answer = world._answer

    def measured(link, node, kind, payload):
        bytes_of_frames.append(len(payload))
        return answer(link, node, kind, payload)

    world._answer = measured
    calls = [world.put(b"%04d" % number, bytes(500)) for number in range(100)]
    world.run(*calls)
    asked = [each for _, each in world.frames[frames:]]
    writes = [request.arguments[1] for each in asked for request in each]
    one = 600
    if "commands_per_write_max" in bound:
        assert max(len(commands.decode(write)) for write in writes) == 7
    if "requests_per_frame_max" in bound:
        assert max(map(len, asked)) == 7
    if bound.get("bytes_per_write_max") == 5_000:
        assert 4_000 < max(map(len, writes)) < 5_000 + one
    if "frame_bytes_target" in bound:
        assert 4_000 < max(bytes_of_frames) < 5_000 + one


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


def test_a_peer_that_breaks_the_protocol_is_dropped():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    (link,) = world.open
    world.core.link_bytes(link, encode_frame(FrameKind.RESPONSE, b"\x81\x01"), world.now)
    assert world.core.links.drops == [link]
    world.run(call)
    assert call.attempts == 2


@pytest.mark.parametrize(
    "result",
    [[], [1, 2], ["x"], [None], [[1]], 5, [True]],
    ids=repr,
)
def test_an_answer_of_another_shape_costs_the_connection_not_the_call(result):
    """Validate where bytes come in: a broken node must not make a put return nonsense."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle
    broken = [True]

    def once(request):
        if request.method == Method.WRITE and broken.pop():
            node._handle = handle
            return result
        return handle(request)

    node._handle = once
    call = world.put(b"k", b"w")
    world.run(call)
    assert call.attempts == 2
    assert len(world.dials) == 2


@pytest.mark.parametrize("result", [[], [None], [None] * 3, None, [1, 1], [None, [b"v"]], [None, ["v", 1]]], ids=repr)
def test_values_of_another_shape_cost_the_connection_not_the_call(result):
    """One value short, and a call would never be answered; one too many, and another's would be taken for its own."""
    world = World(nodes=1)
    version = world.run(world.put(b"k", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle

    def once(request):
        if request.method != Method.GET:
            return handle(request)
        node._handle = handle
        return result

    node._handle = once
    calls = [world.get(b"k"), world.get(b"k")]
    world.run(*calls)
    assert [call.result for call in calls] == [[b"v", version]] * 2
    assert len(world.dials) == 2


@pytest.mark.parametrize("greeted", [True, False])
def test_an_answer_that_nobody_waits_for_costs_the_connection(greeted):
    """It may be another's, or come from a node that does not know what it does."""
    world = World(nodes=1)
    if greeted:
        world.run(world.put(b"k", b"v"))
    else:
        world.mute.add(1)
        world.get(b"k")
        world.pass_time(0.01)
    (link,) = world.open
    assert link.greeted is greeted
    answer = requests.encode_response(4711, world.cluster.clock, None)
    world.core.link_bytes(link, encode_frame(FrameKind.RESPONSE, requests.join([answer])), world.now)
    assert world.core.links.drops == [link]
    assert "broke the protocol" in str(world.core.links.problem)


def test_calls_that_waited_for_room_at_a_node_that_says_goodbye_and_dies_go_elsewhere():
    world = World(settings=Settings(keys_per_get_max=1))
    world.inflight_max = 1
    world.run(world.put(b"k", b"v"))
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    world.mute.add(1)
    calls = [world.get(b"k") for _ in range(3)]
    world.settle()
    assert len(link.peer.waiting) == 2
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    world.crash(1)
    world.cluster.range_of(b"k").leader = 2
    world.run(*calls)
    assert [call.error for call in calls] == [None] * 3


def test_unanswered_requests_to_a_node_are_bounded_as_it_asked():
    """Welcome.inflight_max: beyond it the node stops reading, so the rest waits here."""
    world = World(nodes=1, settings=Settings(keys_per_get_max=1))
    world.inflight_max = 4
    world.run(world.put(b"k", b"v"))
    calls = [world.get(b"k%d" % i) for i in range(50)]
    most = 0
    while not all(call.done for call in calls):
        world.step()
        most = max(most, max((len(link.inflight) for link in world.open), default=0))
    assert most == 4


def test_a_get_that_is_too_large_together_is_asked_in_halves():
    """A node refuses an answer above its frame bound; one at a time always fits."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: (
            errors.ValueTooLarge("more than a frame")
            if request.method == Method.GET and len(request.arguments[1]) > 3
            else None
        )
    )
    calls = [world.get(b"k") for _ in range(40)]
    world.run(*calls)
    assert all(call.result[0] == b"v" for call in calls)


def test_a_get_that_is_refused_alone_is_refused_for_good():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: errors.ValueTooLarge("more than a frame") if request.method == Method.GET else None
    )
    with pytest.raises(errors.ValueTooLarge):
        world.run(world.get(b"k"))
    assert len(world.requests_to(1, Method.GET)) == 1


def test_no_more_ranges_are_cached_than_set_and_all_are_found_again():
    """However many there are: a client that scans them all keeps a bounded part."""
    world = World(nodes=1, settings=Settings(ranges_cached_max=5, routes_per_lookup=3))
    for number in range(1, 20):
        world.cluster.split(b"%02d" % number)
    cache = world.core.router.cache
    for _ in range(2):
        for number in range(20):
            world.run(world.put(b"%02d" % number, b"v"))
            assert len(cache) <= 5
    calls = [world.get(b"%02d" % number) for number in range(20)]
    world.run(*calls)
    assert len(cache) <= 5
    assert all(call.result is not None for call in calls)


def test_of_two_descriptors_of_the_placement_group_the_newer_stays():
    """Who leads it in somebody's eyes fills a gap and overrides nothing that was seen."""
    cache = World().core.router.cache

    def descriptor(membership, *nodes):
        replicas = tuple(Member(NodeId(node), ReplicaId(node)) for node in nodes)
        return RangeDescriptor(RangeId(0), KeyRange(b"", b""), Epoch(membership, 1), replicas)

    assert cache.insert(descriptor(2, 1, 2), 9) == []
    placement = cache.placement
    assert placement.leader is None, "no replica of it"
    assert cache.insert(descriptor(1, 1), 1) is None
    assert (placement.nodes, placement.leader) == ((1, 2), 1)
    assert cache.insert(descriptor(3, 1, 2, 3), 2) == []
    assert (placement.nodes, placement.leader) == ((1, 2, 3), 1)
    assert cache.insert(descriptor(4, 2, 3), 8) == []
    assert (placement.nodes, placement.leader) == ((2, 3), None)
    assert cache.insert(descriptor(4, 2, 3), 3) is None
    assert placement.leader == 3
    assert cache.placement is placement


def test_of_two_descriptors_that_overlap_the_newer_stays():
    """DESIGN §4.9: the larger span generation wins in clients too."""
    world = World()
    cache = world.core.router.cache
    replicas = (Member(NodeId(1), ReplicaId(1)),)

    def descriptor(range_id, start, end, generation):
        return RangeDescriptor(RangeId(range_id), KeyRange(start, end), Epoch(1, generation), replicas)

    assert cache.insert(descriptor(1, b"", None, 5), 1) == []
    assert cache.insert(descriptor(2, b"m", None, 5), 1) is None, "the same generation does not evict"
    assert cache.insert(descriptor(2, b"m", None, 4), 1) is None
    (evicted,) = cache.insert(descriptor(2, b"m", None, 6), 1)
    assert evicted.range_id == 1
    assert cache.find(b"a") is None
    assert cache.find(b"z").range_id == 2
    cache.insert(descriptor(1, b"", b"m", 6), 1)
    assert cache.find(b"a").range_id == 1
    cache.check()


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


@pytest.mark.parametrize(
    "page",
    [
        [[b"b", b"v", 1, b"a", b"v", 1], False],
        [[b"a", b"v", 1, b"a", b"v", 1], False],
        [[b"a", b"v", 1, b"z", b"v", 1], False],
        [[b"A", b"v", 1], False],
        [[b"a", b"v", 1, b"b", b"v", 1, b"c", b"v", 1], False],
        [[], True],
        [[b"a", b"v"], False],
        [["a", b"v", 1], False],
        [[b"a", b"v", 1]],
    ],
    ids=repr,
)
def test_a_page_that_no_scan_can_have_costs_the_connection(page):
    """Out of order, twice, outside the span, above the limit, empty but not the last: none of it reaches the caller."""
    world = World(nodes=1)
    world.run(world.put(b"b", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle
    broken = [True]

    def once(request):
        return page if request.method == Method.SCAN and broken.pop() else handle(request)

    node._handle = lambda request: once(request) if broken else handle(request)
    call = world.scan(b"a", b"d", limit=2)
    flat, more, _ = world.run(call)
    assert flat[0] == b"b"
    assert not more
    assert call.attempts == 2


@pytest.mark.parametrize(("reverse", "asked"), [(False, (b"a", b"m")), (True, (b"m", b"z"))])
def test_a_page_is_asked_of_no_more_than_the_range_is_known_to_hold(reverse, asked):
    """A replica that lags behind a split would answer with keys of the other half, which the next page brings again."""
    world = World(nodes=1)
    world.cluster.split(b"m")
    world.run(world.scan(b"a", b"z", consistency=2, reverse=reverse))
    (request,) = world.requests_to(1, Method.SCAN)
    assert tuple(request.arguments[1:3]) == asked


def test_the_child_of_a_split_is_sought_where_its_parent_was_led():
    """It is led there at first; guessing otherwise would cost a round trip for each split."""
    world = World()
    world.cluster.range_of(b"z").leader = 3
    world.run(world.put(b"z", b"v"))
    world.cluster.split(b"m")
    world.run(world.put(b"z", b"w"))
    assert {node for node, asked in world.frames if asked[0].method == Method.WRITE} == {3}


def test_a_node_that_accepts_but_never_greets_is_given_up():
    """The dial and its greeting have a bound of their own; the call goes elsewhere after it."""
    world = World()
    world.cluster.range_of(b"k").leader = 3
    world.mute.add(3)
    call = world.put(b"k", b"v")
    world.pass_time(1.0)
    assert not call.done
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(call)
    assert world.now - started < 1.5
    assert call.attempts >= 1


def test_a_node_that_never_greets_keeps_nobody_from_being_dialled_again():
    """Nodes of a new cluster listen before they serve. While one of them is waited for, the one that was not up yet is
    tried again as soon as its backoff is over, not when the wait has been given up.
    """
    world = World(seeds=[1, 3])
    world.down.add(1)
    world.mute.add(3)
    call = world.admin(Method.STATUS)
    world.pass_time(0.3)
    assert not call.done
    world.down.clear()
    started = world.now
    assert world.run(call)["node"] == 1
    assert world.now - started <= world.core.settings.backoff_seconds_max + 0.01


def test_nodes_that_never_greet_leave_places_to_those_that_would():
    """``dials_at_once_max`` bounds how many are tried at a time; a dial without an answer gives its place up soon."""
    world = World(nodes=6, seeds=[1, 2, 3, 4, 5, 6], settings=Settings(dials_at_once_max=2))
    world.mute.update([1, 2, 3, 4, 5])
    started = world.now
    assert world.run(world.admin(Method.STATUS))["node"] == 6
    assert world.now - started < 1.0
    assert len(world.dials) == 6, "nobody is dialled twice while he is waited for"


def test_calls_that_wait_for_any_node_share_one_timer():
    """However many wait, and however often a dial fails meanwhile, time is looked at once for each attempt."""
    world = World(seeds=[1, 3])
    world.down.add(1)
    world.mute.add(3)
    calls = [world.admin(Method.STATUS) for _ in range(50)]
    world.pass_time(1.0)
    core = world.core
    assert sum(action == core._dispatcher.retry_anywhere for _, _, action in core.timers._actions) == 1
    world.down.clear()
    world.run(*calls)


@given(st.binary(min_size=1, max_size=6), st.binary(max_size=6))
def test_a_reverse_scan_is_routed_by_the_greatest_key_below_its_end(end, other):
    """No key is longer than allowed, so every key has a predecessor; a range boundary cannot lie between the two."""
    found = before(end)
    assert found < end
    assert not found < other < end
    assert len(found) <= KEY_BYTES_MAX


def test_a_list_that_is_behind_and_comes_while_who_took_over_an_address_is_away_sends_it_nothing_meant_for_another():
    """The address is taken for the other's again only until it is seen, once more, who is there."""
    world = with_node_3_at_the_address_of_node_2()
    for link in [link for link, node in world.open.items() if node is world.cluster.nodes[3]]:
        world.cut(link)
    links = world.core.links
    links.learn_nodes(list(links.nodes.values()))
    assert world.run(world.admin(Method.NODE_STATUS, node_id=3, repeatable=True))["node"] == 3
    two_is_found_once_it_is_told_of(world)
