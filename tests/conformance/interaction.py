"""A world of Raft nodes that is driven by the commands of etcd-io/raft's interaction transcripts.

It owns the nodes, their storage and the messages between them, and prints what happens. It decides nothing about
Raft; all of that is the core's. The core logs nothing, so log levels matter only in that ``none`` silences the world.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from shardkv.raft import (
    UNBOUNDED,
    Compacted,
    MemoryStorage,
    ProposalDropped,
    RaftNode,
    RaftSettings,
    ReadOnly,
    decode_conf_change,
    encode_conf_change,
)
from shardkv.raft.membership import all_voters
from shardkv.raft.messages import (
    APPEND_THREAD,
    APPLY_THREAD,
    EMPTY_HARD_STATE,
    ConfChange,
    ConfChangeTransition,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)
from tests.conformance import rendering
from tests.conformance.datadriven import Case

_LOG_LEVELS = ("debug", "info", "warn", "error", "fatal", "none")
_TRANSITIONS = {
    "auto": ConfChangeTransition.AUTO,
    "implicit": ConfChangeTransition.JOINT_IMPLICIT,
    "explicit": ConfChangeTransition.JOINT_EXPLICIT,
}
_FLAGS = {
    "async-storage-writes": "async_storage_writes",
    "prevote": "pre_vote",
    "checkquorum": "check_quorum",
    "disable-conf-change-validation": "disable_conf_change_validation",
    "step-down-on-removal": "step_down_on_removal",
}
_NUMBERS = {"inflight": "inflight_messages_max", "max-committed-size-per-ready": "committed_bytes_per_ready_max"}
_READ_ONLY = {"safe": ReadOnly.SAFE, "lease-based": ReadOnly.LEASE_BASED}
_LOCAL_ONLY_ERROR = "raft: cannot step raft local message"
_NO_PEER_ERROR = "raft: cannot step as peer not found"
_DROPPED_ERROR = "raft proposal dropped"


class CommandError(Exception):
    """A command failed; its text is part of what the transcript prints."""


class HistoryStorage(MemoryStorage):
    """A log whose newest snapshot is always the state after the last applied entry."""

    __slots__ = ("history",)

    def __init__(self, first: Snapshot) -> None:
        super().__init__()
        self.history = [first]

    def snapshot(self) -> Snapshot:
        return self.history[-1]


class Member:
    """One node with its storage, and the work that its two local threads have before them."""

    def __init__(self, settings: RaftSettings, storage: HistoryStorage, applied: int) -> None:
        self.settings = settings
        self.storage = storage
        self.node = RaftNode(settings, storage, applied=applied)
        self.append_work: list[Message] = []
        self.apply_work: list[Message] = []

    @property
    def id(self) -> int:
        return self.settings.replica_id

    def write(self, hard_state: HardState, entries: Sequence[Entry], snapshot: Snapshot | None) -> None:
        if hard_state != EMPTY_HARD_STATE:
            self.storage.set_hard_state(hard_state)
        if snapshot is not None:
            if entries:
                raise CommandError("can't apply snapshot and entries at the same time")
            self.storage.apply_snapshot(snapshot)
        else:
            self.storage.append(entries)

    def apply(self, entries: Sequence[Entry]) -> None:
        """Append each entry's data to the state, and remember every state as a snapshot."""
        history = self.storage.history
        for entry in entries:
            update, conf_state = entry.data, history[-1].metadata.conf_state
            if entry.type is not EntryType.NORMAL:
                change = decode_conf_change(entry.data)
                update, conf_state = change.context, self.node.apply_conf_change(change)
            metadata = SnapshotMetadata(entry.index, entry.term, conf_state)
            history.append(Snapshot(metadata, history[-1].data + update))


class World:
    """All nodes of one transcript. ``handle`` runs one command and returns what it prints."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.messages: list[Message] = []
        self._output: list[str] = []
        self._level = 0
        self._randrange = random.Random(1).randrange
        self._commands: dict[str, Callable[[Case], None]] = {
            "_breakpoint": lambda case: None,
            "add-nodes": self._add_nodes,
            "campaign": lambda case: self._first(case).node.campaign(),
            "compact": self._compact,
            "deliver-msgs": self._deliver_messages,
            "process-ready": lambda case: self._each(case, "handling Ready", self._process_ready),
            "process-append-thread": lambda case: self._each(case, "processing append thread", self._process_append),
            "process-apply-thread": lambda case: self._each(case, "processing apply thread", self._process_apply),
            "log-level": lambda case: self._set_level(case.positional[0]),
            "raft-log": lambda case: self._print_log(self._first(case)),
            "raft-state": self._print_states,
            "set-randomized-election-timeout": self._set_election_timeout,
            "stabilize": self._stabilize_command,
            "status": self._print_status,
            "tick-election": lambda case: self._tick(case, lambda settings: settings.election_ticks),
            "tick-heartbeat": lambda case: self._tick(case, lambda settings: settings.heartbeat_ticks),
            "transfer-leadership": self._transfer,
            "forget-leader": lambda case: self._first(case).node.forget_leader(),
            "send-snapshot": self._send_snapshot,
            "propose": self._propose,
            "propose-conf-change": self._propose_conf_change,
            "report-unreachable": self._report_unreachable,
        }

    def handle(self, case: Case) -> str:
        self._output = []
        command = self._commands.get(case.command)
        try:
            if command is None:
                raise CommandError("unknown command")
            command(case)
        except CommandError as error:
            if self._quiet:
                return str(error)
            self._print(str(error))
        for member in self.members:
            member.node.check()
        return "".join(self._output) or "ok"

    # Printing.

    @property
    def _quiet(self) -> bool:
        return _LOG_LEVELS[self._level] == "none"

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._output.append(text)

    @contextmanager
    def _indented(self) -> Iterator[None]:
        outer, self._output = self._output, []
        try:
            yield
        finally:
            inner = "".join(self._output)
            self._output = outer
            self._output += [f"  {line}\n" for line in inner.splitlines()]

    def _set_level(self, name: str) -> None:
        if name.lower() not in _LOG_LEVELS:
            raise CommandError(f"log levels must be either of [{' '.join(_LOG_LEVELS).upper()}]")
        self._level = _LOG_LEVELS.index(name.lower())

    # Finding nodes.

    def _member(self, id_: int) -> Member:
        return self.members[id_ - 1]

    def _first(self, case: Case) -> Member:
        return self._member(int(case.positional[0]))

    def _chosen(self, case: Case) -> list[Member]:
        return [self._member(int(id_)) for id_ in case.positional]

    def _each(self, case: Case, title: str, action: Callable[[Member], None]) -> None:
        chosen = self._chosen(case)
        for member in chosen:
            if len(chosen) == 1:
                action(member)
                continue
            self._print(f"> {member.id} {title}\n")
            with self._indented():
                action(member)

    # Commands.

    def _add_nodes(self, case: Case) -> None:
        settings = RaftSettings(
            replica_id=1,
            randrange=self._randrange,
            election_ticks=3,
            heartbeat_ticks=1,
            pre_vote=False,
            check_quorum=False,
            async_storage_writes=False,
            durable_candidacy=False,
            message_bytes_max=UNBOUNDED,
            inflight_messages_max=(1 << 31) - 1,
            inflight_bytes_max=UNBOUNDED,
            uncommitted_bytes_max=UNBOUNDED,
            committed_bytes_per_ready_max=UNBOUNDED,
        )
        changed: dict[str, object] = {}
        voters: tuple[int, ...] = ()
        learners: tuple[int, ...] = ()
        index, content = 0, b""
        for argument in case.arguments[1:]:
            key, values = argument.key, argument.values
            if key == "voters":
                voters = tuple(int(value) for value in values)
            elif key == "learners":
                learners = tuple(int(value) for value in values)
            elif key == "index":
                index = int(values[0])
            elif key == "content":
                content = values[0].encode()
            elif key in _FLAGS:
                changed[_FLAGS[key]] = values[0] == "true"
            elif key in _NUMBERS:
                changed[_NUMBERS[key]] = int(values[0])
            elif key == "read-only":
                if values[0] not in _READ_ONLY:
                    raise CommandError(f'invalid read-only option "{values[0]}"')
                changed["read_only"] = _READ_ONLY[values[0]]
        first = Snapshot(SnapshotMetadata(index, 0, ConfState(voters, learners)), content)
        bootstrap = first != Snapshot()
        if bootstrap:
            if index <= 1:
                raise CommandError("index must be specified as > 1 due to bootstrap")
            first = Snapshot(first.metadata._replace(term=1), content)
        for _ in range(int(case.positional[0])):
            storage = HistoryStorage(first)
            if bootstrap:
                storage.apply_snapshot(first)
            own = replace(settings, replica_id=len(self.members) + 1, **changed)  # type: ignore[arg-type]
            self.members.append(Member(own, storage, index))

    def _compact(self, case: Case) -> None:
        member = self._first(case)
        try:
            member.storage.compact(int(case.positional[1]))
        except Compacted as error:
            raise CommandError("requested index is unavailable due to compaction") from error
        self._print_log(member)

    def _print_log(self, member: Member) -> None:
        storage = member.storage
        first, last = storage.first_index(), storage.last_index()
        if last < first:
            self._print(f"log is empty: first index={first}, last index={last}")
        else:
            self._print(rendering.entries(storage.entries(first, last + 1, UNBOUNDED)))

    def _print_states(self, case: Case) -> None:
        for member in self.members:
            status = member.node.status()
            voter = "(Voter)" if member.id in all_voters(status.configuration) else "(Non-Voter)"
            self._print(
                f"{member.id}: {rendering.role(status.role)} {voter} "
                f"Term:{status.hard_state.term} Lead:{status.leader}\n"
            )

    def _print_status(self, case: Case) -> None:
        for id_, peer in self._first(case).node.status().progress.items():
            self._print(f"{id_}: {rendering.peer(peer)}\n")

    def _set_election_timeout(self, case: Case) -> None:
        self._first(case).node.raft.randomized_election_timeout = int(case.value("timeout") or 0)

    def _tick(self, case: Case, ticks: Callable[[RaftSettings], int]) -> None:
        member = self._first(case)
        for _ in range(ticks(member.settings)):
            member.node.tick()

    def _transfer(self, case: Case) -> None:
        self._member(int(case.value("from") or 0)).node.transfer_leader(int(case.value("to") or 0))

    def _report_unreachable(self, case: Case) -> None:
        chosen = self._chosen(case)
        if len(chosen) != 2:
            raise CommandError("must specify exactly two node indexes: node on which to report, and reported node")
        chosen[0].node.report_unreachable(chosen[1].id)

    def _send_snapshot(self, case: Case) -> None:
        sender, receiver = self._chosen(case)
        message = Message(
            MessageType.SNAP, receiver.id, sender.id, sender.node.term, snapshot=sender.storage.snapshot()
        )
        self.messages.append(message)
        self._print(rendering.message(message))

    def _propose(self, case: Case) -> None:
        self._step_proposal(self._first(case), Entry(0, 0, EntryType.NORMAL, case.positional[1].encode()))

    def _propose_conf_change(self, case: Case) -> None:
        old_form = case.value("v1") == "true"
        transition = case.value("transition") or "auto"
        if transition not in _TRANSITIONS:
            raise CommandError(f"unknown transition {transition}")
        try:
            changes = rendering.parse_conf_changes(case.input)
        except ValueError as error:
            raise CommandError(str(error)) from error
        if old_form and (len(changes) > 1 or transition != "auto"):
            raise CommandError("v1 conf change can only have one operation and no transition")
        kind = EntryType.CONF_CHANGE if old_form else EntryType.CONF_CHANGE_V2
        data = encode_conf_change(ConfChange(changes, _TRANSITIONS[transition]))
        self._step_proposal(self._first(case), Entry(0, 0, kind, data))

    def _step_proposal(self, member: Member, entry: Entry) -> None:
        # As a message, for then a change that may not be proposed becomes an empty entry, which transcripts show.
        try:
            member.node.step(Message(MessageType.PROP, from_=member.id, entries=(entry,)))
        except ProposalDropped as error:
            raise CommandError(_DROPPED_ERROR) from error

    # Messages.

    def _deliver_messages(self, case: Case) -> None:
        wanted: MessageType | None = None
        recipients: list[tuple[int, bool]] = []
        for argument in case.arguments:
            if not argument.values:
                recipients.append((int(argument.key), False))
            elif argument.key == "drop":
                recipients += [(int(value), True) for value in argument.values]
            elif argument.key == "type":
                wanted = rendering.MESSAGE_TYPES[argument.values[0]]
        if sum(self._deliver(id_, drop=drop, wanted=wanted) for id_, drop in recipients) == 0:
            self._print("no messages\n")

    def _select(self, to: int, *, drop: bool = False, wanted: MessageType | None = None) -> list[Message]:
        return [
            message
            for message in self.messages
            if message.to == to and not (drop and _is_local(message)) and wanted in (None, message.type)
        ]

    def _deliver(self, to: int, *, drop: bool = False, wanted: MessageType | None = None) -> int:
        selected = self._select(to, drop=drop, wanted=wanted)
        taken = {id(message) for message in selected}
        self.messages = [message for message in self.messages if id(message) not in taken]
        for message in selected:
            self._print(("dropped: " if drop else "") + rendering.message(message) + "\n")
            if not drop:
                self._step(message)
        return len(selected)

    def _step(self, message: Message) -> None:
        node = self._member(message.to).node
        if not node.accepts(message):
            is_answer = message.from_ not in (APPEND_THREAD, APPLY_THREAD) and message.type.name.endswith("_RESP")
            self._print((_NO_PEER_ERROR if is_answer else _LOCAL_ONLY_ERROR) + "\n")
            return
        try:
            node.step(message)
        except ProposalDropped:
            self._print(_DROPPED_ERROR + "\n")

    # Work.

    def _process_ready(self, member: Member) -> None:
        ready = member.node.ready()
        self._print(rendering.ready(ready))
        if not member.settings.async_storage_writes:
            member.write(ready.hard_state or EMPTY_HARD_STATE, ready.entries, ready.snapshot)
            member.apply(ready.committed_entries)
        for message in ready.messages:
            if message.to == APPEND_THREAD:
                member.append_work.append(message)
            elif message.to == APPLY_THREAD:
                member.apply_work.append(message)
            else:
                self.messages.append(message)
        if not member.settings.async_storage_writes:
            member.node.advance()

    def _process_append(self, member: Member) -> None:
        if not member.append_work:
            self._print("no append work to perform")
            return
        work = member.append_work.pop(0)
        self._print("Processing:\n" + rendering.message(work, with_responses=False) + "\n")
        member.write(HardState(work.term, work.vote, work.commit), work.entries, work.snapshot)
        self._respond(work)

    def _process_apply(self, member: Member) -> None:
        if not member.apply_work:
            self._print("no apply work to perform")
            return
        work = member.apply_work.pop(0)
        self._print("Processing:\n" + rendering.message(work, with_responses=False) + "\n")
        member.apply(work.entries)
        self._respond(work)

    def _respond(self, work: Message) -> None:
        self._print("Responses:\n" + "".join(rendering.message(response) + "\n" for response in work.responses))
        self.messages += work.responses

    def _stabilize_command(self, case: Case) -> None:
        level = self._level
        wanted = case.value("log-level")
        try:
            if wanted is not None:
                self._set_level(wanted)
            self._stabilize(self._chosen(case) or self.members)
        finally:
            self._level = level

    def _stabilize(self, members: list[Member]) -> None:
        """Do all the work there is, in rounds: handle, deliver, write, apply, each for every node."""
        busy = True
        while busy:
            busy = False
            for member in members:
                if member.node.has_ready():
                    busy = True
                    self._print(f"> {member.id} handling Ready\n")
                    with self._indented():
                        self._process_ready(member)
            for member in members:
                if self._select(member.id):
                    busy = True
                    self._print(f"> {member.id} receiving messages\n")
                    with self._indented():
                        self._deliver(member.id)
            busy = self._drain(members, "append") or busy
            busy = self._drain(members, "apply") or busy

    def _drain(self, members: list[Member], thread: str) -> bool:
        worked = False
        for member in members:
            work = member.append_work if thread == "append" else member.apply_work
            if not work:
                continue
            worked = True
            self._print(f"> {member.id} processing {thread} thread\n")
            while work:
                with self._indented():
                    self._process_append(member) if thread == "append" else self._process_apply(member)
        return worked


def _is_local(message: Message) -> bool:
    threads = (APPEND_THREAD, APPLY_THREAD)
    return message.from_ == message.to or message.from_ in threads or message.to in threads
