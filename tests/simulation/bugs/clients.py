"""Deliberate bugs in the client, and in what a server tells it."""

from typing import Any

from shardkv.errors import NotLeader, Unavailable
from shardkv.machine import reads
from shardkv.multiraft import replica as replica_module
from shardkv.multiraft.proposer import Proposer
from shardkv.server import requests
from shardkv.wire.requests import Consistency, Method
from shardkv_client.core import answers, engine
from shardkv_client.core.calls import WriteCall
from shardkv_client.core.ledger import Ledger
from tests.simulation.bugs.table import Bug, Patches, patch


def retry_under_a_new_sequence() -> Patches:
    original = Ledger.requeue

    def requeue(ledger: Ledger, calls: list[Any]) -> None:
        for call in calls:
            if isinstance(call, WriteCall) and call.sealed is not None and not call.done:
                ledger.settle(call)
        original(ledger, calls)

    return [patch.object(Ledger, "requeue", requeue)]


def sequence_of_a_cancelled_write() -> Patches:
    """Whoever gives up a write that was sent gives back its number, too."""
    original = Ledger.cancel

    def cancel(ledger: Ledger, call: Any) -> None:
        sent = isinstance(call, WriteCall) and call.sealed is not None and not call.done
        original(ledger, call)
        session = ledger._session
        if sent and call.sequence == session.next_sequence - 1:
            session.next_sequence = call.sequence
            session.lowest = min(session.lowest, call.sequence)

    return [patch.object(Ledger, "cancel", cancel)]


def certainly_not_applied() -> Patches:
    return [patch.object(answers, "failure", lambda call, reason, advice="": Unavailable(reason))]


def logged_and_told_as_not() -> Patches:
    """A leader that steps down refuses what it has logged as if it had not."""
    return [patch.object(replica_module, "NotLeader", lambda hint=None, logged=False: NotLeader(hint=hint))]


def answered_when_proposed() -> Patches:
    """Puts are answered with the version that they will probably get."""
    original = Proposer._propose_writes

    def propose_writes(proposer: Proposer, replica: Any) -> None:
        for group in replica.waiting:
            if all(command[0] == 0 and command[7] is None for command in group.decoded):
                first = proposer._hybrid_clock.now() + 1
                group.requester.answer(group.request_id, [first + place for place in range(len(group.decoded))])
        waiting = [each for each in replica.waiting if not all(c[0] == 0 and c[7] is None for c in each.decoded)]
        told = [each._replace(requester=_Nobody()) for each in replica.waiting if each not in waiting]
        replica.waiting = waiting + told
        original(proposer, replica)

    return [patch.object(Proposer, "_propose_writes", propose_writes)]


class _Nobody:
    def answer(self, request_id: int, result: Any) -> None: ...

    def refuse(self, request_id: int, error: Any) -> None: ...


def scan_says_that_is_all() -> Patches:
    original = reads.scan_page

    def scan_page(*arguments: Any) -> tuple[list[Any], bool]:
        return original(*arguments)[0], False

    return [patch.object(reads, "scan_page", scan_page)]


def downwards_from_the_wrong_end() -> Patches:
    """A page of a reverse scan is made as any other, and then turned round."""
    original = reads.scan_page

    def scan_page(*arguments: Any) -> tuple[list[Any], bool]:
        *where, reverse, keys_only = arguments
        found, more = original(*where, False, keys_only)
        if reverse:
            found = [part for place in range(len(found) - 3, -1, -3) for part in found[place : place + 3]]
        return found, more

    return [patch.object(reads, "scan_page", scan_page)]


def range_delete_ends_with_the_range() -> Patches:
    return [patch.object(engine, "next_start", lambda call: None)]


def followers_answer_many_keys_at_once() -> Patches:
    """Without a read index: that is asked for when a single key is read."""
    original = requests.Requests._read

    def read(self: Any, requester: Any, request: Any, consistency: int, serve: Any, *arguments: Any) -> None:
        replica = self._replica(request)
        several = request.method == Method.GET and len(request.arguments[1]) > 1
        if several and consistency == Consistency.FOLLOWER and not replica.leads:
            requester.offer(request.id, serve(replica))
        else:
            original(self, requester, request, consistency, serve, *arguments)

    return [patch.object(requests.Requests, "_read", read)]


def small_pages() -> Patches:
    return [patch.object(requests, "SCAN_PAGE_ENTRIES_MAX", 5)]


BUGS = (
    Bug(
        "retry-under-a-new-sequence",
        "a retry is the same command (DESIGN 4.6)",
        retry_under_a_new_sequence,
        ("lost-answers", "blink"),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "sequence-of-a-cancelled-write",
        "a sequence is used for one command only (DESIGN 4.6)",
        sequence_of_a_cancelled_write,
        (),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "unknown-told-as-not-applied",
        "Unavailable only if nothing can have been logged (DESIGN 2.4)",
        certainly_not_applied,
        ("depose", "stall", "slow"),
        11,
        workload="counters",
        rate=100,
    ),
    Bug(
        "logged-told-as-not",
        "what a leader has logged is not issued anew (DESIGN 4.6)",
        logged_and_told_as_not,
        ("depose", "transfer", "stall"),
        1,
        workload="counters",
        rate=100,
    ),
    Bug(
        "answered-when-proposed",
        "a write is answered after the local apply (DESIGN 4.5)",
        answered_when_proposed,
        ("kill", "depose"),
        1,
        workload="ledger",
    ),
    Bug(
        "scan-ends-early",
        "a scan says whether more keys remain (DESIGN 2.3)",
        scan_says_that_is_all,
        ("transfer",),
        1,
        workload="ledger",
        tuning=small_pages,
    ),
    Bug(
        "reverse-scan-from-the-wrong-end",
        "a key that nobody touches is in a scan exactly once (DESIGN 2.3)",
        downwards_from_the_wrong_end,
        ("transfer",),
        1,
        workload="ledger",
        tuning=small_pages,
    ),
    Bug(
        "many-keys-from-a-follower",
        "a follower's reads are linearizable, however many keys are asked for (DESIGN 2.3)",
        followers_answer_many_keys_at_once,
        ("slow", "slow-disk"),
        1,
        workload="bulk",
    ),
    Bug(
        "range-delete-ends-early",
        "delete_range takes every range of its span (DESIGN 2.3)",
        range_delete_ends_with_the_range,
        ("transfer",),
        1,
        workload="errands",
        rate=100,
    ),
)
