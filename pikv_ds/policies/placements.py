"""Placements: on which rank a sealed page lives. They never touch the model's own choice of experts.

A policy is a frozen dataclass with one method; add one by writing it and naming it in `PLACEMENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pikv_ds.placement import Topology


@runtime_checkable
class Placement(Protocol):
    """Where a page lives."""

    name: str

    def owners(self, page_idx: int, votes: list[int] | None, topology: Topology) -> list[int]:
        """Ranks in order of preference.

        Args:
            page_idx: number of the page within its sequence, 0 = first.
            votes: how often the page's tokens chose each expert, ``[num_experts]``; None at
                layers without a router.
        """
        ...


def _ranking(votes: list[int]) -> list[int]:
    """Experts by votes, most first; ties go to the lower number, so that all ranks agree."""
    return sorted(range(len(votes)), key=lambda e: (-votes[e], e))


@dataclass(frozen=True)
class InterleavePlacement:
    """Page ``p`` lives on rank ``p mod G``: the placement of decode context parallelism (vLLM, SGLang)."""

    name = "interleave"

    def owners(self, page_idx: int, votes: list[int] | None, topology: Topology) -> list[int]:
        return [(page_idx + i) % topology.num_ranks for i in range(topology.num_ranks)]


@dataclass(frozen=True)
class ExpertPlacement:
    """A page lives with the expert that its tokens activated most (PiKV); overflow follows its ranking."""

    name = "expert"

    def owners(self, page_idx: int, votes: list[int] | None, topology: Topology) -> list[int]:
        if votes is None:
            return InterleavePlacement().owners(page_idx, votes, topology)
        return list(dict.fromkeys(topology.owner(e) for e in _ranking(votes)))


@dataclass(frozen=True)
class HashPlacement:
    """The paper's hash ``s(t, e) = (t mod N) xor (e mod E)`` over pages and home experts."""

    period: int = 1024
    """N: the page number is taken modulo this."""
    name = "hash"

    def __post_init__(self) -> None:
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period = {self.period!r}: use a whole number of at least 1")

    def owners(self, page_idx: int, votes: list[int] | None, topology: Topology) -> list[int]:
        home = _ranking(votes)[0] if votes is not None else 0
        expert = ((page_idx % self.period) ^ home) % topology.num_experts
        first = topology.owner(expert)
        return [(first + i) % topology.num_ranks for i in range(topology.num_ranks)]


PLACEMENTS: dict[str, type[Placement]] = {
    "expert": ExpertPlacement,
    "interleave": InterleavePlacement,
    "hash": HashPlacement,
}
