"""Which Megatron-Core this is, and everything that differs between its versions.

The package imports it first, before any module of `megatron`: an importable package of the name
`apex` that is not NVIDIA's changes which norms Megatron chooses, while Megatron is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

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


class MegatronVersionError(RuntimeError):
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


# ---- what differs ----


def ep_group(layer: Any) -> Any:
    """The expert-parallel process group of an attention or MoE layer, None before there is one.

    MoE layers carry ``ep_group``; attentions have ``pg_collection`` since 0.15, before that
    ``model_comm_pgs``, neither with an ``ep`` in every version.
    """
    group = getattr(layer, "ep_group", None)
    for name in ("pg_collection", "model_comm_pgs"):
        group = group or getattr(getattr(layer, name, None), "ep", None)
    if group is not None:
        return group
    from megatron.core import parallel_state

    return parallel_state.get_expert_model_parallel_group(check_initialized=False)


def is_static_batching(context: Any) -> bool:
    """Whether an inference context is the static engine's (one batch, one length for all)."""
    return bool(context.is_static_batching())


def active_request_ids(context: Any) -> list[int]:
    """Request ids of the sequences in a dynamic context's next forward pass, in batch order."""
    ids = context.request_ids[context.paused_request_count : context.total_request_count]
    return [int(i) for i in ids.tolist()]


def block_size(context: Any) -> int:
    """Tokens per block of a dynamic context (a *chunk* until 0.14)."""
    size = getattr(context, "block_size_tokens", None)
    return int(context.chunk_size_tokens if size is None else size)


def legacy_static(engine: Any) -> dict[str, bool]:
    """Arguments that make Megatron's static engine static: since 0.14 it wraps a dynamic one instead,
    with CUDA graphs and a buffer of 40 GB."""
    return {"legacy": True} if "legacy" in inspect.signature(engine).parameters else {}


def cpu_seed_arguments(seed: Any) -> dict[str, bool]:
    """Arguments of `model_parallel_cuda_manual_seed` that keep it from random states of a GPU."""
    names = ("inference_rng_tracker", "force_reset_rng")
    return {name: True for name in names if name in inspect.signature(seed).parameters}


hide_foreign_apex()
