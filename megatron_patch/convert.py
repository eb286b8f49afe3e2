"""Hugging Face weights into a Megatron model, each rank only what it owns.

Every parameter of the model is looked up in `rules`: a pattern of Megatron's name, where it comes
from, and how it is put together and split. Tensors are read one by one from the safetensors files,
slices of them where tensor parallelism splits them, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_patch import models
from megatron_patch.checkpoint import Checkpoint, MissingTensorError, ShapeError
from megatron_patch.rules import LAYER_RULES, OUTER_RULES, Part
from pikv_ds.integrations.hf import checkpoints
from pikv_ds.integrations.hf.checkpoints import CheckpointError


@dataclass(frozen=True)
class Report:
    """What loading a model took on this rank."""

    read_bytes: int
    """Bytes read from the files."""
    checkpoint_bytes: int
    """Bytes of all tensors in the files."""
    peak_host_bytes: int
    """Most host memory that this process has had resident so far, mapped parts of the files included."""


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


__all__ = ["CheckpointError", "Report", "load_hf", "load_megatron", "save_megatron"]
