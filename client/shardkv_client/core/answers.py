"""What an error means for the call that met it. Pure decisions; the engine acts on them.

The rule of DESIGN §2.4: ``Unavailable`` promises that nothing was applied, so it is only raised for reads and for
writes of which every attempt was refused before it could be logged. What was refused and may succeed elsewhere or later
is tried again until the deadline: with the same bytes while an attempt is in doubt, else as a new command.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from shardkv import errors
from shardkv.errors import (
    Busy,
    NotLeader,
    OutcomeUnknown,
    ProtocolError,
    RequestError,
    RoutingError,
    SequenceReused,
    ShardKVError,
    TooOld,
    Unavailable,
)
from shardkv_client.core.calls import AdminCall, Call, DeleteRangeCall, Kind, ReadCall, ScanCall, Sent, WriteCall

DOUBT: Final = "it may have been applied, or may be yet, within a minute: a read alone does not settle it"
"""Of a command whose answer was lost. Its bytes may still be on their way to a leader, which executes none that was
issued longer ago."""


class Verdict(Enum):
    FINAL = "final"
    """The database's answer."""
    ELSEWHERE = "elsewhere"
    """The wrong place; find the right one."""
    LATER = "later"
    """The right place, but not now."""
    ANEW = "anew"
    """Certainly not applied and never will be: issue the command again, as a new one."""
    UNKNOWN = "unknown"
    """Nobody can tell any more whether it applied."""


def judge(call: Call, error: ShardKVError, *, recorded: bool) -> Verdict:
    """What to do with ``call``. ``recorded``: the error is the command's own outcome, not that of its request."""
    if isinstance(error, Busy):
        return Verdict.LATER
    if isinstance(error, RoutingError):
        return Verdict.ELSEWHERE
    if isinstance(error, Unavailable):
        return Verdict.LATER
    if isinstance(error, OutcomeUnknown):
        # Exactly once makes asking again safe, but only for commands.
        if isinstance(call, AdminCall) and not call.repeatable:
            return Verdict.FINAL
        return Verdict.LATER
    if isinstance(call, WriteCall):
        if isinstance(error, (TooOld, SequenceReused)):
            return Verdict.ANEW if call.attempts <= 1 else Verdict.UNKNOWN
        if not recorded and call.attempts > 1 and not isinstance(error, RequestError):
            # A node's refusal now (no space, no permission) says nothing about the earlier attempt.
            return Verdict.UNKNOWN
    return Verdict.FINAL


def came_to_nothing(call: Call, error: ShardKVError) -> bool:
    """Whether a node that refuses a write or an administrative call so has certainly not logged it, and never will."""
    if isinstance(error, NotLeader):
        return not error.logged
    # A write that is refused for its range keeps its bytes: they may have been applied at an earlier attempt.
    # An administrative call may be Unavailable because it did not come to its end in time, as a transfer.
    return isinstance(error, (Busy, Unavailable) if call.kind is Kind.WRITE else RoutingError)


def may_repeat(call: Call) -> bool:
    """Whether the call may be sent again after an attempt whose answer was lost."""
    return not isinstance(call, AdminCall) or call.repeatable


def failure(call: Call, reason: str, advice: str = "try again with backoff") -> ShardKVError:
    """What a call raises that ends without an answer. ``reason`` is a clause such as "no answer within 10 s", and
    ``advice`` one for a call of which nothing was applied."""
    if call.attempts and (call.kind is Kind.WRITE or not may_repeat(call)):
        doubt = DOUBT if call.kind is Kind.WRITE else "it may have been carried out: look before you ask again"
        return OutcomeUnknown(f"{reason}, and the request had been sent: {doubt}")
    return Unavailable(f"{reason}; nothing was applied: {advice}")


def copy(error: ShardKVError) -> ShardKVError:
    """The same error as another object, since each caller's traceback grows on its own."""
    return errors.from_wire(errors.to_wire(error))


def next_start(call: DeleteRangeCall) -> bytes | None:
    """Where the next piece of a delete_range starts, now that this one is deleted."""
    reached = call.sealed_end
    if reached is None or (call.end is not None and reached >= call.end):
        return None
    return reached


def take_age(calls: Sequence[ReadCall | ScanCall], answer: object) -> object:
    """Note how old the answer to a stale read is at most; the result in it. Raises ProtocolError for another shape."""
    match answer:
        case [int(age_us), result] if age_us >= 0:
            pass
        case _:
            raise ProtocolError("a stale read was answered without its age")
    bound = calls[0].age_us_max
    if bound is not None and age_us > bound:
        raise ProtocolError(f"a stale read was answered with an age of {age_us} µs, past its bound of {bound}")
    for call in calls:
        call.age_us = age_us
    return result


def check_page(call: ScanCall, result: object, sent: Sent) -> tuple[list[Any], bool, Any]:
    """The page, trusted from here on. Raises ProtocolError for one that no scan can have."""
    match result:
        case [list() as flat, bool(more)] if len(flat) % 3 == 0:
            keys: list[Any] = flat[::3]
        case _:
            raise ProtocolError("a scan was answered with something that is no page")
    for key in keys:
        if type(key) is not bytes:
            raise ProtocolError("a scan was answered with a key that is not bytes")
    if len(keys) > call.limit or (more and not keys):
        raise ProtocolError("a scan was answered with more than its limit, or with an empty page that is not the last")
    ordered = sorted(set(keys), reverse=call.reverse)
    if ordered != keys:
        raise ProtocolError("a scan was answered out of order")
    if keys:
        low, high = (keys[-1], keys[0]) if call.reverse else (keys[0], keys[-1])
        if low < call.start or (call.end is not None and high >= call.end):
            raise ProtocolError("a scan was answered with keys outside its span")
    return flat, more, sent.descriptor
