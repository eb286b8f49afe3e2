"""`PageSender`: encodes full pages, chooses their owners and sends them there.

Prompts are sent layer by layer, while the next layer computes (seal-behind): a rank never holds
more than its shard plus about one layer of its own prompts. While decoding, the pages of all
layers wait for the next step and go in one exchange.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv_ds.errors import PeerError, PoolFullError
from pikv_ds.eviction import Evictor, bits_float, float_bits
from pikv_ds.exchange import SHARED_SOURCE, Exchange, PagesInFlight, StepPlan
from pikv_ds.layout import PageLayout
from pikv_ds.ops import Ops
from pikv_ds.ops.projections import Projections
from pikv_ds.pages import PagePool, PageTable
from pikv_ds.placement import Topology, choose_owner, fair_shares, page_limits
from pikv_ds.policies.placements import Placement
from pikv_ds.policies.summaries import KeyBounds, SubPages, Summary
from pikv_ds.reuse import Reuse
from pikv_ds.sequences import FullPages, SequenceBatch

HEADER = 5
"""Integers that announce a page: sequence id, unit, page number, owner rank, and the bits of its score."""
NO_OWNER = -1


@dataclass
class StagedPage:
    """A page that is encoded and waits for its owner."""

    batch: SequenceBatch
    row: int
    unit: int
    """See `SequenceBatch`."""
    page_idx: int
    votes: list[int] | None
    payload: Tensor
    """uint8 ``[page_bytes + summary_bytes]``"""
    score: float = 0.0
    """What retention thinks of it."""
    seen: list[int] = field(default_factory=list)
    """The votes of all pages of its layer that this rank had staged by then."""


class PageSender:
    """Moves full pages from their sequences' rank to their owners, all ranks in step.

    Args:
        nonfinite: int32 ``[num_layers]``, set to 1 where a page with NaN or infinity was sealed.
    """

    def __init__(
        self,
        ops: Ops,
        exchange: Exchange,
        pool: PagePool,
        table: PageTable,
        layout: PageLayout,
        placement: Placement,
        summary: Summary | None,
        topology: Topology,
        nonfinite: Tensor,
        evictor: Evictor,
        bases: list[Projections],
        reuse: Reuse | None,
    ) -> None:
        self.ops, self.exchange, self.pool, self.table, self.layout = (
            ops,
            exchange,
            pool,
            table,
            layout,
        )
        self.placement, self.summary, self.topology = placement, summary, topology
        self.nonfinite, self.evictor, self.bases, self.reuse = nonfinite, evictor, bases, reuse
        self.staged: list[StagedPage] = []
        self._seen: dict[int, list[int]] = {}  # votes per expert so far, per layer
        self.num_sealed: dict[tuple[int, int], int] = {}
        self.counters: Counter[str] = Counter()
        self._in_flight: tuple[PagesInFlight, list[int]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of pages that are staged or under way."""
        flying = self._in_flight[0].nbytes if self._in_flight else 0
        return flying + sum(p.payload.nbytes for p in self.staged)

    def stage(self, batch: SequenceBatch, unit: int, pages: FullPages) -> None:
        """Encodes full pages of one sequence; they wait for `send`."""
        n, split = pages.keys.shape[0], self.pool.page_bytes
        payload = torch.empty(n, split + self.pool.summary_bytes, dtype=torch.uint8, device=pages.keys.device)
        bounds = payload[:, split:] if isinstance(self.summary, KeyBounds) else None
        layer = unit // self.evictor.streams
        flag = self.nonfinite[layer : layer + 1]
        keys, values = pages.keys, pages.values
        if self.bases:
            assert values is not None
            mine = self.bases[layer].heads(unit % self.evictor.streams, keys.shape[1])
            keys, values = mine.encode(keys, values)
        self.ops.seal_pages(keys, values, self.layout, payload[:, :split], bounds, flag)
        if isinstance(self.summary, SubPages):
            payload[:, split:] = self.summary.encode(keys, self.layout)
        votes = None if pages.experts is None else self._votes(pages.experts)
        for i in range(n):
            if votes is not None:
                before = self._seen.get(layer, [0] * self.topology.num_experts)
                self._seen[layer] = [a + b for a, b in zip(before, votes[i], strict=True)]
            self.staged.append(
                StagedPage(
                    batch,
                    pages.row,
                    unit,
                    pages.numbers[i],
                    None if votes is None else votes[i],
                    payload[i],
                    0.0 if pages.scores is None else pages.scores[i],
                    self._seen.get(layer, []),
                )
            )

    def _votes(self, experts: Tensor) -> list[list[int]]:
        """How often each expert was chosen, per page, from ``[N, S, k]`` (-1: dropped by the gate)."""
        flat = experts.flatten(1).long() + 1
        counts = torch.zeros(flat.shape[0], self.topology.num_experts + 1, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat))
        return counts[:, 1:].tolist()

    def drop(self, batch: SequenceBatch, rows: list[int]) -> None:
        """Forgets staged pages of sequences that are finished."""
        gone = set(rows)
        self.staged = [p for p in self.staged if p.batch is not batch or p.row not in gone]

    def send(self, plan: StepPlan, counts: list[int]) -> None:
        """Places and sends what is staged; every rank calls it at the same point.

        Args:
            counts: staged pages of every rank, which all ranks know.

        Raises:
            PoolFullError: on every rank alike, before anything has been moved.
        """
        self.settle()
        staged, self.staged = self.staged, []
        rank = self.exchange.rank
        assert len(staged) == counts[rank], f"{len(staged)} pages staged, {counts[rank]} announced"
        if sum(counts) == 0:
            return
        if plan.shared:  # the others have the same pages, and take one rank's word for their homes
            counts = [n if r == SHARED_SOURCE else 0 for r, n in enumerate(counts)]
        placed = staged if counts[rank] else []
        owners = self._place(placed, fair_shares(plan.free, counts)[rank])
        rows = [
            [page.batch.ids[page.row], page.unit, page.page_idx, owner, float_bits(page.score)]
            for page, owner in zip(placed, owners, strict=True)
        ]
        headers = self.exchange.all_gather_ragged(rows, HEADER, counts, kind="page_header")
        homeless = sum(row[3] == NO_OWNER for table in headers for row in table)
        if homeless:
            self.staged = staged
            for page, owner in zip(placed, owners, strict=True):
                if owner != NO_OWNER:
                    page.batch.loads[page.unit][page.row][owner] -= 1
            raise PoolFullError(
                f"the KV pool is full: {homeless} of {sum(counts)} new pages found no rank with room; "
                f"{homeless * self.layout.page_size} tokens ({homeless * self.pool.page_bytes} bytes) more are "
                "needed. Raise pikv.capacity_tokens, send fewer or shorter prompts, or use a smaller codec"
            )
        self.counters["seals"] += len(placed)
        self.counters["overflowed"] += sum(o != self._preference(p)[0] for p, o in zip(placed, owners, strict=True))
        if plan.shared:
            owners = self._adopt(staged, headers[SHARED_SOURCE], known=bool(placed))
        incoming: list[tuple[tuple[int, int], int, int, int]] = []  # from the others, in rank order
        receive_counts = [0] * self.exchange.size
        for source, table in enumerate(headers):
            for sequence, unit, page_idx, owner, score in table:
                plan.free[owner] -= 1
                key = (source, sequence)
                self.num_sealed[key] = max(self.num_sealed.get(key, 0), page_idx + 1)
                self.evictor.placed(key, unit)
                if owner == rank and source != rank and not plan.shared:
                    incoming.append((key, unit, page_idx, score))
                    receive_counts[source] += 1
        kept = [page for page, owner in zip(staged, owners, strict=True) if owner == rank]
        if kept:
            slots = self.pool.allocate(len(kept))
            self._store(slots, torch.stack([p.payload for p in kept]))
            source = SHARED_SOURCE if plan.shared else rank
            self._note_stored(slots, [p.score for p in kept])
            for page, slot in zip(kept, slots, strict=True):
                self.table.add((source, page.batch.ids[page.row]), page.unit, page.page_idx, slot)
        if plan.shared:  # what is not kept lies on another rank
            return
        slots = self.pool.allocate(len(incoming))
        self._note_stored(slots, [bits_float(score) for *_, score in incoming])
        for (key, unit, page_idx, _), slot in zip(incoming, slots, strict=True):
            self.table.add(key, unit, page_idx, slot)
        leaving = sorted((o, i) for i, o in enumerate(owners) if o != rank)
        send_counts = [sum(o == r for o, _ in leaving) for r in range(self.exchange.size)]
        row_bytes = self.pool.page_bytes + self.pool.summary_bytes
        payload = (
            torch.stack([staged[i].payload for _, i in leaving])
            if leaving
            else torch.empty(0, row_bytes, dtype=torch.uint8, device=self.pool.device)
        )
        self._in_flight = (self.exchange.send_pages(payload, send_counts, receive_counts), slots)

    @staticmethod
    def _adopt(staged: list[StagedPage], table: list[list[int]], known: bool) -> list[int]:
        """Owners of pages that every rank has, as `SHARED_SOURCE` has chosen them.

        Args:
            known: this rank chose them, so its loads count them.

        Raises:
            PeerError: the ranks' sequences are not the same.
        """
        if [[p.batch.ids[p.row], p.unit, p.page_idx] for p in staged] != [row[:3] for row in table]:
            raise PeerError(
                f"this rank's shared sequences fill {len(staged)} pages, those of rank {SHARED_SOURCE} "
                f"{len(table)}, or others: every rank must make the same passes with the same tokens"
            )
        owners = [row[3] for row in table]
        if not known:
            for page, owner in zip(staged, owners, strict=True):
                page.batch.loads[page.unit][page.row][owner] += 1
        return owners

    def settle(self) -> None:
        """Waits for the pages under way and stores those that this rank owns."""
        if self._in_flight is None:
            return
        transfer, slots = self._in_flight
        self._in_flight = None
        received = transfer.wait()
        if slots:
            self._store(slots, received)

    def _place(self, staged: list[StagedPage], free: list[int]) -> list[int]:
        """Owner rank of each staged page, `NO_OWNER` where nobody has room."""
        owners = []
        free = list(free)
        for page in staged:
            batch, row = page.batch, page.row
            limits = page_limits(
                batch.lengths[row] + batch.new[row],
                self.layout.page_size,
                self.topology,
                None if batch.shared else self.exchange.rank,
            )
            loads = batch.loads[page.unit][row]
            owner = choose_owner(self._preference(page), loads, limits, free)
            if owner is None:
                owners.append(NO_OWNER)
                continue
            loads[owner] += 1
            free[owner] -= 1
            owners.append(owner)
        return owners

    def _preference(self, page: StagedPage) -> list[int]:
        return self.placement.owners(page.page_idx, page.votes, self.topology, page.seen)

    def _note_stored(self, slots: list[int], scores: list[float]) -> None:
        self.evictor.stored(slots, scores)
        if self.reuse is not None:
            self.reuse.stored(slots, self.pool.num_slots)

    def _store(self, slots: list[int], payload: Tensor) -> None:
        split = self.pool.page_bytes
        self.pool.write(slots, payload[:, :split], payload[:, split:] if self.pool.summary_bytes else None)
