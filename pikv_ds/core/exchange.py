"""Everything that crosses ranks: the step plan, queries out and partials back, sealed pages.

One process group of its own, with its own timeout, so that a silent rank is an error after
`timeout_s` and not after half an hour. All ranks call the same methods in the same order; a rank
with nothing to say takes part with zero rows. Shapes follow from the step plan, which is
exchanged once per forward pass: no layer waits for the host to learn how much it will receive.

`dispatch` returns a handle that `combine` consumes (DeepEP's protocol). Counted bytes are those
that leave this rank for another one.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.errors import LostRankError, PeerError, UsageError

Ints = NDArray[np.int64]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""One name until torch 2.12, the other since."""


@contextlib.contextmanager
def talking(what: str, waited: Counter[str] | None = None) -> Iterator[None]:
    """Turns a backend's failure into an error that says what was going on.

    Args:
        waited: takes up the seconds that the host spends in it.
    """
    started = time.perf_counter()
    try:
        yield
        if waited is not None:
            waited[what] += time.perf_counter() - started  # type: ignore[assignment]  # Counters count anything
    except torch.OutOfMemoryError:  # a RuntimeError, too, but nobody else's
        raise
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise LostRankError(
            f"a rank of the group did not answer while this one {what}: {cause}. Look at the other ranks' output for "
            "the first error; if they were only slow, raise pikv.timeout_s"
        ) from error


@dataclass(frozen=True)
class Gathered:
    """Queries of other ranks under way, in rank order."""

    received: Tensor
    """``[N, H, D]``; ready after `wait`."""
    _work: Any
    _waited: Counter[str]

    def wait(self) -> Tensor:
        """The queries, once they are here."""
        if self._work is not None:
            with talking("received queries", self._waited):
                self._work.wait()
        return self.received


@dataclass(frozen=True)
class Dispatched(Gathered):
    """The same; `combine` needs it to send the partials back where they belong."""

    counts: tuple[int, ...]
    """Query rows of every rank."""


class Partials:
    """Partial attentions side by side in one buffer, as they travel: of each query the outputs of all heads, then
    their log-sum-exps.

    Args:
        buffer: float32 ``[..., H * V + H]``.
    """

    def __init__(self, buffer: Tensor, num_heads: int) -> None:
        self.buffer, self.num_heads = buffer, num_heads
        split = buffer.shape[-1] - num_heads
        self.outs = buffer[..., :split].unflatten(-1, (num_heads, -1))
        """``[..., H, V]``"""
        self.lses = buffer[..., split:]
        """``[..., H]``"""

    @classmethod
    def empty(cls, shape: Sequence[int], num_heads: int, value_dim: int, device: torch.device) -> Partials:
        """Room for partials."""
        size = (*shape, num_heads * (value_dim + 1))
        return cls(torch.empty(size, dtype=torch.float32, device=device), num_heads)


@dataclass(frozen=True)
class PagesInFlight:
    """Page bytes under way to another rank."""

    received: Tensor
    """uint8, flat, in rank order of the pages' sources; ready after `wait`."""
    _work: Any
    _sent: Tensor  # keeps the send buffer alive until the transfer is over
    _waited: Counter[str]

    def wait(self) -> Tensor:
        if self._work is not None:
            with talking("received pages", self._waited):
                self._work.wait()
        return self.received

    @property
    def nbytes(self) -> int:
        """Memory held while the pages travel."""
        return self.received.nbytes + self._sent.nbytes


class Exchange:
    """Collectives of one group of ranks; without a group, of one rank with itself.

    Args:
        group: process group made for the cache alone (see `make_group`), or None for one rank. It
            belongs to the exchange, and `close` destroys it.
        partial_dtype: type in which partial outputs travel.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        partial_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.device = torch.device(device)
        self.partial_dtype = partial_dtype
        self.sent_bytes: Counter[str] = Counter()
        self.waited_s: Counter[str] = Counter()
        """Seconds in which the host waited for the others, by what it did. On GPUs waits are the stream's, and do not
        show here."""

    def close(self) -> None:
        """Destroys the group. Every rank of it does so, when none needs it any more."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)

    def all_gather(self, row: Sequence[int], kind: str = "plan") -> list[list[int]]:
        """Every rank's integers; all rows must have the same length. Returns ``[size][len(row)]``."""
        if self.size == 1:
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.int64, device=self.device)
        everyone = torch.empty(self.size * len(row), dtype=torch.int64, device=self.device)
        with talking("exchanged the step plan", self.waited_s):
            _all_gather(everyone, mine, group=self.group)
        self.sent_bytes[kind] += mine.nbytes * (self.size - 1)
        return everyone.view(self.size, -1).tolist()

    def all_gather_ragged(
        self, rows: Sequence[Sequence[int]], width: int, counts: Sequence[int], kind: str = "plan"
    ) -> list[list[list[int]]]:
        """Every rank's table of integers, of which all know the number of rows beforehand.

        Args:
            rows: ``[counts[self.rank]][width]``.
            counts: rows of every rank.
        """
        most = max(counts)
        if most == 0:
            return [[] for _ in counts]
        flat = [x for row in rows for x in row] + [0] * ((most - len(rows)) * width)
        tables = self.all_gather(flat, kind)
        return [
            [table[i * width : (i + 1) * width] for i in range(n)] for table, n in zip(tables, counts, strict=True)
        ]

    def gather_arrays(self, mine: Ints, sizes: Sequence[int], kind: str) -> list[Ints]:
        """Every rank's integers, of which all know the number beforehand.

        Args:
            mine: ``[sizes[self.rank]]``.
        """
        if self.size == 1:
            return [mine]
        padded = np.zeros(max(sizes), np.int64)
        padded[: len(mine)] = mine
        everyone = torch.empty(self.size * len(padded), dtype=torch.int64, device=self.device)
        with talking("exchanged where pages go", self.waited_s):
            _all_gather(everyone, torch.from_numpy(padded).to(self.device), group=self.group)
        self.sent_bytes[kind] += padded.nbytes * (self.size - 1)
        return [row[:n] for row, n in zip(everyone.view(self.size, -1).cpu().numpy(), sizes, strict=True)]

    def swap_arrays(self, table: Ints, send: Sequence[int], receive: Sequence[int], kind: str) -> Ints:
        """Gives every rank its rows of a table of integers, and takes those that the others have for this one.

        Args:
            table: ``[sum(send), width]``, ordered by receiver.
            send, receive: rows to and from every rank.

        Returns:
            ``[sum(receive), width]``, in rank order.
        """
        width = table.shape[1]
        received = torch.empty(sum(receive) * width, dtype=torch.int64, device=self.device)
        payload = torch.from_numpy(np.ascontiguousarray(table).reshape(-1)).to(self.device)
        with talking("exchanged where pages go", self.waited_s):
            dist.all_to_all_single(
                received, payload, [n * width for n in receive], [n * width for n in send], group=self.group
            )
        self.sent_bytes[kind] += payload.nbytes
        return received.view(-1, width).cpu().numpy()

    def all_gather_floats(self, values: Tensor, counts: Sequence[int], kind: str = "utility") -> list[Tensor]:
        """Every rank's float32 values, of which all know the number beforehand.

        Args:
            values: ``[counts[self.rank]]``.
        """
        if self.size == 1:
            return [values]
        padded = torch.zeros(max(counts), dtype=torch.float32, device=self.device)
        padded[: len(values)] = values
        everyone = torch.empty(self.size * len(padded), dtype=torch.float32, device=self.device)
        with talking("exchanged what the pages are worth", self.waited_s):
            _all_gather(everyone, padded, group=self.group)
        self.sent_bytes[kind] += padded.nbytes * (self.size - 1)
        return [x[:n] for x, n in zip(everyone.view(self.size, -1), counts, strict=True)]

    def all_gather_text(self, text: str | None) -> list[str | None]:
        """Every rank's text: reasons of errors. Rare, so an object collective will do."""
        if self.size == 1:
            return [text]
        texts: list[str | None] = [None] * self.size
        with talking("exchanged the reason of an error", self.waited_s):
            dist.all_gather_object(texts, text, group=self.group)
        return texts

    def dispatch(self, query: Tensor, counts: Sequence[int]) -> Dispatched:
        """Sends this rank's query rows to every other rank.

        Args:
            query: ``[counts[self.rank], H, D]``.
            counts: query rows of every rank, from the step plan.
        """
        num_heads, head_dim = query.shape[1:]
        others = [0 if r == self.rank else n for r, n in enumerate(counts)]
        received = query.new_empty(sum(others), num_heads, head_dim)
        if self.size == 1 or sum(counts) == 0:
            return Dispatched(received, None, self.waited_s, tuple(counts))
        copies = query.repeat(self.size - 1, 1, 1)
        mine = [0 if r == self.rank else counts[self.rank] for r in range(self.size)]
        with talking("sent queries", self.waited_s):
            work = dist.all_to_all_single(received, copies, others, mine, group=self.group, async_op=True)
        self.sent_bytes["query"] += copies.nbytes
        return Dispatched(received, work, self.waited_s, tuple(counts))

    def combine(self, handle: Dispatched, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Returns partials to the queries' ranks.

        Args:
            handle: what `dispatch` returned.
            out, lse: float32 ``[N, H, D]`` and ``[N, H]`` for the N rows of `handle.received`.

        Returns:
            This rank's partials from the other ranks, in rank order: ``[size - 1, n, H, D]`` and
            ``[size - 1, n, H]``, float32.
        """
        n = handle.counts[self.rank]
        num_heads, head_dim = out.shape[1:]
        if self.size == 1 or sum(handle.counts) == 0:
            return out.new_empty(self.size - 1, n, num_heads, head_dim), lse.new_empty(self.size - 1, n, num_heads)
        packed = _pack(out.to(self.partial_dtype), lse)
        back = [0 if r == self.rank else c for r, c in enumerate(handle.counts)]
        mine = [0 if r == self.rank else n for r in range(self.size)]
        received = packed.new_empty((self.size - 1) * n, *packed.shape[1:])
        with talking("exchanged partial attentions", self.waited_s):
            dist.all_to_all_single(received, packed, mine, back, group=self.group)
        self.sent_bytes["partial"] += packed.nbytes
        return _unpack(received.view(self.size - 1, n, *packed.shape[1:]), self.partial_dtype)

    def gather_queries(self, query: Tensor, received: Tensor) -> Gathered:
        """Gives every rank all ranks' queries.

        Args:
            query: ``[n, H, D]``, of equally many tokens on every rank.
            received: ``[size * n, H, D]``, written.
        """
        work = None
        if self.size > 1:
            with talking("sent queries", self.waited_s):
                work = _all_gather(received, query, group=self.group, async_op=True)
            self.sent_bytes["query"] += query.nbytes * (self.size - 1)
        else:
            received.copy_(query)
        return Gathered(received, work, self.waited_s)

    def return_partials(self, partials: Partials, received: Partials) -> None:
        """Returns partials to their queries' ranks, equally many to each.

        Args:
            partials: of all ranks' queries, ``[size * n]`` in rank order.
            received: all ranks' partials of this one's queries, ``[size, n]`` in rank order, its own among them.
        """
        if self.size == 1:
            received.buffer.copy_(partials.buffer.view_as(received.buffer))
            return
        self._travel(partials, received, "return")

    def share(self, partials: Partials, received: Partials) -> None:
        """Gives every rank all ranks' partials of the same queries; the same bits on every rank.

        Args:
            partials: this rank's, ``[n]``.
            received: ``[size, n]``, in rank order.
        """
        self._travel(partials, received, "share")

    def _travel(self, partials: Partials, received: Partials, how: str) -> None:
        send, into = partials.buffer, received.buffer
        narrow = self.partial_dtype != torch.float32
        if narrow:
            send = _pack(partials.outs.to(self.partial_dtype), partials.lses)
            into = send.new_empty(*received.buffer.shape[:-1], *send.shape[-2:])
        with talking("exchanged partial attentions", self.waited_s):
            if how == "share":
                _all_gather(into.flatten(), send.flatten(), group=self.group)
            else:
                dist.all_to_all_single(into.flatten(), send.flatten(), group=self.group)
        copies = self.size - 1 if how == "share" else (self.size - 1) / self.size
        self.sent_bytes["partial"] += int(send.nbytes * copies)
        if narrow:
            outs, lses = _unpack(into, self.partial_dtype)
            received.outs.copy_(outs)
            received.lses.copy_(lses)

    def send_pages(
        self,
        payload: Tensor,
        send_bytes: Sequence[int],
        receive_bytes: Sequence[int],
        kind: str = "page",
    ) -> PagesInFlight:
        """Sends the bytes of pages to other ranks.

        Args:
            payload: uint8 ``[sum(send_bytes)]``, ordered by receiver.
            send_bytes, receive_bytes: to and from every rank, 0 for this one.
        """
        received = payload.new_empty(sum(receive_bytes))
        work = None
        if self.size > 1:
            with talking("sent pages", self.waited_s):
                work = dist.all_to_all_single(
                    received,
                    payload,
                    list(receive_bytes),
                    list(send_bytes),
                    group=self.group,
                    async_op=True,
                )
            self.sent_bytes[kind] += payload.nbytes
        return PagesInFlight(received, work, payload, self.waited_s)


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """Outputs ``[n, H, D]`` and log-sum-exps ``[n, H]`` side by side as bytes, uint8 ``[n, H, D * p + 4]``."""
    return torch.cat([out.view(torch.uint8), lse.contiguous().unsqueeze(-1).view(torch.uint8)], dim=-1)


def _unpack(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The outputs and log-sum-exps in `_pack`'s bytes, both float32; leading dimensions stay."""
    split = packed.shape[-1] - torch.float32.itemsize
    outs = packed[..., :split].contiguous().view(dtype).float()
    return outs, packed[..., split:].contiguous().view(torch.float32).squeeze(-1)


def make_group(
    ranks_like: dist.ProcessGroup | None, timeout_s: float, size: int | None = None
) -> dist.ProcessGroup | None:
    """A process group of the cache's own with the ranks of `ranks_like` and its own timeout.

    Groups of a launcher or framework keep their default timeout (30 minutes) and their traffic
    would mix with ours. Every rank of the world must call this at the same time: each creates
    every group, in the same order.

    Args:
        ranks_like: the expert-parallel group of this rank, or None: one rank, no group.
        size: take so many consecutive ranks of it only; None: all. One rank needs no group.

    Raises:
        ValueError: `ranks_like` cannot be divided into groups of this size.
        PeerError: the ranks do not agree on who belongs together.
    """
    if ranks_like is None:
        return None
    mine = sorted(dist.get_process_group_ranks(ranks_like))
    if size is not None:
        if len(mine) % size:
            divisors = [n for n in range(1, len(mine) + 1) if len(mine) % n == 0]
            raise UsageError(
                f"pikv.group_size = {size}: the expert-parallel group has {len(mine)} ranks; use one of {divisors}"
            )
        first = mine.index(dist.get_rank()) // size * size
        mine = mine[first : first + size]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for ranks in everyone:
        different = next((r for r in ranks if everyone[r] != ranks), None)
        if different is not None:
            raise PeerError(
                f"ranks {ranks} and {everyone[different]} would share their KV, but no rank can be in two groups; "
                "start all ranks with the same pikv.group_size"
            )
    own = None
    for ranks in sorted({tuple(r) for r in everyone if len(r) > 1}):
        group = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            own = group
    return own
