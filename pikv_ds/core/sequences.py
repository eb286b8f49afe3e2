"""`SequenceBatch`: what a rank keeps of its own sequences, the open tails above all.

All layers append the same tokens in a forward pass, so lengths, page numbers and the pages that
fill up are known when the pass begins; only the home experts differ from layer to layer.

Tokens are packed: the tensors of a pass are ``[N, heads, D]`` without padding, the tokens of a
sequence side by side, sequences in the order of the batch. So a pass may take a whole prompt of
one sequence and one token of another (continuous batching), and a place in the batch may be used
again for a new sequence when the old one has been released.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.slabs import lasting_zeros

Ints = NDArray[np.int64]
NO_ROW = -1
"""Of a sequence that no step plan has announced yet."""


class Tail(NamedTuple):
    """The open tokens of a batch at one layer, in full precision on the sequences' own rank."""

    keys: Tensor
    """``[B, K, S, D]``"""
    values: Tensor | None
    """The same; None where they are channels of the keys (see `PageLayout.values`)."""
    experts: Tensor | None
    """``[B, S, k]`` int16: the experts that each token chose; None where no router has run yet."""


@dataclass
class Tails:
    """The open tokens at all layers, side by side, so that the pages of all layers are taken out at once."""

    keys: Tensor
    """``[layers, B, K, S, D]``"""
    values: Tensor | None
    """The same, or None (see `Tail`)."""
    experts: Tensor | None = None
    """``[layers, B, S, k]`` int16; None before the first router has run."""
    routed: set[int] = field(default_factory=set)
    """Layers with a router."""
    _views: dict[int, Tail] = field(default_factory=dict)

    def at(self, layer: int) -> Tail:
        """Those of one layer."""
        if layer not in self._views:
            values = None if self.values is None else self.values[layer]
            experts = self.experts[layer] if self.experts is not None and layer in self.routed else None
            self._views[layer] = Tail(self.keys[layer], values, experts)
        return self._views[layer]

    def has_router(self, layer: int, experts: Tensor) -> Tensor:
        """Where the experts of a layer go, ``[B, S, k]``, -1 for none; its router gives as many, or fewer."""
        before = self.experts
        if before is None or before.shape[-1] < experts.shape[-1]:  # layers may choose different numbers of experts
            shape = *self.keys.shape[:2], self.keys.shape[3], experts.shape[-1]
            self.experts = lasting_zeros(shape, torch.int16, experts.device).fill_(-1)
            if before is not None:
                self.experts[..., : before.shape[-1]] = before
            self._views.clear()
        if layer not in self.routed:
            self.routed.add(layer)
            self._views.pop(layer, None)
        kept = self.at(layer).experts
        assert kept is not None
        return kept

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.experts) if t is not None)

    def whole(self, index: int, num: int) -> Tail:
        """A copy of the first tokens of a sequence at all layers, ``[layers, K, num, D]`` and ``[layers, num, k]``."""
        values = None if self.values is None else self.values[:, index, :, :num].clone()
        experts = None if self.experts is None else self.experts[:, index, :num].clone()
        return Tail(self.keys[:, index, :, :num].clone(), values, experts)

    def put(self, index: int, tokens: Tail) -> None:
        """Writes back what `whole` has given."""
        num = tokens.keys.shape[2]
        self.keys[:, index, :, :num] = tokens.keys
        if tokens.values is not None and self.values is not None:
            self.values[:, index, :, :num] = tokens.values
        if tokens.experts is not None and self.experts is not None:
            self.experts[:, index, :num] = tokens.experts

    def grow(self, size: int) -> None:
        """Makes room for more sequences."""

        def grown(x: Tensor) -> Tensor:
            out = lasting_zeros((len(x), size, *x.shape[2:]), x.dtype, x.device)
            out[:, : x.shape[1]] = x
            return out

        self.keys = grown(self.keys)
        self.values = None if self.values is None else grown(self.values)
        self.experts = None if self.experts is None else grown(self.experts)
        self._views.clear()


@dataclass(frozen=True)
class SingleTokens:
    """The sequences that append a single token in a pass, the same at every layer."""

    indices: Ints
    """``[n]``: their places in the batch."""
    tokens: Tensor | None
    """int64 ``[n]``: their tokens among the packed ones; None: these are all."""
    places: Tensor
    """int32 ``[3, n]``: their tokens among the packed ones, their tails, and the tokens' slots in these."""
    tails: Tensor
    """int32 ``[n]``: the second of them."""
    lengths: Tensor
    """int32 ``[n]``: open tokens with the new one."""
    filling: Ints
    """``[m]``: places in the batch of those whose tails fill up with it."""


@dataclass
class FullPages:
    """Pages at one layer that have just filled up: of one prompt, or one of each sequence that fills its tail."""

    index: Ints
    """``[N]``: each page's sequence in the batch."""
    numbers: Ints
    """``[N]``: of the pages within their sequences."""
    keys: Tensor
    """``[N, K, S, D]``"""
    values: Tensor | None
    """The same; None where they are channels of the keys."""
    experts: Tensor | None
    """``[N, tokens, k]``: S tokens, or those of all heads where each has its own."""
    scores: Tensor | None = None
    """``[N]``: what retention thinks of each page, where it does."""
    cold: NDArray[np.bool_] | None = None
    """``[N]``: whether each page is over the budget and demoted at once; None: none is."""


class SequenceBatch:
    """The sequences that go through the model together on one rank.

    Args:
        size: sequences.
        shared: every rank of the group has this same batch (see `ExpertShardedKVCache.new_batch`).
        streams: KV heads of a layer with pages of their own; 1: a page holds all heads. A *unit* is a stream of a
            layer, ``layer * streams + stream``.
    """

    def __init__(self, size: int, num_layers: int, page_size: int, shared: bool = False, streams: int = 1) -> None:
        self.num_layers, self.page_size, self.shared = num_layers, page_size, shared
        self.rows = [NO_ROW] * size
        """Each sequence's number in the group (see `Ledger`), once a step plan has announced it."""
        self.alive = [True] * size
        self.lengths = [0] * size  # tokens, before the pass under way
        self.sealed = [0] * size  # full pages, before the pass under way
        self.new = [0] * size  # tokens of the pass under way
        self._tails: Tails | None = None
        self.fresh: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {}  # [layer][index]: with tail, until routed
        self.dropped = np.zeros((num_layers * streams, size), np.int64)
        """``[units, size]``: full pages that are gone."""
        self.scores: dict[int, dict[int, Tensor]] = {}  # [layer][index]: of a prompt's tokens, until routed
        self._open_layers: set[int] = set()
        self.undone = 0
        """Passes that were undone so far."""
        self._before = list(self.lengths), list(self.sealed)
        self._dropped_before: NDArray[np.int64] | None = None
        self._rests: dict[int, list[tuple[int, Tail]]] = {}  # [layer]: of chunks that fill pages, until the pass ends
        self._overwritten: list[tuple[int, Tail]] = []  # open tokens of all layers that these have replaced
        self._singles: SingleTokens | None = None  # of this pass, as the next one
        self._table: Tensor | None = None  # int32 [4, n], theirs
        self._slices: list[tuple[int, slice]] | None = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def in_step(self) -> bool:
        """Whether a forward pass is under way (or was broken off)."""
        return bool(self._open_layers)

    @property
    def first_open_layer(self) -> int:
        """The first layer that has not ended the pass under way."""
        return min(self._open_layers)

    def open_tokens(self, index: int) -> int:
        """Tokens in the tail of a sequence before the pass under way."""
        return self.lengths[index] - self.sealed[index] * self.page_size

    def filling(self, index: int) -> int:
        """Pages of a sequence that fill up in the pass under way."""
        return (self.open_tokens(index) + self.new[index]) // self.page_size

    def slices(self) -> list[tuple[int, slice]]:
        """``(index, its tokens among the packed ones)`` of each sequence that takes part in the pass."""
        if self._slices is None:
            self._slices, start = [], 0
            for index, n in enumerate(self.new):
                if n:
                    self._slices.append((index, slice(start, start + n)))
                    start += n
        return self._slices

    def prompts(self) -> list[tuple[int, slice]]:
        """`slices` of those sequences that begin in this pass, with several tokens."""
        return [(index, mine) for index, mine in self.slices() if self.new[index] > 1 and not self.lengths[index]]

    def admit(self) -> int:
        """Takes in one more sequence and returns its index: that of a released one, or a new one."""
        assert not self.in_step, "sequences join between passes"
        if False in self.alive:
            index = self.alive.index(False)
            self.rows[index], self.alive[index] = NO_ROW, True
            self.lengths[index] = self.sealed[index] = 0
            self.dropped[:, index] = 0
            for before in self._before:  # an `undo` does not bring the released one back
                if index < len(before):
                    before[index] = 0
            if self._dropped_before is not None and index < self._dropped_before.shape[1]:
                self._dropped_before[:, index] = 0
            self._overwritten = [(i, tokens) for i, tokens in self._overwritten if i != index]
            return index
        self.rows.append(NO_ROW)
        self.alive.append(True)
        for counts in (self.lengths, self.sealed, self.new):
            counts.append(0)
        self.dropped = np.pad(self.dropped, ((0, 0), (0, 1)))
        return len(self.rows) - 1

    def begin(self, new: list[int]) -> None:
        """Starts a pass that appends ``new[index]`` tokens to each sequence."""
        self.new, self._singles, self._slices = list(new), None, None
        self._open_layers = set(range(self.num_layers))
        self._before = list(self.lengths), list(self.sealed)
        self._overwritten.clear()

    def ends_with(self, layer: int) -> bool:
        """Whether this is the last layer that has not ended the pass under way."""
        return self._open_layers == {layer}

    def close_layers(self) -> None:
        """Ends the pass for all layers."""
        for layer in sorted(self._open_layers):
            self.close_layer(layer)

    def close_layer(self, layer: int) -> None:
        """Ends the pass for one layer; the last one moves the lengths, which `undo` can still take back."""
        if self.ends_with(layer):  # still open, should an error come in between
            self._write_rests()
            for index in range(len(self)):
                self.sealed[index] += self.filling(index)
                self.lengths[index] += self.new[index]
                self.new[index] = 0
            self._slices = []
        self._open_layers.discard(layer)

    def break_off(self) -> None:
        """Undoes `begin`: the pass never started."""
        self.new, self._slices = [0] * len(self), []
        self._open_layers.clear()

    def undo(self) -> None:
        """Undoes the last pass, whether it was broken off or has ended: lengths and tails are as before it."""
        if self._tails is not None:
            for index, whole in self._overwritten:
                self._tails.put(index, whole)
        self._overwritten.clear()
        self._rests.clear()
        self.fresh.clear()
        self.scores.clear()
        lengths, sealed = self._before
        self.lengths[: len(lengths)], self.sealed[: len(sealed)] = lengths, sealed
        if self._dropped_before is not None:
            self.dropped[:, : self._dropped_before.shape[1]] = self._dropped_before
        self.undone += 1
        self.break_off()

    def commit(self) -> None:
        """The last pass stands: nothing of what it has replaced is needed."""
        self._overwritten.clear()
        self._dropped_before = None

    def keep_dropped(self) -> None:
        """Keeps `dropped` as it is now, for `undo`."""
        self._dropped_before = self.dropped.copy()

    def _write_rests(self) -> None:
        """Puts what is left of chunks that have filled pages into the tails, in place of the tokens of these pages."""
        if not self._rests:
            return
        tails = self._tails
        assert tails is not None
        for index in sorted({index for rests in self._rests.values() for index, _ in rests}):
            if self.open_tokens(index):
                self._overwritten.append((index, tails.whole(index, self.open_tokens(index))))
        for layer, rests in self._rests.items():
            for index, rest in rests:
                _put(tails.at(layer), index, rest)
        self._rests.clear()

    def release(self, indices: list[int]) -> list[int]:
        """Marks sequences as finished; returns the rows of those that were alive and had one. Tails of a batch
        with no living sequence are given back."""
        released = [self.rows[i] for i in dict.fromkeys(indices) if self.alive[i] and self.rows[i] != NO_ROW]
        for index in indices:
            self.alive[index] = False
        if not any(self.alive):
            self._tails = None
            self._overwritten.clear()
            self._rests.clear()
            self.fresh.clear()
            self.scores.clear()
        return released

    @property
    def tail_nbytes(self) -> int:
        """Bytes allocated for open tails."""
        return 0 if self._tails is None else self._tails.nbytes

    @property
    def tails(self) -> list[Tail | None]:
        """Of each layer; None before the first pass."""
        return [None if self._tails is None else self._tails.at(layer) for layer in range(self.num_layers)]

    @property
    def fresh_nbytes(self) -> int:
        """Bytes of prompt keys and values that wait for their router."""
        return sum(x.nbytes for rows in self.fresh.values() for kv in rows.values() for x in kv if x is not None)

    @property
    def undo_nbytes(self) -> int:
        """Bytes kept for `undo`, and of what it could not undo if it were in the tails already."""
        kept = [tail for _, tail in self._overwritten] + [tail for rests in self._rests.values() for _, tail in rests]
        return sum(x.nbytes for tail in kept for x in tail if x is not None)

    def tail(self, layer: int, keys: Tensor, values: Tensor | None) -> Tail:
        """The tail of a layer, with room for all sequences, in the shape and type of keys and values ``[N, K, D]``."""
        size, tails = len(self), self._tails
        if tails is None:
            empty = [
                None
                if x is None
                else lasting_zeros((self.num_layers, size, x.shape[1], self.page_size, x.shape[2]), x.dtype, x.device)
                for x in (keys, values)
            ]
            assert empty[0] is not None
            tails = self._tails = Tails(empty[0], empty[1])
        elif tails.keys.shape[1] < size:  # sequences have joined
            tails.grow(max(size, 2 * tails.keys.shape[1]))
        return tails.at(layer)

    def singles(self, device: torch.device) -> SingleTokens:
        """The sequences that append a single token in this pass, with one copy to the device; while their number
        stays, into the same memory."""
        if self._singles is None:
            new = np.array(self.new, np.int64)
            indices = np.flatnonzero(new == 1)
            slots = (
                np.array(self.lengths, np.int64)[indices] - np.array(self.sealed, np.int64)[indices] * self.page_size
            )
            tokens = (new.cumsum() - new)[indices]
            table = torch.from_numpy(np.stack([tokens, indices, slots, slots + 1]).astype(np.int32))
            if self._table is None or self._table.shape != table.shape or self._table.device.type != device.type:
                with torch.inference_mode(False):  # the next pass may not be in inference mode
                    self._table = torch.empty(table.shape, dtype=torch.int32, device=device)
            self._table.copy_(table)
            at = None if len(indices) == new.sum() else self._table[0].long()
            filling = indices[slots + 1 == self.page_size]
            self._singles = SingleTokens(indices, at, self._table[:3], self._table[1], self._table[3], filling)
        return self._singles

    def join(self, layer: int, keys: Tensor, values: Tensor | None) -> None:
        """Takes in the tokens of those sequences that append several: joined with their tails, they wait for the
        layer's router.

        Args:
            keys, values: ``[N, K, D]``, of all packed tokens; no values where they are channels of the keys.
        """
        tail, joined = self.tail(layer, keys, values), {}
        pairs = [(tail.keys, keys)]
        if values is not None:
            assert tail.values is not None
            pairs.append((tail.values, values))
        for index, mine in self.slices():
            if self.new[index] > 1:
                start = self.open_tokens(index)
                whole = [x[mine].transpose(0, 1) for _, x in pairs]
                if start:
                    whole = [
                        torch.cat([kept[index, :, :start], x], dim=1)
                        for (kept, _), x in zip(pairs, whole, strict=True)
                    ]
                joined[index] = whole[0], None if values is None else whole[1]
        if joined:
            self.fresh[layer] = joined

    def tail_experts(self, layer: int, experts: Tensor) -> Tensor:
        """Where the experts of a layer's open tokens are kept, int16 ``[B, S, k]``, k the most of any layer.

        Args:
            experts: ``[N, k]``, what its router has chosen.
        """
        assert self._tails is not None, "a router ran before the layer's attention"
        return self._tails.has_router(layer, experts)

    def fill(self, layer: int, experts: Tensor | None) -> list[FullPages]:
        """Takes the pages that are full out of a layer and puts the rest into its tail. Single tokens, with their
        experts, are in the tails already.

        Args:
            experts: int ``[N, k]``, None where no router is.
        """
        fresh = self.fresh.pop(layer, {})
        if not any(self.new):
            return []
        assert self._tails is not None, "a router ran before the layer's attention"
        experts = None if experts is None else experts.to(torch.int16)
        tail, pages = self._tails.at(layer), []
        filling = self.singles(tail.keys.device).filling
        if len(filling):  # their last tokens have gone into the tails
            at = torch.from_numpy(filling).to(tail.keys.device)
            taken = [None if x is None else x[at] for x in tail]
            assert taken[0] is not None
            pages.append(FullPages(filling, np.array(self.sealed)[filling], taken[0], taken[1], taken[2]))
        kept = tail.experts
        for index, mine in self.slices() if fresh else ():
            if index not in fresh:
                continue
            start, size = self.open_tokens(index), self.page_size
            full, rest = divmod(start + self.new[index], size)
            keys, values = fresh[index]
            chosen = None
            if kept is not None and experts is not None:
                chosen = torch.cat([kept[index, :start], experts[mine]])
            if full:
                pages.append(
                    FullPages(
                        np.full(full, index),
                        np.arange(self.sealed[index], self.sealed[index] + full),
                        _as_pages(keys, full, size),
                        None if values is None else _as_pages(values, full, size),
                        None if chosen is None else chosen[: full * size].unflatten(0, (full, size)),
                    )
                )
            if rest:
                left = Tail(
                    keys[:, full * size :],
                    None if values is None else values[:, full * size :],
                    None if chosen is None else chosen[full * size :],
                )
                if full and start:  # the open tokens' places: they must be there if the pass is undone
                    left = Tail(*(None if x is None else x.clone() for x in left))  # type: ignore[arg-type]
                    self._rests.setdefault(layer, []).append((index, left))
                else:
                    _put(tail, index, left)
        return pages

    def fill_all(self) -> Tails | None:
        """The pages of all layers that single tokens have filled in this pass, which has no others: their keys
        ``[layers, m, K, S, D]``, values and experts, in the order of `SingleTokens.filling`. None: no page is full."""
        tails, singles = self._tails, self._singles
        if tails is None or singles is None or not len(singles.filling):
            return None
        at = torch.from_numpy(singles.filling).to(tails.keys.device)
        keys, values, experts = (
            None if x is None else x.index_select(1, at) for x in (tails.keys, tails.values, tails.experts)
        )
        assert keys is not None
        return Tails(keys, values, experts, tails.routed)


def _put(tail: Tail, index: int, tokens: Tail) -> None:
    """Writes tokens ``[K, n, D]`` (experts ``[n, k]``) to the beginning of a sequence's tail."""
    num = tokens.keys.shape[1]
    tail.keys[index, :, :num] = tokens.keys
    if tokens.values is not None:
        assert tail.values is not None
        tail.values[index, :, :num] = tokens.values
    if tokens.experts is not None:
        assert tail.experts is not None
        tail.experts[index, :num] = tokens.experts


def _as_pages(x: Tensor, num_pages: int, page_size: int) -> Tensor:
    """``[K, n, D]`` to contiguous pages ``[num_pages, K, page_size, D]``."""
    return x[:, : num_pages * page_size].unflatten(1, (num_pages, page_size)).transpose(0, 1).contiguous()
