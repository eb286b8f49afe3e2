"""What `deepspeed_generate.py` and `megatron_generate.py` share: options, documents, and the table at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape

from examples import prompts
from pikv_ds import checks, launch_env
from pikv_ds.config import ConfigError, PiKVConfig, load_json, section
from pikv_ds.errors import PeerError, PiKVError, UsageError
from pikv_ds.integrations.hf import checkpoints
from pikv_ds.observe import metrics
from pikv_ds.tools import tables
from pikv_ds.tools.command_line import RANKS, Parser, check_folders, guarded, whole

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]

DEMOS = (
    (prompts.DEMO_DOCUMENT, prompts.DEMO_QUESTION, prompts.DEMO_ANSWER_PREFIX),
    ("alice", "What was written on the little bottle?", "On the little bottle was written"),
)
"""Documents of examples/data, what is asked about them, and how the answer begins."""


def parse_arguments(argv: list[str], description: str | None, examples: str, launcher: str) -> argparse.Namespace:
    parser = Parser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--max-new-tokens", type=whole(), default=64, metavar="N")
    parser.add_argument(
        "--prompt-tokens",
        type=whole(),
        default=5000,
        metavar="N",
        help="length of the demo's longer document (default: 5000)",
    )
    parser.add_argument(
        "--ranks",
        type=whole(most=RANKS),
        metavar="N",
        help=f"start N ranks with {launcher} (when run with plain python)",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="where each rank notes its tokens when it is asked to stop (SIGUSR1 or SIGTERM, as SLURM sends them "
        "before the time limit), and from where it goes on when it is started again",
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
    return args


def main(args: argparse.Namespace, launch: Callable[[int], int], run: Callable[..., None]) -> int:
    """Starts the ranks if that is asked for, and turns errors into one line each; returns the exit code.

    Args:
        launch: runs so many ranks of this script, and returns the exit code if it returns at all.
        run: what a rank does, given the arguments and its `World`.
    """
    if args.ranks is not None and not launch_env.launched():
        return launch(args.ranks)
    if code := guarded("error", lambda: _prepare(args)):
        return code
    world = launch_env.world()

    def work() -> int:
        check_folders(*(Path(file) for file in (args.state, args.json) if file not in (None, "-")))
        run(args, world)
        return 0

    return guarded(f"rank {world.rank}: error", work)


def _prepare(args: argparse.Namespace) -> int:
    launch_env.prepare()
    world = launch_env.world()
    if args.ranks not in (None, world.size):
        raise UsageError(f"--ranks {args.ranks}, but the launcher started {world.size}; drop one")
    return 0


def console_of(args: argparse.Namespace, world: launch_env.World) -> Console:
    """Where rank 0 prints; the others are silent."""
    console = Console(stderr=args.json == "-", quiet=world.rank != 0)
    if not console.is_terminal:
        console.width = 110
    return console


def quiet_transformers() -> None:
    """No bars and no warnings between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration file with the --set changes."""
    config = load_json(args.config)
    settings = section(config, args.config)
    for override in args.overrides:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"--set {checks.named(override)}: write KEY=VALUE, e.g. --set codec=int8")
        settings[key] = text  # a bare word
        with contextlib.suppress(UsageError):
            settings[key] = checks.parse_json(text)
    try:
        PiKVConfig.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{args.config}: {error}") from None
    return {**config, "pikv": settings}


def checkpoint(model: str | None, num_experts: int, progress: bool) -> str:
    """The checkpoint folder, checked, or the reference model's."""
    if model is None:
        from pikv_ds.tools import reference_model

        return str(reference_model.build(num_experts=num_experts, progress=progress))
    checkpoints.check_files(model, "--model")
    return model


def my_prompts(
    args: argparse.Namespace, tokenizer: Any, world: launch_env.World, vocab_size: int
) -> tuple[list[list[int]], list[str], list[str]]:
    """Token ids of this rank's prompts, what is asked in each, and how the answers begin.

    Raises:
        UsageError: a file that is missing, empty or no text, or a tokenizer of another model.
    """
    if args.prompt_file:
        everything = []
        for file in args.prompt_file:
            try:
                text = Path(file).read_text(encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--prompt-file {file}: {error.strerror}; name a text") from None
            except UnicodeDecodeError:
                raise UsageError(f"--prompt-file {file}: not a text in UTF-8; convert it") from None
            if not text.strip():
                raise UsageError(f"--prompt-file {file}: is empty; write a prompt into it")
            everything.append((encode(tokenizer, text, args.question), args.question or Path(file).name, ""))
    else:
        lengths = (args.prompt_tokens, args.prompt_tokens // 2)
        try:
            everything = [
                (prompts.long_prompt(tokenizer, length, question, document, prefix), question, prefix)
                for (document, question, prefix), length in zip(DEMOS, lengths, strict=True)
            ]
        except UsageError as error:
            raise UsageError(f"--prompt-tokens {args.prompt_tokens}, half of it for the second: {error}") from None
    largest = max(max(ids) for ids, _, _ in everything)
    if largest >= vocab_size:
        raise UsageError(
            f"--model {args.model}: its tokenizer gives token {largest}, the model has {vocab_size}; copy the "
            "tokenizer that came with the weights"
        )
    chosen = everything[world.rank :: world.size]
    return [ids for ids, _, _ in chosen], [question for _, question, _ in chosen], [prefix for *_, prefix in chosen]


def encode(tokenizer: Any, text: str, question: str | None) -> list[int]:
    """A document and a question under the model's chat template, where it has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{text}\n\n{question}" if question else text).input_ids)
    head, tail = prompts.chat_parts(tokenizer, question or "")
    return [*head, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids, *tail]


def pad_token(tokenizer: Any) -> int:
    """What fills short prompts up; masked, so that any token will do."""
    return int(next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None))


class Stream:
    """Shows an answer as it grows, where there is one only: several cannot be streamed to one terminal.

    Args:
        questions, prefixes: what is asked, and how the answers begin.
    """

    def __init__(self, console: Console, tokenizer: Any, questions: list[str], prefixes: list[str]) -> None:
        self.console, self.tokenizer, self.questions, self.prefixes = console, tokenizer, questions, prefixes
        self.shown: str | None = None

    def show(self, ids: Sequence[int]) -> None:
        """Takes all tokens of the answer so far."""
        if len(self.questions) != 1:
            return
        if self.shown is None:
            self.shown = ""
            self.console.print(f"\n[bold]{escape(self.questions[0])}[/]")
            self.console.print(self.prefixes[0], end="", highlight=False, markup=False)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        self.console.print(text[len(self.shown) :], end="", highlight=False, markup=False)
        self.shown = text

    def close(self) -> None:
        """Ends the line, also where something has broken off: an error begins a line of its own."""
        if self.shown is not None:
            self.console.print()
            self.shown = None


def end_tokens(model: Any) -> list[int]:
    """The tokens at which a Hugging Face model's answers end."""
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def stop_when(request: launch_env.StopRequest) -> Callable[..., Any]:
    """Stops all sequences at the next token once somebody has asked for it; other ranks go on until they are asked."""
    import torch

    return lambda ids, scores, **kwargs: torch.full((len(ids),), bool(request), device=ids.device)


def gather(own: dict[str, Any], world: launch_env.World) -> list[dict[str, Any]]:
    """What every rank has to tell."""
    import torch

    everyone: list[Any] = [own]
    if world.size > 1:
        everyone = [None] * world.size
        torch.distributed.all_gather_object(everyone, own)
    return everyone


def together(work: Callable[[], Result], world: launch_env.World) -> Result:
    """Does what may fail on one rank alone, such as reading its files. Every rank of the job calls it.

    Raises:
        Exception: whatever `work` raised on this rank.
        PeerError: it failed on another one; without it this rank would wait for that one.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # the others have to know of our own mistakes, too
        failure = error
    everyone = gather({"problem": None if failure is None else checks.one_line(failure)}, world)
    if failure is not None:
        raise failure
    for rank, one in enumerate(everyone):
        if one["problem"] is not None:
            raise PeerError(f"rank {rank}: {one['problem']}")
    return cast(Result, result)


def raise_if_different(everyone: list[dict[str, Any]]) -> None:
    """With --verify, tokens that are not the unsharded model's are an error."""
    if any(r.get("equal_tokens", 0) != r.get("verified_tokens", 0) for r in everyone):
        raise PiKVError("tokens differ from the unsharded model's; see the table")


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
                console.print(f"\n[bold]{escape(question)}[/] [dim](rank {r['rank']})[/]")
                console.print(answer, highlight=False, markup=False)
    console.print()
    tables.show(metrics.table(figures), console)
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
        facts.add_row(
            "tokens equal to the unsharded model's", verdict(figures["equal_tokens"], figures["verified_tokens"])
        )
    console.print(facts)


def verdict(equal: int, verified: int) -> str:
    """What the table says of --verify."""
    if not verified:
        return "[yellow]nothing was compared[/]: the job was stopped before, or had no tokens left to generate"
    return f"{equal} of {verified} " + ("[green]all equal[/]" if equal == verified else "[red]DIFFERENT[/]")


def equal_tokens(want: Any, got: Any, start: int) -> int:
    """New tokens that agree; where one output is longer, the rest counts as unequal."""
    width = min(want.shape[1], got.shape[1])
    return int((want[:, start:width] == got[:, start:width]).sum())
