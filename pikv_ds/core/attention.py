"""Attention of one layer: the open tail, the local shard and the other ranks' shards, merged.

The query goes to the pages. Rows that append a single token are one part of a pass: it has the same ops, shapes and
collectives at every layer, whatever else is in the pass. All ranks' queries are gathered; each rank attends to what
it holds for all of them, and the partials go back and are merged in the order of the ranks, the tail last, in
float32: the same input gives the same bits. Prompts and chunks are the other part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds.core.exchange import Exchange, Partials
from pikv_ds.core.ledger import SHARED_SOURCE, Ledger
from pikv_ds.core.sequences import SequenceBatch, SingleTokens
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.shard import AskedRows, Shard
from pikv_ds.core.step import StepPlan
from pikv_ds.slabs import Slabs


class _Room:
    """Buffers for the queries and partials of single tokens; they are the same ones while the shapes stay.

    Args:
        shards: whose partials are merged, 0 where none has pages.
        width, num: queries with padding and without.
        own: queries for which this rank attends to its pages, where these partials travel.
        query: one that gives their shape and type.
    """

    def __init__(self, shards: int, width: int, num: int, own: int, query: Tensor, value_dim: int) -> None:
        self.shapes = shards, width, num, own, query.dtype
        num_heads, device = query.shape[1], query.device
        with torch.inference_mode(False):  # the next pass may not be in inference mode
            partials = Partials.empty((shards + 1, width), num_heads, value_dim, device)
            self.mine = Partials.empty((own,), num_heads, value_dim, device)
            self.padded = torch.zeros(width, *query.shape[1:], dtype=query.dtype, device=device)
            self.queries = torch.zeros(own, *query.shape[1:], dtype=query.dtype, device=device)
        self.tail_out, self.tail_lse = partials.outs[shards, :num], partials.lses[shards, :num]
        self.shards = Partials(partials.buffer[:shards], num_heads)
        self.outs, self.lses = partials.outs[:, :num], partials.lses[:, :num]
        if shards == 1:
            self.mine = Partials(partials.buffer[0], num_heads)


@dataclass
class ShardedAttention:
    """Exact attention over keys that are spread over the ranks of a group."""

    exchange: Exchange
    shard: Shard
    ledger: Ledger
    shape: ModelShape
    keeps_all: bool
    """No page is ever dropped or demoted."""
    flags: Tensor
    """int32 ``[layers]``, a `SealFlag` of each layer's tokens."""
    counters: Counter[str] = field(default_factory=Counter)
    """``queries``: of this rank, that have gone to the others."""
    totals: dict[int, Tensor] = field(default_factory=dict)
    """Per layer, float32 ``[n, H]``: log-sum-exps of this rank's asking queries over their whole rows in this pass, if
    the shard learns from them; in the order of `StepPlan.asking`."""
    _asked: AskedRows | None = None  # of this pass's single tokens
    _room: _Room | None = None

    def __post_init__(self) -> None:
        self.ops = self.shard.formats[0].ops
        self.flag_of = list(self.flags.split(1))  # of each layer

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
        singles = batch.singles(query.device)
        mine = query if singles.tokens is None else query[singles.tokens]
        decoded = self._single_tokens(plan, batch, singles, layer, mine, key, value, scale)
        if not plan.prefill:
            return decoded
        out = self._several_tokens(plan, batch, layer, query, key, value, scale, attend_prompts)
        if singles.tokens is None and len(singles.indices):
            return decoded
        if len(singles.indices):
            out[singles.tokens] = decoded
        return out

    # -- rows that append a single token ---------------------------------------------------------------------------

    def _single_tokens(
        self,
        plan: StepPlan,
        batch: SequenceBatch,
        singles: SingleTokens,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Puts the tokens into their tails and attends to everything before them: ``[n, H, V]``.

        Args:
            query: ``[n, H, D]``, theirs only.
            key, value: of all packed tokens.
        """
        num, num_heads, value_dim = len(query), self.shape.num_heads, self.shape.value_dim
        size = self.exchange.size if plan.decodes else 0  # shards that have pages of them
        if not num and not size:
            return query.new_empty(0, num_heads, value_dim)
        travels = size > 1 and not plan.shared
        width = plan.width if travels else num
        room = self._room_for(size, width, num, size * width if travels else num, query)
        gathered = None
        if travels:
            leaving = query
            if num < width:
                leaving = room.padded
                leaving[:num].copy_(query)
            gathered = self.exchange.gather_queries(leaving, room.queries)
        if num:
            tail = batch.tail(layer, key, value)
            self.ops.append_tokens(key, value, singles.places, tail.keys, tail.values, self.flag_of[layer])
            values = self.shard.formats[0].layout.values(tail.keys, tail.values)
            into = room.tail_out, room.tail_lse
            self.ops.tail_attention(query, tail.keys, values, singles.lengths, scale, *into, singles.tails)
        if size:
            assert self._asked is not None
            asked = self._asked
            every = query if gathered is None else gathered.wait()
            self.shard.attend_singles(layer, asked, every, scale, room.mine.outs, room.mine.lses)
            if gathered is not None:
                self.exchange.return_partials(room.mine, room.shards)
            elif size > 1:  # every rank has the queries already
                self.exchange.share(room.mine, room.shards)
        out = query.new_empty(num, num_heads, value_dim)
        total = query.new_empty(num, num_heads, dtype=torch.float32) if self.shard.learns else None
        self.ops.merge_partials(room.outs, room.lses, out, total)
        if total is not None and size:
            self.totals[layer] = total
        return out

    def _room_for(self, shards: int, width: int, num: int, own: int, query: Tensor) -> _Room:
        if self._room is None or self._room.shapes != (shards, width, num, own, query.dtype):
            self._room = None  # not two at a time
            self._room = _Room(shards, width, num, own, query, self.shape.value_dim)
        return self._room

    def prepare(self, plan: StepPlan, batch: SequenceBatch | None) -> None:
        """What is the same at every layer of a pass: the rows whose single tokens are attended to here."""
        if batch is not None:
            batch.singles(self.shard.device)
        if not plan.width:
            self._room = None  # prompts need the memory
        if not plan.decodes:
            return
        if plan.shared:
            rows = plan.singles[SHARED_SOURCE]
        else:
            rows = np.full((self.exchange.size, plan.width), -1, np.int64)
            for source, singles in enumerate(plan.singles):
                rows[source, : len(singles)] = singles
        self._asked = self.shard.ask(rows.reshape(-1), self.ledger)
        own = plan.singles[SHARED_SOURCE if plan.shared else self.exchange.rank]
        self.counters["queries"] += len(own) * self.shape.num_layers

    # -- prompts and chunks ------------------------------------------------------------------------------------------

    def _several_tokens(
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
        """The same for the rows that append several tokens; those of other tokens are left as they are."""
        rank, fetched = self.exchange.rank, set(plan.fetches[self.exchange.rank])
        sealed = [(i, mine) for i, mine in batch.slices() if batch.sealed[i] and batch.new[i] > 1]
        asking = [mine for index, mine in sealed if batch.rows[index] not in fetched]
        fetching = [(batch.rows[index], mine) for index, mine in sealed if batch.rows[index] in fetched]
        at = token_places(asking, len(query), query.device)
        stacked = query if at is None else query[at]
        self.counters["queries"] += len(stacked)
        handle = None if plan.shared else self.exchange.dispatch(stacked, plan.query_counts)
        pages = self._fetch(plan, layer, [row for row, _ in fetching])
        local, local_lse = self._own_tokens(batch, layer, query, key, value, scale, attend_prompts)
        if sum(plan.query_counts):
            source = SHARED_SOURCE if plan.shared else rank
            own = self._attend(layer, list(plan.queries[source]), stacked, scale)
            if handle is None:
                outs, lses = (list(x) for x in self._share(*own))
            else:
                asked = [asked for r, rows in enumerate(plan.queries) if r != rank for asked in rows]
                theirs, their_lses = self.exchange.combine(handle, *self._attend(layer, asked, handle.wait(), scale))
                outs, lses = [*theirs[:rank], own[0], *theirs[rank:]], [*their_lses[:rank], own[1], *their_lses[rank:]]
            if asking:
                merged = self._merge(at, outs, lses, local, local_lse)
                if self.shard.learns:
                    before = [self.totals[layer]] if layer in self.totals else []
                    self.totals[layer] = torch.cat([*before, merged])
        for (_, mine), row_pages in zip(fetching, pages, strict=True):
            page_format = self.shard.formats[0]
            asking_query = page_format.query(layer, query[mine])
            out, lse = self.shard.empty(asking_query, page_format.layout.value_dim)
            slots = torch.arange(1, len(row_pages), dtype=torch.int32, device=row_pages.device)
            self.shard.attend_pages(page_format, asking_query, Slabs.of(row_pages), slots, scale, out, lse)
            out = page_format.output(layer, out)
            self._merge(mine, [out], [lse], local, local_lse)
        return local.to(query.dtype)

    def _share(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' partials of queries that every rank has: ``[size, n, H, V]`` and ``[size, n, H]``."""
        num, num_heads, value_dim = out.shape
        if self.exchange.size == 1:
            return out[None], lse[None]
        mine = Partials.empty((num,), num_heads, value_dim, out.device)
        mine.outs.copy_(out)
        mine.lses.copy_(lse)
        every = Partials.empty((self.exchange.size, num), num_heads, value_dim, out.device)
        self.exchange.share(mine, every)
        return every.outs, every.lses

    def _attend(self, layer: int, asked: list[tuple[int, int]], query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """This rank's partials for the queries of some rows (see `Shard.attend`)."""
        sealed = self.ledger.num_sealed([row for row, _ in asked]) if asked else np.zeros(0, np.int64)
        return self.shard.attend(layer, asked, sealed, query, scale)

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
        """Whether a pass moves fewer bytes when a sequence's pages travel instead of its queries, several tokens.

        ``P * page_bytes / G < T * H * (D * q + V * p + 4)``, both sides G - 1 times: of P pages a share of
        1 / G lies here; a query of q bytes an element goes to all other ranks, and from each an output of p
        bytes an element and a log-sum-exp come back. Only where all pages are read and kept and of one format: a
        sparse lookup reads a share of them, a budget leaves a share, so there queries travel. So they do of single
        tokens, whatever their number: a decode pass has the same shapes from layer to layer.
        """
        formats = self.shard.formats
        if self.shard.reuse is not None or not self.keeps_all or self.exchange.size == 1 or len(formats) > 1:
            return False
        layout = formats[0].layout
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
        """Attention of rows that append several tokens over these and their tails: ``[N, H, V]``, ``[N, H]``.

        The log-sum-exp is left empty where nothing needs to be merged.
        """
        prompts = batch.prompts()
        nothing_left = not attend_prompts and sum(batch.new[index] for index, _ in prompts) == len(query)
        out, lse = self.shard.empty(query[:0] if nothing_left else query, self.shape.value_dim)
        lse.fill_(-torch.inf)
        if not any(batch.new):
            return out, lse
        batch.join(layer, key, value)
        if nothing_left:
            return out, lse
        plain = self.shard.formats[0].layout  # how keys and values belong together is the same in all
        value = plain.values(key, value)
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
