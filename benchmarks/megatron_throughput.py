"""Megatron-Core with and without PiKV: tokens per second and KV bytes of a batch of long prompts.

  torchrun --nproc-per-node 2 benchmarks/megatron_throughput.py
  torchrun --nproc-per-node 2 benchmarks/megatron_throughput.py --requests 4 --tokens 500 --codec int8

Every rank runs the same batch in a static context, as Megatron's static server has it. The model is
there twice, once patched; the decoding steps of the two take turns, so that a slow moment of the
machine hits both, and their medians are compared. Prompts are prefilled one after the other (--repeat
times). The last line has the dynamic engine with PiKV, each rank with its share of the requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from examples import generation, megatron_generate, prompts
from pikv_ds import launch_env
from pikv_ds.integrations.hf import checkpoints


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="prefills of each (default: %(default)s)")
    parser.add_argument("--codec", default="none", help="of the pages (default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face checkpoint (default: the reference model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-dynamic", action="store_true", help="leave the dynamic engine out")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


class StaticBatch:
    """One batch in a static context, stepped by hand: Megatron's own loop without its tokenizer and sampler."""

    def __init__(self, model: Any, ids: torch.Tensor, room: int) -> None:
        from megatron_patch import engine

        self.model, self.ids, self.at = model, ids, 0
        self.context = engine.static_context(len(ids), ids.shape[1] + room)

    def step(self) -> float:
        """One forward pass and the greedy choice; seconds."""
        new = self.ids[:, self.at :]
        size = new.shape[1]
        positions = torch.arange(self.at, self.at + size, device=new.device).expand(len(new), -1)
        mask = torch.ones(size, size, dtype=torch.bool, device=new.device).triu(1)[None, None] if size > 1 else None
        dist.barrier()
        started = time.perf_counter()
        logits = self.model(new, positions, mask, inference_context=self.context, runtime_gather_output=True)
        chosen = logits[:, -1].argmax(-1, keepdim=True)
        if chosen.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.context.increment_sequence_len_offset(size)
        self.context.enable_decode_mode()
        self.at += size
        self.ids = torch.cat([self.ids, chosen], dim=1)
        return seconds

    @property
    def kv_bytes(self) -> int:
        """Bytes of the context's own buffers."""
        return sum(k.nbytes + v.nbytes for k, v in self.context.key_value_memory_dict.values())


def main() -> None:
    args = parse_arguments()
    launch_env.prepare()
    world = launch_env.world()
    console = Console(quiet=world.rank != 0)
    if not console.is_terminal:
        console.width = 110
    import megatron_patch
    from megatron_patch import convert, engine, models

    generation.quiet_transformers()
    engine.initialize()
    folder = generation.checkpoint(args.model, 8, progress=world.rank == 0)
    hf = models.load_config(folder)

    def load() -> Any:
        config = models.transformer_config(hf, dtype=getattr(torch, args.dtype), ep=world.size)
        model = models.build_model(hf, config)
        convert.load_hf(model, folder)
        return model

    plain, patched = load(), load()
    megatron_patch.patch_model(patched, {"codec": args.codec})
    cache = megatron_patch.attachment_of(patched).cache
    ids = texts(folder, args.requests, args.tokens).to(launch_env.device())
    prefill: dict[str, list[float]] = {"plain": [], "patched": []}
    decode: dict[str, list[float]] = {"plain": [], "patched": []}
    with torch.inference_mode():
        for _ in range(args.repeat):
            batches = {"plain": StaticBatch(plain, ids, args.new_tokens)}
            prefill["plain"].append(batches["plain"].step())
            batches["patched"] = StaticBatch(patched, ids, args.new_tokens)
            prefill["patched"].append(batches["patched"].step())
            for _ in range(args.new_tokens - 1):
                for name, batch in batches.items():
                    decode[name].append(batch.step())
    same = torch.equal(batches["plain"].ids, batches["patched"].ids)
    held = {"plain": batches["plain"].kv_bytes, "patched": cache.kv_bytes}
    new, prompt = args.requests, args.requests * ids.shape[1]
    out = {"same_tokens": same, "requests": args.requests, "tokens": ids.shape[1], "ranks": world.size}
    seconds = {}
    for name in prefill:
        first, step = statistics.median(prefill[name]), statistics.median(decode[name])
        seconds[name] = first + step * (args.new_tokens - 1)
        out[name] = {
            "prefill_tokens_per_s": prompt / first,
            "decode_tokens_per_s": new / step,
            "batch_s": seconds[name],
            "kv_bytes_per_rank": held[name],
        }
    batches.clear()
    del batch  # the last one, whose context would keep its pages
    megatron_patch.flush(patched)
    if not args.no_dynamic:
        out["dynamic"] = dynamic(patched, folder, ids[world.rank :: world.size], args.new_tokens, cache)
    show(console, args, world, out, seconds)
    if args.json and world.rank == 0:
        Path(args.json).write_text(json.dumps(out, indent=2) + "\n")
    dist.destroy_process_group()


def texts(folder: str, count: int, tokens: int) -> torch.Tensor:
    """Different stretches of real text, ``[count, tokens]``."""
    tokenizer = checkpoints.load_tokenizer(folder)
    everything = tokenizer(" ".join(prompts.texts().values()), verbose=False).input_ids
    if len(everything) < tokens + count:
        raise SystemExit(f"--tokens {tokens}: the texts have {len(everything)}")
    starts = torch.linspace(0, len(everything) - tokens, count).long().tolist()
    return torch.tensor([everything[s : s + tokens] for s in starts])


def dynamic(model: Any, folder: str, mine: torch.Tensor, new_tokens: int, cache: Any) -> dict[str, float]:
    """Megatron's dynamic engine with PiKV, each rank with its own requests."""
    import megatron_patch
    from megatron_patch import engine
    from megatron_patch.tokenizer import HFTokenizer

    served = engine.dynamic_engine(
        model,
        HFTokenizer.load(folder, model.vocab_size),
        max_requests=max(2, len(mine)),
        max_tokens=2048,
        context_length=mine.shape[1] + new_tokens,
    )
    megatron_patch.patch_context(model, served.context)
    cache.forget_peaks()
    watch = type("Nobody", (), {"step": lambda self, answers: None})()
    dist.barrier()
    started = time.perf_counter()
    megatron_generate.generate(served, mine.tolist(), [engine.greedy(new_tokens)] * len(mine), watch)
    dist.barrier()
    return {"batch_s": time.perf_counter() - started, "kv_bytes_per_rank": cache.fullest.kv_bytes}


def show(
    console: Console, args: argparse.Namespace, world: Any, out: dict[str, Any], seconds: dict[str, float]
) -> None:
    """The figures as a table, ratios beside them."""
    table = Table(
        title=f"{args.requests} requests of {out['tokens']:,} + {args.new_tokens} tokens, {world.size} rank(s), "
        f"{args.dtype}, codec {args.codec}",
        title_justify="left",
    )
    for name in ("", "prefill tokens/s", "decode tokens/s", "whole batch, s", "throughput", "KV per rank"):
        table.add_column(name, justify="right" if name else "left")
    titles = {"plain": "Megatron, static", "patched": "with PiKV, static", "dynamic": "with PiKV, dynamic"}
    for name in (n for n in titles if n in out):
        row = out[name]
        table.add_row(
            titles[name],
            *(f"{row[k]:,.1f}" if k in row else "" for k in ("prefill_tokens_per_s", "decode_tokens_per_s")),
            f"{row['batch_s']:,.1f}",
            f"{seconds['plain'] / row['batch_s']:.2f}x",
            f"{row['kv_bytes_per_rank'] / 2**20:,.1f} MiB",
        )
    console.print(table)
    console.print(f"static: the same tokens {'with' if out['same_tokens'] else 'NOT with'} PiKV", highlight=False)


if __name__ == "__main__":
    main()
