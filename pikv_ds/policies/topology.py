"""`Topology`: which rank hosts which expert's pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_ds.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """Which rank hosts which expert's pages: that of the expert itself, in contiguous blocks as DeepSpeed and Megatron
    lay them out, unless the experts have been packed anew (`pikv_ds.core.rebalance`)."""

    num_experts: int
    num_ranks: int
    homes: tuple[tuple[int, ...], ...] | None = None
    """Ranks of each expert, several where it is so hot that they share its pages in turn; None: blocks."""

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_experts < 1 or self.num_experts % self.num_ranks:
            raise UsageError(
                f"{self.num_experts} experts cannot be spread evenly over {self.num_ranks} expert-parallel ranks; "
                f"choose an EP size that divides {self.num_experts}"
            )

    def owners(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rank that hosts each expert's page of some numbers within their sequences.

        Args:
            numbers: ``[N]``

        Returns:
            ``[N, num_experts]``
        """
        if self.homes is None:
            blocks = np.arange(self.num_experts) // (self.num_experts // self.num_ranks)
            return np.broadcast_to(blocks, (len(numbers), self.num_experts))
        most = max(map(len, self.homes))
        table = np.array([[*ranks, *[0] * (most - len(ranks))] for ranks in self.homes])
        turn = numbers[:, None] % np.array([len(ranks) for ranks in self.homes])
        return table[np.arange(self.num_experts), turn]

    def owner(self, expert: int, page_idx: int = 0) -> int:
        """Rank that hosts an expert's page of this number."""
        return int(self.owners(np.array([page_idx]))[0, expert])
