"""The fixture ``shardkv_cluster``: a simulated cluster for a test of your own, with every fault a method away.

Installed with shardkv as a pytest plugin. The rule: a test suite that does not use the fixture notices nothing; what
simulates is imported when a test first asks for it.

    async def test_a_transfer_survives_a_crash(shardkv_cluster):
        async with shardkv_cluster.client() as kv:
            ...

Such a test runs by itself in virtual time, whatever other plugins do with asynchronous tests. A test that is no
coroutine gets a :class:`Simulation` instead, and hands it coroutine functions to run.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from shardkv.simulation.cluster import Cluster

T = TypeVar("T")

FIXTURE = "shardkv_cluster"
MARKER = "shardkv_cluster"
NODES = 3
SPLIT_BYTES = 64 * 1024 * 1024
VIRTUAL_SECONDS_MAX = 600.0
"""A test that waits for what never comes ends after this; the nodes' clocks would tick on for ever."""


class Simulation:
    """What a test that is no coroutine gets: it runs scenarios, each with a cluster of its own.

    ``seed`` is the test's, or what ``--shardkv-seed`` says.
    """

    def __init__(self, seed: str, options: dict[str, Any]) -> None:
        self.seed = seed
        self.options: dict[str, Any] = dict(options)
        self.virtual_seconds_max: float = self.options.pop("virtual_seconds_max", VIRTUAL_SECONDS_MAX)

    def run(self, scenario: "Callable[[Cluster], Awaitable[T]]") -> T:
        """Form a cluster in virtual time and run ``await scenario(cluster)``; what that returns."""
        from shardkv.simulation.cluster import simulated_cluster
        from shardkv.simulation.determinism import run_deterministically
        from shardkv.simulation.patience import within

        async def main() -> T:
            async with simulated_cluster(seed=self.seed, **self.options) as cluster:
                with within(self.virtual_seconds_max, "the test did not end"):
                    return await scenario(cluster)
            raise AssertionError("the cluster swallowed an error")

        try:
            return run_deterministically(main, seed=self.seed)
        except BaseExceptionGroup as group:
            # A test that failed by one error shall show that error.
            alone = _alone(group)
            if alone is None:
                raise
            raise alone from None


def _alone(error: BaseException) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("shardkv").addoption(
        "--shardkv-seed", default=None, help="the seed of every simulated cluster; by default each test has its own"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "shardkv_cluster(nodes=3, seed=..., split_bytes=..., virtual_seconds_max=600, **config): of what kind it is",
    )


@pytest.fixture
def shardkv_cluster(request: pytest.FixtureRequest) -> Any:
    """A simulated cluster: to ``async def`` tests the :class:`~shardkv.simulation.Cluster` itself, formed and serving;
    to others a :class:`Simulation`."""
    return _simulation(request.node)


def _simulation(item: pytest.Item) -> Simulation:
    options: dict[str, Any] = {"nodes": NODES, "split_bytes": SPLIT_BYTES}
    for marker in reversed(list(item.iter_markers(MARKER))):
        options.update(marker.kwargs)
    # A test's own name is a seed that no other test has and that every machine gives it.
    seed = str(options.pop("seed", item.nodeid.rsplit("/", 1)[-1]))
    return Simulation(item.config.getoption("--shardkv-seed") or seed, options)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make asynchronous tests that use the fixture plain ones, before another plugin takes them for its own."""
    for item in items:
        if isinstance(item, pytest.Function) and FIXTURE in item.fixturenames and inspect.iscoroutinefunction(item.obj):
            item.obj = _in_virtual_time(item.obj)


def _in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        simulation: Simulation = arguments.pop(FIXTURE)
        simulation.run(lambda cluster: test(**arguments, **{FIXTURE: cluster}))

    # What it wraps is a coroutine function; nobody shall see through to it.
    del run.__wrapped__
    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the seed of a test that failed."""
    report = yield
    if report.when == "call" and report.failed and FIXTURE in getattr(item, "fixturenames", ()):
        seed = _simulation(item).seed
        report.sections.append(("shardkv", f"simulated with the seed {seed!r}; to repeat it: --shardkv-seed '{seed}'"))
    return report
