"""`Shard`: the pages that lie on a rank, with everything known about them, behind one door.

Pages come in with `put` and `write`, leave with `take` or `release`, and are attended to with `attend`. What moves,
demotes, evicts and rebalances pages does so through these; nobody else touches the pool or the table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.core.formats import PageFormat
from pikv_ds.core.ledger import Ledger
from pikv_ds.core.pool import PagePool
from pikv_ds.core.reuse import Audit, Reuse
from pikv_ds.core.table import Ints, PageTable
from pikv_ds.core.trace import PageTrace
from pikv_ds.ops.lists import PageLists
from pikv_ds.ops.state import UtilityState
from pikv_ds.policies.lookups import Candidates, Lookup, SparseLookup
from pikv_ds.slabs import Slabs

FEW_QUERIES = 8
"""Up to so many query tokens per row are attended page by page, as in decoding."""


class Headers(NamedTuple):
    """What is said of pages when they change ranks, one array per fact, ``[N]`` each."""

    rows: Ints
    units: Ints
    numbers: Ints
    """Of the pages within their sequences."""
    formats: Ints
    homes: Ints
    """Home experts, -1 where no router is."""
    masses: Ints
    """The bits of what retention thinks of them (`UtilityState.mass`)."""
    last_steps: Ints
    visits: Ints

    def stack(self) -> Ints:
        """As a table ``[N, fields]``."""
        return np.stack(self, axis=1)

    @classmethod
    def of(cls, table: Ints) -> Headers:
        """What `stack` was made of."""
        return cls(*np.ascontiguousarray(table.T))

    def at(self, which: NDArray[np.integer] | NDArray[np.bool_]) -> Headers:
        """Some of them."""
        return Headers(*(x[which] for x in self))


def float_bits(x: NDArray[np.float32]) -> Ints:
    """The bits of float32 numbers that are not negative, as integers of the same order."""
    return x.clip(0, 3e38).astype(np.float32).view(np.int32).astype(np.int64)


def bits_float(bits: Ints) -> NDArray[np.float32]:
    """What `float_bits` was made of."""
    return bits.astype(np.int32).view(np.float32)


@dataclass(frozen=True)
class AskedRows:
    """Rows each of which asks with one query in a pass, in the order of the queries."""

    rows: Ints
    """``[R]``; -1: padding."""
    sealed: Ints
    """``[R]``: full pages of each, over all ranks."""
    lists: PageLists
    """Of their pages here, of the first layer and format."""
    in_scope: NDArray[np.int64]
    """``[layers, formats]``: their pages here."""


@dataclass(frozen=True)
class Visit:
    """What a pass saw of some pages: shares of the softmax over those that lie here."""

    layer: int
    asked: list[tuple[int, int]]
    """``(row, query tokens)`` in the order of the queries."""
    slots: Tensor
    """int32 ``[queries * streams, P]``"""
    page_lse: Tensor
    """float32 ``[queries * streams, heads of a stream, P]``"""


class Shard:
    """The pages that lie on this rank.

    Args:
        formats: those of the codec policy's codecs, then that of demoted pages, if there is one.
        lookup: which of a row's pages a query reads.
        streams: KV heads of a layer with pages of their own, 1 where a page holds all heads.
        learns: keep what attention sees of the pages (`visits`) and what retention knows of them (`state`).
        homes: ``[layers, experts]``: count the pages by their home experts (`by_expert`); None: nobody asks.
    """

    def __init__(
        self,
        pool: PagePool,
        table: PageTable,
        formats: list[PageFormat],
        lookup: Lookup,
        streams: int,
        *,
        remembers: bool = False,
        learns: bool = False,
        homes: tuple[int, int] | None = None,
    ) -> None:
        self.pool, self.table, self.formats, self.lookup, self.streams = pool, table, formats, lookup, streams
        self.device = pool.device
        self.trace: PageTrace | None = None
        """Told of every page that comes and goes."""
        self.reuse = None if lookup.summary is None else Reuse(self.device)
        """Of pages that a sparse lookup chooses; None where all are read."""
        self.audit = Audit()
        self.counters: Counter[str] = Counter()
        """``pages_in_scope``: (KV head, page) pairs that there were; ``pages_read``: those read without a choice."""
        self.remembers, self.learns = remembers, learns
        self.state = UtilityState.empty(0, self.device)
        self.step = 0
        self.visits: list[Visit] = []
        """Of this pass, where it learns."""
        self.by_expert = None if homes is None else np.zeros(homes, np.int64)
        """``[layers, experts]``: pages here by home expert."""
        self._homes = np.zeros(0, np.int16)  # of each slot, -1: none
        self._chosen: Tensor | int = 0

    # -- pages that come and go -------------------------------------------------------------------------------------

    def put(self, headers: Headers, serials: Ints) -> Ints:
        """Finds room for pages and notes them; returns their slots, ``[N]``. Their bytes may come later (`write`).

        Args:
            serials: of the rows' sequences (`Ledger.serial`), for the trace.
        """
        slots = np.zeros(len(headers.rows), np.int64)
        for page_format in np.unique(headers.formats).tolist():
            which = headers.formats == page_format
            slots[which] = self.pool.allocate(int(which.sum()), page_format)
        self.table.append(headers.rows, headers.units, headers.formats, headers.numbers, slots)
        if not len(slots):
            return slots
        if self.trace is not None:
            self.trace.store(serials, headers.units, headers.numbers, slots, headers.formats)
        if self.remembers:
            self._remember(slots, headers)
        if self.reuse is not None:
            self.reuse.stored(torch.from_numpy(slots).to(self.device), self.pool.num_slots)
        if self.by_expert is not None:
            if len(self._homes) < self.pool.num_slots:
                more = np.full(max(self.pool.num_slots, 2 * len(self._homes)) - len(self._homes), -1, np.int16)
                self._homes = np.concatenate([self._homes, more])
            self._homes[slots] = headers.homes
            there = headers.homes >= 0
            np.add.at(self.by_expert, (headers.units[there] // self.streams, headers.homes[there]), 1)
        return slots

    def write(self, slots: Ints, page_format: int, payload: Tensor) -> None:
        """Stores the bytes of pages of one format.

        Args:
            payload: uint8 ``[N, page bytes + summary bytes]``.
        """
        if not len(slots):
            return
        ops, size = self.formats[page_format].ops, self.pool.sizes[page_format]
        at = torch.from_numpy(slots.astype(np.int32)).to(self.device)
        ops.scatter_pages(self.pool.pages[page_format], at, payload[:, : size.page])
        if size.summary:
            ops.scatter_pages(self.pool.summaries[page_format], at, payload[:, size.page :])

    def read(self, slots: Ints, page_format: int, summaries: bool = True) -> Tensor:
        """The bytes of pages of one format, uint8 ``[N, page bytes (+ summary bytes)]``."""
        ops, size = self.formats[page_format].ops, self.pool.sizes[page_format]
        at = torch.from_numpy(slots.astype(np.int32)).to(self.device)
        parts = [(self.pool.pages, size.page), (self.pool.summaries, size.summary)]
        out = []
        for of_formats, num_bytes in parts[: 2 if summaries and size.summary else 1]:
            out.append(torch.empty(len(slots), num_bytes, dtype=torch.uint8, device=self.device))
            ops.gather_pages(of_formats[page_format], at, out[-1])
        return torch.cat(out, dim=1) if len(out) > 1 else out[0]

    def take(self, rows: Ints, units: Ints, numbers: Ints, why: str) -> Ints:
        """Removes pages that are here; returns their slots, whose bytes stay until `free`.

        Args:
            why: for the trace: "evict", "demote", "move" or "undo".
        """
        slots = self.table.remove(rows, units, numbers)
        if self.by_expert is not None and len(slots):
            homes = self._homes[slots]
            there = homes >= 0
            np.subtract.at(self.by_expert, (units[there] // self.streams, homes[there]), 1)
        if self.trace is not None:
            self.trace.free(slots.tolist(), why)
        return slots

    def free(self, slots: Ints) -> None:
        """Gives back slots that `take` has returned."""
        self.pool.free(slots)

    def release(self, row: int) -> None:
        """Forgets a finished row with all of its pages."""
        if self.by_expert is not None:
            for page_format in range(self.table.num_formats):
                units = np.arange(self.table.num_units)
                found = self.table.entries(np.full(len(units), row), units, page_format)
                homes = self._homes[found.slots]
                there = homes >= 0
                np.subtract.at(self.by_expert, (found.which[there] // self.streams, homes[there]), 1)
        slots = self.table.release(row)
        if self.trace is not None:
            self.trace.free(slots.tolist(), "release")
        self.pool.free(slots)
        self.audit.forget(row)

    def headers(self, rows: Ints, units: Ints, numbers: Ints, slots: Ints, formats: Ints) -> Headers:
        """What is said of pages that are here when they go to another rank."""
        masses = last_steps = visits = np.zeros(len(rows), np.int64)
        if self.remembers and len(rows):
            at = torch.from_numpy(slots).to(self.device)
            masses = float_bits(self.state.mass[at].cpu().numpy())
            last_steps, visits = (
                x[at].cpu().numpy().astype(np.int64) for x in (self.state.last_step, self.state.visits)
            )
        return Headers(rows, units, numbers, formats, self.homes(slots), masses, last_steps, visits)

    def homes(self, slots: Ints) -> Ints:
        """Home experts of pages that are here, -1 where no router is or nobody asks for them (see `by_expert`)."""
        if self.by_expert is None:
            return np.full(len(slots), -1, np.int64)
        return self._homes[slots].astype(np.int64)

    def _remember(self, slots: Ints, headers: Headers) -> None:
        have, need = len(self.state.mass), self.pool.num_slots
        if have < need:
            more = UtilityState.empty(max(need, 2 * have) - have, self.device)
            pairs = zip(vars(self.state).values(), vars(more).values(), strict=True)
            self.state = UtilityState(*(torch.cat(pair) for pair in pairs))
        at = torch.from_numpy(slots).to(self.device)
        self.state.mass[at] = torch.from_numpy(bits_float(headers.masses)).to(self.device)
        self.state.last_step[at] = torch.from_numpy(headers.last_steps.astype(np.int32)).to(self.device)
        self.state.visits[at] = torch.from_numpy(headers.visits.astype(np.int32)).to(self.device)

    def snapshot(self) -> tuple[Tensor | int, Audit | None, Reuse | None]:
        """What attention changes of a shard in a pass; for `restore`."""
        if self.reuse is None:
            return self._chosen, None, None
        return self._chosen, self.audit.copy(), self.reuse.copy()

    def restore(self, chosen: Tensor | int, audit: Audit | None, reuse: Reuse | None) -> None:
        """Forgets what attention has changed since the `snapshot`."""
        self._chosen = chosen
        if audit is not None:
            self.audit, self.reuse = audit, reuse

    # -- attention --------------------------------------------------------------------------------------------------

    def empty(self, query: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Room for a partial: float32 ``[n, H, channels]`` and ``[n, H]``."""
        out = torch.empty(*query.shape[:2], channels, dtype=torch.float32, device=query.device)
        return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)

    def attend(
        self, layer: int, asked: list[tuple[int, int]], sealed: Ints, query: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of queries over the pages that lie here.

        Args:
            asked: ``(row, query tokens)``, in the order of the queries.
            sealed: full pages of each of these rows, over all ranks; lookups pin the newest ones.
            query: ``[n, H, D]``.

        Returns:
            float32 ``[n, H, V]`` and ``[n, H]``.
        """
        if not asked:
            return self.empty(query, self._channels)
        units = range(layer * self.streams, (layer + 1) * self.streams)
        few = self.lookup.summary is not None or max(tokens for _, tokens in asked) <= FEW_QUERIES
        partials = []
        for i in self._formats(units, asked):
            basis_query = self.formats[i].query(layer, query)
            out, lse = self.empty(basis_query, self.formats[i].layout.value_dim)
            if few:
                self._attend_rows(i, layer, asked, sealed, basis_query, scale, out, lse)
            else:
                self._attend_many(i, layer, asked, basis_query, scale, out, lse)
            partials.append((self.formats[i].output(layer, out), lse))
        if len(partials) == 1:
            return partials[0]
        outs, lses = (torch.stack(x) for x in zip(*partials, strict=True))
        out, lse = self.empty(query, outs.shape[-1])
        ops = self.formats[0].ops
        ops.merge_partials(outs.flatten(1, 2), lses.flatten(1, 2), out.flatten(0, 1), lse.flatten())
        return out, lse

    @property
    def _channels(self) -> int:
        """Of an output, once it has left the pages' bases."""
        first = self.formats[0]
        return first.bases[0].value_read.shape[1] if first.bases else first.layout.value_dim

    def ask(self, rows: Ints, ledger: Ledger) -> AskedRows:
        """Prepares what is the same at every layer of a pass.

        Args:
            rows: ``[R]``, see `AskedRows`.
        """
        there = rows >= 0
        sealed = np.zeros(len(rows), np.int64)
        sealed[there] = ledger.num_sealed(rows[there])
        by_unit = self.table.totals(rows[there])
        in_scope = by_unit.reshape(-1, self.streams, by_unit.shape[1]).sum(1)
        if self._asks_in_place:
            heads = np.array([this.layout.num_kv_heads for this in self.formats])
            for counter in ("pages_in_scope", "pages_read"):
                self.counters[counter] += int((in_scope * heads).sum())
        return AskedRows(rows, sealed, self.table.lists(rows, self.streams), in_scope)

    @property
    def _asks_in_place(self) -> bool:
        """Whether the kernel walks the lists where they are: no lookup chooses, and nothing is learnt of pages."""
        return self.lookup.summary is None and not self.learns

    def attend_singles(
        self, layer: int, asked: AskedRows, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Partial attention of one query per row over the pages that lie here.

        Args:
            query: ``[R, H, D]``.
            out, lse: float32 ``[R, H, V]`` and ``[R, H]``, whose rows may be part of longer rows.
        """
        if not self._asks_in_place:
            there = np.flatnonzero(asked.rows >= 0)
            rows = [(row, 1) for row in asked.rows[there].tolist()]
            at = torch.from_numpy(there).to(self.device)
            found, found_lse = self.attend(layer, rows, asked.sealed[there], query[at], scale)
            if len(there) < len(query):
                out.zero_()
                lse.fill_(-torch.inf)
            out[at], lse[at] = found, found_lse
            return
        formats = np.flatnonzero(asked.in_scope[layer]).tolist() or [0]
        if len(formats) == 1 and self.streams == 1 and not self.formats[formats[0]].bases:
            self._attend_lists(formats[0], layer, asked.lists, query, scale, out, lse)
            return
        partials = []
        for i in formats:
            this = self.formats[i]
            basis_query = this.query(layer, query).unflatten(1, (self.streams, -1)).flatten(0, 1)
            part, part_lse = self.empty(basis_query, this.layout.value_dim)
            self._attend_lists(i, layer, asked.lists, basis_query, scale, part, part_lse)
            part, part_lse = part.view(*query.shape[:2], -1), part_lse.view(query.shape[:2])
            partials.append((this.output(layer, part), part_lse))
        outs, lses = (torch.stack(x) for x in zip(*partials, strict=True))
        self.formats[0].ops.merge_partials(outs, lses, out, lse)

    def _attend_lists(
        self, i: int, layer: int, lists: PageLists, query: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        this = self.formats[i]
        own = lists.at(layer * self.streams * self.table.num_formats + i)
        this.ops.decode_attention(query, self.pool.pages[i], own, None, this.layout, scale, out, lse)

    def attend_pages(
        self,
        page_format: PageFormat,
        query: Tensor,
        slabs: Slabs,
        slots: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Many queries of one sequence over pages of a format.

        Args:
            query: ``[T, H, D]``, as it meets pages of this format.
            slots: int32 ``[P]``.
            out, lse: ``[T, H, V]`` and ``[T, H]``.
        """
        layout = page_format.layout
        for counter in ("pages_in_scope", "pages_read"):
            self.counters[counter] += len(slots) * layout.num_kv_heads * len(query)
        page_format.ops.prefill_attention(query, slabs, slots, layout, scale, out, lse)

    @property
    def pages_visited(self) -> int:
        """(KV head, page) pairs read. Waits for the device, where lookups choose them."""
        return self.counters["pages_read"] + int(self._chosen)

    def _formats(self, units: range, asked: list[tuple[int, int]]) -> list[int]:
        """Formats of which these rows have pages here in these units; the first where they have none."""
        if self.table.num_formats == 1:
            return [0]
        there = sum(self.table.counts(row)[units.start : units.stop].sum(0) for row, _ in asked)
        return np.flatnonzero(there).tolist() or [0]

    def _slots(self, row: int, unit: int, page_format: int) -> Tensor:
        """Slots of a row's pages of a unit and format that lie here, int32 ``[P]``."""
        found = self.table.entries(np.array([row]), np.array([unit]), page_format)
        return torch.from_numpy(found.slots.astype(np.int32)).to(self.device)

    def _attend_many(
        self,
        page_format: int,
        layer: int,
        asked: list[tuple[int, int]],
        query: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Many queries of some rows, over all of their pages of a format here."""
        start, streams, this = 0, self.streams, self.formats[page_format]
        slabs = self.pool.pages[page_format]
        for row, tokens in asked:
            mine = slice(start, start + tokens)
            start += tokens
            if streams == 1:
                slots = self._slots(row, layer, page_format)
                self.attend_pages(this, query[mine], slabs, slots, scale, out[mine], lse[mine])
                continue
            by_stream = query[mine].unflatten(1, (streams, -1)).transpose(0, 1).contiguous()  # [streams, T, G, D]
            group = query.shape[1] // streams
            for stream in range(streams):
                part, part_lse = self.empty(by_stream[stream], this.layout.value_dim)
                slots = self._slots(row, layer * streams + stream, page_format)
                self.attend_pages(this, by_stream[stream], slabs, slots, scale, part, part_lse)
                heads = slice(stream * group, (stream + 1) * group)
                out[mine, heads], lse[mine, heads] = part, part_lse

    def _attend_rows(
        self,
        page_format: int,
        layer: int,
        asked: list[tuple[int, int]],
        sealed: Ints,
        query: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Few queries per row, over those of its pages of a format here that the lookup chooses.

        Where heads have pages of their own, each is a row of the table by itself.
        """
        streams, this, slabs = self.streams, self.formats[page_format], self.pool.pages[page_format]
        lengths = [tokens for _, tokens in asked]
        units = range(layer * streams, (layer + 1) * streams)
        found = self.table.rows([row for row, _ in asked], units, page_format)
        query, out = (x.unflatten(1, (streams, -1)).flatten(0, 1) for x in (query, out))  # [R * streams, heads, D]
        lse = lse.view(len(query), -1)
        table, page_idx, counts = found.slots, found.page_idx, found.counts
        in_scope = found.total * lengths[0]
        sparse = self.lookup.summary is not None
        if len(set(lengths)) > 1:
            by_row = np.array(
                [self.table.counts(row)[units.start : units.stop, page_format].sum() for row, _ in asked]
            )
            in_scope = int((by_row * np.array(lengths)).sum())
        in_scope *= this.layout.num_kv_heads
        self.counters["pages_in_scope"] += in_scope
        if sparse or self.learns or len(set(lengths)) > 1 or (streams > 1 and lengths[0] > 1):
            # else a row's queries share its row of the table
            repeats = torch.tensor(lengths, device=query.device)
            table, page_idx, counts = (
                x.unflatten(0, (len(asked), streams)).repeat_interleave(repeats, dim=0).flatten(0, 1)
                for x in (table, page_idx, counts)
            )
        every = table
        if sparse and in_scope:
            each = [n * streams for n in lengths]
            num_sealed = torch.from_numpy(np.repeat(sealed, each).astype(np.int32)).to(query.device)
            owners = [row for (row, _), n in zip(asked, each, strict=True) for _ in range(n)]
            table = self._choose(layer, page_format, owners, query, every, page_idx, counts, num_sealed, scale)
        else:
            self.counters["pages_read"] += in_scope
        page_lse = None
        if self.learns:
            page_lse = query.new_empty(*query.shape[:2], table.shape[-1], dtype=torch.float32)
            self.visits.append(Visit(layer, asked, every, page_lse))
        this.ops.decode_attention(query, slabs, table, counts, this.layout, scale, out, lse, page_lse)

    def _choose(
        self,
        layer: int,
        page_format: int,
        owners: list[int],
        query: Tensor,
        slots: Tensor,
        page_idx: Tensor,
        counts: Tensor,
        num_sealed: Tensor,
        scale: float,
    ) -> Tensor:
        """The table of the pages that the lookup chooses, int32 ``[R, K, P]``; audits the choice now and then.

        Args:
            owners: the row of each row of the table.
        """
        reuse, lookup = self.reuse, self.lookup
        assert reuse is not None
        assert isinstance(lookup, SparseLookup)
        misses = reuse.misses(slots) if lookup.wants_misses else None
        this = self.formats[page_format]
        summaries, pages = self.pool.summaries[page_format], self.pool.pages[page_format]
        boost = None
        if self.audit.boosts:
            raised = [self.audit.boost(row) for row in owners]
            boost = torch.tensor(raised, dtype=torch.float64, device=query.device)
        candidates = Candidates(
            slots, page_idx, counts, num_sealed, summaries, this.layout, pages, scale, boost, misses
        )
        table = lookup.select(this.ops, query, candidates)
        self._chosen = self._chosen + (table > 0).sum()
        reuse.visit(table)
        if self.trace is not None:
            self.trace.visit(layer, table[table > 0].unique().tolist())
        if lookup.audit_every and reuse.step % lookup.audit_every == 0:
            out, lse = self.empty(query, this.layout.value_dim)
            page_lse = query.new_empty(*query.shape[:2], slots.shape[1], dtype=torch.float32)
            this.ops.decode_attention(query, pages, slots, counts, this.layout, scale, out, lse, page_lse)
            chosen = (table > 0).repeat_interleave(query.shape[1] // this.layout.num_kv_heads, dim=1)
            mass = torch.exp(page_lse - lse[..., None]).masked_fill(~chosen, 0.0).sum(-1)
            for row in dict.fromkeys(owners):
                places = [i for i, owner in enumerate(owners) if owner == row and counts[i]]
                if places:
                    self.audit.note(row, mass[places], lookup.floor)
        return table
