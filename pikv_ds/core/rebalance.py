"""`Rebalancer`: packs experts anew over the ranks, and moves their pages while generation goes on.

Every so many passes the ranks add up how many pages each expert is home to. Where one rank would hold too many of a
layer's, the experts are distributed anew (`pack`), hot ones over several ranks: new pages follow at once, old
ones move a few per rank and pass, between the step plan and the first layer. Pages move as their bytes are. All ranks
decide the same from what they have exchanged; the bound on a rank's share of a sequence holds throughout.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.core.exchange import Exchange
from pikv_ds.core.ledger import Ledger
from pikv_ds.core.placement import owner_limit
from pikv_ds.core.shard import Headers, Shard
from pikv_ds.core.table import Ints
from pikv_ds.core.transfer import Incoming, Outgoing, in_order
from pikv_ds.policies.placements import Packing
from pikv_ds.policies.topology import Topology


class Rebalancer:
    """Where each layer's experts have their pages, and what has to move for it.

    Args:
        topologies: of every layer, changed in place when its experts are packed anew.
    """

    def __init__(
        self, policy: Packing, exchange: Exchange, shard: Shard, ledger: Ledger, topologies: list[Topology]
    ) -> None:
        self.policy, self.exchange, self.shard, self.ledger = policy, exchange, shard, ledger
        self.topologies = topologies
        self.counters: Counter[str] = Counter()
        """``repacks`` of a layer's experts, and ``moved_pages`` that have come here."""
        self._queue = np.zeros((0, 3), np.int64)  # pages here that are to move: row, unit, number
        self._moving = False  # the same on every rank

    def forget(self, row: int) -> None:
        """A row is gone."""
        self._queue = self._queue[self._queue[:, 0] != row]

    def step(self, step: int, free: list[int]) -> None:
        """Looks whether it is time to pack anew, and moves some pages. Every rank calls it at the same point.

        Args:
            step: number of the pass, the same on every rank.
            free: pages that each rank's pool can still take; kept up to date.
        """
        if step % self.policy.every == 0:
            self._look()
        if self._moving:
            self._move(free)

    def _look(self) -> None:
        mine = self.shard.by_expert
        assert mine is not None
        sizes = [mine.size] * self.exchange.size
        everyone = self.exchange.gather_arrays(mine.reshape(-1), sizes, kind="rebalance")
        counts = np.sum(everyone, axis=0).reshape(mine.shape)
        for layer, topology in enumerate(self.topologies):
            packed = pack(counts[layer].tolist(), topology, self.policy.slack, self.policy.redundant)
            if packed is not None:
                self.topologies[layer] = dataclasses.replace(topology, homes=packed)
                self.counters["repacks"] += 1
                self._moving = True
        if self._moving:
            self._queue = self._misplaced()

    def _misplaced(self) -> Ints:
        """Pages here that belong to another rank: row, unit and number, ``[N, 3]``."""
        num_units, rows = self.ledger.num_units, self.ledger.rows
        every_row, every_unit = np.repeat(rows, num_units), np.tile(np.arange(num_units), len(rows))
        found = []
        for page_format in range(self.shard.table.num_formats):
            entries = self.shard.table.entries(every_row, every_unit, page_format)
            homes = self.shard.homes(entries.slots)
            units = every_unit[entries.which]
            pages = np.stack([every_row[entries.which], units, entries.numbers], axis=1)
            targets = self._targets(units, entries.numbers, homes)
            found.append(pages[(homes >= 0) & (targets != self.exchange.rank)])
        return np.concatenate(found)

    def _targets(self, units: Ints, numbers: Ints, homes: Ints) -> Ints:
        """The ranks that pages belong to by their home experts, ``[N]``."""
        targets, layers = np.full(len(units), self.exchange.rank), units // self.shard.streams
        for layer in np.unique(layers):
            here = layers == layer
            owners = self.topologies[layer].owners(numbers[here])
            targets[here] = np.take_along_axis(owners, homes[here, None].clip(min=0), axis=1)[:, 0]
        return targets

    def _move(self, free: list[int]) -> None:
        size, moves = self.exchange.size, self.policy.moves
        proposals, self._queue = self._queue[:moves], self._queue[moves:]
        slots, formats = self.shard.table.find(*proposals.T)
        here = slots > 0  # others have been evicted since
        rows, units, numbers = proposals[here].T
        headers = self.shard.headers(rows, units, numbers, slots[here], formats[here])
        targets = self._targets(units, numbers, headers.homes)
        width = len(Headers._fields) + 1
        table = np.column_stack([headers.stack(), targets])
        everyones = self.exchange.all_gather([len(table), len(self._queue)], kind="rebalance")
        counts = [count for count, _ in everyones]
        self._moving = any(count or left for count, left in everyones)
        if not sum(counts):
            return
        tables = self.exchange.gather_arrays(table.reshape(-1), [n * width for n in counts], kind="rebalance")
        everyone = np.concatenate(tables).reshape(-1, width)
        owners, targets = np.repeat(np.arange(size), counts), everyone[:, -1]
        headers = Headers.of(everyone[:, :-1])
        accepted = self._accept(headers, owners, targets, free)
        headers, owners, targets = headers.at(accepted), owners[accepted], targets[accepted]
        self.ledger.move(headers.rows, headers.units, owners, targets)
        change = np.bincount(owners, minlength=size) - np.bincount(targets, minlength=size)
        free[:] = [pages + int(n) for pages, n in zip(free, change, strict=True)]
        if accepted.any():
            self._exchange(headers, owners, targets)

    def _accept(self, headers: Headers, owners: Ints, targets: Ints, free: list[int]) -> NDArray[np.bool_]:
        """Which moves their targets have room for, one after the other, ``[N]``.

        There are few of them, `Packing.moves` of each rank at most, so they may be looked at one by one."""
        tokens = self.ledger.num_sealed(headers.rows) * self.ledger.page_size
        limits = owner_limit(tokens, self.ledger.page_size, self.topologies[0])
        limits -= (targets == self.ledger.source[headers.rows]) & ~self.ledger.shared[headers.rows]
        accepted = np.zeros(len(targets), np.bool_)
        room, changes = list(free), Counter[tuple[int, int, int]]()
        for i, (row, unit, owner, target) in enumerate(
            zip(headers.rows.tolist(), headers.units.tolist(), owners.tolist(), targets.tolist(), strict=True)
        ):
            held = int(self.ledger.pages[row, unit, target]) + changes[row, unit, target]
            if held < limits[i] and room[target] > 0:
                accepted[i] = True
                changes[row, unit, owner] -= 1
                changes[row, unit, target] += 1
                room[owner], room[target] = room[owner] + 1, room[target] - 1
        return accepted

    def _exchange(self, headers: Headers, owners: Ints, targets: Ints) -> None:
        rank, size = self.exchange.rank, self.exchange.size
        leaving = in_order(targets, headers.formats, np.flatnonzero(owners == rank))
        going = headers.at(leaving)
        slots = self.shard.take(going.rows, going.units, going.numbers, "move")

        def read(places: slice, page_format: int) -> Tensor:
            return self.shard.read(slots[places], page_format)

        outgoing = Outgoing.of(self.shard, size, targets[leaving], going.formats, read)
        self.shard.free(slots)
        arriving = in_order(owners, headers.formats, np.flatnonzero(targets == rank))
        coming = headers.at(arriving)
        new = self.shard.put(coming, self.ledger.serial[coming.rows])
        arrays = owners[arriving], coming.formats, new
        Incoming.start(self.exchange, self.shard, outgoing, *arrays, kind="moved_page").store(self.shard)
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
