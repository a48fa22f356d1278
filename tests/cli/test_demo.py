"""The demo around its nodes (stand-ins here): endpoints, ends, what stays; and the tour's arithmetic."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shardkv.cli import demo, tour
from shardkv.storage.directory import IDENTITY_NAME
from tests.cli.fakes import FakeClient
from tests.cli.processes import SECONDS, STANDIN

UNHURRIED = f"""
from shardkv_bench.local_cluster import LocalCluster
LocalCluster.start.__defaults__ = LocalCluster.stop.__defaults__ = ({SECONDS},)
"""
SCRIPT = f"""{UNHURRIED}
from functools import partial
from shardkv.cli import demo
demo.LocalCluster = partial(demo.LocalCluster, node_command={STANDIN!r})
from shardkv.cli.root import main
main()
"""


BUSY_NODE = """
import contextlib, select, signal, sys
from pathlib import Path
given = dict(zip(sys.argv, sys.argv[1:]))
data, parent = Path(given["--data"]), int(given["--parent-pipe"])
def stop(*_):
    (data / "stopped").touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("ready n1 127.0.0.1:7001", flush=True)
while not select.select([parent], [], [], 0)[0]:
    with contextlib.suppress(FileNotFoundError):
        data.mkdir(parents=True, exist_ok=True)
        (data / "log").touch()
"""
"""A node that writes for as long as it runs, whatever happens to its directory; it notes that it was told to stop."""


def busy_script(second: int = 0) -> str:
    """A demo of busy nodes, in which signal number ``second`` arrives when the first node is about to be ended."""
    return f"""{UNHURRIED}
import signal, sys
from functools import partial
from shardkv.cli import demo, local_cluster
demo.LocalCluster = partial(demo.LocalCluster, node_command=[sys.executable, "-c", {BUSY_NODE!r}])
def send_second(process, number, send=local_cluster.Process.signal):
    if {second}:
        signal.raise_signal({second})
    send(process, number)
local_cluster.Process.signal = send_second
from shardkv.cli.root import main
main()
"""


@contextlib.contextmanager
def start(
    *arguments: str, script: str = SCRIPT, prefix: Sequence[str] = (), **variables: str
) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        [*prefix, sys.executable, "-u", "-c", script, "demo", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def endpoints(child: "subprocess.Popen[str]") -> dict[str, tuple[str, int]]:
    """Node name to address and process id, from the table; returns once the demo says that it runs."""
    assert child.stdout is not None
    assert child.stderr is not None
    assert re.match(r"1 node serves after|[0-9]+ nodes serve after", child.stdout.readline())
    assert child.stdout.readline().split() == ["NODE", "ADDRESS", "PID", "LOG"]
    found = {}
    while cells := child.stdout.readline().split():
        found[cells[0]] = (cells[1], int(cells[2]))
    assert "shardkv shell --connect" in child.stdout.readline()
    assert child.stderr.readline() == "running until interrupted\n"
    return found


def wait_for_ends(descriptors: Iterable[int]) -> None:
    """Wait for the ends of processes that were running; closes their descriptors."""
    for descriptor in descriptors:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(SECONDS * 1000), "a node outlived the demo"
        os.close(descriptor)


INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL


@pytest.mark.parametrize("number, code", [(INT, 130), (TERM, 0), (HUP, 0), (KILL, -9)])
def test_the_nodes_end_with_the_demo_however_it_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """DESIGN 2.2: with --no-shell runs until interrupted; its nodes end when it dies, however it dies."""
    with start("--no-shell", "--data", str(tmp_path)) as child:
        nodes = endpoints(child)
        assert list(nodes) == ["n1", "n2", "n3"]
        watched = [os.pidfd_open(pid) for _, pid in nodes.values()]
        child.send_signal(number)
        assert child.wait(SECONDS) == code
    wait_for_ends(watched)


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_nodes_on_data_that_stays_are_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    with start("--no-shell", "--nodes", "2", "--data", str(tmp_path), script=busy_script()) as child:
        endpoints(child)
        child.send_signal(number)
        child.wait(SECONDS)
    assert (tmp_path / "n1" / "stopped").exists()
    assert (tmp_path / "n2" / "stopped").exists()


@pytest.mark.parametrize(
    "first, second, code",
    [
        (INT, 0, 130),
        (HUP, 0, 0),
        (HUP, HUP, 0),
        (INT, INT, 130),
        (INT, TERM, 130),
        (INT, HUP, 130),
        (TERM, INT, 0),
    ],
)
def test_nothing_stays_of_a_demo_without_data_however_often_it_is_told_to_end(
    tmp_path: Path, first: signal.Signals, second: int, code: int
) -> None:
    """Of what nodes write it would be hundreds of megabytes, each time that a terminal is closed."""
    with start("--no-shell", "--nodes", "2", script=busy_script(second), TMPDIR=str(tmp_path)) as child:
        watched = [os.pidfd_open(pid) for _, pid in endpoints(child).values()]
        assert list(tmp_path.iterdir())
        child.send_signal(first)
        assert child.wait(SECONDS) == code
    wait_for_ends(watched)
    assert not list(tmp_path.iterdir())


def test_a_demo_under_nohup_stays_when_the_terminal_is_closed(tmp_path: Path) -> None:
    with start("--no-shell", "--nodes", "1", "--data", str(tmp_path), prefix=["nohup"]) as child:
        endpoints(child)
        status = Path(f"/proc/{child.pid}/status").read_text()
        ignored = int(re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)[0], 16)
        assert ignored & 1 << HUP - 1
        assert not ignored & 1 << TERM - 1


async def _ends_when_told_to(ends: list[str]) -> None:
    signal.raise_signal(TERM)
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            signal.raise_signal(HUP)
            await trio.testing.wait_all_tasks_blocked()
            ends.append("cleanly")


def test_a_second_signal_does_not_interrupt_the_end_of_a_loop() -> None:
    """A terminal that is closed often tells so twice: its shell does, and the kernel."""
    ends: list[str] = []
    before = [(number, signal.signal(number, demo._terminate)) for number in (TERM, HUP)]
    try:
        with pytest.raises(demo.Terminated):
            demo._run_until_terminated(_ends_when_told_to, ends)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert ends == ["cleanly"]


def test_a_demo_that_is_told_to_end_while_its_nodes_start_ends_cleanly(tmp_path: Path) -> None:
    told = SCRIPT.replace(
        "from shardkv.cli.root",
        "import signal\ndemo.LocalCluster.func.start = lambda self: signal.raise_signal(15)\nfrom shardkv.cli.root",
    )
    done = subprocess.run(
        [sys.executable, "-c", told, "demo", "--no-shell"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"nodes": 3}', '{"nodes": 3, "addresses": {}}', "\0\0", None),
        *('{"nodes": 0, "addresses": {}}', '{"nodes": 2, "addresses": {"n1": "127.0.0.1:1", "n0": "127.0.0.1:2"}}'),
    ],
)
def test_a_demo_names_a_file_of_its_own_that_is_damaged(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "demo.json").mkdir()
    else:
        (tmp_path / "demo.json").write_text(content)
    with start("--no-shell", "--data", str(tmp_path)) as child:
        _, said = child.communicate(timeout=SECONDS)
    assert child.returncode == 2
    assert f"{tmp_path}/demo.json is damaged" in said
    assert "Traceback" not in said
    assert "remove it" in said


def test_a_file_of_a_demo_that_may_not_be_read_is_not_said_to_be_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be removed, and with it what its owner's next demo needs. Root, who may run tests, may read any."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        demo._saved(tmp_path / "demo.json")


def test_a_demo_whose_directory_cannot_be_made_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with start("--no-shell", "--data", str(tmp_path / "file" / "data")) as child:
        _, said = child.communicate(timeout=SECONDS)
    assert child.returncode == 2
    assert f"{tmp_path / 'file' / 'data'} cannot be made: Not a directory; give another --data" in said


def test_a_demo_takes_no_directory_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept its data where it was typed: an empty path is that of a variable which is not set."""
    monkeypatch.chdir(tmp_path)
    with start("--no-shell", "--data", "") as child:
        _, said = child.communicate(timeout=SECONDS)
    assert child.returncode == 2
    assert "--data is empty" in said
    assert list(tmp_path.iterdir()) == []


def test_a_demo_leaves_the_data_directory_of_a_node_alone(tmp_path: Path) -> None:
    """It put files and directories of its own there."""
    (tmp_path / IDENTITY_NAME).touch()
    with start("--no-shell", "--data", str(tmp_path)) as child:
        _, said = child.communicate(timeout=SECONDS)
    assert child.returncode == 2
    assert f"{tmp_path} is the data directory of a node; give another --data" in said
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY_NAME]


@pytest.mark.parametrize("node_code, code", [(2, 2), (1, 1), (-9, 1)])
def test_a_demo_that_was_told_something_wrong_ends_as_its_nodes_do(tmp_path: Path, node_code: int, code: int) -> None:
    """Such as a port in use: 2 wrong usage, from `demo` as from `node`."""
    ending = f"import os, sys; os.kill(os.getpid(), {-node_code}) if {node_code} < 0 else sys.exit({node_code})"
    script = SCRIPT.replace(repr(STANDIN), repr([sys.executable, "-c", ending]))
    with start("--no-shell", "--nodes", "2", "--data", str(tmp_path), script=script) as child:
        _, said = child.communicate(timeout=SECONDS)
    assert child.returncode == code, said
    assert f"Error: node n1 ended with {node_code}" in said
    assert "Traceback" not in said


def test_a_demo_whose_shell_is_open_ends_cleanly_when_it_is_told_to(tmp_path: Path) -> None:
    """Without a complaint of the loop, and with the terminal as it was, so that what is typed next can be seen."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-u", "-c", SCRIPT, "demo", "--nodes", "1"]
    variables = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables) as child:
        os.close(theirs)
        seen = b""
        while b"shardkv>" not in seen:
            seen += os.read(ours, 4096)
        assert termios.tcgetattr(ours) != before
        child.terminate()
        with contextlib.suppress(OSError):  # a terminal that nobody reads would hold up the end
            while found := os.read(ours, 4096):
                seen += found
        assert child.wait(SECONDS) == 0
    assert b"Warning" not in seen
    assert b"Traceback" not in seen
    assert termios.tcgetattr(ours) == before
    os.close(ours)


def test_a_second_demo_on_the_same_data_takes_the_same_ports(tmp_path: Path) -> None:
    addresses = []
    for _ in range(2):
        with start("--no-shell", "--nodes", "2", "--data", str(tmp_path)) as child:
            addresses.append({name: address for name, (address, _) in endpoints(child).items()})
            child.terminate()
            assert child.wait(SECONDS) == 0
    assert addresses[0] == addresses[1]
    with start("--no-shell", "--nodes", "3", "--data", str(tmp_path)) as child:
        assert child.wait(SECONDS) == 2


def test_a_temporary_directory_is_gone_afterwards() -> None:
    with start("--no-shell", "--nodes", "1") as child:
        [(_, pid)] = endpoints(child).values()
        directory = Path(os.readlink(f"/proc/{pid}/fd/2")).parent
        assert directory.exists()
        child.terminate()
        assert child.wait(SECONDS) == 0
    assert not directory.exists()


def test_every_named_character_is_there_twice_with_what_python_says_of_it() -> None:
    """Work order: each named code point under name/... and cp/...., with its properties as JSON."""
    found = dict(islice(tour.pairs(), 400))
    assert found[b"cp/0061"] == found[b"name/LATIN SMALL LETTER A"]
    assert json.loads(found[b"cp/0061"]) == {
        "character": "a",
        "code": "U+0061",
        "name": "LATIN SMALL LETTER A",
        "category": "Ll",
        "bidirectional": "L",
        "width": "Na",
    }
    assert json.loads(found[b"cp/00BD"])["numeric"] == 0.5
    assert json.loads(found[b"cp/0030"])["numeric"] == 0
    assert len(found) == 400


def test_the_pause_is_the_longest_time_without_an_acknowledgement() -> None:
    assert tour.longest_gap([1.1, 1.2, 3.0, 3.1], 1.0, 3.2) == pytest.approx(1.8)
    assert tour.longest_gap([4.0, 4.1], 1.0, 4.2) == 3.0
    assert tour.longest_gap([1.1, 1.2], 1.0, 9.2) == pytest.approx(8.0)
    assert tour.longest_gap([], 1.0, 31.0) == 30.0


async def test_keys_that_are_gone_after_the_failover_make_the_tour_fail(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = FakeClient()
    for number in range(10):
        client.set(b"name/%d" % number, b"")
        client.set(b"cp/%d" % number, b"")
    spread = True

    async def settled(client: Any, nodes: int) -> tuple[list[dict[str, Any]], bool]:
        return [{"leader": 1}], spread

    async def nodes(client: Any, timeout: float) -> list[dict[str, Any]]:
        return [{"id": 1}]

    monkeypatch.setattr(tour, "settled", settled)
    monkeypatch.setattr(tour, "fetch_nodes", nodes)
    assert await tour.show_what_is_kept(client, 20)
    assert not await tour.show_what_is_kept(client, 21)
    assert "20 of 21 keys" in capsys.readouterr().out
    spread = False
    assert not await tour.show_what_is_kept(client, 20)


async def test_an_acknowledged_write_that_cannot_be_read_back_is_missing() -> None:
    """Work order: exit 1 if an acknowledged write is missing."""
    client = FakeClient()
    keys = [tour.WRITE_PREFIX + b"%d" % number for number in range(4)]
    for key in keys[:2]:
        client.set(key, key)
    client.set(keys[2], b"something else")
    assert await tour.missing(client, keys) == keys[2:]
    assert await tour.missing(client, keys[:2]) == []
