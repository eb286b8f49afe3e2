"""Several codecs in one cache: by layer, by KV head, by expert, and for what is over the budget.

A rotation loses nothing, so pages as they are and rotated ones are two formats over which attention stays exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from passes import LATENT, PAGE, SHAPE, Driver, make_cache, pages_of
from test_retention import Watcher, contents
from torch import Tensor

from pikv_ds import ConfigError, OutOfRangeError, PiKVConfig, PoolFullError
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.pool import PagePool, PageSize
from pikv_ds.core.table import PageTable
from pikv_ds.observe.metrics import rank_stats
from pikv_ds.ops.projections import unevenness
from pikv_ds.ops.reference import unseal_pages
from pikv_ds.policies.codecs import Codec, CodecPolicy, PerExpertCodec, PerLayerCodec

ROTATED = {"name": "none", "rotate": True}
HALF = {"name": "uniform", "prompt": 0.5}


@pytest.fixture
def heads(tmp_path: Path) -> str:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"retrieval": [[True, False], [False, True]]}))
    return str(path)


def labels(cache: ExpertShardedKVCache) -> list[list[dict[int, int]]]:
    """Pages of each format, ``[layer][head]``."""
    pool, out = cache.pool, []
    for layer in range(cache.shape.num_layers):
        out.append([])
        for stream in range(cache.streams):
            slots = [
                slot
                for row in cache.ledger.rows.tolist()
                for _, slot in pages_of(cache, row, layer * cache.streams + stream)
            ]
            formats = pool.format_of(slots).tolist()
            out[-1].append({f: formats.count(f) for f in sorted(set(formats))})
    return out


def drive(rng: torch.Generator, **settings: Any) -> ExpertShardedKVCache:
    """A prompt, single tokens, a few and many at once; attention is dense attention's."""
    cache = make_cache(**settings)
    driver = Driver(cache, cache.new_batch(2), rng)
    for width in [45, 1, 1, 3, *[1] * PAGE, 30, 1]:
        driver.step(width)
    cache.check_integrity()
    return cache


LOOKUPS = ["exact", {"name": "quest", "budget": 1.0}, {"name": "two_stage", "budget": 1.0}]


@pytest.mark.parametrize("lookup", LOOKUPS, ids=str)
def test_layers_with_codecs_of_their_own(lookup: Any, rng) -> None:
    cache = drive(rng, codec={"name": "per_layer", "layers": {"1": ROTATED}}, lookup=lookup)
    (first,), (second,) = labels(cache)
    assert set(first) == {0}
    assert set(second) == {1}
    stats = rank_stats(cache)
    assert stats["pages_by_codec"] == {"none": first[0], "none, rotated": second[1]}


@pytest.mark.parametrize("lookup", LOOKUPS, ids=str)
def test_experts_with_codecs_of_their_own(lookup: Any, rng) -> None:
    cache = drive(rng, codec={"name": "per_expert", "experts": {"1-2": ROTATED}}, lookup=lookup)
    (routed,), (dense,) = labels(cache)
    assert set(routed) == {0, 1}  # attended to one after the other, and merged
    assert set(dense) == {0}  # no router, no expert


@pytest.mark.parametrize("lookup", LOOKUPS, ids=str)
def test_heads_with_codecs_of_their_own(lookup: Any, heads: str, rng) -> None:
    codec = {"name": "per_head", "heads": heads, "retrieval": ROTATED, "default": "none"}
    cache = drive(rng, codec=codec, lookup=lookup)
    assert [[set(x) for x in layer] for layer in labels(cache)] == [[{1}, {0}], [{0}, {1}]]
    assert cache.streams == 2


def test_each_format_takes_the_bytes_of_its_codec(rng) -> None:
    cache = make_cache(codec={"name": "per_layer", "layers": {"1": "int4"}, "default": "int8"}, slab_pages=1)
    watcher = Watcher.__new__(Watcher)
    watcher.cache, watcher.batch, watcher.rng = cache, cache.new_batch(1), rng
    watcher.step(4 * PAGE)
    watcher.step(1)
    sizes = [make_cache(codec=c).layout.page_bytes for c in ("int8", "int4")]
    assert [f.layout.page_bytes for f in cache.formats] == sizes
    assert cache.pool.page_storage_bytes == 4 * sum(sizes) + sizes[0]  # and the null page
    cache.release(watcher.batch)
    cache.begin_step(None, [])
    assert cache.pool.num_used == 0


@pytest.mark.parametrize("budget", ["uniform", "pyramid", "ada"])
@pytest.mark.parametrize("retention", ["snap", "chunk", "h2o", "streaming"])
def test_what_is_over_the_budget_is_demoted_and_nothing_is_lost(budget: str, retention: str, rng) -> None:
    settings = {"name": budget, "prompt": 0.5, "tokens": 4 * PAGE}
    cache = drive(rng, demote=ROTATED, retention=retention, budget=settings)
    batch = cache._batches[0]
    assert not batch.dropped.any()
    for layer in labels(cache):
        for stream in layer:
            assert set(stream) == {0, 1}
    stats = rank_stats(cache)
    assert stats["demoted_pages"] > 0
    assert (stats["evicted_pages"], stats["dropped_pages"]) == (0, 0)
    assert stats["pages_by_codec"]["none, rotated"] == stats["demoted_pages"]
    for layer, row in itertools.product(range(2), range(2)):
        limit = cache.evictor._limits[layer * cache.streams : (layer + 1) * cache.streams]
        warm = [len(pages_of(cache, batch.rows[row], layer * cache.streams + s, 0)) for s in range(cache.streams)]
        assert sum(warm) <= sum(limit)


def test_memory_falls_to_the_smaller_codec(rng) -> None:
    """Two thirds of a prompt at a quarter of the bytes; attention is over what the pages say."""
    settings: dict[str, Any] = {"slab_pages": 1, "retention": "chunk"}
    whole, cut = (
        Watcher(rng, budget={"name": "uniform", "prompt": share}, demote=demote, **settings)
        for share, demote in ((0.999, None), ((4 * PAGE + 1) / (12 * PAGE + 1), "int8"))
    )
    for watcher in (whole, cut):
        watcher.step(12 * PAGE + 1)
        watcher.step(1)
    plain, small = (f.layout.page_bytes for f in cut.cache.formats)
    assert cut.cache.pool.page_storage_bytes == 2 * (4 * plain + 8 * small) + plain  # and the null page
    assert cut.cache.pool.num_used == 2 * 12
    assert whole.cache.pool.num_used <= 2 * 12
    first = sorted(pages_of(cut.cache, 0, 0))[0]
    assert cut.cache.pool.format_of(first[1]) == 0  # sinks stay as they are


def test_demoted_pages_are_those_of_least_attention(rng) -> None:
    cache = make_cache(retention="h2o", budget={"name": "uniform", "tokens": 3 * PAGE}, demote="int8")
    watcher = Watcher.__new__(Watcher)
    watcher.cache, watcher.batch, watcher.rng = cache, cache.new_batch(1), rng
    watcher.step(2 * PAGE)
    for _ in range(6 * PAGE + 1):
        watcher.step(1)
    for unit in range(cache.num_units):
        numbers = [[p for p, _ in pages_of(cache, 0, unit, f)] for f in range(2)]
        assert 0 in numbers[0]
        assert len(numbers[0]) <= 3
        assert sorted(numbers[0] + numbers[1]) == list(range(len(numbers[0]) + len(numbers[1])))
    assert len(contents(cache, 0, 0)[0][0]) == watcher.batch.lengths[0]


def test_a_full_pool_has_room_to_demote(rng) -> None:
    """The old page goes before the new one comes."""
    cache = make_cache(
        retention="lru", budget={"name": "uniform", "tokens": 2 * PAGE}, demote=ROTATED, capacity_tokens=6 * PAGE
    )
    driver = Driver(cache, cache.new_batch(1), rng)
    for _ in range(6 * PAGE + 1):
        driver.step(1)
    with pytest.raises(PoolFullError, match="the KV pool is full"):
        driver.step(PAGE + 1)
    assert cache.pool.num_free() == 0
    assert rank_stats(cache)["demoted_pages"] == 2 * 4  # two layers; of six pages two are warm
    cache.check_integrity()


def test_what_the_codec_of_demoted_pages_cannot_hold_is_an_error() -> None:
    cache = make_cache(codec="int8", retention="lru", budget={"name": "uniform", "tokens": 2 * PAGE}, demote="int2")
    batch = cache.new_batch(1)
    key = torch.zeros(1, 2, 16)
    while batch.lengths[0] < 2 * PAGE or not any(cache._flags):
        cache.begin_step(batch, [1])
        for layer in range(2):
            value = key.clone()
            value[0, 0, 3] = 1e6 * layer
            cache.attend(batch, layer, torch.ones(1, 4, 16), key, value, 0.25)
            cache.routed(batch, layer, None)
        assert batch.lengths[0] < 9 * PAGE
    assert batch.lengths[0] > 2 * PAGE  # int8 held it
    with pytest.raises(OutOfRangeError, match=r"values of layer 1 .*int8 holds .*, int2 holds"):
        cache.begin_step(batch, [1])


def test_what_is_decoded_stays_within_the_type() -> None:
    """The largest code may stand for a little more than the largest element."""
    (page_format,) = make_cache(dataclasses.replace(SHAPE, dtype=torch.float16), codec="int4").formats
    x = torch.linspace(-65504, 65504, PAGE)[:, None].expand(1, 2, PAGE, 16).half()
    flags = torch.zeros(1, dtype=torch.int32)
    pages = page_format.seal(0, 0, x, x, flags)
    assert unseal_pages(pages, page_format.layout)[0].max() > 65520  # would be infinity
    keys, values = page_format.unseal(0, 0, pages)
    assert not flags
    assert keys.max() == values.max() == 65504
    assert (keys.float() - x.float()).abs().max() <= 65504 / 15 + 64


def test_pages_of_a_pool_never_share_a_slab_with_another_format() -> None:
    pool = PagePool([PageSize(32), PageSize(16, 4)], slab_pages=2, capacity_pages=9)
    first, second = pool.allocate(3, 1), pool.allocate(3, 0)
    assert not {s // 2 for s in first} & {s // 2 for s in second}
    assert pool.format_of([*first, *second]).tolist() == [1] * 3 + [0] * 3
    pool.check_integrity()
    with pytest.raises(PoolFullError):  # one capacity for all formats
        pool.allocate(4, 0)
    pool.free(first)
    assert pool.summary_storage_bytes == 2 * 4  # the null page's slab
    assert set(pool.allocate(3, 0)) & {2, 3}  # what one has given back, the other takes
    pool.check_integrity()


def test_a_table_that_names_the_wrong_format_is_found() -> None:
    pool, table = PagePool([PageSize(32), PageSize(16)]), PageTable(1, num_formats=2)
    one = np.zeros(1, np.int64)
    table.append(one, one, one, one, pool.allocate(1, 1).astype(np.int64))
    with pytest.raises(AssertionError, match="another format"):
        table.check_integrity(pool)
    with pytest.raises(AssertionError, match="not here"):
        table.remove(one, one, one + 7)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"name": "per_layer", "layers": {"0-2": "int8"}}, "names layer 2, the model has 0 to 1"),
        ({"name": "per_expert", "experts": {"4": "int8"}}, "names expert 4, the model has 0 to 3"),
    ],
)
def test_codecs_of_another_model_are_refused(codec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(codec=codec)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"retrieval": [[True]]}))
    with pytest.raises(ValueError, match=r"pikv\.codec\.heads = .*the model has 2 with 2"):
        make_cache(codec={"name": "per_head", "heads": str(path)})


def test_latent_pages_by_layer(rng) -> None:
    cache = make_cache(LATENT, codec={"name": "per_layer", "layers": {"1": "int8"}})
    driver = Driver(cache, cache.new_batch(1), rng, tolerance=2e-2)  # half a step of 1/255 of the range, and some
    for width in (30, 1, 1):
        driver.step(width)
    assert cache.formats[1].layout.latent_dim == LATENT.latent_dim


def test_settings_come_back(heads: str) -> None:
    settings = {
        "codec": {
            "name": "per_head",
            "heads": heads,
            "retrieval": "none",
            "default": {"name": "int4", "rotate": True},
        },
        "retention": "snap",
        "budget": HALF,
        "demote": {"name": "int2", "rotate": True, "clip": True, "scales": 8},
    }
    config = PiKVConfig.from_dict(settings)
    assert PiKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.files() == [heads]
    assert isinstance(config.codec, CodecPolicy)
    assert PerLayerCodec(layers={"0": Codec("int8")}).settings()["layers"] == {"0": "int8"}
    assert PerExpertCodec("int8", {"0": "int8"}).codecs == (Codec("int8"),)  # no format twice
    with pytest.raises(ConfigError, match="is what pages have already"):
        PiKVConfig.from_dict(settings | {"demote": "none"})


def test_shapes_agree_over_formats() -> None:
    cache = make_cache(codec={"name": "per_layer", "layers": {"1": ROTATED}})
    assert {f.layout.page_size for f in cache.formats} == {PAGE}
    assert {f.layout.head_dim for f in cache.formats} == {SHAPE.head_dim}


# -- rotations and outlier channels ------------------------------------------------------------


def seal_prompts(keys: Tensor, codec: Any, passes: int = 2) -> ExpertShardedKVCache:
    """Two prompts with these keys ``[T, K, D]`` at layer 1."""
    cache = make_cache(codec=codec)
    for _ in range(passes):
        batch = cache.new_batch(1)
        cache.begin_step(batch, [len(keys)])
        for layer in range(2):
            mine = keys if layer else torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
            cache.attend(batch, layer, torch.ones(len(keys), 4, 16), mine, mine, 0.25)
            cache.routed(batch, layer, None)
        cache.begin_step(batch, [1])
        cache.release(batch)
    return cache


@pytest.mark.parametrize(
    ("codec", "tokens", "factor", "warns"),
    [
        ({"name": "int4", "rotate": True}, 130, 20.0, True),
        ({"name": "int4", "rotate": True}, 130, 2.0, False),
        ({"name": "int2", "values": "int8", "rotate": True}, 130, 20.0, True),
        ({"name": "per_layer", "layers": {"1": {"name": "int3", "rotate": True}}}, 130, 20.0, True),
        ({"name": "per_layer", "layers": {"0": {"name": "int3", "rotate": True}}}, 130, 20.0, False),  # not that layer
        ("int4", 130, 20.0, False),
        ({"name": "none", "rotate": True}, 130, 20.0, False),  # loses nothing
        ({"name": "int4", "rotate": True}, 100, 20.0, False),  # too few to tell
    ],
    ids=str,
)
def test_a_rotation_that_meets_outlier_channels_warns_once(codec, tokens, factor, warns, rng, caplog) -> None:
    keys = torch.randn(tokens, 2, 16, generator=rng)
    keys[:, :, 5] *= factor
    keys[:, :, 7] += 1000.0  # large, but the same for all tokens of a page
    seal_prompts(keys, codec)
    texts = [record.getMessage() for record in caplog.records if "outlier" in record.getMessage()]
    assert len(texts) == warns
    if warns:
        assert "keys of layer 1 (rank 0) have outlier channels" in texts[0]
        assert "Leave rotate out" in texts[0]


def test_channels_differ_by_the_ranges_that_codes_span() -> None:
    keys = torch.zeros(3, 2, 4, 8)
    keys[:, :, 0] = 1.0
    keys[:, 0, 0, 3] = 9.0
    keys[..., 5] += 1e3
    assert unevenness(keys) == (9 + 1) / 2
