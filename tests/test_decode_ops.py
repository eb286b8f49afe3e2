"""What a decode pass asks of the ops: lists where they are, packed partials, tails by index, tokens put into tails.

The checks take any `Ops`: tests/test_cuda_emulated.py runs them on the CUDA kernels, too.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from passes import KERNEL_CODECS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pikv_ds.core.exchange import Partials
from pikv_ds.core.table import PageTable
from pikv_ds.layout import SealFlag
from pikv_ds.ops import Ops, reference
from pikv_ds.ops.lists import SEGMENT, PageLists
from pikv_ds.slabs import Slabs

HEADS, DIM, PAGE = 4, 32, 8
HALF = [torch.float32, torch.bfloat16, torch.float16]


def random_lists(rng: torch.Generator, num_slots: int, streams: int, most: int) -> PageLists:
    """Lists of a table with two layers and two formats; some rows are empty, one is padding."""
    units, formats = 2 * streams, 2
    device = torch.get_default_device()
    table = PageTable(units, device, formats)
    choose = np.random.default_rng(int(torch.randint(2**31, (1,), generator=rng, device=rng.device)))
    for row in (0, 1, 3):
        for _ in range(3):  # lists grow in turn, so that their segments do not follow each other
            counts = choose.integers(most // 3 + 2, most, (units, formats))
            at = np.repeat(np.arange(units * formats), counts.reshape(-1))
            slots = choose.integers(0, num_slots, len(at))  # 0: a hole
            numbers = np.arange(len(at)) + 10**6 * choose.integers(0, 1000)
            table.append(np.full(len(at), row), at // formats, at % formats, numbers, slots)
    lists = table.lists(np.array([3, 0, -1, 1, 2]), streams)
    return lists.at((streams + 0) * formats + 1)  # the second layer's, of the second format


def check_lists(ops: Any, rng: torch.Generator, codec: str, dtype: torch.dtype, streams: int) -> None:
    """Lists in place give the bits of a dense table, packed or not, and nothing beside the partials is written."""
    kv_heads = HEADS // 2 // streams
    layout = KERNEL_CODECS[codec].layout(kv_heads, DIM, PAGE, dtype)
    kv = torch.randn(2, 20, kv_heads, PAGE, DIM, generator=rng).to(dtype)
    pages = torch.full((21, layout.page_bytes), 255, dtype=torch.uint8)
    reference.seal_pages(kv[0], kv[1], layout, pages[1:], None, torch.zeros(1, dtype=torch.int32))
    slabs = Slabs.of(pages)
    lists = random_lists(rng, 21, streams, 30)
    table, counts = lists.dense()
    assert int(counts.max()) > SEGMENT
    assert (counts.view(-1, streams)[[2, 4]] == 0).all()
    query = torch.randn(len(lists), HEADS // streams, DIM, generator=rng).to(dtype)
    expected = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    ops.decode_attention(query, slabs, table, counts, layout, 0.2, *expected)
    assert (expected[1].view(5, -1)[[2, 4]] == -torch.inf).all()
    out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    ops.decode_attention(query, slabs, lists, None, layout, 0.2, out, lse)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    packed = Partials(torch.full((len(query) + 2, query.shape[1] * (DIM + 1)), torch.nan), query.shape[1])
    ops.decode_attention(query, slabs, lists, None, layout, 0.2, packed.outs[1:-1], packed.lses[1:-1])
    assert torch.equal(packed.outs[1:-1], expected[0])
    assert torch.equal(packed.lses[1:-1], expected[1])
    assert packed.buffer[[0, -1]].isnan().all()


def check_tails(ops: Any, rng: torch.Generator, dtype: torch.dtype, value_dim: int) -> None:
    """Tails by index give the bits of tails in order; packed partials, too."""
    kv_heads = 1 if value_dim < DIM else 2
    keys, values = torch.randn(2, 7, kv_heads, PAGE, DIM, generator=rng).to(dtype)
    indices = torch.tensor([5, 0, 6, 2], dtype=torch.int32)
    lengths = torch.tensor([PAGE, 3, 0, 1], dtype=torch.int32)
    query = torch.randn(4, HEADS, DIM, generator=rng).to(dtype)
    if value_dim < DIM:
        values = keys[..., :value_dim]
    some = keys[indices.long()]
    in_order = some, some[..., :value_dim] if value_dim < DIM else values[indices.long()]
    expected = torch.empty(4, HEADS, value_dim), torch.empty(4, HEADS)
    ops.tail_attention(query, *in_order, lengths, 0.2, *expected)
    packed = Partials(torch.full((4, HEADS * (value_dim + 1)), torch.nan), HEADS)
    ops.tail_attention(query, keys, values, lengths, 0.2, packed.outs, packed.lses, indices)
    assert torch.equal(packed.outs, expected[0])
    assert torch.equal(packed.lses, expected[1])
    assert (packed.lses[2] == -torch.inf).all()


def check_append(ops: Any, rng: torch.Generator, dtype: torch.dtype, latent: bool, bad: float | None) -> None:
    """Tokens go where they belong and nowhere else; what is not finite is noted, but of these tokens alone."""
    joined = torch.randn(9, 3, 2 * DIM, generator=rng).to(dtype)  # keys and values are pieces of one tensor
    keys, values = joined[..., :DIM], None if latent else joined[..., DIM:]
    places = torch.tensor([[8, 0, 5], [1, 3, 0], [PAGE - 1, 0, 4]], dtype=torch.int32)
    joined[3] = torch.nan  # a token that is not asked for
    if bad is not None:
        (keys if latent else values)[5, 1, DIM - 1] = bad
    tails = [torch.randn(4, 3, PAGE, DIM, generator=rng).to(dtype) for _ in range(1 if latent else 2)]
    flags = torch.full((1,), int(SealFlag.BEYOND_RANGE), dtype=torch.int32)
    expected, expected_flags = [t.clone() for t in tails], flags.clone()
    reference.append_tokens(keys, values, places, expected[0], None if latent else expected[1], expected_flags)
    ops.append_tokens(keys, values, places, tails[0], None if latent else tails[1], flags)
    for mine, wanted in zip(tails, expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), wanted.view(torch.uint8))
    noted = SealFlag.BEYOND_RANGE | (SealFlag(0) if bad is None else SealFlag.NON_FINITE)
    assert flags.tolist() == expected_flags.tolist() == [int(noted)]
    assert torch.equal(tails[0][1, :, PAGE - 1], keys[8])


def check_experts(ops: Any, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Experts of any integer type go into the tails as int16."""
    experts = torch.randint(-1, 300, (6, 2), generator=rng).to(dtype)
    places = torch.tensor([[5, 0], [1, 2], [3, PAGE - 1]], dtype=torch.int32)
    tail = torch.full((3, PAGE, 2), 7, dtype=torch.int16)
    ops.append_experts(experts, places, tail)
    assert tail[1, 3].tolist() == experts[5].tolist()
    assert tail[2, PAGE - 1].tolist() == experts[0].tolist()
    assert int((tail == 7).sum()) >= tail.numel() - 4


def check_merge(ops: Any, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Packed partials, of which some are empty, give the bits of plain ones; the result is rounded as torch does."""
    shape = (3, 5, HEADS)
    partials = Partials(torch.randn(*shape[:2], HEADS * (DIM + 1), generator=rng), HEADS)
    partials.lses[1, 2] = partials.lses[:, 4] = -torch.inf
    partials.outs[1, 2] = partials.outs[:, 4] = torch.nan  # never read
    expected = torch.empty(5 * HEADS, DIM), torch.empty(5 * HEADS)
    outs, lses = partials.outs.contiguous().flatten(1, 2), partials.lses.contiguous().flatten(1, 2)
    ops.merge_partials(outs, lses, *expected)
    out, lse = torch.empty(5, HEADS, DIM, dtype=dtype), torch.empty(5, HEADS)
    ops.merge_partials(partials.outs, partials.lses, out, lse)
    assert torch.equal(out, expected[0].view(5, HEADS, DIM).to(dtype))
    assert torch.equal(lse.flatten(), expected[1])
    assert (out[4] == 0).all()
    again = torch.empty_like(out)
    ops.merge_partials(partials.outs, partials.lses, again, None)
    assert torch.equal(again, out)
    some = torch.empty(4, HEADS, DIM, dtype=dtype)
    ops.merge_partials(partials.outs[:, :4], partials.lses[:, :4], some, None)
    assert torch.equal(some, out[:4])


def check_rounding(ops: Any, rng: torch.Generator, dtype: torch.dtype) -> None:
    """float32 of any bits, ties among them, become what torch makes of them."""
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=rng, dtype=torch.int64).int()
    ties = bits[:20_000] & ~0xFFF | torch.tensor([0, 0x800, 0x1000])[torch.arange(20_000) % 3].int()
    small = torch.arange(-20_000, 20_000, dtype=torch.int64).mul(1 << 15).int()  # subnormals of float16 among them
    x = torch.cat([bits, ties, bits[:20_000] & ~0x7FFF | 0x8000, small]).view(torch.float32).view(1, -1, 4)
    out = torch.empty(x.shape[1:], dtype=dtype)
    ops.merge_partials(x, torch.zeros(x.shape[:2]), out, None)
    assert torch.equal(out.isnan(), x[0].isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), x[0].to(dtype).nan_to_num(nan=0.0))


def check_flags(ops: Any, rng: torch.Generator, codec: str, dtype: torch.dtype) -> None:
    """Each flag is of its own pages, and the bytes are those of pages by themselves."""
    layout = KERNEL_CODECS[codec].layout(2, DIM, PAGE, dtype)
    keys, values = torch.randn(2, 6, 2, PAGE, DIM, generator=rng).to(dtype)
    values[3, 1, 2, 5] = torch.inf
    out, flags = torch.empty(6, layout.page_bytes, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    ops.seal_pages(keys, values, layout, out, None, flags)
    assert flags.tolist() == [0, int(SealFlag.NON_FINITE), 0]
    alone = torch.empty_like(out)
    for i in range(6):
        ops.seal_pages(keys[i : i + 1], values[i : i + 1], layout, alone[i : i + 1], None, flags[:1].clone())
    fine = [0, 1, 2, 4, 5]
    assert torch.equal(out[fine], alone[fine])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("codec", ["none", "fp8", "int8", "int4", "int2"])
def test_lists_where_they_are(ops: Ops, codec: str, dtype: torch.dtype, streams: int, rng: torch.Generator) -> None:
    check_lists(ops, rng, codec, dtype, streams)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value_dim", [DIM, DIM // 2])
def test_tails_by_index(ops: Ops, dtype: torch.dtype, value_dim: int, rng: torch.Generator) -> None:
    if ops.implementation("tail_attention") == "triton" and value_dim < DIM:
        pytest.skip("Triton has no kernels for latent tails")
    check_tails(ops, rng, dtype, value_dim)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_tokens_go_into_their_tails(ops: Ops, dtype, latent: bool, bad: float | None, rng: torch.Generator) -> None:
    check_append(ops, rng, dtype, latent, bad)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_experts_go_into_their_tails(ops: Ops, dtype: torch.dtype, rng: torch.Generator) -> None:
    check_experts(ops, rng, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_packed_partials_are_merged_into_the_models_type(ops: Ops, dtype: torch.dtype, rng: torch.Generator) -> None:
    check_merge(ops, rng, dtype)
    check_rounding(ops, rng, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_flags_of_several_layers(ops: Ops, codec: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    check_flags(ops, rng, codec, dtype)


def test_lists_are_those_of_the_table(rng: torch.Generator) -> None:
    """`dense` gives what the table says it has."""
    table = PageTable(3, num_formats=2)
    rows, units = np.repeat([0, 4], 150), np.tile(np.arange(3), 100)
    slots: Tensor = torch.randint(1, 999, (300,), generator=rng)
    table.append(rows, units, np.ones(300, np.int64), np.arange(300), slots.numpy())
    dense, counts = table.lists(np.array([4, -1, 0, 2]), 1).at(2 * 2 + 1).dense()
    assert counts.tolist() == [50, 0, 50, 0]
    for i, row in ((0, 4), (2, 0)):
        assert dense[i, :50].tolist() == slots.numpy()[(rows == row) & (units == 2)].tolist()


def test_ops_have_fake_forms() -> None:
    """A decode layer can be followed without memory and kernels."""
    layout = KERNEL_CODECS["int8"].layout(2, DIM, PAGE, torch.bfloat16)
    ops = importlib.import_module("pikv_ds.ops.cpp_ops")
    with FakeTensorMode():
        ints = {"dtype": torch.int32}
        key, tail = torch.zeros(3, 2, DIM, dtype=torch.bfloat16), torch.zeros(5, 2, PAGE, DIM, dtype=torch.bfloat16)
        query, places = torch.zeros(3, HEADS, DIM, dtype=torch.bfloat16), torch.zeros(3, 3, **ints)
        ops.append_tokens(key, key, places, tail, tail.clone(), torch.zeros(1, **ints))
        ops.append_experts(torch.zeros(3, 2, dtype=torch.int64), places, torch.zeros(5, PAGE, 2, dtype=torch.int16))
        partials = Partials(torch.zeros(2, 3, HEADS * (DIM + 1)), HEADS)
        ops.tail_attention(query, tail, tail, places[2], 0.2, partials.outs[1], partials.lses[1], places[1])
        ops.seal_pages(tail, tail, layout, torch.zeros(5, layout.page_bytes, dtype=torch.uint8), None, places[0, :1])
        table = torch.zeros(3, 8, **ints)
        torch.ops.pikv_ds.decode_attention(
            *(query, places[0].long(), 8, layout.page_bytes, table, places[0], layout.code, 2, PAGE, 0, 0.2),
            *(partials.outs[0], partials.lses[0], None, 1, None),
        )
        out = query.new_empty(3, HEADS, DIM)
        ops.merge_partials(partials.outs, partials.lses, out, None)
        assert isinstance(out, FakeTensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 4}, r"first \+ \(heads - 1\) \* step must be below lists = 4, got 4"),
        ({"heads": 0}, "heads must be from 1"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "query rows must be a multiple of table rows = 3, got 2"),
        ({"directories": torch.zeros(5, 3, dtype=torch.int32)}, r"directories must have shape \[rows, 2\] = \[5, 2\]"),
        ({"counts": torch.zeros(20, dtype=torch.int32)}, r"counts must have 2 dimensions \[rows, lists\]"),
    ],
)
def test_wrong_lists_are_refused(change: dict[str, Any], message: str) -> None:
    ints = {"dtype": torch.int32}
    layout = KERNEL_CODECS["none"].layout(1, DIM, PAGE, torch.float32)
    fields = {
        "slots": torch.zeros(32, **ints),
        "counts": torch.zeros(5, 4, **ints),
        "directory": torch.zeros(9, **ints),
    }
    fields |= {"directories": torch.zeros(5, 2, **ints), "rows": torch.zeros(2, **ints), "width": 1}
    slabs = Slabs.of(torch.zeros(2, layout.page_bytes, dtype=torch.uint8))
    out, lse = torch.empty(2, 2, DIM), torch.empty(2, 2)
    query = torch.zeros(2, 2, DIM)
    with pytest.raises(RuntimeError, match=message):
        Ops("cpp").decode_attention(query, slabs, PageLists(**(fields | change)), None, layout, 1.0, out, lse)


def test_tails_that_are_parts_of_others_are_refused() -> None:
    keys, places = torch.zeros(2, 2, DIM), torch.zeros(3, 1, dtype=torch.int32)
    tails = torch.zeros(4, 3, 2, PAGE, DIM)[:, 0]
    with pytest.raises(RuntimeError, match="append_tokens: tail_keys must be contiguous"):
        Ops("cpp").append_tokens(keys, None, places, tails, None, torch.zeros(1, dtype=torch.int32))
