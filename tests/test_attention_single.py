"""`ExpertShardedKVCache` on one rank, driven pass by pass, against dense attention in float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from passes import LATENT, PAGE, SHAPE, Driver, check_sizes, make_cache, memory
from torch import Tensor

from pikv_ds import ExpertShardedKVCache, NonFiniteError, OutOfRangeError, PiKVError, PoolFullError
from pikv_ds import ops as ops_module
from pikv_ds.core import sealing
from pikv_ds.core.cache import ModelShape
from pikv_ds.ops import Ops


def check_nothing_is_missing(driver: Driver) -> None:
    """Every token is there exactly once, every page was visited: nothing has been evicted or skipped."""
    cache, counters = driver.cache, driver.cache.shard.counters
    assert cache.stored_tokens == cache.own_tokens * cache.shape.num_layers
    assert cache.own_tokens == sum(rows[0].shape[2] for rows in driver.history)
    assert driver.cache.shard.pages_visited == counters["pages_in_scope"]


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


@pytest.mark.parametrize("placement", ["expert", "balanced", "hierarchical", "interleave", "hash"])
@pytest.mark.parametrize("lookup", ["exact", {"name": "quest", "budget": 1}])
def test_all_policies_that_visit_every_page_are_exact(placement: str, lookup, rng) -> None:
    driver = new_driver(rng, placement=placement, lookup=lookup)
    for width in (19, 1, 1, 12, 1):
        driver.step(width)
    check_nothing_is_missing(driver)
    assert driver.cache.shard.counters["pages_in_scope"] > 0


def test_backends_are_exact(backend: str, rng) -> None:
    driver = new_driver(rng, backend=backend)
    for width in (19, 1, 12, 1):
        driver.step(width)
    check_nothing_is_missing(driver)


@pytest.mark.parametrize("lookup", ["exact", {"name": "quest", "budget": 1}])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_latent_attention_equals_dense_attention(name: str, lookup, rng) -> None:
    if name == "cpp" and (missing := ops_module.why_missing(name, "cpu")):
        pytest.skip(missing)
    cache = make_cache(LATENT, lookup=lookup, backend=name)
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in (19, 1, 1, 12, 8, 1):
        driver.step(width)
    for _ in range(30):
        driver.mixed_pass()
    cache.begin_step(None, [])  # the pages of sequences that have left go
    check_nothing_is_missing(driver)
    assert cache.layout.page_bytes == PAGE * LATENT.head_dim * 4  # one vector per token, and nothing else


def test_latent_tokens_are_kept_once_also_in_tails_and_prompts_under_way(rng) -> None:
    cache = make_cache(LATENT)
    batch = cache.new_batch(2)
    query, key = torch.randn(40, 6, 20, generator=rng), torch.randn(40, 1, 20, generator=rng)
    cache.begin_step(batch, [20, 20])
    cache.attend(batch, 0, query, key, None, 0.25)
    assert cache.kv_bytes == key.nbytes + LATENT.num_layers * 2 * PAGE * 20 * 4  # prompts and tails
    assert LATENT.token_bytes == 2 * 20 * 4


def test_whoever_attends_to_its_prompts_itself_gets_the_rest(rng) -> None:
    def passes(attend_prompts: bool) -> list[Tensor]:
        rng, found = torch.Generator().manual_seed(5), []
        cache = make_cache(LATENT)
        batch = cache.new_batch(3)
        for new in ([0, 20, 0], [15, 1, 9], [1, 9, 0], [1, 1, 1]):  # a prompt alone; two and a token; a chunk; tokens
            cache.begin_step(batch, new)
            mine = [x for _, m in batch.prompts() for x in range(m.start, m.stop)]
            for layer in range(2):
                query, key = (torch.randn(sum(new), h, 20, generator=rng) for h in (6, 1))
                if not attend_prompts:
                    query[mine] = torch.nan
                out = cache.attend(batch, layer, query, key, None, 0.25, attend_prompts)
                found.append(out[[i for i in range(sum(new)) if i not in mine]])
                cache.routed(batch, layer, None)
        return found

    for mine, expected in zip(passes(attend_prompts=False), passes(attend_prompts=True), strict=True):
        assert torch.equal(mine, expected)


def test_latent_pages_and_backends_that_have_no_kernels_for_them(caplog, monkeypatch) -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=rf'"triton": it has no kernels for latent pages .* {device!r}'):
            Ops("triton", device, make_cache(LATENT).layout)
    if ops_module.why_missing("cpp", "cpu") is not None:
        return
    plain = {op for op in ops_module.OPS if Ops("auto").implementation(op) == "reference"}
    ops = make_cache(LATENT).ops
    assert {op for op in ops_module.OPS if ops.implementation(op) == "reference"} == plain == set()
    assert "latent" not in caplog.text
    monkeypatch.setattr(ops_module, "SPECIAL_PAGES", ())  # as with Triton alone
    for _ in range(2):
        ops = make_cache(LATENT).ops
    assert {op for op in ops_module.OPS if ops.implementation(op) == "reference"} == plain | set(
        ops_module.READ_VALUES
    )
    assert (
        caplog.text.count("latent pages (multi-head latent attention) have no kernels on device 'cpu' yet: context_")
        == 1
    )


@pytest.mark.parametrize("tokens", [2, 3])
def test_pages_travel_where_they_are_fewer_bytes_than_absorbed_queries(tokens: int) -> None:
    cache = make_cache(LATENT)
    cache.exchange.size = 2
    queries = tokens * 6 * (20 * 4 + 16 * 4 + 4)  # query out, output and log-sum-exp back
    most = 2 * queries // cache.layout.page_bytes  # half of the pages are here already
    assert cache.attention.cheaper_to_fetch(most, tokens)
    assert not cache.attention.cheaper_to_fetch(most + 1, tokens)
    cache.exchange.size = 1
    assert not cache.attention.cheaper_to_fetch(1, tokens)


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


def test_sequences_join_leave_and_advance_as_they_like(rng) -> None:
    driver = new_driver(rng, rows=1)
    cache, batch = driver.cache, driver.batch
    for _ in range(60):
        driver.mixed_pass()
    assert 1 < len(batch) <= 5  # rows have been used again
    assert cache.shard.counters["pages_in_scope"] > 0
    driver.release(list(range(len(batch))))
    cache.begin_step(None, [])
    assert (cache.pool.num_used, cache.stored_tokens) == (0, 0)
    row = driver.admit()  # also into a batch that nobody is left in
    driver.pass_of([9 if r == row else 0 for r in range(len(batch))])


def test_passes_in_and_out_of_inference_mode_take_turns(rng) -> None:
    with torch.inference_mode():
        driver = new_driver(rng)
        driver.step(20)
    driver.step(1)
    with torch.inference_mode():
        driver.admit()
        driver.pass_of([3, 1, 11])
    for _ in range(9):
        driver.step(1)
    driver.release([0, 1, 2])
    driver.cache.begin_step(None, [])


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
                q = torch.randn(2 * width, 4, 16, generator=rng)
                k, v = torch.randn(2, 2 * width, 2, 16, generator=rng).unbind(0)
                found.append(cache.attend(batch, layer, q, k, v, 0.25))
                cache.routed(batch, layer, None)
        return found

    assert all(torch.equal(a, b) for a, b in zip(outputs(), outputs(), strict=True))


# -- memory ------------------------------------------------------------------------------------


def test_bytes_in_the_middle_of_a_prompt_include_what_waits_for_the_router(rng) -> None:
    cache = make_cache()
    batch = cache.new_batch(2)
    query, kv = torch.randn(40, 4, 16, generator=rng), torch.randn(2, 40, 2, 16, generator=rng)
    cache.begin_step(batch, [20, 20])
    cache.attend(batch, 0, query, kv[0], kv[1], 0.25)
    tail = batch.tails[0]
    assert tail is not None
    assert cache.kv_bytes == cache.peak_bytes == kv.nbytes + memory([tail.keys, tail.values])
    cache.routed(batch, 0, None)
    assert cache.kv_bytes == memory([*cache.pool.pages[0].tensors, tail.keys, tail.values])
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
    assert (cache.pool.num_used, len(cache.ledger.rows), cache.stored_tokens, cache.own_tokens) == (0, 0, 0, 0)
    assert cache.kv_bytes == 4 * cache.layout.page_bytes < full  # the slab of the null page
    assert cache.pool.summary_storage_bytes == 4 * cache.pool.sizes[0].summary
    cache.check_integrity()
    check_sizes(cache)


def test_peaks_are_counted_anew_once_they_are_forgotten(rng) -> None:
    driver = new_driver(rng)
    driver.step(200)
    driver.release([0, 1])
    cache = driver.cache
    cache.forget_peaks()
    later = Driver(cache, cache.new_batch(1), rng)
    later.step(50)
    later.step(1)
    later.step(1)
    assert cache.fullest.own_tokens == 51
    assert cache.fullest.kv_bytes > 0


def test_releasing_one_sequence_leaves_the_others_exact(rng) -> None:
    driver = new_driver(rng, rows=3)
    driver.step(21, LEFT_PADDED)
    driver.step(1)
    driver.release([1])
    for width in (1, 9, 1):
        driver.step(width)
    assert driver.batch.lengths == [28, 22, 13]
    assert driver.cache.stored_tokens == 2 * (28 + 13)
    assert driver.cache.ledger.rows.tolist() == [0, 2]


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
    assert first.cache.sender.num_staged == 2
    with monkeypatch.context() as patch:  # as if other ranks' pages had taken the room
        patch.setattr(sealing, "fair_shares", lambda free, demand: [[0]])
        with pytest.raises(PoolFullError, match="2 of 2 new pages found no rank with room"):
            first.step(1)
    check_sizes(first.cache)
    assert first.cache.sender.num_staged == 2
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
        q, kv = torch.randn(4, 4, 16, generator=rng), torch.randn(2, 4, 2, 16, generator=rng)
        if layer == 1:
            kv[1, 2, 0, 3] = bad
        cache.attend(batch, layer, q, kv[0], kv[1], 0.25)
        cache.routed(batch, layer, None)
    with pytest.raises(NonFiniteError, match="keys or values of layer 1"):
        cache.begin_step(batch, [1])
    cache.release(batch)
    Driver(cache, cache.new_batch(1), rng).step(20)  # the cache itself goes on


def seal_and_look(cache: ExpertShardedKVCache, key: Tensor, value: Tensor) -> None:
    """A prompt of two pages and a token with these keys and values ``[17, K, D]`` at layer 1, then another pass."""
    batch = cache.new_batch(1)
    cache.begin_step(batch, [17])
    for layer in range(2):
        mine = (key, value) if layer == 1 else (torch.ones_like(key), torch.ones_like(value))
        cache.attend(batch, layer, torch.ones(17, 4, 16, dtype=key.dtype), *mine, 0.25)
        cache.routed(batch, layer, None)
    try:
        cache.begin_step(batch, [1])
    finally:
        cache.release(batch)


@pytest.mark.parametrize(
    ("codec", "bound", "words"),
    [
        ("int8", 3e7, r'int8 holds int8 from -65,504 on, .* to 16,703,520\); use "fp8" or "none" there'),
        ("int4", 3e6, "int4 holds int4 from -65,504 on, the largest less the smallest to 982,560"),
        ("int2", 3e5, "int2 from -65,504 on, the largest less the smallest to 196,512"),
        ("int1", 1e5, "int1 from -65,504 on, the largest less the smallest to 65,504"),
        ("int8", -66000.0, "int8 from -65,504 on"),
        ("fp8", 3e7, r'fp8 holds fp8 to 29,345,792\); use "none" there'),
        ({"name": "int4", "scales": 8}, 6000.0, r"int4 to 5,884, .* to 3,677\); use one with 16-bit scales or"),
        ({"name": "int4", "values": "int2"}, 3e5, "int4/int2 holds int4 .*; int2"),
        ({"name": "none", "values": "int2"}, 3e5, "int2"),
        ({"name": "per_layer", "layers": {"0": "none"}, "default": "int2"}, 3e5, "int2 holds"),
        ({"name": "int2", "rotate": True}, 3e6, "int2, rotated holds .* without rotate"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_keys_beyond_a_codec_are_reported_as_what_they_are(codec: Any, bound: float, words: str, backend: str) -> None:
    cache = make_cache(codec=codec, backend=backend)
    key, value = torch.zeros(17, 2, 16), torch.zeros(17, 2, 16)
    value[3, 1, 5] = bound
    with pytest.raises(OutOfRangeError, match=f"values of layer 1 .rank 0. are finite, but beyond .*{words}"):
        seal_and_look(cache, key, value)
    seal_and_look(cache, key, value / 1e4)  # the cache goes on, and these it holds


def test_what_the_type_holds_codec_none_holds() -> None:
    x = torch.zeros(17, 2, 16)
    x[2, 0, 3], x[16] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max  # sealed, and in the tail
    seal_and_look(make_cache(), torch.ones_like(x), x)


def test_coefficients_beyond_float16_are_no_infinity_of_the_model() -> None:
    shape = dataclasses.replace(SHAPE, dtype=torch.float16)
    value = torch.full((17, 2, 16), 6e4).half()  # rotated, four times as large in one channel
    for codec in ("none", "int8"):
        with pytest.raises(OutOfRangeError, match=rf"{codec}, rotated holds .* without rotate"):
            seal_and_look(make_cache(shape, codec={"name": codec, "rotate": True}), torch.ones_like(value), value)
        seal_and_look(make_cache(shape, codec=codec), torch.ones_like(value), value)
    value[0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        seal_and_look(make_cache(shape, codec={"name": "none", "rotate": True}), torch.ones_like(value), value)


def test_keys_beyond_a_summary_are_reported_as_what_they_are() -> None:
    cache = make_cache(lookup={"name": "two_stage", "budget": 0.5})
    key = torch.zeros(17, 2, 16)
    key[9, 1, 2] = 1e9
    with pytest.raises(OutOfRangeError, match=r'keys of layer 1 .* beyond what the summaries of pikv.lookup.*"exact"'):
        seal_and_look(cache, key, torch.zeros_like(key))
    seal_and_look(cache, key / 1e4, torch.zeros_like(key))
    seal_and_look(make_cache(lookup={"name": "quest", "budget": 0.5}), key, torch.zeros_like(key))


def test_an_error_of_this_rank_is_raised_and_the_batch_stays_usable(rng) -> None:
    driver = new_driver(rng)
    driver.step(10)
    with pytest.raises(PiKVError, match="the batch has 3"):
        driver.cache.begin_step(driver.batch, [0, 0], error="the batch has 3")
    driver.step(9)
    check_nothing_is_missing(driver)
