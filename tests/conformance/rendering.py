"""Prints the core's values the way that etcd-io/raft's transcripts print its own. Used by nothing but the runner."""

from collections.abc import Iterable

from shardkv.raft import PeerStatus, ProgressState, ReadState, Ready, Role, decode_conf_change
from shardkv.raft.errors import InvalidConfChange
from shardkv.raft.messages import (
    APPEND_THREAD,
    APPLY_THREAD,
    NONE,
    ConfChangeSingle,
    ConfChangeType,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


MESSAGE_NAMES = {kind: "Msg" + _camel(kind.name) for kind in MessageType}
MESSAGE_TYPES = {name: kind for kind, name in MESSAGE_NAMES.items()}
_ENTRY_NAMES = {
    EntryType.NORMAL: "EntryNormal",
    EntryType.CONF_CHANGE: "EntryConfChange",
    EntryType.CONF_CHANGE_V2: "EntryConfChangeV2",
}
_TARGETS = {NONE: "None", APPEND_THREAD: "AppendThread", APPLY_THREAD: "ApplyThread"}
_CHANGE_LETTERS = {
    ConfChangeType.ADD_NODE: "v",
    ConfChangeType.ADD_LEARNER_NODE: "l",
    ConfChangeType.REMOVE_NODE: "r",
    ConfChangeType.UPDATE_NODE: "u",
}
_CHANGE_TYPES = {letter: kind for kind, letter in _CHANGE_LETTERS.items()}
_ESCAPES = {
    ord('"'): '\\"',
    ord("\\"): "\\\\",
    7: "\\a",
    8: "\\b",
    9: "\\t",
    10: "\\n",
    11: "\\v",
    12: "\\f",
    13: "\\r",
}


def quoted(data: bytes) -> str:
    def character(byte: int) -> str:
        return _ESCAPES.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}")

    return '"' + "".join(character(byte) for byte in data) + '"'


def role(value: Role) -> str:
    return "State" + _camel(value.name)


def hard_state(value: HardState) -> str:
    vote = f" Vote:{value.vote}" if value.vote else ""
    return f"Term:{value.term}{vote} Commit:{value.commit}"


def _ids(values: Iterable[int]) -> str:
    return "[" + " ".join(str(value) for value in values) + "]"


def conf_state(value: ConfState) -> str:
    return (
        f"Voters:{_ids(value.voters)} VotersOutgoing:{_ids(value.voters_outgoing)} Learners:{_ids(value.learners)} "
        f"LearnersNext:{_ids(value.learners_next)} AutoLeave:{str(value.auto_leave).lower()}"
    )


def snapshot(value: Snapshot) -> str:
    metadata = value.metadata
    return f"Index:{metadata.index} Term:{metadata.term} ConfState:{conf_state(metadata.conf_state)}"


def conf_changes(changes: Iterable[ConfChangeSingle]) -> str:
    return " ".join(f"{_CHANGE_LETTERS[change.type]}{change.node_id}" for change in changes)


def parse_conf_changes(text: str) -> tuple[ConfChangeSingle, ...]:
    """The inverse of :func:`conf_changes`. Raises ``ValueError`` with the text that the transcripts expect."""
    changes = []
    for token in text.strip().split(" ") if text.strip() else ():
        if len(token) < 2:
            raise ValueError(f"unknown token {token}")
        if token[0] not in _CHANGE_TYPES:
            raise ValueError(f"unknown input: {token}")
        changes.append(ConfChangeSingle(_CHANGE_TYPES[token[0]], int(token[1:])))
    return tuple(changes)


def entry(value: Entry) -> str:
    if value.type is EntryType.NORMAL:
        text = quoted(value.data)
    else:
        try:
            text = conf_changes(decode_conf_change(value.data).changes)
        except InvalidConfChange as error:
            text = str(error)
    return f"{value.term}/{value.index} {_ENTRY_NAMES[value.type]}" + (f" {text}" if text else "")


def entries(values: Iterable[Entry]) -> str:
    return "".join(entry(value) + "\n" for value in values)


def _target(id_: int) -> str:
    return _TARGETS.get(id_) or f"{id_:x}"


def message(value: Message, indent: str = "", *, with_responses: bool = True) -> str:
    text = (
        f"{indent}{_target(value.from_)}->{_target(value.to)} {MESSAGE_NAMES[value.type]} "
        f"Term:{value.term} Log:{value.log_term}/{value.index}"
    )
    if value.reject:
        text += f" Rejected (Hint: {value.reject_hint})"
    if value.commit:
        text += f" Commit:{value.commit}"
    if value.vote:
        text += f" Vote:{value.vote}"
    if len(value.entries) == 1:
        text += f" Entries:[{entry(value.entries[0])}]"
    elif value.entries:
        text += " Entries:[" + "".join(f"\n{indent}  {entry(item)}" for item in value.entries) + f"\n{indent}]"
    if value.snapshot is not None and not value.snapshot.empty:
        text += f"\n{indent}  Snapshot: {snapshot(value.snapshot)}"
    if with_responses and value.responses:
        text += " Responses:["
        text += "".join("\n" + message(response, indent + "  ") for response in value.responses)
        text += f"\n{indent}]"
    return text


def _read_state(value: ReadState) -> str:
    return f"{{{value.index} {_ids(value.context)}}}"


def ready(value: Ready) -> str:
    text = ""
    if value.soft_state is not None:
        text += f"Lead:{value.soft_state.leader} State:{role(value.soft_state.role)}\n"
    if value.hard_state is not None:
        text += f"HardState {hard_state(value.hard_state)}\n"
    if value.read_states:
        text += f"ReadStates [{' '.join(_read_state(state) for state in value.read_states)}]\n"
    if value.entries:
        text += "Entries:\n" + entries(value.entries)
    if value.snapshot is not None:
        text += f"Snapshot {snapshot(value.snapshot)}\n"
    if value.committed_entries:
        text += "CommittedEntries:\n" + entries(value.committed_entries)
    if value.messages:
        text += "Messages:\n" + "".join(message(item) + "\n" for item in value.messages)
    if not text:
        return "<empty Ready>"
    return f"Ready MustSync={str(value.must_sync).lower()}:\n{text}"


def peer(value: PeerStatus) -> str:
    text = f"State{_camel(ProgressState(value.state).name)} match={value.match} next={value.next}"
    if value.is_learner:
        text += " learner"
    if value.paused:
        text += " paused"
    if value.pending_snapshot:
        text += f" pendingSnap={value.pending_snapshot}"
    if not value.recent_active:
        text += " inactive"
    if value.inflight_messages:
        text += f" inflight={value.inflight_messages}" + ("[full]" if value.inflight_full else "")
    return text


def majority(ids: Iterable[int]) -> str:
    return "(" + " ".join(f"{id_:x}" for id_ in sorted(ids)) + ")"


def configuration(value: ConfState) -> str:
    text = f"voters={majority(value.voters)}"
    if value.voters_outgoing:
        text += f"&&{majority(value.voters_outgoing)}"
    if value.learners:
        text += f" learners={majority(value.learners)}"
    if value.learners_next:
        text += f" learners_next={majority(value.learners_next)}"
    return text + (" autoleave" if value.auto_leave else "")
