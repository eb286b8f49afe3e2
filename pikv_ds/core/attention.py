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

from pikv_ds.core.eviction import Evictor, Visit
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.formats import PageFormat
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.reuse import Audit, Reuse
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.step import SHARED_SOURCE, StepPlan
from pikv_ds.ops import Ops
from pikv_ds.policies.lookups import Candidates, Lookup, SparseLookup
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
    formats: list[PageFormat]
    lookup: Lookup
    evictor: Evictor
    num_heads: int
    head_dim: int
    value_dim: int
    """Channels of an attention output."""
    counters: Counter[str] = field(default_factory=Counter)
    """``pages_in_scope``: (KV head, page) pairs that there were; ``pages_read``: those read without a
    choice; ``queries``."""
    reuse: Reuse | None = None
    """Of pages that a sparse lookup chooses; None where all are read."""
    audit: Audit = field(default_factory=Audit)
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
        sealed = [(row, mine) for row, mine in batch.slices() if batch.sealed[row]]
        asking = [mine for row, mine in sealed if batch.ids[row] not in fetched]
        fetching = [(row, mine) for row, mine in sealed if batch.ids[row] in fetched]
        at = token_places(asking, len(query), query.device)
        stacked = query if at is None else query[at]
        self.counters["queries"] += len(stacked)
        handle = self.exchange.dispatch(stacked, plan.query_counts)
        pages = self._fetch(plan, batch, layer, [row for row, _ in fetching])
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale, attend_prompts)
        if sum(plan.query_counts):
            own = self._shard(layer, [(rank, s, n) for s, n in plan.rows[rank]], stacked, scale)
            asked = [(r, s, n) for r, rows in enumerate(plan.rows) if r != rank for s, n in rows]
            outs, lses = self.exchange.combine(handle, *self._shard(layer, asked, handle.wait(), scale))
            if asking:
                by_rank = [*outs[:rank], own[0], *outs[rank:]], [*lses[:rank], own[1], *lses[rank:]]
                merged = self._merge(at, *by_rank, local, local_lse)
                if self.evictor.learns:
                    self.evictor.merged[layer] = merged
        for (_, mine), row_pages in zip(fetching, pages, strict=True):
            page_format = self.formats[0]
            asking_query = page_format.query(layer, query[mine])
            out, lse = self._empty(asking_query, page_format.layout.value_dim)
            slots = torch.arange(1, len(row_pages), dtype=torch.int32, device=row_pages.device)
            self._attend_pages(page_format, asking_query, Slabs.of(row_pages), slots, scale, out, lse)
            out = page_format.output(layer, out)
            self._merge(mine, [out], [lse], local, local_lse)
        return local.to(query.dtype)

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
        rows = plan.rows[SHARED_SOURCE]
        asking = [mine for row, mine in batch.slices() if batch.sealed[row]]
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale, attend_prompts)
        if asking:
            at = token_places(asking, len(query), query.device)
            stacked = query if at is None else query[at]
            self.counters["queries"] += len(stacked)
            own = self._shard(layer, [(SHARED_SOURCE, s, n) for s, n in rows], stacked, scale)
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

    def _empty(self, query: Tensor, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """Room for a partial: float32 ``[n, H, V]`` and ``[n, H]``."""
        out = torch.empty(*query.shape[:2], channels or self.value_dim, dtype=torch.float32, device=query.device)
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
        page_bytes = payload.shape[1]
        send = [0 if source == rank else sum(map(len, local[source])) * page_bytes for source in range(size)]
        loads = [[0 if r == rank else batch.loads[layer][row][r] for row in rows] for r in range(size)]
        receive = [sum(x) * page_bytes for x in loads]
        received = self.exchange.send_pages(payload.flatten(), send, receive, kind="fetched_page").wait()
        pieces = list(received.view(-1, page_bytes).split([n for per_rank in loads for n in per_rank]))
        by_rank = [pieces[r * len(rows) : (r + 1) * len(rows)] for r in range(size)]
        by_rank[rank] = local[rank]
        null = payload.new_empty(1, payload.shape[1])  # slot 0 is a hole to the ops
        return [torch.cat([null, *(by_rank[r][i] for r in range(size))]) for i in range(len(rows))]

    def _local_pages(self, layer: int, sequence: tuple[int, int]) -> Tensor:
        """Encoded pages of a sequence that lie here, uint8 ``[P, page_bytes]``."""
        slots = self._slots(layer, sequence, 0)
        out = torch.empty(len(slots), self.pool.sizes[0].page, dtype=torch.uint8, device=self.pool.device)
        self.ops.gather_pages(self.pool.pages[0], slots, out)
        return out

    def _slots(self, unit: int, sequence: tuple[int, int], page_format: int) -> Tensor:
        """Slots of a sequence's pages of a unit and format that lie here, int32 ``[P]``."""
        slots = [slot for _, slot in self.table.pages(sequence, unit, page_format)]
        return torch.tensor(slots, dtype=torch.int32, device=self.pool.device)

    def cheaper_to_fetch(self, num_pages: int, query_tokens: int) -> bool:
        """Whether a pass moves fewer bytes when a sequence's pages travel instead of its queries.

        ``P * page_bytes / G < T * H * (D * q + V * p + 4)``, both sides G - 1 times: of P pages a share of
        1 / G lies here; a query of q bytes an element goes to all other ranks, and from each an output of p
        bytes an element and a log-sum-exp come back. Only where all pages are read and kept and of one format: a
        sparse lookup reads a share of them, a budget leaves a share, so there queries travel. A single token asks by
        its query, too, but of latent pages: an absorbed query of all heads is as large as some pages.
        """
        if self.lookup.summary is not None or self.evictor.cuts or self.exchange.size == 1 or len(self.formats) > 1:
            return False
        layout = self.formats[0].layout
        if query_tokens == 1 and layout.latent_dim is None:
            return False
        query = self.head_dim * layout.dtype.itemsize
        partial = self.value_dim * self.exchange.partial_dtype.itemsize + torch.float32.itemsize
        queries = query_tokens * self.num_heads * (query + partial)
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
        nothing_left = not attend_prompts and sum(batch.new[row] for row, _ in prompts) == len(query)
        out, lse = self._empty(query[:0] if nothing_left else query)
        lse.fill_(-torch.inf)
        if not any(batch.new):
            return out, lse
        batch.append(layer, key, value)
        if nothing_left:
            return out, lse
        plain = self.formats[0].layout  # how keys and values belong together is the same in all
        value = plain.values(key, value)
        if any(n == 1 for n in batch.new):
            self._single_tokens(batch, layer, query, scale, out, lse)
        joined = batch.fresh.get(layer, {})
        prompts = prompts if attend_prompts else []
        width = batch.new[prompts[0][0]] if prompts else 0
        if width * len(prompts) == len(query) and all(batch.new[row] == width for row, _ in prompts):
            # Fresh prompts of one length and nothing else: one call for all.
            return prompt_attention(query, key, value, len(prompts), scale), lse
        for _, mine in prompts:
            out[mine] = prompt_attention(query[mine], key[mine], value[mine], 1, scale)
        for row, mine in batch.slices():
            if row in joined and batch.lengths[row]:
                keys, values = joined[row]
                self.ops.context_attention(
                    query[mine],
                    keys,
                    plain.values(keys, values),
                    scale,
                    batch.open_tokens(row),
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
        values = self.formats[0].layout.values(keys, None if tail.values is None else tail.values[: len(batch)])
        if places.all_rows:
            self.ops.tail_attention(query, keys, values, places.lengths, scale, out, lse)
            return
        by_row = query.new_zeros(len(batch), *query.shape[1:])
        by_row[places.rows] = query[places.tokens]
        row_out, row_lse = self._empty(by_row)
        self.ops.tail_attention(by_row, keys, values, places.lengths, scale, row_out, row_lse)
        out[places.tokens], lse[places.tokens] = row_out[places.rows], row_lse[places.rows]

    def _shard(
        self, layer: int, asked: list[tuple[int, int, int]], query: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of query rows over the pages that lie on this rank.

        Args:
            asked: ``(source rank, sequence id, query tokens)``, in the order of the rows.
            query: ``[R, H, D]``.

        Returns:
            float32 ``[R, H, V]`` and ``[R, H]``.
        """
        if not asked:
            return self._empty(query)
        sequences = tuple((source, sequence) for source, sequence, _ in asked)
        lengths = [tokens for _, _, tokens in asked]
        units = range(layer * self.evictor.streams, (layer + 1) * self.evictor.streams)
        few = self.lookup.summary is not None or max(lengths) <= FEW_QUERIES
        partials = []
        for i in self.table.formats(units, sequences):
            basis_query = self.formats[i].query(layer, query)
            out, lse = self._empty(basis_query, self.formats[i].layout.value_dim)
            attend = self._attend_rows if few else self._attend_many
            attend(i, layer, sequences, lengths, basis_query, scale, out, lse)
            partials.append((self.formats[i].output(layer, out), lse))
        if len(partials) == 1:
            return partials[0]
        outs, lses = (torch.stack(x) for x in zip(*partials, strict=True))
        out, lse = self._empty(query)
        self.ops.merge_partials(outs.flatten(1, 2), lses.flatten(1, 2), out.flatten(0, 1), lse.flatten())
        return out, lse

    def _attend_many(
        self,
        page_format: int,
        layer: int,
        sequences: tuple[tuple[int, int], ...],
        lengths: list[int],
        query: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Many queries of some sequences, over all of their pages of a format here."""
        start, streams, this = 0, self.evictor.streams, self.formats[page_format]
        slabs = self.pool.pages[page_format]
        for sequence, tokens in zip(sequences, lengths, strict=True):
            mine = slice(start, start + tokens)
            start += tokens
            if streams == 1:
                slots = self._slots(layer, sequence, page_format)
                self._attend_pages(this, query[mine], slabs, slots, scale, out[mine], lse[mine])
                continue
            by_stream = query[mine].unflatten(1, (streams, -1)).transpose(0, 1).contiguous()  # [streams, T, G, D]
            for stream, heads in enumerate(torch.arange(query.shape[1], device=query.device).chunk(streams)):
                part, part_lse = self._empty(by_stream[stream], this.layout.value_dim)
                slots = self._slots(layer * streams + stream, sequence, page_format)
                self._attend_pages(this, by_stream[stream], slabs, slots, scale, part, part_lse)
                out[mine, heads[0] : heads[-1] + 1], lse[mine, heads[0] : heads[-1] + 1] = part, part_lse

    def _attend_rows(
        self,
        page_format: int,
        layer: int,
        sequences: tuple[tuple[int, int], ...],
        lengths: list[int],
        query: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Few queries per sequence, over those of its pages of a format here that the lookup chooses.

        Where heads have pages of their own, each is a row of the table by itself.
        """
        streams, learns = self.evictor.streams, self.evictor.learns
        this, slabs = self.formats[page_format], self.pool.pages[page_format]
        units = range(layer * streams, (layer + 1) * streams)
        rows = self.table.rows(units, sequences, page_format)
        query, out = (x.unflatten(1, (streams, -1)).flatten(0, 1) for x in (query, out))  # [R * streams, heads, D]
        lse = lse.view(len(query), -1)
        table, page_idx, counts = rows.slots, rows.page_idx, rows.counts
        in_scope = sum(
            len(self.table.pages(s, u, page_format)) * n
            for s, n in zip(sequences, lengths, strict=True)
            for u in units
        )
        in_scope *= this.layout.num_kv_heads
        self.counters["pages_in_scope"] += in_scope
        sparse = self.lookup.summary is not None
        if sparse or learns or len(set(lengths)) > 1 or (streams > 1 and lengths[0] > 1):
            repeats = torch.tensor(
                lengths, device=query.device
            )  # else a sequence's queries share its row of the table
            table, page_idx, counts = (
                x.unflatten(0, (len(sequences), streams)).repeat_interleave(repeats, dim=0).flatten(0, 1)
                for x in (table, page_idx, counts)
            )
        every = table
        if sparse and in_scope:
            sealed = torch.tensor([self.num_sealed[s] for s in sequences], dtype=torch.int32, device=query.device)
            sealed = sealed.repeat_interleave(repeats * streams)
            owners = [s for s, n in zip(sequences, lengths, strict=True) for _ in range(n * streams)]
            table = self._choose(layer, page_format, owners, query, every, page_idx, counts, sealed, scale)
        else:
            self.counters["pages_read"] += in_scope
        page_lse = query.new_empty(*query.shape[:2], table.shape[-1], dtype=torch.float32) if learns else None
        this.ops.decode_attention(query, slabs, table, counts, this.layout, scale, out, lse, page_lse)
        if page_lse is not None:
            asked = [(source, sequence, n) for (source, sequence), n in zip(sequences, lengths, strict=True)]
            self.evictor.visits.append(Visit(layer, asked, every, page_lse))

    def _choose(
        self,
        layer: int,
        page_format: int,
        owners: list[tuple[int, int]],
        query: Tensor,
        slots: Tensor,
        page_idx: Tensor,
        counts: Tensor,
        num_sealed: Tensor,
        scale: float,
    ) -> Tensor:
        """The table of the pages that the lookup chooses, int32 ``[R, K, P]``; audits the choice now and then.

        Args:
            owners: the sequence of each row.
        """
        reuse, lookup = self.reuse, self.lookup
        assert reuse is not None
        assert isinstance(lookup, SparseLookup)
        misses = reuse.misses(slots) if lookup.wants_misses else None
        this = self.formats[page_format]
        summaries, pages = self.pool.summaries[page_format], self.pool.pages[page_format]
        boost = None
        if self.audit.boosts:
            raised = [self.audit.boost(sequence) for sequence in owners]
            boost = torch.tensor(raised, dtype=torch.float64, device=query.device)
        candidates = Candidates(
            slots, page_idx, counts, num_sealed, summaries, this.layout, pages, scale, boost, misses
        )
        table = lookup.select(this.ops, query, candidates)
        self._chosen = self._chosen + (table > 0).sum()
        reuse.visit(table)
        if self.table.trace is not None:
            self.table.trace.visit(layer, table[table > 0].unique().tolist())
        if lookup.audit_every and reuse.step % lookup.audit_every == 0:
            out, lse = self._empty(query, this.layout.value_dim)
            page_lse = query.new_empty(*query.shape[:2], slots.shape[1], dtype=torch.float32)
            this.ops.decode_attention(query, pages, slots, counts, this.layout, scale, out, lse, page_lse)
            chosen = (table > 0).repeat_interleave(query.shape[1] // this.layout.num_kv_heads, dim=1)
            mass = torch.exp(page_lse - lse[..., None]).masked_fill(~chosen, 0.0).sum(-1)
            for sequence in dict.fromkeys(owners):
                rows = [i for i, owner in enumerate(owners) if owner == sequence and counts[i]]
                if rows:
                    self.audit.note(sequence, mass[rows], lookup.floor)
        return table

    def _attend_pages(
        self,
        page_format: PageFormat,
        query: Tensor,
        slabs: Slabs,
        slots: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Many queries of one sequence over its pages of a format."""
        layout = page_format.layout
        for counter in ("pages_in_scope", "pages_read"):
            self.counters[counter] += len(slots) * layout.num_kv_heads * len(query)
        page_format.ops.prefill_attention(query, slabs, slots, layout, scale, out, lse)

    @property
    def pages_visited(self) -> int:
        """(KV head, page) pairs read. Waits for the device, where lookups choose them."""
        return self.counters["pages_read"] + int(self._chosen)


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
