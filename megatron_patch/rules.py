"""What each parameter of a Megatron model is made of: patterns of its name, and how a rank's part is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint import Checkpoint, ShapeError


@dataclass(frozen=True)
class Part:
    """What of a layer a rank owns."""

    checkpoint: Checkpoint
    config: Any
    tp_rank: int
    tp: int
    prefix: str
    """Hugging Face's name of the layer, with a dot at its end."""
    num_held: int
    """Rows of the parameter on this rank."""
    expert: int | None = None
    """Its number in the whole model."""

    def name(self, template: str) -> str:
        return self.prefix + template.format(e=self.expert)

    def need(self, *templates: str) -> None:
        """Raises MissingTensorError with all of these that are not there."""
        self.checkpoint.need(*map(self.name, templates))

    def whole(self, template: str, *index: slice | int) -> Tensor:
        return self.checkpoint.read(self.name(template), *index)

    def rows(self, template: str, num: int) -> Tensor:
        """This rank's share of the ``num`` first dimensions."""
        return self.whole(template, self._share(template, 0, num))

    def columns(self, template: str, num: int) -> Tensor:
        """This rank's share of the ``num`` second dimensions."""
        return self.whole(template, slice(None), self._share(template, 1, num))

    def rows_or_whole(self, template: str, num: int) -> Tensor:
        """As the parameter is: Transformer Engine keeps the projections down to the latents whole on every rank."""
        return self.whole(template) if self.num_held == num else self.rows(template, num)

    def _share(self, template: str, dim: int, num: int) -> slice:
        name = self.name(template)
        self.checkpoint.need(name)
        shape = self.checkpoint.shapes[name]
        if len(shape) <= dim or shape[dim] != num:
            raise ShapeError(f"{name} has shape {shape}, but dimension {dim} is {num} according to config.json")
        size = num // self.tp
        return slice(self.tp_rank * size, (self.tp_rank + 1) * size)


def _query_key_value(part: Part, q: str, k: str, v: str) -> Tensor:
    """Query heads, key and value of one group after the other: ``[groups * (H/K + 2) * D, hidden]``."""
    c = part.config
    heads, groups, dim = c.num_attention_heads, c.num_query_groups, c.kv_channels
    part.need(q, k, v)
    by_group = [
        part.rows(name, n * dim).unflatten(0, (groups // part.tp, -1))
        for name, n in ((q, heads), (k, groups), (v, groups))
    ]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _gate_up(part: Part, size: int, gate: str, up: str) -> Tensor:
    """The gate's rows, then the up projection's."""
    part.need(gate, up)
    return torch.cat([part.rows(gate, size), part.rows(up, size)])


def _expert_fc1(part: Part) -> Tensor:
    """An expert's first layer from any of the three ways in which it is stored; experts are not split."""
    for fused in ("mlp.experts.gate_up_proj", "block_sparse_moe.experts.gate_up_proj"):  # [E, 2 F, hidden]
        if part.name(fused) in part.checkpoint:
            assert part.expert is not None
            return part.whole(fused, part.expert)
    gate, up = _either(
        part,
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
    )
    part.need(gate, up)
    return torch.cat([part.whole(gate), part.whole(up)])


def _expert_fc2(part: Part) -> Tensor:
    for fused in ("mlp.experts.down_proj", "block_sparse_moe.experts.down_proj"):
        if part.name(fused) in part.checkpoint:
            assert part.expert is not None
            return part.whole(fused, part.expert)
    (down,) = _either(part, ("mlp.experts.{e}.down_proj.weight",), ("block_sparse_moe.experts.{e}.w2.weight",))
    return part.whole(down)


def _router(part: Part) -> Tensor:
    (gate,) = _either(part, ("mlp.gate.weight",), ("block_sparse_moe.gate.weight",))
    return part.whole(gate)


def _either(part: Part, *choices: tuple[str, ...]) -> tuple[str, ...]:
    """The names that the checkpoint has; the first ones where it has none, for the error."""
    return next((names for names in choices if part.name(names[0]) in part.checkpoint), choices[0])


Make = Callable[[Part], Tensor]


def _norm(name: str) -> Make:
    return lambda part: part.whole(f"{name}.weight")


LAYER_RULES: list[tuple[str, Make]] = [
    (r"(input_layernorm\.weight|self_attention\.linear_qkv\.layer_norm_weight)", _norm("input_layernorm")),
    (r"(pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)", _norm("post_attention_layernorm")),
    (
        r"self_attention\.linear_qkv\.weight",
        lambda p: _query_key_value(p, *(f"self_attn.{x}_proj.weight" for x in "qkv")),
    ),
    (
        r"self_attention\.linear_proj\.weight",
        lambda p: p.columns("self_attn.o_proj.weight", p.config.num_attention_heads * _value_dim(p.config)),
    ),
    (r"self_attention\.q_layernorm\.weight", lambda p: p.whole(_latent(p, "q_norm", "q_a_layernorm"))),
    (r"self_attention\.k_layernorm\.weight", _norm("self_attn.k_norm")),
    # norms over all heads, of which a rank has its own (see `olmoe`)
    (
        r"self_attention\.q_norm\.weight",
        lambda p: p.rows("self_attn.q_norm.weight", p.config.num_attention_heads * p.config.kv_channels),
    ),
    (
        r"self_attention\.k_norm\.weight",
        lambda p: p.rows("self_attn.k_norm.weight", p.config.num_query_groups * p.config.kv_channels),
    ),
    # latent attention
    (r"self_attention\.linear_q_proj\.weight", lambda p: p.rows("self_attn.q_proj.weight", _query_rows(p.config))),
    (
        r"self_attention\.linear_q_down_proj\.weight",
        lambda p: p.rows_or_whole("self_attn.q_a_proj.weight", p.config.q_lora_rank),
    ),
    (
        r"self_attention\.linear_q_up_proj\.weight",
        lambda p: p.rows("self_attn.q_b_proj.weight", _query_rows(p.config)),
    ),
    (r"self_attention\.linear_q_up_proj\.layer_norm_weight", _norm("self_attn.q_a_layernorm")),
    (
        r"self_attention\.linear_kv_down_proj\.weight",
        lambda p: p.rows_or_whole(
            "self_attn.kv_a_proj_with_mqa.weight", p.config.kv_lora_rank + p.config.qk_pos_emb_head_dim
        ),
    ),
    (
        r"self_attention\.linear_kv_up_proj\.weight",
        lambda p: p.rows(
            "self_attn.kv_b_proj.weight", p.config.num_attention_heads * (p.config.qk_head_dim + p.config.v_head_dim)
        ),
    ),
    (
        r"self_attention\.(kv_layernorm\.weight|linear_kv_up_proj\.layer_norm_weight)",
        _norm("self_attn.kv_a_layernorm"),
    ),
    # experts, their router, and layers without
    (r"mlp\.router\.weight", _router),
    (r"mlp\.router\.expert_bias", lambda p: p.whole("mlp.gate.e_score_correction_bias")),
    (r"mlp\.experts\.(local_experts\.\d+\.linear_fc1\.weight|linear_fc1\.weight\d+)", _expert_fc1),
    (r"mlp\.experts\.(local_experts\.\d+\.linear_fc2\.weight|linear_fc2\.weight\d+)", _expert_fc2),
    (
        r"mlp\.shared_experts\.linear_fc1\.weight",
        lambda p: _gate_up(
            p,
            p.config.moe_shared_expert_intermediate_size,
            "mlp.shared_experts.gate_proj.weight",
            "mlp.shared_experts.up_proj.weight",
        ),
    ),
    (
        r"mlp\.shared_experts\.linear_fc2\.weight",
        lambda p: p.columns("mlp.shared_experts.down_proj.weight", p.config.moe_shared_expert_intermediate_size),
    ),
    (
        r"mlp\.linear_fc1\.weight",
        lambda p: _gate_up(p, p.config.ffn_hidden_size, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ),
    (r"mlp\.linear_fc2\.weight", lambda p: p.columns("mlp.down_proj.weight", p.config.ffn_hidden_size)),
]
"""Patterns of Megatron's names within a layer, and how a rank's part is made of Hugging Face's tensors."""


def _value_dim(config: Any) -> int:
    return int(config.v_head_dim if config.multi_latent_attention else config.kv_channels)


def _query_rows(config: Any) -> int:
    """Rows of the query projection of latent attention."""
    return int(config.num_attention_heads * (config.qk_head_dim + config.qk_pos_emb_head_dim))


def _latent(part: Part, plain: str, latent: str) -> str:
    return f"self_attn.{latent if part.config.multi_latent_attention else plain}.weight"


OUTER_RULES: list[tuple[str, Callable[[Part, int], Tensor]]] = [
    (r"embedding\.word_embeddings\.weight", lambda p, vocab: p.rows("model.embed_tokens.weight", vocab)),
    (r"output_layer\.weight", lambda p, vocab: p.rows("lm_head.weight", vocab)),
    (r"decoder\.final_layernorm\.weight", lambda p, vocab: p.whole("model.norm.weight")),
]
"""The same outside of the layers."""
