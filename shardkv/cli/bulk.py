"""``shardkv import`` and ``shardkv export``: streams of JSON lines or CSV that carry on where they were interrupted.

What was done stands in ``FILE.progress`` beside the file, written at the start and after every batch: for an import
the offset up to which every record is acknowledged, and a hash of what stands around it there, for an export the
offset that is on disk and the last key before it. It is removed at the end. An import repeats at most one batch, which
is harmless: puts of the same values. What stands behind the offset may be corrected before it carries on.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import click

from shardkv.cli import records, text
from shardkv.cli.data import after_prefix, span_options
from shardkv.cli.durable import remove_durably, replace_durably
from shardkv.cli.progress import Progress
from shardkv.cli.root import Example
from shardkv.cli.session import Client, Session, base64_option, connected
from shardkv.errors import BatchError
from shardkv.json_rules import to_json
from shardkv.program import tell
from shardkv.types import KEY_BYTES_MAX

BATCH_KEYS_MAX: Final = 5_000
BATCH_BYTES_MAX: Final = 8 * 1024 * 1024
FINGERPRINT_BYTES_MAX: Final = 4_096
"""Of the beginning of what was imported, and of its end."""
PACKERS: Final = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""What makes files with such names; each unpacks with -dc, and packs its stdin without options."""
_HEX: Final = re.compile("([0-9a-f]{2})+")

format_option = click.option(
    "--format",
    "given_format",
    type=click.Choice(records.FORMATS),
    help="jsonl or csv.  [default: by the file's name, else jsonl]",
)
resume_option = click.option("--resume", is_flag=True, help="Carry on where an earlier run was interrupted.")


class Checkpoint:
    """The ``FILE.progress`` file of one command. Nothing is kept for streams."""

    def __init__(self, file_name: str, identity: Mapping[str, object]) -> None:
        self.path = None if _is_stream(file_name) else Path(file_name + ".progress")
        self._identity = dict(identity)
        self._count = 0

    def left_by(self) -> object:
        """The command that left the file there; None where there is none, or nobody can tell."""
        try:
            saved = json.loads(self.path.read_bytes()) if self.path is not None else None
        except (OSError, ValueError, RecursionError):
            return None
        return saved.get("command") if isinstance(saved, dict) else None

    def load(self) -> dict[str, Any] | None:
        """What an earlier run left, None if it left nothing. Raises a usage error when it was another command's."""
        if self.path is None or not self.path.exists():
            return None
        damaged = click.UsageError(f"{self.path} is damaged; remove it to start anew")
        try:
            saved = json.loads(self.path.read_bytes())
        except (ValueError, RecursionError, IsADirectoryError):
            raise damaged from None
        if not isinstance(saved, dict):
            raise damaged
        differing = [name for name, value in self._identity.items() if saved.get(name) != value]
        if differing:
            raise click.UsageError(
                f"{self.path} belongs to a command with another {', '.join(differing)}; start anew without --resume"
            )
        if not _is_whole(saved):
            raise damaged
        return saved

    def begin(self, otherwise: str, **state: Any) -> None:
        """Save for the first time. Raises a usage error where that cannot be; ``otherwise`` is what does without."""
        try:
            self.save(**state)
        except OSError as problem:
            raise click.UsageError(
                f"the progress cannot be noted in {self.path}: {problem.strerror}; {otherwise} to do without"
            ) from None

    def save(self, *, count: int, **state: object) -> None:
        """Note the keys done, and where to go on behind them.

        Durably: by an older note, an export that was begun anew would go on in the middle of a line, and without any,
        half of one would pass for the whole.
        """
        self._count = count
        if self.path is not None:
            replace_durably(self.path, json.dumps({**self._identity, "count": count, **state}))

    def remove(self) -> None:
        """Durably: by a note that comes back, a later --resume would do the end of a finished import once more."""
        if self.path is not None:
            remove_durably(self.path)

    @contextlib.contextmanager
    def kept(self, *, count_min: int = 0) -> Iterator[None]:
        """While the command works: at its end the file is removed, and where it does not get there it says what for.

        With fewer than ``count_min`` keys done there is nothing to carry on, and it is removed as well.
        """
        try:
            yield
        except BaseException:
            if self._count < count_min:
                self.remove()
            elif self.path is not None:
                tell(f"how far it came is noted in {self.path}; with --resume the same command carries on")
            raise
        self.remove()


def _is_whole(saved: Mapping[str, Any]) -> bool:
    """Whether all is there that its command carries on from."""
    match saved:
        case {"command": "import", "offset": int(offset), "line": int(line), "count": int(count), "fingerprint": str()}:
            return min(offset, line, count) >= 0
        case {"command": "export", "offset": int(offset), "last_key_hex": None | str() as last, "count": int(count)}:
            return min(offset, count) >= 0 and (last is None or _HEX.fullmatch(last) is not None)
    return False


def _is_stream(file_name: str) -> bool:
    """Whether it is read or written once and has no place to go back to: stdin, stdout, a pipe, a device."""
    return file_name == "-" or (Path(file_name).exists() and not Path(file_name).is_file())


def _format_of(file_name: str, given: str | None, pipe: str) -> str:
    """The file's format. Raises a usage error for a name that says it is packed: ``pipe`` is what to do instead."""
    path = Path(file_name)
    packer = PACKERS.get(path.suffix.lower())
    if packer is None:
        return records.format_of(file_name, given)
    instead = pipe.format(packer=packer, file=shlex.quote(file_name), format=records.format_of(path.stem, given))
    raise click.UsageError(f"{path.suffix} files are neither read nor written; pipe the data: {instead}")


def _file_name(ctx: click.Context, parameter: click.Parameter, typed: str) -> str:
    """A name that the system can look for. What was typed may be empty, and in the shell what no argument can be."""
    try:
        if typed and b"\0" not in os.fsencode(typed):
            return typed
    except UnicodeEncodeError:
        pass
    raise click.BadParameter(f"{typed!r} cannot be a file's name", ctx, parameter)


@click.command(
    "import",
    cls=Example,
    example="shardkv import --connect 127.0.0.1:7001 words.jsonl\nshardkv import --resume words.csv",
)
@click.argument("file_name", metavar="FILE", callback=_file_name)
@format_option
@resume_option
@connected
def import_(session: Session, file_name: str, given_format: str | None, resume: bool) -> None:
    """Put every key and value of FILE (- is stdin): JSON lines such as {"key":"a","value":"1"}, or CSV with a header.

    Bytes that are not UTF-8 come as key_base64 and value_base64.
    """
    file_format = _format_of(file_name, given_format, "{packer} -dc {file} | shardkv import - --format {format}")
    checkpoint = Checkpoint(file_name, {"command": "import", "format": file_format})
    if checkpoint.left_by() == "export":
        raise click.UsageError(f"{file_name} is an unfinished export; finish it with export --resume")
    with _open_input(session, file_name) as file:
        saved = checkpoint.load() if resume else None
        if resume and _is_stream(file_name):
            raise click.UsageError("a stream cannot be resumed; import from a file")
        start = saved or {"offset": 0, "line": 0, "count": 0, "fingerprint": _fingerprint(file, 0)}
        total = None if _is_stream(file_name) else os.fstat(file.fileno()).st_size
        if total is not None and total < start["offset"]:
            raise click.UsageError(f"{file_name} is shorter than it was; start anew without --resume")
        if start["offset"] and start["fingerprint"] != _fingerprint(file, start["offset"]):
            raise click.UsageError(
                f"{file_name} has changed before line {start['line'] + 1}, where the import is to carry on;"
                " start anew without --resume"
            )
        checkpoint.begin("import from stdin (-)", **start)
        with checkpoint.kept(count_min=1), Progress("import", unit="bytes", total=total) as progress:
            count = session.run(
                _importer(session, file, file_format, start=start, checkpoint=checkpoint, progress=progress)
            )
    click.echo(f"imported {text.counted(count, 'key')}", err=True)


def _importer(
    session: Session,
    file: BinaryIO,
    file_format: str,
    *,
    start: Mapping[str, Any],
    checkpoint: Checkpoint,
    progress: Progress,
) -> Any:
    async def body(client: Client) -> int:
        count: int = start["count"]
        batches = _batches(records.read_records(file, file_format, start["offset"], start["line"]))
        try:
            for batch, last in batches:
                await client.put_many(batch, timeout=session.timeout)
                count += len(batch)
                if checkpoint.path is not None:
                    fingerprint = _fingerprint(file, last.offset_after)
                    checkpoint.save(offset=last.offset_after, line=last.line, count=count, fingerprint=fingerprint)
                progress.update(last.offset_after, text.counted(count, "key"))
        except records.BadRecord as problem:
            raise click.UsageError(f"{problem} ({text.counted(count, 'key')} imported before it)") from None
        except BatchError as stopped:  # which advises a program that holds the pairs
            again = "run it again with --resume" if checkpoint.path is not None and count else "run it again"
            why = stopped.__cause__ or "a batch was not written"
            raise BatchError(
                f"the import stopped: {why}; {again}", consumed=stopped.consumed, failed=stopped.failed
            ) from stopped.__cause__
        return count

    return body


def _batches(
    found: Iterator[records.Record],
) -> Iterator[tuple[list[tuple[bytes, bytes]], records.Record]]:
    """Records in batches bounded in keys and bytes, each with its last record. A bad record ends them after the
    batch before it."""
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    last: records.Record | None = None
    problem: records.BadRecord | None = None
    while problem is None:
        try:
            record = next(found, None)
        except records.BadRecord as bad:
            problem, record = bad, None
        if record is not None:
            batch.append((record.key, record.value))
            size += len(record.key) + len(record.value)
            last = record
        if batch and last is not None and (record is None or len(batch) >= BATCH_KEYS_MAX or size >= BATCH_BYTES_MAX):
            yield batch, last
            batch, size = [], 0
        if record is None and problem is None:
            return
    raise problem


@contextlib.contextmanager
def _open_input(session: Session, file_name: str) -> Iterator[BinaryIO]:
    if file_name == "-":
        yield session.stdin()
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(file_name).open("rb"))
        except OSError as problem:
            raise click.UsageError(f"cannot read {file_name}: {problem.strerror}") from None
        yield file


def _fingerprint(file: BinaryIO, offset: int) -> str:
    """Tells whether what was imported still stands in the file, and ends where it did: its beginning, and what comes
    before ``offset``. The file is not moved."""
    if not offset:
        return ""
    size = min(offset, FINGERPRINT_BYTES_MAX)
    parts = (os.pread(file.fileno(), size, start) for start in (0, offset - size))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@click.command(
    cls=Example,
    example="shardkv export --connect 127.0.0.1:7001 all.jsonl\nshardkv export --prefix user/ users.csv --resume",
)
@click.argument("file_name", metavar="FILE", callback=_file_name)
@click.argument("start", default="")
@click.argument("end", required=False)
@click.option("--prefix", help="All keys that begin with this, instead of START and END.")
@format_option
@resume_option
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@base64_option
@connected
def export(
    session: Session,
    file_name: str,
    start: str,
    end: str | None,
    prefix: str | None,
    given_format: str | None,
    resume: bool,
    overwrite: bool,
    base64_text: bool,
) -> None:
    """Write every key from START to END with its value and version to FILE (- is stdout), as JSON lines or CSV."""
    file_format = _format_of(file_name, given_format, "shardkv export - --format {format} | {packer} > {file}")
    span = span_options(start, end, prefix, base64_text)
    if "prefix" in span:
        span = {"start": span["prefix"], "end": after_prefix(span["prefix"])}
    checkpoint = Checkpoint(
        file_name, {"command": "export", "format": file_format, "span": to_json(span, compact=True)}
    )
    saved = checkpoint.load() if resume else None
    is_new = not Path(file_name).exists()
    with _open_output(file_name, saved, resume, overwrite) as file:
        if saved is None:
            try:
                checkpoint.begin("export to stdout (-)", offset=0, last_key_hex=None, count=0)
            except click.UsageError:
                if is_new:
                    Path(file_name).resolve().unlink()  # nothing is in it, and the next export would not replace it
                raise
        if saved is None or not saved["offset"]:
            if checkpoint.path is not None:
                file.truncate(0)  # not before the note: where there can be none, what is there stays
            file.write(records.write_header(file_format))
        elif saved["last_key_hex"] is not None:
            start_after = _least_above(bytes.fromhex(saved["last_key_hex"]))
            span |= {"limit": 0} if start_after is None else {"start": start_after}
        with checkpoint.kept(), Progress("export") as progress:
            count = session.run(
                _exporter(session, file, file_format, span=span, saved=saved, checkpoint=checkpoint, progress=progress)
            )
    click.echo(f"exported {text.counted(count, 'key')}", err=True)


def _exporter(
    session: Session,
    file: BinaryIO,
    file_format: str,
    *,
    span: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Any:
    async def body(client: Client) -> int:
        count = saved["count"] if saved else 0
        async with client.scan(**span, timeout=session.timeout) as entries:
            async for entry in entries:
                file.write(records.write_record(file_format, entry.key, entry.value, entry.version))
                count += 1
                if count % BATCH_KEYS_MAX == 0:
                    _sync(file, checkpoint)
                    if checkpoint.path is not None:
                        checkpoint.save(offset=file.tell(), last_key_hex=entry.key.hex(), count=count)
                    progress.update(count)
        _sync(file, checkpoint)
        return count

    return body


def _least_above(key: bytes) -> bytes | None:
    """The least key above ``key``, None if there is none: no key has a byte more than the longest ones."""
    return key + b"\x00" if len(key) < KEY_BYTES_MAX else after_prefix(key)


def _sync(file: BinaryIO, checkpoint: Checkpoint) -> None:
    """Before a checkpoint, and before it goes: what it speaks of must be in the file whatever happens next."""
    file.flush()
    if checkpoint.path is not None:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _open_output(file_name: str, saved: Mapping[str, Any] | None, resume: bool, overwrite: bool) -> Iterator[BinaryIO]:
    if file_name == "-":
        if resume:
            raise click.UsageError("stdout cannot be resumed; export to a file")
        yield sys.stdout.buffer
        return
    path = Path(file_name)
    if saved is not None:
        with _named(path), _opened(path, "r+b") as file:
            if file.seek(0, os.SEEK_END) < saved["offset"]:
                raise click.UsageError(f"{file_name} is shorter than it was; export it anew with --overwrite")
            file.truncate(saved["offset"])
            file.seek(saved["offset"])
            yield file
        return
    if path.exists() and not path.is_dir() and not overwrite:
        why = " and there is nothing to resume" if resume else ""
        raise click.UsageError(f"{file_name} exists{why}; give --overwrite to replace it")
    with _named(path), _opened(path, "r+b" if path.is_file() else "wb") as file:
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system says of an open file does not name it."""
    try:
        yield
    except BrokenPipeError:  # whose reader has gone, which is no news
        raise
    except OSError as problem:
        if problem.filename is not None:
            raise  # it is about that file, the note of the progress
        raise OSError(f"cannot write {path}: {problem.strerror or problem}") from problem


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, path.open(mode))
    except OSError as problem:
        raise click.UsageError(f"cannot write {path}: {problem.strerror}; name another file") from None
