"""`Evictor`: keeps rows within their budgets. What goes is retention's choice, how much the budget's.

Prompts are cut before their pages are sealed (`cut`), token by token for each KV head, or page by page. While
decoding, whole pages are evicted where a row has more of them than its budget allows. Every rank knows how many
pages each row has in each unit (`Ledger`), so all know how many must go. Each rank offers its least useful ones, and
the least useful of all go: the choice does not depend on the number of ranks.

Utilities come from the attention itself: `decode_attention` returns each page's share of the softmax on this rank
(`page_lse`), and the ranks exchange the log-sum-exps over the whole rows once per pass.

Where there is a codec to demote to, what is over the budget stays, as a whole page of that codec
(`pikv_ds.core.demotion`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.core.demotion import Demoter
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.ledger import Ledger
from pikv_ds.core.sequences import FullPages, SequenceBatch
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.shard import Shard, Visit, float_bits
from pikv_ds.core.step import StepPlan
from pikv_ds.core.table import Ints
from pikv_ds.ops.state import UtilityState
from pikv_ds.policies.budgets import LOCAL_PAGES, NO_LIMIT, SINK_PAGES, Budget, page_limits, prompt_pages
from pikv_ds.policies.retention import Prompt, Retention

NOBODY = 2**31 - 1
"""In the place of a utility's bits: this rank has no page to offer."""


class Evictor:
    """Budgets and retention of all rows.

    Args:
        retention: None: everything stays, and nothing here costs anything.
        demoter: encodes what is over the budget anew; None: that is dropped.
    """

    def __init__(
        self,
        exchange: Exchange,
        shard: Shard,
        ledger: Ledger,
        retention: Retention | None,
        budget: Budget,
        demoter: Demoter | None,
        shape: ModelShape,
    ) -> None:
        self.exchange, self.shard, self.ledger = exchange, shard, ledger
        self.retention, self.budget, self.demoter, self.shape = retention, budget, demoter, shape
        self.streams, self.page_size = shard.streams, ledger.page_size
        self.counters: Counter[str] = Counter()
        self.grown_rows: set[int] = set()
        """Rows whose pages have become more since the last eviction."""
        self.sealed_pages = functools.lru_cache(4096)(self._sealed_pages)
        """Pages that a prompt of so many tokens seals at a layer, ``(num_tokens, layer)``."""
        self._limits = decode_limits(budget, shape, self.streams, self.page_size)

    @property
    def evicts(self) -> bool:
        """Whether pages can go, or be demoted, while decoding."""
        return self.retention is not None and bool((self._limits < NO_LIMIT).any())

    @property
    def cuts(self) -> bool:
        """Whether prompts are cut, or parts of them demoted."""
        return self.retention is not None and (self.budget.prompt < 1 or self.evicts)

    @property
    def wants_source(self) -> bool:
        """Whether prompts are rated by their attention's inputs (see `Prompt.source`)."""
        return self.cuts and self.retention is not None and self.retention.wants_source

    # -- prompts -----------------------------------------------------------------------------

    def _sealed_pages(self, num_tokens: int, layer: int) -> int:
        if self.demoter is not None:
            return num_tokens // self.page_size * self.streams
        return sum(self.prompt_pages(num_tokens, layer))

    def prompt_pages(self, num_tokens: int, layer: int, scores: Tensor | None = None) -> list[int]:
        """Full pages of a prompt that each stream of a layer keeps as they are, ``[streams]``.

        Their sum does not depend on the scores, so that other ranks know it beforehand.
        """
        if not self.cuts:
            return [num_tokens // self.page_size] * self.streams
        heads = self.shape.num_layers, self.shape.num_kv_heads, self.streams
        return prompt_pages(self.budget, num_tokens, layer, *heads, self.page_size, scores)

    def rate(self, prompt: Prompt) -> Tensor:
        """Scores of a prompt's tokens, ``[K, n]`` without NaN."""
        assert self.retention is not None
        scores = self.retention.scores(prompt).float()
        assert scores.shape == prompt.key.shape[:2], f"{self.retention.name} rates {list(scores.shape)} tokens"
        return scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    def cut(self, batch: SequenceBatch, layer: int, pages: FullPages) -> Iterator[tuple[int, FullPages]]:
        """What is kept of full pages, for each stream its own, and which of them are demoted: ``(unit, pages)``."""
        first, index = layer * self.streams, int(pages.index[0])
        scores = batch.scores.get(layer, {}).pop(index, None) if len(set(pages.index.tolist())) == 1 else None
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
            batch.dropped[first + stream, index] += len(pages.keys) - len(kept.keys)
            self.counters["dropped_pages"] += len(pages.keys) - len(kept.keys)
            yield first + stream, kept

    # -- while decoding ----------------------------------------------------------------------

    def grown(self, rows: Ints) -> None:
        """Rows have got pages; told on every rank alike."""
        if self.evicts:
            self.grown_rows.update(rows.tolist())

    def forget(self, row: int) -> None:
        """A row is gone."""
        self.grown_rows.discard(row)

    def settle(self, plan: StepPlan | None, totals: Mapping[int, Tensor]) -> None:
        """Learns from the last pass. Every rank calls it at the same point: one exchange, if a query was sent.

        Args:
            plan: of that pass.
            totals: per layer, float32 ``[n, H]``: log-sum-exps of this rank's asking queries over their whole rows.
        """
        visits, self.shard.visits = self.shard.visits, []
        if not self.shard.learns or plan is None or not any(plan.asking):
            return
        counts = [sum(tokens for _, tokens in rows) for rows in plan.asking]
        layers, heads = self.shape.num_layers, self.shape.num_heads
        nothing = torch.full((counts[self.exchange.rank], heads), torch.inf, device=self.shard.device)
        mine = torch.stack([totals.get(layer, nothing) for layer in range(layers)])  # a pass broken off has not all
        shapes = [(layers, n, heads) for n in counts]
        everyone = self.exchange.all_gather_floats(mine.flatten(), [math.prod(s) for s in shapes])
        by_rank = [total.view(shape) for total, shape in zip(everyone, shapes, strict=True)]
        where: dict[int, tuple[int, int]] = {}  # the source of each row, and the place of its queries
        for source, rows in enumerate(plan.asking):
            start = 0
            for row, tokens in rows:
                where[row] = source, start
                start += tokens
        for visit in visits:
            self._learn(visit, by_rank, where)

    def _learn(self, visit: Visit, totals: list[Tensor], where: Mapping[int, tuple[int, int]]) -> None:
        assert self.retention is not None
        state = self.shard.state
        asked = [(where[row], n) for row, n in visit.asked]
        lse = torch.cat([totals[source][visit.layer, start : start + n] for (source, start), n in asked])  # [n, H]
        lse = lse.unflatten(1, (self.streams, -1)).flatten(0, 1)  # [n * streams, heads of a stream]
        mass = torch.exp(visit.page_lse - lse[..., None]).mean(1)  # [n * streams, P]
        slots = visit.slots.long().clamp(min=0).flatten()
        there = slots > 0
        slots, mass = slots[there], mass.flatten()[there]
        total = torch.zeros_like(state.mass).index_add_(0, slots, mass)
        seen = torch.zeros_like(state.visits).index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
        at = seen.nonzero().squeeze(1)
        if self.retention.learns == "visits":
            fair = torch.cat([self._fair(row, visit.layer).repeat(n) for row, n in visit.asked])
            share = torch.zeros_like(total).index_add_(0, slots, fair.repeat_interleave(visit.slots.shape[1])[there])
            at = at[total[at] > share[at]]
        if self.retention.learns == "reads":
            total = (total > 0).float()  # the shares of pages that a lookup has left out are zero
            at = at[total[at] > 0]
        if len(at):
            update = self.shard.formats[0].ops.update_utility
            update(at.int(), total[at].contiguous(), self.shard.step, self.retention.decay, state)

    def _fair(self, row: int, layer: int) -> Tensor:
        """An equal share of the attention among a row's pages, per stream."""
        kept = self.ledger.kept([row])[0, layer * self.streams : (layer + 1) * self.streams]
        return 1 / torch.from_numpy(kept).to(self.shard.device, torch.float32).clamp(min=1)

    def evict(self, batches: list[SequenceBatch]) -> None:
        """Frees what is over the budgets, or demotes it. Every rank calls it at the same point.

        Args:
            batches: this rank's own, whose counts of pages that are gone are kept up to date.
        """
        if not self.grown_rows:
            return
        rows = np.array(sorted(self.grown_rows), np.int64)
        self.grown_rows.clear()
        over_rows, over_units, excess = self._over(rows)
        if not len(excess):
            return
        width = int(excess.max())
        offers = self._offers(over_rows, over_units, width)  # [groups, width, 3]
        tables = self.exchange.gather_arrays(offers.reshape(-1), [offers.size] * self.exchange.size, kind="eviction")
        every = np.stack([table.reshape(offers.shape) for table in tables], axis=2)  # [groups, width, ranks, 3]
        ranks = np.broadcast_to(np.arange(self.exchange.size), every.shape[:3])
        keys = np.concatenate([every, ranks[..., None]], axis=3).reshape(len(excess), -1, 4)
        order = np.lexsort((keys[..., 3], keys[..., 2], keys[..., 1], keys[..., 0]), axis=1)
        ranked = np.take_along_axis(keys, order[..., None], axis=1)
        goes = (np.arange(ranked.shape[1]) < excess[:, None]) & (ranked[..., 0] != NOBODY)
        group, _ = goes.nonzero()
        _, numbers, units, owners = ranked[goes].T
        gone_rows, here = over_rows[group], owners == self.exchange.rank
        if self.demoter is not None:
            self.ledger.demote(gone_rows, units)
            mine = gone_rows[here]
            self.demoter.demote(mine, units[here], numbers[here], self.ledger.serial[mine])
            return
        self.ledger.evict(gone_rows, units, owners)
        own = {row: (batch, i) for batch in batches for i, row in enumerate(batch.rows) if batch.alive[i]}
        for row in np.unique(gone_rows).tolist():
            if row in own:
                batch, i = own[row]
                np.add.at(batch.dropped[:, i], units[gone_rows == row], 1)
        self.shard.free(self.shard.take(gone_rows[here], units[here], numbers[here], "evict"))
        self.counters["evicted_pages"] += int(here.sum())

    def _over(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Where rows have too many pages, ``[groups]`` each: the row, the first unit of those among which to choose (a
        layer's if its budget is pooled, else one), and how many must go."""
        kept, limits, step = self.ledger.kept(rows), self._limits, 1
        if self.budget.pooled:
            step = self.streams
            kept, limits = kept.reshape(len(rows), -1, step).sum(2), limits.reshape(-1, step).sum(1)
        excess = kept - limits
        at, group = (excess > 0).nonzero()
        return rows[at], group * step, excess[at, group]

    def _offers(self, rows: Ints, first_units: Ints, width: int) -> Ints:
        """This rank's least useful pages of some groups: ``(bits of the utility, page number, unit)``, least useful
        first, ``[groups, width, 3]``."""
        offers = np.full((len(rows), width, 3), 0, np.int64)
        offers[..., 0] = NOBODY
        members = self.streams if self.budget.pooled else 1
        units = (first_units[:, None] + np.arange(members)).reshape(-1)
        every = np.repeat(rows, members)
        warm = self.shard.table.num_formats - (self.demoter is not None)  # the last format is of demoted pages
        found = [self.shard.table.entries(every, units, page_format) for page_format in range(warm)]
        which, numbers, slots = (np.concatenate(parts) for parts in zip(*found, strict=True))
        newest = self.ledger.num_sealed(every[which]) - LOCAL_PAGES
        evictable = (numbers >= SINK_PAGES) & (numbers < newest)
        which, numbers, slots = which[evictable], numbers[evictable], slots[evictable]
        if not len(slots):
            return offers
        assert self.retention is not None
        at = torch.from_numpy(slots).to(self.shard.device)
        state = UtilityState(*(x[at] for x in vars(self.shard.state).values()))
        utilities = state.utilities(self.shard.step, self.retention.decay, self.retention.weights).cpu().numpy()
        group = which // members
        order = np.lexsort((units[which], numbers, utilities, group))
        group = group[order]
        place = np.arange(len(group)) - group.searchsorted(group)  # within its group
        first = place < width
        chosen, group, place = order[first], group[first], place[first]
        offers[group, place] = np.stack([float_bits(utilities[chosen]), numbers[chosen], units[which[chosen]]], axis=1)
        return offers


def decode_limits(budget: Budget, shape: ModelShape, streams: int, page_size: int) -> NDArray[np.int64]:
    """Most pages of a row in each unit while decoding, ``[units]``; `NO_LIMIT` where all may stay."""
    limits = np.full((shape.num_layers, streams), NO_LIMIT, np.int64)
    for layer in range(shape.num_layers):
        of_layer = page_limits(budget, layer, shape.num_layers, shape.num_kv_heads, streams, page_size)
        if of_layer is not None:
            limits[layer] = of_layer
    return limits.reshape(-1)


def _streams(pages: FullPages, streams: int) -> Iterator[FullPages]:
    """The pages of each stream."""
    if streams == 1:
        yield pages
        return
    for head in range(streams):
        values = None if pages.values is None else pages.values[:, head : head + 1]
        yield FullPages(pages.index, pages.numbers, pages.keys[:, head : head + 1], values, pages.experts)


def _mark(pages: FullPages, scores: Tensor, count: int) -> FullPages:
    """All pages, of which all but the `count` best are to be demoted; the first never is."""
    total, size = len(pages.keys), pages.keys.shape[2]
    rated = scores.nan_to_num(posinf=3e38 / size, neginf=-3e38 / size).unflatten(1, (total, size)).sum(2).mean(0)
    order = rated.clone()
    order[:1] = torch.inf
    cold = np.ones(total, np.bool_)
    cold[order.topk(count).indices.cpu().numpy()] = False
    return dataclasses.replace(pages, scores=rated, cold=cold)


def _keep(pages: FullPages, scores: Tensor, count: int, whole: bool) -> FullPages:
    """`count` pages of the best tokens, in the order of the text.

    Args:
        pages: of one stream, with ``K`` heads.
        scores: ``[K, N * S]``
        whole: choose pages, by the mean over their tokens and heads; else each head its own tokens.
    """
    total, _, size = pages.keys.shape[:3]
    by_page = scores.nan_to_num(posinf=3e38 / size, neginf=-3e38 / size).unflatten(1, (total, size)).sum(2).mean(0)
    if count == total:
        return dataclasses.replace(pages, scores=by_page)
    if whole:
        order = by_page.clone()
        order[0] = torch.inf  # where the sinks are
        best = order.topk(count).indices.sort().values
        which = best.cpu().numpy()
        return FullPages(
            pages.index[which],
            pages.numbers[which],
            pages.keys[best],
            None if pages.values is None else pages.values[best],
            None if pages.experts is None else pages.experts[best],
            by_page[best].nan_to_num(posinf=3e38),
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
    numbers = np.concatenate([pages.numbers[:1], pages.numbers[total - count + 1 :]])  # the first and the last stay so
    values = None if pages.values is None else gather(pages.values)
    return FullPages(pages.index[:count], numbers, gather(pages.keys), values, experts, rated)
