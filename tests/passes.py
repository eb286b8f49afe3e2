"""Forward passes over random queries, keys and values, checked against dense attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pikv_ds import ExpertShardedKVCache, PiKVConfig
from pikv_ds.core.cache import ModelShape
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.pool import POISON_BYTE
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.policies.codecs import CODECS

PAGE = 8
SHAPE = ModelShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, dtype=torch.float32)
ROUTERS = (True, False)  # layer 1 is dense
LATENT = ModelShape(
    num_layers=2, num_heads=6, num_kv_heads=1, head_dim=20, num_experts=4, dtype=torch.float32, latent_dim=16
)


KERNEL_CODECS = {name: CODECS[name] for name in ("none", "fp8", "int8", "int4", "int2")}
"""Codecs that every backend has kernels for."""


def make_cache(
    shape: ModelShape = SHAPE, exchange: Exchange | None = None, **settings: object
) -> ExpertShardedKVCache:
    config = PiKVConfig.from_dict({"page_size": PAGE, "debug": True, "slab_pages": 4} | settings)
    return ExpertShardedKVCache(shape, config, exchange)


@dataclass
class Driver:
    """Runs forward passes with random queries, keys and values, and remembers them for dense attention."""

    cache: ExpertShardedKVCache
    batch: SequenceBatch
    rng: torch.Generator
    tolerance: float = 1e-5
    """Float32 against float64: sums of a few hundred terms of order one, merged from partials."""
    history: list[list[Tensor]] = field(default_factory=list)
    """[row][layer]: keys and values ``[2, K, n, D]``, of latent attention keys ``[1, 1, n, D]``."""
    votes: torch.Generator | None = None
    """Of the experts that tokens choose, where they are not the same on all ranks."""
    hot: int | None = None
    """Experts that are chosen at all; None: all."""

    def __post_init__(self) -> None:
        self.history = [[self._nothing()] * self.cache.shape.num_layers for _ in range(len(self.batch))]

    def step(self, width: int, mask: Sequence[Sequence[int]] | None = None) -> None:
        """One pass over ``width`` columns; ``mask [B][width]`` says which are tokens."""
        rows = len(self.batch)
        alive = torch.tensor(self.batch.alive)
        tokens = alive[:, None].expand(rows, width) if mask is None else torch.tensor(mask).bool() & alive[:, None]
        self.pass_of(tokens.sum(1).tolist())

    def pass_of(self, new: list[int]) -> None:
        """One pass that appends so many tokens to each sequence."""
        shape, num = self.cache.shape, sum(new)
        self.cache.begin_step(self.batch, new)
        for layer in range(shape.num_layers):
            parts = 2 if shape.latent_dim is None else 1
            heads = shape.num_heads + parts * shape.num_kv_heads  # in one tensor, as one projection gives them
            qkv = torch.randn(num, heads, shape.head_dim, generator=self.rng).to(shape.dtype)
            query, *kv = qkv.split([shape.num_heads] + [shape.num_kv_heads] * parts, dim=1)
            value = kv[1] if shape.latent_dim is None else None
            experts = torch.randint(self.hot or shape.num_experts, (num, 2), generator=self.votes or self.rng)
            out = self.cache.attend(self.batch, layer, query, kv[0], value, 0.25)
            assert out.shape == (*query.shape[:2], shape.value_dim)
            assert out.dtype == shape.dtype
            for row, (mine, q, x) in enumerate(
                zip(out.split(new), query.split(new), torch.stack(kv).split(new, dim=1), strict=True)
            ):
                self.history[row][layer] = torch.cat([self.history[row][layer], x.transpose(1, 2)], dim=2)
                keys, values = self.history[row][layer][[0, -1]]
                expected = dense(q.transpose(0, 1), keys, values[..., : shape.value_dim], 0.25)
                torch.testing.assert_close(mine.double(), expected, atol=self.tolerance, rtol=self.tolerance)
            self.cache.routed(self.batch, layer, experts if ROUTERS[layer] else None)
        check_sizes(self.cache)

    def release(self, rows: list[int]) -> None:
        self.cache.release(self.batch, rows)
        for row in rows:
            self.history[row] = [self._nothing()] * self.cache.shape.num_layers

    def admit(self) -> int:
        """One more sequence; returns its row."""
        row = self.cache.admit(self.batch)
        if row == len(self.history):
            self.history.append([self._nothing()] * self.cache.shape.num_layers)
        return row

    def mixed_pass(self) -> None:
        """Continuous batching: sequences join, leave and append as they like."""
        if torch.rand(1, generator=self.rng) < 0.3 and sum(self.batch.alive) < 4:
            self.admit()
        choice = torch.randint(8, (len(self.batch),), generator=self.rng).tolist()
        amount = {0: 0, 6: 9, 7: 21}  # a pause, a chunk, a prompt; else one token
        self.pass_of([amount.get(c, 1) if alive else 0 for c, alive in zip(choice, self.batch.alive, strict=True)])
        if len(self.batch) and torch.rand(1, generator=self.rng) < 0.2:
            self.release(torch.randint(len(self.batch), (1,), generator=self.rng).tolist())

    def _nothing(self, num_tokens: int = 0) -> Tensor:
        shape = self.cache.shape
        parts = 2 if shape.latent_dim is None else 1
        return torch.empty(parts, shape.num_kv_heads, num_tokens, shape.head_dim, dtype=shape.dtype)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries ``[H, T, D]`` over keys ``[K, N, D]``: float64 ``[T, H, D]``."""
    group, t, n = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scale
    later = torch.ones(t, n, dtype=torch.bool).triu(n - t + 1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def pages_of(
    cache: ExpertShardedKVCache, row: int, unit: int, page_format: int | None = None
) -> list[tuple[int, int]]:
    """``(number, slot)`` of a row's pages of a unit that lie here, of one format or of all."""
    formats = range(cache.table.num_formats) if page_format is None else [page_format]
    found = [cache.table.entries(np.array([row]), np.array([unit]), f) for f in formats]
    return [pair for entries in found for pair in zip(entries.numbers.tolist(), entries.slots.tolist(), strict=True)]


def memory(tensors: list[Tensor | None]) -> int:
    """Bytes of the memory behind some tensors, each allocation once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    return sum(s.nbytes() for s in storages.values())


def check_sizes(cache: ExpertShardedKVCache) -> None:
    """The README's invariants 1 and 8 between two passes: tokens counted in memory, bytes as allocated."""
    batches, layers = cache._batches, cache.shape.num_layers
    tails = [t for b in batches for t in b.tails if t is not None]
    assert cache.kv_bytes == memory(
        [
            *(slab for slabs in cache.pool.pages for slab in slabs.tensors),
            *(x for t in tails for x in (t.keys, t.values, t.experts)),
            *(x for b in batches for _, t in b._overwritten for x in t),
            *(x for p in cache.sender.staged for x in p.payloads.values()),
        ]
    )
    slabs = [slab for slabs in cache.pool.pages for slab in slabs.tensors if slab is not None]
    pages = sum(int((slab != POISON_BYTE).any(1).sum()) for slab in slabs)  # unused slots are poisoned
    assert cache.pool.num_used == sum(cache.table.num_pages_by_format()) == pages
    open_tokens = sum(b.open_tokens(r) * layers for b in batches for r in range(len(b)) if b.alive[r])
    assert cache.stored_tokens == (pages + cache.sender.num_staged) * PAGE // cache.streams + open_tokens
