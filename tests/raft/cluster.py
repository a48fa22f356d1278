"""A Raft group in one process, without clocks or sockets: for scenarios that read as prose and for random runs.

Each host has storage that survives a crash and work that does not: what was handed out to be written but is not
written yet. Nothing happens by itself; a test ticks, delivers and crashes.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any

from shardkv.raft import (
    MemoryStorage,
    ProposalDropped,
    RaftNode,
    RaftSettings,
    ReadState,
    Ready,
    Role,
    SnapshotTemporarilyUnavailable,
    decode_conf_change,
)
from shardkv.raft.messages import (
    APPEND_THREAD,
    APPLY_THREAD,
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)

M = MessageType
TICK_NS = 100_000_000
_SEPARATOR = b"\x00"


def settings_for(replica_id: int, **changed: Any) -> RaftSettings:
    """Settings of a test: pre-vote and check-quorum off unless asked for, timeouts drawn from a fixed seed."""
    defaults: dict[str, Any] = {
        "pre_vote": False,
        "check_quorum": False,
        "randrange": random.Random(replica_id).randrange,
    }
    return RaftSettings(replica_id=replica_id, **(defaults | changed))


def single(text: str) -> ConfChangeSingle:
    """``v4``, ``l4`` and ``r4``: make 4 a voter, make it a learner, remove it."""
    kinds = {"v": ConfChangeType.ADD_NODE, "l": ConfChangeType.ADD_LEARNER_NODE, "r": ConfChangeType.REMOVE_NODE}
    return ConfChangeSingle(kinds[text[0]], int(text[1:]))


def change(text: str, transition: ConfChangeTransition = ConfChangeTransition.AUTO) -> ConfChange:
    return ConfChange(tuple(single(part) for part in text.split()), transition)


class LiveStorage(MemoryStorage):
    """A log whose snapshots are made when they are asked for, of what is applied then.

    A snapshot from before a member was added does not name it, and would be refused by it.
    """

    __slots__ = ("busy", "host")

    def __init__(self, host: "Host", conf_state: ConfState) -> None:
        super().__init__(conf_state)
        self.host = host
        self.busy = False
        """Whether a snapshot cannot be had now."""

    def written_snapshot(self) -> Snapshot:
        return super().snapshot()

    def snapshot(self) -> Snapshot:
        if self.busy:
            raise SnapshotTemporarilyUnavailable
        host = self.host
        if host.applied_index <= self.written_snapshot().metadata.index:
            return self.written_snapshot()
        # Not what the replica says: it is asked for one while it takes up a change that the host has not applied yet.
        metadata = SnapshotMetadata(host.applied_index, self.term(host.applied_index), host.conf_state)
        return Snapshot(metadata, _SEPARATOR.join(host.applied))


class Host:
    """One replica with its disk and its state machine, a list of what was applied."""

    def __init__(self, cluster: "Cluster", replica_id: int, conf_state: ConfState) -> None:
        self.cluster = cluster
        self.id = replica_id
        self.storage = LiveStorage(self, conf_state)
        self.hold_writes = False
        """Whether storage work waits until :meth:`write` is called."""
        self.up = True
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        changed = self.cluster.settings | self.cluster.own_settings.get(self.id, {})
        snapshot = self.storage.written_snapshot()
        self._load(snapshot)
        self.work: list[Message] = []
        self.read_states: list[ReadState] = []
        self.node = RaftNode(
            settings_for(self.id, **changed),
            self.storage,
            applied=snapshot.metadata.index,
            now=self.cluster.clock(self.id),
        )

    def crash(self) -> None:
        """Lose everything that is not written."""
        self.up = False
        self.work.clear()

    def restart(self) -> None:
        self.up = True
        self._start()

    def step(self, message: Message) -> None:
        self.node.step(message, self.cluster.clock(self.id))

    def process(self) -> Ready:
        """Take one Ready and do what it says."""
        ready = self.node.ready()
        self.read_states += ready.read_states
        if not self.node.raft.settings.async_storage_writes:
            self._write(ready.hard_state or HardState(), ready.entries, ready.snapshot)
            self._apply(ready.committed_entries)
            self.cluster.send(ready.messages)
            self.node.advance()
            return ready
        assert not self.node.has_ready(), "a hand-out is all that there is"
        for message in ready.messages:
            if message.to in (APPEND_THREAD, APPLY_THREAD):
                self.work.append(message)
            else:
                self.cluster.send([message])
        if not self.hold_writes:
            self.write()
        return ready

    def write(self, count: int | None = None) -> None:
        """Do the storage work that waits, the oldest first, and deliver its responses."""
        todo = self.work[:count]
        del self.work[:count]
        for message in todo:
            if message.to == APPEND_THREAD:
                self._write(HardState(message.term, message.vote, message.commit), message.entries, message.snapshot)
            else:
                self._apply(message.entries)
            self.cluster.send(self.node.acknowledge(message.responses, self.cluster.clock(self.id)))

    def _write(self, hard_state: HardState, entries: Iterable[Entry], snapshot: Snapshot | None) -> None:
        if hard_state != HardState():
            self.storage.set_hard_state(hard_state)
        if snapshot is not None:
            self.storage.apply_snapshot(snapshot)
            self._load(snapshot)
        self.storage.append(tuple(entries))

    def _load(self, snapshot: Snapshot) -> None:
        self.applied = [part for part in snapshot.data.split(_SEPARATOR) if part]
        self.applied_index = snapshot.metadata.index
        self.conf_state = snapshot.metadata.conf_state

    def _apply(self, entries: Iterable[Entry]) -> None:
        if self.node.raft.log.snapshot is not None:
            return  # the replica is at the snapshot already, which has all this: a change would be made to that
        for entry in entries:
            if entry.index <= self.applied_index:
                continue  # a snapshot that has it was faster
            if entry.type is EntryType.NORMAL:
                if entry.data:
                    self.applied.append(entry.data)
            else:
                self.conf_state = self.node.apply_conf_change(decode_conf_change(entry.data))
            self.applied_index = entry.index

    def compact(self, index: int | None = None) -> None:
        """Make a snapshot of the applied state and drop the log below ``index``, by default all of that."""
        applied = self.applied_index
        self.storage.create_snapshot(applied, self.conf_state, _SEPARATOR.join(self.applied))
        self.storage.compact(applied if index is None else index)

    def logged(self) -> list[tuple[int, bytes]]:
        """The whole log as (term, data), written or not."""
        log = self.node.raft.log
        if log.first_index > log.last_index:
            return []
        entries = log.slice(log.first_index, log.last_index + 1, 1 << 60)
        return [(entry.term, entry.data) for entry in entries]


class Cluster:
    """Hosts and the messages between them. ``settings`` hold for all, ``own_settings`` for single replicas."""

    def __init__(
        self,
        voters: int = 3,
        *,
        learners: int = 0,
        own_settings: dict[int, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = settings
        self.own_settings = own_settings or {}
        self.now = 1_000 * TICK_NS
        self.clocks: dict[int, Callable[[int], int]] = {}
        self.messages: list[Message] = []
        self.cut: set[tuple[int, int]] = set()
        self.dropped: Callable[[Message], bool] = lambda message: False
        ids = range(1, voters + learners + 1)
        conf_state = ConfState(tuple(ids[:voters]), tuple(ids[voters:]))
        self.first = conf_state
        self.hosts = {id_: Host(self, id_, conf_state) for id_ in ids}

    def __getitem__(self, id_: int) -> RaftNode:
        return self.hosts[id_].node

    def clock(self, id_: int) -> int:
        return self.clocks[id_](self.now) if id_ in self.clocks else self.now

    def add(self, id_: int, conf_state: ConfState | None = None) -> Host:
        """A replica that knows who founded the group; the group must be told of it by a membership change."""
        self.hosts[id_] = Host(self, id_, self.first if conf_state is None else conf_state)
        return self.hosts[id_]

    def send(self, messages: Iterable[Message]) -> None:
        self.messages += messages

    def isolate(self, *ids: int) -> None:
        """Cut these replicas off from all others, but not from each other."""
        for inside in ids:
            for outside in self.hosts.keys() - set(ids):
                self.cut |= {(inside, outside), (outside, inside)}

    def heal(self) -> None:
        self.cut.clear()

    def process_all(self) -> bool:
        """Let every host do the work that it has. False when none had any."""
        busy = False
        for host in self.hosts.values():
            while host.up and host.node.has_ready():
                host.process()
                busy = True
        return busy

    def deliver(self, message: Message) -> None:
        host = self.hosts.get(message.to)
        if host is None or not host.up or (message.from_, message.to) in self.cut or self.dropped(message):
            return
        try:
            host.step(message)
        except ProposalDropped:
            assert message.type is M.PROP, f"{message} was dropped as a proposal"

    def settle(self) -> None:
        """Deliver and work until nothing is left to do."""
        for _ in range(10_000):
            busy = self.process_all()
            if not busy and not self.messages:
                break
            messages, self.messages = self.messages, []
            for message in messages:
                self.deliver(message)
        else:
            raise AssertionError("the group does not come to rest")
        for host in self.hosts.values():
            host.node.check()
            host.storage.check()

    def tick(self, *ids: int, count: int = 1) -> None:
        """Let time pass, for these replicas or for all, settling after each tick."""
        for _ in range(count):
            self.now += TICK_NS
            for id_ in ids or tuple(self.hosts):
                host = self.hosts[id_]
                if host.up:
                    host.node.tick(self.clock(id_))
            self.settle()

    def elect(self, id_: int) -> RaftNode:
        """Make this replica lead, the way that its host would."""
        self[id_].campaign(self.clock(id_))
        self.settle()
        assert self[id_].role is Role.LEADER, f"{id_} was not elected: {self[id_].status()}"
        return self[id_]

    def leaders(self) -> list[int]:
        return [id_ for id_, host in self.hosts.items() if host.up and host.node.role is Role.LEADER]


def sent(ready: Ready, kind: MessageType) -> list[Message]:
    """The messages of a kind that may leave at once."""
    return [message for message in ready.messages if message.type is kind]


def after_write(ready: Ready) -> tuple[Message, ...]:
    """The messages that wait for what this Ready writes."""
    return tuple(
        response for message in ready.messages if message.to == APPEND_THREAD for response in message.responses
    )


def stored(terms: Iterable[int], hard_state: HardState | None = None, *, voters: int = 3) -> MemoryStorage:
    """The storage of a voter whose log holds an entry of each of these terms."""
    storage = MemoryStorage(ConfState(tuple(range(1, voters + 1))))
    entries = tuple(Entry(term, index) for index, term in enumerate(terms, 1))
    storage.append(entries)
    if entries:
        storage.set_hard_state(hard_state or HardState(entries[-1].term, 0, 0))
    return storage


def fresh(replica_id: int = 1, voters: int = 3, terms: Iterable[int] = (), **changed: Any) -> RaftNode:
    """A lone replica whose log holds an entry of each of these terms, all of them written."""
    return RaftNode(settings_for(replica_id, **changed), stored(terms, voters=voters))


def led(voters: int = 3, **changed: object) -> Cluster:
    """A group that 1 leads."""
    cluster = Cluster(voters, **changed)
    cluster.elect(1)
    return cluster
