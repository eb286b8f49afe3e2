"""`Latencies`: how long tokens took, as Prometheus counts durations."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0,
)  # fmt: skip
"""Upper bounds of the buckets of latencies."""


@dataclass
class Latencies:
    """A histogram of durations, of buckets as Prometheus has them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    """Of each bucket by itself, the last one without an upper bound."""
    total_s: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Counts `times` durations of so many seconds."""
        self.counts[bisect.bisect_left(SECONDS, seconds)] += times
        self.total_s += seconds * times
