"""`Attachment`: PiKV under the layers of one model."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn

from megatron_patch import compat, dynamic, latent
from megatron_patch.attention import LayerTap, arm, disarm, router_ran
from megatron_patch.checks import check_attention, model_shape
from megatron_patch.requests import DynamicRequests, IdlePass, Pass, StaticRequests
from pikv_ds.api import compare
from pikv_ds.config import PiKVConfig
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.core.exchange import Exchange
from pikv_ds.core.sequences import SequenceBatch
from pikv_ds.errors import UsageError

STATIC_BATCHES = {"auto": None, "shared": True, "own": False}


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
        self.layers: list[LayerTap] = []
        self.requests: dict[int, StaticRequests | DynamicRequests] = {}  # by the context's id
        self.contexts: dict[int, weakref.ref[Any]] = {}
        self._hooks: list[Any] = []
        self._cache: ExpertShardedKVCache | None = None
        self._pass: Pass | None = None
        self._idle = False
        self._nothing: SequenceBatch | None = None  # the batch of idle passes

    def add(self, attention: Any, router: nn.Module | None) -> None:
        """Takes in the next layer."""
        if self._cache is not None:
            raise UsageError("layers cannot join a model that has been used; patch the whole model")
        check_attention(attention)
        kind = latent.LatentTap if latent.is_latent(attention) else LayerTap
        tap = kind(attention, self, len(self.layers), router is not None, compat.softmax_scale(attention))
        self.layers.append(tap)
        arm(tap)
        if router is not None:
            self._hooks.append(router.register_forward_hook(functools.partial(router_ran, tap)))

    @property
    def cache(self) -> ExpertShardedKVCache:
        """The rank's cache; made when all layers are known, in the first pass at the latest (collectively)."""
        if self._cache is None:
            attentions = [layer.attention for layer in self.layers]
            unrouted = tuple(layer.index for layer in self.layers if not layer.has_router)
            shape = model_shape(attentions, self.exchange.size, unrouted)
            compare(self.exchange, self.config, shape)
            device = next(attentions[0].parameters()).device
            self._cache = ExpertShardedKVCache(shape, self.config, self.exchange, device)
        return self._cache

    @property
    def has_to_release(self) -> bool:
        """Whether finished requests still have their pages."""
        return self._cache is not None and self._cache.has_to_release

    def pass_of(self, layer: int, context: Any, key: torch.Tensor) -> Pass | None:
        """The pass under way, started by its first layer; None where PiKV has no part in it."""
        if layer > 0:
            return self._pass
        self._pass = None
        if context is None and not self._idle:  # an ordinary forward pass, of which no keys are kept
            return None
        requests = None if context is None else self.requests_of(context)
        cache = self.cache
        cache.committed_tokens = sum(
            r.committed(c)
            for i, r in self.requests.items()
            if isinstance(r, DynamicRequests) and (c := self.contexts[i]()) is not None
        )
        if requests is None:
            self._nothing = self._nothing or cache.new_batch(0)
            cache.begin_step(self._nothing, [])
            self._pass = IdlePass(cache, self._nothing, (key.shape[0], key.shape[1]))
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
            requests = StaticRequests(self.cache, STATIC_BATCHES[self.static_batches])
        else:
            requests = DynamicRequests(self.cache, context)
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
            self.cache.abandoned.extend(batches)

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
        for layer in self.layers:
            disarm(layer)
        for reference in self.contexts.values():
            if (context := reference()) is not None:
                dynamic.restore_buffer(context)
        dynamic.stop_serving(self)
        self.exchange.close()
