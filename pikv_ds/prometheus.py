"""The cache's figures for Prometheus, and for DeepSpeed's monitor.

``pikv_ds.serve_metrics(engine, port=9400)`` on each rank (another port for each on one machine) shows them under
``/metrics``; ``launch/grafana-pikv.json`` is a dashboard for it. Megatron's server has a ``/metrics`` of its own, with
the same names for its gauges (`megatron_patch.gauges`). The socket is prometheus_client's.

Figures are taken by the cache's own thread at the end of a step plan, at most once per `interval_s`: whoever scrapes
sees the last ones and never touches the cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pikv_ds.metrics import rank_stats

if TYPE_CHECKING:
    from pikv_ds.cache import ExpertShardedKVCache

PREFIX = "pikv:"

GAUGES = {
    "tokens": "Tokens per layer that lie on this rank, those of other ranks' sequences included.",
    "own_tokens": "Tokens of this rank's own sequences.",
    "pages": "Pages of all layers in this rank's pool.",
    "kv_bytes": "Bytes allocated for keys and values: pool, open tails, pages under way.",
    "pool_bytes": "The part of it that holds sealed pages, scales and slack included.",
    "summary_bytes": "Bytes allocated for the pages' summaries.",
    "peak_kv_bytes": "Most bytes at any moment.",
}
COUNTERS = {
    "steps": "Forward passes of the group.",
    "seals": "Pages sealed on this rank.",
    "overflowed_pages": "Pages that went to another rank than their home expert's.",
    "dropped_pages": "Pages' worth of prompts that budgets have dropped.",
    "evicted_pages": "Pages that budgets have freed while decoding.",
    "demoted_pages": "Pages over a budget that are kept with a smaller codec.",
    "moved_pages": "Pages that came here when experts were packed anew.",
    "queries": "Query tokens times layers.",
    "pages_in_scope": "(KV head, page) pairs that queries could have read here.",
    "pages_visited": "Those that they have read.",
}


@dataclass
class Watcher:
    """Keeps the last figures of a cache; hand it to `ExpertShardedKVCache.watchers`."""

    interval_s: float = 1.0
    then: Callable[[dict[str, Any]], None] | None = None
    """Called with new figures, on the cache's thread."""
    figures: dict[str, Any] = field(default_factory=dict)
    _last: float = -1e9

    def __call__(self, cache: ExpertShardedKVCache) -> None:
        now = time.monotonic()
        if now - self._last < self.interval_s:
            return
        self._last = now
        figures = rank_stats(cache)
        capacity = cache.pool.capacity_pages
        figures["kv_cache_usage_perc"] = cache.pool.num_used / capacity if capacity else None
        figures["waited_s"] = dict(cache.exchange.waited_s)
        self.figures = figures
        if self.then is not None:
            self.then(figures)


@dataclass(frozen=True, eq=False)
class Collector:
    """What prometheus_client asks for the figures."""

    watcher: Watcher

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = self.watcher.figures
        if not figures:
            return
        rank = [str(figures["rank"])]
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["rank"])
            gauge.add_metric(rank, figures[name])
            yield gauge
        if figures["kv_cache_usage_perc"] is not None:
            usage = GaugeMetricFamily(
                PREFIX + "kv_cache_usage_perc", "Share of the pool that is in use (1 is all).", labels=["rank"]
            )
            usage.add_metric(rank, figures["kv_cache_usage_perc"])
            yield usage
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["rank"])
            counter.add_metric(rank, figures[name])
            yield counter
        pages = GaugeMetricFamily(PREFIX + "pages_by_codec", "Pages here, by their codec.", labels=["rank", "codec"])
        for codec, count in figures["pages_by_codec"].items():
            pages.add_metric([*rank, codec], count)
        yield pages
        wire = CounterMetricFamily(PREFIX + "wire_bytes", "Bytes sent to other ranks.", labels=["rank", "kind"])
        for kind, num_bytes in figures["sent_bytes"].items():
            wire.add_metric([*rank, kind], num_bytes)
        yield wire
        waited = CounterMetricFamily(
            PREFIX + "waited_seconds", "Time in which the host waited for other ranks.", labels=["rank", "what"]
        )
        for what, seconds in figures["waited_s"].items():
            waited.add_metric([*rank, what], seconds)
        yield waited
        if figures["reuse"] is not None:
            for name, value in zip(("visits", "hits"), figures["reuse"], strict=True):
                counter = CounterMetricFamily(
                    f"{PREFIX}lookup_{name}", f"Page {name} of sparse lookups (see pikv_ds.reuse).", labels=["rank"]
                )
                counter.add_metric(rank, value)
                yield counter
        if figures["audit"] is not None:
            mass = GaugeMetricFamily(
                PREFIX + "captured_mass", "Attention mass that sparse lookups held, where audited.", labels=["rank"]
            )
            mass.add_metric(rank, figures["audit"]["mean"])
            yield mass


@dataclass(frozen=True)
class Server:
    """A running ``/metrics``."""

    port: int
    watcher: Watcher
    _server: Any
    _thread: threading.Thread
    _cache: ExpertShardedKVCache

    def close(self) -> None:
        """Stops it, and takes nothing from the cache any more."""
        if self.watcher in self._cache.watchers:
            self._cache.watchers.remove(self.watcher)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(cache: ExpertShardedKVCache, port: int = 9400, interval_s: float = 1.0, address: str = "0.0.0.0") -> Server:
    """Shows a cache's figures under ``http://address:port/metrics``.

    Args:
        port: 0 takes a free one; see `Server.port`.
        interval_s: least time between two readings of the cache.

    Raises:
        ValueError: prometheus_client is missing, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ValueError(f"metrics need prometheus_client ({error}); pip install prometheus_client") from None
    watcher, registry = Watcher(interval_s), CollectorRegistry()
    registry.register(Collector(watcher))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise ValueError(f"port = {port}: {error}; use another, or 0 for a free one") from None
    cache.watchers.append(watcher)
    watcher(cache)
    return Server(server.server_port, watcher, server, thread, cache)


def monitor_events(figures: dict[str, Any]) -> list[tuple[str, float, int]]:
    """A reading as DeepSpeed's monitor takes it: ``(name, value, step)``."""
    names = [*GAUGES, *COUNTERS]
    step = int(figures["steps"])
    events = [(f"PiKV/{name}", float(figures[name]), step) for name in names if name != "steps"]
    events.append(("PiKV/wire_bytes", float(sum(figures["sent_bytes"].values())), step))
    if figures["audit"] is not None:
        events.append(("PiKV/captured_mass", float(figures["audit"]["mean"]), step))
    return events
