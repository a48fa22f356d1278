"""Every configuration that a node starts with is one that the placement group takes."""

import pytest

from shardkv.config import NodeConfig
from shardkv.errors import ConfigError

LONG = (("rack", "x" * 65),)


@pytest.mark.parametrize(
    "changes",
    [
        {"label": LONG},
        {"label": (("x" * 65, "a"),)},
        {"label": (("zone", "é" * 33),)},
        {"label": (("zone", "\udcff"),)},
        {"advertise": ".".join(["h" * 63] * 3 + ["h" * 61]) + ":7001"},
    ],
)
def test_what_the_placement_group_would_refuse_is_refused_at_the_start(changes: dict[str, object]) -> None:
    """Else the node runs, tells nobody but its debug log, and the cluster takes it for down; a new one never begins."""
    with pytest.raises(ConfigError):
        NodeConfig(**{"name": "n1", "data": "/d", "listen": "h:1", **changes})  # type: ignore[arg-type]
