"""The command `pikv plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from pikv_ds import launch_env
from pikv_ds.checks import named
from pikv_ds.errors import UsageError
from pikv_ds.tools import tables
from pikv_ds.tools.command_line import (
    GIB,
    RANKS,
    check_folders,
    name_or_json,
    picture,
    real,
    settings_of,
    tokens,
    whole,
)

if TYPE_CHECKING:
    from pikv_ds.config import PiKVConfig
    from pikv_ds.core.shape import ModelShape
    from pikv_ds.tools.plan.planner import Load, Plan

EXAMPLES = """examples:
  pikv plan --model mixtral-8x7b --context 128k --batch 16 --ranks 8
  pikv plan --model qwen3-30b-a3b --context 32k --batch 64 --ranks 8 --codec int8 int4 --gib 20
  pikv plan --model /models/Qwen3-30B-A3B --codec '{"name": "int3", "rotate": true, "clip": true, "scales": 8}'
  pikv plan --model mixtral-8x7b --pikv 'half={"retention": "snap", "budget": {"name": "uniform", "prompt": 0.5}}'
  pikv plan --model deepseek-v3 --context 64k --batch 32 --ranks 16 --plot plan.png --json plan.json
  pikv plan --model mixtral-8x7b --measure 2 4         fits step times to passes of 2 and 4 ranks on this machine
  srun pikv plan --model mixtral-8x7b --measure        the same with the ranks of a job
  pikv plan --model qwen3-30b-a3b --context 128k --ranks 512 --simulate benchmarks/results/routing-128 --plot sim.png

--batch counts the sequences of all ranks. "most" is a rank at its bound, whatever the routing; the rest is the mean.
DP attention: each rank keeps its own sequences; TP: each rank keeps its KV heads of all, or copies where there are
more ranks than heads; p mod c: decode context parallelism. All three are counted without slack, uncompressed. What
fits is judged by "most"; "one sequence" is the longest alone. "step" is the attention of a decode pass, all layers,
without the model's own work; it is there once --measure has run for this shape and number of ranks.
--simulate draws ranks by the dozen from assumed figures of a cluster (--assume) and a trace's routing."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to `pikv`."""
    from pikv_ds.tools.plan.planner import PRESETS

    parser = commands.add_parser(
        "plan",
        help="what a model's KV cache takes per rank, what fits, and how long steps take",
        description="Memory, wire and step time of the sharded cache beside DP attention, TP and p mod c, before "
        "anything runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="NAME",
                        help=f"{', '.join(PRESETS)}; or a Hugging Face folder or config.json")  # fmt: skip
    parser.add_argument("--context", type=tokens, default=32768, metavar="N", help="tokens per sequence; default: 32k")
    parser.add_argument("--batch", type=whole(), default=8, metavar="N", help="sequences of all ranks; default: 8")
    parser.add_argument(
        "--ranks", type=whole(most=RANKS), default=8, metavar="G", help="default: 8; of --simulate, the most"
    )
    parser.add_argument("--codec", nargs="+", metavar="NAME or JSON", help="default: none int8 int4")
    parser.add_argument("--pikv", action="append", default=[], metavar="[NAME=]JSON",
                        help="settings of a cache, instead of --codec; may be repeated")  # fmt: skip
    parser.add_argument("--page-size", type=whole(), default=32, metavar="S", help="default: 32")
    parser.add_argument("--lookup", default="exact", metavar="NAME or JSON", help="default: exact")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    size = real(0, GIB, f"use a size above 0 and at most {GIB}", above=True)
    parser.add_argument("--gib", type=size, metavar="M", help="memory for KV per rank: what fits into it")
    parser.add_argument("--measure", nargs="*", type=whole(most=RANKS), metavar="G",
                        help="fit step times to real passes of so many local ranks (default: 2), or, under a "
                        "launcher, of the job's; takes a minute or two for each")  # fmt: skip
    parser.add_argument("--rounds", type=whole(), default=3, metavar="N", help="of --measure; default: 3")
    parser.add_argument("--costs", type=Path, metavar="FILE",
                        help="where --measure keeps what it has found; default: costs.json in PIKV_CACHE")  # fmt: skip
    parser.add_argument("--simulate", type=Path, metavar="TRACE",
                        help="8, 16, … RANKS ranks, routed as in a trace's folder (see pikv trace)")  # fmt: skip
    parser.add_argument("--per-rank", type=whole(), default=4, metavar="N",
                        help="of --simulate: sequences of each rank; default: 4")  # fmt: skip
    parser.add_argument("--spread", type=real(0, 3, "use a number between 0 and 3"), default=0.5, metavar="X",
                        help="of --simulate: how unlike the sequences' lengths are (log-normal; 0: alike); "
                        "default: 0.5")  # fmt: skip
    parser.add_argument("--assume", metavar="JSON",
                        help="of --simulate: other figures of the cluster, or a file with them")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draws them as a PNG")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from pikv_ds.tools.plan import planner

    if args.measure is not None and args.simulate is not None:
        raise UsageError("--measure and --simulate: one after the other")
    if args.assume is not None and args.simulate is None:
        raise UsageError(f"--assume {named(args.assume)}: is of --simulate TRACE; name a trace, or leave it out")
    check_folders(args.json, args.plot)
    shape = planner.shape_of(args.model, getattr(torch, args.dtype))
    configs = _configs(args)
    args.costs = args.costs or launch_env.cache_dir() / "costs.json"
    if args.measure is not None:
        return _measure(args, shape, configs)
    if args.simulate is not None:
        return _simulate(args, shape, configs)
    return _plan(args, shape, configs)


def _configs(args: argparse.Namespace) -> dict[str, PiKVConfig]:
    """Ways to keep the KV by name."""
    from pikv_ds.config import PiKVConfig

    settings = {"page_size": args.page_size, "lookup": name_or_json("lookup", args.lookup)}
    out: dict[str, PiKVConfig] = {}
    for codec in args.codec or ([] if args.pikv else ["none", "int8", "int4"]):
        out[f"PiKV {codec}"] = PiKVConfig.from_dict({**settings, "codec": name_or_json("codec", codec)})
    for text in args.pikv:
        name, changes = settings_of("pikv", text)
        out[f"PiKV {name or text}"] = PiKVConfig.from_dict({**settings, **changes})
    if len({config.page_size for config in out.values()}) > 1:
        raise UsageError("--pikv: one page_size for all, or they cannot be compared")
    return out


def _plan(args: argparse.Namespace, shape: ModelShape, configs: Mapping[str, PiKVConfig]) -> int:
    from pikv_ds.tools.plan import costs, planner, show

    load = planner.Load(args.context, args.batch, args.ranks)
    first = next(iter(configs.values()))
    key = costs.key_of(shape, first.page_size, args.ranks, _device())
    known = costs.load(args.costs).get(key)
    ways = _ways(shape, configs, load)
    rows: list[dict[str, Any]] = []
    for way in ways:
        fitting = {} if args.gib is None else _fitting(shape, configs, way.name, load, args.gib * 2**30)
        rows.append({**planner.facts(way), "step_s": planner.seconds(way, known), **fitting})
    title = (
        f"{args.model}: {args.batch} sequences of {args.context:,} tokens on {args.ranks} ranks, {args.dtype}, "
        f"pages of {first.page_size}"
    )
    tables.show(show.plan_table(title, rows, known is not None))
    rule = planner.page_size_rule(load)
    print(f"page size by sqrt(L / (16 G)): {rule}; page table on the host: {show.size(ways[-1].host)} per rank")
    if known is not None:
        print(f"step: attention of a decode pass, by the costs of {args.costs} ({key})")
    else:
        print(f"no step times: pikv plan --model {args.model} --measure {args.ranks} fits them on this machine")
    if args.json:
        facts = {"model": args.model, "shape": {**vars(shape), "dtype": args.dtype}, "load": vars(load), "plans": rows}
        args.json.write_text(json.dumps({**facts, "page_size_rule": rule}, indent=1) + "\n")
    if args.plot:
        curves = _curves(shape, configs, load)
        show.plot_memory(args.plot, f"{args.model}, {args.batch} sequences, {args.ranks} ranks", curves, set(configs))
    return 0


def _ways(shape: ModelShape, configs: Mapping[str, PiKVConfig], load: Load) -> list[Plan]:
    from pikv_ds.tools.plan import planner

    first = next(iter(configs.values()))
    return [*planner.baselines(shape, first, load), *(planner.plan(shape, c, load, n) for n, c in configs.items())]


def _fitting(
    shape: ModelShape, configs: Mapping[str, PiKVConfig], name: str, load: Load, room: float
) -> dict[str, int]:
    """What a rank at its bound has room for: the longest context at this batch, the largest batch at this context, the
    longest context of a sequence alone."""
    from pikv_ds.tools.plan import planner

    def most(**change: int) -> float:
        changed = dataclasses.replace(load, **change)
        if name in configs:
            return planner.plan(shape, configs[name], changed).most
        return next(w for w in _ways(shape, configs, changed) if w.name == name).most

    return {
        "longest_context": planner.largest(lambda n: most(context=n) <= room),
        "largest_batch": planner.largest(lambda n: most(batch=n) <= room),
        "longest_alone": planner.largest(lambda n: most(context=n, batch=1) <= room),
    }


def _curves(shape: ModelShape, configs: Mapping[str, PiKVConfig], load: Load) -> dict[str, list[tuple[int, float]]]:
    """GiB of the mean rank against the context, for each way."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for context in (load.context * 2**i // 16 for i in range(6)):
        for way in _ways(shape, configs, dataclasses.replace(load, context=max(1, context))):
            curves.setdefault(way.name, []).append((context, way.total / 2**30))
    return curves


def _measure(args: argparse.Namespace, shape: ModelShape, configs: Mapping[str, PiKVConfig]) -> int:
    from pikv_ds.tools.plan import costs, measure, show

    codecs: list[Any] = ["none"]
    for config in configs.values():
        codecs += [codec.settings() for codec in config.codec.codecs if codec.settings() not in codecs]
    first = next(iter(configs.values()))
    longer = measure.GPU_CONTEXT if _device() == "cuda" else 1
    cases = [[c._replace(context=c.context * longer) for c in of] for of in (measure.FITTED, measure.HELD_OUT)]
    spec = measure.Spec(shape, codecs, first.page_size, first.partial_dtype, args.rounds, *cases)
    known = costs.load(args.costs)  # before the work, not after it
    launched = launch_env.launched()
    sizes = args.measure or [2]
    if launched:
        launch_env.normalise()
        world = launch_env.world()
        if args.measure not in ([], [world.size]):
            raise UsageError(f"--measure {' '.join(map(str, args.measure))}: the launcher started {world.size} ranks")
        sizes = [world.size]
    for ranks in sizes:
        if shape.num_experts % ranks:
            raise UsageError(f"--measure {ranks}: {shape.num_experts} experts cannot be spread over so many ranks")
    results: dict[str, Any] = {}
    for ranks in sizes:
        found = measure.rank(spec) if launched else measure.local_ranks(spec, ranks)
        if launched and world.rank:
            return 0
        key = costs.key_of(shape, first.page_size, ranks, _device())
        known[key], results[key] = costs.Costs(**found["costs"]), found
        costs.save(args.costs, known)
        tables.show(show.costs_table(key, known[key]))
        tables.show(show.points_table(key, found["points"]))
    print(f"kept in {args.costs}")
    if args.json:
        args.json.write_text(json.dumps({"machine": _machine(), "results": results}, indent=1) + "\n")
    if args.plot:
        show.plot_points(args.plot, f"{args.model}: {_machine()}", {k: r["points"] for k, r in results.items()})
    return 0


def _simulate(args: argparse.Namespace, shape: ModelShape, configs: Mapping[str, PiKVConfig]) -> int:
    from rich.progress import track

    from pikv_ds.core import trace
    from pikv_ds.tools.plan import show, simulate

    if any(config.lookup.summary is not None for config in configs.values()):
        raise UsageError("--simulate: knows exact lookups only; leave --lookup out")
    cluster = simulate.Cluster.of(simulate.read_assumptions(args.assume or "{}"))
    if args.ranks < cluster.ranks_per_node:
        raise UsageError(f"--ranks {args.ranks}: begin with a node, {cluster.ranks_per_node} ranks")
    console = Console(stderr=True)

    def progress(todo: list[Any]) -> Iterable[Any]:
        return track(todo, "simulating", console=console, transient=True, disable=not sys.stderr.isatty())

    traces = trace.read(args.simulate)
    simulation = simulate.Simulation(
        shape, configs, traces, cluster, args.context, args.per_rank, args.spread, progress=progress
    )
    points = simulation.run(args.ranks)
    title = (
        f"simulated: {args.model}, {args.per_rank} sequences per rank, {args.context:,} tokens on average "
        f"(spread {args.spread:g}), routing of {args.simulate}"
    )
    tables.show(show.simulation_table(title, points))
    print(f"assumed, not measured: {json.dumps(dataclasses.asdict(cluster))}")
    if args.json:
        facts = {"simulated": True, "title": title, "assumed": dataclasses.asdict(cluster)}
        args.json.write_text(json.dumps({**facts, "points": [vars(p) for p in points]}, indent=1) + "\n")
    if args.plot:
        show.plot_simulation(args.plot, title, points)
    return 0


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine() -> str:
    from pikv_ds.tools.bench.show import machine

    return machine(torch.device(_device()))
