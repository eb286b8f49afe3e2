"""DeepSpeed: engines, expert-parallel groups and the outputs of its gates.

The only file that imports deepspeed. What is private in DeepSpeed (gate tuples, AutoEP's classes,
group timeouts) is touched in one function each.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pikv_ds import checks
from pikv_ds.config import ConfigError
from pikv_ds.errors import UsageError
from pikv_ds.integrations.routers import ExpertChoice, find_choices, same_number

WORLD_TIMEOUT = datetime.timedelta(hours=2)
"""Of the world's process group, in which ranks wait for each other's calls, and EP groups for each
other's prompts: however long these take, nobody is lost. `timeout_s` is for ranks that share KV."""


def initialize(model: nn.Module, config: Mapping[str, Any], timeout_s: float, **kwargs: Any) -> Any:
    """`deepspeed.initialize` for inference with expert parallelism.

    Fills in what follows from the model and the job: ``expert_parallel.autoep_size`` (all ranks)
    and ``preset_model``, no ZeRO. ``bf16`` and ``fp16`` cast the model. The rest of `config` goes to DeepSpeed as it
    is.

    Args:
        timeout_s: of the expert-parallel groups.

    Raises:
        ConfigError: an EP size that divides neither the experts nor the ranks, a model without a preset, two dtypes.
    """
    from pikv_ds import launch_env

    settings = {k: v for k, v in config.items() if k not in ("pikv", "pikv_tuned")}
    dtype = _take_dtype(settings)
    parallel = _section(settings, "expert_parallel")
    stage = _section(settings, "zero_optimization").get("stage", 0)
    if stage != 0:
        raise ConfigError(
            f"zero_optimization.stage = {stage!r}: ZeRO spreads what training keeps over the ranks; for inference use "
            "0, or leave the section out"
        )
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    settings.setdefault("zero_optimization", {"stage": 0})
    launch_env.prepare()
    import deepspeed

    # Built just in time, for a minute or more, and of no use to us: the cache talks gloo or NCCL.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=WORLD_TIMEOUT)
    if parallel.get("enabled", False):
        settings["expert_parallel"] = _expert_parallel(model, parallel, dist.get_world_size())
    if dtype is not None:
        _cast(model, dtype)
    try:
        with _recorders_by_name():
            engine, *_ = deepspeed.initialize(model=model, config=settings, **kwargs)
    except ValueError as error:  # pydantic's among them
        raise ConfigError(f"DeepSpeed refuses its configuration: {checks.one_line(error)}") from error
    engine.eval()
    launch_env.return_freed_memory()  # the other ranks' experts
    group = expert_group(engine.module)
    if group is not None:
        _set_timeout(group, timeout_s)
    return engine


@contextlib.contextmanager
def _recorders_by_name() -> Iterator[None]:
    """Lets AutoEP find transformers' output recorders by the names of classes, as it does up to DeepSpeed 0.19.8.

    Newer transformers look them up by model, and their registry fails for a name.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is None or type(registry) is dict:
        yield
        return
    kind = type(registry)

    class ByModelOrName(kind):  # type: ignore[valid-type,misc]
        def get(self, key: Any, default: Any = None) -> Any:
            return dict.get(self, key, default) if isinstance(key, str) else kind.get(self, key)

        def __setitem__(self, key: Any, value: Any) -> None:
            (dict if isinstance(key, str) else kind).__setitem__(self, key, value)

    registry.__class__ = ByModelOrName
    try:
        yield
    finally:
        registry.__class__ = kind


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a section of DeepSpeed's configuration, empty where there is none.

    Raises:
        ConfigError: it is no object, or its "enabled" is neither true nor false.
    """
    section = settings.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{name} = {checks.shown(section)}: use a JSON object, or leave it out")
    enabled = (section or {}).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{name}.enabled = {checks.shown(enabled)}: use true or false")
    return dict(section or {})


def _take_dtype(settings: dict[str, Any]) -> torch.dtype | None:
    """The dtype that DeepSpeed's configuration asks for; its sections are taken out.

    DeepSpeed would wrap an optimizer, which inference has not: with experts on several ranks that is an error there.
    """
    sections = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}
    wanted = {name: dtype for name, dtype in sections.items() if _section(settings, name).get("enabled", False)}
    for name in sections:
        settings.pop(name, None)
    if len(set(wanted.values())) > 1:
        raise ConfigError(f"{' and '.join(wanted)} are both enabled: a model has one dtype; leave one out")
    return next(iter(wanted.values()), None)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights as transformers does where it loads them in this dtype.

    Not by `Module.to`: it would round what is in no checkpoint, too, such as the frequencies of rotary embeddings, and
    weights that a model keeps in float32.
    """
    keep = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        keep += getattr(model, "_keep_in_fp32_modules", None) or []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in keep):
            tensor.data = tensor.data.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype


def _expert_parallel(model: nn.Module, parallel: dict[str, Any], world: int) -> dict[str, Any]:
    """AutoEP's section with sizes and preset filled in and checked."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    size = parallel.get("autoep_size", "auto")
    size = world if size == "auto" else size
    parallel["autoep_size"] = size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or world % size:
        raise ConfigError(
            f"expert_parallel.autoep_size = {size!r}: must divide the {world} rank(s); "
            f'choose one of {", ".join(str(d) for d in range(1, world + 1) if world % d == 0)}, or "auto"'
        )
    experts = same_number(find_choices(model).values())
    if experts is not None and experts % size:
        divisors = ", ".join(str(d) for d in range(1, experts + 1) if experts % d == 0)
        raise ConfigError(
            f"expert_parallel.autoep_size = {size}: does not divide the model's {experts} experts; "
            f"use {divisors} ranks per group"
        )
    if parallel.get("preset_model", "auto") == "auto":
        presets = _autoep_presets()
        if model_type not in presets:
            raise ConfigError(
                f"expert_parallel.preset_model: DeepSpeed's AutoEP has no preset for model type {model_type!r}, only "
                f"for {', '.join(sorted(presets))}; name a preset that fits, or shard the model yourself and use "
                "pikv_ds.attach"
            )
        parallel["preset_model"] = presets[model_type]
    return parallel


def _autoep_presets() -> dict[str, str]:
    """AutoEP's presets by the ``model_type`` of the Hugging Face configurations that they are for."""
    from deepspeed.module_inject.auto_ep_presets import registry

    return {kind: name for name, preset in registry.PRESET_MODELS.items() for kind in preset.hf_model_types}


def choices(model: nn.Module) -> dict[nn.Module, ExpertChoice]:
    """Gates of native MoE layers and routers of AutoEP layers, where the choice of experts shows."""
    found: dict[nn.Module, ExpertChoice] = {}
    for layer in _moe_layers(model):
        if type(layer).__name__ == "MOELayer":
            experts = layer.num_local_experts * layer.ep_size
            found[layer.gate] = ExpertChoice(layer.gate, experts, functools.partial(_read_gate, k=layer.gate.k))
        else:  # (scores, experts [T, k], counts [E])
            found[layer.router] = ExpertChoice(layer.router, layer.num_experts, lambda output: output[1])
    return found


def _moe_layers(model: nn.Module) -> list[Any]:
    """Native MoE layers and AutoEP's, by name: their modules move between DeepSpeed's versions."""
    return [m for m in model.modules() if type(m).__name__ in ("MOELayer", "AutoEPMoELayer")]


def _read_gate(output: Any, k: int) -> Tensor:
    """Chosen experts ``[tokens, k]``, -1 for dropped, from the tuple of a `TopKGate`.

    Seven entries since mid-2026: (l_aux, C, E, indices [k, S], locations, gates [k, S], counts);
    four before: (l_aux, combine weights [S, E, C], mask, counts).
    """
    if len(output) == 7:
        indices = output[3]
        return (torch.stack(list(indices)) if isinstance(indices, (list, tuple)) else indices).T
    if len(output) == 4:
        weights, experts = output[1].sum(-1).topk(k, dim=1)
        return experts.masked_fill(weights == 0, -1)
    raise UsageError(f"unknown gate output with {len(output)} entries; this DeepSpeed is not supported")


def expert_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The expert-parallel group of a model's MoE layers, None without any."""
    return next((m.ep_group for m in _moe_layers(model) if getattr(m, "ep_group", None) is not None), None)


def _set_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """DeepSpeed's groups wait 30 minutes by default; a dead rank should show sooner."""
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if set_timeout is not None:
        set_timeout(datetime.timedelta(seconds=timeout_s), group)
