"""Hugging Face models: PiKV under `generate`, by transformers' own conventions.

* an attention function in transformers' registry, which the model's layers call;
* a `Cache` subclass, through which the layers hand over their new keys and values;
* forward hooks where the choice of experts shows, which tell a page's home expert.

The model's code and parameters stay as they are; `detach` restores everything.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pikv_ds.core.cache import ExpertShardedKVCache, ModelShape
from pikv_ds.errors import PiKVError
from pikv_ds.integrations import routers
from pikv_ds.integrations.hf.cache import LayerTap, PiKVCache, UnsupportedModelError
from pikv_ds.integrations.hf.generate import generate
from pikv_ds.integrations.routers import ExpertChoice

ATTENTION = "pikv_ds"
"""Name under which our attention is registered with transformers."""


class Attachment:
    """A model with PiKV under it. `detach` restores the model exactly.

    Args:
        model: a transformers model that `check_supported` has passed.
        make_store: builds the rank's cache for the model's shape.
        choices: where the layers' choices of experts show, by module.
        num_experts: of the routed layers, as all EP ranks count them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make_store: Callable[[ModelShape], ExpertShardedKVCache],
        choices: Mapping[nn.Module, ExpertChoice],
        num_experts: int,
    ) -> None:
        self.model = model
        pairs = pair_routers(model, choices)
        if any(hasattr(attention, "_pikv") for attention, _ in pairs):
            raise UnsupportedModelError(
                f"{type(model).__name__} shares layers with a model that PiKV is attached to already; detach it there"
            )
        if not pairs:
            raise UnsupportedModelError(
                f"{type(model).__name__}: no attention layer found that PiKV knows how to hook"
            )
        unrouted = tuple(index for index, (_, choice) in enumerate(pairs) if choice is None)
        self.store = make_store(model_shape(model, [a for a, _ in pairs], num_experts, unrouted))
        self.layers: dict[int, LayerTap] = {}
        self.attached = True
        self.generate_lock = threading.RLock()  # held by the call under way; others wait
        self._pass_lock = threading.Lock()
        self._passing: int | None = None  # the thread whose pass with a cache is under way
        self._hooks: list[Any] = []
        self._previous = model.config._attn_implementation
        self._own_generate = model.__dict__.get("generate")  # where somebody has put one there
        self.plain_generate = model.generate
        self._get_criteria = model._get_stopping_criteria
        try:
            self._put_in(pairs)
        except BaseException:
            self.detach()
            raise

    def _put_in(self, pairs: list[tuple[nn.Module, ExpertChoice | None]]) -> None:
        """Puts taps and hooks into the model, and our attention and `generate`."""
        model = self.model
        for index, (attention, choice) in enumerate(pairs):
            layer = LayerTap(index, attention, choice is not None)
            self.layers[attention.layer_idx] = layer  # type: ignore[index]
            attention._pikv = layer  # type: ignore[assignment]
            begins = functools.partial(_attention_begins, layer, self.store.evictor.wants_source)
            self._hooks.append(attention.register_forward_pre_hook(begins, with_kwargs=True))
            ended = functools.partial(_attention_ended, layer)
            self._hooks.append(attention.register_forward_hook(ended, always_call=True))
            if choice is not None:
                self._hooks.append(choice.watch(functools.partial(_routed, layer)))
            if self.store.evictor.wants_source:
                attention.__dict__["rotary_emb"] = model.base_model.rotary_emb  # where kvpress looks for it
        self._hooks.append(model.base_model.register_forward_hook(self._pass_ended, always_call=True))
        AttentionInterface.register(ATTENTION, pikv_attention)
        AttentionMaskInterface.register(ATTENTION, _defer_mask)
        model.set_attn_implementation(ATTENTION)
        model.generate = functools.wraps(model.generate)(functools.partial(generate, self))

    def new_cache(self, release_finished: bool = False) -> PiKVCache:
        """An empty cache for one batch; pass it as ``past_key_values``."""
        return PiKVCache(self, release_finished)

    def obstacle(self, layer_idx: int) -> str | None:
        """Why the caller must not hand over keys and values of this layer now; None if it may."""
        name = type(self.model).__name__
        if not self.attached:
            return f"PiKV was detached from {name} after this cache was made; make a new one: pikv_ds.new_cache(model)"
        layer = self.layers.get(layer_idx)
        if layer is None or not layer.entered:
            return (
                f"another model was given a cache of the {name} that PiKV was attached to (no pass of that one is "
                "under way); a cache serves the model that it was made for: pikv_ds.new_cache(model)"
            )
        return self.other_attention(layer.module)

    def other_attention(self, module: nn.Module) -> str | None:
        """What to say where a module's attention is not PiKV's any more."""
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation == ATTENTION:
            return None
        return (
            f'set_attn_implementation("{implementation}") has taken PiKV out of the attention of '
            f'{type(self.model).__name__}: set "{ATTENTION}" again, or call pikv_ds.detach and leave its caches out'
        )

    def take_turn(self) -> bool:
        """Makes this thread the one whose pass with a cache is under way; False: another's is."""
        with self._pass_lock:
            if self._passing is None:
                self._passing = threading.get_ident()
            return self._passing == threading.get_ident()

    @property
    def passing(self) -> bool:
        """Whether a pass with a cache is under way."""
        return self._passing is not None

    @torch.compiler.disable
    def _pass_ended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the whole model, also after a pass that failed (then there is no output)."""
        with self._pass_lock:
            mine = self._passing == threading.get_ident()
            if mine:
                self._passing = None
        if mine and output is None:  # an error after the last layer is one of the pass, too
            self.store.fail_pass()
        broken = self.store.broken_off if mine and output is not None else None
        if broken is not None:
            raise PiKVError(
                f"the forward pass has ended, but layer {broken.first_open_layer} is still open: the experts of that "
                "layer did not run, or its attention did not; its pages would have no home. Attach PiKV to the model "
                "as it is when it runs"
            )

    def detach(self) -> None:
        """Takes PiKV out of the model again."""
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.module.__dict__.pop("_pikv", None)
            layer.module.__dict__.pop("rotary_emb", None)
        if self.store.shard.trace is not None:
            self.store.shard.trace.close()
        self.model.__dict__.pop("generate", None)
        if self._own_generate is not None:
            self.model.generate = self._own_generate
        if self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self._previous)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Of `copy.deepcopy` and `pickle`, mostly of the model."""
        raise NotImplementedError(
            f"{type(self.model).__name__} is not copied or pickled while PiKV is attached: call pikv_ds.detach first"
        )


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
    devices = sorted({str(p.device) for p in model.parameters()})
    if "meta" in devices:
        raise UnsupportedModelError(
            f"{name}: some weights are on the meta device (offloaded, or not loaded yet); load the model whole, "
            "without accelerate's offloading, before PiKV is attached"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{name}: its weights lie on several devices ({', '.join(devices)}); a rank has one, so leave device_map "
            "out and start a rank for each"
        )
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} does not generate text; attach to the model that does (…ForCausalLM)")
    for module in model.modules():
        if hasattr(module, "num_key_value_groups") and not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{name}: {type(module).__name__} is not causal, which is not supported")
    config = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if window is not None and not layer_types and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{name}: sliding_window = {window} is not supported; set it to None if the model allows"
        )
    other = sorted({t for t in layer_types if t != "full_attention"})
    if other:
        raise UnsupportedModelError(f"{name}: layer types {', '.join(other)} are not supported, only full_attention")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name}: multi-head latent attention (kv_lora_rank) is not supported here")
    for key in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, key, None):
            raise UnsupportedModelError(f"{name}: {key} = {getattr(config, key)} is not supported")


def pair_routers(
    model: nn.Module, choices: Mapping[nn.Module, ExpertChoice]
) -> list[tuple[nn.Module, ExpertChoice | None]]:
    """Each attention module with the choice of experts that follows it, None at dense layers, in order.

    Warns of layers that have experts but no choice that could be read.
    """
    pairs: list[tuple[nn.Module, ExpertChoice | None]] = []
    silent: list[int] = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "num_key_value_groups"):
            pairs.append((module, None))
        elif not pairs or pairs[-1][1] is not None:
            continue
        elif module in choices:
            pairs[-1] = (pairs[-1][0], choices[module])
        elif routers.has_experts(module):
            silent.append(len(pairs) - 1)
    unread = sorted({index for index in silent if pairs[index][1] is None})
    if unread:
        warnings.warn(
            f"{type(model).__name__}: layers {', '.join(map(str, unread))} have experts, but PiKV cannot read which "
            "ones their tokens choose; pages of these layers are placed by their number",
            stacklevel=2,
        )
    return pairs


def model_shape(
    model: PreTrainedModel, attentions: list[nn.Module], num_experts: int, unrouted: tuple[int, ...]
) -> ModelShape:
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
    return ModelShape(len(attentions), heads, kv_heads, sizes.pop(), num_experts, model.dtype, unrouted=unrouted)


@torch.compiler.disable
def pikv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in transformers' registry.

    Args:
        query: ``[B, H, T, D]``; key, value: ``[B, K, T, D]``, new tokens only with a `PiKVCache`.
        attention_mask: what our mask function returned (`DeferredMask`), a mask that the caller has prepared, or None.

    Returns:
        ``[B, T, H, D]`` and None (there are no attention weights to return).

    Raises:
        UnsupportedModelError: attention sinks, soft capping, a sliding window or attention that is not causal, which
            would change the result; dropout in a pass with a cache.
    """
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{type(module).__name__}: attention that is not causal is not supported")
    for name in ("s_aux", "softcap", "sliding_window"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__}: attention with {name} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: LayerTap | None = getattr(module, "_pikv", None)
    if layer is None or layer.pending is None:
        if layer is not None:
            layer.running = None  # of a pass that failed before its router ran
        if isinstance(attention_mask, DeferredMask):
            attention_mask = attention_mask.dense()
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale)
    if dropout:
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention_dropout = {dropout} with PiKV's cache: call model.eval() first"
        )
    if isinstance(attention_mask, DeferredMask):
        attention_mask = attention_mask.padding
    cache, layer.pending = layer.pending, None
    batch = cache.begin(key, value, attention_mask) if layer.index == 0 else cache.batch
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


@torch.compiler.disable
def _attention_begins(
    layer: LayerTap, keep_inputs: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward hook before an attention: who calls, and what retentions that look at its inputs need."""
    layer.entered = True
    if keep_inputs:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        layer.inputs = (hidden, kwargs["position_embeddings"])


@torch.compiler.disable
def _attention_ended(layer: LayerTap, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook after an attention, also after one that failed (then there is no output)."""
    layer.entered = False
    cache, layer.pending = layer.pending, None
    if cache is not None and output is not None:
        cache.refuse(
            f"{type(module).__name__} of layer {layer.index} does not attend through transformers' "
            "AttentionInterface, so its keys and values did not reach PiKV",
            first=layer.index == 0,
        )


def _source(cache: PiKVCache, module: nn.Module, inputs: tuple[Tensor, tuple[Tensor, Tensor]], mine: slice) -> Any:
    """`Prompt.source` of the packed tokens `mine`: module, hidden states ``[1, n, hidden]``, keyword arguments."""
    hidden, positions = inputs
    pair = tuple(cache.pack(x.expand(hidden.shape[0], -1, -1))[mine][None] for x in positions)
    return module, cache.pack(hidden)[mine][None], {"position_embeddings": pair}


def _routed(layer: LayerTap, experts: Tensor) -> None:
    """The tokens of a layer have chosen their experts: its pages can be sealed now."""
    if layer.running is None:
        return
    (cache, size), layer.running = layer.running, None
    assert cache.batch is not None
    cache.store.routed(cache.batch, layer.index, cache.pack(experts.unflatten(0, size)))


class DeferredMask:
    """What transformers would make an attention mask of: the whole mask only where a pass without our cache needs it.

    Args:
        arguments: of transformers' mask functions.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        # A static cache hands over its length as a tensor, which it has changed by the time that attention runs.
        self._arguments = {
            key: x.clone() if isinstance(x, Tensor) and x.dim() == 0 else x for key, x in arguments.items()
        }
        self._dense: Tensor | None = None
        self.padding: Tensor | None = arguments.get("attention_mask")
        """bool or int ``[B, columns]``, 0 at padding; None: there is none."""

    def dense(self) -> Tensor:
        """bool ``[B, 1, queries, keys]``, True where a query sees a key."""
        if self._dense is None:
            self._dense = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**{**self._arguments, "allow_is_causal_skip": False})
        assert self._dense is not None
        return self._dense

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"the model uses its attention mask itself ({name}), which PiKV does not support: it hands a mask on to "
            "attention only"
        )


@torch.compiler.disable
def _defer_mask(*args: Any, **kwargs: Any) -> DeferredMask:
    """Our mask function in transformers' registry. Our cache sees to causality itself and needs the padding only."""
    return DeferredMask(kwargs)
