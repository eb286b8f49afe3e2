"""`Planner`: what follows from the rows of a pass, the same on every rank. Nothing here is told but the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pikv_ds.core.attention import ShardedAttention
from pikv_ds.core.eviction import Evictor
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.ledger import SHARED_SOURCE, Ledger
from pikv_ds.core.pool import PagePool
from pikv_ds.core.sequences import NO_ROW
from pikv_ds.core.step import UNLIMITED, Announcement, StepPlan

Rows = Sequence[tuple[int, int]]
"""``(row, tokens)`` of the sequences that take part in a pass; `NO_ROW` of those that no plan has announced yet."""


class Planner:
    """Makes step plans."""

    def __init__(
        self, exchange: Exchange, ledger: Ledger, pool: PagePool, evictor: Evictor, attention: ShardedAttention
    ) -> None:
        self.exchange, self.ledger, self.pool = exchange, ledger, pool
        self.evictor, self.attention = evictor, attention
        self.entries: list[tuple[tuple[int, int], ...]] = [()] * exchange.size
        """Per source: the rows of the last pass, and the tokens that each of them appends."""
        self.announced: list[tuple[int, int]] | None = None
        """Those of this rank, which travel only when they change."""

    def exchange_rows(
        self, everyone: list[Announcement], entries: Rows, changed: bool, finished: Sequence[int]
    ) -> tuple[list[Rows], list[int]]:
        """Which rows take part in the pass, of every source, and which are finished.

        Args:
            entries, finished: this rank's.
            changed: whether its entries travel.
        """
        released = [(row, 0) for row in finished]
        table = [*entries, *released] if changed else released
        counts = [a.num_entries + a.num_released for a in everyone]
        every: list[Rows] = []
        gone: list[int] = []
        for source, rows in enumerate(self.exchange.all_gather_ragged(table, 2, counts)):
            announced = everyone[source]
            mine = [(row, n) for row, n in rows[: announced.num_entries]]
            every.append(mine if announced.changed else self.entries[source])
            gone += [row for row, _ in rows[announced.num_entries :]]
        return every, gone

    def seals(self, rows: Rows) -> list[int]:
        """Pages that some rows seal in this pass, ``[layers]``."""
        layers, size, streams = self.evictor.shape.num_layers, self.ledger.page_size, self.evictor.streams
        filling, prompts = 0, []
        for row, n in rows:
            before = 0 if row == NO_ROW else int(self.ledger.lengths[row])
            if self.evictor.cuts and n > 1 and not before:
                prompts.append(n)
            else:
                filling += (before + n) // size - before // size
        return [
            filling * streams + sum(self.evictor.sealed_pages(n, layer) for n in prompts) for layer in range(layers)
        ]

    def free_without(self, gone: list[int]) -> tuple[list[int], list[int]]:
        """Free pages of every rank, all and without the reserve, once some rows are gone."""
        capacity, reserved = self.pool.capacity_pages, self.pool.reserved_pages
        if capacity is None:
            return [UNLIMITED] * self.exchange.size, [UNLIMITED] * self.exchange.size
        free = capacity - self.ledger.totals + self.ledger.pages[gone].sum((0, 1))
        return free.clip(min=0).tolist(), (free - reserved).clip(min=0).tolist()

    def number(self, every: Sequence[Rows], shared: bool) -> None:
        """Gives new sequences their rows, and notes what each row appends."""
        out: list[tuple[tuple[int, int], ...]] = []
        for source, rows in enumerate(every):
            if shared and source != SHARED_SOURCE:  # the same sequences
                out.append(out[SHARED_SOURCE])
                continue
            out.append(tuple((self.ledger.join(source, shared) if row == NO_ROW else row, n) for row, n in rows))
        for row, n in {pair for rows in out for pair in rows}:
            self.ledger.new[row] = n
        self.entries, self.announced = out, list(out[self.exchange.rank])

    def plan(
        self, sources: Sequence[int], seals: list[list[int]], prefill: bool, free: list[int], shared: bool
    ) -> StepPlan:
        """What follows from the rows of this pass."""
        singles, queries, fetches, sealing = [], [], [], []
        for source in range(self.exchange.size):
            entries = self.entries[source] if source in sources else ()
            rows = np.array([row for row, _ in entries], np.int64)
            pages, filling = self.ledger.num_sealed(rows).tolist(), self.ledger.filling(rows) > 0
            singles.append(np.array([row for row, n in entries if n == 1], np.int64))
            asking = [(*entry, n) for entry, n in zip(entries, pages, strict=True) if n and entry[1] > 1]
            fetched = {row for row, n, held in asking if not shared and self.attention.cheaper_to_fetch(held, n)}
            queries.append(tuple((row, n) for row, n, _ in asking if row not in fetched))
            fetches.append(tuple(row for row, _, _ in asking if row in fetched))
            sealing.append(rows[filling])
        decodes = any(self.ledger.num_sealed(rows).any() for rows in singles)
        return StepPlan(
            tuple(singles),
            decodes,
            tuple(queries),
            tuple(fetches),
            tuple(sealing),
            tuple(map(tuple, seals)),
            prefill,
            free,
            shared,
        )
