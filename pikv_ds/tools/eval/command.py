"""The command `pikv eval`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pikv_ds.errors import UsageError
from pikv_ds.tools import tables
from pikv_ds.tools.command_line import THREADS, check_folders, picture, settings_of, whole

EXAMPLES = """examples:
  pikv eval --cases 6 --lengths 1000                       a first look, a few minutes
  pikv eval --suite standard --json eval.json --plot eval.png --resume    everything; go on after an interruption
  pikv eval --show --json eval.json --plot eval.png        what the file has, without running anything
  pikv eval --pikv 'four bits={"codec": "int4"}' --presses KeyDiff:0.75 SnapKV:0.75
  pikv eval --model /models/Qwen3-30B-A3B --tasks needle text --markdown eval.md

Contexts are compressed before the question is known. One process, one rank: what is lost does not depend on the
number of ranks but for sparse lookups, which choose per rank. `--model reference` is a real MoE model made of
SmolLM2-135M; `--model reference-dense` is the same before its feed-forward networks were copied into experts:
the same attention, faster."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to `pikv`."""
    parser = commands.add_parser(
        "eval",
        help="measures what compression, eviction and sparse lookup cost on a real model",
        description="Needles, variable tracking, common words and plain text, with PiKV and its peers side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="reference", metavar="DIR", help="default: reference (see below)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=["needle"], metavar="TASK",
                        help="of needle, multikey, tracking, common, text; default: needle")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=whole(), default=[1000, 2000, 3500, 6000], metavar="N",
                        help="tokens before the question; default: 1000 2000 3500 6000")  # fmt: skip
    parser.add_argument(
        "--cases", type=whole(), default=60, metavar="N", help="per task, over all lengths; default: 60"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--suite", choices=("standard", "pikv", "peers", "none"),
                        help="methods; default: pikv, or none where methods are named")  # fmt: skip
    parser.add_argument("--pikv", action="append", default=[], metavar="[NAME=]JSON",
                        help="a configuration, and its name in the tables (repeatable)")  # fmt: skip
    parser.add_argument("--presses", nargs="+", default=[], metavar="NAME:RATIO", help="of kvpress, e.g. SnapKV:0.5")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="prose to hide needles in")
    parser.add_argument(
        "--threads", type=whole(most=THREADS), default=torch.get_num_threads(), metavar="N", help="CPU threads"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all outcomes, after every case")
    parser.add_argument("--resume", action="store_true", help="goes on with what --json FILE has")
    parser.add_argument("--show", action="store_true", help="shows what --json FILE has, and runs nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="writes the tables")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draws quality against bytes")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from pikv_ds.tools.eval import run, tasks
    from pikv_ds.tools.eval.methods import PiKV
    from pikv_ds.tools.eval.text import read

    check(args)
    if args.show:
        done, settings = run.read(args.json)
        show(args, list(done.values()), settings)
        return 0
    methods = methods_of(args)
    settings = {
        "model": args.model, "dtype": args.dtype, "tasks": args.tasks, "lengths": args.lengths, "cases": args.cases,
        "seed": args.seed, "text": [str(p) for p in args.text],
    }  # fmt: skip
    texts = read(args.text or example_texts())
    settings["sha256"] = {
        "model": identity(args.model),
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    settings["methods"] = {m.name: m.config for m in methods if isinstance(m, PiKV)}
    done, settings = run.load(args.json, settings) if args.resume else ({}, settings)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    model, tokenizer = load(args.model, args.dtype, console)
    depths = max(1, args.cases // len(args.lengths))
    cases = tasks.make_cases(tokenizer, texts, args.tasks, args.lengths, depths, args.seed)
    extra = {"machine": machine(), "torch": torch.__version__}

    def save() -> None:
        if args.json:
            run.dump(args.json, settings, done, extra)

    with progress_bar(console, "eval", len(cases) * len(methods)) as step:
        run.run(model, tokenizer, cases, methods, done, save, step)
    names, keys = {m.name for m in methods}, {c.key for c in cases}
    order = {m.name: i for i, m in enumerate(methods)}
    outcomes = sorted(
        (o for o in done.values() if o.method in names and o.case in keys), key=lambda o: order[o.method]
    )
    show(args, outcomes, settings)
    return 0


def show(args: argparse.Namespace, outcomes: Sequence[Any], settings: dict[str, Any]) -> None:
    """Tables on the terminal and in a file, and the picture."""
    from pikv_ds.tools.eval import report

    names = [task for task in settings["tasks"] if any(o.task == task for o in outcomes)]
    for task in names:
        tables.show(report.table(outcomes, task))
    lengths = [o.context_tokens for o in outcomes] or [0]
    count = len({o.case for o in outcomes})
    title = f"{settings['model']}, {settings['dtype']}, {count} cases of {min(lengths)} to {max(lengths)} tokens"
    if args.markdown:
        args.markdown.write_text(report.markdown(outcomes, names, title))
    if args.plot:
        report.plot(args.plot, outcomes, names, title)


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with the time left; what it gives is called with a name after every step."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda name: progress.update(bar, advance=1, description=name[:24].ljust(24))


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is loaded."""
    from pikv_ds.tools.eval.tasks import TASKS

    for task in args.tasks:
        if task not in TASKS:
            raise UsageError(f"--tasks {task}: choose of {', '.join(TASKS)}")
    for option in ("resume", "show"):
        if getattr(args, option) and not args.json:
            raise UsageError(f"--{option}: name the file with --json")
    check_folders(args.json, args.markdown, args.plot)


def methods_of(args: argparse.Namespace) -> Sequence[Any]:
    """The methods that the options name."""
    from pikv_ds.config import PiKVConfig
    from pikv_ds.tools.eval import methods

    suite = args.suite or ("none" if args.pikv or args.presses else "pikv")
    out: list[Any] = [methods.Full()]
    every = methods.standard()
    if suite != "none":
        out += [m for m in every if suite == "standard" or (m.family == "pikv") == (suite == "pikv")]
    for text in args.pikv:
        name, config = settings_of("pikv", text)
        PiKVConfig.from_dict(config)
        out.append(methods.PiKV(name or text, config))
    return [*out, *(methods.parse_press(text) for text in args.presses)]


def load(name: str, dtype: str, console: Console) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers.utils import logging as hf_logging

    from pikv_ds.integrations.hf import checkpoints
    from pikv_ds.tools import reference_model

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    kind = getattr(torch, dtype)
    with console.status(f"loading {name} …"):
        if name == "reference-dense":
            model, tokenizer = reference_model.load_dense(kind)
            return model.eval(), tokenizer
        folder = folder_of(name)
        checkpoints.check_files(folder, "--model")
        tokenizer = checkpoints.load_tokenizer(folder, "--model")
        return checkpoints.load_model(folder, kind, "--model"), tokenizer


def identity(name: str) -> str:
    """What tells a model from others of the same name: what is in its folder, or in the file that it is made of."""
    from pikv_ds.integrations.hf import checkpoints
    from pikv_ds.tools import reference_model

    if name == "reference-dense":
        return checkpoints.sampled([reference_model.gguf_path()])
    folder = folder_of(name)
    checkpoints.check_files(folder, "--model")
    return checkpoints.identity(folder)


def folder_of(name: str) -> str:
    """The folder of the checkpoint that `--model` names; the reference model is built where it is not yet."""
    from pikv_ds.tools import reference_model

    return str(reference_model.build(progress=True)) if name == "reference" else name


def example_texts() -> list[Path]:
    """The prose that comes with the sources."""
    from pikv_ds.tools import reference_model

    return list(reference_model.example_texts())


def machine() -> str:
    from pikv_ds.tools.bench.show import machine

    return machine(torch.device("cpu"))
