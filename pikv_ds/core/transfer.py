"""Page bytes on their way between shards: rank by rank, and for each rank format by format."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pikv_ds.core.exchange import Exchange, PagesInFlight
from pikv_ds.core.shard import Shard
from pikv_ds.core.table import Ints


def in_order(ranks: Ints, formats: Ints, which: Ints) -> Ints:
    """Some pages in the order in which they travel: by rank, then by format, then as they were.

    Args:
        ranks, formats: ``[N]``: where each page goes to or comes from, and its format.
        which: the pages that travel, in order.
    """
    return which[np.lexsort((which, formats[which], ranks[which]))]


def _runs(ranks: Ints, formats: Ints) -> list[tuple[int, int, slice]]:
    """Rank, format and places of each run of pages that travel together."""
    cuts = np.flatnonzero((np.diff(ranks) != 0) | (np.diff(formats) != 0)) + 1
    bounds = [0, *cuts.tolist(), len(ranks)]
    return [(int(ranks[a]), int(formats[a]), slice(a, b)) for a, b in itertools.pairwise(bounds) if a < b]


@dataclass(frozen=True)
class Outgoing:
    """Pages that leave."""

    payload: Tensor
    """uint8, flat."""
    num_bytes: list[int]
    """To each rank."""

    @classmethod
    def of(
        cls, shard: Shard, num_ranks: int, targets: Ints, formats: Ints, read: Callable[[slice, int], Tensor]
    ) -> Outgoing:
        """Joins pages that are `in_order`.

        Args:
            read: from places among them, all of one format, and the format to bytes uint8 ``[n, bytes]``.
        """
        parts, num_bytes = [], [0] * num_ranks
        for target, page_format, places in _runs(targets, formats):
            parts.append(read(places, page_format).flatten())
            num_bytes[target] += len(parts[-1])
        nothing = torch.empty(0, dtype=torch.uint8, device=shard.device)
        return cls(torch.cat(parts) if parts else nothing, num_bytes)


@dataclass(frozen=True)
class Incoming:
    """Pages under way to this rank, which have their slots already."""

    flight: PagesInFlight
    pieces: list[tuple[int, Ints]]
    """Format and slots of what arrives, in its order."""

    @classmethod
    def start(
        cls, exchange: Exchange, shard: Shard, outgoing: Outgoing, sources: Ints, formats: Ints, slots: Ints, kind: str
    ) -> Incoming:
        """Sends pages and begins to receive others, which are `in_order`."""
        receive, pieces = [0] * exchange.size, []
        for source, page_format, places in _runs(sources, formats):
            pieces.append((page_format, slots[places]))
            receive[source] += len(slots[places]) * sum(shard.pool.sizes[page_format])
        return cls(exchange.send_pages(outgoing.payload, outgoing.num_bytes, receive, kind), pieces)

    def store(self, shard: Shard) -> None:
        """Waits for the pages and writes them into their slots."""
        received = self.flight.wait()
        sizes = [len(slots) * sum(shard.pool.sizes[page_format]) for page_format, slots in self.pieces]
        for (page_format, slots), part in zip(self.pieces, received.split(sizes) if sizes else (), strict=True):
            shard.write(slots, page_format, part.view(len(slots), -1))
