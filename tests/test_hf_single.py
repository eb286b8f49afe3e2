"""One process without any process group: `attach` to an unsharded model gives the same model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    TextStreamer,
)

import pikv_ds
from pikv_ds.api import attachment_of
from pikv_ds.integrations.hf.attachment import UnsupportedModelError

SETTINGS = {"page_size": 8, "debug": True}
TOLERANCE = 1e-5
"""Of logits, relative to the largest: float32 sums in another order."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing by threads, and lose a lot where other tests keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attached(kind: str, config: dict[str, Any] | None = None, **model: Any) -> PreTrainedModel:
    whole = tiny.MODELS[kind](**model)
    pikv_ds.attach(whole, {**SETTINGS, **(config or {})})
    return whole


def options(**changes: Any) -> dict[str, Any]:
    greedy = {
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return {**greedy, **changes}


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    """Without the padding token."""
    return tiny.prompt(batch, length, seed).clamp(min=1)


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths and their mask; the first has no padding."""
    starts = torch.tensor([(11 * row) % length for row in range(batch)])
    mask = (torch.arange(length) >= starts[:, None]).long()
    return prompt(batch, length) * mask, mask


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same(ours: Any, theirs: Any) -> None:
    """The same tokens from the same logits."""
    assert torch.equal(ours.sequences, theirs.sequences)
    assert relative(torch.stack(ours.logits), torch.stack(theirs.logits)) <= TOLERANCE


def store_of(model: nn.Module) -> pikv_ds.ExpertShardedKVCache:
    return attachment_of(model).store


# -- the unsharded model's tokens and logits ----------------------------------------------------

PARITY: dict[str, dict[str, Any]] = {
    "mixtral": {"kind": "mixtral"},
    "mixtral-mha": {"kind": "mixtral", "model": {"num_kv_heads": 4}},
    "mixtral-mqa": {"kind": "mixtral", "model": {"num_kv_heads": 1}},
    "mixtral-head_dim-20": {"kind": "mixtral", "model": {"head_dim": 20}},
    "qwen3": {"kind": "qwen3_moe", "model": {"head_dim": 24}},
    "qwen3-attention_bias": {"kind": "qwen3_moe", "model": {"attention_bias": True}},
    "qwen3-dense-layers": {
        "kind": "qwen3_moe",
        "model": {"num_layers": 3, "dense_layers": (0, 2)},
    },
    "llama": {"kind": "llama"},
    "llama-attention_bias": {"kind": "llama", "model": {"attention_bias": True}},
    "page_size-32": {"kind": "mixtral", "config": {"page_size": 32}},
    "slab_pages-1": {"kind": "mixtral", "config": {"slab_pages": 1}},
    "reference-backend": {"kind": "mixtral", "config": {"backend": "reference"}},
    "hash": {"kind": "mixtral", "config": {"placement": "hash"}},
    "quest-whole-budget": {"kind": "llama", "config": {"lookup": {"name": "quest", "budget": 1.0}}},
}


@pytest.mark.sampled
@pytest.mark.parametrize("prompts", ["equal", "padded", "one-token"])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("case", PARITY)
def test_equals_the_model_alone(case: str, chunk: int | None, prompts: str) -> None:
    kind, model = PARITY[case]["kind"], PARITY[case].get("model", {})
    config = dict(PARITY[case].get("config", {}))
    if chunk is not None:
        config["prefill_chunk_tokens"] = 2 * config.get("page_size", 8)
    with_pikv, alone = attached(kind, config, **model), tiny.MODELS[kind](**model)
    arguments = options()
    ids = prompt(3, 1 if prompts == "one-token" else 45)
    if prompts == "padded":
        ids, arguments["attention_mask"] = left_padded(3, 45)
    assert_same(with_pikv.generate(ids, **arguments), alone.generate(ids, **arguments))
    sealed = ids.shape[1] + 19 >= config.get("page_size", 8)
    assert (store_of(with_pikv).sender.counters["seals"] > 0) == sealed


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("where", ["arguments", "generation_config"])
def test_padding_is_found_by_its_token(chunk: int | None, where: str) -> None:
    config = {"prefill_chunk_tokens": chunk}
    with_pikv, alone = attached("mixtral", config), tiny.mixtral()
    ids, _ = left_padded(3, 45)
    arguments = options()
    if where == "generation_config":
        arguments = {"generation_config": GenerationConfig(**options(pad_token_id=0))}
    assert_same(with_pikv.generate(ids, **arguments), alone.generate(ids, **arguments))


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_pad_token_that_ends_texts_is_no_padding(chunk: int | None) -> None:
    with_pikv, alone = attached("mixtral", {"prefill_chunk_tokens": chunk}), tiny.mixtral()
    ids = prompt(2, 45)
    ids[0, :5] = 0
    arguments = options(eos_token_id=0)
    assert_same(with_pikv.generate(ids, **arguments), alone.generate(ids, **arguments))


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampling_with_a_seed(repeats: int) -> None:
    outputs = []
    for model in (attached("mixtral"), tiny.mixtral()):
        torch.manual_seed(5)
        outputs.append(
            model.generate(prompt(2, 30), **options(do_sample=True, num_return_sequences=repeats, top_p=0.9))
        )
    assert len(outputs[0].sequences) == 2 * repeats
    assert_same(*outputs)


def test_settings_in_a_generation_config() -> None:
    config = GenerationConfig(**options(max_new_tokens=7, num_return_sequences=2, do_sample=True))
    outputs = []
    for model in (attached("mixtral"), tiny.mixtral()):
        torch.manual_seed(5)
        outputs.append(model.generate(prompt(2, 30), generation_config=config))
    assert outputs[0].sequences.shape == (4, 37)
    assert_same(*outputs)


def test_input_ids_by_keyword() -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    ids = prompt(2, 30)
    assert_same(with_pikv.generate(input_ids=ids, **options()), alone.generate(input_ids=ids, **options()))


def test_eos_ends_rows_one_by_one() -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    ids = prompt(4, 30)
    free = alone.generate(ids, **options()).sequences[:, 30:]
    eos = int(free[1, 6])
    plain = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    ours, theirs = with_pikv.generate(ids, **plain), alone.generate(ids, **plain)
    assert torch.equal(ours, theirs)
    assert (theirs[1, 30:] == eos).any()
    assert store_of(with_pikv).pool.num_used == 0


def test_a_text_streamer() -> None:
    class Tokens:
        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    streamer = Collect(Tokens())  # type: ignore[arg-type]
    out = attached("mixtral").generate(prompt(1, 20), streamer=streamer, **options())
    assert streamer.text.split() == [str(i) for i in out.sequences[0].tolist()]


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_bfloat16_is_as_exact_as_the_model_alone(kind: str) -> None:
    ids = prompt(2, 60)
    exact = tiny.MODELS[kind]()
    alone, with_pikv = tiny.MODELS[kind]().bfloat16(), tiny.MODELS[kind]().bfloat16()
    pikv_ds.attach(with_pikv, SETTINGS)
    ours, theirs = with_pikv.generate(ids, **options()), alone.generate(ids, **options())
    with torch.no_grad():
        texts = theirs.sequences[:, :-1]
        truth = exact(texts).logits
        rounding = float((alone(texts).logits.float() - truth).abs().max())
    for row in range(2):
        differs = (ours.sequences[row] != theirs.sequences[row]).nonzero()
        if len(differs):  # a tie within rounding; from there on they are different texts
            at = int(differs[0])
            logits = theirs.logits[at - 60][row]
            mine, other = ours.sequences[row, at], theirs.sequences[row, at]
            assert float(logits[other] - logits[mine]) <= 2 * rounding
    if kind != "llama":
        return  # rounding flips the choice of experts here and there: errors are no measure
    with torch.no_grad():
        cache, pieces = pikv_ds.new_cache(with_pikv), []
        for start in range(0, 60, 10):
            pieces.append(with_pikv(ids[:, start : start + 10], past_key_values=cache).logits)
        truth = exact(ids).logits
        error = (torch.cat(pieces, 1).float() - truth).norm()
        assert error <= 2 * (alone(ids).logits.float() - truth).norm()


# -- caches of the user's own -------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 8])
def test_two_turns_with_one_cache(chunk: int | None) -> None:
    with_pikv, alone = attached("qwen3_moe", {"prefill_chunk_tokens": chunk}), tiny.qwen3_moe()
    cache, ids = pikv_ds.new_cache(with_pikv), prompt(2, 31)
    for turn in range(3):
        arguments = options(attention_mask=torch.ones_like(ids))
        theirs = alone.generate(ids, **arguments)
        assert_same(with_pikv.generate(ids, past_key_values=cache, **arguments), theirs)
        ids = torch.cat([theirs.sequences, prompt(2, 13, turn)], dim=1)
    assert store_of(with_pikv).own_tokens == 2 * (theirs.sequences.shape[1] - 1)
    cache.release()
    store_of(with_pikv).begin_step(None, [])
    assert store_of(with_pikv).pool.num_used == 0


def test_the_cache_of_an_output_goes_on() -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    first = with_pikv.generate(prompt(2, 31), **options())
    arguments = options(attention_mask=torch.ones_like(first.sequences))
    second = with_pikv.generate(first.sequences, past_key_values=first.past_key_values, **arguments)
    assert_same(second, alone.generate(first.sequences, **arguments))


def test_pages_go_back_with_the_last_reference_to_their_cache() -> None:
    model = attached("mixtral")
    gc.collect()
    gc.disable()  # by reference counts alone
    try:
        output = model.generate(prompt(2, 31), **options())
        assert store_of(model).pool.num_used > 0
        cache = weakref.ref(output.past_key_values)
        del output
        assert cache() is None
    finally:
        gc.enable()
    store_of(model).begin_step(None, [])
    assert store_of(model).pool.num_used == 0
    assert store_of(model).own_tokens == 0


def test_forward_passes_by_hand() -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    ids = prompt(3, 50)
    cache = pikv_ds.new_cache(with_pikv)
    with torch.no_grad():
        wanted = alone(ids).logits
        start = 0
        for width in (7, 1, 1, 17, 2, 1, 9, 12):
            piece = with_pikv(ids[:, start : start + width], past_key_values=cache).logits
            assert relative(piece, wanted[:, start : start + width]) <= TOLERANCE
            start += width
    assert start == 50


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_passes_of_one_token(side: str) -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    mask = torch.ones(2, 24).long()
    if side == "left":
        mask[1, :12] = 0  # its text begins with the last pass of one token
    else:
        mask[1, 9:12] = 0  # its prompt is shorter by a token, and goes on with that pass
    ids = prompt(2, 24) * mask
    cache, theirs = pikv_ds.new_cache(with_pikv), DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 10), (10, 11), (11, 12), (12, 13), (13, 24)):
            ours, wanted = (
                model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=kept).logits
                for model, kept in ((with_pikv, cache), (alone, theirs))
            )
            tokens = mask[:, start:end].bool()
            assert relative(ours[tokens], wanted[tokens]) <= TOLERANCE
    assert cache.batch is not None
    assert cache.batch.lengths == mask.sum(1).tolist()


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("how", ["mask", "token"])
def test_a_row_that_ends_in_padding_is_refused(how: str, chunk: int | None) -> None:
    model = attached("mixtral", {"prefill_chunk_tokens": chunk})
    ids, mask = prompt(2, 17), torch.ones(2, 17).long()
    mask[1, 15:] = 0
    arguments = {"attention_mask": mask} if how == "mask" else {}
    with pytest.raises(ValueError, match=r"row 1 ends in padding .* pad on the left"):
        model.generate(ids * mask, **arguments, **options())


def test_two_caches_in_turn() -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    texts = [prompt(1, 40, 1), prompt(2, 40, 2)]
    caches = [pikv_ds.new_cache(with_pikv) for _ in texts]
    with torch.no_grad():
        for start in range(0, 40, 10):
            for ids, cache in zip(texts, caches, strict=True):
                piece = with_pikv(ids[:, start : start + 10], past_key_values=cache).logits
                wanted = alone(ids).logits[:, start : start + 10]
                assert relative(piece, wanted) <= TOLERANCE


def test_another_batch_size_for_a_cache_is_an_error() -> None:
    model = attached("mixtral")
    cache = pikv_ds.new_cache(model)
    with torch.no_grad():
        model(prompt(2, 10), past_key_values=cache)
        with pytest.raises(pikv_ds.PiKVError, match="holds 2 sequences, the batch has 3"):
            model(prompt(3, 10), past_key_values=cache)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("reorder_cache", (torch.tensor([0]),), "beam search"),
        ("crop", (3,), "cropping"),
        ("batch_repeat_interleave", (2,), "repeat"),
        ("batch_select_indices", (torch.tensor([0]),), "reorder"),
    ],
)
def test_what_a_cache_cannot_do_says_so(method: str, arguments: Any, words: str) -> None:
    cache = pikv_ds.new_cache(attached("mixtral"))
    with pytest.raises(NotImplementedError, match=words):
        getattr(cache, method)(*arguments)


# -- an attached model without our cache stays a model ------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_plain_forward(kind: str, padded: bool) -> None:
    with_pikv, alone = attached(kind), tiny.MODELS[kind]()
    ids, mask = left_padded(3, 40) if padded else (prompt(3, 40), None)
    with torch.no_grad():
        ours = with_pikv(ids, attention_mask=mask).logits
        theirs = alone(ids, attention_mask=mask).logits
    tokens = slice(None) if mask is None else mask.bool()
    assert relative(ours[tokens], theirs[tokens]) <= TOLERANCE
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("padded", [False, True])
def test_plain_forward_with_a_dynamic_cache(padded: bool) -> None:
    with_pikv, alone = attached("mixtral"), tiny.mixtral()
    ids, mask = left_padded(3, 40) if padded else (prompt(3, 40), torch.ones(3, 40).long())
    outputs = []
    for model in (with_pikv, alone):
        cache, pieces = DynamicCache(), []
        with torch.no_grad():
            for start, end in ((0, 30), (30, 31), (31, 40)):
                piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                pieces.append(piece.logits)
        outputs.append(torch.cat(pieces, 1)[mask.bool()])
    assert relative(*outputs) <= TOLERANCE


# -- detach -------------------------------------------------------------------------------------


def test_detach_leaves_nothing_behind() -> None:
    model, ids = tiny.qwen3_moe(), prompt(2, 40)
    logits = model(ids).logits  # kvpress, where it is imported, leaves a mark at the first pass

    def traces() -> dict[str, list[str]]:
        return {n: [*sorted(vars(m)), *map(str, m._forward_hooks)] for n, m in model.named_modules()}

    before, state = traces(), list(model.state_dict())
    implementation = model.config._attn_implementation
    pikv_ds.attach(model, SETTINGS)
    assert list(model.state_dict()) == state
    with pytest.raises(ValueError, match="already attached"):
        pikv_ds.attach(model, SETTINGS)
    model.generate(ids, max_new_tokens=3)
    pikv_ds.detach(model)
    pikv_ds.detach(model)  # harmless
    assert traces() == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(ValueError, match="not attached"):
        pikv_ds.stats(model)
    with pytest.raises(ValueError, match="not attached"):
        pikv_ds.new_cache(model)
    assert_same(model.generate(ids, **options()), tiny.qwen3_moe().generate(ids, **options()))


def test_a_failed_attach_leaves_nothing_behind() -> None:
    model = tiny.mixtral()
    with pytest.raises(pikv_ds.ConfigError):
        pikv_ds.attach(model, {"page_size": 12})
    model.config.sliding_window = 16
    with pytest.raises(UnsupportedModelError):
        pikv_ds.attach(model, SETTINGS)
    model.config.sliding_window = None
    pikv_ds.attach(model, SETTINGS)
    assert_same(
        model.generate(prompt(1, 30), **options()),
        tiny.mixtral().generate(prompt(1, 30), **options()),
    )


# -- refusals -----------------------------------------------------------------------------------


def with_setting(key: str, value: Any) -> PreTrainedModel:
    model = tiny.llama()
    setattr(model.config, key, value)
    return model


def without_attention_interface() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sliding-window": (lambda: tiny.mixtral(sliding_window=32), "sliding_window = 32"),
    "layer-types": (
        lambda: with_setting("layer_types", ["full_attention", "sliding_attention"]),
        "sliding_attention",
    ),
    "latent-attention": (lambda: with_setting("kv_lora_rank", 16), "kv_lora_rank"),
    "softcapping": (lambda: with_setting("attn_logit_softcapping", 50.0), "attn_logit_softcapping"),
    "attention-chunks": (lambda: with_setting("attention_chunk_size", 64), "attention_chunk_size"),
    "no-attention-interface": (without_attention_interface, "BloomForCausalLM.*AttentionInterface"),
    "no-transformers-model": (lambda: nn.Linear(2, 2), "Linear is no transformers model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_by_name(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=words):
        pikv_ds.attach(make(), SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 2}, "num_beams = 2"),
        ({"use_cache": False}, "use_cache = False"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale = 1.5"),
        ({"output_attentions": True}, "output_attentions"),
        ({"max_new_tokens": 5000}, "context of 4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("where", ["arguments", "generation_config"])
def test_refused_arguments_of_generate(arguments: dict[str, Any], words: str, where: str) -> None:
    if where == "generation_config":
        arguments = {"generation_config": GenerationConfig(**arguments)}
    model = attached("mixtral")
    with pytest.raises(ValueError, match=words):
        model.generate(prompt(1, 10), **arguments)
    assert model.generate(prompt(1, 10), max_new_tokens=2).shape == (1, 12)


def test_a_guidance_scale_of_one_is_no_guidance() -> None:
    ids = prompt(1, 10)
    ours, theirs = (m.generate(ids, **options(guidance_scale=1.0)) for m in (attached("mixtral"), tiny.mixtral()))
    assert_same(ours, theirs)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("key", ["s_aux", "softcap"])
def test_attention_that_is_no_plain_softmax_is_refused(key: str, cached: bool) -> None:
    model, ids = attached("mixtral"), prompt(1, 10)
    with pytest.raises(UnsupportedModelError, match=f"MixtralAttention: attention with {key}"):
        model(ids, past_key_values=pikv_ds.new_cache(model) if cached else None, use_cache=cached, **{key: 30.0})
    model(ids, **{key: None})


def test_pool_full_and_then_a_smaller_call() -> None:
    model = attached("mixtral", {"capacity_tokens": 64})
    with pytest.raises(pikv_ds.PoolFullError, match="capacity_tokens from 64"):
        model.generate(prompt(2, 100), max_new_tokens=3)
    with pytest.raises(pikv_ds.PoolFullError, match="capacity_tokens"):
        model.generate(prompt(1, 20), max_new_tokens=100, eos_token_id=None)
    ids = prompt(1, 30)
    assert_same(model.generate(ids, **options()), tiny.mixtral().generate(ids, **options()))


def test_nan_is_an_error_that_names_the_layer() -> None:
    model = attached("mixtral")
    weight = model.model.layers[1].self_attn.v_proj.weight
    kept = weight[0, 0].clone()
    weight[0, 0] = torch.inf
    with pytest.raises(pikv_ds.NonFiniteError, match="layer 1"):
        model.generate(prompt(1, 20), max_new_tokens=1)
    weight[0, 0] = kept
    ids = prompt(1, 30)
    assert_same(model.generate(ids, **options()), tiny.mixtral().generate(ids, **options()))


def test_nan_at_padding_is_nobodys_error() -> None:
    model, plain = attached("mixtral"), tiny.mixtral()
    model.model.embed_tokens.weight[0] = torch.nan  # what stands at padding is no token
    ids = prompt(2, 30).clamp(min=1)
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    ours, theirs = (m.generate(ids, **options(attention_mask=mask, pad_token_id=1)) for m in (model, plain))
    assert_same(ours, theirs)


def test_an_exception_in_a_stopping_criterion() -> None:
    def failing(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        raise KeyError("the user's own mistake")

    model, ids = attached("mixtral"), prompt(1, 30)
    with pytest.raises(KeyError, match="the user's own mistake"):
        model.generate(ids, max_new_tokens=3, stopping_criteria=StoppingCriteriaList([failing]))
    assert_same(model.generate(ids, **options()), tiny.mixtral().generate(ids, **options()))


def test_an_exception_within_a_forward_pass() -> None:
    model, ids = attached("mixtral"), prompt(1, 30)

    def failing(*args: Any) -> None:
        raise KeyError("out of luck")

    hook = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(KeyError, match="out of luck"):
        model.generate(ids, max_new_tokens=3)
    hook.remove()
    assert_same(model.generate(ids, **options()), tiny.mixtral().generate(ids, **options()))


def fail_before_the_router(model: PreTrainedModel, run: Callable[[], Any]) -> None:
    """Runs the model and breaks it off after the attention of its second layer."""

    def failing(*args: Any) -> None:
        raise KeyError("out of luck")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(failing)
    with pytest.raises(KeyError, match="out of luck"):
        run()
    hook.remove()


def test_a_generation_that_fails_midway_leaves_nothing_in_the_layers() -> None:
    model, ids = attached("mixtral"), prompt(1, 30)
    fail_before_the_router(model, lambda: model.generate(ids, max_new_tokens=3))
    assert all(tap.pending is None and tap.running is None for tap in attachment_of(model).layers.values())


def test_a_plain_pass_after_one_that_failed_midway() -> None:
    model, ids = attached("mixtral"), prompt(1, 30)
    fail_before_the_router(model, lambda: model(ids, past_key_values=pikv_ds.new_cache(model)))
    store = store_of(model)
    before = store.num_steps, store.stored_tokens
    assert relative(model(ids).logits, tiny.mixtral()(ids).logits) <= TOLERANCE
    assert (store.num_steps, store.stored_tokens) == before


def test_stats_of_one_rank() -> None:
    model = attached("mixtral")
    output = model.generate(prompt(2, 40), **options())
    figures = pikv_ds.stats(model)
    (rank,) = figures["per_rank"]
    length = output.sequences.shape[1] - 1
    assert figures["num_ranks"] == 1
    assert rank["own_tokens"] == rank["tokens"] == 2 * length
    assert rank["peak_own_tokens"] == 2 * length
    assert rank["kv_bytes"] >= rank["unsharded_kv_bytes"] > 0
    assert sum(rank["sent_bytes"].values()) == 0
    assert figures["wire_formula_bytes"] == 0


def test_a_released_cache_is_refused_and_not_read_as_empty() -> None:
    model, ids = attached("mixtral"), prompt(2, 31)
    cache = pikv_ds.new_cache(model)
    first = model.generate(ids, past_key_values=cache, **options())
    cache.release()
    with pytest.raises(pikv_ds.PiKVError, match="has been released"):
        model.generate(first.sequences, past_key_values=cache, **options())


def test_a_mask_of_the_new_columns_alone_is_refused() -> None:
    model, ids = attached("mixtral"), prompt(2, 12)
    cache = pikv_ds.new_cache(model)
    model(ids, past_key_values=cache)
    with pytest.raises(pikv_ds.PiKVError, match="attention_mask has 5 columns"):
        model(ids[:, :5], past_key_values=cache, attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert cache.columns == 12


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="input_ids must lie in"):
        attached("mixtral").generate(prompt(1, 8) + 1000, **options())
