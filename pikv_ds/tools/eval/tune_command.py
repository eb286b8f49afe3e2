"""The commands `pikv tune` and `pikv heads`."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pikv_ds.tools import tables
from pikv_ds.tools.command_line import THREADS, check_folders, name_or_json, picture, real, whole
from pikv_ds.tools.eval.command import example_texts, load, machine, progress_bar

TUNE = """examples:
  pikv tune --config launch/ds_inference.json --objective "latency + 0.2*memory - 5*fidelity" --out tuned.json
  pikv tune --codecs int4 '{"name": "int3", "rotate": true}' --lookups exact --plot tuned.png --out tuned.json

latency, memory and fidelity are relative to the exact, uncompressed cache. Everything is measured on this machine."""
HEADS = """examples:
  pikv heads --share 0.5 --out heads.json --plot heads.png
  then, in a configuration:  "retention": "streaming", "budget": {"name": "duo", "heads": "heads.json"}"""

CODECS = ["none", "int8", "int4", '{"name": "int4", "values": "int2", "rotate": true, "clip": true, "scales": 8}',
          '{"name": "int3", "values": "int2", "rotate": true, "clip": true, "scales": 8}']  # fmt: skip
LOOKUPS = ["exact", '{"name": "two_stage", "budget": 0.25}', '{"name": "two_stage", "budget": 0.125}']


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to `pikv`."""
    tuning = commands.add_parser("tune", help="measures settings and writes the best one's configuration",
                                 epilog=TUNE, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    tuning.add_argument("--config", type=Path, metavar="FILE", help="a configuration to start from (DeepSpeed JSON)")
    tuning.add_argument("--objective", default="latency + 0.2*memory - 5*fidelity", metavar="EXPR")
    tuning.add_argument("--codecs", nargs="+", default=CODECS, metavar="NAME or JSON")
    tuning.add_argument("--lookups", nargs="+", default=LOOKUPS, metavar="NAME or JSON")
    tuning.add_argument("--page-sizes", nargs="+", type=whole(), default=[32], metavar="S")
    tuning.add_argument("--out", type=Path, required=True, metavar="FILE", help="the configuration to write")
    tuning.set_defaults(run=tune)
    heads = commands.add_parser("heads", help="finds the retrieval heads of a model, for the budget \"duo\"",
                                epilog=HEADS, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    share = real(0, 1, "use a share of the heads, above 0 and at most 1", above=True)
    heads.add_argument("--share", type=share, default=0.5, help="of all KV heads that keep everything; default: 0.5")
    heads.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    heads.set_defaults(run=find_heads)
    for parser, cases, lengths in ((tuning, 2, [1500]), (heads, 12, [1000, 2000])):
        parser.add_argument("--model", default="reference-dense", metavar="DIR", help="or reference, reference-dense")
        parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
        parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="default: the examples'")
        parser.add_argument("--cases", type=whole(), default=cases, metavar="N", help=f"default: {cases}")
        parser.add_argument(
            "--lengths", nargs="+", type=whole(), default=lengths, metavar="N", help=f"default: {lengths}"
        )
        parser.add_argument("--seed", type=whole(0), default=0)
        parser.add_argument("--threads", type=whole(most=THREADS), default=torch.get_num_threads(), metavar="N")
        parser.add_argument("--plot", type=picture, metavar="FILE", help="draws the result as a PNG")


def _cases(args: argparse.Namespace, tokenizer: Any, names: list[str]) -> list[Any]:
    from pikv_ds.tools.eval import tasks
    from pikv_ds.tools.eval.text import read

    depths = max(1, args.cases // len(args.lengths))
    return tasks.make_cases(tokenizer, read(args.text or example_texts()), names, args.lengths, depths, args.seed)


def tune(args: argparse.Namespace) -> int:
    """Measures the grid and writes the best configuration."""
    from pikv_ds.config import PiKVConfig, load_json, section
    from pikv_ds.tools.eval import methods, run
    from pikv_ds.tools.eval import tune as controller

    check_folders(args.out, args.plot)
    objective = controller.Objective(args.objective)
    base = load_json(args.config) if args.config else {}
    start = section(base, args.config)
    configs: dict[str, dict[str, Any]] = {}
    for codec, lookup, size in itertools.product(args.codecs, args.lookups, args.page_sizes):
        values = {"codec": name_or_json("codecs", codec), "lookup": name_or_json("lookups", lookup), "page_size": size}
        config = {**start, **values}
        PiKVConfig.from_dict(config)
        configs[", ".join([_short(values["codec"]), _short(values["lookup"]), f"p{size}"])] = config
    baseline = "exact, none"
    plain = {k: v for k, v in start.items() if k not in ("codec", "lookup", "retention", "budget")}
    every = [methods.PiKV(baseline, plain), *(methods.PiKV(name, config) for name, config in configs.items())]
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    model, tokenizer = load(args.model, args.dtype, console)
    cases = _cases(args, tokenizer, ["needle", "text"])
    done: dict[tuple[str, str], run.Outcome] = {}
    with progress_bar(console, "tune", len(cases) * len(every)) as step:
        run.run(model, tokenizer, cases, every, done, lambda: None, step)
    found = controller.points(list(done.values()), configs, baseline)
    best = min(found, key=lambda p: (objective.of(p), p.name))
    table = Table(title=f"Pareto front of {len(found)} settings; the choice has the least {objective.text}",
                  title_justify="left")  # fmt: skip
    for name in ("setting", *controller.FIGURES, "needles", "objective"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for p in controller.front(found):
        figures = (
            f"{p.latency:.2f}",
            f"{p.memory:.3f}",
            f"{p.fidelity:.3f}",
            f"{p.needles:.0%}",
            f"{objective.of(p):.3f}",
        )
        table.add_row(("* " if p is best else "") + p.name, *figures)
    tables.show(table)
    facts = {"model": args.model, "dtype": args.dtype, "cases": len(cases), "lengths": args.lengths, "seed": args.seed,
             "machine": machine()}  # fmt: skip
    controller.write(args.out, base, best, objective, facts)
    if args.plot:
        controller.plot(args.plot, found, best, f"{args.model}, {args.dtype}: {objective.text}")
    print(f"{args.out}: {best.name}", file=sys.stderr)
    return 0


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    rest = [k if v is True else f"{k} {v}" for k, v in value.items() if k != "name"]
    return " ".join([value["name"], *rest])


def find_heads(args: argparse.Namespace) -> int:
    """Probes a model and writes the classes of its heads."""
    from pikv_ds.tools.eval import heads

    check_folders(args.out, args.plot)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    model, tokenizer = load(args.model, args.dtype, console)
    cases = _cases(args, tokenizer, ["needle"])
    with progress_bar(console, "heads", len(cases)) as step:
        scores = heads.probe(model, tokenizer, cases, lambda: step("probing"))
    heads.save(args.out, scores, args.share, args.model)
    if args.plot:
        heads.plot(args.plot, scores, args.share, f"{args.model}: attention to the needle")
    chosen = heads.classes(scores, args.share)
    table = Table(title=f"{args.out}: {int(chosen.sum())} retrieval heads of {chosen.numel()}", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("attention to the needle, per KV head (* retrieval)")
    for layer, row in enumerate(scores.tolist()):
        shown = [f"{x:.3f}{'*' if chosen[layer, head] else ' '}" for head, x in enumerate(row)]
        table.add_row(str(layer), "  ".join(shown))
    tables.show(table)
    return 0
