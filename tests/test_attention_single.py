"""`ExpertShardedKVCache` on one rank, driven pass by pass, against dense attention in float64."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pikv_ds import (
    ExpertShardedKVCache,
    NonFiniteError,
    PiKVConfig,
    PiKVError,
    PoolFullError,
    sealing,
)
from pikv_ds.cache import ModelShape
from pikv_ds.pages import POISON_BYTE
from pikv_ds.sequences import SequenceBatch

PAGE = 8
SHAPE = ModelShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, dtype=torch.float32)
ROUTERS = (True, False)  # layer 1 is dense
GARBAGE = 1e3  # keys and values at padding


def make_cache(shape: ModelShape = SHAPE, **settings) -> ExpertShardedKVCache:
    return ExpertShardedKVCache(
        shape, PiKVConfig.from_dict({"page_size": PAGE, "debug": True, "slab_pages": 4} | settings)
    )


@dataclass
class Driver:
    """Runs forward passes with random queries, keys and values, and remembers them for dense attention."""

    cache: ExpertShardedKVCache
    batch: SequenceBatch
    rng: torch.Generator
    tolerance: float = 1e-5
    """Float32 against float64: sums of a few hundred terms of order one, merged from partials."""
    history: list[list[list[Tensor]]] = field(default_factory=list)  # [row][layer] = keys and values [2, K, n, D]

    def __post_init__(self) -> None:
        shape = self.cache.shape
        empty = torch.empty(2, shape.num_kv_heads, 0, shape.head_dim, dtype=shape.dtype)
        self.history = [[empty] * shape.num_layers for _ in range(len(self.batch))]

    def step(self, width: int, mask: Sequence[Sequence[int]] | None = None) -> None:
        """One pass over ``width`` columns; ``mask [B][width]`` says which are tokens."""
        shape, rows = self.cache.shape, len(self.batch)
        alive = torch.tensor(self.batch.alive)
        tokens = alive[:, None].expand(rows, width) if mask is None else torch.tensor(mask).bool() & alive[:, None]
        self.cache.begin_step(
            self.batch, tokens.sum(1).tolist(), None if mask is None and (all(alive) or width == 1) else tokens
        )
        for layer in range(shape.num_layers):
            query = torch.randn(rows, shape.num_heads, width, shape.head_dim, generator=self.rng).to(shape.dtype)
            kv = torch.randn(2, rows, shape.num_kv_heads, width, shape.head_dim, generator=self.rng).to(shape.dtype)
            kv.masked_fill_(~tokens[None, :, None, :, None], GARBAGE)
            experts = torch.randint(shape.num_experts, (rows, width, 2), generator=self.rng)
            out = self.cache.attend(self.batch, layer, query, kv[0], kv[1], 0.25)
            assert out.shape == (rows, width, shape.num_heads, shape.head_dim)
            assert out.dtype == shape.dtype
            for row in range(rows):
                columns = tokens[row]
                assert (out[row, ~columns] == 0).all()
                self.history[row][layer] = torch.cat([self.history[row][layer], kv[:, row][:, :, columns]], dim=2)
                expected = dense(query[row][:, columns], *self.history[row][layer], 0.25)
                torch.testing.assert_close(
                    out[row, columns].double(), expected, atol=self.tolerance, rtol=self.tolerance
                )
            self.cache.routed(self.batch, layer, experts if ROUTERS[layer] else None, kv[0])
        check_sizes(self.cache)

    def release(self, rows: list[int]) -> None:
        self.cache.release(self.batch, rows)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries ``[H, T, D]`` over keys ``[K, N, D]``: float64 ``[T, H, D]``."""
    group, t, n = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scale
    later = torch.ones(t, n, dtype=torch.bool).triu(n - t + 1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)


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
            *cache.pool.slabs.tensors,
            *(x for t in tails for x in (t.keys, t.values, t.experts)),
            *(p.payload for p in cache.sender.staged),
        ]
    )
    slots = torch.cat([s for s in cache.pool.slabs.tensors if s is not None] or [torch.empty(0, 1, dtype=torch.uint8)])
    pages = int((slots != POISON_BYTE).any(1).sum())  # unused slots are poisoned
    assert cache.pool.num_used == cache.table.num_pages() == pages
    open_tokens = sum(b.open_tokens(r) * layers for b in batches for r in range(len(b)) if b.alive[r])
    assert cache.stored_tokens == (pages + len(cache.sender.staged)) * PAGE + open_tokens


def check_nothing_is_missing(driver: Driver) -> None:
    """Every token is there exactly once, every page was visited: nothing has been evicted or skipped."""
    cache, counters = driver.cache, driver.cache.attention.counters
    assert cache.stored_tokens == cache.own_tokens * cache.shape.num_layers
    assert cache.own_tokens == sum(rows[0].shape[2] for rows in driver.history)
    assert driver.cache.attention.pages_visited == counters["pages_in_scope"]


def new_driver(rng: torch.Generator, rows: int = 2, tolerance: float = 1e-5, **settings) -> Driver:
    cache = make_cache(**settings)
    return Driver(cache, cache.new_batch(rows), rng, tolerance)


LEFT_PADDED = [[0] * 5 + [1] * 16, [1] * 21, [0] * 20 + [1]]


@pytest.mark.parametrize(
    "widths", [[1] * 30, [5], [8], [40], [40, 1, 1], [21] + [1] * 20, [7, 8, 9, 1, 2], [16, 16, 16, 1]]
)
def test_prompts_chunks_and_decoding_equal_dense_attention(widths: list[int], rng) -> None:
    driver = new_driver(rng)
    for width in widths:
        driver.step(width)
    check_nothing_is_missing(driver)


@pytest.mark.parametrize("placement", ["expert", "interleave", "hash"])
@pytest.mark.parametrize("lookup", ["exact", {"name": "quest", "budget": 1}])
def test_all_policies_that_visit_every_page_are_exact(placement: str, lookup, rng) -> None:
    driver = new_driver(rng, placement=placement, lookup=lookup)
    for width in (19, 1, 1, 12, 1):
        driver.step(width)
    check_nothing_is_missing(driver)
    assert driver.cache.attention.counters["pages_in_scope"] > 0


def test_backends_are_exact(backend: str, rng) -> None:
    driver = new_driver(rng, backend=backend)
    for width in (19, 1, 12, 1):
        driver.step(width)
    check_nothing_is_missing(driver)


def test_padding_on_the_left(rng) -> None:
    driver = new_driver(rng, rows=3)
    driver.step(21, LEFT_PADDED)
    for _ in range(20):
        driver.step(1)
    assert driver.batch.lengths == [36, 41, 21]
    check_nothing_is_missing(driver)


def test_padding_anywhere_and_in_every_chunk(rng) -> None:
    driver = new_driver(rng, rows=3)
    for width in (20, 9, 1, 13, 1, 1):
        mask = (torch.rand(3, width, generator=rng) < 0.6).int()
        mask[0] = 1
        mask[2, : width // 2] = 0
        driver.step(width, mask.tolist())
    check_nothing_is_missing(driver)


def test_a_chunk_without_tokens_for_any_row(rng) -> None:
    driver = new_driver(rng)
    driver.step(10)
    driver.step(4, [[0] * 4] * 2)
    driver.step(1, [[0], [1]])
    driver.step(1)
    assert driver.batch.lengths == [11, 12]
    check_nothing_is_missing(driver)


def test_batches_do_not_see_each_other(rng) -> None:
    first = new_driver(rng)
    second = Driver(first.cache, first.cache.new_batch(3), rng)
    first.step(19)
    second.step(30)
    for width in (1, 1, 9, 1):
        first.step(width)
        second.step(width)
    first.cache.check_integrity()
    assert first.cache.own_tokens == 2 * 31 + 3 * 42
    assert first.cache.stored_tokens == first.cache.own_tokens * 2


def test_bfloat16_output_is_rounded_once_or_twice(rng) -> None:
    shape = ModelShape(2, 4, 2, 16, 4, torch.bfloat16)
    cache = make_cache(shape)
    # Partials are float32; torch's own prompt attention rounds weights to bfloat16 (2^-9) as well.
    driver = Driver(cache, cache.new_batch(2), rng, tolerance=2**-7)
    for width in (19, 1, 9, 1):
        driver.step(width)
    check_nothing_is_missing(driver)


def test_the_same_passes_give_the_same_bits() -> None:
    def outputs() -> list[Tensor]:
        rng = torch.Generator().manual_seed(3)
        cache = make_cache(debug=False)
        batch, found = cache.new_batch(2), []
        for width in (30, 1, 9, 1):
            cache.begin_step(batch, [width, width])
            for layer in range(2):
                q = torch.randn(2, 4, width, 16, generator=rng)
                k, v = torch.randn(2, 2, 2, width, 16, generator=rng).unbind(0)
                found.append(cache.attend(batch, layer, q, k, v, 0.25))
                cache.routed(batch, layer, None, k)
        return found

    assert all(torch.equal(a, b) for a, b in zip(outputs(), outputs(), strict=True))


# -- memory ------------------------------------------------------------------------------------


def test_bytes_in_the_middle_of_a_prompt_include_what_waits_for_the_router(rng) -> None:
    cache = make_cache()
    batch = cache.new_batch(2)
    query, kv = torch.randn(2, 4, 20, 16, generator=rng), torch.randn(2, 2, 2, 20, 16, generator=rng)
    cache.begin_step(batch, [20, 20])
    cache.attend(batch, 0, query, kv[0], kv[1], 0.25)
    assert cache.kv_bytes == kv.nbytes
    assert cache.peak_bytes == kv.nbytes
    cache.routed(batch, 0, None, kv[0])
    tail = batch.tails[0]
    assert tail is not None
    assert cache.kv_bytes == memory([*cache.pool.slabs.tensors, tail.keys, tail.values])
    assert cache.peak_bytes > kv.nbytes  # pages, tail and prompt were there at once


def test_release_frees_everything(rng) -> None:
    driver = new_driver(rng, lookup={"name": "quest", "budget": 1})
    cache = driver.cache
    for width in (60, 1, 1, 1, 1):  # the last one fills a page, which stays staged
        driver.step(width)
    assert cache.sender.staged
    full = cache.kv_bytes
    driver.release([0, 1])
    assert cache.sender.staged == []
    assert cache.stored_tokens == cache.pool.num_used * PAGE
    cache.begin_step(None, [])  # pages go with the next step plan
    assert (cache.pool.num_used, cache.table.num_pages(), cache.stored_tokens, cache.own_tokens) == (0, 0, 0, 0)
    assert cache.sender.num_sealed == {}
    assert cache.kv_bytes == 4 * cache.layout.page_bytes < full  # the slab of the null page
    assert cache.pool.summary_storage_bytes == 4 * cache.pool.summary_bytes
    cache.check_integrity()
    check_sizes(cache)


def test_releasing_one_sequence_leaves_the_others_exact(rng) -> None:
    driver = new_driver(rng, rows=3)
    driver.step(21, LEFT_PADDED)
    driver.step(1)
    driver.release([1])
    for width in (1, 9, 1):
        driver.step(width)
    assert driver.batch.lengths == [28, 22, 13]
    assert driver.cache.stored_tokens == 2 * (28 + 13)
    assert driver.cache.table.sequences() == [(0, 0), (0, 2)]


def test_memory_of_finished_sequences_is_used_again(rng) -> None:
    cache = make_cache(capacity_tokens=64, watermark=0.0)
    for _ in range(5):
        driver = Driver(cache, cache.new_batch(1), rng)
        driver.step(64)
        assert cache.pool.num_free() == 0
        driver.release([0])
    cache.begin_step(None, [])
    assert cache.pool.num_free() == 16


# -- what does not fit, what is broken ---------------------------------------------------------


def test_a_full_pool_raises_and_evicts_nothing(rng) -> None:
    driver = new_driver(rng, rows=1, capacity_tokens=40, watermark=0.0)
    cache = driver.cache
    driver.step(33)
    other = Driver(cache, cache.new_batch(1), rng)
    with pytest.raises(PoolFullError, match=r"2 free.*raise pikv\.capacity_tokens from 40 to at least"):
        other.step(16)
    cache.check_integrity()
    other.step(7)  # fits into the tail
    for _ in range(7):
        driver.step(1)  # up to the last page, exact as before
    check_sizes(cache)
    assert cache.stored_tokens == 2 * (40 + 7)
    with pytest.raises(PoolFullError):
        driver.step(8)
    assert cache.stored_tokens == 2 * (40 + 7)


@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("length", [401, 4096])
def test_the_capacity_that_the_error_asks_for_is_enough(watermark: float, length: int) -> None:
    def begin(capacity: int) -> None:
        cache = make_cache(capacity_tokens=capacity, watermark=watermark)
        cache.begin_step(cache.new_batch(1), [length])

    with pytest.raises(PoolFullError) as error:
        begin(200)
    wanted = re.search(r"at least (\d+)", str(error.value))
    assert wanted is not None
    begin(int(wanted[1]))


def test_the_reserve_is_for_running_sequences(rng) -> None:
    driver = new_driver(rng, rows=1, capacity_tokens=80, watermark=0.2)
    driver.step(64)
    late = Driver(driver.cache, driver.cache.new_batch(1), rng)
    with pytest.raises(PoolFullError):
        late.step(8)
    for _ in range(16):
        driver.step(1)
    assert driver.batch.lengths == [80]


def test_pages_that_find_no_owner_wait_for_the_next_try(rng, monkeypatch) -> None:
    first = new_driver(rng)
    second = Driver(first.cache, first.cache.new_batch(1), rng)
    first.step(7)
    second.step(7)
    first.step(1)
    second.step(1)
    first.step(8)
    for _ in range(8):
        second.step(1)
    assert len(first.cache.sender.staged) == 2
    with monkeypatch.context() as patch:  # as if other ranks' pages had taken the room
        patch.setattr(sealing, "choose_owner", lambda *args: None)
        with pytest.raises(PoolFullError, match="2 of 2 new pages found no rank with room"):
            first.step(1)
    check_sizes(first.cache)
    assert len(first.cache.sender.staged) == 2
    first.step(1)
    second.step(1)
    first.cache.check_integrity()
    assert first.cache.stored_tokens == 2 * (2 * 17 + 17)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_not_finite_are_reported_with_their_layer(bad: float, rng) -> None:
    cache = make_cache()
    batch = cache.new_batch(1)
    cache.begin_step(batch, [4])
    for layer in range(2):
        q, kv = torch.randn(1, 4, 4, 16, generator=rng), torch.randn(2, 1, 2, 4, 16, generator=rng)
        if layer == 1:
            kv[1, 0, 0, 2, 3] = bad
        cache.attend(batch, layer, q, kv[0], kv[1], 0.25)
        cache.routed(batch, layer, None, kv[0])
    with pytest.raises(NonFiniteError, match="keys or values of layer 1"):
        cache.begin_step(batch, [1])
    cache.release(batch)
    Driver(cache, cache.new_batch(1), rng).step(20)  # the cache itself goes on


@pytest.mark.parametrize("idle", ["padding", "finished", "waiting"])
def test_what_is_no_token_may_be_anything(idle: str, rng) -> None:
    """NaN in padding columns, in the row of a finished sequence, and in a pass that only serves others."""
    cache = make_cache()
    batch = cache.new_batch(2)
    if idle == "finished":
        cache.release(batch, [1])
    tokens = torch.tensor([[True] * 4, [False] * 3 + [True]]) if idle == "padding" else None
    new = {"padding": [4, 1], "finished": [4, 0], "waiting": [0, 0]}[idle]

    def make_pass(bad: float) -> None:
        cache.begin_step(batch, list(new), tokens)
        for layer in range(2):
            q, kv = torch.randn(2, 4, 4, 16, generator=rng), torch.randn(2, 2, 2, 4, 16, generator=rng)
            kv[1, 1, 0, 2, 3] = bad
            if idle == "waiting":
                kv[0, 0] = bad
            cache.attend(batch, layer, q, kv[0], kv[1], 0.25)
            cache.routed(batch, layer, None, kv[0])

    make_pass(torch.nan)
    make_pass(torch.inf)
    cache.begin_step(None, [])


def test_a_broken_off_pass_makes_its_batch_unusable(rng) -> None:
    cache = make_cache()
    batch = cache.new_batch(1)
    cache.begin_step(batch, [10])
    q, kv = torch.randn(1, 4, 10, 16, generator=rng), torch.randn(2, 1, 2, 10, 16, generator=rng)
    cache.attend(batch, 0, q, kv[0], kv[1], 0.25)
    cache.routed(batch, 0, None, kv[0])  # layer 1 never runs
    for _ in range(2):  # every time, not only the first
        with pytest.raises(PiKVError, match="broken off; release it"):
            cache.begin_step(batch, [1])
    cache.release(batch)
    other = Driver(cache, cache.new_batch(2), rng)
    other.step(20)
    assert cache.stored_tokens == 2 * 2 * 20


def test_an_error_of_this_rank_is_raised_and_the_batch_stays_usable(rng) -> None:
    driver = new_driver(rng)
    driver.step(10)
    with pytest.raises(PiKVError, match="the batch has 3"):
        driver.cache.begin_step(driver.batch, [0, 0], error="the batch has 3")
    driver.step(9)
    check_nothing_is_missing(driver)
