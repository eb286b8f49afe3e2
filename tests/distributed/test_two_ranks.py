"""Two ranks, always run: the unsharded model's tokens, the invariants, and errors on every rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import tiny
import torch
import torch.distributed as dist
from cases import Collector, Raised, Work, catching
from harness import Ranks, ranks_fixture
from torch import Tensor, nn

import pikv_ds
from pikv_ds.integrations.deepspeed import _read_gate

pytestmark = pytest.mark.distributed
ranks = ranks_fixture(2)

USUAL = (Work(2, 40, 12), Work(2, 40, 12))
UNEVEN = (Work(1, 30, 20), Work(3, 57, 9))

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
def test_equals_unsharded_model(ranks: Ranks, case: str) -> None:
    cases.assert_parity(ranks.run(cases.parity, **PARITY[case]))


# -- generate: what else people do with it ------------------------------------------------------


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


def test_finished_rows_give_their_pages_back_at_once(ranks: Ranks) -> None:
    results = ranks.run(generate_until_eos)
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
def test_a_cache_of_the_users_own_over_two_turns(ranks: Ranks, pikv: dict[str, Any]) -> None:
    for result in ranks.run(two_turns, pikv=pikv):
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


def test_a_streamer_gets_the_tokens(ranks: Ranks) -> None:
    for result in ranks.run(stream):
        assert result["streamed"] == result["tokens"]
        assert result["ended"]


# -- DeepSpeed's native MoE layers, and models that share KV without them -----------------------


class NativeMoE(nn.Module):
    """`deepspeed.moe.layer.MoE` in the place of an MLP: returns the hidden states only.

    Args:
        experts: all of them; each rank keeps its share.
    """

    def __init__(self, experts: Sequence[nn.Module], gate: Tensor, ep_size: int, k: int, rank: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            gate.shape[1],
            experts[0],
            num_experts=len(experts),
            ep_size=ep_size,
            k=k,
            drop_tokens=False,
            min_capacity=0,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        first = rank % ep_size * self.moe.num_local_experts
        for i, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            expert.load_state_dict(experts[first + i].state_dict())
        self.moe.deepspeed_moe.gate.wg.weight.data.copy_(gate)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.moe(hidden)[0]


def native(ep_size: int, k: int, moe_layers: Sequence[int], num_experts: int = 4) -> Any:
    """A Llama with native MoE layers at some layers; its weights do not depend on ``ep_size``."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for nothing
    deepspeed.init_distributed(verbose=False)
    model = tiny.llama(num_layers=4)
    generator = torch.Generator().manual_seed(1)
    for index in moe_layers:
        layer = model.model.layers[index]
        experts = []
        for _ in range(num_experts):
            expert = copy.deepcopy(layer.mlp)
            for parameter in expert.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            experts.append(expert)
        gate = torch.randn(num_experts, model.config.hidden_size, generator=generator)
        layer.mlp = NativeMoE(experts, gate, ep_size, k, dist.get_rank())
    return model.eval().requires_grad_(False)


def set_parallelism(model: nn.Module) -> None:
    """Makes the expert-parallel groups, as `deepspeed.initialize` does."""
    for module in model.modules():
        if isinstance(module, NativeMoE):
            module.moe.set_deepspeed_parallelism()


def native_parity(
    rank: int, k: int, moe_layers: Sequence[int], initialize: bool, works: Sequence[Work]
) -> dict[str, Any]:
    world = dist.get_world_size()
    model, reference = native(world, k, moe_layers), native(1, k, moe_layers)
    set_parallelism(reference)
    config = cases.settings({})["pikv"]
    if initialize:
        engine = pikv_ds.initialize(model, {"pikv": config})
    else:
        engine = model
        set_parallelism(model)
        pikv_ds.attach(engine, config)
    taken = cases.watch(cases.store_of(engine))
    result = cases.side_by_side(engine, reference, works[rank], rank)
    topology = cases.store_of(engine).topology
    return {**result, "experts": topology.num_experts, "taken": taken, "stats": pikv_ds.stats(engine)}


@pytest.mark.parametrize("initialize", [False, True], ids=["attach", "initialize"])
@pytest.mark.parametrize("k", [1, 2])
def test_native_moe_layers_among_dense_ones(ranks: Ranks, k: int, initialize: bool) -> None:
    works = UNEVEN if k == 2 else USUAL  # DeepSpeed's top-1 gate needs equal numbers of tokens
    arguments = {"k": k, "moe_layers": (1, 3), "initialize": initialize, "works": works}
    results = ranks.run(native_parity, **arguments)
    cases.assert_parity(results)
    assert [r["experts"] for r in results] == [4, 4]
    assert cases.assert_invariants([r["taken"] for r in results], 4, 4, 8) > 0


def test_native_moe_layer_with_an_empty_batch(ranks: Ranks) -> None:
    works = (Work(0, 5, 5), Work(2, 40, 10))
    results = ranks.run(native_parity, k=2, moe_layers=(0, 1, 2, 3), initialize=False, works=works)
    cases.assert_parity(results)


def test_gate_outputs_of_both_generations_of_deepspeed() -> None:
    wanted = torch.tensor([[2, 0], [1, -1], [3, 1]])  # the second token's second choice was dropped
    weights = torch.zeros(3, 4, 5)  # [tokens, experts, capacity]
    for token, expert, place, weight in [(0, 2, 1, 0.7), (0, 0, 0, 0.3), (1, 1, 4, 1.0)]:
        weights[token, expert, place] = weight
    weights[2, 3, 2], weights[2, 1, 1] = 0.6, 0.4
    four = (torch.tensor(0.0), weights, weights > 0, torch.tensor([1, 2, 1, 1]))
    assert torch.equal(_read_gate(four, 2), wanted)
    seven = (torch.tensor(0.0), 5, 4, wanted.T, None, None, None)
    assert torch.equal(_read_gate(seven, 2), wanted)
    listed = (torch.tensor(0.0), 5, 4, [wanted[:, 0], wanted[:, 1]], None, None, None)
    assert torch.equal(_read_gate(listed, 2), wanted)
    with pytest.raises(ValueError, match="gate output with 3 entries"):
        _read_gate((1, 2, 3), 2)


def attached_parity(rank: int, kind: str, works: Sequence[Work], pikv: dict[str, Any]) -> Any:
    model = cases.attached(kind, pikv)
    result = cases.side_by_side(model, tiny.MODELS[kind](), works[rank], rank)
    return {**result, "stats": pikv_ds.stats(model)}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama"])
def test_attach_to_a_model_with_all_experts_on_every_rank(ranks: Ranks, kind: str) -> None:
    pikv = {"placement": "hash"} if kind == "llama" else {}
    cases.assert_parity(ranks.run(attached_parity, kind=kind, works=UNEVEN, pikv=pikv))


def attach_without_group(rank: int) -> Raised:
    with catching() as raised:
        pikv_ds.attach(tiny.llama())
    return raised


def test_attach_must_know_the_ranks_that_share_kv(ranks: Ranks) -> None:
    for raised in ranks.run(attach_without_group):
        assert raised.kind == "UsageError"
        assert "ep_group" in raised.message


# -- the invariants that the README names -------------------------------------------------------


@pytest.mark.parametrize("placement", ["expert", "interleave", "hash"])
def test_every_page_once_and_bounded_when_one_expert_gets_90_percent(ranks: Ranks, placement: str) -> None:
    works = (Work(2, 70, 40), Work(1, 133, 40))
    results = ranks.run(cases.generate_watched, works=works, pikv={"placement": placement}, rigged=True, num_experts=8)
    cases.assert_parity(results)
    assert all(0.85 <= r["share"] <= 0.99 for r in results), [r["share"] for r in results]
    taken = [r["taken"] for r in results]
    assert cases.assert_invariants(taken, num_layers=2, num_experts=8, page_size=8) == 40 * 3 * 2
    if placement == "expert":
        assert sum(r["overflowed_pages"] for r in results[0]["stats"]["per_rank"]) > 0


@pytest.mark.parametrize("num_experts", [4, 8])
def test_every_page_once_and_bounded_with_chunks(ranks: Ranks, num_experts: int) -> None:
    works = (Work(3, 90, 20, padded=True), Work(0, 5, 5))
    pikv = {"prefill_chunk_tokens": 24}
    results = ranks.run(cases.generate_watched, works=works, pikv=pikv, rigged=False, num_experts=num_experts)
    cases.assert_parity(results)
    taken = [r["taken"] for r in results]
    assert cases.assert_invariants(taken, num_layers=2, num_experts=num_experts, page_size=8) > 100


def test_reported_bytes_are_allocated_storage(ranks: Ranks) -> None:
    works = (Work(2, 30, 20), Work(3, 57, 9))
    for result in ranks.run(cases.generate_watched, works=works, pikv={}, rigged=False):
        assert len(result["taken"]) > 10
        for state in result["taken"]:
            assert state["kv_bytes"] == state["storage"], f"pass {state['step']}"


def twice(rank: int, kind: str, pikv: Mapping[str, Any]) -> dict[str, Any]:
    engine, _ = cases.build(kind, pikv)
    outputs = [engine.module.generate(UNEVEN[rank].ids(rank), **cases.options(max_new_tokens=15)) for _ in range(2)]
    first, second = (torch.stack(o.logits) for o in outputs)
    return {"bitwise": torch.equal(first, second)}


@pytest.mark.parametrize("pikv", [{}, {"prefill_chunk_tokens": 16}, {"codec": "int8"}])
def test_same_input_gives_the_same_bits(ranks: Ranks, pikv: dict[str, Any]) -> None:
    assert all(r["bitwise"] for r in ranks.run(twice, kind="mixtral", pikv=pikv))


def wire(rank: int, lengths: Sequence[int], new: int, pikv: Mapping[str, Any]) -> dict[str, Any]:
    engine, _ = cases.build("mixtral", pikv)
    per_token, before = [], 0
    for length in lengths:
        engine.module.generate(Work(1 + rank, length).ids(rank), do_sample=False, max_new_tokens=new, pad_token_id=0)
        ranks_now = pikv_ds.stats(engine)["per_rank"]
        sent = sum(r["sent_bytes"]["query"] + r["sent_bytes"]["partial"] for r in ranks_now)
        rows, layers = 3, 2  # of all ranks; the first new token comes from the prompt's pass
        per_token.append((sent - before) / (rows * layers * (new - 1)))
        before = sent
    figures = pikv_ds.stats(engine)
    return {"per_token": per_token, "stats": figures}


@pytest.mark.parametrize("partial_dtype", ["float32", "bfloat16"])
def test_wire_bytes_do_not_grow_with_the_context(ranks: Ranks, partial_dtype: str) -> None:
    pikv = {"partial_dtype": partial_dtype}
    results = ranks.run(wire, lengths=(16, 400), new=10, pikv=pikv)
    formula = results[0]["stats"]["wire_formula_bytes"]
    partial = 4 if partial_dtype == "float32" else 2
    assert formula == 4 * (16 * (4 + partial) + 4)  # heads, head_dim, query and partial bytes, LSE
    for result in results:
        assert result["per_token"] == [formula, formula]
        assert result["stats"]["wire_bytes_per_token_layer"] == formula


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
def test_no_token_sees_a_later_one_or_another_rank(ranks: Ranks, sharded: bool, chunks: int) -> None:
    results = ranks.run(change_prompts, sharded=sharded, chunks=chunks)
    for result in results:
        assert result["earlier"] <= 1e-6
        assert result["last"] > 1e-3, "the change did not matter: the test proves nothing"
    assert results[1]["elsewhere"] > 1e-3
    assert results[0]["elsewhere"] <= 1e-6
    if not sharded:  # with sharded experts the ranks' tokens meet in one matrix product
        assert results[0]["bitwise"]


# -- codecs and lookups -------------------------------------------------------------------------


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
def test_integer_codecs_are_close_and_small(ranks: Ranks, codec: str, head_dim: int) -> None:
    model = {"head_dim": head_dim, "num_kv_heads": 2}
    exact = ranks.run(compressed, pikv={"page_size": 32}, model=model)
    coded = ranks.run(compressed, pikv={"page_size": 32, "codec": codec}, model=model)
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


def test_quest_with_the_whole_budget_is_exact(ranks: Ranks) -> None:
    exact = ranks.run(compressed, pikv={}, model={})
    quest = ranks.run(compressed, pikv={"lookup": {"name": "quest", "budget": 1.0}}, model={})
    for before, after in zip(exact, quest, strict=True):
        assert after["visited"] == 1.0
        assert cases.difference(after["logits"], before["logits"]) <= 1e-6
        assert all(size > 0 for size in after["summary_bytes"])
        assert all(size == 0 for size in before["summary_bytes"])


def test_quest_with_half_the_budget_visits_half_of_the_pages(ranks: Ranks) -> None:
    for result in ranks.run(compressed, pikv={"lookup": {"name": "quest", "budget": 0.5}}, model={}):
        assert 0.45 <= result["visited"] <= 0.6
        assert 0.0 < result["error"] < 1.0


# -- detach -------------------------------------------------------------------------------------


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


def test_detach_leaves_nothing_behind(ranks: Ranks) -> None:
    for result in ranks.run(attach_and_detach):
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


def test_detach_and_a_failed_attach_destroy_the_process_group(ranks: Ranks) -> None:
    for result in ranks.run(count_groups, times=3):
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


def test_an_engine_without_pikv_still_generates(ranks: Ranks) -> None:
    assert ranks.run(detach_engine) == [True, True]


# -- bad input: every rank raises, soon, and says why -------------------------------------------

SOON = 8.0
"""Seconds."""


def assert_raised(results: Sequence[Raised], kinds: Sequence[str], *words: str) -> None:
    """Every rank raised the named class, within seconds, with these words."""
    for rank, (raised, kind) in enumerate(zip(results, kinds, strict=True)):
        assert raised.kind == kind, f"rank {rank}: {raised}"
        assert raised.seconds < SOON, f"rank {rank}: {raised}"
        for word in words:
            assert word in raised.message, f"rank {rank}: {raised}"


def initialize_badly(rank: int, configs: Sequence[dict[str, Any]], model: dict[str, Any]) -> Raised:
    whole = tiny.mixtral(**model)
    with catching() as raised:
        pikv_ds.initialize(whole, configs[rank])
    return raised


BAD_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "unknown-key": ({"pagesize": 8}, {}, "ConfigError", ("pikv.pagesize", "page_size")),
    "page_size-12": ({"page_size": 12}, {}, "ConfigError", ("pikv.page_size = 12", "16")),
    "codec": ({"codec": "int5"}, {}, "ConfigError", ("pikv.codec", "int4")),
    "3-experts": ({}, {"num_experts": 3}, "ConfigError", ("autoep_size = 2", "3 experts")),
    "sliding-window": (
        {},
        {"sliding_window": 32},
        "UnsupportedModelError",
        ("MixtralForCausalLM", "sliding_window = 32"),
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_errors_on_every_rank(ranks: Ranks, case: str) -> None:
    pikv, model, kind, words = BAD_SETTINGS[case]
    configs = [cases.settings(pikv)] * 2
    assert_raised(ranks.run(initialize_badly, configs=configs, model=model), [kind] * 2, *words)


def test_ep_size_that_does_not_divide_the_ranks(ranks: Ranks) -> None:
    configs = [cases.settings({}, ep=3)] * 2
    results = ranks.run(initialize_badly, configs=configs, model={})
    assert_raised(results, ["ConfigError"] * 2, "autoep_size = 3", "2 rank(s)")


DIFFERENT = [("page_size", 8, 16), ("codec", "none", "int8"), ("partial_dtype", "float32", "bfloat16")]


@pytest.mark.parametrize(("key", "first", "second"), DIFFERENT, ids=[d[0] for d in DIFFERENT])
def test_ranks_with_different_settings(ranks: Ranks, key: str, first: Any, second: Any) -> None:
    configs = [cases.settings({key: value}) for value in (first, second)]
    results = ranks.run(initialize_badly, configs=configs, model={})
    assert_raised(results, ["PeerError"] * 2, key, str(first), str(second))


def generate_badly(
    rank: int,
    calls: Sequence[dict[str, Any]],
    works: Sequence[Work],
    pikv: Mapping[str, Any],
    nan_on: int | None,
    model: Mapping[str, Any],
    nan: float,
) -> dict[str, Any]:
    """A call that fails, then a good one on the same engine."""
    whole = tiny.mixtral(**model)
    reference = copy.deepcopy(whole)
    engine = pikv_ds.initialize(whole, cases.settings(pikv))
    if nan_on == rank:  # only now: DeepSpeed gives every rank the weights of the first
        engine.module.model.layers[1].self_attn.k_proj.weight[3, 5] = nan
    with catching() as raised:
        arguments = {"max_new_tokens": works[rank].new, "do_sample": False, **calls[rank]}
        engine.module.generate(works[rank].ids(rank), **arguments)
    if nan_on is not None:
        return {"raised": raised}
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    store = cases.store_of(engine)
    store.begin_step(None, [])
    return {"raised": raised, "same": after["same"], "pages": store.pool.num_used}


def run_badly(ranks: Ranks, **arguments: Any) -> list[Raised]:
    defaults: dict[str, Any] = {
        "calls": [{}, {}],
        "works": UNEVEN,
        "pikv": {},
        "nan_on": None,
        "model": {},
        "nan": torch.nan,
    }
    results = ranks.run(generate_badly, **(defaults | arguments))
    for rank, result in enumerate(results):
        if "same" in result:
            assert result["same"], f"rank {rank}: the next generate differs from the unsharded model"
            assert result["pages"] == 0, f"rank {rank}: pages were lost"
    return [result["raised"] for result in results]


FULL = ["PoolFullError"] * 2


def test_pool_too_small_for_the_prompts(ranks: Ranks) -> None:
    works = (Work(2, 300, 10), Work(1, 400, 10))
    raised = run_badly(ranks, works=works, pikv={"capacity_tokens": 256})
    assert_raised(raised, FULL, "capacity_tokens", "256")


def test_pool_too_small_while_decoding(ranks: Ranks) -> None:
    works = (Work(4, 60, 200), Work(3, 60, 200))
    raised = run_badly(ranks, works=works, pikv={"capacity_tokens": 320})
    assert_raised(raised, FULL, "capacity_tokens", "320")


def test_pool_too_small_on_chunks(ranks: Ranks) -> None:
    works = (Work(2, 60, 10), Work(1, 700, 10))
    pikv = {"capacity_tokens": 320, "prefill_chunk_tokens": 64}
    assert_raised(run_badly(ranks, works=works, pikv=pikv), FULL, "capacity_tokens")


@pytest.mark.parametrize("new", [1, 10])
def test_nan_on_one_rank(ranks: Ranks, new: int) -> None:
    works = (Work(1, 40, new), Work(1, 40, new))
    raised = run_badly(ranks, works=works, nan_on=1)
    assert_raised(raised, ["NonFiniteError"] * 2, "rank 1", "layer 1")


@pytest.mark.parametrize("new", [1, 10])
def test_keys_beyond_the_codec_on_one_rank(ranks: Ranks, new: int) -> None:
    works = (Work(1, 40, new), Work(1, 40, new))
    raised = run_badly(ranks, works=works, nan_on=1, nan=1e12, pikv={"codec": "int4"})
    assert_raised(raised, ["OutOfRangeError"] * 2, "rank 1", "layer 1", "int4")


def test_prompt_longer_than_the_context_on_one_rank(ranks: Ranks) -> None:
    works = (Work(2, 40, 8), Work(1, 200, 8))
    raised = run_badly(ranks, works=works, model={"max_position_embeddings": 128})
    assert_raised(raised, ["PeerError", "UsageError"], "rank 1", "200", "128")


REFUSED_CALLS = {
    "num_beams": {"num_beams": 2},
    "use_cache": {"use_cache": False},
    "synced_gpus": {"synced_gpus": False},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("key", REFUSED_CALLS)
def test_refused_arguments_on_both_ranks_and_on_one(ranks: Ranks, key: str) -> None:
    bad = REFUSED_CALLS[key]
    assert_raised(run_badly(ranks, calls=[bad, bad]), ["UsageError"] * 2, key)
    assert_raised(run_badly(ranks, calls=[bad, {}]), ["UsageError", "PeerError"], key, "rank 0")


def test_arguments_that_cannot_even_be_checked(ranks: Ranks) -> None:
    raised = run_badly(ranks, calls=[{"max_new_tokens": "ten"}, {}])
    assert_raised(raised, ["UsageError", "PeerError"], "rank 0: ")


def break_down(rank: int, where: str, at: int) -> dict[str, Any]:
    """Code of the user's own raises on rank 0 at one of its tokens."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    engine, reference = cases.build("mixtral", {"timeout_s": 6})
    calls = 0

    def failing(ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 0 and calls == at:
            raise KeyError("the user's own mistake")
        return torch.zeros(len(ids), dtype=torch.bool) if where == "criterion" else scores

    extra: dict[str, Any] = {
        "criterion": {"stopping_criteria": StoppingCriteriaList([failing])},
        "processor": {"logits_processor": LogitsProcessorList([failing])},
    }[where]
    with catching() as raised:
        engine.module.generate(UNEVEN[rank].ids(rank), max_new_tokens=12, do_sample=False, **extra)
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    return {"raised": raised, "same": after["same"]}


@pytest.mark.parametrize("at", [1, 3, 12])
@pytest.mark.parametrize("where", ["criterion", "processor"])
def test_an_exception_in_the_users_code_on_one_rank(ranks: Ranks, where: str, at: int) -> None:
    results = ranks.run(break_down, where=where, at=at)
    raised = [r["raised"] for r in results]
    assert_raised(raised, ["KeyError", "PeerError"], "the user's own mistake")
    assert raised[1].seconds < 4
    assert all(r["same"] for r in results)


def fail_before_a_pass(rank: int, victim: int, where: str, at: int) -> dict[str, Any]:
    """One rank raises outside of the forward passes, while the other one makes the next of them."""
    engine, reference = cases.build("mixtral", {"prefill_chunk_tokens": 16})
    work, extra, passes = (Work(1, 30, 20), Work(1, 57, 9))[rank], {}, 0

    def failing() -> None:
        raise KeyError("only here")

    def count(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == at:
            failing()

    if rank == victim:
        hook = engine.module.register_forward_pre_hook(count)
        if where == "argument":
            extra = {"only_here": 1}
        elif where == "end":
            extra = {"streamer": Collector()}
            extra["streamer"].end = failing
    with catching() as raised:
        engine.module.generate(work.ids(rank), max_new_tokens=work.new, do_sample=False, **extra)
    if rank == victim:
        hook.remove()
    after = cases.side_by_side(engine, reference, UNEVEN[rank], rank)
    store = cases.store_of(engine)
    store.begin_step(None, [])
    return {"raised": raised, "same": after["same"], "pages": store.pool.num_used}


FAILURES = {
    "unknown-argument": ("argument", 0),
    "first-chunk": ("pass", 1),  # of rank 0 an idle pass: its prompt has fewer chunks
    "between-chunks": ("pass", 3),
    "decoding": ("pass", 7),
    "after-the-loop": ("end", 0),
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("case", FAILURES)
def test_an_error_before_a_pass_of_one_rank_reaches_the_other(ranks: Ranks, case: str, victim: int) -> None:
    where, at = FAILURES[case]
    results = ranks.run(fail_before_a_pass, victim=victim, where=where, at=at)
    raised, reason = [r["raised"] for r in results], "only_here" if where == "argument" else "only here"
    assert raised[victim].kind == ("ValueError" if where == "argument" else "KeyError")
    assert raised[1 - victim].kind == "PeerError"
    assert f"rank {victim}" in raised[1 - victim].message
    assert all(reason in r.message and r.seconds < 4 for r in raised), raised
    assert all(r["same"] and r["pages"] == 0 for r in results)


def be_silent(rank: int, folder: str) -> Raised:
    """Code of the user's own takes longer than the others wait."""
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 2}))
    answered = Path(folder) / "answered"

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not answered.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    streamer = Collector(at=42, action=wait) if rank == 0 else None
    with catching() as raised:
        engine.module.generate(Work(1, 40).ids(rank), max_new_tokens=5, do_sample=False, streamer=streamer)
    answered.touch()
    pikv_ds.detach(engine)  # works with a broken group, too
    return raised


def test_a_silent_rank_is_an_error_on_the_other_after_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(2, join=False)
    try:
        results = ranks.run(be_silent, folder=str(tmp_path))
    finally:
        ranks.close()
    assert results[1].kind == "LostRankError"
    assert "timeout_s" in results[1].message
    assert 2 <= results[1].seconds < 6


def generate_until_killed(rank: int, folder: str) -> Raised:
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 5, "debug": False}))
    streamer = Collector(at=40 + 5, action=(Path(folder) / f"rank{rank}").touch)
    with catching() as raised:
        engine.module.generate(Work(1, 40).ids(rank), max_new_tokens=3000, do_sample=False, streamer=streamer)
    return raised


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_an_error_on_the_other(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(2, join=False)
    try:
        ranks.post(generate_until_killed, folder=str(tmp_path))
        deadline = time.monotonic() + 40
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) == 2, ranks.output(0) + ranks.output(1)
        ranks.kill(victim)
        killed = time.monotonic()
        results = ranks.collect(20, may_die=(victim,))
        assert time.monotonic() - killed < 12
    finally:
        ranks.close()
    raised = results[1 - victim]
    assert raised.kind in ("LostRankError", "PeerError"), raised
    assert raised.message


def fail_within_a_pass(rank: int, where: str) -> Raised:
    engine = pikv_ds.initialize(tiny.mixtral(), cases.settings({"timeout_s": 4, "prefill_chunk_tokens": 16}))

    def failing(*args: Any) -> None:
        raise MemoryError("out of memory")

    if rank == 0 and where == "step-plan":  # once the ranks have agreed on the pass
        cases.store_of(engine).sender.send = failing
    elif rank == 0:
        engine.module.model.layers[1].register_forward_pre_hook(failing)
    with catching() as raised:
        work = Work(0 if rank == 0 and where == "idle-pass" else 1, 40)
        engine.module.generate(work.ids(rank), max_new_tokens=5, do_sample=False)
    return raised


@pytest.mark.parametrize("where", ["own-pass", "idle-pass", "step-plan"])
def test_an_exception_within_a_pass_on_one_rank_ends_the_others_after_the_timeout(where: str) -> None:
    ranks = Ranks(2, join=False)
    try:
        results = ranks.run(fail_within_a_pass, where=where)
    finally:
        ranks.close()
    assert results[0].kind == "MemoryError"
    assert results[0].seconds < 6
    assert results[1].kind in ("LostRankError", "PeerError")
    assert results[1].seconds < 12
