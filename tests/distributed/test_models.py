"""What the model and DeepSpeed's configuration may be, over two ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import tiny
import torch
import torch.distributed as dist
from cases import UNEVEN, USUAL, Raised, Work, catching
from harness import Ranks, ranks_fixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pikv_ds
from pikv_ds.integrations.deepspeed import _cast, _read_gate, _take_dtype

pytestmark = pytest.mark.distributed
two = ranks_fixture(2)


def autoep_parity(rank: int, family: str) -> dict[str, Any]:
    whole, reference = families.build(family), families.build(family)
    engine = pikv_ds.initialize(whole, cases.settings({}))
    result = cases.side_by_side(engine, reference, Work(2 - rank, 30 + 20 * rank, 10), rank)
    return {**result, "stats": pikv_ds.stats(engine)}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_families_that_autoep_has_a_preset_for(two: Ranks, family: str) -> None:
    results = two.run(autoep_parity, family=family)
    cases.assert_parity(results)
    assert all(r["stats"]["unrouted_layers"] == [] for r in results)


def autoep_refused(rank: int, family: str) -> Raised:
    with catching() as raised:
        pikv_ds.initialize(families.build(family), cases.settings({}))
    return raised


def test_a_family_without_a_preset_is_refused_with_those_that_have_one(two: Ranks) -> None:
    for raised in two.run(autoep_refused, family="olmoe"):
        assert raised.kind == "ConfigError"
        for word in ("'olmoe'", "mixtral", "qwen2_moe", "qwen3_5_moe_text", "pikv_ds.attach"):
            assert word in raised.message


def attached_family(rank: int, family: str) -> dict[str, Any]:
    model = families.build(family)
    pikv_ds.attach(model, cases.settings({})["pikv"], ep_group=dist.group.WORLD)
    result = cases.side_by_side(model, families.build(family), Work(2 - rank, 30 + 20 * rank, 10), rank)
    return {**result, "stats": pikv_ds.stats(model)}


@pytest.mark.parametrize("family", ["glm4_moe", "granitemoe", "dbrx"])
def test_families_whose_experts_are_on_every_rank(two: Ranks, family: str) -> None:
    cases.assert_parity(two.run(attached_family, family=family))


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
def test_dtypes_of_deepspeeds_configuration(two: Ranks, tmp_path: Path, section: str, dtype: str) -> None:
    tiny.mixtral(initializer_range=0.02).save_pretrained(tmp_path)
    for result in two.run(dtype_by_configuration, folder=str(tmp_path), section=section, dtype=dtype):
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


# -- DeepSpeed's native MoE layers --------------------------------------------------------------


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
def test_native_moe_layers_among_dense_ones(two: Ranks, k: int, initialize: bool) -> None:
    works = UNEVEN if k == 2 else USUAL  # DeepSpeed's top-1 gate needs equal numbers of tokens
    arguments = {"k": k, "moe_layers": (1, 3), "initialize": initialize, "works": works}
    results = two.run(native_parity, **arguments)
    cases.assert_parity(results)
    assert [r["experts"] for r in results] == [4, 4]
    assert cases.assert_invariants([r["taken"] for r in results], 4, 4, 8) > 0


def test_native_moe_layer_with_an_empty_batch(two: Ranks) -> None:
    works = (Work(0, 5, 5), Work(2, 40, 10))
    results = two.run(native_parity, k=2, moe_layers=(0, 1, 2, 3), initialize=False, works=works)
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
