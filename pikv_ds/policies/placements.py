"""Placements: on which rank a sealed page lives. They never touch the model's own choice of experts.

A policy is a frozen dataclass with one method, which ranks the ranks for many pages at once; add one by writing it
and naming it in `PLACEMENTS`. Ties go to the lower expert or rank, so that all ranks agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pikv_ds import checks
from pikv_ds.policies.topology import Topology


class Packing(Protocol):
    """When experts are packed anew, and how many pages move for it."""

    @property
    def every(self) -> int:
        """Passes between two looks at the experts' pages."""
        ...

    @property
    def slack(self) -> float:
        """How many times the mean the fullest rank may hold of a layer's pages before its experts are packed anew."""
        ...

    @property
    def moves(self) -> int:
        """Pages that a rank gives away per pass, at most."""
        ...

    @property
    def redundant(self) -> int:
        """Experts per rank that may have one more rank."""
        ...


@dataclass(frozen=True)
class SealedPages:
    """What a placement knows of ``N`` pages with one topology, in the order in which they are placed."""

    numbers: NDArray[np.int64]
    """``[N]``: of the pages within their sequences, 0 = first."""
    votes: NDArray[np.int64] | None
    """``[N, E]``: how often a page's tokens chose each expert; None at layers without a router."""
    seen: NDArray[np.int64] | None = None
    """``[N, E]``: the sums of the votes of all pages that this rank has placed at a page's layer so far, it included;
    None unless the placement `wants_seen`."""


@runtime_checkable
class Placement(Protocol):
    """Where a page lives."""

    name: str

    @property
    def packing(self) -> Packing | None:
        """How experts are packed anew over the ranks, and pages move after them; None: never."""
        ...

    @property
    def wants_seen(self) -> bool:
        """Whether it reads `SealedPages.seen`."""
        ...

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        """Ranks in order of preference, ``[N, ranks]``; -1 in the places that are left where only some are named."""
        ...


def _interleaved(numbers: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    return (numbers[:, None] + np.arange(num_ranks)) % num_ranks


def _by_best_expert(values: NDArray[Any], pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
    """Ranks by the best of their experts, most first.

    Args:
        values: ``[N, E]``
    """
    ranks, (_, experts) = topology.num_ranks, values.shape
    if topology.homes is None:  # blocks: the lower expert is also on the lower rank
        best = values.reshape(len(values), ranks, experts // ranks).max(2)
        return (-best).argsort(axis=1, kind="stable")
    owner = topology.owners(pages.numbers)
    order = (-values).argsort(axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(experts)[None], axis=1)
    first = np.full((len(values), ranks), experts)
    np.minimum.at(first, (np.arange(len(values))[:, None], owner), place)
    named = np.where(first == experts, -1, np.arange(ranks))
    return np.take_along_axis(named, first.argsort(axis=1, kind="stable"), axis=1)


@dataclass(frozen=True)
class InterleavePlacement:
    """Page ``p`` lives on rank ``p mod G``: the placement of decode context parallelism (vLLM, SGLang)."""

    name = "interleave"
    packing = None
    wants_seen = False

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        return _interleaved(pages.numbers, topology.num_ranks)


@dataclass(frozen=True)
class ExpertPlacement:
    """A page lives with the expert that its tokens activated most (PiKV); overflow follows its ranking."""

    name = "expert"
    packing = None
    wants_seen = False

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        if pages.votes is None:
            return _interleaved(pages.numbers, topology.num_ranks)
        return _by_best_expert(pages.votes, pages, topology)


@dataclass(frozen=True)
class HashPlacement:
    """The paper's hash ``s(t, e) = (t mod N) xor (e mod E)`` over pages and home experts."""

    period: int = 1024
    """N: the page number is taken modulo this."""
    name = "hash"
    packing = None
    wants_seen = False

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "period")

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        homes = np.zeros_like(pages.numbers) if pages.votes is None else pages.votes.argmax(1)
        experts = ((pages.numbers % self.period) ^ homes) % topology.num_experts
        first = topology.owners(np.zeros_like(experts))[np.arange(len(experts)), experts]
        return _interleaved(first, topology.num_ranks)


@dataclass(frozen=True)
class BalancedPlacement:
    """`ExpertPlacement` with a malus for experts that are chosen all the time (PiKV's load-balanced routing).

    Experts are ranked by ``v_e - alpha * (mu_e - 1 / E)``: v_e the page's share of votes, mu_e the share over all
    pages so far. With alpha = 1 a page goes where its tokens deviate the most from the usual.
    """

    alpha: float = 0.5
    """Weight of the malus; 0: `ExpertPlacement`."""
    name = "balanced"
    packing = None
    wants_seen = True

    def __post_init__(self) -> None:
        checks.real_attribute(self, "alpha", 0, 100, "use a number between 0 (votes alone) and 100")

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        if pages.votes is None:
            return _interleaved(pages.numbers, topology.num_ranks)
        assert pages.seen is not None
        shares = pages.votes / pages.votes.sum(1, keepdims=True).clip(min=1)
        usual = pages.seen / pages.seen.sum(1, keepdims=True).clip(min=1) - 1 / topology.num_experts
        return _by_best_expert(shares - self.alpha * usual, pages, topology)


@dataclass(frozen=True)
class HierarchicalPlacement:
    """The node first, then the rank: nodes by the votes for all of their experts, ranks within by the expert's.

    What overflows stays on the node while it has room, so that pages of a sequence lie on few nodes and queries
    cross the slow network less.
    """

    ranks_per_node: int = 8
    """Ranks that share a node; the last node may have fewer."""
    name = "hierarchical"
    packing = None
    wants_seen = False

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "ranks_per_node")

    def owners(self, pages: SealedPages, topology: Topology) -> NDArray[np.int64]:
        if pages.votes is None:
            return _interleaved(pages.numbers, topology.num_ranks)
        ranks = topology.num_ranks
        by_expert = pages.votes.reshape(len(pages.numbers), ranks, -1)
        node = np.arange(ranks) // self.ranks_per_node
        firsts = np.arange(0, ranks, self.ranks_per_node)
        by_node = np.add.reduceat(by_expert.sum(2), firsts, axis=1)[:, node]
        best = by_expert.max(2)
        return np.lexsort((np.broadcast_to(np.arange(ranks), best.shape), -best, node + 0 * best, -by_node), axis=1)


@dataclass(frozen=True)
class EplbPlacement(ExpertPlacement):
    """`ExpertPlacement`, and experts are packed anew over the ranks where their pages pile up (EPLB, DeepSeek 2025).

    Hot experts get several ranks, which take their pages in turn (EPLB's redundant experts). The work is done by
    `pikv_ds.core.rebalance`; the experts of the model's feed-forward networks stay where they are.
    """

    every: int = 64
    """Passes between two looks at the experts' pages."""
    slack: float = 1.1
    """How many times the mean the fullest rank may hold of a layer's pages before its experts are packed anew."""
    moves: int = 32
    """Pages that a rank gives away per pass, at most, until all are where they belong."""
    redundant: int = 1
    """Experts per rank that may have one more rank; 0: each expert has one rank."""
    name = "eplb"

    @property
    def packing(self) -> Packing:  # type: ignore[override]
        return self

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "every", "moves")
        checks.whole_attributes(self, "redundant", least=0)
        checks.real_attribute(self, "slack", 1, 100, "use a factor of at least 1 and at most 100")


PLACEMENTS: dict[str, type[Placement]] = {
    "expert": ExpertPlacement,
    "eplb": EplbPlacement,
    "balanced": BalancedPlacement,
    "hierarchical": HierarchicalPlacement,
    "interleave": InterleavePlacement,
    "hash": HashPlacement,
}
