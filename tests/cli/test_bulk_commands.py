"""import and export: formats, resuming, and what is refused. Against a fake client and real files."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardkv import errors
from shardkv.cli import bulk, records
from shardkv.types import KEY_BYTES_MAX
from shardkv_client.limits import check_span
from tests.cli.fakes import FakeScan, World, world

__all__ = ["world"]

JSON_LINE = '{"key":"a","value":"1"}\n'
PAIRS = st.lists(st.tuples(st.binary(min_size=1), st.binary()), min_size=1, max_size=20)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BATCH_KEYS_MAX", 3)


@pytest.mark.parametrize("file_format", records.FORMATS)
@example(pairs=[(b"\r", b"a\rb"), (b"\n", b'"'), (b",", b"\r\n")])
@given(pairs=PAIRS)
def test_any_bytes_survive_both_formats(file_format: str, pairs: list[tuple[bytes, bytes]]) -> None:
    """DESIGN 2.2: a field that is not UTF-8 is renamed with _base64."""
    import io

    lines = [records.write_record(file_format, key, value, 7) for key, value in pairs]
    file = io.BytesIO(records.write_header(file_format) + b"".join(lines))
    found = list(records.read_records(file, file_format))
    assert [(record.key, record.value) for record in found] == pairs
    for index, record in enumerate(found):
        rest = list(records.read_records(file, file_format, record.offset_after, record.line))
        assert [(each.key, each.value) for each in rest] == pairs[index + 1 :]


@pytest.mark.parametrize("name", ["all.jsonl", "all.csv"])
def test_what_was_exported_can_be_imported(world: World, tmp_path: Path, name: str) -> None:
    for number in range(10):
        world.client.set(b"k%02d" % number, bytes([number, 255 - number]))
    before = dict(world.client.data)
    path = tmp_path / name
    result = world.run("export", str(path))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "exported 10 keys" in result.stderr
    world.client.data.clear()
    assert world.run("import", str(path)).exit_code == 0
    assert {key: entry.value for key, entry in world.client.data.items()} == {
        key: entry.value for key, entry in before.items()
    }
    assert not list(tmp_path.glob("*.progress*"))


def test_an_export_that_says_it_is_done_is_on_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is left to carry on from."""
    for number in range(10):
        world.client.set(b"k%02d" % number, b"v")
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(bulk.os, "fsync", noted)
    path = tmp_path / "all.jsonl"
    assert world.run("export", str(path)).exit_code == 0
    assert path.stat().st_size in synced


def test_an_export_is_json_lines_in_order_and_of_the_span(world: World) -> None:
    for key in (b"a", b"b1", b"b2", b"c\xff"):
        world.client.set(key, b"v")
    result = world.run("export", "-", "b1")
    assert [json.loads(line) for line in result.stdout.splitlines()][-1] == {
        "key_base64": "Y/8=",
        "value": "v",
        "version": str(world.client.version),
    }
    assert [json.loads(line)["key"] for line in world.run("export", "-", "--prefix", "b").stdout.splitlines()] == [
        "b1",
        "b2",
    ]


def test_an_interrupted_import_carries_on_where_it_stopped(world: World, tmp_path: Path) -> None:
    """DESIGN 2.2: import and export can resume."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(records.write_record("jsonl", b"k%d" % number, b"v", 1) for number in range(10)))
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 2
    stopped = world.run("import", str(path))
    assert stopped.exit_code == 3
    assert f"how far it came is noted in {path}.progress; with --resume the same command carries on" in stopped.stderr
    assert len(world.client.data) == 6
    world.client.fail = None
    world.client.batches.clear()
    result = world.run("import", str(path), "--resume")
    assert result.exit_code == 0
    assert [key for batch in world.client.batches for key, _ in batch] == [b"k6", b"k7", b"k8", b"k9"]
    assert "imported 10 keys" in result.stderr
    assert not list(tmp_path.glob("*.progress*"))


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_an_interrupted_export_carries_on_where_it_stopped(world: World, tmp_path: Path, file_format: str) -> None:
    for number in range(10):
        world.client.set(b"k%d" % number, b"v\n%d" % number)
    whole, path = tmp_path / f"whole.{file_format}", tmp_path / f"out.{file_format}"
    assert world.run("export", str(whole)).exit_code == 0
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 7
    assert world.run("export", str(path)).exit_code == 3
    assert json.loads(path.with_name(path.name + ".progress").read_text())["count"] == 6
    with path.open("ab") as file:
        file.write(b"torn" * 100)
    world.client.fail = None
    assert world.run("export", str(path), "--resume").exit_code == 0
    assert path.read_bytes() == whole.read_bytes()


def test_an_export_that_was_interrupted_at_a_longest_key_carries_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client takes no bound longer than a key may be."""
    scan = world.client.scan

    def checking(start: bytes = b"", end: bytes | None = None, **options: Any) -> FakeScan:
        check_span(start, end)
        return scan(start, end, **options)

    monkeypatch.setattr(world.client, "scan", checking)
    for key in (b"a", b"aa", b"b" * KEY_BYTES_MAX, b"c"):
        world.client.set(key, b"v")
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert world.run("export", str(whole)).exit_code == 0
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 3
    assert world.run("export", str(path)).exit_code == 3
    world.client.fail = None
    progress = path.with_name(path.name + ".progress")
    saved = progress.read_text()
    assert world.run("export", str(path), "--resume").exit_code == 0
    assert path.read_bytes() == whole.read_bytes()
    progress.write_text(saved.replace("62" * KEY_BYTES_MAX, "ff" * KEY_BYTES_MAX))
    assert world.run("export", str(path), "--resume").exit_code == 0  # there is nothing behind that key
    assert len(path.read_bytes().splitlines()) == 3


def test_what_a_checkpoint_speaks_of_is_in_the_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed flushes nothing; filling the file up with zeros would not bring it back."""
    for number in range(10):
        world.client.set(b"k%d" % number, b"v")
    path = tmp_path / "out.csv"
    sizes: list[tuple[int, int]] = []
    save = bulk.Checkpoint.save

    def measure(checkpoint: bulk.Checkpoint, **state: Any) -> None:
        sizes.append((path.stat().st_size, state["offset"]))
        save(checkpoint, **state)

    monkeypatch.setattr(bulk.Checkpoint, "save", measure)
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 7
    assert world.run("export", str(path)).exit_code == 3
    assert len(sizes) == 3
    assert all(size == offset for size, offset in sizes), sizes
    path.write_bytes(b"")
    refused = world.run("export", str(path), "--resume")
    assert refused.exit_code == 2
    assert "shorter" in refused.stderr
    assert path.read_bytes() == b""


def test_an_export_that_failed_before_its_first_batch_starts_anew_on_resume(world: World, tmp_path: Path) -> None:
    world.client.set(b"a", b"1")
    path = tmp_path / "out.jsonl"
    world.client.fail = errors.Unavailable("down")
    assert world.run("export", str(path)).exit_code == 3
    world.client.fail = None
    assert world.run("export", str(path), "--resume").exit_code == 0
    assert len(path.read_text().splitlines()) == 1


def test_an_import_that_cannot_note_its_progress_says_so_before_it_writes_a_key(world: World, tmp_path: Path) -> None:
    """In a directory that is read-only, say; here the name of the progress file is too long."""
    path = tmp_path / f"{'words':w<245}.jsonl"
    path.write_text('{"key":"a","value":"1"}\n')
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert "import from stdin" in result.stderr
    assert world.client.data == {}


@pytest.mark.parametrize("content", ["nonsense\n", '{"key":"a","value":"1"}\n'], ids=["a bad record", "no cluster"])
def test_an_import_that_took_nothing_leaves_nothing_to_carry_on(world: World, tmp_path: Path, content: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    world.client.fail = errors.Unavailable("down")
    result = world.run("import", str(path))
    assert result.exit_code == (2 if content == "nonsense\n" else 3)
    assert "--resume" not in result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_error_has_the_exit_code_of_its_cause(world: World, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"key":"a","value":"1"}\n')
    for cause, code in [(errors.Unavailable("x"), 3), (errors.OutcomeUnknown("x"), 4), (errors.Conflict("x"), 1)]:
        error = errors.BatchError("stopped", consumed=1, failed=(b"a",))
        error.__cause__ = cause
        world.client.fail = error
        assert world.run("import", str(path)).exit_code == code


def test_what_an_import_advises_is_for_whoever_typed_it(world: World, tmp_path: Path) -> None:
    """It was what the API advises: to put the failed keys again, and to go on after the pairs consumed."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(records.write_record("jsonl", b"k%d" % number, b"v", 1) for number in range(10)))
    world.client.fail = errors.BatchError("put those again, then go on", consumed=3, failed=(b"k3",))
    world.client.fail.__cause__ = errors.Unavailable("no leader")
    told = "Error: the import stopped: no leader; run it again{} (BatchError)\n"
    assert told.format("") in world.run("import", str(path)).stderr
    world.client.fail_after = 2
    assert told.format(" with --resume") in world.run("import", str(path)).stderr
    world.client.batches.clear()
    assert told.format("") in world.run("import", "-", input=path.read_bytes()).stderr


def test_resuming_something_else_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [records.write_record("jsonl", b"k%d" % number, b"v", 1) for number in range(10)]
    path.write_bytes(b"".join(lines))
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 1
    world.run("import", str(path))
    world.client.fail = None
    assert "format" in world.run("import", str(path), "--resume", "--format", "csv").stderr
    path.write_bytes(b"".join(reversed(lines)))
    result = world.run("import", str(path), "--resume")
    assert result.exit_code == 2
    assert "has changed before line 4, where the import is to carry on; start anew" in result.stderr


@pytest.mark.parametrize("edited", [b"k001", b"k500", b"k999"], ids=["the first", "some", "the last"])
def test_a_file_that_was_edited_where_it_is_imported_is_not_carried_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: bytes
) -> None:
    """The place noted was amid a line then: a record was lost, or a key imported that nobody wrote. Only the first
    4 KiB were compared."""
    monkeypatch.setattr(bulk, "BATCH_KEYS_MAX", 1_000)
    path = tmp_path / "in.csv"
    content = b"key,value\n" + b"".join(b"k%03d,v\n" % number for number in range(1_000)) + b"bad\n"
    path.write_bytes(content)
    assert world.run("import", str(path)).exit_code == 2
    path.write_bytes(content.replace(edited + b",v\n", edited + b",longer\n").replace(b"bad", b"z,1"))
    result = world.run("import", str(path), "--resume")
    assert result.exit_code == 2
    assert "in.csv has changed before line 1002" in result.stderr
    assert len(world.client.data) == 1_000


@pytest.mark.parametrize("records_before", [3, 3_000])
def test_what_stands_behind_the_place_noted_may_be_corrected_before_the_import_is_resumed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records_before: int
) -> None:
    """The message about a bad record invites to it. In a short file that was refused as another file."""
    monkeypatch.setattr(bulk, "BATCH_KEYS_MAX", 1_000)
    path = tmp_path / "in.csv"
    content = b"key,value\n" + b"".join(b"k%04d,v\n" % number for number in range(records_before))
    path.write_bytes(content + b"bad\nz,1\n")
    refused = world.run("import", str(path))
    assert (refused.exit_code, len(world.client.data)) == (2, records_before)
    path.write_bytes(content + b"good,1\nz,1\nappended,1\n")
    world.client.batches.clear()
    assert world.run("import", str(path), "--resume").exit_code == 0
    assert world.client.batches == [[(b"good", b"1"), (b"z", b"1"), (b"appended", b"1")]]


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_an_unfinished_export_is_not_imported(world: World, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A part of it was imported with success, and how far the export came was forgotten."""
    for number in range(10):
        world.client.set(b"k%d" % number, b"v")
    path = tmp_path / "all.jsonl"
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 7
    assert world.run("export", str(path)).exit_code == 3
    world.client.fail = None
    refused = world.run("import", str(path), *options)
    assert refused.exit_code == 2
    assert "all.jsonl is an unfinished export; finish it with export --resume" in refused.stderr
    assert world.run("export", str(path), "--resume").exit_code == 0
    assert world.run("import", str(path)).exit_code == 0


def test_an_import_does_not_carry_on_in_a_file_that_has_become_shorter(world: World, tmp_path: Path) -> None:
    """It would find nothing behind the place noted, and say that all is imported."""
    path = tmp_path / "in.jsonl"
    lines = [records.write_record("jsonl", b"k%03d" % number, b"v" * 1_000, 1) for number in range(10)]
    path.write_bytes(b"".join(lines))
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 2
    assert world.run("import", str(path)).exit_code == 3
    world.client.fail = None
    path.write_bytes(b"".join(lines[:5]))  # its beginning, by which it is known again, is the same
    result = world.run("import", str(path), "--resume")
    assert result.exit_code == 2
    assert "shorter than it was" in result.stderr


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_damaged_note_of_the_progress_is_wrong_usage(world: World, tmp_path: Path, command: str) -> None:
    path = tmp_path / "some.jsonl"
    progress = path.with_name("some.jsonl.progress")
    for number in range(10):
        world.client.set(b"k%d" % number, b"v")
    if command == "import":
        assert world.run("export", str(path)).exit_code == 0
    world.client.fail, world.client.fail_after = errors.Unavailable("no leader"), 2 if command == "import" else 7
    assert world.run(command, str(path)).exit_code == 3
    world.client.fail = None
    saved = json.loads(progress.read_bytes())
    state = {"offset", "count", *(("line", "fingerprint") if command == "import" else ("last_key_hex",))}
    damaged: list[object] = [[], None, 7, *({**saved, name: -1} for name in state)]
    damaged += [{other: saved[other] for other in saved if other != name} for name in state]
    damaged += [{**saved, "last_key_hex": "6g"}] if command == "export" else []
    for content in ("", "{", "[" * 100_000, *map(json.dumps, damaged)):
        progress.write_text(content)
        result = world.run(command, str(path), "--resume")
        assert f"{progress} is damaged; remove it to start anew" in result.stderr, content
        assert result.exit_code == 2
    progress.unlink()
    progress.mkdir()
    result = world.run(command, str(path), "--resume")
    assert f"{progress} is damaged; remove it to start anew" in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_command_that_cannot_note_its_progress_says_how_to_do_without(
    world: World, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "all.jsonl"
    if command == "import":
        path.touch()
    (tmp_path / "all.jsonl.progress").mkdir()
    result = world.run(command, str(path))
    assert result.exit_code == 2
    assert f"the progress cannot be noted in {path}.progress: Is a directory; {command}" in result.stderr
    assert "(-) to do without" in result.stderr
    assert path.exists() == (command == "import"), "a file that the next export must not replace"


def test_an_export_that_cannot_note_its_progress_leaves_a_link_to_nothing_as_it_was(
    world: World, tmp_path: Path
) -> None:
    path, target = tmp_path / "all.jsonl", tmp_path / "elsewhere"
    path.symlink_to(target)
    (tmp_path / "all.jsonl.progress").mkdir()
    assert world.run("export", str(path)).exit_code == 2
    assert path.is_symlink()
    assert not target.exists()


def test_an_export_that_cannot_note_its_progress_replaces_nothing(world: World, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("precious")
    (tmp_path / "all.jsonl.progress").mkdir()
    assert world.run("export", str(path), "--overwrite").exit_code == 2
    assert path.read_text() == "precious"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_export_that_ended_before_it_replaced_the_file_can_be_resumed(
    world: World, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the note and the first byte."""
    world.run("put", "a", "1")
    path, whole = tmp_path / f"all.{suffix}", tmp_path / f"whole.{suffix}"
    path.write_text("something else that is longer than the header and the only record, by far" * 9)

    def killed(file_format: str) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shardkv.cli.records.write_header", killed)
        assert world.run("export", str(path), "--overwrite").exit_code == 130
    assert world.run("export", str(path), "--resume").exit_code == 0
    assert world.run("export", str(whole)).exit_code == 0
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("command", ["import", "export"])
def test_an_empty_name_is_no_file(world: World, command: str) -> None:
    """Such as that of a variable which is not set. An export said that it exists, which is the directory it is in."""
    for result in (world.run(command, ""), world.run("shell", "-c", f"{command} ''")):
        assert result.exit_code == 2
        assert "'' cannot be a file's name" in result.stderr


def test_an_export_does_not_replace_a_file_unless_told(world: World, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    for arguments in ([], ["--resume"]):
        result = world.run("export", str(path), *arguments)
        assert result.exit_code == 2
        assert "give --overwrite to replace it" in result.stderr
        assert path.read_text() == "precious"
    assert world.run("export", str(path), "--overwrite").exit_code == 0
    assert path.read_text() == ""


def test_streams_cannot_be_resumed(world: World) -> None:
    assert world.run("import", "-", "--resume", input="").exit_code == 2
    assert world.run("export", "-", "--resume").exit_code == 2


def test_an_import_reads_stdin(world: World) -> None:
    assert world.run("import", "-", input='{"key":"a","value":"1"}\n\n').exit_code == 0
    assert {key: entry.value for key, entry in world.client.data.items()} == {b"a": b"1"}


@pytest.mark.parametrize(
    "file_format, content", [("csv", '"key",value\r\na,1\r\n'), ("jsonl", JSON_LINE), ("jsonl", "")]
)
def test_an_import_passes_over_a_byte_order_mark(world: World, file_format: str, content: str) -> None:
    """As programs on Windows write it."""
    assert world.run("import", "-", "--format", file_format, input="\ufeff" + content).exit_code == 0
    assert list(world.client.data) == ([b"a"] if content else [])


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_an_import_reads_a_pipe(world: World, file_format: str) -> None:
    """As a shell hands it over for `<(zcat all.jsonl.gz)`."""
    reader, writer = os.pipe()
    try:
        with open(writer, "wb") as file:
            file.write(records.write_header(file_format) + records.write_record(file_format, b"a", b"1", 7))
        name = f"/dev/fd/{reader}"
        assert world.run("import", name, "--resume", "--format", file_format).exit_code == 2
        assert world.run("import", name, "--format", file_format).exit_code == 0
    finally:
        os.close(reader)
    assert world.client.data[b"a"].value == b"1"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"key":"a","value":"1"}\n{"key":"b"}\n', "line 2: a record needs"),
        ("a.jsonl", b'{"key":"a","value":"1"}\nnonsense\n', "line 2: not JSON"),
        ("a.jsonl", b'{"key":"a","value":"1"}\n[1]\n', "line 2: a record must be an object"),
        ("a.jsonl", b'{"key":"a","value":"1"}\n{"key":"b","value":3}\n', "line 2: value must be text"),
        ("a.jsonl", b'{"key":"a","value":"1"}\n{"key":"","value":""}\n', "line 2: a record needs a key"),
        ("a.jsonl", b'{"key":"a","value":"1"}\n\xff\n', "line 2: not UTF-8"),
        (
            "a.jsonl",
            b'{"key":"a","value":"1"}\n{"key":"%s","value":""}\n' % (b"k" * 4097),
            "line 2: a key may have 4096",
        ),
        ("a.csv", b"key,value\na,1\nb,%s\n" % (b"v" * (1048576 + 1)), "line 3: a value may have 1048576"),
        ("a.csv", b"key,value\na,1\nb\n", "line 3: 1 fields under a header of 2"),
        ("a.csv", b'key,value\na,1\n"b,2\n', "line 3: not CSV"),
        ("a.csv", b"key_base64,value\nYQ==,1\n?,2\n", "line 3:"),
        (
            "a.jsonl",
            b'{"key":"a","value":"1"}\n{"key":"b","key_base64":"Yw==","value":"1"}\n',
            "line 2: give key or key_base64, not both",
        ),
        (
            "a.jsonl",
            b'{"key":"a","value":"1"}\n{"key":"b","value":"","value_base64":"Yw=="}\n',
            "line 2: give value or value_base64, not both",
        ),
        ("a.csv", b"key,key_base64,value\na,,1\nb,Yw==,1\n", "line 3: give key or key_base64, not both"),
        ("a.csv", b"key,value,value_base64\na,1,\nb,2,Yw==\n", "line 3: give value or value_base64, not both"),
        (
            "a.csv",
            b"key,value\na,1\nb,2\rc,3\n",
            "line 3: not CSV: a CR without LF ends no line; end lines in LF or CRLF",
        ),
    ],
    ids=range(16),
)
def test_a_bad_record_is_named_by_its_line_after_those_before_it_are_imported(
    world: World, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "(1 key imported before it)" in result.stderr
    assert list(world.client.data) == [b"a"]


def test_a_csv_file_without_a_header_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,1\nb,2\n")
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert "header" in result.stderr
    assert world.run("import", str(tmp_path / "absent")).exit_code == 2


@pytest.mark.parametrize("twice", records.COLUMNS)
def test_a_csv_header_that_names_a_column_twice_is_refused(world: World, tmp_path: Path, twice: str) -> None:
    """One of the two was taken, and the other forgotten. Columns that no record has may be there more than once."""
    path = tmp_path / "a.csv"
    path.write_text(f"key,value,{twice},{twice}\na,1,YQ==,YQ==\n")
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert f"line 1: the header names {twice} more than once" in result.stderr
    assert not world.client.data
    path.write_text("key,value,,\na,1,,\n")
    assert world.run("import", str(path)).exit_code == 0


@pytest.mark.parametrize("twice", records.COLUMNS)
def test_a_json_record_that_names_a_field_twice_is_refused(world: World, tmp_path: Path, twice: str) -> None:
    """The last was taken, and the other forgotten. What no record has may be there more than once, as may what is
    deeper than the record's own fields."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"key":"a","value":"1","' + twice + '":"YQ==","' + twice + '":"YQ=="}\n')
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert f"line 1: the record names {twice} more than once" in result.stderr
    assert not world.client.data
    path.write_text('{"key":"a","value":"1","note":{"key":1,"key":2},"note":0}\n')
    assert world.run("import", str(path)).exit_code == 0


@pytest.mark.parametrize(
    "header, lacking",
    [("key, value", "value"), ("a,value_base64", "key"), ("a;b", "key and value"), ("", "key and value")],
)
def test_a_csv_header_that_lacks_a_column_is_told_at_its_line(
    world: World, tmp_path: Path, header: str, lacking: str
) -> None:
    """`key, value` was told at line 2, where a value was said to be missing that stood there."""
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\na,1\n")
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert f"line 1: the header lacks {lacking}; a CSV file starts with one such as key,value" in result.stderr


def test_a_csv_file_with_lines_that_end_in_cr_is_refused_in_words_of_its_own(world: World, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("key,value\ra,1\r")
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert "line 1: not CSV: a CR without LF ends no line; end lines in LF or CRLF" in result.stderr


@pytest.mark.parametrize("ending, packer", [("gz", "gzip"), ("ZST", "zstd"), ("bz2", "bzip2"), ("xz", "xz")])
def test_the_name_of_a_packed_file_is_refused_with_the_pipe_that_does_it(
    world: World, tmp_path: Path, ending: str, packer: str
) -> None:
    """An export wrote JSON lines into all.csv.gz, unpacked; an import said that line 1 is not UTF-8."""
    path = tmp_path / f"it's all.csv.{ending}"
    quoted = shlex.quote(str(path))
    result = world.run("export", str(path))
    assert (result.exit_code, path.exists()) == (2, False)
    assert f"shardkv export - --format csv | {packer} > {quoted}" in result.stderr
    result = world.run("import", str(path), "--format", "jsonl")
    assert result.exit_code == 2
    assert f"{packer} -dc {quoted} | shardkv import - --format jsonl" in result.stderr


@pytest.mark.parametrize("file_format", records.FORMATS)
def test_a_file_without_line_ends_is_not_read_into_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    monkeypatch.setattr(records, "LINE_BYTES_MAX", 1000)
    path = tmp_path / f"in.{file_format}"
    path.write_bytes(records.write_header(file_format) + records.write_record(file_format, b"a", b"1", 7))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(1001))
    result = world.run("import", str(path))
    assert result.exit_code == 2
    assert f"line {whole.count(10) + 1}: longer than 1,000 bytes" in result.stderr
    assert list(world.client.data) == [b"a"]


@pytest.mark.parametrize("count", [1, 5_000])
def test_an_export_that_finds_no_room_names_the_file(world: World, count: int) -> None:
    """Whether a write says so, or the flush of what was buffered."""
    for number in range(count):
        world.client.set(b"%d" % number, b"v" * 100)
    result = world.run("export", "/dev/full", "--overwrite")
    assert result.exit_code == 1
    assert result.stderr == "Error: cannot write /dev/full: No space left on device (OSError)\n"


def test_an_export_that_is_resumed_and_finds_no_room_names_the_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.jsonl"
    world.client.fail = errors.Unavailable("down")
    assert world.run("export", str(path)).exit_code == 3
    world.client.fail = None

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = world.run("export", str(path), "--resume")
    assert result.exit_code == 1
    assert f"Error: cannot write {path}: No space left on device (OSError)\n" in result.stderr
    assert path.with_name("all.jsonl.progress").exists()


def test_an_export_whose_note_cannot_be_removed_names_the_note(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole."""
    world.client.set(b"a", b"1")
    path = tmp_path / "all.jsonl"

    def refused(note: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(note))

    monkeypatch.setattr(Path, "unlink", refused)
    result = world.run("export", str(path))
    assert result.exit_code == 1
    assert f"Permission denied: '{path}.progress'" in result.stderr
    assert "cannot write" not in result.stderr


def test_an_export_to_a_pipe_whose_reader_goes_ends_silently(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one to stdout does."""
    world.client.set(b"a", b"1")
    reader, writer = os.pipe()

    def gone(file_format: str) -> bytes:
        os.close(reader)
        return b""

    monkeypatch.setattr(records, "write_header", gone)
    try:
        result = world.run("export", f"/dev/fd/{writer}", "--overwrite")
    finally:
        os.close(writer)
    assert (result.exit_code, result.stderr) == (1, "")


def test_a_file_that_cannot_be_written_is_wrong_usage(world: World, tmp_path: Path) -> None:
    for name, why in ((tmp_path / "absent" / "out.jsonl", "No such file or directory"), (tmp_path, "Is a directory")):
        for options in (["--overwrite"], [], ["--resume"]):
            result = world.run("export", str(name), *options)
            assert result.exit_code == 2
            assert f"cannot write {name}: {why}; name another file" in result.stderr
