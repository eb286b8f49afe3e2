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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples import generation
from pikv_ds import launch_env

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
        from pikv_ds import ranks

        return ranks.run([sys.executable, __file__, *argv], count)

    args = generation.parse_arguments(argv, __doc__, EXAMPLES, "one process each")
    return generation.main(args, launch, run)


def run(args: argparse.Namespace, world: launch_env.World) -> None:
    console = generation.console_of(args, world)
    config = generation.read_config(args)
    warnings.filterwarnings("ignore", category=UserWarning)  # what Megatron misses on this machine
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_patch
    from megatron_patch import convert, engine, models
    from megatron_patch.tokenizer import HFTokenizer

    generation.quiet_transformers()
    folder = generation.checkpoint(args.model, 6 if world.size in (3, 6) else 8, progress=world.rank == 0)
    console.print(f"[bold]PiKV-DS[/] {world.size} rank(s), {args.dtype}, model {Path(folder).name}, Megatron-Core")
    started = time.perf_counter()
    engine.initialize()
    hf = models.load_config(folder)
    dtype = getattr(torch, args.dtype)
    model = models.build_model(hf, models.transformer_config(hf, dtype=dtype, ep=world.size))
    loaded = convert.load_hf(model, folder)
    megatron_patch.patch_model(model, config.get("pikv"))
    share = loaded.read_bytes / loaded.checkpoint_bytes
    console.print(f"{share:.0%} of the weights loaded by this rank in {time.perf_counter() - started:.1f} s")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = None if args.ignore_eos else tokenizer.eos_token_id
    mine, questions, prefixes = generation.my_prompts(args, tokenizer, world)
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
    attachment.store.forget_peaks()
    watch = Watch(model, sum(map(len, mine)), tokenizer, console, questions, prefixes)
    with watch:
        answers = generate(served, mine, engine.greedy(args.max_new_tokens, eos), watch)
    figures = megatron_patch.stats(model)
    own = {
        "rank": world.rank,
        "questions": questions,
        "answers": [p + tokenizer.decode(a, skip_special_tokens=True) for p, a in zip(prefixes, answers, strict=True)],
        "prompt_tokens": [len(p) for p in mine],
        "new_tokens": sum(len(a) for a in answers),
        **watch.times(),
    }
    megatron_patch.unpatch_model(model)
    del served, model, attachment, watch
    launch_env.return_freed_memory()
    if args.verify and mine:
        console.print("comparing with the unsharded model …")
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(launch_env.device())
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


def generate(served: Any, mine: list[list[int]], params: Any, watch: Watch) -> list[list[int]]:
    """New tokens of each of this rank's prompts. A rank that is done serves its shard until all are, by the
    dummy passes that Megatron's coordinator would have it make."""
    import torch
    import torch.distributed as dist

    for i, prompt in enumerate(mine):
        served.add_request(i, prompt, params)
    answers: dict[int, list[int]] = {}
    while True:
        mine_left = served.context.get_active_request_count() + len(served.waiting_request_ids)
        left = torch.tensor([mine_left], device=launch_env.device())
        dist.all_reduce(left, op=dist.ReduceOp.MAX)
        if not int(left):
            return [answers[i] for i in range(len(mine))]
        if not mine_left:
            served.controller.dummy_forward()
            continue
        for record in served.step_modern()["finished_request_records"]:
            request = record.merge()
            answers[request.request_id] = list(request.generated_tokens)
        watch.step([answers.get(i) or list(served.get_request(i).generated_tokens) for i in range(len(mine))])


class Watch:
    """Shows the prefill's progress layer by layer, then the answer as it comes; takes the times."""

    def __init__(
        self, model: Any, tokens: int, tokenizer: Any, console: Console, questions: list[str], prefixes: list[str]
    ) -> None:
        self.console, self.tokenizer, self.questions, self.prefixes = console, tokenizer, questions, prefixes
        self.start, self.first, self.last, self.steps, self.shown = 0.0, 0.0, 0.0, 0, ""
        layers = model.decoder.layers
        columns = (
            TextColumn("prefill"), BarColumn(), TextColumn("{task.percentage:3.0f} % of {task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not questions)
        self.task = self.progress.add_task(f"{tokens:,} tokens", total=max(1, tokens) * len(layers))
        self.hooks = [layer.register_forward_hook(self.layer_done) for layer in layers]

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
            self.progress.advance(self.task, output[0].shape[0])

    def step(self, answers: list[list[int]]) -> None:
        """Takes all answers so far, after a step of the engine."""
        if not all(answers):  # a prompt is still under way
            return
        self.last, self.steps = time.perf_counter(), self.steps + 1
        one = len(self.questions) == 1  # several cannot be streamed to one terminal
        if not self.first:
            self.first = self.last
            self.progress.stop()
            if one:
                self.console.print(f"\n[bold]{self.questions[0]}[/]\n{self.prefixes[0]}", end="", highlight=False)
        if one:
            text = self.tokenizer.decode(answers[0], skip_special_tokens=True)
            self.console.print(text[len(self.shown) :], end="", highlight=False, markup=False)
            self.shown = text

    def times(self) -> dict[str, float]:
        self.console.print()
        return {
            "prefill_s": self.first - self.start if self.first else 0.0,
            "decode_s": self.last - self.first,
            "decode_steps": max(0, self.steps - 1),
        }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
