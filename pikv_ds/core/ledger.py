"""`Ledger`: the living sequences of the group, and how many pages of each lie on which rank. The same on all ranks.

A living sequence has a number, its *row*. Rows are given out as step plans that found room announce sequences, by rank
and then in the order of the announcement, the lowest free number first: so all ranks number alike without a word. What
is written here follows from step plans and from what the ranks tell each other when pages are sent, moved and evicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHARED_SOURCE = 0
"""The rank that stands as the source of sequences that all ranks have; its word counts for their pages' homes."""


class Ledger:
    """Who has how many pages.

    Args:
        num_units: of every row (see `SequenceBatch`).
        page_size: tokens.
    """

    def __init__(self, num_units: int, num_ranks: int, page_size: int) -> None:
        self.num_units, self.num_ranks, self.page_size = num_units, num_ranks, page_size
        self.source = np.zeros(0, np.int32)
        """``[rows]``: the rank that each row's sequence belongs to, `SHARED_SOURCE` where all have it; -1: no row."""
        self.shared = np.zeros(0, np.bool_)
        """``[rows]``: whether every rank has the sequence."""
        self.serial = np.zeros(0, np.int64)
        """``[rows]``: sequences that joined before this one, which tells those apart that have a row in turn."""
        self.lengths = np.zeros(0, np.int64)
        """``[rows]``: tokens, those of the pass under way left out."""
        self.new = np.zeros(0, np.int64)
        """``[rows]``: tokens that the pass under way appends."""
        self.pages = np.zeros((0, num_units, num_ranks), np.int32)
        """``[rows, units, ranks]``: pages that lie on each rank."""
        self.demoted = np.zeros((0, num_units), np.int32)
        """``[rows, units]``: those of them that have been demoted."""
        self.totals = np.zeros(num_ranks, np.int64)
        """``[ranks]``: pages on each rank, of all rows."""
        self._free: list[int] = []
        self._joined = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, np.ndarray))

    @property
    def rows(self) -> NDArray[np.int64]:
        """The living rows, in order."""
        return np.flatnonzero(self.source >= 0)

    def num_sealed(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Pages that each unit of some rows has sealed so far, those that were cut or evicted included."""
        return self.lengths[rows] // self.page_size

    def filling(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Pages of some rows per unit that fill up in the pass under way."""
        return (self.lengths[rows] + self.new[rows]) // self.page_size - self.num_sealed(rows)

    def kept(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Pages of some rows that have not been demoted, ``[n, units]``."""
        return self.pages[rows].sum(2) - self.demoted[rows]

    def own_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths[self.rows].sum())

    # -- events -----------------------------------------------------------------------------------------------------

    def join(self, source: int, shared: bool = False) -> int:
        """A sequence of a rank begins; returns its row."""
        if not self._free:
            self._grow()
        row = heapq.heappop(self._free)
        self.source[row], self.shared[row] = source, shared
        self.serial[row] = self._joined
        self._joined += 1
        return row

    def leave(self, row: int) -> None:
        """A sequence is finished, and its pages are gone."""
        assert self.source[row] >= 0, f"row {row} is nobody's"
        self.totals -= self.pages[row].sum(0)
        self.pages[row] = self.demoted[row] = 0
        self.lengths[row] = self.new[row] = 0
        self.source[row] = -1
        heapq.heappush(self._free, row)

    def commit(self) -> None:
        """The pass under way is over: its tokens are part of their sequences."""
        self.lengths += self.new
        self.new[:] = 0

    def place(
        self, rows: NDArray[np.integer], units: range, kept: NDArray[np.integer], demoted: NDArray[np.integer]
    ) -> None:
        """Pages have got owners.

        Args:
            rows: ``[n]``, each once.
            kept, demoted: ``[n, units, ranks]``: pages as they are, and pages of the smaller codec.
        """
        counts, some = kept + demoted, slice(units.start, units.stop)
        self.pages[rows, some] += counts.astype(np.int32)
        self.demoted[rows, some] += demoted.sum(2).astype(np.int32)
        self.totals += counts.sum((0, 1))

    def evict(self, rows: NDArray[np.integer], units: NDArray[np.integer], ranks: NDArray[np.integer]) -> None:
        """Pages are gone, ``[N]`` each."""
        np.subtract.at(self.pages, (rows, units, ranks), 1)
        self.totals -= np.bincount(ranks, minlength=self.num_ranks)

    def demote(self, rows: NDArray[np.integer], units: NDArray[np.integer]) -> None:
        """Pages have been demoted, ``[N]`` each."""
        np.add.at(self.demoted, (rows, units), 1)

    def move(
        self,
        rows: NDArray[np.integer],
        units: NDArray[np.integer],
        ranks: NDArray[np.integer],
        targets: NDArray[np.integer],
    ) -> None:
        """Pages have gone from one rank to another, ``[N]`` each."""
        self.evict(rows, units, ranks)
        np.add.at(self.pages, (rows, units, targets), 1)
        self.totals += np.bincount(targets, minlength=self.num_ranks)

    def check_integrity(self) -> None:
        """Checks every internal relation; raises AssertionError with the first one that fails."""
        assert (self.pages >= 0).all() and (self.demoted >= 0).all(), "a negative number of pages"
        assert (self.kept(self.rows) >= 0).all(), "more pages demoted than there are"
        assert (self.totals == self.pages.sum((0, 1))).all(), "the ranks' pages are miscounted"
        gone = self.source < 0
        assert not self.pages[gone].any() and not self.lengths[gone].any(), "something is left of a row"
        assert sorted(self._free) == np.flatnonzero(gone).tolist(), "a free row is lost"

    def _grow(self) -> None:
        before = len(self.source)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and name != "totals":
                more = np.zeros((max(8, before), *value.shape[1:]), value.dtype)
                setattr(self, name, np.concatenate([value, more]))
        self.source[before:] = -1
        self._free = list(range(before, len(self.source)))
