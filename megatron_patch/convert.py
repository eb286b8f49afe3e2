"""Hugging Face weights into a Megatron model, each rank only what it owns.

Every parameter of the model is looked up in `RULES`: a pattern of Megatron's name, where it comes
from, and how it is put together and split. Tensors are read one by one from the safetensors files,
slices of them where tensor parallelism splits them, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import json
import math
import re
import resource
import sys
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
    peak_host_bytes: int
    """Most host memory that this process has had resident so far, mapped parts of the files included."""


STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number of the types, in safetensors' words, whose numbers are the weights themselves."""

MAPPED_BYTES = 64 * 2**20
"""How much of a file is read before it is opened anew. What was read of a mapped file counts as this
process's memory until the file is closed; without this a rank would hold its weights twice."""


class Checkpoint:
    """The tensors of a folder with safetensors files, read in slices, one file open at a time.

    Raises:
        CheckpointError: no such files, or one that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.read_bytes = 0
        self.nbytes = 0
        """Bytes of all tensors."""
        self._paths: dict[str, Path] = {}  # the file of each tensor
        self._file: tuple[Path, Any] | None = None  # the open one
        self._mapped_bytes = 0
        for path in self._files():
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                self.nbytes += math.prod(part.get_shape()) * STORED.get(part.get_dtype(), 1)
                self._paths[name] = path

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        return list(self._open(self._path(name)).get_slice(name).get_shape())

    def read(self, name: str, *index: slice | int) -> Tensor:
        """A tensor, or a part of it; what is not asked for is not read.

        Raises:
            CheckpointError: it is not there, or it is quantised.
        """
        path = self._path(name)
        file = self._open(path)
        dtype = file.get_slice(name).get_dtype()
        if dtype not in STORED:
            raise CheckpointError(
                f"{path}: {name} is stored as {dtype}, which means nothing without its scales; "
                "dequantise the checkpoint to bf16 first"
            )
        tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        self.read_bytes += tensor.nbytes
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _path(self, name: str) -> Path:
        if name not in self._paths:
            raise CheckpointError(f"{self.directory}: no tensor {name!r} there; is it a checkpoint of this model?")
        return self._paths[name]

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: no table of tensors and files in it ({error!r})") from error
            return [self.directory / name for name in names]
        if single.is_file():
            return [single]
        raise CheckpointError(
            f"{self.directory}: neither {single.name} nor {index.name} there; PiKV loads safetensors only"
        )

    def _open(self, path: Path) -> Any:
        if self._file is None or self._file[0] != path or self._mapped_bytes >= MAPPED_BYTES:
            try:
                self._file = (path, safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {error}; the checkpoint is incomplete or damaged") from error
            self._mapped_bytes = 0
        return self._file[1]


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
        shape = self.checkpoint.shape(name)
        if len(shape) <= dim or shape[dim] != num:
            raise CheckpointError(
                f"{self.checkpoint.directory}: {name} has shape {shape}, but dimension {dim} is {num} according to "
                "config.json, which does not describe these weights"
            )
        size = num // self.tp
        return slice(self.tp_rank * size, (self.tp_rank + 1) * size)


def _query_key_value(part: Part, q: str, k: str, v: str) -> Tensor:
    """Query heads, key and value of one group after the other: ``[groups * (H/K + 2) * D, hidden]``."""
    c = part.config
    heads, groups, dim = c.num_attention_heads, c.num_query_groups, c.kv_channels
    by_group = [
        part.rows(name, n * dim).unflatten(0, (groups // part.tp, -1))
        for name, n in ((q, heads), (k, groups), (v, groups))
    ]
    return torch.cat(by_group, dim=1).flatten(0, 1)


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


def load_hf(model: Any, directory: str | Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Report:
    """Sets the weights of a Megatron model from a Hugging Face checkpoint, in place.

    Args:
        model: from `models.build_model`, of any size of the tensor- and expert-parallel groups.
        directory: with safetensors files.
        progress: wraps the loop over the parameters (`tqdm`, say).

    Raises:
        CheckpointError: a missing or damaged file, a tensor that is missing, quantised or of another shape,
            or a model that is cut into pipeline stages.
    """
    from megatron.core import parallel_state

    config = model.config
    if config.pipeline_model_parallel_size > 1:
        raise CheckpointError(
            f"pipeline_model_parallel_size = {config.pipeline_model_parallel_size}: each stage numbers its layers "
            "from 0, so that they cannot be told apart; use tensor and expert parallelism"
        )
    checkpoint = Checkpoint(directory)
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
            part = Part(checkpoint, config, tp_rank, tp, "", target.shape[0])
            tensor = _rule(OUTER_RULES, name)(part, model.vocab_size)
        else:
            number = re.search(r"(?:local_experts\.|weight)(\d+)", layer[2])
            expert = None if number is None else first_expert + int(number[1])
            part = Part(checkpoint, config, tp_rank, tp, f"model.layers.{layer[1]}.", target.shape[0], expert)
            tensor = _rule(LAYER_RULES, layer[2])(part)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {list(target.shape)} in the model, {list(tensor.shape)} in the "
                "checkpoint; its config.json does not describe these weights"
            )
        with torch.no_grad():
            target.copy_(tensor)
    return Report(len(targets), checkpoint.read_bytes, checkpoint.nbytes, _peak_host_bytes())


LATEST = "latest_checkpointed_iteration.txt"


def load_megatron(model: Any, directory: str | Path) -> None:
    """Sets the weights of a Megatron model from a Megatron checkpoint, in place; collective.

    Args:
        directory: a distributed checkpoint (``--ckpt-format torch_dist``) of any tensor- and expert-parallel
            size, or the folder of a training run, whose latest one is taken.

    Raises:
        CheckpointError: there is none, or it is not of this model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    path = Path(directory)
    if (path / LATEST).is_file():
        latest = (path / LATEST).read_text().strip()
        path = path / (latest if latest == "release" else f"iter_{latest:0>7}")
    if not (path / "metadata.json").is_file():
        raise CheckpointError(
            f"{path}: no metadata.json there; pass a distributed checkpoint (--ckpt-format torch_dist)"
        )
    try:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))
        model.load_state_dict(state["model"])
    except (CheckpointingException, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise CheckpointError(f"{path}: not a checkpoint of this model ({reason})") from error


def save_megatron(model: Any, directory: str | Path) -> None:
    """Writes the weights as a distributed checkpoint of Megatron's, which other parallel sizes can load; collective.

    Args:
        directory: made if it is not there; must be empty.
    """
    from megatron.core import dist_checkpointing

    Path(directory).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory))


def _rule(rules: list[tuple[str, Any]], name: str) -> Any:
    for pattern, make in rules:
        if re.fullmatch(pattern, name):
            return make
    raise CheckpointError(f"no rule tells where Megatron's {name} comes from; this kind of model is not supported")


def _peak_host_bytes() -> int:
    """Of this process since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


__all__ = ["Checkpoint", "CheckpointError", "Report", "load_hf", "load_megatron", "save_megatron"]
