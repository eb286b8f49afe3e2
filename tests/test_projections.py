"""Low-rank pages: attention on coefficients equals attention on the projected keys and values."""

from __future__ import annotations

import pytest
import torch
from passes import KERNEL_CODECS as CODECS
from torch import Tensor

from pikv_ds.ops import Ops
from pikv_ds.ops.projections import Projections, hadamard
from pikv_ds.slabs import Slabs

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 8, 2, 64, 8, 6


def bases(rank: int, rng: torch.Generator) -> Tensor:
    """Random orthonormal columns ``[K, D, rank]``."""
    return torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=rng))[0][..., :rank].contiguous()


def dense(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 attention of ``[R, H, D]`` over pages ``[N, K, S, D]``."""
    k, v = (x.transpose(0, 1).flatten(1, 2).double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (keys, values))
    scores = torch.einsum("rhd,hnd->rhn", query.double(), k) * HEAD_DIM**-0.5
    return torch.einsum("rhn,hnd->rhd", scores.softmax(-1), v), scores.logsumexp(-1)


def attend(ops: Ops, projections: Projections, rank: int, codec: str, inputs: tuple) -> tuple[Tensor, Tensor]:
    query, keys, values = inputs
    layout = CODECS[codec].layout(KV_HEADS, rank, PAGE_SIZE, keys.dtype)
    pages = torch.full((NUM_PAGES + 1, layout.page_bytes), 255, dtype=torch.uint8)
    flag = torch.zeros(1, dtype=torch.int32)
    ops.seal_pages(*projections.encode(keys, values), layout, pages[1:], None, flag)
    assert not flag
    inner, lse = torch.full((*query.shape[:2], rank), torch.nan), torch.full(query.shape[:2], torch.nan)
    table = torch.arange(1, NUM_PAGES + 1, dtype=torch.int32).expand(len(query), -1).contiguous()
    counts = torch.full((len(query),), NUM_PAGES, dtype=torch.int32)
    asked = projections.query(query).contiguous()
    ops.decode_attention(asked, Slabs.of(pages), table, counts, layout, HEAD_DIM**-0.5, inner, lse)
    return projections.output(inner), lse


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_attention_on_coefficients_is_attention_on_projections(ops: Ops, rank: int, rng) -> None:
    query = torch.randn(3, HEADS, HEAD_DIM, generator=rng)
    keys, values = torch.randn(2, NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM, generator=rng).unbind(0)
    projections = Projections.of_bases(bases(rank, rng), bases(rank, rng))
    out, lse = attend(ops, projections, rank, "none", (query, keys, values))
    rebuilt = [
        x @ (b @ b.transpose(1, 2)) for x, b in ((keys, projections.key_read), (values, projections.value_read))
    ]
    expected, expected_lse = dense(query, *rebuilt)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    if rank == HEAD_DIM:  # then nothing is lost
        torch.testing.assert_close(out.double(), dense(query, keys, values)[0], atol=1e-5, rtol=1e-5)


def test_keys_and_values_of_low_rank_lose_nothing_and_codecs_stack(ops: Ops, rng) -> None:
    query = torch.randn(3, HEADS, HEAD_DIM, generator=rng)
    projections = Projections.of_bases(bases(16, rng), bases(16, rng))
    keys, values = (
        torch.randn(NUM_PAGES, KV_HEADS, PAGE_SIZE, 16, generator=rng) @ b.transpose(1, 2)
        for b in (projections.key_read, projections.value_read)
    )
    expected, _ = dense(query, keys, values)
    errors = {
        c: float((attend(ops, projections, 16, c, (query, keys, values))[0] - expected).abs().max())
        for c in ("none", "int8", "int4", "int2")
    }
    assert errors["none"] < 1e-5 < errors["int8"] < errors["int4"] < errors["int2"]


@pytest.mark.parametrize("size", [16, 64, 80, 96, 3, 128])
def test_rotations_are_orthogonal_and_spread_outliers(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    outlier = torch.zeros(size)
    outlier[size // 2] = 1
    even = (size & -size) ** -0.5
    assert (outlier @ matrix).abs().max() <= even + 1e-6


def test_what_is_encoded_and_read_differently_is_a_correction(rng) -> None:
    """Encoding as it is and reading with a correction equals correcting the keys themselves."""
    eye = torch.eye(HEAD_DIM).expand(KV_HEADS, -1, -1)
    correction = torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=rng) * 0.1 + eye
    query = torch.randn(3, HEADS, HEAD_DIM, generator=rng)
    keys, values = torch.randn(2, NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM, generator=rng).unbind(0)
    projections = Projections(eye, correction, eye, correction)
    out, _ = attend(Ops("reference"), projections, HEAD_DIM, "none", (query, keys, values))
    corrected = (x @ correction.transpose(1, 2) for x in (keys, values))
    torch.testing.assert_close(out.double(), dense(query, *corrected)[0], atol=1e-5, rtol=1e-5)
