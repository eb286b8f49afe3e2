"""Expert-parallel groups on four ranks: one of four, and two of two that share a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import tiny
import torch
from cases import Raised, Work, catching
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
four = ranks_fixture(4)

UNEVEN = (Work(2, 40, 14), Work(1, 75, 9), Work(3, 20, 20, padded=True), Work(1, 33, 5))
IDLE = (Work(0, 5, 5), Work(2, 64, 10), Work(0, 2, 2), Work(1, 30, 16))

PARITY: dict[str, dict[str, Any]] = {
    "mixtral": {"kind": "mixtral", "works": UNEVEN},
    "qwen3-dense-layers": {
        "kind": "qwen3_moe",
        "works": UNEVEN,
        "model": {"head_dim": 20, "num_layers": 3, "dense_layers": (1,)},
    },
    "interleave": {"kind": "mixtral", "works": UNEVEN, "pikv": {"placement": "interleave"}},
    "hash": {"kind": "mixtral", "works": UNEVEN, "pikv": {"placement": "hash"}},
    "chunks": {"kind": "mixtral", "works": UNEVEN, "pikv": {"prefill_chunk_tokens": 16}},
    "idle-ranks": {"kind": "mixtral", "works": IDLE},
    "one-expert-each": {"kind": "qwen3_moe", "works": UNEVEN, "model": {"num_experts": 4}},
}


@pytest.mark.sampled
@pytest.mark.parametrize("ep", [4, 2])
@pytest.mark.parametrize("case", PARITY)
def test_equals_unsharded_model(four: Ranks, case: str, ep: int) -> None:
    results = four.run(cases.parity, ep=ep, **PARITY[case])
    for first in range(0, 4, ep):
        cases.assert_parity(results[first : first + ep])
    assert [r["stats"]["num_ranks"] for r in results] == [ep] * 4


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("works", [UNEVEN, IDLE])
def test_part_of_an_expert_group_shares_its_kv(four: Ranks, works: tuple[Work, ...], size: int) -> None:
    results = four.run(cases.parity, kind="mixtral", works=works, pikv={"group_size": size})
    for result in results:
        assert result["same"]
        assert result["error"] <= cases.TOLERANCE
        assert result["stats"]["num_ranks"] == size
        assert (result["stats"]["page_wire_bytes"] > 0) == (size > 1)


def groups(rank: int, sizes: Sequence[int]) -> str:
    with catching() as raised:
        cases.build("mixtral", {"group_size": sizes[rank]})
    return raised.message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 3, 3, 3), "group_size = 3: the expert-parallel group has 4 ranks; use one of [1, 2, 4]"),
        ((2, 2, 4, 2), "no rank can be in two groups"),
    ],
)
def test_groups_that_cannot_be(four: Ranks, sizes: tuple[int, ...], message: str) -> None:
    for text in four.run(groups, sizes=sizes):
        assert message in text


@pytest.mark.parametrize("ep", [4, 2])
def test_every_page_once_and_bounded_when_one_expert_gets_90_percent(four: Ranks, ep: int) -> None:
    works = (Work(1, 70, 25), Work(2, 133, 25), Work(1, 40, 25), Work(1, 200, 25))
    results = four.run(cases.generate_watched, works=works, pikv={}, rigged=True, ep=ep)
    for first in range(0, 4, ep):
        group = results[first : first + ep]
        cases.assert_parity(group)
        taken = [r["taken"] for r in group]
        sequences = sum(w.rows for w in works[first : first + ep])
        assert cases.assert_invariants(taken, 2, 8, 8) == 25 * sequences * 2
        assert sum(r["overflowed_pages"] for r in group[0]["stats"]["per_rank"]) > 0
    assert all(0.85 <= r["share"] <= 0.99 for r in results)
    for result in results:
        assert all(state["kv_bytes"] == state["storage"] for state in result["taken"])


def test_wire_bytes_equal_the_formula(four: Ranks) -> None:
    figures = four.run(cases.parity, kind="mixtral", works=(Work(1, 40, 10),) * 4)[0]["stats"]
    assert figures["wire_formula_bytes"] == 3 * 4 * (16 * (4 + 4) + 4)  # peers, heads
    assert figures["wire_bytes_per_token_layer"] == figures["wire_formula_bytes"]


def fill_one_group(rank: int, works: Sequence[Work]) -> dict[str, Any]:
    engine, reference = cases.build("mixtral", {"capacity_tokens": 128}, ep=2)
    with catching() as raised:
        engine.module.generate(works[rank].ids(rank), max_new_tokens=40, do_sample=False)
    after = cases.side_by_side(engine, reference, Work(1, 20 + rank, 5 + rank), rank)
    return {"raised": raised, "same": after["same"]}


def test_a_full_pool_in_one_group_ends_the_other_groups_call_too(four: Ranks) -> None:
    works = (Work(1, 40), Work(1, 40), Work(1, 500), Work(2, 300))
    results = four.run(fill_one_group, works=works)
    raised: list[Raised] = [r["raised"] for r in results]
    assert [r.kind for r in raised] == ["PeerError"] * 2 + ["PoolFullError"] * 2
    assert all("capacity_tokens" in r.message and r.seconds < 8 for r in raised)
    assert all(r["same"] for r in results)


def fail_in_one_group(rank: int) -> dict[str, Any]:
    engine, reference = cases.build("mixtral", {}, ep=2)
    extra = {"only_here": 1} if rank == 2 else {}
    with catching() as raised:
        engine.module.generate(UNEVEN[rank].ids(rank), max_new_tokens=12, do_sample=False, **extra)
    after = cases.side_by_side(engine, reference, Work(1, 20 + rank, 5 + rank), rank)
    return {"raised": raised, "same": after["same"]}


def test_an_error_before_the_first_pass_of_one_rank_reaches_both_groups(four: Ranks) -> None:
    results = four.run(fail_in_one_group)
    raised: list[Raised] = [r["raised"] for r in results]
    assert [r.kind for r in raised] == ["PeerError", "PeerError", "ValueError", "PeerError"]
    assert all("only_here" in r.message and r.seconds < 8 for r in raised)
    assert all(r["same"] for r in results)


def prefill_slowly(rank: int, seconds: float) -> dict[str, Any]:
    engine, reference = cases.build("mixtral", {"timeout_s": 2, "prefill_chunk_tokens": 16}, ep=2)
    work = Work(1, 64, 5)

    def wait(*args: Any) -> None:
        if rank < 2:
            time.sleep(seconds)

    hook = engine.module.register_forward_pre_hook(wait)
    with catching() as raised:
        ours = engine.module.generate(work.ids(rank), max_new_tokens=work.new, do_sample=False)
    hook.remove()
    theirs = reference.generate(work.ids(rank), max_new_tokens=work.new, do_sample=False, synced_gpus=False)
    return {"raised": raised, "same": not raised.kind and torch.equal(ours, theirs)}


def test_a_long_prefill_of_one_group_is_no_error_in_the_other() -> None:
    ranks = Ranks(4, join=False)
    try:
        results = ranks.run(prefill_slowly, seconds=1.0)  # 4 chunks: longer than the timeout
    finally:
        ranks.close()
    for result in results:
        assert result["same"], result["raised"]
        assert result["raised"].seconds > 4


def different_models(rank: int) -> Raised:
    with catching() as raised:
        model = tiny.mixtral(num_layers=3 if rank == 2 else 2)
        pikv_ds.attach(model, {}, ep_group=cases.world_group())
    return raised


def test_a_rank_with_another_model(four: Ranks) -> None:
    for raised in four.run(different_models):
        assert raised.kind == "PeerError"
        assert "ranks 0 and 2" in raised.message
        assert "num_layers" in raised.message
