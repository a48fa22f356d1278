"""The node's figures as Prometheus reads them, gathered when it asks.

Lives here: names, meanings, and which part of the node knows the figure. The rule: nothing is counted for the sake of
a metric; what the parts' ``statistics()`` say is all there is. A metric's name is a promise to dashboards: add, do not
rename.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

import shardkv
from shardkv.server.loop_health import BOUNDS_SECONDS, LoopStatistics

if TYPE_CHECKING:
    from shardkv.server.parts import Parts

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """``parts()`` is the node, or None while it starts; ``requests()`` counts the answered requests by path."""

    def __init__(self, parts: "Callable[[], Parts | None]", requests: Callable[[], dict[str, int]]) -> None:
        self._parts = parts
        self._requests = requests
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not gather figures of a node that does not stand yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        yield _labelled_counter(
            "shardkv_admin_requests", "Requests that the admin endpoint answered.", "path", self._requests()
        )
        parts = self._parts()
        if parts is not None:
            yield from _node(parts)
            yield from _work(parts)
            yield from _storage(parts)
            yield from _disk(parts)
            yield from _clock(parts)
            yield from _connections(parts)
            yield _lateness(parts.probe.statistics())
            yield from _garbage(parts)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    """Its sample is called ``name_total``."""
    return CounterMetricFamily(name, help, value=value)


def _labelled_counter(name: str, help: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _node(parts: "Parts") -> Iterable[Metric]:
    identity = parts.identity
    yield InfoMetricFamily(
        "shardkv_node",
        "Who this node is.",
        value={
            "name": parts.name,
            "node_id": str(identity.node_id),
            "cluster_id": identity.cluster_id.hex(),
            "address": identity.address,
            "version": shardkv.__version__,
        },
    )
    yield _gauge("shardkv_boot", "How often this node has been started.", identity.boot)
    yield _gauge("shardkv_ready", "1 while the node serves and is not draining.", not parts.unready())


def _work(parts: "Parts") -> Iterable[Metric]:
    driver = parts.driver.statistics()
    replicas = parts.driver.catalog.replicas
    yield _counter("shardkv_turns", "Turns of the driver.", driver.turns)
    yield _counter("shardkv_syncs", "Log records that were synced, each for all groups of a turn.", driver.syncs)
    yield _counter("shardkv_entries_applied", "Log entries applied, over all groups.", driver.entries_applied)
    yield _gauge("shardkv_replicas", "Replicas on this node, the placement group's among them.", len(replicas))
    yield _gauge("shardkv_leaders", "Replicas that lead.", sum(each.leads for each in replicas.values()))


def _storage(parts: "Parts") -> Iterable[Metric]:
    wal, engine = parts.driver.wal.statistics(), parts.driver.engine
    yield _gauge("shardkv_log_segments", "Segment files of the Raft log.", wal.segments)
    yield _gauge("shardkv_log_bytes", "Bytes of the Raft log on disk.", wal.segment_bytes)
    yield _gauge("shardkv_log_cached_bytes", "Bytes of log entries kept in memory.", wal.cached_bytes)
    yield _counter("shardkv_log_records", "Records written to the Raft log.", wal.records)
    yield _counter("shardkv_log_written_bytes", "Bytes written to the Raft log.", wal.written_bytes)
    yield _gauge("shardkv_log_failed", "1 once a write or sync of the log has failed.", wal.failed)
    yield _gauge("shardkv_engine_unflushed_bytes", "Applied, but so far only in the Raft log.", engine.unflushed_bytes)
    yield _gauge("shardkv_engine_stalled", "1 while writes to the engine are held back.", engine.stalled())


def _disk(parts: "Parts") -> Iterable[Metric]:
    disk = parts.disk_health.statistics()
    yield _gauge("shardkv_disk_slow", "1 while syncs stall and the node gives its leaderships away.", disk.slow)
    yield _counter("shardkv_disk_slow_times", "How often the disk became slow.", disk.slow_count)
    yield _gauge("shardkv_log_sync_seconds_max", "The slowest sync since the start.", disk.sync_seconds_max)
    yield _counter("shardkv_leaderships_given_away", "Taken by others while the disk was slow.", disk.given_away)


def _clock(parts: "Parts") -> Iterable[Metric]:
    clock = parts.clock_health.statistics()
    help = "How far the wall clock is ahead of the time that the node goes by; negative when it is behind."
    yield _gauge("shardkv_wall_clock_ahead_seconds", help, clock.wall_ahead_seconds)
    yield _gauge("shardkv_clock_peers", "Other nodes that have lately said what time it is.", clock.peers)


def _connections(parts: "Parts") -> Iterable[Metric]:
    listener = parts.listener.statistics()
    yield _gauge("shardkv_connections", "Open connections: clients, nodes, those still greeting.", listener.connections)
    yield _gauge("shardkv_client_connections", "Open connections of clients.", listener.clients)
    labels = ["peer", "purpose"]
    connected = GaugeMetricFamily("shardkv_peer_connected", "1 while connected to the peer.", labels=labels)
    connects = CounterMetricFamily("shardkv_peer_connects", "Connections made to the peer.", labels=labels)
    dropped = CounterMetricFamily("shardkv_peer_frames_dropped", "Frames the peer could not be sent.", labels=labels)
    buffered = GaugeMetricFamily("shardkv_peer_buffered_bytes", "Bytes that wait to be sent.", labels=labels)
    for link in parts.pool.statistics():
        values = [str(link.node_id), link.purpose.name.lower()]
        connected.add_metric(values, link.connected)
        connects.add_metric(values, link.connects)
        dropped.add_metric(values, link.frames_dropped)
        buffered.add_metric(values, link.bytes_buffered)
    yield from (connected, connects, dropped, buffered)


def _lateness(loop: LoopStatistics) -> Metric:
    total, buckets = 0, []
    for bound, count in zip((*BOUNDS_SECONDS, float("inf")), loop.counts):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return HistogramMetricFamily(
        "shardkv_loop_lateness_seconds",
        "How much too late a probe of the node's loop woke.",
        buckets=buckets,
        sum_value=loop.late_seconds_sum,
    )


def _garbage(parts: "Parts") -> Iterable[Metric]:
    if parts.garbage is None:
        return
    garbage = parts.garbage.statistics()
    kinds = {"young": garbage.young, "full": garbage.full}
    yield _labelled_counter("shardkv_garbage_collections", "Collections of cyclic garbage.", "kind", kinds)
    yield _counter("shardkv_garbage_pause_seconds", "The loop stood still for them.", garbage.pause_seconds_sum)
    yield _gauge("shardkv_garbage_pause_seconds_max", "The longest of these pauses.", garbage.pause_seconds_max)
