"""Owners of pages: the memory bound holds at any skew, and no owner is ever overfilled."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.core.placement import NO_OWNER, fair_shares, owner_limit
from pikv_ds.ops import Ops
from pikv_ds.policies.placements import (
    BalancedPlacement,
    EplbPlacement,
    ExpertPlacement,
    HashPlacement,
    HierarchicalPlacement,
    InterleavePlacement,
    Placement,
    SealedPages,
)
from pikv_ds.policies.topology import Topology

UNLIMITED = 2**40
PLACEMENTS = [
    ExpertPlacement(),
    InterleavePlacement(),
    HashPlacement(),
    HashPlacement(period=3),
    BalancedPlacement(),
    HierarchicalPlacement(ranks_per_node=2),
    HierarchicalPlacement(),
]


def order_of(
    placement: Placement, page: int, votes: Sequence[int] | None, topology: Topology, seen: Sequence[int] | None = None
) -> list[int]:
    """The ranks for one page, best first."""
    arrays = [None if x is None else np.array([x], np.int64) for x in (votes, seen if seen is not None else votes)]
    (order,) = placement.owners(SealedPages(np.array([page]), *arrays), topology).tolist()
    return [rank for rank in order if rank >= 0]


# -- the rules, page by page in plain Python ---------------------------------------------------


def ranking(values: Sequence[float]) -> list[int]:
    """Experts, most first; ties go to the lower number."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


def slow_order(
    placement: Placement, page: int, votes: list[int] | None, topology: Topology, seen: list[int]
) -> list[int]:
    """What each placement's docstring says."""
    ranks = range(topology.num_ranks)
    if isinstance(placement, HashPlacement):
        home = 0 if votes is None else ranking(votes)[0]
        first = topology.owner(((page % placement.period) ^ home) % topology.num_experts)
        return [(first + i) % topology.num_ranks for i in ranks]
    if votes is None or isinstance(placement, InterleavePlacement):
        return [(page + i) % topology.num_ranks for i in ranks]
    if isinstance(placement, HierarchicalPlacement):
        node = [r // placement.ranks_per_node for r in ranks]
        by_node = [sum(v for e, v in enumerate(votes) if node[topology.owner(e)] == n) for n in range(node[-1] + 1)]
        best = [max(v for e, v in enumerate(votes) if topology.owner(e) == r) for r in ranks]
        return sorted(ranks, key=lambda r: (-by_node[node[r]], node[r], -best[r], r))
    values: list[float] = list(votes)
    if isinstance(placement, BalancedPlacement):
        total, every = max(1, sum(votes)), max(1, sum(seen))
        values = [v / total - placement.alpha * (n / every - 1 / len(votes)) for v, n in zip(votes, seen, strict=True)]
    return list(dict.fromkeys(topology.owner(e, page) for e in ranking(values)))


def choose_owner(
    preference: Sequence[int], loads: Sequence[int], limits: Sequence[int], free: Sequence[int]
) -> int | None:
    """The first preferred rank with room, else the least loaded one with room, else None."""
    for rank in preference:
        if loads[rank] < limits[rank] and free[rank] > 0:
            return rank
    rest = [r for r in range(len(loads)) if loads[r] < limits[r] and free[r] > 0]
    return min(rest, key=lambda r: (loads[r], r)) if rest else None


def page_limits(num_tokens: int, page_size: int, topology: Topology, source: int) -> list[int]:
    """How many pages each rank may own of a sequence that lives on one of them."""
    most = owner_limit(num_tokens, page_size, topology)
    return [most - (rank == source) for rank in range(topology.num_ranks)]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    ranks = draw(st.integers(1, 9))
    return Topology(ranks * draw(st.integers(1, 6)), ranks)


def bound(num_tokens: int, page_size: int, topology: Topology) -> int:
    """The README's invariant 2: on a rank, of one sequence and layer, ceil(L/G) + ceil(L/E) + page_size tokens."""
    return -(-num_tokens // topology.num_ranks) - (-num_tokens // topology.num_experts) + page_size


def place_growing(
    num_tokens: int, page_size: int, topology: Topology, source: int, preference: Callable[[int], list[int]]
) -> tuple[list[int], int]:
    """Places pages one by one while a sequence grows.

    Returns:
        Pages per rank, and how far the fullest rank came above the bound at any length: 0 if never.
    """
    loads, excess = [0] * topology.num_ranks, 0
    for page in range(num_tokens // page_size):
        length = (page + 1) * page_size
        owner = choose_owner(
            preference(page),
            loads,
            page_limits(length, page_size, topology, source),
            [UNLIMITED] * topology.num_ranks,
        )
        assert owner is not None, f"page {page} found no owner although nothing is full"
        loads[owner] += 1
        for tail in range(min(page_size, num_tokens - length + 1)):
            for rank, pages in enumerate(loads):
                held = pages * page_size + (tail if rank == source else 0)
                excess = max(excess, held - bound(length + tail, page_size, topology))
    return loads, excess


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    topology=topologies(),
    page_size=st.sampled_from([1, 2, 8, 32]),
    pages=st.integers(0, 60),
    data=st.data(),
)
def test_bound_holds_for_any_preferences(topology: Topology, page_size: int, pages: int, data: st.DataObject) -> None:
    tail = data.draw(st.integers(0, page_size - 1))
    source = data.draw(st.integers(0, topology.num_ranks - 1))
    ranks = st.lists(st.integers(0, topology.num_ranks - 1), unique=True)  # may name only some, or none
    preferences = data.draw(st.lists(ranks, min_size=pages, max_size=pages))
    length = pages * page_size + tail
    loads, excess = place_growing(length, page_size, topology, source, lambda page: preferences[page])
    assert sum(loads) == pages
    assert excess == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    topology=topologies(),
    page_size=st.sampled_from([8, 32]),
    num_tokens=st.integers(0, 2000),
    placement=st.sampled_from(PLACEMENTS),
    data=st.data(),
)
def test_bound_holds_when_all_votes_go_to_one_expert(
    topology: Topology, page_size: int, num_tokens: int, placement: Placement, data: st.DataObject
) -> None:
    votes = [0] * topology.num_experts
    votes[data.draw(st.integers(0, topology.num_experts - 1))] = 2 * page_size
    source = data.draw(st.integers(0, topology.num_ranks - 1))
    loads, excess = place_growing(
        num_tokens, page_size, topology, source, lambda page: order_of(placement, page, votes, topology)
    )
    assert sum(loads) == num_tokens // page_size
    assert excess == 0


@pytest.mark.parametrize("all_at_once", [False, True])
def test_ninety_percent_of_the_votes_for_one_expert(all_at_once: bool) -> None:
    """Four ranks, eight experts, 4,000 tokens: the hot rank takes its whole bound and no more."""
    topology, page_size, num_tokens, source = Topology(8, 4), 32, 4000, 1
    loads = [0] * 4
    for page in range(num_tokens // page_size):
        length = num_tokens if all_at_once else (page + 1) * page_size  # a prompt's length is known
        limits = page_limits(length, page_size, topology, source)
        preference = order_of(ExpertPlacement(), page, [2, 0, 0, 0, 58, 2, 1, 1], topology)
        assert preference[0] == 2
        owner = choose_owner(preference, loads, limits, [UNLIMITED] * 4)
        assert owner is not None
        loads[owner] += 1
    assert sum(loads) == 125
    assert loads[2] == bound(num_tokens, page_size, topology) // page_size == 47  # 1,000 + 500 + 32 tokens
    assert max(loads) == loads[2]


def test_source_has_one_page_less_for_its_tail() -> None:
    assert page_limits(1000, 10, Topology(8, 4), source=2) == [38, 38, 37, 38]  # (250 + 125 + 10) // 10
    assert page_limits(0, 10, Topology(8, 4), source=0) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("preference", "loads", "limits", "free", "owner"),
    [
        ([2, 0], [0, 0, 0], [1, 1, 1], [9, 9, 9], 2),  # the first choice
        ([2, 0], [0, 0, 1], [1, 1, 1], [9, 9, 9], 0),  # over its share: the second
        ([2, 0], [0, 0, 0], [1, 1, 1], [9, 9, 0], 0),  # no room: the second
        ([2], [3, 2, 4], [4, 4, 4], [9, 9, 9], 1),  # none preferred: the least loaded
        ([2], [2, 2, 4], [4, 4, 4], [9, 9, 9], 0),  # equally loaded: the lower rank
        ([2], [3, 2, 4], [4, 4, 4], [9, 0, 9], 0),  # the least loaded with room
        ([], [1, 1], [1, 1], [9, 9], None),  # nobody may
        ([0, 1], [0, 0], [1, 1], [0, 0], None),  # nobody can
    ],
)
def test_choose_owner(preference, loads, limits, free, owner) -> None:
    assert choose_owner(preference, loads, limits, free) == owner


small = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(free=small, demand=small)
def test_fair_shares(free: list[int], demand: list[int]) -> None:
    shares = fair_shares(free, demand)
    total = sum(demand)
    assert len(shares) == len(demand)
    for owner, pages in enumerate(free):
        column = [row[owner] for row in shares]
        assert min(column) >= 0
        if pages < total:
            assert sum(column) == pages  # contended: all of it is handed out, and no page twice
        else:
            assert column == demand  # plenty: open to everybody
    if sum(free) >= total:
        for source, pages in enumerate(demand):
            assert sum(shares[source]) >= pages, "there is room for all pages, but a source cannot place its own"


@pytest.mark.parametrize(
    ("free", "demand"),
    [([4, 4], [3, 5]), ([1, 1, 1], [1, 1, 1]), ([2, 2, 2, 2], [5, 1, 1, 1]), ([0, 7], [3, 4])],
)
def test_the_last_pages_of_the_pools_can_be_used(free: list[int], demand: list[int]) -> None:
    for source, row in enumerate(fair_shares(free, demand)):
        assert sum(row) >= demand[source]


@pytest.mark.parametrize(("experts", "ranks"), [(8, 3), (2, 4), (0, 1), (4, 0)])
def test_experts_must_spread_evenly(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{experts} experts cannot be spread evenly over {ranks}"):
        Topology(experts, ranks)


def test_experts_are_hosted_in_contiguous_blocks() -> None:
    assert [Topology(8, 4).owner(e) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def homes(draw: st.DrawFn, topology: Topology) -> tuple[tuple[int, ...], ...]:
    """Experts packed anew: every rank has at least one, some experts have several ranks."""
    ranks = st.lists(st.integers(0, topology.num_ranks - 1), min_size=1, max_size=3, unique=True)
    packed = [tuple(sorted(draw(ranks))) for _ in range(topology.num_experts)]
    return tuple(packed)


@pytest.mark.parametrize("placement", [*PLACEMENTS, EplbPlacement()], ids=lambda p: p.name)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(topology=topologies(), data=st.data())
def test_many_pages_are_ranked_as_one_by_one(placement: Placement, topology: Topology, data: st.DataObject) -> None:
    if isinstance(placement, ExpertPlacement) and data.draw(st.booleans()):
        topology = dataclasses.replace(topology, homes=homes(data.draw, topology))
    numbers = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=6))
    row = st.lists(st.integers(0, 64), min_size=topology.num_experts, max_size=topology.num_experts)
    votes = data.draw(st.none() | st.lists(row, min_size=len(numbers), max_size=len(numbers)))
    seen = None if votes is None else np.cumsum(votes, axis=0)
    every = SealedPages(np.array(numbers), None if votes is None else np.array(votes), seen)
    got = placement.owners(every, topology).tolist()
    for i, (number, order) in enumerate(zip(numbers, got, strict=True)):
        expected = slow_order(
            placement, number, None if votes is None else votes[i], topology, [] if seen is None else seen[i].tolist()
        )
        assert [rank for rank in order if rank >= 0] == expected
        assert order == expected + [NO_OWNER] * (topology.num_ranks - len(expected))
        if topology.homes is None:
            assert sorted(order) == list(range(topology.num_ranks))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(topology=topologies(), data=st.data())
def test_place_pages_gives_the_owners_of_choose_owner(backend: str, topology: Topology, data: st.DataObject) -> None:
    ranks, pages, groups = topology.num_ranks, data.draw(st.integers(0, 30)), data.draw(st.integers(1, 3))
    orders = data.draw(
        st.lists(st.lists(st.integers(0, ranks - 1), unique=True), min_size=pages, max_size=pages)
    )  # may name only some, or none
    group = data.draw(st.lists(st.integers(0, groups - 1), min_size=pages, max_size=pages))
    limits = data.draw(st.lists(st.integers(0, 9), min_size=pages, max_size=pages))
    source = data.draw(st.integers(-1, ranks - 1))
    free = data.draw(st.lists(st.integers(0, 12), min_size=ranks, max_size=ranks))
    loads = [data.draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks)) for _ in range(groups)]
    table = torch.tensor([order + [NO_OWNER] * (ranks - len(order)) for order in orders], dtype=torch.int32)
    arrays = [torch.tensor(x, dtype=torch.int32) for x in (group, limits)]
    left, room = torch.tensor(loads, dtype=torch.int32), torch.tensor(free, dtype=torch.int64)
    owners = torch.full([pages], 99, dtype=torch.int32)
    Ops(backend).place_pages(table.view(pages, ranks), *arrays, source, left, room, owners)
    expected = []
    for order, g, limit in zip(orders, group, limits, strict=True):
        owner = choose_owner(order, loads[g], [limit - (r == source) for r in range(ranks)], free)
        expected.append(NO_OWNER if owner is None else owner)
        if owner is not None:
            loads[g][owner] += 1
            free[owner] -= 1
    assert owners.tolist() == expected
    assert left.tolist() == loads
    assert room.tolist() == free


def test_expert_placement_follows_the_votes() -> None:
    topology = Topology(8, 4)
    assert order_of(ExpertPlacement(), 0, [0, 1, 0, 0, 5, 0, 0, 9], topology) == [3, 2, 0, 1]
    assert order_of(ExpertPlacement(), 7, [0, 1, 0, 0, 5, 0, 0, 9], topology) == [3, 2, 0, 1]  # whatever the page
    assert order_of(ExpertPlacement(), 0, [0, 0, 4, 0, 4, 0, 0, 0], topology)[0] == 1  # a tie: the lower expert
    assert [order_of(ExpertPlacement(), page, None, topology)[0] for page in range(6)] == [0, 1, 2, 3, 0, 1]


def test_balanced_placement_is_the_experts_without_a_malus() -> None:
    topology, votes, seen = Topology(8, 4), [0, 1, 0, 0, 5, 0, 0, 9], [3, 1, 4, 1, 5, 9, 2, 60]
    without = order_of(BalancedPlacement(alpha=0), 3, votes, topology, seen)
    assert without == order_of(ExpertPlacement(), 3, votes, topology)
    assert order_of(BalancedPlacement(), 5, None, topology) == [1, 2, 3, 0]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_balanced_placement_evens_out_skewed_routing(alpha: float) -> None:
    """One expert has half of all votes, but pages differ a little: with a malus they spread."""
    rng, topology, seen, homes = random.Random(1), Topology(4, 4), [0] * 4, [0] * 4
    for page in range(400):
        votes = [16, 0, 0, 0]
        for expert in rng.choices(range(4), k=16):
            votes[expert] += 1
        seen = [a + b for a, b in zip(seen, votes, strict=True)]
        homes[order_of(BalancedPlacement(alpha), page, votes, topology, seen)[0]] += 1
    assert homes[0] == 400 if alpha == 0 else max(homes) < 160


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=16, max_size=16), st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_hierarchical_placement_stays_on_the_best_node(votes: list[int], per_node: int) -> None:
    topology = Topology(16, 8)
    order = order_of(HierarchicalPlacement(per_node), 0, votes, topology)
    assert sorted(order) == list(range(8))
    nodes = [rank // per_node for rank in order]
    assert len(list(itertools.groupby(nodes))) == len(set(nodes))  # node by node
    by_node = [
        sum(v for e, v in enumerate(votes) if topology.owner(e) // per_node == n) for n in range(max(nodes) + 1)
    ]
    assert by_node[nodes[0]] == max(by_node)
    best = [max(votes[2 * r], votes[2 * r + 1]) for r in order if r // per_node == nodes[0]]
    assert best == sorted(best, reverse=True)


def test_interleave_placement_ignores_the_votes() -> None:
    topology = Topology(8, 4)
    assert [order_of(InterleavePlacement(), p, [9] + [0] * 7, topology)[0] for p in range(6)] == [0, 1, 2, 3, 0, 1]
    assert order_of(InterleavePlacement(), 2, None, topology) == [2, 3, 0, 1]


def test_hash_placement_is_the_papers() -> None:
    topology = Topology(8, 4)
    votes = [0, 0, 0, 9, 0, 0, 0, 0]
    for page in range(40):
        expert = ((page % 11) ^ 3) % 8
        assert order_of(HashPlacement(period=11), page, votes, topology)[0] == topology.owner(expert)
        assert order_of(HashPlacement(period=11), page, None, topology)[0] == topology.owner((page % 11) % 8)
