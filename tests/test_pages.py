"""`PagePool` and `PageTable`: nothing is lost, nothing is handed out twice, memory is given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pikv_ds import PoolFullError
from pikv_ds.core.pages import NULL_SLOT, PagePool, PageSize, PageTable
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
    return (
        [list(heap) for heap in pool._free],
        list(pool._refs),
        list(pool._used_in_slab),
        pool.page_storage_bytes,
        pool.num_used,
    )


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
        self.refs: dict[int, int] = {}
        self.content: dict[int, torch.Tensor] = {}  # slots that have been written
        self.stamp = 0

    def _choose(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True, min_size=1))

    @rule(n=st.integers(0, 9))
    def allocate(self, n: int) -> None:
        if self.capacity is not None and len(self.refs) + n > self.capacity:
            before = state(self.pool)
            with pytest.raises(PoolFullError):
                self.pool.allocate(n)
            assert state(self.pool) == before
            return
        slots = self.pool.allocate(n)
        assert len(set(slots)) == n
        assert NULL_SLOT not in slots
        assert not set(slots) & set(self.refs)
        self.refs |= dict.fromkeys(slots, 1)

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        slots = self._choose(data)
        self.pool.share(slots)
        for slot in slots:
            self.refs[slot] += 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slots = self._choose(data)
        self.pool.free(slots)
        for slot in slots:
            self.refs[slot] -= 1
            if not self.refs[slot]:
                del self.refs[slot]
                self.content.pop(slot, None)

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        slots = self._choose(data)
        rows = torch.empty(len(slots), PAGE_BYTES + SUMMARY_BYTES, dtype=torch.uint8)
        for row in rows:
            self.stamp += 1
            row.copy_(torch.arange(self.stamp, self.stamp + len(row)) % 251)  # never seen before
        self.pool.write(slots, rows[:, :PAGE_BYTES], rows[:, PAGE_BYTES:])
        self.content |= dict(zip(slots, rows, strict=True))

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.refs)
        if self.capacity is not None:
            assert self.pool.num_free() == self.capacity - len(self.refs)
            assert self.pool.num_free(reserve=True) == max(0, self.capacity - len(self.refs) - int(self.capacity / 4))
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
                if slab * SLAB_PAGES + offset not in self.refs:
                    for dtype in (torch.float32, torch.float16, torch.bfloat16):
                        assert page.view(dtype).isnan().all()

    @invariant()
    def memory_follows_use(self) -> None:
        """A slab is there exactly while a slot of it is in use (slab 0 for the null page)."""
        in_use = {0, *(slot // SLAB_PAGES for slot in self.refs)} if self.pool.pages[0].tensors else set()
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
    middle = [s for s in slots if s // SLAB_PAGES == 2]
    pool.free(middle)
    assert pool.page_storage_bytes == 4 * SLAB_PAGES * PAGE_BYTES
    assert pool.allocate(SLAB_PAGES) == middle
    pool.free(slots)
    assert pool.page_storage_bytes == SLAB_PAGES * PAGE_BYTES  # the null page's
    pool.check_integrity()


def test_a_shared_page_stays_until_all_have_freed_it() -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], slab_pages=1)
    (slot,) = pool.allocate(1)
    page = torch.arange(PAGE_BYTES, dtype=torch.uint8)[None]
    pool.share([slot])
    pool.write([slot], page)
    pool.free([slot])
    assert torch.equal(gathered(pool.pages[0], torch.tensor([slot])), page)
    pool.free([slot])
    assert pool.num_used == 0
    assert pool.pages[0].tensors[slot] is None


@pytest.mark.parametrize(
    ("call", "slot"), [("free", NULL_SLOT), ("share", NULL_SLOT), ("free", 2), ("share", 2), ("write", 2)]
)
def test_slots_that_are_not_in_use_are_refused(call: str, slot: int) -> None:
    pool = PagePool([PageSize(PAGE_BYTES)], slab_pages=4)
    assert pool.allocate(1) == [1]
    page = [torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)] if call == "write" else []
    with pytest.raises(AssertionError, match=f"slot {slot} is not in use"):
        getattr(pool, call)([slot], *page)


def test_unwritten_memory_is_poisoned_only_in_debug() -> None:
    for poison in (True, False):
        pool = PagePool([PageSize(PAGE_BYTES, SUMMARY_BYTES)], slab_pages=2, poison=poison)
        slots = pool.allocate(1)
        pool.write(
            slots, torch.zeros(1, PAGE_BYTES, dtype=torch.uint8), torch.zeros(1, SUMMARY_BYTES, dtype=torch.uint8)
        )
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


def test_table_rows_have_holes_padded_with_the_null_slot() -> None:
    table = PageTable(num_units=2)
    a, b, nobody = (0, 7), (1, 7), (1, 8)
    for page, slot in ((0, 3), (2, 5), (1, 4)):
        table.add(a, 0, page, slot)
    table.add(b, 0, 1, 9)
    table.add(b, 1, 1, 8)
    rows = table.rows(range(1), (b, nobody, a))
    assert rows.counts.tolist() == [1, 0, 3]
    assert rows.slots.tolist() == [[9, 0, 0], [0, 0, 0], [3, 5, 4]]
    assert rows.page_idx[2].tolist() == [0, 2, 1]
    assert table.rows(range(1), (b, nobody, a)) is rows  # no copy to the device while nothing changes
    assert table.rows(range(1, 2), (a,)).slots.shape == (1, 0)
    assert table.num_pages() == 5

    table.add(a, 0, 3, 6)
    assert table.rows(range(1), (b, nobody, a)).slots[2].tolist() == [3, 5, 4, 6]
    assert sorted(table.remove(a)) == [3, 4, 5, 6]
    assert table.remove(a) == []
    assert table.rows(range(1), (b, nobody, a)).counts.tolist() == [1, 0, 0]
    assert table.sequences() == [b]


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
    for page, slot in pages:
        table.add((0, 0), 0, page, slot)
    with pytest.raises(AssertionError, match=complaint):
        table.check_integrity(pool)


def test_table_refuses_the_same_page_twice() -> None:
    table = PageTable(1)
    table.add((0, 0), 0, 0, 1)
    with pytest.raises(AssertionError, match="came twice"):
        table.add((0, 0), 0, 0, 2)
