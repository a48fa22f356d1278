"""What all tests share: how hypothesis searches, that Ctrl-C works, and that logs are as no test before has left them.

In the suite it is deterministic, so that a run's outcome depends on the code alone. To search further:
``HYPOTHESIS_PROFILE=explore make unit``.
"""

import os
import signal

import pytest
import structlog
from hypothesis import HealthCheck, settings

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


@pytest.fixture(autouse=True)
def _logs_are_not_configured() -> None:
    """What runs a command, or a node, configures them for the process."""
    structlog.reset_defaults()
