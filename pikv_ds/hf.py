"""Hugging Face models: PiKV under `generate`, by transformers' own conventions.

* an attention function in transformers' registry, which the model's layers call;
* a `Cache` subclass, through which the layers hand over their new keys and values;
* forward hooks on the routers, which tell a page's home expert.

The model's code and parameters stay as they are; `detach` restores everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pikv_ds.cache import ExpertShardedKVCache, ModelShape
from pikv_ds.hf_cache import LayerTap, PiKVCache, UnsupportedModelError
from pikv_ds.hf_generate import generate

ATTENTION = "pikv_ds"
"""Name under which our attention is registered with transformers."""

ReadExperts = Callable[[Any], Tensor]
"""Takes a router's output to the chosen experts, int ``[tokens, k]``, -1 for dropped."""


class Attachment:
    """A model with PiKV under it. `detach` restores the model exactly.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface`.
        make_store: builds the rank's cache for the model's shape.
        routers: how to read the choice of experts from each router's output.
        num_experts: of the routed layers, as all EP ranks count them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make_store: Callable[[ModelShape], ExpertShardedKVCache],
        routers: Mapping[nn.Module, ReadExperts],
        num_experts: int,
    ) -> None:
        check_supported(model)
        self.model = model
        pairs = pair_routers(model, routers)
        if not pairs:
            raise UnsupportedModelError(
                f"{type(model).__name__}: no attention layer found that PiKV knows how to hook"
            )
        self.store = make_store(model_shape(model, [a for a, _ in pairs], num_experts))
        self.layers: dict[int, LayerTap] = {}
        self._hooks: list[Any] = []
        self._attention_modules: list[nn.Module] = []
        for index, (attention, router) in enumerate(pairs):
            layer = LayerTap(index, router is not None)
            self.layers[attention.layer_idx] = layer  # type: ignore[index]
            attention._pikv = layer  # type: ignore[assignment]
            self._attention_modules.append(attention)
            if router is not None:
                hook = functools.partial(_router_ran, layer, routers[router])
                self._hooks.append(router.register_forward_hook(hook))
            if self.store.evictor.wants_source:
                keep = functools.partial(_keep_inputs, layer)
                self._hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
                attention.__dict__["rotary_emb"] = model.base_model.rotary_emb  # where kvpress looks for it
        self._previous = model.config._attn_implementation
        AttentionInterface.register(ATTENTION, pikv_attention)
        AttentionMaskInterface.register(ATTENTION, _padding_mask)
        model.set_attn_implementation(ATTENTION)
        self._generate = model.generate
        self._get_criteria = model._get_stopping_criteria
        model.generate = functools.wraps(model.generate)(functools.partial(generate, self))

    def new_cache(self, release_finished: bool = False) -> PiKVCache:
        """An empty cache for one batch; pass it as ``past_key_values``."""
        cache = PiKVCache(self.store, release_finished)
        cache.layer_of = self.layers
        return cache

    def detach(self) -> None:
        """Takes PiKV out of the model again."""
        for hook in self._hooks:
            hook.remove()
        for attention in self._attention_modules:
            del attention._pikv
            attention.__dict__.pop("rotary_emb", None)
        if self.store.table.trace is not None:
            self.store.table.trace.close()
        del self.model.generate
        self.model.set_attn_implementation(self._previous)


def check_supported(model: nn.Module) -> None:
    """Refuses, by name, what the cache would get wrong.

    Raises:
        UnsupportedModelError: with the module or setting and what to do.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is no transformers model; PiKV hooks attention through transformers")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not use transformers' AttentionInterface, so PiKV cannot hook it")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{name}: sliding_window = {config.sliding_window} is not supported; set it to None if the model allows"
        )
    other = sorted({t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"})
    if other:
        raise UnsupportedModelError(f"{name}: layer types {', '.join(other)} are not supported, only full_attention")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name}: multi-head latent attention (kv_lora_rank) is not supported here")
    for key in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, key, None):
            raise UnsupportedModelError(f"{name}: {key} = {getattr(config, key)} is not supported")


def hf_routers(model: nn.Module) -> dict[nn.Module, ReadExperts]:
    """Routers of transformers' own MoE layers: ``(logits, weights, indices [tokens, k])``."""
    return {m: _read_integers for m in model.modules() if type(m).__name__.endswith("TopKRouter")}


def _read_integers(output: Any) -> Tensor:
    """The one table of integers in a router's output."""
    tables = [t for t in output if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point()]
    if len(tables) != 1:
        raise UnsupportedModelError("a router's output has no table of expert indices [tokens, k]")
    return tables[0]


def pair_routers(
    model: nn.Module, routers: Mapping[nn.Module, ReadExperts]
) -> list[tuple[nn.Module, nn.Module | None]]:
    """Each attention module with the router that follows it, None at dense layers, in order."""
    pairs: list[tuple[nn.Module, nn.Module | None]] = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "num_key_value_groups"):
            pairs.append((module, None))
        elif module in routers and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], module)
    return pairs


def model_shape(model: PreTrainedModel, attentions: list[nn.Module], num_experts: int) -> ModelShape:
    """The model's shape; all attention layers must have the same.

    Raises:
        UnsupportedModelError: layers differ in heads or head size.
    """
    config = model.config.get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {int(a.head_dim) for a in attentions}  # type: ignore[arg-type]
    groups = {int(a.num_key_value_groups) for a in attentions}  # type: ignore[arg-type]
    if len(sizes) != 1 or groups != {heads // kv_heads}:
        raise UnsupportedModelError(
            f"{type(model).__name__}: all layers must share head_dim and KV heads, got {sizes}, {groups}"
        )
    return ModelShape(len(attentions), heads, kv_heads, sizes.pop(), num_experts, model.dtype)


def pikv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in transformers' registry.

    Args:
        query: ``[B, H, T, D]``; key, value: ``[B, K, T, D]``, new tokens only with a `PiKVCache`.
        attention_mask: ``[B, columns]``, 0 at padding, or None.

    Returns:
        ``[B, T, H, D]`` and None (there are no attention weights to return).

    Raises:
        UnsupportedModelError: attention sinks or soft capping, which would change the result.
    """
    for name in ("s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__}: attention with {name} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: LayerTap | None = getattr(module, "_pikv", None)
    if layer is None or layer.pending is None:
        if layer is not None:
            layer.running = None  # of a pass that failed before its router ran
        return _plain_attention(query, key, value, attention_mask, scale), None
    cache, layer.pending = layer.pending, None
    batch = cache.begin(key, attention_mask) if layer.index == 0 else cache.batch
    assert batch is not None
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, heads, D]
    inputs, layer.inputs = layer.inputs, None
    source = None if inputs is None else functools.partial(_source, cache, module, inputs)
    packed = cache.store.attend(
        batch, layer.index, cache.pack(query), cache.pack(key), cache.pack(value), scale, source=source
    )
    if layer.has_router:
        layer.running = (cache, (query.shape[0], query.shape[1]))
    else:
        cache.store.routed(batch, layer.index, None)
    return cache.unpack(packed, query), None


def _keep_inputs(layer: LayerTap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward hook before an attention, for retentions that look at its inputs."""
    layer.inputs = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs["position_embeddings"])


def _source(cache: PiKVCache, module: nn.Module, inputs: tuple[Tensor, tuple[Tensor, Tensor]], mine: slice) -> Any:
    """`Prompt.source` of the packed tokens `mine`: module, hidden states ``[1, n, hidden]``, keyword arguments."""
    hidden, positions = inputs
    pair = tuple(cache.pack(x.expand(hidden.shape[0], -1, -1))[mine][None] for x in positions)
    return module, cache.pack(hidden)[mine][None], {"position_embeddings": pair}


def _router_ran(layer: LayerTap, read: ReadExperts, module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a router: the pages of its layer can be sealed now."""
    if layer.running is None:
        return
    (cache, size), layer.running = layer.running, None
    assert cache.batch is not None
    cache.store.routed(cache.batch, layer.index, cache.pack(read(output).unflatten(0, size)))


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention for passes without a `PiKVCache`, so that an attached model stays a model."""
    t, n = query.shape[2], key.shape[2]
    visible = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)[None, None]
    if mask is not None and mask.dim() == 4:  # prepared by the caller, causality included
        visible = mask[..., :n]
    elif mask is not None:
        visible = visible & mask[:, None, None, :n].bool()
        visible = visible | torch.eye(t, n, dtype=torch.bool, device=query.device).roll(n - t, 1)  # no empty rows
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale).transpose(1, 2)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Our mask in transformers' registry: the plain padding mask, causality is the cache's."""
    return attention_mask
