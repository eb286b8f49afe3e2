"""Pages of any integers, with scales of a byte and narrowed ranges, written and read by the compiled kernels."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from test_seal import DTYPES, difficult, seal
from torch import Tensor

from pikv_ds.layout import BITS, PageLayout, SealFlag
from pikv_ds.ops import Ops, reference, why_missing
from pikv_ds.policies.codecs import Codec
from pikv_ds.slabs import Slabs

pytestmark = [
    pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no compiled ops"),
    pytest.mark.sampled(together=2),
]

CODECS = [
    Codec("int3"),
    Codec("int1"),
    Codec("int4", values="int2"),
    Codec("int8", values="int3"),
    Codec("int2", values="int1", scales=8),
    Codec("int3", clip=True, scales=8),
    Codec("int8", values="int4", scales=8),
]
SEALED = [*CODECS, *(Codec(name, clip=True) for name in ("int8", "int4", "int2", "int1")), Codec("int4", scales=8)]
"""Those that are packed ones to `seal_pages` at least."""
PLAIN = Ops("reference")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels of a device, on which tensors are made."""
    if missing := why_missing("cpp", request.param):
        pytest.skip(missing)
    with torch.device(request.param):
        yield "cpp"


def kernels(layout: PageLayout | None = None) -> Ops:
    return Ops("cpp", torch.get_default_device().type, layout)


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
def test_kernels_read_what_the_reference_reads(codec: Codec, head_dim: int, per_head: bool, backend: str, rng) -> None:
    layout = codec.layout(2, head_dim, 16, torch.float32)
    ops = kernels(layout)
    assert layout.packed
    assert ops.implementation("decode_attention") == ops.implementation("key_scores") == "cpp"
    slabs, rows, pages, heads = sealed(layout, 40, rng), 3, 12, 6
    query = torch.randn(rows * 2, heads, head_dim, generator=rng)
    table = torch.stack([torch.randperm(40, generator=rng, device=rng.device)[:pages] + 1 for _ in range(rows)]).int()
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
def test_prompts_meet_packed_pages(codec: Codec, backend: str, rng) -> None:
    layout = codec.layout(2, 64, 32, torch.bfloat16)
    ops, slabs = kernels(layout), sealed(codec.layout(2, 64, 32, torch.bfloat16), 70, rng)
    query = torch.randn(50, 6, 64, generator=rng).bfloat16()
    slots = (torch.randperm(70, generator=rng, device=rng.device)[:65] + 1).int()
    got, expected = ([torch.empty(50, 6, 64), torch.empty(50, 6)] for _ in range(2))
    ops.prefill_attention(query, slabs, slots, layout, 0.125, *got)
    PLAIN.prefill_attention(query, slabs, slots, layout, 0.125, *expected)
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair, atol=1e-2, rtol=1e-2)  # bfloat16 queries


def test_a_page_reads_the_same_whether_its_bits_are_known_or_unpacked(backend: str, rng) -> None:
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
            kernels().decode_attention(query, slabs, table, counts, kind, 0.125, out, lse)
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

    def call(code: int, head_dim: int = 64, latent_dim: int = 0) -> None:
        query = torch.zeros(1, 4, head_dim)
        pages = slabs.pointers, slabs.slab_rows, slabs.row_bytes
        op(query, *pages, counts[None], counts, code, 2, 32, latent_dim, 1.0, out, lse, None, 1, None)

    call(layout.code)
    with pytest.raises(RuntimeError, match="packed elements must have 1, 2, 3, 4 or 8 bits, got 5"):
        call(4 | 5 << 8 | 3 << 16)
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of the 8 elements in a byte, got 12"):
        call(layout.code, 12)
    with pytest.raises(RuntimeError, match="unpacked to int8"):
        call(5 | 3 << 8 | 3 << 16)
    with pytest.raises(RuntimeError, match="packed pages cannot be latent ones"):
        call(layout.code, latent_dim=48)
    assert not Codec("fp8", values="int4").layout(2, 64, 32, torch.float32).packed


# -- sealing -----------------------------------------------------------------------------------


def sealer(layout: PageLayout) -> Ops:
    ops = kernels(layout)
    assert ops.implementation("seal_pages") == "cpp"
    return ops


@pytest.mark.parametrize("codec", SEALED, ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
def test_bytes_are_those_of_the_reference(codec: Codec, dtype: torch.dtype, head_dim: int, backend: str, rng) -> None:
    for page_size, kv_heads in ((1, 2), (8, 3), (16, 1), (24, 2)):
        keys, values = (difficult((9, kv_heads, page_size, head_dim), dtype, rng) for _ in range(2))
        layout = codec.layout(kv_heads, head_dim, page_size, dtype)
        expected = seal(None, keys, values, layout)
        assert seal(sealer(layout), keys, values, layout) == expected
        if codec.scales == 16:  # a byte stands for scales of up to 235
            assert not expected.flags.any()
        assert not expected.flags & SealFlag.NON_FINITE


@pytest.mark.parametrize("codec", SEALED, ids=lambda c: c.label)
def test_latent_pages_and_nonfinite_input(codec: Codec, backend: str, rng) -> None:
    keys, values = torch.randn(2, 3, 2, 16, 40, generator=rng).bfloat16().unbind(0)
    if codec.values is None and codec.clip and codec.scales == 16 and codec.name not in ("int3", "int1"):
        latent = codec.layout(2, 40, 16, torch.bfloat16, latent_dim=32)
        assert seal(sealer(latent), keys, None, latent) == seal(None, keys, None, latent)
    layout = codec.layout(2, 40, 16, torch.bfloat16)
    clean = seal(None, keys, values, layout)
    for x in (keys, values):
        for bad in (torch.nan, torch.inf, -torch.inf):
            before = x[1, 0, 3, 17].item()
            x[1, 0, 3, 17] = bad
            flagged = seal(sealer(layout), keys, values, layout)
            assert flagged.flags.item() == 1
            assert torch.equal(flagged.pages[::2], clean.pages[::2])
            x[1, 0, 3, 17] = before


@pytest.mark.parametrize("codec", SEALED, ids=lambda c: c.label)
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("clip", [False, True])
def test_what_scales_cannot_hold_is_flagged(codec: Codec, which: str, clip: bool, backend: str, rng) -> None:
    """Whether the whole range fits decides, also where a narrower one might be taken."""
    layout = dataclasses.replace(codec, clip=clip).layout(2, 64, 16, torch.float32)
    element = layout.element if which == "keys" else layout.value_element or layout.element
    levels = 2 ** BITS[element] - 1
    upper = (torch.arange(16)[:, None] + torch.arange(64)) % 2 == 0  # every channel and every token has both ends
    found = set()
    for size, signs in itertools.product((100.0, 2e3, 5e4, 3e5, 1e6, 3e7, 3e38), ((0, 1), (-1, 0), (-1, 1))):
        low, high = (sign * size for sign in signs)
        if codec.scales == 16:
            fits = low >= -65504 and (high - low) / levels <= 65504
        else:
            fits = max((high - low) / levels, size / 24) <= 2**7.9375
        x = torch.rand(2, 2, 16, 64, generator=rng)
        y = x.clone()
        x[1, 1] = torch.where(upper, high, low)
        pair = (x, y)[:: 1 if which == "keys" else -1]
        for ops in (None, sealer(layout)):
            assert seal(ops, *pair, layout).flags.item() == (0 if fits else SealFlag.BEYOND_RANGE), (low, high)
        found.add(fits)
    assert found == {True, False}


def compare_random_shapes(seconds: float, seed: int) -> int:
    """Seals random shapes of all magnitudes for a while; returns how many."""
    choose, count = random.Random(seed), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codec, dtype = choose.choice(SEALED), choose.choice(DTYPES)
        shape = (choose.randint(1, 9), choose.randint(1, 4), choose.randint(1, 70), 8 * choose.randint(1, 20))
        rng = torch.Generator().manual_seed(choose.getrandbits(30))
        size = 2.0 ** choose.uniform(-24, 20)  # every byte of a scale, and what is beyond any scale
        keys, values = ((difficult(shape, torch.float32, rng) * size).to(dtype) for _ in range(2))
        layout = codec.layout(shape[1], shape[3], shape[2], dtype)
        ours, expected = seal(sealer(layout), keys, values, layout), seal(None, keys, values, layout)
        assert torch.equal(ours.flags, expected.flags), (codec, dtype, shape, size)
        assert ours == expected or expected.flags.any(), (codec, dtype, shape, size)
        count += 1
    return count


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_seals_the_same_bytes(isa: str) -> None:
    code = f"from test_packed_pages import *; print(compare_random_shapes(3.0, {random.getrandbits(30)}))"
    environment, here = os.environ | {"PIKV_CPU_ISA": isa}, os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}: {done.stderr}"
    assert int(done.stdout) > 0


def test_a_byte_stands_for_the_nearest_scale(backend: str) -> None:
    """The table that decodes, and the limits that encode, are those of the codec's definition, to the last bit."""
    scales, limits = reference.BYTE_SCALES, reference.BYTE_LIMITS
    definition = torch.exp2((torch.arange(256, device="cpu") / 8 - 24).double()).float()
    assert torch.equal(scales, definition)
    assert (scales < limits).all()
    assert (limits[:-1] < scales[1:]).all()
    below, above = (limits.nextafter(torch.tensor(x, device="cpu")) for x in (0.0, torch.inf))
    steps = torch.cat([limits, below, above, scales]).to(torch.get_default_device())
    # a key channel of two tokens, 0 and 15 steps: int4's step is the one that we want, but for rounding
    keys = (
        torch.stack([torch.zeros_like(steps), steps * 15], dim=1)[:, None, :, None].expand(-1, -1, -1, 8).contiguous()
    )
    layout = Codec("int4", scales=8).layout(1, 8, 2, torch.float32)
    assert seal(sealer(layout), keys, keys, layout) == seal(None, keys, keys, layout)
