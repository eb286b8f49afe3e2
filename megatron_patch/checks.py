"""What of a Megatron model the cache can do, what is refused, and the shape of its layers."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.router import Router
from torch import nn

from megatron_patch import compat, latent
from pikv_ds.core.cache import ModelShape
from pikv_ds.errors import UsageError


class UnsupportedMegatronError(UsageError):
    """The model or the way it is parallelised would give wrong results; the message names it."""


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
    """What the cache must know of the layers of this rank; all must be alike.

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
    """KV heads and head size of what the cache keeps of a token; of latents, how much of it are the values."""
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
    """Refuses, by name, what the cache would get wrong.

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
