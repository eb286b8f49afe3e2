"""`Evictor`: keeps sequences within their budgets. What goes is retention's choice, how much the budget's.

Prompts are cut before their pages are sealed (`cut`), token by token for each KV head, or page by page. While
decoding, whole pages are evicted where a sequence has more of them than its budget allows. Every rank knows how many
pages each sequence has in each unit, since all see the same announcements; so all know how many must go. Each rank
offers its least useful ones, and the least useful of all go: the choice does not depend on the number of ranks.

Utilities come from the attention itself: `decode_attention` returns each page's share of the softmax on this rank
(`page_lse`), and the ranks exchange the log-sum-exps over the whole sequences once per pass.

Where there is a codec to demote to, what is over the budget stays, as a whole page of that codec
(`pikv_ds.core.demotion`).
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.core.demotion import Demoter
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.pages import PagePool, PageTable
from pikv_ds.core.sequences import FullPages, SequenceBatch
from pikv_ds.core.step import StepPlan
from pikv_ds.ops import Ops
from pikv_ds.ops.state import UtilityState
from pikv_ds.policies.budgets import LOCAL_PAGES, SINK_PAGES, Budget, page_limits, prompt_pages
from pikv_ds.policies.retention import Prompt, Retention

Sequence = tuple[int, int]
"""Source rank and id."""
NOBODY = 2**31 - 1
"""In the place of a utility's bits: this rank has no page to offer."""


def float_bits(x: float) -> int:
    """The bits of a float32 that is not negative, as an integer of the same order."""
    return struct.unpack("<i", struct.pack("<f", min(max(x, 0.0), 3e38)))[0]


def bits_float(bits: int) -> float:
    """What `float_bits` was made of."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]


@dataclass(frozen=True)
class Visit:
    """What a pass saw of some pages: shares of the softmax over those that lie here."""

    layer: int
    asked: list[tuple[int, int, int]]
    """``(source rank, sequence, query tokens)`` in the order of the rows."""
    slots: Tensor
    """int32 ``[rows * streams, P]``"""
    page_lse: Tensor
    """float32 ``[rows * streams, heads of a stream, P]``"""


class Evicted(NamedTuple):
    """A page that is gone."""

    sequence: Sequence
    unit: int
    page_idx: int
    owner: int
    """The rank that held it."""


class Evictor:
    """Budgets and retention of all sequences with pages on this rank.

    Args:
        retention: None: everything stays, and nothing here costs anything.
        demoter: encodes what is over the budget anew; None: that is dropped.
        streams: KV heads of a layer with pages of their own, 1 where a page holds all heads.
    """

    def __init__(
        self,
        ops: Ops,
        exchange: Exchange,
        pool: PagePool,
        table: PageTable,
        page_size: int,
        retention: Retention | None,
        budget: Budget,
        demoter: Demoter | None,
        num_layers: int,
        num_kv_heads: int,
        num_heads: int,
        streams: int,
    ) -> None:
        self.ops, self.exchange, self.pool, self.table, self.page_size = ops, exchange, pool, table, page_size
        self.retention, self.budget, self.demoter = retention, budget, demoter
        self.num_layers, self.num_kv_heads, self.num_heads, self.streams = num_layers, num_kv_heads, num_heads, streams
        self.counters: Counter[str] = Counter()
        self.step = 0
        self.visits: list[Visit] = []
        self.merged: dict[int, Tensor] = {}
        """Per layer, float32 ``[n, H]``: log-sum-exps of this rank's asking queries over their whole sequences."""
        self._live: dict[Sequence, list[int]] = {}  # pages per unit, over all ranks
        self._grown: dict[Sequence, None] = {}  # sequences whose pages have become more since the last eviction
        self._state = UtilityState.empty(0, pool.device)
        self._limits: list[list[int] | None] = [
            page_limits(budget, layer, num_layers, num_kv_heads, streams, page_size) for layer in range(num_layers)
        ]

    @property
    def evicts(self) -> bool:
        """Whether pages can go, or be demoted, while decoding."""
        return self.retention is not None and any(limit is not None for limit in self._limits)

    @property
    def cuts(self) -> bool:
        """Whether prompts are cut, or parts of them demoted."""
        return self.retention is not None and (self.budget.prompt < 1 or self.evicts)

    @property
    def wants_source(self) -> bool:
        """Whether prompts are rated by their attention's inputs (see `Prompt.source`)."""
        return self.cuts and self.retention is not None and self.retention.wants_source

    @property
    def learns(self) -> bool:
        """Whether it wants to see the attention on pages."""
        return self.evicts and self.retention is not None and self.retention.learns != "nothing"

    # -- prompts -----------------------------------------------------------------------------

    def sealed_pages(self, num_tokens: int, layer: int) -> int:
        """Pages that a prompt seals at a layer."""
        if self.demoter is not None:
            return num_tokens // self.page_size * self.streams
        return sum(self.prompt_pages(num_tokens, layer))

    def prompt_pages(self, num_tokens: int, layer: int, scores: Tensor | None = None) -> list[int]:
        """Full pages of a prompt that each stream of a layer keeps as they are, ``[streams]``.

        Their sum does not depend on the scores, so that other ranks know it beforehand.
        """
        if not self.cuts:
            return [num_tokens // self.page_size] * self.streams
        return prompt_pages(
            self.budget, num_tokens, layer, self.num_layers, self.num_kv_heads, self.streams, self.page_size, scores
        )

    def rate(self, prompt: Prompt) -> Tensor:
        """Scores of a prompt's tokens, ``[K, n]`` without NaN."""
        assert self.retention is not None
        scores = self.retention.scores(prompt).float()
        assert scores.shape == prompt.key.shape[:2], f"{self.retention.name} rates {list(scores.shape)} tokens"
        return scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    def cut(self, batch: SequenceBatch, layer: int, pages: FullPages) -> Iterator[tuple[int, FullPages]]:
        """What is kept of full pages, for each stream its own, and which of them are demoted: ``(unit, pages)``."""
        first = layer * self.streams
        scores = batch.scores.get(layer, {}).pop(pages.row, None)
        if scores is None:
            for stream, part in enumerate(_streams(pages, self.streams)):
                yield first + stream, part
            return
        counts = self.prompt_pages(scores.shape[1], layer, scores)
        scores = scores[:, : len(pages.keys) * self.page_size]
        for stream, part in enumerate(_streams(pages, self.streams)):
            rated = scores if self.streams == 1 else scores[stream : stream + 1]
            if self.demoter is not None:
                self.demoter.counters["demoted_pages"] += len(part.keys) - counts[stream]
                yield first + stream, _mark(part, rated, counts[stream])
                continue
            assert self.retention is not None
            kept = _keep(part, rated, counts[stream], self.retention.whole_pages)
            batch.dropped[first + stream][pages.row] += len(pages.keys) - len(kept.keys)
            self.counters["dropped_pages"] += len(pages.keys) - len(kept.keys)
            yield first + stream, kept

    # -- while decoding ----------------------------------------------------------------------

    def placed(self, sequence: Sequence, unit: int, page_format: int) -> None:
        """A page has got an owner; told on every rank alike."""
        if self.evicts and (self.demoter is None or page_format != self.demoter.page_format):
            self._live.setdefault(sequence, [0] * (self.num_layers * self.streams))[unit] += 1
            self._grown[sequence] = None

    def stored(self, slots: Seq[int], scores: Seq[float]) -> None:
        """Pages lie in these slots now."""
        if not self.evicts or not slots:
            return
        have, need = len(self._state.mass), self.pool.num_slots
        if have < need:
            more = UtilityState.empty(max(need, 2 * have) - have, self.pool.device)
            pairs = zip(vars(self._state).values(), vars(more).values(), strict=True)
            self._state = UtilityState(*(torch.cat(pair) for pair in pairs))
        at = torch.tensor(slots, device=self.pool.device)
        self._state.mass[at] = torch.tensor(scores, dtype=torch.float32, device=self.pool.device)
        self._state.last_step[at] = self.step
        self._state.visits[at] = 0

    def knowledge(self, slot: int) -> tuple[int, int, int]:
        """What is known of a page: the bits of its mass, its last step and visits. It goes with the page to another
        rank (`recall`)."""
        if not self.evicts:
            return 0, 0, 0
        state = self._state
        return float_bits(float(state.mass[slot])), int(state.last_step[slot]), int(state.visits[slot])

    def recall(self, slot: int, knowledge: tuple[int, int, int]) -> None:
        """A page with what is known of it lies in this slot now."""
        if not self.evicts:
            return
        mass, last_step, visits = knowledge
        self.stored([slot], [bits_float(mass)])
        self._state.last_step[slot], self._state.visits[slot] = last_step, visits

    def forget(self, sequence: Sequence) -> None:
        """A sequence is gone."""
        self._live.pop(sequence, None)
        self._grown.pop(sequence, None)

    def settle(self, plan: StepPlan | None, step: int) -> None:
        """Learns from the last pass. Every rank calls it at the same point: one exchange, if a query was sent.

        Args:
            plan: of that pass.
        """
        self.step = step
        visits, self.visits = self.visits, []
        merged, self.merged = self.merged, {}
        if not self.learns or plan is None or not sum(plan.query_counts):
            return
        counts, device = plan.query_counts, self.pool.device
        nothing = torch.full(
            (counts[self.exchange.rank], self.num_heads), torch.inf, device=device
        )  # a pass broken off
        mine = torch.stack([merged.get(layer, nothing) for layer in range(self.num_layers)])
        shapes = [(self.num_layers, n, self.num_heads) for n in counts]
        totals = self.exchange.all_gather_floats(mine.flatten(), [math.prod(s) for s in shapes])
        by_rank = [total.view(shape) for total, shape in zip(totals, shapes, strict=True)]
        starts: dict[Sequence, int] = {}
        for source, rows in enumerate(plan.rows):
            start = 0
            for sequence, tokens in rows:
                starts[source, sequence] = start
                start += tokens
        for visit in visits:
            self._learn(visit, by_rank, starts)

    def _learn(self, visit: Visit, totals: list[Tensor], starts: dict[Sequence, int]) -> None:
        lse = torch.cat(
            [totals[r][visit.layer, starts[r, s] : starts[r, s] + n] for r, s, n in visit.asked]
        )  # [rows, H]
        lse = lse.unflatten(1, (self.streams, -1)).flatten(0, 1)  # [rows * streams, heads of a stream]
        mass = torch.exp(visit.page_lse - lse[..., None]).mean(1)  # [rows * streams, P]
        slots = visit.slots.long().clamp(min=0).flatten()
        there = slots > 0
        slots, mass = slots[there], mass.flatten()[there]
        total = torch.zeros_like(self._state.mass).index_add_(0, slots, mass)
        seen = torch.zeros_like(self._state.visits).index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
        at = seen.nonzero().squeeze(1)
        assert self.retention is not None
        if self.retention.learns == "visits":
            fair = torch.cat([self._fair((r, s), visit.layer).repeat(n) for r, s, n in visit.asked])
            share = torch.zeros_like(total).index_add_(0, slots, fair.repeat_interleave(visit.slots.shape[1])[there])
            at = at[total[at] > share[at]]
        if self.retention.learns == "reads":
            total = (total > 0).float()  # the shares of pages that a lookup has left out are zero
            at = at[total[at] > 0]
        if len(at):
            self.ops.update_utility(at.int(), total[at].contiguous(), self.step, self.retention.decay, self._state)

    def _fair(self, sequence: Sequence, layer: int) -> Tensor:
        """An equal share of the attention among a sequence's pages, per stream."""
        first = layer * self.streams
        live = self._live[sequence][first : first + self.streams]
        return 1 / torch.tensor(live, dtype=torch.float32, device=self.pool.device).clamp(min=1)

    def evict(self, num_sealed: dict[Sequence, int], batches: list[SequenceBatch]) -> list[Evicted]:
        """Frees what is over the budgets, or demotes it. Every rank calls it at the same point.

        Args:
            num_sealed: page numbers given out so far, per sequence.
            batches: this rank's own, whose counts of pages are kept up to date.

        Returns:
            The pages that are gone, of all ranks, the same on each.
        """
        gone: list[Evicted] = []
        if not self._grown:
            return gone
        groups = [group for sequence in self._grown for group in self._over(sequence)]
        self._grown.clear()
        if not groups:
            return gone
        width = sum(excess for _, _, excess in groups)
        offers = self.exchange.all_gather(
            [x for group in groups for offer in self._offers(*group, num_sealed) for x in offer], kind="eviction"
        )
        at = 0
        owners = {(self.exchange.rank, batch.ids[row]): (batch, row) for batch in batches for row in range(len(batch))}
        freed: list[int] = []
        cold: list[tuple[Sequence, int, int]] = []
        for sequence, _, excess in groups:
            ranked = sorted(
                (*table[3 * i : 3 * i + 3], rank) for rank, table in enumerate(offers) for i in range(at, at + excess)
            )
            at += excess
            for utility, page_idx, unit, rank in ranked[:excess]:
                if utility == NOBODY:
                    continue
                self._live[sequence][unit] -= 1
                if self.demoter is not None:
                    if rank == self.exchange.rank:
                        cold.append((sequence, unit, page_idx))
                    continue
                gone.append(Evicted(sequence, unit, page_idx, rank))
                if sequence in owners:
                    batch, row = owners[sequence]
                    batch.loads[unit][row][rank] -= 1
                    batch.dropped[unit][row] += 1
                if rank == self.exchange.rank:
                    freed.append(self.table.remove_page(sequence, unit, page_idx, "evict"))
        assert at == width
        self.pool.free(freed)
        self.counters["evicted_pages"] += len(freed)
        if self.demoter is not None:
            self.stored(self.demoter.demote(cold, self.streams), [0.0] * len(cold))
        return gone

    def _over(self, sequence: Sequence) -> Iterator[tuple[Sequence, range, int]]:
        """Where a sequence has too many pages: ``(sequence, units among which to choose, pages to evict)``."""
        live = self._live[sequence]
        for layer, limits in enumerate(self._limits):
            if limits is None:
                continue
            first = layer * self.streams
            if self.budget.pooled:
                units = range(first, first + self.streams)
                excess = sum(live[first : first + self.streams]) - sum(limits)
                if excess > 0:
                    yield sequence, units, excess
                continue
            for stream, limit in enumerate(limits):
                if live[first + stream] > limit:
                    yield sequence, range(first + stream, first + stream + 1), live[first + stream] - limit

    def _offers(
        self, sequence: Sequence, units: range, excess: int, num_sealed: dict[Sequence, int]
    ) -> list[tuple[int, int, int]]:
        """This rank's least useful pages: ``(bits of the utility, page number, unit)``, padded to `excess`."""
        newest = num_sealed[sequence] - LOCAL_PAGES
        warm = range(self.table.num_formats - (self.demoter is not None))  # the last format is of demoted pages
        pages = [(p, unit, slot) for unit in units for f in warm for p, slot in self.table.pages(sequence, unit, f)]
        pages = sorted(page for page in pages if SINK_PAGES <= page[0] < newest)
        offers: list[tuple[int, int, int]] = []
        if pages:
            assert self.retention is not None
            at = torch.tensor([0, *(slot for *_, slot in pages)], device=self.pool.device)  # 0 means none to the op
            state = UtilityState(*(x[at] for x in vars(self._state).values()))
            evictable = torch.ones(len(at), dtype=torch.bool, device=self.pool.device)
            evictable[0] = False
            victims = torch.empty(min(excess, len(pages)), dtype=torch.int32, device=self.pool.device)
            weights, decay = self.retention.weights, self.retention.decay
            self.ops.choose_victims(state, evictable, self.step, decay, weights, victims)
            utilities = state.utilities(self.step, decay, weights)[victims.long()].tolist()
            for victim, value in zip(victims.tolist(), utilities, strict=True):
                page_idx, unit, _ = pages[victim - 1]
                offers.append((float_bits(value), page_idx, unit))
        return offers + [(NOBODY, 0, 0)] * (excess - len(offers))


def _streams(pages: FullPages, streams: int) -> Iterator[FullPages]:
    """The pages of each stream."""
    if streams == 1:
        yield pages
        return
    for head in range(streams):
        values = None if pages.values is None else pages.values[:, head : head + 1]
        yield FullPages(pages.row, pages.numbers, pages.keys[:, head : head + 1], values, pages.experts)


def _mark(pages: FullPages, scores: Tensor, count: int) -> FullPages:
    """All pages, of which all but the `count` best are to be demoted; the first never is."""
    total, size = len(pages.keys), pages.keys.shape[2]
    rated = scores.nan_to_num(posinf=3e38 / size, neginf=-3e38 / size).unflatten(1, (total, size)).sum(2).mean(0)
    order = rated.clone()
    order[:1] = torch.inf
    best = set(order.topk(count).indices.tolist())
    return dataclasses.replace(pages, scores=rated.tolist(), cold=[i not in best for i in range(total)])


def _keep(pages: FullPages, scores: Tensor, count: int, whole: bool) -> FullPages:
    """`count` pages of the best tokens, in the order of the text.

    Args:
        pages: of one stream, with ``K`` heads.
        scores: ``[K, N * S]``
        whole: choose pages, by the mean over their tokens and heads; else each head its own tokens.
    """
    total, _, size = pages.keys.shape[:3]
    numbers = pages.numbers[:1] + pages.numbers[total - count + 1 :]  # the first stays the first, the last the last
    by_page = scores.nan_to_num(posinf=3e38 / size, neginf=-3e38 / size).unflatten(1, (total, size))
    if count == total:
        rated = by_page.sum(2).mean(0)
        return FullPages(pages.row, pages.numbers, pages.keys, pages.values, pages.experts, rated.tolist())
    if whole:
        rated = by_page.sum(2).mean(0)
        rated[0] = torch.inf  # where the sinks are
        kept = rated.topk(count).indices.sort().values
        experts = None if pages.experts is None else pages.experts[kept]
        values = None if pages.values is None else pages.values[kept]
        ratings = by_page.sum(2).mean(0)[kept].tolist()
        return FullPages(
            pages.row, [pages.numbers[i] for i in kept.tolist()], pages.keys[kept], values, experts, ratings
        )
    kept = scores.topk(count * size, dim=1).indices.sort(dim=1).values  # [K, count * S]

    def gather(x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1).flatten(1, 2)  # [K, N * S, D]
        chosen = tokens.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return chosen.unflatten(1, (count, size)).transpose(0, 1).contiguous()

    experts = None
    if pages.experts is not None:
        flat = pages.experts.flatten(0, 1)[kept]  # [K, count * S, k]
        experts = flat.unflatten(1, (count, size)).transpose(0, 1).flatten(1, 2)
    rated = scores.gather(1, kept).nan_to_num(posinf=3e38 / size).unflatten(1, (count, size)).sum(2).mean(0)
    values = None if pages.values is None else gather(pages.values)
    return FullPages(pages.row, numbers, gather(pages.keys), values, experts, rated.tolist())
