"""Generates with a Mixture-of-Experts model whose KV cache is sharded by expert over the ranks.

Each prompt belongs to one rank; its KV pages live on all of them. Without --prompt-file and --model
the reference model (built once, cached on disk) answers questions about two public-domain books.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples import generation
from examples.state import is_done, prepare, until_end
from pikv_ds import launch_env
from pikv_ds.integrations.hf import checkpoints

EXAMPLES = """examples:
  deepspeed --num_accelerators 2 examples/deepspeed_generate.py --config launch/ds_inference.json --verify
  python examples/deepspeed_generate.py --ranks 4 --set codec=int8 --json figures.json
  deepspeed --num_accelerators 2 examples/deepspeed_generate.py --model /models/Qwen3-30B-A3B \\
      --dtype bfloat16 --prompt-file report.txt --question "What was decided?" --max-new-tokens 200
"""


def main(argv: list[str]) -> int:
    def launch(ranks: int) -> int:
        launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
        os.execv(launcher, [launcher, "--num_accelerators", str(ranks), __file__, *argv])

    args = generation.parse_arguments(argv, __doc__, EXAMPLES, "the deepspeed launcher")
    return generation.main(args, launch, run)


def run(args: argparse.Namespace, world: launch_env.World) -> None:
    console = generation.console_of(args, world)
    config = generation.read_config(args)
    import torch

    generation.quiet_transformers()
    import pikv_ds

    folder = generation.checkpoint(args.model, num_experts=6 if world.size in (3, 6) else 8, progress=world.rank == 0)
    load = lambda: checkpoints.load_model(folder, getattr(torch, args.dtype), "--model")  # noqa: E731
    console.print(f"[bold]PiKV-DS[/] {world.size} rank(s), {args.dtype}, model {escape(Path(folder).name)}")
    started = time.perf_counter()
    quiet_deepspeed()
    engine = pikv_ds.initialize(load().to(launch_env.device()), config)
    console.print(f"model loaded and sharded in {time.perf_counter() - started:.1f} s")

    vocab_size = engine.module.config.get_text_config().vocab_size
    tokenizer, mine, questions, prefixes, state = prepare(
        args, config, folder, world, vocab_size, "deepspeed", padding_side="left"
    )
    ends = [] if args.ignore_eos else generation.end_tokens(engine.module)
    answers = [until_end(ids, ends, args.max_new_tokens) for ids in state.read(len(mine), vocab_size)]
    going = [i for i, ids in enumerate(answers) if not is_done(ids, ends, args.max_new_tokens)]
    batch = padded([[*mine[i], *answers[i]] for i in going], tokenizer)
    settings = {
        "max_new_tokens": args.max_new_tokens - max((len(answers[i]) for i in going), default=0),
        "do_sample": False,
        "pad_token_id": generation.pad_token(tokenizer),
    }
    if args.ignore_eos:
        settings["eos_token_id"] = None
    pikv_ds.api.attachment_of(engine).store.forget_peaks()
    stream = generation.Stream(console, tokenizer, questions, prefixes)
    watch = Watch(engine.module, batch["attention_mask"].sum().item(), console, stream, answers[0] if mine else [])
    with watch, torch.inference_mode(), launch_env.stop_on_signals() as request:
        out = engine.module.generate(
            **{k: v.to(launch_env.device()) for k, v in batch.items()},
            streamer=watch if going else None,
            stopping_criteria=[generation.stop_when(request)],
            **settings,
        )
    for i, ids in zip(going, out.cpu()[:, batch["input_ids"].shape[1] :].tolist() if going else [], strict=True):
        answers[i] = until_end([*answers[i], *ids], ends, args.max_new_tokens)
    if request:
        state.write(answers)
        where = f"its tokens are in {state.path}" if state.path else "give --state FILE to go on from here"
        told = f"stopped by {request.signals[0]} after {max(map(len, answers), default=0)} tokens"
        print(f"rank {world.rank}: {told}; {where}", flush=True)
    else:
        state.remove()
    figures = pikv_ds.stats(engine)
    own = {
        "rank": world.rank,
        "questions": questions,
        "answers": [p + tokenizer.decode(a, skip_special_tokens=True) for p, a in zip(prefixes, answers, strict=True)],
        "prompt_tokens": [len(p) for p in mine],
        "new_tokens": sum(len(a) for a in answers),
        "answer_ids": answers,
        "stopped_by": request.signals[0] if request else None,
        **watch.times(),
    }
    pikv_ds.detach(engine)
    del engine
    launch_env.return_freed_memory()
    if args.verify and going and not request:
        console.print("comparing with the unsharded model …")
        model = load().to(launch_env.device())
        with torch.inference_mode():
            plain = model.generate(**{k: v.to(model.device) for k, v in batch.items()}, **settings, synced_gpus=False)
        longest = max(plain.shape[1], out.shape[1]) - batch["input_ids"].shape[1]
        own["verified_tokens"] = longest * len(going)
        own["equal_tokens"] = generation.equal_tokens(plain.cpu(), out.cpu(), batch["input_ids"].shape[1])
    everyone = generation.gather(own, world)
    generation.report(args, console, figures, everyone)
    if world.size > 1:
        torch.distributed.destroy_process_group()
    generation.raise_if_different(everyone)


def padded(rows: list[list[int]], tokenizer: Any) -> dict[str, Any]:
    """The prompts as one left-padded batch; an empty batch for a rank without prompts."""
    import torch

    width = max((len(r) for r in rows), default=1)
    ids = torch.full((len(rows), width), generation.pad_token(tokenizer), dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Watch:
    """Shows the prefill's progress layer by layer, then the answer as it comes; takes the times."""

    def __init__(
        self, model: Any, tokens: int, console: Console, stream: generation.Stream, before: list[int]
    ) -> None:
        self.stream, self.pieces = stream, list(before)
        self.prompt_tokens, self.start, self.first, self.last, self.count = tokens, 0.0, 0.0, 0.0, 0
        layers = model.get_decoder().layers
        columns = (
            TextColumn("prefill"), BarColumn(), TextColumn("{task.percentage:3.0f} % of {task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not stream.questions)
        self.task = self.progress.add_task(f"{tokens:,} tokens", total=len(layers))
        self.hooks = [layer.register_forward_hook(self.layer_done) for layer in layers]

    def __enter__(self) -> Watch:
        self.progress.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        self.stream.close()
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
        self.pieces.append(int(value.flatten()[0]))
        self.stream.show(self.pieces)

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self.stream.close()

    def times(self) -> dict[str, float]:
        return {
            "prefill_s": self.first - self.start if self.first else 0.0,
            "decode_s": self.last - self.first,
            "decode_steps": max(0, self.count - 2),
        }


def quiet_deepspeed() -> None:
    import logging as python_logging

    import deepspeed  # noqa: F401  (it sets up its logger when it is imported)

    python_logging.getLogger("DeepSpeed").setLevel(python_logging.WARNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
