"""Lookups: which pages a query visits.

A policy is a frozen dataclass with one method; add one by writing it and naming it in `LOOKUPS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.policies.summaries import KeyBounds
from pikv_ds.slabs import Slabs


@dataclass(frozen=True)
class Candidates:
    """The pages among which a lookup chooses: those of each query's sequence that lie on this rank."""

    slots: Tensor
    """``[R, P]`` int32; entries at and beyond `counts` are undefined."""
    page_idx: Tensor
    """``[R, P]`` int32, number of each page within its sequence."""
    counts: Tensor
    """``[R]`` int32."""
    num_sealed: Tensor
    """``[R]`` int32, sealed pages of each row's sequence over all ranks."""
    summaries: Slabs
    """The pool's summaries."""
    layout: PageLayout


@runtime_checkable
class Lookup(Protocol):
    """Which pages a query visits."""

    name: str

    @property
    def summary(self) -> KeyBounds | None:
        """What it needs to see of a page; None: nothing, it reads all pages."""
        ...

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        """The page table to attend to: int32 ``[R, P]``, or ``[R, K, P]`` with a choice per KV head
        and slot 0 where a page is left out.

        Args:
            ops: the `pikv_ds.ops.Ops` to compute with.
            query: ``[R, H, D]``.
        """
        ...


@dataclass(frozen=True)
class ExactLookup:
    """Every page: attention is exact."""

    name = "exact"
    summary = None

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        return pages.slots


@dataclass(frozen=True)
class QuestLookup:
    """The pages with the highest upper bound of ``q . k`` (Quest, Tang et al. 2024).

    A page's score for a query is ``sum_i max(q_i * min_i, q_i * max_i)`` over its keys' per-channel
    minima and maxima, the maximum over the query heads of a KV head. Sink and most recent pages
    are always visited. Every rank applies the budget to its own pages, so nothing but the query
    travels, and the wire does not grow with the context.
    """

    budget: float = 0.5
    """Share of the pages that a query visits, pinned pages included."""
    sink_pages: int = 1
    """First pages of a sequence that are always visited."""
    local_pages: int = 1
    """Most recently sealed pages that are always visited."""
    name = "quest"
    summary = KeyBounds()

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not 0 < self.budget <= 1:
            raise ValueError(f"budget = {self.budget!r}: use a share of the pages, above 0 and at most 1")
        for key in ("sink_pages", "local_pages"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{key} = {value!r}: use a whole number of at least 0")

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        rows, width = pages.slots.shape
        shape = rows, pages.layout.num_kv_heads, width
        scores = torch.empty(shape, dtype=torch.float32, device=query.device)
        ops.page_scores(query, pages.summaries, pages.slots, pages.counts, pages.layout, scores)
        sink = pages.page_idx < self.sink_pages
        recent = pages.page_idx >= pages.num_sealed[:, None] - self.local_pages
        budget = torch.ceil(pages.counts.double() * self.budget).int()
        table = torch.empty(shape, dtype=torch.int32, device=query.device)
        ops.select_pages(pages.slots, pages.counts, scores, sink | recent, budget, table)
        return table


LOOKUPS: dict[str, type[Lookup]] = {"exact": ExactLookup, "quest": QuestLookup}
