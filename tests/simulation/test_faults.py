"""The faults of whole clusters: crashes at numbered calls, wayward frames, lost packets, reads that lie."""

from pathlib import Path

import pytest
import trio
import trio.testing

from shardkv.errors import Corruption, StorageError
from shardkv.simulation import (
    SimulatedNetwork,
    Trace,
    run_deterministically,
    seeded_random,
    simulated_cluster,
    simulated_environment,
)
from shardkv.simulation.calls import Calls
from shardkv.simulation.faults import KINDS, flush_one
from shardkv.simulation.frames import CARRIED_BYTES_MAX, HELD_SECONDS_MAX, WaywardCarrier
from shardkv.simulation.pipes import RETRANSMIT_SECONDS, Link
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame


def frames(count: int, kind: FrameKind = FrameKind.RAFT) -> list[bytes]:
    return [encode_frame(kind, b"%d" % number) for number in range(count)]


def carried(pieces: list[bytes], duplicate: float, reorder: float) -> list[Frame]:
    """What comes out of a carrier, as the receiver decodes it."""
    out: list[bytes] = []

    async def main() -> None:
        carrier = WaywardCarrier(out.append, seeded_random("carrier"), duplicate, reorder)
        for piece in pieces:
            carrier.carry(piece)
        carrier.flush()
        await trio.sleep(2 * HELD_SECONDS_MAX)

    run_deterministically(main, seed=1)
    return FrameDecoder().feed(b"".join(out))


def numbers(found: list[Frame]) -> list[int]:
    return [int(frame.payload) for frame in found]


def test_a_carrier_repeats_and_reorders_whole_raft_frames_and_loses_none() -> None:
    found = numbers(carried(frames(200), 0.2, 0.2))
    assert set(found) == set(range(200)), "none is lost"
    assert len(found) > 220, "some come twice"
    assert found != sorted(found), "some overtake others"
    assert all(abs(position - place) < 80 for place, position in enumerate(found))


def test_a_carrier_passes_large_frames_as_they_come() -> None:
    """One that is kept until it is whole, and is larger than a stream's window, would never be whole."""
    out: list[bytes] = []
    large = encode_frame(FrameKind.RAFT, bytes(CARRIED_BYTES_MAX))
    carrier = WaywardCarrier(out.append, seeded_random("carrier"), 0.5, 0.0)
    carrier.carry(large[:-1])
    assert b"".join(out) == large[:-1]
    carrier.carry(large[-1:] + encode_frame(FrameKind.RAFT, b"next"))
    assert b"".join(out).startswith(large + encode_frame(FrameKind.RAFT, b"next"))


def test_a_carrier_touches_nothing_but_raft_frames() -> None:
    found = numbers(carried(frames(100, FrameKind.SNAPSHOT), 1.0, 1.0))
    assert found == list(range(100))


def test_a_carrier_waits_for_whole_frames() -> None:
    whole = b"".join(frames(50))
    pieces = [whole[start : start + 3] for start in range(0, len(whole), 3)]
    assert set(numbers(carried(pieces, 0.3, 0.3))) == set(range(50))


def test_a_held_frame_goes_on_its_way_by_itself() -> None:
    out: list[bytes] = []

    async def main() -> None:
        carrier = WaywardCarrier(out.append, seeded_random("carrier"), 0.0, 1.0)
        carrier.carry(frames(1)[0])
        assert not out
        await trio.sleep(HELD_SECONDS_MAX + 0.01)
        assert out == frames(1)

    run_deterministically(main, seed=1)


def test_a_lost_packet_holds_up_what_is_behind_it_and_nothing_is_lost() -> None:
    async def main() -> None:
        network = SimulatedNetwork(3, link=Link(loss_probability=0.3))
        one = simulated_environment("one", seed=3, network=network)
        two = simulated_environment("two", seed=3, network=network)
        received = bytearray()

        async def serve(stream: object) -> None:
            while data := await stream.receive(1000):  # type: ignore[attr-defined]
                received.extend(data)

        async with trio.open_nursery() as nursery:
            await nursery.start(two.network.listen, "two:1", serve)
            stream = await one.network.dial("two:1")
            began = trio.current_time()
            for number in range(100):
                await stream.send_all(b"%03d" % number)
            with trio.fail_after(60):
                while len(received) < 300:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert received == b"".join(b"%03d" % number for number in range(100))
            assert trio.current_time() - began > RETRANSMIT_SECONDS
            nursery.cancel_scope.cancel()

    run_deterministically(main, seed=3)


def test_a_call_is_hit_once_and_only_at_its_number() -> None:
    calls = Calls()
    hit: list[int] = []
    calls.crash_at(3, lambda: hit.append(calls.count))
    assert [calls.hit() for _ in range(5)] == [False, False, True, False, False]
    assert hit == [3]
    with pytest.raises(AssertionError, match="made already"):
        calls.crash_at(5, lambda: None)


@pytest.mark.parametrize("power", [False, True])
def test_a_node_may_die_inside_any_call_and_nothing_acknowledged_is_lost(power: bool) -> None:
    """Disk, network and sleep calls have one count; each crash is put at another, in the middle of a write."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            for number in range(12):
                leader = await cluster.leader_of(kv, b"k")
                called = leader.environment.calls.count
                leader.crash_at_call(called + 1 + number, power=power)
                await kv.put(b"k%d" % number, b"v")
                if leader.alive:
                    await trio.sleep(0.5)
                assert not leader.alive
                await leader.buried()
                assert leader.environment.calls.count >= called
                await leader.start()
            for number in range(12):
                entry = await kv.get(b"k%d" % number)
                assert entry is not None
                leader.check()

    run_deterministically(main, seed=1)


def test_a_read_that_lies_ends_a_start_and_the_next_one_is_fine() -> None:
    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster:
            node = cluster.nodes["n2"]
            await node.kill()
            node.environment.disk.on_read = lambda path, found: found[:-1] + bytes([found[-1] ^ 1]) if found else found
            with pytest.raises(StorageError) as caught:
                await node.run_to_its_end()
            assert isinstance(caught.value, Corruption)
            node.environment.kill()
            node.environment = node.environment.restart()
            await node.start()

    run_deterministically(main, seed=1)


def test_a_node_that_ends_by_itself_fails_the_run_unless_that_is_tolerated() -> None:
    async def main(tolerant: bool) -> None:
        async with simulated_cluster(3, seed=1) as cluster:
            cluster.tolerant = tolerant
            node = cluster.nodes["n2"]
            node.environment.disk.fail("sync", StorageError("the disk is broken"), times=100)
            async with cluster.client("n1") as kv:
                await kv.put(b"k", b"v")
            await trio.sleep(2)
            assert isinstance(node.error, StorageError)
            assert not node.alive
            node.environment.disk.fail("sync", StorageError("still"), times=0)
            await node.start()

    run_deterministically(main, True, seed=1)
    with pytest.raises(BaseExceptionGroup):
        run_deterministically(main, False, seed=1)


def test_healing_takes_every_fault_back() -> None:
    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            node = cluster.nodes["n1"]
            disk, clock, link = node.environment.disk, node.environment.clock, cluster.network.link("n1", "n2")
            cluster.partition(["n1"], ["n2", "n3"])
            link.loss_probability = link.reorder_probability = 0.5
            disk.stall()
            disk.leave(0)
            disk.on_read = lambda path, found: b""
            clock.set_drift(0.01)
            clock.wall_offset_ms = 100
            node.pause()
            cluster.heal()
            assert not node.paused
            assert link == Link()
            assert (clock.drift, clock.wall_offset_ms, disk.on_read, disk.stalled) == (0, 0, None, False)
            assert disk.free_bytes("/") > 1 << 30
            await kv.put(b"k", b"v")

    run_deterministically(main, seed=1)


def test_a_leader_that_was_paused_answers_what_waited_for_it_by_the_state_of_now() -> None:
    """A read that was sent to it after others had come to lead, and had taken a write, sees that write."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as first, cluster.client() as second:
            await first.put(b"k", b"old")
            assert await second.get(b"k") is not None
            leader = await cluster.leader_of(first, b"k")
            leader.pause()
            assert leader.paused
            await cluster.sleep(0.1)
            applied = leader.inside.driver.statistics().entries_applied
            cluster.network.drop(leader.name, "client2")
            await first.put(b"k", b"new")
            assert (await cluster.leader_of(first, b"k")) is not leader
            assert leader.inside.driver.statistics().entries_applied == applied
            found: list[bytes | None] = []

            async def read() -> None:
                entry = await second.get(b"k")
                found.append(entry and entry.value)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await cluster.sleep(0.2)
                assert not found
                leader.resume()
            assert found == [b"new"]

    run_deterministically(main, seed=1)


@pytest.mark.parametrize("power", [False, True])
def test_a_paused_node_dies_like_any_other(power: bool) -> None:
    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client() as kv:
            node = cluster.nodes["n2"]
            node.pause()
            await cluster.sleep(1)
            await (node.power_off() if power else node.kill())
            assert not node.paused
            await node.start()
            await kv.put(b"k", b"v")

    run_deterministically(main, seed=1)


def test_a_paused_node_stops_once_it_goes_on() -> None:
    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, trio.open_nursery() as nursery:
            node = cluster.nodes["n2"]
            node.pause()
            nursery.start_soon(node.shut_down)
            await cluster.sleep(2)
            assert node.alive
            node.resume()
            await node.ended.wait()

    run_deterministically(main, seed=1)


def test_a_traces_digest_is_of_every_event_in_its_order() -> None:
    def digest(*events: str) -> str:
        found: list[str] = []

        async def main() -> None:
            trace = Trace()
            for event in events:
                trace.record(event)
            trace.record_bytes("n1", "n2", b"x")
            found.append(trace.digest())

        run_deterministically(main, seed=1)
        return found[0]

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("b", "a"), digest("a"), digest()}) == 4


def test_every_fault_has_a_name_that_the_docs_have_too() -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text()
    listed = page.split("or names: `")[1].split("`")[0].replace("\n", " ")
    assert [name.strip() for name in listed.split(",")] == list(KINDS)


def test_faults_go_on_when_a_node_dies_while_it_is_asked_to_flush() -> None:
    """The tasks of a node that is dead wait for ever; a plan that waits for them makes no more faults."""

    async def main() -> bool:
        async with simulated_cluster(3, seed=1) as cluster, trio.open_nursery() as nursery:
            node = cluster.nodes["n2"]
            node.environment.disk.stall()
            flushed = trio.Event()

            async def flush() -> None:
                await flush_one(node)
                flushed.set()

            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked()
            await node.kill()
            with trio.move_on_after(60):
                await flushed.wait()
            nursery.cancel_scope.cancel()
        return flushed.is_set()

    assert run_deterministically(main, seed=1)
