"""`patch_model` and `patch_layer_spec`: PiKV under a Megatron model, and out again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_patch import compat, dynamic, latent
from megatron_patch.attention import MARK, LayerTap, arm, disarm, router_ran
from megatron_patch.requests import DynamicRequests, IdlePass, Pass, StaticRequests
from pikv_ds.api import compare, with_backend
from pikv_ds.config import ConfigError, PiKVConfig
from pikv_ds.core.cache import ExpertShardedKVCache, ModelShape
from pikv_ds.core.exchange import Exchange, make_group
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.errors import UsageError
from pikv_ds.observe import metrics

KEY = "_pikv_attachment"
STATIC_BATCHES = {"auto": None, "shared": True, "own": False}


class UnsupportedMegatronError(UsageError):
    """The model or the way it is parallelised would give wrong results; the message names it."""


class Attachment:
    """PiKV under the layers of one model on one rank.

    Args:
        config: settings, equal on all ranks.
        exchange: of the ranks that share KV; it belongs to the attachment.
        static_batches: of a static context: every rank has the same ("shared"), each has its own
            ("own"), or found out from each prompt ("auto").
    """

    def __init__(self, config: PiKVConfig, exchange: Exchange, static_batches: str) -> None:
        if static_batches not in STATIC_BATCHES:
            raise UsageError(f"static_batches = {static_batches!r}: choose one of {', '.join(STATIC_BATCHES)}")
        self.config, self.exchange = config, exchange
        self.static_batches = static_batches
        self.layers: list[nn.Module] = []
        self.requests: dict[int, StaticRequests | DynamicRequests] = {}  # by the context's id
        self.contexts: dict[int, weakref.ref[Any]] = {}
        self._hooks: list[Any] = []
        self._store: ExpertShardedKVCache | None = None
        self._pass: Pass | None = None
        self._idle = False
        self._nothing: SequenceBatch | None = None  # the batch of idle passes

    def add(self, attention: Any, router: nn.Module | None) -> None:
        """Takes in the next layer."""
        if self._store is not None:
            raise UsageError("layers cannot join a model that has been used; patch the whole model")
        check_attention(attention)
        kind = latent.LatentTap if latent.is_latent(attention) else LayerTap
        tap = kind(self, len(self.layers), router is not None, compat.softmax_scale(attention))
        self.layers.append(attention)
        arm(attention, tap)
        if router is not None:
            self._hooks.append(router.register_forward_hook(functools.partial(router_ran, tap)))

    @property
    def store(self) -> ExpertShardedKVCache:
        """The rank's cache; made when all layers are known, in the first pass at the latest (collectively)."""
        if self._store is None:
            unrouted = tuple(i for i, layer in enumerate(self.layers) if not layer.__dict__[MARK].has_router)
            shape = model_shape(self.layers, self.exchange.size, unrouted)
            compare(self.exchange, self.config, shape)
            device = next(self.layers[0].parameters()).device
            self._store = ExpertShardedKVCache(shape, self.config, self.exchange, device)
        return self._store

    @property
    def has_to_release(self) -> bool:
        """Whether finished requests still have their pages."""
        return self._store is not None and self._store.has_to_release

    def pass_of(self, tap: LayerTap, context: Any, key: torch.Tensor) -> Pass | None:
        """The pass under way, started by its first layer; None where PiKV has no part in it."""
        if tap.index > 0:
            return self._pass
        self._pass = None
        if context is None and not self._idle:  # an ordinary forward pass, of which no keys are kept
            return None
        requests = None if context is None else self.requests_of(context)
        store = self.store
        store.committed_tokens = sum(
            r.committed(c)
            for i, r in self.requests.items()
            if isinstance(r, DynamicRequests) and (c := self.contexts[i]()) is not None
        )
        if requests is None:
            self._nothing = self._nothing or store.new_batch(0)
            store.begin_step(self._nothing, [])
            self._pass = IdlePass(store, self._nothing, (key.shape[0], key.shape[1]))
        else:
            self._pass = requests.begin(context, key)
        return self._pass

    def requests_of(self, context: Any) -> Any:
        """The requests of a context, which is Megatron's; its own KV buffer is given back."""
        known = self.requests.get(id(context))
        if known is not None:
            return known
        requests: StaticRequests | DynamicRequests
        if context.is_static_batching():
            requests = StaticRequests(self.store, STATIC_BATCHES[self.static_batches])
        else:
            requests = DynamicRequests(self.store, context)
            dynamic.give_up_buffer(context, requests.release, requests.may_admit)
        self.requests[id(context)] = requests
        self.contexts[id(context)] = weakref.ref(context)
        weakref.finalize(context, self._forget, id(context))
        return requests

    def _forget(self, context_id: int) -> None:
        """A context is gone. A finalizer may run within a collective, so the next pass releases its pages."""
        requests = self.requests.pop(context_id, None)
        self.contexts.pop(context_id, None)
        if requests is not None:
            batches = requests.batches.values() if isinstance(requests, StaticRequests) else [requests.batch]
            self.store.abandoned.extend(batches)

    def dummy_forward(self, forward: Any, wrapper: Any) -> Any:
        """Megatron's forward pass of a rank that has no requests, while others have."""
        self._idle = True
        try:
            return forward(wrapper)
        finally:
            self._idle, self._pass = False, None

    def detach(self) -> None:
        """Takes PiKV out of the layers again."""
        for hook in self._hooks:
            hook.remove()
        for attention in self.layers:
            disarm(attention)
        for reference in self.contexts.values():
            if (context := reference()) is not None:
                dynamic.restore_buffer(context)
        dynamic.stop_serving(self)
        self.exchange.close()


def patch_model(
    model: nn.Module,
    config: PiKVConfig | Mapping[str, Any] | None = None,
    *,
    ep_group: dist.ProcessGroup | None = None,
    static_batches: str = "auto",
) -> nn.Module:
    """Puts an expert-sharded KV cache under a built Megatron model; a second call changes nothing.

    Every rank of the job calls it at the same time. Works with static and dynamic inference contexts;
    training and passes without a context stay Megatron's.

    Args:
        model: a `GPTModel`, or a wrapper around one (`Float16Module`).
        ep_group: ranks that share their KV; by default the expert-parallel group.
        static_batches: see `Attachment`.

    Returns:
        The same model.

    Raises:
        ConfigError, UnsupportedMegatronError: by name.
        PeerError: the ranks have different settings or versions.
    """
    compat.require()
    inner = _unwrap(model)
    if KEY in inner.__dict__:
        return model
    pairs = pair_routers(inner)
    if not pairs:
        raise UnsupportedMegatronError(f"{type(inner).__name__}: no self-attention of Megatron's found in it")
    attachment = _attachment(
        config, ep_group or compat.expert_group(), next(inner.parameters()).device, static_batches
    )
    try:
        for attention, router in pairs:
            attachment.add(attention, router)
        attachment.store  # noqa: B018 - made now, while every rank is here, so that differences show at once
    except BaseException:
        attachment.detach()
        raise
    inner.__dict__[KEY] = attachment
    dynamic.serve_dummy_passes(attachment, _attached)
    return model


def patch_context(model: nn.Module, context: Any) -> Any:
    """Takes over an inference context before its first pass; returns it. A second call changes nothing.

    A pass does it too, but then the requests of the first one have been admitted by Megatron's limits,
    and its KV buffer has been there until then. Collective for a model whose first pass is still to come.
    """
    attachment_of(model).requests_of(context)
    return context


def unpatch_model(model: nn.Module) -> nn.Module:
    """Takes PiKV out of a model; nothing of it stays. Harmless where it is not. Every rank calls it."""
    attachment = _attached(model)
    if attachment is not None:
        attachment.detach()
        for module in _unwrap(model).modules():
            module.__dict__.pop(KEY, None)
    return model


def patch_layer_spec(
    spec: Any,
    config: PiKVConfig | Mapping[str, Any] | None = None,
    *,
    ep_group: dist.ProcessGroup | None = None,
    static_batches: str = "auto",
) -> Any:
    """A copy of a layer spec (or block spec) whose layers build themselves with PiKV.

    Call it on every rank, after `initialize_model_parallel` and before the model is built from it;
    one call per model. The arguments are `patch_model`'s.
    """
    compat.require()
    attachment = _attachment(config, ep_group or compat.expert_group(), compat.device(), static_batches)
    dynamic.serve_dummy_passes(attachment, _attached)
    layers = 0

    def transform(x: Any) -> Any:
        nonlocal layers
        if isinstance(x, ModuleSpec):
            if isinstance(x.module, type) and issubclass(x.module, TransformerLayer):
                layers += 1
                return dataclasses.replace(x, module=_layer_class(x.module, attachment))
            return dataclasses.replace(x, submodules=transform(x.submodules))
        if dataclasses.is_dataclass(x) and not isinstance(x, type):  # a block's submodules
            out = copy.copy(x)
            for field in dataclasses.fields(x):
                value = getattr(x, field.name)
                new = transform(value)
                if new is not value:
                    object.__setattr__(out, field.name, new)
            return out
        if isinstance(x, list):
            return [transform(i) for i in x]
        return x

    patched = transform(spec)
    if not layers:
        attachment.exchange.close()
        raise UnsupportedMegatronError(f"{spec!r}: no TransformerLayer found in this spec")
    return patched


def _layer_class(cls: type, attachment: Attachment) -> type:
    """A transformer layer that hands its attention and router to an attachment once it is built."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.__class__ = cls  # it has done its work; the layer is Megatron's own
        for attention, router in pair_routers(self):
            attachment.add(attention, router)
        self.__dict__[KEY] = attachment

    return type(f"PiKV{cls.__name__}", (cls,), {"__init__": __init__, "__module__": __name__})


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a patched model.

    Raises:
        ValueError: PiKV is not under it.
    """
    attachment = _attached(model)
    if attachment is None:
        raise UsageError("PiKV is not under this model; call megatron_patch.patch_model")
    return attachment


def stats(model: nn.Module) -> dict[str, Any]:
    """What the cache did and holds, over all ranks (`pikv_ds.stats`). Collective."""
    return metrics.stats(attachment_of(model).store)


def flush(model: nn.Module) -> None:
    """Returns the pages of finished requests at once instead of with the next pass. Collective."""
    attachment_of(model).store.begin_step(None, [])


def _attached(model: Any) -> Attachment | None:
    inner = _unwrap(model)
    if KEY not in inner.__dict__:  # a model built from a patched spec
        found = next((m.__dict__[KEY] for m in inner.modules() if KEY in m.__dict__), None)
        if found is not None:
            inner.__dict__[KEY] = found
    return inner.__dict__.get(KEY)


def _attachment(
    config: PiKVConfig | Mapping[str, Any] | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
    static_batches: str,
) -> Attachment:
    settings = with_backend(config if isinstance(config, PiKVConfig) else PiKVConfig.from_dict(config or {}))
    if settings.retention is not None and settings.retention.name == "kvpress":
        raise ConfigError(
            f"pikv.retention = {settings.to_dict()['retention']!r}: kvpress rates with Hugging Face's modules, which "
            "are not there under Megatron; choose another retention"
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    own = make_group(group if several else None, settings.timeout_s, settings.group_size)
    return Attachment(settings, Exchange(own, device, getattr(torch, settings.partial_dtype)), static_batches)


def pair_routers(model: nn.Module) -> list[tuple[Any, nn.Module | None]]:
    """Each self-attention with the router that follows it in order of traversal, None at dense layers."""
    pairs: list[tuple[Any, nn.Module | None]] = []
    for module in model.modules():
        if isinstance(module, Attention) and getattr(module, "attention_type", None) == "self":
            pairs.append((module, None))
        elif isinstance(module, Router) and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], module)
    return pairs


def model_shape(attentions: list[Any], num_ranks: int, unrouted: tuple[int, ...]) -> ModelShape:
    """What the store must know of the layers of this rank; all must be alike.

    Args:
        unrouted: layers without a router.

    Raises:
        UnsupportedMegatronError: layers differ in heads or head size.
    """
    shapes = {(a.num_attention_heads_per_partition, *_kv_shape(a), next(a.parameters()).dtype) for a in attentions}
    if len(shapes) != 1:
        raise UnsupportedMegatronError(
            f"layers with different heads are not supported, got {sorted(map(str, shapes))}"
        )
    heads, kv_heads, head_dim, latent_dim, dtype = shapes.pop()
    experts = attentions[0].config.num_moe_experts or num_ranks
    return ModelShape(len(attentions), heads, kv_heads, head_dim, experts, dtype, latent_dim, unrouted)


def _kv_shape(attention: Any) -> tuple[int, int, int | None]:
    """KV heads and head size of what the store keeps of a token; of latents, how much of it are the values."""
    if not latent.is_latent(attention):
        return attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head, None
    rank = attention.config.kv_lora_rank
    return 1, rank + attention.config.qk_pos_emb_head_dim, rank


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "context_parallel_size": ((1,), "attention over parts of a sequence is what PiKV does itself; use 1"),
    "pipeline_model_parallel_size": ((1, None), "ranks of several stages are not in step layer by layer; use 1"),
    "sequence_parallel": ((False,), "the routers would see a part of the tokens; turn it off for inference"),
    "flash_decode": ((False,), "it attends to Megatron's own buffer; turn it off"),
    "window_size": ((None,), "sliding-window attention is not supported"),
    "softmax_type": (("vanilla",), "attention sinks are not supported"),
    "apply_query_key_layer_scaling": ((False,), "scores scaled by layer are not supported"),
    "cuda_graph_impl": ((None, "none"), "exchanges of any number of pages cannot be captured; use none"),
}
"""Settings of a `TransformerConfig`: the values that work, and why others do not."""


def check_attention(attention: Any) -> None:
    """Refuses, by name, what the store would get wrong.

    Raises:
        UnsupportedMegatronError: with the setting, its value and the reason.
    """
    for key, (fine, reason) in (REFUSED | (latent.REFUSED if latent.is_latent(attention) else {})).items():
        value = getattr(attention.config, key, fine[0])
        if value not in fine:
            raise UnsupportedMegatronError(f"PiKV does not work with {key} = {value!r}: {reason}")
    groups, tp = attention.config.num_query_groups, compat.tensor_parallel_size(attention)
    if groups is not None and groups % tp:
        raise UnsupportedMegatronError(
            f"PiKV does not work with num_query_groups = {groups} on tensor_model_parallel_size = {tp}: KV heads must "
            f"divide evenly; use a tensor-parallel size that divides {groups}"
        )


def _unwrap(model: Any) -> nn.Module:
    """The model within Megatron's wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


__all__ = [
    "Attachment",
    "UnsupportedMegatronError",
    "attachment_of",
    "flush",
    "patch_context",
    "patch_layer_spec",
    "patch_model",
    "stats",
    "unpatch_model",
]
