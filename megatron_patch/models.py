"""From a Hugging Face configuration to Megatron's: `TransformerConfig`, layer spec and `GPTModel`.

One function per family says what differs; what Megatron cannot represent is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_patch import compat, cpu
from pikv_ds import checks
from pikv_ds.errors import UsageError


class UnsupportedCheckpointError(UsageError):
    """Megatron would compute something else than the checkpoint means; the message names the setting."""


def load_config(directory: str | Path) -> Any:
    """The `config.json` of a Hugging Face checkpoint.

    Raises:
        UnsupportedCheckpointError: no such folder or file, or one of an unknown kind.
    """
    from transformers import AutoConfig

    path = Path(directory)
    if not (path / "config.json").is_file():
        raise UnsupportedCheckpointError(f"{path}: no config.json there; pass the folder of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a file that somebody else has written makes transformers raise anything
        raise UnsupportedCheckpointError(f"{path / 'config.json'}: {checks.one_line(error)}") from error


def transformer_config(
    hf: Any, *, dtype: torch.dtype = torch.float32, tp: int = 1, ep: int = 1, **overrides: Any
) -> Any:
    """Megatron's configuration of a Hugging Face model.

    Args:
        hf: a Hugging Face configuration (see `FAMILIES` for the model types).
        tp, ep: tensor- and expert-parallel ranks; experts are not split by tensor parallelism.
        overrides: settings of the `TransformerConfig` that go before ours.

    Returns:
        A `TransformerConfig`, or an `MLATransformerConfig` for latent attention.

    Raises:
        UnsupportedCheckpointError: the setting, its value and the reason.
    """
    compat.require()
    compat.repair()
    if not torch.cuda.is_available():
        cpu.install()
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    family = FAMILIES.get(hf.model_type)
    if family is None:
        raise UnsupportedCheckpointError(f"model type {hf.model_type!r} is not one of {', '.join(FAMILIES)}")
    if getattr(hf, "sliding_window", None) is not None and getattr(hf, "use_sliding_window", True):
        _refuse("sliding_window", hf.sliding_window, "windows are not supported; set it to null if the model allows")
    if hf.hidden_act != "silu":
        _refuse("hidden_act", hf.hidden_act, "only silu is known")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            _refuse(name, True, "Megatron would add biases to every linear layer")
    if getattr(hf, "quantization_config", None):
        _refuse("quantization_config", hf.quantization_config, "dequantise the checkpoint to bf16 and drop this key")
    experts = _num_experts(hf)
    if experts is None and ep > 1:
        _refuse("model_type", hf.model_type, f"a dense model has no experts for {ep} expert-parallel ranks; use ep=1")
    for name, value, parts, kind in (
        ("num_attention_heads", hf.num_attention_heads, tp, "tensor"),
        ("num_key_value_heads", hf.num_key_value_heads, tp, "tensor"),
        ("vocab_size", hf.vocab_size, tp, "tensor"),
        ("number of experts", experts or ep, ep, "expert"),
    ):
        if value % parts:
            _refuse(name, value, f"does not divide over {parts} {kind}-parallel ranks")
    settings: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,
    }
    if not torch.cuda.is_available():
        settings |= {"use_cpu_initialization": True, "attention_backend": AttnBackend.local}
    if experts is not None:
        settings |= {
            "moe_ffn_hidden_size": getattr(hf, "moe_intermediate_size", None) or hf.intermediate_size,
            "num_moe_experts": experts,
            "moe_router_topk": hf.num_experts_per_tok,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",  # the one that takes any number of tokens per rank
        }
    settings |= family(hf)
    if experts is not None and hf.num_experts_per_tok == 1 and not settings.get("moe_router_pre_softmax"):
        _refuse("num_experts_per_tok", 1, "the weight of a single expert is 1 here, and its score in Megatron")
    settings |= overrides
    kind = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    return kind(**settings)


def build_model(hf: Any, config: Any) -> Any:
    """A `GPTModel` in evaluation mode on this rank's device, its weights not yet set (see `convert`).

    Args:
        hf, config: Hugging Face's configuration and what `transformer_config` made of it.
    """
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(hf, config),
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        rotary_base=_rope(hf)["rope_theta"],
        share_embeddings_and_output_weights=bool(hf.tie_word_embeddings),
    )
    model.to(compat.device())
    for parameter in model.parameters():
        # the parameters only: an expert bias stays in fp32, for rounded to bf16 it would choose other experts
        parameter.data = parameter.data.to(config.params_dtype)
    if config.multi_latent_attention:
        _set_latent_epsilon(model)
    return model.eval().requires_grad_(False)


LATENT_EPSILON = 1e-6
"""Of the norms of DeepSeek's latents, whatever ``rms_norm_eps`` says (`DeepseekV3Attention` in transformers)."""


def _set_latent_epsilon(model: Any) -> None:
    for layer in model.decoder.layers:
        # Transformer Engine has these norms within the projections that follow them
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module = getattr(layer.self_attention, name, None)
            if module is not None and hasattr(module, "eps"):
                module.eps = LATENT_EPSILON


def block_spec(hf: Any, config: Any) -> Any:
    """The layers of a model: Transformer Engine's where it is installed, Megatron's own elsewhere."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=compat.has_transformer_engine(), normalization="RMSNorm"
    )
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        if hf.model_type == "olmoe":
            from megatron_patch.olmoe import OlmoeSelfAttention

            attention.module = OlmoeSelfAttention
        if config.multi_latent_attention and not compat.has_transformer_engine():
            attention.submodules.core_attention = compat.latent_dot_product_attention()
    return spec


def _llama(hf: Any) -> dict[str, Any]:
    _default_rope(hf)
    return {}


def _mixtral(hf: Any) -> dict[str, Any]:
    _default_rope(hf)
    return {"moe_router_pre_softmax": False}  # softmax over the chosen, as renormalising the top k does


def _qwen3_moe(hf: Any) -> dict[str, Any]:
    _default_rope(hf)
    sparse = [
        int((i + 1) % hf.decoder_sparse_step == 0 and i not in (hf.mlp_only_layers or []))
        for i in range(hf.num_hidden_layers)
    ]
    return {"qk_layernorm": True, "moe_router_pre_softmax": not hf.norm_topk_prob, "moe_layer_freq": sparse}


def _olmoe(hf: Any) -> dict[str, Any]:
    _default_rope(hf)
    if hf.clip_qkv is not None:
        _refuse("clip_qkv", hf.clip_qkv, "Megatron does not clip")
    return {"moe_router_pre_softmax": not hf.norm_topk_prob}


def _deepseek(hf: Any) -> dict[str, Any]:
    rope = _rope(hf)
    if rope["rope_type"] not in ("default", "yarn"):
        _refuse("rope_type", rope["rope_type"], "use default or yarn")
    if not getattr(hf, "rope_interleave", True):
        _refuse("rope_interleave", False, "Megatron takes latent attention's rotary channels in pairs")
    if getattr(hf, "moe_layer_freq", 1) != 1:
        _refuse("moe_layer_freq", hf.moe_layer_freq, "transformers has experts in every layer after the dense ones")
    settings: dict[str, Any] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,  # of the latents
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "num_query_groups": hf.num_attention_heads,
        "kv_channels": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        "rotary_base": rope["rope_theta"],
        "rope_type": "rope" if rope["rope_type"] == "default" else "yarn",
        "rotary_scaling_factor": 1.0,
        "moe_layer_freq": [int(i >= hf.first_k_dense_replace) for i in range(hf.num_hidden_layers)],
        "moe_shared_expert_intermediate_size": (hf.n_shared_experts or 0) * hf.moe_intermediate_size or None,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_router_dtype": "fp32",
    }
    return settings | (_yarn(hf, rope) if rope["rope_type"] == "yarn" else {})


def _yarn(hf: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Latent attention's YaRN; both factors on the attention's scale come from the two ``mscale``."""
    if rope.get("attention_factor") is not None:
        _refuse("attention_factor", rope["attention_factor"], "Megatron derives it from mscale and mscale_all_dim")
    if not rope.get("truncate", True):
        _refuse("truncate", False, "Megatron rounds the range of dimensions that it corrects")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(mscale_all_dim) and (mscale, mscale_all_dim or 0) != (1, 0):
        _refuse(
            "mscale, mscale_all_dim",
            (mscale, mscale_all_dim),
            "with one of them, transformers and DeepSeek's own code disagree; give both or none",
        )
    original = rope["original_max_position_embeddings"]
    return {
        "rotary_scaling_factor": rope.get("factor") or hf.max_position_embeddings / original,
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": mscale or 1.0,
        "mscale_all_dim": mscale_all_dim or 0.0,
    }


def _deepseek_v2(hf: Any) -> dict[str, Any]:
    if hf.topk_method != "greedy":
        _refuse(
            "topk_method",
            hf.topk_method,
            "Megatron ranks groups by the sum of their best, not by the best; use greedy",
        )
    if hf.norm_topk_prob:
        _refuse("norm_topk_prob", True, "transformers' DeepSeek-V2 ignores it, DeepSeek's own code does not")
    return _deepseek(hf) | {"moe_router_pre_softmax": True}


def _deepseek_v3(hf: Any) -> dict[str, Any]:
    if not hf.norm_topk_prob:
        _refuse("norm_topk_prob", False, "Megatron normalises what a sigmoid router chooses")
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    if hf.n_group > 1:
        if hf.num_experts_per_tok // hf.topk_group != 2:
            _refuse(
                "topk_group",
                hf.topk_group,
                "DeepSeek-V3 ranks groups by their two best, Megatron by top-k / topk_group",
            )
        settings |= {"moe_router_num_groups": hf.n_group, "moe_router_group_topk": hf.topk_group}
    return _deepseek(hf) | settings


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
"""By Hugging Face's ``model_type``: what differs from the settings of all."""


def _num_experts(hf: Any) -> int | None:
    """Routed experts of a layer, None for a dense model."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(getattr(hf, name, None), int):
            return int(getattr(hf, name))
    return None


def _rope(hf: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | dict(hf.rope_parameters or {})


def _default_rope(hf: Any) -> None:
    if _rope(hf)["rope_type"] != "default":
        _refuse("rope_type", _rope(hf)["rope_type"], "only plain rotary embeddings are known for this family")


def _refuse(key: str, value: Any, reason: str) -> None:
    raise UnsupportedCheckpointError(f"{key} = {value!r}: {reason}")
