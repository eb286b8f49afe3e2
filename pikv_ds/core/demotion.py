"""`Demoter`: encodes pages that lie here anew, with a smaller codec.

Errors add up: what the first codec has lost stays lost. A demoted page keeps its rank, its tokens and its number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pikv_ds.core.shard import Headers, Shard
from pikv_ds.core.table import Ints


@dataclass
class Demoter:
    """Moves pages into the last of the formats."""

    shard: Shard
    flags: Tensor
    """See `PageSender`: what the first codec held may be beyond the second."""
    counters: Counter[str] = field(default_factory=Counter)
    """``demoted_pages``: of prompts, counted on their sequences' rank, and while decoding."""

    @property
    def page_format(self) -> int:
        """The format of demoted pages."""
        return len(self.shard.formats) - 1

    def demote(self, rows: Ints, units: Ints, numbers: Ints, serials: Ints) -> None:
        """Demotes pages that lie here, ``[N]``.

        Args:
            serials: of the rows' sequences.
        """
        shard = self.shard
        slots, formats = shard.table.find(rows, units, numbers)
        groups = units * len(shard.formats) + formats  # pages of a unit and format share bases
        for group in np.unique(groups).tolist():
            which = np.flatnonzero(groups == group)
            unit, page_format = divmod(group, len(shard.formats))
            before, after = shard.formats[page_format], shard.formats[self.page_format]
            layer, head = divmod(unit, shard.streams)
            encoded = shard.read(slots[which], page_format, summaries=False)
            flags = self.flags[layer : layer + 1]
            keys, values = before.unseal(layer, head, encoded)
            payload = after.seal(layer, head, keys, values, flags)
            count = len(which)
            cold = Headers(
                rows[which],
                units[which],
                numbers[which],
                np.full(count, self.page_format),
                shard.homes(slots[which]),
                masses=np.zeros(count, np.int64),
                last_steps=np.full(count, shard.step),
                visits=np.zeros(count, np.int64),
            )
            shard.free(shard.take(rows[which], units[which], numbers[which], "demote"))  # so a full pool has room
            shard.write(shard.put(cold, serials[which]), self.page_format, payload)
        self.counters["demoted_pages"] += len(rows)
