"""How a group moves to another configuration: when an entry that changes it is applied, or with a snapshot.

A configuration counts from the moment it is applied, not from when it is appended as in the thesis. What follows from
that (one change at a time, none while an earlier one may be unapplied, no election with one committed but unapplied)
is kept in ``proposals`` and ``election`` (trap 9). What a change makes of a configuration is in ``membership``.
"""

from shardkv.raft import lease, replication, thrift
from shardkv.raft.errors import ProposalDropped
from shardkv.raft.membership import Changer, all_voters
from shardkv.raft.messages import NONE, ConfChange, ConfState, Entry, EntryType, Message, MessageType, Snapshot
from shardkv.raft.proposals import leader_propose
from shardkv.raft.state import Raft, Role


def apply_conf_change(raft: Raft, change: ConfChange) -> ConfState:
    """Carry out a change whose entry is being applied. Raises ``InvalidConfChange``, and then nothing has changed."""
    changer = Changer(
        raft.configuration, raft.progress, last_index=raft.log.last_index, inflight_limits=raft.inflight_limits
    )
    changer.apply(change)
    return switch_to(raft, changer)


def switch_to(raft: Raft, changer: Changer) -> ConfState:
    raft.configuration = changer.configuration
    raft.progress = changer.progress
    if raft.role != Role.LEADER:
        return raft.configuration
    thrift.arrange(raft)
    own = raft.progress.get(raft.id)
    if own is None or own.is_learner:
        # The leader was removed: it has led the group up to the commit of its own removal (thesis 4.2.2).
        if raft.settings.step_down_on_removal:
            raft.become_follower(raft.term, NONE)
            return raft.configuration
        lease.recompute(raft)
        return raft.configuration
    lease.recompute(raft)
    if replication.maybe_commit(raft):
        # With fewer voters an entry may be committed that was not before.
        replication.release_postponed_reads(raft)
        replication.broadcast_append(raft)
    else:
        # New members should not have to wait for a heartbeat.
        replication.broadcast_append(raft, if_empty=False)
    if raft.transferee != NONE and raft.transferee not in all_voters(raft.configuration):
        raft.transferee = NONE
    return raft.configuration


def applied_to(raft: Raft, index: int, size: int) -> None:
    """Entries up to ``index`` are applied, ``size`` bytes of them; leave a joint configuration if it is time."""
    log = raft.log
    log.applied_to(index if index > log.applied else log.applied, size)
    if raft.configuration.auto_leave:
        leave_joint(raft)


def leave_joint(raft: Raft) -> None:
    """Propose to leave a joint configuration that is applied and leaves by itself."""
    if raft.configuration.auto_leave and raft.role == Role.LEADER and raft.log.applied >= raft.pending_conf_index:
        # An empty change is never refused for its size. During a transfer it is, and then each tick tries again, or
        # the next leader does.
        leave = Message(MessageType.PROP, from_=raft.id, entries=(Entry(0, 0, EntryType.CONF_CHANGE_V2),))
        try:
            leader_propose(raft, leave)
        except ProposalDropped:
            return


def applied_snapshot(raft: Raft, snapshot: Snapshot) -> None:
    """A snapshot is written, and the host's state is what it holds."""
    raft.log.stable_snapshot_to(snapshot.metadata.index)
    applied_to(raft, snapshot.metadata.index, 0)


def follower_snapshot(raft: Raft, message: Message) -> None:
    replication.heard_from_leader(raft, message)
    handle_snapshot(raft, message)


def candidate_snapshot(raft: Raft, message: Message) -> None:
    raft.become_follower(message.term, message.from_)
    handle_snapshot(raft, message)


def handle_snapshot(raft: Raft, message: Message) -> None:
    """Take a snapshot if it is ahead of this log; in any case answer with how far this log is good."""
    snapshot = message.snapshot or Snapshot()
    index = raft.log.last_index if _restore(raft, snapshot) else raft.log.committed
    raft.send(Message(MessageType.APP_RESP, message.from_, index=index))


def _restore(raft: Raft, snapshot: Snapshot) -> bool:
    log, (index, term, target) = raft.log, snapshot.metadata
    if index <= log.committed:
        return False
    if raft.id not in (*target.voters, *target.learners, *target.voters_outgoing):
        return False  # not meant for this replica
    if log.matches(index, term):
        # All of it is here already, so only its being committed is news.
        log.commit_to(index)
        return False
    changer = Changer(last_index=index, inflight_limits=raft.inflight_limits)
    changer.restore(target)
    log.restore(snapshot)
    switch_to(raft, changer)
    return True
