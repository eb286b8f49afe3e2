"""`generate` over several ranks: the unsharded model's tokens, whatever is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cases
import pytest
import tiny
import torch
from cases import UNEVEN, USUAL, Collector, Work
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)

PARITY: dict[str, dict[str, Any]] = {
    "mixtral-gqa": {"kind": "mixtral", "works": USUAL},
    "mixtral-mha": {"kind": "mixtral", "works": USUAL, "model": {"num_kv_heads": 4}},
    "mixtral-mqa": {"kind": "mixtral", "works": USUAL, "model": {"num_kv_heads": 1}},
    "mixtral-head_dim-24": {"kind": "mixtral", "works": USUAL, "model": {"head_dim": 24}},
    "mixtral-top-1": {"kind": "mixtral", "works": USUAL, "model": {"experts_per_token": 1}},
    "mixtral-2-experts": {"kind": "mixtral", "works": USUAL, "model": {"num_experts": 2}},
    "qwen3-head_dim-20": {"kind": "qwen3_moe", "works": USUAL, "model": {"head_dim": 20}},
    "qwen3-attention_bias": {
        "kind": "qwen3_moe",
        "works": USUAL,
        "model": {"attention_bias": True},
    },
    "qwen3-dense-layers": {
        "kind": "qwen3_moe",
        "works": USUAL,
        "model": {"num_layers": 4, "dense_layers": (0, 2)},
    },
    "page_size-32": {
        "kind": "mixtral",
        "works": (Work(2, 100, 40), Work(1, 70, 40)),
        "pikv": {"page_size": 32},
    },
    "placement-interleave": {
        "kind": "mixtral",
        "works": UNEVEN,
        "pikv": {"placement": "interleave"},
    },
    "placement-hash": {"kind": "mixtral", "works": UNEVEN, "pikv": {"placement": "hash"}},
    "not-debug": {"kind": "mixtral", "works": UNEVEN, "pikv": {"debug": False}},
    "reference-backend": {"kind": "mixtral", "works": UNEVEN, "pikv": {"backend": "reference"}},
    "chunks": {
        "kind": "mixtral",
        "works": (Work(2, 20, 10), Work(1, 90, 10)),
        "pikv": {"prefill_chunk_tokens": 16},
    },
    "chunks-padded": {
        "kind": "qwen3_moe",
        "works": (Work(3, 61, 10, padded=True), Work(2, 20, 10, padded=True)),
        "pikv": {"prefill_chunk_tokens": 16},
    },
    "chunks-odd": {
        "kind": "mixtral",
        "works": (Work(1, 64, 10), Work(2, 65, 10)),
        "pikv": {"prefill_chunk_tokens": 13},
    },
    "chunks-padding-inferred": {
        "kind": "mixtral",
        "works": (Work(3, 40, 8, True, unmasked=True), Work(2, 61, 8, True, unmasked=True)),
        "pikv": {"prefill_chunk_tokens": 16},
    },
    "padding-inferred": {
        "kind": "mixtral",
        "works": (Work(3, 40, 8, True, unmasked=True), Work(2, 61, 8, True, unmasked=True)),
    },
    "padded": {"kind": "mixtral", "works": (Work(4, 45, 12, padded=True), Work(2, 33, 12))},
    "padded-qwen3": {
        "kind": "qwen3_moe",
        "works": (Work(3, 25, 20, padded=True), Work(4, 50, 7, padded=True)),
    },
    "uneven": {"kind": "mixtral", "works": UNEVEN},
    "uneven-qwen3": {"kind": "qwen3_moe", "works": (Work(3, 18, 4), Work(1, 80, 25))},
    "one-token-prompt": {"kind": "mixtral", "works": (Work(2, 1, 30), Work(1, 40, 30))},
    "one-new-token": {"kind": "mixtral", "works": (Work(2, 40, 1), Work(1, 40, 10))},
    "empty-batch": {"kind": "mixtral", "works": (Work(2, 40, 15), Work(0, 5, 15))},
    "empty-batch-first": {"kind": "qwen3_moe", "works": (Work(0, 3, 3), Work(3, 40, 15))},
    "empty-batch-chunks": {
        "kind": "mixtral",
        "works": (Work(0, 3, 3), Work(2, 70, 12)),
        "pikv": {"prefill_chunk_tokens": 16},
    },
    "several-calls": {"kind": "mixtral", "works": UNEVEN, "calls": 3},
    "sampling": {
        "kind": "mixtral",
        "works": UNEVEN,
        "rng": 7,
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 20,
    },
    "two-return-sequences": {
        "kind": "mixtral",
        "works": USUAL,
        "rng": 3,
        "do_sample": True,
        "num_return_sequences": 2,
    },
    "two-return-sequences-padded": {
        "kind": "mixtral",
        "works": (Work(2, 40, 10, padded=True), Work(1, 30, 10)),
        "rng": 3,
        "do_sample": True,
        "num_return_sequences": 2,
    },
}


@pytest.mark.parametrize("case", PARITY)
def test_equals_unsharded_model(two: Ranks, case: str) -> None:
    cases.assert_parity(two.run(cases.parity, **PARITY[case]))


@pytest.mark.parametrize("size", [3, 8])
def test_equals_unsharded_model_and_keeps_the_invariants(size: int) -> None:
    ranks = Ranks(size)
    num_experts = {3: 6, 8: 8}[size]
    works = [Work(rank % 3, 25 + 9 * rank, 8 + rank % 4) for rank in range(size)]
    try:
        results = ranks.run(cases.generate_watched, works=works, pikv={}, num_experts=num_experts, head_dim=24)
    finally:
        ranks.close()
    cases.assert_parity(results)
    assert [r["stats"]["num_ranks"] for r in results] == [size] * size
    assert cases.assert_invariants([r["taken"] for r in results], 2, num_experts, 8) >= 60
    for result in results:
        assert all(state["kv_bytes"] == state["storage"] for state in result["taken"])


def chunked_alone_and_together(rank: int) -> bool:
    """A row's int4 tokens, whatever the others of its batch and of the other rank are."""
    model = cases.attached("mixtral", {"codec": "int4", "prefill_chunk_tokens": 16})
    ids = tiny.prompt(1, 45, rank).clamp(min=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(ids, **options)[0, -8:]
    wide = torch.cat([torch.nn.functional.pad(ids, (13 + 5 * rank, 0)), tiny.prompt(1, 58 + 5 * rank, 9).clamp(min=1)])
    together = model.generate(wide, attention_mask=(wide != 0).long(), **options)[0, -8:]
    return torch.equal(alone, together)


def test_a_rows_tokens_do_not_depend_on_its_neighbours(two: Ranks) -> None:
    assert two.run(chunked_alone_and_together) == [True, True]


# -- what else people do with it --------------------------------------------------------------


def generate_until_eos(rank: int) -> dict[str, Any]:
    engine, reference = cases.build("mixtral", {})
    work = Work(3, 40, 30)
    ids = work.ids(rank)
    plain = {"max_new_tokens": work.new, "do_sample": False, "pad_token_id": 0}
    new = reference.generate(ids, eos_token_id=None, **plain)[:, work.length :]
    rest = set(new[1:].flatten().tolist())
    eos = next(t for t in new[0, 3:15].tolist() if t not in rest)  # only row 0 comes to it
    taken = cases.watch(cases.store_of(engine))
    ours = engine.module.generate(ids, eos_token_id=eos, **plain)
    theirs = reference.generate(ids, eos_token_id=eos, **plain)
    return {
        "same": torch.equal(ours, theirs),
        "finished": int((theirs[0, work.length :] == eos).nonzero()[0]),
        "taken": taken,
        "stats": pikv_ds.stats(engine),
    }


def test_finished_rows_give_their_pages_back_at_once(two: Ranks) -> None:
    results = two.run(generate_until_eos)
    assert all(r["same"] for r in results)
    for rank, result in enumerate(results):
        after = result["finished"] + 2  # the pass after the next plan
        first = min(s["id"] for s in result["taken"][0]["own"])
        assert len(result["taken"][0]["own"]) == 3
        assert len(result["taken"][after]["own"]) == 2
        for other in results:
            assert (rank, first) in other["taken"][0]["table"]
            assert (rank, first) not in other["taken"][after]["table"]
    taken = [r["taken"] for r in results]
    assert cases.assert_invariants(taken, num_layers=2, num_experts=8, page_size=8) > 100
    figures = results[0]["stats"]["per_rank"]
    assert [f["pages"] for f in figures] == [0, 0]
    assert [f["tokens"] for f in figures] == [0, 0]


def two_turns(rank: int, pikv: Mapping[str, Any]) -> dict[str, Any]:
    engine, reference = cases.build("qwen3_moe", pikv)
    cache = pikv_ds.new_cache(engine)
    arguments = cases.options(max_new_tokens=11 + 2 * rank)
    ids = tiny.prompt(2, 30 + 5 * rank, rank).clamp(min=1)
    same, errors = [], []
    for turn in range(2):
        arguments["attention_mask"] = torch.ones_like(ids)
        ours = engine.module.generate(ids, past_key_values=cache, **arguments)
        theirs = reference.generate(ids, **arguments)
        same.append(torch.equal(ours.sequences, theirs.sequences))
        errors.append(cases.difference(ours.logits, theirs.logits))
        follow_up = tiny.prompt(2, 17 - 3 * rank, 50 + turn).clamp(min=1)
        ids = torch.cat([theirs.sequences, follow_up], dim=1)
    held = cases.store_of(engine).own_tokens
    cache.release()
    cases.store_of(engine).begin_step(None, [])
    return {
        "same": same,
        "errors": errors,
        "held": held,
        "length": 2 * (theirs.sequences.shape[1] - 1),
        "stats": pikv_ds.stats(engine),
    }


@pytest.mark.parametrize("pikv", [{}, {"prefill_chunk_tokens": 8}], ids=["whole", "chunks"])
def test_a_cache_of_the_users_own_over_two_turns(two: Ranks, pikv: dict[str, Any]) -> None:
    for result in two.run(two_turns, pikv=pikv):
        assert result["same"] == [True, True]
        assert max(result["errors"]) <= cases.TOLERANCE
        assert result["held"] == result["length"], "the last token of a turn is not in the cache"
        assert [r["pages"] for r in result["stats"]["per_rank"]] == [0, 0]


def stream(rank: int) -> dict[str, Any]:
    engine, reference = cases.build("mixtral", {})
    work, streamer = Work(1, 20 + rank, 10), Collector()
    result = cases.side_by_side(engine, reference, work, rank)
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    engine.module.generate(work.ids(rank), max_new_tokens=10, streamer=streamer, **plain)
    return {"streamed": [streamer.tokens], "tokens": result["tokens"], "ended": streamer.ended}


def test_a_streamer_gets_the_tokens(two: Ranks) -> None:
    for result in two.run(stream):
        assert result["streamed"] == result["tokens"]
        assert result["ended"]
