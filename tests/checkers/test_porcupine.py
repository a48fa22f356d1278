"""The published histories, each judged as published; and the command that judges them, on histories of our own."""

from pathlib import Path

import pytest

from shardkv.simulation.checkers.linearizability import Verdict
from tests.checkers import porcupine

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "porcupine"
FILES = porcupine.history_files([DATA]) if DATA.is_dir() else []
KEY_STEPS_MAX = 400_000
"""Five keys of the largest store history take over a million steps each; its verdict needs only one that fails."""

REGISTER_GOOD = """INFO  jepsen.util - 0\t:invoke\t:write\t1
INFO  jepsen.util - 1\t:invoke\t:read\tnil
INFO  jepsen.util - 0\t:ok\t:write\t1
INFO  jepsen.util - 1\t:ok\t:read\tnil
INFO  jepsen.util - 1\t:invoke\t:cas\t[1 2]
INFO  jepsen.util - 1\t:info\t:cas\t:timed-out
INFO  jepsen.util - 0\t:invoke\t:cas\t[3 4]
INFO  jepsen.util - 0\t:fail\t:cas\t[3 4]
INFO  jepsen.util - 2\t:invoke\t:read\tnil
INFO  jepsen.util - 2\t:fail\t:read\t:timed-out
INFO  jepsen.util - 0\t:invoke\t:read\tnil
INFO  jepsen.util - 0\t:ok\t:read\t2
"""


@pytest.mark.skipif(not FILES, reason=f"the published histories are not at {DATA}")
def test_every_published_verdict_is_ours() -> None:
    """Issue: all 102 verdicts of the Jepsen histories and the six of the store."""
    assert len(FILES) == 108
    differing = []
    for path in FILES:
        case = porcupine.read_case(path)
        if case.judge(KEY_STEPS_MAX).verdict is not case.expected:
            differing.append(path.name)
    assert not differing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "expected.tsv").write_text("good\tlinearizable\nbad\tnot-linearizable\n")
    (tmp_path / "good.log").write_text(REGISTER_GOOD)
    (tmp_path / "bad.log").write_text(REGISTER_GOOD.replace(":read\t2", ":read\t4"))
    (tmp_path / "unjudged.log").write_text(REGISTER_GOOD)
    return tmp_path


def test_the_command_says_for_each_file_whether_it_matches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert porcupine.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "good.log: match (linearizable" in out
    assert "bad.log: match (not-linearizable" in out
    assert "2 of 2 verdicts match" in out
    assert "unjudged" not in out


def test_the_command_fails_when_a_verdict_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "expected.tsv").write_text("good\tnot-linearizable\nbad\tnot-linearizable\n")
    assert porcupine.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "good.log: differ, published as not-linearizable" in out
    assert "1 of 2 verdicts match" in out


def test_the_command_explains_what_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert porcupine.main(["--explain", str(folder / "bad.log")]) == 0
    assert "read -> 4" in capsys.readouterr().out


def test_the_command_refuses_what_is_no_history(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert porcupine.main([]) == 2
    assert porcupine.main([str(folder / "absent.log")]) == 2
    (folder / "good.log").write_text("something else\n")
    with pytest.raises(ValueError, match="line 1"):
        porcupine.read_case(folder / "good.log")
    with pytest.raises(ValueError, match="no verdict for unjudged"):
        porcupine.read_case(folder / "unjudged.log")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"", "its name says no verdict"),
        ("a-ok.txt", b"hello\n", "line 1 is none of the store's"),
        ("a-ok.txt", b'{:process 3, :type :ok, :f :get, :key "a", :value nil}\n', "line 1 answers a call"),
        ("good.log", b"\x93\xfa\x00", "can't decode"),
        ("good.log", b"INFO  jepsen.util - 4\t:ok\t:read\t1\n", "line 1 answers a call"),
    ],
)
def test_the_command_goes_on_behind_a_file_that_is_no_history(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, why: str
) -> None:
    (folder / name).write_bytes(content)
    assert porcupine.main([str(folder / name), str(folder / "bad.log")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert "is no history with a published verdict" in shown[0]
    assert why in shown[0]
    assert shown[1].startswith("bad.log: match")


STORE = """{:process 0, :type :invoke, :f :append, :key "a", :value "x"}
{:process 0, :type :ok, :f :append, :key "a", :value "x"}
{:process 1, :type :invoke, :f :put, :key "b", :value "z"}
{:process 0, :type :invoke, :f :get, :key "a", :value nil}
{:process 0, :type :ok, :f :get, :key "a", :value "x"}
"""


def test_a_store_history_is_judged_key_by_key(tmp_path: Path) -> None:
    for name, text in (
        ("c-ok.txt", STORE),
        ("c-bad.txt", STORE.replace(':get, :key "a", :value "x"', ':get, :key "a", :value ""')),
    ):
        path = tmp_path / name
        path.write_text(text)
        case = porcupine.read_case(path)
        found = case.judge()
        assert found.verdict is case.expected
        assert {each.key: each.verdict for each in found.findings}["b"] is Verdict.LINEARIZABLE
