"""`Reuse`: how soon pages are visited again, and how much of the attention sparse lookups hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

WINDOW = 8
"""A visit is a hit if the page was visited at most so many passes before."""
DISTANCES = 16
"""Buckets of the histogram: bucket b counts distances from 2^b to 2^(b + 1) - 1 passes."""


@dataclass
class Reuse:
    """What is known of each slot's visits, while lookups leave pages out."""

    device: torch.device
    step: int = 0
    counts: Tensor = field(init=False)
    """int64 ``[2]``: visits, and hits among them."""
    histogram: Tensor = field(init=False)
    """int64 ``[DISTANCES]``: visits by the passes since the page's last one."""

    def __post_init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.histogram = torch.zeros(DISTANCES, dtype=torch.int64, device=self.device)
        self._last = torch.full([0], -1, dtype=torch.int64, device=self.device)
        self._misses = torch.zeros(0, dtype=torch.float32, device=self.device)

    def copy(self) -> Reuse:
        """As it is now; nothing of the size of the pool is copied, since visits make new tensors."""
        out = copy.copy(self)
        out.counts, out.histogram = self.counts.clone(), self.histogram.clone()
        return out

    def stored(self, slots: Tensor, num_slots: int) -> None:
        """New pages lie in these slots, ``[N]``: nobody has visited them yet."""
        more = num_slots - len(self._last)
        if more > 0:
            self._last = torch.cat([self._last, self._last.new_full([more], -1)])
            self._misses = torch.cat([self._misses, self._misses.new_zeros(more)])
        self._last[slots], self._misses[slots] = -1, 0.0

    def misses(self, slots: Tensor) -> Tensor:
        """Misses in a row of the pages in some slots, float32 in their shape."""
        return self._misses[slots.long()]

    def visit(self, table: Tensor) -> None:
        """Notes what a lookup has chosen: int32, slots of any shape, 0 for none. Waits for no device."""
        seen = torch.zeros_like(self._last, dtype=torch.bool)
        seen[table.flatten().long()] = True
        seen[0] = False  # the null page
        distance = (self.step - self._last).clamp(min=1)
        again = seen & (self._last >= 0)
        hit = again & (distance <= WINDOW)
        self.counts += torch.stack([seen.sum(), hit.sum()])
        bucket = distance.double().log2().long().clamp(max=DISTANCES - 1)
        self.histogram.index_add_(0, bucket, again.long())
        self._misses = torch.where(hit, 0.0, self._misses + seen)
        self._last = torch.where(seen, self.step, self._last)


@dataclass
class Audit:
    """How much attention mass a sparse lookup's choice held, where all pages were read beside it."""

    boosts: dict[int, float] = field(default_factory=dict)
    """What a row's budget is multiplied by now, where that is not 1. By row, so that none depends on which others
    there are."""
    count: int = 0
    total: float = 0.0
    worst: float = 1.0
    _highest: float = 1.0

    def copy(self) -> Audit:
        """As it is now."""
        return replace(self, boosts=dict(self.boosts))

    def boost(self, row: int) -> float:
        """What its budget is multiplied by."""
        return self.boosts.get(row, 1.0)

    @property
    def raised(self) -> float:
        """The highest factor that any row has come to."""
        return self._highest

    def forget(self, row: int) -> None:
        """A row is gone."""
        self.boosts.pop(row, None)

    def note(self, row: int, captured: Tensor, floor: float) -> None:
        """Takes in the mass that each query and head of a row found; raises its budget where it is too little."""
        self.count += captured.numel()
        self.total += float(captured.sum())
        self.worst = min(self.worst, float(captured.min()))
        if float(captured.mean()) < floor:
            self.boosts[row] = self.boost(row) * 1.25
            self._highest = max(self._highest, self.boosts[row])

    @property
    def mean(self) -> float | None:
        """The average so far; None before the first audit."""
        return self.total / self.count if self.count else None
