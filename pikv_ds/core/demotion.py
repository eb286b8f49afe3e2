"""`Demoter`: encodes pages that lie here anew, with a smaller codec.

Errors add up: what the first codec has lost stays lost. A demoted page keeps its rank, its tokens and its number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv_ds.core.formats import PageFormat
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.reuse import Reuse

Sequence = tuple[int, int]
"""Source rank and id."""


@dataclass
class Demoter:
    """Moves pages into the last of the formats."""

    formats: list[PageFormat]
    pool: PagePool
    table: PageTable
    reuse: Reuse | None
    flags: Tensor
    """See `PageSender`: what the first codec held may be beyond the second."""
    counters: Counter[str] = field(default_factory=Counter)
    """``demoted_pages``: of prompts, counted on their sequences' rank, and while decoding."""

    @property
    def page_format(self) -> int:
        """The format of demoted pages."""
        return len(self.formats) - 1

    def demote(self, pages: list[tuple[Sequence, int, int]], streams: int) -> list[int]:
        """Demotes pages ``(sequence, unit, page number)`` that lie here; returns their new slots."""
        groups: dict[tuple[int, int], list[tuple[Sequence, int]]] = {}  # by unit and format: they share bases
        for sequence, unit, page_idx in pages:
            slot = next(slot for p, slot in self.table.pages(sequence, unit) if p == page_idx)
            groups.setdefault((unit, self.pool.format_of(slot)), []).append((sequence, page_idx))
        out: list[int] = []
        for (unit, page_format), members in groups.items():
            before, after = self.formats[page_format], self.formats[self.page_format]
            slots = [self.table.remove_page(sequence, unit, page_idx, "demote") for sequence, page_idx in members]
            encoded = torch.empty(len(slots), before.size.page, dtype=torch.uint8, device=self.pool.device)
            at = torch.tensor(slots, dtype=torch.int32, device=self.pool.device)
            before.ops.gather_pages(self.pool.pages[page_format], at, encoded)
            layer, head = divmod(unit, streams)
            flags = self.flags[layer : layer + 1]
            payload = after.seal(layer, head, *before.unseal(layer, head, encoded), flags)
            self.pool.free(slots)  # first, so that a full pool has room
            new = self.pool.allocate(len(slots), self.page_format)
            self.pool.write(new, payload[:, : after.size.page], payload[:, after.size.page :])
            for (sequence, page_idx), slot in zip(members, new, strict=True):
                self.table.add(sequence, unit, page_idx, slot, self.page_format)
            if self.reuse is not None:
                self.reuse.stored(new, self.pool.num_slots)
            out += new
        self.counters["demoted_pages"] += len(out)
        return out
