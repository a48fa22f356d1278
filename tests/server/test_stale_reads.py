"""Stale reads say how stale they are at most, and whoever may be older sends the reader elsewhere (DESIGN 2.3, 4.5).

In virtual time, so that what was written when is known exactly.
"""

from typing import Any

import pytest
import trio
import trio.lowlevel

from shardkv.errors import MalformedRequest, NotLeader, Unavailable
from shardkv.raft.messages import MessageType
from shardkv.raft.settings import LeaseSettings
from shardkv.simulation import run_deterministically
from shardkv.wire.requests import Consistency, Method
from shardkv_client import Client
from tests.server.world import Cluster, Recorder, SimulatedNode, ask, world

FRESH_US = 250_000
"""Two heartbeat intervals of 100 ms, and the way."""
DRIFT = LeaseSettings(promise_ns=1).drift


async def stale(node: SimulatedNode, bound_us: int | None = None, key: bytes = b"k") -> Recorder:
    return await ask(node, Method.GET, Consistency.STALE, [key], bound_us)


async def aged(node: SimulatedNode, key: bytes = b"k") -> tuple[float, bytes | None]:
    """A node's answer whatever its age: how many seconds old it is at most, and the value."""
    recorder = await stale(node, key=key)
    assert recorder.error is None, recorder.error
    age_us, (found,) = recorder.result
    return age_us / 1e6, None if found is None else found[0]


async def roles(cluster: Cluster, kv: Client) -> tuple[SimulatedNode, list[SimulatedNode]]:
    """The leader of the key, and its followers, once all is at rest."""
    await kv.put(b"k", b"old")
    await trio.sleep(1)
    leader = await cluster.leader_of(kv, b"k")
    return leader, [node for node in cluster.nodes.values() if node is not leader]


def test_in_a_cluster_at_rest_a_follower_is_hardly_older_than_its_last_heartbeats() -> None:
    async def main() -> None:
        async with world(3, seed=1) as cluster, cluster.client() as kv:
            leader, followers = await roles(cluster, kv)
            for node in followers:
                for _ in range(20):
                    age, value = await aged(node)
                    assert 0 < age * 1e6 < FRESH_US
                    assert value == b"old"
                    await trio.sleep(0.037)
            assert await aged(leader) == (0.0, b"old")

    run_deterministically(main, seed=1)


def test_a_follower_that_is_cut_off_answers_within_the_bound_and_refuses_past_it() -> None:
    """With the leader that it last knew as a hint; and the age that it states is never less than the true one."""

    async def main() -> None:
        async with world(3, seed=2) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            cluster.partition([follower.name], [node.name for node in cluster.nodes.values() if node is not follower])
            await kv.put(b"k", b"new")
            written = trio.current_time()
            served = refused = 0
            while trio.current_time() - written < 6:
                age, value = await aged(follower)
                assert value == b"old"
                assert age >= trio.current_time() - written
                for bound in (0.5, 2.0, 4.0):
                    recorder = await stale(follower, int(bound * 1e6))
                    if age <= bound:
                        assert recorder.result[0] <= bound * 1e6
                        served += 1
                    else:
                        assert isinstance(recorder.error, NotLeader)
                        refused += 1
                await trio.sleep(0.1)
            assert min(served, refused) > 30
            cluster.heal()
            await trio.sleep(1.5)
            age, value = await aged(follower)
            assert value == b"new"
            assert age * 1e6 < FRESH_US

    run_deterministically(main, seed=2)


def test_a_refusal_names_the_leader() -> None:
    async def main() -> None:
        async with world(3, seed=2) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            recorder = await stale(follower, 1)
            assert isinstance(recorder.error, NotLeader)
            replica = follower.inside.catalog.replicas[1]
            assert recorder.error.hint == replica.node_of(replica.raft.leader) is not None

    run_deterministically(main, seed=2)


def test_a_client_with_a_bound_gets_past_a_follower_that_is_too_old() -> None:
    """Whichever replica its reads go to: what it is given is within the bound, and no older than it is said to be."""

    async def main() -> None:
        async with world(3, seed=3) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            follower.inside.driver.step = lambda replica, message: None  # deaf to Raft, open to clients
            for number in range(20):
                await kv.put(b"k", b"%d" % number)
                await trio.sleep(1)
                async with cluster.client() as reader:
                    ages: list[float] = []
                    entry = await reader.get(b"k", consistency="stale", max_age=0.9, on_age=ages.append)
                    assert entry is not None
                    assert entry.value == b"%d" % number, ages
                    assert ages[-1] <= 0.9
            async with cluster.client(follower.name) as reader:
                ages = []
                found = [entry async for entry in reader.scan(consistency="stale", max_age=0, on_age=ages.append)]
                assert (ages, [entry.value for entry in found]) == ([0.0], [b"19"])

    run_deterministically(main, seed=3)


def test_a_follower_that_hears_heartbeats_but_lags_in_its_log_states_its_true_age() -> None:
    """Its disk stalls: it answers every heartbeat, and its leader's words are fresh, but its state is not."""

    async def main() -> None:
        async with world(3, seed=4) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            follower.environment.disk.stall()
            await kv.put(b"k", b"new")
            written = trio.current_time()
            for _ in range(30):
                await trio.sleep(0.1)
                age, value = await aged(follower)
                assert follower.inside.catalog.replicas[1].raft.leader, "it hears its leader"
                assert value == b"old"
                assert age >= trio.current_time() - written
                assert isinstance((await stale(follower, FRESH_US)).error, NotLeader) == (age * 1e6 > FRESH_US)
            follower.environment.disk.resume()
            await trio.sleep(1)
            age, value = await aged(follower)
            assert value == b"new"
            assert age * 1e6 < FRESH_US

    run_deterministically(main, seed=4)


def test_a_follower_that_always_lags_states_its_true_age() -> None:
    """Every append comes half a second late: there is always something that was committed and is not applied here."""

    async def main() -> None:
        async with world(3, seed=12) as cluster, cluster.client() as kv, trio.open_nursery() as nursery:
            _, (follower, _) = await roles(cluster, kv)
            step, written = follower.inside.driver.step, [trio.current_time()]
            await kv.put(b"k", b"0")

            async def late(replica: Any, message: Any) -> None:
                await trio.sleep(0.5)
                step(replica, message)

            def stepped(replica: Any, message: Any) -> None:
                if message.type is MessageType.APP:
                    nursery.start_soon(late, replica, message)
                else:
                    step(replica, message)

            await trio.sleep(0.5)
            follower.inside.driver.step = stepped
            ages = []
            for number in range(1, 80):
                await kv.put(b"k", b"%d" % number)
                written.append(trio.current_time())
                age, value = await aged(follower)
                assert value is not None
                assert int(value) < number
                # What it serves was current until the next value was written.
                assert age >= trio.current_time() - written[int(value) + 1]
                ages.append(age)
                await trio.sleep(0.03)
            assert max(ages[20:]) < 1.5, "it keeps up, half a second late"
            nursery.cancel_scope.cancel()

    run_deterministically(main, seed=12)


def test_a_follower_whose_appends_are_lost_states_its_true_age() -> None:
    """Heartbeats have a connection of their own, and may come through where nothing else does."""

    async def main() -> None:
        async with world(3, seed=5) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            driver = follower.inside.driver
            step = driver.step
            driver.step = lambda replica, message: message.type is MessageType.APP or step(replica, message)
            await kv.put(b"k", b"new")
            written = trio.current_time()
            for _ in range(30):
                await trio.sleep(0.1)
                age, value = await aged(follower)
                assert value == b"old"
                assert age >= trio.current_time() - written

    run_deterministically(main, seed=5)


@pytest.mark.parametrize("drift", [-DRIFT / 2, DRIFT / 2])
def test_the_age_is_true_by_everybody_elses_clock(drift: float) -> None:
    """A follower's clock that is slow within the bound counts too few seconds; the bound is added."""

    async def main() -> None:
        async with world(3, seed=6) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            follower.environment.clock.set_drift(drift)
            cluster.partition([follower.name], [node.name for node in cluster.nodes.values() if node is not follower])
            await kv.put(b"k", b"new")
            written = trio.current_time()
            await trio.sleep(100)
            age, value = await aged(follower)
            elapsed = trio.current_time() - written
            assert value == b"old"
            assert elapsed <= age <= (elapsed + 1) * (1 + 2 * DRIFT)

    run_deterministically(main, seed=6)


def test_a_leader_that_is_cut_off_never_calls_its_state_new() -> None:
    """It is too old as soon as another may lead, and says how old once it knows that it leads no more."""

    async def main() -> None:
        async with world(3, seed=7) as cluster, cluster.client() as kv:
            leader, followers = await roles(cluster, kv)
            cluster.partition([leader.name], [node.name for node in followers])
            async with cluster.client(*(node.name for node in followers)) as far:
                await far.put(b"k", b"new")
                written = trio.current_time()
                told = []
                for _ in range(30):
                    recorder = await stale(leader)
                    await trio.lowlevel.checkpoint()
                    if recorder.result is not None:
                        told.append(recorder.result[0] / 1e6)
                        assert recorder.result[1][0][0] == b"old"
                        assert told[-1] >= trio.current_time() - written
                    await trio.sleep(0.1)
                assert len(told) > 20

    run_deterministically(main, seed=7)


def test_a_leader_confirms_a_stale_read_that_its_lease_does_not_cover() -> None:
    """What a leader answers has no age: without a lease, as after a transfer that failed, it asks a quorum."""

    async def main() -> None:
        async with world(3, seed=8) as cluster, cluster.client() as kv:
            leader, _ = await roles(cluster, kv)
            leader.inside.catalog.replicas[1].raft.raft.lease_suspended = True
            recorder = await stale(leader, 0)
            assert recorder.count == 0
            await trio.sleep(0.1)
            assert recorder.result == [0, [[b"old", recorder.result[1][0][1]]]]

    run_deterministically(main, seed=8)


def test_a_restarted_replica_refuses_until_it_knows_its_age() -> None:
    """Its state may be of any age, whatever leader it hears of."""

    async def main() -> None:
        async with world(3, seed=9) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            await follower.kill()
            await kv.put(b"k", b"new")
            written = trio.current_time()
            await follower.start()
            refused = 0
            with trio.fail_after(5):
                while True:
                    recorder = await stale(follower)
                    if recorder.error is None:
                        break
                    assert isinstance(recorder.error, NotLeader)
                    refused += 1
                    await trio.sleep(0.01)
            age_us, ((value, _),) = recorder.result
            assert refused > 0
            assert value == b"new" or age_us / 1e6 >= trio.current_time() - written

    run_deterministically(main, seed=9)


def test_where_nobody_is_young_enough_a_read_with_a_bound_is_unavailable() -> None:
    """And one without a bound is answered, with its age: no leader is needed for that."""

    async def main() -> None:
        async with world(3, seed=10) as cluster, cluster.client() as kv:
            await roles(cluster, kv)
            cluster.partition(*([name] for name in cluster.nodes))
            await trio.sleep(3)
            with pytest.raises(Unavailable):
                await kv.get(b"k", consistency="stale", max_age=0.5, timeout=1)
            ages: list[float] = []
            entry = await kv.get(b"k", consistency="stale", on_age=ages.append)
            assert entry is not None
            assert entry.value == b"old"
            assert ages[0] >= 3

    run_deterministically(main, seed=10)


@pytest.mark.parametrize(
    "arguments",
    [
        (Method.GET, Consistency.STALE, [b"k"], -1),
        (Method.GET, Consistency.STALE, [b"k"], 1.5),
        (Method.GET, Consistency.FOLLOWER, [b"k"], 1),
        (Method.GET, Consistency.LINEARIZABLE, [b"k"], None),
        (Method.SCAN, Consistency.STALE, b"", None, 1, 1, False, False, -1),
        (Method.SCAN, Consistency.STALE, b"", None, 1, 1, False, False, b"1"),
        (Method.SCAN, Consistency.LINEARIZABLE, b"", None, 1, 1, False, False, 1),
    ],
    ids=repr,
)
def test_a_bound_that_is_none_is_refused(arguments: tuple[Any, ...]) -> None:
    async def main() -> None:
        async with world(1, seed=1) as cluster:
            recorder = await ask(cluster.nodes["n1"], *arguments)
            assert isinstance(recorder.error, MalformedRequest)

    run_deterministically(main, seed=1)


def test_requests_of_the_first_shape_are_answered_as_they_were() -> None:
    """Without the argument, any age, and the result alone."""

    async def main() -> None:
        async with world(3, seed=1) as cluster, cluster.client() as kv:
            _, (follower, _) = await roles(cluster, kv)
            recorder = await ask(follower, Method.GET, Consistency.STALE, [b"k"])
            assert [each[0] for each in recorder.result] == [b"old"]
            recorder = await ask(follower, Method.SCAN, Consistency.STALE, b"", None, 9, 99, False, False)
            assert recorder.result[0][:2] == [b"k", b"old"]
            assert recorder.result[1] is False

    run_deterministically(main, seed=1)
