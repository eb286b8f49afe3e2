"""Attention of one layer: the open tail, the local shard and the other ranks' shards, merged.

The query goes to the pages. While it travels, this rank attends to what it holds itself; then it
answers the others' queries, and the partials are merged in the order of the ranks, the tail last,
in float32: the same input gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds.exchange import Exchange, StepPlan
from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops
from pikv_ds.pages import PagePool, PageTable
from pikv_ds.policies.routing import Candidates, Lookup
from pikv_ds.sequences import SequenceBatch
from pikv_ds.slabs import Slabs

FEW_QUERIES = 8
"""Up to so many query tokens per sequence are attended page by page, as in decoding."""


@dataclass
class ShardedAttention:
    """Exact attention over keys that are spread over the ranks of a group."""

    ops: Ops
    exchange: Exchange
    pool: PagePool
    table: PageTable
    layout: PageLayout
    lookup: Lookup
    num_heads: int
    counters: Counter[str] = field(default_factory=Counter)
    """``pages_in_scope``: (KV head, page) pairs that there were; ``pages_read``: those read without a
    choice; ``queries``."""
    _chosen: Tensor | int = 0
    num_sealed: dict[tuple[int, int], int] = field(default_factory=dict)
    """Sealed pages of every sequence of the group over all ranks, for the pinned local pages."""

    def __call__(
        self,
        plan: StepPlan,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention output of one layer for this rank's batch.

        Args:
            query: ``[B, H, T, D]``, positions already encoded.
            key, value: ``[B, K, T, D]``, the new tokens only.

        Returns:
            ``[B, T, H, D]`` in the query's dtype; zeros at columns that are no tokens.
        """
        rank, fetched = self.exchange.rank, set(plan.fetches[self.exchange.rank])
        sealed = [row for row in range(len(batch)) if batch.new[row] and batch.sealed[row]]
        asking = [row for row in sealed if batch.ids[row] not in fetched]
        fetching = [row for row in sealed if batch.ids[row] in fetched]
        stacked = self._queries(batch, query, asking)
        self.counters["queries"] += len(stacked)
        handle = self.exchange.dispatch(stacked, plan.query_counts)
        pages = self._fetch(plan, batch, layer, fetching)
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale)
        if sum(plan.query_counts):
            own = self._shard(layer, [(rank, s, n) for s, n in plan.rows[rank]], stacked, scale)
            asked = [(r, s, n) for r, rows in enumerate(plan.rows) if r != rank for s, n in rows]
            outs, lses = self.exchange.combine(handle, *self._shard(layer, asked, handle.wait(), scale))
            if asking:
                by_rank = [*outs[:rank], own[0], *outs[rank:]], [*lses[:rank], own[1], *lses[rank:]]
                self._merge(batch, asking, *by_rank, local, local_lse)
        for row, row_pages in zip(fetching, pages, strict=True):
            stacked = self._queries(batch, query, [row])
            out, lse = self._empty(stacked)
            slots = torch.arange(1, len(row_pages), dtype=torch.int32, device=row_pages.device)
            self._attend_pages(stacked, Slabs.of(row_pages), slots, scale, out, lse)
            self._merge(batch, [row], [out], [lse], local, local_lse)
        return local.to(query.dtype)

    def _merge(
        self,
        batch: SequenceBatch,
        rows: list[int],
        outs: list[Tensor],
        lses: list[Tensor],
        local: Tensor,
        lse: Tensor,
    ) -> None:
        """Merges partials ``[n, H, D]``, ``[n, H]`` of some sequences with their local ones, in place."""
        whole = batch.tokens is None and len(rows) == len(batch)
        if whole:
            mine, mine_lse = local.view(-1, *local.shape[2:]), lse.view(-1, lse.shape[2])
        else:
            index = [(row, column) for row in rows for column in self._token_columns(batch, row, local.shape[1])]
            at = tuple(torch.tensor(i, device=local.device) for i in zip(*index, strict=True))
            mine, mine_lse = local[at], lse[at]
        partials, partial_lses = torch.stack([*outs, mine]), torch.stack([*lses, mine_lse])
        self.ops.merge_partials(
            partials.flatten(1, 2), partial_lses.flatten(1, 2), mine.flatten(0, 1), mine_lse.flatten()
        )
        if not whole:
            local[at] = mine

    @staticmethod
    def _queries(batch: SequenceBatch, query: Tensor, rows: list[int]) -> Tensor:
        """The query tokens of some sequences, ``[n, H, D]``."""
        if not rows:
            return query.new_empty(0, query.shape[1], query.shape[3])
        return torch.cat([batch.columns(query[row], row).transpose(0, 1) for row in rows])

    @staticmethod
    def _empty(query: Tensor) -> tuple[Tensor, Tensor]:
        """Room for a partial: float32 ``[n, H, D]`` and ``[n, H]``."""
        out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)

    def _fetch(self, plan: StepPlan, batch: SequenceBatch, layer: int, rows: list[int]) -> list[Tensor]:
        """Brings all pages of some sequences here, in rank order, each uint8 ``[1 + P, page_bytes]`` with the null
        page first."""
        if not any(plan.fetches):
            return []
        rank, size = self.exchange.rank, self.exchange.size
        local = [
            [self._local_pages(layer, (source, sequence)) for sequence in plan.fetches[source]]
            for source in range(size)
        ]
        leaving = [p for source in range(size) if source != rank for p in local[source]]
        payload = torch.cat(leaving) if leaving else self._local_pages(layer, (-1, -1))
        send = [0 if source == rank else sum(map(len, local[source])) for source in range(size)]
        loads = [[0 if r == rank else batch.loads[layer][row][r] for row in rows] for r in range(size)]
        received = self.exchange.send_pages(payload, send, [sum(x) for x in loads], kind="fetched_page").wait()
        pieces = list(received.split([n for per_rank in loads for n in per_rank]))
        by_rank = [pieces[r * len(rows) : (r + 1) * len(rows)] for r in range(size)]
        by_rank[rank] = local[rank]
        null = payload.new_empty(1, payload.shape[1])  # slot 0 is a hole to the ops
        return [torch.cat([null, *(by_rank[r][i] for r in range(size))]) for i in range(len(rows))]

    def _local_pages(self, layer: int, sequence: tuple[int, int]) -> Tensor:
        """Encoded pages of a sequence that lie here, uint8 ``[P, page_bytes]``."""
        slots = self._slots(layer, sequence)
        out = torch.empty(len(slots), self.layout.page_bytes, dtype=torch.uint8, device=self.pool.device)
        self.ops.gather_pages(self.pool.slabs, slots, out)
        return out

    def _slots(self, layer: int, sequence: tuple[int, int]) -> Tensor:
        """Slots of a sequence's pages that lie here, int32 ``[P]``."""
        slots = [slot for _, slot in self.table.pages(sequence, layer)]
        return torch.tensor(slots, dtype=torch.int32, device=self.pool.device)

    def cheaper_to_fetch(self, num_pages: int, query_tokens: int) -> bool:
        """Whether a pass moves fewer bytes when the pages travel instead of the queries.

        Only where all pages are read: a sparse lookup reads a share of them, so its queries travel.
        """
        if self.lookup.summary is not None or self.exchange.size == 1:
            return False
        elements = query_tokens * self.num_heads * self.layout.head_dim
        queries = elements * (self.layout.dtype.itemsize + self.exchange.partial_dtype.itemsize)
        return num_pages * self.layout.page_bytes / self.exchange.size < queries

    @staticmethod
    def _token_columns(batch: SequenceBatch, row: int, width: int) -> list[int]:
        return list(range(width)) if batch.tokens is None else batch.tokens[row].nonzero().squeeze(1).tolist()

    def _own_tokens(
        self,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the open tail and the tokens of this pass: ``[B, T, H, D]``, ``[B, T, H]``.

        The log-sum-exp is left empty where nothing needs to be merged.
        """
        b, h, t, d = query.shape
        out = torch.zeros(b, t, h, d, dtype=torch.float32, device=query.device)
        lse = torch.full((b, t, h), -torch.inf, dtype=torch.float32, device=query.device)
        if not any(batch.new):
            return out, lse
        if t == 1 and batch.tokens is None:
            lengths = batch.append_one(layer, key, value)
            tail = batch.tail(layer, key)
            self.ops.tail_attention(
                query.squeeze(2),
                tail.keys,
                tail.values,
                lengths,
                scale,
                out.squeeze(1),
                lse.squeeze(1),
            )
            return out, lse
        joined = batch.append_many(layer, key, value)
        whole = batch.tokens is None and not any(batch.lengths) and all(batch.new)
        if whole:  # fresh prompts of one length: one call for the batch
            return _prompt_attention(query, key, value, scale).transpose(1, 2).float(), lse
        for row, (keys, values) in enumerate(joined):
            if not batch.new[row]:
                continue
            columns = slice(None) if batch.tokens is None else batch.tokens[row]
            q = batch.columns(query[row], row)
            if batch.lengths[row] == 0:
                fresh = _prompt_attention(q[None], keys[None], values[None], scale)
                out[row, columns] = fresh[0].transpose(0, 1).float()
                continue
            n = batch.new[row]
            row_out, row_lse = out.new_empty(n, h, d), lse.new_empty(n, h)
            self.ops.context_attention(
                q.transpose(0, 1), keys, values, scale, batch.open_tokens(row), row_out, row_lse
            )
            out[row, columns], lse[row, columns] = row_out, row_lse
        return out, lse

    def _shard(
        self, layer: int, asked: list[tuple[int, int, int]], query: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of query rows over the pages that lie on this rank.

        Args:
            asked: ``(source rank, sequence id, query tokens)``, in the order of the rows.
            query: ``[R, H, D]``.

        Returns:
            float32 ``[R, H, D]`` and ``[R, H]``.
        """
        out, lse = self._empty(query)
        if not asked:
            return out, lse
        sequences = tuple((source, sequence) for source, sequence, _ in asked)
        lengths = [tokens for _, _, tokens in asked]
        if self.lookup.summary is not None or max(lengths) <= FEW_QUERIES:
            self._attend_rows(layer, sequences, lengths, query, scale, out, lse)
            return out, lse
        start = 0
        for sequence, tokens in zip(sequences, lengths, strict=True):
            mine = slice(start, start + tokens)
            slots = self._slots(layer, sequence)
            self._attend_pages(query[mine], self.pool.slabs, slots, scale, out[mine], lse[mine])
            start += tokens
        return out, lse

    def _attend_rows(
        self,
        layer: int,
        sequences: tuple[tuple[int, int], ...],
        lengths: list[int],
        query: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Few queries per sequence, over those of its pages here that the lookup chooses."""
        rows = self.table.rows(layer, sequences)
        table, counts = rows.slots, rows.counts
        in_scope = sum(len(self.table.pages(s, layer)) * n for s, n in zip(sequences, lengths, strict=True))
        in_scope *= self.layout.num_kv_heads
        self.counters["pages_in_scope"] += in_scope
        sparse = self.lookup.summary is not None
        if sparse or len(set(lengths)) > 1:  # else the queries of a sequence share its row of the table
            repeats = torch.tensor(lengths, device=query.device)
            table, counts = (x.repeat_interleave(repeats, dim=0) for x in (table, counts))
        if sparse and in_scope:
            page_idx = rows.page_idx.repeat_interleave(repeats, dim=0)
            sealed = torch.tensor([self.num_sealed[s] for s in sequences], dtype=torch.int32, device=query.device)
            sealed = sealed.repeat_interleave(repeats)
            pages = Candidates(table, page_idx, counts, sealed, self.pool.summary_slabs, self.layout)
            table = self.lookup.select(self.ops, query, pages)
            self._chosen = self._chosen + (table > 0).sum()
        else:
            self.counters["pages_read"] += in_scope
        self.ops.decode_attention(query, self.pool.slabs, table, counts, self.layout, scale, out, lse)

    def _attend_pages(
        self, query: Tensor, slabs: Slabs, slots: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Many queries of one sequence over its pages."""
        for counter in ("pages_in_scope", "pages_read"):
            self.counters[counter] += len(slots) * self.layout.num_kv_heads * len(query)
        self.ops.prefill_attention(query, slabs, slots, self.layout, scale, out, lse)

    @property
    def pages_visited(self) -> int:
        """(KV head, page) pairs read. Waits for the device, where lookups choose them."""
        return self.counters["pages_read"] + int(self._chosen)


def _prompt_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Ordinary causal attention of whole prompts, ``[B, H, T, D]``: nothing to merge, so torch's own."""
    group = query.shape[1] // key.shape[1]
    if group > 1:  # repeated as Hugging Face does: the same kernel, the same bits
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scale)
