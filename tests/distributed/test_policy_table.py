"""Every policy with every other one, on one, two and four ranks: the invariants that hold whatever they choose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from passes import PAGE, make_cache
from torch import Tensor

from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.policies.lookups import LOOKUPS
from pikv_ds.policies.placements import PLACEMENTS
from pikv_ds.policies.retention import RETENTIONS

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)
four = ranks_fixture(4)

CODECS: list[Any] = [
    "none",
    "fp8",
    "int4",
    {"name": "int2", "rotate": True, "clip": True, "scales": 8},
    {"name": "int8", "values": "int3"},
    {"name": "per_layer", "layers": {"1": "int8"}, "default": "fp8"},
    {"name": "per_expert", "experts": {"0-1": "int8"}, "default": {"name": "int4", "rotate": True}},
]
SPARSE = {"audit_every": 3}
CHOICES: list[Any] = ["exact", *({"name": name, **SPARSE} for name in LOOKUPS if name != "exact")]
BUDGETS: list[dict[str, Any]] = [
    {},
    {"retention": "h2o", "budget": {"name": "uniform", "tokens": 4 * PAGE}},
    {"retention": "snap", "budget": {"name": "ada", "prompt": 0.5}},
    {"retention": "lru_plus", "budget": {"name": "pyramid", "prompt": 0.7, "tokens": 5 * PAGE}},
    {"retention": "chunk", "budget": {"name": "uniform", "prompt": 0.6}},
    {"retention": "h2o", "budget": {"name": "ada", "prompt": 0.5, "tokens": 4 * PAGE}, "demote": "int2"},
]
HOMES: list[Any] = [name if name != "eplb" else {"name": "eplb", "every": 3, "moves": 4} for name in PLACEMENTS]
TABLE = [
    (codec, lookup, HOMES[(i + i // len(BUDGETS)) % len(HOMES)], budget)
    for i, (codec, lookup, budget) in enumerate(itertools.product(CODECS, CHOICES, BUDGETS))
]
"""Placements go round: all of them meet all of the others, if not in all combinations."""


def table(every: int) -> pytest.MarkDecorator:
    """Every so many of the table's rows, as settings."""
    return pytest.mark.parametrize(("codec", "lookup", "placement", "budget"), TABLE[::every], ids=str)


def passes(cache: ExpertShardedKVCache, seeds: tuple[int, int], prompt: int, steps: int) -> list[Tensor]:
    """Outputs of the first of two sequences, pass by pass, whose data follow from their seeds alone."""
    shape, batch, out = cache.shape, cache.new_batch(2), []
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    for width in [prompt, *[1] * steps]:
        cache.begin_step(batch, [width, width])
        for layer in range(shape.num_layers):
            heads = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
            parts = [[torch.randn(width, n, shape.head_dim, generator=g) for n in heads] for g in sources]
            experts = torch.cat([torch.randint(shape.num_experts, (width, 2), generator=g) for g in sources])
            query, key, value = (torch.cat(pair) for pair in zip(*parts, strict=True))
            got = cache.attend(batch, layer, query, key, value, 0.25)
            assert got.isfinite().all()
            out.append(got[:width].clone())
            cache.routed(batch, layer, experts)
    cache.begin_step(None, [])  # what has filled up last is sent
    cache.check_integrity()
    sealed = sum(batch.sealed) * cache.num_units
    gone = int(batch.dropped.sum())
    held = int(cache.ledger.pages[batch.rows].sum())
    assert held + gone == sealed  # exactly once, or counted as dropped
    assert gone == 0 or cache.evictor.cuts
    cache.release(batch)
    cache.begin_step(None, [])
    return out


def check(settings: dict[str, Any], exchange: Exchange | None, rank: int) -> None:
    """Two runs that differ in the second sequence only, and one whose prompt is longer."""
    seed = 10 * rank
    first, second, longer = (
        passes(make_cache(exchange=exchange, **settings), seeds, prompt, steps)
        for seeds, prompt, steps in (((seed, 1), 35, 12), ((seed, 2), 35, 12), ((seed, 1), 35, 14))
    )
    for a, b, c in zip(first, second, longer, strict=False):
        if exchange is None or exchange.size == 1:
            assert torch.equal(a, b), "a sequence has seen another one"
        else:  # the other's pages change who holds what, and with it the order of sums
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4) if settings["lookup"] == "exact" else None
        torch.testing.assert_close(a, c, atol=0, rtol=0)  # nor has it seen what comes later


def on_ranks(rank: int, settings: dict[str, Any]) -> int:
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    check(settings, exchange, rank)
    pool = make_cache(exchange=exchange).pool.num_used
    exchange.close()
    return pool


@pytest.mark.sampled(together=2)
@table(1)
def test_on_one_rank(codec: Any, lookup: Any, placement: Any, budget: dict[str, Any]) -> None:
    check({"codec": codec, "lookup": lookup, "placement": placement, **budget}, None, 0)


@pytest.mark.sampled
@table(7)
def test_on_two_ranks(two: Ranks, codec: Any, lookup: Any, placement: Any, budget: dict[str, Any]) -> None:
    settings = {"codec": codec, "lookup": lookup, "placement": placement, **budget}
    assert two.run(on_ranks, settings=settings) == [0, 0]


@pytest.mark.sampled
@table(13)
def test_on_four_ranks(four: Ranks, codec: Any, lookup: Any, placement: Any, budget: dict[str, Any]) -> None:
    settings = {"codec": codec, "lookup": lookup, "placement": placement, **budget}
    assert four.run(on_ranks, settings=settings) == [0] * 4


def test_the_table_is_whole() -> None:
    assert {str(home) for _, _, home, _ in TABLE} == set(map(str, HOMES))
    assert {lookup if isinstance(lookup, str) else lookup["name"] for _, lookup, _, _ in TABLE} == set(LOOKUPS)
    assert {budget["retention"] for *_, budget in TABLE if budget} < set(RETENTIONS)
    for column, number in ((1, len(CHOICES)), (3, len(BUDGETS)), (0, len(CODECS))):
        pairs = {(str(row[2]), str(row[column])) for row in TABLE}
        assert len(pairs) == len(HOMES) * number, column
