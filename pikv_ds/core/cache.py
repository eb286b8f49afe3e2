"""`ExpertShardedKVCache`: the one stateful class. It owns storage, tables and statistics.

A rank has one cache. Its own sequences live in `SequenceBatch`es; their sealed pages live on the
ranks of their home experts. A forward pass is `begin_step`, then for every layer `attend` and
`routed`; all ranks of the group make the same passes, with zero tokens where they have none.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds.config import PiKVConfig
from pikv_ds.core import step
from pikv_ds.core.attention import ShardedAttention
from pikv_ds.core.demotion import Demoter
from pikv_ds.core.eviction import Evictor, decode_limits
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.formats import describe_flags, make_formats, num_streams
from pikv_ds.core.latencies import Latencies
from pikv_ds.core.ledger import SHARED_SOURCE, Ledger
from pikv_ds.core.placement import rank_bound
from pikv_ds.core.planner import Planner
from pikv_ds.core.pool import PagePool
from pikv_ds.core.rebalance import Rebalancer
from pikv_ds.core.sealing import PageSender, Sending
from pikv_ds.core.sequences import NO_ROW, FullPages, SequenceBatch
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.shard import Shard
from pikv_ds.core.step import (
    BROKEN_OFF,
    FAILED,
    FINE,
    NON_FINITE,
    NOTHING,
    OUT_OF_RANGE,
    Announcement,
    StepPlan,
)
from pikv_ds.core.table import Ints, PageTable
from pikv_ds.core.trace import PageTrace
from pikv_ds.core.transaction import Transaction
from pikv_ds.errors import PiKVError, UsageError
from pikv_ds.layout import SealFlag
from pikv_ds.policies.budgets import NO_LIMIT
from pikv_ds.policies.retention import Prompt
from pikv_ds.policies.topology import Topology
from pikv_ds.slabs import lasting_zeros

UNFIT = SealFlag.NON_FINITE | SealFlag.BEYOND_RANGE | SealFlag.BEYOND_SUMMARY


@dataclass(frozen=True)
class Snapshot:
    """What a rank holds at the end of a forward pass."""

    own_tokens: int = 0
    """Tokens of its own sequences."""
    stored_tokens: int = 0
    """Tokens times layers that lie on it: pages of everybody, own tails, own pages not yet sent."""
    pages: int = 0
    kv_bytes: int = 0
    """All memory for keys and values: pool, tails, pages not yet sent."""
    pool_bytes: int = 0
    """The part of it that holds sealed pages, slack included."""
    summary_bytes: int = 0


class ExpertShardedKVCache:
    """A KV cache whose pages are spread over a group of ranks by their home experts.

    Args:
        shape: the model.
        config: settings, equal on all ranks.
        exchange: the group's collectives; None for one rank.

    Raises:
        ValueError: the experts cannot be spread over the ranks, the codec does not fit, the backend
            has no kernels for such pages, there is a budget for latent ones, or the trace cannot be written.
    """

    def __init__(
        self,
        shape: ModelShape,
        config: PiKVConfig,
        exchange: Exchange | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.config = shape, config
        self.exchange = exchange or Exchange(None, device)
        self.device = torch.device(device)
        self.topology = Topology(shape.num_experts, self.exchange.size)
        if shape.latent_dim is not None and config.retention is not None:
            raise UsageError(
                f'pikv.retention = "{config.retention.name}": prompts of latent attention are attended to elsewhere, '
                "so their tokens cannot be rated here; leave retention and budget out"
            )
        self.streams = num_streams(shape, config)
        """KV heads of a layer with pages of their own, 1 where a page holds all heads."""
        config.codec.check(shape.num_layers, shape.num_kv_heads, shape.num_experts)
        self.formats = make_formats(shape, config, config.backend, self.device)
        self.layout, self.ops = self.formats[0].layout, self.formats[0].ops
        capacity = config.capacity_tokens
        pool = PagePool(
            [page_format.size for page_format in self.formats],
            slab_pages=config.slab_pages,
            capacity_pages=None if capacity is None else capacity // config.page_size * self.num_units,
            watermark=config.watermark,
            device=self.device,
            poison=config.debug,
        )
        packing = config.placement.packing if self.exchange.size > 1 else None
        retention, evicts = (
            config.retention,
            bool((decode_limits(config.budget, shape, self.streams, 1) < NO_LIMIT).any()),
        )
        self.shard = Shard(
            pool,
            PageTable(self.num_units, self.device, len(self.formats), pool.capacity_pages or 0),
            self.formats,
            config.lookup,
            self.streams,
            remembers=retention is not None and evicts,
            learns=retention is not None and evicts and retention.learns != "nothing",
            homes=None if packing is None else (shape.num_layers, shape.num_experts),
        )
        self.ledger = Ledger(self.num_units, self.exchange.size, config.page_size)
        if config.trace is not None:
            self.shard.trace = PageTrace(config.trace, self.exchange.rank, self._facts(), self.streams)
        self._flags = lasting_zeros([shape.num_layers], torch.int32, self.device)
        demoter = None if config.demote is None else Demoter(self.shard, self._flags)
        parts = self.exchange, self.shard, self.ledger
        self.evictor = Evictor(*parts, retention, config.budget, demoter, shape)
        topologies = [self.topology] * shape.num_layers
        self.rebalancer = None if packing is None else Rebalancer(packing, *parts, topologies)
        self.sender = PageSender(*parts, config.codec, config.placement, topologies, self._flags)
        self.attention = ShardedAttention(*parts, shape, keeps_all=not self.evictor.cuts, flags=self._flags)
        self.planner = Planner(self.exchange, self.ledger, pool, self.evictor, self.attention)
        self.plan: StepPlan | None = None
        self.committed_tokens = 0
        """The sum of `bound` over this rank's sequences at the lengths that they may reach. The engine that admits
        sequences sets it, if it knows; each step plan tells it to the other ranks."""
        self.committed_by_rank = [0] * self.exchange.size
        self.first_token, self.between_tokens = Latencies(), Latencies()
        """Of this rank's own sequences, if `generate` or the engine records them: the time from the call to a
        sequence's first token, and from each of its tokens to the next."""
        self.watchers: list[Callable[[ExpertShardedKVCache], None]] = []
        """Called after each step plan, on the thread that makes the passes."""
        self._warned = False  # of what rotate does to the keys
        self.num_steps = 0
        """Passes so far, those that were undone left out; the same on every rank."""
        self.num_plans = 0
        """Step plans so far, the same on every rank."""
        self._transaction: Transaction | None = None
        self._standing = False  # a plan stands, and what it does itself is not done yet
        self._again = False  # a pass was undone, and no plan has stood since
        self.peak_bytes = 0
        self.fullest = Snapshot()
        self._after_pass = Snapshot()
        self._most_tokens = 0
        self._passed = False  # since the peaks were forgotten
        self._batches: list[SequenceBatch] = []
        self.abandoned: deque[SequenceBatch] = deque()
        """Batches whose last reference is gone. A finalizer may run at any moment, also within a
        collective, so it only leaves them here; the next pass releases them."""
        self._released: list[int] = []
        self._given_up: list[int] = []  # rows that all ranks have, released here, while rank 0 has not said so yet
        self._unsent: list[Ints] = [np.zeros(0, np.int64)] * self.exchange.size
        """Per source: the rows whose tails filled up in the last pass; their pages go with the next plan."""

    @property
    def pool(self) -> PagePool:
        """Memory for the pages that lie here."""
        return self.shard.pool

    @property
    def table(self) -> PageTable:
        """Which page lies where in it."""
        return self.shard.table

    @property
    def num_units(self) -> int:
        """Streams of all layers (see `SequenceBatch`)."""
        return self.shape.num_layers * self.streams

    # -- sequences ---------------------------------------------------------------------------

    def new_batch(self, size: int, shared: bool = False) -> SequenceBatch:
        """Registers ``size`` new sequences of this rank; more can join with `admit`.

        Args:
            shared: every rank of the group makes the same batch, with the same tokens (as Megatron's
                static server does). Its pages are stored once for all of them, and as every rank has
                the queries, only partials travel.

        Raises:
            ValueError: a shared batch with a budget: ranks that round differently would drop different tokens.
        """
        if shared and self.evictor.cuts:
            raise UsageError("a batch that every rank has cannot be kept within a budget; use each rank's own batches")
        batch = SequenceBatch(size, self.shape.num_layers, self.config.page_size, shared, self.streams)
        self._batches.append(batch)
        return batch

    def admit(self, batch: SequenceBatch) -> int:
        """Adds a new sequence to a batch, between passes; returns its index, which may be that of a released one."""
        if batch not in self._batches:
            self._batches.append(batch)
        return batch.admit()

    @property
    def has_to_release(self) -> bool:
        """Whether finished sequences of this rank still have their pages, which go with the next step plan."""
        return bool(self._released or self.abandoned)

    def release(self, batch: SequenceBatch, indices: list[int] | None = None) -> None:
        """Gives back finished sequences: their tails at once, their pages with the next step plan."""
        indices = list(range(len(batch))) if indices is None else indices
        rows = batch.release(indices)
        if not batch.shared or self.exchange.rank == SHARED_SOURCE:  # of what all ranks have, one rank's word counts
            self.sender.drop(rows)
            self._released += rows
        else:
            self._given_up += rows
        if not any(batch.alive) and batch in self._batches:
            self._batches.remove(batch)

    # -- a forward pass ----------------------------------------------------------------------

    def begin_step(
        self, batch: SequenceBatch | None, new: list[int], error: str | None = None, digest: int = 0
    ) -> None:
        """Starts a forward pass. Every rank calls it, with no batch where it has nothing to do.

        Args:
            new: tokens that each sequence of the batch appends, 0 for finished ones.
            error: what is wrong on this rank; then every rank raises.
            digest: of the tokens of a shared batch, by which a rank with other ones is found out.

        Raises:
            PiKVError: the same on every rank: an error of one rank, a full pool, NaN in K or V.
        """
        while self.abandoned:
            self.release(self.abandoned.popleft())
        ruined = self._standing
        if ruined:
            error = error or (
                "an error came between a step plan and its pass, and left this rank's cache in pieces; detach and "
                "attach PiKV anew"
            )
        last = NOTHING if self._transaction is None else self._transaction.state
        if last == BROKEN_OFF:
            self._undo()
        begun = batch is not None and error is None
        entries: list[tuple[int, int]] = []
        if batch is not None and begun:
            entries = [(batch.rows[index], n) for index, n in enumerate(new) if n]
        waiting = [pages for pages in self.sender.staged if not np.isin(pages.rows, self._given_up).all()]
        kinds = {pages.shared for pages in waiting} | ({batch.shared} if batch is not None else set())
        if len(kinds) > 1:
            mixed = "a shared batch and a rank's own take turns pass by pass; release one before the other goes on"
            error = error or mixed
        try:
            self._exchange_plan(batch if begun else None, new, entries, error, True in kinds, digest, last)
        except PiKVError:  # the other ranks know nothing of any other error, and make the pass
            self._standing = ruined
            if batch is not None and begun:
                batch.break_off()
            raise
        assert self.plan is not None
        sending = np.unique(np.concatenate(self.plan.sealing)) if self.plan.prefill else np.zeros(0, np.int64)
        self._transaction = Transaction(
            batch if begun else None, sending, self.ledger, self.shard, self.sender, self.evictor, self.attention
        )
        self._standing = False
        self.attention.prepare(self.plan, batch)
        if self.shard.trace is not None:
            bytes_now = self.kv_bytes, self.pool.page_storage_bytes
            self.shard.trace.step(self.num_steps, self.pool.num_used, *bytes_now, self.own_tokens)
        for watcher in self.watchers:
            watcher(self)

    def _undo(self) -> None:
        """Undoes the last pass on this rank (see `Transaction`)."""
        if self._transaction is not None:
            self._transaction.undo()
            self._transaction = None
            self._again = True
            self._unsent = [rows[:0] for rows in self._unsent]
            self.num_steps -= 1  # what comes next is made in its place

    def fail_pass(self) -> None:
        """The pass under way has ended with an error after its last layer: it is to be undone, too."""
        if self._transaction is not None:
            self._transaction.failed = True

    @property
    def broken_off(self) -> SequenceBatch | None:
        """The batch whose last pass was broken off on this rank; the next one undoes it."""
        broken = self._transaction is not None and self._transaction.broken
        return self._transaction.batch if broken and self._transaction is not None else None

    def attend(
        self,
        batch: SequenceBatch,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        attend_prompts: bool = True,
        source: Callable[[slice], Any] | None = None,
    ) -> Tensor:
        """Attention of one layer; see `ShardedAttention`. ``[N, H, V]``, tokens packed.

        Args:
            source: from a prompt's tokens to the `Prompt.source` of it, for retentions that need it.
        """
        assert self.plan is not None
        out = self.attention(self.plan, batch, layer, query, key, value, scale, attend_prompts)
        if not self.plan.prefill:
            return out
        self._look_for_nonfinite(batch, layer, key, value)
        if self.evictor.cuts:
            values = self.layout.values(key, value)
            for index, mine in batch.prompts():
                q, k, v = (x[mine].transpose(0, 1) for x in (query, key, values))
                prompt = Prompt(q, k, v, scale, None if source is None else source(mine))
                batch.scores.setdefault(layer, {})[index] = self.evictor.rate(prompt)
        self._measure()
        return out

    def _look_for_nonfinite(self, batch: SequenceBatch, layer: int, key: Tensor, value: Tensor | None) -> None:
        """Looks for NaN and infinity in what prompts leave in the tails; full pages are looked at when sealed, and
        single tokens when they are put into the tails."""
        ends = [slice(None)]
        if any(n > self.config.page_size for n in batch.new):
            ends = [slice(max(s.start, s.stop - self.config.page_size), s.stop) for _, s in batch.slices()]
        for end in ends:  # one NaN or infinity is enough; in float64 no sum of finite ones is infinite
            total = key[end].sum(dtype=torch.float64)
            if value is not None:
                total = total + value[end].sum(dtype=torch.float64)
            self._flags[layer] |= SealFlag.NON_FINITE * ~torch.isfinite(total)

    def routed(self, batch: SequenceBatch, layer: int, experts: Tensor | None) -> None:
        """Seals what has filled up at a layer, once its router has run.

        Args:
            experts: int ``[N, k]``, of the packed tokens; None at a layer without a router.
        """
        assert self.plan is not None
        if experts is not None and any(batch.new):
            singles = batch.singles(experts.device)
            kept = batch.tail_experts(layer, experts)
            if kept.shape[-1] > experts.shape[-1]:  # other layers choose more
                experts = F.pad(experts, (0, kept.shape[-1] - experts.shape[-1]), value=-1)
            if len(singles.indices):
                self.ops.append_experts(experts.contiguous(), singles.places, kept)
        if self.plan.prefill:
            self._seal(batch, layer, batch.fill(layer, experts))
            self._measure()
            counts = [of_rank[layer] if of_rank else 0 for of_rank in self.plan.seals]
            self._send(Sending(self.plan.sealing, counts, range(layer * self.streams, (layer + 1) * self.streams)))
        elif batch.ends_with(layer):
            self.end_step(batch)
            return
        batch.close_layer(layer)
        if not self.plan.prefill:
            return
        if not batch.in_step:
            self.sender.settle()
        self._measure()
        if self.config.debug and not batch.in_step:
            self.check_integrity()

    def end_step(self, batch: SequenceBatch) -> None:
        """Ends a pass of single tokens, once all layers have run: seals what it has filled up. The last layer's
        `routed` does so, too; whoever replays the layers' ops without their Python calls it."""
        assert self.plan is not None
        assert not self.plan.prefill, "prompts are sealed layer by layer"
        self._seal_all(batch)
        batch.close_layers()
        self._measure()
        if self.config.debug:
            self.check_integrity()

    def _seal(self, batch: SequenceBatch, layer: int, full: list[FullPages]) -> None:
        """Encodes what has filled up at a layer."""
        for pages in full:
            for unit, kept in self.evictor.cut(batch, layer, pages):
                self.sender.stage(batch, unit, kept)
        batch.scores.pop(layer, None)

    def _seal_all(self, batch: SequenceBatch) -> None:
        """Encodes what a pass of single tokens has filled up at all layers."""
        pages = batch.fill_all()
        if pages is None:
            return
        filling = batch.singles(self.device).filling
        if self.sender.together:
            self.sender.stage_all(batch, filling, pages)
            return
        for layer in range(self.shape.num_layers):
            self._seal(batch, layer, [FullPages(filling, np.array(batch.sealed)[filling], *pages.at(layer))])

    def _send(self, sending: Sending) -> None:
        """Sends what is staged, and tells the evictor of it."""
        assert self.plan is not None
        self.sender.send(self.plan, sending)
        for rows in sending.rows:
            self.evictor.grown(rows)

    def bound(self, num_tokens: int) -> int:
        """Most tokens of a sequence of this length that a rank ever keeps at a layer."""
        return rank_bound(num_tokens, self.config.page_size, self.topology)

    @property
    def rank_capacity(self) -> int | None:
        """Tokens per layer that a rank's pool holds, the reserve left out; None: no limit."""
        if self.config.capacity_tokens is None:
            return None
        pages = self.config.capacity_tokens // self.config.page_size
        return (pages - int(pages * self.config.watermark)) * self.config.page_size

    def grant(self) -> int | None:
        """How far this rank may raise `committed_tokens` before the next step plan; None: no limit.

        Whoever admits sequences within it never meets a full pool: a sequence is counted with its
        `bound` at the length that it may reach, which no rank exceeds, so it may be about G times as
        long as one rank's capacity. Ranks admit without asking each other: after every second plan
        each has an equal share of the room, after the others one rank in turn has all of it.
        """
        if self.rank_capacity is None:
            return None
        room = max(0, self.rank_capacity - sum(self.committed_by_rank))
        ranks, turn = self.exchange.size, self.num_steps // 2 % self.exchange.size
        if self.num_steps % 2 == 0:
            return room // ranks
        return room if turn == self.exchange.rank else 0

    def check_integrity(self) -> None:
        """Checks the invariants that one rank can see; raises AssertionError."""
        self.pool.check_integrity()
        self.table.check_integrity(self.pool)
        self.ledger.check_integrity()
        here = int(self.ledger.totals[self.exchange.rank])
        assert here == self.pool.num_used, f"{self.pool.num_used} pages here, {here} in the ledger"
        size = self.config.page_size
        for batch in self._batches:
            if batch.in_step:  # a pass of it was broken off, and the next one undoes it
                continue
            staged = np.zeros((self.num_units, len(batch)), np.int64)
            for pages in self.sender.staged:
                for row, unit in zip(pages.rows.tolist(), pages.units.tolist(), strict=True):
                    staged[unit] += np.array(batch.rows) == row
            for index, row in enumerate(batch.rows):
                if not batch.alive[index] or row == NO_ROW:
                    continue
                held, waits, dropped = self.ledger.pages[row], staged[:, index], batch.dropped[:, index]
                known = held.sum(1) + waits + dropped == batch.sealed[index]
                assert known.all(), "a sealed page is not stored exactly once"
                assert self.evictor.cuts or not dropped.any(), "a page was dropped though there is no budget"
                length, tokens = batch.lengths[index], held * size
                if not batch.shared:
                    tokens[:, self.exchange.rank] += batch.open_tokens(index) + waits * size
                most, bound = int(tokens.max()), self.bound(length)
                assert most <= bound, f"a rank holds {most} tokens of a sequence of {length}, bound {bound}"

    # -- sizes -------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes that this rank has allocated for keys and values now: pool, tails, pages under way."""
        tails = sum(b.tail_nbytes + b.fresh_nbytes + b.undo_nbytes for b in self._batches)
        return self.pool.page_storage_bytes + tails + self.sender.nbytes

    @property
    def stored_tokens(self) -> int:
        """Tokens times layers that lie on this rank: pages of everybody, own tails, staged pages."""
        tails = sum(
            b.open_tokens(i) * self.shape.num_layers for b in self._batches for i in range(len(b)) if b.alive[i]
        )
        return (self.pool.num_used + self.sender.num_staged) * self.config.page_size // self.streams + tails

    @property
    def own_tokens(self) -> int:
        """Tokens of this rank's own living sequences: what an unsharded cache would keep here."""
        return sum(b.lengths[i] for b in self._batches for i in range(len(b)) if b.alive[i])

    def _measure(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.kv_bytes)
        if not any(b.in_step for b in self._batches):
            self._after_pass = Snapshot(
                self.own_tokens,
                self.stored_tokens,
                self.pool.num_used,
                self.kv_bytes,
                self.pool.page_storage_bytes,
                self.pool.summary_storage_bytes,
            )

    def forget_peaks(self) -> None:
        """Starts `peak_bytes` and `fullest` anew. Every rank calls it at the same point."""
        self.peak_bytes, self._most_tokens, self._passed = 0, 0, False
        self.fullest = self._after_pass = Snapshot()

    # -- the step plan -----------------------------------------------------------------------

    def _exchange_plan(
        self,
        batch: SequenceBatch | None,
        new: list[int],
        entries: list[tuple[int, int]],
        error: str | None,
        shared: bool,
        digest: int,
        last: int,
    ) -> None:
        """Tells the other ranks of this one's pass, and makes the same plan as they.

        Args:
            batch, new: of this pass; its new sequences get their rows.
            entries: ``(row, tokens)`` of each of its sequences that take part; `NO_ROW` for new ones.
            last: how the last pass has ended here.
        """
        self.sender.settle()
        status, error = self._status(error)
        changed = entries != self.planner.announced
        mine = Announcement(
            step=self.num_plans,
            status=status,
            num_entries=len(entries) if changed else 0,
            changed=int(changed),
            num_released=len(self._released),
            shared=int(shared),
            digest=digest if shared else 0,
            committed=self.committed_tokens,
            last=last,
        )
        everyone = [Announcement(*row) for row in self.exchange.all_gather(mine)]
        self.num_plans += 1
        if step.must_undo(everyone):
            self._undo()
        else:
            if self._transaction is not None:
                self._transaction.commit()
            self.shard.step = self.num_steps
            self.evictor.settle(self.plan, self.attention.totals)
            self.attention.totals.clear()
            self.ledger.commit()
        self._transaction = None
        if batch is not None:
            batch.begin(new)
        if step.any_failed(everyone):
            self._flags.zero_()
            raise step.failure(everyone, self.exchange.all_gather_text(error), self.exchange.rank)
        step.check_together(everyone)
        step.check_undone(everyone)
        self.committed_by_rank = [a.committed for a in everyone]
        own_tokens = self.ledger.own_tokens()
        if self._passed and own_tokens > self._most_tokens:  # at the same pass on every rank
            self._most_tokens, self.fullest = own_tokens, self._after_pass
        every, gone = self.planner.exchange_rows(everyone, entries, changed, self._released)
        step.check_shared(everyone, every)
        sources = [SHARED_SOURCE] if shared else range(self.exchange.size)  # whose pages need room
        prefill = any(n > 1 for rows in every for _, n in rows)
        seals = [self.planner.seals(every[r]) if r in sources else [] for r in range(self.exchange.size)]
        unsent = [rows[~np.isin(rows, gone)] for rows in self._unsent]
        free, spare = self.planner.free_without(gone)
        step.check_room(
            sum(map(sum, seals)) + sum(map(len, unsent)) * self.num_units,
            sum(spare if prefill else free),
            prefill,
            self.config,
            self.num_units * self.exchange.size,
            self.layout.page_bytes,
        )
        # From here on the plan stands, on all ranks alike.
        self._standing = True
        self._passed = True
        self.num_steps += 1
        if self.shard.reuse is not None:
            self.shard.reuse.step = self.num_steps
        self.sender.drop(gone)
        for row in gone:
            self._forget(row)
        self._unsent, self._released = unsent, []
        self._given_up = [row for row in self._given_up if row not in gone]
        self.planner.number(every, shared)
        if batch is not None and self.planner.announced is not None:
            for (index, _), (row, _) in zip(batch.slices(), self.planner.announced, strict=True):
                batch.rows[index] = row
        self.plan = self.planner.plan(sources, seals, prefill, free, shared)
        try:
            self._send(Sending(unsent, [len(rows) * self.num_units for rows in unsent], range(self.num_units)))
        except PiKVError:
            self.ledger.new[:] = 0
            raise
        self._unsent = [rows[:0] if prefill else rows for rows in self.plan.sealing]
        self.sender.settle()
        if not self._again:  # else that was done before the pass that was undone
            self.evictor.evict(self._batches)
            if self.rebalancer is not None:
                self.rebalancer.step(self.num_steps, self.plan.free)
        self._again = False

    def _status(self, error: str | None) -> tuple[int, str | None]:
        """This rank's status and its error, if there is one, once what was noted of sealed pages is read."""
        status = FINE if error is None else FAILED
        for layer, noted in enumerate(self._flags.tolist()):
            flags = SealFlag(noted)
            if SealFlag.OUTLIERS in flags and not self._warned:
                self._warned = True
                logging.getLogger("pikv_ds").warning(
                    f"pikv.codec: the keys of layer {layer} (rank {self.exchange.rank}) have outlier channels, which "
                    "rotate spreads over all others: few bits lose more with it than without. Leave rotate out "
                    "(docs/policies.md says how this is measured)"
                )
            if flags & UNFIT:  # the first layer: it may be the cause of what the others have
                status = NON_FINITE if SealFlag.NON_FINITE in flags else OUT_OF_RANGE
                error = error or describe_flags(flags, f"layer {layer} (rank {self.exchange.rank})", self.formats)
                break
        return status, error

    def _facts(self) -> dict[str, Any]:
        """What a trace begins with."""
        codecs = [{"codec": f.codec.label, "page": f.size.page, "summary": f.size.summary} for f in self.formats]
        return {
            "ranks": self.exchange.size,
            "layers": self.shape.num_layers,
            "experts": self.shape.num_experts,
            "page_size": self.config.page_size,
            "capacity_pages": self.pool.capacity_pages,
            "placement": self.config.placement.name,
            "lookup": self.config.lookup.name,
            "codecs": codecs,
        }

    def _forget(self, row: int) -> None:
        """A sequence is finished: its pages go back to the pool."""
        if self.ledger.shared[row]:  # this rank may not have said so yet
            for batch in self._batches:
                if batch.shared and row in batch.rows:
                    index = batch.rows.index(row)
                    batch.release([index])
                    batch.rows[index] = NO_ROW
        self.shard.release(row)
        self.ledger.leave(row)
        self.evictor.forget(row)
        if self.rebalancer is not None:
            self.rebalancer.forget(row)
