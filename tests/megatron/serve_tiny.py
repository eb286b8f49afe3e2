"""The server with a small random model: ``serve_tiny.py --model FOLDER_OF_A_TOKENIZER --no-pikv ...``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from megatron_patch import server


def load(args: argparse.Namespace) -> server.Loaded:
    import tiny_megatron

    from megatron_patch.tokenizer import HFTokenizer

    model = tiny_megatron.build()
    tokenizer = HFTokenizer.load(args.model, tiny_megatron.VOCAB)
    return server.Loaded(model, tokenizer, tiny_megatron.MAX_LENGTH, lambda: {"stored_bytes": 7.0})


if __name__ == "__main__":
    sys.exit(server.main(load=load))
