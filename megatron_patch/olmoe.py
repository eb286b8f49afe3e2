"""OLMoE's attention: query and key norms over all heads together, where Megatron's are per head."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_patch import compat


class OlmoeSelfAttention(SelfAttention):
    """Megatron's self-attention with an RMSNorm over the whole query and the whole key of a token."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if compat.tensor_parallel_size(self) > 1:
            raise ValueError("OLMoE's norms span all heads, which tensor parallelism would split; use 1")
        self.q_norm = nn.RMSNorm(self.query_projection_size, eps=config.layernorm_epsilon)
        self.k_norm = nn.RMSNorm(self.kv_projection_size, eps=config.layernorm_epsilon)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query ``[s, b, H, D]``, key and value ``[s, b, K, D]``."""
        kwargs["split_qkv"] = True
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        query, key = (norm(x.flatten(2)).view(x.shape) for norm, x in ((self.q_norm, query), (self.k_norm, key)))
        return query, key, *rest
