"""Families of MoE models: the unsharded model's tokens, and pages placed by the experts that were really chosen."""

from __future__ import annotations

import warnings
from typing import Any

import families
import pytest
import tiny
import torch
from torch import nn

import pikv_ds
from pikv_ds.api import attachment_of
from pikv_ds.integrations.routers import ExpertChoice, UnknownRouterError, find_choices

SETTINGS = {"page_size": 8, "debug": True}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompt() -> torch.Tensor:
    return tiny.prompt(2, 40).clamp(min=1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_tokens_and_placement(family: str) -> None:
    model, ids = families.build(family), prompt()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have experts, but PiKV cannot read")
        pikv_ds.attach(model, SETTINGS)
    store = attachment_of(model).store
    votes: dict[int, torch.Tensor] = {}

    def count(batch: Any, layer: int, experts: torch.Tensor | None) -> None:
        assert experts is not None
        votes[layer] = votes.get(layer, 0) + torch.bincount(experts.flatten(), minlength=families.EXPERTS)
        routed(batch, layer, experts)

    routed, store.routed = store.routed, count  # type: ignore[method-assign]
    assert torch.equal(model.generate(ids, **GREEDY), families.build(family).generate(ids, **GREEDY))
    assert store.shape.num_experts == families.EXPERTS
    assert pikv_ds.stats(model)["unrouted_layers"] == []
    assert {layer: int(n.sum()) for layer, n in votes.items()} == {0: 204, 1: 204}
    assert store.sender.counters["seals"] == 2 * 2 * (51 // 8)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_experts_that_are_read_are_those_that_compute(family: str) -> None:
    """An expert that is never read to be chosen has no influence, and one that is has."""
    model, ids = families.build(family), prompt()
    choice = next(iter(find_choices(model).values()))
    read: list[torch.Tensor] = []
    handle = choice.watch(lambda experts: read.append(experts))
    with torch.no_grad():
        before = model(ids).logits
        handle.remove()
        experts = read[0].view(2, 40, -1)
        for expert in range(families.EXPERTS):
            changed = families.build(family)
            _spoil(changed, next(iter(find_choices(changed))), expert)
            difference = (changed(ids).logits - before).abs().amax(-1) > 1e-6
            chosen = (experts == expert).any(-1)
            # A token's first difference is where it, or one before it, has chosen the expert at the first layer.
            assert torch.equal(difference[:, 0], chosen[:, 0])
            assert not difference[chosen.cumsum(1) == 0].any()


def _spoil(model: nn.Module, shows_choice: nn.Module, expert: int) -> None:
    """Changes one expert of the first layer."""
    block = next(m for m in model.modules() if shows_choice in m.children())
    for name, parameter in block.named_parameters():
        if "shared" in name or "router" in name or "gate." in name or name.startswith("wg"):
            continue
        if parameter.dim() == 3:
            parameter[expert] *= 1.5
        elif parameter.shape[0] % families.EXPERTS == 0 and ".mlp." in f".{name}":  # dbrx: stacked in rows
            parameter.view(families.EXPERTS, -1)[expert] *= 1.5


class HiddenExperts(nn.Module):
    """Takes nothing by name, so nobody can tell what the second argument is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class ManyBlocks(HiddenExperts):
    """Takes the choice, but does not say of how many experts."""

    def forward(self, hidden: Any, indices: Any, weights: Any) -> Any:
        return self.inner(hidden, indices, weights)

    def parameters(self, recurse: bool = True) -> Any:
        return iter(p.flatten() for p in super().parameters(recurse))


@pytest.mark.parametrize("kind", [HiddenExperts, ManyBlocks])
def test_a_layer_whose_choice_cannot_be_read_is_named(kind: type[HiddenExperts]) -> None:
    model, ids = tiny.mixtral(num_layers=3), prompt()
    for layer in (0, 2):
        block = model.model.layers[layer].mlp
        block.experts = kind(block.experts)
    with pytest.warns(UserWarning, match="MixtralForCausalLM: layers 0, 2 have experts, but PiKV cannot read"):
        pikv_ds.attach(model, SETTINGS)
    figures = pikv_ds.stats(model)
    assert figures["unrouted_layers"] == [0, 2]
    assert torch.equal(model.generate(ids, **GREEDY), tiny.mixtral(num_layers=3).generate(ids, **GREEDY))


def test_dense_layers_are_unrouted_without_a_warning() -> None:
    model = tiny.qwen3_moe(num_layers=3, dense_layers=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pikv_ds.attach(model, SETTINGS)
    assert pikv_ds.stats(model)["unrouted_layers"] == [1]
    dense = tiny.llama()
    pikv_ds.attach(dense, SETTINGS)
    assert pikv_ds.stats(dense)["unrouted_layers"] == [0, 1]


def test_layers_with_different_numbers_of_experts_are_refused() -> None:
    model = tiny.mixtral()
    model.model.layers[1] = tiny.mixtral(num_experts=4).model.layers[1]
    with pytest.raises(ValueError, match=r"different numbers of experts \(\[4, 8\]\)"):
        pikv_ds.attach(model, SETTINGS)


@pytest.mark.parametrize("given", [(), (torch.zeros(2, 3), torch.zeros(2, 2)), (torch.zeros(2, 3), None)])
def test_experts_that_are_given_something_else(given: tuple[Any, ...]) -> None:
    class Experts(nn.Module):
        num_experts = 4

        def forward(self, hidden: Any = None, indices: Any = None, weights: Any = None) -> None:
            return None

    block = nn.Module()
    block.experts = Experts()
    (choice,) = find_choices(block).values()
    choice.watch(lambda experts: None)
    with pytest.raises(UnknownRouterError, match="instead of a table of expert indices"):
        block.experts(*given)


def test_a_gate_that_returns_something_else() -> None:
    class Gate(nn.Module):
        num_experts, top_k = 4, 2

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, hidden: torch.Tensor) -> Any:
            return self.layer(hidden), hidden.long()

    block = nn.Module()
    block.router = Gate()
    (choice,) = find_choices(block).values()
    assert isinstance(choice, ExpertChoice)
    choice.watch(lambda experts: None)
    with pytest.raises(UnknownRouterError, match="does not end with logits"):
        block.router(torch.zeros(3, 8))
