"""The cache's figures as Prometheus and DeepSpeed's monitor see them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import pikv_ds
from pikv_ds.observe.metrics import rank_stats
from pikv_ds.observe.prometheus import COUNTERS, GAUGES, HISTOGRAMS, Watcher, families, monitor_events, reading

pytest.importorskip("prometheus_client")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "page_size": 8,
    "capacity_tokens": 4096,
    "lookup": {"name": "quest", "budget": 0.5, "audit_every": 1},
    "codec": {"name": "per_layer", "layers": {"0": "int8"}, "default": "none"},
}


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny.mixtral()
    pikv_ds.attach(made, CONFIG)
    yield made
    pikv_ds.detach(made)


def scrape(port: int) -> dict[str, float]:
    """Samples by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_prometheus_sees_what_stats_says(model: Any) -> None:
    server = pikv_ds.serve_metrics(model, port=0, interval_s=0)
    cache = pikv_ds.new_cache(model)
    model(input_ids=tiny.prompt(2, 50), past_key_values=cache, use_cache=True)
    for _ in range(3):
        model(input_ids=tiny.prompt(2, 1), past_key_values=cache, use_cache=True)
    seen, facts = scrape(server.port), rank_stats(cache.store)
    for name in ("pages", "kv_bytes", "pool_bytes"):
        assert seen[f'pikv:{name}{{rank="0"}}'] == facts[name], name  # the last pass has sealed nothing
    assert seen['pikv:seals_total{rank="0"}'] == facts["seals"] > 0
    assert seen['pikv:steps_total{rank="0"}'] == facts["steps"]
    assert seen['pikv:pages_by_codec{codec="int8",rank="0"}'] == facts["pages_by_codec"]["int8"] > 0
    assert 0 < seen['pikv:kv_cache_usage_perc{rank="0"}'] < 1
    assert 0 < seen['pikv:captured_mass{rank="0"}'] <= 1
    assert {name for name in COUNTERS if f'pikv:{name}_total{{rank="0"}}' in seen} == set(COUNTERS)
    assert {name for name in GAUGES if f'pikv:{name}{{rank="0"}}' in seen} == set(GAUGES)
    with pytest.raises(ValueError, match=rf"port = {server.port}: .*use another, or 0"):
        pikv_ds.serve_metrics(model, port=server.port)
    server.close()
    assert not cache.store.watchers
    cache.release()


def test_metrics_are_for_this_machine_unless_said_otherwise(model: Any) -> None:
    for arguments, address in (({}, "127.0.0.1"), ({"address": "0.0.0.0"}, "0.0.0.0")):
        server = pikv_ds.serve_metrics(model, port=0, **arguments)
        assert server._server.server_address[0] == address
        server.close()
    for address in ("203.0.113.7", "no-such-host.invalid"):
        with pytest.raises(ValueError, match=f"address = '{address}': .*use one of this machine's"):
            pikv_ds.serve_metrics(model, port=0, address=address)


def test_latencies_of_generate(model: Any) -> None:
    """Three sequences, one of which ends after two tokens: three first tokens, and four times five, less three."""
    server = pikv_ds.serve_metrics(model, port=0, interval_s=0)
    ids = tiny.prompt(3, 20)
    free = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert scrape(server.port)['pikv:inter_token_latency_seconds_count{rank="0"}'] == 12
    row = next(r for r in range(3) if int(free[r, 21]) not in free[r, 22:].tolist() + free[r, 20:21].tolist())
    ends = int(free[row, 21])
    early = [free[r, 20:].tolist().index(ends) + 1 if ends in free[r, 20:].tolist() else 5 for r in range(3)]
    assert early[row] == 2
    model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=ends, pad_token_id=0)
    seen = scrape(server.port)
    assert seen['pikv:time_to_first_token_seconds_count{rank="0"}'] == 6
    assert seen['pikv:inter_token_latency_seconds_count{rank="0"}'] == 12 + sum(early) - 3
    for name in HISTOGRAMS:
        assert seen[f'pikv:{name}_bucket{{le="+Inf",rank="0"}}'] == seen[f'pikv:{name}_count{{rank="0"}}']
        assert 0 < seen[f'pikv:{name}_sum{{rank="0"}}'] < 60
    server.close()


def test_figures_of_several_ranks_are_one_family_each(model: Any) -> None:
    cache = pikv_ds.new_cache(model)
    first = reading(cache.store)
    found = list(families([first, {**json.loads(json.dumps(first)), "rank": 1, "reuse": None}]))
    assert len({f.name for f in found}) == len(found) > 20
    ranks = {f.name: [sample.labels["rank"] for sample in f.samples] for f in found}
    assert ranks["pikv:pages"] == ["0", "1"]
    assert ranks["pikv:lookup_hits"] == ["0"]


def test_a_watcher_takes_its_time(model: Any) -> None:
    readings: list[dict[str, Any]] = []
    cache = pikv_ds.new_cache(model)
    cache.store.watchers.append(Watcher(interval_s=3600, then=readings.append))
    for _ in range(3):
        model(input_ids=tiny.prompt(1, 9), past_key_values=cache, use_cache=True)
    assert len(readings) == 1
    events = monitor_events(readings[0])
    assert all(name.startswith("PiKV/") and step == readings[0]["steps"] for name, _, step in events)
    assert {"PiKV/kv_bytes", "PiKV/seals", "PiKV/wire_bytes"} <= {name for name, _, _ in events}


def test_metrics_of_a_model_without_a_cache() -> None:
    with pytest.raises(ValueError, match="PiKV is not attached"):
        pikv_ds.serve_metrics(tiny.mixtral())


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((ROOT / "launch" / "grafana-pikv.json").read_text())
    text = json.dumps(board)
    known = {f"pikv:{name}" for name in GAUGES} | {f"pikv:{name}_total" for name in COUNTERS}
    known |= {"pikv:kv_cache_usage_perc", "pikv:pages_by_codec", "pikv:pages_by_tier", "pikv:captured_mass"}
    known |= {"pikv:exposed_communication_seconds_total", "pikv:lookup_hits_total", "pikv:lookup_misses_total"}
    known |= {"pikv:wire_bytes_total", *(f"pikv:{name}_bucket" for name in HISTOGRAMS)}
    import re

    asked = set(re.findall(r"pikv:\w+", text))
    assert asked <= known, asked - known
    assert len(board["panels"]) >= 8
