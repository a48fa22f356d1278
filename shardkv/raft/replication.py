"""How the leader's log reaches the followers: appends, their answers, heartbeats, and what commits by them.

Both sides of each exchange live here, next to each other, but for a snapshot's: what a follower makes of one is in
``reconfiguration``. What a leader knows of a follower is in ``progress``.
"""

from shardkv.raft import freshness, lease, reads, thrift
from shardkv.raft.errors import Compacted, SnapshotTemporarilyUnavailable, Unavailable
from shardkv.raft.messages import NONE, Entry, Message, MessageType
from shardkv.raft.progress import Progress, ProgressState
from shardkv.raft.quorum import majority_value
from shardkv.raft.settings import ReadOnly
from shardkv.raft.state import NOT_EAGER, Raft
from shardkv.raft.storage import payload_bytes

_APP = MessageType.APP
_APP_RESP = MessageType.APP_RESP
_HEARTBEAT = MessageType.HEARTBEAT
_HEARTBEAT_RESP = MessageType.HEARTBEAT_RESP
_PROBE = ProgressState.PROBE
_REPLICATE = ProgressState.REPLICATE
_SNAPSHOT = ProgressState.SNAPSHOT
_NO_ENTRIES: tuple[Entry, ...] = ()


# The leader sends.


def send_append(raft: Raft, to: int, peer: Progress, *, if_empty: bool = True) -> bool:
    """Send a follower what it lacks, or just the commit index. True if a message was sent.

    Without ``if_empty`` nothing is sent when there are no entries to send.
    """
    if peer.flow_paused or peer.state == _SNAPSHOT:
        thrift.owe(peer)
        return False
    log = raft.log
    next_index = peer.next
    previous = next_index - 1
    entries = _NO_ENTRIES
    try:
        previous_term = raft.term if previous >= raft.term_start else log.term(previous)
        # With a full window only an empty append goes out. It is answered, which frees the window even when all that
        # was in it got lost.
        if next_index <= log.last_index and not (peer.state == _REPLICATE and peer.inflights.full):
            entries = log.entries(next_index, raft.settings.message_bytes_max)
    except (Compacted, Unavailable):
        return send_snapshot(raft, to, peer)
    if not entries and not if_empty:
        return False
    committed = log.committed
    raft.messages.append(Message(_APP, to, raft.id, raft.term, previous_term, previous, entries, committed))
    peer.sent_entries(len(entries), payload_bytes(entries))
    peer.sent_commit = committed
    if previous + len(entries) < log.last_index:
        thrift.owe(peer)
    return True


def send_snapshot(raft: Raft, to: int, peer: Progress) -> bool:
    """Send a follower a snapshot, for it needs entries that are gone. False if it is away or none can be had now."""
    if not peer.recent_active:
        return False
    try:
        snapshot = raft.log.snapshot or raft.log.storage.snapshot()
    except SnapshotTemporarilyUnavailable:
        return False
    assert not snapshot.empty, "entries were compacted, yet there is no snapshot"
    peer.become_snapshot(snapshot.metadata.index)
    raft.send(Message(MessageType.SNAP, to, snapshot=snapshot))
    return True


def broadcast_append(raft: Raft, *, if_empty: bool = True) -> None:
    own = raft.id
    for id_, peer in raft.progress.items():
        if id_ != own:
            send_append(raft, id_, peer, if_empty=if_empty)


def broadcast_entries(raft: Raft, proposed: tuple[Entry, ...]) -> None:
    """Send what was proposed to a quorum at once, and to the others when it is worth it (see ``thrift``)."""
    preferred = raft.preferred
    if not preferred:
        broadcast_append(raft)
        return
    progress = raft.progress
    needed = thrift.needed(raft)
    spares: list[tuple[int, Progress]] = []
    for id_ in preferred:
        peer = progress[id_]
        if needed and peer.state == _REPLICATE and not peer.flow_paused:
            needed -= 1
            peer.relied_on()
            send_append(raft, id_, peer)
        else:
            spares.append((id_, peer))
    for id_, peer in spares:
        peer.spare = not needed
        peer.held_bytes = peer.held_bytes + payload_bytes(proposed) if peer.spare else 0
        if not thrift.holds(raft, peer) and send_append(raft, id_, peer):
            raft.race = raft.log.last_index
    if len(progress) > len(preferred) + 1:
        for id_, peer in progress.items():
            if peer.is_learner:
                send_append(raft, id_, peer)


def hedge(raft: Raft) -> None:
    """An acknowledgement that is waited for takes long: send the spares what they lack."""
    for id_ in raft.preferred:
        peer = raft.progress[id_]
        while peer.next <= raft.log.last_index and send_append(raft, id_, peer, if_empty=False):
            raft.race = raft.log.last_index


def distrust(raft: Raft, id_: int) -> None:
    """A follower may be gone: what waits for its acknowledgement alone should not."""
    thrift.distrust(raft, id_)
    hedge(raft)


def broadcast_heartbeat(raft: Raft) -> None:
    """Tell every peer that this leader lives, what it may commit, and which reads wait for its answer."""
    context = reads.heartbeat_context(raft)
    own, committed = raft.id, raft.log.committed
    proves = lease.valid(raft, raft.now)
    for id_, peer in raft.progress.items():
        if id_ == own:
            continue
        # Never more than the follower surely has: what lies behind its match may be something else.
        commit = min(peer.match, committed)
        heartbeat = Message(_HEARTBEAT, id_, own, raft.term, commit=commit, context=context)
        lease.stamp(raft, heartbeat)
        if proves:
            freshness.prove(raft, peer, heartbeat)
        raft.messages.append(heartbeat)
        peer.sent_commit = commit


def maybe_commit(raft: Raft) -> bool:
    """Commit what a quorum has, if that is of this term (paper 5.4.2). True if the commit index moved."""
    progress, configuration = raft.progress, raft.configuration
    index = majority_value([progress[id_].match for id_ in configuration.voters])
    if configuration.voters_outgoing:
        index = min(index, majority_value([progress[id_].match for id_ in configuration.voters_outgoing]))
    # From term_start on every entry of a leader's log is of its own term. No voters at all commit nothing.
    if raft.log.committed < index <= raft.log.last_index and index >= raft.term_start:
        raft.log.commit_to(index)
        return True
    return False


def leader_beat(raft: Raft, message: Message) -> None:
    broadcast_heartbeat(raft)


# The follower receives.


def heard_from_leader(raft: Raft, message: Message) -> None:
    """A message of the leader of this term: whatever doubt there was is gone."""
    raft.election_elapsed = 0
    raft.leader = message.from_
    raft.fruitless_campaigns = 0
    raft.doubted = False
    raft.eager_ticks = NOT_EAGER


def follower_append(raft: Raft, message: Message) -> None:
    heard_from_leader(raft, message)
    handle_append(raft, message)


def candidate_append(raft: Raft, message: Message) -> None:
    raft.become_follower(message.term, message.from_)
    handle_append(raft, message)


def handle_append(raft: Raft, message: Message) -> None:
    """Take the leader's entries if they follow on from what is here, else say where the logs may agree."""
    log = raft.log
    if message.index < log.committed:
        index: int | None = log.committed
    else:
        index = log.maybe_append(message.index, message.log_term, message.entries, message.commit)
    if index is not None:
        # The answer waits for the disk, as every answer to an append does.
        raft.messages_after_append.append(Message(_APP_RESP, message.from_, raft.id, raft.term, 0, index))
        return
    hint, hint_term = log.conflict_hint(min(message.index, log.last_index), message.log_term)
    raft.send(Message(_APP_RESP, message.from_, log_term=hint_term, index=message.index, reject=True, reject_hint=hint))


def follower_heartbeat(raft: Raft, message: Message) -> None:
    heard_from_leader(raft, message)
    handle_heartbeat(raft, message)


def candidate_heartbeat(raft: Raft, message: Message) -> None:
    raft.become_follower(message.term, message.from_)
    handle_heartbeat(raft, message)


def handle_heartbeat(raft: Raft, message: Message) -> None:
    raft.log.commit_to(message.commit)
    follower_stamp = promise = 0
    if message.lease_promise:
        promise = lease.accept_promise(raft, message)
        follower_stamp = raft.now + raft.stamp_offset
        if message.follower_stamp:
            freshness.learn(raft, message)
    raft.messages.append(
        Message(
            _HEARTBEAT_RESP,
            message.from_,
            raft.id,
            raft.term,
            context=message.context,
            lease_stamp=message.lease_stamp,
            lease_promise=promise,
            follower_stamp=follower_stamp,
        )
    )


# The leader hears back.


def leader_append_response(raft: Raft, message: Message) -> None:
    sender = message.from_
    peer = raft.progress.get(sender)
    if peer is None:
        return
    peer.recent_active = True
    peer.probes_unanswered = 0
    if message.reject:
        _append_rejected(raft, peer, message)
        return
    index = message.index
    # An answer that is no news still moves a probing peer on: it shows that the probe's guess was right.
    if not (peer.maybe_update(index) or (peer.state == _PROBE and peer.match == index)):
        return
    log = raft.log
    state = peer.state
    if state == _REPLICATE:
        peer.inflights.free_to(index)
    elif state == _PROBE:
        peer.become_replicate()
    elif peer.match + 1 >= log.first_index:
        # Whatever snapshot it got, and from whom: the log takes over from there.
        peer.become_probe()
        peer.become_replicate()

    committed = log.committed
    if maybe_commit(raft):
        if raft.race and log.committed >= raft.race:
            thrift.decide(raft)
        release_postponed_reads(raft)
        # A change of the members is told at once: whoever has applied it needs other votes, or can do with fewer. A
        # range that has grown from one voter could else elect nobody without that one until the next heartbeat.
        if raft.settings.commit_broadcast or committed < raft.pending_conf_index <= log.committed:
            broadcast_append(raft)
    elif sender != raft.id and raft.settings.commit_broadcast and peer.can_bump_commit(log.committed):
        send_append(raft, sender, peer)
    if sender != raft.id:
        # The answer may have made room for more than one message.
        while peer.next <= log.last_index and not thrift.holds(raft, peer):
            if not send_append(raft, sender, peer, if_empty=False):
                break
        if sender == raft.transferee and peer.match == log.last_index:
            lease.send_timeout_now(raft, sender)


def _append_rejected(raft: Raft, peer: Progress, message: Message) -> None:
    """Try again further down, but skip what cannot agree.

    The follower has said where its log ends, at most, and with which term. Entries of this log with a higher term
    cannot be in the other, for terms only grow along a log; so each term is probed once, not each entry.
    """
    hint = message.reject_hint
    if message.log_term:
        hint, _ = raft.log.conflict_hint(hint, message.log_term)
    if peer.maybe_decrease_to(message.index, hint):
        if peer.state == _REPLICATE:
            peer.become_probe()
        send_append(raft, message.from_, peer)


def leader_heartbeat_response(raft: Raft, message: Message) -> None:
    sender = message.from_
    peer = raft.progress.get(sender)
    if peer is None:
        return
    peer.recent_active = True
    peer.heartbeat_answered(raft.settings.probe_heartbeats_max)
    if message.lease_promise:
        lease.renew(raft, peer, message)
        peer.follower_stamp = message.follower_stamp
    # It answers, so what it lacks was lost or held back. One that is only probed is sent an append too, for the answer
    # to it ends the probing.
    if peer.match < raft.log.last_index or peer.state == _PROBE:
        send_append(raft, sender, peer)
        if peer.spare and raft.log.committed < raft.log.last_index:
            thrift.owe(peer)
    if message.context and raft.settings.read_only is ReadOnly.SAFE:
        reads.acknowledge(raft, sender, message.context)


def leader_snapshot_status(raft: Raft, message: Message) -> None:
    """The host says whether a snapshot got through. The follower's own answer may come before or after, or never."""
    peer = raft.progress.get(message.from_)
    if peer is None or peer.state != _SNAPSHOT:
        return
    if message.reject:
        peer.pending_snapshot = 0  # it must not be probed from the snapshot that it did not get
    peer.become_probe()
    # After a success the follower's answer comes next; after a failure the next try waits for a heartbeat.
    peer.flow_paused = True


def leader_unreachable(raft: Raft, message: Message) -> None:
    """What was in flight to that peer is probably lost."""
    peer = raft.progress.get(message.from_)
    if peer is None:
        return
    peer.probes_unanswered = 0  # no wonder
    if peer.state == _REPLICATE:
        peer.become_probe()
    distrust(raft, message.from_)


# Reads, as far as heartbeats carry them.


def leader_read_index(raft: Raft, message: Message) -> None:
    if not raft.committed_in_term:
        # Also in a group of one, where etcd answers at once: a restart may have forgotten how far was committed.
        if reads.has_room(raft):
            reads.postpone(raft, message)
        return
    if message.from_ in (NONE, raft.id):
        _confirm_read(raft, message)  # this replica's own host asks for the lease itself
        return
    _tell_commit(raft, message.from_)
    if lease.valid(raft, raft.now):
        # The clock was read after the follower's question came in.
        reads.answer(raft, message, raft.log.committed)
    else:
        _confirm_read(raft, message)


def _tell_commit(raft: Raft, to: int) -> None:
    """A follower is about to wait for what is committed now, and may not have been told of it."""
    peer = raft.progress.get(to)
    if peer is not None and peer.sent_commit < raft.log.committed:
        # An append, for it covers also what is in flight. What gets lost is told again by the next heartbeat.
        send_append(raft, to, peer)


def _confirm_read(raft: Raft, message: Message) -> None:
    alone = raft.is_singleton and raft.configuration.voters[0] == raft.id
    if alone or raft.settings.read_only is ReadOnly.LEASE_BASED:
        reads.answer(raft, message, raft.log.committed)
    elif reads.has_room(raft):
        reads.add(raft, message)
        broadcast_heartbeat(raft)


def release_postponed_reads(raft: Raft) -> None:
    """An entry of this term is committed now, so the commit index is good to read at."""
    for message in reads.take_postponed(raft):
        _confirm_read(raft, message)


def follower_read_index_response(raft: Raft, message: Message) -> None:
    """The leader has confirmed a read that was passed on to it."""
    raft.read_states.append(reads.ReadState(message.index, message.context))
