"""The server with a small random model: ``serve_tiny.py --model FOLDER_OF_A_TOKENIZER ...``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import megatron_patch
from megatron_patch import server


def load(args: argparse.Namespace) -> server.Loaded:
    import tiny_megatron

    from megatron_patch.tokenizer import HFTokenizer

    model = tiny_megatron.build()
    tokenizer = HFTokenizer.load(args.model, tiny_megatron.VOCAB)
    settings = server.pikv_config(args)
    if settings is not None:
        megatron_patch.patch_model(model, settings)
    return server.Loaded(model, tokenizer, tiny_megatron.MAX_LENGTH, server.kv_figures(model) if settings else None)


if __name__ == "__main__":
    sys.exit(server.main(load=load))
