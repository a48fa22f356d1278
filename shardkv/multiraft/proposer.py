"""Proposals: what waits to become log entries, and when it does.

Lives here: the groups whose writes and reads wait for a turn, whether they are worth one, the entries made of them.
Does not live here: when one group's writes should become an entry (``replica``), the turn (``driver``).
"""

from collections.abc import Callable
from typing import Any, Final

from shardkv.environment import Clock
from shardkv.errors import Busy, ShardKVError
from shardkv.machine.clock import HybridClock
from shardkv.machine.entries import encode_split_entry
from shardkv.machine.split import SplitCommand
from shardkv.multiraft.log_writer import LogWriter
from shardkv.multiraft.replica import GATHER_NS, Proposal, Replica, Requester
from shardkv.multiraft.space import Space
from shardkv.raft import ProposalDropped
from shardkv.raft.messages import ConfChange
from shardkv.types import RangeId

DECODED_BYTES_MAX: Final = 256 * 1024
"""Up to this size an entry is kept decoded until it is applied; a larger one would be in memory twice for little."""


class Proposer:
    """Proposes for all groups of a node. Everything is called in the loop and returns at once.

    Args:
        wake: called when there is something for a turn.
        touch: called with a group that was stepped outside a turn.
        proposed: called with a group that has a new entry under way.
    """

    def __init__(
        self,
        log_writer: LogWriter,
        space: Space,
        clock: Clock,
        hybrid_clock: HybridClock,
        *,
        wake: Callable[[], None],
        touch: Callable[[Replica], None],
        proposed: Callable[[Replica], None],
    ) -> None:
        self._log_writer = log_writer
        self._space = space
        self._clock = clock
        self._hybrid_clock = hybrid_clock
        self._wake = wake
        self._touch = touch
        self._proposed = proposed
        self.groups: dict[RangeId, Replica] = {}
        """Groups with writes or reads that wait for the next turn."""
        self.gather_until_ns: int | None = None
        """When to look again at writes that wait only for more of their kind."""

    # What waits

    def later(self, replica: Replica) -> None:
        """A group has writes or reads waiting. A turn that could only leave them waiting is not worth its cost."""
        self.groups[replica.range_id] = replica
        if self._worth_a_turn(replica):
            self._wake()

    def _worth_a_turn(self, replica: Replica) -> bool:
        """Whether a turn now would step a group's reads or writes, or has to set the time for the writes.

        Else the writes are looked at when the sync under way ends, the entry under way is applied, more have come, the
        time set for gathering is over, or at the next tick.
        """
        if replica.open_reads:
            return True
        if self._log_writer.syncing:
            return False
        if replica.may_propose(self._clock.monotonic_ns()):
            return True
        until = self.gather_until_ns
        return not replica.proposals and (until is None or replica.answered_ns + GATHER_NS < until)

    @property
    def worth_a_turn(self) -> bool:
        """Whether a turn now would do anything for those who wait."""
        return any(map(self._worth_a_turn, self.groups.values()))

    def may_propose(self, now_ns: int) -> bool:
        """Whether some group's writes have waited enough."""
        return any(replica.waiting and replica.may_propose(now_ns) for replica in self.groups.values())

    def gather(self, replica: Replica) -> None:
        """Look again at a group's writes, those here and those to come, when the time for gathering is over."""
        until = replica.answered_ns + GATHER_NS
        self.gather_until_ns = until if self.gather_until_ns is None else min(self.gather_until_ns, until)

    def refuse_waiting(self) -> None:
        """The log has no room, and that may take long: refuse the writes that only wait to be proposed."""
        for replica in self.groups.values():
            replica.refuse_waiting(self._space.refusal())

    # In a turn

    def propose(self) -> list[Replica]:
        """Step the waiting reads, and, unless a sync is running, the waiting writes; the groups that were stepped."""
        if self._space.full:
            self.refuse_waiting()  # they came before it was
        groups, self.groups = self.groups, {}
        now = self._clock.monotonic_ns()
        stepped: list[Replica] = []
        self.gather_until_ns = None
        for replica in groups.values():
            context = replica.take_open_reads(now)
            if context is not None:
                replica.raft.read_index(context)
                stepped.append(replica)
            if replica.waiting and not self._log_writer.syncing:
                if replica.may_propose(now):
                    replica.proposed_ns = now
                    self._propose_writes(replica)
                    self._proposed(replica)
                    stepped.append(replica)
                elif not replica.proposals:
                    self.gather(replica)
            if replica.waiting or replica.open_reads:
                self.groups[replica.range_id] = replica
        return stepped

    def _propose_writes(self, replica: Replica) -> None:
        machine = replica.machine
        assert machine is not None, f"writes wait for range {replica.range_id}, which is not initialised"
        while replica.waiting:
            groups = replica.take_waiting()
            timestamp = self._hybrid_clock.now()
            data, decoded = machine.encode_write_entry(
                [(group.session, group.commands, group.decoded) for group in groups], timestamp
            )
            waiting = tuple([(group.requester, group.request_id) for group in groups])
            commands = sum([len(group.decoded) for group in groups])
            try:
                term, index = replica.raft.propose(data)
            except ProposalDropped as dropped:
                error = _refusal(replica, dropped)
                for requester, request_id in waiting:
                    requester.refuse(request_id, error)
            else:
                kept = decoded if len(data) <= DECODED_BYTES_MAX else None
                replica.proposals[index] = Proposal(term, waiting, commands, kept)

    # One at a time

    def split(self, replica: Replica, split: SplitCommand, requester: Requester, request_id: int) -> None:
        """Raises NotLeader or Busy."""
        assert replica.machine is not None, f"a split of range {replica.range_id}, which is not initialised"
        data = encode_split_entry(split, self._hybrid_clock.now())
        self._propose(replica, lambda: replica.raft.propose(data), requester, request_id)

    def extension(self, replica: Replica, command: Any, requester: Requester, request_id: int) -> None:
        """Propose a command of the range's extension. Raises NotLeader or Busy."""
        assert replica.machine is not None, f"a command for range {replica.range_id}, which is not initialised"
        data = replica.machine.encode_extension_entry(command, self._hybrid_clock.now())
        self._propose(replica, lambda: replica.raft.propose(data), requester, request_id)

    def membership(self, replica: Replica, change: ConfChange, requester: Requester, request_id: int) -> None:
        """Propose a change of the replica set. Raises NotLeader or Busy."""
        self._propose(replica, lambda: replica.raft.propose_conf_change(change), requester, request_id)

    def _propose(
        self, replica: Replica, propose: Callable[[], tuple[int, int]], requester: Requester, request_id: int
    ) -> None:
        if not replica.leads:
            raise replica.not_leader()
        try:
            term, index = propose()
        except ProposalDropped as dropped:
            raise _refusal(replica, dropped) from dropped
        replica.proposed_ns = self._clock.monotonic_ns()
        replica.proposals[index] = Proposal(term, ((requester, request_id),))
        self._proposed(replica)
        self._touch(replica)


def _refusal(replica: Replica, dropped: ProposalDropped) -> ShardKVError:
    if not replica.leads:
        return replica.not_leader()
    return Busy(f"range {replica.range_id} takes no proposal now: {dropped.reason.value}")
