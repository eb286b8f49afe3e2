"""The cache's figures for Prometheus, and for DeepSpeed's monitor.

``pikv_ds.serve_metrics(engine, port=9400)`` on each rank (another port for each on one machine) shows them under
``/metrics``; ``launch/grafana-pikv.json`` is a dashboard for it. Megatron's server shows the same beside its own
figures (`megatron_patch.gauges`). The socket is prometheus_client's.

Figures are taken by the cache's own thread at the end of a step plan, at most once per `interval_s`. A scrape
gets the last ones and never touches the cache.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pikv_ds.core.latencies import SECONDS
from pikv_ds.core.reuse import WINDOW
from pikv_ds.errors import UsageError
from pikv_ds.observe.metrics import rank_stats

if TYPE_CHECKING:
    from pikv_ds.core.cache import ExpertShardedKVCache

PREFIX = "pikv:"

GAUGES = {
    "tokens": "Tokens per layer that lie on this rank, those of other ranks' sequences included.",
    "own_tokens": "Tokens of this rank's own sequences.",
    "pages": "Pages of all layers in this rank's pool.",
    "kv_bytes": "Bytes allocated for keys and values: pool, open tails, pages under way.",
    "pool_bytes": "The part of it that holds sealed pages, scales and slack included.",
    "summary_bytes": "Bytes allocated for the pages' summaries.",
    "peak_kv_bytes": "Most bytes at any moment.",
    "skew": "Pages of the fullest rank over the mean of all.",
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


HISTOGRAMS = {
    "time_to_first_token_seconds": "From the call to a sequence's first token.",
    "inter_token_latency_seconds": "From a token of a sequence to its next one.",
}


def reading(cache: ExpertShardedKVCache) -> dict[str, Any]:
    """A cache's figures now, as JSON values; needs no other rank."""
    figures = rank_stats(cache)
    capacity = cache.pool.capacity_pages
    figures["kv_cache_usage_perc"] = cache.pool.num_used / capacity if capacity else None
    figures["waited_s"] = dict(cache.exchange.waited_s)
    latencies = zip(HISTOGRAMS, (cache.first_token, cache.between_tokens), strict=True)
    figures["latencies"] = {name: (list(x.counts), x.total_s) for name, x in latencies if any(x.counts)}
    return figures


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
        self.figures = reading(cache)
        if self.then is not None:
            self.then(self.figures)


@dataclass(frozen=True, eq=False)
class Collector:
    """What prometheus_client asks for the figures."""

    watcher: Watcher

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        yield from families([self.watcher.figures] if self.watcher.figures else [])


def families(ranks: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Ranks' figures (`reading`) as prometheus_client's families of metrics; what no rank has is left out."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    def family(kind: Any, name: str, text: str, label: str | None, values: Sequence[Any]) -> Iterator[Any]:
        """One family: of each rank a figure or None, or one for each value of a label."""
        out = kind(PREFIX + name, text, labels=["rank"] if label is None else ["rank", label])
        for figures, of_rank in zip(ranks, values, strict=True):
            rank = str(figures["rank"])
            if label is None and of_rank is not None:
                out.add_metric([rank], of_rank)
            for value, figure in of_rank.items() if label is not None else ():
                out.add_metric([rank, value], figure)
        if out.samples:
            yield out

    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    for name, text in GAUGES.items():
        yield from family(gauge, name, text, None, [f[name] for f in ranks])
    for name, text in COUNTERS.items():
        yield from family(counter, name, text, None, [f[name] for f in ranks])
    usage = "Share of the pool that is in use (1 is all)."
    yield from family(gauge, "kv_cache_usage_perc", usage, None, [f["kv_cache_usage_perc"] for f in ranks])
    tiers = "Pages here, by the tier of memory that they lie in."
    yield from family(gauge, "pages_by_tier", tiers, "tier", [{"device": f["pages"]} for f in ranks])
    codecs = "Pages here, by their codec."
    yield from family(gauge, "pages_by_codec", codecs, "codec", [f["pages_by_codec"] for f in ranks])
    yield from family(counter, "wire_bytes", "Bytes sent to other ranks.", "kind", [f["sent_bytes"] for f in ranks])
    waited = "Communication that nothing hides: seconds in which the host waited for other ranks."
    yield from family(counter, "exposed_communication_seconds", waited, "what", [f["waited_s"] for f in ranks])
    soon = f"Visits of sparse lookups to pages that were visited at most {WINDOW} passes before."
    yield from family(counter, "lookup_hits", soon, None, [f["reuse"] and f["reuse"][1] for f in ranks])
    late = "The other visits of sparse lookups to pages."
    yield from family(
        counter, "lookup_misses", late, None, [f["reuse"] and f["reuse"][0] - f["reuse"][1] for f in ranks]
    )
    mass = "Attention mass that sparse lookups held, where audited."
    yield from family(gauge, "captured_mass", mass, None, [f["audit"] and f["audit"]["mean"] for f in ranks])
    for name, text in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(PREFIX + name, text, labels=["rank"])
        for figures in ranks:
            if name in figures["latencies"]:
                counts, total = figures["latencies"][name]
                bounds = [*map(str, SECONDS), "+Inf"]
                cumulative = list(zip(bounds, itertools.accumulate(counts), strict=True))
                histogram.add_metric([str(figures["rank"])], cumulative, total)
        if histogram.samples:
            yield histogram


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


def serve(
    cache: ExpertShardedKVCache, port: int = 9400, interval_s: float = 1.0, address: str = "127.0.0.1"
) -> Server:
    """Shows a cache's figures under ``http://address:port/metrics``.

    Args:
        port: 0 takes a free one; see `Server.port`.
        interval_s: least time between two readings of the cache.
        address: of this machine, to listen on.

    Raises:
        ValueError: prometheus_client is missing, the port is taken, or the address is not this machine's.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise UsageError(f"metrics need prometheus_client ({error}); pip install prometheus_client") from None
    watcher, registry = Watcher(interval_s), CollectorRegistry()
    registry.register(Collector(watcher))
    try:
        server, thread = start_http_server(port, address, registry)
    except socket.gaierror as error:
        raise UsageError(f"address = {address!r}: {error}; use one of this machine's") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"address = {address!r}: {error}; use one of this machine's") from None
        raise UsageError(f"port = {port}: {error}; use another, or 0 for a free one") from None
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
