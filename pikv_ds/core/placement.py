"""From a page's votes to the rank that owns it. No communication.

Routing is skewed, so the memory bound of the store is enforced here: for every sequence and layer
no rank keeps more than ``ceil(L/G) + ceil(L/E) + page_size`` tokens. The source rank of a sequence
places all its pages, so it knows every rank's share of it without asking anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pikv_ds.policies.topology import Topology

NO_OWNER = -1
Whole = TypeVar("Whole", int, NDArray[np.int64])


def rank_bound(num_tokens: Whole, page_size: int, topology: Topology) -> Whole:
    """Most tokens of a sequence of ``num_tokens`` that a rank keeps at a layer, at any skew of the routing."""
    return -(-num_tokens // topology.num_ranks) - (-num_tokens // topology.num_experts) + page_size


def owner_limit(num_tokens: Whole, page_size: int, topology: Topology) -> Whole:
    """How many pages of a sequence and unit a rank may own when ``num_tokens`` of the sequence are there.

    The sequence's own rank may own one less: it also keeps the tail. Where every rank has the sequence and its tail,
    all may own as many. A page's limit uses the tokens up to its end, so that every prefix of a sequence is bounded.
    """
    return rank_bound(num_tokens, page_size, topology) // page_size


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
