"""Codecs and lookups over two ranks: errors of logits, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cases
import pytest
import tiny
import torch
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def compressed(rank: int, pikv: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Logits of a text over sealed pages, relative to the unsharded model's, and sizes.

    A model without routers: these would make jumps of small errors.
    """
    engine = cases.attached("llama", {"placement": "hash", **pikv}, **model)
    ids = tiny.prompt(2, 160 + 24, rank)
    pieces = [160] + [1] * 24
    cache = pikv_ds.new_cache(engine)
    ours = cases.teacher_forced(engine, ids, pieces, cache)[:, 160:]
    with torch.no_grad():
        theirs = tiny.llama(**model)(ids).logits[:, 160:]
    figures = pikv_ds.stats(engine)
    return {
        "error": float((ours - theirs).norm() / theirs.norm()),
        "logits": ours,
        "page_bytes": figures["page_bytes"],
        "page_wire_bytes": figures["page_wire_bytes"],
        "visited": figures["visited_share"],
        "pool_bytes": [r["pool_bytes"] for r in figures["per_rank"]],
        "summary_bytes": [r["summary_bytes"] for r in figures["per_rank"]],
        "slab": cases.store_of(engine).config.slab_pages,
        "storage": cases.storage_bytes(cases.store_of(engine)),
        "kv_bytes": cases.store_of(engine).kv_bytes,
    }


CODEC_ERRORS = {"int8": 0.03, "int4": 0.4}
"""Bounds of the relative error of logits on random weights; measured are 0.014 and 0.22."""


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("codec", CODEC_ERRORS)
def test_integer_codecs_are_close_and_small(two: Ranks, codec: str, head_dim: int) -> None:
    model = {"head_dim": head_dim, "num_kv_heads": 2}
    exact = two.run(compressed, pikv={"page_size": 32}, model=model)
    coded = two.run(compressed, pikv={"page_size": 32, "codec": codec}, model=model)
    bits = {"int8": 8, "int4": 4}[codec]
    data = 2 * 2 * 32 * head_dim * bits // 8  # keys and values, KV heads, tokens
    scales = 2 * 2 * 2 * (head_dim + 32)  # scale and minimum, float16, KV heads, channels and tokens
    for before, after in zip(exact, coded, strict=True):
        assert before["error"] <= 1e-5
        assert 1e-4 < after["error"] <= CODEC_ERRORS[codec]
        assert before["page_bytes"] == 2 * 2 * 32 * head_dim * 4
        assert data + scales <= after["page_bytes"] <= data + scales + 4 * 15
        assert after["kv_bytes"] == after["storage"]
        for size in after["pool_bytes"]:
            assert size % (after["slab"] * after["page_bytes"]) == 0
    assert sum(coded[0]["pool_bytes"]) < 0.5 * sum(exact[0]["pool_bytes"])


def test_quest_with_the_whole_budget_is_exact(two: Ranks) -> None:
    exact = two.run(compressed, pikv={}, model={})
    quest = two.run(compressed, pikv={"lookup": {"name": "quest", "budget": 1.0}}, model={})
    for before, after in zip(exact, quest, strict=True):
        assert after["visited"] == 1.0
        assert cases.difference(after["logits"], before["logits"]) <= 1e-6
        assert all(size > 0 for size in after["summary_bytes"])
        assert all(size == 0 for size in before["summary_bytes"])


def test_quest_with_half_the_budget_visits_half_of_the_pages(two: Ranks) -> None:
    for result in two.run(compressed, pikv={"lookup": {"name": "quest", "budget": 0.5}}, model={}):
        assert 0.45 <= result["visited"] <= 0.6
        assert 0.0 < result["error"] < 1.0
