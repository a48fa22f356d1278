"""The simulator is proved by what it finds: every deliberate bug, with the seed that the table names.

The long search is ``python -m tests.simulation.bugs``; this is the part of it that every change goes through.
"""

from dataclasses import replace

import pytest

from tests.simulation.bugs import ALL
from tests.simulation.bugs.table import checker


@pytest.mark.parametrize("name", list(ALL))
def test_a_deliberate_bug_is_found(name: str) -> None:
    """Switched on alone, one of its runs ends with a violation; a list of seeds, for a product that changes."""
    bug = ALL[name]
    for seed in bug.seeds:
        result = bug.run(seed)
        if result.violation is not None:
            assert checker(result)
            return
    raise AssertionError(f"{name} is not found by seeds {bug.seeds}: `python -m tests.simulation.bugs --bug {name}`")


def test_what_a_bug_that_no_longer_fits_the_product_ends_with_does_not_count() -> None:
    """Its own patch is wrong then; that a run ended by it proves nothing."""
    bug = ALL["no-fsync"]
    found = bug.run()
    assert checker(found)
    with pytest.raises(AssertionError, match="no longer fits"):
        checker(replace(found, violation="AttributeError: 'int' object has no attribute 'machine' (a/b.py:1)"))


def test_bugs_are_switched_off_again_and_their_runs_are_clean() -> None:
    """What is found is the bug: of the most violent mixes, one run without any."""
    for name in ("restart-without-refusal", "ingest-without-flush"):
        assert ALL[name].run(switched_on=False).violation is None
