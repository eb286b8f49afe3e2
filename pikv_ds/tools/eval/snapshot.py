"""A prompt, prefilled once by the uncompressed model: what every method starts from.

Compression happens after a layer's attention, and does not change what later layers see of the prompt. So feeding a
method the keys, values (and queries, hidden states and chosen experts) of one prefill is the same as prefilling
with that method, and a table of forty methods costs one prefill per case and not forty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_ds.integrations.hf.cache import CACHE
from pikv_ds.integrations.routers import find_choices

NAME = "pikv_snapshot"


@dataclass
class LayerInputs:
    """What one attention module got for a prompt of n tokens."""

    module: nn.Module
    query: Tensor
    """``[1, H, n, D]``, positions encoded."""
    key: Tensor
    """``[1, K, n, D]``, the same."""
    value: Tensor
    hidden: Tensor
    """``[1, n, hidden]``"""
    positions: tuple[Tensor, Tensor]
    scale: float
    experts: Tensor | None = None
    """``[n, k]``: what the layer's router chose, where it has one."""


@dataclass
class Snapshot:
    """All layers of one prompt."""

    ids: Tensor
    layers: list[LayerInputs] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def full_cache(self) -> DynamicCache:
        """The uncompressed cache."""
        cache = DynamicCache()
        for i, layer in enumerate(self.layers):
            cache.update(layer.key.clone(), layer.value.clone(), i)
        return cache


def take(model: PreTrainedModel, ids: Tensor) -> Snapshot:
    """Prefills a prompt ``[1, n]`` with a model that nothing is attached to."""
    snapshot = Snapshot(ids)
    inputs: dict[nn.Module, tuple[Tensor, Any]] = {}
    plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float = 0.0, **kwargs: Any
    ) -> Any:
        hidden, positions = inputs.pop(module)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        snapshot.layers.append(LayerInputs(module, query, key, value, hidden, positions, scale))
        return plain(module, query, key, value, mask, dropout=dropout, **kwargs)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs[module] = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            kwargs["position_embeddings"],
        )

    def routed(experts: Tensor) -> None:
        snapshot.layers[-1].experts = experts

    ALL_ATTENTION_FUNCTIONS[NAME] = attention  # not the class's: kvpress overrides those when it is imported
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    hooks = [
        m.register_forward_pre_hook(before, with_kwargs=True)
        for m in model.modules()
        if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
    ]
    hooks += [choice.watch(routed) for choice in find_choices(model).values()]
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            model.base_model(ids, use_cache=True, **{CACHE: DynamicCache()})
    finally:
        model.set_attn_implementation(previous)
        del ALL_ATTENTION_FUNCTIONS[NAME]
        for hook in hooks:
            hook.remove()
    return snapshot
