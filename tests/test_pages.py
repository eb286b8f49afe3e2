"""`PagePool`, `PageTable` and `Ledger` beside slow models in plain Python: nothing is lost, nothing is handed out
twice, memory is given back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pikv_ds import PoolFullError
from pikv_ds.core.ledger import Ledger
from pikv_ds.core.pool import NULL_SLOT, PagePool, PageSize
from pikv_ds.core.table import SEGMENT, Mirror, PageTable
from pikv_ds.ops import Ops
from pikv_ds.slabs import Slabs

PAGE_BYTES, SUMMARY_BYTES, SLAB_PAGES, CAPACITY = 32, 16, 4, 21


def gathered(slabs: Slabs, slots: torch.Tensor) -> torch.Tensor:
    """The rows of some slots."""
    out = torch.empty(len(slots), slabs.row_bytes, dtype=torch.uint8)
    Ops("reference").gather_pages(slabs, slots, out)
    return out


def state(pool: PagePool) -> tuple:
    """Everything that a failed call must leave as it was."""
    arrays = (pool._used.tolist(), pool._used_in_slab.tolist(), pool._format.tolist())
    return (*arrays, pool.page_storage_bytes, pool.num_used, pool.num_slots)


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool at random beside a plain dict of what each slot must contain."""

    capacity: int | None = CAPACITY

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(
            [PageSize(PAGE_BYTES, SUMMARY_BYTES)],
            slab_pages=SLAB_PAGES,
            capacity_pages=self.capacity,
            watermark=0.25,
            poison=True,
        )
        self.slots: set[int] = set()
        self.content: dict[int, torch.Tensor] = {}  # slots that have been written
        self.stamp = 0

    def _choose(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.slots)), unique=True, min_size=1))

    @rule(n=st.integers(0, 9))
    def allocate(self, n: int) -> None:
        if self.capacity is not None and len(self.slots) + n > self.capacity:
            before = state(self.pool)
            with pytest.raises(PoolFullError):
                self.pool.allocate(n)
            assert state(self.pool) == before
            return
        slots = self.pool.allocate(n).tolist()
        assert slots == sorted(set(slots))
        assert len(slots) == n
        assert NULL_SLOT not in slots
        assert not set(slots) & self.slots
        self.slots |= set(slots)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slots = self._choose(data)
        self.pool.free(slots)
        self.slots -= set(slots)
        for slot in slots:
            self.content.pop(slot, None)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        slots = self._choose(data)
        rows = torch.empty(len(slots), PAGE_BYTES + SUMMARY_BYTES, dtype=torch.uint8)
        for row in rows:
            self.stamp += 1
            row.copy_(torch.arange(self.stamp, self.stamp + len(row)) % 251)  # never seen before
        at = torch.tensor(slots, dtype=torch.int32)
        Ops("auto").scatter_pages(self.pool.pages[0], at, rows[:, :PAGE_BYTES])
        Ops("auto").scatter_pages(self.pool.summaries[0], at, rows[:, PAGE_BYTES:])
        self.content |= dict(zip(slots, rows, strict=True))

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.slots)
        if self.capacity is not None:
            assert self.pool.num_free() == self.capacity - len(self.slots)
            assert self.pool.num_free(reserve=True) == max(0, self.capacity - len(self.slots) - int(self.capacity / 4))
        if self.content:
            slots, rows = torch.tensor(list(self.content)), torch.stack(list(self.content.values()))
            assert torch.equal(gathered(self.pool.pages[0], slots), rows[:, :PAGE_BYTES])
            assert torch.equal(gathered(self.pool.summaries[0], slots), rows[:, PAGE_BYTES:])

    @invariant()
    def unused_slots_read_nan(self) -> None:
        for slab, storage in enumerate(self.pool.pages[0].tensors):
            if storage is None:
                continue
            for offset, page in enumerate(storage):
                if slab * SLAB_PAGES + offset not in self.slots:
                    for dtype in (torch.float32, torch.float16, torch.bfloat16):
                        assert page.view(dtype).isnan().all()

    @invariant()
    def memory_follows_use(self) -> None:
        """A slab is there exactly while a slot of it is in use (slab 0 for the null page)."""
        in_use = {0, *(slot // SLAB_PAGES for slot in self.slots)} if self.pool.pages[0].tensors else set()
        live = {i for i, s in enumerate(self.pool.pages[0].tensors) if s is not None}
        assert in_use == live
        assert self.pool.page_storage_bytes == len(live) * SLAB_PAGES * PAGE_BYTES
        assert self.pool.summary_storage_bytes == len(live) * SLAB_PAGES * SUMMARY_BYTES


class UnlimitedPoolMachine(PoolMachine):
    capacity = None


_SETTINGS = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
TestPool = PoolMachine.TestCase
TestPool.settings = _SETTINGS
TestUnlimitedPool = UnlimitedPoolMachine.TestCase
TestUnlimitedPool.settings = _SETTINGS


def test_memory_falls_after_frees_and_gaps_are_used_again() -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], slab_pages=SLAB_PAGES)
    slots = pool.allocate(5 * SLAB_PAGES - 1)  # with the null page: five whole slabs
    assert pool.page_storage_bytes == 5 * SLAB_PAGES * PAGE_BYTES
    middle = slots[slots // SLAB_PAGES == 2]
    pool.free(middle)
    assert pool.page_storage_bytes == 4 * SLAB_PAGES * PAGE_BYTES
    assert pool.allocate(SLAB_PAGES).tolist() == middle.tolist()
    pool.free(slots)
    assert pool.page_storage_bytes == SLAB_PAGES * PAGE_BYTES  # the null page's
    pool.check_integrity()


@pytest.mark.parametrize(("slots", "wrong"), [([NULL_SLOT], 0), ([2], 2), ([1, 3], 3)])
def test_slots_that_are_not_in_use_are_refused(slots: list[int], wrong: int) -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], slab_pages=4)
    assert pool.allocate(1).tolist() == [1]
    with pytest.raises(AssertionError, match=f"slot {wrong} is not in use"):
        pool.free(slots)


def test_a_slot_is_given_back_once() -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], slab_pages=4)
    pool.allocate(3)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.free([2, 2])


def test_slack_stays_small_over_thousands_of_requests() -> None:
    """Requests of all lengths come and go; memory stays within 15 % of what they need."""
    rng = random.Random(11)
    pool, living, worst = PagePool([PageSize(PAGE_BYTES)], slab_pages=16), [], 0.0
    for request in range(10_000):
        living.append(pool.allocate(round(2 ** rng.uniform(0, 8))))
        while len(living) > 64:
            pool.free(living.pop(rng.randrange(len(living))))
        if request > 200:
            worst = max(worst, pool.page_storage_bytes / PAGE_BYTES / pool.num_used - 1)
    pool.check_integrity()
    assert worst <= 0.15


def test_unwritten_memory_is_poisoned_only_in_debug() -> None:
    for poison in (True, False):
        pool = PagePool([PageSize(PAGE_BYTES, SUMMARY_BYTES)], slab_pages=2, poison=poison)
        slots = pool.allocate(1).tolist()
        for slabs in (pool.pages[0], pool.summaries[0]):
            slabs.row(slots[0]).zero_()
        slab, summaries = pool.pages[0].tensors[0], pool.summaries[0].tensors[0]
        assert slab is not None
        assert summaries is not None
        pool.free(slots)
        for storage in (slab, summaries):
            assert bool(storage[slots[0]].view(torch.float32).isnan().all()) is poison


def test_reserve_is_kept_back_from_prompts_only() -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], capacity_pages=100, watermark=0.1)
    assert (pool.num_free(), pool.num_free(reserve=True)) == (100, 90)
    pool.allocate(95)  # running sequences may use the reserve
    assert (pool.num_free(), pool.num_free(reserve=True)) == (5, 0)
    assert PagePool([PageSize(PAGE_BYTES)], watermark=0.5).num_free(reserve=True) is None


# -- the table ---------------------------------------------------------------------------------

ROWS, UNITS, FORMATS = 4, 3, 2


class TableMachine(RuleBasedStateMachine):
    """Drives a table at random beside lists of ``(number, slot)``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(UNITS, "cpu", FORMATS)
        self.pool = PagePool([PageSize(PAGE_BYTES), PageSize(2 * PAGE_BYTES)], slab_pages=SLAB_PAGES)
        self.lists: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        self.next_number = 0

    def _pages(self) -> list[tuple[int, int, int]]:
        return sorted((r, u, n) for (r, u, _), pages in self.lists.items() for n, _ in pages)

    @rule(data=st.data(), many=st.sampled_from([1, 1, 5, 3 * SEGMENT]))
    def append(self, data: st.DataObject, many: int) -> None:
        page_format = data.draw(st.integers(0, FORMATS - 1))
        places = st.tuples(st.integers(0, ROWS - 1), st.integers(0, UNITS - 1))
        chosen = data.draw(st.lists(places, min_size=1, max_size=4)) * many
        numbers = list(range(self.next_number, self.next_number + len(chosen)))
        self.next_number += len(chosen)
        slots = self.pool.allocate(len(chosen), page_format).astype(np.int64)
        rows, units = np.array(chosen).T
        self.table.append(rows, units, np.full(len(rows), page_format), np.array(numbers), slots)
        for (row, unit), number, slot in zip(chosen, numbers, slots.tolist(), strict=True):
            self.lists.setdefault((row, unit, page_format), []).append((number, slot))

    @precondition(lambda self: self._pages())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(self._pages()), unique=True, min_size=1))
        slots = self.table.remove(*np.array(gone, np.int64).T)
        for (row, unit, number), slot in zip(gone, slots.tolist(), strict=True):
            (where,) = [key for key, pages in self.lists.items() if key[:2] == (row, unit) and (number, slot) in pages]
            self.lists[where].remove((number, slot))
        self.pool.free(slots)

    @rule(row=st.integers(0, ROWS))
    def release(self, row: int) -> None:
        slots = self.table.release(row)
        mine = [key for key in self.lists if key[0] == row]
        assert sorted(slots.tolist()) == sorted(slot for key in mine for _, slot in self.lists.pop(key))
        self.pool.free(slots)

    @invariant()
    def agrees(self) -> None:
        self.table.check_integrity(self.pool)
        by_format = [sum(len(p) for key, p in self.lists.items() if key[2] == f) for f in range(FORMATS)]
        assert self.table.num_pages_by_format() == by_format
        rows, units = range(ROWS + 2), range(UNITS)  # the last ones have never been there
        for page_format in range(FORMATS):
            lists = [self.lists.get((row, unit, page_format), []) for row in rows for unit in units]
            found = self.table.rows(list(rows), units, page_format)
            assert found.counts.tolist() == [len(pages) for pages in lists]
            assert found.total == sum(map(len, lists))
            for pages, slots, numbers in zip(lists, found.slots.tolist(), found.page_idx.tolist(), strict=True):
                assert list(zip(numbers, slots, strict=True))[: len(pages)] == pages
                assert not any(slots[len(pages) :])

    @invariant()
    def finds_what_is_there_and_nothing_else(self) -> None:
        pages = self._pages()
        asked = np.array([*pages, (0, 0, self.next_number), (ROWS + 3, 0, 0)], np.int64)
        slots, formats = self.table.find(*asked.T)
        assert slots[-2:].tolist() == [NULL_SLOT, NULL_SLOT]
        for (row, unit, number), slot, page_format in zip(pages, slots.tolist(), formats.tolist(), strict=False):
            assert (number, slot) in self.lists[row, unit, page_format]


TestTable = TableMachine.TestCase
TestTable.settings = _SETTINGS


def test_memory_of_a_table_follows_its_pages() -> None:
    """One row of 128k tokens beside 255 of 1k, with pages of 32: the long one costs the short ones nothing."""
    units = 8
    table, pool = PageTable(units), PagePool([PageSize(16)], slab_pages=256)
    lengths = [4096] + [32] * 255
    for row, pages in enumerate(lengths):
        arrays = (
            np.repeat(np.arange(units), pages),
            np.zeros(units * pages, np.int64),
            np.tile(np.arange(pages), units),
        )
        slots = pool.allocate(units * pages).astype(np.int64)
        table.append(np.full(units * pages, row), *arrays, slots)
    table.check_integrity(pool)
    assert table.nbytes / pool.num_used <= 24  # twice that with a copy on a device
    for row in range(256):
        pool.free(table.release(row))
    grown = table.nbytes
    for row, pages in enumerate(lengths):
        slots = pool.allocate(units * pages).astype(np.int64)
        unit = np.repeat(np.arange(units), pages)
        table.append(np.full(units * pages, row), unit, unit * 0, np.tile(np.arange(pages), units), slots)
    assert table.nbytes <= grown * 1.01  # what was given back is used again


@pytest.mark.parametrize(
    ("pages", "complaint"),
    [
        ([(0, 1), (1, 1)], "share a slot"),
        ([(0, 1)], "1 pages in the table, 2 in the pool"),
        ([(0, NULL_SLOT), (1, 1)], "null slot"),
        ([(0, 1), (1, 2), (0, 3)], "in the table|there twice"),
    ],
)
def test_table_integrity_finds_what_is_wrong(pages: list[tuple[int, int]], complaint: str) -> None:
    pool, table = PagePool([PageSize(PAGE_BYTES)]), PageTable(1)
    pool.allocate(2)
    numbers, slots = np.array(pages).T
    table.append(numbers * 0, numbers * 0, numbers * 0, numbers, slots)
    with pytest.raises(AssertionError, match=complaint):
        table.check_integrity(pool)


def test_copies_on_a_device_outlive_the_pass_that_makes_them() -> None:
    """A pass may run in inference mode, and the next one not."""
    with torch.inference_mode():
        mirror = Mirror(4, torch.device("meta"))
        mirror.reach(64)
    assert not mirror.tensor.is_inference()
    mirror.write(np.arange(4), np.arange(4))


# -- the ledger --------------------------------------------------------------------------------


class LedgerMachine(RuleBasedStateMachine):
    """Drives a ledger at random beside dicts."""

    RANKS, UNITS, PAGE = 3, 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.UNITS, self.RANKS, self.PAGE)
        self.pages: dict[int, list[list[int]]] = {}  # [row][unit][rank]
        self.lengths: dict[int, int] = {}
        self.new: dict[int, int] = {}

    @rule(source=st.integers(0, RANKS - 1))
    def join(self, source: int) -> None:
        row = self.ledger.join(source)
        assert row == min(set(range(len(self.pages) + 1)) - set(self.pages))  # the lowest that is free
        self.pages[row] = [[0] * self.RANKS for _ in range(self.UNITS)]
        self.lengths[row] = 0

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.pages)))
        self.ledger.leave(row)
        for known in (self.pages, self.lengths, self.new):
            known.pop(row, None)

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), tokens=st.integers(0, 30))
    def append(self, data: st.DataObject, tokens: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.pages)))
        self.ledger.new[row] = self.new[row] = tokens
        before = self.lengths[row]
        assert self.ledger.filling([row]).tolist() == [(before + tokens) // self.PAGE - before // self.PAGE]

    @rule()
    def commit(self) -> None:
        self.ledger.commit()
        for row, tokens in self.new.items():
            self.lengths[row] += tokens
        self.new.clear()

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.pages)), unique=True, min_size=1))
        counts = np.array(
            data.draw(
                st.lists(
                    st.integers(0, 4),
                    min_size=len(rows) * self.UNITS * self.RANKS,
                    max_size=len(rows) * self.UNITS * self.RANKS,
                )
            )
        ).reshape(len(rows), self.UNITS, self.RANKS)
        self.ledger.place(np.array(rows), range(self.UNITS), counts, counts * 0)
        for row, of_row in zip(rows, counts.tolist(), strict=True):
            for unit in range(self.UNITS):
                for rank in range(self.RANKS):
                    self.pages[row][unit][rank] += of_row[unit][rank]

    def _held(self) -> list[tuple[int, int, int]]:
        return [
            (row, unit, rank)
            for row, units in sorted(self.pages.items())
            for unit, ranks in enumerate(units)
            for rank, pages in enumerate(ranks)
            if pages
        ]

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(self._held()), unique=True, min_size=1))
        self.ledger.evict(*np.array(gone).T)
        for row, unit, rank in gone:
            self.pages[row][unit][rank] -= 1

    @precondition(lambda self: self._held())
    @rule(data=st.data(), to=st.integers(0, RANKS - 1))
    def move(self, data: st.DataObject, to: int) -> None:
        row, unit, rank = data.draw(st.sampled_from(self._held()))
        self.ledger.move(np.array([row]), np.array([unit]), np.array([rank]), np.array([to]))
        self.pages[row][unit][rank] -= 1
        self.pages[row][unit][to] += 1

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.rows.tolist() == sorted(self.pages)
        for row, units in self.pages.items():
            assert self.ledger.pages[row].tolist() == units
            assert self.ledger.lengths[row] == self.lengths[row]
            assert self.ledger.num_sealed([row]).tolist() == [self.lengths[row] // self.PAGE]
        assert self.ledger.own_tokens() == sum(self.lengths.values())


TestLedger = LedgerMachine.TestCase
TestLedger.settings = _SETTINGS


def test_those_who_have_a_row_in_turn_are_told_apart() -> None:
    ledger = Ledger(1, 1, 8)
    first, second = ledger.join(0), ledger.join(0)
    assert (first, second) == (0, 1)
    serial = int(ledger.serial[first])
    ledger.leave(first)
    assert ledger.join(0) == first
    assert ledger.serial[first] > ledger.serial[second] > serial
