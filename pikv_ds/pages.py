"""`PagePool`: the pages that one rank owns. `PageTable`: which sequence they belong to.

The pool hands out slots; slot 0 is the null page (vLLM's block 0): tables point to it where a
sequence has no page, and no query ever reads it. Memory grows and shrinks by slabs of a few pages
each, so what is reported as allocated is what the sequences need, and growing never copies.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds.errors import PoolFullError
from pikv_ds.slabs import Slabs, lasting_zeros

NULL_SLOT = 0
POISON_BYTE = 0xFF
"""Eight set bits: a NaN in float32, float16 and bfloat16."""


class PagePool:
    """Storage of pages with a free list, reference counts and a reserve.

    Args:
        page_bytes: bytes of one encoded page.
        summary_bytes: bytes of one page's summary (key bounds), 0 for none. Kept apart from the
            pages, so that a lookup reads summaries only.
        slab_pages: slots per slab.
        capacity_pages: most pages the pool may hold; None grows as long as there is memory.
        watermark: share of the capacity that `num_free(reserve=True)` keeps back.
        poison: fill unused slots with NaN (debugging: whoever reads one is found out).
    """

    def __init__(
        self,
        page_bytes: int,
        summary_bytes: int = 0,
        *,
        slab_pages: int = 16,
        capacity_pages: int | None = None,
        watermark: float = 0.0,
        device: torch.device | str = "cpu",
        poison: bool = False,
    ) -> None:
        self.page_bytes = page_bytes
        self.summary_bytes = summary_bytes
        self.slab_pages = slab_pages
        self.capacity_pages = capacity_pages
        self.reserved_pages = 0 if capacity_pages is None else int(capacity_pages * watermark)
        self.device = torch.device(device)
        self.poison = poison
        self.slabs = Slabs(slab_pages, page_bytes, device)
        self.summary_slabs = Slabs(slab_pages, summary_bytes, device)
        self._free: list[int] = []  # heap: low slots first, so that the last slabs empty and can go
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
        return self.slabs.nbytes

    @property
    def summary_storage_bytes(self) -> int:
        """Bytes of memory really allocated for summaries."""
        return self.summary_slabs.nbytes

    def allocate(self, num_pages: int) -> list[int]:
        """Takes ``num_pages`` slots with one reference each, growing the pool where necessary.

        Raises:
            PoolFullError: the capacity does not allow it; nothing has been taken then.
        """
        free = self.num_free()
        if free is not None and num_pages > free:
            raise PoolFullError(f"{num_pages} pages wanted, {free} of {self.capacity_pages} free")
        while len(self._free) < num_pages:
            self._grow()
        slots = [heapq.heappop(self._free) for _ in range(num_pages)]
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
            heapq.heappush(self._free, slot)
            if not self._used_in_slab[slab]:
                emptied.add(slab)
        if emptied:
            for slab in emptied:
                self.slabs.put(slab, None)
                self.summary_slabs.put(slab, None)
            self._free = [slot for slot in self._free if slot // self.slab_pages not in emptied]
            heapq.heapify(self._free)

    def write(self, slots: Sequence[int], pages: Tensor, summaries: Tensor | None = None) -> None:
        """Stores encoded pages.

        Args:
            pages: uint8 ``[N, page_bytes]``.
            summaries: uint8 ``[N, summary_bytes]``, where the pool keeps summaries.
        """
        assert pages.dtype == torch.uint8 and pages.shape == (len(slots), self.page_bytes)
        by_slab: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            assert self._refs[slot] > 0, f"slot {slot} is not in use"
            by_slab.setdefault(slot // self.slab_pages, []).append(i)
        for slab, rows in by_slab.items():
            offsets = torch.tensor([slots[i] % self.slab_pages for i in rows], device=self.device)
            source = torch.tensor(rows, device=self.device)
            storage, summary_storage = self.slabs.tensors[slab], self.summary_slabs.tensors[slab]
            assert storage is not None and summary_storage is not None
            storage[offsets] = pages[source]
            if self.summary_bytes:
                assert summaries is not None
                summary_storage[offsets] = summaries[source]

    def check_integrity(self) -> None:
        """Checks every internal relation; raises AssertionError with the first one that fails."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is twice in the free list"
        if self._refs:
            assert self._refs[NULL_SLOT] == 1 and NULL_SLOT not in free, "the null page was given away"
        for slab, storage in enumerate(self.slabs.tensors):
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

    def _grow(self) -> None:
        """Adds one slab, in the first gap that a returned slab left."""
        tensors = self.slabs.tensors
        slab = next((i for i, s in enumerate(tensors) if s is None), len(tensors))
        if slab == len(tensors):
            self._refs.extend([0] * self.slab_pages)
            self._used_in_slab.append(0)
        for slabs in (self.slabs, self.summary_slabs):
            slabs.put(slab, lasting_zeros([self.slab_pages, slabs.row_bytes], torch.uint8, self.device))
        self._poison(slab, slice(None))
        for slot in range(slab * self.slab_pages, (slab + 1) * self.slab_pages):
            if slot == NULL_SLOT:
                self._refs[slot] = 1
                self._used_in_slab[slab] += 1
            else:
                heapq.heappush(self._free, slot)

    def _poison(self, slab: int, index: int | slice) -> None:
        if self.poison:
            for slabs in (self.slabs, self.summary_slabs):
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
    """Slots of the pages that this rank holds, per unit and sequence, in order of arrival.

    A sequence is named by ``(source rank, sequence id)``; a unit is a layer, or one KV head of a layer where heads
    have pages of their own (see `SequenceBatch`). The table lives on the host; what a query needs of it is copied to
    the device when the set of sequences or pages changes.
    """

    def __init__(self, num_units: int, device: torch.device | str = "cpu") -> None:
        self.num_units = num_units
        self.device = torch.device(device)
        self._pages: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}  # [unit][n] = (page_idx, slot)
        self._rows: dict[tuple[range, tuple[tuple[int, int], ...]], TableRows] = {}

    def add(self, sequence: tuple[int, int], unit: int, page_idx: int, slot: int) -> None:
        """Notes a page. Each (sequence, unit, page) may be added once."""
        units = self._pages.setdefault(sequence, [[] for _ in range(self.num_units)])
        assert all(p != page_idx for p, _ in units[unit][-1:]), f"page {page_idx} of {sequence} came twice"
        units[unit].append((page_idx, slot))
        self._rows.clear()

    def remove(self, sequence: tuple[int, int]) -> list[int]:
        """Forgets a sequence and returns the slots of all its pages."""
        self._rows.clear()
        return [slot for unit in self._pages.pop(sequence, []) for _, slot in unit]

    def remove_page(self, sequence: tuple[int, int], unit: int, page_idx: int) -> int:
        """Forgets one page and returns its slot."""
        self._rows.clear()
        pages = self._pages[sequence][unit]
        place = next(i for i, (p, _) in enumerate(pages) if p == page_idx)
        return pages.pop(place)[1]

    def sequences(self) -> list[tuple[int, int]]:
        """All sequences with pages here."""
        return list(self._pages)

    def pages(self, sequence: tuple[int, int], unit: int) -> list[tuple[int, int]]:
        """``(page_idx, slot)`` of a sequence's pages of one unit."""
        return self._pages[sequence][unit] if sequence in self._pages else []

    def rows(self, units: range, sequences: tuple[tuple[int, int], ...]) -> TableRows:
        """The table rows of some sequences, for each of them one per unit; those without pages get an empty row."""
        key = (units, sequences)
        if key not in self._rows:
            lists = [self.pages(s, unit) for s in sequences for unit in units]
            width = max((len(pages) for pages in lists), default=0)
            packed = torch.full((2, len(lists), width), NULL_SLOT, dtype=torch.int32)
            for row, pages in enumerate(lists):
                if pages:
                    packed[:, row, : len(pages)] = torch.tensor(pages, dtype=torch.int32).T
            counts = torch.tensor([len(pages) for pages in lists], dtype=torch.int32)
            packed = packed.to(self.device)
            self._rows[key] = TableRows(slots=packed[1], page_idx=packed[0], counts=counts.to(self.device))
        return self._rows[key]

    def num_pages(self) -> int:
        """All pages noted here."""
        return sum(len(unit) for units in self._pages.values() for unit in units)

    def check_integrity(self, pool: PagePool) -> None:
        """Every page of the table is in use in the pool, once, and none is left over."""
        slots = [slot for units in self._pages.values() for unit in units for _, slot in unit]
        assert len(set(slots)) == len(slots), "two pages share a slot"
        assert NULL_SLOT not in slots, "a page lies in the null slot"
        assert len(slots) == pool.num_used, f"{len(slots)} pages in the table, {pool.num_used} in the pool"
        for sequence, units in self._pages.items():
            for unit, pages in enumerate(units):
                numbers = [p for p, _ in pages]
                assert len(set(numbers)) == len(numbers), f"{sequence} unit {unit}: a page is there twice"
