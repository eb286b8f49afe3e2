"""From a page's home expert to the rank that owns it. Pure functions, no communication.

Routing is skewed, so the memory bound of the store is enforced here: for every sequence and layer
no rank keeps more than ``ceil(L/G) + ceil(L/E) + page_size`` tokens. The source rank of a sequence
places all its pages, so it knows every rank's share of it without asking anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

from pikv_ds.policies.topology import Topology


def rank_bound(num_tokens: int, page_size: int, topology: Topology) -> int:
    """Most tokens of a sequence of ``num_tokens`` that a rank keeps at a layer, at any skew of the routing."""
    return -(-num_tokens // topology.num_ranks) - (-num_tokens // topology.num_experts) + page_size


def page_limits(num_tokens: int, page_size: int, topology: Topology, source: int | None) -> list[int]:
    """How many pages of one sequence and layer each rank may hold, ``[num_ranks]``.

    Args:
        num_tokens: length L of the sequence in tokens, the open tail included.
        source: the sequence's own rank. It also keeps the tail, for which one page is reserved. None:
            every rank has the sequence and its tail, beside these pages.
    """
    limit = rank_bound(num_tokens, page_size, topology) // page_size
    return [limit - 1 if rank == source else limit for rank in range(topology.num_ranks)]


def choose_owner(
    preference: Sequence[int], loads: Sequence[int], limits: Sequence[int], free: Sequence[int]
) -> int | None:
    """The first preferred rank with room, else the least loaded one with room, else None.

    Args:
        preference: ranks, best first; may name only some of them.
        loads: pages of this sequence and layer that each rank already holds, ``[num_ranks]``.
        limits: how many it may hold, ``[num_ranks]``.
        free: pages that each rank's pool can still take from this source, ``[num_ranks]``.
    """
    for rank in preference:
        if loads[rank] < limits[rank] and free[rank] > 0:
            return rank
    rest = [r for r in range(len(loads)) if loads[r] < limits[r] and free[r] > 0]
    return min(rest, key=lambda r: (loads[r], r)) if rest else None


def fair_shares(free: Sequence[int], demand: Sequence[int]) -> list[list[int]]:
    """Splits each rank's free pages over the sources that want to send pages: ``[source][owner]``.

    All ranks compute the same table from the step plan, so sources that place their pages without
    asking each other still never overfill an owner. Plenty is not divided: an owner that could
    take everybody's pages is open to all.
    """
    total = sum(demand)
    shares = [
        [demand[s] if pages >= total else pages * demand[s] // total for pages in free] for s in range(len(demand))
    ]
    for owner, pages in enumerate(free):  # what rounding down has left goes to those who lack most
        for _ in range(pages - sum(share[owner] for share in shares) if pages < total else 0):
            source = max(range(len(demand)), key=lambda s: (demand[s] - sum(shares[s]), -s))
            shares[source][owner] += 1
    return shares
