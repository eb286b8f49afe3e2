"""The ops in plain torch and float32: their signatures, what they mean, and the specification that
every other backend is tested against.

Shape letters: R query rows, B table rows (R a multiple of B: the query rows of one sequence follow
each other and share its table), H query heads, K KV heads, D head size, V size of a value (D, but of
latent pages less), S page size, P pages, N any number, T tokens. Log-sum-exps are natural logarithms
in float32; an empty partial is ``out = 0, lse = -inf``. All ops write into tensors that the caller
owns. Slot 0 in a table is a hole; entries at and beyond ``counts`` are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.layout import BITS, PageLayout, SealFlag, scale_rows
from pikv_ds.ops.lists import PageLists
from pikv_ds.ops.state import UtilityState
from pikv_ds.ops.summaries import SubPages
from pikv_ds.slabs import Slabs

ZERO = 0.0
"""Added to extremes: of 0.0 and -0.0 either may be found, and the sum with either is 0.0."""


def seal_pages(
    keys: Tensor, values: Tensor | None, layout: PageLayout, out: Tensor, bounds: Tensor | None, flags: Tensor
) -> None:
    """Encodes full pages, in one pass over the input (KIVI, Liu et al. 2024, for the integers).

    Args:
        keys, values: ``[N, K, S, D]`` in ``layout.dtype``, any strides with contiguous channels;
            values of latent pages are None.
        out: uint8 ``[N, page_bytes]``, rows contiguous (they may be part of a longer row); padding
            bytes are written as 0.
        bounds: uint8 ``[N, bounds_bytes]`` likewise: each page's key minima and maxima per KV
            head and channel, ``[2, K, D]`` in ``layout.dtype`` (Quest); None: not wanted.
        flags: int32 ``[F]``, N is a multiple of F and each flag is of so many pages that follow each other (of a
            layer, say). To it is added (bitwise or), for each page and KV head and for keys and values
            apart: `SealFlag.NON_FINITE` where there is a NaN or infinity among them; else
            `SealFlag.BEYOND_RANGE` where a range from the smallest to the largest element has a scale
            or minimum that cannot be stored. Such a page's bytes are undefined.
    """
    out.zero_()  # padding between sections: pages are compared and logged byte by byte
    # keys per channel: over the page's tokens; values per token: over the channels
    sections = [(keys, layout.element, 2, 0, layout.key_scale_offset)]
    if layout.latent_dim is None:
        assert values is not None
        element = layout.value_element or layout.element
        sections.append((values, element, 3, layout.value_offset, layout.value_scale_offset))
    for x, element, dim, offset, scale_offset in sections:
        codes, scales, storable = _encode(x, element, layout, dim)
        _put(out, offset, codes.flatten(1))
        finite = x.isfinite().flatten(2).all(2)
        flags |= SealFlag.NON_FINITE * _some(~finite, flags)
        if scales is not None:
            _put(out, scale_offset, scales.flatten(1))
            flags |= SealFlag.BEYOND_RANGE * _some(finite & ~storable.flatten(2).all(2), flags)
    if bounds is not None:
        _put(bounds, 0, torch.stack([keys.amin(2), keys.amax(2)], dim=1).add(ZERO).flatten(1))


def _some(noted: Tensor, flags: Tensor) -> Tensor:
    """Whether something is noted of some page of each flag, bool ``[F]``, from bool ``[N, K]``."""
    return noted.reshape(len(flags), -1).any(1)


def unseal_pages(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Decodes pages uint8 ``[N, page_bytes]`` into float32 keys ``[N, K, S, D]`` and values ``[N, K, S, V]``."""
    n, k, s, d = pages.shape[0], layout.num_kv_heads, layout.page_size, layout.head_dim
    out = []
    sections = [(layout.element, 2, d, d, 0, layout.key_scale_offset, layout.key_scale_bytes)]
    if layout.latent_dim is None:
        element = layout.value_element or layout.element
        offsets = layout.value_offset, layout.value_scale_offset, layout.value_scale_bytes
        sections.append((element, 3, s, layout.value_dim, *offsets))
    for element, dim, size, channels, offset, scale_offset, scale_bytes in sections:
        num_bytes = layout.data_bytes if dim == 2 else layout.value_bytes
        x = _decode(_get(pages, offset, num_bytes), element, layout, (n, k, s, channels))
        rows = scale_rows(element)
        if rows:
            stored = _get(pages, scale_offset, scale_bytes)
            stored = stored.view(torch.float16) if layout.scales == 16 else stored
            stored = stored.view(n, rows, k, size).unsqueeze(dim + 1)
            scale, minimum = _scales_from(stored, layout)
            x = x * scale if minimum is None else x * scale + minimum
        out.append(x)
    return out[0], layout.values(out[0], out[-1])


def gather_pages(slabs: Slabs, slots: Tensor, out: Tensor) -> None:
    """Copies pages out of their slots.

    Args:
        slots: int32 ``[N]``, all valid.
        out: uint8 ``[N, row_bytes]``.
    """
    word = torch.int64 if slabs.row_bytes % 8 == 0 else torch.uint8  # eight bytes at a time: several times faster
    rows, slab_of = slots.long(), slots.long() // slabs.slab_rows
    for slab in slab_of.unique().tolist():
        here = (slab_of == slab).nonzero().squeeze(1)
        storage = slabs.tensors[slab]
        assert storage is not None, f"slab {slab} was given back, but a table still points into it"
        out.view(word).index_copy_(0, here, storage.view(word).index_select(0, rows[here] % slabs.slab_rows))


def scatter_pages(slabs: Slabs, slots: Tensor, pages: Tensor) -> None:
    """Copies pages into their slots.

    Args:
        slots: int32 ``[N]``, all valid, each once.
        pages: uint8 ``[N, row_bytes]``, rows contiguous (they may be part of a longer row).
    """
    word = torch.int64 if _in_words(slabs, pages) else torch.uint8
    rows, slab_of = slots.long(), slots.long() // slabs.slab_rows
    for slab in slab_of.unique().tolist():
        here = (slab_of == slab).nonzero().squeeze(1)
        storage = slabs.tensors[slab]
        assert storage is not None, f"slab {slab} was given back, but a page is to go into it"
        storage.view(word).index_copy_(0, rows[here] % slabs.slab_rows, pages.view(word).index_select(0, here))


def _in_words(slabs: Slabs, pages: Tensor) -> bool:
    """Whether rows can be copied eight bytes at a time, which is several times faster."""
    return slabs.row_bytes % 8 == 0 and pages.stride(0) % 8 == 0 and pages.storage_offset() % 8 == 0


def place_pages(
    preference: Tensor, groups: Tensor, limits: Tensor, source: int, loads: Tensor, free: Tensor, out: Tensor
) -> None:
    """Gives every page an owner, one after the other: the first rank of its preference that has room, else the one
    with room that has the fewest pages of its group, the lower one of several. It runs on the host.

    Args:
        preference: int32 ``[N, G]``, ranks, best first; -1 in the places that are left where a row names only some.
        groups: int32 ``[N]``, each page's group: a sequence and unit.
        limits: int32 ``[N]``: how many pages of its group a rank may own when this one is placed.
        source: the rank that may own one less, for it keeps the open tail; -1: none.
        loads: int32 ``[M, G]``, pages of each group that each rank owns; what is placed is added.
        free: int64 ``[G]``, pages for which each rank has memory; what is placed is taken off.
        out: int32 ``[N]``: owners, -1 where no rank has room.
    """
    ranks = range(len(free))
    table, room = loads.tolist(), free.tolist()
    owners = []
    for wanted, group, limit in zip(preference.tolist(), groups.tolist(), limits.tolist(), strict=True):
        held = table[group]
        able = [r for r in ranks if held[r] < limit - (r == source) and room[r] > 0]
        owner = next((r for r in wanted if r in able), min(able, key=lambda r: (held[r], r), default=-1))
        if owner >= 0:
            held[owner] += 1
            room[owner] -= 1
        owners.append(owner)
    loads.copy_(torch.tensor(table, dtype=loads.dtype).view_as(loads))
    free.copy_(torch.tensor(room, dtype=free.dtype))
    out.copy_(torch.tensor(owners, dtype=out.dtype))


def decode_attention(
    query: Tensor,
    slabs: Slabs,
    table: Tensor | PageLists,
    counts: Tensor | None,
    layout: PageLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    page_lse: Tensor | None = None,
) -> None:
    """Partial attention of few queries over paged keys (flash-decoding, Dao et al. 2023).

    Args:
        query: ``[R, H, D]``, float32, bfloat16 or float16.
        slabs: the pool's pages.
        table: int32 slots ``[B, P]``, or ``[B, K, P]`` with a selection per KV head; or B lists where they are.
        counts: int32 ``[B]``; None: lists have theirs.
        scale: factor on ``q . k``.
        out, lse: float32 ``[R, H, V]``, ``[R, H]``; rows may be part of longer rows.
        page_lse: float32 ``[R, H, P]`` for a table, on request: the log-sum-exp of each page's scores, -inf at
            holes and beyond ``counts``. ``exp(page_lse - lse)`` is the page's attention mass; with
            the merged lse of all ranks it is the mass over the whole sequence (H2O).
    """
    if isinstance(table, PageLists):
        table, counts = table.dense()
    assert counts is not None
    for row in range(len(query)):  # rows are ragged; a reference may take them one by one
        keys, values, there = _visible_pages(slabs, table, counts, layout, row * len(table) // len(query))
        scores = _page_scores(query[row], keys, there, scale)  # [H, P, S]
        row_lse = scores.flatten(1).logsumexp(-1)
        weights = torch.exp(scores - row_lse.nan_to_num(neginf=0.0)[:, None, None])
        weights = weights.unflatten(0, (layout.num_kv_heads, -1))  # [K, G, P, S]
        # Page by page first: a matrix product may add up a long row in one float32.
        out[row] = torch.einsum("kgps,pksd->pkgd", weights, values).sum(0).flatten(0, 1)
        lse[row] = row_lse
        if page_lse is not None:
            page_lse[row] = -torch.inf
            page_lse[row, :, : scores.shape[1]] = scores.logsumexp(-1)


def key_scores(
    query: Tensor, slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, scale: float, out: Tensor
) -> None:
    """`decode_attention`'s ``page_lse`` alone, reading keys only: ranks a shortlist exactly.

    Args:
        out: float32 ``[R, H, P]``; -inf at holes and beyond ``counts``. The rest as there.
    """
    out.fill_(-torch.inf)
    for row in range(len(query)):
        keys, _, there = _visible_pages(slabs, table, counts, layout, row * len(table) // len(query))
        scores = _page_scores(query[row], keys, there, scale)
        out[row, :, : scores.shape[1]] = scores.logsumexp(-1)


def _visible_pages(
    slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[P, K, S, D or V]`` of a table row, zeros at holes, and where pages are, bool ``[K, P]``."""
    slots = table[row, ..., : int(counts[row])]  # [P] or [K, P]
    used, place = slots.unique(return_inverse=True)
    encoded = torch.zeros(len(used), layout.page_bytes, dtype=torch.uint8, device=table.device)
    first = int((used == 0).sum())  # the hole, if there is one, comes first and stays zeros
    gather_pages(slabs, used[first:], encoded[first:])
    keys, values = unseal_pages(encoded, layout)
    heads = torch.arange(layout.num_kv_heads, device=table.device)
    place = place.expand(layout.num_kv_heads, -1).T  # [P, K]
    return keys[place, heads], values[place, heads], (slots > 0).expand(layout.num_kv_heads, -1)


def _page_scores(query: Tensor, keys: Tensor, there: Tensor, scale: float) -> Tensor:
    """Scaled scores ``[H, P, S]`` of one query ``[H, D]``, -inf at holes."""
    k = keys.shape[1]
    scores = torch.einsum("kgd,pksd->kgps", query.float().unflatten(0, (k, -1)), keys) * scale
    return scores.masked_fill(~there[:, None, :, None], -torch.inf).flatten(0, 1)


def prefill_attention(
    query: Tensor, slabs: Slabs, slots: Tensor, layout: PageLayout, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Partial attention of a prompt's chunk over the sealed pages before it: all see all.

    Args:
        query: ``[T, H, D]``.
        slots: int32 ``[P]``, the pages of one sequence; 0 is a hole.
        out, lse: float32 ``[T, H, V]``, ``[T, H]``.
    """
    slots = slots[slots > 0]
    pages = torch.empty(len(slots), layout.page_bytes, dtype=torch.uint8, device=slots.device)
    gather_pages(slabs, slots, pages)
    keys, values = (x.transpose(0, 1).flatten(1, 2) for x in unseal_pages(pages, layout))
    context_attention(query, keys, values, scale, None, out, lse)


def context_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    first_query: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Partial attention of many queries of one sequence over contiguous keys.

    Args:
        query: ``[T, H, D]``.
        keys, values: ``[K, N, D]``, ``[K, N, V]``.
        first_query: index of the key that belongs to query 0 (causal: query ``t`` sees keys up
            to ``first_query + t``); None: every query sees every key.
        out, lse: float32 ``[T, H, V]``, ``[T, H]``.
    """
    t, num_heads, d = query.shape
    k, n, _ = keys.shape
    group, v = num_heads // k, values.shape[-1]
    keys, values = keys.float(), values.float()
    for start in range(0, t, 128):  # blocks of queries bound the memory of the scores
        q = query[start : start + 128]
        m = q.shape[0]
        grouped = q.float().view(m, k, group, d).permute(1, 0, 2, 3).reshape(k, m * group, d)
        scores = (grouped @ keys.transpose(1, 2)).view(k, m, group, n) * scale
        if first_query is not None:
            last_key = torch.arange(start, start + m, device=q.device) + first_query
            hidden = torch.arange(n, device=q.device)[None] > last_key[:, None]
            scores.masked_fill_(hidden[None, :, None], -torch.inf)
        block_lse = scores.logsumexp(-1)  # [K, m, group]
        weights = torch.exp(scores - block_lse.nan_to_num(neginf=0.0)[..., None])
        block = weights.view(k, m * group, n) @ values
        out[start : start + m] = block.view(k, m, group, v).permute(1, 0, 2, 3).reshape(m, num_heads, v)
        lse[start : start + m] = block_lse.permute(1, 0, 2).reshape(m, num_heads)


def tail_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None = None,
) -> None:
    """Partial attention of one query per sequence over its open tail.

    Args:
        query: ``[N, H, D]``.
        keys, values: ``[B, K, S, D]``, ``[B, K, S, V]``; tokens at and beyond ``lengths`` are never used.
        lengths: int32 ``[N]``, 0 gives an empty partial.
        out, lse: float32 ``[N, H, V]``, ``[N, H]``; rows may be part of longer rows.
        indices: int32 ``[N]``, each query's tail; None: B is N, in order.
    """
    if indices is not None:
        keys, values = keys[indices.long()], values[indices.long()]
    b, num_heads, d = query.shape
    k, s = keys.shape[1], keys.shape[2]
    q = query.float().view(b, k, num_heads // k, d)
    unused = torch.arange(s, device=query.device)[None] >= lengths[:, None]  # [B, S]
    scores = (q @ keys.float().transpose(2, 3)) * scale
    scores = scores.masked_fill(unused[:, None, None], -torch.inf)
    row_lse = scores.logsumexp(-1)
    weights = torch.exp(scores - row_lse.nan_to_num(neginf=0.0)[..., None])
    clean = values.float().masked_fill(unused[:, None, :, None], 0.0)  # 0 * NaN would be NaN
    out.copy_((weights @ clean).view(out.shape))
    lse.copy_(row_lse.view(b, num_heads))


def append_tokens(
    keys: Tensor, values: Tensor | None, places: Tensor, tail_keys: Tensor, tail_values: Tensor | None, flags: Tensor
) -> None:
    """Puts the newest tokens of M sequences into their tails.

    Args:
        keys, values: ``[N, K, D]``, ``[N, K, V]``, any strides with contiguous channels; values are None where they
            are channels of the keys.
        places: int32 ``[3, M]``: the tokens' places among N, their tails among B, and their slots in these.
        tail_keys, tail_values: ``[B, K, S, D]``, ``[B, K, S, V]``.
        flags: int32 ``[1]``, to which is added `SealFlag.NON_FINITE` where there is a NaN or infinity in a token.
    """
    tokens, tails, slots = places.long()
    for x, tail in ((keys, tail_keys), (values, tail_values)):
        if x is not None:
            assert tail is not None
            tail[tails, :, slots] = x[tokens]
            flags |= SealFlag.NON_FINITE * ~x[tokens].isfinite().all()


def append_experts(experts: Tensor, places: Tensor, tail_experts: Tensor) -> None:
    """Puts the experts that the newest tokens of M sequences chose into their tails.

    Args:
        experts: int16, int32 or int64 ``[N, k]``, contiguous; -1: dropped by the gate.
        places: see `append_tokens`.
        tail_experts: int16 ``[B, S, k]``.
    """
    tokens, tails, slots = places.long()
    tail_experts[tails, slots] = experts[tokens].to(tail_experts.dtype)


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Merges partial attentions over disjoint keys, in the order given (invariant: same bits).

    Args:
        outs, lses: float32 ``[P, N, D]``, ``[P, N]``, or ``[P, N, H, D]``, ``[P, N, H]``, whose first two dimensions
            may have any strides; a partial with lse -inf is not read.
        out, lse: ``[N, (H,) D]``, float32, bfloat16 or float16, and float32 ``[N(, H)]``; None: it is not wanted.
    """
    if outs.shape[0] == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    peak = lses.amax(0)
    safe = torch.where(peak == -torch.inf, 0.0, peak)  # all empty: -inf - -inf would be NaN
    total, denominator = torch.zeros_like(outs[0]), torch.zeros_like(peak)
    for partial, partial_lse in zip(outs, lses, strict=True):  # fixed order: same bits for the same ranks
        weight = torch.exp(partial_lse - safe)
        total += torch.where(weight[..., None] == 0, 0.0, partial * weight[..., None])
        denominator += weight
    empty = denominator == 0
    out.copy_(torch.where(empty[..., None], 0.0, total / denominator[..., None]))
    if lse is not None:
        lse.copy_(torch.where(empty, -torch.inf, safe + torch.log(denominator)))


def page_scores(
    query: Tensor, summary_slabs: Slabs, table: Tensor, counts: Tensor, layout: PageLayout, out: Tensor
) -> None:
    """Upper bound of ``q . k`` for each page, the maximum over a KV head's query heads (Quest).

    Args:
        query: ``[R, H, D]``.
        summary_slabs: the pool's key bounds (see `seal_pages`).
        table, counts: int32 ``[R, P]`` and ``[R]``.
        out: float32 ``[R, K, P]``; -inf at holes and beyond ``counts``.
    """
    k, d = layout.num_kv_heads, layout.head_dim
    out.fill_(-torch.inf)
    for row in range(query.shape[0]):
        n = int(counts[row])
        there = table[row, :n] > 0
        slots = table[row, :n][there]
        packed = torch.empty(len(slots), summary_slabs.row_bytes, dtype=torch.uint8, device=query.device)
        gather_pages(summary_slabs, slots, packed)
        bounds = _get(packed, 0, layout.bounds_bytes).view(layout.dtype).view(-1, 2, k, d).float()
        q = query[row].float().view(k, -1, d)
        # sum_i max(q_i lo_i, q_i hi_i) splits by the sign of q into two matrix products
        upper = torch.einsum("kgd,nkd->kgn", q.clamp(min=0), bounds[:, 1])
        upper += torch.einsum("kgd,nkd->kgn", q.clamp(max=0), bounds[:, 0])
        out[row, :, :n][:, there] = upper.amax(1)


def subpage_scores(
    query: Tensor,
    summary_slabs: Slabs,
    table: Tensor,
    counts: Tensor,
    layout: PageLayout,
    summary: SubPages,
    scale: float,
    out: Tensor,
) -> None:
    """Estimates each page's log-sum-exp of ``q . k`` from its sub-pages: that of their scores (see `SubPages`).

    Args:
        query: ``[R, H, D]``.
        table, counts: int32 ``[R, P]`` and ``[R]``.
        scale: factor on ``q . k``.
        out: float32 ``[R, H, P]``, -inf beyond ``counts`` and at slot 0.
    """
    out.fill_(-torch.inf)
    for row in range(len(query)):
        slots = table[row, : int(counts[row])]
        there = slots > 0
        slots = slots[there]
        encoded = torch.empty(len(slots), summary_slabs.row_bytes, dtype=torch.uint8, device=table.device)
        gather_pages(summary_slabs, slots, encoded)
        centres, spreads = summary.decode(encoded, layout)  # [P, K, sub-pages, D]
        q = query[row].float().unflatten(0, (layout.num_kv_heads, -1))  # [K, G, D]
        scores = torch.einsum("kgd,pknd->kgpn", q, centres) + torch.einsum("kgd,pknd->kgpn", q.abs(), spreads)
        out[row, :, : len(there)][:, there] = (scores * scale).logsumexp(-1).flatten(0, 1)


def select_pages(table: Tensor, counts: Tensor, scores: Tensor, pinned: Tensor, budget: Tensor, out: Tensor) -> None:
    """Keeps the best pages of each row and KV head; ties go to the page that came first.

    Args:
        table, counts: int32 ``[R, P]`` and ``[R]``.
        scores: float32 ``[R, K, P]``, no NaN.
        pinned: bool ``[R, P]``, pages that are always kept, within the budget where it suffices.
        budget: int32 ``[R]``, pages to keep.
        out: int32 ``[R, K, P]``: the slot where a page is kept, 0 elsewhere.
    """
    rows, k, width = scores.shape
    exists = torch.arange(width, device=table.device)[None] < counts[:, None]
    ranked = scores.masked_fill((pinned & exists)[:, None], torch.inf).masked_fill(~exists[:, None], -torch.inf)
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    keep = torch.maximum(budget, (pinned & exists).sum(-1)).clamp(max=counts)
    chosen = (place < keep[:, None, None]) & exists[:, None]
    out.copy_(torch.where(chosen, table[:, None].expand(rows, k, width), 0))


def update_utility(slots: Tensor, mass: Tensor, step: int, decay: float, state: UtilityState) -> None:
    """Notes a visit of some pages: ``mass <- mass * decay^age + (1 - decay) * new mass``.

    Args:
        slots: int32 ``[N]``, each slot at most once; 0 is skipped.
        mass: float32 ``[N]``, attention mass of the visit.
        step: number of this step, not before any slot's last one; a slot's age is counted from its last visit.
        decay: of the moving average per step, in [0, 1).
    """
    at = slots[slots > 0].long()
    age = (step - state.last_step[at]).float()
    state.mass[at] = state.mass[at] * decay**age + (1 - decay) * mass[slots > 0]
    state.last_step[at] = step
    state.visits[at] += 1


def choose_victims(
    state: UtilityState, evictable: Tensor, step: int, decay: float, weights: tuple[float, float, float], out: Tensor
) -> None:
    """The evictable pages of the lowest utility, lowest first, ties to the lower slot.

    The utility is ``w0 * mass * decay^age + w1 / (1 + age) + w2 * log(1 + visits)``: mass (H2O),
    recency (LRU) and frequency (LFU) in one pass.

    Args:
        evictable: bool ``[N]`` per slot: in use and not pinned.
        out: int32 ``[V]``: victims, each once; 0 where fewer are evictable.
    """
    candidates = evictable.nonzero().squeeze(1)
    order = state.utilities(step, decay, weights)[candidates].argsort(stable=True)[: len(out)]
    out.zero_()
    out[: len(order)] = candidates[order].to(out.dtype)


def _encode(x: Tensor, element: str, layout: PageLayout, dim: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stored elements of ``x [N, K, S, D]``, their scales ``[N, scale_rows, K, *]`` over ``dim``, and whether those
    can be stored, ``[N, K, ...]``."""
    if not scale_rows(element):
        return x.to(layout.dtype).contiguous(), None, x.new_ones(()).bool()
    if element == "fp8":
        codes, scales = _to_fp8(x.float(), dim)
        return codes, scales, scales[:, 0].isfinite()
    codes, scales, storable = _quantize(x.float(), BITS[element], dim, layout)
    return _pack(codes, BITS[element]), scales, storable


def _decode(data: Tensor, element: str, layout: PageLayout, shape: tuple[int, ...]) -> Tensor:
    """Stored elements, uint8 ``[N, bytes]``, as float32, before their scales."""
    if not scale_rows(element):
        return data.view(layout.dtype).view(shape).float()
    if element == "fp8":
        return data.view(torch.float8_e4m3fn).view(shape).float()
    return _unpack(data, BITS[element], shape)


def _to_fp8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """e4m3 of x divided by a float16 scale, rounded up so that nothing exceeds e4m3's 448."""
    peak = x.abs().amax(dim, keepdim=True)
    half = (peak / 448).half()
    above = torch.nextafter(half, half.new_full((), torch.inf))
    scale = torch.where(half.float() * 448 < peak, above, half)
    codes = torch.where(scale > 0, x / scale.float(), 0.0).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale.squeeze(dim)[:, None]


CLIPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""How far `PageLayout.clip` narrows ranges, beside not at all."""
BYTE_SCALES = torch.tensor([2 ** (byte / 8 - 24) for byte in range(256)])
"""What a scale's byte stands for."""
BYTE_LIMITS = torch.tensor([2 ** ((byte + 0.5) / 8 - 24) for byte in range(256)])
"""Scales above these are nearer to the next byte's; above the last one no byte is near enough."""


def _quantize(x: Tensor, bits: int, dim: int, layout: PageLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of x's shape, (scale, minimum) stacked in dimension 1, without ``dim``, and whether those of the
    whole range can be stored."""
    low, high = x.amin(dim, keepdim=True) + ZERO, x.amax(dim, keepdim=True) + ZERO
    codes, scales, error = _quantize_between(x, low, high, bits, dim, layout)
    if layout.clip:
        middle, half = (low + high) / 2, (high - low) / 2
        for share in CLIPS:
            tried = _quantize_between(x, middle - share * half, middle + share * half, bits, dim, layout)
            better = tried[2] < error
            codes = torch.where(better, tried[0], codes)
            scales = torch.where(better.squeeze(dim)[:, None], tried[1], scales)
            error = torch.where(better, tried[2], error)
    return codes, scales, _storable(low, high, 2**bits - 1, layout)


def _quantize_between(
    x: Tensor, low: Tensor, high: Tensor, bits: int, dim: int, layout: PageLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the squared error over ``dim``, of x cut off at `low` and `high`.

    Codes are computed with the rounded scale and minimum that decoding will use.
    """
    levels = 2**bits - 1
    stored = _scales_to(low, high, levels, layout)
    scale, minimum = _scales_from(stored, layout)
    assert minimum is not None
    codes = torch.where(scale > 0, ((x - minimum) / scale).round(), 0.0).clamp(0, levels)
    error = _sum_in_order((codes * scale + minimum - x).square(), dim) if layout.clip else x.new_zeros(())
    return codes.to(torch.uint8), stored.squeeze(dim + 1), error


def _sum_in_order(x: Tensor, dim: int) -> Tensor:
    """The sum over dimension 2 or 3 of ``[N, K, S, D]``, which is kept, in an order that all backends have, as ranges
    are chosen by it: tokens one by one; channels ``d, d + 16, ...`` likewise into 16 sums, then these by halves."""
    parts = x.split(1, 2) if dim == 2 else torch.nn.functional.pad(x, (0, -x.shape[3] % 16)).split(16, 3)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if dim == 2:
        return total
    for width in (8, 4, 2, 1):
        total = total[..., :width] + total[..., width:]
    return total


def _scales_to(low: Tensor, high: Tensor, levels: int, layout: PageLayout) -> Tensor:
    """Scale and minimum as they are stored, stacked in dimension 1.

    A float16 minimum is rounded down: rounded up, it would cut off the elements below it (0.25 at an offset of
    1000). In eight bits the scale is rounded to the nearest, so that ranges shrink as often as they grow.
    """
    if layout.scales == 16:
        half = low.half()
        below = torch.nextafter(half, half.new_full((), -torch.inf))
        minimum = torch.where(half.float() > low, below, half).float()
        return torch.stack([((high - minimum).clamp(min=0) / levels).half(), minimum.half()], dim=1)
    step = _byte_step(low, high, levels)
    scale = torch.bucketize(step, BYTE_LIMITS.to(step.device)).clamp(max=255)
    minimum = (low / BYTE_SCALES.to(step.device)[scale] * 4).round().clamp(-127, 127)
    return torch.stack([scale.to(torch.uint8), minimum.to(torch.int8).view(torch.uint8)], dim=1)


def _byte_step(low: Tensor, high: Tensor, levels: int) -> Tensor:
    """The scale that is rounded to a byte's: so large that the minimum fits into a byte, too."""
    return torch.maximum((high - low) / levels, torch.maximum(low.abs(), high.abs()) / 24)


def _storable(low: Tensor, high: Tensor, levels: int, layout: PageLayout) -> Tensor:
    """Whether the scale and the minimum of a range are within what they are stored as."""
    if layout.scales == 16:
        return _scales_to(low, high, levels, layout).isfinite().all(1)
    return _byte_step(low, high, levels) <= BYTE_LIMITS[-1].item()


def _scales_from(stored: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum in float32 from their stored form ``[N, scale_rows, ...]``; fp8 has no minimum."""
    if layout.scales == 16:
        return stored[:, 0].float(), stored[:, 1].float() if stored.shape[1] == 2 else None
    scale = BYTE_SCALES.to(stored.device)[stored[:, 0].long()]
    return scale, stored[:, 1].contiguous().view(torch.int8).float() / 4 * scale


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 3:  # two planes
        return torch.cat([_pack(codes & 3, 2), _pack(codes >> 2, 1)], dim=-1)
    per_byte = 8 // bits
    parts = codes.chunk(per_byte, dim=-1)
    packed = parts[0].clone()
    for i in range(1, per_byte):
        packed |= parts[i] << (bits * i)
    return packed


def _unpack(data: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    channels = shape[-1]
    packed = data.view(*shape[:-1], channels * bits // 8)
    if bits == 3:
        low, high = packed.split([channels // 4, channels // 8], dim=-1)
        return _unpack(low, 2, shape) + 4 * _unpack(high, 1, shape)
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=-1).float()


def _put(pages: Tensor, offset: int, section: Tensor) -> None:
    data = section.contiguous().view(torch.uint8)
    pages[:, offset : offset + data.shape[1]] = data


def _get(pages: Tensor, offset: int, num_bytes: int) -> Tensor:
    return pages[:, offset : offset + num_bytes].contiguous()
