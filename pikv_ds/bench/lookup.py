"""Choosing pages and attending to them, scoring included, against attending to all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pikv_ds.bench.attention import Setting, label, sealed
from pikv_ds.bench.timing import Contender
from pikv_ds.ops import Ops
from pikv_ds.policies.codecs import CODECS


def lookups(setting: Setting, context: int, codec: str, backend: str, budget: float) -> list[Contender]:
    """Full attention, Quest's lookup, and Quest's shortlist of twice the budget ranked again on the stored keys.

    Args:
        budget: share of the pages that is attended to.
    """
    ops = Ops(backend, setting.device.type)
    layout = CODECS[codec].layout(setting.num_kv_heads, setting.head_dim, setting.page_size, setting.dtype)
    data = sealed(setting, context, layout, ops)
    copies, num_pages = data.tables.shape
    keep = math.ceil(num_pages * budget)
    heads, kv_heads, scale = setting.num_heads, setting.num_kv_heads, setting.head_dim**-0.5
    query = setting.query()
    device = setting.device
    out, lse = torch.empty(1, heads, setting.head_dim, device=device), torch.empty(1, heads, device=device)
    bounds, again = (torch.empty(1, kv_heads, num_pages, device=device) for _ in range(2))
    exact = torch.empty(1, heads, num_pages, device=device)
    shortlist, chosen = (torch.empty(1, kv_heads, num_pages, dtype=torch.int32, device=device) for _ in range(2))
    counts, few, many = (torch.tensor([n], dtype=torch.int32, device=device) for n in (num_pages, keep, 2 * keep))
    pinned = torch.zeros(1, num_pages, dtype=torch.bool, device=device)
    pinned[:, 0] = pinned[:, -1] = True

    def attend(table: Tensor) -> None:
        ops.decode_attention(query, data.slabs, table, counts, layout, scale, out, lse)

    def full(i: int) -> None:
        attend(data.tables[i : i + 1])

    def quest(i: int) -> None:
        table = data.tables[i : i + 1]
        ops.page_scores(query, data.bounds, table, counts, layout, bounds)
        ops.select_pages(table, counts, bounds, pinned, few, chosen)
        attend(chosen)

    def two_stage(i: int) -> None:
        table = data.tables[i : i + 1]
        ops.page_scores(query, data.bounds, table, counts, layout, bounds)
        ops.select_pages(table, counts, bounds, pinned, many, shortlist)
        ops.key_scores(query, data.slabs, shortlist, counts, layout, scale, exact)
        torch.amax(exact.unflatten(1, (kv_heads, -1)), 2, out=again)
        ops.select_pages(table, counts, again, pinned, few, chosen)
        attend(chosen)

    whole = num_pages * layout.page_bytes
    seen = num_pages * layout.bounds_bytes
    named = f"pikv {codec}" + ("" if backend == "auto" else f" ({backend})")
    return [
        Contender(f"{named} all pages", full, copies, whole, label(context)),
        Contender(f"{named} quest {budget:.1%}", quest, copies, seen + int(whole * budget), label(context)),
        Contender(
            f"{named} two stages {budget:.1%}", two_stage, copies, seen + int(whole * budget * 2), label(context)
        ),
    ]
