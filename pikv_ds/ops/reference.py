"""The ops in plain torch and float32: the specification that every other backend is tested against.

Signatures and shapes are documented in `pikv_ds.ops`; here stands only how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_ds.layout import PageLayout


def seal_pages(keys: Tensor, values: Tensor, layout: PageLayout, out: Tensor) -> None:
    n = keys.shape[0]
    out.zero_()  # padding between sections: pages are compared and logged byte by byte
    if layout.bits is None:
        _put(out, 0, keys.to(layout.dtype).reshape(n, -1))
        _put(out, layout.value_offset, values.to(layout.dtype).reshape(n, -1))
        return
    key_codes, key_scales = _quantize(keys.float(), layout.bits, dim=2)  # per channel: over the page's tokens
    value_codes, value_scales = _quantize(values.float(), layout.bits, dim=3)  # per token: over the channels
    _put(out, 0, _pack(key_codes, layout.bits).reshape(n, -1))
    _put(out, layout.key_scale_offset, key_scales.reshape(n, -1))
    _put(out, layout.value_offset, _pack(value_codes, layout.bits).reshape(n, -1))
    _put(out, layout.value_scale_offset, value_scales.reshape(n, -1))


def unseal_pages(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    n, k, s, d = pages.shape[0], layout.num_kv_heads, layout.page_size, layout.head_dim
    keys = _get(pages, 0, layout.data_bytes)
    values = _get(pages, layout.value_offset, layout.data_bytes)
    if layout.bits is None:
        return tuple(x.view(layout.dtype).view(n, k, s, d).float() for x in (keys, values))  # type: ignore[return-value]
    key_scales = _get(pages, layout.key_scale_offset, layout.key_scale_bytes).view(torch.float16).float()
    value_scales = _get(pages, layout.value_scale_offset, layout.value_scale_bytes).view(torch.float16).float()
    key_scale, key_min = key_scales.view(n, 2, k, 1, d).unbind(1)
    value_scale, value_min = value_scales.view(n, 2, k, s, 1).unbind(1)
    return (
        _unpack(keys, layout.bits, (n, k, s, d)) * key_scale + key_min,
        _unpack(values, layout.bits, (n, k, s, d)) * value_scale + value_min,
    )


def page_bounds(keys: Tensor, out: Tensor) -> None:
    n = keys.shape[0]
    bounds = torch.stack([keys.amin(2), keys.amax(2)], dim=1).to(keys.dtype)
    _put(out, 0, bounds.reshape(n, -1))


def gather_pages(slabs: Sequence[Tensor | None], slots: Tensor) -> Tensor:
    live = next(s for s in slabs if s is not None)
    per_slab, width = live.shape
    out = torch.empty(*slots.shape, width, dtype=torch.uint8, device=live.device)
    word = torch.int64 if width % 8 == 0 else torch.uint8  # eight bytes at a time: several times faster
    flat, rows = out.view(-1, width).view(word), slots.reshape(-1).long()
    slab_of = rows // per_slab
    for slab in slab_of.unique().tolist():
        here = (slab_of == slab).nonzero().squeeze(1)
        storage = slabs[slab]
        assert storage is not None, f"slab {slab} was given back, but a table still points into it"
        flat.index_copy_(0, here, storage.view(word).index_select(0, rows[here] % per_slab))
    return out


def decode_attention(
    query: Tensor,
    slabs: Sequence[Tensor | None],
    table: Tensor,
    counts: Tensor,
    layout: PageLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    rows, num_heads, d = query.shape
    k, group = layout.num_kv_heads, num_heads // layout.num_kv_heads
    per_head = table.dim() == 3
    for row in range(rows):  # rows are ragged; a reference may take them one by one
        slots = table[row, ..., : int(counts[row])]
        valid = slots > 0
        if not bool(valid.any()):
            out[row], lse[row] = 0.0, -torch.inf
            continue
        used = slots[valid].unique() if per_head else slots[valid]
        keys, values = unseal_pages(gather_pages(slabs, used), layout)  # [P, K, S, D]
        q = query[row].float().view(k, group, d)
        scores = torch.einsum("kgd,pksd->kgps", q, keys) * scale
        if per_head:  # a KV head sees only the pages selected for it
            chosen = torch.stack([torch.isin(used, slots[head][valid[head]]) for head in range(k)])
            scores.masked_fill_(~chosen[:, None, :, None], -torch.inf)
        scores = scores.reshape(k, group, -1)
        row_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - row_lse.nan_to_num(neginf=0.0)[..., None])
        flat = values.permute(1, 0, 2, 3).reshape(k, -1, d)
        out[row] = (weights @ flat).view(num_heads, d)
        lse[row] = row_lse.view(num_heads)


def context_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    first_query: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    t, num_heads, d = query.shape
    k, n, _ = keys.shape
    group = num_heads // k
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
        out[start : start + m] = block.view(k, m, group, d).permute(1, 0, 2, 3).reshape(m, num_heads, d)
        lse[start : start + m] = block_lse.permute(1, 0, 2).reshape(m, num_heads)


def tail_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    b, num_heads, d = query.shape
    k, s = keys.shape[1], keys.shape[2]
    q = query.float().view(b, k, num_heads // k, d)
    unused = torch.arange(s, device=query.device)[None] >= lengths[:, None]  # [B, S]
    scores = (q @ keys.float().transpose(2, 3)) * scale
    scores = scores.masked_fill(unused[:, None, None], -torch.inf)
    row_lse = scores.logsumexp(-1)
    weights = torch.exp(scores - row_lse.nan_to_num(neginf=0.0)[..., None])
    clean = values.float().masked_fill(unused[:, None, :, None], 0.0)  # 0 * NaN would be NaN
    out.copy_((weights @ clean).view(b, num_heads, d))
    lse.copy_(row_lse.view(b, num_heads))


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    if outs.shape[0] == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    peak = lses.amax(0)
    safe = torch.where(peak == -torch.inf, 0.0, peak)  # all empty: -inf - -inf would be NaN
    total, denominator = torch.zeros_like(out), torch.zeros_like(lse)
    for partial, partial_lse in zip(outs, lses, strict=True):  # fixed order: same bits for the same ranks
        weight = torch.exp(partial_lse - safe)
        total += torch.where(weight[..., None] == 0, 0.0, partial * weight[..., None])
        denominator += weight
    empty = denominator == 0
    out.copy_(torch.where(empty[..., None], 0.0, total / denominator[..., None]))
    lse.copy_(torch.where(empty, -torch.inf, safe + torch.log(denominator)))


def page_scores(
    query: Tensor,
    summary_slabs: Sequence[Tensor | None],
    table: Tensor,
    counts: Tensor,
    layout: PageLayout,
    out: Tensor,
) -> None:
    k, d = layout.num_kv_heads, layout.head_dim
    out.fill_(-torch.inf)
    for row in range(query.shape[0]):
        n = int(counts[row])
        if n == 0:
            continue
        packed = gather_pages(summary_slabs, table[row, :n])
        bounds = packed[:, : 2 * k * d * layout.dtype.itemsize].view(layout.dtype).view(n, 2, k, d).float()
        q = query[row].float().view(k, -1, d)
        # sum_i max(q_i lo_i, q_i hi_i) splits by the sign of q into two matrix products
        upper = torch.einsum("kgd,nkd->kgn", q.clamp(min=0), bounds[:, 1])
        upper += torch.einsum("kgd,nkd->kgn", q.clamp(max=0), bounds[:, 0])
        out[row, :, :n] = upper.amax(1)


def select_pages(table: Tensor, counts: Tensor, scores: Tensor, pinned: Tensor, budget: Tensor, out: Tensor) -> None:
    rows, k, width = scores.shape
    exists = torch.arange(width, device=table.device)[None] < counts[:, None]
    ranked = scores.masked_fill((pinned & exists)[:, None], torch.inf).masked_fill(~exists[:, None], -torch.inf)
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    keep = torch.maximum(budget, (pinned & exists).sum(-1)).clamp(max=counts)
    chosen = (place < keep[:, None, None]) & exists[:, None]
    out.copy_(torch.where(chosen, table[:, None].expand(rows, k, width), 0))


def _quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 of x's shape, and float16 (scale, minimum) stacked in dimension 1, without ``dim``.

    Codes are computed with the rounded float16 scale and minimum that decoding will use. The minimum
    is rounded down: rounded up, it would cut off the elements below it (0.25 at an offset of 1000).
    """
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    half = low.half()
    below = torch.nextafter(half, half.new_full((), -torch.inf))
    minimum = torch.where(half.float() > low, below, half).float()
    scale = ((high - minimum).clamp(min=0) / levels).half().float()
    codes = torch.where(scale > 0, ((x - minimum) / scale).round(), 0.0).clamp(0, levels).to(torch.uint8)
    return codes, torch.stack([scale.squeeze(dim).half(), minimum.squeeze(dim).half()], dim=1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    half = codes.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def _unpack(data: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    if bits == 8:
        return data.view(shape).float()
    packed = data.view(*shape[:-1], shape[-1] // 2)
    return torch.cat([packed & 15, packed >> 4], dim=-1).float()


def _put(pages: Tensor, offset: int, section: Tensor) -> None:
    data = section.contiguous().view(torch.uint8)
    pages[:, offset : offset + data.shape[1]] = data


def _get(pages: Tensor, offset: int, num_bytes: int) -> Tensor:
    return pages[:, offset : offset + num_bytes].contiguous()
