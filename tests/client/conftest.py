"""What the tests over loopback share: both event loops, and a fake cluster behind real sockets."""

import pytest

from tests.client.fake_cluster import FakeCluster
from tests.client.fake_server import FakeServer


@pytest.fixture(params=["trio", "asyncio"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server():
    with FakeServer(FakeCluster(nodes=3)) as running:
        yield running
