"""OLMoE's attention: query and key norms over all heads together, where Megatron's are per head."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_patch import compat


class SpanningRMSNorm(nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks; a rank has its own heads and their weights.

    Args:
        size: heads x head_dim of this rank.
        eps: added to the mean square.
        group: the tensor-parallel ranks, which call it together.
    """

    def __init__(self, size: int, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.group, self.num_ranks = eps, group, group.size()

    def forward(self, x: Tensor) -> Tensor:
        """``[s, b, heads, head_dim]`` to the same, computed in fp32."""
        flat = x.flatten(2).float()
        square = flat.square().sum(-1, keepdim=True)
        if self.num_ranks > 1:
            dist.all_reduce(square, group=self.group)
        flat = flat * torch.rsqrt(square / (flat.shape[-1] * self.num_ranks) + self.eps)
        return (self.weight * flat.to(x.dtype)).view(x.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Tells Megatron's checkpoints that the weights are spread over the ranks; it takes norms for copies."""
        state = self.state_dict(prefix="", keep_vars=True)
        return dict(make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets))


class OlmoeSelfAttention(SelfAttention):
    """Megatron's self-attention with an RMSNorm over the whole query and the whole key of a token."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        parts, eps = compat.tensor_parallel_size(self), config.layernorm_epsilon
        group = parallel_state.get_tensor_model_parallel_group()
        self.q_norm = SpanningRMSNorm(self.query_projection_size // parts, eps, group)
        self.k_norm = SpanningRMSNorm(self.kv_projection_size // parts, eps, group)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query ``[s, b, H, D]``, key and value ``[s, b, K, D]``, of this rank's heads."""
        kwargs["split_qkv"] = True
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        return self.q_norm(query), self.k_norm(key), *rest
