"""Decoding of whole sequences, pages and tail, against float64 attention on what the pages hold."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops, reference
from pikv_ds.slabs import Slabs
from pikv_ds.tools.bench.attention import codec_of

HUGE = 2**30
"""A table entry that nobody may follow."""
NUM_PAGES = 40
EMPTY, ROW = [], list(range(1, NUM_PAGES + 1))
ROWS = {
    "one long": [ROW],
    "ragged": [ROW[:5], ROW[7:8], EMPTY, ROW[::-1], ROW[9:26]],
    "holes": [[0, 9, 0, 3, 0], [0, 0], ROW[:2], [0, *ROW[:30]]],
    "empty": [EMPTY, EMPTY],
    "many": [ROW[i % 7 : i % 7 + 5 * i % 23] for i in range(33)],
}
"""Slots of each sequence's pages; 0 is a hole."""


@dataclass(frozen=True)
class Case:
    """One call of the ops that a decode step makes of a layer."""

    codec: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    rows: str
    queries: int = 1
    """Per sequence."""
    latent_dim: int | None = None

    @property
    def layout(self) -> PageLayout:
        codec = codec_of(self.codec)
        return codec.layout(self.kv_heads, self.head_dim, self.page_size, self.dtype, self.latent_dim)

    @property
    def name(self) -> str:
        shape = f"{self.heads}/{self.kv_heads}x{self.head_dim} p{self.page_size}"
        latent = f" latent {self.latent_dim}" if self.latent_dim else ""
        queries = f" {self.queries} queries" if self.queries > 1 else ""
        return f"{self.codec} {str(self.dtype).removeprefix('torch.')} {shape}{latent} {self.rows}{queries}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    (BF16, 32, 8, 128, 32, "ragged"),
    (BF16, 32, 8, 128, 64, "one long"),
    (FP16, 16, 1, 256, 64, "holes"),
    (BF16, 14, 2, 64, 16, "many"),
    (FP32, 8, 8, 64, 16, "ragged"),
    (BF16, 6, 2, 96, 8, "holes"),
]
CASES = [
    *(Case(codec, *shape) for codec in ("none", "fp8", "int8", "int4", "int2") for shape in SHAPES),
    *(Case(codec, *SHAPES[0]) for codec in ("int3", "int1", "int3/int2+clip", "int4/int2")),
    Case("int8/int3+scales8", *SHAPES[3]),
    Case("int4", *SHAPES[0], queries=4),
    Case("none", BF16, 16, 1, 576, 32, "ragged", latent_dim=512),
    Case("int4", BF16, 16, 1, 576, 64, "holes", latent_dim=512),
    Case("fp8", BF16, 128, 1, 576, 32, "one long", latent_dim=512),
    Case("int8", BF16, 8, 2, 128, 32, "empty"),
]
"""Forty."""


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention in the query's type: ``[T, H, D]`` over ``[K, N, D]`` and ``[K, N, V]`` gives ``[T, H, V]`` and
    ``[T, H]``. In float64 it is what is right; in less its error is the measure."""
    if not keys.shape[1]:
        return query.new_zeros(*query.shape[:2], values.shape[2]), query.new_full(query.shape[:2], -math.inf)
    grouped = query.unflatten(1, (keys.shape[0], -1)).transpose(0, 1).flatten(1, 2)  # [K, T * G, D]
    scores = (grouped @ keys.to(query.dtype).transpose(1, 2)) * scale
    wide = scores.double() if query.dtype == torch.float64 else scores.float()
    out = torch.softmax(wide, -1).to(query.dtype) @ values.to(query.dtype)
    return tuple(x.unflatten(1, (len(query), -1)).transpose(0, 1).flatten(1, 2) for x in (out, wide.logsumexp(-1)))


def check(case: Case, backend: str, device: torch.device) -> dict[str, Any]:
    """Whether a backend's result is at most twice as far from float64 as torch's own in the same dtype (`judge`).

    Unused slots, the null page and what a tail does not hold yet are NaN; table entries beyond a row's count lead
    nowhere.
    """
    seed = random.SystemRandom().getrandbits(32)
    rng = torch.Generator().manual_seed(seed)
    layout, rows = case.layout, ROWS[case.rows]
    ops = Ops(backend, device.type, layout)
    keys, values = _tokens(layout, NUM_PAGES, rng)
    pages, same = _seal(ops, layout, keys, values, device)
    query = torch.randn(len(rows) * case.queries, case.heads, case.head_dim, generator=rng)
    query = (query * torch.tensor([1.0, 0.1, 3.0]).repeat(len(query))[: len(query), None, None]).to(case.dtype)
    lengths = [n for _, n in zip(rows, itertools.cycle([3, 0, case.page_size - 1, 1]))]
    if case.rows == "empty":
        lengths = [0 for _ in rows]
    tail_keys, tail_values = _tokens(layout, len(rows), rng)
    for row, length in enumerate(lengths):
        tail_keys[row, :, length:] = torch.nan
        if tail_values is not None:
            tail_values[row, :, length:] = torch.nan
    scale = case.head_dim**-0.5
    got = _attend(case, ops, layout, pages, query, (tail_keys, tail_values, lengths), scale, device)
    decoded = reference.unseal_pages(pages[1:].cpu(), layout)
    right, theirs, terms = [], [], 0.0
    for row, slots in enumerate(rows):
        mine = query[row * case.queries : (row + 1) * case.queries]
        tail = tail_keys[row, :, : lengths[row]], layout.values(tail_keys, tail_values)[row, :, : lengths[row]]
        k, v = (
            torch.cat([*(x[slot - 1] for slot in slots if slot), own.float()], dim=1)
            for x, own in zip(decoded, tail, strict=True)
        )
        right.append(attention(mine.double(), k, v, scale))
        theirs.append(attention(mine, k, v, scale))
        if k.shape[1]:
            largest = k.abs().amax(1).repeat_interleave(case.heads // case.kv_heads, 0)
            terms = max(terms, float(torch.einsum("thd,hd->th", mine.float().abs(), largest).max()) * scale)
    expected, measure = ([torch.cat(x).double() for x in zip(*pair, strict=True)] for pair in (right, theirs))
    found = judge(got, expected, measure, terms)
    if not same:
        found["wrong"] = "; ".join(["its pages are not the reference's", *filter(None, [found.get("wrong")])])
    return found | {"ok": "wrong" not in found, "seed": seed}


def judge(got: Sequence[Tensor], expected: Sequence[Tensor], theirs: Sequence[Tensor], terms: float) -> dict[str, Any]:
    """Errors of outputs (rms) and log-sum-exps (largest), their limits, and what is wrong.

    The limits: twice the error of torch's own attention in the query's type, or what
    one rounding of a float32 sum of ``terms`` costs where that is more. Rows that see no key are zeros and -inf.
    """
    blind = expected[1] == -math.inf

    def errors(pair: Sequence[Tensor]) -> tuple[float, float]:
        out, lse = ((x.double() - y)[~blind] for x, y in zip(pair, expected, strict=True))
        return float(out.square().mean().sqrt()) if len(out) else 0.0, float(lse.abs().max()) if len(lse) else 0.0

    least = terms * torch.finfo(torch.float32).eps
    limits = [2 * max(error, least) for error in errors(theirs)]
    wrong = [
        f"{what} off by {error:.2g}, at most {limit:.2g}"
        for what, error, limit in zip(("outputs", "log-sum-exps"), errors(got), limits, strict=True)
        if not error <= limit  # NaN, too
    ]
    if not ((got[0][blind] == 0).all() and (got[1][blind] == -math.inf).all()):
        wrong.append("rows without keys are not 0 and -inf")
    figures = {"errors": [x if math.isfinite(x) else str(x) for x in errors(got)], "limits": limits}
    return figures | ({"wrong": "; ".join(wrong)} if wrong else {})


def _tokens(layout: PageLayout, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Keys ``[num, K, S, D]`` with a few channels 20 times larger, as real ones have them, and values."""
    shape = num, layout.num_kv_heads, layout.page_size, layout.head_dim
    keys = torch.randn(shape, generator=rng)
    keys[..., torch.randperm(layout.head_dim, generator=rng)[: max(2, layout.head_dim // 32)]] *= 20
    latent = layout.latent_dim is not None
    return keys.to(layout.dtype), None if latent else torch.randn(shape, generator=rng).to(layout.dtype)


def _seal(
    ops: Ops, layout: PageLayout, keys: Tensor, values: Tensor | None, device: torch.device
) -> tuple[Tensor, bool]:
    """Pages in slots 1 to N behind a null page of NaN, uint8 ``[1 + N, page_bytes]`` on the device; and whether their
    bytes are the reference's."""
    made = []
    for sealer, place in ((ops, device), (Ops("reference"), torch.device("cpu"))):
        pages = torch.full((len(keys) + 1, layout.page_bytes), 255, dtype=torch.uint8, device=place)
        flag = torch.zeros(1, dtype=torch.int32, device=place)
        k, v = (None if x is None else x.to(place) for x in (keys, values))
        sealer.seal_pages(k, v, layout, pages[1:], None, flag)
        made.append(pages)
    return made[0], torch.equal(made[0].cpu(), made[1])


def _attend(
    case: Case,
    ops: Ops,
    layout: PageLayout,
    pages: Tensor,
    query: Tensor,
    tail: tuple[Tensor, Tensor | None, list[int]],
    scale: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Pages, tail and their merge as `pikv_ds.core.attention` does it: ``[T, H, V]`` and ``[T, H]``, on the CPU."""
    rows = ROWS[case.rows]
    table = torch.full((len(rows), NUM_PAGES + 2), HUGE, dtype=torch.int32)
    for line, slots in zip(table, rows, strict=True):
        line[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
    counts = torch.tensor([len(slots) for slots in rows], dtype=torch.int32, device=device)
    outs = torch.full((2, *query.shape[:2], layout.value_dim), torch.nan, device=device)
    lses = torch.full((2, *query.shape[:2]), torch.nan, device=device)
    query = query.to(device)
    ops.decode_attention(query, Slabs.of(pages), table.to(device), counts, layout, scale, outs[0], lses[0])
    keys, values, lengths = tail
    keys, values, lengths = (
        None if x is None else x.repeat_interleave(case.queries, 0).to(device)
        for x in (keys, values, torch.tensor(lengths, dtype=torch.int32))
    )
    ops.tail_attention(query, keys, layout.values(keys, values), lengths, scale, outs[1], lses[1])
    out, lse = torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], torch.nan)
    ops.merge_partials(outs.flatten(1, 2), lses.flatten(1, 2), out.flatten(0, 1), lse.flatten())
    return out.cpu(), lse.cpu()
