"""The examples of docs/client.md, and of the README as far as they are of the client alone, are programs that work."""

import re
from pathlib import Path

import pytest

from tests.client.fake_cluster import FakeCluster
from tests.client.fake_server import FakeServer
from tests.client.processes import in_subprocess

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
GUIDE = CODE.findall((ROOT / "docs/client.md").read_text())
README = [each for each in CODE.findall((ROOT / "README.md").read_text()) if "shardkv_cluster" not in each]
EXAMPLES = GUIDE + README


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(example):
    assert "127.0.0.1:7001" in example
    with FakeServer(FakeCluster(nodes=2)) as server:
        in_subprocess(example.replace("127.0.0.1:7001", server.addresses))


def test_the_pages_have_their_examples():
    assert len(GUIDE) >= 5
    assert len(README) == 2
