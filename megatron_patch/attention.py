"""The overrides: Megatron computes queries, keys and values and rotates them, PiKV attends.

A patched attention keeps its parameters, its forward pass and its place in the model. Its class is
swapped for a subclass of itself that intercepts two calls:

* `_adjust_key_value_for_inference`, where Megatron would write new keys into its own buffer, hands the
  new keys on as they are, and no buffer is made;
* the attention itself (`core_attention` with static contexts, `flash_decode_and_prefill` with dynamic
  ones) is asked of the cache.

A forward hook on the layer's router then seals the pages that have filled up.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from megatron_patch.requests import Pass

MARK = "_pikv"


class PiKVAttention:
    """Comes before Megatron's own class among the bases of a patched attention."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kw: Any,
    ) -> tuple[Any, ...]:
        """Hands on the new keys and values instead of Megatron's buffer.

        Args:
            query: static ``[s, b, H, D]``, dynamic ``[T, 1, H, D]``; key, value likewise with K heads.
                Positions are not encoded yet.
        """
        tap: LayerTap = self.__dict__[MARK]
        tap.running = None
        own = super()._adjust_key_value_for_inference  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            return own(inference_context, query, key, value, rotary_pos_emb, *args, **kw)
        running = tap.passes.pass_of(tap.index, inference_context, key)
        if running is None:
            return own(inference_context, query, key, value, rotary_pos_emb, *args, **kw)
        tap.running = running
        if running.idle:  # Megatron's dummy pass: the token is attended as ever, and the others are served
            tap.attend(query, key, value)
            return own(inference_context, query, key, value, rotary_pos_emb, *args, **kw)
        return running.adjust(self, query, key, value, rotary_pos_emb, *args, **kw)

    def flash_decode_and_prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Tensor:
        """Attention of a dynamic context, ``[T, 1, H, D]``."""
        tap: LayerTap = self.__dict__[MARK]
        if tap.running is None:
            return super().flash_decode_and_prefill(q, k, v, *args, **kw)  # type: ignore[misc]
        return tap.attend(q, k, v)


class Passes(Protocol):
    """Whom the layers ask for the pass under way: an `attachment.Attachment`."""

    def pass_of(self, layer: int, context: Any, key: Tensor) -> Pass | None:
        """The pass under way, started by its first layer; None where PiKV has no part in it."""


@dataclass(eq=False)
class LayerTap:
    """What ties one attention module to the cache."""

    attention: Any
    passes: Passes
    index: int
    """Of the layer among the attentions of this rank."""
    has_router: bool
    scale: float
    running: Pass | None = None
    """The pass under way, between the attention and the router."""

    mixin: ClassVar[type] = PiKVAttention
    """What comes before Megatron's own class among the bases."""

    @staticmethod
    def overrides(attention: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Modules of an attention, and the `forward` that each gets."""
        return [(attention.core_attention, core_forward)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the pass under way, in Megatron's shape: ``[*shape, H, D]``, key and value with K heads."""
        running = self.running
        assert running is not None
        query, key, value = (running.pack(x.view(*running.shape, *x.shape[-2:])) for x in (query, key, value))
        out = self.attend_packed(running, query, key, value)
        if not self.has_router:
            self.running = None
            running.routed(self.index, None)
        return running.unpack(out)

    def attend_packed(self, running: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of packed tokens: ``[N, H, D]``, ``[N, K, D]`` twice, to ``[N, H, D]``."""
        return running.cache.attend(running.batch, self.index, query, key, value, self.scale)


def core_forward(core: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
    """`core_attention.forward` of a patched attention: ``[s, b, H * D]``."""
    tap: LayerTap = core.__dict__[MARK]
    if tap.running is None or tap.running.idle:
        return type(core).forward(core, query, key, value, *args, **kw)
    return tap.attend(query, key, value).flatten(2)


def router_ran(tap: LayerTap, router: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the layer's router: its pages can be sealed now."""
    running, tap.running = tap.running, None
    if running is not None:
        running.routed(tap.index, chosen_experts(output, router.topk))


def chosen_experts(output: Any, k: int) -> Tensor:
    """Experts of each token, int ``[tokens, k]``, from a router's output.

    Megatron's routers return probabilities ``[tokens, E]`` that are zero at experts not chosen, and a
    map of the chosen ones; its inference router the chosen numbers themselves.
    """
    probs, chosen = output[0], output[1]
    if chosen.dtype != torch.bool:
        return chosen
    best, experts = torch.where(chosen, probs.float(), -1.0).topk(k, dim=-1)
    return experts.masked_fill(best < 0, -1)  # dropped, as far as a capacity allows fewer


_classes: dict[type, type] = {}


def patched_class(cls: type, mixin: type) -> type:
    """The subclass of a Megatron attention class that asks PiKV; made once per class."""
    if issubclass(cls, PiKVAttention):
        return cls
    if cls not in _classes:
        _classes[cls] = type(f"PiKV{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _classes[cls]


def arm(tap: LayerTap) -> None:
    """Swaps the attention's class; its parameters and submodules stay."""
    attention = tap.attention
    attention.__class__ = patched_class(type(attention), tap.mixin)
    attention.__dict__[MARK] = tap
    for module, forward in tap.overrides(attention):
        module.__dict__[MARK] = tap
        module.__dict__["forward"] = types.MethodType(forward, module)


def disarm(tap: LayerTap) -> None:
    """Undoes `arm`, exactly."""
    attention = tap.attention
    attention.__class__ = next(
        c for c in type(attention).__mro__ if issubclass(c, nn.Module) and not issubclass(c, PiKVAttention)
    )
    del attention.__dict__[MARK]
    for module, _ in tap.overrides(attention):
        del module.__dict__[MARK], module.__dict__["forward"]
