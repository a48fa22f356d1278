"""What is committed becomes state: entries of all groups, in as few engine batches as possible, and the answers.

Lives here: when entries are applied, and in which batch. Does not live here: what a command does (``machine``), nor
when a group's work is looked at (``driver``). The rule: a batch holds a range's data together with its applied index,
and between what a batch does to the machines and the engine's having it nobody reads. Answers leave in between.
"""

from collections.abc import Callable
from typing import Any, Final

from shardkv.environment import Clock
from shardkv.errors import EpochMismatch, NotLeader, RequestError, ShardKVError
from shardkv.machine.clock import HybridClock
from shardkv.machine.machine import SplitResult
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.replica import Proposal, Replica
from shardkv.multiraft.space import Space
from shardkv.raft import InvalidConfChange, decode_conf_change
from shardkv.raft.messages import Entry, EntryType, Message
from shardkv.storage.engine import BATCH_KEYS_MAX, Engine, WriteBatch
from shardkv.types import RangeId

APPLIES_LATER_MAX: Final = 16
APPLIES_LATER_BYTES: Final = 256 * 1024
"""Nobody waits for what a follower applies: so much of it, of all groups together, may wait for company, until the next
tick at the latest. Writing to the engine costs nearly the same for one entry as for several."""


class Applier:
    """Applies committed entries to the machines of the groups in ``catalog``.

    Args:
        flush: called when there are answers, to send them.
        applied: called once a group's entries are in the engine and answered.
        divided: called when a split was applied, with both halves; the right one is None if it has ended here before.
        changed: called when a replica's descriptor has changed, or the replica is new.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        space: Space,
        clock: Clock,
        *,
        hybrid_clock: HybridClock,
        flush: Callable[[], None],
        applied: Callable[[Replica, Message], None],
        divided: Callable[[Replica, Replica | None], None],
        changed: Callable[[Replica], None],
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._space = space
        self._clock = clock
        self._hybrid_clock = hybrid_clock
        self._flush = flush
        self._applied = applied
        self._divided = divided
        self._changed = changed
        self.held: list[tuple[Replica, Message]] = []
        """Committed entries that wait for the engine to take writes again."""
        self.later: list[tuple[Replica, Message]] = []
        """Committed entries of followers that wait for company, in the order in which they must be applied."""
        self._later_bytes = 0
        self.later_due = False
        """A tick has passed over ``later``: it has waited long enough for company."""
        self.entries = 0
        """How many have been applied since the start."""

    def tick(self) -> bool:
        """What waits for company has waited long enough; whether there is any."""
        self.later_due = bool(self.later)
        return self.later_due

    def catch_up(self) -> None:
        """At the begin of a turn: what has waited for the engine."""
        if self.held and not self._must_hold():
            held, self.held = self.held, []
            self._apply(held)

    def _must_hold(self) -> bool:
        """Whether the engine would make the loop wait.

        For lack of room that may take for ever, and reads would wait with it: then what was under way when the node
        began to refuse writes, which is little, stays in the engine's memory.
        """
        return self._engine.stalled() and not (self._engine.full and self._space.full)

    def apply(self, applies: list[tuple[Replica, Message]]) -> None:
        """Apply what somebody waits for, and whatever waits before it; let the rest wait for company."""
        later = self.later
        later += applies
        wanted = len(later) >= APPLIES_LATER_MAX
        for replica, message in applies:
            # A leader answers when it has applied, a read waits for it, and before a change of its members is applied
            # a replica does not campaign.
            wanted = wanted or replica.leads or bool(replica.confirmed)
            for entry in message.entries:
                self._later_bytes += len(entry.data)
                wanted = wanted or entry.type is not EntryType.NORMAL
        if wanted or self._later_bytes >= APPLIES_LATER_BYTES:
            self.apply_later()

    def apply_later(self) -> None:
        """Apply what waits for company."""
        later, self.later, self._later_bytes, self.later_due = self.later, [], 0, False
        self._apply(later)

    def _apply(self, applies: list[tuple[Replica, Message]]) -> None:
        """Apply committed entries of all groups in as few engine batches as the bound allows, and answer.

        What is committed is in the logs of a majority, so an answer need not wait for the engine, and whoever gets it
        works while the engine does. Whoever asks next finds the batch there: the loop does nothing else until then.
        """
        if self.held or self._must_hold():
            self.held += applies
            return
        batch = WriteBatch()
        answers: list[tuple[Proposal, Any]] = []
        answered: dict[Replica, int] = {}
        touched: dict[RangeId, Replica] = {}
        for replica, message in applies:
            machine = replica.machine
            if machine is None or self._catalog.replicas.get(replica.range_id) is not replica:
                # It has ended, or waits for the snapshot that alone can give it state.
                continue
            if replica.raft.raft.log.snapshot is not None:
                # Its group is at the snapshot already, which has all this: a change of the members among it would be
                # made to the snapshot's, a second time.
                continue
            touched[replica.range_id] = replica
            for entry in message.entries:
                if entry.index <= machine.applied_index:
                    continue  # held back until after a snapshot that has it was installed
                proposal = replica.proposals.pop(entry.index, None) if replica.proposals else None
                if proposal is not None and proposal.term != entry.term:
                    _refuse(proposal, replica.not_leader())
                    proposal = None
                outcome = self._apply_entry(replica, entry, batch, proposal)
                if proposal is not None:
                    answers.append((proposal, outcome))
                    answered[replica] = answered.get(replica, 0) + proposal.commands
                if len(batch) >= BATCH_KEYS_MAX:
                    self._finish(batch, touched)
                    self._engine.write(batch)
                    batch, touched = WriteBatch(), {replica.range_id: replica}
        self._finish(batch, touched)
        for proposal, outcome in answers:
            _answer(proposal, outcome)
        if answers:
            self._flush()
        if batch:
            self._engine.write(batch)
        now = self._clock.monotonic_ns()
        for replica, count in answered.items():
            replica.answered(count, now)
        for replica, message in applies:
            # An install has made these entries void, or will; unacknowledged they would stay under way for ever.
            if replica.machine is not None or replica.installing:
                self._applied(replica, message)

    def _finish(self, batch: WriteBatch, touched: dict[RangeId, Replica]) -> None:
        """Put the applied state of every range that a batch touches into it, too."""
        for replica in touched.values():
            if replica.machine is not None:
                replica.machine.finish(batch)
                # Whoever answers from this state does so with a stamp no lower than the versions in it.
                self._hybrid_clock.absorb(replica.machine.last_timestamp)

    def _apply_entry(self, replica: Replica, entry: Entry, batch: WriteBatch, proposal: Proposal | None) -> Any:
        """Apply one entry; its outcome for the proposer: a list with one item for each that waits, or an error."""
        machine = replica.machine
        assert machine is not None, f"range {replica.range_id} applies {entry.index} without a machine"
        self.entries += 1
        if entry.type is not EntryType.NORMAL:
            change = decode_conf_change(entry.data)
            try:
                conf_state = replica.raft.apply_conf_change(change)
            except InvalidConfChange as error:
                # Every replica comes to the same: the entry is applied, and changes nothing.
                machine.apply(entry.index, entry.term, b"", batch, self._engine)
                return RequestError(f"the membership change does not fit the range: {error}")
            machine.apply_conf_change(entry.index, entry.term, change.context, conf_state, batch)
            self._changed(replica)
            return [machine.descriptor.to_wire()]
        decoded = proposal.decoded if proposal is not None else None
        applied = machine.apply(entry.index, entry.term, entry.data, batch, self._engine, decoded)
        if applied.split is not None:
            self._split(replica, applied.split, batch)
        return applied.outcomes

    def _split(self, left: Replica, split: SplitResult, batch: WriteBatch) -> None:
        """A split was applied: the right half's replica comes to be.

        Writes that wait are proposed all the same: applying answers each command by its record, or by where its key
        is now. Reads that wait were confirmed, if at all, for a range that is no more.
        """
        right = self._catalog.split(left, split, batch)
        left.abandon_reads(EpochMismatch(current=(split.left, split.right)))
        self._changed(left)
        if right is not None:
            self._changed(right)
        self._divided(left, right)


def _refuse(proposal: Proposal, error: NotLeader) -> None:
    for requester, request_id in proposal.waiting:
        requester.refuse(request_id, error)


def _answer(proposal: Proposal, outcomes: Any) -> None:
    if isinstance(outcomes, ShardKVError):
        for requester, request_id in proposal.waiting:
            requester.refuse(request_id, outcomes)
        return
    for (requester, request_id), outcome in zip(proposal.waiting, outcomes, strict=True):
        if isinstance(outcome, ShardKVError):
            requester.refuse(request_id, outcome)
        else:
            requester.answer(request_id, outcome)
