"""The demo as a user runs it: three nodes, real data, a leader killed, and what it says of all that."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.harness import SECONDS_MAX

pytestmark = pytest.mark.cluster

UNHURRIED = f"""
from shardkv.cli import tour
from shardkv.cli.root import main
from shardkv_bench.local_cluster import LocalCluster
tour.SETTLE_SECONDS_MAX = tour.RESUME_SECONDS_MAX = tour.TIMEOUT_SECONDS = {SECONDS_MAX}
LocalCluster.start.__defaults__ = LocalCluster.restart.__defaults__ = ({SECONDS_MAX},)
main()
"""
"""The command, which gives the cluster as long as a machine may need that has much else to do."""


def test_the_demo_shows_what_it_promises_and_ends_with_0(tmp_path: Path) -> None:
    """The tour without a terminal: it fails if a write is missing, or writes do not go on, or ranges do not spread."""
    command = [sys.executable, "-c", UNHURRIED, "demo", "--tour", "--data", str(tmp_path)]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for wanted in (
        r"nodes serve after \d",
        r"^[\d,]{7} keys in ",
        r"^(\d\d|[89]) ranges, \d",
        r"refused: the key is at version \d+",
        r"^kill -9 n\d, which led the range, after [\d,]+ acknowledged writes",
        r"^writes paused for \d+\.\d\d s and went on under a new leader",
        r": none is missing$",
        r"^n\d restarted and serves again",
        r"^(\d\d\d,\d\d\d) of \1 keys$",
        r"^\d+ ranges, 3 of 3 nodes lead some$",
    ):
        assert re.search(wanted, ended.stdout, re.MULTILINE), f"{wanted!r} is not in:\n{ended.stdout}{ended.stderr}"
