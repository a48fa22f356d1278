"""A requester that is a task of this node: it asks a group for something and waits for the outcome."""

from typing import Any

import trio

from shardkv.environment import Clock
from shardkv.errors import NotLeader, OutcomeUnknown, ShardKVError


class Reply:
    """One outcome. See :class:`~shardkv.multiraft.replica.Requester`."""

    __slots__ = ("_arrived", "_error", "_result")

    def __init__(self) -> None:
        self._arrived = trio.Event()
        self._result: Any = None
        self._error: ShardKVError | None = None

    def answer(self, request_id: int, result: Any) -> None:
        self._result = result
        self._arrived.set()

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self._error = error
        self._arrived.set()

    async def wait(self, clock: Clock, seconds: float) -> Any:
        """The result. Raises the error it was refused with, or OutcomeUnknown when neither comes in time.

        OutcomeUnknown also when the group's leader changed meanwhile: the next one may have what was proposed in its
        log, and asking again, as clients do on NotLeader, is no retry for what has no session.
        """
        with clock.deadline(seconds):
            await self._arrived.wait()
        if isinstance(self._error, NotLeader):
            raise OutcomeUnknown(
                "the leader changed before the outcome was known; look at the cluster's status before trying again"
            ) from self._error
        if self._error is not None:
            raise self._error
        if not self._arrived.is_set():
            raise OutcomeUnknown(f"no outcome within {seconds:g} s; look at the cluster's status before trying again")
        return self._result
