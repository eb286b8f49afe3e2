"""Megatron-Core without a GPU: the smallest set of replacements, each with its reason.

Megatron names CUDA in many places where any device would do. `install` replaces these, where no
CUDA is present, and nothing else; where CUDA is present it does nothing. Covered: the forward pass
of a GPTModel (alltoall dispatcher, local layer specs, ``use_cpu_initialization=True``), the static
and the dynamic engine, and the data-parallel coordinator.

torch itself stays as it is, but for `Tensor.cuda` (see there): the modules of `TORCH_USERS` get a
stand-in for their global ``torch`` that has another ``torch.cuda``. Whoever else asks torch for CUDA
still hears the truth.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch import compat

TORCH_USERS = (
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.inference.batch_dimensions_utils",
    "megatron.core.inference.communication_utils",
    "megatron.core.inference.contexts.attention_context.mha_metadata",
    "megatron.core.inference.contexts.dynamic_block_allocator",
    "megatron.core.inference.contexts.dynamic_context",
    "megatron.core.inference.engines.dynamic_engine",
    "megatron.core.inference.engines.static_engine",
    "megatron.core.inference.inference_request",
    "megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper",
    "megatron.core.inference.text_generation_controllers.text_generation_controller",
    "megatron.core.inference.utils",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.dot_product_attention",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.moe.shared_experts",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.utils",  # the buffer that attention without FlashAttention shares
)
"""Modules on the covered paths that say ``torch.cuda``. Some exist in newer versions only."""


# ---- stand-ins for what `torch.cuda` and `torch` offer ----


class Stream:
    """A stream of a device that has only one: work is done when it is submitted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """A point in time on the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, _: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, _: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3


class _StandIn(types.ModuleType):
    """A module with some names of its own; all others are those of the module it stands in for."""

    def __init__(self, module: Any, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _stands_in_for=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_in_for"], name)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _empty_like(tensor: Tensor, *, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    return torch.empty_like(tensor, **kwargs)


def _cuda() -> _StandIn:
    stream = Stream()
    return _StandIn(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),  # "where do my tensors go": 100 places
        Stream=Stream,  # the dispatcher and shared experts overlap copies on a stream of their own
        current_stream=lambda *_: stream,
        stream=lambda _: contextlib.nullcontext(),
        Event=Event,  # the engines time their steps with events
        synchronize=_nothing,  # around broadcasts of results
        memory_stats=lambda *_: dict.fromkeys(_MEMORY_STATS, 0),  # printed on suspend and resume
        set_device=_nothing,  # the static engine's thread chooses its device again
        nvtx=_StandIn(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),  # marks for a profiler
    )


_MEMORY_STATS = ("allocation.all.current", "allocated_bytes.all.current", "reserved_bytes.all.current")


# ---- replacements in Megatron's modules ----


def flash_decode_and_prefill(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Any,
    seqlens_k: Tensor,
    block_table: Tensor,
    *_: Any,
) -> Tensor:
    """Attention over the paged KV buffer of a dynamic context, in plain torch: the reference.

    Args:
        self: Megatron's attention module.
        q: ``[tokens, 1, heads, head_dim]``, after RoPE, the sequences one after the other, padded.
        k, v: ``[blocks, block_size, kv_heads, head_dim]``, with this step's tokens in place.
        cu_seqlens_q: ``[sequences + 1]``, where each sequence's queries begin.
        seqlens_k: ``[sequences]``, tokens in the buffer, this step's included.
        block_table: ``[sequences, max_blocks]``.

    Returns:
        ``[tokens, 1, heads, head_dim]``; zeros for padding.
    """
    q = q.reshape(-1, *q.shape[-2:])
    scale = getattr(self, "softmax_scale", None)
    out = torch.zeros_like(q)
    starts, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
    for i, length in enumerate(lengths):
        start, end = starts[i], starts[i + 1]
        if end == start or length == 0:
            continue
        blocks = block_table[i, : -(-length // k.shape[1])].long()
        key, value = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in (k, v))  # [g, length, d]
        position = torch.arange(length - (end - start), length)
        out[start:end] = scaled_dot_product_attention(
            q[start:end].transpose(0, 1),
            key,
            value,
            attn_mask=torch.arange(length) <= position[:, None],
            scale=scale,
            enable_gqa=True,
        ).transpose(0, 1)
    return out.unsqueeze(1)


def _causal_mask(sq: int) -> Tensor:
    return torch.ones(sq, sq, dtype=torch.bool).triu(1)


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class Replacement(NamedTuple):
    """One name of one module of Megatron."""

    module: str
    name: str
    value: Any
    reason: str


REPLACEMENTS = (
    Replacement(
        "megatron.core.transformer.attention",
        "Attention.flash_decode_and_prefill",
        flash_decode_and_prefill,
        "calls FlashAttention",
    ),
    Replacement(
        "megatron.core.transformer.attention",
        "HAVE_FA3",
        True,
        "the dynamic path asserts that FlashAttention is there before it calls the method above",
    ),
    Replacement(
        "megatron.core.inference.contexts.dynamic_context",
        "triton_append_key_value_cache",
        None,
        "a Triton kernel; Megatron has the same in torch for None",
    ),
    Replacement(
        "megatron.core.fusions.fused_softmax",
        "get_default_causal_mask",
        _causal_mask,
        'says device="cuda"',
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _splits,
        "makes split sizes numbers only of tensors that come from a GPU; the all-to-all needs numbers",
    ),
    Replacement(
        "megatron.core.inference.engines.dynamic_engine", "range_push", _nothing, "imported from torch.cuda.nvtx"
    ),
    Replacement(
        "megatron.core.inference.engines.dynamic_engine", "range_pop", _nothing, "imported from torch.cuda.nvtx"
    ),
)


def _stay(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.cuda` for callers in Megatron: the tensor itself. All others get torch's, and its error.

    A method of Tensor cannot be replaced for some modules only, hence the look at the caller. The
    static controller says it of its lengths, and a tied embedding of its weight.
    """

    def cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return self if caller.startswith("megatron.") else original(self, *args, **kwargs)

    return cuda


# ---- the two functions to call ----

_installed = False


def install() -> bool:
    """Makes Megatron run on a CPU; harmless to call again.

    Returns:
        Whether the replacements are active: never where CUDA is present.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _installed = True
    compat.repair()
    stand_in = _StandIn(torch, cuda=_cuda(), empty_like=_empty_like)  # pinned memory needs a GPU
    for name in TORCH_USERS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name).__dict__["torch"] = stand_in
    for module, path, value, _ in REPLACEMENTS:
        owner = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        if hasattr(owner, name):
            setattr(owner, name, value)
    torch.Tensor.cuda = _stay(torch.Tensor.cuda)  # type: ignore[method-assign]
    return True


def seed(number: int) -> None:
    """Seeds torch and Megatron's trackers, equally on every rank but for the tensor-parallel part.

    On a CPU with the tracker for inference, which does not touch the random numbers of a GPU.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(number)
    if install():
        model_parallel_cuda_manual_seed(number, **compat.cpu_seed_arguments(model_parallel_cuda_manual_seed))
    else:
        model_parallel_cuda_manual_seed(number)
