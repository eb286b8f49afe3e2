"""What is special to the CPU attention kernels: each instruction set agrees with attention in float64.

The instruction set is chosen once per process, so each one runs these same checks in a process of
its own: ``PIKV_CPU_ISA=avx2 python tests/test_cpu_attention.py`` does that by hand. One that the
machine lacks falls back to the best below, which is then checked twice.

Tolerances: with float32 queries every kernel is as good as float32 sums. With 16-bit queries the
byte kernels round the query to 15 bits of its largest product with a scale, and a weight to 15 bits of
the largest of 64 tokens, each rounding half a unit at most and as often up as down. So the root mean
square of the errors is bounded tightly (1e-4 was measured; bfloat16 itself, with its 8 bits, is at 2e-2),
and the largest of ten thousand loosely.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pikv_ds.layout import BITS, PLAIN, PageLayout
from pikv_ds.ops import Ops, reference, why_missing
from pikv_ds.slabs import Slabs

ISAS = ("plain", "avx2", "avx512", "amx")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
ROOT_MEAN_SQUARE = {torch.float32: 1.5e-6, torch.bfloat16: 1.5e-4, torch.float16: 1.5e-4}
HUGE = 2**30  # a table entry that nobody may follow

ELEMENTS = [element for element in BITS if element not in ("int3", "int1")]  # those have no kernels

# KV heads, group, head size, page size, queries per table row, table rows, table width, table per head, holes
DECODE_CASES = [
    (8, 4, 128, 64, 1, 2, 20, False, False),  # the usual shape
    (2, 4, 128, 64, 1, 1, 40, True, True),  # more than one piece of a sequence
    (2, 1, 64, 16, 1, 3, 5, True, True),
    (1, 16, 80, 8, 2, 2, 7, False, True),  # rows that are no multiple of 64 bytes, tiny pages
    (2, 3, 96, 32, 8, 1, 9, True, True),
    (1, 8, 192, 128, 4, 2, 9, False, False),  # pages longer than what is packed at a time
    (1, 2, 256, 256, 1, 2, 5, False, True),
    (3, 5, 20, 24, 3, 1, 5, False, True),  # no multiple of anything
    (2, 7, 36, 40, 1, 1, 40, True, False),
    (1, 16, 128, 16, 8, 1, 30, False, False),  # the most rows that share a page
]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: object) -> None:
    assert torch.equal(actual.isinf(), expected.isinf()), what  # empty partials
    assert not actual.isnan().any(), what
    error = (actual - expected).nan_to_num(0.0).abs()
    if error.numel():
        rms = error.square().mean().sqrt().item()
        assert rms <= ROOT_MEAN_SQUARE[dtype], f"{what}: root mean square of the errors {rms:.2e}"
    if error.numel() and error.max() > TOLERANCE[dtype]:
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        got, wanted = actual[tuple(worst)].item(), expected[tuple(worst)].item()
        raise AssertionError(f"{what}: shape {list(error.shape)}, at {worst}: {got!r}, in float64 {wanted!r}")


def exact(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float64: no vector library and no order of sums has a say in it.

    Args:
        query: ``[T, H, D]``; keys, values: ``[K, N, D]``.
        visible: bool, broadcasts to ``[K, T, N]``.

    Returns:
        ``[T, H, D]``, ``[T, H]`` and the scores ``[T, H, N]``, -inf where nothing is visible.
    """
    k = keys.shape[0]
    q = query.double().unflatten(1, (k, -1))  # [T, K, G, D]
    scores = torch.einsum("tkgd,knd->tkgn", q, keys.double()) * scale
    scores = scores.masked_fill(~visible.expand(k, len(query), -1).transpose(0, 1)[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = torch.einsum("tkgn,knd->tkgd", weights, values.double())
    return out.flatten(1, 2), lse.flatten(1, 2), scores.flatten(1, 2)


def exact_pages(
    query: Tensor, slabs: Slabs, table: Tensor, layout: PageLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`exact` of ``[T, H, D]`` over the pages in a table row ``[K, P]``, 0 a hole; scores per page ``[T, H, P]``."""
    table = table.expand(layout.num_kv_heads, -1)
    slots = table.flatten().clamp(min=1)
    pages = torch.empty(len(slots), layout.page_bytes, dtype=torch.uint8)
    reference.gather_pages(slabs, slots, pages)
    keys, values = (x.unflatten(0, table.shape) for x in reference.unseal_pages(pages, layout))  # [K, P, K, S, D]
    heads = torch.arange(layout.num_kv_heads)
    keys, values = (x[heads, :, heads].flatten(1, 2) for x in (keys, values))  # [K, P * S, D]
    visible = (table > 0).repeat_interleave(layout.page_size, dim=1)[:, None]
    out, lse, scores = exact(query, keys, values, scale, visible)
    return out, lse, scores.unflatten(-1, (-1, layout.page_size)).logsumexp(-1)


def sealed(n: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype, element: str) -> tuple[PageLayout, Slabs]:
    """Pages 1 to n in slabs of 7; page 0, the hole, is garbage."""
    dtype = getattr(torch, element) if element in PLAIN.values() else dtype
    layout = PageLayout(num_kv_heads=kv_heads, head_dim=dim, page_size=size, dtype=dtype, element=element)
    keys, values = torch.randn(2, n, kv_heads, size, dim) + torch.randn(2, n, kv_heads, 1, dim)
    pages = torch.full((-(-(n + 1) // 7) * 7, layout.page_bytes), 0xAB, dtype=torch.uint8)
    flags = torch.zeros(1, dtype=torch.int32)
    reference.seal_pages(keys.to(dtype), values.to(dtype), layout, pages[1 : n + 1], None, flags)
    assert not flags.item()
    slabs = Slabs(7, layout.page_bytes)
    for slab, rows in enumerate(pages.split(7)):
        slabs.put(slab, rows.clone())
    return layout, slabs


def empty(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def check_decode(ops: Ops, dtype: torch.dtype, element: str, case: tuple[int, ...]) -> None:
    kv_heads, group, dim, size, t, rows, width, per_head, holes = case
    heads, scale, what = kv_heads * group, dim**-0.5, (dtype, element, case)
    layout, slabs = sealed(40, kv_heads, size, dim, dtype, element)
    query = torch.randn(rows * t, heads, dim).to(dtype)
    shape = (rows, kv_heads, width) if per_head else (rows, width)
    table = torch.randint(0 if holes else 1, 41, shape, dtype=torch.int32)
    counts = torch.randint(0, width + 1, (rows,), dtype=torch.int32)
    counts[0] = width
    for row, count in enumerate(counts.tolist()):
        table[row, ..., count:] = HUGE
    outs = empty(rows * t, heads, dim), empty(rows * t, heads), empty(rows * t, heads, width)
    ops.decode_attention(query, slabs, table, counts, layout, scale, *outs)
    for row, count in enumerate(counts.tolist()):
        mine = slice(row * t, (row + 1) * t)
        *expected, page_lse = exact_pages(query[mine], slabs, table[row, ..., :count], layout, scale)
        page_lse = torch.cat([page_lse, page_lse.new_full((t, heads, width - count), -torch.inf)], dim=-1)
        for ours, wanted in zip(outs, (*expected, page_lse), strict=True):
            close(ours[mine], wanted, dtype, what)
    scores = empty(rows * t, heads, width)
    ops.key_scores(query, slabs, table, counts, layout, scale, scores)
    assert torch.equal(scores, outs[2]), what
    bits = outs[0].clone()
    for threads in (1, 3):  # pieces are cut by length, never by the number of threads
        torch.set_num_threads(threads)
        ops.decode_attention(query, slabs, table, counts, layout, scale, *outs)
        assert torch.equal(outs[0], bits), (what, threads)


def check_prefill(ops: Ops, dtype: torch.dtype, element: str, case: tuple[int, ...]) -> None:
    kv_heads, group, dim, size, t, num_pages = case
    layout, slabs = sealed(12, kv_heads, size, dim, dtype, element)
    slots = (torch.randperm(12)[:num_pages] + 1).int()
    query = torch.randn(t, kv_heads * group, dim).to(dtype)
    out, lse = empty(t, kv_heads * group, dim), empty(t, kv_heads * group)
    ops.prefill_attention(query, slabs, slots, layout, dim**-0.5, out, lse)
    expected = exact_pages(query, slabs, slots, layout, dim**-0.5)
    for ours, wanted in zip((out, lse), expected[:2], strict=True):
        close(ours, wanted, dtype, (dtype, element, case))


def check_context(ops: Ops, dtype: torch.dtype, case: tuple) -> None:
    kv_heads, group, dim, n, t, first_query = case
    query = torch.randn(kv_heads * group, t, dim).to(dtype).transpose(0, 1)  # strided
    keys, values = torch.randn(2, kv_heads, n + 3, dim).to(dtype)[:, :, :n]
    out, lse = empty(t, kv_heads * group, dim), empty(t, kv_heads * group)
    ops.context_attention(query, keys, values, dim**-0.5, first_query, out, lse)
    last_key = n if first_query is None else first_query + torch.arange(t)[:, None]
    expected = exact(query, keys, values, dim**-0.5, torch.arange(n)[None] <= last_key)
    for ours, wanted in zip((out, lse), expected[:2], strict=True):
        close(ours, wanted, dtype, (dtype, case))


def check_tail(ops: Ops, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    rows, kv_heads, group, size, dim = case
    query = torch.randn(rows, kv_heads * group, dim).to(dtype)
    keys, values = torch.randn(2, rows, kv_heads, size, dim).to(dtype)
    lengths = torch.randint(0, size + 1, (rows,), dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:], values[row, :, length:] = math.nan, math.nan
    out, lse = empty(rows, kv_heads * group, dim), empty(rows, kv_heads * group)
    ops.tail_attention(query, keys, values, lengths, dim**-0.5, out, lse)
    for row, length in enumerate(lengths.tolist()):
        used = keys[row, :, :length], values[row, :, :length]
        expected = exact(query[row : row + 1], *used, dim**-0.5, torch.ones(1, length, dtype=torch.bool))
        for ours, wanted in zip((out[row], lse[row]), expected[:2], strict=True):
            close(ours, wanted[0], dtype, (dtype, case))


def check_nan(ops: Ops, element: str) -> None:
    """A NaN in one query head makes that head NaN and no other."""
    layout, slabs = sealed(40, 2, 64, 128, torch.bfloat16, element)
    query = torch.randn(1, 8, 128).bfloat16()
    query[0, 3, 5] = math.nan
    out, lse = empty(1, 8, 128), empty(1, 8)
    table, counts = torch.arange(1, 41, dtype=torch.int32)[None], torch.tensor([40], dtype=torch.int32)
    ops.decode_attention(query, slabs, table, counts, layout, 0.1, out, lse)
    assert torch.equal(lse[0].isnan(), torch.arange(8) == 3), element
    assert torch.equal(out[0].isnan(), lse[0].isnan()[:, None].expand(8, 128)), element


def main() -> None:
    torch.manual_seed(0)
    ops = Ops("cpp")
    for dtype in TOLERANCE:
        for element in ELEMENTS:
            for decode in DECODE_CASES:
                check_decode(ops, dtype, element, decode)
            for prefill in [
                (2, 4, 128, 64, 70, 9),
                (1, 16, 64, 16, 9, 3),
                (3, 1, 80, 32, 200, 4),
                (2, 2, 64, 64, 3, 0),
            ]:
                check_prefill(ops, dtype, element, prefill)
        for context in [
            (2, 4, 128, 200, 70, None),
            (2, 4, 128, 200, 70, 130),
            (1, 1, 64, 64, 64, 0),
            (2, 2, 36, 0, 3, None),
        ]:
            check_context(ops, dtype, context)
        for tail in [(1, 8, 4, 64, 128), (5, 2, 7, 16, 64), (3, 1, 16, 256, 256), (2, 3, 1, 8, 20)]:
            check_tail(ops, dtype, tail)
    for element in ELEMENTS:
        check_nan(ops, element)


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="the extension is not built")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_agrees_with_float64(isa: str) -> None:
    environment = os.environ | {"PIKV_CPU_ISA": isa}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    main()
