"""Starts that must fail: a clear message that says what to do, exit code 1 or 2, and nothing changed or lost."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardkv.cli.root import shardkv
from shardkv.multiraft.maintenance import ENTRIES_KEPT
from shardkv.storage.rocks import RocksEngine
from shardkv_bench.local_cluster import free_ports
from shardkv_client import connect_blocking
from tests.cluster.harness import SECONDS_MAX, LocalCluster, started

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One node, n1, that serves throughout."""
    with started(tmp_path_factory.mktemp("bad-start"), nodes=1) as running:
        with connect_blocking(running.connect) as kv:
            kv.put(b"kept", b"1")
        yield running


def start(*arguments: str, variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and stderr of a `shardkv node` that is expected to end by itself."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SHARDKV_")}
    done = subprocess.run(
        [sys.executable, "-m", "shardkv.cli", "node", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        env={**inherited, **(variables or {})},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "", "it said that it is ready"
    return done.returncode, done.stderr


def flags(data: Path, *more: str, name: str = "n9", port: int | None = None) -> list[str]:
    address = f"127.0.0.1:{port or free_ports(1)[0]}"
    return ["--name", name, "--data", str(data), "--listen", address, *(more or ("--bootstrap",))]


def still_serves(world: LocalCluster) -> None:
    with connect_blocking(world.connect) as kv:
        entry = kv.get(b"kept")
        assert entry is not None
        assert entry.value == b"1"


def test_a_data_directory_in_use_is_refused_and_its_node_goes_on(world: LocalCluster) -> None:
    """DESIGN 4.3: two processes on one directory would destroy it."""
    code, message = start(*flags(world.directory / "n1", name="n1"))
    assert code == 1
    assert "in use" in message or "another process" in message, message
    still_serves(world)


def test_a_data_directory_in_use_is_refused_although_its_lock_file_was_deleted(world: LocalCluster) -> None:
    """The second process would make another file, lock that, and write into the same log."""
    (world.directory / "n1" / "LOCK").unlink()
    code, message = start(*flags(world.directory / "n1", name="n1"))
    assert code == 1
    assert "in use" in message, message
    still_serves(world)


def test_a_node_alone_whose_engine_was_removed_says_what_to_do(tmp_path: Path) -> None:
    """Its log and identity are there. It said that it was ready, and nobody could ever give it its data."""
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        kv.put(b"a", b"1")
    shutil.rmtree(tmp_path / "n1" / "engine")
    for _ in range(2):
        code, message = start(*flags(tmp_path / "n1", name="n1"))
        assert code == 1
        assert str(tmp_path / "n1" / "engine") in message
        assert "backup" in message


def test_an_engine_that_has_lost_what_the_log_let_go_of_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """The end of its MANIFEST is missing: RocksDB opens it in an older state, without a word, and removes the tables of
    the newer. Where the log still has the rest, that is made up for."""
    engine = tmp_path / "n1" / "engine"
    sizes: list[int] = []
    older: dict[Path, bytes] = {}
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        (manifest,) = engine.glob("MANIFEST-*")
        for count in (1, ENTRIES_KEPT + 50, 1):
            for _ in range(count):
                kv.increment(b"n")
            command = ["admin", "snapshot", "1", "--connect", world.connect, "--timeout", str(SECONDS_MAX)]
            assert CliRunner().invoke(shardkv, command).exit_code == 0
            world.pause("n1")  # a compaction adds and removes tables whenever it likes
            sizes.append(manifest.stat().st_size)
            older |= {table: table.read_bytes() for table in engine.glob("*.sst")}
            world.resume("n1")
    for table, data in older.items():
        if not table.exists():
            table.write_bytes(data)
    whole, tables = manifest.read_bytes(), sorted(engine.glob("*.sst"))
    assert sizes == sorted(set(sizes))
    os.truncate(manifest, sizes[0])
    for _ in range(2):
        code, message = start(*flags(tmp_path / "n1", name="n1"))
        assert code == 1
        assert "range 1 has applied" in message
        assert "move the folder engine out" in message
        assert sorted(engine.glob("*.sst")) == tables
    manifest.write_bytes(whole[: sizes[1]])
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        assert kv.increment(b"n", 0) == ENTRIES_KEPT + 52


def test_an_engine_that_has_lost_sight_of_all_its_tables_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """Nothing but the beginning of its MANIFEST is there. It was opened as an empty store, which removed them."""
    new = RocksEngine(str(tmp_path / "new"))
    beginning = next((tmp_path / "new").glob("MANIFEST-*")).stat().st_size
    new.close()
    engine = tmp_path / "n1" / "engine"
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        kv.put(b"a", b"1")
    (manifest,) = engine.glob("MANIFEST-*")
    whole, tables = manifest.read_bytes(), sorted(engine.glob("*.sst"))
    os.truncate(manifest, beginning)
    for _ in range(2):
        code, message = start(*flags(tmp_path / "n1", "--join", "127.0.0.1:1", name="n1"))
        assert code == 1
        assert tables[0].name in message
        assert "move the folder engine out" in message
        assert sorted(engine.glob("*.sst")) == tables
    manifest.write_bytes(whole)
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        assert kv.increment(b"a", 0) == 1


def test_a_port_in_use_is_named_and_the_node_that_has_it_goes_on(world: LocalCluster, tmp_path: Path) -> None:
    port = int(world.addresses["n1"].rpartition(":")[2])
    code, message = start(*flags(tmp_path / "data", port=port))
    assert code != 0
    assert str(port) in message
    assert "in use" in message
    still_serves(world)


def test_a_start_that_failed_on_the_port_can_be_repeated_on_another(tmp_path: Path) -> None:
    """Nothing that a failed first start leaves behind stands in the way of the next."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        code, _ = start(*flags(tmp_path / "n1", name="n1", port=holder.getsockname()[1]))
        assert code != 0
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        assert kv.put(b"a", b"1") > 0


def test_a_directory_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    code, message = start(*flags(tmp_path))
    assert code == 1
    assert "holiday.jpg" in message
    assert "empty" in message
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_directory_of_a_newer_format_is_refused_untouched(tmp_path: Path) -> None:
    """DESIGN 4.3: the format stands in the data directory and is compared at start."""
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        kv.put(b"a", b"1")
    identity = tmp_path / "n1" / "identity"
    data = bytearray(identity.read_bytes())
    data[8] = 9
    identity.write_bytes(data)
    before = sorted(path.name for path in (tmp_path / "n1").rglob("*"))
    code, message = start(*flags(tmp_path / "n1", name="n1"))
    assert code == 1
    assert "format 9" in message
    assert "newer" in message
    assert identity.read_bytes() == data
    assert sorted(path.name for path in (tmp_path / "n1").rglob("*")) == before


def test_a_directory_of_another_node_is_refused(tmp_path: Path) -> None:
    with started(tmp_path, nodes=1) as world, connect_blocking(world.connect) as kv:
        kv.put(b"a", b"1")
    code, message = start(*flags(tmp_path / "n1", name="n2"))
    assert code == 1
    assert "'n1'" in message
    assert "'n2'" in message


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code, message = start(*flags(tmp_path / "file" / "data"))
    assert code == 1
    assert str(tmp_path / "file") in message


def test_a_new_directory_needs_bootstrap_or_join(tmp_path: Path) -> None:
    code, message = start("--name", "n1", "--data", str(tmp_path / "n1"), "--listen", f"127.0.0.1:{free_ports(1)[0]}")
    assert code in (1, 2)
    assert "--bootstrap" in message
    assert "--join" in message


@pytest.mark.parametrize(
    "text, said",
    [
        ("name = [", "TOML"),
        ("nmae = 'n1'", "nmae"),
        ("[raft]\ntick_ms = 'soon'", "tick_ms"),
        ("[raft]\ntick_ms = -5", "tick_ms"),
        ("[raft]\npromise_ms = 1", "promise_ms"),
        ("raft = 5", "raft"),
    ],
)
def test_a_broken_config_file_is_named_with_what_is_wrong_in_it(tmp_path: Path, text: str, said: str) -> None:
    """Exit code 2: wrong usage; nothing is made."""
    (tmp_path / "node.toml").write_text(text)
    code, message = start(*flags(tmp_path / "data"), "--config", str(tmp_path / "node.toml"))
    assert code == 2
    assert said in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--bootstrap", "--frobnicate"], "--frobnicate"),
        (["--bootstrap", "--tick-ms", "soon"], "tick"),
        (["--bootstrap", "--join", "127.0.0.1:1"], "join"),
        (["--join", "nowhere"], "nowhere"),
        (["--bootstrap", "--listen", "0.0.0.0:7001"], "advertise"),
        (["--bootstrap", "--config", "/nowhere/at/all.toml"], "/nowhere/at/all.toml"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, more: list[str], said: str) -> None:
    code, message = start(*flags(tmp_path / "data", *more))
    assert code == 2
    assert said in message
    assert not (tmp_path / "data").exists()


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    code, message = start(*flags(tmp_path / "data"), variables={"SHARDKV_TICK_MS": "soon"})
    assert code == 2
    assert "SHARDKV_TICK_MS" in message
