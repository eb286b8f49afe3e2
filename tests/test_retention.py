"""Budgets and retention on one rank: what is kept, what is freed, and attention over the rest."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import LATENT, PAGE, Driver, make_cache, pages_of
from torch import Tensor

from pikv_ds import PiKVConfig
from pikv_ds.config import ConfigError
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.shard import bits_float, float_bits
from pikv_ds.ops.reference import gather_pages
from pikv_ds.policies.budgets import BUDGETS, AdaBudget, PyramidBudget, UniformBudget, whole_pages
from pikv_ds.policies.retention import RETENTIONS, H2oRetention, Prompt, SnapRetention, StreamingRetention

PROMPT_POLICIES = ["lru", "lru_plus", "streaming", "h2o", "tova", "snap", "chunk", "expected", "flexgen"]
HALF = {"name": "uniform", "prompt": 0.5}


def contents(cache: ExpertShardedKVCache, row: int, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[n, D]`` of each KV head that the store has of a sequence, pages first, then the tail."""
    batch = cache._batches[0]
    out = []
    for head in range(cache.shape.num_kv_heads):
        unit = layer * cache.streams + (head if cache.streams > 1 else 0)
        pages = sorted(pages_of(cache, batch.rows[row], unit))
        decoded = [decode(cache, layer, slot) for _, slot in pages]
        shape = 0, cache.layout.num_kv_heads, cache.config.page_size, cache.shape.head_dim
        keys, values = (torch.cat(x) for x in zip((torch.empty(shape), torch.empty(shape)), *decoded, strict=True))
        place = 0 if cache.streams > 1 else head
        tail, n = batch.tails[layer], batch.open_tokens(row)
        assert tail is not None
        assert tail.values is not None
        out.append(
            (
                torch.cat([keys[:, place].flatten(0, 1), tail.keys[row, head, :n].float()]),
                torch.cat([values[:, place].flatten(0, 1), tail.values[row, head, :n].float()]),
            )
        )
    return out


def decode(cache: ExpertShardedKVCache, layer: int, slot: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, K, S, D]`` of a page."""
    number = int(cache.pool.format_of(slot))
    this = cache.formats[number]
    encoded = torch.empty(1, this.size.page, dtype=torch.uint8)
    gather_pages(cache.pool.pages[number], torch.tensor([slot], dtype=torch.int32), encoded)
    keys, values = this.unseal(layer, 0, encoded)
    assert values is not None
    return keys.float(), values.float()


class Watcher:
    """A cache with budgets, driven pass by pass; attention is checked against what the store has."""

    def __init__(self, rng: torch.Generator, rows: int = 1, **settings: Any) -> None:
        self.cache = make_cache(debug=True, **settings)
        self.batch = self.cache.new_batch(rows)
        self.rng = rng

    def step(self, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One pass of `width` new tokens in each row; queries, keys and values ``[N, heads, D]`` per layer."""
        shape, rows = self.cache.shape, len(self.batch)
        before = [[contents(self.cache, r, l) for r in range(rows)] for l in range(shape.num_layers)] if (
            self.batch.lengths[0]
        ) else None  # fmt: skip
        self.cache.begin_step(self.batch, [width] * rows)
        seen = []
        for layer in range(shape.num_layers):
            if before is not None:  # what the step plan has evicted is gone by now
                before[layer] = [contents(self.cache, r, layer) for r in range(rows)]
            query, key, value = (
                torch.randn(rows * width, heads, shape.head_dim, generator=self.rng)
                for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            )
            out = self.cache.attend(self.batch, layer, query, key, value, 0.25)
            for row in range(rows):
                mine = slice(row * width, (row + 1) * width)
                for head in range(shape.num_heads):
                    kv = head // (shape.num_heads // shape.num_kv_heads)
                    old = before[layer][row][kv] if before is not None else (key[:0, kv], value[:0, kv])
                    expected = dense(query[mine, head], key[mine, kv], value[mine, kv], *old)
                    torch.testing.assert_close(out[mine, head].double(), expected, atol=1e-5, rtol=1e-5)
            self.cache.routed(
                self.batch, layer, torch.randint(shape.num_experts, (rows * width, 2), generator=self.rng)
            )
            seen.append((query, key, value))
        self.cache.check_integrity()
        return seen


def dense(query: Tensor, key: Tensor, value: Tensor, old_key: Tensor, old_value: Tensor) -> Tensor:
    """Causal attention of new tokens ``[T, D]`` over old ones and themselves, float64."""
    keys, values = torch.cat([old_key, key]).double(), torch.cat([old_value, value]).double()
    scores = query.double() @ keys.T * 0.25
    later = torch.ones(scores.shape, dtype=torch.bool).triu(len(old_key) + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("retention", PROMPT_POLICIES)
@pytest.mark.parametrize("budget", ["uniform", "pyramid", "ada"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_prompts_are_cut_to_the_budget_and_attention_is_over_the_rest(retention: str, budget: str, codec, rng) -> None:
    watcher = Watcher(rng, rows=2, codec=codec, retention=retention, budget={"name": budget, "prompt": 0.5})
    watcher.step(61)
    cache, batch = watcher.cache, watcher.batch
    for row in range(2):
        for layer in range(cache.shape.num_layers):
            kept = [len(keys) for keys, _ in contents(cache, row, layer)]
            mean = {"uniform": 1.0, "ada": 1.0, "pyramid": 1.5 - layer / (cache.shape.num_layers - 1)}[budget] * 30
            assert sum(kept) <= mean * len(kept)
            assert sum(kept) > (mean - PAGE) * len(kept)
            assert budget == "ada" or len(set(kept)) == 1
    whole = make_cache(codec=codec)
    driver = Driver(whole, whole.new_batch(2), rng, tolerance=1e-5 if codec == "none" else 0.1)
    driver.step(61)
    assert cache.pool.page_storage_bytes < 0.75 * whole.pool.page_storage_bytes  # memory, not a mask
    for width in (1, 1, 5, *[1] * 20, 21):  # decoding, a chunk, pages that fill up on the way
        watcher.step(width)
    watcher.cache.release(batch)
    watcher.cache.begin_step(None, [])
    assert watcher.cache.pool.num_used == 0


def test_each_head_keeps_its_own_best_tokens(rng) -> None:
    watcher = Watcher(rng, retention="h2o", budget=HALF)
    seen = watcher.step(48)
    for layer, (query, key, value) in enumerate(seen):
        q, k = (x.transpose(0, 1).double() for x in (query, key))
        group = q.shape[0] // k.shape[0]
        later = torch.ones(48, 48, dtype=torch.bool).triu(1)
        weights = (q @ k.repeat_interleave(group, 0).transpose(1, 2) * 0.25).masked_fill(later, -torch.inf).softmax(-1)
        received = weights.unflatten(0, (-1, group)).sum((1, 2))  # [K, n]
        for head, (keys, values) in enumerate(contents(watcher.cache, 0, layer)):
            best = received[head].topk(24).indices.sort().values
            assert torch.equal(keys, key[best, head])
            assert torch.equal(values, value[best, head])


def test_streaming_keeps_the_ends(rng) -> None:
    watcher = Watcher(rng, retention={"name": "streaming", "sink": 4}, budget=HALF)
    _, key, _ = watcher.step(67)[0]
    kept = [*range(4), *range(64 - 20, 67)]  # 24 in three pages, 3 in the tail: 27 of 33
    assert torch.equal(contents(watcher.cache, 0, 0)[1][0], key[kept, 1])


def test_chunks_are_whole_pages_of_the_text(rng) -> None:
    watcher = Watcher(rng, retention="chunk", budget=HALF)
    _, key, _ = watcher.step(80)[0]
    keys = contents(watcher.cache, 0, 0)[0][0].unflatten(0, (-1, PAGE))
    pages = key[:, 0].unflatten(0, (-1, PAGE))
    found = [next(i for i, page in enumerate(pages) if torch.equal(page, kept)) for kept in keys]
    assert found == sorted(set(found))
    assert found[0] == 0
    assert len(found) == 5


def test_duo_keeps_all_of_retrieval_heads_and_the_ends_of_the_others(rng, tmp_path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"retrieval": [[True, False], [False, False]]}))
    budget = {"name": "duo", "heads": str(path), "sink": 4, "recent": 2 * PAGE}
    watcher = Watcher(rng, retention={"name": "streaming", "sink": 4}, budget=budget)
    (_, key, _), _ = watcher.step(80)
    assert [len(keys) for keys, _ in contents(watcher.cache, 0, 0)] == [80, 2 * PAGE]
    assert torch.equal(contents(watcher.cache, 0, 0)[1][0], key[[*range(4), *range(68, 80)], 1])
    for _ in range(41):  # the last one sends the page that the one before has filled
        watcher.step(1)
    sizes = [[len(keys) for keys, _ in contents(watcher.cache, 0, layer)] for layer in range(2)]
    assert sizes[0][0] == 121
    assert all(n <= 4 * PAGE for n in (sizes[0][1], *sizes[1]))
    wrong = {"retrieval": [[True, False]]}
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="is of 1 layers with 2 KV heads, the model has 2 with 2"):
        make_cache(retention="streaming", budget=budget)


def test_ada_gives_more_to_heads_with_higher_scores(rng) -> None:
    scores = torch.rand(3, 100, generator=rng)
    scores[1] += 0.5
    limits = AdaBudget(prompt=0.3).split(30, 0, 2, 3, scores)
    assert sum(limits) == pytest.approx(90)
    assert limits[1] > 30 > limits[0]
    assert min(limits) >= 0.2 * 30


@pytest.mark.parametrize("retention", ["lru", "lru_plus", "streaming", "h2o", "tova", "snap"])
@pytest.mark.parametrize("budget", ["uniform", "pyramid", "ada"])
def test_pages_over_the_budget_are_evicted_while_decoding(retention: str, budget: str, rng) -> None:
    watcher = Watcher(rng, rows=2, retention=retention, budget={"name": budget, "tokens": 40})
    watcher.step(21)
    for _ in range(70):
        watcher.step(1)
    cache = watcher.cache
    assert cache.evictor.counters["evicted_pages"] > 0
    limit = 40 // PAGE * cache.num_units * 2
    assert cache.pool.num_used <= limit
    assert cache.pool.num_used > limit - cache.num_units * 2
    slabs = [s for s in cache.pool.pages[0].tensors if s is not None]
    fullest = limit + cache.num_units * 2 + 1  # a new page of each before the old ones go, and the null page
    assert len(slabs) <= math.ceil(fullest / cache.pool.slab_pages)


@pytest.mark.parametrize(
    "settings_", [{"retention": "h2o"}, {"retention": "flexgen", "lookup": {"name": "quest", "budget": 0.75}}], ids=str
)
def test_what_nobody_attends_to_is_evicted(settings_: dict[str, Any], rng) -> None:
    """A page of keys that no query ever meets goes, and no other does; nor does one that a lookup never reads stay."""
    cache = make_cache(debug=True, budget={"name": "uniform", "tokens": 4 * PAGE}, **settings_)
    batch, shape = cache.new_batch(1), cache.shape

    def run(width: int, unwanted: slice | None = None) -> None:
        cache.begin_step(batch, [width])
        for layer in range(shape.num_layers):
            query = torch.ones(width, shape.num_heads, shape.head_dim)
            key = torch.rand(width, shape.num_kv_heads, shape.head_dim, generator=rng)
            if unwanted is not None:
                key[unwanted] = -3.0
            value = torch.randn(key.shape, generator=rng)
            cache.attend(batch, layer, query, key, value, 1.0)
            cache.routed(batch, layer, torch.zeros(width, 2, dtype=torch.int64))

    run(4 * PAGE, slice(2 * PAGE, 3 * PAGE))
    for _ in range(PAGE + 1):
        run(1)
    for unit in range(cache.num_units):
        assert [p for p, _ in pages_of(cache, batch.rows[0], unit)] == [0, 1, 3, 4]
    assert cache.evictor.counters["evicted_pages"] == cache.num_units


def test_a_pass_that_was_broken_off_teaches_nothing(rng) -> None:
    watcher = Watcher(rng, retention="h2o", budget={"name": "uniform", "tokens": 4 * PAGE})
    watcher.step(30)
    cache, shape = watcher.cache, watcher.cache.shape
    cache.begin_step(watcher.batch, [1])
    query, key = torch.randn(1, shape.num_heads, shape.head_dim), torch.randn(1, shape.num_kv_heads, shape.head_dim)
    cache.attend(watcher.batch, 0, query, key, key, 0.25)  # and no further
    cache.release(watcher.batch)
    other = Watcher(rng, retention="h2o", budget={"name": "uniform", "tokens": 4 * PAGE})
    other.cache, other.batch = cache, cache.new_batch(1)
    for _ in range(3):
        other.step(1)
    assert cache.pool.num_used == 0


def test_a_batch_that_every_rank_has_is_refused_with_a_budget() -> None:
    cache = make_cache(retention="h2o", budget=HALF)
    with pytest.raises(ValueError, match="cannot be kept within a budget"):
        cache.new_batch(1, shared=True)


def test_latent_attention_is_refused_with_a_budget() -> None:
    with pytest.raises(ValueError, match=r'pikv\.retention = "h2o": prompts of latent attention'):
        make_cache(LATENT, retention="h2o", budget=HALF)


@given(
    st.lists(st.floats(0, 200) | st.just(math.inf), min_size=1, max_size=5),
    st.integers(0, 7),
    st.integers(0, 30),
    st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
def test_whole_pages_stay_within_what_there_is(limits: list[float], rest: int, full: int, least: int) -> None:
    counts = whole_pages(limits, rest, full, 8, least)
    assert all(min(least, full) <= n <= full for n in counts)
    if all(math.isfinite(x) for x in limits):
        total = math.floor((sum(limits) - len(limits) * rest) / 8 + 1e-9)
        assert sum(counts) == max(len(limits) * min(least, full), min(len(limits) * full, total))


@given(st.integers(1, 4), st.integers(9, 200), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_pages_of_a_prompt_do_not_depend_on_its_scores(heads: int, length: int, share: float, seed: int) -> None:
    """Other ranks know the number before the scores exist."""
    scores = torch.rand(heads, length, generator=torch.Generator().manual_seed(seed))
    for budget in (UniformBudget(share), PyramidBudget(share), AdaBudget(share)):
        mean, (full, rest) = int(length * share), divmod(length, 8)
        sums = {sum(whole_pages(budget.split(mean, 1, 4, heads, s), rest, full, 8, 1)) for s in (None, scores)}
        assert len(sums) == 1


def test_pyramids_have_the_mean_of_the_budget() -> None:
    table = [PyramidBudget(slope=0.8).split(100, layer, 7, 2, None)[0] for layer in range(7)]
    assert sum(table) == pytest.approx(700)
    assert [round(a - b, 6) for a, b in itertools.pairwise(table)] == [round(160 / 6, 6)] * 6
    assert table[0] == pytest.approx(180)


def test_snap_keeps_its_window_and_what_it_attends_to(rng) -> None:
    query, key = torch.zeros(4, 50, 16), torch.randn(2, 50, 16, generator=rng)
    query[:, -8:] = key[:, 20].repeat_interleave(2, 0)[:, None] * 4
    scores = SnapRetention(window=8, kernel=1).scores(Prompt(query, key, key, 0.25))
    assert scores[:, -8:].isinf().all()
    assert scores[:, :-8].argmax(1).tolist() == [20, 20]


def test_h2o_in_pieces_is_the_sum_of_the_columns(rng) -> None:
    query, key = torch.randn(4, 600, 16, generator=rng), torch.randn(2, 600, 16, generator=rng)
    prompt = Prompt(query, key, key, 0.25)
    whole = prompt.attention(600).mean(1).sum(1)
    torch.testing.assert_close(
        H2oRetention().scores(prompt) / H2oRetention().scores(prompt).sum(), whole / whole.sum()
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"retention": "h20"}, "pikv.retention = 'h20': did you mean \"h2o\""),
        ({"retention": "kvpress:nothing"}, "pikv.retention.press = 'nothing': choose one of"),
        ({"retention": {"name": "snap", "kernel": 4}}, "pikv.retention.kernel = 4: use an odd number"),
        ({"retention": "h2o"}, "pikv.retention = 'h2o': keeps everything without a budget"),
        ({"budget": {"name": "ada", "prompt": 0.5}}, "pikv.retention = None: a budget needs to know who goes first"),
        ({"budget": {"name": "uniform", "prompt": 0}}, "pikv.budget.prompt = 0: use the share"),
        ({"budget": {"name": "uniform", "tokens": 0}}, "pikv.budget.tokens = 0: use a whole number"),
        ({"budget": {"name": "pyramid", "slope": 2}}, "pikv.budget.slope = 2: use a number between 0"),
        ({"budget": {"name": "duo"}}, "pikv.budget.heads = ''"),
        ({"budget": {"name": "duo", "heads": "nowhere.json"}}, "pikv.budget.heads = 'nowhere.json'"),
        ({"budget": {"name": "uniform", "slope": 1}}, "pikv.budget.slope = 1: "),
    ],
)
def test_bad_settings_are_refused_by_name(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PiKVConfig.from_dict(settings_)
    assert message in str(error.value)


@pytest.mark.parametrize("name", sorted(RETENTIONS))
def test_settings_come_back(name: str) -> None:
    retention = "kvpress:knorm" if name == "kvpress" else name
    config = PiKVConfig.from_dict({"retention": retention, "budget": {"name": "ada", "prompt": 0.25}})
    assert PiKVConfig.from_dict(config.to_dict()) == config


def test_every_budget_is_named() -> None:
    assert {name for name, kind in BUDGETS.items() if kind.name == name} == set(BUDGETS)
    assert StreamingRetention.name in RETENTIONS


@given(*[st.floats(0, 2.0**120, width=32, allow_subnormal=False)] * 2)
def test_bits_have_the_order_of_their_floats(a: float, b: float) -> None:
    bits = float_bits(np.array([a, b], np.float32))
    assert bits_float(bits).tolist() == [a, b]
    assert (bits[0] < bits[1]) == (a < b)
