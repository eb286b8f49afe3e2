"""`SequenceBatch` against plain lists of tokens, for any way of cutting a stream into passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pikv_ds.core.sequences import NO_ROW, SequenceBatch
from pikv_ds.ops.reference import append_experts, append_tokens

PAGE, KV_HEADS, HEAD_DIM, TOP_K, LAYERS = 8, 2, 4, 2, 2
ROUTERS = (True, False)  # layer 1 has none


def token(row: int, layer: int, position: int) -> Tensor:
    """The key ``[K, D]`` of a token: different for each row, layer, position, head and channel."""
    base = ((row * LAYERS + layer) * 1000 + position) * KV_HEADS * HEAD_DIM
    return torch.arange(base, base + KV_HEADS * HEAD_DIM, dtype=torch.float32).view(KV_HEADS, HEAD_DIM)


def experts_of(row: int, position: int) -> list[int]:
    return [(row + position) % 5, -1 if position % 7 == 3 else (row + 3 * position) % 5]  # -1: dropped


@dataclass
class Stream:
    """What one sequence must have become: pages taken out so far, per layer."""

    length: int = 0
    pages: list[list[tuple[int, Tensor, Tensor, Tensor | None]]] = field(default_factory=lambda: [[], []])


def run_pass(batch: SequenceBatch, streams: list[Stream], new: list[int]) -> None:
    """One forward pass of all layers over packed tokens."""
    batch.begin(new)
    for layer in range(LAYERS):
        places = [(row, streams[row].length + i) for row, n in enumerate(new) for i in range(n)]
        keys = torch.empty(len(places), KV_HEADS, HEAD_DIM)
        experts = torch.empty(len(places), TOP_K, dtype=torch.int64)
        for i, (row, position) in enumerate(places):
            keys[i] = token(row, layer, position)
            experts[i] = torch.tensor(experts_of(row, position))
        batch.join(layer, keys, -keys)
        single = batch.singles(keys.device)
        tail, flags = batch.tail(layer, keys, -keys), torch.zeros(1, dtype=torch.int32)
        append_tokens(keys, -keys, single.places, tail.keys, tail.values, flags)
        joined = batch.fresh.get(layer, {})
        assert set(joined) == {row for row, n in enumerate(new) if n > 1}
        for row, (k, v) in joined.items():
            first = streams[row].length // PAGE * PAGE
            expected = [token(row, layer, p) for p in range(first, streams[row].length + new[row])]
            assert torch.equal(k, torch.stack(expected, dim=1))
            assert torch.equal(v, -k)
        assert single.indices.tolist() == [r for r, n in enumerate(new) if n == 1]
        assert single.lengths.tolist() == [batch.open_tokens(r) + 1 for r in single.indices.tolist()]
        if ROUTERS[layer] and any(new):
            append_experts(experts, single.places, batch.tail_experts(layer, experts))
        for pages in batch.fill(layer, experts if ROUTERS[layer] else None):
            chosen = pages.experts
            assert (chosen is None) is (not ROUTERS[layer])
            for i, row in enumerate(pages.index.tolist()):
                page = pages.keys[i].clone(), pages.values[i].clone(), None if chosen is None else chosen[i].clone()
                streams[row].pages[layer].append((int(pages.numbers[i]), *page))
        assert batch.in_step
        batch.close_layer(layer)
    assert not batch.in_step
    assert batch.fresh_nbytes == 0
    for stream, n in zip(streams, new, strict=True):
        stream.length += n


def check(batch: SequenceBatch, streams: list[Stream]) -> None:
    """Pages and tails hold every token once, in order, with its experts."""
    assert batch.lengths == [s.length for s in streams]
    assert batch.sealed == [s.length // PAGE for s in streams]
    for row, stream in enumerate(streams):
        for layer in range(LAYERS):
            assert [number for number, *_ in stream.pages[layer]] == list(range(stream.length // PAGE))
            for number, keys, values, experts in stream.pages[layer]:
                positions = range(number * PAGE, (number + 1) * PAGE)
                assert torch.equal(keys, torch.stack([token(row, layer, p) for p in positions], dim=1))
                assert torch.equal(values, -keys)
                if experts is not None:
                    assert experts.tolist() == [experts_of(row, p) for p in positions]
            tail, rest = batch.tails[layer], range(stream.length // PAGE * PAGE, stream.length)
            assert batch.open_tokens(row) == len(rest)
            for i, position in enumerate(rest):
                assert tail is not None
                assert torch.equal(tail.keys[row, :, i], token(row, layer, position))
                assert torch.equal(tail.values[row, :, i], -token(row, layer, position))
                if ROUTERS[layer]:
                    assert tail.experts is not None
                    assert tail.experts[row, i].tolist() == experts_of(row, position)


def new_batch(rows: int) -> tuple[SequenceBatch, list[Stream]]:
    batch = SequenceBatch(rows, LAYERS, PAGE)
    batch.rows = list(range(10, 10 + rows))  # as a step plan would have numbered them
    return batch, [Stream() for _ in range(rows)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_of_a_stream_gives_the_same_pages(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    batch, streams = new_batch(rows)
    counts = st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 8, 9, 20]), min_size=rows, max_size=rows)
    for new in data.draw(st.lists(counts, min_size=1, max_size=12)):
        run_pass(batch, streams, new)
        check(batch, streams)


@pytest.mark.parametrize("widths", [[1] * 21, [21], [7, 7, 7], [8, 8, 5], [20, 1], [1, 20]])
def test_some_splits_of_21_tokens(widths: list[int]) -> None:
    batch, streams = new_batch(2)
    for width in widths:
        run_pass(batch, streams, [width, width])
    assert streams[0].length == 21
    check(batch, streams)


def test_finished_sequences_stand_still() -> None:
    batch, streams = new_batch(3)
    run_pass(batch, streams, [5, 5, 5])
    assert batch.release([1]) == [11]
    assert batch.release([1]) == []  # once only
    for _ in range(6):
        run_pass(batch, streams, [1, 0, 1])
    check(batch, streams)
    assert batch.lengths == [11, 5, 11]


def test_a_sequence_that_is_named_twice_is_released_once() -> None:
    batch, _ = new_batch(2)
    assert batch.release([1, 1, 0]) == [11, 10]


def test_release_gives_the_tails_back() -> None:
    batch, streams = new_batch(2)
    assert batch.tail_nbytes == 0
    run_pass(batch, streams, [5, 5])
    keys_and_values = 2 * LAYERS * 2 * KV_HEADS * PAGE * HEAD_DIM * 4
    assert batch.tail_nbytes == keys_and_values + LAYERS * 2 * PAGE * TOP_K * 2  # int16 experts
    batch.release([0])
    assert batch.tail_nbytes > 0
    assert batch.release([0, 1]) == [11]
    assert batch.tail_nbytes == batch.fresh_nbytes == 0
    assert batch.tails == [None] * LAYERS


def test_pages_of_all_layers_at_once() -> None:
    """`fill_all` gives what `fill` gives layer by layer, for passes of single tokens."""
    batch, streams = new_batch(3)
    run_pass(batch, streams, [PAGE - 1, 3, 2 * PAGE - 1])
    batch.begin([1, 1, 1])
    for layer in range(LAYERS):
        keys = torch.stack([token(row, layer, s.length) for row, s in enumerate(streams)])
        single, tail = batch.singles(keys.device), batch.tail(layer, keys, -keys)
        append_tokens(keys, -keys, single.places, tail.keys, tail.values, torch.zeros(1, dtype=torch.int32))
        experts = torch.tensor([experts_of(row, s.length) for row, s in enumerate(streams)])
        if ROUTERS[layer]:
            append_experts(experts, single.places, batch.tail_experts(layer, experts))
        assert batch.ends_with(layer) is (layer == LAYERS - 1)
        if batch.ends_with(layer):
            pages = batch.fill_all()
        batch.close_layer(layer)
    assert pages is not None
    assert single.filling.tolist() == [0, 2]
    assert pages.routed == {layer for layer in range(LAYERS) if ROUTERS[layer]}
    for layer in range(LAYERS):
        keys, values, experts = pages.at(layer)
        for i, row in enumerate([0, 2]):
            positions = range(streams[row].length + 1 - PAGE, streams[row].length + 1)
            assert torch.equal(keys[i], torch.stack([token(row, layer, p) for p in positions], dim=1))
            assert torch.equal(values[i], -keys[i])
            if ROUTERS[layer]:
                assert experts[i].tolist() == [experts_of(row, p) for p in positions]


def test_a_pass_that_never_started_leaves_nothing() -> None:
    batch, streams = new_batch(2)
    run_pass(batch, streams, [5, 5])
    batch.begin([3, 3])
    batch.break_off()
    assert not batch.in_step
    assert batch.filling(0) == 0
    run_pass(batch, streams, [9, 9])
    check(batch, streams)


def test_a_row_is_used_again_for_a_new_sequence() -> None:
    batch, streams = new_batch(2)
    run_pass(batch, streams, [21, 1])
    batch.release([0])
    assert batch.admit() == 0
    streams[0] = Stream()
    assert batch.admit() == 2
    streams.append(Stream())
    assert (batch.rows, batch.lengths, batch.sealed) == ([NO_ROW, 11, NO_ROW], [0, 1, 0], [0, 0, 0])
    assert batch.release([2]) == []  # no plan has announced it
    assert batch.admit() == 2
    for new in ([3, 1, 0], [1, 1, 19], [9, 0, 1]):
        run_pass(batch, streams, new)
        check(batch, streams)
