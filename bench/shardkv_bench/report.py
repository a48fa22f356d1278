"""A comparison as text: a table for the terminal, a Markdown page for the documentation. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

MARKS: Final = (
    "A star marks a run whose client process\nwas busy throughout, so that the client and not the server was the limit."
    " A dagger stands before the number of\noperations that failed. A failure costs less than what was asked, so no"
    " budget is judged by a row with one."
)
HEADER: Final = (
    "workload",
    "in flight",
    "system",
    "ops/s",
    "p50 ms",
    "p99 ms",
    "server µs/op",
    "client µs/op",
    "throughput ratio",
    "server CPU ratio",
)


def lines_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Two lines of cells for each row: ours and etcd's. The ratios stand in ours; :data:`MARKS` says what is marked."""
    lines = []
    for row in rows:
        for system in ("shardkv", "etcd"):
            figures = row[system]
            ours = system == "shardkv"
            star = "*" if figures["client_bound"] else ""
            lines.append(
                [
                    row["workload"] if ours else "",
                    str(row["inflight"]) if ours else "",
                    system,
                    f"{figures['throughput']:,.0f}{star}{_failures(figures['errors'])}",
                    f"{figures['p50_ms']:.2f}",
                    f"{figures['p99_ms']:.2f}",
                    f"{figures['server_cpu_us']:.1f}",
                    f"{figures['client_cpu_us']:.1f}",
                    _ratio(row["throughput_ratio"]) if ours else "",
                    _ratio(row["server_cpu_ratio"]) if ours else "",
                ]
            )
    return lines


def _failures(count: int) -> str:
    return f" †{count:,}" if count else ""


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


class Budget(NamedTuple):
    """One line of the budgets: what is asked, what was found, and whether that is enough, None where nobody can say."""

    what: str
    budget: str
    found: str
    met: bool | None


def _budget(what: str, budget: str, found: str, met: bool, *rows: dict[str, Any]) -> Budget:
    """A budget that rows are judged by, if both systems did operations in each of them, and every one succeeded."""
    figures = [row[system] for row in rows for system in ("shardkv", "etcd")]
    failures = sum(each["errors"] for each in figures)
    judged = not failures and all(each["ops"] for each in figures)
    return Budget(what, budget, found + _failures(failures), met if judged else None)


def budgets_of(document: dict[str, Any]) -> list[Budget]:
    """The budgets that the document's measurements speak about."""
    rows = {(row["workload"], row["inflight"]): row for row in document["rows"]}
    spread = document["ranges"] > 1
    budgets = []
    for inflight, cpu_max in ((64, 120 if spread else 60), (256, 50 if spread else 35)):
        row = rows.get(("put", inflight))
        if row:
            cpu, times = row["shardkv"]["server_cpu_us"], row["throughput_ratio"]
            wanted = 2.0 if spread else 2.5
            budgets += [
                _budget(
                    f"server CPU of a put at {inflight} in flight",
                    f"< {cpu_max} µs",
                    f"{cpu:.1f} µs",
                    cpu < cpu_max,
                    row,
                ),
                _budget(
                    f"puts a second at {inflight} in flight",
                    f"≥ {wanted:g} × etcd",
                    f"{_ratio(times)} ×",
                    times is not None and times >= wanted,
                    row,
                ),
            ]
    for inflight in (64, 256):
        row = rows.get(("get", inflight))
        if row:
            cpu, times = row["shardkv"]["server_cpu_us"], row["throughput_ratio"]
            budgets += [
                _budget(f"server CPU of a get at {inflight} in flight", "< 20 µs", f"{cpu:.1f} µs", cpu < 20, row),
                _budget(
                    f"linearizable gets a second at {inflight} in flight",
                    "≥ 2 × etcd",
                    f"{_ratio(times)} ×",
                    times is not None and times >= 2,
                    row,
                ),
            ]
    for workload in ("put", "get"):
        row = rows.get((workload, 64))
        if row:
            cpu = row["shardkv"]["client_cpu_us"]
            budgets.append(
                _budget(f"client CPU of a {workload} at 64 in flight", "< 20 µs", f"{cpu:.1f} µs", cpu < 20, row)
            )
    return budgets + _single_budgets(document, rows)


def _single_budgets(document: dict[str, Any], rows: dict[tuple[str, int], dict[str, Any]]) -> list[Budget]:
    budgets = []
    row, trip = rows.get(("put", 1)), rows.get(("get", 1))
    if row and trip:
        # A get alone is a round trip and next to no work.
        bound = 1.5 * (document["machine"]["fsync_ms_median"] + trip["shardkv"]["p50_ms"])
        found = row["shardkv"]["p50_ms"]
        budgets.append(
            _budget(
                "one put alone, median",
                f"< {bound:.2f} ms (1.5 × an fsync and a get alone)",
                f"{found:.2f} ms (etcd {row['etcd']['p50_ms']:.2f})",
                found < bound,
                row,
                trip,
            )
        )
    bulk = document["bulk_seconds"]
    if {"shardkv", "etcd"} <= set(bulk):
        budgets.append(
            Budget(
                "bulk load of the records by put_many",
                f"< {bulk['etcd']:.2f} s (etcd, transactions of 128)",
                f"{bulk['shardkv']:.2f} s",
                bulk["shardkv"] < bulk["etcd"],
            )
        )
    cold = document["cold_start_seconds"].get("shardkv")
    if cold:
        budgets.append(Budget("cold start to the first write", "< 2 s", f"{max(cold):.2f} s", max(cold) < 2))
    failover = document["failover_seconds"].get("shardkv")
    if failover:
        median = statistics.median(failover)
        budgets += [
            Budget("failover after kill -9, median", "< 0.8 s", f"{median:.2f} s", median < 0.8),
            Budget(f"failover, worst of {len(failover)}", "< 1.5 s", f"{max(failover):.2f} s", max(failover) < 1.5),
        ]
    return budgets


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in body)


def markdown(documents: Sequence[dict[str, Any]], command: str) -> str:
    """The benchmark page: the machine, each comparison, what it says of the budgets, the single moments."""
    machine = documents[0]["machine"]
    parts = [
        "# Benchmarks\n\n"
        "Measured by the load generator, three node processes of each system on one machine, fsync on, alternating\n"
        "rounds of one run. Ratios carry over to other machines better than absolute figures. etcd is driven by a\n"
        "client that costs almost nothing, connected to its leader; shardkv by its public Python client.\n"
        "The load is a closed loop: each operation in flight begins when one has ended, so percentiles hardly show a\n"
        "stall, in which less was asked.\n\n"
        f"Made with `{command}`.\n\n"
        + markdown_table(
            ("machine", ""),
            [
                ("processor", machine["processor"]),
                ("cores, shared by servers and clients", str(machine["cores"])),
                ("kernel", machine["kernel"]),
                ("Python", machine["python"]),
                ("etcd", machine["etcd"]),
                (
                    "4 KiB append and fdatasync",
                    f"{machine['fsync_ms_median']:.2f} ms median, {machine['fsync_ms_p99']:.2f} ms 99th percentile",
                ),
            ],
        )
    ]
    for document in documents:
        parts.append(_section(document))
    return "\n".join(parts)


def _section(document: dict[str, Any]) -> str:
    ranges = document["ranges"]
    where = "One range" if ranges == 1 else f"{ranges} ranges, led evenly by the three nodes"
    parts = [
        f"## {where}\n\n16-byte keys over 100,000 records, 100-byte values, 4 connections. {MARKS}\n\n",
        markdown_table(HEADER, lines_of(document["rows"])),
        "\n### Budgets\n\n",
        markdown_table(
            ("what", "budget", "found", "met"),
            [
                (each.what, each.budget, each.found, "" if each.met is None else "yes" if each.met else "**no**")
                for each in budgets_of(document)
            ],
        ),
    ]
    if document["failover_seconds"]:
        parts += [
            "\n### Failover\n\nSeconds from `kill -9` of the leader to the next acknowledged write, sorted.\n\n",
            markdown_table(
                ("system", "trials", "median", "worst"),
                [
                    (
                        name,
                        ", ".join(f"{each:.2f}" for each in sorted(seconds)),
                        f"{statistics.median(seconds):.2f}",
                        f"{max(seconds):.2f}",
                    )
                    for name, seconds in document["failover_seconds"].items()
                ],
            ),
        ]
    if document["cold_start_seconds"]:
        parts += [
            "\n### Cold start\n\nSeconds from starting three processes on empty directories to the first write.\n\n",
            markdown_table(
                ("system", "seconds"),
                [
                    (name, ", ".join(f"{each:.2f}" for each in seconds))
                    for name, seconds in document["cold_start_seconds"].items()
                ],
            ),
        ]
    return "".join(parts)
