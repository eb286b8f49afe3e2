"""`Topology`: which rank hosts which expert's pages."""

from __future__ import annotations

from dataclasses import dataclass

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

    def owner(self, expert: int, page_idx: int = 0) -> int:
        """Rank that hosts ``expert``'s page of this number within its sequence."""
        if self.homes is not None:
            ranks = self.homes[expert]
            return ranks[page_idx % len(ranks)]
        return expert // (self.num_experts // self.num_ranks)
