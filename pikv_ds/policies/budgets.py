"""Budgets: how many tokens of a sequence each layer and KV head may keep. Which ones is retention's affair.

A policy is a frozen dataclass with one method; add one by writing it and naming it in `BUDGETS`. All are given
as a mean over layers and heads, so that two of them with the same figures take the same memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pikv_ds import checks
from pikv_ds.policies.heads import HEADS_REMEDY, check_heads, read_heads


@runtime_checkable
class Budget(Protocol):
    """How much of a sequence is kept."""

    name: str

    @property
    def per_head(self) -> bool:
        """Heads of a layer may keep different numbers of tokens, so each has pages of its own."""
        ...

    @property
    def pooled(self) -> bool:
        """While decoding, the heads of a layer share one limit; else each has its own."""
        ...

    @property
    def prompt(self) -> float:
        """Share of a prompt's tokens that stays after it, on average over layers and heads. 1: all."""
        ...

    @property
    def tokens(self) -> int | None:
        """Most tokens of a sequence in pages, on average over layers and heads; what is over it is evicted page by
        page. None: no limit."""
        ...

    def split(self, mean: float, layer: int, num_layers: int, num_heads: int, scores: Tensor | None) -> list[float]:
        """Tokens that each KV head of a layer may keep, ``[num_heads]``.

        Args:
            mean: tokens per layer and head, on average over all of them; may be infinite.
            scores: ``[K, n]`` of a prompt's tokens, for budgets that look at them; None while decoding. The sum of
                the result does not depend on them.
        """
        ...


def _check(budget: Any) -> None:
    remedy = "use the share of a prompt that is kept, above 0 and at most 1"
    checks.real_attribute(budget, "prompt", 0, 1, remedy, above=True)
    checks.whole_attributes(budget, "tokens", optional=True, without="no limit")


@dataclass(frozen=True)
class UniformBudget:
    """The same for every layer and head."""

    prompt: float = 1.0
    tokens: int | None = None
    name = "uniform"
    per_head = False
    pooled = False

    def __post_init__(self) -> None:
        _check(self)

    def split(self, mean: float, layer: int, num_layers: int, num_heads: int, scores: Tensor | None) -> list[float]:
        return [mean] * num_heads


@dataclass(frozen=True)
class PyramidBudget:
    """Low layers keep more than high ones: ``C_i = C_1 - (i - 1) d`` (PyramidKV, Cai et al. 2024).

    ``C_1 = (1 + slope) * mean`` and ``d = 2 * slope * mean / (layers - 1)``, so that the mean is the budget.
    """

    prompt: float = 1.0
    tokens: int | None = None
    slope: float = 0.5
    """0: uniform; 1: the last layer keeps nothing but what is pinned."""
    name = "pyramid"
    per_head = False
    pooled = False

    def __post_init__(self) -> None:
        _check(self)
        checks.real_attribute(self, "slope", 0, 1, "use a number between 0 (uniform) and 1")

    def split(self, mean: float, layer: int, num_layers: int, num_heads: int, scores: Tensor | None) -> list[float]:
        if num_layers == 1 or math.isinf(mean):
            return [mean] * num_heads
        first, step = (1 + self.slope) * mean, 2 * self.slope * mean / (num_layers - 1)
        return [first - layer * step] * num_heads


@dataclass(frozen=True)
class AdaBudget:
    """A layer's budget goes to the heads whose tokens have the highest scores (AdaKV, Feng et al. 2024)."""

    prompt: float = 1.0
    tokens: int | None = None
    safeguard: float = 0.2
    """Share of the mean that every head keeps whatever its scores."""
    name = "ada"
    per_head = True
    pooled = True

    def __post_init__(self) -> None:
        _check(self)
        checks.real_attribute(self, "safeguard", 0, 1, "use a share of the budget between 0 and 1")

    def split(self, mean: float, layer: int, num_layers: int, num_heads: int, scores: Tensor | None) -> list[float]:
        if scores is None or math.isinf(mean):
            return [mean] * num_heads
        heads, length = scores.shape
        total, safe = min(int(mean * heads), heads * length), min(int(mean * self.safeguard), length)
        ranked = scores.clone()
        ranked.scatter_(1, scores.topk(safe, dim=1).indices, torch.inf)
        chosen = ranked.flatten().topk(total).indices // length
        counts = torch.bincount(chosen, minlength=heads).double()
        return (counts + (mean * heads - total) / heads).tolist()


@dataclass(frozen=True)
class DuoBudget:
    """Retrieval heads keep everything, streaming heads the ends of it (DuoAttention, Xiao et al. 2024).

    Which heads are which is found out by ``pikv heads`` and stands in a JSON file:
    ``{"retrieval": [[true, false, ...] per layer]}``.
    """

    heads: str = ""
    """Path of that file."""
    sink: int = 16
    """First tokens that a streaming head keeps."""
    recent: int = 256
    """Latest tokens that it keeps."""
    name = "duo"
    per_head = True
    pooled = False
    prompt = 1.0
    tokens = None

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "sink", "recent")
        checks.path(self, "heads", HEADS_REMEDY)
        _ = self.retrieval

    @cached_property
    def retrieval(self) -> list[list[bool]]:
        """Whether a head is a retrieval head, ``[num_layers][num_heads]``."""
        return read_heads(self.heads)

    def split(self, mean: float, layer: int, num_layers: int, num_heads: int, scores: Tensor | None) -> list[float]:
        check_heads(self.retrieval, self.heads, num_layers, num_heads)
        return [mean if keep_all else min(mean, self.sink + self.recent) for keep_all in self.retrieval[layer]]


BUDGETS: dict[str, type[Budget]] = {
    "uniform": UniformBudget,
    "pyramid": PyramidBudget,
    "ada": AdaBudget,
    "duo": DuoBudget,
}


SINK_PAGES, LOCAL_PAGES = 1, 1
"""First pages of a sequence, and latest ones, that are never evicted."""
NO_LIMIT = 10**9
"""Pages of a stream that may keep all."""


def page_limits(
    budget: Budget, layer: int, num_layers: int, num_heads: int, streams: int, page_size: int
) -> list[int] | None:
    """Most pages of a sequence in each stream of a layer while decoding, None where there is no limit for any.

    Args:
        streams: KV heads with pages of their own, 1 where a page holds all `num_heads`.
    """
    mean = math.inf if budget.tokens is None else float(budget.tokens)
    limits = budget.split(mean, layer, num_layers, num_heads, None)
    if all(math.isinf(x) for x in limits):
        return None
    least = SINK_PAGES + LOCAL_PAGES
    return [NO_LIMIT if math.isinf(x) else max(least, int(x // page_size)) for x in limits[:streams]]


def prompt_pages(
    budget: Budget,
    num_tokens: int,
    layer: int,
    num_layers: int,
    num_heads: int,
    streams: int,
    page_size: int,
    scores: Tensor | None = None,
) -> list[int]:
    """Full pages of a prompt that each stream of a layer keeps, ``[streams]``.

    Their sum does not depend on the scores ``[num_heads, num_tokens]``, so that other ranks know it beforehand.
    """
    full, rest = divmod(num_tokens, page_size)
    mean = int(num_tokens * budget.prompt + 1e-9)
    mean = min(mean, budget.tokens) if budget.tokens is not None else mean
    limits = budget.split(mean, layer, num_layers, num_heads, scores)[:streams]
    return whole_pages(limits, rest, full, page_size, least=SINK_PAGES)


def whole_pages(limits: list[float], open_tokens: int, full_pages: int, page_size: int, least: int) -> list[int]:
    """How many of a sequence's full pages each head keeps, so that pages and open tokens stay within the limits.

    The sum follows from the sum of the limits alone, so that other ranks know it without the scores.

    Args:
        limits: tokens per head.
        open_tokens: newest tokens, which stay in the tail.
        least: pages that every head keeps where it has them.
    """
    heads, least = len(limits), min(least, full_pages)
    total = math.inf if math.isinf(sum(limits)) else math.floor((sum(limits) - heads * open_tokens) / page_size + 1e-9)
    if math.isinf(total):  # some keep all of it
        return [
            full_pages if math.isinf(x) else max(least, min(full_pages, int((x - open_tokens) // page_size)))
            for x in limits
        ]
    total = int(max(heads * least, min(heads * full_pages, total)))
    wanted = [min(max((x - open_tokens) / page_size, least), full_pages) for x in limits]
    counts = [max(least, min(full_pages, math.floor(w))) for w in wanted]
    order = sorted(range(heads), key=lambda h: (counts[h] - wanted[h], h))  # whose share was cut the most comes first
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        for head in order if step > 0 else reversed(order):
            if least <= counts[head] + step <= full_pages and sum(counts) != total:
                counts[head] += step
    return counts
