"""The insides of Megatron's dynamic contexts and of the engine that steps them (0.16)."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.inference.engines import DynamicInferenceEngine as Engine
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper as Wrapper,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController as Controller,
)
from torch import Tensor

KEY = "_pikv"


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


def final_lengths(context: Any) -> list[int]:
    """Tokens that each request of a context, paused ones too, may grow to."""
    return context.request_output_lengths[: context.total_request_count].tolist()


def token_positions(context: Any) -> Tensor:
    """Position of each token of this pass within its request, padding included: int64 ``[T]``."""
    return context.token_to_pos_ids[: context.padded_active_token_count]


@dataclass
class OwnBuffer:
    """What a dynamic context had before it gave up its KV buffer."""

    allocator: Any
    shape: tuple[int, ...]
    graphs: list[Any]


@torch.inference_mode(False)  # Megatron writes its bookkeeping outside of it, too
def give_up_buffer(context: Any, released: Callable[[list[int]], None], admits: Callable[[Any, int], bool]) -> None:
    """Frees the KV buffer of a dynamic context, and with it the limits that its blocks set.

    Blocks go on being counted, since Megatron's scheduler thinks in them, but there are as many as the
    context's requests can ever want: what is really there is the cache's affair.

    Args:
        released: told the ids of requests whose blocks Megatron gives back: finished or evicted.
        admits: asked whether there is room for a new request that may grow to so many tokens.
    """
    buffer, allocator = context.memory_buffer, context.block_allocator
    context.__dict__[KEY] = OwnBuffer(allocator, tuple(buffer.shape), context.cuda_graph_batch_dimensions_list)
    context.cuda_graph_batch_dimensions_list = []  # nothing is captured, so nothing needs to be padded for it
    _empty_buffer(context)
    enough = context.max_requests * context.max_kv_block_count
    virtual = type(allocator)(context, total_count=2 * enough + 2, paused_count=enough)
    virtual.total_avail -= allocator.get_total_used()
    context.block_allocator = virtual

    def release(self: Any, indexes: Tensor) -> None:
        released(self.request_ids[indexes].tolist())
        type(self).release_memory_blocks_from_request_indexes(self, indexes)

    def check(self: Any, request: Any) -> tuple[bool, bool, bool]:
        requests, tokens, memory = type(self).check_availability(self, request)
        started = request.finished_chunk_token_count > 0  # a later chunk of a prompt has been admitted
        growth = request.sampling_params.num_tokens_to_generate
        return requests, tokens, memory and (started or admits(self, request.remaining_prompt_length + growth))

    def allocate(self: Any, *, is_init: bool) -> None:  # after a suspension
        count, virtual.total_count = virtual.total_count, 1
        type(self).allocate_all_tensors(self, is_init=is_init)
        virtual.total_count = count
        _empty_buffer(self)

    for method in (release, check, allocate):
        setattr(context, OVERRIDDEN[method.__name__], types.MethodType(method, context))


OVERRIDDEN = {
    "release": "release_memory_blocks_from_request_indexes",
    "check": "check_availability",
    "allocate": "allocate_all_tensors",
}
"""Methods of a dynamic context that `give_up_buffer` overrides on the instance."""


def _empty_buffer(context: Any) -> None:
    buffer = context.memory_buffer
    blocks = buffer.dim() - 4 if buffer.dim() == 6 else 1  # [2, layers, blocks, ...], of latents [layers, blocks, ...]
    context.memory_buffer = buffer.new_empty([0 if d == blocks else n for d, n in enumerate(buffer.shape)])


def restore_buffer(context: Any) -> None:
    """Gives a dynamic context its own KV buffer back; requests in it must start anew."""
    own: OwnBuffer | None = context.__dict__.pop(KEY, None)
    if own is None:
        return
    for name in OVERRIDDEN.values():
        del context.__dict__[name]
    context.memory_buffer = context.memory_buffer.new_empty(own.shape)
    context.block_allocator, context.cuda_graph_batch_dimensions_list = own.allocator, own.graphs
    context.reset()


# ---- dummy passes ----


def serve_dummy_passes(attachment: Any, attached: Callable[[Any], Any]) -> None:
    """Lets ranks without requests take part in the cache's exchanges, until `stop_serving`.

    Replaces four methods of Megatron's; for a model without PiKV they do what they did:

    * the inference wrapper's `dummy_forward`, the pass of an EP rank that is idle while others work;
    * the controller's step, which makes no pass at all where requests wait but none is active. The
      other ranks make one, so this rank must, too;
    * the engine's question whether any rank has work: pages of finished requests are work, so that they
      are returned by one more pass and not by the next request's.
    * the engine's capture of CUDA graphs, which an exchange of any number of pages does not allow: the engine,
      and Megatron's static one that is made of it, runs without them instead.

    Args:
        attached: from a model to its attachment, or None.
    """
    _serving.add(attachment)
    if _own_methods or not hasattr(Wrapper, "dummy_forward"):  # before 0.16 there is none
        return
    dummy, step = Wrapper.dummy_forward, Controller.async_generate_output_tokens_dynamic_batch

    @functools.wraps(dummy)
    def dummy_forward(self: Any) -> Any:
        attachment = attached(self.model)
        return dummy(self) if attachment is None else attachment.dummy_forward(dummy, self)

    @functools.wraps(step)
    async def step_or_serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.inference_wrapped_model
        attachment = attached(wrapper.model)
        idle = wrapper.inference_context.active_token_count == 0
        if attachment is None or attachment.exchange.size == 1 or not idle:
            return await step(self, *args, **kwargs)
        with torch.inference_mode():
            self.dummy_forward()
        return None

    has_work = Engine._ep_group_has_work

    @functools.wraps(has_work)
    async def has_work_or_pages(self: Any, local_work: int) -> bool:
        attachment = attached(self.controller.inference_wrapped_model.model)
        pages = attachment is not None and attachment.has_to_release
        return await has_work(self, local_work or int(pages))

    capture = Engine.create_cuda_graphs

    @functools.wraps(capture)
    def capture_or_take_over(self: Any, *args: Any, **kwargs: Any) -> None:
        attachment = attached(self.controller.inference_wrapped_model.model)
        if attachment is None:
            capture(self, *args, **kwargs)
        else:
            attachment.requests_of(self.context)

    for cls, name, method in (
        (Engine, "create_cuda_graphs", capture_or_take_over),
        (Engine, "_ep_group_has_work", has_work_or_pages),
        (Wrapper, "dummy_forward", dummy_forward),
        (Controller, "async_generate_output_tokens_dynamic_batch", step_or_serve),
    ):
        _own_methods.append((cls, name, getattr(cls, name)))
        setattr(cls, name, method)


def stop_serving(attachment: Any) -> None:
    """Gives Megatron its own methods back when no model has PiKV any more."""
    _serving.discard(attachment)
    while _own_methods and not _serving:
        cls, name, method = _own_methods.pop()
        setattr(cls, name, method)


_serving: weakref.WeakSet[Any] = weakref.WeakSet()
_own_methods: list[tuple[type, str, Any]] = []
"""What was replaced: the methods belong to Megatron's classes, so there is one list for all models."""
