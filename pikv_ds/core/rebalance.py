"""`Rebalancer`: packs experts anew over the ranks, and moves their pages while generation goes on.

Every so many passes the ranks add up how many pages each expert is home to. Where one rank would hold too many of a
layer's, the experts are distributed anew (`pack`), hot ones over several ranks: new pages follow at once, old
ones move a few per rank and pass, between the step plan and the first layer. Pages move as their bytes are. All ranks
decide the same from what they have exchanged; the bound on a rank's share of a sequence holds throughout.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pikv_ds.core.eviction import Evicted, Evictor
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.placement import page_limits
from pikv_ds.core.reuse import Reuse
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.step import SHARED_SOURCE
from pikv_ds.policies.placements import Packing
from pikv_ds.policies.topology import Topology

Key = tuple[int, int]
"""A sequence: source rank and id."""


class Move(NamedTuple):
    """A page that would change its rank."""

    source: int
    sequence: int
    unit: int
    page_idx: int
    page_format: int
    home: int
    """Its expert, -1 in an empty row."""
    target: int
    """Rank."""
    mass: int
    """What retention knows of it: the bits of its mass, its last step and visits."""
    last_step: int
    visits: int

    @property
    def key(self) -> Key:
        return self.source, self.sequence


NOTHING = Move(0, 0, 0, 0, 0, -1, 0, 0, 0, 0)


class Rebalancer:
    """Where each layer's experts have their pages, and what has to move for it.

    Args:
        topologies: of every layer, changed in place when its experts are packed anew.
    """

    def __init__(
        self,
        policy: Packing,
        exchange: Exchange,
        pool: PagePool,
        table: PageTable,
        topologies: list[Topology],
        evictor: Evictor,
        reuse: Reuse | None,
        page_size: int,
    ) -> None:
        self.policy, self.exchange, self.pool, self.table, self.topologies = policy, exchange, pool, table, topologies
        self.evictor, self.reuse, self.page_size = evictor, reuse, page_size
        self.counters: Counter[str] = Counter()
        """``repacks`` of a layer's experts, and ``moved_pages`` that have come here."""
        self._homes: dict[Key, dict[tuple[int, int], int]] = {}  # home expert of the pages here, [unit, number]
        self._loads: dict[Key, list[list[int]]] = {}  # pages of everybody, [unit][rank]
        self._queue: deque[tuple[Key, int, int]] = deque()  # (sequence, unit, page number) here, to be moved
        self._moving = False  # the same on every rank

    def placed(self, sequence: Key, unit: int, page_idx: int, owner: int, home: int) -> None:
        """A page has got an owner; told on every rank alike."""
        units = self._loads.setdefault(sequence, [[0] * self.exchange.size for _ in range(self.table.num_units)])
        units[unit][owner] += 1
        if owner == self.exchange.rank and home >= 0:
            self._homes.setdefault(sequence, {})[unit, page_idx] = home

    def evicted(self, page: Evicted) -> None:
        """A page is gone; told on every rank alike."""
        self._loads[page.sequence][page.unit][page.owner] -= 1
        self._homes.get(page.sequence, {}).pop((page.unit, page.page_idx), None)

    def forget(self, sequence: Key) -> None:
        """A sequence is gone."""
        self._homes.pop(sequence, None)
        self._loads.pop(sequence, None)

    def step(self, step: int, free: list[int], num_sealed: dict[Key, int], batches: list[SequenceBatch]) -> None:
        """Looks whether it is time to pack anew, and moves some pages. Every rank calls it at the same point.

        Args:
            step: number of the pass, the same on every rank.
            free: pages that each rank's pool can still take; kept up to date.
            num_sealed: pages given out so far, per sequence.
            batches: this rank's own, whose counts of pages are kept up to date.
        """
        if step % self.policy.every == 0:
            self._look()
        if self._moving:
            self._move(free, num_sealed, batches)

    def _look(self) -> None:
        streams, experts = self.evictor.streams, self.topologies[0].num_experts
        layers = len(self.topologies)
        mine = [0] * (layers * experts)
        for homes in self._homes.values():
            for (unit, _), home in homes.items():
                mine[unit // streams * experts + home] += 1
        everyone = self.exchange.all_gather(mine, kind="rebalance")
        for layer, topology in enumerate(self.topologies):
            part = slice(layer * experts, (layer + 1) * experts)
            counts = [sum(column) for column in zip(*(row[part] for row in everyone), strict=True)]
            packed = pack(counts, topology, self.policy.slack, self.policy.redundant)
            if packed is not None:
                self.topologies[layer] = dataclasses.replace(topology, homes=packed)
                self.counters["repacks"] += 1
                self._moving = True
        if self._moving:
            self._queue = deque(
                (sequence, unit, page_idx)
                for sequence, homes in self._homes.items()
                for (unit, page_idx), home in homes.items()
                if self.topologies[unit // streams].owner(home, page_idx) != self.exchange.rank
            )

    def _move(self, free: list[int], num_sealed: dict[Key, int], batches: list[SequenceBatch]) -> None:
        proposals = [move for move in (self._proposal() for _ in range(self.policy.moves)) if move is not None]
        rows = [x for move in [*proposals, *[NOTHING] * (self.policy.moves - len(proposals))] for x in move]
        tables = self.exchange.all_gather(rows, kind="rebalance")
        width = len(Move._fields)
        accepted: list[list[Move]] = []
        seen = False
        for rank, table in enumerate(tables):
            accepted.append([])
            for at in range(0, len(table), width):
                move = Move(*table[at : at + width])
                if move.home < 0:
                    break
                seen = True
                loads = self._loads[move.key][move.unit]
                topology = self.topologies[move.unit // self.evictor.streams]
                source = None if move.sequence < 0 else move.source
                limit = page_limits(num_sealed[move.key] * self.page_size, self.page_size, topology, source)
                if loads[move.target] < limit[move.target] and free[move.target] > 0:
                    loads[rank] -= 1
                    loads[move.target] += 1
                    free[move.target] -= 1
                    free[rank] += 1
                    accepted[-1].append(move)
                    self._note(move, rank, batches)
        self._moving = seen
        if any(accepted):
            self._exchange(accepted)

    def _proposal(self) -> Move | None:
        """The next page of the queue that is still here."""
        while self._queue:
            sequence, unit, page_idx = self._queue.popleft()
            home = self._homes.get(sequence, {}).get((unit, page_idx))
            if home is None:
                continue
            for page_format in range(self.table.num_formats):
                for number, slot in self.table.pages(sequence, unit, page_format):
                    if number == page_idx:
                        target = self.topologies[unit // self.evictor.streams].owner(home, page_idx)
                        known = self.evictor.knowledge(slot)
                        return Move(*sequence, unit, page_idx, page_format, home, target, *known)
        return None

    def _note(self, move: Move, rank: int, batches: list[SequenceBatch]) -> None:
        """Keeps the counts of the sequence's own rank up to date."""
        for batch in batches:
            if move.source == (SHARED_SOURCE if batch.shared else self.exchange.rank) and move.sequence in batch.ids:
                loads = batch.loads[move.unit][batch.ids.index(move.sequence)]
                loads[rank] -= 1
                loads[move.target] += 1

    def _exchange(self, accepted: list[list[Move]]) -> None:
        rank, size = self.exchange.rank, self.exchange.size
        leaving = sorted(accepted[rank], key=lambda move: move.target)
        slots = [self.table.remove_page(move.key, move.unit, move.page_idx, "move") for move in leaving]
        rows = [self.pool.read(slot) for slot in slots]
        self.pool.free(slots)
        for move in leaving:
            self._homes[move.key].pop((move.unit, move.page_idx))
        arriving = [(source, move) for source in range(size) for move in accepted[source] if move.target == rank]
        sizes = [sum(self.pool.sizes[move.page_format]) for _, move in arriving]
        receive = [sum(n for n, (s, _) in zip(sizes, arriving, strict=True) if s == r) for r in range(size)]
        send = [sum(sum(self.pool.sizes[m.page_format]) for m in leaving if m.target == r) for r in range(size)]
        payload = torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8, device=self.pool.device)
        received = self.exchange.send_pages(payload, send, receive, kind="moved_page").wait()
        for row, (_, move) in zip(received.split(sizes) if arriving else (), arriving, strict=True):
            (slot,) = self.pool.allocate(1, move.page_format)
            split = self.pool.sizes[move.page_format].page
            self.pool.write([slot], row[None, :split], row[None, split:])
            self.table.add(move.key, move.unit, move.page_idx, slot, move.page_format)
            self.evictor.recall(slot, (move.mass, move.last_step, move.visits))
            if self.reuse is not None:
                self.reuse.stored([slot], self.pool.num_slots)
            self._homes.setdefault(move.key, {})[move.unit, move.page_idx] = move.home
        self.counters["moved_pages"] += len(arriving)


def pack(counts: list[int], topology: Topology, slack: float, redundant: int) -> tuple[tuple[int, ...], ...] | None:
    """The ranks of each expert, packed so that all hold about as many pages; None where it is not worth it.

    EPLB's two steps (DeepSeek, 2025): one more rank, ``redundant * num_ranks`` times, for the expert with the most
    pages per rank; then balanced packing: heaviest shares first, each to the lightest rank that still has room for one
    and has none of the expert. Ranks are then named so that as many pages as possible stay where they are.

    Args:
        counts: pages of each expert.
        slack: how many times the mean a rank may hold before anything is done.
    """
    ranks, experts = topology.num_ranks, len(counts)
    mean = sum(counts) / ranks

    def fullest(homes: Sequence[tuple[int, ...]]) -> float:
        loads = [0.0] * ranks
        for count, owners in zip(counts, homes, strict=True):
            for rank in owners:
                loads[rank] += count / len(owners)
        return max(loads)

    now = topology.homes or tuple((topology.owner(e),) for e in range(experts))
    if mean == 0 or fullest(now) <= slack * mean:
        return None
    shares = [1] * experts
    for _ in range(redundant * ranks):
        open_ = [e for e in range(experts) if shares[e] < ranks]
        if not open_:
            break
        shares[max(open_, key=lambda e: (counts[e] / shares[e], -e))] += 1
    room = -(-sum(shares) // ranks)
    bins: list[list[int]] = [[] for _ in range(ranks)]

    def weight(members: list[int]) -> float:
        return sum(counts[e] / shares[e] for e in members)

    parts = sorted((e for e in range(experts) for _ in range(shares[e])), key=lambda e: (-counts[e] / shares[e], e))
    for expert in parts:
        open_bins = [i for i, b in enumerate(bins) if len(b) < room]
        best = min(open_bins, key=lambda i: (expert in bins[i], weight(bins[i]), i))
        bins[best].append(expert)
    stays = sorted(
        (-sum(counts[e] / shares[e] for e in members if rank in now[e]), rank, i)
        for i, members in enumerate(bins)
        for rank in range(ranks)
    )
    names: dict[int, int] = {}
    for _, rank, i in stays:
        if i not in names and rank not in names.values():
            names[i] = rank
    homes = tuple(tuple(sorted({names[i] for i, b in enumerate(bins) if e in b})) for e in range(experts))
    return homes if fullest(homes) < fullest(now) else None
