"""The one file that knows Megatron-Core's versions and its private corners.

Supported are 0.13 to 0.16: static contexts throughout, dynamic ones from 0.16 on.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import __version__ as MEGATRON_VERSION
from megatron.core import parallel_state
from megatron.core.transformer.attention import Attention
from packaging.version import Version
from torch import Tensor

OLDEST, NEWEST = Version("0.13.0"), Version("0.16.1")
KEY = "_pikv"


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


# -- dynamic contexts ------------------------------------------------------------------------------


class Request(NamedTuple):
    """An active request of a dynamic context."""

    id: int
    num_tokens: int
    """Tokens of this pass."""
    offset: int
    """Tokens before it."""


def requests(context: Any) -> tuple[set[int], list[Request]]:
    """Ids of all requests, paused ones too, and the active ones in the order of their tokens."""
    paused, total = context.paused_request_count, context.total_request_count
    table = torch.stack(
        [context.request_ids[:total], context.request_query_lengths[:total], context.request_kv_length_offsets[:total]]
    )
    ids, lengths, offsets = table.tolist()  # one copy to the host per pass
    return set(ids), [Request(ids[i], lengths[i], offsets[i]) for i in range(paused, total)]


def uses_cuda_graph(context: Any) -> bool:
    """Whether the pass under way is replayed from a CUDA graph, or captured into one."""
    return bool(context.using_cuda_graph_this_step())


@dataclass
class OwnBuffer:
    """What a dynamic context had before it gave up its KV buffer."""

    allocator: Any
    shape: tuple[int, ...]


@torch.inference_mode(False)  # Megatron writes its bookkeeping outside of it, too
def give_up_buffer(context: Any, released: Callable[[list[int]], None]) -> None:
    """Frees the KV buffer of a dynamic context, and with it the limits that its blocks set.

    Blocks go on being counted, since Megatron's scheduler thinks in them, but there are as many as the
    context's requests can ever want: what is really there is the store's affair.

    Args:
        released: told the ids of requests whose blocks Megatron gives back: finished or evicted.
    """
    buffer, allocator = context.memory_buffer, context.block_allocator
    context.__dict__[KEY] = OwnBuffer(allocator, tuple(buffer.shape))
    _empty_buffer(context)
    enough = context.max_requests * context.max_kv_block_count
    virtual = type(allocator)(context, total_count=2 * enough + 2, paused_count=enough)
    virtual.total_avail -= allocator.get_total_used()
    context.block_allocator = virtual

    def release(self: Any, indexes: Tensor) -> None:
        released(self.request_ids[indexes].tolist())
        type(self).release_memory_blocks_from_request_indexes(self, indexes)

    def allocate(self: Any, *, is_init: bool) -> None:  # after a suspension
        count, virtual.total_count = virtual.total_count, 1
        type(self).allocate_all_tensors(self, is_init=is_init)
        virtual.total_count = count
        _empty_buffer(self)

    context.release_memory_blocks_from_request_indexes = types.MethodType(release, context)
    context.allocate_all_tensors = types.MethodType(allocate, context)


def _empty_buffer(context: Any) -> None:
    buffer = context.memory_buffer
    blocks = buffer.dim() - 4 if buffer.dim() == 6 else 1  # [2, layers, blocks, ...], of latents [layers, blocks, ...]
    context.memory_buffer = buffer.new_empty([0 if d == blocks else n for d, n in enumerate(buffer.shape)])


def restore_buffer(context: Any) -> None:
    """Gives a dynamic context its own KV buffer back; requests in it must start anew."""
    own: OwnBuffer | None = context.__dict__.pop(KEY, None)
    if own is None:
        return
    del context.__dict__["release_memory_blocks_from_request_indexes"], context.__dict__["allocate_all_tensors"]
    context.memory_buffer = context.memory_buffer.new_empty(own.shape)
    context.block_allocator = own.allocator
    context.reset()


# -- dummy passes ----------------------------------------------------------------------------------


def serve_dummy_passes(attached: Callable[[Any], Any]) -> None:
    """Lets Megatron's dummy forward passes of idle EP ranks take part in the store's exchanges.

    Replaces the inference wrapper's `dummy_forward` once; for a model without PiKV it does what it did.

    Args:
        attached: from a model to its attachment, or None.
    """
    from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
        AbstractModelInferenceWrapper as Wrapper,
    )

    own = getattr(Wrapper, "dummy_forward", None)
    if own is None or hasattr(own, "__wrapped__"):  # before 0.16 there is none
        return

    def dummy_forward(self: Any) -> Any:
        attachment = attached(self.model)
        return own(self) if attachment is None else attachment.dummy_forward(own, self)

    dummy_forward.__wrapped__ = own  # type: ignore[attr-defined]
    Wrapper.dummy_forward = dummy_forward
