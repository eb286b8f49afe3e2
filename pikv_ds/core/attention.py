"""Attention of one layer: the open tail, the local shard and the other ranks' shards, merged.

The query goes to the pages. While it travels, this rank attends to what it holds itself; then it
answers the others' queries, and the partials are merged in the order of the ranks, the tail last,
in float32: the same input gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds.core.exchange import Exchange
from pikv_ds.core.ledger import SHARED_SOURCE, Ledger
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.shard import Shard
from pikv_ds.core.step import StepPlan
from pikv_ds.slabs import Slabs


@dataclass
class ShardedAttention:
    """Exact attention over keys that are spread over the ranks of a group."""

    exchange: Exchange
    shard: Shard
    ledger: Ledger
    shape: ModelShape
    keeps_all: bool
    """No page is ever dropped or demoted."""
    counters: Counter[str] = field(default_factory=Counter)
    """``queries``: of this rank, that have gone to the others."""
    totals: dict[int, Tensor] = field(default_factory=dict)
    """Per layer, float32 ``[n, H]``: log-sum-exps of this rank's asking queries over their whole rows in this pass, if
    the shard learns from them."""

    def __post_init__(self) -> None:
        self.ops = self.shard.formats[0].ops

    def __call__(
        self,
        plan: StepPlan,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        attend_prompts: bool = True,
    ) -> Tensor:
        """Attention output of one layer for this rank's batch, whose tokens are packed.

        Args:
            query: ``[N, H, D]``, positions already encoded; of latent attention the absorbed query.
            key, value: ``[N, K, D]``. Of latent attention the key is latent and rotary key in one, and there
                is no value.
            attend_prompts: False: the caller attends to the prompts that begin in this pass (`SequenceBatch.prompts`)
                itself, as latent attention does with keys and values expanded per head. Their rows of the query
                are not read, and those of the result are undefined.

        Returns:
            ``[N, H, V]`` in the query's dtype; no rows where the caller attends to all of them.
        """
        query = query.contiguous()  # it may be a piece of one tensor with keys and values
        if batch.shared:
            return self._shared(plan, batch, layer, query, key, value, scale, attend_prompts)
        rank, fetched = self.exchange.rank, set(plan.fetches[self.exchange.rank])
        sealed = [(index, mine) for index, mine in batch.slices() if batch.sealed[index]]
        asking = [mine for index, mine in sealed if batch.rows[index] not in fetched]
        fetching = [(batch.rows[index], mine) for index, mine in sealed if batch.rows[index] in fetched]
        at = token_places(asking, len(query), query.device)
        stacked = query if at is None else query[at]
        self.counters["queries"] += len(stacked)
        handle = self.exchange.dispatch(stacked, plan.query_counts)
        pages = self._fetch(plan, layer, [row for row, _ in fetching])
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale, attend_prompts)
        if sum(plan.query_counts):
            own = self._attend(layer, list(plan.queries[rank]), stacked, scale)
            asked = [asked for r, rows in enumerate(plan.queries) if r != rank for asked in rows]
            outs, lses = self.exchange.combine(handle, *self._attend(layer, asked, handle.wait(), scale))
            if asking:
                by_rank = [*outs[:rank], own[0], *outs[rank:]], [*lses[:rank], own[1], *lses[rank:]]
                merged = self._merge(at, *by_rank, local, local_lse)
                if self.shard.learns:
                    self.totals[layer] = merged
        for (_, mine), row_pages in zip(fetching, pages, strict=True):
            page_format = self.shard.formats[0]
            asking_query = page_format.query(layer, query[mine])
            out, lse = self.shard.empty(asking_query, page_format.layout.value_dim)
            slots = torch.arange(1, len(row_pages), dtype=torch.int32, device=row_pages.device)
            self.shard.attend_pages(page_format, asking_query, Slabs.of(row_pages), slots, scale, out, lse)
            out = page_format.output(layer, out)
            self._merge(mine, [out], [lse], local, local_lse)
        return local.to(query.dtype)

    def _attend(self, layer: int, asked: list[tuple[int, int]], query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """This rank's partials for the queries of some rows (see `Shard.attend`)."""
        sealed = self.ledger.num_sealed([row for row, _ in asked]) if asked else np.zeros(0, np.int64)
        return self.shard.attend(layer, asked, sealed, query, scale)

    def _shared(
        self,
        plan: StepPlan,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        attend_prompts: bool,
    ) -> Tensor:
        """The same where every rank has this batch: the queries are everywhere already, so only partials travel."""
        rows = list(plan.queries[SHARED_SOURCE])
        asking = [mine for index, mine in batch.slices() if batch.sealed[index]]
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale, attend_prompts)
        if asking:
            at = token_places(asking, len(query), query.device)
            stacked = query if at is None else query[at]
            self.counters["queries"] += len(stacked)
            own = self._attend(layer, rows, stacked, scale)
            outs, lses = self.exchange.share(*own)
            self._merge(at, list(outs), list(lses), local, local_lse)
        return local.to(query.dtype)

    def _merge(
        self, at: Tensor | slice | None, outs: list[Tensor], lses: list[Tensor], local: Tensor, lse: Tensor
    ) -> Tensor:
        """Merges partials ``[n, H, V]``, ``[n, H]`` of some tokens with their local ones, in place.

        Args:
            at: the tokens' places; None: all.

        Returns:
            The log-sum-exps over all of them, ``[n, H]``.
        """
        mine, mine_lse = (local, lse) if at is None else (local[at], lse[at])
        partials, partial_lses = torch.stack([*outs, mine]), torch.stack([*lses, mine_lse])
        self.ops.merge_partials(
            partials.flatten(1, 2), partial_lses.flatten(1, 2), mine.flatten(0, 1), mine_lse.flatten()
        )
        if at is not None:
            local[at] = mine
        return mine_lse

    def _fetch(self, plan: StepPlan, layer: int, rows: list[int]) -> list[Tensor]:
        """Brings all pages of some rows here, in rank order, each uint8 ``[1 + P, page_bytes]`` with the null page
        first."""
        if not any(plan.fetches):
            return []
        rank, size = self.exchange.rank, self.exchange.size
        local = [[self._local_pages(layer, row) for row in plan.fetches[source]] for source in range(size)]
        leaving = [p for source in range(size) if source != rank for p in local[source]]
        page_bytes = self.shard.pool.sizes[0].page
        nothing = torch.empty(0, page_bytes, dtype=torch.uint8, device=self.shard.device)
        payload = torch.cat(leaving) if leaving else nothing
        send = [0 if source == rank else sum(map(len, local[source])) * page_bytes for source in range(size)]
        counts = self.ledger.pages[rows, layer].T  # [ranks, rows]
        loads = [[0] * len(rows) if r == rank else counts[r].tolist() for r in range(size)]
        receive = [sum(x) * page_bytes for x in loads]
        received = self.exchange.send_pages(payload.flatten(), send, receive, kind="fetched_page").wait()
        pieces = list(received.view(-1, page_bytes).split([n for per_rank in loads for n in per_rank]))
        by_rank = [pieces[r * len(rows) : (r + 1) * len(rows)] for r in range(size)]
        by_rank[rank] = local[rank]
        null = payload.new_empty(1, page_bytes)  # slot 0 is a hole to the ops
        return [torch.cat([null, *(by_rank[r][i] for r in range(size))]) for i in range(len(rows))]

    def _local_pages(self, layer: int, row: int) -> Tensor:
        """Encoded pages of a row that lie here, uint8 ``[P, page_bytes]``."""
        found = self.shard.table.entries(np.array([row]), np.array([layer]), 0)
        return self.shard.read(found.slots, 0, summaries=False)

    def cheaper_to_fetch(self, num_pages: int, query_tokens: int) -> bool:
        """Whether a pass moves fewer bytes when a sequence's pages travel instead of its queries.

        ``P * page_bytes / G < T * H * (D * q + V * p + 4)``, both sides G - 1 times: of P pages a share of
        1 / G lies here; a query of q bytes an element goes to all other ranks, and from each an output of p
        bytes an element and a log-sum-exp come back. Only where all pages are read and kept and of one format: a
        sparse lookup reads a share of them, a budget leaves a share, so there queries travel. A single token asks by
        its query, too, but of latent pages: an absorbed query of all heads is as large as some pages.
        """
        formats = self.shard.formats
        if self.shard.reuse is not None or not self.keeps_all or self.exchange.size == 1 or len(formats) > 1:
            return False
        layout = formats[0].layout
        if query_tokens == 1 and layout.latent_dim is None:
            return False
        query = self.shape.head_dim * layout.dtype.itemsize
        partial = self.shape.value_dim * self.exchange.partial_dtype.itemsize + torch.float32.itemsize
        queries = query_tokens * self.shape.num_heads * (query + partial)
        return num_pages * layout.page_bytes / self.exchange.size < queries

    def _own_tokens(
        self,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        attend_prompts: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the open tails and the tokens of this pass: ``[N, H, V]``, ``[N, H]``.

        The log-sum-exp is left empty where nothing needs to be merged.
        """
        prompts = batch.prompts()
        nothing_left = not attend_prompts and sum(batch.new[index] for index, _ in prompts) == len(query)
        out, lse = self.shard.empty(query[:0] if nothing_left else query, self.shape.value_dim)
        lse.fill_(-torch.inf)
        if not any(batch.new):
            return out, lse
        batch.append(layer, key, value)
        if nothing_left:
            return out, lse
        plain = self.shard.formats[0].layout  # how keys and values belong together is the same in all
        value = plain.values(key, value)
        if any(n == 1 for n in batch.new):
            self._single_tokens(batch, layer, query, scale, out, lse)
        joined = batch.fresh.get(layer, {})
        prompts = prompts if attend_prompts else []
        width = batch.new[prompts[0][0]] if prompts else 0
        if width * len(prompts) == len(query) and all(batch.new[index] == width for index, _ in prompts):
            # Fresh prompts of one length and nothing else: one call for all.
            return prompt_attention(query, key, value, len(prompts), scale), lse
        for _, mine in prompts:
            out[mine] = prompt_attention(query[mine], key[mine], value[mine], 1, scale)
        for index, mine in batch.slices():
            if index in joined and batch.lengths[index]:
                keys, values = joined[index]
                self.ops.context_attention(
                    query[mine],
                    keys,
                    plain.values(keys, values),
                    scale,
                    batch.open_tokens(index),
                    out[mine],
                    lse[mine],
                )
        return out, lse

    def _single_tokens(
        self, batch: SequenceBatch, layer: int, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Attention over the tails for the sequences that append one token, into their places of `out` and `lse`."""
        tail, places = batch.tails[layer], batch.places(query.device)
        assert tail is not None
        keys = tail.keys[: len(batch)]
        values = self.shard.formats[0].layout.values(keys, None if tail.values is None else tail.values[: len(batch)])
        if places.all_sequences:
            self.ops.tail_attention(query, keys, values, places.lengths, scale, out, lse)
            return
        by_index = query.new_zeros(len(batch), *query.shape[1:])
        by_index[places.indices] = query[places.tokens]
        index_out, index_lse = self.shard.empty(by_index, self.shape.value_dim)
        self.ops.tail_attention(by_index, keys, values, places.lengths, scale, index_out, index_lse)
        out[places.tokens], lse[places.tokens] = index_out[places.indices], index_lse[places.indices]


def token_places(slices: list[slice], num_tokens: int, device: torch.device) -> Tensor | None:
    """The places in some slices of packed tokens, int64; None if that is all of them."""
    if sum(s.stop - s.start for s in slices) == num_tokens:
        return None
    places = [i for s in slices for i in range(s.start, s.stop)]
    return torch.tensor(places, dtype=torch.int64, device=device)


def prompt_attention(query: Tensor, key: Tensor, value: Tensor, num_prompts: int, scale: float) -> Tensor:
    """Ordinary causal attention of whole prompts of one length, packed: nothing to merge, so torch's own.

    Args:
        query, key, value: ``[N, H, D]``, ``[N, K, D]``, ``[N, K, V]``.

    Returns:
        float32 ``[N, H, V]``.
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.unflatten(0, (num_prompts, -1)).transpose(1, 2) for x in (query, key, value))  # [B, heads, T, D]
    if group > 1:  # repeated as Hugging Face does: the same kernel, the same bits
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale)
    return out.transpose(1, 2).flatten(0, 1).float()
