"""`pikv plan`: its arithmetic against what a real cache allocates and sends, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import LATENT, PAGE, SHAPE, Driver, make_cache

from pikv_ds import PiKVConfig
from pikv_ds.core.cache import ModelShape
from pikv_ds.observe.metrics import wire_bytes_per_token_layer
from pikv_ds.policies.codecs import ELEMENTS
from pikv_ds.tools.cli import main
from pikv_ds.tools.plan import planner

CODECS: list[Any] = [*ELEMENTS, {"name": "int3", "values": "int1", "rotate": True, "clip": True, "scales": 8}]


@pytest.mark.parametrize("lookup", ["exact", "quest", "two_stage"])
@pytest.mark.parametrize(
    ("shape", "codec"),
    [*((SHAPE, codec) for codec in CODECS), *((LATENT, codec) for codec in ("none", "fp8", "int8", "int4", "int2"))],
    ids=str,
)
def test_memory_is_what_a_cache_allocates(codec: Any, lookup: str, shape: ModelShape, rng) -> None:
    settings = {"codec": codec, "lookup": lookup, "page_size": PAGE, "slab_pages": 4}
    shape = dataclasses.replace(shape, dtype=torch.bfloat16)
    cache = make_cache(shape, **settings, debug=False)
    batch, width = cache.new_batch(3), 12 * PAGE + 3
    for step in (width - 1, 1):
        cache.begin_step(batch, [step] * 3)
        for layer in range(shape.num_layers):
            query, key = (
                torch.randn(3 * step, heads, shape.head_dim, generator=rng, dtype=torch.float32).to(shape.dtype)
                for heads in (shape.num_heads, shape.num_kv_heads)
            )
            cache.attend(batch, layer, query, key, None if shape.latent_dim else key, 0.25)
            cache.routed(batch, layer, None)
    load = planner.Load(context=width, batch=3, ranks=1)
    made = planner.plan(shape, PiKVConfig.from_dict(settings), load)
    assert made.pages == cache.pool.page_storage_bytes
    assert made.summaries == cache.pool.summary_storage_bytes
    assert made.pages + made.tails == pytest.approx(cache.kv_bytes, rel=0.01)
    assert made.most_pages == made.pages  # one rank has it all


BUDGET = {"name": "uniform", "prompt": 0.5, "tokens": 12 * PAGE}
SEVERAL: dict[str, dict[str, Any]] = {
    "per_layer": {"codec": {"name": "per_layer", "layers": {"0": "int8"}, "default": "int4"}},
    "per_head": {"codec": {"name": "per_head", "heads": "HEADS", "retrieval": "int8", "default": "int2"}},
    "per_head, bf16": {"codec": {"name": "per_head", "heads": "HEADS", "retrieval": "none", "default": "int4"}},
    "budget": {"retention": "snap", "budget": BUDGET},
    "short budget": {"retention": "snap", "budget": {"name": "uniform", "tokens": 5 * PAGE}},
    "pyramid": {"retention": "streaming", "budget": {**BUDGET, "name": "pyramid"}, "codec": "int8"},
    "ada": {"retention": "h2o", "budget": {**BUDGET, "name": "ada"}},
    "duo": {"retention": "streaming", "budget": {"name": "duo", "heads": "HEADS", "sink": 8, "recent": 24}},
    "demote": {"retention": "snap", "budget": BUDGET, "codec": "int8", "demote": "int2"},
    "demote by layer": {
        "retention": "snap", "budget": BUDGET, "demote": "int2",
        "codec": {"name": "per_layer", "layers": {"1": "int8"}, "default": "int4"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_memory_of_several_codecs_and_budgets(name: str, tmp_path: Path, rng) -> None:
    (tmp_path / "heads.json").write_text(json.dumps({"retrieval": [[True, False], [False, False]]}))
    settings = json.loads(json.dumps(SEVERAL[name]).replace("HEADS", str(tmp_path / "heads.json")))
    settings |= {"page_size": PAGE, "slab_pages": 1}
    shape = dataclasses.replace(SHAPE, dtype=torch.bfloat16)
    cache = make_cache(shape, **settings)
    batch, width = cache.new_batch(3), 40 * PAGE + 3
    for step in (width, 1, 1):
        cache.begin_step(batch, [step] * 3)
        for layer in range(shape.num_layers):
            heads = (shape.num_heads, shape.num_kv_heads)
            query, key = (torch.randn(3 * step, n, shape.head_dim, generator=rng).to(shape.dtype) for n in heads)
            cache.attend(batch, layer, query, key, key, 0.25)
            cache.routed(batch, layer, None)
    made = planner.plan(shape, PiKVConfig.from_dict(settings), planner.Load(width, 3, 1))
    assert made.pages == pytest.approx(cache.pool.page_storage_bytes, rel=0.01)
    assert made.most_pages == made.pages


def test_memory_of_codecs_by_expert_is_the_mean_over_experts() -> None:
    codec = {"name": "per_expert", "experts": {"0": "int8"}, "default": "int4"}
    config = PiKVConfig.from_dict({"codec": codec, "page_size": PAGE})
    default, hot = planner.pages_by_format(SHAPE, config, 40 * PAGE)
    assert (default, hot) == (0.75 * 80, 0.25 * 80)  # of four experts, at two layers


def test_wire_is_the_caches_own_formula() -> None:
    cache = make_cache()
    load = planner.Load(context=1000, batch=2, ranks=1)
    assert planner.plan(SHAPE, PiKVConfig(), load).wire == wire_bytes_per_token_layer(cache) == 0
    load = planner.Load(context=1000, batch=6, ranks=3)
    per_layer = 2 * SHAPE.num_heads * (SHAPE.head_dim * 4 + SHAPE.head_dim * 4 + 4)
    assert planner.plan(SHAPE_OF_THREE, PiKVConfig(), load).wire == 2 * 2 * per_layer + 2 * 72  # and the step plan


SHAPE_OF_THREE = dataclasses.replace(SHAPE, num_experts=6)


def test_no_rank_ever_exceeds_what_is_planned_as_the_most(rng) -> None:
    """On one rank trivially; on several the cache's own checks hold every rank below this bound."""
    driver = Driver(cache := make_cache(slab_pages=1), cache.new_batch(1), rng)
    driver.step(5 * PAGE)
    made = planner.plan(SHAPE, PiKVConfig(page_size=PAGE, slab_pages=1), planner.Load(5 * PAGE, 1, 1))
    assert cache.pool.page_storage_bytes <= made.most_pages


@pytest.mark.parametrize(
    ("name", "bytes_per_token"), [("mixtral-8x7b", 131_072), ("qwen3-30b-a3b", 98_304), ("deepseek-v3", 70_272)]
)
def test_presets_take_the_bytes_that_are_known_of_them(name: str, bytes_per_token: int) -> None:
    assert planner.shape_of(name, torch.bfloat16).token_bytes == bytes_per_token


def test_shapes_come_from_a_config_json(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_local_experts": 4}))
    expected = ModelShape(3, 8, 2, 8, 4, torch.float32)
    assert planner.shape_of(str(tmp_path), torch.float32) == expected
    assert planner.shape_of(f"{tmp_path}/config.json", torch.float32) == expected
    settings |= {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "n_routed_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert planner.shape_of(str(tmp_path), torch.float32) == ModelShape(3, 8, 1, 40, 16, torch.float32, 32)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="names no num_attention_heads"):
        planner.shape_of(str(tmp_path), torch.float32)
    whole = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64, "num_local_experts": 4}
    for key in whole:
        for wrong in (-1, "8", [8], 1.5, True, 10**30):
            (tmp_path / "config.json").write_text(json.dumps(whole | {key: wrong}))
            with pytest.raises(ValueError, match=f"{key} = .*: use a whole number from 1"):
                planner.shape_of(str(tmp_path), torch.float32)
    for content in ("5", "[]", "[" * 10**5, '{"text_config": 5}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json (has no JSON object in it|cannot be read)"):
            planner.shape_of(str(tmp_path), torch.float32)


def test_baselines_count_copies() -> None:
    shape = planner.shape_of("qwen3-30b-a3b", torch.bfloat16)  # 4 KV heads
    dp, tp, dcp = planner.baselines(shape, PiKVConfig(), planner.Load(context=1024, batch=16, ranks=8))
    sequence = 1024 * shape.token_bytes
    assert (dp.total, tp.total, dcp.total) == (2 * sequence, 4 * sequence, 2 * sequence)


def test_the_largest_that_fits() -> None:
    assert planner.largest(lambda n: n <= 1000) == 1000
    assert planner.largest(lambda n: False) == 0
    assert planner.largest(lambda n: n < 2) == 1


def test_the_papers_rule_for_the_page_size() -> None:
    assert planner.page_size_rule(planner.Load(context=128 * 1024, batch=1, ranks=8)) == 32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "mixtral-8x7b", "--context", "4k", "--batch", "8", "--gib", "4"]
    files = ["--json", f"{tmp_path}/plan.json", "--plot", f"{tmp_path}/plan.png"]
    assert main([*arguments, *files]) == 0
    text = capsys.readouterr().out
    for word in ("DP attention", "TP, heads split", "p mod c", "PiKV none", "PiKV int4", "page size by"):
        assert word in text
    plans = {p["name"]: p for p in json.loads((tmp_path / "plan.json").read_text())["plans"]}
    assert plans["PiKV int4"]["total"] < 0.35 * plans["PiKV none"]["total"]
    alone = {name: p["longest_alone"] for name, p in plans.items()}
    assert alone["DP attention"] == 4 * 2**30 // 131_072
    assert alone["PiKV none"] > 3.9 * alone["DP attention"]  # at the bound; 8 times on average
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mixtral"], "--model mixtral: no preset (mixtral-8x7b"),
        (["--model", "mixtral-8x7b", "--ranks", "0"], "--ranks: 0: use a whole number"),
        (["--model", "mixtral-8x7b", "--ranks", "3"], "8 experts cannot be spread evenly over 3"),
        (["--model", "mixtral-8x7b", "--codec", "int5"], "pikv.codec = 'int5'"),
        (["--model", "mixtral-8x7b", "--codec", "{"], "write a name or a JSON object"),
        (["--model", "mixtral-8x7b", "--gib", "-1"], "--gib: -1: use a size above 0"),
        (["--model", "mixtral-8x7b", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (
            ["--model", "mixtral-8x7b", "--codec", '{"name": "per_layer", "layers": {"40": "int8"}}'],
            "names layer 40",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
