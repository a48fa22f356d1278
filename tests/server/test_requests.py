"""What comes in from clients and peers, good and bad, on nodes of a simulated cluster."""

import random
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv import codec
from shardkv.environment import Stream
from shardkv.errors import (
    Busy,
    ClientClosed,
    Corruption,
    DataDirectoryError,
    EpochMismatch,
    InvalidRange,
    KeyTooLarge,
    MalformedRequest,
    NotFound,
    OutcomeUnknown,
    OutOfSpace,
    ProtocolError,
    RequestError,
    ShardKVError,
    StorageError,
    Unavailable,
    ValueTooLarge,
    WrongCluster,
)
from shardkv.machine.split import raised
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_receiver import Receiver
from shardkv.raft.messages import Message, MessageType
from shardkv.server import node as node_module
from shardkv.server.clock_health import ASK_SECONDS
from shardkv.server.listener import Listener
from shardkv.server.operations import _membership_changes
from shardkv.server.peers import receive_messages
from shardkv.server.requests import COMMANDS_PER_REQUEST_MAX, GET_BYTES_MAX, GET_SLICE_KEYS
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.storage.wal import Wal
from shardkv.transport.pool import Purpose
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX, KeyRange, NodeId, RangeId, ReplicaId, timestamp_at
from shardkv.wire import commands, raft_codec
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Role
from shardkv.wire.requests import GET_KEYS_MAX, Consistency, Method, Request
from shardkv_placement.fields import ID_MAX, REPLICAS_MAX
from tests.multiraft.world import descriptor_on
from tests.server.world import Cluster, Recorder, ask, lose_engine, world


async def test_trap_23_a_request_from_the_future_is_refused_and_leaves_no_trace(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        clock = node.inside.hybrid_clock
        for stamp in (timestamp_at(node.environment.clock.wall_ms() + 70_000), (1 << 64) - 1):
            before = clock.last
            recorder = await ask(node, Method.GET, 0, [b"k"], timestamp=stamp)
            assert isinstance(recorder.error, Unavailable)
            assert clock.last == before
        near = timestamp_at(node.environment.clock.wall_ms() + 400)
        recorder = await ask(node, Method.GET, 0, [b"k"], timestamp=near)
        assert recorder.error is None
        assert clock.last >= near


async def test_a_request_is_not_the_callers_mistake_when_the_nodes_clocks_differ(autojump_clock: MockClock) -> None:
    """A client carries the stamps of a leader whose clock is ahead to its successor, which refuses them until its own
    clock gets there. A write may have been sent to the first leader before, and may have been applied."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        leader = await cluster.leader_of(kv, b"k")
        leader.environment.clock.wall_offset_ms = 5_000
        await kv.put(b"k", b"v")
        await leader.kill()
        assert await kv.increment(b"n") == 1


async def test_a_split_whose_leader_changes_under_way_is_of_unknown_outcome(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next leader may carry it out; asked again, it would say that there is such a range already."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        driver = (await cluster.leader_of(kv, b"m")).inside.driver
        propose = driver.proposer.split

        def lose_leadership(replica: Replica, *arguments: Any) -> None:
            propose(replica, *arguments)
            replica.abandon()

        monkeypatch.setattr(driver.proposer, "split", lose_leadership)
        with pytest.raises(OutcomeUnknown):
            await kv.call(Method.SPLIT, b"m", key=b"m")
        await cluster.until(kv, lambda _, ranges: len(ranges) == 2)


async def test_a_split_that_got_no_ids_is_tried_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of the ids, the range is as it was."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        group = (await cluster.leader_of(kv, b"m")).inside.placement.group

        async def lose_the_answer(command: object) -> None:
            monkeypatch.undo()
            raise OutcomeUnknown("the placement group changed its leader")

        monkeypatch.setattr(group, "propose", lose_the_answer)
        assert len(await kv.call(Method.SPLIT, b"m", key=b"m")) == 2


async def test_a_write_after_minutes_of_reads_is_not_taken_for_an_old_one(autojump_clock: MockClock) -> None:
    """A client stamps its commands with the time that the last answer told, so a read must tell it, too: else the
    first write after a change of leader is refused as too old by the second node that it is sent to, and nobody knows
    then whether the first one has applied it."""
    async with world(3) as cluster, cluster.client() as kv, cluster.client() as other:
        await kv.put(b"k", b"v")
        await cluster.formed(other)
        old = await cluster.leader_of(other, b"k")
        for _ in range(20):
            await trio.sleep(5)
            assert await kv.get(b"k") is not None
        to = next(node for node in cluster.nodes.values() if node is not old)
        await cluster.ask(other, Method.TRANSFER, 1, to.inside.catalog.node_id, range_id=1)
        await kv.put(b"k", b"w")


async def test_a_delete_range_without_an_end_goes_on_behind_a_split_that_its_client_has_not_heard_of(
    autojump_clock: MockClock,
) -> None:
    """The left half must not delete what it holds and let the client believe that this was all."""
    async with world(3) as cluster, cluster.client() as kv, cluster.client() as other:
        await kv.put_many({b"a": b"1", b"n": b"2", b"z": b"3"})
        await cluster.ask(other, Method.SPLIT, b"m", key=b"m")
        await kv.delete_range(b"a")
        assert await other.get_many([b"a", b"n", b"z"]) == {}


async def test_trap_12_a_range_delete_that_comes_again_behind_a_split_is_answered_by_its_record(
    autojump_clock: MockClock,
) -> None:
    """Told of the split instead, a client would cut it anew: another command, and what was written since would go."""
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put_many({b"a": b"1", b"z": b"1"})
        node = cluster.nodes["n1"]
        body = commands.pack_delete_range(b"a", b"zz")
        blob = commands.seal(commands.Op.DELETE_RANGE, body, 1, node.environment.clock.wall_ms(), 1)

        async def send(range_id: RangeId, generation: int) -> Any:
            recorder = Recorder()
            arguments = [b"another session.", commands.join([blob])]
            request = Request(1, Method.WRITE, range_id, generation, 0, arguments)
            node.inside.listener._requests.dispatch(recorder, request)
            await trio.sleep(0.2)
            assert recorder.error is None
            return recorder.result

        before = node.inside.catalog.replicas[RangeId(1)].machine.descriptor.epoch.span
        assert await send(RangeId(1), before) == [True]
        left, right = await cluster.ask(kv, Method.SPLIT, b"m", key=b"m")
        newer = {b"a": b"2", b"z": b"2"}
        await kv.put_many(newer)
        for descriptor, generation in ((left, before), (left, before + 1), (right, before + 1)):
            assert await send(descriptor[0], generation) == [True]
        found = await kv.get_many(list(newer))
        assert {key: entry.value for key, entry in found.items()} == newer


async def test_trap_04_what_belongs_to_another_range_is_refused_before_it_is_logged(
    autojump_clock: MockClock,
) -> None:
    """At the end of the span too, which is the other's first key; and by whoever knows an older range than this."""
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put(b"a", b"1")
        await cluster.ask(kv, Method.SPLIT, b"m", key=b"m")
        node = cluster.nodes["n1"]
        replica = node.inside.catalog.replicas[RangeId(1)]
        last = replica.raft.last_index
        generation = replica.machine.descriptor.epoch.span
        for key, stated in ((b"m", generation), (b"z", generation), (b"a", generation - 1)):
            blob = commands.seal(commands.Op.PUT, commands.pack_put(key, b"2", None), 1, 0, 1)
            recorder = Recorder()
            arguments = [b"another session.", commands.join([blob])]
            node.inside.listener._requests.dispatch(recorder, Request(1, Method.WRITE, 1, stated, 0, arguments))
            assert isinstance(recorder.error, EpochMismatch)
        assert not replica.waiting
        assert replica.raft.last_index == last
        for consistency in Consistency:
            recorder = Recorder()
            asked = Request(1, Method.GET, 1, generation - 1, 0, [int(consistency), [b"z"]])
            node.inside.listener._requests.dispatch(recorder, asked)
            assert isinstance(recorder.error, EpochMismatch), "the key is with the other half now"


@pytest.mark.parametrize(
    ("method", "arguments"), [(Method.GET, [[b"a"]]), (Method.SCAN, [b"a", b"z", 10, 1000, False, False])]
)
async def test_trap_21_a_read_that_waited_is_not_served_from_another_epoch(
    autojump_clock: MockClock, method: Method, arguments: list[Any]
) -> None:
    """A snapshot may have been put in place meanwhile, from behind a split; a page of it would seem to be the whole."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        await kv.put_many({b"a": b"1", b"y": b"1"})
        leader = await cluster.leader_of(kv, b"a")
        follower = next(node for node in cluster.nodes.values() if node is not leader)
        machine = follower.inside.catalog.replicas[RangeId(1)].machine
        before = machine.descriptor
        asked = Request(1, method, 1, before.epoch.span, 0, [int(Consistency.FOLLOWER), *arguments])
        recorder = Recorder()
        follower.inside.listener._requests.dispatch(recorder, asked)
        machine.descriptor = before.with_span(KeyRange(b"", b"m"), raised(before.epoch))
        await trio.sleep(1)
        machine.descriptor = before
        assert isinstance(recorder.error, EpochMismatch), recorder.result


async def test_a_node_whose_engine_has_failed_reads_nothing_from_it_until_it_ends(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have answered what the engine did not take; its connections end a moment after the turn that failed."""
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        cluster.tolerant = True
        node = cluster.nodes["n1"]
        driver, requests = node.inside.driver, node.inside.listener._requests
        generation = node.inside.catalog.replicas[RangeId(1)].machine.descriptor.epoch.span
        put, reads = Recorder(), [Recorder() for _ in Consistency]
        write, try_turn = node.inside.driver.engine.write, driver._try_turn

        def broken(batch: WriteBatch) -> None:
            if put.count:
                raise StorageError("the engine is broken")
            write(batch)

        def turn_and_reads() -> None:
            try_turn()
            if put.count and not reads[0].count:
                for consistency, read in zip(Consistency, reads, strict=True):
                    requests.dispatch(read, Request(1, Method.GET, 1, generation, 0, [int(consistency), [b"k"]]))

        monkeypatch.setattr(driver.engine, "write", broken)
        monkeypatch.setattr(driver, "_try_turn", turn_and_reads)
        blob = commands.seal(commands.Op.PUT, commands.pack_put(b"k", b"w"), 1, node.environment.clock.wall_ms(), 1)
        arguments = [b"another session.", commands.join([blob])]
        requests.dispatch(put, Request(1, Method.WRITE, 1, generation, 0, arguments))
        await node.ended.wait()
        assert put.error is None
        for read in reads:
            assert isinstance(read.error, Unavailable), read.result


async def test_a_command_that_could_not_be_applied_is_refused_before_it_is_logged(autojump_clock: MockClock) -> None:
    """What is logged every replica applies, and ends where it cannot: one such command would end them all."""
    put, delete, increment, delete_range = (int(op) for op in commands.Op)
    plain = [put, 1, 0, 1, 0, b"k", b"v", None]
    strange: list[Any] = [
        [*plain[:position], value, *plain[position + 1 :]]
        for position in range(5)
        for value in (-1, 1 << 64, True, "1")
    ]
    strange += [
        [9, *plain[1:]],
        [*plain[:4], 1 << 32, *plain[5:]],
        plain[:7],
        [*plain, None],
        plain[:3],
        "put",
    ]
    strange += [[*plain[:5], key, *plain[6:]] for key in (b"", "k", None, bytes(KEY_BYTES_MAX + 1))]
    strange += [[*plain[:6], value, None] for value in ("v", None, bytes(VALUE_BYTES_MAX + 1))]
    strange += [[*plain[:7], condition] for condition in (-1, 1 << 64, True, b"1")]
    strange += [[delete, *plain[1:6], condition] for condition in (-1, 1 << 64, True)]
    strange += [[increment, *plain[1:6], delta] for delta in (1 << 63, -(1 << 63) - 1, True, b"1", None)]
    strange += [[delete_range, *plain[1:6], end] for end in (b"k", b"a", "z", 1, b"z" * (KEY_BYTES_MAX + 2))]
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put(b"a", b"1")
        node = cluster.nodes["n1"]
        replica = node.inside.catalog.replicas[RangeId(1)]
        last = replica.raft.last_index
        several = [[], [plain] * (COMMANDS_PER_REQUEST_MAX + 1)]
        for group in [*several, *([plain, command] for command in strange), *([command] for command in strange)]:
            recorder = await ask(node, Method.WRITE, b"another session.", codec.dumps(group))
            assert isinstance(recorder.error, MalformedRequest), group
        assert not replica.waiting
        assert replica.raft.last_index == last


async def test_a_read_that_is_out_of_bounds_is_refused(autojump_clock: MockClock) -> None:
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put(b"a", b"1")
        node = cluster.nodes["n1"]
        long, bounds = bytes(KEY_BYTES_MAX), (False, False)
        refusals: list[tuple[type[ShardKVError], int, list[Any]]] = [
            (KeyTooLarge, Method.GET, [0, [b"a", b""]]),
            (KeyTooLarge, Method.GET, [0, [b"a", long + b"k"]]),
            (KeyTooLarge, Method.GET, [0, [b"a", "a"]]),
            (MalformedRequest, Method.GET, [0, [b"a"] * (GET_KEYS_MAX + 1)]),
            (MalformedRequest, Method.GET, [2, [b"a"] * (GET_KEYS_MAX + 1), None]),
            (MalformedRequest, Method.GET, [2, [b"a"], -1]),
            (MalformedRequest, Method.GET, [3, [b"a"]]),
            (MalformedRequest, Method.GET, [-1, [b"a"]]),
            (MalformedRequest, Method.SCAN, [0, b"a", None, 0, 1, *bounds]),
            (MalformedRequest, Method.SCAN, [0, b"a", None, 1, 0, *bounds]),
            (MalformedRequest, Method.SCAN, [3, b"a", None, 1, 1, *bounds]),
            (InvalidRange, Method.SCAN, [0, b"b", b"a", 1, 1, *bounds]),
        ]
        for error, method, arguments in refusals:
            recorder = await ask(node, method, *arguments)
            assert type(recorder.error) is error, arguments
        for answer, method, arguments in (
            ([None], Method.GET, [0, [long]]),
            ([None] * GET_KEYS_MAX, Method.GET, [0, [b"b"] * GET_KEYS_MAX]),
            ([0, [None] * GET_KEYS_MAX], Method.GET, [2, [b"b"] * GET_KEYS_MAX, 0]),
            ([[], False], Method.SCAN, [0, b"a", b"a", 1, 1, *bounds]),
        ):
            recorder = await ask(node, method, *arguments)
            assert recorder.error is None
            assert recorder.result in (answer, tuple(answer))


async def test_a_read_that_comes_due_while_its_client_leaves_its_answers_unread_is_not_done(
    autojump_clock: MockClock,
) -> None:
    class Crowded(Recorder):
        crowded = True

    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        leader = await cluster.leader_of(kv, b"k")
        follower = next(node for node in cluster.nodes.values() if node is not leader)
        generation = follower.inside.catalog.replicas[RangeId(1)].machine.descriptor.epoch.span
        asked = Request(1, Method.GET, 1, generation, 0, [int(Consistency.FOLLOWER), [b"k"]])
        busy, free = Crowded(), Recorder()
        for recorder in (busy, free):
            follower.inside.listener._requests.dispatch(recorder, asked)
        await trio.sleep(1)
        assert isinstance(busy.error, Busy)
        assert free.result == [None]


@pytest.mark.parametrize(("full", "taken"), [(False, True), (True, False)])
async def test_a_node_that_is_low_takes_deletes_and_a_full_one_nothing(
    autojump_clock: MockClock, full: bool, taken: bool
) -> None:
    async with world(1) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        node = cluster.nodes["n1"]
        space = node.inside.driver.space
        issued = node.environment.clock.wall_ms()
        for body, expected in (
            ((commands.Op.PUT, commands.pack_put(b"k", b"w", None)), False),
            ((commands.Op.DELETE, commands.pack_delete(b"k", None)), taken),
        ):
            blob = commands.seal(*body, 1, issued, 1)
            space.low, space.full = True, full
            recorder = await ask(node, Method.WRITE, b"another session.", commands.join([blob]))
            await trio.sleep(0.2)
            assert isinstance(recorder.error, OutOfSpace) is not expected
            assert (recorder.result == [True]) is expected
        assert (await kv.get(b"k") is None) is taken


async def test_an_answer_carries_a_stamp_no_lower_than_the_versions_in_it(autojump_clock: MockClock) -> None:
    """A new leader whose clock is behind serves versions that the old one gave; the client carries the stamp on."""
    async with world(3) as cluster, cluster.client() as kv:
        leader = await cluster.leader_of(kv, b"k")
        leader.environment.clock.wall_offset_ms = 450
        await trio.sleep(2 * ASK_SECONDS)
        version = await kv.put(b"k", b"v")
        await trio.sleep(0.3)
        for node in cluster.nodes.values():
            if node is not leader:
                assert timestamp_at(node.inside.hybrid_clock.ms()) < version
                recorder = await ask(node, Method.GET, 2, [b"k"])
                assert recorder.result == [[b"v", version]]
                assert node.inside.hybrid_clock.last >= version


async def test_as_many_of_the_largest_values_as_one_slice_are_no_larger_than_a_frame(autojump_clock: MockClock) -> None:
    """16 values of 1 MiB make more than a frame holds: the node says so, and the client asks for fewer at once."""
    async with world(1) as cluster, cluster.client() as kv:
        keys = [b"large/%02d" % number for number in range(GET_SLICE_KEYS)]
        for key in keys:
            await kv.put(key, bytes(VALUE_BYTES_MAX))
        node = cluster.nodes["n1"]
        recorder = await ask(node, Method.GET, 0, keys)
        assert isinstance(recorder.error, ValueTooLarge)
        found = await kv.get_many(keys)
        assert list(found) == keys
        recorder = await ask(node, Method.GET, 0, keys[: GET_BYTES_MAX // VALUE_BYTES_MAX])
        assert len(recorder.result) == GET_BYTES_MAX // VALUE_BYTES_MAX


GARBAGE: tuple[Any, ...] = (None, -1, 0, 1, 3, (1 << 64) - 1, b"", b"k", "text", [], [[]], True, 1.5, {}, [b"k"], [1])


async def test_no_request_whatever_its_arguments_stops_a_node(autojump_clock: MockClock) -> None:
    """Every method with random arguments: an answer or a refusal each time, and never an error of ours."""
    chance = random.Random(7)
    async with world(1) as cluster, cluster.client() as kv:
        node = cluster.nodes["n1"]
        recorders = []
        for _ in range(1500):
            method = chance.choice([*Method, 0, 99])
            arguments = [chance.choice(GARBAGE) for _ in range(chance.randrange(9))]
            if method == Method.CHANGE_REPLICAS and chance.random() < 0.7:
                change = [chance.choice(["add_learner", "promote", "remove"]), *chance.choices(GARBAGE, k=2)]
                membership = node.inside.catalog.replicas[1].machine.descriptor.epoch.membership
                arguments = [1, [change, change][: chance.randrange(3)], membership]
            recorder = await ask(node, method, *arguments, range_id=chance.choice([0, 1, 5]))
            recorders.append((method, arguments, recorder))
            if chance.random() < 0.05:
                await trio.sleep(0.05)
        await trio.sleep(9)
        for method, arguments, recorder in recorders:
            assert recorder.count == 1, (method, arguments, recorder.count)
        assert node.error is None
        await kv.put(b"still", b"here")
        node.check()


async def test_trap_09_a_membership_change_that_does_not_fit_is_refused_before_it_is_logged(
    autojump_clock: MockClock,
) -> None:
    """Once it is in the log every replica carries it out, and stops at what nobody can. And what the placement group
    does not take it refuses with everything else that the leader's node has to report."""
    descriptor = descriptor_on(3, learners=1)
    good, added = _membership_changes(descriptor, [["promote", 3, 3], ["add_learner", 4, 9]])
    assert (len(good), added) == (2, [(4, 9)])
    for items in (
        [["add_learner", 1, 9]],
        [["add_learner", 4, 3]],
        [["add_learner", 4, 9], ["add_learner", 4, 10]],
        [["add_learner", 4, 9], ["add_learner", 5, 9]],
        [["add_learner", 4, 0]],
        [["add_learner", 4, -1]],
        [["add_learner", 4, (1 << 64) - 1]],
        [["add_learner", 4, ID_MAX + 1]],
        [["add_learner", 4 + number, 9 + number] for number in range(REPLICAS_MAX - 2)],
        [["promote", 4, 9]],
        [["promote", 1, 1]],
        [["promote", 2, 3]],
        [["remove", 1, 1]],
        [[]],
    ):
        with pytest.raises(RequestError):
            _membership_changes(descriptor, items)
    with pytest.raises(NotFound):
        _membership_changes(descriptor, [])


async def test_trap_09_a_membership_change_names_the_epoch_that_it_was_made_for(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        recorder = await ask(node, Method.CHANGE_REPLICAS, 1, [["add_learner", 7, 70]], 99)
        await trio.sleep(0.1)
        assert isinstance(recorder.error, EpochMismatch)


def _frame(*items: list[Any]) -> Frame:
    return Frame(FrameKind.RAFT, raft_codec.join([codec.dumps(item) for item in items]))


async def test_no_raft_message_of_a_peer_stops_a_node(autojump_clock: MockClock) -> None:
    """Well-formed frames with any fields: what cannot be is a protocol error, or is ignored."""
    chance = random.Random(15)
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        node = await cluster.leader_of(kv, b"k")
        for _ in range(2000):
            await _one_bad_message(cluster, chance)
            if chance.random() < 0.01:
                await trio.sleep(0.05)
        assert node.error is None
        for each in cluster.nodes.values():
            assert each.alive
            for replica in each.inside.catalog.replicas.values():
                replica.check()


@pytest.mark.parametrize(
    "message",
    [
        Message(MessageType.VOTE, (1 << 64) - 1, 5, 7),
        Message(MessageType.VOTE, (1 << 63) - 1, 5, 7),
        Message(MessageType.VOTE, 0, 5, 7),
        Message(MessageType.VOTE, 7, 0, 7),
    ],
    ids=["to above all", "to a large id", "to nobody", "from nobody"],
)
async def test_a_message_to_a_replica_that_cannot_be_ends_no_node_for_good(
    autojump_clock: MockClock, message: Message
) -> None:
    """The first message to a replica makes it, and that is logged: each later start met the same impossible id."""
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        node = cluster.nodes["n1"]
        with suppress(ProtocolError, MalformedRequest):
            frame = Frame(FrameKind.RAFT, raft_codec.join([raft_codec.encode_message(777, message)]))
            receive_messages(node.inside.driver, NodeId(9), frame, lambda range_id, error: None)
        await trio.sleep(1)
        assert node.alive
        await node.kill()
        await node.start()
        await kv.put(b"k", b"w")
        assert node.error is None


@pytest.mark.parametrize("term", [(1 << 64) - 1, (1 << 63) - 1, 1 << 40])
async def test_a_message_of_a_term_far_ahead_costs_a_range_nothing(autojump_clock: MockClock, term: int) -> None:
    """All its replicas came to that term, and there was none after it in which anybody could be elected."""
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        node = await cluster.leader_of(kv, b"k")
        replica = node.inside.catalog.replicas[RangeId(1)]
        message = Message(MessageType.HEARTBEAT, replica.replica_id, 5000, term)
        with suppress(ProtocolError, MalformedRequest):
            frame = Frame(FrameKind.RAFT, raft_codec.join([raft_codec.encode_message(1, message)]))
            receive_messages(node.inside.driver, NodeId(9), frame, lambda range_id, error: None)
        await kv.put(b"k", b"w", timeout=5)
        assert replica.leads


async def test_a_leadership_is_not_offered_to_a_node_that_is_gone(autojump_clock: MockClock) -> None:
    """Meanwhile the range would take no writes, and its leader would have no lease for the rest of its term."""
    async with world(3) as cluster, cluster.client() as kv:
        leader = await cluster.leader_of(kv, b"k")
        gone = next(node for node in cluster.nodes.values() if node is not leader)
        target = gone.inside.catalog.node_id
        await gone.power_off()
        await cluster.sleep(2)
        with pytest.raises(RequestError, match="not heard of node"):
            await kv.call(Method.TRANSFER, 1, int(target), range_id=1)
        replica = leader.inside.catalog.replicas[RangeId(1)]
        assert replica.raft.lease_valid(leader.environment.clock.monotonic_ns())
        await gone.start()
        await cluster.sleep(2)
        await kv.call(Method.TRANSFER, 1, int(target), range_id=1)
        assert gone.inside.catalog.replicas[RangeId(1)].leads


async def test_a_replica_gets_no_vote_before_it_follows(autojump_clock: MockClock) -> None:
    """Whatever whoever asks has last heard of it."""
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        replica = node.inside.catalog.replicas[RangeId(1)]
        assert replica.machine is not None
        membership = replica.machine.descriptor.epoch.membership
        await ask(node, Method.CHANGE_REPLICAS, 1, [["add_learner", 7, 70]], membership)
        await trio.sleep(0.1)
        assert replica.machine.descriptor.replica(ReplicaId(70)) is not None
        recorder = await ask(node, Method.CHANGE_REPLICAS, 1, [["promote", 7, 70]], membership + 1)
        await trio.sleep(0.1)
        assert isinstance(recorder.error, Busy)
        assert "does not follow closely" in str(recorder.error)


async def test_a_replica_gets_no_vote_while_it_waits_for_its_data(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has lost its engine and kept its log, so it acknowledges what it is sent and seems to follow closely. Whoever
    asked has seen it when it had its data still."""

    def refuse(self: Receiver, begin: Any, sender: Any) -> Any:
        raise Busy("others are received")

    async with world(1) as cluster:
        leader, learner = cluster.nodes["n1"], cluster.add("n2")
        await learner.start()
        replica = leader.inside.catalog.replicas[RangeId(1)]
        assert replica.machine is not None
        added = ["add_learner", int(learner.inside.catalog.node_id), 70]
        await ask(leader, Method.CHANGE_REPLICAS, 1, [added], replica.machine.descriptor.epoch.membership)
        await trio.sleep(2)
        await learner.power_off()
        lose_engine(learner)
        monkeypatch.setattr(Receiver, "_admit", refuse)
        await learner.start()
        await trio.sleep(2)
        peer = replica.raft.status().progress[70]
        assert learner.inside.catalog.replicas[RangeId(1)].needs_snapshot
        assert (peer.recent_active, peer.match) == (True, replica.raft.last_index)
        promoted = ["promote", *added[1:]]
        membership = replica.machine.descriptor.epoch.membership
        recorder = await ask(leader, Method.CHANGE_REPLICAS, 1, [promoted], membership)
        await trio.sleep(0.1)
        assert isinstance(recorder.error, Busy)
        monkeypatch.undo()
        await trio.sleep(5)
        recorder = await ask(leader, Method.CHANGE_REPLICAS, 1, [promoted], membership)
        await trio.sleep(0.1)
        assert recorder.error is None
        assert replica.raft.configuration.voters == (replica.replica_id, 70)


async def _one_bad_message(cluster: Cluster, chance: random.Random) -> None:
    node = chance.choice(list(cluster.nodes.values()))
    replica = chance.choice(list(node.inside.catalog.replicas.values()))
    raft = replica.raft
    kinds = [
        *(MessageType.APP_RESP, MessageType.VOTE_RESP, MessageType.HEARTBEAT_RESP, MessageType.PRE_VOTE_RESP),
        *(MessageType.READ_INDEX, MessageType.READ_INDEX_RESP, MessageType.PROP, MessageType.TRANSFER_LEADER),
        *(MessageType.HEARTBEAT, MessageType.APP, MessageType.PRE_VOTE),
    ]
    numbers = [0, 1, raft.committed, raft.last_index, raft.last_index + 1, raft.last_index + 100, (1 << 63) - 1]
    members = [member.replica_id for member in replica.machine.descriptor.replicas] if replica.machine else []
    sender = chance.choice([*members, raft.leader, 999])
    item = [
        replica.range_id,
        replica.replica_id,
        sender,
        int(chance.choice(kinds)),
        chance.choice([0, max(raft.term - 1, 0), raft.term]),
        chance.choice([0, raft.term]),
        chance.choice(numbers),
        chance.choice(numbers),
        chance.random() < 0.3,
        chance.choice(numbers),
        chance.choice([0, 1, 2, 3]),
        chance.choice([b"", b"12345678", b"\xff" * 8]),
        chance.choice([0, 1, 1 << 60]),
        chance.choice([0, 1, 1 << 60]),
        chance.choice([0, 1, 1 << 60]),
        [],
    ]
    if item[3] in (MessageType.APP, MessageType.HEARTBEAT) and sender == raft.leader:
        # A leader's word is what the log follows; only what cannot be true of it is tried.
        item[7] = raft.last_index + 100
        item[6], item[5] = raft.last_index + 50, raft.term
    try:
        receive_messages(
            node.inside.driver, replica.node_of(sender) or NodeId(9), _frame(item), lambda range_id, error: None
        )
    except (ProtocolError, MalformedRequest):
        pass


async def test_what_a_peer_has_sent_meanwhile_shares_a_turn(autojump_clock: MockClock) -> None:
    """A node that was held up finds hundreds of frames; a turn for each would hold it up for as long again."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        leading = await cluster.leader_of(kv, b"k")
        node = next(each for each in cluster.nodes.values() if each is not leading)
        mine, theirs = (each.inside.catalog.replicas[RangeId(1)] for each in (node, leading))
        heartbeat = Message(MessageType.HEARTBEAT, mine.replica_id, theirs.replica_id, theirs.raft.term)
        frame = Frame(FrameKind.RAFT, raft_codec.join([raft_codec.encode_message(RangeId(1), heartbeat)]))
        identity, listener = leading.inside.listener._identity, node.inside.listener

        async def receive() -> bytes:
            return b""

        connection: Any = SimpleNamespace(receive=receive)
        turns = node.inside.driver.statistics().turns
        hello = identity.hello(Role.PEER, listener._identity.node_id)
        await listener._serve_peer(connection, FrameDecoder(), [frame] * 100, hello)
        assert node.inside.driver.statistics().turns == turns + 1


@pytest.mark.parametrize(
    ("kind", "term"),
    [
        (MessageType.PROP, 0),
        (MessageType.PROP, 1 << 20),
        (MessageType.TRANSFER_LEADER, 1 << 20),
        (MessageType.HEARTBEAT, 0),
        (MessageType.APP, 0),
        (MessageType.VOTE, 0),
    ],
)
async def test_a_peer_neither_proposes_nor_speaks_in_no_term(
    autojump_clock: MockClock, kind: MessageType, term: int
) -> None:
    """What requests ask for is checked with them; and a message without a term is taken for one of this one."""
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        replica = node.inside.catalog.replicas[1]
        item = [1, replica.replica_id, 3, int(kind), term, 0, 0, 0, False, 0, 0, b"", 0, 0, 0, []]
        for entries in ([], [[0, 0, b"x"]]):
            item[-1] = entries
            with pytest.raises(ProtocolError):
                receive_messages(node.inside.driver, NodeId(2), _frame(item), lambda range_id, error: None)


async def test_a_range_whose_logs_contradict_each_other_is_named_and_holds_up_no_other(
    autojump_clock: MockClock,
) -> None:
    """The connection was closed, for all ranges, again and again, and nobody was told why."""
    with capture_logs() as lines:
        async with world(3) as cluster, cluster.client() as kv:
            leader = await cluster.leader_of(kv, b"k")
            replica = leader.inside.catalog.replicas[RangeId(1)]
            assert replica.machine is not None
            follower = next(
                each for each in replica.machine.descriptor.replicas if each.replica_id != replica.replica_id
            )
            raft = replica.raft
            head = [1, follower.replica_id, replica.replica_id, int(MessageType.HEARTBEAT), raft.term]
            bad = [*head, 0, 0, raft.last_index + 100, False, 0, 0, b"", 0, 0, 0, []]
            connects = {(each.node_id, each.purpose): each.connects for each in leader.inside.pool.statistics()}
            for _ in range(3):
                leader.inside.pool.send(follower.node_id, Purpose.BULK, encode_frame(*_frame(bad)))
                leader.inside.pool.flush()
                await cluster.sleep(1)
            assert connects == {(each.node_id, each.purpose): each.connects for each in leader.inside.pool.statistics()}
            await kv.put(b"k", b"v")
            with pytest.raises(AssertionError, match=r"its logs of ranges \[1\] contradict"):
                next(node for node in cluster.nodes.values() if node.inside.listener.contradictions).check()
    [line] = [line for line in lines if "contradict each other" in line["event"]]
    assert (line["range"], line["peer"], line["log_level"]) == (1, leader.inside.listener._identity.node_id, "error")
    assert "ends at" in line["reason"]


async def test_trap_24_a_node_reborn_on_an_empty_disk_under_its_old_name_is_refused(autojump_clock: MockClock) -> None:
    """It would vote again in terms in which it has voted."""
    async with world(3) as cluster, cluster.client("n1", "n2") as kv:
        await kv.put(b"k", b"v")
        node = cluster.nodes["n3"]
        await node.kill()
        node.wipe()
        with pytest.raises(ShardKVError, match="n3"):
            await node.run_to_its_end()
        await kv.put(b"k", b"w")


async def test_trap_24_a_node_on_an_old_copy_of_its_disk_is_refused_however_often_it_is_started(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start raises the boot counter, and a supervisor starts what has ended: the one after the next has a counter
    that nobody has seen, and a log that has forgotten what it had acknowledged."""
    async with world(3) as cluster, cluster.client("n1", "n2") as kv:
        await kv.put(b"k", b"v")
        node = cluster.nodes["n3"]
        await node.kill()
        old = node.environment.disk.copy()
        old_engine = node.copied_engine()
        await node.start()
        await trio.sleep(1)
        await kv.put(b"k", b"w")
        await node.kill()
        node.restore(old, old_engine)
        drained: list[object] = []
        monkeypatch.setattr(node_module._Node, "_drain", lambda self: drained.append(self))
        with pytest.raises(WrongCluster, match="old copy"):
            await node.run_to_its_end()
        assert not drained, "while it hands over what it leads it acknowledges what it may lose"
        monkeypatch.undo()
        for _ in range(3):
            with pytest.raises(DataDirectoryError, match="old copy"):
                await node.run_to_its_end()
        await kv.put(b"k", b"x")


@pytest.mark.parametrize("marked", [True, False])
async def test_trap_24_an_assigned_directory_without_its_log_is_not_begun_anew(
    autojump_clock: MockClock, marked: bool
) -> None:
    """Not even when the note of how far the log was on disk is gone with it."""
    async with world(3) as cluster:
        node = cluster.nodes["n3"]
        await node.kill()
        disk = node.environment.disk
        for name in disk.list("/n3/wal"):
            disk.unlink(f"/n3/wal/{name}")
        if not marked:
            disk.unlink("/n3/log-mark")
        with pytest.raises(Corruption, match="no segment of the log, and this node had one"):
            await node.run_to_its_end()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_start_whose_engine_does_not_open_closes_the_log_and_says_why(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Its files would stay open for as long as whoever has called lives, which need not be a process of the node's.

    On a disk that fails, closing may fail, too, and that says nothing of what happened.
    """
    closed = []
    close = Wal.close

    def noted(wal: Wal) -> None:
        closed.append(wal)
        close(wal)
        if fails:
            raise StorageError("closing: fails too")

    def damaged(config: object, path: str, admit: object) -> Engine:
        raise Corruption("engine: a file is missing")

    async with world(3) as cluster:
        node = cluster.nodes["n3"]
        await node.kill()
        monkeypatch.setattr(Wal, "close", noted)
        monkeypatch.setattr(node, "_open_engine", damaged)
        with pytest.raises(Corruption, match="a file is missing"):
            await node.run_to_its_end()
        assert len(closed) == 1


async def test_files_of_interrupted_snapshots_are_removed_at_a_start(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        await node.kill()
        node.environment.disk.write_atomically("/n1/ingest/incoming-1-1", b"half")
        await node.start()
        assert node.environment.disk.list("/n1/ingest") == []


async def test_calls_of_a_client_that_closes_end(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        with pytest.raises(ClientClosed):
            await kv.get(b"k")


async def test_a_request_for_a_task_that_comes_while_the_node_ends_does_no_harm(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are the last to go at a stop: whatever their tasks call must still be there."""
    handle = Listener.handle
    asked = []

    async def handle_and_ask(listener: Listener, stream: Stream) -> None:
        try:
            await handle(listener, stream)
        finally:
            asked.append(Recorder())
            listener._requests.dispatch(asked[-1], Request(1, Method.NODE_STATUS, 1, 0, 0, []))

    async with world(1) as cluster:
        monkeypatch.setattr(Listener, "handle", handle_and_ask)
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
            await cluster.nodes["n1"].shut_down()
        assert asked, "nobody was connected when the node ended"
        assert cluster.nodes["n1"].error is None


async def test_a_large_answer_leaves_at_once(autojump_clock: MockClock) -> None:
    """On a node with nothing else to do: it must not lie about until something else is sent."""
    async with world(1) as cluster, cluster.client() as kv:
        for size in (1_000, 50_000, 100_000, 200_000):
            await kv.put(b"k", bytes(size))
            await trio.sleep(1.01)
            asked = trio.current_time()
            entry = await kv.get(b"k")
            assert entry is not None
            assert len(entry.value) == size
            assert trio.current_time() - asked < 0.005, f"{size} bytes"
