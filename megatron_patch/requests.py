"""Megatron's inference contexts as batches of the cache, and one forward pass over each.

A static context is a batch of sequences of one length, ``[s, b, ...]``; a dynamic one has requests
that join, leave and pause at any step, packed as ``[T, 1, ...]``. Either way a pass packs its tokens
as the cache wants them and puts the result back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_patch import compat, dynamic
from pikv_ds.config import ConfigError
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.sequences import SequenceBatch


class Pass:
    """One forward pass of this rank's batch."""

    idle = False
    """Nothing is appended: the pass serves the other ranks."""

    def __init__(self, cache: ExpertShardedKVCache, batch: SequenceBatch, shape: tuple[int, int]) -> None:
        self.cache, self.batch = cache, batch
        self.shape = shape  # of the tokens in Megatron's tensors

    def pack(self, x: Tensor) -> Tensor:
        """Megatron's ``[*shape, ...]`` to the cache's ``[N, ...]``."""
        raise NotImplementedError

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, zeros where no token is."""
        raise NotImplementedError

    def adjust(
        self, attention: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *args: Any, **kw: Any
    ) -> tuple[Any, ...]:
        """What `_adjust_key_value_for_inference` returns: new keys only, and how they are rotated."""
        raise NotImplementedError

    def routed(self, layer: int, experts: Tensor | None) -> None:
        """Seals what has filled up, by the experts ``[tokens, k]`` that the layer's router chose, if it has one."""
        if experts is not None:
            experts = self.pack(experts.unflatten(0, self.shape))
        self.cache.routed(self.batch, layer, experts)


class StaticPass(Pass):
    """A pass over a static context: ``s`` new tokens of each of ``b`` sequences."""

    def __init__(self, cache: ExpertShardedKVCache, batch: SequenceBatch, shape: tuple[int, int], start: int) -> None:
        super().__init__(cache, batch, shape)
        self.positions = slice(start, start + shape[0])

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)

    def unpack(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.shape[1], self.shape[0])).transpose(0, 1)

    def adjust(
        self, attention: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *args: Any, **kw: Any
    ) -> tuple[Any, ...]:
        if rotary_pos_emb is not None:  # keys that are in the cache have been rotated already
            rotary_pos_emb = tuple(None if emb is None else emb[self.positions] for emb in rotary_pos_emb)
        return query, key, value, rotary_pos_emb, attention.attn_mask_type, None


class DynamicPass(Pass):
    """A pass over a dynamic context: tokens of the active requests side by side, then padding.

    Args:
        num_tokens: without padding.
        order: int64 ``[num_tokens]``, Megatron's place of each packed token; None: the same.
    """

    def __init__(
        self,
        cache: ExpertShardedKVCache,
        batch: SequenceBatch,
        context: Any,
        shape: tuple[int, int],
        num_tokens: int,
        order: Tensor | None,
    ) -> None:
        super().__init__(cache, batch, shape)
        self.context, self.num_tokens, self.order = context, num_tokens, order

    def pack(self, x: Tensor) -> Tensor:
        x = x[: self.num_tokens, 0]
        return x if self.order is None else x[self.order]

    def unpack(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*self.shape, *x.shape[1:])
        if self.order is None:
            out[: self.num_tokens, 0] = x
        else:
            out[self.order, 0] = x
        return out

    def adjust(
        self, attention: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *args: Any, **kw: Any
    ) -> tuple[Any, ...]:
        """As Megatron does: keys are rotated here, queries later (or both here by a fused kernel)."""
        cos_sin = compat.rotary_cos_sin(args, kw)
        if getattr(self.context, "use_flashinfer_fused_rope", False) and cos_sin is not None:
            query, key = self.context.apply_fused_qk_rotary_emb(query, key, cos_sin, attention.config)
        elif rotary_pos_emb is not None:
            query_emb, key_emb = rotary_pos_emb
            key = compat.rotate_key(self.context, attention, key, key_emb)
            rotary_pos_emb = query_emb, None
        return query, key, value, rotary_pos_emb, attention.attn_mask_type, None


class IdlePass(Pass):
    """Megatron's dummy pass on a rank without requests: takes part in every exchange and appends nothing."""

    idle = True

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[:0]

    def unpack(self, x: Tensor) -> Tensor:
        return x


class StaticRequests:
    """The batches of one static context: one for each part of it that Megatron runs by itself.

    Args:
        shared: whether every rank of the group runs the same batch; None: find out at each prompt.
    """

    def __init__(self, cache: ExpertShardedKVCache, shared: bool | None) -> None:
        self.cache, self.shared = cache, shared
        self.batches: dict[int, SequenceBatch] = {}  # by the offset of its first sequence

    def begin(self, context: Any, key: Tensor) -> Pass:
        """Starts a pass with the first layer's new keys ``[s, b, K, D]``, not rotated yet."""
        (size, rows), start, offset = key.shape[:2], context.sequence_len_offset, context.batch_size_offset
        sums: list[int] | None = None
        if start == 0:
            if offset in self.batches:
                self.cache.release(self.batches.pop(offset))
            shared = self.shared
            if shared is None and self.cache.evictor.cuts:  # ranks that round differently would drop different tokens
                shared = False
            if shared is None:
                sums = fingerprint(key)
                everyone = self.cache.exchange.all_gather([rows, *sums])
                shared = self.cache.exchange.size > 1 and all(d == everyone[0] for d in everyone)
            self.batches[offset] = self.cache.new_batch(rows, shared)
        batch, error = self.batches.get(offset), None
        if batch is None or len(batch) != rows or batch.lengths[0] != start:
            seen = None if batch is None else (len(batch), batch.lengths[0])
            batch = batch or self.cache.new_batch(0)
            error = (
                f"the static context continues {rows} sequences at token {start}, but the cache has {seen} "
                "(sequences, tokens) of it; reset the context to start anew"
            )
        digest = (sums or fingerprint(key))[0] if batch.shared else 0
        error = error or _broken_off(self.cache, batch)
        self.cache.begin_step(batch, [size] * len(batch) if error is None else [0] * len(batch), error, digest)
        return StaticPass(self.cache, batch, (size, rows), start)


class DynamicRequests:
    """The requests of one dynamic context as rows of one batch.

    Raises:
        ConfigError: a request as long as the context allows would never be admitted.
    """

    def __init__(self, cache: ExpertShardedKVCache, context: Any) -> None:
        capacity, longest = cache.rank_capacity, context.max_sequence_length
        if capacity is not None and capacity < cache.bound(longest):
            raise ConfigError(
                f"pikv.capacity_tokens = {cache.config.capacity_tokens}: {capacity} without the watermark; of one "
                f"as long as the context's max_sequence_length = {longest} a rank may have to keep "
                f"{cache.bound(longest)}; raise the one or lower the other"
            )
        self.cache = cache
        self.batch = cache.new_batch(0)
        self.rows: dict[int, int] = {}  # by request id

    def committed(self, context: Any) -> int:
        """See `ExpertShardedKVCache.committed_tokens`; of all requests of a context."""
        return sum(self.cache.bound(length) for length in dynamic.final_lengths(context))

    def may_admit(self, context: Any, num_tokens: int) -> bool:
        """Whether the ranks' pools have room for a request that may grow to so many tokens."""
        grant = self.cache.grant()
        if grant is None:
            return True
        told = self.cache.committed_by_rank[self.cache.exchange.rank]
        return self.committed(context) + self.cache.bound(num_tokens) <= told + grant

    def begin(self, context: Any, key: Tensor) -> Pass:
        """Starts a pass over the context's active requests; key ``[T, 1, K, D]``."""
        known, active = dynamic.requests(context)
        self.release([r for r in self.rows if r not in known])
        error = _broken_off(self.cache, self.batch)
        if error is not None:  # nobody can join it; it is undone, and every rank is told: this raises
            self.cache.begin_step(self.batch, [0] * len(self.batch), error)
        for request in active:
            row = self.rows.get(request.id)
            if row is not None and request.offset == 0:  # evicted and started anew
                self.release([request.id])
                row = None
            if row is None:
                row = self.rows[request.id] = self.cache.admit(self.batch)
            if self.batch.lengths[row] != request.offset:
                error = (
                    f"request {request.id} continues at token {request.offset}, but {self.batch.lengths[row]} are in "
                    "the cache; PiKV needs all tokens of a request (no prefix caching, no restored context)"
                )
        new = [0] * len(self.batch)
        for request in active:
            new[self.rows[request.id]] = request.num_tokens
        self.cache.begin_step(self.batch, new if error is None else [0] * len(new), error)
        order = _order([(self.rows[r.id], r.num_tokens) for r in active], key.device)
        return DynamicPass(self.cache, self.batch, context, (key.shape[0], 1), sum(new), order)

    def release(self, requests: list[int]) -> None:
        """Gives back finished requests; the pages go with the next step plan."""
        rows = [self.rows.pop(r) for r in requests if r in self.rows]
        if rows:
            self.cache.release(self.batch, rows)


def _broken_off(cache: ExpertShardedKVCache, batch: SequenceBatch) -> str | None:
    """What to say of a batch whose last pass has not ended: Megatron does not make a pass again."""
    if cache.broken_off is not batch:
        return None
    return (
        f"the previous forward pass of this batch was broken off at layer {batch.first_open_layer} (by an error, or "
        "because the experts of that layer did not run) and is undone; reset the context and start anew"
    )


def _order(requests: list[tuple[int, int]], device: torch.device) -> Tensor | None:
    """Places of tokens, sorted by row, from ``(row, tokens)`` in their present order; None if they are sorted."""
    rows = [row for row, _ in requests]
    if rows == sorted(rows):
        return None
    starts, at = {}, 0
    for row, tokens in requests:
        starts[row] = range(at, at + tokens)
        at += tokens
    return torch.tensor([place for row in sorted(rows) for place in starts[row]], device=device)


def fingerprint(key: Tensor) -> list[int]:
    """Two sums over the first layer's keys that tell batches with different tokens apart.

    Keys of the first layer follow from the tokens alone, without any layer between that may round
    differently from rank to rank, and peers with other heads have others.
    """
    sample = key[..., :8].float().contiguous().view(torch.int32).flatten().long()
    weights = torch.arange(1, len(sample) + 1, device=key.device)
    sums = torch.stack([sample.sum(), (sample * (weights * 2654435761 % 2**31)).sum()])
    return [int(x) for x in sums.tolist()]
