"""Which Megatron-Core this is, and everything that differs between its versions.

The package imports it first, before any module of `megatron`: an importable package of the name
`apex` that is not NVIDIA's changes which norms Megatron chooses, while Megatron is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_ds.errors import UsageError

OLDEST, NEWEST = "0.13", "0.16.1"
"""Versions that this package was tried with, both included."""

ENGINE_SINCE = "0.16"
"""The dynamic engine's constructors, its coordinator and its HTTP server have this form since."""

_APEX_USERS = (
    "megatron.core.models.backends",
    "megatron.core.transformer.transformer_block",
    "megatron.core.models.gpt.gpt_layer_specs",
)
"""Modules that look for apex by a bare ``import apex``, at import, on the way to a GPTModel."""


class MegatronVersionError(UsageError):
    """The installed Megatron-Core is not one that this package supports."""


# ---- versions ----


def version() -> str:
    """The installed version of Megatron-Core, such as ``"0.16.1"``.

    Raises:
        MegatronVersionError: it is not installed.
    """
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        pass
    if importlib.util.find_spec("megatron") is None:
        raise MegatronVersionError("megatron-core is not installed: pip install 'megatron-core==0.16.1'")
    from megatron.core.package_info import __version__  # a checkout on PYTHONPATH

    return str(__version__)


def require(oldest: str = OLDEST, what: str = "PiKV") -> None:
    """Refuses a Megatron-Core that is older than `oldest` or newer than `NEWEST`.

    Raises:
        MegatronVersionError: it names the installed version, the range and `what` asked.
    """
    installed = version()
    if not _release(oldest) <= _release(installed) <= _release(NEWEST):
        raise MegatronVersionError(
            f"megatron-core {installed} is installed, but {what} needs {oldest} to {NEWEST}: "
            f"pip install 'megatron-core=={NEWEST}'"
        )


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version: ``"0.16.1rc2"`` is (0, 16, 1)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


# ---- apex ----


def foreign_apex() -> Path | None:
    """Folder of an importable package `apex` that is not NVIDIA's; None without one.

    The package index has an unrelated one. It is recognised without running any of it: NVIDIA's
    has ``apex/normalization/fused_layer_norm.py``.
    """
    if sys.modules.get("apex", ...) is None:  # hidden already
        return None
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "normalization" / "fused_layer_norm.py").is_file() for folder in folders):
        return None
    return folders[0] if folders else Path(spec.origin or "apex")


def hide_foreign_apex() -> None:
    """From here on ``import apex`` fails if it would bring a package that is not NVIDIA's.

    Raises:
        RuntimeError: Megatron was imported before, and it took the unrelated package for NVIDIA's.
    """
    folder = foreign_apex()
    if folder is None:
        return
    fooled = [name for name in _APEX_USERS if getattr(sys.modules.get(name), "HAVE_APEX", False)]
    if fooled:
        raise RuntimeError(
            f"{fooled[0]} took the package apex in {folder} for NVIDIA's apex, which breaks RMSNorm models; "
            "import megatron_patch before megatron, or uninstall that package: pip uninstall apex"
        )
    warnings.warn(
        f"the package apex in {folder} is not NVIDIA's apex (no apex.normalization.fused_layer_norm); "
        "Megatron does without it",
        stacklevel=2,
    )
    sys.modules["apex"] = None  # type: ignore[assignment]  # how Python says: not importable


# ---- repairs ----


def repair() -> None:
    """Mends what is broken in a supported version on any device; harmless to call again.

    0.16.1 names `te_general_gemm` in its router also where Transformer Engine did not bring it.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used, as Megatron itself finds out."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


def latent_dot_product_attention() -> type:
    """Megatron's own attention product for latent attention, where Transformer Engine's is not there.

    Megatron passes the widths of keys and values to it, which it does not take, and derives its heads
    from settings that are not latent attention's. 0.15 and 0.16 also believe that Transformer Engine
    is installed when they look for it there.
    """
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not has_transformer_engine():
        multi_latent_attention.HAVE_TE = False

    class LatentDotProductAttention(DotProductAttention):
        def __init__(
            self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.num_query_groups_per_partition = self.num_attention_heads_per_partition
            if v_channels is not None:  # without them it is built once in vain, as any other attention's
                self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return LatentDotProductAttention


# ---- what differs ----


def device() -> torch.device:
    """Where Megatron puts its models."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def expert_group() -> dist.ProcessGroup | None:
    """The expert-parallel group of this rank, None where Megatron has not made its groups."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_expert_model_parallel_group()


def tensor_parallel_size(attention: Any) -> int:
    """Over how many ranks an attention's heads are spread."""
    return attention.config.num_attention_heads // attention.num_attention_heads_per_partition


def softmax_scale(attention: Any) -> float:
    """The factor on q . k of a self-attention."""
    for module in (attention, attention.core_attention):
        scale = getattr(module, "softmax_scale", None)
        if scale is not None:
            return float(scale)
    return float(attention.hidden_size_per_attention_head**-0.5)


def rotary_cos_sin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`rotary_pos_cos_sin` among what `_adjust_key_value_for_inference` is given after rotary_pos_emb; since 0.15."""
    if "rotary_pos_cos_sin" in kwargs:
        return kwargs["rotary_pos_cos_sin"]
    from megatron.core.transformer.attention import Attention

    names = list(inspect.signature(Attention._adjust_key_value_for_inference).parameters)
    if "rotary_pos_cos_sin" not in names:
        return None
    place = names.index("rotary_pos_cos_sin") - names.index("rotary_pos_emb") - 1
    return args[place] if place < len(args) else None


def rotate_key(context: Any, attention: Any, key: Tensor, embedding: Tensor) -> Tensor:
    """Rotates the new keys of a dynamic context, each to its position; the groups have another name until 0.14."""
    groups = getattr(attention, "pg_collection", None) or attention.model_comm_pgs
    return context.apply_rotary_emb_key(key, embedding, attention.config, groups.cp)


def cpu_seed_arguments(seed: Any) -> dict[str, bool]:
    """Arguments of `model_parallel_cuda_manual_seed` that keep it from random states of a GPU."""
    names = ("inference_rng_tracker", "force_reset_rng")
    return {name: True for name in names if name in inspect.signature(seed).parameters}


hide_foreign_apex()
