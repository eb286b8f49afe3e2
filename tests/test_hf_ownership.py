"""A cache serves the model that it was made for; whoever else uses it is refused before a token is wrong."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import pikv_ds
from pikv_ds.api import attachment_of
from pikv_ds.integrations.hf.attachment import UnsupportedModelError
from pikv_ds.integrations.hf.cache import PiKVCache

SETTINGS = {"page_size": 8, "debug": True}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def attached(seed: int = 0, **config: Any) -> PreTrainedModel:
    model = tiny.mixtral(seed=seed)
    pikv_ds.attach(model, {**SETTINGS, **config})
    return model


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return tiny.prompt(batch, length, seed).clamp(min=1)


def used_cache(model: PreTrainedModel) -> PiKVCache:
    """A cache with 20 tokens of one sequence in it."""
    cache = pikv_ds.new_cache(model)
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
    return cache


# -- whose cache it is --------------------------------------------------------------------------


def unattached(owner: PreTrainedModel) -> PreTrainedModel:
    return tiny.mixtral()


def attached_elsewhere(owner: PreTrainedModel) -> PreTrainedModel:
    return attached(seed=1)


def attached_anew(owner: PreTrainedModel) -> PreTrainedModel:
    pikv_ds.detach(owner)
    pikv_ds.attach(owner, SETTINGS)
    return owner


def detached(owner: PreTrainedModel) -> PreTrainedModel:
    pikv_ds.detach(owner)
    return owner


def with_other_attention(owner: PreTrainedModel) -> PreTrainedModel:
    owner.set_attn_implementation("sdpa")
    return owner


MISUSES: dict[Callable[[PreTrainedModel], PreTrainedModel], str] = {
    unattached: "another model was given a cache of the MixtralForCausalLM",
    attached_elsewhere: "another model was given a cache of the MixtralForCausalLM",
    attached_anew: "PiKV was detached from MixtralForCausalLM after this cache was made",
    detached: "PiKV was detached from MixtralForCausalLM after this cache was made",
    with_other_attention: r'set_attn_implementation\("sdpa"\) has taken PiKV out',
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("misuse", MISUSES)
def test_a_forward_pass_with_a_cache_that_is_not_its_own(
    misuse: Callable[[PreTrainedModel], PreTrainedModel], used: bool
) -> None:
    owner = attached()
    cache = used_cache(owner) if used else pikv_ds.new_cache(owner)
    columns = cache.get_seq_length()
    user = misuse(owner)
    with pytest.raises(pikv_ds.PiKVError, match=MISUSES[misuse]), torch.no_grad():
        user(prompt(1, 5), past_key_values=cache)
    assert cache.get_seq_length() == columns


@pytest.mark.parametrize("misuse", MISUSES)
def test_generate_with_a_cache_that_is_not_its_own(misuse: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    owner = attached()
    cache, ids = used_cache(owner), prompt(1, 25)
    user = misuse(owner)
    with pytest.raises((ValueError, pikv_ds.PiKVError), match=f"{MISUSES[misuse]}|not a cache of this MixtralFor"):
        user.generate(ids, past_key_values=cache, **GREEDY)


def test_other_attention_is_refused_in_generate_and_back_again_works() -> None:
    model, ids = attached(), prompt(2, 30)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'set_attn_implementation\("sdpa"\) has taken PiKV out'):
        model.generate(ids, **GREEDY)
    model.set_attn_implementation("pikv_ds")
    assert torch.equal(model.generate(ids, **GREEDY), tiny.mixtral().generate(ids, **GREEDY))
    model.set_attn_implementation("eager")
    pikv_ds.detach(model)
    assert model.config._attn_implementation == "eager"  # what the user has set since stays
    assert torch.equal(model.generate(ids, **GREEDY), tiny.mixtral().generate(ids, **GREEDY))


def test_the_owner_goes_on_after_somebody_elses_attempt() -> None:
    owner, ids = attached(), prompt(1, 30)
    cache = pikv_ds.new_cache(owner)
    with torch.no_grad():
        owner(ids[:, :20], past_key_values=cache)
        with pytest.raises(pikv_ds.PiKVError):
            tiny.mixtral()(ids[:, 20:], past_key_values=cache)
        ours = owner(ids[:, 20:], past_key_values=cache).logits
        theirs = tiny.mixtral()(ids).logits[:, 20:]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_an_attention_that_does_not_take_what_was_announced() -> None:
    """`update` tells the model's attention what comes; here a module swallows it."""
    model = attached()
    attention = model.model.layers[1].self_attn

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        k, v = (p(hidden_states).unflatten(-1, (2, 16)).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
        cache.update(k, v, 1)
        return torch.zeros_like(hidden_states), None

    attention.forward = forward
    with pytest.raises(pikv_ds.PiKVError, match="layer 1 does not attend through"), torch.no_grad():
        model(prompt(1, 20), past_key_values=pikv_ds.new_cache(model))


COPIES = [(what, how) for what in ("cache", "model", "layer", "output") for how in (copy.deepcopy, pickle.dumps)]
COPIES.append(("cache", copy.copy))  # of the others it has the same modules, or the same cache


@pytest.mark.parametrize(("what", "how"), COPIES)
def test_copies_are_refused(what: str, how: Callable[[Any], Any]) -> None:
    model = attached()
    if what == "output":
        thing: Any = model.generate(prompt(1, 20), return_dict_in_generate=True, **GREEDY)
    else:
        thing = {"cache": used_cache(model), "model": model, "layer": model.model.layers[0]}[what]
    with pytest.raises(NotImplementedError, match=r"does not copy or save caches|call pikv_ds\.detach first"):
        how(thing)


def test_a_detached_model_can_be_copied_again() -> None:
    model, ids = attached(), prompt(1, 20)
    pikv_ds.detach(model)
    assert torch.equal(copy.deepcopy(model).generate(ids, **GREEDY), tiny.mixtral().generate(ids, **GREEDY))


# -- transformers' protocol ---------------------------------------------------------------------


def test_nothing_of_transformers_cache_is_inherited_unseen() -> None:
    """What `Cache` answers from its list of layers would be wrong: PiKV's has none. A new method must be looked at."""
    inherited = {name for name in vars(Cache) if not name.startswith("__")} - set(vars(PiKVCache))
    assert inherited == set()


@pytest.mark.parametrize(
    "name", ["get_conv_state", "update_recurrent_state", "has_previous_state", "prefetch", "early_initialization"]
)
def test_what_is_not_kept_says_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match="PiKV"):
        getattr(pikv_ds.new_cache(attached()), name)(0)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_of_transformers_names_for_a_cache(name: str) -> None:
    model, ids = attached(), prompt(2, 20)
    own = pikv_ds.new_cache(model)
    assert torch.equal(model.generate(ids, **{name: own}, **GREEDY), tiny.mixtral().generate(ids, **GREEDY))
    assert own.get_seq_length() == 31
    with pytest.raises(ValueError, match="are the same argument"):
        model.generate(ids, past_key_values=own, cache=own, **GREEDY)


def test_a_cache_that_is_not_pikvs_is_refused_by_either_name() -> None:
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="DynamicCache"):
            attached().generate(prompt(1, 10), **{name: DynamicCache()}, **GREEDY)


# -- a model that is changed under the cache ----------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
@pytest.mark.parametrize("when", ["before the first pass", "between passes"])
def test_a_cast_after_attach_is_refused(cast: str, when: str) -> None:
    model, ids = attached(), prompt(1, 30)
    cache = pikv_ds.new_cache(model)
    with torch.no_grad():
        if when == "between passes":
            model(ids[:, :20], past_key_values=cache)
        getattr(model, cast)()
        words = (
            r"keys or values are torch\.\w+, but they were torch.float32 when PiKV was attached: cast the model first"
        )
        with pytest.raises(pikv_ds.PiKVError, match=words):
            model(ids[:, cache.get_seq_length() :], past_key_values=cache)
        with pytest.raises(pikv_ds.PiKVError, match=words):
            model.generate(ids, **GREEDY)
    pikv_ds.detach(model)
    if cast == "bfloat16":
        pikv_ds.attach(model, SETTINGS)
        assert model.generate(ids, **GREEDY).shape == (1, 42)


def test_autocast_is_refused() -> None:
    with (
        pytest.raises(pikv_ds.PiKVError, match="leave autocast out"),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        attached().generate(prompt(1, 30), **GREEDY)


def test_weights_on_meta_are_refused() -> None:
    model = tiny.mixtral()
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"meta device \(offloaded"):
        pikv_ds.attach(model, SETTINGS)


def test_accelerates_offloading_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny.mixtral(), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="without accelerate's offloading"):
        pikv_ds.attach(model, SETTINGS)


# -- several threads ----------------------------------------------------------------------------


def test_calls_of_generate_from_several_threads_wait_for_each_other() -> None:
    model, alone = attached(), tiny.mixtral()
    texts = [prompt(1 + i % 2, 20 + 3 * i, i) for i in range(6)]
    ours: dict[int, torch.Tensor] = {}
    errors: list[Exception] = []

    def call(i: int) -> None:
        try:
            ours[i] = model.generate(texts[i], **GREEDY)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, ids in enumerate(texts):
        assert torch.equal(ours[i], alone.generate(ids, **GREEDY))


PAUSES = ["before its keys are announced", "between announcement and attention", "between two layers"]


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("other", ["with a cache", "without a cache"])
def test_forward_passes_of_two_threads_at_a_time(other: str, pause: str) -> None:
    """The first keeps its tokens; another with a cache is refused, and one without a cache is not concerned."""
    model, ids = attached(), prompt(2, 30)
    within, go_on = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        if threading.current_thread() is thread:
            within.set()
            assert go_on.wait(60)

    layers = model.model.layers
    where = {PAUSES[0]: layers[0].self_attn.k_proj, PAUSES[2]: layers[0].mlp}
    cache = pikv_ds.new_cache(model)
    if pause in where:
        where[pause].register_forward_pre_hook(wait)
    else:
        update = cache.update

        def announce(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            out = update(key, value, layer, *args, **kwargs)
            if layer == 1:
                wait()
            return out

        cache.update = announce  # type: ignore[method-assign]
    outcome: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                outcome.append(model(ids, past_key_values=cache).logits)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert within.wait(60)
    with torch.no_grad():
        theirs = tiny.mixtral()(ids).logits
        started = pause != PAUSES[0]
        if other == "with a cache" and started:
            with pytest.raises(pikv_ds.PiKVError, match="another thread makes a forward pass"):
                model(ids, past_key_values=pikv_ds.new_cache(model))
        else:
            ours = model(ids, past_key_values=pikv_ds.new_cache(model) if other == "with a cache" else None).logits
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        go_on.set()
        thread.join()
        assert isinstance(outcome[0], torch.Tensor), outcome[0]
        assert (outcome[0] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        again = model(ids, past_key_values=pikv_ds.new_cache(model)).logits  # nobody's turn is left over
    assert (again - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_pass_that_fails_in_another_thread_gives_its_turn_back() -> None:
    model, ids = attached(), prompt(1, 30)

    def failing(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("out of luck")

    model.model.layers[1].mlp.register_forward_pre_hook(failing)
    errors: list[Exception] = []

    def run() -> None:
        try:
            with torch.no_grad():
                model(ids, past_key_values=pikv_ds.new_cache(model))
        except KeyError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert torch.equal(model.generate(ids, **GREEDY), tiny.mixtral().generate(ids, **GREEDY))


# -- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["attach, then compile the forward", "compile the module, then attach"])
def test_a_compiled_forward(case: str) -> None:
    ids, options = prompt(2, 30), {**GREEDY, "max_new_tokens": 4}
    model: Any = tiny.mixtral()
    model.set_experts_implementation("eager")  # transformers' default for experts does not compile on a CPU
    torch._dynamo.reset()
    try:
        if case.startswith("attach"):
            pikv_ds.attach(model, SETTINGS)
            model.forward = torch.compile(model.forward, backend="eager")
        else:
            model = torch.compile(model, backend="eager")
            pikv_ds.attach(model, SETTINGS)
        assert torch.equal(model.generate(ids, **options), tiny.mixtral().generate(ids, **options))
        assert attachment_of(model).store.sender.counters["seals"] > 0
    finally:
        torch._dynamo.reset()


# -- arguments of generate ----------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_position_ids(chunk: int | None, rows: int) -> None:
    """Positions that skip some, the same for all rows or for each: with and without chunks as transformers'."""
    model, ids = attached(prefill_chunk_tokens=chunk), prompt(2, 29)
    positions = torch.arange(29)[None].repeat(rows, 1)
    positions[:, 10:] += 40
    positions[-1, 20:] += 7
    arguments = {"position_ids": positions, "attention_mask": torch.ones_like(ids), **GREEDY}
    theirs = tiny.mixtral().generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), theirs)
    assert not torch.equal(theirs, tiny.mixtral().generate(ids, **GREEDY))  # they matter


@pytest.mark.parametrize("chunk", [None, 8])
def test_position_ids_of_repeated_prompts(chunk: int | None) -> None:
    outputs = []
    positions = torch.arange(29)[None].repeat(2, 1) + torch.tensor([[0], [30]])
    for model in (attached(prefill_chunk_tokens=chunk), tiny.mixtral()):
        torch.manual_seed(3)
        arguments = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "position_ids": positions}
        outputs.append(model.generate(prompt(2, 29), **arguments))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, "inputs_embeds are not supported; pass input_ids"),
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"attention_mask must be \[1, tokens\], got \[1, 1, 20, 20\]"),
        ({"position_ids": torch.zeros(3, 1, 20)}, r"position_ids must be \[batch, tokens\], got \[3, 1, 20\]"),
        ({"attention_mask": torch.ones(2, 20)}, r"attention_mask must be \[1, tokens\], got \[2, 20\]"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str, chunk: int | None) -> None:
    with pytest.raises(ValueError, match=words):
        attached(prefill_chunk_tokens=chunk).generate(prompt(1, 20), **arguments, **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"position_ids": torch.arange(19)[None]}, "position_ids has 19 columns and input_ids 20"),
        ({"attention_mask": torch.ones(1, 27)}, "attention_mask has 27 columns and input_ids 20"),
        ({"token_type_ids": torch.zeros(1, 20)}, "token_type_ids is not supported with pikv.prefill_chunk_tokens"),
    ],
)
def test_arguments_that_are_refused_with_chunks(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attached(prefill_chunk_tokens=8).generate(prompt(1, 20), **arguments, **GREEDY)


def test_inputs_embeds_alone_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="inputs_embeds are not supported"):
        attached().generate(inputs_embeds=torch.zeros(1, 20, 64), **GREEDY)


def test_an_assistant_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match="assistant_model = MixtralForCausalLM is not supported") as raised:
        attached().generate(prompt(1, 10), assistant_model=tiny.mixtral(), **GREEDY)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "int2"])
def test_a_rows_tokens_do_not_depend_on_its_neighbours_padding(codec: str) -> None:
    """Chunks are cut by a row's own length; what it attends to as pages of a codec and what not stays the same."""
    model = attached(prefill_chunk_tokens=16, codec=codec)
    rows = [prompt(1, length, length) for length in (45, 61, 20, 13, 80)]
    alone = [model.generate(ids, **GREEDY)[0, -12:] for ids in rows]
    width = max(ids.shape[1] for ids in rows)
    ids = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    together = model.generate(ids, attention_mask=(ids != 0).long(), **GREEDY)[:, -12:]
    assert torch.equal(together, torch.stack(alone))


class Stopped(Exception):
    """What breaks passes off here."""


@pytest.mark.parametrize("where", ["attention", "experts", "norm"])
@pytest.mark.parametrize("between", [False, True])
def test_a_pass_that_was_broken_off_can_be_made_again(where: str, between: bool) -> None:
    """Positions, masks and tokens are as if it had never been, also if another cache's pass comes first."""
    model = tiny.mixtral()
    pikv_ds.attach(model, SETTINGS)
    ids = torch.arange(1, 31)[None]
    part = {
        "attention": model.model.layers[1].self_attn,
        "experts": model.model.layers[1].mlp,
        "norm": model.model.norm,
    }[where]

    def stop(*args: Any) -> None:
        raise Stopped

    with torch.no_grad():
        calm, cache = pikv_ds.new_cache(model), pikv_ds.new_cache(model)
        for own in (calm, cache):
            model(ids[:, :20], past_key_values=own)
        for new in (ids[:, 20:21], ids[:, 21:30]):
            expected = model(new, past_key_values=calm).logits
            hook = part.register_forward_pre_hook(stop)
            with pytest.raises(Stopped):
                model(new, past_key_values=cache)
            hook.remove()
            if between:
                model(ids[:, :3], past_key_values=pikv_ds.new_cache(model))
            assert torch.equal(model(new, past_key_values=cache).logits, expected)
            assert cache.get_seq_length() == calm.get_seq_length()
    pikv_ds.detach(model)
