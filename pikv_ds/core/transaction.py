"""`Transaction`: what a pass changes before it commits, and how that is undone.

A pass commits when all ranks have made it whole: the next step plan tells. One that was broken off on any rank is
undone on every rank, so that its batch is as it was and the pass can be made again, with the same bits. What would be
destroyed on the way is kept: a few numbers per pass, and of rows whose pages are sent in it the ledger's counts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pikv_ds.core.attention import ShardedAttention
from pikv_ds.core.eviction import Evictor
from pikv_ds.core.ledger import Ledger
from pikv_ds.core.sealing import PageSender
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.shard import Shard
from pikv_ds.core.step import BROKEN_OFF, MADE, NOTHING
from pikv_ds.core.table import Ints


class Transaction:
    """A pass under way.

    Args:
        batch: of this rank; None where it has none in the pass.
        rows: of all ranks, those whose pages are sent while the pass goes on: where there are prompts, all that fill
            pages.
    """

    def __init__(
        self,
        batch: SequenceBatch | None,
        rows: Ints,
        ledger: Ledger,
        shard: Shard,
        sender: PageSender,
        evictor: Evictor,
        attention: ShardedAttention,
    ) -> None:
        self.batch, self.rows = batch, rows
        self.appends = batch is not None and any(batch.new)
        self.ledger, self.shard, self.sender, self.evictor, self.attention = ledger, shard, sender, evictor, attention
        self._counters = [Counter(counter) for counter in self._counted()]
        self._chosen, self._audit, self._reuse = shard.snapshot()
        self._sent: tuple[Ints, Any, Any] | None = None
        self._totals, self._grown = ledger.totals.copy(), set(evictor.grown_rows)
        self._flags = attention.flags.clone()  # what the plan itself has noted, of pages that it demoted
        self.failed = False
        """The pass has ended with an error after its last layer."""
        if batch is not None and evictor.cuts:
            batch.keep_dropped()
        if len(rows):
            self._sent = sender.seen.copy(), ledger.pages[rows], ledger.demoted[rows]

    @property
    def state(self) -> int:
        """`BROKEN_OFF`, `MADE` or `NOTHING`: how this rank's part of the pass has ended."""
        if self.broken:
            return BROKEN_OFF
        alive = self.batch is not None and any(self.batch.alive)  # else there is nothing to be made again
        return MADE if alive and self.appends else NOTHING

    @property
    def broken(self) -> bool:
        """Whether the pass was broken off on this rank."""
        return self.batch is not None and (self.failed or self.batch.in_step)

    def commit(self) -> None:
        """The pass stands."""
        if self.batch is not None:
            self.batch.commit()

    def undo(self) -> None:
        """Leaves everything as it was when the plan stood; every rank does so."""
        self.sender.settle()
        self.sender.staged.clear()
        if self.batch is not None:
            self.batch.undo()
        if self._sent is not None:
            for row in self.rows.tolist():
                self._take_pages(row)
            self.sender.seen[:], self.ledger.pages[self.rows], self.ledger.demoted[self.rows] = self._sent
        self.ledger.totals[:], self.ledger.new[:] = self._totals, 0
        self.evictor.grown_rows.clear()
        self.evictor.grown_rows.update(self._grown)
        self.shard.restore(self._chosen, self._audit, self._reuse)
        self.shard.visits.clear()
        self.attention.flags.copy_(self._flags)
        self.attention.totals.clear()
        for counter, before in zip(self._counted(), self._counters, strict=True):
            counter.clear()
            counter.update(before)

    def _take_pages(self, row: int) -> None:
        """Removes the pages of a row that have come here in this pass."""
        units = np.arange(self.ledger.num_units)
        first = int(self.ledger.num_sealed([row])[0])
        for page_format in range(self.shard.table.num_formats):
            found = self.shard.table.entries(np.full(len(units), row), units, page_format)
            new = found.numbers >= first
            if new.any():
                which = found.which[new]
                rows = np.full(len(which), row)
                self.shard.free(self.shard.take(rows, units[which], found.numbers[new], "undo"))

    def _counted(self) -> list[Counter[str]]:
        demoter = self.evictor.demoter
        counters: list[Any] = [self.shard.counters, self.sender.counters, self.evictor.counters]
        counters.append(self.attention.counters)
        return counters if demoter is None else [*counters, demoter.counters]
