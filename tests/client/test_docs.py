"""The examples of docs/client.md are programs that work."""

import re
from pathlib import Path

import pytest

from tests.client.fake_cluster import FakeCluster
from tests.client.fake_server import FakeServer
from tests.client.test_blocking import in_subprocess

GUIDE = Path(__file__).parents[2] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_guide_runs(example):
    assert "127.0.0.1:7001" in example
    with FakeServer(FakeCluster(nodes=2)) as server:
        in_subprocess(example.replace("127.0.0.1:7001", server.addresses))


def test_the_guide_has_its_examples():
    assert len(EXAMPLES) >= 5
