"""Multi-head latent attention under Megatron: the same tokens, and of each token one vector, kept once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core")

import tiny_megatron
from harness import Ranks, ranks_fixture
from test_patch import CONFIG, COUNT, PROMPTS, Ids, dynamic, left, prompts_of, random_traffic, static

import megatron_patch
from megatron_patch import latent
from megatron_patch.checks import UnsupportedMegatronError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model lives on a CPU")
two = ranks_fixture(2, "megatron")

RANK, ROTARY, LAYERS = 24, 8, tiny_megatron.LAYERS
SETTINGS: dict[str, Any] = {
    "q_lora_rank": 20,
    "kv_lora_rank": RANK,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": ROTARY,
    "v_head_dim": 10,
    "rope_type": "rope",
}
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4, "original_max_position_embeddings": 32}
YARN |= {"mscale": 0.7, "mscale_all_dim": 0.9}
VARIANTS = {
    "rope": {},
    "no q_lora": {"q_lora_rank": None},
    "yarn": YARN,
    "yarn, no q_lora": YARN | {"q_lora_rank": None},
}


def build(**changes: Any) -> Any:
    return tiny_megatron.build(latent=SETTINGS | changes)


def distance(logits: torch.Tensor, patched: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit: sums in another order, absorbed weights."""
    return float((logits - patched).abs().max() / logits.abs().max())


@pytest.fixture
def initialized() -> None:
    tiny_megatron.initialize()


@pytest.fixture
def model(initialized: None) -> Iterator[Any]:
    model = build()
    yield model
    megatron_patch.unpatch_model(model)


@pytest.mark.usefixtures("initialized")
@pytest.mark.parametrize("variant", VARIANTS)
def test_static_and_dynamic_contexts(variant: str) -> None:
    model = build(**VARIANTS[variant])
    prompts = prompts_of(0)
    own, ids, logits = static(model, prompts, COUNT)
    assert len(own.key_value_memory_dict) == LAYERS
    expected = [tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS]

    megatron_patch.patch_model(model, CONFIG)
    context, patched_ids, patched_logits = static(model, prompts, COUNT)
    assert torch.equal(ids, patched_ids)
    assert distance(logits, patched_logits) < 1e-5
    assert context.key_value_memory_dict == {}
    del context
    context, tokens = dynamic(model, PROMPTS)
    assert tokens == expected
    assert context.memory_buffer.nbytes == 0
    assert left(model) == 0
    megatron_patch.unpatch_model(model)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        pytest.param({"max_tokens": 64}, {}, id="a prompt in chunks"),
        pytest.param({"max_requests": 1}, {}, id="one after the other"),
        pytest.param({}, {"lookup": {"name": "quest", "budget": 1}}, id="quest"),
    ],
)
def test_a_dynamic_context_gives_the_tokens_of_a_model_without_cache(
    model: Any, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    expected = [tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS]
    megatron_patch.patch_model(model, CONFIG | config)
    assert dynamic(model, PROMPTS, **changes)[1] == expected
    figures = megatron_patch.stats(model)["per_rank"][0]
    assert figures["pages_visited"] == figures["pages_in_scope"] > 0
    assert left(model) == 0


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_page_is_one_vector_per_token(model: Any, codec: str) -> None:
    megatron_patch.patch_model(model, CONFIG | {"codec": codec})
    context, _, _ = static(model, prompts_of(0), 4)
    megatron_patch.flush(model)  # stores the pages of the last token, too
    cache = megatron_patch.attachment_of(model).cache
    pages = 2 * LAYERS * (40 // 8)
    assert cache.pool.num_used == pages
    slabs = -(-(pages + 1) // 4)  # of four pages, one page of them the null page
    page_bytes = 8 * (RANK + ROTARY) * 4 if codec == "none" else 8 * (RANK + ROTARY) + 2 * 2 * (RANK + ROTARY)
    assert cache.pool.page_storage_bytes == slabs * 4 * page_bytes
    assert cache.stored_tokens == 2 * LAYERS * 40
    assert cache.shape.token_bytes == LAYERS * (RANK + ROTARY) * 4
    context.reset()


def test_the_static_engine_of_megatron(model: Any) -> None:
    from test_patch import sampling

    expected = [tiny_megatron.greedy(model, p, COUNT) for p in PROMPTS]
    megatron_patch.patch_model(model, CONFIG)
    made = tiny_megatron.static_engine(model, Ids())
    requests = made.generate(prompts=PROMPTS, sampling_params=sampling())
    assert [[int(i) for i in request.generated_tokens] for request in requests] == expected


def test_unpatching_leaves_nothing_and_other_passes_are_megatrons(model: Any) -> None:
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    prompts = prompts_of(0)
    _, _, logits = static(model, prompts, 5)
    expected = tiny_megatron.greedy(model, PROMPTS[0], 5)

    megatron_patch.patch_model(model, CONFIG)
    assert list(model.state_dict()) == keys
    assert tiny_megatron.greedy(model, PROMPTS[0], 5) == expected
    assert megatron_patch.attachment_of(model).cache.num_steps == 0
    model.train()
    mask = torch.ones(37, 37, dtype=torch.bool).triu(1)[None, None]
    model(prompts, torch.arange(37)[None].expand(2, -1), mask, labels=prompts).mean().backward()
    assert all(p.grad is not None for p in model.decoder.layers[0].self_attention.parameters())
    model.eval()
    static(model, prompts, 5)
    megatron_patch.unpatch_model(model)
    assert before == {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    assert torch.equal(static(model, prompts, 5)[2], logits)  # the same bits


@pytest.mark.usefixtures("initialized")
def test_a_patched_spec_builds_a_patched_model() -> None:
    plain = build()
    patched = tiny_megatron.build(spec=lambda spec: megatron_patch.patch_layer_spec(spec, CONFIG), latent=SETTINGS)
    assert list(patched.state_dict()) == list(plain.state_dict())
    assert dynamic(patched, PROMPTS)[1] == [tiny_megatron.greedy(plain, p, COUNT) for p in PROMPTS]
    megatron_patch.unpatch_model(patched)
    assert not [m for m in patched.modules() if any("pikv" in name for name in vars(m))]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_mla_latents", True),
        ("experimental_attention_variant", "dsa"),
        ("apply_rope_fusion", True),
        ("fp8", "hybrid"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(model: Any, key: str, value: Any, monkeypatch) -> None:
    assert key in latent.REFUSED
    monkeypatch.setattr(model.config, key, value)
    with pytest.raises(UnsupportedMegatronError, match=f"{key} = "):
        megatron_patch.patch_model(model, CONFIG)
    monkeypatch.undo()


@pytest.mark.usefixtures("initialized")
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v3-yarn"])
def test_a_checkpoint_has_hugging_faces_logits_token_by_token(family: str, tmp_path: Path) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext
    from test_convert import LENGTH, hf_logits, save, tokens

    from megatron_patch import convert, models

    folder = save(tmp_path, family)
    hf = models.load_config(folder)
    model = models.build_model(hf, models.transformer_config(hf))
    convert.load_hf(model, folder)
    megatron_patch.patch_model(model, CONFIG)
    context, ids, logits = StaticInferenceContext(2, LENGTH), tokens(), []
    with torch.inference_mode():
        for start, end in [(0, 9), *((i, i + 1) for i in range(9, LENGTH))]:  # a prompt, then single tokens
            mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None] if end == 9 else None
            positions = torch.arange(start, end)[None].expand(2, -1)
            new = model(ids[:, start:end], positions, mask, inference_context=context, runtime_gather_output=True)
            logits.append(new)
            context.increment_sequence_len_offset(end - start)
            context.enable_decode_mode()
    expected = hf_logits(folder)[:, 8:]  # of a prompt, of its last token only
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)
    assert megatron_patch.stats(model)["pages_in_scope"] > 0
    megatron_patch.unpatch_model(model)


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_within_the_up_projection(kind: str, gamma: bool) -> None:
    linear = nn.Module()
    linear.normalization, linear.zero_centered_gamma, linear.eps = kind, gamma, 1e-5
    linear.layer_norm_weight = torch.rand(16)
    linear.layer_norm_bias = torch.rand(16) if kind == "LayerNorm" else None
    x = torch.randn(5, 16) * 3 + 1
    weight = linear.layer_norm_weight + gamma
    if kind == "RMSNorm":
        expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    else:
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + linear.layer_norm_bias
    torch.testing.assert_close(latent.fused_norm(linear, x), expected)


# -- two ranks -------------------------------------------------------------------------------------


def static_batches(
    rank: int, same: bool, choice: str, length: int, count: int = COUNT, **changes: Any
) -> dict[str, Any]:
    tiny_megatron.initialize()
    model = build(**changes)
    if changes.get("tensor_model_parallel_size", 1) > 1:  # other heads on each rank
        for layer in model.decoder.layers:
            torch.manual_seed(rank)
            layer.self_attention.linear_kv_up_proj.weight.data.normal_(0, 0.3)
    prompts = prompts_of(0 if same else rank, length=length)
    _, ids, logits = static(model, prompts, count)
    megatron_patch.patch_model(model, CONFIG, static_batches=choice)
    context, patched, patched_logits = static(model, prompts, count)
    figures = megatron_patch.stats(model)
    tokens = megatron_patch.attachment_of(model).cache.stored_tokens
    del context
    result = {
        "same": torch.equal(ids, patched),
        "distance": distance(logits, patched_logits),
        "sent": figures["per_rank"][rank]["sent_bytes"],
        "held": [r["peak_pages"] for r in figures["per_rank"]],
        "tokens": tokens,
        "page_bytes": figures["page_bytes"],
        "wire": (figures["wire_bytes_per_token_layer"], figures["wire_formula_bytes"]),
        "left": left(model),
    }
    megatron_patch.unpatch_model(model)
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None} | YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize(
    ("same", "choice", "shared"),
    [(True, "auto", True), (False, "auto", False), (True, "own", False), (True, "shared", True)],
)
def test_static_batches_on_two_ranks(
    two: Ranks, same: bool, choice: str, shared: bool, changes: dict[str, Any]
) -> None:
    length, tokens = 37, 2 * LAYERS * (37 + COUNT - 1)  # of one rank's two sequences
    results = two.run(static_batches, same=same, choice=choice, length=length, **changes)
    open_tokens = 2 * LAYERS * ((length + COUNT - 1) % 8)
    for r in results:
        assert r["same"]
        assert r["distance"] < 1e-5
        assert r["left"] == 0
        assert sum(r["held"]) * 8 == (tokens - open_tokens) * (1 if shared else 2)
        assert r["page_bytes"] == 8 * (RANK + ROTARY) * 4
    # Each token once: of a shared batch, whose tails are on every rank, and of two batches.
    assert sum(r["tokens"] for r in results) == (tokens + open_tokens if shared else 2 * tokens)
    assert ("query" in results[0]["sent"]) is not shared


@pytest.mark.distributed
def test_single_tokens_of_a_short_context_ask_by_their_queries(two: Ranks) -> None:
    results = two.run(static_batches, same=False, choice="own", length=8, count=8)
    for r in results:
        assert r["same"]
        assert r["distance"] < 1e-5
        assert r["sent"]["query"] > 0
        assert "fetched_page" not in r["sent"]


@pytest.mark.distributed
def test_queries_leave_absorbed_and_outputs_come_back_latent(two: Ranks) -> None:
    for r in two.run(static_batches, same=False, choice="own", length=100):
        assert r["same"]
        assert r["distance"] < 1e-5
        measured, formula = r["wire"]
        assert measured == formula == 4 * ((RANK + ROTARY) * 4 + RANK * 4 + 4)  # heads, query, output, log-sum-exp
        assert r["sent"]["query"] > 0
        assert "fetched_page" not in r["sent"]


@pytest.mark.distributed
@pytest.mark.slow
def test_requests_that_arrive_at_random(two: Ranks) -> None:
    seed = random.SystemRandom().getrandbits(20)
    print(f"seed {seed}")
    results = two.run(random_traffic, seed=seed, steps=60, latent=SETTINGS)
    for r in results:
        assert r["answers"]
        assert r["left"] == r["buffer"] == 0
    assert results[1]["idle"] > 0


def tensor_parallel(rank: int) -> dict[str, Any]:
    """Both ranks have the same sequences, half of the heads and half of the experts each."""
    from megatron.core import parallel_state

    from megatron_patch import cpu

    cpu.install()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    try:
        return static_batches(rank, same=True, choice="auto", length=37, tensor_model_parallel_size=2)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.distributed
def test_tensor_parallel_ranks_keep_the_same_latents_each(two: Ranks) -> None:
    results = two.run(tensor_parallel)
    for r in results:
        assert r["same"]
        assert r["distance"] < 1e-5
    assert sum(r["tokens"] for r in results) == 2 * 2 * LAYERS * (37 + COUNT - 1)
