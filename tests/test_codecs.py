"""Codecs with options: elements and scales that only the reference knows, rotations, bases from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from passes import SHAPE, Driver, make_cache
from safetensors.torch import save_file
from torch import Tensor

from pikv_ds import ops as ops_module
from pikv_ds.layout import ALIGNMENT, PageLayout
from pikv_ds.ops import Ops, reference
from pikv_ds.policies.codecs import CODECS, Codec

REFERENCE = Ops("reference")


def seal(layout: PageLayout, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they come back."""
    pages = torch.full((len(keys), layout.page_bytes), 255, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    REFERENCE.seal_pages(keys, values, layout, pages, None, flag)
    assert not flag
    return reference.unseal_pages(pages, layout)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_is_off_by_half_a_step(bits: int, dtype: torch.dtype, rng) -> None:
    keys, values = torch.randn(2, 5, 3, 16, 40, generator=rng).to(dtype).unbind(0)
    decoded_pair = seal(CODECS[f"int{bits}"].layout(3, 40, 16, dtype), keys, values)
    for x, decoded, dim in zip((keys, values), decoded_pair, (2, 3), strict=True):
        step = (x.float().amax(dim, keepdim=True) - x.float().amin(dim, keepdim=True)) / (2**bits - 1)
        assert ((decoded - x.float()).abs() <= step * 0.502 + 2e-3).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scales_of_eight_bits_cost_little(bits: int, rng) -> None:
    """A scale is off by at most 2^(1/16), a minimum by an eighth of a step."""
    x = torch.randn(5, 2, 32, 64, generator=rng) + 0.5
    layout = Codec(f"int{bits}", scales=8).layout(2, 64, 32, torch.float32)
    decoded = seal(layout, x, x)
    for got, dim in zip(decoded, (2, 3), strict=True):
        step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1) * 2 ** (1 / 16)
        assert ((got - x).abs() <= step * (0.5 + 0.125 + (2**bits - 1) * 0.045)).all()
    wide = CODECS[f"int{bits}"].layout(2, 64, 32, torch.float32)
    assert wide.page_bytes - layout.page_bytes == 2 * 2 * (64 + 32)


def test_eight_bit_minima_reach_values_far_from_zero(rng) -> None:
    x = torch.randn(2, 1, 32, 64, generator=rng) * 0.1 + torch.randn(64, generator=rng) * 20
    keys, _ = seal(Codec("int4", scales=8).layout(1, 64, 32, torch.float32), x, x)
    spread = torch.maximum(x.amax(2, keepdim=True) - x.amin(2, keepdim=True), x.abs().amax(2, keepdim=True) / 24 * 15)
    assert ((keys - x).abs() <= spread / 15 * 1.5).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_clipping_never_makes_the_squared_error_larger(bits: int, rng) -> None:
    x = torch.randn(6, 2, 32, 64, generator=rng)
    plain, clipped = (
        seal(Codec(f"int{bits}", clip=clip).layout(2, 64, 32, torch.float32), x, x) for clip in (False, True)
    )
    for a, b, dim in zip(plain, clipped, (2, 3), strict=True):
        before, after = ((y - x).square().sum(dim) for y in (a, b))
        assert (after <= before * (1 + 1e-5)).all()
        assert bits > 2 or after.sum() < 0.8 * before.sum()


def test_keys_and_values_of_their_own_elements(rng) -> None:
    x = torch.randn(4, 2, 16, 32, generator=rng)
    layout = Codec("int8", values="int2").layout(2, 32, 16, torch.float32)
    both = CODECS["int8"].layout(2, 32, 16, torch.float32), CODECS["int2"].layout(2, 32, 16, torch.float32)
    keys, values = seal(layout, x, x)
    assert torch.equal(keys, seal(both[0], x, x)[0])
    assert torch.equal(values, seal(both[1], x, x)[1])
    assert layout.page_bytes == both[0].value_offset + both[1].page_bytes - both[1].value_offset
    assert layout.page_bytes % ALIGNMENT == 0


def test_kernels_take_what_they_know_and_no_more(caplog) -> None:
    if ops_module.why_missing("cpp", "cpu") is not None:
        pytest.skip("no compiled ops")
    for codec, slow in (
        (Codec("int4", rotate=True), ()),
        (Codec("int2", clip=True), ()),
        (Codec("int3"), ()),  # unpacked to int8 as they are read
        (Codec("int4", values="int2"), ()),
        (Codec("int4", scales=8), ()),
        (Codec("fp8", values="int4"), ops_module.READ_PAGES),
    ):
        layout = codec.layout(2, 64, 32, torch.float32)
        ops = Ops("auto", layout=layout)
        plain = {op for op in ops_module.OPS if Ops("auto").implementation(op) == "reference"}
        assert {op for op in ops_module.OPS if ops.implementation(op) == "reference"} == plain | set(slow)
        if slow:
            with pytest.raises(ValueError, match="no kernels for pages of this codec"):
                Ops("cpp", layout=layout)


@pytest.mark.parametrize("lookup", ["exact", {"name": "quest", "budget": 1}])
def test_rotated_pages_give_the_same_attention(lookup: Any, rng) -> None:
    cache = make_cache(codec={"name": "none", "rotate": True}, lookup=lookup)
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in (19, 1, 1, 12, 1, 21, *[1] * 9):
        driver.step(width)
    assert cache.shard.counters["pages_in_scope"] > 0


def test_rotation_helps_where_a_channel_is_an_outlier(rng) -> None:
    x = torch.randn(4, 2, 32, 64, generator=rng)
    x[..., 5] *= 20
    errors = []
    for codec in (Codec("int4"), Codec("int4", rotate=True)):
        bases = codec.bases(1, 2, 64, torch.device("cpu"))
        encoded = bases[0].encode(x, x) if bases else (x, x)
        _, values = seal(codec.layout(2, 64, 32, torch.float32), *encoded)
        errors.append(float(((values @ bases[0].value_read.transpose(1, 2) if bases else values) - x).norm()))
    assert errors[1] < 0.7 * errors[0]


def bases_file(path: Path, rank: int, value_rank: int, layers: int = SHAPE.num_layers) -> str:
    eye = torch.eye(SHAPE.head_dim).expand(SHAPE.num_kv_heads, -1, -1)
    save_file(
        {
            f"{layer}.{name}": eye[..., : rank if "key" in name else value_rank].contiguous()
            for layer in range(layers)
            for name in ("key_encode", "key_read", "value_encode", "value_read")
        },
        path,
    )
    return str(path)


def test_bases_from_a_file(tmp_path: Path, rng) -> None:
    path = bases_file(tmp_path / "bases.safetensors", 16, 16)
    cache = make_cache(codec={"name": "none", "projections": path})
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in (19, 1, 12, *[1] * 9):
        driver.step(width)
    assert make_cache(codec={"name": "none", "projections": path}).layout.page_bytes == make_cache().layout.page_bytes
    narrow = make_cache(codec={"name": "none", "projections": bases_file(tmp_path / "b.safetensors", 8, 12)})
    assert narrow.layout.page_bytes == make_cache().layout.page_bytes * 20 // 32
    narrow.begin_step(batch := narrow.new_batch(1), [24])
    x = torch.randn(24, 4, 16, generator=rng)
    assert narrow.attend(batch, 0, x, x[:, :2], x[:, :2], 0.25).shape == (24, 4, 16)


@pytest.mark.parametrize(
    ("rank", "layers", "found"), [(8, 1, r"layer 1 has \[None, None, None, None\]"), (8, 2, None)]
)
def test_bases_of_another_model_are_refused(tmp_path: Path, rank: int, layers: int, found: str | None) -> None:
    path = bases_file(tmp_path / "bases.safetensors", rank, rank, layers)
    if found is not None:
        with pytest.raises(ValueError, match=found):
            Codec("none", projections=path).bases(2, 2, 16, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"this model wants \[3, 16, rank\]"):
        Codec("none", projections=path).bases(2, 3, 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="pikv calibrate"):
        Codec("none", projections=str(tmp_path / "nowhere")).bases(2, 3, 16, torch.device("cpu"))


def test_latent_pages_refuse_what_does_not_fit() -> None:
    for codec in (Codec("int4", rotate=True), Codec("int4", values="int2"), Codec("int4", projections="x")):
        with pytest.raises(ValueError, match="latent pages"):
            codec.layout(1, 40, 16, torch.float32, latent_dim=32)
