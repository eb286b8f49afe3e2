"""`SequenceBatch`: what a rank keeps of its own sequences, the open tails above all.

All layers append the same tokens in a forward pass, so lengths, page numbers and the pages that
fill up are known when the pass begins; only the home experts differ from layer to layer.

Tokens are packed: the tensors of a pass are ``[N, heads, D]`` without padding, the tokens of a
sequence side by side, sequences in the order of their rows. So a pass may take a whole prompt of
one sequence and one token of another (continuous batching), and a row may be used again for a new
sequence when the old one has been released.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pikv_ds.slabs import lasting_zeros


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

    def grown(self, rows: int) -> Tail:
        """The same with room for more sequences."""

        def grow(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            grown = lasting_zeros((rows, *x.shape[1:]), x.dtype, x.device)
            grown[: len(x)] = x
            return grown

        keys = grow(self.keys)
        assert keys is not None
        return Tail(keys, grow(self.values), grow(self.experts))


@dataclass(frozen=True)
class TailPlaces:
    """Where the tokens of those sequences go that append a single one in a pass."""

    rows: Tensor
    """int64 ``[n]``: the sequences."""
    tokens: Tensor
    """int64 ``[n]``: their tokens among the packed ones."""
    slots: Tensor
    """int64 ``[n]``: places in the tails."""
    lengths: Tensor
    """int32 ``[B]``: open tokens with the new one; 0 at other sequences."""
    all_tokens: bool
    """The pass has no other tokens."""
    all_rows: bool
    """Every sequence appends a single token, so packed tokens and rows are the same."""


@dataclass
class FullPages:
    """Pages of one sequence at one layer that have just filled up.

    While decoding they are views of the tail, which the next token overwrites: encode them at once.
    """

    row: int
    numbers: list[int]
    """Of the pages within their sequence."""
    keys: Tensor
    """``[N, K, S, D]``"""
    values: Tensor | None
    """The same; None where they are channels of the keys."""
    experts: Tensor | None
    """``[N, tokens, k]``: S tokens, or those of all heads where each has its own."""
    scores: list[float] | None = None
    """What retention thinks of each page, where it does."""
    cold: list[bool] | None = None
    """Whether each page is over the budget and demoted at once; None: none is."""


class SequenceBatch:
    """The sequences that go through the model together on one rank.

    Args:
        ids: one number per sequence, unique on this rank for ever.
        num_ranks: ranks of the group, for the count of pages placed on each.
        shared: every rank of the group has this same batch (see `ExpertShardedKVCache.new_batch`).
        streams: KV heads of a layer with pages of their own; 1: a page holds all heads. A *unit* is a stream of a
            layer, ``layer * streams + stream``.
    """

    def __init__(
        self,
        ids: list[int],
        num_layers: int,
        num_ranks: int,
        page_size: int,
        shared: bool = False,
        streams: int = 1,
    ) -> None:
        self.ids = ids
        self.num_layers = num_layers
        self.num_ranks = num_ranks
        self.page_size = page_size
        self.shared = shared
        self.alive = [True] * len(ids)
        self.lengths = [0] * len(ids)  # tokens, before the pass under way
        self.sealed = [0] * len(ids)  # full pages, before the pass under way
        self.new = [0] * len(ids)  # tokens of the pass under way
        self.tails: list[Tail | None] = [None] * num_layers
        self.fresh: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {}  # [layer][row]: with tail, until routed
        self.loads = [
            [[0] * num_ranks for _ in ids] for _ in range(num_layers * streams)
        ]  # [unit][row]: pages per rank
        self.dropped = [[0] * len(ids) for _ in range(num_layers * streams)]  # [unit][row]: pages that are gone
        self.scores: dict[int, dict[int, Tensor]] = {}  # [layer][row]: of a prompt's tokens, until routed
        self._open_layers: set[int] = set()
        self._tail_nbytes: int | None = 0  # None: to be counted again
        self._places: TailPlaces | None = None  # of this pass

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_step(self) -> bool:
        """Whether a forward pass is under way (or was broken off)."""
        return bool(self._open_layers)

    @property
    def first_open_layer(self) -> int:
        """The first layer that has not ended the pass under way."""
        return min(self._open_layers)

    def open_tokens(self, row: int) -> int:
        """Tokens in the tail of a sequence before the pass under way."""
        return self.lengths[row] - self.sealed[row] * self.page_size

    def filling(self, row: int) -> int:
        """Pages of a sequence that fill up in the pass under way."""
        return (self.open_tokens(row) + self.new[row]) // self.page_size

    def slices(self) -> list[tuple[int, slice]]:
        """``(row, its tokens among the packed ones)`` of each sequence that takes part in the pass."""
        out, start = [], 0
        for row, n in enumerate(self.new):
            if n:
                out.append((row, slice(start, start + n)))
                start += n
        return out

    def prompts(self) -> list[tuple[int, slice]]:
        """`slices` of those sequences that begin in this pass, with several tokens."""
        return [(row, mine) for row, mine in self.slices() if self.new[row] > 1 and not self.lengths[row]]

    def admit(self, sequence: int) -> int:
        """Takes in one more sequence and returns its row: that of a released one, or a new one."""
        assert not self.in_step, "sequences join between passes"
        if False in self.alive:
            row = self.alive.index(False)
            self.ids[row], self.alive[row] = sequence, True
            self.lengths[row] = self.sealed[row] = 0
            for loads, dropped in zip(self.loads, self.dropped, strict=True):
                loads[row], dropped[row] = [0] * self.num_ranks, 0
            return row
        self.ids.append(sequence)
        self.alive.append(True)
        for counts in (self.lengths, self.sealed, self.new):
            counts.append(0)
        for loads, dropped in zip(self.loads, self.dropped, strict=True):
            loads.append([0] * self.num_ranks)
            dropped.append(0)
        return len(self.ids) - 1

    def begin(self, new: list[int]) -> None:
        """Starts a pass that appends ``new[row]`` tokens to each sequence."""
        self.new, self._places = list(new), None
        self._open_layers = set(range(self.num_layers))

    def close_layer(self, layer: int) -> None:
        """Ends the pass for one layer; the last one commits the new lengths."""
        self._open_layers.discard(layer)
        if not self._open_layers:
            for row in range(len(self)):
                self.sealed[row] += self.filling(row)
                self.lengths[row] += self.new[row]
                self.new[row] = 0

    def break_off(self) -> None:
        """Undoes `begin`: the pass never started."""
        self.new = [0] * len(self)
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
        tail, rows = self.tails[layer], len(self)
        if tail is None:
            empty = [
                None if x is None else lasting_zeros((rows, x.shape[1], self.page_size, x.shape[2]), x.dtype, x.device)
                for x in (keys, values)
            ]
            assert empty[0] is not None
            tail = self.tails[layer] = Tail(empty[0], empty[1])
            self._tail_nbytes = None
        elif len(tail.keys) < rows:  # sequences have joined
            tail = self.tails[layer] = tail.grown(max(rows, 2 * len(tail.keys)))
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
                kept[places.rows, :, places.slots] = x[at]
        joined = {}
        for row, mine in self.slices():
            if self.new[row] > 1:
                start = self.open_tokens(row)
                whole = [x[mine].transpose(0, 1) for _, x in pairs]
                if start:
                    whole = [
                        torch.cat([kept[row, :, :start], x], dim=1) for (kept, _), x in zip(pairs, whole, strict=True)
                    ]
                joined[row] = whole[0], None if values is None else whole[1]
        if joined:
            self.fresh[layer] = joined

    def places(self, device: torch.device) -> TailPlaces:
        """Where the single tokens of this pass go; the same at every layer."""
        if self._places is None:
            single = [(row, mine.start) for row, mine in self.slices() if self.new[row] == 1]
            lengths = [self.open_tokens(r) + 1 if n == 1 else 0 for r, n in enumerate(self.new)]
            rows, tokens = [row for row, _ in single], [token for _, token in single]
            self._places = TailPlaces(
                torch.tensor(rows, dtype=torch.int64, device=device),
                torch.tensor(tokens, dtype=torch.int64, device=device),
                torch.tensor([self.open_tokens(row) for row in rows], dtype=torch.int64, device=device),
                torch.tensor(lengths, dtype=torch.int32, device=device),
                all_tokens=len(single) == sum(self.new),
                all_rows=len(single) == len(self) == sum(self.new),
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
            kept[places.rows, places.slots] = experts if places.all_tokens else experts[places.tokens]
        pages = []
        for row, mine in self.slices():
            start, size = self.open_tokens(row), self.page_size
            full, rest = divmod(start + self.new[row], size)
            if row in fresh:
                keys, values = fresh[row]
            elif full:  # its last token has gone into the tail
                keys, values = tail.keys[row], None if tail.values is None else tail.values[row]
            else:
                continue
            chosen = None
            if kept is not None and experts is not None:
                chosen = torch.cat([kept[row, :start], experts[mine]])
            if full:
                pages.append(
                    FullPages(
                        row,
                        list(range(self.sealed[row], self.sealed[row] + full)),
                        _as_pages(keys, full, size),
                        None if values is None else _as_pages(values, full, size),
                        None if chosen is None else chosen[: full * size].unflatten(0, (full, size)),
                    )
                )
            if row in fresh:
                tail.keys[row, :, :rest] = keys[:, full * size :]
                if values is not None:
                    assert tail.values is not None
                    tail.values[row, :, :rest] = values[:, full * size :]
                if kept is not None and chosen is not None:
                    kept[row, :rest] = chosen[full * size :]
        return pages


def _as_pages(x: Tensor, num_pages: int, page_size: int) -> Tensor:
    """``[K, n, D]`` to contiguous pages ``[num_pages, K, page_size, D]``."""
    return x[:, : num_pages * page_size].unflatten(1, (num_pages, page_size)).transpose(0, 1).contiguous()
