"""Attention ops on random shapes for a bounded time, against the reference. Each run has its own seed."""

from __future__ import annotations

import random
import time

import pytest
import torch
from passes import KERNEL_CODECS as CODECS
from torch import Tensor

from pikv_ds.ops import Ops, reference
from pikv_ds.slabs import Slabs

SECONDS = 4.0
REFERENCE = Ops("reference")


@pytest.fixture
def choose() -> random.Random:
    """Choices of this run; the seed is printed where a test fails."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


class Case:
    """Random pages, tables and queries."""

    def __init__(self, choose: random.Random) -> None:
        device = torch.get_default_device()
        rng = torch.Generator(device).manual_seed(choose.getrandbits(32))
        self.dtype = choose.choice([torch.float32, torch.bfloat16, torch.float16])
        self.codec = choose.choice(list(CODECS))
        kv_heads, group = choose.choice([1, 1, 2, 3]), choose.choice([1, 2, 3, 4, 5, 7, 8, 16])
        head_dim = choose.choice([16, 20, 36, 64, 80, 96, 128, 192, 256])
        page_size = choose.choice([1, 2, 8, 16, 17, 32, 64])
        self.layout = CODECS[self.codec].layout(kv_heads, head_dim, page_size, self.dtype)
        num_pages = choose.randint(1, 12)
        keys, values = torch.randn(2, num_pages, kv_heads, page_size, head_dim, generator=rng).unbind(0)
        keys *= torch.where(torch.rand(head_dim, generator=rng) < 0.05, 20.0, 1.0)
        pages = torch.full((num_pages + 1, self.layout.page_bytes), 255, dtype=torch.uint8)  # slot 0 is poison
        flag = torch.zeros(1, dtype=torch.int32)
        REFERENCE.seal_pages(keys.to(self.dtype), values.to(self.dtype), self.layout, pages[1:], None, flag)
        self.slabs = Slabs.of(pages)
        self.rows, self.queries = choose.randint(1, 4), choose.randint(1, 8)
        width = choose.randint(1, 14)
        per_head = choose.random() < 0.4
        shape = (self.rows, kv_heads, width) if per_head else (self.rows, width)
        table = torch.randint(0, num_pages + 1, shape, generator=rng, dtype=torch.int32)
        self.counts = torch.randint(0, width + 1, (self.rows,), generator=rng, dtype=torch.int32)
        beyond = torch.arange(width) >= self.counts[:, None]
        self.table = table.masked_fill(beyond[:, None] if per_head else beyond, 2**30)  # nobody may follow these
        self.num_heads, self.scale = kv_heads * group, head_dim**-0.5
        self.keys, self.values = (x.to(self.dtype).transpose(0, 1).flatten(1, 2) for x in (keys, values))
        self.query = torch.randn(self.rows * self.queries, self.num_heads, head_dim, generator=rng).to(self.dtype)
        self.num_pages, self.page_lse_wanted = num_pages, choose.random() < 0.5
        self.first_query = choose.choice([None, 0, self.keys.shape[1] // 2])
        self.lengths = torch.randint(0, page_size + 1, (len(self.query),), generator=rng, dtype=torch.int32)
        self.tails = torch.randn(2, len(self.query), kv_heads, page_size, head_dim, generator=rng).to(self.dtype)

    def __str__(self) -> str:
        return (
            f"{self.layout} {self.codec} heads {self.num_heads} rows {self.rows} x {self.queries} table "
            f"{tuple(self.table.shape)} counts {self.counts.tolist()} page_lse {self.page_lse_wanted}"
        )

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Room for a partial, full of NaN."""
        return torch.full(self.query.shape, torch.nan), torch.full(self.query.shape[:2], torch.nan)

    def results(self, ops: Ops) -> dict[str, list[Tensor]]:
        """What the ops give."""
        out, lse = self.outputs()
        page_lse = torch.full((*self.query.shape[:2], self.table.shape[-1]), torch.nan)
        wanted = page_lse if self.page_lse_wanted else None
        arguments = (self.query, self.slabs, self.table, self.counts, self.layout, self.scale)
        ops.decode_attention(*arguments, out, lse, wanted)
        results = {"decode": [out, lse, *([page_lse] if self.page_lse_wanted else [])]}
        scores = torch.full_like(page_lse, torch.nan)
        ops.key_scores(*arguments, scores)
        results["key_scores"] = [scores]
        slots = self.table.view(-1, self.table.shape[-1])[0]
        slots = torch.where(slots > self.num_pages, 0, slots)
        out, lse = self.outputs()
        ops.prefill_attention(self.query, self.slabs, slots, self.layout, self.scale, out, lse)
        results["prefill"] = [out, lse]
        out, lse = self.outputs()
        ops.context_attention(self.query, self.keys, self.values, self.scale, self.first_query, out, lse)
        results["context"] = [out, lse]
        out, lse = self.outputs()
        ops.tail_attention(self.query, *self.tails, self.lengths, self.scale, out, lse)
        results["tail"] = [out, lse]
        return results


TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative to the largest result: scores of outlier channels reach a hundred, whose rounding the
exponential multiplies. `test_errors_stay_within_twice_those_of_torch` judges errors exactly."""


def test_random_shapes_of_attention(fast_ops: Ops, choose: random.Random) -> None:
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        case = Case(choose)
        mine, expected = case.results(fast_ops), case.results(REFERENCE)
        for op, tensors in mine.items():
            for actual, wanted in zip(tensors, expected[op], strict=True):
                assert not actual.isnan().any(), f"{op}: NaN in {case}"
                assert torch.equal(actual == -torch.inf, wanted == -torch.inf), f"{op}: other holes in {case}"
                finite = wanted != -torch.inf
                error = (actual - wanted)[finite].abs().max() if bool(finite.any()) else torch.zeros(())
                size = wanted[finite].abs().max().clamp(min=1.0) if bool(finite.any()) else torch.ones(())
                assert float(error / size) <= TOLERANCE[case.dtype], f"{op}: off by {float(error):.2g} in {case}"
        count += 1
    assert count > 0


def test_a_case_that_is_wrong_is_found(choose: random.Random) -> None:
    """The comparison itself can fail: another scale gives other results."""
    case = Case(choose)
    case.counts.fill_(case.table.shape[-1])
    case.table.clamp_(max=case.num_pages)
    case.table[..., 0] = 1
    right = case.results(REFERENCE)["decode"][1]
    case.scale *= 1.5
    assert not torch.allclose(right, case.results(REFERENCE)["decode"][1], atol=1e-3)
    assert reference.decode_attention is Ops("reference").decode_attention
