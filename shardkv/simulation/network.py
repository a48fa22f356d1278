"""A network in memory, with the faults of a real one: delay, slow links, partitions, resets, cuts, dead machines.

It behaves as TCP does: a stream's bytes arrive in order or not at all, a partition delays them until it heals, a window
bounds what is under way, and only a reset or an end of stream tells anybody that something is over. The rule: a node
sees of a fault only what its own sockets would show.
"""

import errno
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Final

import trio

from shardkv.address import parse_address
from shardkv.environment import Listener, Stream
from shardkv.errors import ConfigError, ShardKVError
from shardkv.simulation import determinism
from shardkv.simulation.calls import Calls
from shardkv.simulation.frames import WaywardCarrier
from shardkv.simulation.pipes import END, RESET, Link, Pipe, Reset, Signal
from shardkv.simulation.trace import Trace

WINDOW_BYTES: Final = 256 * 1024
"""What one direction of a stream holds, sent and not yet read; beyond it a sender must wait."""
CONNECT_SECONDS_MAX: Final = 20.0
"""After this a dial that nobody answers fails, as the system's own limit would make it."""
FIRST_PORT: Final = 20_000


class SimulatedStream:
    """Implements :class:`shardkv.environment.Stream`."""

    __slots__ = ("_closed", "_local", "_network", "_remote", "incoming", "number", "outgoing", "owner")

    def __init__(
        self, owner: "NodeNetwork", number: int, local: str, remote: str, outgoing: Pipe, incoming: Pipe
    ) -> None:
        self.owner: NodeNetwork = owner
        self._network = owner.network
        self._local = local
        self._remote = remote
        self._closed = False
        self.number: int = number
        self.outgoing: Pipe = outgoing
        self.incoming: Pipe = incoming

    @property
    def remote(self) -> str:
        return self._remote

    @property
    def local(self) -> str:
        return self._local

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        if self.owner.fenced:
            return len(data)
        if self.owner.node_calls is not None and self.owner.node_calls.hit():
            return len(data)
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self.incoming.end_arrived():
            raise trio.BrokenResourceError(f"the connection to {self._remote} is lost: broken pipe")
        pipe = self.outgoing
        count = min(len(data), WINDOW_BYTES - pipe.under_way)
        if count <= 0:
            return 0
        link = pipe.link
        random = self._network.random
        if link.reset_probability and random.random() < link.reset_probability:
            self._network.reset(self)
            return count
        if pipe.closed:
            return count  # A reset is under way; the program cannot know it yet, and nothing of this arrives.
        if link.cut_after_bytes is not None:
            if count >= link.cut_after_bytes:
                pipe.put(bytes(data[: link.cut_after_bytes]), random)
                link.cut_after_bytes = None
                self._network.reset(self)
                return count
            link.cut_after_bytes -= count
        if pipe.carrier is not None:
            pipe.carrier.carry(bytes(data[:count]))
        else:
            pipe.put(bytes(data[:count]), random)
        return count

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        with memoryview(data) as rest:
            sent = self.send_nowait(rest)
            while sent < len(rest):
                await self.outgoing.window.wait()
                sent += self.send_nowait(rest[sent:])

    async def receive(self, count_max: int) -> bytes:
        pipe = self.incoming
        if self._closed or pipe.arrived():
            await trio.lowlevel.checkpoint()
        while True:
            if self.owner.fenced:
                await determinism.hang()
            if self._closed:
                raise trio.ClosedResourceError("this stream is closed")
            if pipe.arrived():
                break
            await pipe.readable.wait()
        data = pipe.take(count_max)
        if isinstance(data, Reset):
            raise trio.BrokenResourceError(f"the connection to {self._remote} is lost: connection reset by peer")
        if self._network.trace is not None:
            self._network.trace.record_bytes(pipe.source, pipe.target, data)
        return data

    async def aclose(self) -> None:
        self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        if not self._closed:
            self._closed = True
            if not self.owner.fenced:
                self.hang_up()
            self.wake()

    def wake(self) -> None:
        """Let the stream's own tasks look again."""
        self.outgoing.window.notify()
        self.incoming.readable.notify()

    def hang_up(self) -> None:
        """What the system does with a socket when the program closes it or dies."""
        self._network.streams.pop(self.number, None)
        self.outgoing.end(END, self._network.random)


class SimulatedListener:
    """Implements :class:`shardkv.environment.Listener`."""

    __slots__ = ("_address", "arrived", "owner", "waiting")

    def __init__(self, address: str, owner: "NodeNetwork") -> None:
        self._address = address
        self.owner: NodeNetwork = owner
        self.waiting: deque[SimulatedStream] = deque()
        """Connected, and not yet handed to a task."""
        self.arrived: trio.Event = trio.Event()

    @property
    def address(self) -> str:
        return self._address


class NodeNetwork:
    """The network as one node sees it. Implements :class:`shardkv.environment.Network`."""

    __slots__ = ("fenced", "name", "network", "node_calls")

    def __init__(self, network: "SimulatedNetwork", name: str) -> None:
        self.network: SimulatedNetwork = network
        self.node_calls: Calls | None = None
        """Where the node counts its calls."""
        self.name: str = name
        self.fenced: bool = False
        """The node has crashed: what its remains send goes nowhere, and what they wait for never comes."""

    def fence(self) -> None:
        self.fenced = True
        for stream in self.network.streams.values():
            if stream.owner is self:
                stream.wake()

    async def listen(
        self,
        address: str,
        handler: Callable[[Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Listener] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        await trio.lowlevel.checkpoint()
        listener = self.network.bind(self, address)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(listener)
                while True:
                    await listener.arrived.wait()
                    listener.arrived = trio.Event()
                    while listener.waiting:
                        nursery.start_soon(_serve, listener.waiting.popleft(), handler)
        finally:
            if not self.fenced:
                self.network.unbind(listener)

    async def dial(self, address: str) -> SimulatedStream:
        if self.node_calls is not None:
            self.node_calls.hit()
        await trio.lowlevel.checkpoint()
        if self.fenced:
            await determinism.hang()
        stream = await self.network.connect(self, str(parse_address(address)))
        if self.fenced:
            await determinism.hang()
        return stream

    def connections_max(self) -> int:
        return sys.maxsize


class SimulatedNetwork:
    """The network between all nodes of a run, and the hand that breaks it. Nodes are known by name.

    Args:
        seed: delays and chance faults follow from it.
        link: what each link starts as; :meth:`link` gives a single one, to be changed.
    """

    def __init__(self, seed: int | str, *, link: Link | None = None) -> None:
        self.random: determinism.SeededRandom = determinism.seeded_random("network", seed)
        self.trace: Trace | None = None
        """Of the whole run: what is received goes there."""
        self.streams: dict[int, SimulatedStream] = {}
        """Every open end of a connection, in the order of their making."""
        self._default = link or Link()
        self._links: dict[tuple[str, str], Link] = {}
        self._listeners: dict[str, SimulatedListener] = {}
        self._owners: dict[str, str] = {}
        """Which node had an address last: a dial into its silence fails otherwise than one to a free port."""
        self._dead: dict[str, list[SimulatedStream]] = {}
        """Machines that are off, and the connections that their peers still believe in."""
        self._made = 0
        self._ports = FIRST_PORT
        self._healed = Signal()

    def node(self, name: str) -> NodeNetwork:
        """The network for a node that starts, or starts again: connections of a machine that was off are reset now."""
        for stream in self._dead.pop(name, []):
            stream.outgoing.end(RESET, self.random)
        self._healed.notify()
        return NodeNetwork(self, name)

    def is_off(self, name: str) -> bool:
        """Whether the node's machine is dead, and has not come back."""
        return name in self._dead

    def link(self, source: str, target: str) -> Link:
        """How bytes travel from ``source`` to ``target``; change its fields at will."""
        link = self._links.get((source, target))
        if link is None:
            link = self._links[source, target] = replace(self._default)
        return link

    # Faults

    def block(self, source: str, target: str) -> None:
        """Nothing gets from ``source`` to ``target`` any more; the other way is left as it is."""
        self.link(source, target).blocked = True
        for stream in self.streams.values():
            pipe = stream.incoming
            if (pipe.source, pipe.target) == (source, target):
                pipe.block()

    def unblock(self, source: str, target: str) -> None:
        """What was held up is sent again and arrives."""
        self.link(source, target).blocked = False
        for stream in self.streams.values():
            pipe = stream.incoming
            if (pipe.source, pipe.target) == (source, target):
                pipe.unblock()
            elif (pipe.source, pipe.target) == (target, source):
                pipe.release_credit()
        self._healed.notify()

    def partition(self, *groups: Iterable[str]) -> None:
        """Block both ways between nodes of different groups. Nodes in no group are not touched."""
        sides = [[*group] for group in groups]
        for number, side in enumerate(sides):
            for other in sides[number + 1 :]:
                for one, two in product(side, other):
                    self.block(one, two)
                    self.block(two, one)

    def heal(self) -> None:
        """Unblock every link."""
        for (source, target), link in list(self._links.items()):
            if link.blocked:
                self.unblock(source, target)

    def restore_links(self) -> None:
        """Make every link what it was at the start, but for partitions."""
        for link in self._links.values():
            for name in Link.__slots__:
                if name != "blocked":
                    setattr(link, name, getattr(self._default, name))
        for stream in self.streams.values():
            if stream.outgoing.carrier is not None:
                stream.outgoing.carrier.rest()
            stream.outgoing.hurry()

    def drop(self, one: str, two: str) -> int:
        """Reset every connection between two nodes; how many there were."""
        ends = [stream for stream in self.streams.values() if stream.incoming.source in (one, two)]
        hit = [stream for stream in ends if {stream.incoming.source, stream.incoming.target} == {one, two}]
        for stream in hit:
            self.reset(stream)
        return len(hit) // 2

    def cut_after(self, source: str, target: str, count: int) -> None:
        """Let ``count`` more bytes get from ``source`` to ``target``, then reset the connection with the last."""
        self.link(source, target).cut_after_bytes = count

    def reset(self, stream: SimulatedStream) -> None:
        """End one connection for both sides, as a router that has lost its state does."""
        stream.outgoing.end(RESET, self.random)
        stream.incoming.end(RESET, self.random)

    def kill(self, node: NodeNetwork) -> None:
        """The node's process dies: it is fenced, and its system closes its sockets."""
        node.fence()
        for stream in self._take_streams(node):
            stream.hang_up()
        self._unbind_all(node)

    def power_off(self, node: NodeNetwork) -> None:
        """The node's machine dies: it is fenced, and nobody is told. Its peers hear of it when it is back."""
        node.fence()
        streams = self._take_streams(node)
        for stream in streams:
            stream.outgoing.abandon()
        self._dead.setdefault(node.name, []).extend(streams)
        self._unbind_all(node)

    def _take_streams(self, node: NodeNetwork) -> "list[SimulatedStream]":
        taken = [stream for stream in self.streams.values() if stream.owner is node]
        for stream in taken:
            del self.streams[stream.number]
        return taken

    # What the nodes' networks call

    def bind(self, owner: NodeNetwork, address: str) -> SimulatedListener:
        wanted = parse_address(address, port_zero=True)
        if wanted.port == 0:
            self._ports += 1
            wanted = wanted._replace(port=self._ports)
        text = str(wanted)
        if text in self._listeners:
            raise ConfigError(f"cannot listen on {text}: port {wanted.port} is in use; choose another port")
        listener = self._listeners[text] = SimulatedListener(text, owner)
        self._owners[text] = owner.name
        return listener

    def unbind(self, listener: SimulatedListener) -> None:
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]
        for stream in listener.waiting:
            stream.hang_up()

    def _unbind_all(self, node: NodeNetwork) -> None:
        for listener in [listener for listener in self._listeners.values() if listener.owner is node]:
            self.unbind(listener)

    async def connect(self, source: NodeNetwork, address: str) -> SimulatedStream:
        """Connect as TCP does: wait while nothing gets through, then be accepted or refused."""
        with determinism.deadline_after(CONNECT_SECONDS_MAX):
            while True:
                target = self._owners.get(address)
                if target is None or self._gets_through(source.name, target):
                    break
                await self._healed.wait()
            link = self.link(source.name, target or source.name)
            await determinism.sleep(2 * link.delay_seconds_max)
            listener = self._listeners.get(address)
            if listener is None:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {address}")
            if not self._gets_through(source.name, listener.owner.name):
                await determinism.hang()  # The answer is lost; the deadline ends this.
            return self._make(source, listener)
        raise TimeoutError(errno.ETIMEDOUT, f"no answer from {address}")

    def _gets_through(self, one: str, two: str) -> bool:
        return two not in self._dead and not (self.link(one, two).blocked or self.link(two, one).blocked)

    def _make(self, source: NodeNetwork, listener: SimulatedListener) -> SimulatedStream:
        target = listener.owner
        there, back = self.link(source.name, target.name), self.link(target.name, source.name)
        outgoing = Pipe(source.name, target.name, there, back)
        incoming = Pipe(target.name, source.name, back, there)
        outgoing.back, incoming.back = incoming, outgoing
        for pipe in (outgoing, incoming):
            self._entrust(pipe)
        self._ports += 1
        here = f"{source.name}:{self._ports}"
        dialled = SimulatedStream(source, self._made, here, listener.address, outgoing, incoming)
        accepted = SimulatedStream(target, self._made + 1, listener.address, here, incoming, outgoing)
        self._made += 2
        self.streams[dialled.number] = dialled
        self.streams[accepted.number] = accepted
        listener.waiting.append(accepted)
        listener.arrived.set()
        return dialled

    def _entrust(self, pipe: Pipe) -> None:
        link = pipe.link
        if link.duplicate_probability or link.reorder_probability:
            pipe.carrier = WaywardCarrier(
                lambda data: pipe.put(data, self.random),
                self.random,
                link.duplicate_probability,
                link.reorder_probability,
            )


async def _serve(stream: SimulatedStream, handler: Callable[[Stream], Awaitable[None]]) -> None:
    try:
        await handler(stream)
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ShardKVError):
        pass
    finally:
        stream.close_now()
