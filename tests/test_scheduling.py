"""Ops that move, rank, select and give up pages, on every backend.

Utilities are float32 and their pow and log1p may differ in the last bits between backends, so that
choices are held against float64 and may differ where utilities do by less than `TOLERANCE`.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import KERNEL_CODECS as CODECS
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops, UtilityState, why_missing
from pikv_ds.ops.summaries import SubPages
from pikv_ds.slabs import Slabs

BACKENDS = ["reference", *([] if why_missing("cpp", "cpu") else ["cpp"])]
HUGE = 2**30  # a table entry that nobody may follow
TOLERANCE = 1e-6

needs_cpp = pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason=str(why_missing("cpp", "cpu")))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# -- gather_pages ------------------------------------------------------------------------------


def random_slabs(num_slabs: int, slab_rows: int, row_bytes: int, rng: torch.Generator) -> tuple[Slabs, Tensor]:
    slabs = Slabs(slab_rows, row_bytes, torch.get_default_device())
    for i in range(num_slabs):
        slabs.put(i, torch.randint(256, (slab_rows, row_bytes), generator=rng).to(torch.uint8))
    return slabs, torch.cat([t for t in slabs.tensors if t is not None])


@pytest.mark.parametrize("row_bytes", [16, 24, 41, 4096])
def test_gather_pages_is_bitwise(ops: Ops, row_bytes: int, rng) -> None:
    slabs, rows = random_slabs(70, 3, row_bytes, rng)  # more slabs than a table of addresses begins with
    slabs.put(4, None)
    for count in (0, 1, 7, 600):
        slots = torch.randint(1, len(rows), (count,), generator=rng, dtype=torch.int32)
        slots = slots[slots // 3 != 4]
        out = torch.full((len(slots), row_bytes), 0xAB, dtype=torch.uint8)
        ops.gather_pages(slabs, slots, out)
        assert torch.equal(out, rows[slots.long()])


@needs_cpp
@pytest.mark.parametrize("slot", [-1, 6, 12, HUGE])
def test_gather_pages_names_a_slot_that_is_nowhere(slot: int, rng) -> None:
    slabs, _ = random_slabs(4, 3, 16, rng)
    slabs.put(2, None)
    slabs.pointers = slabs.pointers[:4].clone()
    with pytest.raises(RuntimeError, match=rf"slots\[1\] = {slot} is in slab .*, which was given back or never was"):
        Ops("cpp").gather_pages(slabs, int32([1, slot]), torch.empty(2, 16, dtype=torch.uint8))


@pytest.mark.parametrize("row_bytes", [16, 24, 41, 4096])
@pytest.mark.parametrize("longer", [0, 16])
def test_scatter_pages_is_bitwise(ops: Ops, row_bytes: int, longer: int, rng) -> None:
    slabs, rows = random_slabs(70, 3, row_bytes, rng)
    for count in (0, 1, 7, 150):
        slots = (torch.randperm(len(rows) - 1, generator=rng)[:count] + 1).int()
        pages = torch.randint(256, (count, row_bytes + longer), generator=rng).to(torch.uint8)
        ops.scatter_pages(slabs, slots, pages[:, :row_bytes])
        rows[slots.long()] = pages[:, :row_bytes]
        assert torch.equal(torch.cat([t for t in slabs.tensors if t is not None]), rows)


@needs_cpp
def test_scatter_pages_names_a_slot_that_is_nowhere(rng) -> None:
    slabs, _ = random_slabs(4, 3, 16, rng)
    slabs.put(2, None)
    with pytest.raises(RuntimeError, match=r"slots\[1\] = 6 is in slab 2, which was given back or never was"):
        Ops("cpp").scatter_pages(slabs, int32([1, 6]), torch.zeros(2, 16, dtype=torch.uint8))


# -- page_scores -------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 24), (8, 1, 64), (14, 2, 20), (6, 2, 128), (3, 1, 5)]
)
def test_page_scores_are_the_bounds_of_each_page(
    ops: Ops, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rng
) -> None:
    num_slots, width, group = 90, 150, heads // kv_heads
    layout = PageLayout(kv_heads, head_dim, 8, dtype, "int8")
    ends = torch.randn(num_slots, 2, kv_heads, head_dim, generator=rng).to(dtype).sort(1).values
    rows = torch.full((num_slots, layout.bounds_bytes + 8), 0xFF, dtype=torch.uint8)  # the rest of a row is no bound
    rows[:, : layout.bounds_bytes] = ends.view(num_slots, -1).view(torch.uint8)
    rows[0] = 0xFF  # the null page
    table = torch.randint(0, num_slots, (3, width), generator=rng, dtype=torch.int32)
    counts = int32([width, 0, 71])
    for row, count in enumerate(counts.tolist()):
        table[row, count:] = HUGE
    query = torch.randn(3, heads, head_dim, generator=rng).to(dtype)
    out = torch.full((3, kv_heads, width), torch.nan)
    ops.page_scores(query, Slabs.of(rows), table, counts, layout, out)
    for row, count in enumerate(counts.tolist()):
        slots = table[row, :count].long()
        q = query[row].double().view(kv_heads, group, 1, 1, head_dim)
        bound = (q * ends[slots].double().permute(2, 0, 1, 3)[:, None]).amax(3).sum(-1).amax(1)  # [K, count]
        expected = bound.masked_fill(slots == 0, -torch.inf)
        torch.testing.assert_close(out[row, :, :count].double(), expected, atol=2e-5, rtol=1e-5)
        assert (out[row, :, count:] == -torch.inf).all()


# -- subpage_scores ----------------------------------------------------------------------------


def random_summaries(
    num_slots: int, summary: SubPages, layout: PageLayout, rng: torch.Generator, padding: int = 8
) -> Tensor:
    """Any bytes are codes; scales are small, some of them zero; what follows in a row is no number."""
    vectors = 2 * layout.num_kv_heads * summary.count(layout)
    codes = torch.randint(256, (num_slots, vectors * layout.head_dim * summary.bits // 8), generator=rng)
    scales = (
        torch.rand(num_slots, vectors, generator=rng) * 0.02 * (torch.rand(num_slots, vectors, generator=rng) > 0.1)
    )
    rest = torch.full((num_slots, padding), 0xFF, dtype=torch.uint8)
    rows = torch.cat([codes.to(torch.uint8), scales.half().view(torch.uint8), rest], dim=1)
    assert rows.shape[1] == summary.num_bytes(layout) + padding
    rows[0] = 0xFF  # the null page
    return rows


def subpage_case(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    summary: SubPages,
    rng: torch.Generator,
) -> tuple:
    """Arguments of `subpage_scores` but the output: three rows, one without pages; holes, slots that are nowhere."""
    num_slots, width = 60, 150
    layout = PageLayout(kv_heads, head_dim, page_size, dtype, "int8")
    rows = random_summaries(num_slots, summary, layout, rng)
    table = torch.randint(0, num_slots, (3, width), generator=rng, dtype=torch.int32)
    counts = int32([width, 0, 71])
    for row, count in enumerate(counts.tolist()):
        table[row, count:] = HUGE
    query = torch.randn(3, heads, head_dim, generator=rng).to(dtype)
    return query, Slabs.of(rows), table, counts, layout, summary, 0.3


SUBPAGES = [
    (4, 4, 24, 8, SubPages(8, 8)), (8, 1, 64, 32, SubPages(8, 4)), (14, 2, 20, 16, SubPages(4, 8)),
    (6, 2, 128, 32, SubPages(8, 8)), (3, 1, 5, 32, SubPages(32, 8)), (6, 3, 10, 8, SubPages(2, 4)),
    (16, 1, 576, 64, SubPages(16, 4)), (5, 5, 96, 32, SubPages(1, 8)), (32, 8, 80, 64, SubPages(8, 8)),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "summary"), SUBPAGES)
def test_subpage_scores_are_the_log_sum_exps_of_sub_pages(
    ops: Ops, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int, summary: SubPages, rng
) -> None:
    case = subpage_case(dtype, heads, kv_heads, head_dim, page_size, summary, rng)
    query, slabs, table, counts, layout, summary, scale = case
    out = torch.full((3, heads, table.shape[1]), torch.nan)
    ops.subpage_scores(*case, out)
    rows = torch.cat([slabs.row(slot)[None] for slot in range(60)])[:, : summary.num_bytes(layout)]
    rows[0] = 0
    centres, spreads = (x.double().transpose(0, 1) for x in summary.decode(rows, layout))  # [K, slots, C, D]
    for row, count in enumerate(counts.tolist()):
        slots = table[row, :count].long()
        q = query[row].double().unflatten(0, (kv_heads, -1))
        parts = torch.einsum("kgd,kpcd->kgpc", q, centres[:, slots])
        parts = parts + torch.einsum("kgd,kpcd->kgpc", q.abs(), spreads[:, slots])
        expected = (parts * scale).logsumexp(-1).masked_fill(slots == 0, -torch.inf).flatten(0, 1)
        torch.testing.assert_close(out[row, :, :count].double(), expected, atol=2e-4, rtol=1e-5)
        assert (out[row, :, count:] == -torch.inf).all()


# -- select_pages ------------------------------------------------------------------------------


def select(ops: Ops, counts: list[int], scores: Tensor, pinned: Tensor, budget: list[int]) -> Tensor:
    """Places of the pages kept, bool ``[R, K, P]``; checks that each kept one shows its own slot."""
    rows, heads, width = scores.shape
    table = torch.arange(1, rows * width + 1, dtype=torch.int32).view(rows, width)
    out = torch.full((rows, heads, width), -1, dtype=torch.int32)
    ops.select_pages(table, int32(counts), scores, pinned, int32(budget), out)
    kept = out != 0
    assert torch.equal(out, torch.where(kept, table[:, None].expand_as(out), 0))
    return kept


def best(scores: Tensor, pinned: Tensor, count: int, budget: int) -> list[int]:
    """Places to keep of one list, by the words of the specification."""
    pins = [p for p in range(count) if pinned[p]]
    ranked = sorted(range(count), key=lambda p: (-math.inf if pinned[p] else -float(scores[p]), p))
    return sorted(ranked[: max(budget, len(pins))])


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_select_pages_keeps_the_best(name: str, data: st.DataObject) -> None:
    rows, heads, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 9))
    counts = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    budget = data.draw(st.lists(st.integers(0, width + 2), min_size=rows, max_size=rows))
    rng = torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 2**31)))
    levels = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf])  # many ties
    scores = levels[torch.randint(len(levels), (rows, heads, width), generator=rng)]
    pinned = torch.rand(rows, width, generator=rng) < 0.25
    kept = select(Ops(name), counts, scores, pinned, budget)
    for row in range(rows):
        for head in range(heads):
            expected = best(scores[row, head], pinned[row], counts[row], budget[row])
            assert kept[row, head].nonzero().squeeze(1).tolist() == expected


def test_select_pages_of_long_tables(ops: Ops, rng) -> None:
    scores = torch.randint(200, (3, 2, 20_000), generator=rng).float()  # a hundred ties of each
    pinned = torch.rand(3, 20_000, generator=rng) < 0.01
    counts, budget = [20_000, 15_001, 3], [5_000, 400, 20_000]
    kept = select(ops, counts, scores, pinned, budget)
    for row in range(3):
        for head in range(2):
            expected = best(scores[row, head], pinned[row], counts[row], budget[row])
            assert kept[row, head].nonzero().squeeze(1).tolist() == expected


@needs_cpp
def test_select_pages_survives_nan() -> None:
    scores = torch.full((1, 1, 5_000), torch.nan)
    scores[..., ::7] = 1.0
    kept = select(Ops("cpp"), [5_000], scores, torch.zeros(1, 5_000, dtype=torch.bool), [100])
    assert kept.sum() == 100
    assert (scores[kept] == 1.0).all()


# -- utility -----------------------------------------------------------------------------------


def random_state(num_slots: int, step: int, rng: torch.Generator) -> UtilityState:
    state = UtilityState.empty(num_slots)
    state.mass.copy_(torch.rand(num_slots, generator=rng))
    state.last_step.copy_(torch.randint(step + 1, (num_slots,), generator=rng))
    state.visits.copy_(torch.randint(20, (num_slots,), generator=rng))
    return state


def copy_of(state: UtilityState) -> UtilityState:
    return UtilityState(state.mass.clone(), state.last_step.clone(), state.visits.clone())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9375])
def test_update_utility(ops: Ops, decay: float, rng) -> None:
    step, num_slots = 30, 64
    state = random_state(num_slots, step, rng)
    before = copy_of(state)
    slots = torch.randperm(num_slots, generator=rng).int()[:40]
    slots[5:9] = 0  # skipped
    mass = torch.rand(40, generator=rng)
    ops.update_utility(slots, mass, step, decay, state)
    given = dict(zip(slots.tolist(), mass.tolist(), strict=True))
    given.pop(0)
    for slot in range(num_slots):
        old = float(before.mass[slot])
        if slot not in given:
            assert state.mass[slot] == old
            assert state.last_step[slot] == before.last_step[slot]
            assert state.visits[slot] == before.visits[slot]
            continue
        expected = old * decay ** (step - int(before.last_step[slot])) + (1 - decay) * given[slot]
        assert float(state.mass[slot]) == pytest.approx(expected, rel=TOLERANCE)
        assert state.last_step[slot] == step
        assert state.visits[slot] == before.visits[slot] + 1


def utilities(state: UtilityState, step: int, decay: float, weights: tuple[float, float, float]) -> Tensor:
    age = (step - state.last_step).double()
    mass = weights[0] * state.mass.double() * torch.tensor(decay, dtype=torch.float64) ** age
    return mass + weights[1] / (1 + age) + weights[2] * torch.log1p(state.visits.double())


@dataclass
class Choice:
    state: UtilityState
    evictable: Tensor
    step: int = 40
    decay: float = 0.9375
    weights: tuple[float, float, float] = (1.0, 0.5, 0.25)

    def victims(self, ops: Ops, number: int) -> list[int]:
        """Chooses, and checks whatever can be said of any choice."""
        out = torch.full((number,), -1, dtype=torch.int32)
        before = copy_of(self.state)
        ops.choose_victims(self.state, self.evictable, self.step, self.decay, self.weights, out)
        assert all(torch.equal(a, b) for a, b in zip(vars(before).values(), vars(self.state).values(), strict=True))
        num_chosen = min(number, int(self.evictable.sum()))
        victims = out[:num_chosen].tolist()
        assert (out[num_chosen:] == 0).all()
        assert len(set(victims)) == num_chosen  # no page twice
        assert bool(self.evictable[victims].all()) if victims else True
        utility = utilities(self.state, self.step, self.decay, self.weights)
        ordered = utility[victims]
        assert (ordered.diff() >= -TOLERANCE).all()
        spared = self.evictable.clone()
        spared[victims] = False
        if victims and spared.any():
            assert utility[spared].min() >= ordered.max() - TOLERANCE
        rank = {slot: i for i, slot in enumerate(victims)}
        same: dict[tuple, int] = {}  # slots with one and the same state go lowest first
        for slot in self.evictable.nonzero().squeeze(1).tolist():
            kind = (float(self.state.mass[slot]), int(self.state.last_step[slot]), int(self.state.visits[slot]))
            earlier = same.get(kind)
            if earlier is not None and slot in rank:
                assert earlier in rank
                assert rank[earlier] < rank[slot]
            same[kind] = slot
        return victims


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_choose_victims(name: str, data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 40))
    rng = torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 2**31)))
    state = random_state(num_slots, 40, rng)
    if data.draw(st.booleans()):  # ties
        state.mass.mul_(4).round_()
        state.last_step.floor_divide_(20)
        state.visits.floor_divide_(8)
    evictable = torch.rand(num_slots, generator=rng) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    weights = data.draw(st.sampled_from([(1.0, 0.5, 0.25), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]))
    choice = Choice(state, evictable, decay=data.draw(st.sampled_from([0.0, 0.5, 0.9375])), weights=weights)
    choice.victims(Ops(name), data.draw(st.integers(0, num_slots + 3)))


def test_choose_victims_of_many(ops: Ops, rng) -> None:
    choice = Choice(random_state(30_000, 40, rng), torch.rand(30_000, generator=rng) < 0.7)
    assert len(choice.victims(ops, 1_000)) == 1_000


def test_equal_utilities_go_to_the_lower_slot(ops: Ops) -> None:
    choice = Choice(UtilityState.empty(10_000), torch.ones(10_000, dtype=torch.bool))
    choice.evictable[0] = choice.evictable[3] = False
    assert choice.victims(ops, 5) == [1, 2, 4, 5, 6]
    choice.state.mass[::2] = -0.0  # no less than 0.0
    assert choice.victims(ops, 5) == [1, 2, 4, 5, 6]


def test_nobody_to_evict(ops: Ops) -> None:
    assert Choice(UtilityState.empty(5), torch.zeros(5, dtype=torch.bool)).victims(ops, 3) == []
    assert Choice(UtilityState.empty(0), torch.zeros(0, dtype=torch.bool)).victims(ops, 3) == []


# -- random shapes -----------------------------------------------------------------------------


def test_random_shapes(ops: Ops) -> None:
    choose = random.Random(3)
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        rng = torch.Generator(torch.get_default_device()).manual_seed(choose.getrandbits(30))
        rows, heads, width = choose.randint(1, 5), choose.randint(1, 4), choose.randint(1, 300)
        counts = [choose.randint(0, width) for _ in range(rows)]
        budget = [choose.randint(0, width) for _ in range(rows)]
        scores = torch.randn(rows, heads, width, generator=rng).mul(choose.choice([1, 8])).round()
        pinned = torch.rand(rows, width, generator=rng) < choose.choice([0.0, 0.1, 0.9])
        kept = select(ops, counts, scores, pinned, budget)
        row, head = choose.randrange(rows), choose.randrange(heads)
        expected = best(scores[row, head], pinned[row], counts[row], budget[row])
        assert kept[row, head].nonzero().squeeze(1).tolist() == expected

        choice = Choice(random_state(width, 40, rng), torch.rand(width, generator=rng) < 0.5)
        choice.victims(ops, choose.randint(0, width))

        slabs, content = random_slabs(choose.randint(1, 6), choose.randint(1, 9), choose.randint(1, 700), rng)
        slots = torch.randint(len(content), (width,), generator=rng, dtype=torch.int32)
        out = torch.empty(width, slabs.row_bytes, dtype=torch.uint8)
        ops.gather_pages(slabs, slots, out)
        assert torch.equal(out, content[slots.long()])


# -- wrong arguments ---------------------------------------------------------------------------

LAYOUT = CODECS["int4"].layout(2, 16, 8, torch.float32)
PAGES, BOUNDS = (Slabs(4, size) for size in (LAYOUT.page_bytes, LAYOUT.bounds_bytes))
F, I, B, U = torch.float32, torch.int32, torch.bool, torch.uint8
STATE = UtilityState.empty(9)


def zeros(*shape: int, dtype: torch.dtype = F) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD: dict[str, dict] = {
    "gather_pages": {"slabs": PAGES, "slots": zeros(0, dtype=I), "out": zeros(0, LAYOUT.page_bytes, dtype=U)},
    "scatter_pages": {"slabs": PAGES, "slots": zeros(0, dtype=I), "pages": zeros(0, LAYOUT.page_bytes, dtype=U)},
    "place_pages": {
        "preference": zeros(4, 3, dtype=I),
        "groups": zeros(4, dtype=I),
        "limits": zeros(4, dtype=I),
        "source": -1,
        "loads": zeros(2, 3, dtype=I),
        "free": zeros(3, dtype=torch.int64),
        "out": zeros(4, dtype=I),
    },
    "decode_attention": {
        "query": zeros(6, 4, 16),
        "slabs": PAGES,
        "table": zeros(3, 5, dtype=I),
        "counts": zeros(3, dtype=I),
        "layout": LAYOUT,
        "scale": 1.0,
        "out": zeros(6, 4, 16),
        "lse": zeros(6, 4),
        "page_lse": zeros(6, 4, 5),
    },
    "key_scores": {
        "query": zeros(6, 4, 16),
        "slabs": PAGES,
        "table": zeros(3, 5, dtype=I),
        "counts": zeros(3, dtype=I),
        "layout": LAYOUT,
        "scale": 1.0,
        "out": zeros(6, 4, 5),
    },
    "prefill_attention": {
        "query": zeros(7, 4, 16),
        "slabs": PAGES,
        "slots": zeros(0, dtype=I),
        "layout": LAYOUT,
        "scale": 1.0,
        "out": zeros(7, 4, 16),
        "lse": zeros(7, 4),
    },
    "context_attention": {
        "query": zeros(7, 4, 16),
        "keys": zeros(2, 9, 16),
        "values": zeros(2, 9, 16),
        "scale": 1.0,
        "first_query": 2,
        "out": zeros(7, 4, 16),
        "lse": zeros(7, 4),
    },
    "tail_attention": {
        "query": zeros(3, 4, 16),
        "keys": zeros(3, 2, 8, 16),
        "values": zeros(3, 2, 8, 16),
        "lengths": zeros(3, dtype=I),
        "scale": 1.0,
        "out": zeros(3, 4, 16),
        "lse": zeros(3, 4),
    },
    "merge_partials": {"outs": zeros(2, 3, 4), "lses": zeros(2, 3), "out": zeros(3, 4), "lse": zeros(3)},
    "page_scores": {
        "query": zeros(3, 4, 16),
        "summary_slabs": BOUNDS,
        "table": zeros(3, 5, dtype=I),
        "counts": zeros(3, dtype=I),
        "layout": LAYOUT,
        "out": zeros(3, 2, 5),
    },
    "subpage_scores": {
        "query": zeros(3, 4, 16),
        "summary_slabs": Slabs(4, SubPages(4, 4).num_bytes(LAYOUT)),
        "table": zeros(3, 5, dtype=I),
        "counts": zeros(3, dtype=I),
        "layout": LAYOUT,
        "summary": SubPages(4, 4),
        "scale": 1.0,
        "out": zeros(3, 4, 5),
    },
    "select_pages": {
        "table": zeros(3, 5, dtype=I),
        "counts": zeros(3, dtype=I),
        "scores": zeros(3, 2, 5),
        "pinned": zeros(3, 5, dtype=B),
        "budget": zeros(3, dtype=I),
        "out": zeros(3, 2, 5, dtype=I),
    },
    "update_utility": {
        "slots": zeros(4, dtype=I),
        "mass": zeros(4),
        "step": 1,
        "decay": 0.5,
        "state": STATE,
    },
    "choose_victims": {
        "state": STATE,
        "evictable": zeros(9, dtype=B),
        "step": 1,
        "decay": 0.5,
        "weights": (1.0, 1.0, 1.0),
        "out": zeros(2, dtype=I),
    },
}

BAD = [
    ("gather_pages", {"slots": zeros(2, 2, dtype=I)}, r"slots must have 1 dimensions \[N\], got shape \[2, 2\]"),
    ("gather_pages", {"slots": zeros(0, dtype=torch.int64)}, "slots must be Int, got Long"),
    ("scatter_pages", {"pages": zeros(1, 7, dtype=U)}, r"pages must have shape .* = \[0, {page}\], got \[1, 7\]"),
    ("place_pages", {"groups": zeros(4, dtype=I) + 2}, r"groups\[0\] = 2, but loads has 2 groups"),
    ("place_pages", {"preference": zeros(4, 3, dtype=I) + 3}, r"preference\[0, 0\] = 3, but there are 3 ranks"),
    ("place_pages", {"free": zeros(3, dtype=I)}, "free must be Long, got Int"),
    ("gather_pages", {"out": zeros(1, 7, dtype=U)}, r"out must have shape .* = \[0, {page}\], got \[1, 7\]"),
    ("decode_attention", {"query": zeros(7, 4, 16)}, "query rows must be a multiple of table rows = 3, got 7"),
    ("decode_attention", {"query": zeros(6, 5, 16)}, "query heads must be a multiple of num_kv_heads = 2, got 5"),
    ("decode_attention", {"query": zeros(6, 4, 32)}, "slabs must have rows of page_bytes = .*, got {page}"),
    (
        "decode_attention",
        {"query": zeros(6, 4, 15)},
        "head_dim must be a multiple of the 2 elements in a byte, got 15",
    ),
    ("decode_attention", {"query": zeros(6, 4, 16, dtype=torch.float64)}, "query must be .*, got Double"),
    ("decode_attention", {"table": zeros(4, 5, dtype=I)}, r"table must have shape \[B, P\] = \[3, 5\], got \[4, 5\]"),
    ("decode_attention", {"table": zeros(3, 3, 5, dtype=I)}, r"table must .* = \[3, 2, 5\], got \[3, 3, 5\]"),
    ("decode_attention", {"table": zeros(5, 3, dtype=I).T}, "table must be contiguous, .* strides"),
    ("decode_attention", {"counts": zeros(3)}, "counts must be Int, got Float"),
    ("decode_attention", {"lse": zeros(6, 2)}, r"lse must have shape \[R, H\] = \[6, 4\], got \[6, 2\]"),
    ("decode_attention", {"page_lse": zeros(6, 4, 6)}, r"page_lse must have shape .* = \[6, 4, 5\], got \[6, 4, 6\]"),
    ("key_scores", {"out": zeros(6, 4, 16)}, r"out must have shape \[R, H, P\] = \[6, 4, 5\], got \[6, 4, 16\]"),
    ("prefill_attention", {"out": zeros(6, 4, 16)}, r"out must have shape .* = \[7, 4, 16\], got \[6, 4, 16\]"),
    ("prefill_attention", {"lse": zeros(7, 4).half()}, "lse must be Float, got Half"),
    ("context_attention", {"values": zeros(2, 8, 16)}, r"values must have .* = \[2, 9, 16\], got \[2, 8, 16\]"),
    ("context_attention", {"keys": zeros(3, 9, 16)}, "query heads must be a multiple of KV heads = 3, got 4"),
    ("context_attention", {"first_query": -3}, "first_query must be at least 0 or None, got -3"),
    ("tail_attention", {"lengths": zeros(4, dtype=I)}, r"lengths must have shape \[N\] = \[3\], got \[4\]"),
    ("tail_attention", {"keys": zeros(3, 2, 9, 16)}, r"values must have .* = \[3, 2, 9, 16\], got \[3, 2, 8, 16\]"),
    ("merge_partials", {"lses": zeros(2, 4)}, r"lses must have shape \[P, N\] = \[2, 3\], got \[2, 4\]"),
    ("page_scores", {"table": zeros(4, 5, dtype=I)}, r"table must have shape \[R, P\] = \[3, 5\], got \[4, 5\]"),
    ("page_scores", {"query": zeros(3, 4, 64)}, "summaries must have rows of at least bounds_bytes = 1024, got 256"),
    ("page_scores", {"out": zeros(3, 4, 5)}, r"out must have shape \[R, K, P\] = \[3, 2, 5\], got \[3, 4, 5\]"),
    ("subpage_scores", {"counts": zeros(2, dtype=I)}, r"counts must have shape \[R\] = \[3\], got \[2\]"),
    (
        "subpage_scores",
        {"summary": SubPages(4, 8)},
        "summaries must have rows of at least summary_bytes = 144, got 80",
    ),
    ("subpage_scores", {"query": zeros(3, 4, 15)}, "head_dim must be a multiple of the 2 codes in a byte, got 15"),
    ("subpage_scores", {"out": zeros(3, 2, 5)}, r"out must have shape \[R, H, P\] = \[3, 4, 5\], got \[3, 2, 5\]"),
    ("select_pages", {"pinned": zeros(3, 5, dtype=U)}, "pinned must be Bool, got Byte"),
    ("select_pages", {"budget": zeros(2, dtype=I)}, r"budget must have shape \[R\] = \[3\], got \[2\]"),
    ("update_utility", {"mass": zeros(5)}, r"new_mass must have shape \[N\] = \[4\], got \[5\]"),
    ("update_utility", {"step": 2**31}, "step must be from 0 to 2147483647, got 2147483648"),
    ("choose_victims", {"evictable": zeros(8, dtype=B)}, r"evictable must have shape .* = \[9\], got \[8\]"),
    ("choose_victims", {"out": zeros(2, dtype=torch.int64)}, "out must be Int, got Long"),
]


@needs_cpp
@pytest.mark.parametrize(("op", "change", "message"), BAD, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(BAD)])
def test_messages_name_the_argument_and_both_sizes(op: str, change: dict, message: str) -> None:
    ops = Ops("cpp")
    getattr(ops, op)(**GOOD[op])
    with pytest.raises(RuntimeError, match=f"{op}: " + message.replace("{page}", str(LAYOUT.page_bytes))):
        getattr(ops, op)(**GOOD[op] | change)


@needs_cpp
def test_an_output_shares_no_memory() -> None:
    whole = torch.zeros(40)
    outs, out = whole[:24].view(2, 3, 4), whole[20:32].view(3, 4)
    with pytest.raises(RuntimeError, match="merge_partials: out must not share memory with outs"):
        Ops("cpp").merge_partials(outs, torch.zeros(2, 3), out, torch.zeros(3))
