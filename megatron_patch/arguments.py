"""`--pikv-config FILE`, for scripts that parse Megatron's arguments."""

from __future__ import annotations

import argparse

from pikv_ds.config import PiKVConfig, load_config


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds PiKV's options to a parser (Megatron's: ``initialize_megatron(extra_args_provider=add_arguments)``)."""
    group = parser.add_argument_group("PiKV", "expert-sharded KV cache")
    group.add_argument(
        "--pikv-config",
        metavar="FILE",
        help='JSON file with PiKV\'s settings, by themselves or under "pikv" (a DeepSpeed configuration will do); '
        "without it Megatron keeps its own KV cache",
    )
    return parser


def config_from_args(args: argparse.Namespace) -> PiKVConfig | None:
    """The settings that `--pikv-config` names; None without it.

    Raises:
        ConfigError: naming the file, or the key, the value and the remedy.
    """
    if getattr(args, "pikv_config", None) is None:
        return None
    return load_config(args.pikv_config)
