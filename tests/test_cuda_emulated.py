"""The CUDA kernels against the reference, run on the CPU by tests/cuda_emulator/emulator.h, so that their
arithmetic, fragments, barriers and asynchronous copies are tested where no GPU is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulator.emulated import EmulatedOps, build
from test_decode_ops import (
    DIM,
    HALF,
    check_append,
    check_experts,
    check_flags,
    check_lists,
    check_merge,
    check_rounding,
    check_tails,
)
from test_packed_pages import SEALED
from test_scheduling import SUBPAGES, subpage_case
from test_seal import DTYPES, difficult
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import reference
from pikv_ds.ops.state import UtilityState
from pikv_ds.ops.summaries import SubPages
from pikv_ds.policies.codecs import Codec
from pikv_ds.slabs import Slabs

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
HUGE = 2**30  # a table entry that nobody may follow
CODED = ["fp8", "int8", "int4", "int2"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the emulator")
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def cuda(library: Path) -> EmulatedOps:
    return EmulatedOps(library)


def kv(rng: torch.Generator, n: int, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Keys with channels of different size and offset, and values with tokens of different size."""
    shape = (n, layout.num_kv_heads, layout.page_size, layout.head_dim)
    keys, values = torch.randn(2, *shape, generator=rng).unbind(0)
    keys *= torch.rand(1, layout.num_kv_heads, 1, layout.head_dim, generator=rng) * 2
    keys += torch.randn(1, layout.num_kv_heads, 1, layout.head_dim, generator=rng)
    values *= torch.rand(n, layout.num_kv_heads, layout.page_size, 1, generator=rng) * 2
    return keys.to(layout.dtype), values.to(layout.dtype)


# -- moves and integers: the same bytes --------------------------------------------------------


@pytest.mark.parametrize("element", ["plain", *CODED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "page_size", "head_dim"), [(2, 16, 64), (3, 8, 20), (1, 32, 80), (1, 8, 12)])
def test_seal_pages(cuda: EmulatedOps, element: str, dtype: torch.dtype, kv_heads, page_size, head_dim, rng) -> None:
    element = str(dtype).removeprefix("torch.") if element == "plain" else element
    layout = PageLayout(kv_heads, head_dim, page_size, dtype, element)
    keys, values = kv(rng, 3, layout)
    keys[0, :, :, 0], keys[1, :, :, 1], values[0, 0, 0] = 0.0, 3.14159, -1.5  # constant channels and tokens
    keys[2] *= 1000
    keys[1, :, :, 2], keys[1, :, 1, 2], values[1, 0, 1], values[1, 0, 1, 1] = 0.0, -0.0, -0.0, 0.0
    padded = torch.full((3, layout.page_bytes + 48), 0xAB, dtype=torch.uint8)
    bounds = torch.full((3, layout.bounds_bytes + 1), 0xAB, dtype=torch.uint8)  # misaligned rows
    expected, expected_bounds = padded.clone(), bounds.clone()
    flag, expected_flag = torch.zeros(2, 1, dtype=torch.int32).unbind(0)
    reference.seal_pages(keys, values, layout, expected[:, 16:-32], expected_bounds[:, 1:], expected_flag)
    # strided: [N, S, K, D] in memory
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    cuda.seal_pages(keys, values, layout, padded[:, 16:-32], bounds[:, 1:], flag)
    assert torch.equal(padded, expected)
    assert torch.equal(bounds, expected_bounds)
    assert flag == expected_flag == 0
    aligned = torch.full((3, layout.page_bytes), 0xAB, dtype=torch.uint8)
    cuda.seal_pages(keys, values, layout, aligned, None, flag)
    assert torch.equal(aligned, expected[:, 16:-32])


@pytest.mark.parametrize("element", ["float32", *CODED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_seal_pages_notes_what_is_not_finite(cuda: EmulatedOps, element: str, bad: float, rng) -> None:
    layout = PageLayout(2, 64, 16, torch.float32, element)
    for which in range(2):
        keys, values = kv(rng, 2, layout)
        (keys, values)[which][1, 1, 7, 33] = bad
        flags = torch.zeros(2, 1, dtype=torch.int32)
        for flag, seal in zip(flags, (reference.seal_pages, cuda.seal_pages), strict=True):
            seal(keys, values, layout, torch.zeros(2, layout.page_bytes, dtype=torch.uint8), None, flag)
        assert torch.equal(*flags)


@pytest.mark.parametrize("codec", SEALED, ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "page_size", "head_dim"), [(2, 16, 64), (3, 8, 40), (1, 24, 128), (2, 1, 8)])
def test_seal_packed_pages(cuda: EmulatedOps, codec: Codec, dtype: torch.dtype, kv_heads, page_size, head_dim, rng):
    layout = codec.layout(kv_heads, head_dim, page_size, dtype)
    keys, values = (difficult((5, kv_heads, page_size, head_dim), dtype, rng) for _ in range(2))
    pages, expected = torch.full((2, 5, layout.page_bytes), 0xAB, dtype=torch.uint8).unbind(0)
    bounds, expected_bounds = torch.full((2, 5, layout.bounds_bytes), 0xAB, dtype=torch.uint8).unbind(0)
    flag, expected_flag = torch.zeros(2, 1, dtype=torch.int32).unbind(0)
    reference.seal_pages(keys, values, layout, expected, expected_bounds, expected_flag)
    cuda.seal_pages(keys, values, layout, pages, bounds, flag)
    assert torch.equal(pages, expected)
    assert torch.equal(bounds, expected_bounds)
    assert flag == expected_flag == 0


@pytest.mark.parametrize("codec", ["none", "fp8", "int8", "int4", Codec("int4", clip=True)])
def test_seal_latent_pages(cuda: EmulatedOps, codec: str | Codec, rng) -> None:
    codec = Codec(codec) if isinstance(codec, str) else codec
    layout = codec.layout(2, 40, 16, torch.bfloat16, latent_dim=32)
    keys = difficult((4, 2, 16, 40), torch.bfloat16, rng)
    pages, expected = torch.full((2, 4, layout.page_bytes), 0xAB, dtype=torch.uint8).unbind(0)
    flag = torch.zeros(1, dtype=torch.int32)
    reference.seal_pages(keys, None, layout, expected, None, flag)
    cuda.seal_pages(keys, None, layout, pages, None, flag)
    assert torch.equal(pages, expected)
    assert flag == 0


@pytest.mark.parametrize("row_bytes", [48, 7, 16 * 1024 + 16])
def test_gather_pages(cuda: EmulatedOps, row_bytes: int, rng) -> None:
    slabs = Slabs(4, row_bytes)
    for i in range(3):
        slabs.put(i, torch.randint(256, (4, row_bytes), generator=rng).to(torch.uint8))
    slots = torch.tensor([1, 11, 4, 4, 7], dtype=torch.int32)
    out, expected = torch.zeros(2, 5, row_bytes, dtype=torch.uint8).unbind(0)
    cuda.gather_pages(slabs, slots, out)
    reference.gather_pages(slabs, slots, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("row_bytes", [48, 7, 16 * 1024 + 16])
def test_scatter_pages(cuda: EmulatedOps, row_bytes: int, rng) -> None:
    slabs = Slabs(4, row_bytes)
    for i in range(3):
        slabs.put(i, torch.zeros(4, row_bytes, dtype=torch.uint8))
    slots = torch.tensor([1, 11, 4, 7], dtype=torch.int32)
    longer = torch.randint(256, (4, row_bytes + 16), generator=rng).to(torch.uint8)
    pages = longer[:, :row_bytes]
    cuda.scatter_pages(slabs, slots, pages)
    expected = torch.zeros(12, row_bytes, dtype=torch.uint8)
    expected[slots.long()] = pages
    assert torch.equal(torch.cat(slabs.tensors), expected)


@pytest.mark.parametrize("width", [1, 9, 513, 1500])
@pytest.mark.parametrize("levels", [2, 1000])
def test_select_pages(cuda: EmulatedOps, width: int, levels: int, rng) -> None:
    rows, heads = 6, 2
    scores = torch.randint(-levels, levels, (rows, heads, width), generator=rng) / 7.0
    scores[0, 0, : width // 2] = -0.0
    scores[1, :, ::3] = -torch.inf
    pinned = torch.rand(rows, width, generator=rng) < 0.2
    counts = torch.randint(0, width + 1, (rows,), generator=rng).int()
    budget = torch.randint(0, width + 2, (rows,), generator=rng).int()
    budget[2], counts[3], budget[4], counts[5], budget[5] = 0, 0, width + 5, width, max(1, width // 3)
    table = torch.randint(1, 1000, (rows, width), generator=rng).int()
    out, expected = torch.full((2, rows, heads, width), -1, dtype=torch.int32).unbind(0)
    cuda.select_pages(table, counts, scores, pinned, budget, out)
    reference.select_pages(table, counts, scores, pinned, budget, expected)
    assert torch.equal(out, expected)


def random_utility(n: int, rng: torch.Generator) -> UtilityState:
    return UtilityState(
        torch.rand(n, generator=rng),
        torch.randint(0, 40, (n,), generator=rng).int(),
        torch.randint(0, 5, (n,), generator=rng).int(),
    )


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_update_utility(cuda: EmulatedOps, decay: float, rng) -> None:
    state = random_utility(50, rng)
    expected = UtilityState(*(x.clone() for x in (state.mass, state.last_step, state.visits)))
    slots = torch.randperm(50, generator=rng)[:21].int()
    mass = torch.rand(21, generator=rng)
    cuda.update_utility(slots, mass, 40, decay, state)
    reference.update_utility(slots, mass, 40, decay, expected)
    torch.testing.assert_close(state.mass, expected.mass, rtol=1e-6, atol=1e-7)
    assert torch.equal(state.last_step, expected.last_step)
    assert torch.equal(state.visits, expected.visits)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.5, 0.25), (0.0, -1.0, 0.0)])
@pytest.mark.parametrize("num_victims", [1, 20, 400])
def test_choose_victims(cuda: EmulatedOps, weights, num_victims: int, rng) -> None:
    state = random_utility(300, rng)  # many ties but for the mass
    evictable = torch.rand(300, generator=rng) < 0.7
    out, expected = torch.full((2, num_victims), -1, dtype=torch.int32).unbind(0)
    cuda.choose_victims(state, evictable, 41, 0.9, weights, out)
    reference.choose_victims(state, evictable, 41, 0.9, weights, expected)
    assert torch.equal(out, expected)


# -- attention ---------------------------------------------------------------------------------


def attention_inputs(rng, layout: PageLayout, rows: int, table_rows: int, heads: int, pages: int, dtype, per_head):
    """Query, pool with NaN in unused slots, ragged table with holes and traps beyond the counts."""
    keys, values = kv(rng, pages, layout)
    values = None if layout.latent_dim is not None else values
    sealed = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    reference.seal_pages(keys, values, layout, sealed, None, flag)
    assert flag == 0
    pool = torch.full((2 * pages + 2, layout.page_bytes), 0xFF, dtype=torch.uint8)
    pool[2 : 2 * pages + 2 : 2] = sealed
    slabs = Slabs(4, layout.page_bytes)
    for i, rows_of_slab in enumerate(pool.split(4)):
        storage = torch.full((4, layout.page_bytes), 0xFF, dtype=torch.uint8)
        storage[: len(rows_of_slab)] = rows_of_slab
        slabs.put(i, storage)
    width = pages + 3
    shape = (table_rows, layout.num_kv_heads, width) if per_head else (table_rows, width)
    table = 2 + 2 * torch.randint(0, pages, shape, generator=rng).int()
    table[torch.rand(shape, generator=rng) < 0.2] = 0
    counts = torch.randint(1, width + 1, (table_rows,), generator=rng).int()
    counts[0] = width
    if table_rows > 1:
        counts[-1] = 0
    for row, count in zip(table, counts.tolist(), strict=True):
        row[..., count:] = HUGE
    query = torch.randn(rows, heads, layout.head_dim, generator=rng).to(dtype)
    return query, slabs, table, counts


def check_decode(ops: EmulatedOps, query, slabs, table, counts, layout, tolerance: float) -> None:
    scale = layout.head_dim**-0.5
    shape, width = (*query.shape[:2], layout.value_dim), table.shape[-1]

    def run(decode):
        out, lse = torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan)
        page_lse = torch.full((*shape[:2], width), torch.nan)
        decode(query, slabs, table, counts, layout, scale, out, lse, page_lse)
        return out, lse, page_lse

    for actual, expected in zip(run(ops.decode_attention), run(reference.decode_attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    scores = torch.full((*shape[:2], width), torch.nan)
    ops.key_scores(query, slabs, table, counts, layout, scale, scores)
    expected = torch.empty_like(scores)
    reference.key_scores(query, slabs, table, counts, layout, scale, expected)
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)
    if query.shape[0] > 0:  # without page_lse, the same bits
        out, lse = torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan)
        ops.decode_attention(query, slabs, table, counts, layout, scale, out, lse)
        assert torch.equal(out, run(ops.decode_attention)[0])


TENSOR_SHAPES = [(e, d) for e in ["plain", *CODED] for d in (64, 80, 96, 128, 192, 256)]


@pytest.mark.parametrize(("element", "head_dim"), TENSOR_SHAPES)
def test_decode_attention_on_tensor_cores(cuda: EmulatedOps, element: str, head_dim: int, rng) -> None:
    """float16 and bfloat16 queries; an error of a few roundings of the weights and scaled queries."""
    for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 2e-2 if element == "plain" else 3e-3)):
        for group, page_size in ((4, 32), (12, 16)):
            stored = str(dtype).removeprefix("torch.") if element == "plain" else element
            layout = PageLayout(2, head_dim, page_size, dtype, stored)
            inputs = attention_inputs(rng, layout, 3, 3, 2 * group, 7, dtype, False)
            check_decode(cuda, *inputs, layout, tolerance)


@pytest.mark.parametrize("element", ["plain", *CODED])
@pytest.mark.parametrize("page_size", [8, 64, 256])
def test_decode_attention_page_sizes(library: Path, element: str, page_size: int, rng) -> None:
    element = "float16" if element == "plain" else element
    layout = PageLayout(1, 64, page_size, torch.float16, element)
    inputs = attention_inputs(rng, layout, 2, 1, 3, 6, torch.float16, True)
    check_decode(EmulatedOps(library, num_splits=2), *inputs, layout, 3e-3)


@pytest.mark.parametrize("element", ["bfloat16", "int4"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_attention_many_queries(library: Path, element: str, per_head: bool, num_splits: int, rng) -> None:
    """A group of 5 and 8 rows per table row: 40 columns, in tiles of 16."""
    layout = PageLayout(2, 64, 16, torch.bfloat16, element)
    inputs = attention_inputs(rng, layout, 16, 2, 10, 9, torch.bfloat16, per_head)
    check_decode(EmulatedOps(library, num_splits), *inputs, layout, 2e-2 if element == "bfloat16" else 3e-3)


@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16", *CODED])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 64), (1, 20), (3, 80)])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_decode_attention_in_float32(library: Path, element: str, kv_heads: int, head_dim: int, num_splits, rng):
    dtype = getattr(torch, element) if element in ("bfloat16", "float16") else torch.float32
    layout = PageLayout(kv_heads, head_dim, 8 if head_dim == 20 else 64, dtype, element)
    inputs = attention_inputs(rng, layout, 6, 3, 2 * kv_heads, 7, torch.float32, kv_heads == 2)
    check_decode(EmulatedOps(library, num_splits), *inputs, layout, 5e-6)


@pytest.mark.parametrize("codec", SEALED, ids=lambda c: c.label)
@pytest.mark.parametrize(("kv_heads", "page_size", "head_dim"), [(2, 16, 64), (1, 40, 40), (3, 32, 128)])
def test_decode_attention_over_packed_pages(library: Path, codec: Codec, kv_heads, page_size, head_dim, rng) -> None:
    for dtype, splits in ((torch.float32, 1), (torch.bfloat16, 2)):
        layout = codec.layout(kv_heads, head_dim, page_size, dtype)
        if not layout.packed:  # as other pages
            continue
        inputs = attention_inputs(rng, layout, 6, 3, 3 * kv_heads, 5, dtype, kv_heads == 2)
        check_decode(EmulatedOps(library, splits), *inputs, layout, 5e-6)


@pytest.mark.parametrize("codec", ["none", "fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize(("head_dim", "latent_dim", "heads"), [(576, 512, 16), (80, 64, 5), (40, 40, 3)])
def test_decode_attention_over_latent_pages(library: Path, codec: str, head_dim, latent_dim, heads, rng) -> None:
    """Multi-head latent attention: one KV head, whose keys begin with the values."""
    for dtype, splits in ((torch.float32, 1), (torch.bfloat16, 2)):
        layout = Codec(codec).layout(1, head_dim, 16, dtype, latent_dim=latent_dim)
        inputs = attention_inputs(rng, layout, 4, 2, heads, 5, dtype, False)
        check_decode(EmulatedOps(library, splits), *inputs, layout, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim", "heads"), [(576, 512, 16), (80, 64, 5), (40, 8, 9)])
def test_tail_attention_of_latent_attention(cuda: EmulatedOps, dtype, head_dim: int, value_dim: int, heads: int, rng):
    keys = torch.randn(3, 1, 32, head_dim, generator=rng).to(dtype)
    query = torch.randn(3, heads, head_dim, generator=rng).to(dtype)
    lengths, results = torch.tensor([0, 7, 32], dtype=torch.int32), []
    for tail in (cuda.tail_attention, reference.tail_attention):
        out, lse = torch.full((3, heads, value_dim), torch.nan), torch.full((3, heads), torch.nan)
        tail(query, keys, keys[..., :value_dim], lengths, head_dim**-0.5, out, lse)
        results.append((out, lse))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=5e-6)


def test_decode_attention_walks_tables_of_more_pages_than_lanes(library: Path, rng) -> None:
    """Each warp looks up 32 pages at a time: 300 entries are several times that for four warps."""
    layout = PageLayout(1, 64, 8, torch.float16, "int8")
    query, slabs, table, counts = attention_inputs(rng, layout, 1, 1, 4, 297, torch.float16, False)
    table[0, 40:210] = 0  # whole batches without a page
    for num_splits in (1, 2):
        check_decode(EmulatedOps(library, num_splits), query, slabs, table, counts, layout, 3e-3)


@pytest.mark.parametrize("element", CODED)
@pytest.mark.parametrize("magnitude", [1e-3, 3e4])
def test_decode_attention_keeps_within_float16(cuda: EmulatedOps, element: str, magnitude: float, rng) -> None:
    """Large and small keys under queries that keep the scores ordinary."""
    layout = PageLayout(1, 64, 32, torch.bfloat16, element)
    keys, values = torch.randn(2, 4, 1, 32, 64, generator=rng).clamp(-2, 2).to(torch.bfloat16).unbind(0)
    sealed = torch.zeros(5, layout.page_bytes, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    reference.seal_pages(keys * magnitude, values * magnitude, layout, sealed[1:], None, flag)
    assert flag == 0
    query = (torch.randn(1, 4, 64, generator=rng) / magnitude).to(torch.bfloat16)
    table, counts = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    out, expected = torch.zeros(2, 1, 4, 64).unbind(0)
    lse, expected_lse = torch.zeros(2, 1, 4).unbind(0)
    cuda.decode_attention(query, Slabs.of(sealed), table, counts, layout, 0.125, out, lse)
    reference.decode_attention(query, Slabs.of(sealed), table, counts, layout, 0.125, expected, expected_lse)
    torch.testing.assert_close(lse, expected_lse, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(out / magnitude, expected / magnitude, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize(
    ("element", "dtype"), [("int4", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_prefill_attention(cuda: EmulatedOps, element: str, dtype: torch.dtype, rng) -> None:
    layout = PageLayout(2, 64, 32, dtype, element)
    _, slabs, table, _ = attention_inputs(rng, layout, 1, 1, 4, 5, dtype, False)
    slots = table[0][table[0] > 0].contiguous()
    query = torch.randn(11, 8, 64, generator=rng).to(dtype)
    results = []
    for prefill in (cuda.prefill_attention, reference.prefill_attention):
        out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
        prefill(query, slabs, slots, layout, 0.125, out, lse)
        results.append((out, lse))
    for actual, expected in zip(*results, strict=True):
        tolerance = 5e-6 if dtype == torch.float32 else 3e-3
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 24), (24, 2, 64), (4, 1, 20), (6, 3, 80)])
def test_tail_attention(cuda: EmulatedOps, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rng) -> None:
    lengths = torch.tensor([0, 1, 64, 37], dtype=torch.int32)
    keys, values = torch.randn(2, 4, kv_heads, 64, head_dim, generator=rng).to(dtype).unbind(0)
    keys, values = keys.clone(), values.clone()
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:] = values[row, :, length:] = torch.nan
    query = torch.randn(4, heads, head_dim, generator=rng).to(dtype)
    results = []
    for tail in (cuda.tail_attention, reference.tail_attention):
        out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
        tail(query, keys.nan_to_num(0.0) if tail is reference.tail_attention else keys, values, lengths, 0.2, out, lse)
        results.append((out, lse))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("head_dim", [6, 64, 200])
def test_merge_partials(cuda: EmulatedOps, head_dim: int, rng) -> None:
    outs, lses = torch.randn(3, 9, head_dim, generator=rng), torch.randn(3, 9, generator=rng) * 20
    lses[1, 2], lses[:, 4], lses[2, 5], lses[0, 6] = -torch.inf, -torch.inf, torch.nan, torch.inf
    outs[1, 2] = outs[:, 4] = torch.nan  # never read
    for count in (3, 1, 0):
        out, expected = torch.full((2, 9, head_dim), 7.0).unbind(0)
        lse, expected_lse = torch.full((2, 9), 7.0).unbind(0)
        cuda.merge_partials(outs[:count], lses[:count], out, lse)
        reference.merge_partials(outs[:count], lses[:count], expected, expected_lse)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "summary"), SUBPAGES)
def test_subpage_scores(
    cuda: EmulatedOps,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    summary: SubPages,
    rng,
) -> None:
    case = subpage_case(dtype, heads, kv_heads, head_dim, page_size, summary, rng)
    out, expected = torch.full((2, 3, heads, 150), torch.nan).unbind(0)
    cuda.subpage_scores(*case, out)
    reference.subpage_scores(*case, expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 24), (24, 2, 64), (4, 1, 20), (6, 3, 80)])
def test_page_scores(cuda: EmulatedOps, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rng) -> None:
    layout = PageLayout(kv_heads, head_dim, 8, dtype, str(dtype).removeprefix("torch."))
    keys, values = kv(rng, 20, layout)
    bounds = torch.full((20, layout.bounds_bytes), 0, dtype=torch.uint8)
    pages = torch.zeros(20, layout.page_bytes, dtype=torch.uint8)
    reference.seal_pages(keys, values, layout, pages, bounds, torch.zeros(1, dtype=torch.int32))
    table = torch.randint(0, 20, (3, 37), generator=rng).int()
    counts = torch.tensor([37, 0, 18], dtype=torch.int32)
    table[2, 18:] = HUGE
    query = torch.randn(3, heads, head_dim, generator=rng).to(dtype)
    out, expected = torch.full((2, 3, kv_heads, 37), torch.nan).unbind(0)
    cuda.page_scores(query, Slabs.of(bounds), table, counts, layout, out)
    reference.page_scores(query, Slabs.of(bounds), table, counts, layout, expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("codec", ["none", "fp8", "int8", "int4", "int2"])
def test_lists_where_they_are(library: Path, codec: str, dtype: torch.dtype, streams: int, num_splits: int, rng):
    check_lists(EmulatedOps(library, num_splits), rng, codec, dtype, streams)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value_dim", [DIM, DIM // 2])
def test_tails_by_index(cuda: EmulatedOps, dtype: torch.dtype, value_dim: int, rng) -> None:
    check_tails(cuda, rng, dtype, value_dim)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_tokens_go_into_their_tails(cuda: EmulatedOps, dtype: torch.dtype, latent: bool, bad: float | None, rng):
    check_append(cuda, rng, dtype, latent, bad)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_experts_go_into_their_tails(cuda: EmulatedOps, dtype: torch.dtype, rng) -> None:
    check_experts(cuda, rng, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_packed_partials_are_merged_into_the_models_type(cuda: EmulatedOps, dtype: torch.dtype, rng) -> None:
    check_merge(cuda, rng, dtype)
    check_rounding(cuda, rng, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_flags_of_several_layers(cuda: EmulatedOps, codec: str, dtype: torch.dtype, rng) -> None:
    check_flags(cuda, rng, codec, dtype)
