"""Tiny random models of transformers, for tests: made in milliseconds, different for each seed.

Weights are drawn wide enough that greedy decoding does not settle on one token, so that equality
of generated tokens means something; attention biases are random too, not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 128


def mixtral(
    num_experts: int = 8,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    experts_per_token: int = 2,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A Mixtral: every layer has a router."""
    settings = _shared(num_layers, num_heads, num_kv_heads, head_dim)
    settings |= {"num_local_experts": num_experts, "num_experts_per_tok": experts_per_token, "sliding_window": None}
    return _build(MixtralForCausalLM, MixtralConfig, settings | overrides, seed)


def qwen3_moe(
    num_experts: int = 8,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    experts_per_token: int = 2,
    attention_bias: bool = False,
    dense_layers: tuple[int, ...] = (),
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A Qwen3-MoE: query and key norms, and layers without a router where `dense_layers` says so."""
    settings = _shared(num_layers, num_heads, num_kv_heads, head_dim)
    settings |= {
        "num_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": list(dense_layers),
        "attention_bias": attention_bias,
    }
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig, settings | overrides, seed)


def llama(
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    attention_bias: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A dense Llama: no router anywhere."""
    settings = _shared(num_layers, num_heads, num_kv_heads, head_dim) | {"attention_bias": attention_bias}
    return _build(LlamaForCausalLM, LlamaConfig, settings | overrides, seed)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "llama": llama}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that lengths can be counted by hand."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = sorted(set(map(chr, range(32, 127))) | {"\n", "?"})
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _shared(num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,  # generation is never cut short
        "pad_token_id": None,
    }


def _build(model_class: Any, config_class: Any, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    return build(model_class, config_class(**settings), seed)


def build(make: Callable[[Any], PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """A model of a configuration in float32, with random attention biases; the same for each seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = make(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)
