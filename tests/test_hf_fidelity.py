"""Where an attached model must do as the model alone does, or say that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MixtralForCausalLM,
    MixtralModel,
    PreTrainedModel,
    StaticCache,
)

import pikv_ds
from pikv_ds.integrations.hf.attachment import UnsupportedModelError
from pikv_ds.integrations.hf.cache import CACHE

SETTINGS = {"page_size": 8, "debug": True}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    return tiny.prompt(batch, length, seed).clamp(min=1)


def pair(
    prepare: Callable[[PreTrainedModel], Any] = lambda model: None, **config: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model alone, and with PiKV."""
    alone, ours = tiny.mixtral(), tiny.mixtral()
    prepare(alone)
    prepare(ours)
    pikv_ds.attach(ours, {**SETTINGS, **config})
    return alone, ours


def close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


# -- generate's settings come from three places -------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("call", [{}, {"pad_token_id": 0}])
@pytest.mark.parametrize("model", [{"pad_token_id": 0}, {"eos_token_id": 0}, {"pad_token_id": 0, "eos_token_id": 5}])
def test_padding_of_merged_configurations(model: dict[str, int], call: dict[str, int], chunk: int | None) -> None:
    def prepare(m: PreTrainedModel) -> None:
        m.generation_config.update(**model)

    alone, ours = pair(prepare, prefill_chunk_tokens=chunk)
    ids = prompt(2, 29)
    ids[0, :9] = 0
    config = GenerationConfig(**GREEDY, **call)
    assert torch.equal(ours.generate(ids, config), alone.generate(ids, config))


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_return_sequences", 2), ("return_dict_in_generate", True), ("temperature", 0.5)],
)
def test_settings_of_the_model_count_beside_a_configuration(setting: str, value: Any, chunk: int | None) -> None:
    alone, ours = pair(lambda m: setattr(m.generation_config, setting, value), prefill_chunk_tokens=chunk)
    outputs = []
    for model in (ours, alone):
        torch.manual_seed(3)
        out = model.generate(prompt(2, 21), GenerationConfig(max_new_tokens=8, do_sample=True))
        outputs.append(out if isinstance(out, Tensor) else out.sequences)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_cache", False), ("num_beams", 2), ("cache_implementation", "static"), ("prompt_lookup_num_tokens", 2)],
)
def test_settings_of_the_model_are_refused_beside_a_configuration(setting: str, value: Any) -> None:
    _, ours = pair(lambda m: setattr(m.generation_config, setting, value))
    with pytest.raises(ValueError, match=f"{setting} = "):
        ours.generate(prompt(1, 12), GenerationConfig(**GREEDY))


def test_positional_arguments() -> None:
    alone, ours = pair()
    arguments = (prompt(1, 12), GenerationConfig(**GREEDY), LogitsProcessorList())
    assert torch.equal(ours.generate(*arguments), alone.generate(*arguments))
    with pytest.raises(TypeError, match="multiple values for argument 'logits_processor'"):
        ours.generate(*arguments, logits_processor=LogitsProcessorList())


def test_an_end_token_that_is_a_tensor() -> None:
    alone, ours = pair()
    ids = prompt(2, 20)
    ids[0, :5] = 0
    arguments = {**GREEDY, "eos_token_id": torch.tensor([3, 7]), "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **arguments), alone.generate(ids, **arguments))


@pytest.mark.parametrize(
    ("ids", "arguments", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "input_ids has no tokens"),
        (torch.ones(1, 9, dtype=torch.long), {"num_return_sequences": 2}, "num_return_sequences"),
        (torch.ones(1, 9, dtype=torch.long), {"assistant_early_exit": 1}, "assistant_early_exit = 1"),
    ],
)
def test_what_cannot_be_asked(ids: Tensor, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair()[1].generate(ids, **arguments, **GREEDY)


def test_hidden_states_of_chunks_are_refused() -> None:
    _, ours = pair(prefill_chunk_tokens=8)
    arguments = {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    with pytest.raises(ValueError, match="output_hidden_states would be the last chunk's only"):
        ours.generate(prompt(1, 21), **arguments)
    assert len(ours.generate(prompt(1, 7), **arguments).hidden_states) == 8


# -- what is in a cache stays as it was ---------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_mask_that_hides_what_is_in_the_cache_is_refused(chunk: int | None) -> None:
    _, ours = pair(prefill_chunk_tokens=chunk)
    ids, cache = prompt(2, 20), pikv_ds.new_cache(ours)
    out = ours.generate(ids, **GREEDY, **{CACHE: cache})
    longer = torch.cat([out, prompt(2, 19, 3)], dim=1)
    mask = torch.ones_like(longer)
    mask[1, 22:25] = 0
    with pytest.raises(
        pikv_ds.PiKVError, match="attention_mask hides row 1, column 22, which is in the cache as a token"
    ):
        ours.generate(longer, attention_mask=mask, **GREEDY, **{CACHE: cache})


@pytest.mark.parametrize("given", ["none", "ones"])
def test_a_mask_that_shows_padding_in_the_cache_is_refused(given: str) -> None:
    alone, ours = pair()
    ids, mask = prompt(2, 20), torch.ones(2, 20).long()
    mask[0, :6] = 0
    cache, theirs = pikv_ds.new_cache(ours), DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 10), (10, 14)):
            piece, wanted = (
                m(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE: c}).logits
                for m, c in ((ours, cache), (alone, theirs))
            )
            seen = mask[:, start:end].bool()
            assert close(piece[seen], wanted[seen])
        words = {
            "none": "the cache has padding; pass the attention_mask",
            "ones": "shows row 0, column 0, .* as padding",
        }
        changed = None if given == "none" else torch.ones_like(mask)
        with pytest.raises(pikv_ds.PiKVError, match=words[given]):
            ours(ids[:, 14:], attention_mask=changed, **{CACHE: cache})


def test_a_row_that_was_released_by_hand_is_refused() -> None:
    _, ours = pair()
    ids, cache = prompt(2, 20), pikv_ds.new_cache(ours)
    with torch.no_grad():
        ours(ids[:, :16], **{CACHE: cache})
        cache.release([0])
        with pytest.raises(pikv_ds.PiKVError, match="row 0 of the cache has been released"):
            ours(ids[:, 16:], **{CACHE: cache})


def test_a_cache_that_has_the_whole_text_already() -> None:
    _, ours = pair()
    cache = pikv_ds.new_cache(ours)
    out = ours.generate(prompt(1, 20), **GREEDY, **{CACHE: cache})
    with pytest.raises(ValueError, match="the cache has 27 columns and input_ids 20"):
        ours.generate(out[:, :20], **GREEDY, **{CACHE: cache})


def test_gradients_through_a_cache_are_refused() -> None:
    _, ours = pair(lambda m: m.requires_grad_(True))
    with pytest.raises(pikv_ds.PiKVError, match=r"keeps no gradients: .* torch\.no_grad"):
        ours(prompt(1, 20), **{CACHE: pikv_ds.new_cache(ours)})
    with torch.no_grad():
        ours(prompt(1, 20), **{CACHE: pikv_ds.new_cache(ours)})


# -- passes without our cache are the model's own -----------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_static_cache_in_a_plain_pass(masked: bool) -> None:
    alone, ours = pair()
    ids, mask = prompt(2, 12), torch.ones(2, 12).long()
    mask[0, :4] = 0
    outputs = []
    for model in (ours, alone):
        cache = StaticCache(config=model.config, max_cache_len=32)
        pieces = []
        with torch.no_grad():
            for start, end in ((0, 8), (8, 9), (9, 12)):
                given = {"attention_mask": mask[:, :end]} if masked else {}
                positions = torch.arange(start, end)[None]
                out = model(ids[:, start:end], position_ids=positions, **given, **{CACHE: cache})
                pieces.append(out.logits)
        outputs.append(torch.cat(pieces, 1)[mask.bool()])
    assert close(*outputs)


def test_packed_texts_in_a_plain_pass() -> None:
    alone, ours = pair()
    ids, positions = prompt(1, 12), torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        mine, theirs = (m(ids, position_ids=positions, use_cache=False).logits for m in (ours, alone))
    assert close(mine, theirs)
    with torch.no_grad():
        assert not close(theirs, alone(ids, use_cache=False).logits)


def test_dropout_in_a_plain_pass_and_with_a_cache() -> None:
    model = tiny.mixtral(attention_dropout=0.5).train()
    pikv_ds.attach(model, SETTINGS)
    ids = prompt(2, 12)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        with pytest.raises(UnsupportedModelError, match=r"attention_dropout = 0\.5 .* model\.eval"):
            model(ids, **{CACHE: pikv_ds.new_cache(model)})


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_that_is_not_causal_is_refused(when: str) -> None:
    model = tiny.mixtral()
    if when == "after":
        pikv_ds.attach(model, SETTINGS)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    use = {"before": lambda: pikv_ds.attach(model, SETTINGS), "after": lambda: model(prompt(1, 12))}[when]
    with pytest.raises(UnsupportedModelError, match="causal"):
        use()


# -- attach and detach --------------------------------------------------------------------------


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_that_does_not_generate_is_refused_whole() -> None:
    model = MixtralModel(tiny.mixtral().config).eval()
    with pytest.raises(UnsupportedModelError, match="MixtralModel does not generate text"):
        pikv_ds.attach(model, SETTINGS)
    assert hooks(model) == 0


def test_an_attach_that_fails_midway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = tiny.mixtral(), tiny.mixtral().config._attn_implementation

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("out of luck")

    monkeypatch.setattr(model, "set_attn_implementation", fail)
    with pytest.raises(KeyError):
        pikv_ds.attach(model, SETTINGS)
    monkeypatch.undo()
    assert hooks(model) == 0
    assert not any(hasattr(m, "_pikv") for m in model.modules())
    assert model.config._attn_implementation == before
    pikv_ds.attach(model, SETTINGS)
    assert torch.equal(model.generate(prompt(1, 20), **GREEDY), tiny.mixtral().generate(prompt(1, 20), **GREEDY))


def test_a_model_that_shares_layers_with_an_attached_one_is_refused() -> None:
    _, ours = pair()
    other = MixtralForCausalLM(tiny.mixtral().config).eval()
    other.model = ours.model
    with pytest.raises(UnsupportedModelError, match="shares layers with a model that PiKV is attached to"):
        pikv_ds.attach(other, SETTINGS)
    assert torch.equal(ours.generate(prompt(1, 20), **GREEDY), tiny.mixtral().generate(prompt(1, 20), **GREEDY))


def test_a_generate_of_the_users_own_comes_back() -> None:
    model = tiny.mixtral()
    own = model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.generate = mine
    pikv_ds.attach(model, SETTINGS)
    pikv_ds.detach(model)
    assert model.generate is mine


def test_a_layer_whose_experts_do_not_run_is_named() -> None:
    _, ours = pair()
    ours.model.layers[1].mlp = tiny.mixtral().model.layers[1].mlp
    with pytest.raises(pikv_ds.PiKVError, match=r"layer 1 is still open: the experts of that layer did not run"):
        ours.generate(prompt(1, 20), **GREEDY)
