"""`seal_pages`: every backend, instruction set and number of threads writes the reference's bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from passes import KERNEL_CODECS as CODECS
from torch import Tensor

from pikv_ds.layout import PageLayout, SealFlag
from pikv_ds.ops import Ops, reference, why_missing

pytestmark = pytest.mark.sampled(together=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNTOUCHED = 0xAB

codecs = pytest.mark.parametrize("codec", CODECS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_cpp = pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason=str(why_missing("cpp", "cpu")))


@dataclass
class Sealed:
    pages: Tensor
    bounds: Tensor
    flags: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sealed) and all(
            torch.equal(a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        )


def seal(ops: Ops | None, keys: Tensor, values: Tensor | None, layout: PageLayout) -> Sealed:
    """With an op set, or with the reference (None)."""
    n = len(keys)
    pages = torch.full((n, layout.page_bytes), UNTOUCHED, dtype=torch.uint8)
    bounds = torch.full((n, layout.bounds_bytes), UNTOUCHED, dtype=torch.uint8)
    flags = torch.zeros(1, dtype=torch.int32)
    (ops or reference).seal_pages(keys, values, layout, pages, bounds, flags)
    return Sealed(pages, bounds, flags)


def layout_of(keys: Tensor, codec: str) -> PageLayout:
    _, kv_heads, page_size, head_dim = keys.shape
    return CODECS[codec].layout(kv_heads, head_dim, page_size, keys.dtype)


def difficult(shape: tuple[int, int, int, int], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Keys or values ``[N, K, S, D]`` as models have them, and as no model has them."""
    x = torch.randn(shape, generator=rng)
    x[..., torch.randperm(shape[-1], generator=rng)[:2]] *= 20  # channels with outliers
    pages = list(x)
    for page, change in zip(
        pages,
        (
            lambda p: p.mul_(1e-6),  # scales that are subnormal in float16
            lambda p: p.zero_(),
            lambda p: p.sign_().mul_(torch.rand(p.shape, generator=rng) < 0.5),  # ties; zeros of both signs
            lambda p: p.add_(1000),
            lambda p: p.mul_(1e-3).sub_(1),
            lambda p: p.mul_(300),
            lambda p: p.round_().mul_(0.5),
        ),
        strict=False,
    ):
        change(page)
    return x.to(dtype)


@codecs
@dtypes
@pytest.mark.parametrize("head_dim", [20, 64, 80, 128])
def test_bytes_are_those_of_the_reference(ops: Ops, codec: str, dtype: torch.dtype, head_dim: int, rng) -> None:
    for page_size, kv_heads in ((8, 3), (16, 1), (24, 2), (64, 2)):
        keys, values = (difficult((9, kv_heads, page_size, head_dim), dtype, rng) for _ in range(2))
        layout = layout_of(keys, codec)
        expected = seal(None, keys, values, layout)
        assert seal(ops, keys, values, layout) == expected
        assert not expected.flags.any()


@codecs
@dtypes
def test_strided_inputs_and_rows_within_longer_rows(ops: Ops, codec: str, dtype: torch.dtype, rng) -> None:
    n, kv_heads, page_size, head_dim = 5, 2, 8, 40
    # keys: pages cut out of one sequence [K, tokens, D]; values: misaligned, with gaps between tokens
    sequence = difficult((1, kv_heads, n * page_size, head_dim), dtype, rng)[0]
    keys = sequence.view(kv_heads, n, page_size, head_dim).transpose(0, 1)
    loose = torch.full((n * kv_heads * page_size * (head_dim + 3) + 1,), torch.nan, dtype=dtype)
    values = loose[1:].view(n, kv_heads, page_size, head_dim + 3)[..., :head_dim]
    values.copy_(difficult((n, kv_heads, page_size, head_dim), dtype, rng))
    layout = layout_of(keys, codec)
    split = layout.page_bytes
    # as pages are sent: each page followed by its bounds, here at odd addresses
    payload = torch.full((n, 3 + split + layout.bounds_bytes + 2), UNTOUCHED, dtype=torch.uint8)
    pages, bounds = payload[:, 3 : 3 + split], payload[:, 3 + split : -2]
    flags = torch.zeros(1, dtype=torch.int32)
    ops.seal_pages(keys, values, layout, pages, bounds, flags)
    assert Sealed(pages, bounds, flags) == seal(None, keys.contiguous(), values.contiguous(), layout)
    assert (payload[:, :3] == UNTOUCHED).all()
    assert (payload[:, -2:] == UNTOUCHED).all()


@codecs
def test_the_same_token_for_all(ops: Ops, codec: str, rng) -> None:
    """Strides of zero."""
    keys = torch.randn(1, 2, 1, 64, generator=rng).bfloat16().expand(3, 2, 16, 64)
    layout = layout_of(keys, codec)
    assert seal(ops, keys, keys, layout) == seal(None, keys.contiguous(), keys.contiguous(), layout)


@codecs
@dtypes
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_latent_pages_are_the_keys_of_ordinary_ones(name: str, codec: str, dtype: torch.dtype, rng) -> None:
    if missing := None if name == "reference" else why_missing(name, "cpu"):
        pytest.skip(missing)
    keys = difficult((9, 2, 16, 40), dtype, rng)
    ordinary = layout_of(keys, codec)
    latent = CODECS[codec].layout(2, 40, 16, dtype, latent_dim=32)
    ops = Ops(name, layout=latent)
    expected, sealed = seal(None, keys, keys, ordinary), seal(ops, keys, None, latent)
    assert latent.page_bytes == ordinary.value_offset
    assert torch.equal(sealed.pages, expected.pages[:, : latent.page_bytes])
    assert torch.equal(sealed.bounds, expected.bounds)
    decoded_keys, decoded_values = reference.unseal_pages(sealed.pages, latent)
    assert torch.equal(decoded_keys, reference.unseal_pages(expected.pages, ordinary)[0])
    assert torch.equal(decoded_values, decoded_keys[..., :32])
    keys[4, 1, 3, 35] = torch.inf
    assert seal(ops, keys, None, latent).flags.item() == 1


@pytest.mark.parametrize("latent_dim", [0, -1, 41])
def test_a_latent_that_no_key_can_hold_is_refused(latent_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"latent_dim = {latent_dim}: .* use 1 to 40"):
        CODECS["none"].layout(1, 40, 16, torch.float32, latent_dim)


def test_nothing_to_seal_and_no_bounds(ops: Ops, rng) -> None:
    keys = torch.randn(2, 1, 8, 64, generator=rng)
    layout = layout_of(keys, "int4")
    assert not seal(ops, keys[:0], keys[:0], layout).flags.any()
    pages, flags = torch.empty(2, layout.page_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    ops.seal_pages(keys, keys, layout, pages, None, flags)
    assert torch.equal(pages, seal(None, keys, keys, layout).pages)


# -- what cannot be stored ---------------------------------------------------------------------


@codecs
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_flagged_and_stay_within_their_page(
    ops: Ops, codec: str, dtype: torch.dtype, bad: float, rng
) -> None:
    clean_keys, clean_values = torch.randn(2, 3, 2, 8, 36, generator=rng).to(dtype).unbind(0)
    layout = layout_of(clean_keys, codec)
    clean = seal(None, clean_keys, clean_values, layout)
    for which in (0, 1):
        for place in ((1, 0, 0, 0), (1, 1, 7, 35), (1, 0, 3, 17)):
            keys, values = clean_keys.clone(), clean_values.clone()
            (keys, values)[which][place] = bad
            sealed = seal(ops, keys, values, layout)
            assert sealed.flags.item() == 1
            for page in (0, 2):
                assert torch.equal(sealed.pages[page], clean.pages[page])
                assert torch.equal(sealed.bounds[page], clean.bounds[page])


@codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_float16_scales_cannot_hold_is_flagged(ops: Ops, codec: str, dtype: torch.dtype, which: str, rng) -> None:
    for low, high, bits in (
        (-70000.0, 0.0, (8, 4, 2)),  # the minimum
        (0.0, 3e5, (2,)),  # the scale of int2, not those of finer codes
        (0.0, 2e6, (4, 2)),
        (0.0, 3e7, (8, 4, 2)),
        (66000.0, 70000.0, ()),  # the minimum is rounded down to 65504
        (-3e38, 3e38, (8, 4, 2)),  # their difference is infinite in float32
    ):
        x = torch.rand(2, 2, 8, 64, generator=rng) * 0.5
        y = x.clone()
        x[0, 0] = torch.where(x[0, 0] < 0.25, low, high)
        keys, values = (x.to(dtype), y.to(dtype))[:: 1 if which == "keys" else -1]
        layout = layout_of(keys, codec)
        flags = SealFlag(seal(ops, keys, values, layout).flags.item())
        beyond = layout.bits in bits if codec.startswith("int") else codec == "fp8" and high >= 3e7
        assert flags == (SealFlag.BEYOND_RANGE if beyond else 0), (low, high)


@codecs
def test_what_is_finite_and_what_is_not_are_told_apart(ops: Ops, codec: str, rng) -> None:
    clean = torch.rand(3, 2, 8, 64, generator=rng)
    layout = layout_of(clean, codec)
    large, broken = clean.clone(), clean.clone()
    large[1, 0, 3, 5] = 1e30
    broken[2, 1, 7, 9] = torch.nan
    both = large.clone()
    both[1, 0, 3, 6] = torch.inf  # in the same page and head: whether the rest fits is not asked
    beyond = SealFlag.BEYOND_RANGE if layout.scale_rows else SealFlag(0)
    for keys, values, expected in (
        (clean, large, beyond),
        (broken, large, beyond | SealFlag.NON_FINITE),
        (large, broken, beyond | SealFlag.NON_FINITE),
        (both, clean, SealFlag.NON_FINITE),
        (clean, both, SealFlag.NON_FINITE),
    ):
        assert seal(ops, keys, values, layout).flags.item() == expected


def test_flags_once_set_stay(ops: Ops, rng) -> None:
    keys = torch.randn(1, 1, 8, 64, generator=rng)
    layout = layout_of(keys, "int8")
    pages, flags = torch.empty(1, layout.page_bytes, dtype=torch.uint8), torch.full([1], 8, dtype=torch.int32)
    ops.seal_pages(keys, keys, layout, pages, None, flags)
    assert flags.item() == 8
    ops.seal_pages(keys * 1e30, keys, layout, pages, None, flags)
    assert flags.item() == 8 | SealFlag.BEYOND_RANGE
    ops.seal_pages(keys, keys * torch.inf, layout, pages, None, flags)
    assert flags.item() == 8 | SealFlag.BEYOND_RANGE | SealFlag.NON_FINITE


# -- other ways to the same bytes --------------------------------------------------------------


def compare_random_shapes(ops: Ops, seconds: float, seed: int) -> int:
    """Seals random shapes for a while; returns how many."""
    choose, count = random.Random(seed), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codec, dtype = choose.choice(list(CODECS)), choose.choice(DTYPES)
        shape = (choose.randint(1, 9), choose.randint(1, 4), choose.randint(1, 70), 4 * choose.randint(1, 40))
        rng = torch.Generator(torch.get_default_device()).manual_seed(choose.getrandbits(30))
        keys, values = (difficult(shape, dtype, rng) for _ in range(2))
        layout = layout_of(keys, codec)
        assert seal(ops, keys, values, layout) == seal(None, keys, values, layout), (codec, dtype, shape)
        count += 1
    return count


def test_random_shapes(fast_ops: Ops) -> None:
    assert compare_random_shapes(fast_ops, seconds=2.0, seed=1) > 0


@needs_cpp
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = "from test_seal import *; print(compare_random_shapes(Ops('cpp'), 2.0, seed=2))"
    environment = os.environ | {"PIKV_CPU_ISA": isa}
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@needs_cpp
@codecs
def test_any_number_of_threads(codec: str, rng) -> None:
    keys, values = torch.randn(2, 33, 3, 16, 64, generator=rng).bfloat16().unbind(0)  # large enough for several
    layout, threads = layout_of(keys, codec), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert seal(Ops("cpp"), keys, values, layout) == seal(None, keys, values, layout)
            values[7, 1, 3, 5] = torch.nan
            assert seal(Ops("cpp"), keys, values, layout).flags.item() == 1  # found by one of them
            values[7, 1, 3, 5] = 0.0
    finally:
        torch.set_num_threads(threads)


# -- wrong arguments ---------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 1, 8)}, r"keys must have 4 dimensions \[N, K, S, D\], got shape \[2, 1, 8\]"),
        ({"keys": torch.zeros(2, 3, 8, 16)}, r"keys must have shape \[N, K, S, D\] = \[2, 1, 8, 16\], got \[2, 3, 8"),
        ({"values": torch.zeros(2, 1, 7, 16)}, r"values must have shape .* = \[2, 1, 8, 16\], got \[2, 1, 7, 16\]"),
        ({"values": torch.zeros(2, 1, 8, 16).half()}, "values must be Float, got Half"),
        (
            {"keys": torch.zeros(2, 1, 8, 32)[..., ::2]},
            r"keys must have contiguous rows, .* strides \[256, 256, 32, 2",
        ),
        ({"keys": torch.zeros(2, 1, 8, 16).long()}, "keys must be Float, BFloat16 or Half, got Long"),
        (
            {"out": torch.zeros(2, 7, dtype=torch.uint8)},
            r"out must have shape .* = \[2, 224\], got \[2, 7\]",
        ),
        ({"out": torch.zeros(1, 224, dtype=torch.uint8).expand(2, -1)}, "out must have rows that do not overlap"),
        (
            {"bounds": torch.zeros(3, 128, dtype=torch.uint8)},
            r"bounds must have shape .* = \[2, 128\], got \[3, 128\]",
        ),
        ({"flags": torch.zeros(3, dtype=torch.int32)}, "pages must be a multiple of flags = 3, got 2"),
        ({"flags": torch.zeros(1)}, "flags must be Int, got Float"),
        ({"layout": PageLayout(1, 16, 8, torch.float32, "bfloat16")}, "element must be the type of keys"),
    ],
)
def test_messages_name_the_argument_and_both_sizes(change: dict, message: str) -> None:
    arguments = {
        "keys": torch.zeros(2, 1, 8, 16),
        "values": torch.zeros(2, 1, 8, 16),
        "layout": PageLayout(1, 16, 8, torch.float32, "int4"),
        "out": torch.zeros(2, 224, dtype=torch.uint8),
        "bounds": torch.zeros(2, 128, dtype=torch.uint8),
        "flags": torch.zeros(1, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match="seal_pages: " + message):
        Ops("cpp").seal_pages(**arguments | change)
