"""Hugging Face weights into a Megatron model, each rank only what it owns.

Every parameter of the model is looked up in `RULES`: a pattern of Megatron's name, where it comes
from, and how it is put together and split. Tensors are read one by one from the safetensors files,
slices of them where tensor parallelism splits them, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch import models
from pikv_ds.integrations.hf import checkpoints
from pikv_ds.integrations.hf.checkpoints import CheckpointError


class MissingTensorError(CheckpointError):
    """Tensors that a parameter is made of are not there."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        super().__init__(f"{directory}: no tensor {', '.join(names)} there; is it a checkpoint of this model?")
        self.names = names


class ShapeError(CheckpointError):
    """A tensor or a parameter is of another shape than config.json says."""


@dataclass(frozen=True)
class Report:
    """What loading a model took on this rank."""

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
        CheckpointError: no such files, one that cannot be read, or a tensor that two of them have.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.read_bytes = 0
        self.nbytes = 0
        """Bytes of all tensors."""
        self.requested: set[str] = set()
        """Names that somebody has asked for, there or not."""
        self.shapes: dict[str, list[int]] = {}
        """Of all tensors."""
        self._paths: dict[str, Path] = {}  # the file of each tensor
        self._file: tuple[Path, Any] | None = None  # the open one
        self._mapped_bytes = 0
        for path, file in checkpoints.open_files(self._files()):
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                self.nbytes += math.prod(part.get_shape()) * STORED.get(part.get_dtype(), 1)
                self._paths[name] = path
                self.shapes[name] = list(part.get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def need(self, *names: str) -> None:
        """Notes that these are asked for.

        Raises:
            MissingTensorError: some are not there.
        """
        self.requested.update(names)
        if missing := [name for name in names if name not in self]:
            raise MissingTensorError(self.directory, missing)

    def read(self, name: str, *index: slice | int) -> Tensor:
        """A tensor, or a part of it; what is not asked for is not read.

        Raises:
            CheckpointError: it is not there, or it is quantised.
        """
        self.need(name)
        path = self._paths[name]
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

    def _files(self) -> list[Path]:
        files = checkpoints.safetensors_files(self.directory)
        if not files:
            raise CheckpointError(
                f"{self.directory}: neither {checkpoints.WHOLE} nor {checkpoints.INDEX} there; "
                "PiKV loads safetensors only"
            )
        return files

    def _open(self, path: Path) -> Any:
        if self._file is None or self._file[0] != path or self._mapped_bytes >= MAPPED_BYTES:
            self._file = (path, checkpoints.open_safetensors(path))
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


def load_hf(model: Any, directory: str | Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Report:
    """Sets the weights of a Megatron model from a Hugging Face checkpoint, in place.

    Args:
        model: from `models.build_model`, of any size of the tensor- and expert-parallel groups.
        directory: with safetensors files.
        progress: wraps the loop over the parameters (`tqdm`, say).

    Raises:
        CheckpointError: a missing or damaged file; tensors that are missing (those of other ranks' experts, too, so
            that all ranks say the same), of another shape, or not the model's, by name; a quantised one; a model that
            is cut into pipeline stages.
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
    missing: set[str] = set()
    mismatched: list[str] = []
    for name, target in progress(targets.items()):
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        try:
            if layer is None:
                part = Part(checkpoint, config, tp_rank, tp, "", target.shape[0])
                tensor = _rule(OUTER_RULES, name)(part, model.vocab_size)
            else:
                number = re.search(r"(?:local_experts\.|weight)(\d+)", layer[2])
                expert = None if number is None else first_expert + int(number[1])
                part = Part(checkpoint, config, tp_rank, tp, f"model.layers.{layer[1]}.", target.shape[0], expert)
                tensor = _rule(LAYER_RULES, layer[2])(part)
        except MissingTensorError as error:
            missing.update(error.names)
            continue
        except ShapeError as error:
            mismatched.append(str(error))
            continue
        if tensor.shape != target.shape:
            shapes = f"shape {list(target.shape)} in the model, {list(tensor.shape)} in the checkpoint"
            mismatched.append(f"{name} has {shapes}")
            continue
        with torch.no_grad():
            target.copy_(tensor)
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    if tied and "lm_head.weight" in checkpoint:
        _check_tied(Part(checkpoint, config, tp_rank, tp, "", 0), model.vocab_size)
    wanted = checkpoint.requested | _of_all_experts(checkpoint.requested, config.num_moe_experts or 0)
    missing |= {name for name in wanted if name not in checkpoint}
    mismatched += _odd_experts(checkpoint, wanted)
    unexpected = checkpoint.shapes.keys() - wanted
    if unexpected:
        dispensable = "|".join(_dispensable(directory))
        unexpected = {name for name in unexpected if not re.search(dispensable, name)}
    checkpoints.refuse_unfitting(directory, missing, unexpected, mismatched)
    return Report(checkpoint.read_bytes, checkpoint.nbytes, _peak_host_bytes())


EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")
"""A tensor of one expert."""


def _of_all_experts(names: Iterable[str], num_experts: int) -> set[str]:
    """The names that the tensors of a rank's experts have for all experts of the model."""
    kinds = {(match[1], match[3]) for name in names if (match := EXPERT.fullmatch(name))}
    return {f"{before}{expert}{after}" for before, after in kinds for expert in range(num_experts)}


def _odd_experts(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Experts whose tensors are of another shape than their neighbours', on whichever rank they are."""
    shapes: dict[tuple[str, str], list[int]] = {}
    out = []
    for name in sorted(names):
        match = EXPERT.fullmatch(name)
        if match is not None and name in checkpoint:
            shape = checkpoint.shapes[name]
            usual = shapes.setdefault((match[1], match[3]), shape)
            if shape != usual:
                out.append(f"{name} has shape {shape}, other experts {usual}")
    return out


def _check_tied(part: Part, vocab_size: int) -> None:
    """Where config.json ties the output layer to the embeddings, one in the checkpoint must be the same."""
    embeddings, output = (part.rows(name, vocab_size) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not torch.equal(embeddings, output):
        raise CheckpointError(
            f"{part.checkpoint.directory}: tie_word_embeddings is true in config.json, but lm_head.weight differs "
            "from model.embed_tokens.weight; set it to false"
        )


def _dispensable(directory: str | Path) -> list[str]:
    """Patterns of tensors that transformers leaves out, too: what it computes itself, and layers it does not run."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(models.load_config(directory))]
    return [r"rotary_emb\.inv_freq", *(kind._keys_to_ignore_on_load_unexpected or [])]


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
