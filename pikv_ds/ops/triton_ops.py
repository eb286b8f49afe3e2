"""The Triton ops: arguments of `Ops` to the kernels in `pikv_ds.ops.triton_kernels`.

Launch geometry follows from shapes alone, never from what a tensor holds: nothing here waits for the
device, and every op can be captured in a CUDA graph. Scratch memory comes from torch's caching
allocator. Tile sizes, warps and stages are chosen by reasoning about registers and shared memory
(tests/test_triton.py compiles the kernels and looks); they have not been measured on a GPU.

By the instructions in the decode loop's machine code (sm_90, head size 128, pages of 32), plain pages
are bound by memory; int4 takes about 15 lane instructions per element where an H200's bandwidth leaves
about 3.4, so it should run no faster than bfloat16 here. The compiled kernels in csrc are for that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pikv_ds.layout import PLAIN, PageLayout, SealFlag
from pikv_ds.ops.lists import PageLists
from pikv_ds.ops.state import UtilityState
from pikv_ds.ops.summaries import SubPages
from pikv_ds.ops.triton_kernels.attention import (
    compact_kernel,
    merge_kernel,
    paged_attention_kernel,
    plain_attention_kernel,
)
from pikv_ds.ops.triton_kernels.pages import gather_kernel, seal_kernel
from pikv_ds.ops.triton_kernels.scheduling import (
    NOBODY,
    page_scores_kernel,
    select_kernel,
    subpage_scores_kernel,
    update_kernel,
    utility_kernel,
)
from pikv_ds.slabs import Slabs

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOG2E = math.log2(math.e)
_PROGRAMS_PER_SM = 4
"""Programs of the decode kernel that should be there for each streaming multiprocessor."""
_MIN_SPLIT_TOKENS = 128
"""Fewer are not worth a partial of their own, whose output is as large as some of their keys."""


def supported(device_type: str) -> frozenset[str]:
    """Ops that have kernels for a device ("cpu": when interpreting)."""
    return frozenset(
        (
            "seal_pages",
            "gather_pages",
            "decode_attention",
            "key_scores",
            "prefill_attention",
            "context_attention",
            "tail_attention",
            "merge_partials",
            "page_scores",
            "subpage_scores",
            "select_pages",
            "update_utility",
            "choose_victims",
        )
    )


def seal_pages(
    keys: Tensor, values: Tensor, layout: PageLayout, out: Tensor, bounds: Tensor | None, flags: Tensor
) -> None:
    if keys.shape[0] == 0:
        return
    assert keys.stride(3) == values.stride(3) == out.stride(1) == 1, "channels and bytes must be contiguous"
    n, k, s, d = keys.shape
    parts, part = _parts(layout)
    if bounds is not None:
        assert bounds.stride(1) == 1
        bounds = bounds.view(keys.dtype)
    # Tiles of 8192 elements: 32 for each of 256 threads.
    channels = min(triton.next_power_of_2(part), max(1, 8192 // (s * parts)))
    tokens = min(s, max(1, 8192 // (triton.next_power_of_2(part) * parts)))
    seal_kernel[(n, k, 2)](
        keys,
        values,
        out,
        bounds,
        flags,
        *keys.stride()[:3],
        *values.stride()[:3],
        out.stride(0),
        bounds.stride(0) if bounds is not None else 0,
        n // len(flags),
        K=k,
        S=s,
        D=d,
        BITS=layout.bits,
        FP8=layout.element == "fp8",
        SCALE_ROWS=layout.scale_rows,
        KEY_SCALES=layout.key_scale_offset,
        VALUES=layout.value_offset,
        VALUE_SCALES=layout.value_scale_offset,
        PAGE_BYTES=layout.page_bytes,
        CHANNELS=channels,
        TOKENS=tokens,
        NON_FINITE=int(SealFlag.NON_FINITE),
        BEYOND_RANGE=int(SealFlag.BEYOND_RANGE),
        num_warps=8,
    )


def gather_pages(slabs: Slabs, slots: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    assert out.is_contiguous()
    wide = slabs.row_bytes % 8 == 0 and out.data_ptr() % 8 == 0
    words = slabs.row_bytes // 8 if wide else slabs.row_bytes
    block = min(1024, triton.next_power_of_2(words))
    gather_kernel[(len(slots), triton.cdiv(words, block))](
        slabs.pointers,
        slots,
        out.view(torch.int64) if wide else out,
        slabs.slab_rows,
        ROW_BYTES=slabs.row_bytes,
        WORD=tl.int64 if wide else tl.uint8,
        BLOCK=block,
    )


def decode_attention(
    query: Tensor,
    slabs: Slabs,
    table: Tensor | PageLists,
    counts: Tensor | None,
    layout: PageLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    page_lse: Tensor | None = None,
) -> None:
    if page_lse is not None:
        page_lse.fill_(-torch.inf)  # holes, and what lies beyond the counts
    if isinstance(table, PageLists):  # the kernel walks tables only
        table, counts = table.dense()
    with _contiguous(out, lse) as (whole, whole_lse):
        _attend_pages(query, slabs, table, counts, layout, scale, whole, whole_lse, page_lse)


@contextlib.contextmanager
def _contiguous(*outs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tensors, or contiguous ones whose contents go into them in the end: kernels write whole rows."""
    whole = tuple(x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format) for x in outs)
    yield whole
    for x, written in zip(outs, whole, strict=True):
        if written is not x:
            x.copy_(written)


def key_scores(
    query: Tensor, slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, scale: float, out: Tensor
) -> None:
    out.fill_(-torch.inf)
    _attend_pages(query, slabs, table, counts, layout, scale, None, None, out)


def prefill_attention(
    query: Tensor, slabs: Slabs, slots: Tensor, layout: PageLayout, scale: float, out: Tensor, lse: Tensor
) -> None:
    _attend_pages(query, slabs, slots[None], None, layout, scale, out, lse, None)


def _attend_pages(
    query: Tensor,
    slabs: Slabs,
    table: Tensor,
    counts: Tensor | None,
    layout: PageLayout,
    scale: float,
    out: Tensor | None,
    lse: Tensor | None,
    page_lse: Tensor | None,
) -> None:
    """Launches `paged_attention_kernel`, and around it what a selection per head and splits need.

    Args:
        counts: None: the whole table holds pages.
        out, lse: None: only page_lse is wanted.
    """
    rows, num_heads, d = query.shape
    table_rows, width, k = table.shape[0], table.shape[-1], layout.num_kv_heads
    if rows == 0 or (out is None and width == 0):
        return
    assert query.is_contiguous()
    assert table.is_contiguous()
    group, queries = num_heads // k, rows // table_rows
    places = None
    if table.dim() == 3:
        slots, places = torch.empty_like(table), torch.empty_like(table)
        filled = torch.empty(table_rows, k, dtype=torch.int32, device=table.device)
        block = min(1024, max(16, triton.next_power_of_2(width)))
        compact_kernel[(table_rows * k,)](table, counts, slots, places, filled, width, K=k, BLOCK=block)
        table, counts = slots, filled

    dot = _dot_type(query.dtype, layout)
    block_m, block_d, tile, options = _blocks(queries * group, d, dot, scaled=layout.scale_rows > 0)
    tile = min(max(16, layout.page_size), tile)  # a matrix product takes 16 and more
    blocks = triton.cdiv(queries * group, block_m)
    min_pages = triton.cdiv(_MIN_SPLIT_TOKENS, layout.page_size)
    splits = 1
    if out is not None:
        wanted = triton.cdiv(_PROGRAMS_PER_SM * _num_sms(query.device), blocks * k * table_rows)
        splits = max(1, min(wanted, triton.cdiv(width, min_pages)))
    else:  # nothing to merge: splits are free
        splits = max(1, triton.cdiv(width, min_pages))
    outs, lses = out, lse
    if out is not None and splits > 1:
        outs = torch.empty(splits, rows, num_heads, d, dtype=torch.float32, device=query.device)
        lses = torch.empty(splits, rows, num_heads, dtype=torch.float32, device=query.device)
    paged_attention_kernel[(blocks * splits, k, table_rows)](
        query,
        slabs.pointers,
        table,
        places,
        counts,
        outs,
        lses,
        page_lse,
        scale * _LOG2E,
        slabs.slab_rows,
        width,
        queries,
        rows,
        splits,
        K=k,
        GROUP=group,
        S=layout.page_size,
        D=d,
        PER_HEAD=places is not None,
        **_page_constants(layout),
        DOT=dot,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        TILE=tile,
        MIN_PAGES=min_pages,
        **options,
    )
    if outs is not out:
        assert out is not None
        assert lse is not None
        assert outs is not None
        assert lses is not None
        merge_partials(outs.view(splits, -1, d), lses.view(splits, -1), out.view(-1, d), lse.view(-1))


def context_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    first_query: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    _attend_plain(query, keys[None], values[None], None, scale, first_query, out, lse)


def tail_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None = None,
) -> None:
    if indices is not None:  # the kernel takes tails in order
        keys, values = keys[indices], values[indices]
    with _contiguous(out, lse) as (whole, whole_lse):
        _attend_plain(query, keys, values, lengths, scale, None, whole, whole_lse)


def _attend_plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    scale: float,
    first_query: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Queries ``[B * T, H, D]`` over keys and values ``[B, K, N, D]``, of which each sequence has ``lengths``."""
    rows, num_heads, d = query.shape
    if rows == 0:
        return
    assert query.stride(2) == keys.stride(3) == values.stride(3) == 1, "channels must be contiguous"
    assert out.is_contiguous()
    batch, k, n, _ = keys.shape
    group, queries = num_heads // k, rows // batch
    dot = _product_type(query.dtype) if query.dtype == keys.dtype == values.dtype else tl.float32
    block_m, block_d, tile, options = _blocks(queries * group, d, dot, scaled=False)
    plain_attention_kernel[(triton.cdiv(queries * group, block_m), k, batch)](
        query,
        keys,
        values,
        lengths,
        out,
        lse,
        scale * _LOG2E,
        queries,
        n,
        0 if first_query is None else first_query,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        K=k,
        GROUP=group,
        D=d,
        CAUSAL=first_query is not None,
        DOT=dot,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        TILE=tile,
        **options,
    )


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """The kernel takes contiguous partials, and writes float32: others are copied before and after."""
    num_partials, d = outs.shape[0], outs.shape[-1]
    outs, lses = outs.flatten(1, -2).contiguous(), lses.flatten(1).contiguous()
    rows = outs.shape[1]
    if rows == 0:
        return
    direct = out.dtype == torch.float32 and out.is_contiguous()
    merged = out if direct else torch.empty(rows, d, dtype=torch.float32, device=out.device)
    known = lse is not None and lse.is_contiguous()
    merged_lse = lse if known else torch.empty(rows, dtype=torch.float32, device=out.device)
    block_p = min(16, triton.next_power_of_2(max(1, num_partials)))
    merge_kernel[(rows,)](
        outs,
        lses,
        merged,
        merged_lse,
        num_partials,
        rows,
        D=d,
        BLOCK_P=block_p,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=4 if block_p * d >= 1024 else 1,
    )
    if not direct:
        out.copy_(merged.view(out.shape))
    if lse is not None and not known:
        assert merged_lse is not None
        lse.copy_(merged_lse.view(lse.shape))


def page_scores(
    query: Tensor, summary_slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, out: Tensor
) -> None:
    if out.numel() == 0:
        return
    assert query.is_contiguous()
    assert table.is_contiguous()
    assert out.is_contiguous()
    rows, num_heads, d = query.shape
    k, width = layout.num_kv_heads, table.shape[1]
    block_d = max(16, triton.next_power_of_2(d))
    pages = 32 if block_d <= 128 else 16
    page_scores_kernel[(triton.cdiv(width, pages), k, rows)](
        query,
        summary_slabs.pointers,
        table,
        counts,
        out,
        summary_slabs.slab_rows,
        width,
        ROW_BYTES=summary_slabs.row_bytes,
        K=k,
        GROUP=num_heads // k,
        D=d,
        STORED=_TYPES[layout.dtype],
        DOT=_product_type(query.dtype) if query.dtype == layout.dtype else tl.float32,
        BLOCK_G=max(16, triton.next_power_of_2(num_heads // k)),
        BLOCK_D=block_d,
        PAGES=pages,
    )


def subpage_scores(
    query: Tensor,
    summary_slabs: Slabs,
    table: Tensor,
    counts: Tensor,
    layout: PageLayout,
    summary: SubPages,
    scale: float,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    assert query.is_contiguous()
    assert table.is_contiguous()
    assert out.is_contiguous()
    rows, num_heads, d = query.shape
    k, width = layout.num_kv_heads, table.shape[1]
    num_bytes = d * summary.bits // 8
    block_b = max(16, triton.next_power_of_2(num_bytes))
    pages = 32 if block_b <= 128 else 16
    subpage_scores_kernel[(triton.cdiv(width, pages), k, rows)](
        query,
        summary_slabs.pointers,
        table,
        counts,
        out,
        scale,
        summary_slabs.slab_rows,
        width,
        ROW_BYTES=summary_slabs.row_bytes,
        K=k,
        GROUP=num_heads // k,
        D=d,
        BITS=summary.bits,
        COUNT=summary.count(layout),
        DOT=_product_type(query.dtype),
        BLOCK_G=max(16, triton.next_power_of_2(num_heads // k)),
        BLOCK_B=block_b,
        PAGES=pages,
    )


def select_pages(table: Tensor, counts: Tensor, scores: Tensor, pinned: Tensor, budget: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    assert all(x.is_contiguous() for x in (table, scores, pinned, out))
    rows, k, width = scores.shape
    block = min(4096, max(16, triton.next_power_of_2(width)))
    select_kernel[(rows * k,)](
        table, counts, scores, pinned, budget, out, width, K=k, BLOCK=block, num_warps=8 if block > 1024 else 4
    )


def update_utility(slots: Tensor, mass: Tensor, step: int, decay: float, state: UtilityState) -> None:
    n, block = len(slots), 256
    if n == 0:
        return
    update_kernel[(triton.cdiv(n, block),)](
        slots, mass, state.mass, state.last_step, state.visits, n, step, decay, _log2(decay), BLOCK=block
    )


def choose_victims(
    state: UtilityState, evictable: Tensor, step: int, decay: float, weights: tuple[float, float, float], out: Tensor
) -> None:
    n, block = len(evictable), 256
    out.zero_()
    if n == 0 or len(out) == 0:
        return
    keys = torch.empty(n, dtype=torch.int64, device=evictable.device)
    utility_kernel[(triton.cdiv(n, block),)](
        state.mass, state.last_step, state.visits, evictable, keys, n, step, _log2(decay), *weights, BLOCK=block
    )
    lowest = keys.topk(min(n, len(out)), largest=False, sorted=True).values  # no two keys are equal: no ties
    slots = torch.where(lowest == NOBODY.value, 0, lowest & 0xFFFFFFFF)
    out[: len(slots)] = slots.to(out.dtype)


def _log2(decay: float) -> float:
    return math.log2(decay) if decay > 0 else -math.inf


def _parts(layout: PageLayout) -> tuple[int, int]:
    """Channels that share a byte, and how far they are apart."""
    parts = max(1, 8 // layout.bits)
    return parts, layout.head_dim // parts


def _page_constants(layout: PageLayout) -> dict[str, Any]:
    return {
        "STORED": _TYPES[layout.dtype],
        "BITS": layout.bits,
        "FP8": layout.element == "fp8",
        "SCALE_ROWS": layout.scale_rows,
        "KEY_SCALES": layout.key_scale_offset,
        "VALUES": layout.value_offset,
        "VALUE_SCALES": layout.value_scale_offset,
        "PAGE_BYTES": layout.page_bytes,
    }


def _blocks(num_rows: int, head_dim: int, dot: tl.dtype, scaled: bool) -> tuple[int, int, int, dict[str, int]]:
    """Rows, channels and tokens of an attention kernel's tiles, its stages and warps.

    64 rows and more go to the larger matrix instructions of Hopper and Blackwell. Queries that take in
    scales stay in float32 beside the accumulator, so those blocks are smaller, and have more warps.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(num_rows))
    if dot == tl.float32:  # no tensor cores: everything lies in registers
        return min(block_m, 32), block_d, 16, {"STAGES": 2, "num_warps": 8}
    block_m = min(block_m, (64 if scaled else 128) // (1 if block_d <= 128 else 2))
    large = block_m * block_d > 8192
    tile = 64 if block_d <= 128 and not (scaled and block_m > 32) else 32
    warps = 8 if large or (scaled and block_m * block_d > 2048) else 4
    return block_m, block_d, tile, {"STAGES": 2 if large else 3, "num_warps": warps}


def _dot_type(query: torch.dtype, layout: PageLayout) -> tl.dtype:
    """What products are taken in.

    Scaled elements are exact in float16, where scaled queries and weights round at 2^-11: better than
    bfloat16 whatever the query's type; the kernel sees to their range.
    """
    if query == torch.float32:
        return tl.float32
    if layout.scale_rows:
        return tl.float16
    return _product_type(query) if PLAIN[query] == layout.element else tl.float32


def _product_type(dtype: torch.dtype) -> tl.dtype:
    # The interpreter would multiply the bits of bfloat16 numbers as integers.
    return tl.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else _TYPES[dtype]


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # interpreting: as on an H200
    return torch.cuda.get_device_properties(device).multi_processor_count
