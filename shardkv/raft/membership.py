"""Who belongs to a group, and how that may change: one voter at a time, or through a joint configuration.

Pure: a configuration and a change come in, the next configuration comes out, or ``InvalidConfChange``. When changes
are proposed and applied is decided in ``reconfiguration``. A configuration is a ``ConfState`` with sorted ids; while
it is joint, ``voters`` is the incoming half (thesis 4.3).

Invariants: learners are no voters of either half; learners_next are voters of the outgoing half; only a joint
configuration has learners_next or leaves by itself.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Final

from shardkv.raft.errors import InvalidConfChange
from shardkv.raft.messages import (
    EMPTY_CONF_STATE,
    NONE,
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfState,
)
from shardkv.raft.progress import Inflights, Progress

ProgressMap = dict[int, Progress]

_HEADER: Final = struct.Struct("<BH")
_SINGLE: Final = struct.Struct("<BQ")


def encode_conf_change(change: ConfChange) -> bytes:
    """The change as an entry's data. The change that leaves a joint configuration is no bytes at all."""
    if change == ConfChange():
        return b""
    parts = [_HEADER.pack(change.transition, len(change.changes))]
    parts += [_SINGLE.pack(single.type, single.node_id) for single in change.changes]
    parts.append(change.context)
    return b"".join(parts)


def decode_conf_change(data: bytes) -> ConfChange:
    """The inverse of :func:`encode_conf_change`. Raises ``InvalidConfChange`` for anything else."""
    if not data:
        return ConfChange()
    try:
        transition, count = _HEADER.unpack_from(data)
        end = _HEADER.size + count * _SINGLE.size
        changes = tuple(
            ConfChangeSingle(ConfChangeType(kind), node_id)
            for kind, node_id in _SINGLE.iter_unpack(data[_HEADER.size : end])
        )
        if len(changes) != count:
            raise ValueError(f"{len(changes)} of {count} changes")
        return ConfChange(changes, ConfChangeTransition(transition), bytes(data[end:]))
    except (struct.error, ValueError) as error:
        raise InvalidConfChange(f"not a membership change: {data!r:.100}") from error


def is_joint(configuration: ConfState) -> bool:
    return bool(configuration.voters_outgoing)


def all_voters(configuration: ConfState) -> tuple[int, ...]:
    """The voters of both halves, sorted."""
    if not configuration.voters_outgoing:
        return configuration.voters
    return tuple(sorted({*configuration.voters, *configuration.voters_outgoing}))


def leaves_joint(change: ConfChange) -> bool:
    return change.transition is ConfChangeTransition.AUTO and not change.changes


def enters_joint(change: ConfChange) -> bool:
    """Whether the change goes through a joint configuration: when asked to, or when it has more than one part."""
    return change.transition is not ConfChangeTransition.AUTO or len(change.changes) > 1


class _Draft:
    """A configuration being changed, with the progress of its members. The originals stay as they are."""

    __slots__ = ("inflight_limits", "last_index", "learners", "learners_next", "outgoing", "progress", "voters")

    def __init__(
        self, configuration: ConfState, progress: Mapping[int, Progress], last_index: int, limits: tuple[int, int]
    ) -> None:
        check_configuration(configuration, progress)
        self.voters = set(configuration.voters)
        self.outgoing = set(configuration.voters_outgoing)
        self.learners = set(configuration.learners)
        self.learners_next = set(configuration.learners_next)
        # Only the learner flag is ever changed in a copy, so the window of in-flight messages may be shared.
        self.progress: ProgressMap = {id_: peer.copy() for id_, peer in progress.items()}
        self.last_index = last_index
        self.inflight_limits = limits

    def apply(self, changes: Iterable[ConfChangeSingle]) -> None:
        for single in changes:
            if single.node_id == NONE:
                continue  # a change that its host has voided
            if single.type == ConfChangeType.ADD_NODE:
                self._make_voter(single.node_id)
            elif single.type == ConfChangeType.ADD_LEARNER_NODE:
                self._make_learner(single.node_id)
            elif single.type == ConfChangeType.REMOVE_NODE:
                self._remove(single.node_id)
        if not self.voters:
            raise InvalidConfChange("removed all voters")

    def _make_voter(self, id_: int) -> None:
        self.voters.add(id_)
        self.learners.discard(id_)
        self.learners_next.discard(id_)
        peer = self.progress.get(id_)
        if peer is None:
            self._add_progress(id_, is_learner=False)
        else:
            peer.is_learner = False

    def _make_learner(self, id_: int) -> None:
        peer = self.progress.get(id_)
        if peer is None:
            self._add_progress(id_, is_learner=True)
            self.learners.add(id_)
            return
        if peer.is_learner:
            return
        self._remove(id_)
        self.progress[id_] = peer
        # A voter of the outgoing half becomes a learner only when that half is gone.
        if id_ in self.outgoing:
            self.learners_next.add(id_)
        else:
            peer.is_learner = True
            self.learners.add(id_)

    def _remove(self, id_: int) -> None:
        self.voters.discard(id_)
        self.learners.discard(id_)
        self.learners_next.discard(id_)
        if id_ not in self.outgoing:
            self.progress.pop(id_, None)

    def _add_progress(self, id_: int, *, is_learner: bool) -> None:
        # A new member counts as active, else the next check of the quorum could depose the leader on its account.
        # It is probed at the end of the log; it usually needs a snapshot anyway.
        self.progress[id_] = Progress(
            max(self.last_index, 1), Inflights(*self.inflight_limits), is_learner=is_learner, recent_active=True
        )

    def finish(self, *, auto_leave: bool = False) -> tuple[ConfState, ProgressMap]:
        configuration = ConfState(
            tuple(sorted(self.voters)),
            tuple(sorted(self.learners)),
            tuple(sorted(self.outgoing)),
            tuple(sorted(self.learners_next)),
            auto_leave,
        )
        check_configuration(configuration, self.progress)
        # Peers are always visited in the order of their ids, so that a run can be repeated.
        return configuration, dict(sorted(self.progress.items()))


class Changer:
    """Carries a configuration and its members' progress from one change to the next.

    ``last_index`` is where new members are probed; ``inflight_limits`` are (messages, bytes) for each member. A change
    that raises ``InvalidConfChange`` leaves everything as it was.
    """

    __slots__ = ("configuration", "inflight_limits", "last_index", "progress")

    def __init__(
        self,
        configuration: ConfState = EMPTY_CONF_STATE,
        progress: ProgressMap | None = None,
        *,
        last_index: int,
        inflight_limits: tuple[int, int],
    ) -> None:
        self.configuration = configuration
        self.progress = {} if progress is None else progress
        self.last_index = last_index
        self.inflight_limits = inflight_limits

    def _draft(self) -> _Draft:
        return _Draft(self.configuration, self.progress, self.last_index, self.inflight_limits)

    def simple(self, changes: Iterable[ConfChangeSingle]) -> None:
        """Change at most one voter, and any learners."""
        draft = self._draft()
        if is_joint(self.configuration):
            raise InvalidConfChange("can't apply simple config change in joint config")
        draft.apply(changes)
        if len(draft.voters.symmetric_difference(self.configuration.voters)) > 1:
            raise InvalidConfChange("more than one voter changed without entering joint config")
        self.configuration, self.progress = draft.finish()

    def enter_joint(self, changes: Iterable[ConfChangeSingle], *, auto_leave: bool) -> None:
        """Keep the voters as the outgoing half and change the incoming one."""
        draft = self._draft()
        if is_joint(self.configuration):
            raise InvalidConfChange("config is already joint")
        if not draft.voters:
            raise InvalidConfChange("can't make a zero-voter config joint")
        draft.outgoing = set(draft.voters)
        draft.apply(changes)
        self.configuration, self.progress = draft.finish(auto_leave=auto_leave)

    def leave_joint(self) -> None:
        """Let the incoming half decide alone; who waited to become a learner becomes one."""
        draft = self._draft()
        if not is_joint(self.configuration):
            raise InvalidConfChange("can't leave a non-joint config")
        for id_ in draft.learners_next:
            draft.learners.add(id_)
            draft.progress[id_].is_learner = True
        draft.learners_next = set()
        for id_ in draft.outgoing:
            if id_ not in draft.voters and id_ not in draft.learners:
                draft.progress.pop(id_, None)
        draft.outgoing = set()
        self.configuration, self.progress = draft.finish()

    def apply(self, change: ConfChange) -> None:
        """Carry out a change in the way that it asks for."""
        if leaves_joint(change):
            self.leave_joint()
        elif enters_joint(change):
            auto_leave = change.transition is not ConfChangeTransition.JOINT_EXPLICIT
            self.enter_joint(change.changes, auto_leave=auto_leave)
        else:
            self.simple(change.changes)

    def restore(self, target: ConfState) -> None:
        """Make ``target`` out of the empty configuration, through valid changes only."""
        assert self.configuration == EMPTY_CONF_STATE, f"restored on top of {self.configuration}"
        add, add_learner = ConfChangeType.ADD_NODE, ConfChangeType.ADD_LEARNER_NODE
        incoming = [ConfChangeSingle(add, id_) for id_ in target.voters]
        incoming += [ConfChangeSingle(add_learner, id_) for id_ in (*target.learners, *target.learners_next)]
        if not target.voters_outgoing:
            for single in incoming:
                self.simple([single])
        else:
            for id_ in target.voters_outgoing:
                self.simple([ConfChangeSingle(add, id_)])
            leaving = [ConfChangeSingle(ConfChangeType.REMOVE_NODE, id_) for id_ in target.voters_outgoing]
            self.enter_joint(leaving + incoming, auto_leave=target.auto_leave)
        if self.configuration != normalized(target):
            raise InvalidConfChange(f"{target} was restored as {self.configuration}")


def normalized(configuration: ConfState) -> ConfState:
    """The same configuration with its ids sorted."""
    return ConfState(
        tuple(sorted(configuration.voters)),
        tuple(sorted(configuration.learners)),
        tuple(sorted(configuration.voters_outgoing)),
        tuple(sorted(configuration.learners_next)),
        configuration.auto_leave,
    )


def check_configuration(configuration: ConfState, progress: Mapping[int, Progress]) -> None:
    """Walk the invariants of a configuration. Raises ``InvalidConfChange`` at the first that does not hold."""
    voters, outgoing = set(configuration.voters), set(configuration.voters_outgoing)
    for id_ in (*voters, *outgoing, *configuration.learners, *configuration.learners_next):
        if id_ not in progress:
            raise InvalidConfChange(f"no progress for {id_}")
    for id_ in configuration.learners_next:
        if id_ not in outgoing:
            raise InvalidConfChange(f"{id_} is to become a learner, but is no outgoing voter")
        if progress[id_].is_learner:
            raise InvalidConfChange(f"{id_} is to become a learner, but already is one")
    for id_ in configuration.learners:
        if id_ in outgoing or id_ in voters:
            raise InvalidConfChange(f"{id_} is both a learner and a voter")
        if not progress[id_].is_learner:
            raise InvalidConfChange(f"{id_} is a learner, but is not marked as one")
    if not outgoing and (configuration.learners_next or configuration.auto_leave):
        raise InvalidConfChange(f"not joint, yet about to leave: {configuration}")
