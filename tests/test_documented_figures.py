"""Figures that pages state are the constants of the code: who changes one is told where it is written, too."""

from pathlib import Path

import pytest

from shardkv.config import NodeConfig
from shardkv.multiraft import hedger, maintenance, replica, snapshot_parts, snapshot_sender, snapshot_stream
from shardkv.raft import election, thrift
from shardkv.server import answer_budget, disk_health, garbage, intake, missing_leaders, requests
from shardkv.server.admin import serving
from shardkv.server.admin.app import REQUESTS_AT_ONCE_MAX
from shardkv.simulation.pytest_plugin import VIRTUAL_SECONDS_MAX
from shardkv.storage.rocks import INGEST_FILE_BYTES, RocksSettings
from shardkv.storage.wal import RECORD_DATA_BYTES_MAX, WalSettings
from shardkv.transport.pool import UNREACHABLE_SECONDS
from shardkv.types import KEY_BYTES_MAX, LINEAGE_MAX, VALUE_BYTES_MAX
from shardkv.wire.requests import SCAN_PAGE_BYTES_MAX
from shardkv_client.core import TIMEOUT_SECONDS
from shardkv_placement import operators, state

DOCS = Path(__file__).parents[1] / "docs"
CONFIG = NodeConfig(name="n1", data="/data", listen="127.0.0.1:7001")
KIB, MIB = 1024, 1024 * 1024
IN_WORDS = {3: "three", 4: "four", 8: "eight"}

FIGURES = {
    "admin.md": (
        f"at most {serving.CONNECTIONS_MAX} connections at once",
        f"at most {REQUESTS_AT_ONCE_MAX} requests at once",
        f"idle or slow for {serving.IDLE_SECONDS} s",
        f"`--sync-stall-ms` ({CONFIG.raft.sync_stall_ms:,}:",
        f"until for {disk_health.WELL_SECONDS:g} s no sync took",
        f"up to {disk_health.WELL_SECONDS_MAX:g} s",
        f"`--spare-entries-max`, {CONFIG.raft.spare_entries_max})",
        f"`--clock-offset-max-ms` ({CONFIG.clock_offset_max_ms})",
        f"`--promise-ms` ({CONFIG.raft.promise_ms})",
        f"those of its last {LINEAGE_MAX} starts",
        f"started {LINEAGE_MAX} times more often",
        f"{answer_budget.UNREAD_BYTES_MAX // KIB} KiB and one answer",
        f"{answer_budget.UNREAD_BYTES_CROWDED // KIB} KiB while half of all the room is taken",
        f"answers above {answer_budget.SMALL_ANSWER_BYTES // KIB} KiB that all clients",
        f"{answer_budget.ANSWER_BYTES_MAX // MIB} MiB, and {answer_budget.RESERVE_BYTES // MIB} MiB more for clients "
        f"that have taken {answer_budget.PROVEN_BYTES // MIB} MiB before",
        f"{answer_budget.SHARE_BYTES / MIB:g} MiB of answers",
        f"{requests.GET_BYTES_MAX // MIB} MiB of values to a get",
        f"{SCAN_PAGE_BYTES_MAX // MIB} MiB and one value to a page",
        f"{intake.ARRIVING_BYTES_MAX // MIB} MiB, all clients together; while others wait for their turn, one of which "
        f"less than {intake.STANDSTILL_BYTES // KIB} KiB arrive",
        f"{answer_budget.BACKLOG_BYTES_MAX // MIB} MiB, all clients together; beyond it",
        f"more than {answer_budget.DROP_BYTES_MIN // MIB} MiB are untaken",
        f"after {garbage.FORCE_SECONDS:g} s or {garbage.YOUNG_OBJECTS_MAX:,} new objects",
    ),
    "architecture.md": (
        f"for {replica.PIPELINE_NS / 1e6:g} ms, or until there is much",
        f"up to {replica.GATHER_NS / 1e6:g} ms, until most",
        f"about {replica.ENTRY_BYTES_MAX // MIB} MiB at most",
    ),
    "client.md": (
        f"1 byte to {KEY_BYTES_MAX // KIB} KiB, a value up to {VALUE_BYTES_MAX // MIB} MiB",
        f"`timeout=` in seconds, by default {TIMEOUT_SECONDS:g}",
        f"({CONFIG.raft.heartbeat_ticks * CONFIG.raft.tick_ms} ms each by default)",
    ),
    "quickstart.md": (
        f"has been down for {UNREACHABLE_SECONDS:g} s",
        f"no leader for {missing_leaders.LEADERLESS_SECONDS:g} s",
    ),
    "simulation.md": (f"`virtual_seconds_max` ({VIRTUAL_SECONDS_MAX:g})",),
    "reference/errors.md": (f"`--free-bytes-min` ({CONFIG.storage.free_bytes_min // MIB} MiB)",),
    "internals/placement.md": (
        f"up to {state.NODES_MAX:,} nodes in service",
        f"the data takes at {operators.CATCH_UP_BYTES_PER_SECOND_MIN // KIB} KiB/s",
        f"and {operators.CATCH_UP_SECONDS_MAX / 60:g} minutes",
    ),
    "internals/raft.md": (
        f"up to {2**election.DOUBLINGS_MAX} times, for as long",
        f"{IN_WORDS[CONFIG.raft.spare_entries_max]} entries on a node, or {thrift.HELD_BYTES_MAX // KIB} KiB",
        f"after {IN_WORDS[hedger.USUAL_TIMES]} times what entries took",
        f"at least {hedger.PATIENCE_NS_MIN // 1_000_000} ms and at most a tick",
        f"{IN_WORDS[thrift.RACES_LOST_MAX]} times in a row",
    ),
    "internals/snapshots.md": (
        f"{snapshot_parts.CHUNK_BYTES // KIB} KiB, {snapshot_parts.CHUNK_ROWS_MAX} rows, or one larger row",
        f"at most {snapshot_parts.WINDOW_CHUNKS} chunks are on their way",
        f"is silent for {snapshot_stream.SILENCE_SECONDS_MAX:g} seconds",
        f"got no further for {snapshot_stream.RESUME_SECONDS_MAX:g} seconds",
        f"{snapshot_sender.RETRY_SECONDS_MIN:g} seconds, which double each time up to "
        f"{snapshot_sender.RETRY_SECONDS_MAX:g}",
        f"cuts that at {INGEST_FILE_BYTES // MIB} MiB",
        f"no more than {maintenance.KEEPING_SEGMENTS_MAX} segments",
        f"the {maintenance.LAG_ENTRIES_MAX:,} entries or {maintenance.LAG_BYTES_MAX // MIB} MiB that are kept",
        f"not answered for {maintenance.AWAY_SECONDS:g} seconds that is kept up to {maintenance.KEEPING_SEGMENTS_MAX} "
        f"segments, too, and for the others up to {2 * maintenance.KEEPING_SEGMENTS_MAX}",
        f"keeps its last {maintenance.ENTRIES_KEPT} entries",
        f"with more than {maintenance.LOG_SEGMENTS_MAX} segments, the last MiB",
    ),
    "internals/storage.md": (
        f"(`--segment-bytes`, {CONFIG.storage.segment_bytes // MIB} MiB",
        f"random tokens of the last {LINEAGE_MAX} starts",
        f"more than {RECORD_DATA_BYTES_MAX // MIB} MiB of entry data",
        f"once more than {WalSettings().closed_segments_max} closed segments stand",
        f"there is the reserve, {WalSettings().reserve_bytes // MIB} MiB",
        f"{RocksSettings().write_buffer_bytes // MIB} MiB write buffers (at most {RocksSettings().write_buffers_max})",
        f"below `free_bytes_min` ({CONFIG.storage.free_bytes_min // MIB} MiB)",
    ),
}


@pytest.mark.parametrize("page", FIGURES)
def test_the_figures_of_a_page_are_those_of_the_code(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    wrong = [figure for figure in FIGURES[page] if figure not in text]
    assert not wrong, f"docs/{page} does not say: {wrong}"
