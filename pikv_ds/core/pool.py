"""`PagePool`: memory for the pages that one rank owns, and which of its slots are in use.

Slot 0 is the null page (vLLM's block 0): tables point to it where a row has no page, and no query ever reads it.
Memory grows and shrinks by slabs of a few pages each, so what is reported as allocated is what the rows need, and
growing never copies. A slab holds pages of one format (`pikv_ds.core.formats`); slots are numbered through all of
them. What is known of slots stands in arrays: a call costs a few array operations, whatever the number of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pikv_ds.errors import PoolFullError
from pikv_ds.slabs import Slabs

NULL_SLOT = 0
SLACK = 0.06
"""Share of the pages in use that may lie idle in slabs before new pages fill these up."""
POISON_BYTE = 0xFF
"""Eight set bits: a NaN in float32, float16 and bfloat16."""


class PageSize(NamedTuple):
    """Bytes of a page of one format."""

    page: int
    summary: int = 0
    """Of its summary, 0 for none. Kept apart from the page, so that a lookup reads summaries only."""


class PagePool:
    """Slots for pages, with the memory behind them and a reserve.

    Args:
        sizes: of each format's pages.
        slab_pages: slots per slab.
        capacity_pages: most pages the pool may hold; None grows as long as there is memory.
        watermark: share of the capacity that `num_free(reserve=True)` keeps back.
        poison: fill unused slots with NaN, so that a read of one shows in the result (for debugging).
    """

    def __init__(
        self,
        sizes: Sequence[PageSize],
        *,
        slab_pages: int = 16,
        capacity_pages: int | None = None,
        watermark: float = 0.0,
        device: torch.device | str = "cpu",
        poison: bool = False,
    ) -> None:
        self.sizes = tuple(sizes)
        self.slab_pages = slab_pages
        self.capacity_pages = capacity_pages
        self.reserved_pages = 0 if capacity_pages is None else int(capacity_pages * watermark)
        self.device = torch.device(device)
        self.poison = poison
        self.pages = [Slabs(slab_pages, size.page, device) for size in sizes]
        """Of each format; where a slab is another format's, there is none."""
        self.summaries = [Slabs(slab_pages, size.summary, device) for size in sizes]
        if capacity_pages is not None:  # the null page's slab, and slack
            for slabs in (*self.pages, *self.summaries):
                slabs.reserve(2 + -(-int(capacity_pages * (1 + 2 * SLACK)) // slab_pages))
        self.num_used = 0
        """Pages in use (the null page not counted)."""
        self.num_slots = 0
        """One more than the highest slot that there has ever been."""
        self._used = np.zeros((16, slab_pages), np.bool_)  # [slab, place]; the null page is in use for ever
        self._used_in_slab = np.zeros(16, np.int32)
        self._format = np.full(16, -1, np.int16)  # of each slab, -1 where it has no memory

    def num_free(self, reserve: bool = False) -> int | None:
        """Pages that can still be allocated, None without a limit.

        Args:
            reserve: leave the watermark's pages out (for prompts; running rows may use them).
        """
        if self.capacity_pages is None:
            return None
        return max(0, self.capacity_pages - self.num_used - (self.reserved_pages if reserve else 0))

    @property
    def page_storage_bytes(self) -> int:
        """Bytes of memory really allocated for pages, slack and the null page included."""
        return sum(slabs.nbytes for slabs in self.pages)

    @property
    def summary_storage_bytes(self) -> int:
        """Bytes of memory really allocated for summaries."""
        return sum(slabs.nbytes for slabs in self.summaries)

    @property
    def table_bytes(self) -> int:
        """Bytes of the arrays that say which slots are in use."""
        return self._used.nbytes + self._used_in_slab.nbytes + self._format.nbytes

    def format_of(self, slots: ArrayLike) -> NDArray[np.int16]:
        """The formats of the pages in some slots, in the same shape."""
        return self._format[np.asarray(slots) // self.slab_pages]

    def allocate(self, num_pages: int, page_format: int = 0) -> NDArray[np.int32]:
        """Takes slots for pages of one format, growing the pool where necessary: ``[num_pages]``, in order.

        What fills whole slabs gets slabs of its own, as it is likely to go together, unless more than `SLACK` of the
        pool lies idle; the rest fills the fullest slabs first. So slabs empty, and little of them lies idle.

        Raises:
            PoolFullError: the capacity does not allow it; nothing has been taken then.
        """
        free = self.num_free()
        if free is not None and num_pages > free:
            raise PoolFullError(f"{num_pages} pages wanted, {free} of {self.capacity_pages} free")
        if not num_pages:
            return np.zeros(0, np.int32)
        if self.num_slots == 0:
            self._grow(1, page_format)
            self._used[0, NULL_SLOT], self._used_in_slab[0] = True, 1
        partly = np.flatnonzero((self._format == page_format) & (self._used_in_slab < self.slab_pages))
        partly = partly[(-self._used_in_slab[partly]).argsort(kind="stable")]
        rooms = (self.slab_pages - self._used_in_slab[partly]).cumsum()
        room = int(rooms[-1]) if len(rooms) else 0
        whole = (num_pages - min(num_pages, max(0, room - int(self.num_used * SLACK)))) // self.slab_pages
        rest = num_pages - whole * self.slab_pages
        lacking = max(0, -(-(rest - room) // self.slab_pages))
        new = self._grow(whole + lacking, page_format)
        partly = partly[: int(rooms.searchsorted(rest)) + 1] if rest else partly[:0]
        partly, new = np.append(partly, new[whole:]), new[:whole]
        at, places = (~self._used[partly]).nonzero()
        slots = (partly[at] * self.slab_pages + places)[:rest]
        slots = np.append(slots, (new[:, None] * self.slab_pages + np.arange(self.slab_pages)).reshape(-1))
        self._used.reshape(-1)[slots] = True
        touched = np.append(partly, new)
        self._used_in_slab[touched] = self._used[touched].sum(1)
        self.num_used += num_pages
        return np.sort(slots).astype(np.int32)

    def free(self, slots: ArrayLike) -> None:
        """Gives slots back, each at most once, and slabs that empty to the allocator."""
        slots = np.asarray(slots, np.int64)
        if not len(slots):
            return
        used = self._used.reshape(-1)
        wrong = slots[(slots == NULL_SLOT) | ~used[slots]]
        assert not len(wrong), f"slot {wrong[0]} is not in use"
        if self.poison:
            self._poison(slots)
        used[slots] = False
        slabs, counts = np.unique(slots // self.slab_pages, return_counts=True)
        assert (self._used[slabs].sum(1) == self._used_in_slab[slabs] - counts).all(), "a slot is given back twice"
        self._used_in_slab[slabs] -= counts.astype(np.int32)
        self.num_used -= len(slots)
        emptied = slabs[self._used_in_slab[slabs] == 0]
        for page_format in np.unique(self._format[emptied]):
            gone = emptied[self._format[emptied] == page_format].tolist()
            for of_format in self._storage(page_format):
                of_format.put_all(gone, [None] * len(gone))
        self._format[emptied] = -1

    def check_integrity(self) -> None:
        """Checks every internal relation; raises AssertionError with the first one that fails."""
        if self.num_slots:
            assert self._used[0, NULL_SLOT], "the null page was given away"
        assert (self._used.sum(1) == self._used_in_slab).all(), "the slots in use are miscounted"
        assert not self._used[self._format < 0].any(), "a slab was given back while in use"
        for slab, page_format in enumerate(self._format[: self.num_slots // self.slab_pages].tolist()):
            there = [f for f, slabs in enumerate(self.pages) if slabs.tensors[slab] is not None]
            assert there == ([] if page_format < 0 else [page_format]), f"slab {slab} has memory of formats {there}"
        total = int(self._used_in_slab.sum())
        assert self.num_used == max(0, total - 1), "the pages in use are miscounted"
        if self.capacity_pages is not None:
            assert self.num_used <= self.capacity_pages, "more pages than the capacity"

    def _grow(self, num_slabs: int, page_format: int) -> NDArray[np.int64]:
        """Adds slabs of a format, first in the gaps that returned ones left; returns them."""
        if not num_slabs:
            return np.zeros(0, np.int64)
        gaps = np.flatnonzero(self._format < 0)
        if len(gaps) < num_slabs:
            more = max(len(self._format), num_slabs)
            self._used = np.concatenate([self._used, np.zeros((more, self.slab_pages), np.bool_)])
            self._used_in_slab = np.concatenate([self._used_in_slab, np.zeros(more, np.int32)])
            self._format = np.concatenate([self._format, np.full(more, -1, np.int16)])
            gaps = np.flatnonzero(self._format < 0)
        slabs = gaps[:num_slabs]
        self._format[slabs] = page_format
        end = int(slabs[-1]) + 1
        self.num_slots = max(self.num_slots, end * self.slab_pages)
        for of_any in (*self.pages, *self.summaries):
            of_any.reach(end)
        for of_format in self._storage(page_format):
            of_format.fill(slabs.tolist())
        if self.poison:
            self._poison((slabs[:, None] * self.slab_pages + np.arange(self.slab_pages)).reshape(-1))
        return slabs

    def _storage(self, page_format: int) -> list[Slabs]:
        """Where pages of a format lie, and their summaries if they have some."""
        both = self.pages[page_format], self.summaries[page_format]
        return [slabs for slabs in both if slabs.row_bytes]

    def _poison(self, slots: NDArray[np.int64]) -> None:
        for slot, page_format in zip(slots.tolist(), self.format_of(slots).tolist(), strict=True):
            for slabs in self._storage(page_format):
                slabs.row(slot).fill_(POISON_BYTE)
