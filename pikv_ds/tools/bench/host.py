"""`pikv bench --op host`: what the cache costs the host, apart from kernels and wires.

Heads are tiny, one thread computes, and CPU time is taken, so that what is left is Python and array operations. One
process stands for a rank of a group in which all ranks do the same: `MirrorExchange` answers for the others at once.
What is taken:

- sealing: from the router's choice to pages in their owners' tables, for the pages of one prompt at one layer;
  encoding is in it. The slope between few and many pages is the cost of a page; what is left is the cost of a call;
- a decode pass with the ops as stubs, per layer, for rows of many and of few tokens, some of which fill a page in
  every pass;
- bytes of metadata per page: tables, pool and ledger, slack included, on a device a second time;
- ops that torch dispatches per layer of a decode pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_ds.config import PiKVConfig
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.exchange import Exchange, Gathered, Ints, PagesInFlight, Partials
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.core.shape import ModelShape
from pikv_ds.core.shard import Headers
from pikv_ds.ops import OPS

FEW, MANY = 256, 4096
"""Pages of a prompt between which the slope is taken."""
LAYERS, TOP_K = 8, 2
SMALL_PAGE, PAGE = 8, 32
"""Tokens of a page, where sealing and where decoding is measured."""
EXPERTS, RANKS = (8, 128), (1, 2, 4)
LOADS = ((4, 1024), (64, 16384))
"""Rows, and tokens of each, of decode passes."""


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    ranks: int
    experts: int
    value: float
    unit: str


class MirrorExchange(Exchange):
    """The collectives of rank 0 of a group whose other ranks do what this one does."""

    def __init__(self, size: int) -> None:
        super().__init__(None)
        self.size = size
        self.cache: ExpertShardedKVCache | None = None

    def all_gather(self, row: Sequence[int], kind: str = "plan") -> list[list[int]]:
        return [list(row)] * self.size

    def all_gather_ragged(
        self, rows: Sequence[Sequence[int]], width: int, counts: Sequence[int], kind: str = "plan"
    ) -> list[list[list[int]]]:
        assert self.cache is not None
        ledger = self.cache.ledger
        twin = {int(row): i for i, row in enumerate(np.flatnonzero(ledger.source == 0))}
        every = [np.flatnonzero(ledger.source == source) for source in range(self.size)]
        return [
            [[int(every[source][twin[row]]) if row >= 0 else row, n] for row, n in rows] for source in range(self.size)
        ]

    def gather_arrays(self, mine: Ints, sizes: Sequence[int], kind: str) -> list[Ints]:
        return [mine] * self.size

    def swap_arrays(self, table: Ints, send: Sequence[int], receive: Sequence[int], kind: str) -> Ints:
        """Headers of as many pages of the others, of the same unit."""
        assert self.cache is not None
        unit = int(table[0, Headers._fields.index("units")]) if len(table) else 0
        out = np.zeros((sum(receive), table.shape[1]), np.int64)
        at = 0
        for source, count in enumerate(receive):
            part = out[at : at + count]
            rows = np.flatnonzero((self.cache.ledger.source == source) & (self.cache.ledger.new > 0))
            if count:
                part[:, Headers._fields.index("rows")] = rows[np.arange(count) % len(rows)]
                part[:, Headers._fields.index("numbers")] = np.arange(count) + 10**6
                part[:, Headers._fields.index("units")] = unit
            at += count
        return out

    def send_pages(
        self, payload: Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], kind: str = "page"
    ) -> PagesInFlight:
        received = torch.zeros(sum(receive_bytes), dtype=torch.uint8)
        return PagesInFlight(received, None, payload, self.waited_s)

    def gather_queries(self, query: Tensor, received: Tensor) -> Gathered:
        return Gathered(received, None, self.waited_s)

    def return_partials(self, partials: Partials, received: Partials) -> None:
        pass


class _Counting(TorchDispatchMode):
    """Counts the ops that torch dispatches, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _make(ranks: int, experts: int, layers: int, page_size: int) -> ExpertShardedKVCache:
    shape = ModelShape(
        num_layers=layers, num_heads=4, num_kv_heads=1, head_dim=16, num_experts=experts, dtype=torch.bfloat16
    )
    exchange = MirrorExchange(ranks)
    cache = ExpertShardedKVCache(shape, PiKVConfig(page_size=page_size), exchange)
    exchange.cache = cache
    return cache


def _prefill(cache: ExpertShardedKVCache, batch: SequenceBatch, new: list[int]) -> list[float]:
    """A pass of prompts whose attention somebody else computes; seconds of sealing at each layer."""
    shape, num = cache.shape, sum(new)
    query = torch.zeros(num, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    key = torch.rand(num, 1, shape.head_dim, dtype=shape.dtype)
    experts = torch.randint(shape.num_experts, (num, TOP_K))
    cache.begin_step(batch, new)
    seconds = []
    for layer in range(shape.num_layers):
        cache.attend(batch, layer, query, key, key, 0.25, attend_prompts=False)
        begin = time.thread_time()
        cache.routed(batch, layer, experts)
        seconds.append(time.thread_time() - begin)
    return seconds


def _seal(ranks: int, experts: int, pages: int) -> list[float]:
    """Seconds of sealing a prompt of so many pages, at several layers."""
    cache = _make(ranks, experts, 4, SMALL_PAGE)
    return _prefill(cache, cache.new_batch(1), [pages * SMALL_PAGE])[1:]


def _decode_pass(cache: ExpertShardedKVCache, batch: SequenceBatch) -> None:
    shape, rows = cache.shape, len(batch)
    query, key = (torch.zeros(rows, n, shape.head_dim, dtype=shape.dtype) for n in (shape.num_heads, 1))
    experts = torch.zeros(rows, TOP_K, dtype=torch.int64)
    cache.begin_step(batch, [1] * rows)
    for layer in range(shape.num_layers):
        cache.attend(batch, layer, query, key, key, 0.25)
        cache.routed(batch, layer, experts)


def _loaded(ranks: int, rows: int, tokens: int) -> tuple[ExpertShardedKVCache, SequenceBatch]:
    """A cache of rows of about so many tokens, some of which fill a page in every pass."""
    cache = _make(ranks, EXPERTS[0], LAYERS, PAGE)
    batch = cache.new_batch(rows)
    lengths = [tokens - i * PAGE // rows for i in range(rows)]
    for row in range(rows):  # one after the other: their prompts need not be there at once
        _prefill(cache, batch, [lengths[row] if i == row else 0 for i in range(rows)])
    return cache, batch


def _without_kernels(cache: ExpertShardedKVCache) -> None:
    """Makes the ops that run on a device stubs; from here on only the host's work is real."""
    real = cache.formats[0].ops
    stubs: dict[str, Any] = {name: lambda *args, **kwargs: None for name in OPS}
    stub = SimpleNamespace(**stubs | {"place_pages": real.place_pages})
    for page_format in cache.formats:
        object.__setattr__(page_format, "ops", stub)
    cache.ops = cache.attention.ops = stub  # type: ignore[assignment]


def metadata_bytes(cache: ExpertShardedKVCache) -> float:
    """Bytes per page of what is known of pages, without the pages, on the host and as much again where a device has a
    copy."""
    shard = cache.shard
    on_both = shard.table.nbytes if cache.device.type != "cpu" else 2 * shard.table.nbytes
    slabs = sum(slabs.pointers.nbytes for slabs in (*shard.pool.pages, *shard.pool.summaries))
    return (on_both + slabs + shard.pool.table_bytes + cache.ledger.nbytes) / max(1, shard.pool.num_used)


def measure(rounds: int, track: Callable[[Iterable[Any]], Iterable[Any]] = lambda x: x) -> list[Figure]:
    """All figures; medians over rounds in which everything is interleaved.

    Args:
        track: wraps the work, for a progress bar.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [(ranks, experts) for ranks in RANKS for experts in EXPERTS]
    sealing: dict[tuple[int, int, int], list[float]] = {(*case, n): [] for case in cases for n in (FEW, MANY)}
    loads = [(ranks, *load) for ranks in RANKS for load in LOADS]
    decoding: dict[tuple[int, int, int], list[float]] = {load: [] for load in loads}
    figures = []
    todo = [("seal", key) for _ in range(rounds) for key in sealing] + [("decode", load) for load in loads]
    for what, key in track(todo):
        if what == "seal":
            sealing[key] += _seal(*key)
            continue
        cache, batch = _loaded(*key)
        ranks, rows, tokens = key
        name = f"metadata per page, {rows} rows × {tokens:,}"
        figures.append(Figure(name, ranks, EXPERTS[0], metadata_bytes(cache), "bytes"))
        for _ in range(2):
            _decode_pass(cache, batch)
        with _Counting() as counting:
            _decode_pass(cache, batch)
        if (rows, tokens) == LOADS[0]:
            figures.append(Figure("ops per layer of a decode pass", ranks, EXPERTS[0], counting.count / LAYERS, "ops"))
        _without_kernels(cache)
        for _ in range(3 * rounds):
            begin = time.thread_time()
            _decode_pass(cache, batch)
            decoding[key].append((time.thread_time() - begin) / LAYERS)
    torch.set_num_threads(before)
    for ranks, experts in cases:
        few, many = (statistics.median(sealing[ranks, experts, n]) for n in (FEW, MANY))
        slope = (many - few) / (MANY - FEW)
        figures.append(Figure("a page, sealed and entered", ranks, experts, slope * 1e6, "µs"))
        figures.append(Figure("a call that seals", ranks, experts, (few - FEW * slope) * 1e6, "µs"))
    for (ranks, rows, tokens), seconds in decoding.items():
        name = f"decode, host per layer, {rows} rows × {tokens:,}"
        figures.append(Figure(name, ranks, EXPERTS[0], statistics.median(seconds) * 1e6, "µs"))
    return sorted(figures, key=lambda figure: (figure.name, figure.ranks, figure.experts))


def table(title: str, figures: Sequence[Figure]) -> Table:
    """One line per figure."""
    out = Table(title=title, title_justify="left")
    for name in ("", "ranks", "experts", "", ""):
        out.add_column(name, justify="left" if not name else "right")
    for before, figure in zip([None, *figures], figures, strict=False):
        if before is not None and before.name != figure.name:
            out.add_section()
        value = f"{figure.value:,.2f}" if figure.value < 10 else f"{figure.value:,.0f}"
        out.add_row(figure.name, str(figure.ranks), str(figure.experts), value, figure.unit)
    return out
