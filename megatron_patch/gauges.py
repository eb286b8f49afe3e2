"""Figures of the server for Prometheus: what each rank publishes, what the HTTP side counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from pikv_ds.observe import prometheus

PREFIX = "megatron:"
USAGE = PREFIX + "kv_cache_usage_perc"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)


class Board:
    """One dictionary of figures per rank, for all to read, without a collective operation.

    Args:
        store: a key-value store of the job, such as torch's TCPStore.
        rank, size: this rank, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size

    def publish(self, figures: dict[str, Any]) -> None:
        """Replaces this rank's figures."""
        self._store.set(f"figures/{self._rank}", json.dumps(figures))

    def read(self) -> dict[int, dict[str, Any]]:
        """The last figures of every rank that has published any."""
        keys = {rank: f"figures/{rank}" for rank in range(self._size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}


def engine_figures(engine: Any) -> dict[str, float]:
    """Load of one rank's dynamic engine."""
    context = engine.context
    allocator = context.block_allocator
    return {
        PREFIX + "num_requests_running": context.total_request_count - context.paused_request_count,
        PREFIX + "num_requests_waiting": len(engine.waiting_request_ids) + context.paused_request_count,
        USAGE: allocator.get_total_used() / max(1, allocator.total_count - 1),
    }


HELP = {
    PREFIX + "num_requests_running": "Requests in this rank's batch.",
    PREFIX + "num_requests_waiting": "Requests that wait on this rank, paused ones included.",
    USAGE: "Share of the blocks of Megatron's KV buffer that are in use (1 is all).",
}


class Metrics:
    """What ``/metrics`` shows. Names are vLLM's, where it has the same figure; those of the KV cache are PiKV's own
    (`pikv_ds.observe.prometheus`).

    Args:
        board: where the ranks publish.
    """

    def __init__(self, board: Board) -> None:
        self._registry = CollectorRegistry()
        self._board = board
        name, kind = PREFIX.rstrip(":"), self._registry
        self.success = Counter(f"{name}:request_success", "Answered requests.", ["finished_reason"], registry=kind)
        self.rejected = Counter(f"{name}:request_rejected", "Refused requests.", ["status"], registry=kind)
        self.prompt_tokens = Counter(f"{name}:prompt_tokens", "Tokens of prompts answered.", registry=kind)
        self.generation_tokens = Counter(f"{name}:generation_tokens", "Tokens generated.", registry=kind)
        self.latency = Histogram(
            f"{name}:e2e_request_latency_seconds",
            "From a request's arrival to its answer.",
            buckets=_SECONDS,
            registry=kind,
        )
        self.queue = Histogram(
            f"{name}:request_queue_time_seconds",
            "From a request's arrival until all of its prompt is in the batch.",
            buckets=_SECONDS,
            registry=kind,
        )
        self.first_token = Histogram(
            f"{name}:time_to_first_token_seconds",
            "From a request's arrival to the end of the step that made its first token.",
            buckets=_SECONDS,
            registry=kind,
        )
        self.step = Histogram(
            f"{name}:inter_token_latency_seconds",
            "Duration of the steps that made tokens, the first token's left out.",
            buckets=_SECONDS,
            registry=kind,
        )
        self._registry.register(self)  # type: ignore[arg-type]  # see `collect`

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Any]:
        return []  # so that registering asks no rank for anything

    def collect(self) -> Iterator[Any]:
        """The ranks' figures; prometheus_client calls it."""
        families: dict[str, GaugeMetricFamily] = {}
        ranks = self._board.read()
        for rank, figures in ranks.items():
            for name, value in figures["engine"].items():
                family = families.setdefault(name, GaugeMetricFamily(name, HELP[name], labels=["rank"]))
                family.add_metric([str(rank)], value)
        yield from families.values()
        yield from prometheus.families([figures["pikv"] for figures in ranks.values() if figures["pikv"]])
