"""The published data-driven files of etcd-io/raft, replayed; and the runner's own ability to see a difference."""

from pathlib import Path

import pytest

from tests.conformance import etcd_raft
from tests.conformance.datadriven import parse_file

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "etcd-raft"
FILES = etcd_raft.data_files([DATA]) if DATA.is_dir() else []

SAMPLE = """
add-nodes 1 voters=(1) index=3
----
INFO 1 switched to configuration voters=(1)

# A comment.
campaign 1
----
ok

stabilize
----
> 1 handling Ready
  Ready MustSync=true:
  Lead:0 State:StateCandidate
  HardState Term:1 Vote:1 Commit:3
  INFO 1 became leader at term 1
> 1 handling Ready
  Ready MustSync=true:
  Lead:1 State:StateLeader
  Entries:
  1/4 EntryNormal ""
> 1 handling Ready
  Ready MustSync=false:
  HardState Term:1 Vote:1 Commit:4
  CommittedEntries:
  1/4 EntryNormal ""

propose 1 "x"
----
ok
"""


@pytest.mark.skipif(not FILES, reason=f"the published files are not at {DATA}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_published_file_replays_to_the_letter(path: Path) -> None:
    """etcd-io/raft: testdata, quorum/testdata and confchange/testdata."""
    difference = etcd_raft.replay(path)
    assert difference is None, str(difference)


def test_the_runner_matches_what_it_should_and_leaves_only_log_lines_out(tmp_path: Path) -> None:
    """A log line is no part of the comparison; the lines around it are."""
    file = tmp_path / "sample.txt"
    file.write_text(SAMPLE)
    assert etcd_raft.replay(file) is None


@pytest.mark.parametrize(
    "published,changed,line",
    [
        ("Lead:1 State:StateLeader", "Lead:1 State:StateFollower", 11),
        ("MustSync=false", "MustSync=true", 11),
        ("  Entries:\n", "", 11),
        ('propose 1 "x"\n----\nok', "propose 1 x\n----\nraft proposal dropped", 29),
        ("campaign 1", "no-such-command 1", 7),
    ],
)
def test_the_runner_names_the_first_difference(tmp_path: Path, published: str, changed: str, line: int) -> None:
    """A suite that could not fail would prove nothing."""
    file = tmp_path / "sample.txt"
    assert published in SAMPLE
    file.write_text(SAMPLE.replace(published, changed))
    difference = etcd_raft.replay(file)
    assert difference is not None
    assert difference.case.line == line
    assert str(file) in str(difference)


def test_the_exit_code_tells_whether_every_file_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 only when all do; 2 for a path that is not there."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(SAMPLE)
    assert etcd_raft.main([str(good)]) == 0
    assert capsys.readouterr().out.endswith("1 of 1 files match\n")
    bad.write_text(SAMPLE.replace("StateLeader", "StateFollower"))
    assert etcd_raft.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 files match\n")
    assert etcd_raft.main([str(tmp_path / "absent.txt")]) == 2


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"hello world\n", b"\x93\xfa\x00"])
def test_a_file_that_is_not_of_the_format_does_not_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """An empty one was said to match, and another ended in a traceback before the files behind it."""
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(content)
    assert etcd_raft.main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in shown[:2]] == ["is no data-driven file"] * 2
    assert shown[2] == "0 of 2 files match"


def test_the_parser_reads_every_form_of_the_format(tmp_path: Path) -> None:
    """cockroachdb/datadriven: comments, continued lines, input, values in parentheses, doubled dashes."""
    file = tmp_path / "forms.txt"
    file.write_text(
        "# a\n\nfirst 1 \\\n  key=value both=(a, b) none=()\nin\nput\n"
        "----\n----\none\n\ntwo\n----\n----\n\nlast\n----\nok\n"
    )
    first, last = parse_file(file)
    assert (first.line, first.command, first.input, first.expected) == (3, "first", "in\nput", "one\n\ntwo")
    assert [(argument.key, argument.values) for argument in first.arguments] == [
        ("1", ()),
        ("key", ("value",)),
        ("both", ("a", "b")),
        ("none", ()),
    ]
    assert (last.line, last.command, last.arguments, last.input, last.expected) == (15, "last", (), "", "ok")
