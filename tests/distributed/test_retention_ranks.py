"""Budgets over several ranks: what goes does not depend on how many there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import PAGE, make_cache, pages_of

from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.observe.metrics import rank_stats

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)
four = ranks_fixture(4)

POLICIES = ["lru", "streaming", "h2o", "snap", "chunk", "flexgen"]


def one_sequence(cache: ExpertShardedKVCache, source: int, passes: int) -> None:
    """A prompt and single tokens, the same ones wherever they run."""
    rng, shape, batch = torch.Generator().manual_seed(source), cache.shape, cache.new_batch(1)
    for width in [45 + 16 * source, *[1] * passes]:
        cache.begin_step(batch, [width])
        for layer in range(shape.num_layers):
            query, key, value = (
                torch.randn(width, heads, shape.head_dim, generator=rng) * 2
                for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            )
            cache.attend(batch, layer, query, key, value, 0.25)
            cache.routed(batch, layer, torch.randint(shape.num_experts, (width, 2), generator=rng))
    cache.begin_step(None, [])
    cache.check_integrity()


def pages_here(cache: ExpertShardedKVCache, source: int) -> list[list[int]]:
    """Numbers of a sequence's pages that lie here, of each unit; those of a second format with 1,000 added."""
    (row,) = [row for row in cache.ledger.rows.tolist() if cache.ledger.source[row] == source]
    formats = range(cache.table.num_formats)
    return [
        [1000 * f + p for f in formats for p, _ in pages_of(cache, row, unit, f)] for unit in range(cache.num_units)
    ]


def on_ranks(rank: int, passes: int, **settings: Any) -> dict[str, Any]:
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange, **settings)
    one_sequence(cache, rank, passes)
    here = [pages_here(cache, source) for source in range(exchange.size)]
    batch = cache._batches[0]
    loads = cache.ledger.pages[batch.rows[0]].sum(1).tolist()
    cache.release(batch)
    cache.begin_step(None, [])
    left = cache.pool.num_used, len(cache.ledger.rows)
    sent = dict(exchange.sent_bytes)
    exchange.close()
    return {"here": here, "left": left, "loads": loads, "sent": sent}


@pytest.mark.sampled
@pytest.mark.parametrize("retention", POLICIES)
@pytest.mark.parametrize("budget", ["uniform", "pyramid", "ada"])
def test_the_same_pages_stay_on_one_rank_and_on_two(two: Ranks, retention: str, budget: str) -> None:
    check(two, {"retention": retention, "budget": {"name": budget, "prompt": 0.7, "tokens": 5 * PAGE}})


def test_the_same_pages_stay_on_four_ranks(four: Ranks) -> None:
    settings = {"retention": "h2o", "budget": {"name": "ada", "tokens": 4 * PAGE}}
    check(four, settings | {"lookup": {"name": "quest", "budget": 1}, "placement": "interleave"})


def test_what_is_known_of_a_page_moves_with_it(two: Ranks) -> None:
    settings = {"retention": "h2o", "budget": {"name": "uniform", "tokens": 5 * PAGE}}
    results = check(two, settings | {"placement": {"name": "eplb", "every": 3, "moves": 2, "slack": 1.0}})
    assert sum(r["sent"].get("moved_page", 0) for r in results) > 0


@pytest.mark.parametrize("budget", ["uniform", "ada"])
def test_the_same_pages_are_demoted_on_one_rank_and_on_two(two: Ranks, budget: str) -> None:
    settings = {"retention": "h2o", "budget": {"name": budget, "prompt": 0.7, "tokens": 5 * PAGE}, "demote": "int8"}
    check(two, settings)


def check(ranks: Ranks, settings: dict[str, Any]) -> list[dict[str, Any]]:
    results = ranks.run(on_ranks, passes=60, **settings)
    for source in range(len(results)):
        alone = make_cache(**settings)
        one_sequence(alone, source, passes=60)
        figures = rank_stats(alone)
        assert figures["evicted_pages"] + figures["demoted_pages"] > 0
        mine = [sorted(unit) for unit in pages_here(alone, 0)]
        together = [
            sorted(p for r in results for p in r["here"][source][unit]) for unit in range(alone.num_units)
        ]  # each exactly once
        assert together == mine
        assert results[source]["loads"] == [len(unit) for unit in mine]
    assert all(r["left"] == (0, 0) for r in results)
    return results
