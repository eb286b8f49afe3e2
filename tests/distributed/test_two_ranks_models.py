"""Two ranks: what the model and DeepSpeed's configuration may be, and whose a cache is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import tiny
import torch
import torch.distributed as dist
from cases import Raised, Work, catching
from harness import Ranks, ranks_fixture
from transformers import AutoModelForCausalLM, StoppingCriteriaList

import pikv_ds
from pikv_ds.integrations.deepspeed import _cast, _take_dtype

pytestmark = pytest.mark.distributed
ranks = ranks_fixture(2)


def autoep_parity(rank: int, family: str) -> dict[str, Any]:
    whole, reference = families.build(family), families.build(family)
    engine = pikv_ds.initialize(whole, cases.settings({}))
    result = cases.side_by_side(engine, reference, Work(2 - rank, 30 + 20 * rank, 10), rank)
    return {**result, "stats": pikv_ds.stats(engine)}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_families_that_autoep_has_a_preset_for(ranks: Ranks, family: str) -> None:
    results = ranks.run(autoep_parity, family=family)
    cases.assert_parity(results)
    assert all(r["stats"]["unrouted_layers"] == [] for r in results)


def autoep_refused(rank: int, family: str) -> Raised:
    with catching() as raised:
        pikv_ds.initialize(families.build(family), cases.settings({}))
    return raised


def test_a_family_without_a_preset_is_refused_with_those_that_have_one(ranks: Ranks) -> None:
    for raised in ranks.run(autoep_refused, family="olmoe"):
        assert raised.kind == "ConfigError"
        for word in ("'olmoe'", "mixtral", "qwen2_moe", "qwen3_5_moe_text", "pikv_ds.attach"):
            assert word in raised.message


def attached_family(rank: int, family: str) -> dict[str, Any]:
    model = families.build(family)
    pikv_ds.attach(model, cases.settings({})["pikv"], ep_group=dist.group.WORLD)
    result = cases.side_by_side(model, families.build(family), Work(2 - rank, 30 + 20 * rank, 10), rank)
    return {**result, "stats": pikv_ds.stats(model)}


@pytest.mark.parametrize("family", ["glm4_moe", "granitemoe", "dbrx"])
def test_families_whose_experts_are_on_every_rank(ranks: Ranks, family: str) -> None:
    cases.assert_parity(ranks.run(attached_family, family=family))


def dtype_by_configuration(rank: int, folder: str, section: str, dtype: str) -> dict[str, Any]:
    """A float32 model cast by the configuration, beside one that transformers has loaded in the dtype."""
    ids = tiny.prompt(2, 300, rank).clamp(min=1)
    out = []
    for loaded, extra in (("float32", {section: {"enabled": True}}), (dtype, {})):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, loaded))
        engine = pikv_ds.initialize(model, {**cases.settings({}), **extra})
        out.append(engine.module.generate(ids, **cases.options(max_new_tokens=8)))
    return {"dtype": str(model.dtype), "same": torch.equal(torch.stack(out[0].logits), torch.stack(out[1].logits))}


@pytest.mark.parametrize(("section", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_dtypes_of_deepspeeds_configuration(ranks: Ranks, tmp_path: Path, section: str, dtype: str) -> None:
    tiny.mixtral(initializer_range=0.02).save_pretrained(tmp_path)
    for result in ranks.run(dtype_by_configuration, folder=str(tmp_path), section=section, dtype=dtype):
        assert result == {"dtype": f"torch.{dtype}", "same": True}


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "minimax_m2", "ernie4_5_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_is_as_transformers_loads_it(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    families.build(family).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _cast(ours, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for kind in ("named_parameters", "named_buffers"):
        wanted = dict(getattr(theirs, kind)())
        for name, tensor in getattr(ours, kind)():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(tensor, wanted[name]), name
    assert ours.config.dtype == theirs.config.dtype


def test_dtype_sections() -> None:
    settings = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "loss_scale": 0}, "steps_per_print": 1}
    assert _take_dtype(settings) == torch.float16
    assert settings == {"steps_per_print": 1}
    assert _take_dtype({"bf16": {}}) is None
    with pytest.raises(pikv_ds.ConfigError, match="bf16 and fp16 are both enabled"):
        _take_dtype({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    with pytest.raises(pikv_ds.ConfigError, match=r"bf16\.enabled = 'auto': use true or false"):
        _take_dtype({"bf16": {"enabled": "auto"}})
    with pytest.raises(pikv_ds.ConfigError, match="bf16 = True: use a JSON object"):
        _take_dtype({"bf16": True})


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
def test_another_models_cache_is_an_error_of_all_ranks(ranks: Ranks, who: tuple[int, ...], how: str) -> None:
    words = {
        "forward": "another model was given a cache of the Mixtral",
        "generate": "not a cache of this MixtralForCausalLM",
    }
    for result in ranks.run(foreign_cache, who=who, how=how):
        assert words[how] in result["raised"].message
        assert result["after"].kind == ""


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3"),
        ({"zero_optimization": 3}, "zero_optimization = 3: use a JSON object"),
        ({"expert_parallel": True}, "expert_parallel = True: use a JSON object"),
        ({"expert_parallel": {"enabled": "yes"}}, "expert_parallel.enabled = 'yes'"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3"),
    ],
)
def test_deepspeeds_settings_that_cannot_work(ranks: Ranks, extra: dict[str, Any], words: str) -> None:
    for raised, dtype in ranks.run(initialized_with, extra=extra):
        assert raised.kind == "ConfigError"
        assert words in raised.message
        assert dtype == "torch.float32"  # nothing has been done to the model


def initialized_with(rank: int, extra: dict[str, Any]) -> tuple[Raised, str]:
    model = tiny.mixtral()
    with catching() as raised:
        pikv_ds.initialize(model, {**cases.settings({}), **extra})
    return raised, str(model.dtype)


def interrupted(rank: int, kind: str) -> tuple[str, str, float]:
    """Ctrl-C, or a script that ends, between two passes of rank 1."""

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if rank == 1 and ids.shape[1] >= 23:
            raise {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}[kind]("enough")
        return torch.zeros(len(ids), dtype=torch.bool)

    model = cases.attached("mixtral", {})
    started = time.monotonic()
    try:
        model.generate(tiny.prompt(1, 20, rank), max_new_tokens=9, stopping_criteria=StoppingCriteriaList([stop]))
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", 0.0


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
def test_an_interrupt_of_one_rank_between_passes_reaches_the_other(ranks: Ranks, kind: str) -> None:
    (other, message, seconds), (own, *_) = ranks.run(interrupted, kind=kind)
    assert (own, other) == (kind, "PeerError")
    assert f"rank 1: {kind}" in message
    assert seconds < 10  # of a time-out of 20


def chunked_alone_and_together(rank: int) -> bool:
    """A row's int4 tokens, whatever the others of its batch and of the other rank are."""
    model = cases.attached("mixtral", {"codec": "int4", "prefill_chunk_tokens": 16})
    ids = tiny.prompt(1, 45, rank).clamp(min=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(ids, **options)[0, -8:]
    wide = torch.cat([torch.nn.functional.pad(ids, (13 + 5 * rank, 0)), tiny.prompt(1, 58 + 5 * rank, 9).clamp(min=1)])
    together = model.generate(wide, attention_mask=(wide != 0).long(), **options)[0, -8:]
    return torch.equal(alone, together)


def test_a_rows_tokens_do_not_depend_on_its_neighbours(ranks: Ranks) -> None:
    assert ranks.run(chunked_alone_and_together) == [True, True]
