"""pytest plugin for Megatron's own unit tests (see `run_upstream.py`): on a CPU, and with PiKV.

Megatron's tests ask torch for CUDA devices throughout, which `megatron_patch.cpu` leaves alone on
purpose; here, and only here, torch itself is made to take them for the CPU. With PIKV_UPSTREAM=1
every GPTModel that a test builds gets PiKV as soon as it is built.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest
import tests.test_utils.python_scripts.download_unit_tests_dataset as download
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

import megatron_patch
from megatron_patch import cpu
from megatron_patch.checks import UnsupportedMegatronError

download.download_and_extract_asset = lambda *args, **kwargs: None  # fetches nothing


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come on the CPU, and not pinned."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*(_here(a) for a in args), **kwargs)


def _here(arg: Any) -> Any:
    if isinstance(arg, torch.device) and arg.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg


def without_cuda() -> None:
    """What the tests themselves need of a machine without a GPU."""
    cpu.install()
    stand_in = cpu._cuda()
    for name in ("current_device", "Stream", "current_stream", "stream", "Event", "synchronize", "memory_stats"):
        setattr(torch.cuda, name, getattr(stand_in, name))
    nothing: Any = lambda *args, **kwargs: None  # noqa: E731
    for name in ("set_device", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, nothing)
    torch.cuda.device_count = lambda: int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *args: 0  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (8, 0)  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    OnCpu().__enter__()
    init, barrier = dist.init_process_group, dist.barrier

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init(**{**kwargs, "backend": "gloo"})

    dist.init_process_group = torch.distributed.init_process_group = init_process_group
    dist.barrier = lambda *args, **kwargs: barrier(*args, **{k: v for k, v in kwargs.items() if k != "device_ids"})


def without_transformer_engine() -> None:
    """Specs for Transformer Engine become Megatron's own; asking for its version, or for fp8, is no error."""
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.utils as utils
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random
    from packaging.version import Version

    fp8: Any = types.ModuleType("transformer_engine.pytorch.fp8")  # Megatron has looked for the real one by now
    fp8.check_fp8_support = lambda: (False, "no Transformer Engine")
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[fp8.__name__] = fp8
    utils.get_te_version = lambda: Version("0.0")
    utils.get_fa_version = lambda: Version("2.8.0")

    def local_spec(num_experts: Any = None, qk_layernorm: bool = False, **kwargs: Any) -> Any:
        latent = kwargs.get("multi_latent_attention", False)
        return specs.get_gpt_layer_local_spec(
            num_experts=num_experts, qk_layernorm=qk_layernorm, multi_latent_attention=latent
        )

    specs.get_gpt_layer_with_transformer_engine_spec = local_spec
    seed = random.model_parallel_cuda_manual_seed

    def seed_on_cpu(number: int | None = None, *args: Any, **kwargs: Any) -> None:
        seed(kwargs.get("seed", number), inference_rng_tracker=True, force_reset_rng=True)

    random.model_parallel_cuda_manual_seed = tensor_parallel.model_parallel_cuda_manual_seed = seed_on_cpu


def with_pikv() -> None:
    """Every GPTModel is patched when it is built; a test of what PiKV refuses counts as expected to fail."""
    from megatron.core.models.gpt import gpt_model

    init = gpt_model.GPTModel.__init__

    def init_and_patch(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        try:
            megatron_patch.patch_model(self, {"page_size": 8, "timeout_s": 30})
        except UnsupportedMegatronError as error:
            pytest.xfail(f"refused: {error}")

    gpt_model.GPTModel.__init__ = init_and_patch


without_cuda()
without_transformer_engine()
if os.environ.get("PIKV_UPSTREAM") == "1":
    with_pikv()
