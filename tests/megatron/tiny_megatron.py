"""A small random GPTModel with experts, its tokenizer, and greedy decoding without any cache."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

VOCAB = 128
EXPERTS = 4
LAYERS = 2
MAX_LENGTH = 512
BLOCK_TOKENS = 16
"""Of Megatron's KV buffer, so small that a short sequence has several."""

WORDS = ["the", "a", "of", "in", "on", "sea", "ship", "whale", "man", "inn", "night", "old", "said", "was"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def initialize(seed: int = 1234) -> None:
    """Megatron's groups over the world, all ranks one expert-parallel group; gloo for a lone rank."""
    from megatron_patch import cpu

    cpu.install()
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=dist.get_world_size(), expert_tensor_parallel_size=1
        )
    cpu.seed(seed)


def build(
    layers: int = LAYERS, spec: Callable[[Any], Any] = lambda spec: spec, latent: dict[str, Any] | None = None
) -> Any:
    """A GPTModel; the weights of an expert depend on its number in the group, not on its rank.

    Args:
        spec: changes the layers' spec.
        latent: for latent attention, settings of an `MLATransformerConfig`.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from megatron_patch import compat

    world = dist.get_world_size()
    config = (TransformerConfig if latent is None else MLATransformerConfig)(
        num_layers=layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2 if latent is None else 4,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=32,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        expert_model_parallel_size=world,
        expert_tensor_parallel_size=1,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.local,
        **latent or {},
    )
    layer = get_gpt_layer_local_spec(
        num_experts=EXPERTS,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        multi_latent_attention=latent is not None,
        qk_layernorm=latent is not None,
    )
    if latent is not None:
        layer.submodules.self_attention.submodules.core_attention = compat.latent_dot_product_attention()
    model = GPTModel(
        config,
        spec(layer),
        vocab_size=VOCAB,
        max_sequence_length=MAX_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).eval()
    first = EXPERTS // world * parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + first}", name)
            generator = torch.Generator().manual_seed(zlib.crc32(whole.encode()))
            parameter.copy_(
                torch.ones(parameter.shape)
                if "norm" in name
                else torch.randn(parameter.shape, generator=generator) * 0.3
            )
    return model


def dynamic_engine(model: Any, tokenizer: Any, **settings: Any) -> Any:
    """`engine.dynamic_engine`, with small blocks."""
    from megatron_patch import engine

    with mock.patch.object(engine, "BLOCK_TOKENS", BLOCK_TOKENS):
        return engine.dynamic_engine(model, tokenizer, **settings)


def static_engine(model: Any, tokenizer: Any) -> Any:
    """Megatron's `StaticInferenceEngine`, in the form that does not wrap a dynamic one."""
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine

    from megatron_patch import engine

    rows, length = 4, 128
    controller = engine._controller(model, tokenizer, engine.static_context(rows, length), rows, length)
    return StaticInferenceEngine(controller, legacy=True)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` tokens after a prompt, the whole sequence computed anew for each. Collective."""
    ids = list(prompt)
    for _ in range(count):
        length = len(ids)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        logits = model(
            torch.tensor([ids]), torch.arange(length)[None], mask, runtime_gather_output=True
        )  # [1, length, vocab]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def is_greedy(model: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Whether `greedy` gives these tokens, in one pass: each is the best after those before it. Collective."""
    if not tokens:
        return True
    ids = torch.tensor([prompt + tokens[:-1]])
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    logits = model(ids, torch.arange(length)[None], mask, runtime_gather_output=True)  # [1, length, vocab]
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of single words with a chat template, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", ":", "user", "assistant", "system", *WORDS]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
