"""Every op against plain float64 attention written out here, on every backend that has the op.

Tolerances: float32 results of sums over up to a few hundred products of standard normal numbers
agree with float64 within a few times 1e-6; moves and integers are compared bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import KERNEL_CODECS as CODECS
from torch import Tensor

from pikv_ds.core.pool import PagePool, PageSize
from pikv_ds.layout import ALIGNMENT, BITS, PageLayout
from pikv_ds.ops import OPS, Ops, reference, why_missing
from pikv_ds.slabs import Slabs

pytestmark = pytest.mark.sampled(together=2)
FP32 = {"atol": 5e-6, "rtol": 5e-6}
FLOAT32_EPS = torch.finfo(torch.float32).eps
HUGE = 2**30  # a table entry that nobody may follow
SHAPES = [(4, 4, 24), (8, 2, 64), (4, 1, 20), (6, 3, 80)]  # query heads, KV heads, head size: MHA, GQA, MQA
shapes = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
REFERENCE = Ops("reference")


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None) -> tuple:
    """Attention in float64: query ``[T, H, D]``, keys ``[K, N, D]`` give ``[T, H, D]`` and ``[T, H]``."""
    group = query.shape[1] // keys.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))  # [H, N, D]
    scores = torch.einsum("thd,hnd->htn", query.double(), k) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # no key at all: zeros
    return torch.einsum("htn,hnd->thd", weights, v), lse.T


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **(tolerance or FP32))


# -- codecs ------------------------------------------------------------------------------------


def seal(keys: Tensor, values: Tensor, codec: str) -> tuple[Tensor, PageLayout]:
    _, kv_heads, page_size, head_dim = keys.shape
    layout = CODECS[codec].layout(kv_heads, head_dim, page_size, keys.dtype)
    pages = torch.full((len(keys), layout.page_bytes), 0xAB, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    REFERENCE.seal_pages(keys, values, layout, pages, None, flag)
    assert not flag
    return pages, layout


def quantization_error(x: Tensor, element: str, dim: int) -> Tensor:
    """Most that an element may lose to rounding in a page, with scales over dimension ``dim``.

    fp8: half a unit in the last of e4m3's three places, 2^-4 of the element, or of its least step,
    2^-9 of the scale, which is 1/448 of the largest element, rounded up to float16.
    Integers: half a step of ``(max - min) / (2^bits - 1)``, where the minimum is rounded down to float16: the
    spread grows by at most one unit in its last place, ``|min| * 2^-10``. The step is float16
    too, rounded by 2^-11 of itself (2^-25 where it is subnormal), which counts up to 2^bits - 1
    times. 2^-20 covers the float32 arithmetic.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if element == "fp8":
        scale = torch.maximum(high, -low) / 448 * (1 + 2**-10) + 2**-24
        return torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
    levels = 2 ** BITS[element] - 1
    step = (high - low + low.abs() * 2**-10 + 2**-24) / levels
    return step / 2 + levels * (step * 2**-11).clamp(min=2**-25) + (low.abs() + high.abs()) * 2**-20


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 20), (2, 64), (3, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(codec: str, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, rng) -> None:
    keys, values = torch.randn(2, 3, kv_heads, page_size, head_dim, generator=rng).to(dtype).unbind(0)
    pages, layout = seal(keys, values, codec)
    decoded_keys, decoded_values = reference.unseal_pages(pages, layout)
    assert decoded_keys.dtype == decoded_values.dtype == torch.float32
    if codec == "none":
        assert torch.equal(decoded_keys, keys.float())
        assert torch.equal(decoded_values, values.float())
        return
    # KIVI: keys per channel (over the page's tokens), values per token (over the channels)
    for x, decoded, dim in ((keys.float(), decoded_keys, 2), (values.float(), decoded_values, 3)):
        error = (decoded - x).abs()
        assert (error <= quantization_error(x, layout.element, dim)).all()
        assert error.max() > 0  # or nothing was quantized


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("offset", [-1000.0, 100.0, 30000.0])
def test_large_offsets_cost_no_more_than_half_a_step(codec: str, offset: float, rng) -> None:
    keys, values = torch.randn(2, 2, 2, 8, 24, generator=rng).add(offset).unbind(0)
    pages, layout = seal(keys, values, codec)
    for x, decoded, dim in zip((keys, values), reference.unseal_pages(pages, layout), (2, 3), strict=True):
        assert ((decoded - x).abs() <= quantization_error(x, layout.element, dim)).all()


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_keys_are_quantized_per_channel_and_values_per_token(codec: str, rng) -> None:
    """An outlier costs its own channel of the keys, its own token of the values, and nothing else."""
    keys, values = torch.randn(2, 1, 2, 8, 24, generator=rng).unbind(0)
    plain = reference.unseal_pages(*seal(keys, values, codec))
    keys[0, 0, 3, 5], values[0, 0, 3, 5] = 1000.0, 1000.0
    spoilt = reference.unseal_pages(*seal(keys, values, codec))
    key_changes, value_changes = ((a != b).nonzero() for a, b in zip(plain, spoilt, strict=True))
    assert {tuple(x) for x in key_changes[:, [1, 3]].tolist()} == {(0, 5)}  # head 0, channel 5
    assert {tuple(x) for x in value_changes[:, [1, 2]].tolist()} == {(0, 3)}  # head 0, token 3


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_constant_channels_and_tokens_are_exact_in_float16(codec: str) -> None:
    constant = torch.linspace(-70, 70, 24)
    keys = constant.expand(1, 2, 8, 24).contiguous()  # each channel constant over the tokens
    values = constant[:8, None].expand(1, 2, 8, 24).contiguous()  # each token constant over the channels
    pages, layout = seal(keys, values, codec)
    decoded_keys, decoded_values = reference.unseal_pages(pages, layout)
    for x, decoded in ((keys, decoded_keys), (values, decoded_values)):
        assert ((decoded - x).abs() <= x.abs() * 2**-11).all()  # what storing x as float16 would lose


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec: str) -> None:
    zeros = torch.zeros(2, 2, 8, 24)
    for decoded in reference.unseal_pages(*seal(zeros, zeros, codec)):
        assert torch.equal(decoded, zeros)


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 20), (2, 64)])
def test_page_bytes_are_what_the_codec_promises(page_size: int, kv_heads: int, head_dim: int) -> None:
    elements = kv_heads * page_size * head_dim
    layouts = {c: CODECS[c].layout(kv_heads, head_dim, page_size, torch.bfloat16) for c in CODECS}
    assert layouts["none"].data_bytes == 2 * elements
    assert layouts["int8"].data_bytes == elements
    assert layouts["int4"].data_bytes * 2 == elements
    for name, layout in layouts.items():
        offsets = [0, layout.key_scale_offset, layout.value_offset, layout.value_scale_offset, layout.page_bytes]
        sizes = [layout.data_bytes, layout.key_scale_bytes, layout.data_bytes, layout.value_scale_bytes]
        for start, end, size in zip(offsets, offsets[1:], sizes, strict=False):
            assert start % ALIGNMENT == 0
            assert size <= end - start < size + ALIGNMENT
        rows = {"none": 0, "fp8": 1}.get(name, 2)  # float16 scale, and minimum of the integers
        scales = rows * 2 * kv_heads * (head_dim + page_size)
        assert layout.key_scale_bytes + layout.value_scale_bytes == scales


@pytest.mark.parametrize("codec", CODECS)
def test_sealing_is_deterministic_and_padding_is_zero(codec: str, rng) -> None:
    keys, values = torch.randn(2, 3, 1, 8, 20 if codec == "int2" else 22, generator=rng).unbind(0)
    pages, layout = seal(keys, values, codec)
    assert torch.equal(seal(keys, values, codec)[0], pages)
    assert torch.equal(seal(keys[1:2], values[1:2], codec)[0][0], pages[1])  # whatever else is in the call
    used = torch.zeros(layout.page_bytes, dtype=torch.bool)
    for offset, size in (
        (0, layout.data_bytes),
        (layout.key_scale_offset, layout.key_scale_bytes),
        (layout.value_offset, layout.data_bytes),
        (layout.value_scale_offset, layout.value_scale_bytes),
    ):
        assert not used[offset : offset + size].any()  # sections do not overlap
        used[offset : offset + size] = True
    assert (pages[:, ~used] == 0).all()
    assert codec == "none" or (~used).any()  # this shape has padding where there are scales


@pytest.mark.parametrize("codec", CODECS)
def test_values_in_the_keys_are_off_by_half_a_step_of_their_channel(codec: str, rng) -> None:
    keys = torch.randn(3, 1, 32, 40, generator=rng)
    keys[..., 7] *= 50  # an outlier costs its own channel of the values, too
    layout = CODECS[codec].layout(1, 40, 32, torch.float32, latent_dim=36)
    pages = torch.empty(3, layout.page_bytes, dtype=torch.uint8)
    REFERENCE.seal_pages(keys, None, layout, pages, None, torch.zeros(1, dtype=torch.int32))
    values = reference.unseal_pages(pages, layout)[1]
    assert values.shape == (3, 1, 32, 36)
    if codec == "none":
        assert torch.equal(values, keys[..., :36])
    else:
        assert ((values - keys[..., :36]).abs() <= quantization_error(keys, layout.element, 2)[..., :36]).all()


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_a_latent_page(page_size: int, dtype: torch.dtype) -> None:
    layouts = {c: CODECS[c].layout(1, 576, page_size, dtype, latent_dim=512) for c in CODECS}  # DeepSeek-V3
    assert layouts["none"].page_bytes == page_size * 576 * dtype.itemsize
    for codec, scales in {"fp8": 1, "int8": 2, "int4": 2, "int2": 2}.items():
        assert layouts[codec].page_bytes == page_size * 576 * BITS[codec] // 8 + scales * 576 * 2
    assert {layout.value_dim for layout in layouts.values()} == {512}


def test_int4_refuses_an_odd_head_size() -> None:
    with pytest.raises(ValueError, match=r'pikv\.codec = "int4".*head_dim is 21; use "int8"'):
        CODECS["int4"].layout(1, 21, 8, torch.float32)


# -- moves -------------------------------------------------------------------------------------


def test_gather_pages_is_bitwise(ops: Ops, rng) -> None:
    slabs = Slabs(4, 48, torch.get_default_device())
    for slab in range(5):
        slabs.put(slab, torch.randint(256, (4, 48), generator=rng).to(torch.uint8))
    everything = torch.cat([s for s in slabs.tensors if s is not None])
    slabs.put(3, None)  # given back: nobody asks for slots 12 to 15
    slots = torch.tensor([1, 19, 4, 7, 7, 0], dtype=torch.int32)
    out = torch.empty(6, 48, dtype=torch.uint8)
    ops.gather_pages(slabs, slots, out)
    assert torch.equal(out, everything[slots.long()])
    ops.gather_pages(slabs, slots[:0], out[:0])


def test_the_reference_finds_a_table_that_points_into_a_returned_slab() -> None:
    slabs = Slabs(4, 16)
    slabs.put(0, torch.zeros(4, 16, dtype=torch.uint8))
    slabs.put(1, None)
    with pytest.raises(AssertionError, match="slab 1 was given back"):
        REFERENCE.gather_pages(slabs, torch.tensor([5]), torch.empty(1, 16, dtype=torch.uint8))


# -- attention over pages ----------------------------------------------------------------------


@dataclass
class Pages:
    """Random pages in a poisoned pool, and what decoding them gives."""

    layout: PageLayout
    pool: PagePool
    keys: dict[int, Tensor]  # slot -> float32 [K, S, D]
    values: dict[int, Tensor]
    true_keys: dict[int, Tensor]  # before encoding


def make_pages(n: int, kv_heads: int, head_dim: int, page_size: int, codec: str, dtype: torch.dtype, rng) -> Pages:
    keys, values = torch.randn(2, n, kv_heads, page_size, head_dim, generator=rng).to(dtype).unbind(0)
    layout = CODECS[codec].layout(kv_heads, head_dim, page_size, dtype)
    pages, bounds = (torch.zeros(n, size, dtype=torch.uint8) for size in (layout.page_bytes, layout.bounds_bytes))
    REFERENCE.seal_pages(keys, values, layout, pages, bounds, torch.zeros(1, dtype=torch.int32))
    device = torch.get_default_device()
    pool = PagePool([PageSize(layout.page_bytes, bounds.shape[1])], slab_pages=4, device=device, poison=True)
    slots = pool.allocate(2 * n).tolist()
    pool.free(slots[1::2])  # poisoned slots between the live ones
    slots = slots[::2]
    at = torch.tensor(slots, dtype=torch.int32)
    REFERENCE.scatter_pages(pool.pages[0], at, pages)
    REFERENCE.scatter_pages(pool.summaries[0], at, bounds)
    decoded = reference.unseal_pages(pages, layout)
    return Pages(layout, pool, *(dict(zip(slots, x, strict=True)) for x in (*decoded, keys.float())))


def table_of(rows: list, width: int) -> tuple[Tensor, Tensor]:
    """Table ``[R, width]`` and counts ``[R]``; what lies beyond a count must not be read."""
    table = torch.full((len(rows), width), HUGE, dtype=torch.int32)
    for row, slots in zip(table, rows, strict=True):
        row[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
    return table, torch.tensor([len(slots) for slots in rows], dtype=torch.int32)


def attend_pages(ops: Ops, query: Tensor, pages: Pages, table: Tensor, counts: Tensor, scale: float) -> tuple:
    out = torch.full(query.shape, torch.nan, dtype=torch.float32)
    lse = torch.full(query.shape[:2], torch.nan)
    ops.decode_attention(query, pages.pool.pages[0], table, counts, pages.layout, scale, out, lse)
    return out, lse


def dense_over(query: Tensor, pages: Pages, slots: list[int], scale: float) -> tuple:
    """One query ``[H, D]`` over the tokens of some pages, float64."""
    shape = (pages.layout.num_kv_heads, 0, pages.layout.head_dim)
    keys = torch.cat([torch.empty(shape), *(pages.keys[s] for s in slots)], dim=1)
    values = torch.cat([torch.empty(shape), *(pages.values[s] for s in slots)], dim=1)
    out, lse = dense(query[None].float(), keys, values, scale)
    return out[0], lse[0]


@shapes
@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        ("none", torch.float32),
        ("none", torch.bfloat16),
        ("none", torch.float16),
        ("int8", torch.float32),
        ("int4", torch.float32),
    ],
)
def test_decode_attention(ops: Ops, heads: int, kv_heads: int, head_dim: int, page_size, codec, dtype, rng) -> None:
    pages = make_pages(9, kv_heads, head_dim, page_size, codec, dtype, rng)
    s = list(pages.keys)
    rows = [s[:5], [0, s[8], 0, s[2]], [], [0, 0], s[3:4], s[::-1]]  # 0 is a hole
    query = torch.randn(len(rows), heads, head_dim, generator=rng).to(dtype)
    out, lse = attend_pages(ops, query, pages, *table_of(rows, 12), scale := head_dim**-0.5)
    for row, slots in enumerate(rows):
        expected, expected_lse = dense_over(query[row], pages, [x for x in slots if x], scale)
        close(out[row], expected)
        close(lse[row], expected_lse)
        if not any(slots):
            assert (out[row] == 0).all()
            assert (lse[row] == -torch.inf).all()


@shapes
def test_decode_attention_with_a_table_per_head(ops: Ops, heads: int, kv_heads: int, head_dim: int, rng) -> None:
    pages = make_pages(6, kv_heads, head_dim, 8, "none", torch.float32, rng)
    s = list(pages.keys)
    counts, width = [4, 0, 6], 7
    table = torch.full((3, kv_heads, width), HUGE, dtype=torch.int32)
    picked: dict[tuple[int, int], list[int]] = {}
    for row, count in enumerate(counts):
        for head in range(kv_heads):
            keep = torch.rand(count, generator=rng) < 0.6
            if (row, head) == (0, 0):
                keep[:] = False  # a head without any page beside heads that have some
            table[row, head, :count] = torch.where(keep, torch.tensor(s[:count], dtype=torch.int32), 0)
            picked[row, head] = [slot for slot, k in zip(s, keep.tolist(), strict=False) if k]
    query, group = torch.randn(3, heads, head_dim, generator=rng), heads // kv_heads
    out, lse = attend_pages(ops, query, pages, table, torch.tensor(counts, dtype=torch.int32), 0.3)
    for (row, head), slots in picked.items():
        mine = slice(head * group, (head + 1) * group)
        expected, expected_lse = dense_over(query[row], pages, slots, 0.3)  # right for this head only
        close(out[row, mine], expected[mine])
        close(lse[row, mine], expected_lse[mine])


def test_decode_attention_reads_pages_in_any_order(ops: Ops, rng) -> None:
    pages = make_pages(5, 2, 64, 8, "none", torch.float32, rng)
    s, query = list(pages.keys), torch.randn(1, 4, 64, generator=rng)
    forward = attend_pages(ops, query, pages, *table_of([s], 5), 0.125)
    backward = attend_pages(ops, query, pages, *table_of([s[::-1]], 5), 0.125)
    close(forward[0], backward[0])
    again = attend_pages(ops, query, pages, *table_of([s], 9), 0.125)  # a wider table, the same bits
    assert all(torch.equal(a, b) for a, b in zip(forward, again, strict=True))


LATENT_SHAPES = [(32, 24, 8, 6, 1), (80, 64, 16, 33, 1), (40, 12, 32, 4, 2), (192, 128, 64, 16, 1)]
"""Key and latent channels, page size, query heads and KV heads."""


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "latent", "size", "heads", "kv_heads"), LATENT_SHAPES)
def test_attention_over_latent_pages_and_tails(
    name: str, codec: str, dtype: torch.dtype, dim: int, latent: int, size: int, heads: int, kv_heads: int, rng
) -> None:
    if missing := None if name == "reference" else why_missing(name, "cpu"):
        pytest.skip(missing)
    layout = CODECS[codec].layout(kv_heads, dim, size, dtype, latent)
    ops, scale = Ops(name, layout=layout), dim**-0.5
    keys = (torch.randn(5, kv_heads, size, dim, generator=rng) + torch.randn(dim, generator=rng)).to(dtype)
    encoded = torch.empty(5, layout.page_bytes, dtype=torch.uint8)
    REFERENCE.seal_pages(keys, None, layout, encoded, None, torch.zeros(1, dtype=torch.int32))
    slabs = Slabs.of(torch.cat([torch.full_like(encoded[:1], 0xFF), encoded]))
    decoded = reference.unseal_pages(encoded, layout)[0]  # [pages, K, S, D]
    query = torch.randn(3, heads, dim, generator=rng).to(dtype)
    # Queries with scales are rounded again where the compiled kernels multiply bytes or bfloat16.
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-4, "rtol": 2e-4}

    def check(row_query: Tensor, seen: Tensor, out: Tensor, lse: Tensor, visible: Tensor | None = None) -> None:
        expected = dense(row_query, seen, seen[..., :latent], scale, visible)
        for got, wanted in zip((out, lse), expected, strict=True):
            close(got, wanted, **tolerance)

    def seen(slots: list[int]) -> Tensor:
        return torch.cat([torch.empty(kv_heads, 0, dim), *(decoded[s - 1] for s in slots if s)], dim=1)

    rows = [[1, 3], [0, 5, 2], []]
    table, counts = table_of(rows, 4)
    out, lse = torch.empty(3, heads, latent), torch.empty(3, heads)
    page_lse = torch.empty(3, heads, 4)
    ops.decode_attention(query, slabs, table, counts, layout, scale, out, lse, page_lse)
    for i, slots in enumerate(rows):
        check(query[i : i + 1], seen(slots), out[i : i + 1], lse[i : i + 1])
    close(page_lse.logsumexp(-1), lse, **tolerance)
    scores = torch.empty_like(page_lse)
    ops.key_scores(query, slabs, table, counts, layout, scale, scores)
    close(scores, page_lse, **tolerance)

    ops.prefill_attention(query, slabs, torch.tensor([4, 0, 1], dtype=torch.int32), layout, scale, out, lse)
    check(query, seen([4, 1]), out, lse)

    lengths = torch.tensor([3, 0, size], dtype=torch.int32)
    ops.tail_attention(query, keys[:3], layout.values(keys[:3], None), lengths, scale, out, lse)
    for i, n in enumerate(lengths.tolist()):
        check(query[i : i + 1], keys[i, :, :n].float(), out[i : i + 1], lse[i : i + 1])

    plain = keys[:2].transpose(0, 1).flatten(1, 2)
    first = 2 * size - 3
    ops.context_attention(query, plain, layout.values(plain, None), scale, first, out, lse)
    visible = torch.arange(2 * size)[None] <= torch.arange(3)[:, None] + first
    check(query, plain.float(), out, lse, visible)


@dataclass
class Shape:
    """A shape of decoding."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int


DECODE_SHAPES = [
    Shape(8, 8, 64, 16),
    Shape(4, 2, 80, 8),
    Shape(6, 2, 96, 32),
    Shape(8, 2, 128, 32),
    Shape(14, 2, 64, 16),
    Shape(16, 1, 192, 8),
    Shape(5, 1, 256, 64),
    Shape(2, 1, 20, 8),
]


def with_outliers(keys: Tensor, rng: torch.Generator) -> Tensor:
    """A few channels 20 times larger, as real keys have them."""
    channels = torch.randperm(keys.shape[-1], generator=rng)[: max(2, keys.shape[-1] // 32)]
    keys[..., channels] *= 20
    return keys


def torch_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A plain implementation in the query's own type: ``[R, H, D]`` over ``[K, N, D]``."""
    grouped = query.unflatten(1, (keys.shape[0], -1)).transpose(0, 1).flatten(1, 2)  # [K, R * group, D]
    scores = (grouped @ keys.to(query.dtype).transpose(1, 2)) * scale
    out = torch.softmax(scores.float(), -1).to(query.dtype) @ values.to(query.dtype)
    return out.unflatten(1, (len(query), -1)).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_stay_within_twice_those_of_torch(ops: Ops, shape: Shape, codec: str, dtype: torch.dtype, rng) -> None:
    """Judged on the decoded pages, so that rounding in pages does not count."""
    num_pages = 12
    size = num_pages, shape.kv_heads, shape.page_size, shape.head_dim
    keys, values = torch.randn(2, *size, generator=rng).unbind(0)
    query = torch.randn(3, shape.heads, shape.head_dim, generator=rng)
    scale = shape.head_dim**-0.5
    pages, layout = seal(with_outliers(keys, rng).to(dtype), values.to(dtype), codec)
    query = (query * torch.tensor([1.0, 0.1, 3.0])[:, None, None]).to(dtype)
    table = torch.arange(1, num_pages + 1, dtype=torch.int32)[None]
    slabs = Slabs.of(torch.cat([torch.full_like(pages[:1], 255), pages]))
    out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    counts = torch.tensor([num_pages], dtype=torch.int32)
    ops.decode_attention(query, slabs, table, counts, layout, scale, out, lse)
    decoded = [x.transpose(0, 1).flatten(1, 2) for x in reference.unseal_pages(pages, layout)]
    expected, expected_lse = dense(query.float(), *decoded, scale)
    theirs = torch_attention(query, *decoded, scale)

    def rms(x: Tensor) -> float:
        return float((x.double() - expected).square().mean().sqrt())

    # What rounding once costs at least, in sums of this size: a key is a channel's minimum plus codes, and the two
    # can cancel, so a channel counts with its largest key. The order of summation decides the rest.
    largest = decoded[0].abs().amax(1).repeat_interleave(shape.heads // shape.kv_heads, 0)
    terms = float(torch.einsum("rhd,hd->rh", query.float().abs(), largest).max()) * scale
    assert rms(out) <= 2 * max(rms(theirs), terms * FLOAT32_EPS)
    assert float((lse.double() - expected_lse).abs().max()) <= 4 * terms * torch.finfo(dtype).eps


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("queries", [2, 5, 8])
def test_the_queries_of_a_sequence_share_its_table_row(ops: Ops, codec: str, queries: int, rng) -> None:
    pages = make_pages(7, 2, 64, 8, codec, torch.bfloat16, rng)
    s = list(pages.keys)
    table, counts = table_of([s[:4], [], s[2:]], 6)
    query = torch.randn(3 * queries, 8, 64, generator=rng).bfloat16()
    shared = attend_pages(ops, query, pages, table, counts, 0.125)
    repeated = table.repeat_interleave(queries, 0), counts.repeat_interleave(queries)
    for mine, alone in zip(shared, attend_pages(ops, query, pages, *repeated, 0.125), strict=True):
        close(mine, alone, atol=2e-5, rtol=2e-5)  # rows may be grouped into other tiles
    assert (shared[0][queries : 2 * queries] == 0).all()


@shapes
@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_the_mass_of_each_page(ops: Ops, heads: int, kv_heads: int, head_dim: int, codec: str, rng) -> None:
    pages = make_pages(6, kv_heads, head_dim, 8, codec, torch.float32, rng)
    s = list(pages.keys)
    rows = [s[:3], [], [0, s[4], s[1], 0, s[5]]]
    table, counts = table_of(rows, 6)
    query = torch.randn(3, heads, head_dim, generator=rng)
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    page_lse, alone = torch.full((2, 3, heads, 6), torch.nan).unbind(0)
    ops.decode_attention(query, pages.pool.pages[0], table, counts, pages.layout, 0.2, out, lse, page_lse)
    for row, slots in enumerate(rows):
        for place in range(6):
            slot = slots[place] if place < len(slots) else 0
            if slot:
                close(page_lse[row, :, place], dense_over(query[row], pages, [slot], 0.2)[1])
            else:
                assert (page_lse[row, :, place] == -torch.inf).all()
    mass = torch.exp(page_lse - lse[..., None]).nan_to_num(0.0).sum(-1)
    close(mass, torch.tensor([1.0, 0.0, 1.0])[:, None].expand_as(mass), atol=2e-5, rtol=0.0)
    ops.key_scores(query, pages.pool.pages[0], table, counts, pages.layout, 0.2, alone)
    close(alone, page_lse)


def test_tables_of_a_hundred_thousand_entries(ops: Ops, rng) -> None:
    pages = make_pages(5, 1, 64, 8, "int4", torch.bfloat16, rng)
    s = list(pages.keys)
    entries = torch.randint(len(s), (100_000,), generator=rng)
    table = torch.tensor(s, dtype=torch.int32)[entries][None]
    query = torch.randn(1, 2, 64, generator=rng).bfloat16()
    counts = torch.tensor([100_000], dtype=torch.int32)
    out, lse = attend_pages(ops, query, pages, table, counts, 0.125)
    page_lse = torch.stack([dense_over(query[0], pages, [slot], 0.125)[1] for slot in s], dim=-1)  # [H, pages]
    page_out = torch.stack([dense_over(query[0], pages, [slot], 0.125)[0] for slot in s], dim=-1)
    often = torch.bincount(entries, minlength=len(s)).double()
    weights = often * page_lse.exp()
    close(lse[0], weights.sum(-1).log(), atol=1e-3, rtol=0.0)
    close(out[0], (page_out * weights[:, None]).sum(-1) / weights.sum(-1, keepdim=True), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_prefill_attention(ops: Ops, shape: Shape, codec: str, rng) -> None:
    pages = make_pages(9, shape.kv_heads, shape.head_dim, shape.page_size, codec, torch.bfloat16, rng)
    query = torch.randn(37, shape.heads, shape.head_dim, generator=rng).bfloat16()
    scale = shape.head_dim**-0.5
    for slots in (list(pages.keys)[::-1], list(pages.keys)[:1], []):
        out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
        chosen = torch.tensor([0, *slots, 0], dtype=torch.int32)  # 0 is a hole
        ops.prefill_attention(query, pages.pool.pages[0], chosen, pages.layout, scale, out, lse)
        size = (shape.kv_heads, 0, shape.head_dim)
        keys, values = (torch.cat([torch.empty(size), *(x[s] for s in slots)], 1) for x in (pages.keys, pages.values))
        expected, expected_lse = dense(query.float(), keys, values, scale)
        if not slots:
            assert (out == 0).all()
            assert (lse == -torch.inf).all()
            continue
        error, theirs = (
            float((x.double() - expected).square().mean().sqrt())
            for x in (out, torch_attention(query, keys, values, scale))
        )
        assert error <= 2 * theirs
        close(lse, expected_lse, atol=0.03, rtol=0.0)


# -- attention over plain keys -----------------------------------------------------------------


@shapes
@pytest.mark.parametrize(
    ("queries", "keys", "first_query"),
    [(1, 1, 0), (5, 5, 0), (3, 10, 7), (300, 300, 0), (200, 217, 17), (1, 40, None), (257, 33, None), (4, 9, 2)],
)
def test_context_attention(ops: Ops, heads, kv_heads, head_dim, queries: int, keys: int, first_query, rng) -> None:
    query = torch.randn(queries, heads, head_dim, generator=rng)
    key, value = torch.randn(2, kv_heads, keys, head_dim, generator=rng).unbind(0)
    visible = None
    if first_query is not None:
        visible = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + first_query
    out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    ops.context_attention(query, key, value, head_dim**-0.5, first_query, out, lse)
    expected, expected_lse = dense(query, key, value, head_dim**-0.5, visible)
    close(out, expected)
    close(lse, expected_lse)


def test_context_attention_does_not_see_later_tokens(ops: Ops, rng) -> None:
    query, key, value = (torch.randn(shape, generator=rng) for shape in ((150, 4, 24), (2, 160, 24), (2, 160, 24)))
    results = []
    for later in (1.0, -50.0):
        key[:, 100:], value[:, 100:] = later, later
        out, lse = torch.empty(150, 4, 24), torch.empty(150, 4)
        ops.context_attention(query, key, value, 0.2, 10, out, lse)
        results.append((out, lse))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:90], b[:90])  # query 89 sees keys up to 99
        assert not torch.equal(a[90:], b[90:])


@shapes
@pytest.mark.parametrize("page_size", [8, 32])
def test_tail_attention(ops: Ops, heads: int, kv_heads: int, head_dim: int, page_size: int, rng) -> None:
    lengths = torch.tensor([0, 1, 5, page_size], dtype=torch.int32)
    keys, values = torch.randn(2, 4, kv_heads, page_size, head_dim, generator=rng).unbind(0)
    for row, n in enumerate(lengths.tolist()):
        keys[row, :, n:], values[row, :, n:] = torch.nan, torch.nan
    query = torch.randn(4, heads, head_dim, generator=rng)
    out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    ops.tail_attention(query, keys, values, lengths, head_dim**-0.5, out, lse)
    for row, n in enumerate(lengths.tolist()):
        expected, expected_lse = dense(query[row][None], keys[row, :, :n], values[row, :, :n], head_dim**-0.5)
        close(out[row], expected[0])
        close(lse[row], expected_lse[0])
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()


# -- merging -----------------------------------------------------------------------------------


def merge(ops: Ops, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.full(outs.shape[1:], torch.nan), torch.full(lses.shape[1:], torch.nan)
    ops.merge_partials(outs.contiguous(), lses.contiguous(), out, lse)
    return out, lse


def split_softmax(scores: Tensor, values: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Partials ``[P, N, D]``, ``[P, N]`` in float32 of scores ``[N, M]`` cut at the given places."""
    outs, lses = [], []
    for start, end in zip([0, *cuts], [*cuts, scores.shape[1]], strict=True):
        lse = scores[:, start:end].double().logsumexp(-1)
        weights = (scores[:, start:end].double() - lse[:, None]).exp()
        out = weights @ values[start:end].double()
        outs.append(out if end > start else torch.full_like(out, torch.nan))  # never read
        lses.append(lse)
    return torch.stack(outs).float(), torch.stack(lses).float()


BACKENDS = ["reference", *([] if why_missing("cpp", "cpu") else ["cpp"])]


@pytest.mark.parametrize("spread", [1.0, 30.0])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_splitting_a_softmax_and_merging_gives_the_whole(spread: float, data: st.DataObject) -> None:
    n, keys, head_dim = (
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(0, 40)),
        data.draw(st.sampled_from([20, 64])),
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=6)))  # equal cuts: empty partials
    rng = torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randn(n, keys, generator=rng) * spread
    values = torch.randn(keys, head_dim, generator=rng)
    outs, lses = split_softmax(scores, values, cuts)
    expected = torch.softmax(scores.double(), -1) @ values.double()
    merged = {b: merge(Ops(b), outs, lses) for b in BACKENDS}
    for out, lse in merged.values():
        # Weights are exp of float32 log-sum-exps of up to |100|: an error of 2^-18 each.
        close(out, expected, atol=2e-5, rtol=2e-5)
        close(lse, scores.double().logsumexp(-1), atol=1e-6, rtol=1e-6)
    if "cpp" in merged:
        close(merged["cpp"][0], merged["reference"][0], atol=1e-6, rtol=1e-6)
        close(merged["cpp"][1], merged["reference"][1], atol=1e-6, rtol=1e-6)


def test_merging_does_not_overflow(ops: Ops) -> None:
    outs = torch.tensor([[[1.0, -2.0]], [[3.0, 4.0]]])
    for shift in (-1e4, 0.0, 1e4):
        out, lse = merge(ops, outs, torch.tensor([[shift], [shift]]))
        close(out, torch.tensor([[2.0, 1.0]]))
        close(lse, torch.tensor([shift + math.log(2)]), atol=0.0, rtol=1e-6)
    out, lse = merge(ops, outs, torch.tensor([[1e4], [-1e4]]))
    assert torch.equal(out, outs[0])
    assert lse.item() == 1e4


def test_empty_partials_are_not_read(ops: Ops, rng) -> None:
    outs, lses = torch.randn(4, 6, 20, generator=rng), torch.randn(4, 6, generator=rng)
    empty = torch.tensor([[True, False, True, False, True, False], [True] * 6, [False] * 6, [True] + [False] * 5])
    lses[empty] = -torch.inf
    clean = merge(ops, outs.masked_fill(empty[..., None], 0.0), lses)
    for garbage in (torch.nan, torch.inf):
        spoilt = merge(ops, outs.masked_fill(empty[..., None], garbage), lses)
        assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
    assert torch.equal(clean[0][0], outs[2, 0])  # the only one that is there, bit by bit
    assert clean[1][0] == lses[2, 0]


@pytest.mark.parametrize("num_partials", [0, 1, 3])
def test_nothing_but_empty_partials_gives_an_empty_partial(ops: Ops, num_partials: int) -> None:
    out, lse = merge(ops, torch.full((num_partials, 2, 20), torch.nan), torch.full((num_partials, 2), -torch.inf))
    assert torch.equal(out, torch.zeros(2, 20))
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_partial_spoils_its_row_and_no_other(ops: Ops, bad: float, rng) -> None:
    outs, lses = torch.randn(3, 4, 20, generator=rng), torch.randn(3, 4, generator=rng)
    healthy_out, _ = merge(ops, outs, lses)
    lses[1, 2] = bad
    out, lse = merge(ops, outs, lses)
    assert out[2].isnan().all()
    assert lse[2].isnan()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(out[others], healthy_out[others])


def test_merging_twice_gives_the_same_bits(ops: Ops, rng) -> None:
    outs, lses = torch.randn(7, 33, 80, generator=rng), torch.randn(7, 33, generator=rng)
    first, second = merge(ops, outs, lses), merge(ops, outs, lses)
    alone = merge(ops, outs[:, 5:6], lses[:, 5:6])  # a row does not depend on its neighbours
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[5:6], c)


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason=str(why_missing("cpp", "cpu")))
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (((2, 3, 4), (2, 3), (3, 5), (3,)), r"out must have shape \[N, D\] = \[3, 4\]"),
        (((3, 4), (2, 3), (3, 4), (3,)), "3 dimensions"),
    ],
)
def test_compiled_merge_names_the_wrong_argument(shape: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Ops("cpp").merge_partials(*(torch.zeros(s) for s in shape))


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason=str(why_missing("cpp", "cpu")))
def test_auto_takes_the_compiled_op_where_there_is_one() -> None:
    assert Ops("auto").implementation("merge_partials") == "cpp"
    assert Ops("cpp").implementation("merge_partials") == "cpp"
    assert Ops("reference").implementation("merge_partials") == "reference"
    with pytest.raises(ValueError, match="has no ops for device 'meta'"):
        Ops("cpp", "meta")


def test_every_op_of_the_reference_is_offered() -> None:
    defined = {n for n, f in vars(reference).items() if callable(f) and f.__module__ == reference.__name__}
    assert {n for n in defined if not n.startswith("_")} == {*OPS, "unseal_pages"}


# -- lookup ------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_scores_bound_every_key_of_the_page(
    ops: Ops, heads: int, kv_heads: int, head_dim: int, dtype, rng
) -> None:
    pages = make_pages(7, kv_heads, head_dim, 8, "none", dtype, rng)
    s = list(pages.keys)
    rows = [s[:3], [], s, s[4:5]]
    table, counts = table_of(rows, 9)
    query = torch.randn(len(rows), heads, head_dim, generator=rng).to(dtype)
    scores = torch.full((len(rows), kv_heads, 9), torch.nan)
    ops.page_scores(query, pages.pool.summaries[0], table, counts, pages.layout, scores)
    group = heads // kv_heads
    for row, slots in enumerate(rows):
        assert (scores[row, :, len(slots) :] == -torch.inf).all()
        for place, slot in enumerate(slots):
            keys = pages.true_keys[slot].double()  # [K, S, D]
            q = query[row].double().view(kv_heads, group, head_dim)
            best = torch.einsum("kgd,ksd->kgs", q, keys).amax((1, 2))
            assert (scores[row, :, place] >= best - 1e-4).all()  # float32 sums of head_dim products
            low, high = keys.amin(1)[:, None], keys.amax(1)[:, None]
            bound = torch.maximum(q * low, q * high).sum(-1).amax(1)
            close(scores[row, :, place], bound, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_page_bounds_are_exact(ops: Ops, dtype: torch.dtype, rng) -> None:
    keys = torch.randn(3, 2, 8, 24, generator=rng).to(dtype)
    layout = CODECS["int8"].layout(2, 24, 8, dtype)
    row = torch.full((3, layout.page_bytes + layout.bounds_bytes), 0xAB, dtype=torch.uint8)  # a row of a send buffer
    pages, out = row[:, : layout.page_bytes], row[:, layout.page_bytes :]
    ops.seal_pages(keys, keys, layout, pages, out, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(pages, seal(keys, keys, "int8")[0])
    low, high = out.contiguous().view(dtype).view(3, 2, 2, 24).unbind(1)
    assert torch.equal(low, keys.amin(2))
    assert torch.equal(high, keys.amax(2))


def select(ops: Ops, counted: list[int], scores: Tensor, pinned: Tensor, budget: list[int]) -> Tensor:
    """Places of the pages kept, bool ``[R, K, P]``; checks that the kept ones show their own slots."""
    rows, heads, width = scores.shape
    table = torch.arange(1, rows * width + 1, dtype=torch.int32).view(rows, width)
    out = torch.full((rows, heads, width), -1, dtype=torch.int32)
    counts, budgets = (torch.tensor(x, dtype=torch.int32) for x in (counted, budget))
    ops.select_pages(table, counts, scores, pinned, budgets, out)
    kept = out != 0
    assert torch.equal(out, torch.where(kept, table[:, None].expand_as(out), 0))  # so no page is there twice
    return kept


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_select_pages_keeps_the_best_within_the_budget(data: st.DataObject) -> None:
    rows, heads, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    counts = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    budget = data.draw(st.lists(st.integers(0, width + 2), min_size=rows, max_size=rows))
    rng = torch.Generator(torch.get_default_device()).manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randint(4, (rows, heads, width), generator=rng).float()  # many ties
    pinned = torch.rand(rows, width, generator=rng) < 0.25
    kept = select(REFERENCE, counts, scores, pinned, budget)
    for row, count in enumerate(counts):
        pins = pinned[row, :count].nonzero().squeeze(1).tolist()
        for head in range(heads):
            rest = [p for p in range(count) if p not in pins]
            rest.sort(key=lambda p: (-float(scores[row, head, p]), p))  # ties: the earlier page
            expected = sorted(pins + rest[: max(0, budget[row] - len(pins))])
            assert kept[row, head].nonzero().squeeze(1).tolist() == expected


def test_select_pages_ties_go_to_the_earlier_page(ops: Ops) -> None:
    width = 500  # wide enough that an unstable sort shows
    kept = select(ops, [width], torch.zeros(1, 1, width), torch.zeros(1, width, dtype=torch.bool), [3])
    assert kept.nonzero()[:, 2].tolist() == [0, 1, 2]


def test_select_pages_keeps_everything_when_the_budget_suffices(ops: Ops, rng) -> None:
    kept = select(ops, [4, 7], torch.randn(2, 3, 7, generator=rng), torch.zeros(2, 7, dtype=torch.bool), [4, 100])
    assert kept.sum(-1).tolist() == [[4] * 3, [7] * 3]


def test_select_pages_keeps_pinned_pages_whatever_their_score(ops: Ops) -> None:
    scores = torch.tensor([[[-torch.inf, 5.0, 4.0, -9.0, 3.0]]])
    pinned = torch.tensor([[True, False, False, True, True]])
    assert select(ops, [4], scores, pinned, [3])[0, 0].tolist() == [True, True, False, True, False]
    assert select(ops, [4], scores, pinned, [1])[0, 0].tolist() == [True, False, False, True, False]
