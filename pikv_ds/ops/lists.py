"""`PageLists`: lists of pages where a page table keeps them, as kernels walk them.

A dense table ``[B, P]`` has to be made anew whenever a list grows. These lists are read in place: a *directory* says
which segments of an arena a list has, so a pass only writes what is new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 32
"""Entries of a segment; csrc/layout.h has the same."""


@dataclass(frozen=True)
class PageLists:
    """``len(rows) * heads`` lists: list ``b`` is list ``first + b % heads * step`` of row ``rows[b // heads]``."""

    slots: Tensor
    """int32 ``[segments * SEGMENT]``: the arena. Slot 0 is a hole."""
    counts: Tensor
    """int32 ``[table rows, lists]``: entries of each list."""
    directory: Tensor
    """int32: numbers of segments."""
    directories: Tensor
    """int32 ``[table rows, 2]``: where a row's part of the directory begins, and the segments that it has room for per
    list."""
    rows: Tensor
    """int32 ``[R]``; -1: empty lists."""
    width: int
    """At least the entries of the longest list: how finely kernels split the work follows from it."""
    first: int = 0
    step: int = 1
    heads: int = 1

    def __len__(self) -> int:
        return len(self.rows) * self.heads

    def at(self, first: int) -> PageLists:
        """The lists of the same rows that begin with another one."""
        return PageLists(
            self.slots,
            self.counts,
            self.directory,
            self.directories,
            self.rows,
            self.width,
            first,
            self.step,
            self.heads,
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same as a table int32 ``[B, P]`` with its counts ``[B]``. Waits for the device."""
        rows = self.rows.long().repeat_interleave(self.heads)
        head = torch.arange(self.heads, device=rows.device).repeat(len(self.rows))
        at = rows.clamp(min=0)
        lists = self.first + head * self.step
        counts = self.counts[at, lists].masked_fill(rows < 0, 0)
        start, room = self.directories[at].long().unbind(1)
        place = torch.arange(int(counts.max()) if len(counts) else 0, device=rows.device)
        inside = place < counts[:, None]
        segment = torch.where(inside, start[:, None] + (lists * room)[:, None] + place // SEGMENT, 0)
        entries = self.directory[segment].long() * SEGMENT + place % SEGMENT
        return self.slots[torch.where(inside, entries, 0)].masked_fill(~inside, 0), counts
