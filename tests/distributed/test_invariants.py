"""The invariants that the README names, over two ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cases
import pytest
import tiny
import torch
from cases import UNEVEN, Work
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


@pytest.mark.parametrize("placement", ["expert", "interleave", "hash"])
def test_every_page_once_and_bounded_when_one_expert_gets_90_percent(two: Ranks, placement: str) -> None:
    works = (Work(2, 70, 40), Work(1, 133, 40))
    results = two.run(cases.generate_watched, works=works, pikv={"placement": placement}, rigged=True, num_experts=8)
    cases.assert_parity(results)
    assert all(0.85 <= r["share"] <= 0.99 for r in results), [r["share"] for r in results]
    taken = [r["taken"] for r in results]
    assert cases.assert_invariants(taken, num_layers=2, num_experts=8, page_size=8) == 40 * 3 * 2
    if placement == "expert":
        assert sum(r["overflowed_pages"] for r in results[0]["stats"]["per_rank"]) > 0


@pytest.mark.parametrize("num_experts", [4, 8])
def test_every_page_once_and_bounded_with_chunks(two: Ranks, num_experts: int) -> None:
    works = (Work(3, 90, 20, padded=True), Work(0, 5, 5))
    pikv = {"prefill_chunk_tokens": 24}
    results = two.run(cases.generate_watched, works=works, pikv=pikv, rigged=False, num_experts=num_experts)
    cases.assert_parity(results)
    taken = [r["taken"] for r in results]
    assert cases.assert_invariants(taken, num_layers=2, num_experts=num_experts, page_size=8) > 100


def test_reported_bytes_are_allocated_storage(two: Ranks) -> None:
    works = (Work(2, 30, 20), Work(3, 57, 9))
    for result in two.run(cases.generate_watched, works=works, pikv={}, rigged=False):
        assert len(result["taken"]) > 10
        for state in result["taken"]:
            assert state["kv_bytes"] == state["storage"], f"pass {state['step']}"


def twice(rank: int, kind: str, pikv: Mapping[str, Any]) -> dict[str, Any]:
    engine, _ = cases.build(kind, pikv)
    outputs = [engine.module.generate(UNEVEN[rank].ids(rank), **cases.options(max_new_tokens=15)) for _ in range(2)]
    first, second = (torch.stack(o.logits) for o in outputs)
    return {"bitwise": torch.equal(first, second)}


@pytest.mark.parametrize("pikv", [{}, {"prefill_chunk_tokens": 16}, {"codec": "int8"}])
def test_same_input_gives_the_same_bits(two: Ranks, pikv: dict[str, Any]) -> None:
    assert all(r["bitwise"] for r in two.run(twice, kind="mixtral", pikv=pikv))


def wire(rank: int, lengths: Sequence[int], new: int, pikv: Mapping[str, Any]) -> dict[str, Any]:
    engine, _ = cases.build("mixtral", pikv)
    per_token, before = [], 0
    for length in lengths:
        engine.module.generate(Work(1 + rank, length).ids(rank), do_sample=False, max_new_tokens=new, pad_token_id=0)
        ranks_now = pikv_ds.stats(engine)["per_rank"]
        sent = sum(r["sent_bytes"]["query"] + r["sent_bytes"]["partial"] for r in ranks_now)
        # Of all ranks, and each sends as many as the fullest; the first new token comes from the prompt's pass.
        rows, layers = 2 * 2, 2
        per_token.append((sent - before) / (rows * layers * (new - 1)))
        before = sent
    figures = pikv_ds.stats(engine)
    return {"per_token": per_token, "stats": figures}


@pytest.mark.parametrize("partial_dtype", ["float32", "bfloat16"])
def test_wire_bytes_do_not_grow_with_the_context(two: Ranks, partial_dtype: str) -> None:
    pikv = {"partial_dtype": partial_dtype}
    results = two.run(wire, lengths=(16, 400), new=10, pikv=pikv)
    formula = results[0]["stats"]["wire_formula_bytes"]
    partial = 4 if partial_dtype == "float32" else 2
    assert formula == 4 * (16 * (4 + partial) + 4)  # heads, head_dim, query and partial bytes, LSE
    for result in results:
        assert result["per_token"] == [formula, formula]
        assert result["stats"]["wire_bytes_per_token_layer"] == formula * 4 / 3  # of three rows, one is padded


def change_prompts(rank: int, sharded: bool, chunks: int) -> dict[str, Any]:
    """Logits of a prompt, of it with another last token, and with another prompt on rank 1."""
    if sharded:
        model = cases.build("mixtral", {})[0]
    else:
        model = cases.attached("mixtral", {})
    ids = tiny.prompt(2, 48, rank)
    later, elsewhere = ids.clone(), ids.clone()
    later[:, -1] = (later[:, -1] + 1) % tiny.VOCAB
    if rank == 1:
        elsewhere = tiny.prompt(2, 48, 99)
    pieces = [48 // chunks] * chunks
    base, changed_later, changed_elsewhere = (cases.teacher_forced(model, x, pieces) for x in (ids, later, elsewhere))
    return {
        "earlier": cases.difference(changed_later[:, :-1], base[:, :-1]),
        "last": cases.difference(changed_later[:, -1], base[:, -1]),
        "elsewhere": cases.difference(changed_elsewhere, base),
        "bitwise": torch.equal(changed_elsewhere, base),
    }


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated-experts", "sharded-experts"])
def test_no_token_sees_a_later_one_or_another_rank(two: Ranks, sharded: bool, chunks: int) -> None:
    results = two.run(change_prompts, sharded=sharded, chunks=chunks)
    for result in results:
        assert result["earlier"] <= 1e-6
        assert result["last"] > 1e-3, "the change did not matter: the test proves nothing"
    assert results[1]["elsewhere"] > 1e-3
    assert results[0]["elsewhere"] <= 1e-6
    if not sharded:  # with sharded experts the ranks' tokens meet in one matrix product
        assert results[0]["bitwise"]
