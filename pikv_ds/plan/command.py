"""The command `pikv plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

EXAMPLES = """examples:
  pikv plan --model mixtral-8x7b --context 128k --batch 16 --ranks 8
  pikv plan --model qwen3-30b-a3b --context 32k --batch 64 --ranks 8 --codec int8 int4 --gib 20
  pikv plan --model /models/Qwen3-30B-A3B --codec '{"name": "int3", "rotate": true, "clip": true, "scales": 8}'
  pikv plan --model deepseek-v3 --context 64k --batch 32 --ranks 16 --plot plan.png --json plan.json

--batch counts the sequences of all ranks. "most" is a rank at its bound, whatever the routing; the rest is the mean.
DP attention: each rank keeps its own sequences; TP: each rank keeps its KV heads of all, or copies where there are
more ranks than heads; p mod c: decode context parallelism. All three are counted without slack, uncompressed. What
fits is judged by "most"; "one sequence" is the longest alone. Step times are not planned yet: they want a measured
cost model."""


def tokens(text: str) -> int:
    """``4096``, ``4k``."""
    number = text.lower().removesuffix("k")
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 4096 or 4k")
    return int(number) * (1024 if text.lower().endswith("k") else 1)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to `pikv`."""
    from pikv_ds.plan.planner import PRESETS

    parser = commands.add_parser(
        "plan",
        help="what a model's KV cache takes per rank, and what fits",
        description="Memory and wire of the sharded cache beside DP attention, TP and p mod c, before anything runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="NAME",
                        help=f"{', '.join(PRESETS)}; or a Hugging Face folder or config.json")  # fmt: skip
    parser.add_argument("--context", type=tokens, default=32768, metavar="N", help="tokens per sequence; default: 32k")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of all ranks; default: 8")
    parser.add_argument("--ranks", type=int, default=8, metavar="G", help="default: 8")
    parser.add_argument("--codec", nargs="+", default=["none", "int8", "int4"], metavar="NAME or JSON")
    parser.add_argument("--page-size", type=int, default=32, metavar="S", help="default: 32")
    parser.add_argument("--lookup", default="exact", metavar="NAME or JSON", help="default: exact")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gib", type=float, metavar="M", help="memory for KV per rank: what fits into it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws memory against context as a PNG")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from pikv_ds.config import PiKVConfig, name_or_json
    from pikv_ds.plan import planner

    for name in ("batch", "ranks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: use a whole number of at least 1")
    if args.gib is not None and args.gib <= 0:
        raise ValueError(f"--gib {args.gib}: use a size above 0")
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    shape = planner.shape_of(args.model, getattr(torch, args.dtype))
    load = planner.Load(args.context, args.batch, args.ranks)
    settings = {"page_size": args.page_size, "lookup": name_or_json("lookup", args.lookup)}
    configs = {
        f"PiKV {codec}": PiKVConfig.from_dict({**settings, "codec": name_or_json("codec", codec)})
        for codec in args.codec
    }
    first = next(iter(configs.values()))
    ways = [*planner.baselines(shape, first, load), *(planner.plan(shape, c, load, n) for n, c in configs.items())]
    title = (
        f"{args.model}: {args.batch} sequences of {args.context:,} tokens on {args.ranks} ranks, {args.dtype}, "
        f"pages of {args.page_size}"
    )
    table = Table(title=title, title_justify="left")
    for head in ("KV cache", "GiB per rank", "most", "of DP", "wire per step"):
        table.add_column(head, justify="left" if head == "KV cache" else "right")
    rows: list[dict[str, Any]] = [planner.facts(way) for way in ways]
    if args.gib is not None:
        for head in ("longest context", "largest batch", "one sequence"):
            table.add_column(head, justify="right")
    for way, row in zip(ways, rows, strict=True):
        cells = [way.name, gib(way.total), gib(way.most), f"{way.share:.3f}", _bytes(way.wire)]
        if args.gib is not None:
            row |= _fitting(shape, first, configs, way.name, load, args.gib * 2**30)
            cells += [f"{row[key]:,}" for key in ("longest_context", "largest_batch", "longest_alone")]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    rule = planner.page_size_rule(load)
    print(f"page size by sqrt(L / (16 G)): {rule}; page table on the host: {_bytes(ways[-1].host)} per rank")
    if args.json:
        facts = {"model": args.model, "shape": {**vars(shape), "dtype": args.dtype}, "load": vars(load), "plans": rows}
        args.json.write_text(json.dumps({**facts, "page_size_rule": rule}, indent=1) + "\n")
    if args.plot:
        plot(args.plot, shape, first, configs, load, f"{args.model}, {args.batch} sequences, {args.ranks} ranks")
    return 0


def _fitting(shape: Any, first: Any, configs: dict[str, Any], name: str, load: Any, room: float) -> dict[str, int]:
    """What a rank at its bound has room for: the longest context at this batch, the largest batch at this context, the
    longest context of a sequence alone."""
    from pikv_ds.plan import planner

    def most(**change: int) -> float:
        changed = dataclasses.replace(load, **change)
        if name in configs:
            return planner.plan(shape, configs[name], changed).most
        return next(w for w in planner.baselines(shape, first, changed) if w.name == name).most

    return {
        "longest_context": planner.largest(lambda n: most(context=n) <= room),
        "largest_batch": planner.largest(lambda n: most(batch=n) <= room),
        "longest_alone": planner.largest(lambda n: most(context=n, batch=1) <= room),
    }


def plot(path: Path, shape: Any, first: Any, configs: dict[str, Any], load: Any, title: str) -> None:
    """Memory of the mean rank against the context, for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pikv_ds.plan import planner

    contexts: Sequence[int] = [load.context * 2**i // 16 for i in range(6)]
    curves: dict[str, list[float]] = {}
    for context in contexts:
        changed = dataclasses.replace(load, context=context)
        ways = planner.baselines(shape, first, changed)
        for way in [*ways, *(planner.plan(shape, c, changed, n) for n, c in configs.items())]:
            curves.setdefault(way.name, []).append(way.total / 2**30)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    dashes = iter(("--", ":", "-."))  # on top: some of them lie on each other, and on PiKV's without a codec
    for name, values in sorted(curves.items(), key=lambda curve: curve[0] not in configs):
        style = {"marker": "o", "lw": 3, "alpha": 0.6} if name in configs else {"color": "black", "ls": next(dashes)}
        axes.plot(contexts, values, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel="GiB of KV per rank", title=title)
    axes.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def _bytes(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B" if num_bytes else "0"
