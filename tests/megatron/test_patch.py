"""PiKV under Megatron's attention: the same tokens, each page once, nothing left when it is gone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

import tiny_megatron
from harness import Ranks, ranks_fixture

import megatron_patch
from megatron_patch import compat, engine
from megatron_patch.checks import REFUSED, UnsupportedMegatronError
from pikv_ds.config import ConfigError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model lives on a CPU")
two = ranks_fixture(2, "megatron")

CONFIG = {"page_size": 8, "debug": True, "slab_pages": 4, "timeout_s": 20}
PROMPTS = [[3, 1, 4, 1, 5], [(7 * i) % 100 for i in range(84)], [9]]
COUNT = 30
SHAPE = {"max_requests": 4, "max_tokens": 256, "context_length": 160}


class Ids:
    """A tokenizer for prompts that are ids already."""

    vocab_size, eod, bos = tiny_megatron.VOCAB, 1, None

    def tokenize(self, ids: list[int]) -> list[int]:
        return ids

    def detokenize(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def offsets(self, ids: list[int], text: str) -> list[int]:
        return list(range(len(ids)))


def sampling(count: int = COUNT) -> Any:
    return engine.greedy(count)


def dynamic(model: Any, prompts: list[list[int]], **changes: Any) -> tuple[Any, list[list[int]]]:
    """A dynamic engine's context and tokens."""
    made = tiny_megatron.dynamic_engine(model, Ids(), **{**SHAPE, **changes})
    records = made.generate(prompts, sampling())
    return made.context, [list(r.merge().generated_tokens) for r in records]


@torch.inference_mode()
def static(model: Any, prompts: torch.Tensor, count: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A static context, tokens and logits of a batch ``[b, s]`` of one length, step by step."""
    from megatron.core.inference.contexts import StaticInferenceContext

    rows, start = prompts.shape
    context = StaticInferenceContext(rows, start + count)
    ids, logits, at = prompts, [], 0
    while ids.shape[1] < start + count:
        new = ids[:, at:]
        size = new.shape[1]
        positions = torch.arange(at, at + size)[None].expand(rows, -1)
        mask = torch.ones(size, size, dtype=torch.bool).triu(1)[None, None] if size > 1 else None
        out = model(new, positions, mask, inference_context=context, runtime_gather_output=True)[:, -1]
        context.increment_sequence_len_offset(size)
        context.enable_decode_mode()
        at += size
        logits.append(out)
        ids = torch.cat([ids, out.argmax(-1, keepdim=True)], dim=1)
    return context, ids, torch.stack(logits, dim=1)


def prompts_of(seed: int, rows: int = 2, length: int = 37) -> torch.Tensor:
    return torch.randint(tiny_megatron.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> Iterator[Any]:
    tiny_megatron.initialize()
    model = tiny_megatron.build()
    yield model
    megatron_patch.unpatch_model(model)


def left(model: Any) -> int:
    """Pages in the rank's pool once the finished requests' have been returned."""
    megatron_patch.flush(model)
    cache = megatron_patch.attachment_of(model).cache
    cache.check_integrity()
    return cache.pool.num_used


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        pytest.param({}, {}, id="usual"),
        pytest.param({"max_tokens": 64}, {}, id="a prompt in chunks"),
        pytest.param({"max_requests": 1}, {}, id="one after the other"),
        pytest.param({}, {"lookup": {"name": "quest", "budget": 1}}, id="quest"),
        pytest.param({}, {"capacity_tokens": 400, "watermark": 0.0}, id="few pages"),
    ],
)
def test_a_dynamic_context_gives_the_tokens_of_a_model_without_cache(
    model: Any, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    expected = [tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS]
    megatron_patch.patch_model(model, CONFIG | config)
    context, tokens = dynamic(model, PROMPTS, **changes)
    assert tokens == expected
    assert context.memory_buffer.nbytes == 0
    figures = megatron_patch.stats(model)["per_rank"][0]
    assert figures["seals"] > 0
    assert figures["pages_visited"] == figures["pages_in_scope"] > 0
    assert left(model) == 0
    assert dynamic(model, PROMPTS[:1])[1] == expected[:1]  # a second engine on the same model


def test_a_static_context_allocates_no_buffer_and_gives_the_same_logits(model: Any) -> None:
    prompts = prompts_of(0)
    own, ids, logits = static(model, prompts, COUNT)
    assert len(own.key_value_memory_dict) == tiny_megatron.LAYERS
    megatron_patch.patch_model(model, CONFIG)
    context, patched_ids, patched_logits = static(model, prompts, COUNT)
    assert torch.equal(ids, patched_ids)
    torch.testing.assert_close(logits, patched_logits, atol=1e-5, rtol=1e-5)
    assert context.key_value_memory_dict == {}
    cache = megatron_patch.attachment_of(model).cache
    assert cache.own_tokens == 2 * (37 + COUNT - 1)
    context.reset()  # a new batch takes the place of the old one
    static(model, prompts_of(1, rows=3), 2)
    del context
    assert left(model) == cache.own_tokens == 0


def test_a_static_context_that_jumps_is_refused(model: Any) -> None:
    from pikv_ds import PiKVError

    megatron_patch.patch_model(model, CONFIG)
    context, ids, _ = static(model, prompts_of(0), 3)
    context.increment_sequence_len_offset(5)
    message = r"continues 2 sequences at token 44, but the cache has \(2, 39\)"
    with torch.inference_mode(), pytest.raises(PiKVError, match=message):
        model(ids[:, -1:], torch.tensor([[44], [44]]), None, inference_context=context)


def test_static_and_dynamic_engines_of_megatron(model: Any) -> None:
    expected = [tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS]
    megatron_patch.patch_model(model, CONFIG)
    requests = tiny_megatron.static_engine(model, Ids()).generate(prompts=PROMPTS, sampling_params=sampling())
    assert [[int(i) for i in request.generated_tokens] for request in requests] == expected


def test_megatrons_static_engine_that_is_made_of_the_dynamic_one(model: Any) -> None:
    """It asks for CUDA graphs, which a patched model's engine goes without."""
    from megatron.core.inference.engines import StaticInferenceEngine

    megatron_patch.patch_model(model, CONFIG)
    inner = tiny_megatron.dynamic_engine(model, Ids(), **SHAPE)
    with pytest.warns(DeprecationWarning, match="StaticInferenceEngine"):
        served = StaticInferenceEngine(inner.controller, max_batch_size=4, buffer_size_gb=0.01, legacy=False)
    assert not served.legacy
    assert served.dynamic_engine.context.memory_buffer.nbytes == 0
    results = served.dynamic_engine.generate(PROMPTS, sampling(COUNT))
    assert [list(r.merge().generated_tokens) for r in results] == [
        tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS
    ]


def test_patching_twice_changes_nothing_and_unpatching_leaves_nothing(model: Any) -> None:
    from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
        AbstractModelInferenceWrapper as Wrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController as Controller,
    )

    names = "dummy_forward", "async_generate_output_tokens_dynamic_batch"
    methods = Wrapper.__dict__[names[0]], Controller.__dict__[names[1]]
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    prompts = prompts_of(0)
    _, _, logits = static(model, prompts, 5)

    assert megatron_patch.patch_model(model, CONFIG) is model
    attachment = megatron_patch.attachment_of(model)
    megatron_patch.patch_model(model, CONFIG)
    assert megatron_patch.attachment_of(model) is attachment
    assert list(model.state_dict()) == keys
    context, _ = dynamic(model, PROMPTS[:1])
    other = tiny_megatron.build()
    megatron_patch.patch_model(other, CONFIG)

    megatron_patch.unpatch_model(model)
    assert before == {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    assert hooks == {name: len(m._forward_hooks) for name, m in model.named_modules()}
    assert not [name for name in vars(context) if "pikv" in name]
    assert context.memory_buffer.nbytes > 0
    assert torch.equal(static(model, prompts, 5)[2], logits)  # the same bits
    with pytest.raises(ValueError, match="PiKV is not under this model"):
        megatron_patch.stats(model)
    megatron_patch.unpatch_model(model)
    assert Wrapper.__dict__[names[0]] is not methods[0]  # the other model needs it still
    megatron_patch.unpatch_model(other)
    assert (Wrapper.__dict__[names[0]], Controller.__dict__[names[1]]) == methods


def test_a_patched_model_without_a_context_is_megatrons(model: Any) -> None:
    expected = tiny_megatron.greedy(model, PROMPTS[0], 5)
    megatron_patch.patch_model(model, CONFIG)
    assert tiny_megatron.greedy(model, PROMPTS[0], 5) == expected
    assert megatron_patch.attachment_of(model).cache.num_steps == 0
    model.train()
    ids = prompts_of(0)
    mask = torch.ones(37, 37, dtype=torch.bool).triu(1)[None, None]
    model(ids, torch.arange(37)[None].expand(2, -1), mask, labels=ids).mean().backward()
    assert all(p.grad is not None for p in model.decoder.layers[0].self_attention.parameters())


def test_a_patched_spec_builds_a_patched_model() -> None:
    tiny_megatron.initialize()
    plain = tiny_megatron.build()
    patched = tiny_megatron.build(spec=lambda spec: megatron_patch.patch_layer_spec(spec, CONFIG))
    assert type(patched.decoder.layers[0]) is type(plain.decoder.layers[0])
    assert list(patched.state_dict()) == list(plain.state_dict())
    prompts = prompts_of(0)
    expected, got = (static(m, prompts, COUNT)[1] for m in (plain, patched))
    assert torch.equal(expected, got)
    assert megatron_patch.stats(patched)["seals"] > 0
    assert dynamic(patched, PROMPTS)[1] == [tiny_megatron.greedy(plain, p, COUNT) for p in PROMPTS]
    megatron_patch.unpatch_model(patched)
    assert not [m for m in patched.modules() if any("pikv" in name for name in vars(m))]


def test_transformer_engines_spec_builds_a_patched_model() -> None:
    if not compat.has_transformer_engine():
        pytest.skip("Transformer Engine is not installed here: its layers run unpatched and patched elsewhere only")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec as te_spec

    tiny_megatron.initialize()
    layer = te_spec(num_experts=tiny_megatron.EXPERTS, moe_grouped_gemm=False)
    plain = tiny_megatron.build(spec=lambda _: layer)
    patched = tiny_megatron.build(spec=lambda _: megatron_patch.patch_layer_spec(layer, CONFIG))
    patched.load_state_dict(plain.state_dict())
    assert torch.equal(*(static(m, prompts_of(0), COUNT)[1] for m in (plain, patched)))
    megatron_patch.unpatch_model(patched)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_parallel_size", 2),
        ("pipeline_model_parallel_size", 2),
        ("sequence_parallel", True),
        ("flash_decode", True),
        ("window_size", (128, 0)),
        ("softmax_type", "learnable"),
        ("apply_query_key_layer_scaling", True),
        ("cuda_graph_impl", "local"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(model: Any, key: str, value: Any, monkeypatch) -> None:
    assert key in REFUSED
    monkeypatch.setattr(model.config, key, value)
    with pytest.raises(UnsupportedMegatronError, match=f"{key} = "):
        megatron_patch.patch_model(model, CONFIG)
    monkeypatch.undo()
    assert not [m for m in model.modules() if any("pikv" in name for name in vars(m))]


def test_a_retention_that_wants_hugging_face_is_refused(model: Any) -> None:
    pytest.importorskip("kvpress")
    settings = {"retention": "kvpress:knorm", "budget": {"name": "uniform", "prompt": 0.5}}
    with pytest.raises(ConfigError, match=r"pikv.retention = .*knorm.* choose another retention"):
        megatron_patch.patch_model(model, CONFIG | settings)
    assert not [m for m in model.modules() if any("pikv" in name for name in vars(m))]


def test_a_pool_that_could_never_hold_a_request_is_refused(model: Any) -> None:
    megatron_patch.patch_model(model, CONFIG | {"capacity_tokens": 120})
    with pytest.raises(ConfigError, match=r"max_sequence_length = 160 a rank may have to keep 208"):
        tiny_megatron.dynamic_engine(model, Ids(), **SHAPE)


def test_the_command_line_option(tmp_path: Path) -> None:
    import argparse

    parser = megatron_patch.add_arguments(argparse.ArgumentParser())
    assert megatron_patch.config_from_args(parser.parse_args([])) is None
    for text in ('{"page_size": 64}', '{"pikv": {"page_size": 64}, "zero_optimization": {}}'):
        (tmp_path / "c.json").write_text(text)
        config = megatron_patch.config_from_args(parser.parse_args(["--pikv-config", str(tmp_path / "c.json")]))
        assert config is not None
        assert config.page_size == 64
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        megatron_patch.config_from_args(parser.parse_args(["--pikv-config", "nowhere.json"]))


# -- two ranks -------------------------------------------------------------------------------------


def static_batches(rank: int, same: bool, choice: str) -> dict[str, Any]:
    tiny_megatron.initialize()
    model = tiny_megatron.build()
    prompts = prompts_of(0 if same else rank)
    _, ids, logits = static(model, prompts, COUNT)
    megatron_patch.patch_model(model, CONFIG, static_batches=choice)
    context, patched, patched_logits = static(model, prompts, COUNT)
    figures = megatron_patch.stats(model)
    del context
    result = {
        "same": torch.equal(ids, patched),
        "error": float((logits - patched_logits).abs().max() / logits.abs().max()),  # sums in another order
        "sent": figures["per_rank"][rank]["sent_bytes"],
        "held": [r["peak_pages"] for r in figures["per_rank"]],
        "left": left(model),
    }
    megatron_patch.unpatch_model(model)
    return result


SEALED = 2 * tiny_megatron.LAYERS * ((37 + COUNT - 1) // 8)  # pages of the two sequences


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("same", "choice", "shared"),
    [(True, "auto", True), (False, "auto", False), (True, "own", False), (True, "shared", True)],
)
def test_static_batches_on_two_ranks(two: Ranks, same: bool, choice: str, shared: bool) -> None:
    results = two.run(static_batches, same=same, choice=choice)
    for r in results:
        assert r["same"]
        assert r["error"] < 1e-5
        assert r["left"] == 0
        assert sum(r["held"]) == SEALED * (1 if shared else 2)
        assert ("query" in r["sent"] or "page" in r["sent"]) is not shared


def within_budget(rank: int) -> dict[str, Any]:
    """The same static batch on both ranks, and a dynamic engine, with prompts that are cut and pages that go."""
    tiny_megatron.initialize()
    model = tiny_megatron.build()
    budget = {"name": "uniform", "prompt": 0.5, "tokens": 24}
    megatron_patch.patch_model(model, CONFIG | {"retention": "snap", "budget": budget})
    static(model, prompts_of(0), 30)
    held = megatron_patch.attachment_of(model).cache.pool.num_used
    _, answers = dynamic(model, PROMPTS)
    figures = megatron_patch.stats(model)
    result = {"held": held, "lengths": [len(a) for a in answers], "left": left(model),
              "dropped": figures["dropped_pages"], "evicted": figures["evicted_pages"]}  # fmt: skip
    megatron_patch.unpatch_model(model)
    return result


@pytest.mark.distributed
def test_budgets_hold_under_megatron(two: Ranks) -> None:
    results = two.run(within_budget)
    limit = 2 * 2 * tiny_megatron.LAYERS * (24 // 8)  # two ranks' own copies of two sequences
    assert 0 < sum(r["held"] for r in results) <= limit + 2 * 2 * tiny_megatron.LAYERS
    for r in results:
        assert r["lengths"] == [COUNT] * len(PROMPTS)
        assert r["dropped"] > 0
        assert r["evicted"] > 0
        assert r["left"] == 0


def different_prompts_declared_shared(rank: int) -> str:
    from pikv_ds import PeerError

    tiny_megatron.initialize()
    model = megatron_patch.patch_model(tiny_megatron.build(), CONFIG, static_batches="shared")
    try:
        static(model, prompts_of(rank), 3)
    except PeerError as error:
        return str(error)
    finally:
        megatron_patch.unpatch_model(model)
    return ""


@pytest.mark.distributed
def test_batches_that_are_not_the_same_after_all(two: Ranks) -> None:
    for message in two.run(different_prompts_declared_shared):
        assert "different tokens" in message


def random_traffic(
    rank: int, seed: int, steps: int, latent: dict[str, Any] | None = None, **config: Any
) -> dict[str, Any]:
    """Requests arrive at random, and some are cut short; the engines step as under Megatron's coordinator."""
    tiny_megatron.initialize()
    model = tiny_megatron.build(latent=latent)
    megatron_patch.patch_model(model, CONFIG | config)
    served = tiny_megatron.dynamic_engine(model, Ids(), **SHAPE | {"max_tokens": 64})
    megatron_patch.patch_context(model, served.context)
    rng = random.Random(1000 * seed + rank)
    prompts: list[tuple[list[int], int]] = []
    answers: dict[int, list[int]] = {}
    idle, step, cancelled = 0, 0, set()
    while True:
        context = served.context
        if context.total_request_count > context.paused_request_count and rng.random() < 0.05:
            victim = rng.randrange(context.paused_request_count, context.total_request_count)
            if context.request_query_lengths[victim] == 1:  # decoding: Megatron ends it after its next token
                context.request_output_lengths[victim] = context.request_kv_length_offsets[victim]
                cancelled.add(int(context.request_ids[victim]))
        if step < steps and rng.random() < (0.3 if rank == 0 or step > steps // 2 else 0.02):
            prompt = [rng.randrange(tiny_megatron.VOCAB) for _ in range(rng.choice([1, 5, 8, 40, 100]))]
            prompts.append((prompt, rng.choice([1, 3, 20, 50])))
            served.add_request(len(prompts) - 1, prompt, sampling(prompts[-1][1]))
        work = torch.tensor([served.context.get_active_request_count() + len(served.waiting_request_ids)])
        mine = int(work)
        dist.all_reduce(work, op=dist.ReduceOp.MAX)
        step += 1
        if not int(work) and step >= steps:
            break
        if mine:
            for record in served.step_modern()["finished_request_records"]:
                done = record.merge()
                answers[done.request_id] = list(done.generated_tokens)
        elif int(work):
            idle += 1
            served.controller.dummy_forward()
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, [(prompt, answers[i]) for i, (prompt, _) in enumerate(prompts)])
    right = [[tiny_megatron.is_greedy(model, *pair) for pair in of_rank] for of_rank in everyone][rank]
    whole = [len(answers[i]) == count or (i in cancelled) for i, (_, count) in enumerate(prompts)]
    result = {
        "answers": all(right) and all(whole),
        "cut short": sum(len(answers[i]) < prompts[i][1] for i in cancelled),
        "requests": len(prompts),
        "idle": idle,
        "left": left(model),
        "buffer": served.context.memory_buffer.nbytes,
    }
    megatron_patch.unpatch_model(model)
    return result


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"capacity_tokens": 160}, {"group_size": 1}],
    ids=["no limit", "few pages", "not shared"],
)
def test_requests_that_arrive_at_random(two: Ranks, config: dict[str, Any]) -> None:
    seed = random.SystemRandom().getrandbits(20)
    print(f"seed {seed}")
    results = two.run(random_traffic, seed=seed, steps=60, **config)
    for r in results:
        assert r["answers"]
        assert r["left"] == r["buffer"] == 0
    assert results[0]["requests"] > 0
    print(f"cut short: {[r['cut short'] for r in results]}")
    assert results[1]["idle"] > 0
