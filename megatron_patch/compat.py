"""The one file that knows Megatron-Core's versions and its private corners.

Supported are 0.13 to 0.16: static contexts throughout, dynamic ones from 0.16 on.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as MEGATRON_VERSION
from megatron.core import parallel_state
from megatron.core.transformer.attention import Attention
from packaging.version import Version
from torch import Tensor

OLDEST, NEWEST = Version("0.13.0"), Version("0.16.1")


class UnsupportedVersionError(ImportError):
    """This Megatron-Core was not tested with PiKV and is refused."""


def check_version(version: str = MEGATRON_VERSION) -> None:
    """Refuses a Megatron-Core outside the range that is tested.

    Raises:
        UnsupportedVersionError: naming the version and the range.
    """
    if not OLDEST <= Version(Version(version).base_version) <= NEWEST:
        raise UnsupportedVersionError(
            f"megatron-core {version} is not supported: PiKV works with {OLDEST} to {NEWEST}; "
            f'pip install "megatron-core=={NEWEST}"'
        )


def device() -> torch.device:
    """Where Megatron puts its models."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# -- parallelism -----------------------------------------------------------------------------------


def expert_group() -> dist.ProcessGroup | None:
    """The expert-parallel group of this rank, None where Megatron has not made its groups."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_expert_model_parallel_group()


def tensor_parallel_size(attention: Any) -> int:
    """Over how many ranks an attention's heads are spread."""
    return attention.config.num_attention_heads // attention.num_attention_heads_per_partition


# -- attention -------------------------------------------------------------------------------------


def softmax_scale(attention: Any) -> float:
    """The factor on q . k of a self-attention."""
    for module in (attention, attention.core_attention):
        scale = getattr(module, "softmax_scale", None)
        if scale is not None:
            return float(scale)
    return float(attention.hidden_size_per_attention_head**-0.5)


def rotary_cos_sin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`rotary_pos_cos_sin` among the arguments of `_adjust_key_value_for_inference` (after rotary_pos_emb)."""
    if "rotary_pos_cos_sin" in kwargs:
        return kwargs["rotary_pos_cos_sin"]
    names = list(inspect.signature(Attention._adjust_key_value_for_inference).parameters)
    if "rotary_pos_cos_sin" not in names:
        return None
    place = names.index("rotary_pos_cos_sin") - names.index("rotary_pos_emb") - 1
    return args[place] if place < len(args) else None


def rotate_key(context: Any, attention: Any, key: Tensor, embedding: Tensor) -> Tensor:
    """Rotates the new keys of a dynamic context, each to its position."""
    groups = getattr(attention, "pg_collection", None) or attention.model_comm_pgs
    return context.apply_rotary_emb_key(key, embedding, attention.config, groups.cp)
