"""Megatron-Core: an expert-sharded KV cache under its attention, and its inference server with it.

    model = megatron_patch.patch_model(model, PiKVConfig(...))    # a built model
    spec = megatron_patch.patch_layer_spec(spec, PiKVConfig(...)) # or before it is built
    parser = megatron_patch.add_arguments(parser)                 # or from a script's --pikv-config FILE

This folder alone imports megatron. What differs between its versions is in `compat`, what it lacks
without CUDA in `cpu`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_patch import compat  # before megatron: it hides a package that is not NVIDIA's apex
from megatron_patch.arguments import add_arguments, config_from_args

if TYPE_CHECKING:
    from megatron_patch.patch import (
        attachment_of,
        flush,
        patch_context,
        patch_layer_spec,
        patch_model,
        stats,
        unpatch_model,
    )

__all__ = [
    "add_arguments",
    "attachment_of",
    "compat",
    "config_from_args",
    "flush",
    "patch_context",
    "patch_layer_spec",
    "patch_model",
    "stats",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    """What needs Megatron is imported when it is asked for, after its version has been checked."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    compat.require()
    from megatron_patch import patch

    return getattr(patch, name)
