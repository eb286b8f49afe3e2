"""The step plan: what every rank announces before a forward pass, and what all of them read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHARED_SOURCE = 0
"""The rank that stands as the source of sequences that all ranks have; its word counts for their pages' homes."""

UNLIMITED = 2**40
"""Free pages that a rank without a capacity announces."""

FINE, FAILED, NON_FINITE, OUT_OF_RANGE = range(4)


class Announcement(NamedTuple):
    """One rank's row of the step plan."""

    step: int
    status: int
    num_entries: int
    """Sequences with sealed pages in this pass, 0 if the list has not changed."""
    changed: int
    num_released: int
    seals: int
    """Pages that this pass seals, over all layers."""
    prompt: int
    """Whether some sequence appends several tokens."""
    staged: int
    """Pages of earlier passes that wait to be sent."""
    free: int
    spare: int
    """Free pages without the reserve."""
    own_tokens: int
    """Tokens of the rank's own sequences after the last pass."""
    shared: int
    """Whether the pass is made with a batch that every rank has."""
    digest: int
    """Of the tokens of such a batch."""
    committed: int
    """See `ExpertShardedKVCache.committed_tokens`."""
    pages: int
    """In the rank's pool, of all layers."""


@dataclass(frozen=True)
class StepPlan:
    """What every rank will do in one forward pass: exchanged once, before its first layer."""

    rows: tuple[tuple[tuple[int, int], ...], ...]
    """Per rank: ``(sequence id, query tokens)`` of each sequence whose queries travel to its pages."""
    fetches: tuple[tuple[int, ...], ...]
    """Per rank: ids of the sequences whose pages travel to their queries, because these are more."""
    seals: tuple[tuple[int, ...], ...]
    """Per rank and layer: pages that this pass seals."""
    prefill: bool
    """Some rank seals a prompt: pages are sent layer by layer instead of once per pass."""
    free: list[int]
    """Per rank: pages that its pool can still take; kept up to date as pages are sent."""
    shared: bool = False
    """Every rank makes this pass with the same sequences: pages are stored once, and no query travels."""

    @property
    def query_counts(self) -> list[int]:
        """Query rows of every rank."""
        return [sum(tokens for _, tokens in rows) for rows in self.rows]
