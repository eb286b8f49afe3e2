"""Placements: on which rank a sealed page lives. They never touch the model's own choice of experts.

A policy is a frozen dataclass with one method; add one by writing it and naming it in `PLACEMENTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Placement(Protocol):
    """Where a page lives."""

    name: str

    @property
    def packing(self) -> Packing | None:
        """How experts are packed anew over the ranks, and pages move after them; None: never."""
        ...

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        """Ranks in order of preference.

        Args:
            page_idx: number of the page within its sequence, 0 = first.
            votes: how often the page's tokens chose each expert, ``[num_experts]``; None at
                layers without a router.
            seen: the sums of the votes of all pages that this rank has placed at the layer so far, this one
                included, ``[num_experts]``.
        """
        ...


def _ranking(votes: Sequence[float]) -> list[int]:
    """Experts by votes, most first; ties go to the lower number, so that all ranks agree."""
    return sorted(range(len(votes)), key=lambda e: (-votes[e], e))


@dataclass(frozen=True)
class InterleavePlacement:
    """Page ``p`` lives on rank ``p mod G``: the placement of decode context parallelism (vLLM, SGLang)."""

    name = "interleave"
    packing = None

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        return [(page_idx + i) % topology.num_ranks for i in range(topology.num_ranks)]


@dataclass(frozen=True)
class ExpertPlacement:
    """A page lives with the expert that its tokens activated most (PiKV); overflow follows its ranking."""

    name = "expert"
    packing = None

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        if votes is None:
            return InterleavePlacement().owners(page_idx, votes, topology)
        return list(dict.fromkeys(topology.owner(e) for e in _ranking(votes)))


@dataclass(frozen=True)
class HashPlacement:
    """The paper's hash ``s(t, e) = (t mod N) xor (e mod E)`` over pages and home experts."""

    period: int = 1024
    """N: the page number is taken modulo this."""
    name = "hash"
    packing = None

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "period")

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        home = _ranking(votes)[0] if votes is not None else 0
        expert = ((page_idx % self.period) ^ home) % topology.num_experts
        first = topology.owner(expert)
        return [(first + i) % topology.num_ranks for i in range(topology.num_ranks)]


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

    def __post_init__(self) -> None:
        checks.real_attribute(self, "alpha", 0, 100, "use a number between 0 (votes alone) and 100")

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        if votes is None:
            return InterleavePlacement().owners(page_idx, votes, topology)
        total, all_votes = max(1, sum(votes)), max(1, sum(seen))
        usual = [n / all_votes - 1 / len(votes) for n in seen] or [0.0] * len(votes)
        ranked = _ranking([v / total - self.alpha * u for v, u in zip(votes, usual, strict=True)])
        return list(dict.fromkeys(topology.owner(e) for e in ranked))


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

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "ranks_per_node")

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        if votes is None:
            return InterleavePlacement().owners(page_idx, votes, topology)
        by_rank = [max(v for e, v in enumerate(votes) if topology.owner(e) == r) for r in range(topology.num_ranks)]
        node = [r // self.ranks_per_node for r in range(topology.num_ranks)]
        by_node = [0] * (node[-1] + 1)
        for expert, n in enumerate(votes):
            by_node[node[topology.owner(expert)]] += n
        return sorted(range(topology.num_ranks), key=lambda r: (-by_node[node[r]], node[r], -by_rank[r], r))


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

    def owners(
        self, page_idx: int, votes: list[int] | None, topology: Topology, seen: Sequence[int] = ()
    ) -> list[int]:
        if votes is None:
            return InterleavePlacement().owners(page_idx, votes, topology)
        return list(dict.fromkeys(topology.owner(e, page_idx) for e in _ranking(votes)))


PLACEMENTS: dict[str, type[Placement]] = {
    "expert": ExpertPlacement,
    "eplb": EplbPlacement,
    "balanced": BalancedPlacement,
    "hierarchical": HierarchicalPlacement,
    "interleave": InterleavePlacement,
    "hash": HashPlacement,
}
