"""The core on several ranks without a model: continuous batching, and batches that every rank has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import SHAPE, Driver, make_cache

from pikv_ds import PeerError
from pikv_ds.exchange import Exchange, make_group
from pikv_ds.metrics import rank_stats

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def own_batches(rank: int, seed: int, passes: int, **settings) -> dict:
    """Every rank's sequences come and go by themselves."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    rng = torch.Generator().manual_seed(seed * 100 + rank)
    cache = make_cache(exchange=exchange, **settings)
    driver = Driver(cache, cache.new_batch(0), rng)
    for _ in range(passes):
        driver.mixed_pass()
    held = cache.pool.num_used
    driver.release(list(range(len(driver.batch))))
    cache.begin_step(None, [])
    cache.check_integrity()
    exchange.close()
    return {"held": held, "left": cache.pool.num_used + cache.stored_tokens, **rank_stats(cache)}


def shared_batch(rank: int, seed: int, passes: int, **settings) -> dict:
    """Every rank makes the same batch; the routers' votes differ, as rounding may make them."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange, **settings)
    votes = torch.Generator().manual_seed(rank)
    driver = Driver(cache, cache.new_batch(2, shared=True), torch.Generator().manual_seed(seed), votes=votes)
    driver.pass_of([70, 45])
    for _ in range(passes):
        driver.mixed_pass()
    cache.begin_step(None, [])  # what has filled up since is sent
    batch = driver.batch
    sealed = sum(batch.sealed[r] * SHAPE.num_layers for r in range(len(batch)) if batch.alive[r])
    held, stats = cache.pool.num_used, rank_stats(cache)
    driver.release(list(range(len(batch))))
    cache.begin_step(None, [])
    cache.check_integrity()
    exchange.close()
    return {**stats, "held": held, "sealed": sealed, "left": cache.pool.num_used + cache.stored_tokens}


def different_tokens(rank: int) -> str:
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange)
    batch = cache.new_batch(1, shared=True)
    try:
        cache.begin_step(batch, [5], digest=rank)
    except PeerError as error:
        return str(error)
    finally:
        exchange.close()
    return ""


@pytest.mark.parametrize("settings", [{}, {"lookup": {"name": "quest", "budget": 1}}, {"capacity_tokens": 800}])
def test_sequences_of_each_rank_come_and_go(two: Ranks, settings: dict) -> None:
    results = two.run(own_batches, seed=len(settings), passes=50, **settings)
    assert [r["left"] for r in results] == [0, 0]
    assert all(r["held"] > 0 and r["pages_in_scope"] > 0 for r in results)


@pytest.mark.parametrize("settings", [{}, {"lookup": {"name": "quest", "budget": 1}}])
def test_a_batch_that_every_rank_has_is_stored_once(two: Ranks, settings: dict) -> None:
    results = two.run(shared_batch, seed=3, passes=30, **settings)
    assert [r["left"] for r in results] == [0, 0]
    assert results[0]["sealed"] == results[1]["sealed"] == sum(r["held"] for r in results)
    assert all(r["held"] > 0 for r in results)
    for r in results:
        assert set(r["sent_bytes"]) <= {"plan", "page_header", "partial"}  # neither queries nor pages
        assert r["sent_bytes"]["partial"] == r["queries"] * SHAPE.num_heads * (SHAPE.head_dim * 4 + 4)


def test_ranks_that_disagree_on_a_shared_batch_are_told(two: Ranks) -> None:
    for message in two.run(different_tokens):
        assert "different tokens (digests [0, 1])" in message
