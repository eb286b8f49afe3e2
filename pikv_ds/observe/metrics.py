"""What the cache did and holds, as a dict of plain numbers, and as a table for people.

Sizes are memory that is really allocated: whole slabs, scales, padding and metadata included.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pikv_ds.core.cache import ExpertShardedKVCache


def rank_stats(cache: ExpertShardedKVCache) -> dict[str, Any]:
    """This rank's figures; needs no other rank.

    ``tokens`` are per layer (tokens times layers, over layers). ``tokens`` ... ``summary_bytes`` are
    what is held now. The ``peak_*`` counts, ``held_*`` and ``unsharded_kv_bytes`` belong to one
    moment, the same on all ranks: the end of the pass after which the group held the most tokens.
    ``dropped_pages`` are of prompts, cut before they were sealed, on their sequences' rank; ``evicted_pages`` were
    freed while decoding, on the rank that held them; ``demoted_pages`` are kept with the smaller codec instead
    (counted likewise); of one KV head each where heads have pages of their own. ``moved_pages`` have come here from
    other ranks when experts were packed anew. ``pages_by_codec`` are here now, under the codecs' labels.
    Of sparse lookups: ``reuse`` visits to pages, and those among them shortly after an earlier one
    (`pikv_ds.core.reuse`); ``reuse_distances`` their histogram over powers of two; ``audit`` the attention mass
    on this rank's pages that the choice held, where it was audited.
    ``peak_kv_bytes`` is the most at any moment, pages and prompts under way included. ``skew`` is the fullest rank's
    pages over the mean at the last step plan.
    """
    layers, fullest = cache.shape.num_layers, cache.fullest
    attention, sender = cache.attention.counters, cache.sender.counters
    reuse, audit = cache.shard.reuse, cache.shard.audit
    return {
        "rank": cache.exchange.rank,
        "tokens": cache.stored_tokens / layers,
        "own_tokens": cache.own_tokens,
        "pages": cache.pool.num_used,
        "skew": _skew([float(n) for n in cache.ledger.totals]),
        "kv_bytes": cache.kv_bytes,
        "pool_bytes": cache.pool.page_storage_bytes,
        "summary_bytes": cache.pool.summary_storage_bytes,
        "peak_tokens": fullest.stored_tokens / layers,
        "peak_own_tokens": fullest.own_tokens,
        "peak_pages": fullest.pages,
        "peak_summary_bytes": fullest.summary_bytes,
        "held_kv_bytes": fullest.kv_bytes,
        "held_pool_bytes": fullest.pool_bytes,
        "unsharded_kv_bytes": fullest.own_tokens * cache.shape.token_bytes,
        "peak_kv_bytes": cache.peak_bytes,
        "steps": cache.num_steps,
        "seals": sender["seals"],
        "overflowed_pages": sender["overflowed"],
        "dropped_pages": cache.evictor.counters["dropped_pages"],
        "evicted_pages": cache.evictor.counters["evicted_pages"],
        "demoted_pages": 0 if cache.evictor.demoter is None else cache.evictor.demoter.counters["demoted_pages"],
        "pages_by_codec": _pages_by_codec(cache),
        "moved_pages": 0 if cache.rebalancer is None else cache.rebalancer.counters["moved_pages"],
        "queries": attention["queries"],
        "pages_in_scope": cache.shard.counters["pages_in_scope"],
        "pages_visited": cache.shard.pages_visited,
        "reuse": None if reuse is None else reuse.counts.tolist(),
        "reuse_distances": None if reuse is None else reuse.histogram.tolist(),
        "audit": {"mean": audit.mean, "worst": audit.worst, "raised": audit.raised} if audit.count else None,
        "sent_bytes": dict(cache.exchange.sent_bytes),
    }


def _pages_by_codec(cache: ExpertShardedKVCache) -> dict[str, int]:
    out: Counter[str] = Counter()
    for page_format, pages in zip(cache.formats, cache.table.num_pages_by_format(), strict=True):
        out[page_format.codec.label] += pages
    return dict(out)


def stats(cache: ExpertShardedKVCache) -> dict[str, Any]:
    """Figures of all ranks. Collective: every rank of the group must call it.

    ``unrouted_layers`` are those whose choice of experts the cache does not know: whatever ``config["placement"]``
    says, their pages are placed by number.
    """
    texts = cache.exchange.all_gather_text(json.dumps(rank_stats(cache)))
    per_rank = [json.loads(t) for t in texts if t is not None]
    tokens = [r["peak_tokens"] for r in per_rank]
    queries = sum(r["queries"] for r in per_rank)
    query_bytes = sum(r["sent_bytes"].get("query", 0) for r in per_rank)
    partial_bytes = sum(r["sent_bytes"].get("partial", 0) for r in per_rank)
    in_scope = sum(r["pages_in_scope"] for r in per_rank)
    visited = sum(r["pages_visited"] for r in per_rank)
    visits, again = (sum(r["reuse"][i] for r in per_rank if r["reuse"]) for i in (0, 1))
    audited = [r["audit"]["mean"] for r in per_rank if r["audit"]]
    return {
        "config": cache.config.to_dict(),
        "unrouted_layers": list(cache.shape.unrouted),
        "num_ranks": cache.exchange.size,
        "num_layers": cache.shape.num_layers,
        "page_bytes": cache.layout.page_bytes,
        "per_rank": per_rank,
        "skew": _skew(tokens),
        "unsharded_skew": _skew([r["peak_own_tokens"] for r in per_rank]),
        "wire_bytes_per_token_layer": (query_bytes + partial_bytes) / queries if queries else 0.0,
        "wire_formula_bytes": wire_bytes_per_token_layer(cache),
        "page_wire_bytes": sum(r["sent_bytes"].get("page", 0) for r in per_rank),
        "plan_wire_bytes": sum(
            r["sent_bytes"].get(kind, 0) for r in per_rank for kind in ("plan", "page_counts", "page_header")
        ),
        "seals": sum(r["seals"] for r in per_rank),
        "dropped_pages": sum(r["dropped_pages"] for r in per_rank),
        "evicted_pages": sum(r["evicted_pages"] for r in per_rank),
        "demoted_pages": sum(r["demoted_pages"] for r in per_rank),
        "moved_pages": sum(r["moved_pages"] for r in per_rank),
        "pages_by_codec": {
            label: sum(r["pages_by_codec"][label] for r in per_rank) for label in per_rank[0]["pages_by_codec"]
        },
        "hits": visited,
        "pages_in_scope": in_scope,
        "visited_share": visited / in_scope if in_scope else 1.0,
        "reuse_hit_rate": again / visits if visits else None,
        "captured_mass": min(audited) if audited else None,
    }


def wire_bytes_per_token_layer(cache: ExpertShardedKVCache) -> int:
    """What a decoded token costs on the wire at one layer, whatever the context (the README's
    invariant 5).

    ``(G - 1) * H * (D * q + V * p + 4)``: the query goes to the G - 1 other ranks in the model's
    dtype of q bytes, an output in the partial dtype of p bytes and a float32 log-sum-exp return. V is
    D, but of latent attention the latent's size.
    """
    shape, peers = cache.shape, cache.exchange.size - 1
    partial = cache.exchange.partial_dtype.itemsize
    return peers * shape.num_heads * (shape.head_dim * shape.dtype.itemsize + shape.value_dim * partial + 4)


def table(figures: dict[str, Any], title: str = "KV cache") -> Table:
    """The figures of `stats` as a rich table: one line per rank, and the sum."""
    from rich.table import Table

    out = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("rank", "own tokens", "unsharded", "held tokens", "pages", "held KV", "peak KV", "held"):
        out.add_column(name, justify="right")
    rows = figures["per_rank"]
    largest = max((r["unsharded_kv_bytes"] for r in rows), default=0)
    for r in rows:
        out.add_row(
            str(r["rank"]),
            f"{r['peak_own_tokens']:,}",
            _mib(r["unsharded_kv_bytes"]),
            f"{r['peak_tokens']:,.0f}",
            f"{r['peak_pages']:,}",
            _mib(r["held_kv_bytes"]),
            _mib(r["peak_kv_bytes"]),
            f"{r['held_kv_bytes'] / largest:.0%} of largest" if largest else "-",
        )
    out.add_section()
    out.add_row(
        "all",
        f"{sum(r['peak_own_tokens'] for r in rows):,}",
        _mib(sum(r["unsharded_kv_bytes"] for r in rows)),
        f"{sum(r['peak_tokens'] for r in rows):,.0f}",
        f"{sum(r['peak_pages'] for r in rows):,}",
        _mib(sum(r["held_kv_bytes"] for r in rows)),
        "",
        "",
    )
    return out


def _skew(values: list[float]) -> float:
    return max(values) / (sum(values) / len(values)) if sum(values) else 1.0


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
