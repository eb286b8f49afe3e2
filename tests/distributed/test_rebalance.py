"""Experts are packed anew, and their pages move, while generation goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, ranks_fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import PAGE, Driver, make_cache, pages_of

from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.core.rebalance import pack
from pikv_ds.observe.metrics import rank_stats
from pikv_ds.policies.topology import Topology

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)
four = ranks_fixture(4)


def skewed_passes(rank: int, passes: int, shared: bool = False, hot: int = 2, **config: Any) -> dict[str, Any]:
    """Sequences whose tokens choose the first `hot` experts nearly always; attention is dense attention's."""
    exchange = Exchange(make_group(dist.group.WORLD, 20))
    cache = make_cache(exchange=exchange, **config)
    rng = torch.Generator().manual_seed(0 if shared else rank)
    driver = Driver(cache, cache.new_batch(2, shared=shared), rng, hot=hot)
    driver.pass_of([61, 40 if shared else 40 + 8 * rank])
    for _ in range(passes):
        driver.step(1)
    late = driver.admit()
    driver.pass_of([1, 1, 30])
    driver.release([late])
    driver.step(3)
    stats, sent = rank_stats(cache), dict(exchange.sent_bytes)
    routed = [len(pages_of(cache, row, 0)) for row in cache.ledger.rows.tolist()]
    homes = cache.sender.topologies[0].homes
    driver.release([0, 1])
    cache.begin_step(None, [])
    cache.check_integrity()
    left = cache.pool.num_used
    if cache.rebalancer is not None:
        left += int(cache.shard.by_expert.sum()) + len(cache.rebalancer._queue)
    exchange.close()
    return {**stats, "routed": sum(routed), "homes": homes, "left": left, "sent": sent}


EPLB = {"name": "eplb", "every": 4, "moves": 3, "redundant": 0}


def skew(results: list[dict[str, Any]]) -> float:
    pages = [r["routed"] for r in results]
    return max(pages) * len(pages) / sum(pages)


DEMOTION = {
    "retention": "h2o",
    "budget": {"name": "ada", "tokens": 4 * PAGE},
    "demote": {"name": "none", "rotate": True},
}
CONFIGS = [
    {},
    {"codec": {"name": "per_expert", "experts": {"1": {"name": "none", "rotate": True}}}},
    {"lookup": {"name": "quest", "budget": 1.0}},
]


@pytest.mark.parametrize(
    ("shared", "config"),
    [*((False, c) for c in [*CONFIGS, DEMOTION]), *((True, c) for c in CONFIGS)],
    ids=str,
)
def test_pages_move_and_attention_stays_exact(two: Ranks, shared: bool, config: dict[str, Any]) -> None:
    before = two.run(skewed_passes, passes=24, shared=shared, placement="expert", **config)
    after = two.run(skewed_passes, passes=24, shared=shared, placement=EPLB, **config)
    assert skew(after) < skew(before)
    assert all(r["homes"] == after[0]["homes"] for r in after)
    assert after[0]["homes"][0] != after[0]["homes"][1]  # the two hot experts have parted
    assert sum(r["moved_pages"] for r in after) > 0
    assert sum(r["sent"]["moved_page"] for r in after) > 0
    assert all(r["left"] == 0 for r in (*before, *after))


def test_a_hot_expert_gets_several_ranks(four: Ranks) -> None:
    """As many experts as ranks, and one that has it all: to move it elsewhere would not help."""
    before, packed, shared = (
        four.run(skewed_passes, passes=30, placement=placement, hot=1)
        for placement in ("expert", EPLB, EPLB | {"redundant": 1})
    )
    assert skew(packed) == skew(before) > 1.5
    assert skew(shared) < 1.2
    assert len(shared[0]["homes"][0]) == 4
    assert all(r["left"] == 0 for r in (*packed, *shared))


def test_a_full_pool_moves_what_it_can(two: Ranks) -> None:
    """Pages that have no room at home stay; nothing is lost, and nobody waits for room."""
    results = two.run(skewed_passes, passes=16, placement=EPLB, capacity_tokens=24 * PAGE, watermark=0.0)
    assert sum(r["moved_pages"] for r in results) > 0
    assert all(r["left"] == 0 for r in results)


def test_one_rank_has_nothing_to_move() -> None:
    assert make_cache(placement=EPLB).rebalancer is None


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_packing_never_makes_it_worse(ranks: int, per_rank: int, redundant: int, seed: int) -> None:
    counts = torch.randint(0, 50, [ranks * per_rank], generator=torch.Generator().manual_seed(seed)).tolist()
    topology = Topology(len(counts), ranks)
    homes = pack(counts, topology, 1.0, redundant)
    if homes is None:
        return
    loads = [[0.0] * ranks, [0.0] * ranks]
    for expert, n in enumerate(counts):
        loads[0][topology.owner(expert)] += n
        for rank in homes[expert]:
            loads[1][rank] += n / len(homes[expert])
    assert max(loads[1]) < max(loads[0])
    assert all(owners and len(set(owners)) == len(owners) for owners in homes)
    assert max(sum(rank in owners for owners in homes) for rank in range(ranks)) <= per_rank + redundant
    again = Topology(len(counts), ranks, homes)
    assert {again.owner(0, page) for page in range(ranks)} == set(homes[0])


def test_packing_moves_as_little_as_it_must() -> None:
    topology = Topology(4, 2)
    packed = pack([10, 10, 0, 0], topology, 1.1, 0)
    assert packed is not None
    assert {packed[0], packed[1]} == {(0,), (1,)}  # one of the two stays
    assert pack([10, 9, 10, 9], topology, 1.1, 0) is None  # even enough
    assert pack([40, 0, 0, 0], topology, 1.1, 0) is None  # nothing to part
    assert pack([0, 0, 0, 0], topology, 1.1, 1) is None
    shared = pack([40, 0, 0, 0], topology, 1.1, 1)
    assert shared is not None
    assert shared[0] == (0, 1)
