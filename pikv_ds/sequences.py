"""`SequenceBatch`: what a rank keeps of its own sequences, the open tails above all.

All layers append the same tokens in a forward pass, so lengths, page numbers and the pages that
fill up are known when the pass begins; only the home experts differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tail:
    """The open tokens of a batch at one layer, in full precision on the sequences' own rank."""

    keys: Tensor
    """``[B, K, S, D]``"""
    values: Tensor
    """``[B, K, S, D]``"""
    experts: Tensor | None = None
    """``[B, S, k]`` int16: the experts that each token chose; None where no router is."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.experts) if t is not None)


@dataclass
class FullPages:
    """Pages of one sequence at one layer that have just filled up.

    While decoding they are views of the tail, which the next token overwrites: encode them at once.
    """

    row: int
    first_page: int
    keys: Tensor
    """``[N, K, S, D]``"""
    values: Tensor
    experts: Tensor | None
    """``[N, S, k]``"""


class SequenceBatch:
    """The sequences that go through the model together on one rank.

    Args:
        ids: one number per sequence, unique on this rank for ever.
        num_ranks: ranks of the group, for the count of pages placed on each.
    """

    def __init__(self, ids: list[int], num_layers: int, num_ranks: int, page_size: int) -> None:
        self.ids = ids
        self.num_layers = num_layers
        self.page_size = page_size
        self.alive = [True] * len(ids)
        self.lengths = [0] * len(ids)  # tokens, before the pass under way
        self.sealed = [0] * len(ids)  # full pages, before the pass under way
        self.new = [0] * len(ids)  # tokens of the pass under way
        self.tokens: Tensor | None = None  # bool [B, T]: columns of this pass that are tokens; None: all
        self.tails: list[Tail | None] = [None] * num_layers
        self.fresh: dict[int, list[tuple[Tensor, Tensor]]] = {}  # [layer][row]: tail and prompt, until routed
        self.loads = [[[0] * num_ranks for _ in ids] for _ in range(num_layers)]  # pages per rank
        self._open_layers: set[int] = set()
        self._tail_nbytes: int | None = 0  # None: to be counted again
        self._places: tuple[Tensor, Tensor, Tensor] | None = None  # of this pass; see append_one

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_step(self) -> bool:
        """Whether a forward pass is under way (or was broken off)."""
        return bool(self._open_layers)

    def open_tokens(self, row: int) -> int:
        """Tokens in the tail of a sequence before the pass under way."""
        return self.lengths[row] - self.sealed[row] * self.page_size

    def filling(self, row: int) -> int:
        """Pages of a sequence that fill up in the pass under way."""
        return (self.open_tokens(row) + self.new[row]) // self.page_size

    def begin(self, new: list[int], tokens: Tensor | None) -> None:
        """Starts a pass that appends ``new[b]`` tokens to each sequence."""
        self.new, self.tokens, self._places = new, tokens, None
        self._open_layers = set(range(self.num_layers))

    def close_layer(self, layer: int) -> None:
        """Ends the pass for one layer; the last one commits the new lengths."""
        self._open_layers.discard(layer)
        if not self._open_layers:
            for row in range(len(self)):
                self.sealed[row] += self.filling(row)
                self.lengths[row] += self.new[row]
                self.new[row] = 0
            self.tokens = None

    def break_off(self) -> None:
        """Undoes `begin`: the pass never started."""
        self.new, self.tokens = [0] * len(self), None
        self._open_layers.clear()

    def release(self, rows: list[int]) -> list[int]:
        """Marks sequences as finished; returns the ids of those that were alive. Tails of a batch
        with no living sequence are given back."""
        released = [self.ids[r] for r in rows if self.alive[r]]
        for row in rows:
            self.alive[row] = False
        if not any(self.alive):
            self.tails = [None] * self.num_layers
            self._tail_nbytes = 0
            self.fresh.clear()
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
        return sum(k.nbytes + v.nbytes for rows in self.fresh.values() for k, v in rows)

    def tail(self, layer: int, like: Tensor) -> Tail:
        """The tail of a layer, allocated on first use in the shape and type of keys ``[B, K, T, D]``."""
        tail = self.tails[layer]
        if tail is None:
            b, k, _, d = like.shape
            tail = Tail(like.new_zeros(b, k, self.page_size, d), like.new_zeros(b, k, self.page_size, d))
            self.tails[layer] = tail
            self._tail_nbytes = None
        return tail

    def append_one(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Writes one token per living sequence into the tail; returns the tail lengths ``[B]``.

        Args:
            keys, values: ``[B, K, 1, D]``.
        """
        tail = self.tail(layer, keys)
        if self._places is None:  # the same for all layers
            rows = [r for r in range(len(self)) if self.new[r]]
            lengths = [self.open_tokens(r) + self.new[r] if self.new[r] else 0 for r in range(len(self))]
            self._places = (
                torch.tensor(rows, device=keys.device),
                torch.tensor([self.open_tokens(r) for r in rows], device=keys.device),
                torch.tensor(lengths, dtype=torch.int32, device=keys.device),
            )
        index, place, filled = self._places
        tail.keys[index, :, place] = keys[index, :, 0]
        tail.values[index, :, place] = values[index, :, 0]
        return filled

    def append_many(self, layer: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Joins the tails with the tokens of this pass; kept until the layer's router has run.

        Args:
            keys, values: ``[B, K, T, D]``.

        Returns:
            Per sequence keys and values ``[K, open + new, D]``.
        """
        tail = self.tails[layer]
        joined = []
        for row in range(len(self)):
            k, v = self.columns(keys[row], row), self.columns(values[row], row)
            start = self.open_tokens(row)
            if start and self.new[row]:
                assert tail is not None
                k = torch.cat([tail.keys[row, :, :start], k], dim=1)
                v = torch.cat([tail.values[row, :, :start], v], dim=1)
            joined.append((k, v))
        self.fresh[layer] = joined
        return joined

    def columns(self, x: Tensor, row: int) -> Tensor:
        """The columns of ``x [*, T, D]`` that are tokens of this pass for a sequence."""
        if self.new[row] == 0:
            return x[:, :0]
        return x if self.tokens is None else x[:, self.tokens[row]]

    def fill(self, layer: int, experts: Tensor | None, like: Tensor) -> list[FullPages]:
        """Takes the pages that are full out of a layer and puts the rest into its tail.

        Args:
            experts: int ``[B, T, k]``, None where no router is.
            like: keys ``[B, K, T, D]`` of this pass (shape and type).
        """
        fresh = self.fresh.pop(layer, None)
        if not any(self.new):
            return []
        tail = self.tail(layer, like)
        if experts is not None and tail.experts is None:
            shape = (len(self), self.page_size, experts.shape[-1])
            tail.experts = torch.full(shape, -1, dtype=torch.int16, device=like.device)
            self._tail_nbytes = None
        pages = []
        for row in range(len(self)):
            new, start, size = self.new[row], self.open_tokens(row), self.page_size
            if new == 0:
                continue
            chosen = None
            if experts is not None:
                assert tail.experts is not None
                chosen = experts[row] if self.tokens is None else experts[row][self.tokens[row]]
                chosen = torch.cat([tail.experts[row, :start], chosen.to(torch.int16)])
            if fresh is None:  # one token, already in the tail
                keys, values = tail.keys[row, :, : start + new], tail.values[row, :, : start + new]
            else:
                keys, values = fresh[row]
            full = (start + new) // size
            rest = start + new - full * size
            if full:
                pages.append(
                    FullPages(
                        row,
                        self.sealed[row],
                        _as_pages(keys, full, size),
                        _as_pages(values, full, size),
                        None if chosen is None else chosen[: full * size].unflatten(0, (full, size)),
                    )
                )
            if fresh is not None:
                tail.keys[row, :, :rest] = keys[:, full * size :]
                tail.values[row, :, :rest] = values[:, full * size :]
            if chosen is not None:
                assert tail.experts is not None
                tail.experts[row, :rest] = chosen[full * size :]
        return pages


def _as_pages(x: Tensor, num_pages: int, page_size: int) -> Tensor:
    """``[K, n, D]`` to contiguous pages ``[num_pages, K, page_size, D]``."""
    return x[:, : num_pages * page_size].unflatten(1, (num_pages, page_size)).transpose(0, 1).contiguous()
