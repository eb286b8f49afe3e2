"""The Triton kernels: against the reference where they can run, and through the compiler where not.

Without a GPU they are interpreted, in a process of its own (`test_the_ops_interpreted` starts it):
TRITON_INTERPRET must be set before triton is imported, and would have every other user of triton
interpreted, too. What the interpreter accepts the compiler may not, so without a GPU the launchers'
kernels are also compiled, for several architectures, and their registers and shared memory looked at.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_ops import DIM, check_flags, check_lists, check_merge, check_tails
from torch import Tensor

from pikv_ds.layout import PLAIN, PageLayout
from pikv_ds.ops import Ops, UtilityState, reference
from pikv_ds.ops.summaries import SubPages
from pikv_ds.slabs import Slabs

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

pytestmark = pytest.mark.sampled
INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU: test_the_ops_interpreted runs it in a process of its own"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="interpreting")

ELEMENTS = ["none", "fp8", "int8", "int4", "int2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HUGE = 2**30  # a table entry that nobody may follow


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(DEVICE == "cuda", reason="the ops run on the GPU itself")
def test_the_ops_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops("triton", DEVICE)


def generator(seed: int = 20260) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layout_of(kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, element: str) -> PageLayout:
    return PageLayout(kv_heads, head_dim, page_size, dtype, PLAIN[dtype] if element == "none" else element)


def to(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in tensors)


# -- moves and encoding: the reference's bytes --------------------------------------------------


def seal(op: Callable, keys: Tensor, values: Tensor, layout: PageLayout, device: str) -> tuple[Tensor, ...]:
    """Pages, bounds and the flag, from rows that are parts of longer rows of garbage."""
    row = torch.full((len(keys), layout.page_bytes + layout.bounds_bytes), 0xAB, dtype=torch.uint8, device=device)
    pages, bounds = row[:, : layout.page_bytes], row[:, layout.page_bytes :]
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    op(keys.to(device), values.to(device), layout, pages, bounds, flags)
    return pages.cpu(), bounds.cpu(), flags.cpu()


@runs
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim", "page_size"), [(1, 20, 8), (2, 64, 16), (3, 80, 32), (1, 192, 256)])
def test_seal_pages_gives_the_bytes_of_the_reference(
    ops: Ops, element: str, dtype: torch.dtype, kv_heads: int, head_dim: int, page_size: int
) -> None:
    layout, rng = layout_of(kv_heads, head_dim, page_size, dtype, element), generator()
    keys, values = (torch.randn(2, 3, page_size, kv_heads, head_dim, generator=rng) * 3).transpose(2, 3).unbind(0)
    keys[0, 0, :, 1], values[0, 0, 1] = 0.0, 0.0  # constant channels and tokens: scales of 0
    keys[1, 0, :, 2] += 1000.0  # minima beyond the integers' spread
    keys[1, 0, :, 3] *= 1e-6  # subnormal scales
    values[2] *= torch.logspace(-9, 3, page_size)[:, None]
    keys, values = keys.to(dtype) + 0.0, values.to(dtype) + 0.0  # without -0: is it less than 0?
    expected = seal(reference.seal_pages, keys, values, layout, "cpu")
    for actual, wanted in zip(seal(ops.seal_pages, keys, values, layout, DEVICE), expected, strict=True):
        assert torch.equal(actual, wanted)


@runs
def test_seal_pages_rounds_halves_to_even(ops: Ops) -> None:
    """All multiples of a sixteenth: every e4m3 number, every middle between two, and both halves of the integers."""
    steps = torch.arange(-2048, 2048).view(1, 1, 16, 256)
    for element, x in (("fp8", steps * (448 / 2048)), ("fp8", steps / 2**12 * 448), ("int8", steps / 2.0)):
        layout = layout_of(1, 256, 16, torch.float32, element)
        expected = seal(reference.seal_pages, x.float(), x.float(), layout, "cpu")
        assert torch.equal(seal(ops.seal_pages, x.float(), x.float(), layout, DEVICE)[0], expected[0])


@runs
@pytest.mark.parametrize("element", ["none", "fp8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_seal_pages_tells_of_what_cannot_be_stored(ops: Ops, element: str, bad: float, which: str) -> None:
    layout = layout_of(2, 20, 8, torch.float32, element)
    x = {name: torch.randn(2, 2, 8, 20, generator=generator()) for name in ("keys", "values")}
    assert seal(ops.seal_pages, **x, layout=layout, device=DEVICE)[2].item() == 0
    x[which][1, 1, 5, 7] = bad
    expected = seal(reference.seal_pages, **x, layout=layout, device="cpu")[2]
    assert torch.equal(seal(ops.seal_pages, **x, layout=layout, device=DEVICE)[2], expected)


@runs
@pytest.mark.parametrize("row_bytes", [48, 40, 22])
def test_gather_pages_is_bitwise(ops: Ops, row_bytes: int) -> None:
    rows = torch.randint(256, (12, row_bytes), generator=generator()).to(torch.uint8)
    slabs = slabs_of(rows, 5)
    slots = torch.tensor([11, 0, 4, 5, 5, 9], dtype=torch.int32)
    out = torch.empty(6, row_bytes, dtype=torch.uint8, device=DEVICE)
    ops.gather_pages(slabs, slots.to(DEVICE), out)
    assert torch.equal(out.cpu(), rows[slots.long()])
    ops.gather_pages(slabs, slots[:0].to(DEVICE), out[:0])


def slabs_of(rows: Tensor, slab_rows: int) -> Slabs:
    slabs = Slabs(slab_rows, rows.shape[1], DEVICE)
    for i, start in enumerate(range(0, len(rows), slab_rows)):
        storage = torch.full((slab_rows, rows.shape[1]), 0xFF, dtype=torch.uint8)  # NaN in every type
        storage[: len(rows) - start] = rows[start : start + slab_rows]
        slabs.put(i, storage.to(DEVICE))
    return slabs


# -- attention -----------------------------------------------------------------------------------


@dataclass
class Case:
    """Queries over random pages with holes, poison between the pages and traps behind the counts."""

    layout: PageLayout
    query: Tensor  # [R, H, D]
    slabs: Slabs
    table: Tensor
    counts: Tensor

    @classmethod
    def random(
        cls,
        element: str,
        dtype: torch.dtype,
        kv_heads: int,
        group: int,
        head_dim: int,
        page_size: int,
        queries: int = 1,
        counts: tuple[int, ...] = (11, 0, 3),
        width: int = 12,
        per_head: bool = False,
        holes: float = 0.2,
    ) -> Case:
        rng, n = generator(), 6
        layout = layout_of(kv_heads, head_dim, page_size, dtype, element)
        keys, values = torch.randn(2, n, kv_heads, page_size, head_dim, generator=rng).to(dtype).unbind(0)
        pages = torch.full((2 * n + 1, layout.page_bytes), 0xFF, dtype=torch.uint8)  # poisoned slots between
        reference.seal_pages(keys, values, layout, pages[1::2], None, torch.zeros(1, dtype=torch.int32))
        shape = (len(counts), kv_heads, width) if per_head else (len(counts), width)
        table = torch.randint(n, shape, generator=rng, dtype=torch.int32) * 2 + 1
        table[torch.rand(shape, generator=rng) < holes] = 0
        for row, count in zip(table, counts, strict=True):
            row[..., count:] = HUGE
        query = torch.randn(len(counts) * queries, kv_heads * group, head_dim, generator=rng).to(dtype)
        there = torch.tensor(counts, dtype=torch.int32)
        return cls(layout, query.to(DEVICE), slabs_of(pages, 4), *to(table, there))

    def run(self, ops: Any, page_lse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        rows, heads, _ = self.query.shape
        out = torch.full(self.query.shape, math.nan, device=DEVICE)
        lse = torch.full((rows, heads), math.nan, device=DEVICE)
        per_page = torch.full((rows, heads, self.table.shape[-1]), math.nan, device=DEVICE) if page_lse else None
        arguments = (self.query, self.slabs, self.table, self.counts, self.layout, self.query.shape[2] ** -0.5)
        ops.decode_attention(*arguments, out, lse, per_page)
        if per_page is None:
            return out, lse, lse
        alone = torch.full_like(per_page, math.nan)
        ops.key_scores(*arguments, alone)
        torch.testing.assert_close(alone, per_page, atol=1e-5, rtol=1e-5)
        return out, lse, per_page

    def in_its_own_type(self) -> tuple[Tensor, Tensor, Tensor]:
        """What torch computes in the queries' type, from pages decoded to that type."""
        out, lse, per_page = (torch.empty_like(x) for x in self.run(reference))
        for row, query in enumerate(self.query):
            arguments = (self.slabs, self.table, self.counts, self.layout, row * len(self.table) // len(self.query))
            keys, values, there = reference._visible_pages(*arguments)  # [P, K, S, D]
            k, p = self.layout.num_kv_heads, len(keys)
            q = query.unflatten(0, (k, -1))
            flat_keys, flat_values = (x.transpose(0, 1).flatten(1, 2).to(query.dtype) for x in (keys, values))
            scores = (q @ flat_keys.transpose(1, 2)).float() * query.shape[1] ** -0.5  # [K, G, P * S]
            scores = scores.unflatten(2, (p, self.layout.page_size)).masked_fill(~there[:, None, :, None], -math.inf)
            per_page[row] = -math.inf
            per_page[row, :, :p] = scores.logsumexp(-1).flatten(0, 1)
            scores = scores.flatten(2)
            lse[row] = scores.logsumexp(-1).flatten()
            weights = torch.exp(scores - lse[row].nan_to_num(neginf=0.0).view(k, -1, 1)).to(query.dtype)
            out[row] = (weights @ flat_values).flatten(0, 1)
        return out, lse, per_page


def check(case: Case, ops: Ops) -> None:
    actual, expected = case.run(ops), case.run(reference)
    half = case.query.dtype != torch.float32
    bounds = case.in_its_own_type() if half else expected
    for x, y, z in zip(actual, expected, bounds, strict=True):
        assert torch.equal(x == -math.inf, y == -math.inf)
        finite = y != -math.inf
        error, torch_error = (x - y)[finite].abs(), (z - y)[finite].abs()
        if half:
            assert error.max() <= 2 * torch_error.max() + 1e-6
            assert error.square().mean() <= 4 * torch_error.square().mean() + 1e-12
        else:
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@runs
@pytest.mark.parametrize(
    ("element", "dtype"),
    [(e, d) for e in ELEMENTS for d in DTYPES if d != torch.bfloat16 or e in ("none", "int4")],  # interpreting is slow
)
def test_decode_attention_of_every_element(ops: Ops, element: str, dtype: torch.dtype) -> None:
    check(Case.random(element, dtype, 2, 3, 64, 32, queries=2), ops)  # 12 pages of 32 tokens: several splits


@runs
@pytest.mark.parametrize("element", ["none", "int4"])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page_size", "queries"),
    [
        (1, 1, 20, 8, 1),  # half of a tile is empty
        (3, 2, 80, 16, 1),
        (1, 16, 96, 16, 8),  # as many rows as a block of queries has: several blocks
        (1, 4, 128, 256, 3),  # several tiles in a page
        (1, 5, 192, 32, 1),
        (1, 8, 256, 64, 1),
    ],
)
def test_decode_attention_of_every_shape(
    ops: Ops, element: str, kv_heads: int, group: int, head_dim: int, page_size: int, queries: int
) -> None:
    dtype = torch.float16 if page_size > 8 else torch.float32
    check(Case.random(element, dtype, kv_heads, group, head_dim, page_size, queries, (5, 1), 6), ops)


@runs
@pytest.mark.parametrize(("element", "width"), [("int4", 40), ("none", 1100)])
def test_decode_attention_with_a_table_per_head(ops: Ops, element: str, width: int) -> None:
    holes = 1 - 15 / width  # 1100: more than the compaction takes at a time
    check(Case.random(element, torch.float32, 2, 1, 24, 8, 2, (width - 1, 3), width, True, holes), ops)


@runs
def test_decode_attention_does_not_depend_on_what_else_is_there(ops: Ops) -> None:
    case = Case.random("int4", torch.float16, 2, 2, 32, 32)
    out, lse, _ = case.run(ops)
    assert all(torch.equal(a, b) for a, b in zip(case.run(ops), case.run(ops), strict=True))
    plain = case.run(ops, page_lse=False)  # weights are taken relative to another maximum
    torch.testing.assert_close(plain[0], out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(plain[1], lse, atol=1e-5, rtol=1e-5)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()


@runs
def test_a_page_far_below_the_others_keeps_its_score(ops: Ops) -> None:
    """Its weight underflows beside the others', its own log-sum-exp must not: shortlists are ranked by it."""
    layout = layout_of(1, 16, 16, torch.float32, "none")
    keys = torch.ones(3, 1, 16, 16) * torch.tensor([1.0, 60.0, -60.0])[:, None, None, None]
    pages = torch.zeros(4, layout.page_bytes, dtype=torch.uint8)
    reference.seal_pages(keys, keys, layout, pages[1:], None, torch.zeros(1, dtype=torch.int32))
    table, counts = torch.tensor([[2, 1, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    case = Case(layout, torch.ones(1, 1, 16).to(DEVICE), slabs_of(pages, 4), *to(table, counts))
    expected = torch.tensor([60.0, 1.0, -60.0]) * 4 + math.log(16)
    torch.testing.assert_close(case.run(ops)[2].flatten().cpu(), expected)


@runs
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("element", ["fp8", "int4"])
def test_scales_near_the_ends_of_float16_neither_overflow_nor_underflow(ops: Ops, element: str, scale: float) -> None:
    """bfloat16 queries of 10^5 over keys and values whose own scales come near float16's ends."""
    layout, rng = layout_of(1, 32, 16, torch.bfloat16, element), generator()
    keys, values = (torch.randn(2, 4, 1, 16, 32, generator=rng) * scale).bfloat16().unbind(0)
    pages = torch.zeros(5, layout.page_bytes, dtype=torch.uint8)
    reference.seal_pages(keys, values, layout, pages[1:], None, torch.zeros(1, dtype=torch.int32))
    query = (torch.randn(1, 2, 32, generator=rng) * (1e5 if scale < 1 else 1.0 / scale)).bfloat16()
    table, counts = torch.tensor([[2, 1, 3, 4]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    check(Case(layout, query.to(DEVICE), slabs_of(pages, 8), *to(table, counts)), ops)


@runs
@pytest.mark.parametrize("element", ["none", "int8"])
def test_prefill_attention(ops: Ops, element: str) -> None:
    case = Case.random(element, torch.float32, 2, 2, 24, 16, queries=35, counts=(7,), width=7, holes=0.0)
    expected, lse, _ = case.run(reference)
    out, out_lse = torch.full_like(expected, math.nan), torch.full_like(lse, math.nan)
    ops.prefill_attention(case.query, case.slabs, case.table[0], case.layout, 24**-0.5, out, out_lse)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_lse, lse, atol=1e-5, rtol=1e-5)


@runs
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_attention_over_plain_keys(ops: Ops, dtype: torch.dtype, tolerance: float) -> None:
    rng = generator()
    query, keys, values = (
        torch.randn(s, generator=rng).to(dtype) for s in ((4, 6, 24), (4, 3, 16, 24), (4, 3, 16, 24))
    )
    lengths = torch.tensor([0, 5, 16, 1], dtype=torch.int32)
    for i, length in enumerate(lengths.tolist()):
        keys[i, :, length:], values[i, :, length:] = math.nan, math.nan
    compare("tail_attention", ops, query, keys, values, lengths, 0.2, tolerance=tolerance)
    query, keys, values = (torch.randn(s, generator=rng).to(dtype) for s in ((37, 6, 24), (3, 90, 24), (3, 90, 24)))
    for first_query in (None, 0, 53, -3):
        compare("context_attention", ops, query, keys, values, 0.2, first_query, tolerance=tolerance)


def compare(op: str, ops: Ops, query: Tensor, *arguments: Any, tolerance: float) -> None:
    results = []
    for backend, device in ((ops, DEVICE), (reference, "cpu")):
        there = (x.to(device) if isinstance(x, Tensor) else x for x in (query, *arguments))
        out = torch.full(query.shape, math.nan, device=device)
        lse = torch.full(query.shape[:2], math.nan, device=device)
        getattr(backend, op)(*there, out, lse)
        results.append((out.cpu(), lse.cpu()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@runs
@pytest.mark.parametrize("streams", [1, 2])
def test_what_a_decode_pass_asks_for(ops: Ops, streams: int) -> None:
    """What the kernels do not do themselves is done around them."""
    with torch.device(DEVICE):
        rng = torch.Generator(DEVICE).manual_seed(streams)
        check_lists(ops, rng, "int4", torch.float16, streams)
        check_tails(ops, rng, torch.float16, DIM)
        check_merge(ops, rng, torch.bfloat16)
        check_flags(ops, rng, "int8", torch.float32)


@runs
@pytest.mark.parametrize("num_partials", [0, 1, 4, 21])
def test_merge_partials(ops: Ops, num_partials: int) -> None:
    rng = generator()
    outs, lses = torch.randn(num_partials, 6, 24, generator=rng), torch.randn(num_partials, 6, generator=rng) * 30
    lses[:, 2] = -math.inf
    lses[1::3, :4] = -math.inf
    outs[lses == -math.inf] = math.nan  # never read
    if num_partials:
        lses[0, 5] = math.nan  # spoils its row, and no other
    results = []
    for backend, device in ((ops, DEVICE), (reference, "cpu")):
        out, lse = torch.full((6, 24), 7.0, device=device), torch.full((6,), 7.0, device=device)
        backend.merge_partials(outs.to(device), lses.to(device), out, lse)
        results.append((out.cpu(), lse.cpu()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5, equal_nan=True)
    if num_partials == 1:
        assert torch.equal(results[0][0][0], outs[0, 0])  # bit by bit


# -- lookup and retention ------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 3, 20), (1, 16, 128)])
def test_page_scores(ops: Ops, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int) -> None:
    rng, layout = generator(), layout_of(kv_heads, head_dim, 8, dtype, "int8")
    bounds = torch.randn(9, 2, kv_heads, head_dim, generator=rng).sort(1).values.to(dtype)
    slabs = slabs_of(bounds.view(9, -1).view(torch.uint8), 4)
    table = torch.full((2, 40), HUGE, dtype=torch.int32)
    table[0], table[1, :3] = torch.randint(9, (40,), generator=rng), torch.tensor([0, 4, 8])
    arguments = to(torch.randn(2, kv_heads * group, head_dim, generator=rng).to(dtype))[0], slabs
    arguments += (*to(table, torch.tensor([40, 3], dtype=torch.int32)), layout)
    actual, expected = torch.full((2, 2, kv_heads, 40), math.nan, device=DEVICE)
    ops.page_scores(*arguments, actual)
    reference.page_scores(*arguments, expected)
    torch.testing.assert_close(actual, expected)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page_size", "summary"),
    [(2, 3, 20, 16, SubPages(4, 4)), (1, 16, 128, 32, SubPages(8, 8)), (3, 1, 24, 8, SubPages(8, 8))],
)
def test_subpage_scores(
    ops: Ops, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, page_size: int, summary: SubPages
) -> None:
    rng, layout = generator(), layout_of(kv_heads, head_dim, page_size, dtype, "int8")
    bits = summary.bits * head_dim // 8
    codes = torch.randint(256, (9, 2 * kv_heads * summary.count(layout) * bits), generator=rng).to(torch.uint8)
    scales = (torch.rand(9, 2 * kv_heads * summary.count(layout), generator=rng) * 0.02).half()
    slabs = slabs_of(torch.cat([codes, scales.view(torch.uint8)], dim=1), 4)
    table = torch.full((2, 40), HUGE, dtype=torch.int32)
    table[0], table[1, :3] = torch.randint(9, (40,), generator=rng), torch.tensor([0, 4, 8])
    arguments = to(torch.randn(2, kv_heads * group, head_dim, generator=rng).to(dtype))[0], slabs
    arguments += (*to(table, torch.tensor([40, 3], dtype=torch.int32)), layout, summary, 0.3)
    actual, expected = torch.full((2, 2, kv_heads * group, 40), math.nan, device=DEVICE)
    ops.subpage_scores(*arguments, actual)
    reference.subpage_scores(*arguments, expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-4)


@runs
@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 70, 5000])
def test_select_pages_chooses_as_the_reference_does(ops: Ops, width: int) -> None:
    rng, rows, heads = generator(width), 3, 2
    scores = torch.randint(-3, 4, (rows, heads, width), generator=rng).float()  # many ties
    scores[0] *= torch.rand(heads, width, generator=rng) * 1e3  # and none, negative ones included
    scores[1, 0, 0], scores[2, 1, width // 2] = -math.inf, -0.0
    pinned = torch.rand(rows, width, generator=rng) < 0.2
    counts = torch.randint(width + 1, (rows,), generator=rng, dtype=torch.int32)
    budget = torch.randint(width + 3, (rows,), generator=rng, dtype=torch.int32)
    table = torch.arange(1, rows * width + 1, dtype=torch.int32).view(rows, width)
    actual, expected = torch.full((2, rows, heads, width), -1, dtype=torch.int32).unbind(0)
    reference.select_pages(table, counts, scores, pinned, budget, expected)
    actual = actual.to(DEVICE)
    ops.select_pages(*to(table, counts, scores, pinned, budget), actual)
    assert torch.equal(actual.cpu(), expected)


@runs
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_utility_and_victims(ops: Ops, decay: float) -> None:
    rng, n = generator(), 300
    fields = (torch.rand(n, generator=rng), *torch.randint(5, (2, n), generator=rng, dtype=torch.int32).unbind(0))
    states = UtilityState(*to(*(x.clone() for x in fields))), UtilityState(*fields)
    slots, mass = torch.randperm(n, generator=rng)[:50].int(), torch.rand(50, generator=rng)
    ops.update_utility(*to(slots, mass), 7, decay, states[0])
    reference.update_utility(slots, mass, 7, decay, states[1])
    torch.testing.assert_close(states[0].mass.cpu(), states[1].mass)
    assert torch.equal(states[0].last_step.cpu(), states[1].last_step)
    assert torch.equal(states[0].visits.cpu(), states[1].visits)
    evictable = torch.rand(n, generator=rng) < 0.2
    for weights in ((1.0, 0.5, 0.1), (0.0, 1.0, 0.0)):  # the second: ties everywhere
        for wanted in (0, 5, 100, 400):
            actual, expected = torch.full((2, wanted), -1, dtype=torch.int32).unbind(0)
            actual = actual.to(DEVICE)
            ops.choose_victims(states[0], evictable.to(DEVICE), 9, decay, weights, actual)
            reference.choose_victims(states[1], evictable, 9, decay, weights, expected)
            assert torch.equal(actual.cpu(), expected)


# -- compiling without a GPU ---------------------------------------------------------------------


@dataclass
class Compiled:
    """A kernel as it would have been launched."""

    name: str
    registers: int
    stack: int
    """Bytes per thread, spilled registers included."""
    shared: int
    """Bytes."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Compiled]:
    """What launches are compiled to, for the architecture that the test is parametrized with; nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kernels: list[Compiled] = []
    target = GPUTarget("cuda", request.getfixturevalue("arch"), 32)
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
    types |= {torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kwargs: Any) -> None:
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.params):
            value = args[i] if i < len(args) else kwargs[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = (
                f"*{types[value.dtype]}"
                if isinstance(value, Tensor)
                else "fp32"
                if isinstance(value, float)
                else "i32"
            )
            if special and not isinstance(value, float) and (isinstance(value, Tensor) or value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        kernel = triton.compile(
            ASTSource(self, signature, constants, attributes), target=target, options={"num_warps": num_warps}
        )
        kernels.append(Compiled(self.__name__, *resources(kernel.asm["cubin"]), kernel.metadata.shared))

    def resources(cubin: bytes) -> tuple[int, int]:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        return int(found[1]), int(found[2])

    tmp_path = request.getfixturevalue("tmp_path")
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


DECODE = [
    (element, group, head_dim, page_size)
    for element in ELEMENTS
    for group, head_dim, page_size in ((8, 128, 32), (4, 128, 64))
]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decode_attention_compiles_without_spilling(compiled: list[Compiled], arch: int) -> None:
    from pikv_ds.ops import triton_ops as ops

    for element, group, head_dim, page_size in DECODE if arch == 90 else DECODE[6:7]:
        compiled.clear()
        case = Case.random(element, torch.bfloat16, 2, group, head_dim, page_size)
        out, lse = torch.empty(case.query.shape), torch.empty(case.query.shape[:2])
        ops.decode_attention(case.query, case.slabs, case.table, case.counts, case.layout, 1.0, out, lse)
        kernel = compiled[0]
        print(f"sm_{arch} {element} group {group} head size {head_dim} page size {page_size}: {kernel}")
        assert kernel.name == "paged_attention_kernel"
        assert kernel.stack <= 16
        assert kernel.shared <= 48 * 1024  # several programs on every streaming multiprocessor


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everything_else_compiles(compiled: list[Compiled], arch: int) -> None:
    from pikv_ds.ops import triton_ops as ops

    flag, f16 = torch.zeros(1, dtype=torch.int32), torch.float16
    shapes = [("int4", 256, 256), ("none", 80, 8), ("fp8", 128, 32)]
    for element, head_dim, page_size in shapes if arch == 90 else shapes[:1]:
        case = Case.random(element, f16, 2, 4, head_dim, page_size, queries=2, per_head=element == "int4")
        k, lay = torch.zeros(2, 2, page_size, head_dim, dtype=f16), case.layout
        pages, bounds = (torch.zeros(2, n, dtype=torch.uint8) for n in (lay.page_bytes, lay.bounds_bytes))
        ops.seal_pages(k, k, lay, pages, bounds, flag)
        ops.gather_pages(Slabs.of(pages), flag, pages[:1])
        out, lse, scores = torch.empty(6, 8, head_dim), torch.empty(6, 8), torch.empty(6, 8, 12)
        arguments = (case.query, case.slabs, case.table, case.counts, lay, 1.0)
        ops.decode_attention(*arguments, out, lse, scores)
        ops.key_scores(*arguments, scores)
        ops.page_scores(case.query, Slabs.of(bounds), case.table.view(-1, 12), case.counts, lay, torch.empty(6, 2, 12))
        for summary in (SubPages(8, 4), SubPages(8, 8)):
            rows = Slabs.of(torch.zeros(2, summary.num_bytes(lay), dtype=torch.uint8))
            table = case.table.view(-1, 12)
            ops.subpage_scores(case.query, rows, table, case.counts, lay, summary, 1.0, torch.empty(6, 8, 12))
        prompt = torch.empty(300, 8, head_dim, dtype=f16)
        out, lse = torch.empty(prompt.shape), torch.empty(prompt.shape[:2])
        ops.prefill_attention(prompt, case.slabs, case.table[0].flatten()[:3], lay, 1.0, out, lse)
        ops.context_attention(prompt, k[0], k[0], 1.0, 0, out, lse)
        ops.tail_attention(prompt[:2], k, k, flag.expand(2), 1.0, out[:2], lse[:2])
    case = Case.random("none", torch.float32, 2, 4, 128, 32)
    ops.decode_attention(*arguments_of(case))
    scores, pinned = torch.zeros(1, 2, 5000), torch.zeros(1, 5000, dtype=torch.bool)
    ops.select_pages(scores[:, 0].int(), flag, scores, pinned, flag, scores.int())
    state = UtilityState.empty(40)
    ops.update_utility(flag, torch.zeros(1), 16, 0.9, state)
    ops.choose_victims(state, pinned[0, :40], 16, 0.9, (1.0, 1.0, 1.0), flag)
    for name in sorted({x.name for x in compiled}):
        found = [x for x in compiled if x.name == name]
        registers, stack, shared = (
            max(x) for x in zip(*((x.registers, x.stack, x.shared) for x in found), strict=True)
        )
        print(f"sm_{arch} {name}: up to {registers} registers, {stack} B of stack, {shared} B shared")
        assert shared <= 99 * 1024  # what a program may have on every chip since sm_80
        assert stack <= 256


def arguments_of(case: Case) -> tuple:
    out, lse = torch.empty(case.query.shape), torch.empty(case.query.shape[:2])
    return (case.query, case.slabs, case.table, case.counts, case.layout, 1.0, out, lse)
