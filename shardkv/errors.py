"""Every error that a user of shardkv can meet, as one tree; the base tells the caller what it may do next.

* :class:`RequestError`: the input is wrong; the same call will fail again.
* :class:`VersionMismatch` and its siblings: the database's answer; decide.
* :class:`RoutingError`: the request went to the wrong place; the client corrects itself, users never see these.
* :class:`Unavailable`: certainly not applied; retry with backoff.
* :class:`OutcomeUnknown`: may have been applied.
* :class:`StorageError`: a node's disk; the message says what to do.

Each class has a stable ``code`` that stands for it on the wire. :func:`to_wire` and :func:`from_wire` translate.
Codes are never reused.
"""

from typing import ClassVar

from shardkv.types import RangeDescriptor


class ShardKVError(Exception):
    """The base of everything that shardkv raises on purpose."""

    code: ClassVar[int] = 1

    def details(self) -> list[object]:
        """What :func:`from_wire` needs besides the message, as CBOR values."""
        return []

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "ShardKVError":
        return cls(message)


class RequestError(ShardKVError):
    """The request itself is wrong; do not retry it."""

    code = 10


class KeyTooLarge(RequestError):
    """A key must have 1 byte to 4 KiB."""

    code = 11


class ValueTooLarge(RequestError):
    """A value may have up to 1 MiB, and the values of one answer what a frame holds."""

    code = 12


class InvalidRange(RequestError):
    """A span that ends below its start, a split key that divides nothing, or targets that exclude each other."""

    code = 13


class NotAnInteger(RequestError):
    """An increment met a value that is not decimal text of a signed 64-bit integer, or would leave that span."""

    code = 14


class UnknownMethod(RequestError):
    """The node does not know this request; it may be of an older version."""

    code = 15


class NotFound(RequestError):
    """The range, node or other object that an administrative request names does not exist."""

    code = 16


class MalformedRequest(RequestError):
    """The bytes of the request are not what the protocol allows."""

    code = 17


class TransactionTooLarge(RequestError):
    """A transaction may have up to 10,000 keys and 8 MiB."""

    code = 18


class VersionMismatch(ShardKVError):
    """A conditional write found another version. ``current`` is the version found, 0 for an absent key."""

    code = 20

    def __init__(self, message: str = "", *, current: int = 0) -> None:
        super().__init__(message or f"the key is at version {current}; read it again and decide")
        self.current = current

    def details(self) -> list[object]:
        return [self.current]

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "VersionMismatch":
        match details:
            case [int(current)]:
                return cls(message, current=current)
        return cls(message)


class Conflict(ShardKVError):
    """Another transaction was first; run the transaction again."""

    code = 21


class LockLost(ShardKVError):
    """A lock is held by somebody else by now, or by nobody."""

    code = 22


class TooOld(ShardKVError):
    """The command was issued so long ago that its session's record is gone; nobody can tell whether it applied."""

    code = 23


class SequenceReused(ShardKVError):
    """A session's sequence number came again with other content, or after it was settled."""

    code = 24


class BatchError(ShardKVError):
    """A ``put_many`` stopped early.

    ``consumed`` counts the pairs taken from the input; ``failed`` names every consumed key that is not known to be
    written. All other consumed keys are written.
    """

    code = 25

    def __init__(self, message: str, *, consumed: int = 0, failed: tuple[bytes, ...] = ()) -> None:
        super().__init__(message)
        self.consumed = consumed
        self.failed = failed

    def details(self) -> list[object]:
        return [self.consumed, list(self.failed)]

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "BatchError":
        match details:
            case [int(consumed), [*failed]]:
                return cls(message, consumed=consumed, failed=tuple(key for key in failed if isinstance(key, bytes)))
        return cls(message, consumed=0, failed=())


class RoutingError(ShardKVError):
    """The request reached a node that cannot serve it; the client finds the right one."""

    code = 30


class NotLeader(RoutingError):
    """This replica does not lead the range. ``hint`` is the node id of the leader it knows of, or None.

    ``logged``: it did when it logged the command, which may still be applied.
    """

    code = 31

    def __init__(
        self, message: str = "this replica does not lead its range", *, hint: int | None = None, logged: bool = False
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.logged = logged

    def details(self) -> list[object]:
        return [self.hint, self.logged]

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "NotLeader":
        match details:
            case [int() | None as hint, bool(logged)]:
                return cls(message, hint=hint, logged=logged)
        return cls(message, logged=True)


class EpochMismatch(RoutingError):
    """The range has been split, merged or moved since the request was routed. ``current`` are newer descriptors."""

    code = 32

    def __init__(self, message: str = "the range has changed", *, current: tuple[RangeDescriptor, ...] = ()) -> None:
        super().__init__(message)
        self.current = current

    def details(self) -> list[object]:
        return [[descriptor.to_wire() for descriptor in self.current]]

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "EpochMismatch":
        match details:
            case [[*descriptors]]:
                return cls(message, current=tuple(RangeDescriptor.from_wire(fields) for fields in descriptors))
        return cls(message)


class RangeNotFound(RoutingError):
    """This node holds no replica of the range."""

    code = 33


class Busy(RoutingError):
    """A queue of the node is full; nothing was done. The client backs off and tries again within its timeout."""

    code = 34


class Unavailable(ShardKVError):
    """Certainly not applied: no leader could be reached in time. Retry with backoff."""

    code = 40


class OutcomeUnknown(ShardKVError):
    """The write was sent but its answer was lost: it may have been applied, or may be yet.

    A read alone does not settle it; docs/client.md says what does.
    """

    code = 41


class ClientClosed(ShardKVError):
    """The client was closed, was never opened, or belongs to the parent of a forked process; open a new one."""

    code = 50


class PermissionDenied(ShardKVError):
    """Kept for authentication, which there is not yet."""

    code = 51


class Unauthenticated(ShardKVError):
    """Kept for authentication, which there is not yet."""

    code = 52


class ProtocolError(ShardKVError):
    """The other side broke the protocol; the connection is closed."""

    code = 53


class VersionUnsupported(ProtocolError):
    """The two sides speak no common protocol version; upgrade the older one."""

    code = 54


class WrongCluster(ShardKVError):
    """The two sides belong to different clusters, or a node is not the one it was taken for.

    ``old_copy``: its data are an older copy of what it had, or nothing of it, so it has forgotten votes and must never
    run on them again.
    """

    code = 55

    def __init__(self, message: str, *, old_copy: bool = False) -> None:
        super().__init__(message)
        self.old_copy = old_copy

    def details(self) -> list[object]:
        return [True] if self.old_copy else []

    @classmethod
    def from_details(cls, message: str, details: list[object]) -> "WrongCluster":
        return cls(message, old_copy=details[:1] == [True])


class ConfigError(ShardKVError):
    """A setting is missing, unknown or out of bounds; the message names it and where it came from."""

    code = 56


class StorageError(ShardKVError):
    """A node's disk failed a call; the message names the file and says what to do. The node ends with it."""

    code = 60


class Corruption(StorageError):
    """Bytes on disk are not what was written. The message names the place and what to do."""

    code = 61


class OutOfSpace(StorageError):
    """A node's disk is nearly full, so it takes no writes now: certainly not applied. Free space, or delete keys."""

    code = 62


class DataDirectoryError(StorageError):
    """The data directory is foreign, of a newer format, in use, refused as an old copy, or not a directory."""

    code = 63


def _classes(root: type[ShardKVError]) -> dict[int, type[ShardKVError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        for code, cls in _classes(child).items():
            assert code not in found, f"wire code {code} stands for both {found[code].__name__} and {cls.__name__}"
            found[code] = cls
    return found


_BY_CODE = _classes(ShardKVError)


def to_wire(error: ShardKVError) -> list[object]:
    """``[code, message, details]``."""
    return [error.code, str(error), error.details()]


def from_wire(fields: object) -> ShardKVError:
    """The error that :func:`to_wire` encoded; an unknown code becomes its base, :class:`ShardKVError`.

    Raises:
        ValueError: ``fields`` has another shape.
    """
    match fields:
        case [int(code), str(message), [*details]]:
            return _BY_CODE.get(code, ShardKVError).from_details(message, details)
    raise ValueError(f"not an error: {fields!r:.200}")
