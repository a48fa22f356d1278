"""The admin page: one file with everything in it, filled in here once and by its own script from then on.

Lives here: the first filling, which is also all that a browser without scripts gets, and the headers. The file beside
this one, ``page.html``, holds the rest. The rule: every text from the cluster is escaped, for keys are whatever users
write, and the page may run and load nothing but what stands in it.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, Final

from shardkv.amounts import human_bytes

RANGES_MAX: Final = 500
"""Rows of ranges on the page; the script shows as many."""

_FILE: Final = resources.files(__package__).joinpath("page.html").read_text("utf-8")


def _hash_of(tag: str) -> str:
    """What lets the browser use the file's own script, or style, and nothing else."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", _FILE, re.DOTALL)
    assert found is not None, f"page.html has no {tag}"
    return "'sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() + "'"


HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def render(name: str, status: Any, ranges: Any, problem: str) -> bytes:
    """The page of node ``name``. ``status`` and ``ranges`` are None, and ``problem`` says why, when nobody knows."""
    nodes: list[Mapping[str, Any]] = []
    facts = operators = ""
    if status is not None:
        nodes = sorted(status["node_table"], key=lambda row: int(row["id"]))
        facts = _facts(status, nodes)
        operators = "".join(
            _row([str(each["id"]), str(each["kind"]), str(each["range"]), str(each["reason"])], numeric={0, 2})
            for each in status["operators"]
        )
    shown = list(ranges or ())
    names = {row["id"]: str(row["name"]) for row in nodes}
    filled = {
        "NAME": escape(name),
        "PROBLEM": escape(problem),
        "FACTS": escape(facts),
        "NODES": "".join(_node_row(row) for row in nodes),
        "RANGES": "".join(_range_row(row, names) for row in shown[:RANGES_MAX]),
        "MORE": escape(f"{len(shown) - RANGES_MAX} more ranges in /ranges.json") if len(shown) > RANGES_MAX else "",
        "OPERATORS": operators,
        "SETTLED": "" if operators else " hidden",
    }
    return re.sub(r"<!--([A-Z]+)-->", lambda marker: filled[marker[1]], _FILE).encode()


def _facts(status: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    leader = next((row["name"] for row in nodes if row["id"] == status["placement_leader"]), "nobody")
    # The placement leader may run an earlier version.
    settled = "settled" if status["settled"] else f"not settled: {status.get('unsettled', 'it is under way')}"
    return (
        f"cluster {status['cluster_id'][:8]} · version {status['version']} · {settled} · {status.get('live', '?')} of "
        f"{status['nodes']} nodes live · {status['ranges']} ranges · placement led by {leader}"
    )


def _row(cells: Sequence[str], numeric: set[int]) -> str:
    return (
        "<tr>"
        + "".join(f"<td{' class=n' if at in numeric else ''}>{escape(cell)}</td>" for at, cell in enumerate(cells))
        + "</tr>"
    )


def _node_row(row: Mapping[str, Any]) -> str:
    cells = [str(row[column]) for column in ("name", "id", "address", "state", "replicas", "leaders")]
    return _row(cells, numeric={1, 4, 5})


def _range_row(row: Mapping[str, Any], names: Mapping[int, str]) -> str:
    leader, learners = row["leader"], row.get("learners", ())
    cells = [
        str(row["id"]),
        show_key(row["start"]) or "−∞",
        "+∞" if row["end"] is None else show_key(row["end"]),
        "none" if leader is None else names.get(leader, str(leader)),
        ", ".join(names.get(node, str(node)) + (" (learner)" if node in learners else "") for node in row["replicas"]),
        ".".join(map(str, row["epoch"])),
        human_bytes(row["bytes"]),
    ]
    return _row(cells, numeric={0, 5, 6})


def show_key(key: bytes) -> str:
    """Text that can be read, whatever the bytes."""
    text = key.decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)
