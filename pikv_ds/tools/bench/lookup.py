"""Choosing pages and attending to them, scoring included, against attending to all."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.policies.lookups import Candidates, QuestLookup, TwoStageLookup
from pikv_ds.slabs import Slabs
from pikv_ds.tools.bench.attention import Setting, label, sealed
from pikv_ds.tools.bench.timing import Contender


def lookups(setting: Setting, context: int, codec: str, backend: str, budget: float) -> list[Contender]:
    """Full attention, the lookups `quest` and `two_stage` as the cache calls them, and the latter's two stages.

    Args:
        budget: share of the pages that is attended to.
    """
    layout, ops = setting.pages(codec, backend)
    two_stage, quest = TwoStageLookup(budget=budget), QuestLookup(budget=budget)
    data = sealed(setting, context, layout, ops, two_stage.summary)
    copies, num_pages = data.tables.shape
    heads, scale = setting.num_heads, setting.head_dim**-0.5
    query, device = setting.query(), setting.device
    out, lse = torch.empty(1, heads, setting.head_dim, device=device), torch.empty(1, heads, device=device)
    counts = torch.tensor([num_pages], dtype=torch.int32, device=device)
    numbers = torch.arange(num_pages, dtype=torch.int32, device=device)[None]

    def attend(table: Tensor) -> None:
        ops.decode_attention(query, data.slabs, table, counts, layout, scale, out, lse)

    def full(i: int) -> None:
        attend(data.tables[i : i + 1])

    def candidates(i: int, summaries: Slabs) -> Candidates:
        return Candidates(data.tables[i : i + 1], numbers, counts, counts, summaries, layout, data.slabs, scale)

    def by_quest(i: int) -> None:
        attend(quest.select(ops, query, candidates(i, data.bounds)))

    def by_two_stages(i: int) -> None:
        attend(two_stage.select(ops, query, candidates(i, data.subpages)))

    logits = torch.empty(1, heads, num_pages, device=device)

    def estimate(i: int) -> None:
        table = data.tables[i : i + 1]
        ops.subpage_scores(query, data.subpages, table, counts, layout, two_stage.summary, scale, logits)

    shortlists = [two_stage.shares(ops, query, candidates(i, data.subpages))[1] for i in range(copies)]

    def rank(i: int) -> None:
        ops.key_scores(query, data.slabs, shortlists[i], counts, layout, scale, logits)

    whole = num_pages * layout.page_bytes
    keys = int(whole // 2 * min(1.0, two_stage.shortlist * budget))
    seen = [num_pages * n for n in (layout.bounds_bytes, two_stage.summary.num_bytes(layout))]
    named = f"pikv {codec}" + ("" if backend == "auto" else f" ({backend})")
    read = int(seen[0] + whole * budget), int(seen[1] + keys + whole * budget)
    return [
        Contender(f"{named} all pages", full, copies, whole, label(context)),
        Contender(f"{named} quest {budget:.1%}", by_quest, copies, read[0], label(context)),
        Contender(f"{named} two_stage {budget:.1%}", by_two_stages, copies, read[1], label(context)),
        Contender(f"{named} two_stage, its sub-pages", estimate, copies, seen[1], label(context)),
        Contender(f"{named} two_stage, its keys", rank, copies, keys, label(context)),
    ]
