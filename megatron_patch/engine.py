"""Megatron's inference engines around a GPTModel, with Megatron's own classes throughout."""

from __future__ import annotations

import math
from typing import Any

from megatron_patch import compat, cpu
from pikv_ds import launch_env
from pikv_ds.errors import UsageError

SEED = 1234
"""Of Megatron's random numbers and of the sampling."""

BLOCK_TOKENS = 256
"""Tokens per block of Megatron's KV buffer."""


def initialize(tp: int = 1) -> Any:
    """The job's process groups, all ranks one expert-parallel group, and Megatron's random numbers.

    Args:
        tp: ranks over which attention is split; experts are not.

    Returns:
        A key-value store that all ranks read and write.
    """
    import torch
    import torch.distributed as dist

    compat.require()
    cpu.install()
    from megatron.core import parallel_state

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(launch_env.device())
    if launch_env.launched():
        world = launch_env.world()
        store, rank, size = launch_env.store(), world.rank, world.size
    else:  # alone: no port is needed
        store, rank, size = dist.HashStore(), 0, 1
    group_store = dist.PrefixStore("world", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=group_store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=size, expert_tensor_parallel_size=1
    )
    cpu.seed(SEED)
    return dist.PrefixStore("figures", store)


def greedy(num_tokens: int, end: int | None = None) -> Any:
    """`SamplingParams` of a greedy answer of at most so many tokens, which ends with token ``end``."""
    from megatron.core.inference.sampling_params import SamplingParams

    return SamplingParams(num_tokens_to_generate=num_tokens, top_k=1, termination_id=-1 if end is None else end)


def static_context(max_batch: int, max_length: int) -> Any:
    """A `StaticInferenceContext` for so many sequences of so many tokens, for loops of one's own."""
    from megatron.core.inference.contexts import StaticInferenceContext

    return StaticInferenceContext(max_batch, max_length)


def dynamic_engine(
    model: Any,
    tokenizer: Any,
    *,
    max_requests: int,
    max_tokens: int,
    context_length: int,
    buffer_gib: float | None = None,
) -> Any:
    """Megatron's `DynamicInferenceEngine`: requests join and leave the batch at every step.

    Alone, the engines of an expert-parallel group must be stepped equally often; under Megatron's
    coordinator an idle rank runs dummy passes by itself.

    Args:
        model: a GPTModel on this rank's device.
        tokenizer: such as `tokenizer.HFTokenizer`.
        max_requests: most sequences in one forward pass.
        max_tokens: most tokens in one forward pass, rounded up to Megatron's padding of 64; longer
            prompts come in chunks of this.
        context_length: most tokens of one sequence, prompt and answer.
        buffer_gib: of Megatron's KV buffer; by default just `max_requests` sequences of full length.

    Raises:
        ValueError: a buffer that cannot hold one sequence of `context_length`: the engine would
            stop in the middle of it.
        compat.MegatronVersionError: a Megatron whose dynamic engine has another form.
    """
    compat.require(compat.ENGINE_SINCE, "the dynamic engine")
    compat.repair()
    cpu.install()
    if max_tokens < max_requests:
        raise UsageError(f"max_tokens = {max_tokens} is less than max_requests = {max_requests}: one token each")
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine

    config = model.config
    block_bytes = kv_bytes_per_token(config) * BLOCK_TOKENS
    blocks_per_sequence = math.ceil(context_length / BLOCK_TOKENS)
    smallest = (blocks_per_sequence + 1) * block_bytes  # one block is Megatron's dummy
    if buffer_gib is None:
        buffer_gib = (max_requests * blocks_per_sequence + 1) * block_bytes * (1 + 1e-9) / 2**30
    elif buffer_gib * 2**30 < smallest:
        raise UsageError(
            f"a buffer of {buffer_gib:g} GiB cannot hold one sequence of {context_length} tokens: "
            f"use at least {math.ceil(smallest / 2**30 * 1000) / 1000:g} GiB or a shorter context"
        )
    context = DynamicInferenceContext(
        params_dtype=config.params_dtype,
        num_layers=config.num_layers // config.pipeline_model_parallel_size,
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups,  # what it stores: key-value heads
        max_sequence_length=context_length,
        buffer_size_gb=buffer_gib,
        block_size_tokens=BLOCK_TOKENS,
        max_requests=max_requests,
        max_tokens=DynamicInferenceContext.round_up_tokens(max_tokens, config.tensor_model_parallel_size),
        num_cuda_graphs=None,
    )
    controller = _controller(model, tokenizer, context, max_requests, context_length)
    # Megatron seeds all data-parallel ranks alike: several answers to one prompt would be the same.
    controller.sampling_rng.manual_seed(SEED + parallel_state.get_data_parallel_rank())
    return DynamicInferenceEngine(controller, context, random_seed=SEED)


def kv_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values of one token on one rank, in Megatron's own buffer."""
    layers = config.num_layers // config.pipeline_model_parallel_size
    heads = config.num_query_groups // config.tensor_model_parallel_size
    return int(2 * layers * heads * config.kv_channels * config.params_dtype.itemsize)


def _controller(model: Any, tokenizer: Any, context: Any, max_requests: int, max_length: int) -> Any:
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,  # of pipelines
        padded_vocab_size=model.vocab_size,
        inference_max_requests=max_requests,
        inference_max_seq_length=max_length,
    )
    wrapper = GPTInferenceWrapper(model, config, context)
    wrapper.prep_model_for_inference()
    return TextGenerationController(inference_wrapped_model=wrapper, tokenizer=tokenizer)
