"""The command `pikv`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from pikv_ds.errors import UsageError
from pikv_ds.ops import BACKENDS
from pikv_ds.tools import tables, trace_command
from pikv_ds.tools.command_line import (
    GIB,
    THREADS,
    Parser,
    check_folders,
    device,
    guarded,
    picture,
    real,
    tokens,
    whole,
)
from pikv_ds.tools.eval import calibrate_command, command, tune_command
from pikv_ds.tools.plan import command as plan_command
from pikv_ds.version import __version__

if TYPE_CHECKING:
    from pikv_ds.tools.bench.attention import Setting
    from pikv_ds.tools.bench.timing import Timing

EXAMPLES = """examples:
  pikv report                                      what is installed, which ops run here, and why
  pikv plan --model mixtral-8x7b --context 128k --ranks 8 --gib 20    what the cache takes, and what fits
  pikv trace plot traces                           occupancy, reuse and homes of a run's pages, as a picture
  pikv bench                                       decode attention at 4k and 32k tokens, one thread
  pikv bench --context 1k 4k 16k --threads 1 2     more of it
  pikv bench --op lookup --context 32k --codecs int4   choosing an eighth of the pages, against all
  pikv bench --op seal --json seal.json            sealing, against a plain copy
  pikv bench --op host --json host.json            what pages and passes cost the host, apart from kernels
  pikv bench --plot decode.png                     time and GB/s against context, as a picture
  pikv eval --cases 6 --lengths 1000               needles found with codecs and lookups
  pikv codecs                                      what each codec loses of keys, values and attention
  pikv calibrate --rank 32 --out bases.safetensors bases for low-rank pages
  pikv tune --out tuned.json                       the settings with the least latency + 0.2*memory - 5*fidelity
  pikv heads --out heads.json                      retrieval heads, for the budget "duo\""""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser: argparse.ArgumentParser = Parser(
        prog="pikv",
        description="Looks at and measures PiKV-DS on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pikv-ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_bench(commands)
    command.add(commands)
    calibrate_command.add(commands)
    tune_command.add(commands)
    plan_command.add(commands)
    trace_command.add(commands)
    report = commands.add_parser(
        "report",
        help="what is installed, which ops run here, and why",
        description="Like ds_report: versions, devices, CPU features, backends and the owner of each op.",
        epilog="examples:\n  pikv report\n  pikv report --json > report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("--json", action="store_true", help="as JSON")
    report.set_defaults(run=_report)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version, or a line about the arguments
        return stop.code if isinstance(stop.code, int) else 2
    return guarded(f"pikv {args.command}", lambda: args.run(args))


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measures the ops side by side with torch and others",
        description="All contenders run interleaved, round by round, over working sets that no cache holds; "
        "what counts is the ratio of medians.",
        epilog="examples:\n" + "\n".join(line for line in EXAMPLES.splitlines() if "pikv bench" in line),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--op", choices=("decode", "lookup", "seal", "host"), default="decode", help="default: decode")
    bench.add_argument(
        "--context", nargs="+", type=tokens, default=[4096, 32768], metavar="N", help="tokens; default: 4k 32k"
    )
    bench.add_argument(
        "--codecs",
        nargs="+",
        default=["none", "int8", "int4"],
        metavar="CODEC",
        help="int4, int3/int2 (keys/values), int3+clip+scales8, ...; default: none int8 int4",
    )
    share = real(0, 1, "use a share of the pages, above 0 and at most 1", above=True)
    bench.add_argument("--budget", type=share, default=0.125, help="of --op lookup, a share; default: 0.125")
    bench.add_argument(
        "--threads", nargs="+", type=whole(most=THREADS), default=[1], metavar="N", help="CPU threads; default: 1"
    )
    bench.add_argument("--rounds", type=whole(), default=15, metavar="N", help="timings per contender; default: 15")
    bench.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto"], help="of the ops; default: auto")
    bench.add_argument("--heads", type=whole(), default=32, metavar="H", help="query heads; default: 32")
    bench.add_argument("--kv-heads", type=whole(), default=8, metavar="K", help="default: 8")
    bench.add_argument("--head-dim", type=whole(), default=128, metavar="D", help="default: 128")
    bench.add_argument("--page-size", type=whole(), default=32, metavar="S", help="tokens per page; default: 32")
    bench.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    usual = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench.add_argument("--device", type=device, default=usual, help="default: cuda or cpu")
    size = real(0, GIB, f"use a size above 0 and at most {GIB}", above=True)
    bench.add_argument("--gib", type=size, default=1.0, help="working set of each contender; default: 1")
    bench.add_argument("--json", type=Path, metavar="FILE", help="writes the figures")
    bench.add_argument("--plot", type=picture, metavar="FILE", help="draws them as a PNG")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from pikv_ds.tools.bench import attention, ggml, show

    if args.op == "host":
        return _bench_host(args)
    if args.heads % args.kv_heads:
        raise UsageError(f"--heads = {args.heads}: must be a multiple of --kv-heads = {args.kv_heads}")
    for codec in args.codecs:
        attention.codec_of(codec)
    if args.plot and args.op == "seal":
        raise UsageError("--plot: draws figures against context, which --op seal has not; use --json")
    for context in args.context:
        if args.op != "seal" and context % args.page_size:
            raise UsageError(f"--context = {context}: use a multiple of --page-size = {args.page_size}")
    check_folders(args.json, args.plot)
    dtype = getattr(torch, args.dtype)
    shape = args.heads, args.kv_heads, args.head_dim, args.page_size
    setting = attention.Setting(*shape, dtype, args.device, int(args.gib * 2**30))
    console = Console(stderr=True)
    timings, baseline = _measure(args, setting, console)
    rate = args.op == "seal"
    title = f"{args.op}: {args.heads} query and {args.kv_heads} KV heads, d = {args.head_dim}, {args.dtype}, "
    title += f"pages of {args.page_size} tokens; {show.machine(setting.device)}"
    tables.show(show.table(title, timings, baseline, rate))
    if args.op == "decode":
        notes = [*attention.missing_baselines(), *([f"llama.cpp: {reason}"] if (reason := ggml.missing()) else [])]
        for note in notes:
            console.print(f"not compared with {note}", highlight=False)
    if args.json:
        figures = {"title": title, "results": show.rows(timings, baseline, rate)}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        show.plot(args.plot, title, timings)
    return 0


def _bench_host(args: argparse.Namespace) -> int:
    from pikv_ds.tools.bench import host, show

    if args.plot:
        raise UsageError("--plot: draws figures against context, which --op host has not; use --json")
    check_folders(args.json)
    figures = host.measure(args.rounds, _progress(Console(stderr=True), "host"))
    title = f"host, one thread, CPU time; {show.machine(torch.device('cpu'))}"
    tables.show(host.table(title, figures))
    if args.json:
        results = [dataclasses.asdict(figure) for figure in figures]
        args.json.write_text(json.dumps({"title": title, "results": results}, indent=1) + "\n")
    return 0


def _measure(args: argparse.Namespace, setting: Setting, console: Console) -> tuple[list[Timing], str]:
    """All timings, and the name of the contender that the others are compared with."""
    from pikv_ds.tools.bench import attention, ggml, lookup, memory, timing

    threads = args.threads if setting.device.type == "cpu" else [1]
    timings: list[Timing] = []
    baseline = {"decode": "torch grouped matmul", "seal": "copy"}.get(args.op, "")
    for context in args.context if args.op != "seal" else [0]:
        with console.status(f"preparing {context or args.op} …"):
            contenders = []
            if args.op == "decode":
                baselines = (
                    attention.torch_baselines,
                    attention.flashinfer,
                    attention.quantized_cache,
                    ggml.baselines,
                )
                contenders = [contender for make in baselines for contender in make(setting, context)]
                contenders.append(memory.copying(setting, context))
            elif args.op == "seal":
                contenders = [memory.copying(setting)]
            for backend in args.backends:
                for codec in args.codecs:
                    if args.op == "decode":
                        contenders.append(attention.paged(setting, context, codec, backend))
                    elif args.op == "seal":
                        contenders.append(memory.sealing(setting, codec, backend))
                    else:
                        contenders += lookup.lookups(setting, context, codec, backend, args.budget)
            baseline = baseline or contenders[0].name
        progress = _progress(console, str(context or args.op))
        timings += timing.measure(contenders, threads, args.rounds, setting.device, progress)
    return timings, baseline


def _progress(console: Console, what: str) -> Callable[[Iterable[int]], Iterable[int]]:
    from rich.progress import track

    return lambda rounds: track(list(rounds), description=what, console=console, transient=True)


def _report(args: argparse.Namespace) -> int:
    from pikv_ds.tools import report

    facts = report.ops_report()
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        report.show(facts, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
