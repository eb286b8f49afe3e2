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

import torch
from torch import Tensor

from pikv_ds.config import PiKVConfig
from pikv_ds.core import step
from pikv_ds.core.attention import ShardedAttention
from pikv_ds.core.demotion import Demoter
from pikv_ds.core.eviction import Evictor
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.formats import describe_flags, make_formats, num_streams
from pikv_ds.core.latencies import Latencies
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.placement import rank_bound
from pikv_ds.core.rebalance import Rebalancer
from pikv_ds.core.reuse import Reuse
from pikv_ds.core.sealing import PageSender, Sent
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.step import FAILED, FINE, NON_FINITE, OUT_OF_RANGE, SHARED_SOURCE, UNLIMITED, Announcement, StepPlan
from pikv_ds.core.trace import PageTrace
from pikv_ds.errors import PiKVError, UsageError
from pikv_ds.layout import SealFlag
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
        self.pool = PagePool(
            [page_format.size for page_format in self.formats],
            slab_pages=config.slab_pages,
            capacity_pages=None if capacity is None else capacity // config.page_size * self.num_units,
            watermark=config.watermark,
            device=self.device,
            poison=config.debug,
        )
        self.table = PageTable(self.num_units, self.device, len(self.formats))
        if config.trace is not None:
            self.table.trace = PageTrace(config.trace, self.exchange.rank, self._facts(), self.streams)
        reuse = None if config.lookup.summary is None else Reuse(self.device)
        self._flags = lasting_zeros([shape.num_layers], torch.int32, self.device)
        demoter = None
        if config.demote is not None:
            demoter = Demoter(self.formats, self.pool, self.table, reuse, self._flags)
        self.evictor = Evictor(
            self.ops,
            self.exchange,
            self.pool,
            self.table,
            config.page_size,
            config.retention,
            config.budget,
            demoter,
            shape.num_layers,
            shape.num_kv_heads,
            shape.num_heads,
            self.streams,
        )
        topologies = [self.topology] * shape.num_layers
        self.rebalancer: Rebalancer | None = None
        packing = config.placement.packing
        if packing is not None and self.exchange.size > 1:
            self.rebalancer = Rebalancer(
                packing,
                self.exchange,
                self.pool,
                self.table,
                topologies,
                self.evictor,
                reuse,
                config.page_size,
            )
        self.sender = PageSender(
            self.exchange,
            self.pool,
            self.table,
            self.formats,
            config.codec,
            config.placement,
            topologies,
            self._flags,
            self.streams,
        )
        self.attention = ShardedAttention(
            self.ops,
            self.exchange,
            self.pool,
            self.table,
            self.formats,
            config.lookup,
            self.evictor,
            shape.num_heads,
            shape.head_dim,
            shape.value_dim,
            reuse=reuse,
            num_sealed=self.sender.num_sealed,
        )
        self.plan: StepPlan | None = None
        self.committed_tokens = 0
        """The sum of `bound` over this rank's sequences at the lengths that they may reach. The engine that admits
        sequences sets it, if it knows; each step plan tells it to the other ranks."""
        self.committed_by_rank = [0] * self.exchange.size
        self.pages_by_rank = [0] * self.exchange.size
        """Pages of every rank's pool at the last step plan."""
        self.first_token, self.between_tokens = Latencies(), Latencies()
        """Of this rank's own sequences, if `generate` or the engine records them: the time from the call to a
        sequence's first token, and from each of its tokens to the next."""
        self.watchers: list[Callable[[ExpertShardedKVCache], None]] = []
        """Called after each step plan, on the thread that makes the passes."""
        self._warned = False  # of what rotate does to the keys
        self.num_steps = 0  # step plans so far, the same on every rank
        self.peak_bytes = 0
        self.fullest = Snapshot()
        self._after_pass = Snapshot()
        self._most_tokens = 0
        self._batches: list[SequenceBatch] = []
        self.abandoned: deque[SequenceBatch] = deque()
        """Batches whose last reference is gone. A finalizer may run at any moment, also within a
        collective, so it only leaves them here; the next pass releases them."""
        self._next_id, self._next_shared_id = 0, 0
        self._released: list[int] = []
        self._announced: list[tuple[int, int]] | None = None
        self._plan_rows: list[tuple[tuple[int, int], ...]] = [() for _ in range(self.exchange.size)]

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
        ids = [self._new_id(shared) for _ in range(size)]
        layers, ranks, size = self.shape.num_layers, self.exchange.size, self.config.page_size
        batch = SequenceBatch(ids, layers, ranks, size, shared, self.streams)
        self._batches.append(batch)
        return batch

    def admit(self, batch: SequenceBatch) -> int:
        """Adds a new sequence to a batch, between passes; returns its row, which may be that of a released one."""
        if batch not in self._batches:
            self._batches.append(batch)
        return batch.admit(self._new_id(batch.shared))

    @property
    def has_to_release(self) -> bool:
        """Whether finished sequences of this rank still have their pages, which go with the next step plan."""
        return bool(self._released or self.abandoned)

    def _new_id(self, shared: bool) -> int:
        if shared:  # the same on every rank, and none that a rank gives its own sequences
            self._next_shared_id -= 1
            return self._next_shared_id
        self._next_id += 1
        return self._next_id - 1

    def release(self, batch: SequenceBatch, rows: list[int] | None = None) -> None:
        """Gives back finished sequences: their tails at once, their pages with the next step plan."""
        rows = list(range(len(batch))) if rows is None else rows
        self.sender.drop(batch, rows)
        self._released += batch.release(rows)
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
        if batch is not None and batch.in_step:
            layer = batch.first_open_layer
            error = error or (
                f"the previous forward pass of this batch was broken off at layer {layer} (by an error, or because "
                "the experts of that layer did not run); release it and start anew"
            )
        entries: list[tuple[int, int]] = []
        seals = [0] * self.shape.num_layers
        begun = batch is not None and error is None
        if batch is not None and begun:
            batch.begin(new)
            for row in range(len(batch)):
                prompt = new[row] > 1 and not batch.lengths[row] and self.evictor.cuts
                for layer in range(self.shape.num_layers):
                    pages = self.evictor.sealed_pages(new[row], layer) if prompt else 0
                    seals[layer] += pages if prompt else batch.filling(row) * self.streams
                if new[row] and batch.sealed[row]:
                    entries.append((batch.ids[row], new[row]))
        kinds = {page.batch.shared for page in self.sender.staged} | ({batch.shared} if batch is not None else set())
        if len(kinds) > 1:
            mixed = "a shared batch and a rank's own take turns pass by pass; release one before the other goes on"
            error = error or mixed
        shared = True in kinds
        try:
            self._exchange_plan(entries, seals, max(new, default=0), error, shared, digest)
        except PiKVError:  # the other ranks know nothing of any other error, and make the pass
            if batch is not None and begun:
                batch.break_off()
            raise

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
        self._look_for_nonfinite(batch, layer, key, value)
        out = self.attention(self.plan, batch, layer, query, key, value, scale, attend_prompts)
        if self.evictor.cuts:
            values = self.layout.values(key, value)
            for row, mine in batch.prompts():
                q, k, v = (x[mine].transpose(0, 1) for x in (query, key, values))
                prompt = Prompt(q, k, v, scale, None if source is None else source(mine))
                batch.scores.setdefault(layer, {})[row] = self.evictor.rate(prompt)
        self._measure()
        return out

    def _look_for_nonfinite(self, batch: SequenceBatch, layer: int, key: Tensor, value: Tensor | None) -> None:
        """Looks for NaN and infinity in what this pass leaves in the tails; full pages are looked at when sealed."""
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
        for pages in batch.fill(layer, experts):
            for unit, kept in self.evictor.cut(batch, layer, pages):
                self.sender.stage(batch, unit, kept)
        batch.scores.pop(layer, None)
        self._measure()
        if self.plan.prefill:
            self._note(self.sender.send(self.plan, [of_rank[layer] for of_rank in self.plan.seals]))
        batch.close_layer(layer)
        if not batch.in_step and self.plan.prefill:
            self.sender.settle()
        self._measure()
        if self.config.debug and not batch.in_step:
            self.check_integrity()

    def _note(self, sent: Sent) -> None:
        """Tells those who keep account of pages what has been placed on all ranks, and stored on this one."""
        for source, header in sent.placed:
            sequence = (source, header.sequence)
            self.evictor.placed(sequence, header.unit, header.page_format)
            if self.rebalancer is not None:
                self.rebalancer.placed(sequence, header.unit, header.page_idx, header.owner, header.home)
        self.evictor.stored(sent.slots, sent.scores)
        if sent.slots and self.attention.reuse is not None:
            self.attention.reuse.stored(sent.slots, self.pool.num_slots)

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
        size = self.config.page_size
        for batch in self._batches:
            if batch.in_step:  # a pass of it was broken off, so its counts are neither old nor new
                continue
            for row in range(len(batch)):
                if not batch.alive[row]:
                    continue
                length = batch.lengths[row]
                bound = self.bound(length)
                for unit in range(self.num_units):
                    staged = sum(p.batch is batch and p.row == row and p.unit == unit for p in self.sender.staged)
                    loads, dropped = batch.loads[unit][row], batch.dropped[unit][row]
                    assert sum(loads) + staged + dropped == batch.sealed[row], (
                        "a sealed page is not stored exactly once"
                    )
                    assert self.evictor.cuts or not dropped, "a page was dropped though there is no budget"
                    for rank, pages in enumerate(loads):
                        own = rank == self.exchange.rank and not batch.shared
                        tail = batch.open_tokens(row) + staged * size if own else 0
                        assert pages * size + tail <= bound, (
                            f"rank {rank} holds {pages * size + tail} tokens of a sequence of {length}, bound {bound}"
                        )

    # -- sizes -------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes that this rank has allocated for keys and values now: pool, tails, pages under way."""
        tails = sum(b.tail_nbytes + b.fresh_nbytes for b in self._batches)
        return self.pool.page_storage_bytes + tails + self.sender.nbytes

    @property
    def stored_tokens(self) -> int:
        """Tokens times layers that lie on this rank: pages of everybody, own tails, staged pages."""
        tails = sum(
            b.open_tokens(row) * self.shape.num_layers for b in self._batches for row in range(len(b)) if b.alive[row]
        )
        return (self.pool.num_used + len(self.sender.staged)) * self.config.page_size // self.streams + tails

    @property
    def own_tokens(self) -> int:
        """Tokens of this rank's own living sequences: what an unsharded cache would keep here."""
        return sum(b.lengths[row] for b in self._batches for row in range(len(b)) if b.alive[row])

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
        self.peak_bytes = self._most_tokens = 0
        self.fullest = self._after_pass = Snapshot()

    # -- the step plan -----------------------------------------------------------------------

    def _exchange_plan(
        self,
        entries: list[tuple[int, int]],
        seals: list[int],
        most_new: int,
        error: str | None,
        shared: bool,
        digest: int,
    ) -> None:
        self.sender.settle()
        self.evictor.settle(self.plan, self.num_steps)
        free = self.pool.num_free()
        status, error = self._status(error)
        changed = entries != self._announced
        mine = Announcement(
            step=self.num_steps,
            status=status,
            num_entries=len(entries) if changed else 0,
            changed=int(changed),
            num_released=len(self._released),
            seals=sum(seals),
            prompt=int(most_new > 1),
            staged=len(self.sender.staged),
            free=UNLIMITED if free is None else free,
            spare=UNLIMITED if free is None else self.pool.num_free(reserve=True) or 0,
            own_tokens=self._after_pass.own_tokens,
            shared=int(shared),
            digest=digest if shared else 0,
            committed=self.committed_tokens,
            pages=self.pool.num_used,
        )
        everyone = [Announcement(*row) for row in self.exchange.all_gather(mine)]
        self.num_steps += 1
        if self.attention.reuse is not None:
            self.attention.reuse.step = self.num_steps
        if step.any_failed(everyone):
            self._flags.zero_()
            raise step.failure(everyone, self.exchange.all_gather_text(error), self.exchange.rank)
        step.check_together(everyone)
        self.committed_by_rank = [a.committed for a in everyone]
        self.pages_by_rank = [a.pages for a in everyone]
        own_tokens = sum(a.own_tokens for a in everyone)
        if own_tokens > self._most_tokens:  # at the same pass on every rank
            self._most_tokens, self.fullest = own_tokens, self._after_pass
        self._exchange_sequences(everyone, entries, changed)
        frees, spare = self._free_after_release(everyone)
        fetches = tuple(
            tuple(i for i, tokens in rows if self._fetches(source, i, tokens))
            for source, rows in enumerate(self._plan_rows)
        )
        queries = tuple(
            tuple(row for row in rows if row[0] not in fetched)
            for rows, fetched in zip(self._plan_rows, fetches, strict=True)
        )
        prompt = any(a.prompt for a in everyone)
        if prompt and self.evictor.cuts:  # layers may keep different numbers of pages
            seals_of_all = tuple(tuple(row) for row in self.exchange.all_gather(seals))
        else:
            seals_of_all = tuple((a.seals // len(seals),) * len(seals) for a in everyone)
        self.plan = StepPlan(queries, fetches, seals_of_all, prompt, frees, shared)
        staged = [a.staged for a in everyone]
        own = slice(SHARED_SOURCE, SHARED_SOURCE + 1) if shared else slice(None)  # whose pages need room
        seals_now = sum(a.seals for a in everyone[own])
        step.check_room(
            seals_now + sum(staged[own]),
            sum(spare if prompt else frees),
            prompt,
            self.config,
            self.num_units * self.exchange.size,
            self.layout.page_bytes,
        )
        self._note(self.sender.send(self.plan, staged))
        self.sender.settle()
        evicted = self.evictor.evict(self.sender.num_sealed, self._batches)
        if self.rebalancer is not None:
            for page in evicted:
                self.rebalancer.evicted(page)
            self.rebalancer.step(self.num_steps, self.plan.free, self.sender.num_sealed, self._batches)
        if self.table.trace is not None:
            bytes_now = self.kv_bytes, self.pool.page_storage_bytes
            self.table.trace.step(self.num_steps, self.pool.num_used, *bytes_now, self.own_tokens)
        for watcher in self.watchers:
            watcher(self)

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

    def _exchange_sequences(self, everyone: list[Announcement], entries: list[tuple[int, int]], changed: bool) -> None:
        """Which sequences ask for their pages, where that has changed, and which are finished."""
        released = [(i, 0) for i in self._released]
        table = [*entries, *released] if changed else released
        counts = [a.num_entries + a.num_released for a in everyone]
        for source, rows in enumerate(self.exchange.all_gather_ragged(table, 2, counts)):
            announced = everyone[source]
            if announced.changed:
                self._plan_rows[source] = tuple((s, n) for s, n in rows[: announced.num_entries])
            for sequence, _ in rows[announced.num_entries :]:
                self._forget((source, sequence))
        self._announced, self._released = entries, []

    def _fetches(self, source: int, sequence: int, query_tokens: int) -> bool:
        if sequence < 0:  # shared: no query travels
            return False
        pages = self.sender.num_sealed.get((source, sequence), 0)
        return self.attention.cheaper_to_fetch(pages, query_tokens)

    def _forget(self, sequence: tuple[int, int]) -> None:
        """Returns a finished sequence's pages to the pool."""
        self.pool.free(self.table.remove(sequence))
        self.sender.num_sealed.pop(sequence, None)
        self.evictor.forget(sequence)
        if self.rebalancer is not None:
            self.rebalancer.forget(sequence)
        self.attention.audit.forget(sequence)

    def _free_after_release(self, everyone: list[Announcement]) -> tuple[list[int], list[int]]:
        """Free pages of every rank, all and without the reserve, once finished sequences are gone."""
        if not any(a.num_released for a in everyone) or self.config.capacity_tokens is None:
            return [a.free for a in everyone], [a.spare for a in everyone]
        now = self.exchange.all_gather([self.pool.num_free() or 0, self.pool.num_free(reserve=True) or 0])
        return [free for free, _ in now], [spare for _, spare in now]
