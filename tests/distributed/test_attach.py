"""Attach and detach over two ranks, and whose a cache is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cases
import pytest
import tiny
import torch
import torch.distributed as dist
from cases import UNEVEN, Raised, Work, catching
from harness import Ranks, ranks_fixture

import pikv_ds

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def attached_parity(rank: int, kind: str, works: Sequence[Work], pikv: dict[str, Any]) -> Any:
    model = cases.attached(kind, pikv)
    result = cases.side_by_side(model, tiny.MODELS[kind](), works[rank], rank)
    return {**result, "stats": pikv_ds.stats(model)}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama"])
def test_attach_to_a_model_with_all_experts_on_every_rank(two: Ranks, kind: str) -> None:
    pikv = {"placement": "hash"} if kind == "llama" else {}
    cases.assert_parity(two.run(attached_parity, kind=kind, works=UNEVEN, pikv=pikv))


def attach_without_group(rank: int) -> Raised:
    with catching() as raised:
        pikv_ds.attach(tiny.llama())
    return raised


def test_attach_must_know_the_ranks_that_share_kv(two: Ranks) -> None:
    for raised in two.run(attach_without_group):
        assert raised.kind == "UsageError"
        assert "ep_group" in raised.message


def attach_and_detach(rank: int) -> dict[str, Any]:
    model = tiny.mixtral()
    ids = tiny.prompt(2, 40, rank)
    before = cases.fingerprint(model)
    with torch.no_grad():
        logits = model(ids).logits
    pikv_ds.attach(model, {"page_size": 8}, ep_group=cases.world_group())
    state_while_attached = list(model.state_dict())
    with catching() as again:
        pikv_ds.attach(model, ep_group=cases.world_group())
    model.generate(ids, max_new_tokens=4, do_sample=False)
    pikv_ds.detach(model)
    pikv_ds.detach(model)
    with torch.no_grad():
        same = torch.equal(model(ids).logits, logits)
    after = cases.fingerprint(model)
    plain = {"max_new_tokens": 8, "do_sample": False, "synced_gpus": False}
    tokens = torch.equal(model.generate(ids, **plain), tiny.mixtral().generate(ids, **plain))
    with catching() as no_stats:
        pikv_ds.stats(model)
    pikv_ds.attach(model, {"page_size": 8}, ep_group=cases.world_group())  # and once more
    third = cases.side_by_side(model, tiny.mixtral(), UNEVEN[rank], rank)
    return {
        "before": before,
        "after": after,
        "state_while_attached": state_while_attached,
        "again": again,
        "no_stats": no_stats,
        "same": same and tokens and third["same"],
    }


def test_detach_leaves_nothing_behind(two: Ranks) -> None:
    for result in two.run(attach_and_detach):
        assert result["after"] == result["before"]
        assert result["state_while_attached"] == result["before"]["state"]
        assert result["same"]
        assert result["again"].kind == "UsageError"
        assert "already attached" in result["again"].message
        assert "not attached" in result["no_stats"].message


def count_groups(rank: int, times: int) -> dict[str, Any]:
    """Process groups that this rank knows: at first, after each attach, and after each detach or failure."""
    groups = dist.distributed_c10d._world.pg_map
    model, ids = tiny.mixtral(), tiny.prompt(2, 40, rank)
    start, attached, detached, failed = len(groups), [], [], []
    for _ in range(times):
        pikv_ds.attach(model, {"page_size": 8}, ep_group=cases.world_group())
        attached.append(len(groups) - start)
        same = torch.equal(
            model.generate(ids, max_new_tokens=8, do_sample=False),
            tiny.mixtral().generate(ids, max_new_tokens=8, do_sample=False, synced_gpus=False),
        )
        pikv_ds.detach(model)
        detached.append(len(groups) - start)
        with catching() as raised:  # found only when the ranks compare
            pikv_ds.attach(model, {"page_size": 8 * (rank + 1)}, ep_group=cases.world_group())
        failed.append((raised.kind, len(groups) - start))
    return {"attached": attached, "detached": detached, "failed": failed, "same": same}


def test_detach_and_a_failed_attach_destroy_the_process_group(two: Ranks) -> None:
    for result in two.run(count_groups, times=3):
        assert result["attached"] == [1, 1, 1]
        assert result["detached"] == [0, 0, 0]
        assert result["failed"] == [("PeerError", 0)] * 3
        assert result["same"]


def detach_engine(rank: int) -> bool:
    engine, reference = cases.build("mixtral", {})
    pikv_ds.detach(engine)
    ids = UNEVEN[rank].ids(rank)
    plain = {"max_new_tokens": 8 + rank, "do_sample": False}
    ours = engine.module.generate(ids, synced_gpus=True, **plain)
    return torch.equal(ours, reference.generate(ids, synced_gpus=False, **plain))


def test_an_engine_without_pikv_still_generates(two: Ranks) -> None:
    assert two.run(detach_engine) == [True, True]


def foreign_cache(rank: int, who: tuple[int, ...], how: str) -> dict[str, Any]:
    """Some ranks take a cache into a model that it is not of; the others make the right pass."""
    owner, other = cases.attached("mixtral", {}), tiny.mixtral()
    ids = tiny.prompt(1, 20, rank).clamp(min=1)
    cache = pikv_ds.new_cache(owner)
    with torch.no_grad():
        owner(ids, past_key_values=cache)
        with catching() as raised:
            if how == "generate":
                own = pikv_ds.new_cache(cases.attached("mixtral", {}) if rank in who else owner)
                if rank not in who:
                    cases.attached("mixtral", {})  # which is collective
                owner.generate(ids, past_key_values=own, max_new_tokens=3)
            else:
                (other if rank in who else owner)(ids[:, :3], past_key_values=cache)
        with catching() as after:
            owner.generate(ids, max_new_tokens=3)
    return {"raised": raised, "after": after}


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("who", [(0, 1), (1,)])
def test_another_models_cache_is_an_error_of_all_ranks(two: Ranks, who: tuple[int, ...], how: str) -> None:
    words = {
        "forward": "another model was given a cache of the Mixtral",
        "generate": "not a cache of this MixtralForCausalLM",
    }
    for result in two.run(foreign_cache, who=who, how=how):
        assert words[how] in result["raised"].message
        assert result["after"].kind == ""
