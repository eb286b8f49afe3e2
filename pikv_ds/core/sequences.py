"""`SequenceBatch`: what a rank keeps of its own sequences, the open tails above all.

All layers append the same tokens in a forward pass, so lengths, page numbers and the pages that
fill up are known when the pass begins; only the home experts differ from layer to layer.

Tokens are packed: the tensors of a pass are ``[N, heads, D]`` without padding, the tokens of a
sequence side by side, sequences in the order of the batch. So a pass may take a whole prompt of
one sequence and one token of another (continuous batching), and a place in the batch may be used
again for a new sequence when the old one has been released.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.slabs import lasting_zeros

Ints = NDArray[np.int64]
NO_ROW = -1
"""Of a sequence that no step plan has announced yet."""


@dataclass
class Tail:
    """The open tokens of a batch at one layer, in full precision on the sequences' own rank."""

    keys: Tensor
    """``[B, K, S, D]``"""
    values: Tensor | None
    """The same; None where they are channels of the keys (see `PageLayout.values`)."""
    experts: Tensor | None = None
    """``[B, S, k]`` int16: the experts that each token chose; None where no router is."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.experts) if t is not None)

    def grown(self, size: int) -> Tail:
        """The same with room for more sequences."""

        def grow(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            grown = lasting_zeros((size, *x.shape[1:]), x.dtype, x.device)
            grown[: len(x)] = x
            return grown

        keys = grow(self.keys)
        assert keys is not None
        return Tail(keys, grow(self.values), grow(self.experts))


@dataclass(frozen=True)
class TailPlaces:
    """Where the tokens of those sequences go that append a single one in a pass."""

    indices: Tensor
    """int64 ``[n]``: the sequences."""
    tokens: Tensor
    """int64 ``[n]``: their tokens among the packed ones."""
    slots: Tensor
    """int64 ``[n]``: places in the tails."""
    lengths: Tensor
    """int32 ``[B]``: open tokens with the new one; 0 at other sequences."""
    all_tokens: bool
    """The pass has no other tokens."""
    all_sequences: bool
    """Every sequence appends a single token, so packed tokens and sequences are the same."""
    filling: Tensor
    """int64 ``[m]``: the sequences whose tails fill up with it."""
    filling_host: Ints
    """The same on the host."""


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
        self.tails: list[Tail | None] = [None] * num_layers
        self.fresh: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {}  # [layer][index]: with tail, until routed
        self.dropped = np.zeros((num_layers * streams, size), np.int64)
        """``[units, size]``: full pages that are gone."""
        self.scores: dict[int, dict[int, Tensor]] = {}  # [layer][index]: of a prompt's tokens, until routed
        self._open_layers: set[int] = set()
        self._tail_nbytes: int | None = 0  # None: to be counted again
        self._places: TailPlaces | None = None  # of this pass, as the next one
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
            return index
        self.rows.append(NO_ROW)
        self.alive.append(True)
        for counts in (self.lengths, self.sealed, self.new):
            counts.append(0)
        self.dropped = np.pad(self.dropped, ((0, 0), (0, 1)))
        return len(self.rows) - 1

    def begin(self, new: list[int]) -> None:
        """Starts a pass that appends ``new[index]`` tokens to each sequence."""
        self.new, self._places, self._slices = list(new), None, None
        self._open_layers = set(range(self.num_layers))

    def close_layer(self, layer: int) -> None:
        """Ends the pass for one layer; the last one commits the new lengths."""
        self._open_layers.discard(layer)
        if not self._open_layers:
            for index in range(len(self)):
                self.sealed[index] += self.filling(index)
                self.lengths[index] += self.new[index]
                self.new[index] = 0
            self._slices = []

    def break_off(self) -> None:
        """Undoes `begin`: the pass never started."""
        self.new, self._slices = [0] * len(self), []
        self._open_layers.clear()

    def release(self, indices: list[int]) -> list[int]:
        """Marks sequences as finished; returns the rows of those that were alive and had one. Tails of a batch
        with no living sequence are given back."""
        released = [self.rows[i] for i in dict.fromkeys(indices) if self.alive[i] and self.rows[i] != NO_ROW]
        for index in indices:
            self.alive[index] = False
        if not any(self.alive):
            self.tails = [None] * self.num_layers
            self._tail_nbytes = 0
            self.fresh.clear()
            self.scores.clear()
        return released

    @property
    def tail_nbytes(self) -> int:
        """Bytes allocated for open tails."""
        if self._tail_nbytes is None:
            self._tail_nbytes = sum(t.nbytes for t in self.tails if t is not None)
        return self._tail_nbytes

    @property
    def fresh_nbytes(self) -> int:
        """Bytes of prompt keys and values that wait for their router."""
        return sum(x.nbytes for rows in self.fresh.values() for kv in rows.values() for x in kv if x is not None)

    def tail(self, layer: int, keys: Tensor, values: Tensor | None) -> Tail:
        """The tail of a layer, with room for all sequences, in the shape and type of keys and values ``[N, K, D]``."""
        tail, size = self.tails[layer], len(self)
        if tail is None:
            empty = [
                None if x is None else lasting_zeros((size, x.shape[1], self.page_size, x.shape[2]), x.dtype, x.device)
                for x in (keys, values)
            ]
            assert empty[0] is not None
            tail = self.tails[layer] = Tail(empty[0], empty[1])
            self._tail_nbytes = None
        elif len(tail.keys) < size:  # sequences have joined
            tail = self.tails[layer] = tail.grown(max(size, 2 * len(tail.keys)))
            self._tail_nbytes = None
        return tail

    def append(self, layer: int, keys: Tensor, values: Tensor | None) -> None:
        """Takes in the tokens of this pass.

        A single token goes into its sequence's tail. Several are joined with the tail and kept until
        the layer's router has run.

        Args:
            keys, values: ``[N, K, D]``; no values where they are channels of the keys.
        """
        tail = self.tail(layer, keys, values)
        pairs = [(tail.keys, keys)]
        if values is not None:
            assert tail.values is not None
            pairs.append((tail.values, values))
        if any(n == 1 for n in self.new):
            places = self.places(keys.device)
            at = slice(None) if places.all_tokens else places.tokens
            for kept, x in pairs:
                kept[places.indices, :, places.slots] = x[at]
        joined = {}
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

    def places(self, device: torch.device) -> TailPlaces:
        """Where the single tokens of this pass go; the same at every layer."""
        if self._places is None:
            single = [(index, mine.start) for index, mine in self.slices() if self.new[index] == 1]
            lengths = [self.open_tokens(r) + 1 if n == 1 else 0 for r, n in enumerate(self.new)]
            indices, tokens = [index for index, _ in single], [token for _, token in single]
            full = np.array([index for index in indices if lengths[index] == self.page_size], np.int64)
            self._places = TailPlaces(
                torch.tensor(indices, dtype=torch.int64, device=device),
                torch.tensor(tokens, dtype=torch.int64, device=device),
                torch.tensor([self.open_tokens(index) for index in indices], dtype=torch.int64, device=device),
                torch.tensor(lengths, dtype=torch.int32, device=device),
                all_tokens=len(single) == sum(self.new),
                all_sequences=len(single) == len(self) == sum(self.new),
                filling=torch.from_numpy(full).to(device),
                filling_host=full,
            )
        return self._places

    def fill(self, layer: int, experts: Tensor | None) -> list[FullPages]:
        """Takes the pages that are full out of a layer and puts the rest into its tail.

        Args:
            experts: int ``[N, k]``, None where no router is.
        """
        fresh, tail = self.fresh.pop(layer, {}), self.tails[layer]
        if not any(self.new):
            return []
        assert tail is not None, "a router ran before the layer's attention"
        kept = None  # the open tokens' experts
        if experts is not None:
            experts = experts.to(torch.int16)
            if tail.experts is None:
                shape = len(tail.keys), self.page_size, experts.shape[-1]
                tail.experts = lasting_zeros(shape, experts.dtype, experts.device)
                self._tail_nbytes = None
            kept, places = tail.experts, self.places(experts.device)
            kept[places.indices, places.slots] = experts if places.all_tokens else experts[places.tokens]
        pages = []
        places = self.places(tail.keys.device)
        if len(places.filling_host):  # their last tokens have gone into the tails
            at = places.filling
            pages.append(
                FullPages(
                    places.filling_host,
                    np.array(self.sealed)[places.filling_host],
                    tail.keys[at],
                    None if tail.values is None else tail.values[at],
                    None if kept is None else kept[at],
                )
            )
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
            tail.keys[index, :, :rest] = keys[:, full * size :]
            if values is not None:
                assert tail.values is not None
                tail.values[index, :, :rest] = values[:, full * size :]
            if kept is not None and chosen is not None:
                kept[index, :rest] = chosen[full * size :]
        return pages


def _as_pages(x: Tensor, num_pages: int, page_size: int) -> Tensor:
    """``[K, n, D]`` to contiguous pages ``[num_pages, K, page_size, D]``."""
    return x[:, : num_pages * page_size].unflatten(1, (num_pages, page_size)).transpose(0, 1).contiguous()
