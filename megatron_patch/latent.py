"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one vector per token for all heads.

Megatron projects and rotates as ever, and expands each new token's latent to keys and values per head.
What goes to the cache instead is the latent, after its norm, and the rotary key beside it: ``R + P``
elements, of which the first R are the values, too (see `pikv_ds.layout`). With ``k_h = [W_UK_h c, k_P]``
and ``v_h = W_UV_h c``, a rank attends to the latents that it holds without expanding any of them (the
paper's weight absorption, section 2.1.2):

    q_h . k_h = [W_UK_h^T q_h, q_P] . [c, k_P],     sum_t a_t v_h,t = W_UV_h (sum_t a_t c_t)

So queries leave absorbed, outputs come back latent, and are expanded once, after the merge. A prompt
that begins is attended per head, where its keys and values are: that is a third of the arithmetic.

Shape letters: N tokens, H heads of this rank, R `kv_lora_rank`, P `qk_pos_emb_head_dim`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_patch import dynamic
from megatron_patch.attention import MARK, LayerTap, PiKVAttention
from megatron_patch.requests import Pass
from pikv_ds.core.attention import prompt_attention, token_places

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_mla_latents": ((False,), "it is Megatron's own cache of latents; turn it off, PiKV keeps latents anyway"),
    "experimental_attention_variant": ((None,), "only plain latent attention is known"),
    "apply_rope_fusion": ((False,), "Megatron has no fused rotation of latent attention at inference; turn it off"),
    "fp8": ((None, False), "absorbed queries need the up-projection's weight itself"),
    "fp4": ((None, False), "absorbed queries need the up-projection's weight itself"),
}
"""Settings of an `MLATransformerConfig`, beside those that no attention works with: see `checks.REFUSED`."""


def is_latent(attention: nn.Module) -> bool:
    return isinstance(attention, MLASelfAttention)


class AsStatic:
    """A dynamic context as Megatron's latent attention can use it: its own path for them is left out.

    That path needs Transformer Engine and FlashMLA, and does not run in 0.16.1. All that the other one wants
    to know is where the tokens are, which `rotary_forward` tells.
    """

    sequence_len_offset = 0

    def __init__(self, context: Any) -> None:
        self.context = context
        self.max_sequence_length = context.max_sequence_length

    def is_static_batching(self) -> bool:
        return True


class PiKVLatentAttention(PiKVAttention):
    """Comes before Megatron's `MLASelfAttention`."""

    def forward(self, *args: Any, inference_context: Any = None, **kw: Any) -> Any:
        tap: LatentTap = self.__dict__[MARK]
        if inference_context is not None and not inference_context.is_static_batching():
            tap.positions = dynamic.token_positions(inference_context)
            inference_context = AsStatic(inference_context)
        try:
            return super().forward(*args, inference_context=inference_context, **kw)  # type: ignore[misc]
        finally:
            tap.latent = tap.positions = None

    def _adjust_key_value_for_inference(self, inference_context: Any, *args: Any, **kw: Any) -> tuple[Any, ...]:
        if isinstance(inference_context, AsStatic):
            inference_context = inference_context.context
        return super()._adjust_key_value_for_inference(inference_context, *args, **kw)


@dataclass(eq=False)
class LatentTap(LayerTap):
    """What ties one latent attention to the cache."""

    latent: Tensor | None = None
    """``[*, R]`` of the tokens of this pass, as the up-projection got it."""
    positions: Tensor | None = None
    """int64 ``[T]``, of a dynamic context's tokens."""

    mixin: ClassVar[type] = PiKVLatentAttention

    @staticmethod
    def overrides(attention: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
        return [
            *LayerTap.overrides(attention),
            (attention.rotary_pos_emb, rotary_forward),
            (attention.linear_kv_up_proj, up_projection_forward),
        ]

    def attend_packed(self, running: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of packed tokens.

        Args:
            query, key, value: per head, ``[N, H, D]``, ``[N, H, D]`` and ``[N, H, V]``, positions encoded.

        Returns:
            ``[N, H, V]``.
        """
        config, up = self.attention.config, self.attention.linear_kv_up_proj
        content = config.qk_head_dim
        up_key, up_value = up.weight.view(query.shape[1], -1, config.kv_lora_rank).split(
            [content, value.shape[-1]], dim=1
        )
        assert self.latent is not None
        latent = fused_norm(up, running.pack(self.latent))
        stored = torch.cat([latent, key[:, 0, content:]], dim=-1).unsqueeze(1)  # rotary keys of all heads are one

        def absorb(q: Tensor) -> Tensor:
            return torch.cat([torch.einsum("nhd,hdr->nhr", q[..., :content], up_key), q[..., content:]], dim=-1)

        def ask(absorbed: Tensor) -> Tensor:
            return running.cache.attend(
                running.batch, self.index, absorbed, stored, None, self.scale, attend_prompts=False
            )

        def expand(out: Tensor) -> Tensor:
            return torch.einsum("nhr,hvr->nhv", out, up_value)

        prompts = [mine for _, mine in running.batch.prompts()]
        if not prompts:
            return expand(ask(absorb(query)))
        rest = [mine for _, mine in running.batch.slices() if mine not in prompts]
        at = token_places(rest, len(query), query.device)
        absorbed = stored.expand(-1, query.shape[1], -1)  # nobody reads those of prompts: any will do
        if rest:
            absorbed = absorbed.clone()
            absorbed[at] = absorb(query[at])
        merged = ask(absorbed)
        out = torch.empty_like(value)
        if rest:
            out[at] = expand(merged[at])
        for mine in prompts:
            out[mine] = prompt_attention(query[mine], key[mine], value[mine], 1, self.scale).to(out.dtype)
        return out


def up_projection_forward(linear: nn.Module, x: Tensor, *args: Any, **kw: Any) -> Any:
    """`linear_kv_up_proj.forward`: what it is given is the latent."""
    tap: LatentTap = linear.__dict__[MARK]
    tap.latent = None if linear.training else x
    return type(linear).forward(linear, x, *args, **kw)


def rotary_forward(rotary: nn.Module, *args: Any, **kw: Any) -> Any:
    """`rotary_pos_emb.forward`: in a dynamic pass one row for each token, at its position.

    Returns:
        Angles ``[T, 1, 1, P]``; YaRN adds its factor.
    """
    tap: LatentTap = rotary.__dict__[MARK]
    out = type(rotary).forward(rotary, *args, **kw)
    if tap.positions is None:
        return out
    return (out[0][tap.positions], *out[1:]) if isinstance(out, tuple) else out[tap.positions]


def fused_norm(linear: Any, latent: Tensor) -> Tensor:
    """The norm that Transformer Engine has put into the up-projection, which so gets latents ``[N, R]`` before it."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return latent
    weight = weight + 1 if getattr(linear, "zero_centered_gamma", False) else weight
    if getattr(linear, "normalization", "RMSNorm") == "RMSNorm":
        return F.rms_norm(latent, weight.shape, weight, linear.eps)
    return F.layer_norm(latent, weight.shape, weight, linear.layer_norm_bias, linear.eps)
