"""Tiny random models of every MoE family whose attention PiKV serves, by transformers' ``model_type``."""

from __future__ import annotations

from typing import Any

import tiny
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EXPERTS = 4

_SHARED: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "sliding_window": None,
}
_GROUPED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 32, "head_dim": None},
    "qwen3_moe": {"num_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS, "head_dim": None},
    "flex_olmo": {"num_experts": EXPERTS, "head_dim": None},
    "glm4_moe": _GROUPED,
    "dots1": _GROUPED,
    "solar_open": _GROUPED,
    "exaone_moe": {
        "num_experts": EXPERTS,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "is_moe_layer": [True, True],
        "mlp_layer_types": ["sparse", "sparse"],
        "sliding_window": 4096,
        "layer_types": ["full_attention"] * 2,
    },
    "granitemoe": {"num_local_experts": EXPERTS},
    "granitemoeshared": {"num_local_experts": EXPERTS, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "minimax_m2": {"num_local_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
}
"""What each family's configuration needs beside the shared settings."""


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of a family, the same for each seed."""
    settings = {**_SHARED, **FAMILIES[family], **overrides}
    if settings["head_dim"] is None or family == "dbrx":  # no setting there
        del settings["head_dim"]
    if family == "dbrx":
        del settings["intermediate_size"]
    config = AutoConfig.for_model(family, **settings)
    return tiny.build(AutoModelForCausalLM.from_config, config, seed)
