"""Generates with Megatron-Core's dynamic engine, its KV cache sharded by expert over the ranks.

Each prompt belongs to one rank; its KV pages live on all of them. Without --prompt-file and --model
the reference model (built once, cached on disk) answers questions about two public-domain books.
The options are those of deepspeed_generate.py; of the configuration only the "pikv" section counts.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence, Sized
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
  torchrun --nproc-per-node 2 examples/megatron_generate.py --config launch/ds_inference.json --verify
  python examples/megatron_generate.py --ranks 4 --set codec=int8 --json figures.json
  torchrun --nproc-per-node 8 examples/megatron_generate.py --model /models/Qwen3-30B-A3B \\
      --dtype bfloat16 --prompt-file report.txt --question "What was decided?" --max-new-tokens 200
"""

PASS_TOKENS = 512
"""Tokens of one forward pass; longer prompts come in chunks of this, and so does the progress bar."""


def main(argv: list[str]) -> int:
    def launch(count: int) -> int:
        from pikv_ds.tools import local_ranks as ranks

        return ranks.run([sys.executable, __file__, *argv], count)

    args = generation.parse_arguments(argv, __doc__, EXAMPLES, "one process each")
    return generation.main(args, launch, run)


def run(args: argparse.Namespace, world: launch_env.World) -> None:
    console = generation.console_of(args, world)
    config = generation.read_config(args)
    warnings.filterwarnings("ignore", category=UserWarning)  # what Megatron misses on this machine
    import torch

    import megatron_patch
    from megatron_patch import convert, engine, models
    from megatron_patch.tokenizer import HFTokenizer

    generation.quiet_transformers()
    folder = generation.checkpoint(args.model, 6 if world.size in (3, 6) else 8, progress=world.rank == 0)
    console.print(
        f"[bold]PiKV-DS[/] {world.size} rank(s), {args.dtype}, model {escape(Path(folder).name)}, Megatron-Core"
    )
    started = time.perf_counter()
    engine.initialize()
    hf = models.load_config(folder)
    dtype = getattr(torch, args.dtype)
    model = models.build_model(hf, models.transformer_config(hf, dtype=dtype, ep=world.size))
    loaded = convert.load_hf(model, folder)
    megatron_patch.patch_model(model, config.get("pikv"))
    share = loaded.read_bytes / loaded.checkpoint_bytes
    console.print(f"{share:.0%} of the weights loaded by this rank in {time.perf_counter() - started:.1f} s")

    tokenizer, mine, questions, prefixes, state = prepare(args, config, folder, world, model.vocab_size, "megatron")
    eos = None if args.ignore_eos else tokenizer.eos_token_id
    ends = [] if eos is None else [eos]
    answers = [until_end(ids, ends, args.max_new_tokens) for ids in state.read(len(mine), model.vocab_size)]
    going = [i for i, ids in enumerate(answers) if not is_done(ids, ends, args.max_new_tokens)]
    served = engine.dynamic_engine(
        model,
        HFTokenizer.load(folder, model.vocab_size),
        max_requests=max(2, len(mine)),
        max_tokens=PASS_TOKENS,
        context_length=max([len(p) for p in mine] or [0]) + args.max_new_tokens,
        buffer_gib=None,
    )
    megatron_patch.patch_context(model, served.context)
    attachment = megatron_patch.attachment_of(model)
    attachment.cache.forget_peaks()
    stream = generation.Stream(console, tokenizer, questions, prefixes)
    todo = [[*mine[i], *answers[i]] for i in going]
    watch = Watch(model, sum(map(len, todo)), console, stream, answers[0] if mine else [])
    params = [engine.greedy(args.max_new_tokens - len(answers[i]), eos) for i in going]
    with watch, launch_env.stop_on_signals() as request:
        new, stopped = generate(served, todo, params, watch, request)
    for i, ids in zip(going, new, strict=True):
        answers[i] = until_end([*answers[i], *ids], ends, args.max_new_tokens)
    if stopped:
        state.write(answers)
        where = f"its tokens are in {state.path}" if state.path else "give --state FILE to go on from here"
        print(f"rank {world.rank}: stopped after {max(map(len, answers), default=0)} tokens; {where}", flush=True)
    else:
        state.remove()
    figures = megatron_patch.stats(model)
    own = {
        "rank": world.rank,
        "questions": questions,
        "answers": [p + tokenizer.decode(a, skip_special_tokens=True) for p, a in zip(prefixes, answers, strict=True)],
        "prompt_tokens": [len(p) for p in mine],
        "new_tokens": sum(len(a) for a in answers),
        "answer_ids": answers,
        "stopped_by": (request.signals or ["another rank"])[0] if stopped else None,
        **watch.times(),
    }
    megatron_patch.unpatch_model(model)
    del served, model, attachment, watch, stream
    launch_env.return_freed_memory()
    if args.verify and mine and not stopped:
        console.print("comparing with the unsharded model …")
        plain = checkpoints.load_model(folder, dtype, "--model").to(launch_env.device())
        own["verified_tokens"] = own["equal_tokens"] = 0
        for prompt, answer in zip(mine, answers, strict=True):
            ids = torch.tensor([prompt], device=plain.device)
            with torch.inference_mode():
                want = plain.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.max_new_tokens,
                    pad_token_id=generation.pad_token(tokenizer), eos_token_id=eos,
                )[0, len(prompt) :].tolist()  # fmt: skip
            own["verified_tokens"] += max(len(want), len(answer))
            own["equal_tokens"] += sum(a == b for a, b in zip(want, answer, strict=False))
    everyone = generation.gather(own, world)
    generation.report(args, console, figures, everyone)
    torch.distributed.destroy_process_group()
    generation.raise_if_different(everyone)


def generate(
    served: Any, mine: list[list[int]], params: Sequence[Any], watch: Watch, request: Sized = ()
) -> tuple[list[list[int]], bool]:
    """New tokens of each of this rank's prompts, and whether it was stopped before all ranks were done.

    A rank that is done serves its shard until all are, by the dummy passes that Megatron's coordinator would have it
    make.

    Args:
        params: of the sampling, for each prompt.
        request: all ranks stop after the step at which this is no longer empty on one of them.
    """
    import torch
    import torch.distributed as dist

    for i, prompt in enumerate(mine):
        served.add_request(i, prompt, params[i])
    answers: dict[int, list[int]] = {}

    def so_far() -> list[list[int]]:
        return [answers[i] if i in answers else list(served.get_request(i).generated_tokens) for i in range(len(mine))]

    while True:
        mine_left = served.context.get_active_request_count() + len(served.waiting_request_ids)
        everyone = torch.tensor([mine_left, len(request)], device=launch_env.device())
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
        left, asked = everyone.tolist()
        if not left or asked:
            return so_far(), bool(left)
        if not mine_left:
            served.controller.dummy_forward()
            continue
        for record in served.step_modern()["finished_request_records"]:
            done = record.merge()
            answers[done.request_id] = list(done.generated_tokens)
        watch.step(so_far())


class Watch:
    """Shows the prefill's progress layer by layer, then the answer as it comes; takes the times."""

    def __init__(
        self, model: Any, tokens: int, console: Console, stream: generation.Stream, before: list[int]
    ) -> None:
        self.stream, self.before = stream, before
        self.start, self.first, self.last, self.steps = 0.0, 0.0, 0.0, 0
        layers = model.decoder.layers
        columns = (
            TextColumn("prefill"), BarColumn(), TextColumn("{task.percentage:3.0f} % of {task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not stream.questions)
        self.task = self.progress.add_task(f"{tokens:,} tokens", total=max(1, tokens) * len(layers))
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
            self.progress.advance(self.task, output[0].shape[0])

    def step(self, answers: list[list[int]]) -> None:
        """Takes all answers so far, after a step of the engine."""
        if not all(answers):  # a prompt is still under way
            return
        self.last, self.steps = time.perf_counter(), self.steps + 1
        if not self.first:
            self.first = self.last
            self.progress.stop()
        if answers:
            self.stream.show([*self.before, *answers[0]])

    def times(self) -> dict[str, float]:
        return {
            "prefill_s": self.first - self.start if self.first else 0.0,
            "decode_s": self.last - self.first,
            "decode_steps": max(0, self.steps - 1),
        }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
