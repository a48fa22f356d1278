"""What all tests share: how hypothesis searches, and that the shell they are started from, the other workers, and the
tests before them make no difference.

In the suite it is deterministic, so that a run's outcome depends on the code alone. To search further:
``HYPOTHESIS_PROFILE=explore make unit``.
"""

import os
import signal

import pytest
import structlog
from hypothesis import HealthCheck, settings

from shardkv_bench import local_cluster

# How long a step takes says something of the machine, not of the code.
settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=2_000, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell leaves it so to what it runs in the background; programs that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A developer's own cluster, say: the settings that tests mean to give are those that they give themselves.
for name in [name for name in os.environ if name.startswith("SHARDKV_")]:
    del os.environ[name]

if "PYTEST_XDIST_WORKER" in os.environ:
    # A port is free until its node runs, so workers that look for free ones side by side each do so in their own part.
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % count  # one that replaces another goes on
    width = (local_cluster._PORT_HIGH - local_cluster._PORT_LOW) // count
    local_cluster._PORT_LOW += number * width
    local_cluster._PORT_HIGH = local_cluster._PORT_LOW + width


@pytest.fixture(scope="session", autouse=True)
def _programs_obey_a_hangup() -> None:
    """nohup has it ignored, which programs that tests start would inherit. A handler they do not inherit, and this
    process survives with one, as was asked. Not on import: workers shall inherit what was asked, and do the same."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(autouse=True)
def _logs_are_not_configured() -> None:
    """What runs a command, or a node, configures them for the process."""
    structlog.reset_defaults()
