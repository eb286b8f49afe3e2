"""The step plan: what every rank announces before a forward pass, and what all of them read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pikv_ds.config import PiKVConfig
from pikv_ds.errors import NonFiniteError, OutOfRangeError, PeerError, PiKVError, PoolFullError

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


def any_failed(everyone: Sequence[Announcement]) -> bool:
    """Whether some rank cannot make the pass; then all tell why, and raise `failure`."""
    return any(announced.status != FINE for announced in everyone)


def failure(everyone: Sequence[Announcement], texts: Sequence[str | None], rank: int) -> PiKVError:
    """The error of a pass that some ranks cannot make, of the same kind on all that did not cause it.

    Args:
        texts: each rank's own error, None where it has none.
        rank: this one.
    """
    statuses = {announced.status for announced in everyone}
    kind: type[PiKVError] = PeerError if texts[rank] is None else PiKVError
    if NON_FINITE in statuses:
        kind = NonFiniteError
    elif OUT_OF_RANGE in statuses:
        kind = OutOfRangeError
    return kind("; ".join(f"rank {r}: {t}" if len(texts) > 1 else t for r, t in enumerate(texts) if t))


def check_together(everyone: Sequence[Announcement]) -> None:
    """All ranks must be in the same pass, and have the same batch where it is said to be shared.

    Raises:
        PeerError: on every rank alike.
    """
    steps = [announced.step for announced in everyone]
    if len(set(steps)) > 1:
        raise PeerError(
            f"the ranks are not in the same forward pass (steps {steps}): every rank of the group must make the "
            "same calls; use generate(..., synced_gpus=True)"
        )
    different = len({(a.shared, a.digest, a.seals, a.staged) for a in everyone}) > 1
    if different and any(a.shared for a in everyone):
        what = "tokens" if all(a.shared for a in everyone) else "batches"
        raise PeerError(
            f"the ranks make this pass with different {what} (digests {[a.digest for a in everyone]}), but the "
            "batch was declared to be the same on every rank: declare it as each rank's own"
        )


def check_room(need: int, room: int, prompt: bool, config: PiKVConfig, spread: int, page_bytes: int) -> None:
    """A pass must find room for all pages that it seals. All ranks see the same numbers, so all raise or none does.

    Args:
        need, room: pages of all ranks.
        prompt: whether prompts are among them, which leave the watermark free.
        spread: units times ranks, over which pages spread.

    Raises:
        PoolFullError: with what is missing.
    """
    if need <= room:
        return
    pages = -(-(need - room) // spread)
    if prompt:
        pages = math.ceil(pages / (1 - config.watermark)) + 1
    missing, capacity = pages * config.page_size, config.capacity_tokens or 0
    raise PoolFullError(
        f"the KV pool is full: this step seals {need} pages, the ranks have {room} free. "
        f"{missing} tokens per rank more are needed ({pages * page_bytes} bytes per layer): "
        f"raise pikv.capacity_tokens from {capacity} to at least {capacity + missing}, send fewer or shorter "
        "prompts, or use a smaller codec"
    )
