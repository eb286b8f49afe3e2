"""Hugging Face weights into a Megatron model, each rank only what it owns.

Every parameter of the model is looked up in `RULES`: a pattern of Megatron's name, where it comes
from, and how it is put together and split. Tensors are read one by one from the safetensors files,
slices of them where tensor parallelism splits them, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """The files are not the weights of this model; the message names the file or the tensor."""


@dataclass(frozen=True)
class Report:
    """What loading a model took on this rank."""

    num_tensors: int
    """Parameters of the model that were set."""
    read_bytes: int
    """Bytes read from the files."""
    checkpoint_bytes: int
    """Bytes of all tensors in the files."""


class Checkpoint:
    """The tensors of a folder with safetensors files, read in slices.

    Raises:
        CheckpointError: no such files, or one that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.read_bytes = 0
        self._open: dict[str, Any] = {}  # the file of each tensor
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.is_file():
            names = [single.name]
        else:
            raise CheckpointError(
                f"{self.directory}: neither {single.name} nor {index.name} there; PiKV loads safetensors only"
            )
        for name in names:
            path = self.directory / name
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {error}; the checkpoint is incomplete or damaged") from error
            self._open |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        slices = (file.get_slice(name) for name, file in self._open.items())
        return sum(_elements(s.get_shape()) * _ITEM_BYTES.get(s.get_dtype(), 4) for s in slices)

    def read(self, name: str, *index: slice | int) -> Tensor:
        """A tensor, or a part of it; what is not asked for is not read."""
        if name not in self._open:
            raise CheckpointError(f"{self.directory}: no tensor {name!r} there; is it a checkpoint of this model?")
        tensor = self._open[name].get_slice(name)[index] if index else self._open[name].get_tensor(name)
        self.read_bytes += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class Part:
    """What of a layer a rank owns."""

    checkpoint: Checkpoint
    config: Any
    tp_rank: int
    tp: int
    prefix: str
    """Hugging Face's name of the layer, with a dot at its end."""
    expert: int | None = None
    """Its number in the whole model."""

    def name(self, template: str) -> str:
        return self.prefix + template.format(e=self.expert)

    def whole(self, template: str, *index: slice | int) -> Tensor:
        return self.checkpoint.read(self.name(template), *index)

    def rows(self, template: str, num: int) -> Tensor:
        """This rank's share of the ``num`` first dimensions."""
        return self.whole(template, self._share(num))

    def columns(self, template: str, num: int) -> Tensor:
        """This rank's share of the ``num`` second dimensions."""
        return self.whole(template, slice(None), self._share(num))

    def _share(self, num: int) -> slice:
        size = num // self.tp
        return slice(self.tp_rank * size, (self.tp_rank + 1) * size)


def _query_key_value(part: Part, q: str, k: str, v: str) -> Tensor:
    """Query heads, key and value of one group after the other: ``[groups * (H/K + 2) * D, hidden]``."""
    c = part.config
    heads, groups, dim = c.num_attention_heads, c.num_query_groups, c.kv_channels
    q, k, v = (
        part.rows(name, n * dim).unflatten(0, (groups // part.tp, -1))
        for name, n in ((q, heads), (k, groups), (v, groups))
    )
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def _gate_up(part: Part, size: int, gate: str, up: str) -> Tensor:
    """The gate's rows, then the up projection's."""
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
    (r"self_attention\.(q_layernorm|q_norm)\.weight", lambda p: p.whole(_latent(p, "q_norm", "q_a_layernorm"))),
    (r"self_attention\.(k_layernorm|k_norm)\.weight", _norm("self_attn.k_norm")),
    # latent attention
    (r"self_attention\.linear_q_proj\.weight", lambda p: p.whole("self_attn.q_proj.weight")),
    (r"self_attention\.linear_q_down_proj\.weight", lambda p: p.whole("self_attn.q_a_proj.weight")),
    (r"self_attention\.linear_q_up_proj\.weight", lambda p: p.whole("self_attn.q_b_proj.weight")),
    (r"self_attention\.linear_q_up_proj\.layer_norm_weight", _norm("self_attn.q_a_layernorm")),
    (r"self_attention\.linear_kv_down_proj\.weight", lambda p: p.whole("self_attn.kv_a_proj_with_mqa.weight")),
    (r"self_attention\.linear_kv_up_proj\.weight", lambda p: p.whole("self_attn.kv_b_proj.weight")),
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


def _latent(part: Part, plain: str, latent: str) -> str:
    return f"self_attn.{latent if part.config.multi_latent_attention else plain}.weight"


OUTER_RULES: list[tuple[str, Callable[[Part, int], Tensor]]] = [
    (r"embedding\.word_embeddings\.weight", lambda p, vocab: p.rows("model.embed_tokens.weight", vocab)),
    (r"output_layer\.weight", lambda p, vocab: p.rows("lm_head.weight", vocab)),
    (r"decoder\.final_layernorm\.weight", lambda p, vocab: p.whole("model.norm.weight")),
]
"""The same outside of the layers."""


def load_hf(model: Any, directory: str | Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Report:
    """Sets the weights of a Megatron model from a Hugging Face checkpoint, in place.

    Args:
        model: from `models.build_model`, of any size of the tensor- and expert-parallel groups.
        directory: with safetensors files.
        progress: wraps the loop over the parameters (`tqdm`, say).

    Raises:
        CheckpointError: a missing or damaged file, a missing tensor, or one of another shape.
    """
    from megatron.core import parallel_state

    checkpoint = Checkpoint(directory)
    config = model.config
    tp_rank, tp = parallel_state.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
    experts = (config.num_moe_experts or 1) // config.expert_model_parallel_size
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts
    targets = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.endswith(("_extra_state", "local_tokens_per_expert")) and "rotary" not in name
    }
    for name, target in progress(targets.items()):
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            part = Part(checkpoint, config, tp_rank, tp, "")
            tensor = _rule(OUTER_RULES, name)(part, model.vocab_size)
        else:
            number = re.search(r"(?:local_experts\.|weight)(\d+)", layer[2])
            expert = None if number is None else first_expert + int(number[1])
            part = Part(checkpoint, config, tp_rank, tp, f"model.layers.{layer[1]}.", expert)
            tensor = _rule(LAYER_RULES, layer[2])(part)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {list(target.shape)} in the model, {list(tensor.shape)} in the "
                "checkpoint; its config.json does not describe these weights"
            )
        with torch.no_grad():
            target.copy_(tensor)
    return Report(len(targets), checkpoint.read_bytes, checkpoint.nbytes)


def _rule(rules: list[tuple[str, Any]], name: str) -> Any:
    for pattern, make in rules:
        if re.fullmatch(pattern, name):
            return make
    raise CheckpointError(f"no rule tells where Megatron's {name} comes from; this kind of model is not supported")


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1}


def _elements(shape: list[int]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


__all__ = ["Checkpoint", "CheckpointError", "Report", "load_hf"]
