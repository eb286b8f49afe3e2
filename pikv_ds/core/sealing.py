"""`PageSender`: encodes full pages, chooses their owners and sends them there.

Prompts are sent layer by layer, while the next layer computes (seal-behind): a rank never holds
more than its shard plus about one layer of its own prompts. While decoding, the pages of all
layers wait for the next step and go in one exchange.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.core.eviction import bits_float, float_bits
from pikv_ds.core.exchange import Exchange, PagesInFlight
from pikv_ds.core.formats import PageFormat
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.placement import choose_owner, fair_shares, page_limits
from pikv_ds.core.sequences import FullPages, SequenceBatch
from pikv_ds.core.step import SHARED_SOURCE, StepPlan
from pikv_ds.errors import PeerError, PoolFullError
from pikv_ds.policies.codecs import CodecPolicy
from pikv_ds.policies.placements import Placement
from pikv_ds.policies.topology import Topology

NO_OWNER = -1


class Header(NamedTuple):
    """What announces a page to all ranks."""

    sequence: int
    unit: int
    page_idx: int
    owner: int
    """Rank, or `NO_OWNER`."""
    score: int
    """The bits of what retention thinks of it."""
    page_format: int
    home: int
    """Its home expert, -1 where no router is."""


@dataclass
class StagedPage:
    """A page that is encoded and waits for its owner."""

    batch: SequenceBatch
    row: int
    unit: int
    """See `SequenceBatch`."""
    page_idx: int
    votes: list[int] | None
    page_format: int
    payload: Tensor
    """uint8 ``[page bytes + summary bytes]``"""
    score: float = 0.0
    """What retention thinks of it."""
    seen: list[int] = field(default_factory=list)
    """The votes of all pages of its layer that this rank had staged by then."""


class Sent(NamedTuple):
    """What `PageSender.send` did."""

    placed: Sequence[tuple[int, Header]] = ()
    """Every page that got an owner, of all ranks, with its source rank; the same on every rank."""
    slots: Sequence[int] = ()
    """Of the pages that this rank owns."""
    scores: Sequence[float] = ()
    """What retention thinks of each of them."""


class PageSender:
    """Moves full pages from their sequences' rank to their owners, all ranks in step.

    Args:
        formats: those of the codec policy's codecs, then that of demoted pages, if there is one.
        topologies: of every layer; `Rebalancer` changes them.
        flags: int32 ``[num_layers]``, a `SealFlag` of each layer's pages.
        streams: KV heads of a layer with pages of their own, 1 where a page holds all heads.
    """

    def __init__(
        self,
        exchange: Exchange,
        pool: PagePool,
        table: PageTable,
        formats: list[PageFormat],
        codec: CodecPolicy,
        placement: Placement,
        topologies: list[Topology],
        flags: Tensor,
        streams: int,
    ) -> None:
        self.exchange, self.pool, self.table, self.formats, self.codec = exchange, pool, table, formats, codec
        self.placement, self.topologies = placement, topologies
        self.flags, self.streams = flags, streams
        self.page_size = formats[0].layout.page_size
        self.staged: list[StagedPage] = []
        self._seen: dict[int, list[int]] = {}  # votes per expert so far, per layer
        self.num_sealed: dict[tuple[int, int], int] = {}
        self.counters: Counter[str] = Counter()
        self._in_flight: tuple[PagesInFlight, list[int]] | None = None  # and the slots of what arrives

    @property
    def nbytes(self) -> int:
        """Bytes of pages that are staged or under way."""
        flying = self._in_flight[0].nbytes if self._in_flight else 0
        return flying + sum(p.payload.nbytes for p in self.staged)

    def stage(self, batch: SequenceBatch, unit: int, pages: FullPages) -> None:
        """Encodes full pages of one sequence; they wait for `send`."""
        layer, head = divmod(unit, self.streams)
        flags = self.flags[layer : layer + 1]
        votes = None if pages.experts is None else self._votes(pages.experts)
        chosen = [
            len(self.formats) - 1
            if pages.cold is not None and pages.cold[i]
            else self.codec.choose(layer, head, None if votes is None else home_expert(votes[i]))
            for i in range(len(pages.keys))
        ]
        payloads: dict[int, Tensor] = {}
        for page_format in dict.fromkeys(chosen):
            which = [i for i, f in enumerate(chosen) if f == page_format]
            keys, values = pages.keys, pages.values
            if len(which) < len(chosen):
                keys, values = keys[which], None if values is None else values[which]
            sealed = self.formats[page_format].seal(layer, head, keys, values, flags)
            payloads |= dict(zip(which, sealed, strict=True))
        for i, page_format in enumerate(chosen):
            if votes is not None:
                before = self._seen.get(layer, [0] * self.topologies[layer].num_experts)
                self._seen[layer] = [a + b for a, b in zip(before, votes[i], strict=True)]
            self.staged.append(
                StagedPage(
                    batch,
                    pages.row,
                    unit,
                    pages.numbers[i],
                    None if votes is None else votes[i],
                    page_format,
                    payloads[i],
                    0.0 if pages.scores is None else pages.scores[i],
                    self._seen.get(layer, []),
                )
            )

    def _votes(self, experts: Tensor) -> list[list[int]]:
        """How often each expert was chosen, per page, from ``[N, S, k]`` (-1: dropped by the gate)."""
        flat = experts.flatten(1).long() + 1
        counts = torch.zeros(flat.shape[0], self.topologies[0].num_experts + 1, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat))
        return counts[:, 1:].tolist()

    def drop(self, batch: SequenceBatch, rows: list[int]) -> None:
        """Forgets staged pages of sequences that are finished."""
        gone = set(rows)
        self.staged = [p for p in self.staged if p.batch is not batch or p.row not in gone]

    def send(self, plan: StepPlan, counts: list[int]) -> Sent:
        """Places and sends what is staged; every rank calls it at the same point.

        Args:
            counts: staged pages of every rank, which all ranks know.

        Returns:
            What happened, for those who keep account of pages.

        Raises:
            PoolFullError: on every rank alike, before anything has been moved.
        """
        self.settle()
        staged, self.staged = self.staged, []
        rank = self.exchange.rank
        assert len(staged) == counts[rank], f"{len(staged)} pages staged, {counts[rank]} announced"
        if sum(counts) == 0:
            return Sent()
        if plan.shared:  # the others have the same pages, and take one rank's word for their homes
            counts = [n if r == SHARED_SOURCE else 0 for r, n in enumerate(counts)]
        placed = staged if counts[rank] else []
        owners = self._place(placed, fair_shares(plan.free, counts)[rank])
        rows = [self._header(page, owner) for page, owner in zip(placed, owners, strict=True)]
        gathered = self.exchange.all_gather_ragged(rows, len(Header._fields), counts, kind="page_header")
        headers = [[Header(*row) for row in table] for table in gathered]
        homeless = [header for table in headers for header in table if header.owner == NO_OWNER]
        if homeless:
            self.staged = staged
            for page, owner in zip(placed, owners, strict=True):
                if owner != NO_OWNER:
                    page.batch.loads[page.unit][page.row][owner] -= 1
            raise PoolFullError(
                f"the KV pool is full: {len(homeless)} of {sum(counts)} new pages found no rank with room; "
                f"{len(homeless) * self.page_size} tokens "
                f"({sum(self.pool.sizes[h.page_format].page for h in homeless)} bytes) more are needed. "
                "Raise pikv.capacity_tokens, send fewer or shorter prompts, or use a smaller codec"
            )
        self.counters["seals"] += len(placed)
        if self.table.trace is not None:
            for page, row in zip(placed, rows, strict=True):
                self.table.trace.seal(row.sequence, row.unit, row.page_idx, row.owner, row.home, page.votes)
        self.counters["overflowed"] += sum(o != self._preference(p)[0] for p, o in zip(placed, owners, strict=True))
        if plan.shared:
            owners = self._adopt(staged, headers[SHARED_SOURCE], known=bool(placed))
        all_placed: list[tuple[int, Header]] = []
        incoming: list[tuple[int, Header]] = []  # from the others, in rank order
        receive_bytes = [0] * self.exchange.size
        for source, table in enumerate(headers):
            for header in table:
                plan.free[header.owner] -= 1
                key = (source, header.sequence)
                self.num_sealed[key] = max(self.num_sealed.get(key, 0), header.page_idx + 1)
                all_placed.append((source, header))
                if header.owner == rank and source != rank and not plan.shared:
                    incoming.append((source, header))
                    receive_bytes[source] += sum(self.pool.sizes[header.page_format])
        kept = [page for page, owner in zip(staged, owners, strict=True) if owner == rank]
        source = SHARED_SOURCE if plan.shared else rank
        entering = [(source, self._header(page, rank)) for page in kept]
        kept_slots = self._enter(entering)
        self._store([page.payload for page in kept], kept_slots)
        if plan.shared:  # what is not kept lies on another rank
            return Sent(all_placed, kept_slots, [bits_float(header.score) for _, header in entering])
        slots = self._enter(incoming)
        leaving = sorted((o, i) for i, o in enumerate(owners) if o != rank)
        send_bytes = [
            sum(sum(self.pool.sizes[staged[i].page_format]) for o, i in leaving if o == r)
            for r in range(self.exchange.size)
        ]
        nothing = torch.empty(0, dtype=torch.uint8, device=self.pool.device)
        payload = torch.cat([staged[i].payload for _, i in leaving]) if leaving else nothing
        self._in_flight = (self.exchange.send_pages(payload, send_bytes, receive_bytes), slots)
        scores = [bits_float(header.score) for _, header in [*entering, *incoming]]
        return Sent(all_placed, [*kept_slots, *slots], scores)

    @staticmethod
    def _header(page: StagedPage, owner: int) -> Header:
        sequence = page.batch.ids[page.row]
        home = -1 if page.votes is None else home_expert(page.votes)
        return Header(sequence, page.unit, page.page_idx, owner, float_bits(page.score), page.page_format, home)

    def _enter(self, pages: list[tuple[int, Header]]) -> list[int]:
        """Finds room for pages, given with their source ranks, and notes them; returns their slots."""
        slots = [0] * len(pages)
        for page_format in dict.fromkeys(header.page_format for _, header in pages):
            which = [i for i, (_, header) in enumerate(pages) if header.page_format == page_format]
            for i, slot in zip(which, self.pool.allocate(len(which), page_format), strict=True):
                slots[i] = slot
        for (source, header), slot in zip(pages, slots, strict=True):
            key = (source, header.sequence)
            self.table.add(key, header.unit, header.page_idx, slot, header.page_format)
        return slots

    @staticmethod
    def _adopt(staged: list[StagedPage], table: list[Header], known: bool) -> list[int]:
        """Owners of pages that every rank has, as `SHARED_SOURCE` has chosen them.

        Args:
            known: this rank chose them, so its loads count them.

        Raises:
            PeerError: the ranks' sequences are not the same.
        """
        if [[p.batch.ids[p.row], p.unit, p.page_idx] for p in staged] != [list(row[:3]) for row in table]:
            raise PeerError(
                f"this rank's shared sequences fill {len(staged)} pages, those of rank {SHARED_SOURCE} "
                f"{len(table)}, or others: every rank must make the same passes with the same tokens"
            )
        owners = [header.owner for header in table]
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
        sizes = [sum(self.pool.sizes[self.pool.format_of(slot)]) for slot in slots]
        self._store(list(received.split(sizes)) if slots else [], slots)

    def _place(self, staged: list[StagedPage], free: list[int]) -> list[int]:
        """Owner rank of each staged page, `NO_OWNER` where nobody has room."""
        owners = []
        free = list(free)
        for page in staged:
            batch, row = page.batch, page.row
            limits = page_limits(
                batch.lengths[row] + batch.new[row],
                self.page_size,
                self._topology(page),
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
        return self.placement.owners(page.page_idx, page.votes, self._topology(page), page.seen)

    def _topology(self, page: StagedPage) -> Topology:
        return self.topologies[page.unit // self.streams]

    def _store(self, payloads: list[Tensor], slots: list[int]) -> None:
        """Writes pages with their summaries into their slots."""
        by_format: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            by_format.setdefault(self.pool.format_of(slot), []).append(i)
        for page_format, which in by_format.items():
            rows = torch.stack([payloads[i] for i in which])
            split = self.pool.sizes[page_format].page
            self.pool.write([slots[i] for i in which], rows[:, :split], rows[:, split:])


def home_expert(votes: list[int]) -> int:
    """The expert that a page's tokens chose most often, the first of several."""
    return max(range(len(votes)), key=lambda e: (votes[e], -e))
