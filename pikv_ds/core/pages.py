"""`PagePool`: the pages that one rank owns. `PageTable`: which sequence they belong to.

The pool hands out slots; slot 0 is the null page (vLLM's block 0): tables point to it where a
sequence has no page, and no query ever reads it. Memory grows and shrinks by slabs of a few pages
each, so what is reported as allocated is what the sequences need, and growing never copies.
A slab holds pages of one format (`pikv_ds.core.formats`); slots are numbered through all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.core.trace import PageTrace
from pikv_ds.errors import PoolFullError
from pikv_ds.slabs import Slabs, lasting_zeros

NULL_SLOT = 0
POISON_BYTE = 0xFF
"""Eight set bits: a NaN in float32, float16 and bfloat16."""


class PageSize(NamedTuple):
    """Bytes of a page of one format."""

    page: int
    summary: int = 0
    """Of its summary, 0 for none. Kept apart from the page, so that a lookup reads summaries only."""


class PagePool:
    """Storage of pages with a free list, reference counts and a reserve.

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
        self._free: list[list[int]] = [[] for _ in sizes]  # heaps: low slots first, so that the last slabs empty
        self._format: list[int] = []  # of each slab
        self._refs: list[int] = []  # per slot; the null page holds one for ever
        self._used_in_slab: list[int] = []
        self.num_used = 0
        """Pages in use (the null page not counted)."""

    def num_free(self, reserve: bool = False) -> int | None:
        """Pages that can still be allocated, None without a limit.

        Args:
            reserve: leave the watermark's pages out (for prompts; running sequences may use them).
        """
        if self.capacity_pages is None:
            return None
        return max(0, self.capacity_pages - self.num_used - (self.reserved_pages if reserve else 0))

    @property
    def num_slots(self) -> int:
        """One more than the highest slot that has ever been given out or could be now."""
        return len(self._refs)

    @property
    def page_storage_bytes(self) -> int:
        """Bytes of memory really allocated for pages, slack and the null page included."""
        return sum(slabs.nbytes for slabs in self.pages)

    @property
    def summary_storage_bytes(self) -> int:
        """Bytes of memory really allocated for summaries."""
        return sum(slabs.nbytes for slabs in self.summaries)

    def format_of(self, slot: int) -> int:
        """The format of the pages in a slot's slab."""
        return self._format[slot // self.slab_pages]

    def allocate(self, num_pages: int, page_format: int = 0) -> list[int]:
        """Takes ``num_pages`` slots for pages of one format with one reference each, growing the pool where necessary.

        Raises:
            PoolFullError: the capacity does not allow it; nothing has been taken then.
        """
        free = self.num_free()
        if free is not None and num_pages > free:
            raise PoolFullError(f"{num_pages} pages wanted, {free} of {self.capacity_pages} free")
        heap = self._free[page_format]
        while len(heap) < num_pages:
            self._grow(page_format)
        slots = [heapq.heappop(heap) for _ in range(num_pages)]
        for slot in slots:
            self._refs[slot] = 1
            self._used_in_slab[slot // self.slab_pages] += 1
        self.num_used += num_pages
        return slots

    def share(self, slots: Iterable[int]) -> None:
        """Adds a reference to each slot: the page stays until everybody has freed it."""
        for slot in slots:
            assert slot != NULL_SLOT and self._refs[slot] > 0, f"slot {slot} is not in use"
            self._refs[slot] += 1

    def free(self, slots: Iterable[int]) -> None:
        """Drops a reference to each slot; unreferenced pages return to the free list, empty slabs
        to the allocator."""
        emptied: set[int] = set()
        for slot in slots:
            assert slot != NULL_SLOT and self._refs[slot] > 0, f"slot {slot} is not in use"
            self._refs[slot] -= 1
            if self._refs[slot]:
                continue
            slab = slot // self.slab_pages
            self._poison(slab, slot % self.slab_pages)
            self._used_in_slab[slab] -= 1
            self.num_used -= 1
            heapq.heappush(self._free[self._format[slab]], slot)
            if not self._used_in_slab[slab]:
                emptied.add(slab)
        for slab in emptied:
            self.pages[self._format[slab]].put(slab, None)
            self.summaries[self._format[slab]].put(slab, None)
        for page_format in {self._format[slab] for slab in emptied}:
            heap = [slot for slot in self._free[page_format] if slot // self.slab_pages not in emptied]
            heapq.heapify(heap)
            self._free[page_format] = heap

    def read(self, slot: int) -> Tensor:
        """A copy of a page with its summary, uint8 ``[page bytes + summary bytes]``."""
        page_format = self.format_of(slot)
        return torch.cat([self.pages[page_format].row(slot), self.summaries[page_format].row(slot)])

    def write(self, slots: Sequence[int], pages: Tensor, summaries: Tensor | None = None) -> None:
        """Stores encoded pages of one format.

        Args:
            pages: uint8 ``[N, page bytes]``.
            summaries: uint8 ``[N, summary bytes]``, where the pool keeps summaries.
        """
        if not slots:
            return
        page_format = self.format_of(slots[0])
        assert pages.dtype == torch.uint8 and pages.shape == (len(slots), self.sizes[page_format].page)
        by_slab: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            assert self._refs[slot] > 0, f"slot {slot} is not in use"
            assert self.format_of(slot) == page_format, f"slot {slot} is for pages of another format"
            by_slab.setdefault(slot // self.slab_pages, []).append(i)
        for slab, rows in by_slab.items():
            offsets = torch.tensor([slots[i] % self.slab_pages for i in rows], device=self.device)
            source = torch.tensor(rows, device=self.device)
            storage, summary_storage = (x[page_format].tensors[slab] for x in (self.pages, self.summaries))
            assert storage is not None and summary_storage is not None
            storage[offsets] = pages[source]
            if self.sizes[page_format].summary:
                assert summaries is not None
                summary_storage[offsets] = summaries[source]

    def check_integrity(self) -> None:
        """Checks every internal relation; raises AssertionError with the first one that fails."""
        free = {slot for heap in self._free for slot in heap}
        assert len(free) == sum(map(len, self._free)), "a slot is twice in the free lists"
        for page_format, heap in enumerate(self._free):
            assert all(self.format_of(slot) == page_format for slot in heap), "a slot is free for another format"
        if self._refs:
            assert self._refs[NULL_SLOT] == 1 and NULL_SLOT not in free, "the null page was given away"
        for slab, page_format in enumerate(self._format):
            storages = [of_format.tensors[slab] for of_format in self.pages]
            storage = storages.pop(page_format)
            assert all(x is None for x in storages), f"slab {slab} is of two formats"
            slots = range(slab * self.slab_pages, (slab + 1) * self.slab_pages)
            used = sum(self._refs[s] > 0 for s in slots)
            assert used == self._used_in_slab[slab], f"slab {slab}: {used} in use, counted {self._used_in_slab[slab]}"
            if storage is None:
                assert used == 0 and not free.intersection(slots), f"slab {slab} was given back while in use"
            else:
                assert used + len(free.intersection(slots)) == self.slab_pages, f"slab {slab} has lost a slot"
        assert all(r >= 0 for r in self._refs), "a negative reference count"
        assert self.num_used == max(0, sum(self._used_in_slab) - 1), "the pages in use are miscounted"
        if self.capacity_pages is not None:
            assert self.num_used <= self.capacity_pages, "more pages than the capacity"

    def _grow(self, page_format: int) -> None:
        """Adds one slab, in the first gap that a returned slab left."""
        gone = (i for i, f in enumerate(self._format) if self.pages[f].tensors[i] is None)
        slab = next(gone, len(self._format))
        if slab == len(self._format):
            self._refs.extend([0] * self.slab_pages)
            self._used_in_slab.append(0)
            self._format.append(page_format)
            for slabs in (*self.pages, *self.summaries):
                slabs.put(slab, None)
        self._format[slab] = page_format
        for slabs in (self.pages[page_format], self.summaries[page_format]):
            slabs.put(slab, lasting_zeros([self.slab_pages, slabs.row_bytes], torch.uint8, self.device))
        self._poison(slab, slice(None))
        for slot in range(slab * self.slab_pages, (slab + 1) * self.slab_pages):
            if slot == NULL_SLOT:
                self._refs[slot] = 1
                self._used_in_slab[slab] += 1
            else:
                heapq.heappush(self._free[page_format], slot)

    def _poison(self, slab: int, index: int | slice) -> None:
        if self.poison:
            for slabs in (self.pages[self._format[slab]], self.summaries[self._format[slab]]):
                storage = slabs.tensors[slab]
                if storage is not None:
                    storage[index] = POISON_BYTE


@dataclass(frozen=True)
class TableRows:
    """The pages of some sequences at one layer, as ops take them."""

    slots: Tensor
    """``[R, P]`` int32; entries at and beyond `counts` are undefined."""
    page_idx: Tensor
    """``[R, P]`` int32, number of each page within its sequence."""
    counts: Tensor
    """``[R]`` int32, pages of each row."""


class PageTable:
    """Slots of the pages that this rank holds, per sequence, unit and format, in order of arrival.

    A sequence is named by ``(source rank, sequence id)``; a unit is a layer, or one KV head of a layer where heads
    have pages of their own (see `SequenceBatch`). The table lives on the host; what a query needs of it is copied to
    the device when the set of sequences or pages changes.
    """

    def __init__(self, num_units: int, device: torch.device | str = "cpu", num_formats: int = 1) -> None:
        self.num_units, self.num_formats = num_units, num_formats
        self.device = torch.device(device)
        self.trace: PageTrace | None = None
        """Told of every page that comes and goes."""
        self._pages: dict[tuple[int, int], list[list[list[tuple[int, int]]]]] = {}
        """[unit][format][n] = (page_idx, slot)"""
        self._rows: dict[tuple[range, tuple[tuple[int, int], ...], int], TableRows] = {}

    def add(self, sequence: tuple[int, int], unit: int, page_idx: int, slot: int, page_format: int = 0) -> None:
        """Notes a page. Each (sequence, unit, page) may be added once."""
        if sequence not in self._pages:
            self._pages[sequence] = [[[] for _ in range(self.num_formats)] for _ in range(self.num_units)]
        pages = self._pages[sequence][unit][page_format]
        assert all(p != page_idx for p, _ in pages[-1:]), f"page {page_idx} of {sequence} came twice"
        pages.append((page_idx, slot))
        self._rows.clear()
        if self.trace is not None:
            self.trace.store(sequence, unit, page_idx, slot, page_format)

    def remove(self, sequence: tuple[int, int]) -> list[int]:
        """Forgets a sequence and returns the slots of all its pages."""
        self._rows.clear()
        slots = [slot for unit in self._pages.pop(sequence, []) for pages in unit for _, slot in pages]
        if self.trace is not None:
            self.trace.free(slots, "release")
        return slots

    def remove_page(self, sequence: tuple[int, int], unit: int, page_idx: int, why: str) -> int:
        """Forgets one page and returns its slot.

        Args:
            why: for the trace: "evict", "demote" or "move".
        """
        self._rows.clear()
        for pages in self._pages[sequence][unit]:
            for place, (number, slot) in enumerate(pages):
                if number == page_idx:
                    pages.pop(place)
                    if self.trace is not None:
                        self.trace.free([slot], why)
                    return slot
        raise KeyError(f"page {page_idx} of {sequence} is not here")

    def sequences(self) -> list[tuple[int, int]]:
        """All sequences with pages here."""
        return list(self._pages)

    def pages(self, sequence: tuple[int, int], unit: int, page_format: int | None = None) -> list[tuple[int, int]]:
        """``(page_idx, slot)`` of a sequence's pages of one unit, of one format or of all."""
        if sequence not in self._pages:
            return []
        by_format = self._pages[sequence][unit]
        return [p for pages in by_format for p in pages] if page_format is None else by_format[page_format]

    def formats(self, units: range, sequences: tuple[tuple[int, int], ...]) -> list[int]:
        """Formats of which these sequences have pages in these units; the first where they have none."""
        if self.num_formats == 1:
            return [0]
        there = [
            f for f in range(self.num_formats) if any(self.pages(s, unit, f) for s in sequences for unit in units)
        ]
        return there or [0]

    def rows(self, units: range, sequences: tuple[tuple[int, int], ...], page_format: int = 0) -> TableRows:
        """The table rows of some sequences, for each of them one per unit, with the pages of one format; those
        without pages get an empty row."""
        key = (units, sequences, page_format)
        if key not in self._rows:
            lists = [self.pages(s, unit, page_format) for s in sequences for unit in units]
            width = max((len(pages) for pages in lists), default=0)
            packed = torch.full((2, len(lists), width), NULL_SLOT, dtype=torch.int32)
            for row, pages in enumerate(lists):
                if pages:
                    packed[:, row, : len(pages)] = torch.tensor(pages, dtype=torch.int32).T
            counts = torch.tensor([len(pages) for pages in lists], dtype=torch.int32)
            packed = packed.to(self.device)
            self._rows[key] = TableRows(slots=packed[1], page_idx=packed[0], counts=counts.to(self.device))
        return self._rows[key]

    def num_pages_by_format(self) -> list[int]:
        """Pages noted here, of each format."""
        units = [unit for units in self._pages.values() for unit in units]
        return [sum(len(unit[f]) for unit in units) for f in range(self.num_formats)]

    def num_pages(self) -> int:
        """All pages noted here."""
        return sum(len(pages) for units in self._pages.values() for unit in units for pages in unit)

    def check_integrity(self, pool: PagePool) -> None:
        """Every page of the table is in use in the pool, once, and none is left over."""
        slots = [slot for units in self._pages.values() for unit in units for pages in unit for _, slot in pages]
        assert len(set(slots)) == len(slots), "two pages share a slot"
        assert NULL_SLOT not in slots, "a page lies in the null slot"
        assert len(slots) == pool.num_used, f"{len(slots)} pages in the table, {pool.num_used} in the pool"
        for sequence, units in self._pages.items():
            for unit, by_format in enumerate(units):
                numbers = [p for pages in by_format for p, _ in pages]
                for page_format, pages in enumerate(by_format):
                    wrong = [slot for _, slot in pages if pool.format_of(slot) != page_format]
                    assert not wrong, f"{sequence} unit {unit}: slots {wrong} hold pages of another format"
                assert len(set(numbers)) == len(numbers), f"{sequence} unit {unit}: a page is there twice"
