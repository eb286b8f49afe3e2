"""Generates with a Mixture-of-Experts model whose KV cache is sharded by expert over the ranks.

Each prompt belongs to one rank; its KV pages live on all of them. Without --prompt-file and --model
the reference model (built once, cached on disk) answers questions about two public-domain books.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples import prompts
from pikv_ds import launch_env, metrics
from pikv_ds.config import ConfigError, load_json
from pikv_ds.errors import PiKVError

DEMOS = (
    (prompts.DEMO_DOCUMENT, prompts.DEMO_QUESTION, prompts.DEMO_ANSWER_PREFIX),
    ("alice", "What was written on the little bottle?", "On the little bottle was written"),
)
"""Documents of examples/data, what is asked about them, and how the answer begins."""

EXAMPLES = """examples:
  deepspeed --num_accelerators 2 examples/deepspeed_generate.py --config launch/ds_inference.json --verify
  python examples/deepspeed_generate.py --ranks 4 --set codec=int8 --json figures.json
  deepspeed --num_accelerators 2 examples/deepspeed_generate.py --model /models/Qwen3-30B-A3B \\
      --dtype bfloat16 --prompt-file report.txt --question "What was decided?" --max-new-tokens 200
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(ROOT / "launch" / "ds_inference.json"),
        metavar="FILE",
        help='DeepSpeed JSON with a "pikv" section (default: launch/ds_inference.json)',
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a pikv setting, e.g. --set codec=int8 --set page_size=64 (repeatable)",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face checkpoint of a MoE model (default: the reference model)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="text file with a prompt; repeat for several, they go round the ranks",
    )
    parser.add_argument("--question", help="asked after the document (needs --prompt-file)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=5000,
        metavar="N",
        help="length of the demo's longer document (default: 5000)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="start N ranks with the deepspeed launcher (when run with plain python)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="always generate --max-new-tokens tokens")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compare every token with the unsharded Hugging Face model",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the figures as JSON, to FILE or (without one) to standard output",
    )
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.question and not args.prompt_file:
        parser.error("--question needs the document it is about: --prompt-file FILE")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: use at least 1")
    return args


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    if args.ranks is not None and not launch_env.launched():
        launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
        os.execv(launcher, [launcher, "--num_accelerators", str(args.ranks), __file__, *argv])
    launch_env.prepare()
    world = launch_env.world()
    if args.ranks not in (None, world.size):
        print(
            f"error: --ranks {args.ranks}, but the launcher started {world.size}; drop one",
            file=sys.stderr,
        )
        return 2
    try:
        run(args, world)
    except (ConfigError, PiKVError, ValueError, OSError) as error:
        print(f"rank {world.rank}: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run(args: argparse.Namespace, world: launch_env.World) -> None:
    console = Console(stderr=args.json == "-", quiet=world.rank != 0)
    if not console.is_terminal:
        console.width = 110
    config = read_config(args)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    import pikv_ds

    folder = checkpoint(args.model, num_experts=6 if world.size in (3, 6) else 8, progress=world.rank == 0)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()  # noqa: E731
    console.print(f"[bold]PiKV-DS[/] {world.size} rank(s), {args.dtype}, model {Path(folder).name}")
    started = time.perf_counter()
    quiet_deepspeed()
    engine = pikv_ds.initialize(load().to(launch_env.device()), config)
    console.print(f"model loaded and sharded in {time.perf_counter() - started:.1f} s")

    mine, questions, prefixes = my_prompts(args, tokenizer, world)
    batch = padded(mine, tokenizer)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad_token(tokenizer),
    }
    if args.ignore_eos:
        settings["eos_token_id"] = None
    pikv_ds.api.attachment_of(engine).store.forget_peaks()
    watch = Watch(engine.module, batch["attention_mask"].sum().item(), tokenizer, console, questions, prefixes)
    with watch, torch.inference_mode():
        out = engine.module.generate(
            **{k: v.to(launch_env.device()) for k, v in batch.items()},
            streamer=watch if mine else None,
            **settings,
        )
    answers = [ids[batch["input_ids"].shape[1] :] for ids in out.cpu()] if mine else []
    figures = pikv_ds.stats(engine)
    own = {
        "rank": world.rank,
        "questions": questions,
        "answers": [p + tokenizer.decode(a, skip_special_tokens=True) for p, a in zip(prefixes, answers, strict=True)],
        "prompt_tokens": [len(p) for p in mine],
        "new_tokens": sum(len(a) for a in answers),
        **watch.times(),
    }
    pikv_ds.detach(engine)
    del engine
    launch_env.return_freed_memory()
    if args.verify and mine:
        console.print("comparing with the unsharded model …")
        model = load().to(launch_env.device())
        with torch.inference_mode():
            plain = model.generate(**{k: v.to(model.device) for k, v in batch.items()}, **settings, synced_gpus=False)
        longest = max(plain.shape[1], out.shape[1]) - batch["input_ids"].shape[1]
        own["verified_tokens"] = longest * len(mine)
        own["equal_tokens"] = equal_tokens(plain.cpu(), out.cpu(), batch["input_ids"].shape[1])
    everyone: list[Any] = [own]
    if world.size > 1:
        everyone = [None] * world.size
        torch.distributed.all_gather_object(everyone, own)
    report(args, console, figures, everyone)
    if world.size > 1:
        torch.distributed.destroy_process_group()
    if any(r.get("equal_tokens", 0) != r.get("verified_tokens", 0) for r in everyone):
        raise PiKVError("tokens differ from the unsharded model's; see the table")


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration file with the --set changes."""
    config = load_json(args.config)
    for override in args.overrides:
        key, found, value = override.partition("=")
        if not found:
            raise ConfigError(f"--set {override}: write KEY=VALUE, e.g. --set codec=int8")
        with contextlib.suppress(json.JSONDecodeError):  # a bare word is a string
            value = json.loads(value)
        config.setdefault("pikv", {})[key] = value
    from pikv_ds.config import PiKVConfig

    try:
        PiKVConfig.from_dict(config.get("pikv", {}))
    except ConfigError as error:
        raise ConfigError(f"{args.config}: {error}") from None
    return config


def checkpoint(model: str | None, num_experts: int, progress: bool) -> str:
    """The checkpoint folder, checked, or the reference model's."""
    if model is None:
        from pikv_ds import reference_model

        return str(reference_model.build(num_experts=num_experts, progress=progress))
    if not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: no config.json there; name the folder of a Hugging Face checkpoint")
    return model


def my_prompts(
    args: argparse.Namespace, tokenizer: Any, world: launch_env.World
) -> tuple[list[list[int]], list[str], list[str]]:
    """Token ids of this rank's prompts, what is asked in each, and how the answers begin."""
    if args.prompt_file:
        everything = []
        for file in args.prompt_file:
            if not Path(file).is_file():
                raise FileNotFoundError(f"--prompt-file {file}: no such file")
            ids = encode(tokenizer, Path(file).read_text(encoding="utf-8"), args.question)
            everything.append((ids, args.question or Path(file).name, ""))
    else:
        lengths = (args.prompt_tokens, args.prompt_tokens // 2)
        everything = [
            (prompts.long_prompt(tokenizer, length, question, document, prefix), question, prefix)
            for (document, question, prefix), length in zip(DEMOS, lengths, strict=True)
        ]
    chosen = everything[world.rank :: world.size]
    return [ids for ids, _, _ in chosen], [question for _, question, _ in chosen], [prefix for *_, prefix in chosen]


def encode(tokenizer: Any, text: str, question: str | None) -> list[int]:
    """A document and a question under the model's chat template, where it has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{text}\n\n{question}" if question else text).input_ids)
    head, tail = prompts.chat_parts(tokenizer, question or "")
    return [*head, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids, *tail]


def pad_token(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def padded(rows: list[list[int]], tokenizer: Any) -> dict[str, Any]:
    """The prompts as one left-padded batch; an empty batch for a rank without prompts."""
    import torch

    width = max((len(r) for r in rows), default=1)
    ids = torch.full((len(rows), width), pad_token(tokenizer), dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Watch:
    """Shows the prefill's progress layer by layer, then the answer as it comes; takes the times."""

    def __init__(
        self, model: Any, tokens: int, tokenizer: Any, console: Console, questions: list[str], prefixes: list[str]
    ) -> None:
        self.console, self.tokenizer, self.questions, self.prefixes = console, tokenizer, questions, prefixes
        self.prompt_tokens, self.start, self.first, self.last, self.count = tokens, 0.0, 0.0, 0.0, 0
        layers = model.get_decoder().layers
        columns = (
            TextColumn("prefill"), BarColumn(), TextColumn("{task.percentage:3.0f} % of {task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not questions)
        self.task = self.progress.add_task(f"{tokens:,} tokens", total=len(layers))
        self.hooks = [layer.register_forward_hook(self.layer_done) for layer in layers]
        self.pieces: list[int] = []
        self.shown = ""

    def __enter__(self) -> Watch:
        self.progress.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        for hook in self.hooks:
            hook.remove()

    def layer_done(self, module: Any, args: Any, output: Any) -> None:
        if not self.first:
            share = output.shape[1] * output.shape[0] / max(1, self.prompt_tokens)  # a chunk is part of it
            self.progress.advance(self.task, min(1.0, share))

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with every new token."""
        self.count += 1
        if self.count == 1:
            return
        self.last = time.perf_counter()
        if not self.first:
            self.first = self.last
            self.progress.stop()
            if len(self.questions) == 1:
                self.console.print(f"\n[bold]{self.questions[0]}[/]\n{self.prefixes[0]}", end="", highlight=False)
        if len(self.questions) == 1:  # a batch cannot be streamed to one terminal
            self.pieces.append(int(value.flatten()[0]))
            text = self.tokenizer.decode(self.pieces, skip_special_tokens=True)
            self.console.print(text[len(self.shown) :], end="", highlight=False, markup=False)
            self.shown = text

    def end(self) -> None:
        self.console.print()

    def times(self) -> dict[str, float]:
        return {
            "prefill_s": self.first - self.start if self.first else 0.0,
            "decode_s": self.last - self.first,
            "decode_steps": max(0, self.count - 2),
        }


def report(
    args: argparse.Namespace,
    console: Console,
    figures: dict[str, Any],
    everyone: list[dict[str, Any]],
) -> None:
    """The table, or the figures as JSON."""
    from rich.table import Table

    prefill = max(r["prefill_s"] for r in everyone)
    decode = max(r["decode_s"] for r in everyone)
    figures["generation"] = everyone
    figures["prefill_tokens_per_s"] = sum(sum(r["prompt_tokens"]) for r in everyone) / prefill if prefill else 0.0
    new = sum(r["decode_steps"] * len(r["prompt_tokens"]) for r in everyone)
    figures["decode_tokens_per_s"] = new / decode if decode else 0.0
    if args.verify:
        figures["verified_tokens"] = sum(r.get("verified_tokens", 0) for r in everyone)
        figures["equal_tokens"] = sum(r.get("equal_tokens", 0) for r in everyone)
    if args.json and not console.quiet:
        text = json.dumps(figures, indent=2)
        if args.json == "-":
            print(text)
            return
        Path(args.json).write_text(text + "\n")
    for r in everyone:
        if r["rank"] or len(r["questions"]) > 1:
            for question, answer in zip(r["questions"], r["answers"], strict=True):
                console.print(f"\n[bold]{question}[/] [dim](rank {r['rank']})[/]")
                console.print(answer, highlight=False, markup=False)
    console.print()
    console.print(metrics.table(figures))
    facts = Table(show_header=False, box=None)
    facts.add_row(
        "skew (largest rank over mean), tokens",
        f"{figures['skew']:.2f}, unsharded {figures['unsharded_skew']:.2f}",
    )
    facts.add_row(
        "wire, bytes per decoded token and layer",
        f"{figures['wire_bytes_per_token_layer']:,.0f} (formula {figures['wire_formula_bytes']:,})",
    )
    facts.add_row("pages moved to their owners, once", f"{figures['page_wire_bytes'] / 2**20:,.1f} MiB in all")
    facts.add_row("prefill", f"{figures['prefill_tokens_per_s']:,.0f} tokens/s, all ranks")
    facts.add_row("decode", f"{figures['decode_tokens_per_s']:,.1f} tokens/s, all ranks")
    if args.verify:
        same = figures["equal_tokens"] == figures["verified_tokens"]
        verdict = "[green]all equal[/]" if same else "[red]DIFFERENT[/]"
        facts.add_row(
            "tokens equal to the unsharded model's",
            f"{figures['equal_tokens']} of {figures['verified_tokens']} {verdict}",
        )
    console.print(facts)


def equal_tokens(want: Any, got: Any, start: int) -> int:
    """New tokens that agree; where one output is longer, the rest counts as unequal."""
    width = min(want.shape[1], got.shape[1])
    return int((want[:, start:width] == got[:, start:width]).sum())


def quiet_deepspeed() -> None:
    import logging as python_logging

    import deepspeed  # noqa: F401  (it sets up its logger when it is imported)

    python_logging.getLogger("DeepSpeed").setLevel(python_logging.WARNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
