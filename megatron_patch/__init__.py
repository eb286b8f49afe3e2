"""Megatron-Core: an expert-sharded KV cache under its attention.

    model = megatron_patch.patch_model(model, PiKVConfig(...))    # a built model
    spec = megatron_patch.patch_layer_spec(spec, PiKVConfig(...)) # or before it is built
    parser = megatron_patch.add_arguments(parser)                 # or from a script's --pikv-config FILE

This folder alone imports megatron. What differs between its versions is in `compat`, what it lacks
without CUDA in `cpu`.
"""

from megatron_patch.arguments import add_arguments, config_from_args
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
    "config_from_args",
    "flush",
    "patch_context",
    "patch_layer_spec",
    "patch_model",
    "stats",
    "unpatch_model",
]
