"""`PageSender`: encodes full pages, chooses their owners and sends them there.

Prompts are sent layer by layer, while the next layer computes (seal-behind): a rank never holds
more than its shard plus about one layer of its own prompts. While decoding, the pages of all
layers wait for the next step and go in one exchange. Pages are rows of arrays all the way: there is
no object and no turn of a loop per page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.core.exchange import Exchange
from pikv_ds.core.ledger import SHARED_SOURCE, Ledger
from pikv_ds.core.placement import NO_OWNER, fair_shares, owner_limit
from pikv_ds.core.sequences import FullPages, SequenceBatch, Tails
from pikv_ds.core.shard import Headers, Shard, float_bits
from pikv_ds.core.step import StepPlan
from pikv_ds.core.table import Ints
from pikv_ds.core.transfer import Incoming, Outgoing, in_order
from pikv_ds.errors import PeerError, PoolFullError
from pikv_ds.policies.codecs import CodecPolicy
from pikv_ds.policies.placements import Placement, SealedPages
from pikv_ds.policies.topology import Topology


@dataclass
class StagedPages:
    """Pages that are encoded and wait for their owners, ``N`` of them, of one unit or of several."""

    rows: Ints
    """``[N]``"""
    shared: bool
    """Every rank has their sequences."""
    units: Ints
    """``[N]``, see `SequenceBatch`."""
    numbers: Ints
    """``[N]``: of the pages within their sequences."""
    votes: Tensor | None
    """int32 ``[N, experts]``: how often a page's tokens chose each; None where no router is."""
    formats: Ints
    """``[N]``"""
    payloads: dict[int, Tensor]
    """By format: uint8 ``[pages of it, page bytes + summary bytes]``, in the order of the pages."""
    scores: Tensor | None
    """float32 ``[N]``: what retention thinks of them, where it does."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads.values())

    def without(self, gone: NDArray[np.bool_]) -> StagedPages:
        """The pages that are left when some are forgotten."""
        stays = ~gone
        kept = torch.from_numpy(stays)
        payloads = {f: x[torch.from_numpy(stays[self.formats == f]).to(x.device)] for f, x in self.payloads.items()}
        votes = None if self.votes is None else self.votes[kept.to(self.votes.device)]
        scores = None if self.scores is None else self.scores[kept.to(self.scores.device)]
        arrays = self.units[stays], self.numbers[stays], votes, self.formats[stays]
        return StagedPages(self.rows[stays], self.shared, *arrays, payloads, scores)


class Sending(NamedTuple):
    """Which pages are sent together, as every rank knows beforehand."""

    rows: Sequence[Ints]
    """Per source: the rows that fill pages."""
    pages: Sequence[int]
    """Per source: how many pages."""
    units: range
    """The units that they belong to."""


class PageSender:
    """Moves full pages from their sequences' rank to their owners, all ranks in step.

    Args:
        topologies: of every layer; `Rebalancer` changes them.
        flags: int32 ``[num_layers]``, a `SealFlag` of each layer's pages.
    """

    def __init__(
        self,
        exchange: Exchange,
        shard: Shard,
        ledger: Ledger,
        codec: CodecPolicy,
        placement: Placement,
        topologies: list[Topology],
        flags: Tensor,
    ) -> None:
        self.exchange, self.shard, self.ledger = exchange, shard, ledger
        self.codec, self.placement, self.topologies, self.flags = codec, placement, topologies, flags
        self.staged: list[StagedPages] = []
        self.counters: Counter[str] = Counter()
        self.seen = np.zeros((len(topologies), topologies[0].num_experts), np.int64)
        """``[layers, experts]``: votes so far, if the placement asks for them."""
        self._in_flight: Incoming | None = None

    @property
    def num_staged(self) -> int:
        """Pages that wait for the next step."""
        return sum(map(len, self.staged))

    @property
    def nbytes(self) -> int:
        """Bytes of pages that are staged or under way."""
        flying = self._in_flight.flight.nbytes if self._in_flight else 0
        return flying + sum(pages.nbytes for pages in self.staged)

    def stage(self, batch: SequenceBatch, unit: int, pages: FullPages) -> None:
        """Encodes full pages; they wait for `send`."""
        layer, head = divmod(unit, self.shard.streams)
        votes = None if pages.experts is None else self._votes(pages.experts)
        formats = self._formats(layer, head, votes, len(pages.index))
        if pages.cold is not None:
            formats[pages.cold] = len(self.shard.formats) - 1
        payloads = {}
        for page_format in np.unique(formats).tolist():
            keys, values = pages.keys, pages.values
            which = np.flatnonzero(formats == page_format)
            if len(which) < len(formats):
                at = torch.from_numpy(which).to(keys.device)
                keys, values = keys[at], None if values is None else values[at]
            flags = self.flags[layer : layer + 1]
            payloads[page_format] = self.shard.formats[page_format].seal(layer, head, keys, values, flags)
        rows = np.array(batch.rows, np.int64)[pages.index]
        arrays = np.full(len(rows), unit), pages.numbers, votes, formats
        self.staged.append(StagedPages(rows, batch.shared, *arrays, payloads, pages.scores))

    @property
    def together(self) -> bool:
        """Whether pages of all layers are encoded alike, so that they can be `stage_all`d."""
        return len(self.codec.codecs) == 1 and not self.shard.formats[0].bases

    def stage_all(self, batch: SequenceBatch, filling: Ints, pages: Tails) -> None:
        """Encodes one page at every layer of some sequences, in one go.

        Args:
            filling: ``[m]``, their places in the batch.
            pages: ``[layers, m, K, S, D]``.
        """
        streams, num = self.shard.streams, len(filling)
        layers = len(pages.keys)
        keys, values = (
            None if x is None else x.unflatten(2, (streams, -1)).transpose(1, 2).flatten(0, 2)
            for x in (pages.keys, pages.values)
        )
        assert keys is not None
        payload = self.shard.formats[0].seal(0, 0, keys, values, self.flags)
        rows = np.tile(np.array(batch.rows, np.int64)[filling], layers * streams)
        numbers = np.tile(np.array(batch.sealed, np.int64)[filling], layers * streams)
        units, formats = np.repeat(np.arange(layers * streams), num), np.zeros(len(rows), np.int64)
        routed = np.isin(units // streams, list(pages.routed))
        votes = None
        if pages.experts is not None:
            votes = self._votes(pages.experts.flatten(0, 1)).unflatten(0, (layers, num))
            votes = votes[:, None].expand(-1, streams, -1, -1).flatten(0, 2)
        for some, chosen in ((routed, votes), (~routed, None)):
            if some.any():
                part = payload
                if not some.all():
                    at = torch.from_numpy(np.flatnonzero(some)).to(payload.device)
                    part, chosen = payload[at], None if chosen is None else chosen[at]
                arrays = units[some], numbers[some], chosen, formats[some]
                self.staged.append(StagedPages(rows[some], batch.shared, *arrays, {0: part}, None))

    def _formats(self, layer: int, head: int, votes: Tensor | None, num_pages: int) -> Ints:
        """The format of each page, ``[N]``: what the codec policy chooses by its home expert."""
        if votes is None or not self.codec.per_expert:
            return np.full(num_pages, self.codec.choose(layer, head, None))
        by_expert = np.array([self.codec.choose(layer, head, e) for e in range(votes.shape[1])])
        return by_expert[votes.cpu().numpy().argmax(1)]

    def _votes(self, experts: Tensor) -> Tensor:
        """How often each expert was chosen, per page, int32 ``[N, experts]``, from ``[N, S, k]`` (-1: dropped by the
        gate)."""
        flat = experts.flatten(1).long() + 1
        counts = torch.zeros(flat.shape[0], self.topologies[0].num_experts + 1, dtype=torch.int32, device=flat.device)
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
        return counts[:, 1:]

    def drop(self, rows: list[int]) -> None:
        """Forgets staged pages of rows that are finished."""
        left = []
        for pages in self.staged:
            gone = np.isin(pages.rows, rows)
            if not gone.any():
                left.append(pages)
            elif not gone.all():
                left.append(pages.without(gone))
        self.staged = left

    def send(self, plan: StepPlan, sending: Sending) -> None:
        """Places and sends what is staged; every rank calls it at the same point.

        Raises:
            PoolFullError: on every rank alike, before anything has been moved.
            PeerError: a shared batch fills other pages here than on the rank that speaks for it; on this rank alone.
        """
        self.settle()
        staged, self.staged = self.staged, []
        rank = self.exchange.rank
        places = not plan.shared or rank == SHARED_SOURCE
        if not any(sending.pages):
            assert not staged, f"{staged} is staged, but no pages were announced"
            return
        headers, votes = self._describe(staged)
        expected = sending.pages[SHARED_SOURCE if plan.shared else rank]
        assert len(headers.rows) == expected or plan.shared, f"{len(headers.rows)} staged, {expected} announced"
        if places:
            share = fair_shares(plan.free, sending.pages)[rank]
            owners, first = self._place(headers, votes, plan.shared, share)
        else:
            owners = first = np.zeros(0, np.int64)
        homeless = int((owners == NO_OWNER).sum())
        everyone = self._exchange_counts(sending, headers if places else _none(headers), owners, homeless)
        lacking = sum(int(table[-1]) for table in everyone)
        if lacking:
            self.staged = staged
            tokens = lacking * self.ledger.page_size
            raise PoolFullError(
                f"the KV pool is full: {lacking} of {sum(sending.pages)} new pages found no rank with room; "
                f"{tokens} tokens ({lacking * self.shard.pool.sizes[0].page} bytes) more are needed. "
                "Raise pikv.capacity_tokens, send fewer or shorter prompts, or use a smaller codec"
            )
        if plan.shared:
            owners = self._adopt(headers, owners, expected)
        for rows, table in zip(sending.rows, everyone, strict=True):
            counts = table[:-1].reshape(len(rows), len(sending.units), 2, self.exchange.size)
            self.ledger.place(rows, sending.units, counts[:, :, 0], counts[:, :, 1])
            placed = counts.sum((0, 1, 2)).tolist()
            plan.free[:] = [free - n for free, n in zip(plan.free, placed, strict=True)]
        if places:
            if self.placement.wants_seen:
                for layer, of_layer in votes.items():
                    self.seen[layer] += of_layer.sum(0)
            self.counters["seals"] += len(owners)
            self.counters["overflowed"] += int((owners != first).sum())
            if self.shard.trace is not None:
                serials = self.ledger.serial[headers.rows]
                self.shard.trace.seal(serials, headers.units, headers.numbers, owners, headers.homes, votes)
        payloads = self._payloads(staged)
        self._enter(headers, owners == rank, payloads)
        if self.exchange.size > 1 and not plan.shared:
            arriving = [int(table[:-1].reshape(-1, self.exchange.size)[:, rank].sum()) for table in everyone]
            self._ship(headers, owners, payloads, arriving)

    def settle(self) -> None:
        """Waits for the pages under way and stores those that this rank owns."""
        if self._in_flight is None:
            return
        incoming, self._in_flight = self._in_flight, None
        incoming.store(self.shard)

    def _describe(self, staged: list[StagedPages]) -> tuple[Headers, dict[int, NDArray[np.int64]]]:
        """Headers of all staged pages, in their order, and the votes of each layer's where it has a router."""
        num_pages = sum(map(len, staged))
        if not num_pages:
            return Headers(*np.zeros((len(Headers._fields), 0), np.int64)), {}
        rows, units, numbers, formats = (
            _stacked([getattr(p, name) for p in staged]) for name in ("rows", "units", "numbers", "formats")
        )
        homes, masses = np.full(num_pages, -1, np.int64), np.zeros(num_pages, np.int64)
        routed = [pages.votes for pages in staged if pages.votes is not None]
        every = _joined(routed).cpu().numpy() if routed else None  # one copy to the host
        scored = [pages.scores for pages in staged if pages.scores is not None]
        scores = _joined(scored).float().cpu().numpy() if scored else None
        of_layer: dict[int, list[NDArray[np.int64]]] = {}
        at = vote = score = 0
        for pages in staged:
            here = slice(at, at + len(pages))
            at += len(pages)
            if pages.votes is not None:
                assert every is not None
                votes = every[vote : vote + len(pages)]
                vote += len(pages)
                homes[here] = votes.argmax(1)
                layers = pages.units // self.shard.streams  # in ascending order
                cuts = np.flatnonzero(np.diff(layers)) + 1
                for first, some in zip([0, *cuts.tolist()], np.split(votes, cuts), strict=True):
                    of_layer.setdefault(int(layers[first]), []).append(some)
            if pages.scores is not None:
                assert scores is not None
                masses[here] = float_bits(scores[score : score + len(pages)])
                score += len(pages)
        steps = np.full(num_pages, self.shard.step)
        headers = Headers(rows, units, numbers, formats, homes, masses, steps, np.zeros(num_pages, np.int64))
        return headers, {layer: _stacked(votes) for layer, votes in of_layer.items()}

    def _place(
        self, headers: Headers, votes: dict[int, NDArray[np.int64]], shared: bool, free: list[int]
    ) -> tuple[Ints, Ints]:
        """Owner of each page, `NO_OWNER` where nobody has room, and the rank that its placement preferred."""
        num_pages, size = len(headers.rows), self.exchange.size
        if not num_pages:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        preference = np.zeros((num_pages, size), np.int32)
        limits = np.zeros(num_pages, np.int32)
        layers = headers.units // self.shard.streams
        alike: dict[tuple[int, bool], list[int]] = {}  # layers with one topology go together
        for layer in np.unique(layers).tolist():
            alike.setdefault((id(self.topologies[layer]), layer in votes), []).append(layer)
        for (_, routed), members in alike.items():
            topology = self.topologies[members[0]]
            which = np.flatnonzero(np.isin(layers, members))
            which = which[layers[which].argsort(kind="stable")]  # the order in which votes are joined
            numbers, every = headers.numbers[which], None
            seen = None
            if routed:
                every = _stacked([votes[layer] for layer in members])
                if self.placement.wants_seen:
                    seen = np.concatenate([self.seen[layer] + votes[layer].cumsum(0) for layer in members])
            preference[which] = self.placement.owners(SealedPages(numbers, every, seen), topology)
            limits[which] = owner_limit((numbers + 1) * self.ledger.page_size, self.ledger.page_size, topology)
        keys, groups = np.unique(headers.rows * self.ledger.num_units + headers.units, return_inverse=True)
        loads = torch.from_numpy(self.ledger.pages.reshape(-1, size)[keys])
        out, room = torch.empty(num_pages, dtype=torch.int32), torch.tensor(free)
        self.shard.formats[0].ops.place_pages(
            torch.from_numpy(preference),
            torch.from_numpy(groups.reshape(-1).astype(np.int32)),
            torch.from_numpy(limits),
            -1 if shared else self.exchange.rank,
            loads,
            room,
            out,
        )
        return out.numpy().astype(np.int64), preference[:, 0].astype(np.int64)

    def _exchange_counts(
        self, sending: Sending, headers: Headers, owners: Ints, homeless: int
    ) -> list[NDArray[np.int64]]:
        """How many pages of each row and unit go to each rank, of every source: ``[rows, units, 2, ranks]``, demoted
        ones apart, flat; then the number of pages that found no rank with room."""
        units, size = sending.units, self.exchange.size
        shapes = [(len(rows), len(units), 2, size) for rows in sending.rows]
        mine = sending.rows[self.exchange.rank]
        counts = np.zeros(shapes[self.exchange.rank], np.int64)
        placed = owners != NO_OWNER
        if placed.any():
            order = mine.argsort()
            at = order[mine[order].searchsorted(headers.rows[placed])]
            demoted = headers.formats[placed] >= self.num_warm
            np.add.at(counts, (at, headers.units[placed] - units.start, demoted.astype(np.int64), owners[placed]), 1)
        table = np.append(counts.reshape(-1), homeless)
        return self.exchange.gather_arrays(table, [int(np.prod(shape)) + 1 for shape in shapes], kind="page_counts")

    @property
    def num_warm(self) -> int:
        """Formats of pages that have not been demoted."""
        return len(self.codec.codecs)

    @staticmethod
    def _payloads(staged: list[StagedPages]) -> dict[int, Tensor]:
        """The bytes of all staged pages by format, in their order."""
        by_format: dict[int, list[Tensor]] = {}
        for pages in staged:
            for page_format, payload in pages.payloads.items():
                by_format.setdefault(page_format, []).append(payload)
        return {f: _joined(parts) for f, parts in by_format.items()}

    def _enter(self, headers: Headers, kept: NDArray[np.bool_], payloads: dict[int, Tensor]) -> None:
        """Takes in those of the staged pages that this rank owns."""
        if not kept.any():
            return
        mine = headers if kept.all() else headers.at(kept)
        slots = self.shard.put(mine, self.ledger.serial[mine.rows])
        for page_format, payload in payloads.items():
            which = np.flatnonzero(kept[headers.formats == page_format])
            if len(which) < len(payload):
                payload = payload.index_select(0, torch.from_numpy(which).to(payload.device))
            self.shard.write(slots[mine.formats == page_format], page_format, payload)

    def _ship(self, headers: Headers, owners: Ints, payloads: dict[int, Tensor], arriving: list[int]) -> None:
        """Sends pages to the other ranks, headers first, and takes in those that come from them.

        Args:
            arriving: per source: pages that this rank owns, its own included.
        """
        rank, size = self.exchange.rank, self.exchange.size
        arriving[rank] = 0
        leaving = in_order(owners, headers.formats, np.flatnonzero(owners != rank))
        send_counts = np.bincount(owners[leaving], minlength=size).tolist()
        table = headers.at(leaving).stack()
        incoming = Headers.of(self.exchange.swap_arrays(table, send_counts, arriving, kind="page_header"))
        slots = self.shard.put(incoming, self.ledger.serial[incoming.rows])
        place = np.zeros(len(owners), np.int64)  # of each page within the payload of its format
        for page_format in payloads:
            which = headers.formats == page_format
            place[which] = np.arange(int(which.sum()))

        def read(places: slice, page_format: int) -> Tensor:
            at = torch.from_numpy(place[leaving[places]]).to(self.shard.device)
            return payloads[page_format].index_select(0, at)

        outgoing = Outgoing.of(self.shard, size, owners[leaving], headers.formats[leaving], read)
        sources = np.repeat(np.arange(size), arriving)
        arrays = sources, incoming.formats, slots
        self._in_flight = Incoming.start(self.exchange, self.shard, outgoing, *arrays, kind="page")

    def _adopt(self, headers: Headers, owners: Ints, num_pages: int) -> Ints:
        """Owners of pages that every rank has, as `SHARED_SOURCE` has chosen them.

        Raises:
            PeerError: the ranks' sequences are not the same.
        """
        rank, size = self.exchange.rank, self.exchange.size
        mine = np.stack([headers.rows, headers.units, headers.numbers], axis=1)
        if size == 1:
            return owners
        table = np.column_stack([mine, owners]) if rank == SHARED_SOURCE else np.zeros((0, 4), np.int64)
        widths = [4 * num_pages if r == SHARED_SOURCE else 0 for r in range(size)]
        tables = self.exchange.gather_arrays(table.reshape(-1), widths, kind="page_header")
        theirs = tables[SHARED_SOURCE].reshape(-1, 4)
        if not np.array_equal(mine, theirs[:, :3]):
            raise PeerError(
                f"this rank's shared sequences fill {len(mine)} pages, those of rank {SHARED_SOURCE} "
                f"{len(theirs)}, or others: every rank must make the same passes with the same tokens"
            )
        return theirs[:, 3]


def _none(headers: Headers) -> Headers:
    """No page."""
    return headers.at(np.zeros(0, np.int64))


def _joined(parts: list[Tensor]) -> Tensor:
    """`torch.cat`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacked(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """`np.concatenate`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
