"""Whose data directory this is: format, cluster, node, and how often it was opened.

Layout: ``DATA/identity`` (this module's file), ``DATA/LOCK`` (held while a node runs), ``DATA/wal/`` (the shared Raft
log), ``DATA/log-mark`` (how far that is known to have been on disk), ``DATA/promise`` (the longest promise that a
replica here may have given, in nanoseconds), ``DATA/engine/`` (the ordered store),
``DATA/ingest/`` (files on their way into it; what a start finds there is left over), ``DATA/refused`` (why the cluster
will not have this directory, if so). Does not live here: what those hold.
The rule: a directory that is not certainly ours, of a format that we know and free for us to use, is refused before
anything in it is changed.
"""

from dataclasses import dataclass, replace
from struct import Struct
from typing import Final
from zlib import crc32

from shardkv.environment import DirectoryLock, Disk, Ids
from shardkv.errors import Corruption, DataDirectoryError, OutOfSpace, StorageError
from shardkv.storage.segment import remove_spares
from shardkv.types import CLUSTER_ID_BYTES, LINEAGE_MAX, TOKEN_BYTES, NodeId

FORMAT: Final = 2
"""Of everything under the directory. Raised when an older program could no longer read it."""

IDENTITY_NAME: Final = "identity"
LOCK_NAME: Final = "LOCK"
WAL_NAME: Final = "wal"
ENGINE_NAME: Final = "engine"
INGEST_NAME: Final = "ingest"
REFUSED_NAME: Final = "refused"
MARK_NAME: Final = "log-mark"
PROMISE_NAME: Final = "promise"

STORED_NAME_BYTES_MAX: Final = 255
"""More than any configuration takes."""

_MAGIC: Final = b"shardkv\n"
_START: Final = Struct("<8sII")
"""magic, format, checksum of what follows. These stay where they are in every format."""
_FIELDS: Final = Struct("<16sQ16sQH")
"""directory token, boot counter, cluster id (zeros: none yet), node id (0: none yet), bytes of the name."""
_NOTE: Final = Struct("<16sQ")
"""directory token, number. The checksum of both follows."""
_NOTE_CRC: Final = Struct("<I")

_NO_CLUSTER: Final = bytes(CLUSTER_ID_BYTES)
_HARMLESS: Final = frozenset((LOCK_NAME, f"{IDENTITY_NAME}.temporary", "lost+found"))
"""What may stand in a directory that has no identity yet: what a first start that died leaves, and an empty volume."""


class Note:
    """One number of a data directory in a file of its own, kept durably; 0 as long as nobody has noted any."""

    __slots__ = ("_advice", "_disk", "_token", "path")

    def __init__(self, disk: Disk, path: str, token: bytes, advice: str) -> None:
        """``token``: the directory's. ``advice``: what a damaged note was for, and when it may be removed."""
        self._disk = disk
        self._token = token
        self._advice = advice
        self.path = path

    def read(self) -> int:
        """Blocks. Raises Corruption if the note is damaged, or another directory's."""
        try:
            data = self._disk.read(self.path)
        except FileNotFoundError:
            return 0
        if len(data) == _NOTE.size + _NOTE_CRC.size:
            token, number = _NOTE.unpack_from(data)
            if data[_NOTE.size :] == _NOTE_CRC.pack(crc32(data[: _NOTE.size])) and token == self._token:
                return int(number)
        raise Corruption(f"{self.path} is damaged, or another directory's. {self._advice}")

    def write(self, number: int) -> None:
        """Blocks until it is on disk. Raises StorageError, OutOfSpace; then what was noted before stays."""
        body = _NOTE.pack(self._token, number)
        self._disk.write_atomically(self.path, body + _NOTE_CRC.pack(crc32(body)))


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose a data directory is; the last three are None until a node of a cluster has it."""

    token: bytes
    """16 random bytes, of this directory alone; the log's checksums start from it."""
    boot: int
    """How often the directory was opened, 1 the first time. A lower one than peers have seen is a restored disk."""
    starts: tuple[bytes, ...]
    """A random token of each of the last LINEAGE_MAX openings, newest first: two copies of a disk part with the first
    opening of either, however often each is opened then."""
    cluster_id: bytes | None = None
    node_id: NodeId | None = None
    name: str | None = None

    @property
    def assigned(self) -> bool:
        """Whether the directory belongs to a node of a cluster yet."""
        return self.cluster_id is not None


def encode_identity(identity: Identity) -> bytes:
    name = (identity.name or "").encode()
    body = _FIELDS.pack(
        identity.token, identity.boot, identity.cluster_id or _NO_CLUSTER, identity.node_id or 0, len(name)
    )
    body += name + b"".join(identity.starts)
    return _START.pack(_MAGIC, FORMAT, crc32(body)) + body


def decode_identity(data: bytes, path: str) -> Identity:
    """The inverse of :func:`encode_identity`. Raises DataDirectoryError for a newer format, Corruption for damage."""
    advice = (
        "the directory cannot be used as it is: restore that one file from a copy made since the node was last "
        "started, or start a node under another name with an empty data directory"
    )
    if len(data) < _START.size:
        raise Corruption(f"{path} holds {len(data)} bytes, too few; {advice}")
    magic, version, crc = _START.unpack_from(data)
    if magic != _MAGIC:
        raise Corruption(f"{path} does not begin as an identity does; {advice}")
    body = data[_START.size :]
    if crc32(body) != crc or len(body) < _FIELDS.size:
        if version > FORMAT:
            raise DataDirectoryError(_newer(path, version))
        raise Corruption(f"{path} is damaged, its checksum is wrong; {advice}")
    if version > FORMAT:
        raise DataDirectoryError(_newer(path, version))
    token, boot, cluster_id, node_id, name_bytes = _FIELDS.unpack_from(body)
    name, rest = body[_FIELDS.size :][:name_bytes], body[_FIELDS.size + name_bytes :]
    starts = tuple(rest[at : at + TOKEN_BYTES] for at in range(0, len(rest), TOKEN_BYTES))
    # Format 1 had no tokens.
    if version < 1 or len(name) != name_bytes or len(rest) % TOKEN_BYTES or (rest and version < 2):
        raise Corruption(f"{path} says format {version}, and {len(body)} bytes do not fit that; {advice}")
    if cluster_id == _NO_CLUSTER:
        return Identity(token, boot, starts)
    return Identity(token, boot, starts, cluster_id, NodeId(node_id), name.decode())


def _newer(path: str, version: int) -> str:
    return (
        f"{path} is of format {version}, and this program knows formats up to {FORMAT}: it was written by a newer "
        "version of shardkv; start that version"
    )


class DataDirectory:
    """An open, locked data directory. :meth:`close` gives it back."""

    def __init__(self, disk: Disk, path: str, identity: Identity, lock: DirectoryLock) -> None:
        self._disk = disk
        self._lock = lock
        self.path = path
        self.identity = identity
        self.wal_path = f"{path}/{WAL_NAME}"
        self.engine_path = f"{path}/{ENGINE_NAME}"
        self.ingest_path = f"{path}/{INGEST_NAME}"
        mark = f"{path}/{MARK_NAME}"
        self.log_mark = Note(
            disk,
            mark,
            identity.token,
            "It says how far the log was on disk, so that a start can tell if a part of it is gone: remove "
            f"{mark} only if nothing of {self.wal_path} was removed or put back",
        )
        """Up to which record the log is known to have been on disk."""
        promise = f"{path}/{PROMISE_NAME}"
        self.promise = Note(
            disk,
            promise,
            identity.token,
            "It says for how long this node may have promised its votes: remove "
            f"{promise} once the node has been down for longer than any --promise-ms that it ever ran with",
        )
        """The longest promise that a replica here may have given, in nanoseconds."""

    def assign(self, cluster_id: bytes, node_id: NodeId, name: str) -> None:
        """Make the directory that of a node, durably. Blocks. Saying the same again does nothing.

        Call it once the log has been opened: a directory that is assigned has a log, so from then on a start must not
        begin an empty one. Raises DataDirectoryError if it is another node's.
        """
        assert len(cluster_id) == CLUSTER_ID_BYTES, f"a cluster id of {len(cluster_id)} bytes"
        assert cluster_id != _NO_CLUSTER, "a cluster id of zeros means none"
        assert node_id > 0, f"node id {node_id}"
        assert 0 < len(name.encode()) <= STORED_NAME_BYTES_MAX, f"a name of {len(name.encode())} bytes"
        self.require(cluster_id=cluster_id, node_id=node_id, name=name)
        if not self.identity.assigned:
            self._store(replace(self.identity, cluster_id=cluster_id, node_id=node_id, name=name))

    def require(
        self, *, cluster_id: bytes | None = None, node_id: NodeId | None = None, name: str | None = None
    ) -> None:
        """Raise DataDirectoryError if the directory belongs to another cluster or node than those given (not None)."""
        mine = self.identity
        if not mine.assigned:
            return
        assert mine.cluster_id is not None, "assigned without a cluster"
        if cluster_id is not None and cluster_id != mine.cluster_id:
            raise DataDirectoryError(
                f"{self.path} belongs to cluster {mine.cluster_id.hex()}, not to {cluster_id.hex()}; "
                "give this node another data directory, or connect it to its own cluster"
            )
        if (node_id is not None and node_id != mine.node_id) or (name is not None and name != mine.name):
            raise DataDirectoryError(
                f"{self.path} belongs to the node named {mine.name!r} (id {mine.node_id}), not to {name!r} "
                f"(id {node_id if node_id is not None else 'any'}); start it under its own name, or give this node "
                "another data directory"
            )

    def _store(self, identity: Identity) -> None:
        self._disk.write_atomically(f"{self.path}/{IDENTITY_NAME}", encode_identity(identity))
        self.identity = identity

    def condemn(self, reason: str) -> None:
        """Let no start use the directory any more. Blocks.

        For an old copy: every start raises the boot counter, and after enough of them it would pass for the newest.
        """
        self._disk.write_atomically(f"{self.path}/{REFUSED_NAME}", reason.encode())

    def close(self) -> None:
        self._lock.release()


def open_directory(disk: Disk, ids: Ids, path: str) -> DataDirectory:
    """Lock the data directory at ``path``, making it if there is none, and count this start. Blocks.

    Raises DataDirectoryError (not a directory, foreign, of a newer format, in use, condemned), Corruption (damaged
    identity), StorageError, OutOfSpace; each message says what to do.
    """
    path = path.rstrip("/") or "/"
    identity_path = f"{path}/{IDENTITY_NAME}"
    _make(disk, path)
    _refuse_foreign(disk, path)
    lock = disk.lock(f"{path}/{LOCK_NAME}")
    try:
        _refuse_condemned(disk, path)
        try:
            identity = decode_identity(disk.read(identity_path), identity_path)
        except FileNotFoundError:
            identity = Identity(ids.random_bytes(TOKEN_BYTES), 0, ())
        directory = DataDirectory(disk, path, identity, lock)
        starts = (ids.random_bytes(TOKEN_BYTES), *identity.starts[: LINEAGE_MAX - 1])
        started = replace(identity, boot=identity.boot + 1, starts=starts)
        try:
            directory._store(started)
        except OutOfSpace:
            # The log's next segment was made ahead of time; it is made again once there is room.
            if not disk.exists(directory.wal_path) or not remove_spares(disk, directory.wal_path):
                raise
            directory._store(started)
        for child in (directory.wal_path, directory.engine_path, directory.ingest_path):
            try:
                disk.make_directory(child)
            except FileExistsError as error:
                raise DataDirectoryError(
                    f"{child} is not a directory: put back what was there, or mount what it leads to if it is a link"
                ) from error
    except BaseException:
        lock.release()
        raise
    return directory


def _make(disk: Disk, path: str) -> None:
    # One without an identity is made once more: who made it may have been killed before it was durable.
    if disk.exists(f"{path}/{IDENTITY_NAME}"):
        return
    there = disk.exists(path)
    try:
        disk.make_directory(path)
    except (OSError, StorageError) as error:
        if there and isinstance(error, FileExistsError):
            return  # a file: refused as what it is
        raise DataDirectoryError(
            f"the data directory {path} cannot be made: {error}; check the path and its permissions"
        ) from error


def _refuse_condemned(disk: Disk, path: str) -> None:
    """Raise DataDirectoryError if :meth:`DataDirectory.condemn` was called. Changes nothing."""
    try:
        reason = disk.read(f"{path}/{REFUSED_NAME}")
    except FileNotFoundError:
        return
    raise DataDirectoryError(
        f"the cluster has refused {path}: {reason.decode(errors='replace')}; only if the right data have been put in "
        f"its place since, remove {path}/{REFUSED_NAME}"
    )


def _refuse_foreign(disk: Disk, path: str) -> None:
    """Raise DataDirectoryError unless the directory is empty or has an identity. Changes nothing."""
    try:
        names = disk.list(path)
    except (OSError, StorageError) as error:
        raise DataDirectoryError(
            f"{path} is not a directory that can be read: {error}; give a directory as data directory"
        ) from error
    if IDENTITY_NAME in names:
        return
    if WAL_NAME in names or ENGINE_NAME in names:
        raise DataDirectoryError(
            f"{path} holds a node's data and no {IDENTITY_NAME} file: it was lost; restore that one file from a copy, "
            "or start a node under another name with an empty data directory"
        )
    foreign = [name for name in names if name not in _HARMLESS]
    if foreign:
        raise DataDirectoryError(
            f"{path} is not empty and holds no shardkv data (but {', '.join(foreign[:3])}, …); give an empty or a new "
            "directory as data directory"
        )
