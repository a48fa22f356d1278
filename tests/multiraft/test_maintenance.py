"""When a node's housekeeping looks how much room its disk has left."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv.errors import OutOfSpace, StorageError
from shardkv.machine.machine import INITIAL_INDEX
from shardkv.multiraft.maintenance import (
    AWAY_SECONDS,
    ENTRIES_KEPT,
    FULL_DISK_FLUSH_SECONDS,
    IDLE_MEASURES,
    INTERVAL_SECONDS,
    KEEPING_SEGMENTS_MAX,
    KEPT_BYTES_MAX,
    LOG_SEGMENTS_MAX,
    MARK_SECONDS,
    MEASURED_BYTES,
    REST_SECONDS,
    Maintenance,
)
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.space import Space
from shardkv.raft.messages import ConfState
from shardkv.storage.engine import WriteBatch
from shardkv.storage.group_log import GroupLog
from shardkv.storage.wal import CreateGroup, LogUpdate
from shardkv.transport.groups import main_error
from shardkv.types import SESSION_AGE_MS_MAX, NodeId, RangeId, ReplicaId
from tests.multiraft.scenes import led_by_another
from tests.multiraft.world import PROMISE_NS, RANGE, Hosts, world


async def write_many(hosts: Hosts, count: int, value: bytes = b"v") -> None:
    """So many entries."""
    for number in range(count):
        await hosts.write(b"k%d" % number, value)


async def test_room_is_measured_at_every_look_while_the_node_writes_or_lacks_room_and_less_often_at_rest(
    autojump_clock: MockClock,
) -> None:
    """It costs a thread's hop; what others write to the disk, a node at rest may learn of a second later."""
    free = 1 << 40
    measures = 0

    def free_bytes(path: str) -> int:
        nonlocal measures
        measures += 1
        return free

    async def during(looks: int) -> int:
        before = measures
        await trio.sleep(looks * INTERVAL_SECONDS)
        return measures - before

    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        driver = host.driver
        driver.space = Space(1 << 30)
        environment: Any = SimpleNamespace(
            clock=host.environment.clock,
            workers=host.environment.workers,
            disk=SimpleNamespace(free_bytes=free_bytes),
        )
        maintenance = Maintenance(driver, environment, structlog.get_logger(), "/data")
        async with trio.open_nursery() as nursery:
            await nursery.start(maintenance.run)
            await trio.sleep(1.1 * INTERVAL_SECONDS)
            assert measures == 1, "a node that was started on a full disk soon knows"
            assert await during(10 * IDLE_MEASURES) <= 10 + 1, "at rest"
            for number in range(20):
                await hosts.write(b"k%d" % number, bytes(MEASURED_BYTES))
                assert await during(1) >= 1, "it writes much"
            for number in range(20):
                await hosts.write(b"k%d" % number, b"v")
            assert await during(10 * IDLE_MEASURES) <= 10 + 1, "it has written little"
            free = 1 << 29
            await trio.sleep((IDLE_MEASURES + 1) * INTERVAL_SECONDS)
            assert driver.space.low
            assert await during(20) >= 19, "it lacks room"
            nursery.cancel_scope.cancel()


async def test_an_engine_that_found_no_room_makes_the_node_full_however_much_is_free(
    autojump_clock: MockClock,
) -> None:
    """A quota, or a compaction that was given up. What is committed is applied, for reads wait for it; the engine's
    memory has a bound because nothing new is taken."""
    async with world(3) as hosts:
        host = hosts[hosts.leader().node_id]
        await hosts.write(b"k", b"v")
        host.engine.stall = host.engine.full = True
        write = host.put(b"k", b"w")
        async with trio.open_nursery() as nursery:
            await nursery.start(Maintenance(host.driver, host.environment, structlog.get_logger()).run)
            await write.wait()
            assert await host.read(b"k").wait() == b"w"
            assert "the engine has found no room" in str(host.driver.space.refusal())
            host.engine.stall = host.engine.full = False
            await trio.sleep(2 * INTERVAL_SECONDS)
            assert not host.driver.space.low
            nursery.cancel_scope.cancel()


async def test_a_flush_that_finds_no_room_is_tried_again_and_said_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may stay full for days: the log must not fill what is left of it, nor hide what else was said."""
    tries = 0

    def flush() -> None:
        nonlocal tries
        tries += 1
        if full:
            raise OutOfSpace("no room")

    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await hosts.write(b"k", b"v")
        monkeypatch.setattr(host.driver.engine, "flush", flush)
        monkeypatch.setattr("shardkv.multiraft.maintenance.IDLE_FLUSH_SECONDS", 1.0)
        structlog.reset_defaults()
        with capture_logs() as lines:
            maintenance = Maintenance(host.driver, host.environment, structlog.get_logger())
            async with trio.open_nursery() as nursery:
                await nursery.start(maintenance.run)
                for _ in range(2):
                    full, before = True, tries
                    await trio.sleep(10 * FULL_DISK_FLUSH_SECONDS)
                    assert tries - before >= 9
                    full = False
                    await trio.sleep(2 * FULL_DISK_FLUSH_SECONDS)
                nursery.cancel_scope.cancel()
        full_said = "no room to flush the engine: it is tried until there is"
        assert [line["event"] for line in lines].count(full_said) == 2


@pytest.mark.parametrize(
    ("count", "value_bytes", "kept"),
    [(100, 20_000, KEPT_BYTES_MAX // 20_000), (ENTRIES_KEPT + 50, 2_000, ENTRIES_KEPT)],
)
async def test_a_log_that_is_long_keeps_few_large_entries_for_those_who_are_a_little_behind(
    autojump_clock: MockClock, count: int, value_bytes: int, kept: int
) -> None:
    """So many for every range would make each start read gigabytes, and the log be moved for as long as it is written
    to. Small entries keep their number."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        maintenance = Maintenance(host.driver, host.environment, structlog.get_logger())
        for number in range(count):
            await hosts.write(b"k%d" % number, bytes(value_bytes))
        assert host.wal.statistics().segments > LOG_SEGMENTS_MAX
        await hosts.commit_handed_out(host)
        await maintenance.flush_and_compact()
        log = host.replica(RANGE).log
        assert log.last_index() - log.compact_index == kept


async def test_room_is_watched_and_the_next_segment_made_while_a_flush_takes_long(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk may take minutes for what the engine holds; the log goes on meanwhile, and others fill the disk."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await hosts.write(b"k", b"v")
        free = 1 << 40
        flushing = trio.Event()

        async def run(function: Any, *args: Any) -> Any:
            if function == host.driver.engine.flush:
                flushing.set()
                await trio.sleep_forever()
            return await host.environment.workers.run(function, *args)

        environment: Any = SimpleNamespace(
            clock=host.environment.clock,
            workers=SimpleNamespace(run=run),
            disk=SimpleNamespace(free_bytes=lambda path: free),
        )
        host.driver.space = Space(1 << 30)
        monkeypatch.setattr("shardkv.multiraft.maintenance.IDLE_FLUSH_SECONDS", 0.1)
        maintenance = Maintenance(host.driver, environment, structlog.get_logger(), "/data")
        async with trio.open_nursery() as nursery:
            await nursery.start(maintenance.run)
            await flushing.wait()
            await trio.sleep(INTERVAL_SECONDS)
            taken = host.driver.wal.spares_taken
            while host.driver.wal.spares_taken == taken:
                await hosts.write(b"k", bytes(20_000))
            await trio.sleep(INTERVAL_SECONDS / 2)
            assert host.driver.wal.statistics().spare_ready, "it is not waited for the next look"
            free = 1 << 20
            await trio.sleep((IDLE_MEASURES + 1) * INTERVAL_SECONDS)
            assert host.driver.space.full
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("gone", ["/data", "/wal"])
async def test_a_data_directory_that_is_removed_under_a_node_ends_it_and_the_error_says_what_to_do(
    autojump_clock: MockClock, gone: str
) -> None:
    def free_bytes(path: str) -> int:
        if gone == "/data":
            raise FileNotFoundError(2, "No such file or directory", path)
        return 1 << 40

    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        if gone == "/wal":
            del host.disk._directories["/wal"]
        environment: Any = SimpleNamespace(
            clock=host.environment.clock,
            workers=host.environment.workers,
            disk=SimpleNamespace(free_bytes=free_bytes),
        )
        maintenance = Maintenance(host.driver, environment, structlog.get_logger(), "/data")
        with pytest.raises(StorageError, match=f"is not there any more .*{gone}.*put it back"):
            await maintenance._watch_room()


@pytest.mark.parametrize("how", ["removed", "replaced", "moved away with its directory"])
async def test_a_log_file_that_is_taken_away_under_a_node_ends_it_before_it_is_full(
    autojump_clock: MockClock, how: str
) -> None:
    """An open file takes every write, wherever it lies or if it has no name any more, and no start would find them."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await hosts.write(b"k", b"v")
        maintenance = Maintenance(host.driver, host.environment, structlog.get_logger(), "/data")
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(maintenance.run)
                await trio.sleep(2 * INTERVAL_SECONDS)
                [segment] = [name for name in host.disk.list("/wal") if name.endswith(".wal")]
                if how == "moved away with its directory":
                    host.disk._directories["/elsewhere"] = host.disk._directories.pop("/wal")
                    host.disk.make_directory("/wal")
                else:
                    host.disk.unlink(f"/wal/{segment}")
                if how == "replaced":
                    host.disk.open(f"/wal/{segment}", create=True).close()
                await trio.sleep((IDLE_MEASURES + 1) * INTERVAL_SECONDS)
                nursery.cancel_scope.cancel()
        error = main_error(caught.value)
        assert isinstance(error, StorageError)
        assert re.search(
            r"not there any more \(/wal/0+1.wal was removed, .* put in its place\).*put it back", str(error)
        )


async def test_the_newest_entries_stay_in_the_log_though_every_follower_has_them(autojump_clock: MockClock) -> None:
    """The next leader may have a follower that is a little behind; and none may go that is not applied here."""
    async with world(3) as hosts:
        await write_many(hosts, 20)
        await hosts.agreed()
        await trio.sleep(1)
        leader = hosts.leader()
        leader.maintenance.kept = (5, 100)
        await leader.maintenance.flush_and_compact()
        assert leader.replica().log.compact_index == leader.machine().applied_index - 5


async def test_the_log_keeps_for_a_follower_that_is_away_only_what_it_can_use(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its next entry is gone it gets a snapshot, whatever is kept; and where nothing goes, nothing is counted."""
    async with world(3) as hosts:
        await write_many(hosts, 20)
        await hosts.agreed()
        leader = hosts.leader()
        away = next(host for host in hosts.values() if host is not leader)
        await away.crash()
        held = leader.replica().log.last_index()
        leader.maintenance.kept = (5, 40)
        await write_many(hosts, 20)
        log = leader.replica().log
        counted: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(GroupLog, "entry_bytes", lambda self, index: counted.append(index) or 0)
            await leader.maintenance.flush_and_compact()
        assert log.compact_index == held
        assert not counted
        await write_many(hosts, 40)
        await hosts.commit_handed_out(leader)
        await leader.maintenance.flush_and_compact()
        assert log.compact_index == leader.machine().applied_index - 45
        await leader.maintenance.flush_and_compact()
        assert log.compact_index == leader.machine().applied_index - 5
        await away.start()
        await hosts.agreed()


async def test_a_log_of_very_many_segments_keeps_nothing_for_those_far_behind(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of each range is not enough: there may be ten thousand."""
    monkeypatch.setattr("shardkv.multiraft.maintenance.KEEPING_SEGMENTS_MAX", 2)
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        away = next(host for host in hosts.values() if host is not leader)
        await away.crash()
        leader.maintenance.kept = (5, 10_000)
        await write_many(hosts, 20, bytes(20_000))
        assert leader.wal.statistics().segments > 2
        await trio.sleep(AWAY_SECONDS + 1)
        await leader.maintenance.flush_and_compact()
        assert leader.replica().log.compact_index == leader.machine().applied_index - 5
        await away.start()
        await hosts.agreed()


@pytest.mark.parametrize(("size", "behind"), [(1 << 20, 1), (300_000, 4)])
async def test_trap_11_a_follower_a_moment_behind_needs_no_snapshot_however_long_the_log_is(
    autojump_clock: MockClock, size: int, behind: int
) -> None:
    """Another range's follower is away, say, so that the log has more than KEEPING_SEGMENTS_MAX segments; this range's
    followers are all there, and one has not heard of the last write or two yet."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        for _ in range(16):
            await hosts.write(b"k", bytes(size))
        await hosts.agreed()
        await trio.sleep(0.2)
        hosts.isolate(3)
        for _ in range(behind):
            await hosts.write(b"k", bytes(size))
        assert leader.wal.statistics().segments > KEEPING_SEGMENTS_MAX
        await leader.maintenance.flush_and_compact()
        hosts.heal()
        await hosts.agreed()
        assert leader.snapshots.statistics().chunks_sent == 0


async def test_trap_11_a_new_leader_keeps_what_its_predecessor_will_need_when_it_is_back(
    autojump_clock: MockClock,
) -> None:
    """It has not heard of it in this term: a rolling restart under load would send a snapshot of every range."""
    async with world(3) as hosts:
        await write_many(hosts, 20)
        await hosts.agreed()
        former = hosts.leader()
        await former.crash()
        leader = await hosts.led()
        leader.maintenance.kept = (5, 10_000)
        await write_many(hosts, 30)
        await leader.maintenance.flush_and_compact()
        await former.start()
        await hosts.agreed()
        assert leader.snapshots.statistics().chunks_sent == 0


async def test_a_follower_that_is_there_and_takes_nothing_does_not_fill_the_disks_of_the_others(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without room answers heartbeats for days."""
    monkeypatch.setattr("shardkv.multiraft.maintenance.KEEPING_SEGMENTS_MAX", 2)
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        full = next(host for host in hosts.values() if host is not leader)
        full.driver.space.failed("a test", OutOfSpace("full"))
        leader.maintenance.kept = (5, 10_000)
        await write_many(hosts, 100, bytes(20_000))
        await trio.sleep(60)
        await leader.maintenance.flush_and_compact()
        assert leader.replica().log.compact_index == leader.machine().applied_index - 5
        full.driver.space.succeeded("a test")


async def test_ranges_at_rest_are_told_so_now_and_then(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await hosts.write(b"k", b"v")
        async with trio.open_nursery() as nursery:
            await nursery.start(host.maintenance.run)
            assert host.machine()._sessions is not None
            await trio.sleep(SESSION_AGE_MS_MAX / 1000 + REST_SECONDS + 1)
            assert host.machine()._sessions is None
            nursery.cancel_scope.cancel()


async def test_a_replica_without_state_is_left_alone(autojump_clock: MockClock) -> None:
    """There is nothing of it to flush or to forget, and its log is all that it has."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.write(b"k", b"v")
        replica = host.catalog.create(RangeId(7), ReplicaId(9), (8, NodeId(2)))
        host.maintenance.kept = (0, 0)
        before = host.replica().log.compact_index
        await host.maintenance.flush_and_compact()
        host.maintenance._rest()
        assert host.replica().log.compact_index > before
        assert host.catalog.replicas[RangeId(7)] is replica
        assert replica.log.compact_index == 0


async def test_what_a_replica_had_applied_is_not_said_of_the_one_in_its_place(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 20: an entry leaves the log only after a flush that covers its batch. A replica that takes the place of
    another one while the engine is flushed may have applied less, or what the flush has not seen."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await write_many(hosts, 20)
        host.maintenance.kept = (5, 100)
        former = host.replica(RANGE)
        begin = former.log.compact_index
        run = host.workers.run

        async def replaced_meanwhile(function: Any, *args: Any) -> Any:
            host.catalog.replicas[RANGE] = Replica(RANGE, ReplicaId(99), former.raft, former.log, former.machine)
            return await run(function, *args)

        with monkeypatch.context() as patch:
            patch.setattr(host.workers, "run", replaced_meanwhile)
            await host.maintenance.flush_and_compact()
        assert former.log.compact_index == begin
        await host.maintenance.flush_and_compact()
        assert former.log.compact_index > begin


async def test_trap_20_what_is_applied_while_the_engine_is_flushed_stays_in_the_log(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush covers what was written before it began, and no more."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        await write_many(hosts, 20)
        host.maintenance.kept = (0, 0)
        run = host.workers.run

        async def written_meanwhile(function: Any, *args: Any) -> Any:
            result = await run(function, *args)
            await write_many(hosts, 20, b"w")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(host.workers, "run", written_meanwhile)
            await host.maintenance.flush_and_compact()
        assert host.replica(RANGE).log.compact_index > INITIAL_INDEX
        await hosts.write(b"last", b"v")  # so what was let go of is on disk, too
        await host.restart(kept_batches=lambda count: 0)
        await hosts.led(RANGE)
        assert host.value(b"k19") == b"w"


async def test_trap_20_nothing_leaves_the_log_of_a_node_that_ends_amid_applying(autojump_clock: MockClock) -> None:
    """What the machines have applied of the batch that came to nothing is not in the engine, and never was flushed."""
    async with world(1) as hosts:
        host = hosts[1]
        hosts.tolerant = True
        await hosts.led(RANGE)
        await write_many(hosts, 20)
        host.maintenance.kept = (0, 0)

        def fail(batch: WriteBatch) -> None:
            hosts.nursery.start_soon(host.maintenance.flush_and_compact)
            raise StorageError("a block cannot be read")

        host.engine.write = fail  # type: ignore[method-assign]
        host.put(b"k0", b"w")
        await host.ended.wait()
        await trio.sleep(1)
        host.wal.close()  # as a node does that ends
        await host.restart()
        await hosts.led(RANGE)
        assert host.value(b"k0") == b"w"


async def test_a_log_whose_old_segments_cannot_be_removed_ends_the_node(autojump_clock: MockClock) -> None:
    """It takes nothing more, and a node at rest would find that out only at its next write."""
    async with world(1) as hosts:
        host = hosts[1]
        hosts.tolerant = True

        def fail() -> None:
            raise StorageError("the disk is broken")

        host.wal.collect = lambda: fail  # type: ignore[method-assign]
        host.maintenance._collect()
        with trio.fail_after(1):
            await host.ended.wait()
        assert "the disk is broken" in repr(host.error)


async def test_old_segments_are_removed_again_and_again_but_not_twice_at_once(autojump_clock: MockClock) -> None:
    async with world(1) as hosts:
        host = hosts[1]
        removals: list[int] = []
        host.wal.collect = lambda: lambda: removals.append(1)  # type: ignore[method-assign]
        for before in range(2):
            host.workers.hold_log()
            host.maintenance._collect()
            host.maintenance._collect()
            host.workers.release()
            await hosts.until(lambda count=before: len(removals) > count, "a removal")
            await trio.sleep(0.1)
            assert len(removals) == before + 1


async def test_how_far_the_log_is_on_disk_is_noted_now_and_then_and_never_ahead_of_it(
    autojump_clock: MockClock,
) -> None:
    """A start refuses a log that ends before what was noted."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        noted: list[int] = []
        maintenance = Maintenance(host.driver, host.environment, structlog.get_logger(), "/data", noted.append)
        create = CreateGroup(ReplicaId(9), 0, 0, ConfState())
        write = host.wal.append([LogUpdate(RangeId(5), create=create)])
        before = host.wal.synced_sequence
        assert before < host.wal.statistics().sequence
        await trio.sleep(MARK_SECONDS)
        for _ in range(3):
            maintenance._look("/")
        assert noted == [before]
        write()
        maintenance._look("/")
        assert noted == [before], "so soon after the last one"
        await trio.sleep(MARK_SECONDS)
        for _ in range(3):
            maintenance._look("/")
        assert noted == [before, host.wal.synced_sequence]


async def test_a_shorter_promise_is_put_on_record_once_however_many_flushes_begin_together(
    autojump_clock: MockClock,
) -> None:
    """People flush too (`admin snapshot`), at any moment. Two threads that write one note at once meet each other's
    unfinished file: one finds it gone, and the node ends by that; or a crash finds the note empty."""
    async with world(1) as hosts:
        host = hosts[1]
        await hosts.led(RANGE)
        host.catalog.note_promise(2 * PROMISE_NS)
        await hosts.until(lambda: host.catalog.shorter_promise_ns() is not None, "the end of the longer promises")
        under_way, most = 0, 0
        run = host.workers.run

        async def counted(function: Any, *args: Any) -> Any:
            nonlocal under_way, most
            if function != host.catalog.note_promise:
                return await run(function, *args)
            under_way += 1
            most = max(most, under_way)
            try:
                return await run(function, *args)
            finally:
                under_way -= 1

        host.workers.run = counted  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(host.maintenance.flush_and_compact)
        assert most == 1
        assert host.catalog.shorter_promise_ns() is None
