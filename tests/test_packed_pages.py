"""Pages of any integers, with scales of a byte, read by the CPU's kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops, reference, why_missing
from pikv_ds.policies.codecs import Codec
from pikv_ds.slabs import Slabs

pytestmark = pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no compiled ops")

CODECS = [
    Codec("int3"),
    Codec("int1"),
    Codec("int4", values="int2"),
    Codec("int8", values="int3"),
    Codec("int2", values="int1", scales=8),
    Codec("int3", clip=True, scales=8),
    Codec("int8", values="int4", scales=8),
]
KERNELS, PLAIN = Ops("auto"), Ops("reference")


def sealed(layout: PageLayout, num_pages: int, rng: torch.Generator) -> Slabs:
    """Pages in slots 1 to `num_pages`; the null page is poison."""
    shape = num_pages, layout.num_kv_heads, layout.page_size, layout.head_dim
    keys, values = (torch.randn(shape, generator=rng) for _ in range(2))
    keys[..., 3] *= 20  # as real keys have them
    pages = torch.full((num_pages + 1, layout.page_bytes), 255, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    reference.seal_pages(keys.to(layout.dtype), values.to(layout.dtype), layout, pages[1:], None, flag)
    assert not flag.any()
    return Slabs.of(pages)


def close(a: Tensor, b: Tensor) -> None:
    """Sums of some hundred products of order one, in float32 and in another order; weights are split into bytes where
    the instruction set multiplies these."""
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.label)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
@pytest.mark.parametrize("per_head", [False, True])
def test_kernels_read_what_the_reference_reads(codec: Codec, head_dim: int, per_head: bool, rng) -> None:
    layout = codec.layout(2, head_dim, 16, torch.float32)
    ops = Ops("auto", layout=layout)
    assert layout.packed
    assert ops.implementation("decode_attention") == ops.implementation("key_scores") == "cpp"
    slabs, rows, pages, heads = sealed(layout, 40, rng), 3, 12, 6
    query = torch.randn(rows * 2, heads, head_dim, generator=rng)
    table = torch.stack([torch.randperm(40, generator=rng)[:pages] + 1 for _ in range(rows)]).int()
    counts = torch.tensor([pages, 5, 0], dtype=torch.int32)
    if per_head:
        table = torch.stack([table, table.flip(1)], dim=1)
        table[0, 1, ::3] = 0
    out = [torch.empty(rows * 2, heads, head_dim) for _ in range(2)]
    lse = [torch.empty(rows * 2, heads) for _ in range(2)]
    page_lse = [torch.empty(rows * 2, heads, pages) for _ in range(2)]
    scores = [torch.empty(rows * 2, heads, pages) for _ in range(2)]
    for i, kind in enumerate((ops, PLAIN)):
        arguments = (query, slabs, table, counts, layout, head_dim**-0.5)
        kind.decode_attention(*arguments, out[i], lse[i], page_lse[i])
        kind.key_scores(*arguments, scores[i])
    for pair in (out, lse, page_lse, scores):
        close(*pair)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.label)
def test_prompts_meet_packed_pages(codec: Codec, rng) -> None:
    layout = codec.layout(2, 64, 32, torch.bfloat16)
    ops, slabs = Ops("auto", layout=layout), sealed(codec.layout(2, 64, 32, torch.bfloat16), 70, rng)
    query = torch.randn(50, 6, 64, generator=rng).bfloat16()
    slots = (torch.randperm(70, generator=rng)[:65] + 1).int()
    got, expected = ([torch.empty(50, 6, 64), torch.empty(50, 6)] for _ in range(2))
    ops.prefill_attention(query, slabs, slots, layout, 0.125, *got)
    PLAIN.prefill_attention(query, slabs, slots, layout, 0.125, *expected)
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair, atol=1e-2, rtol=1e-2)  # bfloat16 queries


def test_a_page_reads_the_same_whether_its_bits_are_known_or_unpacked(rng) -> None:
    """int8, int4 and int2 have kernels of their own; unpacked, the same bytes give the same attention."""
    for name in ("int8", "int4", "int2"):
        layout = Codec(name).layout(2, 64, 32, torch.float32)
        forced = _Forced(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})
        assert forced.code != layout.code
        slabs, table = sealed(layout, 9, rng), torch.arange(1, 10, dtype=torch.int32)[None]
        query, counts = torch.randn(1, 4, 64, generator=rng), torch.tensor([9], dtype=torch.int32)
        results = []
        for kind in (layout, forced):
            out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
            KERNELS.decode_attention(query, slabs, table, counts, kind, 0.125, out, lse)
            results.append((out, lse))
        for pair in zip(*results, strict=True):
            close(*pair)


class _Forced(PageLayout):
    """A layout that says that no kernel knows it."""

    kernels_know = False  # type: ignore[assignment]


def test_what_cannot_be_unpacked_is_refused_by_name() -> None:
    layout = Codec("int3").layout(2, 64, 32, torch.float32)
    slabs, counts = Slabs.of(torch.zeros(2, layout.page_bytes, dtype=torch.uint8)), torch.ones(1, dtype=torch.int32)
    out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
    op = torch.ops.pikv_ds.decode_attention

    def call(code: int, head_dim: int = 64) -> None:
        query = torch.zeros(1, 4, head_dim)
        pages = slabs.pointers, slabs.slab_rows, slabs.row_bytes
        op(query, *pages, counts[None], counts, code, 2, 32, 0, 1.0, out, lse, None, 1, None)

    call(layout.code)
    with pytest.raises(RuntimeError, match="packed elements must have 1, 2, 3, 4 or 8 bits, got 5"):
        call(4 | 5 << 8 | 3 << 16)
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of the 8 elements in a byte, got 12"):
        call(layout.code, 12)
    with pytest.raises(RuntimeError, match="unpacked to int8"):
        call(5 | 3 << 8 | 3 << 16)
    keys = torch.zeros(1, 2, 32, 64)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="no kernels that seal packed pages"):
        torch.ops.pikv_ds.seal_pages(keys, keys, layout.code, 2, 32, 0, pages, None, counts)
    assert not Codec("fp8", values="int4").layout(2, 64, 32, torch.float32).packed
