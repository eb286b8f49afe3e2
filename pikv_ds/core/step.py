"""The step plan: what every rank announces before a forward pass, and what all of them read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pikv_ds.config import PiKVConfig
from pikv_ds.errors import NonFiniteError, OutOfRangeError, PeerError, PiKVError, PoolFullError

UNLIMITED = 2**40
"""Free pages that a rank without a capacity announces."""

FINE, FAILED, NON_FINITE, OUT_OF_RANGE = range(4)

NOTHING, MADE, BROKEN_OFF = range(3)
"""How a rank's part of the last pass has ended: it appended nothing, it is whole, or an error came in between."""


class Announcement(NamedTuple):
    """One rank's row of the step plan."""

    step: int
    status: int
    num_entries: int
    """Sequences that take part in this pass, 0 if the list has not changed."""
    changed: int
    num_released: int
    shared: int
    """Whether the pass is made with a batch that every rank has."""
    digest: int
    """Of the tokens of such a batch."""
    committed: int
    """See `ExpertShardedKVCache.committed_tokens`."""
    last: int
    """How the last pass has ended: `NOTHING`, `MADE` or `BROKEN_OFF`."""


@dataclass(frozen=True)
class StepPlan:
    """What every rank will do in one forward pass: exchanged once, before its first layer."""

    singles: tuple[NDArray[np.int64], ...]
    """Per rank: the rows that append a single token, in the order of their tokens. This decode part of a pass has the
    same shapes on all ranks (`width`)."""
    decodes: bool
    """Some of these rows have pages, so that their queries travel."""
    queries: tuple[tuple[tuple[int, int], ...], ...]
    """Per rank: ``(row, query tokens)`` of each other row whose queries travel to its pages."""
    fetches: tuple[tuple[int, ...], ...]
    """Per rank: the rows whose pages travel to their queries, because these are more."""
    sealing: tuple[NDArray[np.int64], ...]
    """Per rank: the rows that fill pages in this pass."""
    seals: tuple[tuple[int, ...], ...]
    """Per rank and layer: pages that this pass seals."""
    prefill: bool
    """Some row appends several tokens: pages are sent layer by layer instead of once per pass."""
    free: list[int]
    """Per rank: pages that its pool can still take; kept up to date as pages are sent."""
    shared: bool = False
    """Every rank makes this pass with the same sequences: pages are stored once, and no query travels."""

    @cached_property
    def width(self) -> int:
        """Single tokens of the rank that has the most: the others' are padded to as many."""
        return max(map(len, self.singles))

    @cached_property
    def query_counts(self) -> list[int]:
        """Query tokens of every rank's `queries`."""
        return [sum(tokens for _, tokens in rows) for rows in self.queries]

    @cached_property
    def asking(self) -> list[list[tuple[int, int]]]:
        """Per rank: ``(row, query tokens)`` of all rows whose queries travel, those of single tokens first."""
        singles = [[(row, 1) for row in rows.tolist()] if self.decodes else [] for rows in self.singles]
        return [[*first, *rows] for first, rows in zip(singles, self.queries, strict=True)]


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


def must_undo(everyone: Sequence[Announcement]) -> bool:
    """Whether the last pass was broken off somewhere, so that it is undone everywhere."""
    return any(announced.last == BROKEN_OFF for announced in everyone)


def check_undone(everyone: Sequence[Announcement]) -> None:
    """A rank that has made a pass whole goes on with the next one, while another must make it again.

    Raises:
        PeerError: on every rank alike.
    """
    ranks = [rank for rank, announced in enumerate(everyone) if announced.last == BROKEN_OFF]
    if ranks and any(announced.last == MADE for announced in everyone):
        raise PeerError(
            f"the last forward pass was broken off on rank {', '.join(map(str, ranks))} by an error, and is undone on "
            "every rank: the batches are as they were before it. Make the same pass again, or release them"
        )


def check_together(everyone: Sequence[Announcement]) -> None:
    """All ranks must be in the same pass.

    Raises:
        PeerError: on every rank alike.
    """
    steps = [announced.step for announced in everyone]
    if len(set(steps)) > 1:
        raise PeerError(
            f"the ranks are not in the same forward pass (steps {steps}): every rank of the group must make the "
            "same calls; use generate(..., synced_gpus=True)"
        )


def check_shared(everyone: Sequence[Announcement], rows: Sequence[Sequence[tuple[int, int]]]) -> None:
    """All ranks must have the same batch where it is said to be shared.

    Args:
        rows: per rank: ``(row, tokens)`` of each sequence of the pass.

    Raises:
        PeerError: on every rank alike.
    """
    batches = {(a.shared, a.digest, tuple(of_rank)) for a, of_rank in zip(everyone, rows, strict=True)}
    if len(batches) > 1 and any(a.shared for a in everyone):
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
