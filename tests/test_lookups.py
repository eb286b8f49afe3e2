"""Sparse lookups: what they choose, what they never leave out, and what audits find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import LATENT, PAGE, Driver, make_cache
from torch import Tensor

from pikv_ds.core.reuse import Audit, Reuse
from pikv_ds.observe.metrics import rank_stats
from pikv_ds.ops import Ops
from pikv_ds.ops.summaries import KeyBounds, SubPages
from pikv_ds.policies.codecs import CODECS
from pikv_ds.policies.lookups import (
    LOOKUPS,
    AdaptiveLookup,
    CacheAwareLookup,
    Candidates,
    TwoStageLookup,
    _smallest_set,
)
from pikv_ds.slabs import Slabs

OPS = Ops("auto")
HEADS, KV_HEADS, DIM, SIZE, PAGES = 4, 2, 32, 16, 24
SPARSE = ["two_stage", "quest", "topk", "adaptive", "cache_aware"]


def candidates(keys: Tensor, summary: KeyBounds | SubPages, rows: int = 1, **extra: Any) -> Candidates:
    """Pages of keys ``[P, K, S, D]`` in slots 1, 2, ..., the same ones for every row."""
    layout = CODECS["none"].layout(keys.shape[1], keys.shape[3], keys.shape[2], keys.dtype)
    pages = torch.full((len(keys) + 1, layout.page_bytes), 255, dtype=torch.uint8)
    summaries = torch.full((len(keys) + 1, summary.num_bytes(layout)), 255, dtype=torch.uint8)
    bounds = summaries[1:] if isinstance(summary, KeyBounds) else None
    OPS.seal_pages(keys, keys, layout, pages[1:], bounds, torch.zeros(1, dtype=torch.int32))
    if isinstance(summary, SubPages):
        summaries[1:] = summary.encode(keys, layout)
    slots = torch.arange(1, len(keys) + 1, dtype=torch.int32).expand(rows, -1).contiguous()
    counts = torch.full((rows,), len(keys), dtype=torch.int32)
    return Candidates(
        slots, slots - 1, counts, counts, Slabs.of(summaries), layout, Slabs.of(pages), DIM**-0.5, **extra
    )  # fmt: skip


def chosen(table: Tensor) -> Tensor:
    """Where pages are visited, bool ``[R, K, P]``."""
    return table > 0


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("codec", ["none", {"name": "none", "rotate": True}])
def test_a_budget_of_all_pages_is_exact(name: str, codec: Any, rng) -> None:
    options = {"pages": 1000} if name == "topk" else {"budget": 1}
    options |= {"mass": 1.0, "min_pages": 1000} if name == "adaptive" else {}
    cache = make_cache(lookup={"name": name, "audit_every": 3, **options}, codec=codec)
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in (37, 1, 1, 9, 1, *[1] * 9):
        driver.step(width)
    assert cache.shard.pages_visited == cache.shard.counters["pages_in_scope"] > 0
    assert cache.shard.audit.mean == pytest.approx(1.0, abs=1e-5)
    assert cache.shard.audit.raised == 1


@pytest.mark.parametrize("name", ["two_stage", "adaptive"])
def test_latent_pages_are_chosen_by_absorbed_queries(name: str, rng) -> None:
    cache = make_cache(LATENT, lookup={"name": name, "budget": 1, **({"min_pages": 99} if name == "adaptive" else {})})
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in (37, 1, 9, 1):
        driver.step(width)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grain", [1, 8, 32])
def test_subpages_come_back_within_half_a_step(bits: int, grain: int, rng) -> None:
    summary, layout = SubPages(grain, bits), CODECS["none"].layout(KV_HEADS, DIM, SIZE, torch.float32)
    keys = torch.randn(5, KV_HEADS, SIZE, DIM, generator=rng) * 3 + 1
    encoded = summary.encode(keys, layout)
    assert encoded.shape == (5, summary.num_bytes(layout))
    centres, spreads = summary.decode(encoded, layout)
    parts = keys.unflatten(2, (max(1, SIZE // grain), -1))
    low, high, mean = parts.amin(3), parts.amax(3), parts.mean(3)
    for got, true, levels in (
        (centres, (low + high) / 4 + mean / 2, (2**bits - 1) // 2),
        (spreads, (high - low) / 4, 2**bits - 1),
    ):
        step = true.abs().amax(-1, keepdim=True) / levels * (1 + 2**-10)
        assert ((got - true).abs() <= step * 0.501 + 1e-6).all()


def test_subpage_scores_are_the_log_sum_exp_of_half_bound_and_half_mean(rng) -> None:
    keys = torch.randn(PAGES, KV_HEADS, SIZE, DIM, generator=rng)
    query = torch.randn(3, HEADS, DIM, generator=rng)
    summary = SubPages(8, 8)
    pages = candidates(keys, summary, rows=3)
    out = torch.empty(3, HEADS, PAGES)
    OPS.subpage_scores(query, pages.summaries, pages.slots, pages.counts, pages.layout, summary, 0.5, out)
    parts = keys.unflatten(2, (2, 8))
    low, high, mean = (x[:, :, :, None] for x in (parts.amin(3), parts.amax(3), parts.mean(3)))  # [P, K, 2, 1, D]
    q = query.unflatten(1, (KV_HEADS, -1))[:, None, :, None]  # [R, 1, K, 1, G, D]
    bound = torch.maximum(q * low, q * high).sum(-1)
    expected = ((bound + (q * mean).sum(-1)) / 2 * 0.5).logsumexp(3)  # [R, P, K, G]
    torch.testing.assert_close(out, expected.flatten(2).transpose(1, 2), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("name", SPARSE)
def test_a_needle_is_found_and_pinned_pages_are_always_in(name: str, rng) -> None:
    keys = torch.randn(PAGES, KV_HEADS, SIZE, DIM, generator=rng)
    query = torch.randn(2, HEADS, DIM, generator=rng)
    query[:, 2:] = query[:, :2]
    keys[13, 0, 5] = query[0, 0] * 3
    keys[7, 1, 11] = query[1, 2] * 3
    options = {"pages": 4} if name == "topk" else {"budget": 0.2}
    policy = LOOKUPS[name](**options, sink_pages=1, local_pages=2)  # type: ignore[call-arg]
    assert policy.summary is not None
    pages = candidates(keys, policy.summary, rows=2)
    table = policy.select(OPS, query, pages)
    assert table.dtype == torch.int32
    got = chosen(table)
    assert got[0, 0, 13]
    assert got[1, 1, 7]
    assert got[..., [0, -1, -2]].all()
    assert (got.sum(-1) <= 5).all()
    assert torch.equal(table[got], pages.slots[:, None].expand_as(table)[got])


def test_two_stages_choose_by_the_stored_keys(rng) -> None:
    """With everything on the shortlist the choice is that of the true attention."""
    keys, query = torch.randn(PAGES, 1, SIZE, DIM, generator=rng), torch.randn(1, 1, DIM, generator=rng) * 2
    policy = TwoStageLookup(budget=0.25, shortlist=4, sink_pages=0, local_pages=0)
    got = chosen(policy.select(OPS, query, candidates(keys, policy.summary)))[0, 0]
    true = (keys[:, 0] @ query[0, 0] * DIM**-0.5).logsumexp(-1)
    assert set(got.nonzero().flatten().tolist()) == set(true.topk(6).indices.tolist())


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.floats(0.05, 1))
@settings(max_examples=100, deadline=None)
def test_the_smallest_set_is_the_smallest(values: list[float], mass: float) -> None:
    shares = torch.tensor(values, dtype=torch.float64)
    shares = (shares / shares.sum())[None, None]
    inside = _smallest_set(shares, mass)[0, 0]
    held, flat = shares[0, 0][inside], shares[0, 0]
    assert held.sum() >= mass - 1e-9
    assert held.sum() - held.min() < mass  # without its least it would not be enough
    assert not (~inside).any() or flat[~inside].max() <= held.min()


def test_adaptive_reads_less_where_attention_is_sharp(rng) -> None:
    keys = torch.randn(PAGES, 1, SIZE, DIM, generator=rng)
    flat, sharp = torch.randn(1, 1, DIM, generator=rng) * 0.01, torch.randn(1, 1, DIM, generator=rng)
    keys[9, 0, 3] = sharp[0, 0] * 10
    policy = AdaptiveLookup(budget=0.5, mass=0.9)
    counts = [int(chosen(policy.select(OPS, q, candidates(keys, policy.summary))).sum()) for q in (sharp, flat)]
    assert counts[0] <= 3 < counts[1] <= 12
    more = AdaptiveLookup(budget=0.5, mass=0.99)
    assert int(chosen(more.select(OPS, flat, candidates(keys, more.summary))).sum()) >= counts[1]


def test_cache_aware_prefers_what_was_visited_but_not_against_recall(rng) -> None:
    keys = torch.randn(PAGES, 1, SIZE, DIM, generator=rng)
    query = torch.randn(1, 1, DIM, generator=rng)
    true = (keys[:, 0] @ query[0, 0] * DIM**-0.5).logsumexp(-1).softmax(-1)
    order = true.argsort(descending=True).tolist()
    misses = torch.zeros(1, PAGES)
    misses[0, order[3]] = 1000.0  # the fourth best has not been visited for long
    keys_of = {}
    for recall in (0.01, float(true[order[:4]].sum()) - 1e-4):
        policy = CacheAwareLookup(
            budget=4 / PAGES, shortlist=6, penalty=1.0, recall=recall, sink_pages=0, local_pages=0
        )
        got = chosen(policy.select(OPS, query, candidates(keys, policy.summary, misses=misses)))[0, 0]
        keys_of[recall] = set(got.nonzero().flatten().tolist())
        assert len(keys_of[recall]) == 4
    low, high = keys_of.values()
    assert order[3] not in low
    assert high == set(order[:4])


def test_tier_costs_count_like_attention(rng) -> None:
    keys, query = (
        torch.randn(PAGES, 1, SIZE, DIM, generator=rng),
        torch.zeros(1, 1, DIM),
    )  # all pages are worth the same
    cost = torch.linspace(1, 0, PAGES)[None]
    policy = CacheAwareLookup(budget=3 / PAGES, shortlist=8, recall=0.001, sink_pages=0, local_pages=0)
    got = chosen(policy.select(OPS, query, candidates(keys, policy.summary, tier_cost=cost)))[0, 0]
    assert set(got.nonzero().flatten().tolist()) <= {0, *range(PAGES - 3, PAGES)}  # 0: the recall floor's one page


def test_audits_raise_a_budget_that_captures_too_little(rng) -> None:
    cache = make_cache(
        lookup={"name": "quest", "budget": 0.1, "audit_every": 1, "floor": 0.99, "sink_pages": 0, "local_pages": 0}
    )
    batch, shape = cache.new_batch(1), cache.shape
    for width in (30 * PAGE, *[1] * 15):
        cache.begin_step(batch, [width])
        for layer in range(shape.num_layers):
            query, key, value = (
                torch.randn(width, n, shape.head_dim, generator=rng) * 0.1
                for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            )
            cache.attend(batch, layer, query, key, value, 0.25)
            cache.routed(batch, layer, torch.zeros(width, 2, dtype=torch.int64))
    figures = rank_stats(cache)
    assert figures["audit"]["raised"] > 9  # attention is flat: only nearly all pages hold 0.99 of it
    assert figures["audit"]["worst"] < 0.2 < figures["audit"]["mean"] < 1
    assert figures["pages_visited"] > 0.3 * figures["pages_in_scope"]
    assert figures["reuse"][0] >= figures["reuse"][1] > 0
    assert sum(figures["reuse_distances"]) <= figures["reuse"][0]


def test_reuse_counts_hits_distances_and_misses_in_a_row() -> None:
    reuse = Reuse(torch.device("cpu"))
    reuse.stored([1, 2, 3], 4)
    for step, slots in ((1, [1, 2]), (2, [1]), (12, [1]), (13, [3, 1]), (14, [])):
        reuse.step = step
        reuse.visit(torch.tensor([[[0, *slots]]], dtype=torch.int32))
    assert reuse.counts.tolist() == [6, 2]
    assert reuse.histogram.tolist()[:4] == [2, 0, 0, 1]  # 1 pass twice, 10 passes once
    assert reuse.misses(torch.tensor([1, 2, 3])).tolist() == [0, 1, 1]
    reuse.stored([1], 4)
    assert reuse.misses(torch.tensor([1])).tolist() == [0]


def test_an_audit_remembers_the_worst() -> None:
    audit = Audit()
    assert audit.mean is None
    audit.note((0, 1), torch.tensor([0.5, 1.0]), floor=0.7)
    assert audit.raised == 1
    audit.note((0, 2), torch.tensor([0.25]), floor=0.7)
    assert (audit.boost((0, 1)), audit.boost((0, 2))) == (1, 1.25)
    assert (audit.raised, audit.worst, audit.mean) == (1.25, 0.25, pytest.approx(1.75 / 3))
    audit.forget((0, 2))
    assert audit.boost((0, 2)) == 1


BAD = {"budget": 0, "pages": 0, "shortlist": 0.5, "grain": 3, "summary_bits": 5, "mass": 0, "min_pages": 0,
       "penalty": 2, "recall": 0, "floor": 1.5, "audit_every": -1, "sink_pages": -1, "local_pages": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "option"), [(name, o) for name in SPARSE for o in BAD if o in LOOKUPS[name].__dataclass_fields__]
)
def test_bad_options_are_named(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} = "):
        LOOKUPS[name](**{option: BAD[option]})
