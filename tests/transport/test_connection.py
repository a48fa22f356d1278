"""The out-buffer of a connection, over a stream that takes as much as the test says."""

import pytest
import trio

from shardkv.environment.real import real_environment
from shardkv.transport.connection import SEND_PIECE_BYTES, Connection


class ScriptedStream:
    """Takes ``room`` bytes at once, the rest when the test makes room."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.taken = b""
        self.sends = 0
        self.room = room
        self.closed = False
        self.changed = trio.Event()
        self.remote = "test:1"

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        if self.closed:
            raise trio.BrokenResourceError("gone")
        self.sends += 1
        count = min(self.room, len(data))
        self.taken += bytes(data[:count])
        self.room -= count
        return count

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            count = self.send_nowait(rest)
            rest = rest[count:]
            if rest:
                await self.changed.wait()
        await trio.lowlevel.checkpoint()

    def make_room(self, count: int) -> None:
        self.room += count
        self.changed.set()
        self.changed = trio.Event()

    async def receive(self, count_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("reset")

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        self.closed = True
        self.make_room(0)


def connection(stream: ScriptedStream, **settings: object) -> Connection:
    return Connection(stream, clock=real_environment().clock, **settings)  # type: ignore[arg-type]


async def test_many_writes_leave_in_one_send() -> None:
    """One flush per connection and turn (DESIGN 4.2)."""
    stream = ScriptedStream()
    c = connection(stream)
    for number in range(100):
        assert c.write(b"%03d" % number)
    assert c.buffered == 300
    c.flush()
    c.check()
    assert (stream.sends, c.buffered) == (1, 0)
    assert stream.taken == b"".join(b"%03d" % number for number in range(100))


async def test_a_flush_without_data_sends_nothing() -> None:
    stream = ScriptedStream()
    connection(stream).flush()
    assert stream.sends == 0


async def test_what_the_system_does_not_take_goes_to_the_writer_in_order(nursery: trio.Nursery) -> None:
    """While the writer holds a piece a flush must not overtake it."""
    stream = ScriptedStream(room=5)
    c = connection(stream)
    await nursery.start(c.run_writer)
    c.write(b"0123456789")
    c.flush()
    assert (stream.taken, c.buffered) == (b"01234", 5)
    await trio.testing.wait_all_tasks_blocked()
    c.write(b"abc")
    c.flush()
    c.check()
    assert stream.taken == b"01234"
    assert c.statistics().writer_wakeups == 1
    stream.make_room(100)
    await c.drain(1)
    assert (stream.taken, c.buffered) == (b"0123456789abc", 0)
    c.write(b"xyz")
    c.flush()
    assert stream.taken.endswith(b"xyz")
    c.close_now()


async def test_a_large_buffer_is_sent_in_pieces(nursery: trio.Nursery) -> None:
    stream = ScriptedStream()
    c = connection(stream)
    await nursery.start(c.run_writer)
    whole = b""
    for number in range(40):
        part = bytes([number]) * (SEND_PIECE_BYTES // 7)
        whole += part
        c.write(part)
    await c.drain(1)
    assert stream.taken == whole
    assert 5 <= stream.sends <= 7
    c.close_now()


async def test_a_reader_that_does_not_read_loses_its_connection_and_its_memory(nursery: trio.Nursery) -> None:
    """A slow reader never grows memory: its answers must not be lost silently, so the connection goes."""
    stream = ScriptedStream(room=0)
    c = connection(stream, buffer_bytes_max=1000)
    await nursery.start(c.run_writer)
    assert c.write(bytes(900))
    c.flush()
    await trio.testing.wait_all_tasks_blocked()
    assert not c.overflowing
    assert not c.write(bytes(101))
    assert c.overflowing
    assert c.closed
    assert stream.closed
    assert c.buffered == 0
    assert "does not read" in c.reason
    c.check()


async def test_a_connection_for_droppable_messages_drops_them_and_recovers(nursery: trio.Nursery) -> None:
    stream = ScriptedStream(room=0)
    c = connection(stream, buffer_bytes_max=1000, break_on_overflow=False)
    await nursery.start(c.run_writer)
    assert c.write(bytes(900))
    assert not c.write(bytes(101))
    c.check()
    assert c.overflowing
    assert not c.closed
    assert c.write(bytes(100))
    assert c.statistics().bytes_dropped == 101
    c.flush()
    stream.make_room(10_000)
    await c.drain(1)
    assert not c.overflowing
    assert len(stream.taken) == 1000
    c.close_now()


async def test_a_frame_above_the_bound_is_taken_when_nothing_waits(nursery: trio.Nursery) -> None:
    """Otherwise it could never be sent."""
    stream = ScriptedStream()
    c = connection(stream, buffer_bytes_max=10)
    assert c.write(bytes(100))
    c.flush()
    assert len(stream.taken) == 100


async def test_drain_waits_for_the_mark_only(nursery: trio.Nursery) -> None:
    stream = ScriptedStream(room=0)
    c = connection(stream)
    await nursery.start(c.run_writer)
    for _ in range(4):
        c.write(bytes(SEND_PIECE_BYTES))
    drained = trio.Event()

    async def wait() -> None:
        await c.drain(2 * SEND_PIECE_BYTES + 1)
        drained.set()

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    stream.make_room(SEND_PIECE_BYTES)
    await trio.testing.wait_all_tasks_blocked()
    assert not drained.is_set()
    stream.make_room(SEND_PIECE_BYTES)
    await trio.testing.wait_all_tasks_blocked()
    assert drained.is_set()
    c.close_now()


async def test_closing_wakes_whoever_drains(nursery: trio.Nursery) -> None:
    stream = ScriptedStream(room=0)
    c = connection(stream)
    await nursery.start(c.run_writer)
    c.write(b"x")

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError, match="enough"):
            await c.drain(1)

    async with trio.open_nursery() as inner:
        inner.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        c.close_now("enough")
    assert not c.write(b"y")
    c.check()


async def test_a_broken_stream_closes_the_connection_at_the_flush() -> None:
    stream = ScriptedStream()
    c = connection(stream)
    stream.closed = True
    c.write(b"x")
    c.flush()
    assert c.closed
    assert c.reason == "gone"
    c.check()


async def test_a_reset_is_told_to_the_reader_and_closes() -> None:
    c = connection(ScriptedStream())
    with pytest.raises(trio.BrokenResourceError):
        await c.receive()
    assert c.closed


async def test_the_time_without_progress_is_known(nursery: trio.Nursery) -> None:
    """A peer that takes nothing for long is given up, which needs a measure."""
    stream = ScriptedStream(room=0)

    class Clock:
        now = 0

        def monotonic_ns(self) -> int:
            return self.now

    clock = Clock()
    c = Connection(stream, clock=clock)  # type: ignore[arg-type]
    await nursery.start(c.run_writer)
    assert c.stalled_seconds() == 0
    c.write(b"x")
    c.flush()
    clock.now = 3_000_000_000
    assert c.stalled_seconds() == 3
    stream.make_room(1)
    await c.drain(1)
    await trio.testing.wait_all_tasks_blocked()
    assert c.stalled_seconds() == 0
    c.close_now()


async def test_a_large_piece_is_sent_and_counted_bit_by_bit(nursery: trio.Nursery) -> None:
    """Who takes a large answer slowly is seen to take it, and what was taken is no longer in memory."""
    stream = ScriptedStream(room=0)
    c = connection(stream)
    seen: list[int] = []
    c.on_progress = lambda: seen.append(c.buffered)
    await nursery.start(c.run_writer)
    whole = b"".join(bytes([number]) * SEND_PIECE_BYTES for number in range(8)) + b"end"
    c.write(whole)
    c.flush()
    await trio.testing.wait_all_tasks_blocked()
    assert c.buffered == len(whole)
    stream.make_room(3 * SEND_PIECE_BYTES + 1)
    await trio.testing.wait_all_tasks_blocked()
    assert c.buffered == len(whole) - 3 * SEND_PIECE_BYTES
    c.check()
    stream.make_room(1 << 30)
    await c.drain(1)
    assert stream.taken == whole
    assert c.bytes_sent == len(whole)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 9
    c.close_now()
    assert len(seen) == 10
