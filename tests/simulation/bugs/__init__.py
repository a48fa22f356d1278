"""Deliberate bugs, and the proof that the simulator finds them: ``python -m tests.simulation.bugs``."""

from typing import Final

from tests.simulation.bugs import clients, elections, growth, membership, staleness, state
from tests.simulation.bugs.table import Bug

ALL: Final[dict[str, Bug]] = {
    bug.name: bug
    for bug in (
        *elections.BUGS,
        *membership.BUGS,
        *state.BUGS,
        *clients.BUGS,
        *staleness.BUGS,
        *growth.BUGS,
    )
}
"""Every bug by its name."""
