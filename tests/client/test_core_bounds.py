"""How many calls are in flight, who waits for a place, and which bounds no client could work with."""

import pytest

from shardkv import errors
from shardkv.server.requests import COMMANDS_PER_REQUEST_MAX
from shardkv.types import KEY_BYTES_MAX
from shardkv.wire.frames import FRAME_BYTES_MAX
from shardkv.wire.requests import REQUESTS_PER_FRAME_MAX, Method
from shardkv_client.core import Settings
from tests.client.world import World


@pytest.mark.parametrize("kind", ["put", "get"])
def test_calls_beyond_the_bytes_in_flight_wait_their_turn(kind):
    """Their bytes are the client's memory, and the nodes'."""
    world = World(nodes=1, settings=Settings(bytes_in_flight_max=10_000))
    world.run(world.put(b"k", b"v"))
    key = b"k" * 1_000
    calls = [world.put(key, bytes(1_000)) if kind == "put" else world.get(key) for _ in range(60)]
    most = 0
    while not all(call.done for call in calls):
        active = [call for call in calls if call.admitted and not call.done]
        most = max(most, sum(call.size for call in active))
        world.step()
    assert 8_000 < most < 10_000 + calls[0].size


def test_calls_beyond_the_in_flight_bound_wait_their_turn():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=10))
    world.run(world.put(b"k", b"v"))
    calls = [world.put(b"k%d" % i, b"v") for i in range(35)]
    before = len(world.frames)
    world.run(*calls)
    assert [len(world.cluster.windows), len(world.frames) - before] == [36, 4]


def test_a_call_that_waits_for_its_turn_ends_by_its_deadline():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=1))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    first, second = world.put(b"k", b"1", timeout=5.0), world.put(b"k", b"2", timeout=1.0)
    with pytest.raises(errors.Unavailable):
        world.run(second)
    assert not first.done


def test_a_call_that_found_no_place_says_so():
    """The addresses are not to blame."""
    world = World(nodes=1, settings=Settings(calls_in_flight_max=3))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    for _ in range(3):
        world.put(b"k", b"1", timeout=5.0)
    with pytest.raises(errors.Unavailable, match=r"^3 calls of this client were in flight.*make fewer at once"):
        world.run(world.put(b"k", b"2", timeout=1.0))


def test_what_needs_no_leader_finds_a_place_however_many_calls_wait_for_one():
    """Stale reads go on while a range has no leader, as do requests to any node."""
    world = World(settings=Settings(calls_in_flight_max=10))
    world.run(world.put(b"k", b"v"))
    for node in world.cluster.nodes.values():
        node.faults.append(
            lambda request: (
                errors.NotLeader()
                if request.method == Method.WRITE or (request.method == Method.GET and request.arguments[0] < 2)
                else None
            )
        )
    stuck = [world.put(b"k", b"w") for _ in range(40)] + [world.get(b"k") for _ in range(40)]
    world.pass_time(1.0)
    started = world.now
    assert world.run(world.get(b"k", consistency=2))[0] == b"v"
    assert world.run(world.admin(Method.STATUS))
    assert world.now - started < 0.5
    assert not any(call.done for call in stuck)


def test_calls_that_end_while_they_wait_for_a_place_are_not_kept():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=2))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    for _ in range(2):
        world.put(b"k", b"1", timeout=50.0)
    lane = world.core.ledger._writes
    for _ in range(50):
        for call in [world.put(b"k", b"2", timeout=40.0) for _ in range(100)]:
            world.core.cancel(call)
            world.core.check()
    assert len(lane.backlog) < 1_000
    last = world.put(b"k", b"3", timeout=30.0)
    world.mute.clear()
    world.run(last)
    assert world.cluster.data[b"k"][0] == b"3"


@pytest.mark.parametrize(
    "changed",
    [
        {"commands_per_write_max": 0},
        {"bytes_per_write_max": 0},
        {"calls_in_flight_max": -1},
        {"commands_per_write_max": COMMANDS_PER_REQUEST_MAX + 1},
        {"bytes_per_write_max": FRAME_BYTES_MAX},
        {"frame_bytes_target": FRAME_BYTES_MAX + 1},
        {"requests_per_frame_max": REQUESTS_PER_FRAME_MAX + 1},
        {"keys_per_get_max": FRAME_BYTES_MAX // KEY_BYTES_MAX},
        {"keys_per_get_max": 1.5},
        {"dials_at_once_max": True},
        {"dial_seconds": 0},
        {"moved_seconds": float("nan")},
        {"lookup_seconds": float("inf")},
        {"lookup_seconds": "5"},
        {"backoff_seconds_min": 1.0},
        {"ping_after_seconds": 2.0},
        {"cluster_id": b"short"},
        {"node_id": 0},
        {"node_id": True},
        {"node_id": "n1"},
    ],
    ids=repr,
)
def test_settings_that_no_client_could_work_with_are_refused(changed):
    """With some of them a call spun for ever, past every timeout; with others nodes refused sound calls for having come
    too many together."""
    with pytest.raises(errors.ConfigError, match=next(iter(changed))):
        Settings(**changed)
