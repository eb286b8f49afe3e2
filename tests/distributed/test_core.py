"""The core on several ranks without a model: continuous batching, and batches that every rank has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import LATENT, PAGE, SHAPE, Driver, make_cache, pages_of

from pikv_ds import PeerError
from pikv_ds.core.cache import ModelShape
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.observe.metrics import rank_stats, wire_bytes_per_token_layer

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def own_batches(rank: int, seed: int, passes: int, shape: ModelShape = SHAPE, **settings) -> dict:
    """Every rank's sequences come and go by themselves."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    rng = torch.Generator().manual_seed(seed * 100 + rank)
    cache = make_cache(shape, exchange, **settings)
    driver = Driver(cache, cache.new_batch(0), rng)
    for _ in range(passes):
        driver.mixed_pass()
    held = cache.pool.num_used
    driver.release(list(range(len(driver.batch))))
    cache.begin_step(None, [])
    cache.check_integrity()
    exchange.close()
    return {"held": held, "left": cache.pool.num_used + cache.stored_tokens, **rank_stats(cache)}


def shared_batch(rank: int, seed: int, passes: int, shape: ModelShape = SHAPE, **settings) -> dict:
    """Every rank makes the same batch; the routers' votes differ, as rounding may make them."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(shape, exchange, **settings)
    votes = torch.Generator().manual_seed(rank)
    driver = Driver(cache, cache.new_batch(2, shared=True), torch.Generator().manual_seed(seed), votes=votes)
    driver.pass_of([70, 45])
    for _ in range(passes):
        driver.mixed_pass()
    cache.begin_step(None, [])  # what has filled up since is sent
    batch = driver.batch
    sealed = sum(batch.sealed[r] * shape.num_layers for r in range(len(batch)) if batch.alive[r])
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


def latent_bytes(rank: int, prompt: int, steps: int, partial_dtype: str, width: int = 1) -> dict:
    """One sequence per rank: a prompt, then `width` tokens at a time. What was sent, and what the step plan said."""
    exchange = Exchange(make_group(dist.group.WORLD, 20), partial_dtype=getattr(torch, partial_dtype))
    cache = make_cache(LATENT, exchange)
    tolerance = 1e-5 if partial_dtype == "float32" else 2e-2
    driver = Driver(cache, cache.new_batch(1), torch.Generator().manual_seed(rank), tolerance)
    driver.pass_of([prompt])
    exchange.sent_bytes.clear()
    fetched = []
    for _ in range(steps):
        driver.pass_of([width])
        assert cache.plan is not None
        fetched.append([len(ids) for ids in cache.plan.fetches])
    here = [len(pages_of(cache, row, layer)) for row in range(2) for layer in range(2)]
    sent, formula = dict(exchange.sent_bytes), wire_bytes_per_token_layer(cache)
    exchange.close()
    return {"fetched": fetched, "here": here, "sent": sent, "formula": formula}


def release_at_different_times(rank: int, prompt: int, then_shared: bool) -> dict:
    """Rank 0 gives a batch that both have back at once, rank 1 a pass later, as finalizers may."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange)
    same, votes = torch.Generator().manual_seed(5), torch.Generator().manual_seed(rank)
    first = Driver(cache, cache.new_batch(1, shared=True), same, votes=votes)
    first.pass_of([prompt])
    first.pass_of([1])
    if rank == 0:
        first.release([0])
    own = torch.Generator().manual_seed(rank)
    batch = cache.new_batch(1, shared=True) if then_shared else cache.new_batch(1)
    second = Driver(cache, batch, same if then_shared else own, votes=votes)
    second.pass_of([20])
    if rank == 1:
        first.release([0])
    for _ in range(PAGE):
        second.pass_of([1])  # attention is compared with dense attention's
    cache.begin_step(None, [])
    cache.check_integrity()
    held = cache.pool.num_used
    second.release([0])
    cache.begin_step(None, [])
    exchange.close()
    return {"held": held, "left": cache.pool.num_used, "rows": len(cache.ledger.rows)}


@pytest.mark.parametrize(("prompt", "then_shared"), [(20, False), (23, True), (20, True)])
def test_a_shared_batch_may_end_at_different_times(two: Ranks, prompt: int, then_shared: bool) -> None:
    results = two.run(release_at_different_times, prompt=prompt, then_shared=then_shared)
    pages = 28 // PAGE * SHAPE.num_layers * (1 if then_shared else 2)
    assert sum(r["held"] for r in results) == pages
    assert [(r["left"], r["rows"]) for r in results] == [(0, 0), (0, 0)]


def shared_then_own(rank: int) -> int:
    """Both give the batch back while pages of it wait, and go on with their own."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange)
    shared = Driver(cache, cache.new_batch(1, shared=True), torch.Generator().manual_seed(5))
    shared.pass_of([23])
    shared.pass_of([1])
    assert cache.sender.num_staged
    shared.release([0])
    own = Driver(cache, cache.new_batch(1), torch.Generator().manual_seed(rank))
    own.pass_of([20])
    cache.check_integrity()
    exchange.close()
    return cache.pool.num_used


def test_own_batches_follow_a_shared_one(two: Ranks) -> None:
    assert sum(two.run(shared_then_own)) == 2 * 2 * SHAPE.num_layers


@pytest.mark.parametrize("settings", [{}, {"lookup": {"name": "quest", "budget": 1}}, {"capacity_tokens": 800}])
def test_sequences_of_each_rank_come_and_go(two: Ranks, settings: dict) -> None:
    results = two.run(own_batches, seed=len(settings), passes=50, **settings)
    assert [r["left"] for r in results] == [0, 0]
    assert all(r["held"] > 0 and r["pages_in_scope"] > 0 for r in results)


@pytest.mark.parametrize("settings", [{}, {"codec": "none", "lookup": {"name": "quest", "budget": 1}}])
def test_latent_sequences_of_each_rank_come_and_go(two: Ranks, settings: dict) -> None:
    results = two.run(own_batches, seed=7, passes=50, shape=LATENT, **settings)
    assert [r["left"] for r in results] == [0, 0]
    assert all(r["held"] > 0 and r["pages_in_scope"] > 0 for r in results)


def test_a_latent_batch_that_every_rank_has_is_stored_once(two: Ranks) -> None:
    results = two.run(shared_batch, seed=4, passes=30, shape=LATENT)
    assert [r["left"] for r in results] == [0, 0]
    assert results[0]["sealed"] == results[1]["sealed"] == sum(r["held"] for r in results)
    for r in results:
        assert set(r["sent_bytes"]) <= {"plan", "page_counts", "page_header", "partial"}
        assert r["sent_bytes"]["partial"] == r["queries"] * LATENT.num_heads * (LATENT.latent_dim * 4 + 4)


@pytest.mark.parametrize("partial_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pages", [2, 20])
def test_the_absorbed_query_of_a_single_token_travels(two: Ranks, pages: int, partial_dtype: str) -> None:
    """However short the context is: a decode pass has the same shapes all the time."""
    partial = 4 if partial_dtype == "float32" else 2
    token, steps = LATENT.num_heads * (LATENT.head_dim * 4 + LATENT.latent_dim * partial + 4), 3
    results = two.run(latent_bytes, prompt=pages * PAGE, steps=steps, partial_dtype=partial_dtype)
    assert all(r["fetched"] == [[0, 0]] * steps and r["formula"] == token for r in results)
    query = steps * LATENT.num_layers * LATENT.num_heads * LATENT.head_dim * 4
    assert [r["sent"]["query"] for r in results] == [query] * 2
    assert [r["sent"]["query"] + r["sent"]["partial"] for r in results] == [steps * LATENT.num_layers * token] * 2


def test_the_pages_travel_to_a_chunk_where_the_context_is_short(two: Ranks) -> None:
    results = two.run(latent_bytes, prompt=2 * PAGE, steps=2, partial_dtype="float32", width=3)
    assert all(r["fetched"] == [[1, 1]] * 2 for r in results)
    for rank, r in enumerate(results):
        leaving = sum(r["here"][2 * (1 - rank) :][:2])  # the other rank's pages, of both layers
        assert r["sent"].get("fetched_page", 0) == 2 * leaving * PAGE * LATENT.head_dim * 4
        assert not {"query", "partial"} & set(r["sent"])


@pytest.mark.parametrize("settings", [{}, {"lookup": {"name": "quest", "budget": 1}}])
def test_a_batch_that_every_rank_has_is_stored_once(two: Ranks, settings: dict) -> None:
    results = two.run(shared_batch, seed=3, passes=30, **settings)
    assert [r["left"] for r in results] == [0, 0]
    assert results[0]["sealed"] == results[1]["sealed"] == sum(r["held"] for r in results)
    assert all(r["held"] > 0 for r in results)
    for r in results:
        assert set(r["sent_bytes"]) <= {"plan", "page_counts", "page_header", "partial"}  # neither queries nor pages
        assert r["sent_bytes"]["partial"] == r["queries"] * SHAPE.num_heads * (SHAPE.head_dim * 4 + 4)


def test_ranks_that_disagree_on_a_shared_batch_are_told(two: Ranks) -> None:
    for message in two.run(different_tokens):
        assert "different tokens (digests [0, 1])" in message
