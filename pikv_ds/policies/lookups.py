"""Lookups: which pages a query visits.

A policy is a frozen dataclass with one method; add one by writing it and naming it in `LOOKUPS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pikv_ds import checks
from pikv_ds.layout import PageLayout
from pikv_ds.ops.summaries import KeyBounds, SubPages, Summary
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
    pages: Slabs
    """The pool's pages."""
    scale: float
    """Factor on ``q . k``."""
    boost: Tensor | None = None
    """``[R]``: by how much audits have raised each row's budget so far; None: not at all."""
    misses: Tensor | None = None
    """float32 ``[R, P]``: how often in a row each page was not visited shortly before (see `Reuse`); None: never."""
    tier_cost: Tensor | None = None
    """float32 ``[R, P]``, in nats: what it costs to read a page where it lies; None: all are on the device."""

    @property
    def exists(self) -> Tensor:
        """Where there is a page, bool ``[R, P]``."""
        return torch.arange(self.slots.shape[1], device=self.slots.device)[None] < self.counts[:, None]

    def pinned(self, sink_pages: int, local_pages: int) -> Tensor:
        """First and most recent pages, bool ``[R, P]``."""
        return (self.page_idx < sink_pages) | (self.page_idx >= self.num_sealed[:, None] - local_pages)

    def budget(self, share: float) -> Tensor:
        """Pages of a share of them, raised by the audits, int32 ``[R]``."""
        return torch.ceil(self.counts * self._raised(share).clamp(max=1.0) - 1e-9).int()

    def at_most(self, pages: int) -> Tensor:
        """So many pages, raised by the audits, int32 ``[R]``."""
        return torch.minimum(self.counts, torch.ceil(self._raised(pages) - 1e-9)).int()

    def _raised(self, amount: float) -> Tensor:
        ones = torch.ones(len(self.counts), dtype=torch.float64, device=self.counts.device)
        return amount * (ones if self.boost is None else self.boost)


@runtime_checkable
class Lookup(Protocol):
    """Which pages a query visits."""

    name: str

    @property
    def summary(self) -> Summary | None:
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
class SparseLookup:
    """What all lookups have that leave pages out."""

    sink_pages: int = 1
    """First pages of a sequence that are always visited."""
    local_pages: int = 1
    """Most recently sealed pages that are always visited."""
    audit_every: int = 64
    """Every so many passes all pages are read beside the chosen ones, and the attention mass that the choice holds is
    measured (`stats`). 0: never."""
    floor: float = 0.8
    """Where an audit finds less than this on average, the budget grows by a quarter."""

    wants_misses: ClassVar[bool] = False
    """Whether it looks at how often in a row a page was visited without having been so shortly before."""

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "sink_pages", "local_pages", "audit_every", least=0)
        _share(self, "floor", "a share of the attention mass")


@dataclass(frozen=True)
class QuestLookup(SparseLookup):
    """The pages with the highest upper bound of ``q . k`` (Quest, Tang et al. 2024).

    A page's score for a query is ``sum_i max(q_i * min_i, q_i * max_i)`` over its keys' per-channel
    minima and maxima, the maximum over the query heads of a KV head. Sink and most recent pages
    are always visited. Every rank applies the budget to its own pages, so nothing but the query
    travels, and the wire does not grow with the context.
    """

    budget: float = 0.5
    """Share of the pages that a query visits, pinned pages included."""
    name = "quest"
    summary = KeyBounds()

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "budget")

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        scores = _bounds(ops, query, pages)
        return _select(ops, pages, scores, pages.budget(self.budget), self)


@dataclass(frozen=True)
class TopkLookup(SparseLookup):
    """A fixed number of pages per rank, by Quest's bounds: what a query reads does not grow with the context."""

    pages: int = 16
    """Pages that a query visits on each rank, pinned ones included."""
    name = "topk"
    summary = KeyBounds()

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole_attributes(self, "pages")

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        return _select(ops, pages, _bounds(ops, query, pages), pages.at_most(self.pages), self)


@dataclass(frozen=True)
class TwoStageLookup(SparseLookup):
    """Sub-page summaries make a shortlist, exact scores on the stored keys rank it: the sparse default.

    First every page's log-sum-exp is estimated from its sub-pages (`SubPages`), soft-maxed over the pages, the
    maximum over the query heads of a KV head; the best ``shortlist * budget`` are ranked again by their true
    log-sum-exp on the keys as they are stored (`key_scores`). Reads of each KV head the summaries, the shortlist's
    keys, and keys and values of the budget.
    """

    budget: float = 0.125
    """Share of the pages that a query visits, pinned pages included."""
    shortlist: float = 4.0
    """How many times the budget is ranked exactly."""
    grain: int = 8
    """Tokens of a sub-page."""
    summary_bits: int = 8
    """Bits per element of a summary: 8, or 4, which takes half of the bytes and loses a few pages more."""
    name = "two_stage"

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "budget")
        checks.real_attribute(self, "shortlist", 1, 100, "use a factor of at least 1 and at most 100")
        _ = self.summary

    @property
    def summary(self) -> SubPages:
        return SubPages(self.grain, self.summary_bits)

    def shares(self, ops: Any, query: Tensor, pages: Candidates) -> tuple[Tensor, Tensor]:
        """Estimated share of the attention on each page, float32 ``[R, K, P]``: exact on the shortlist, 0 elsewhere;
        and the shortlist, int32 ``[R, K, P]``."""
        logits = query.new_empty(*query.shape[:2], pages.slots.shape[1], dtype=torch.float32)
        arguments = pages.summaries, pages.slots, pages.counts, pages.layout, self.summary, pages.scale
        ops.subpage_scores(query, *arguments, logits)
        estimated = _over_group(logits.softmax(-1).nan_to_num(0.0), pages.layout)  # rows without pages here
        shortlist = _select(ops, pages, estimated, pages.budget(self.budget * self.shortlist), self)
        ops.key_scores(query, pages.pages, shortlist, pages.counts, pages.layout, pages.scale, logits)
        return _over_group(logits.softmax(-1).nan_to_num(0.0), pages.layout), shortlist

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        shares, _ = self.shares(ops, query, pages)
        return _select(ops, pages, shares, pages.budget(self.budget), self)


@dataclass(frozen=True)
class AdaptiveLookup(TwoStageLookup):
    """As many pages as hold a share of the attention (top-p), best first, as two stages estimate it.

    Heads whose attention is sharp read few pages, others up to `budget`.
    """

    budget: float = 0.25
    """Largest share of the pages that a query visits."""
    mass: float = 0.95
    """Share of the shortlist's attention that is enough."""
    min_pages: int = 2
    """Pages that are visited in any case, pinned ones included."""
    name = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "mass", "a share of the attention mass")
        checks.whole_attributes(self, "min_pages")

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        shares, _ = self.shares(ops, query, pages)
        pinned = (pages.pinned(self.sink_pages, self.local_pages) & pages.exists)[:, None]
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
        enough = _smallest_set(shares, self.mass)
        limit = pages.budget(self.budget).clamp(min=self.min_pages)[:, None, None]
        place = _places(torch.where(pinned, torch.inf, shares).masked_fill(~pages.exists[:, None], -torch.inf))
        chosen = pinned | ((place < limit) & (enough | (place < self.min_pages)) & pages.exists[:, None])
        return torch.where(chosen, pages.slots[:, None], 0).int()


@dataclass(frozen=True)
class CacheAwareLookup(TwoStageLookup):
    """Two stages, with a malus for pages that are not at hand (PiKV's cache-aware routing).

    ``log(share) - penalty * log(1 + misses) - tier cost``, where `misses` counts how often in a row a page was visited
    without having been visited shortly before (see `Reuse`). Such a score may give away attention, up to a
    factor of ``(1 + misses)^penalty`` per page; so the fewest pages that hold `recall` of the estimated attention are
    visited whatever they cost, and the penalty is at most 1.
    """

    penalty: float = 0.5
    """λ, between 0 and 1."""
    recall: float = 0.9
    """Share of the estimated attention that is never given away, within the budget."""
    name = "cache_aware"
    wants_misses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "recall", "a share of the attention mass")
        checks.real_attribute(self, "penalty", 0, 1, "use a number between 0 and 1")

    def select(self, ops: Any, query: Tensor, pages: Candidates) -> Tensor:
        shares, shortlist = self.shares(ops, query, pages)
        scores = shares.clamp(min=1e-30).log().masked_fill(shortlist == 0, -torch.inf)
        if pages.misses is not None:
            scores = scores - self.penalty * torch.log1p(pages.misses)[:, None]
        if pages.tier_cost is not None:
            scores = scores - pages.tier_cost[:, None]
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
        scores = torch.where(_smallest_set(shares, self.recall), shares + 1e3, scores)
        return _select(ops, pages, scores.clamp(min=-3e38), pages.budget(self.budget), self)


def _bounds(ops: Any, query: Tensor, pages: Candidates) -> Tensor:
    """Quest's upper bounds, float32 ``[R, K, P]``."""
    shape = len(query), pages.layout.num_kv_heads, pages.slots.shape[1]
    scores = torch.empty(shape, dtype=torch.float32, device=query.device)
    ops.page_scores(query, pages.summaries, pages.slots, pages.counts, pages.layout, scores)
    return scores


def _over_group(shares: Tensor, layout: PageLayout) -> Tensor:
    """``[R, H, P]`` to the maximum over the query heads of each KV head, ``[R, K, P]``."""
    return shares.unflatten(1, (layout.num_kv_heads, -1)).amax(2)


def _select(ops: Any, pages: Candidates, scores: Tensor, budget: Tensor, policy: SparseLookup) -> Tensor:
    """The table of the best pages, int32 ``[R, K, P]``, pinned ones included."""
    table = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    pinned = pages.pinned(policy.sink_pages, policy.local_pages)
    ops.select_pages(pages.slots, pages.counts, scores.contiguous(), pinned, budget, table)
    return table


def _places(scores: Tensor) -> Tensor:
    """Rank of each element in the last dimension, 0 = highest; ties go to the first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)


def _smallest_set(shares: Tensor, mass: float) -> Tensor:
    """The fewest pages that hold so much of the shares, bool ``[R, K, P]``."""
    order = shares.argsort(dim=-1, descending=True, stable=True)
    ranked = shares.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, (before < mass) & (ranked > 0))


def _share(policy: Any, key: str, of: str = "a share of the pages") -> None:
    checks.real_attribute(policy, key, 0, 1, f"use {of}, above 0 and at most 1", above=True)


LOOKUPS: dict[str, type[Lookup]] = {
    "exact": ExactLookup,
    "two_stage": TwoStageLookup,
    "quest": QuestLookup,
    "topk": TopkLookup,
    "adaptive": AdaptiveLookup,
    "cache_aware": CacheAwareLookup,
}
