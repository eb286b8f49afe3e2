"""The needle cases: a number hidden in real prose, asked for at the end of the prompt.

One sentence, "The special magic number for Paris is: 48213.", stands between two sentences of the
texts in `examples/data`; the question follows the text. Whether an answer is found depends on one
place in the context, so the cases show what compression and sparse lookup lose.

    python -m benchmarks.needle_cases             # the unsharded reference model, full attention
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too

from examples.prompts import texts
from pikv_ds.tools.eval.tasks import CITIES, found
from pikv_ds.tools.eval.text import chat_parts, sentences

NEEDLE = " The special magic number for {city} is: {number}."
INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n\n"
)
QUESTION = "What is the special magic number for {city} mentioned in the provided text?"
ANSWER_PREFIX = "The special magic number for {city} mentioned in the provided text is"
LENGTHS = (1000, 2000, 3500)
"""Tokens in front of the question, exactly; the first part of the template counts."""
DEPTHS = 6
"""How many places, evenly spread in (0, 1): (i + 1/2) / DEPTHS."""


@dataclass(frozen=True)
class NeedleCase:
    """One prompt: chat head and document with the needle, `context_tokens` of them, then the question."""

    input_ids: list[int]
    answer: str
    context_tokens: int
    depth: float


def needle_cases(tokenizer: Any, seed: int = 0) -> list[NeedleCase]:
    """One case per length and depth.

    Args:
        tokenizer: of the reference model (any with a chat template).
        seed: of the numbers, and of where in the texts the filler starts.
    """
    rng = random.Random(seed)
    prose = [s for text in texts().values() for s in sentences(text)]

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    cases: list[NeedleCase] = []
    for length in LENGTHS:
        for i in range(DEPTHS):
            depth = (i + 0.5) / DEPTHS
            city = CITIES[len(cases) % len(CITIES)]
            answer = str(rng.randrange(10_000, 100_000))
            head, question = chat_parts(tokenizer, QUESTION.format(city=city), ANSWER_PREFIX.format(city=city))
            head = head + encode(INSTRUCTION)
            needle = encode(NEEDLE.format(city=city, number=answer))
            room = length - len(head) - len(needle)
            start = rng.randrange(len(prose))
            before: list[int] = []
            after: list[int] = []
            for k in range(len(prose)):
                ids = encode(prose[(start + k) % len(prose)])
                if not after and len(before) + len(ids) / 2 <= depth * room:
                    before += ids
                else:
                    after += ids
                if len(before) + len(after) >= room:
                    break
            context = head + before + needle + after[: room - len(before)]
            cases.append(NeedleCase(context + question, answer, length, depth))
    return cases


def main(argv: list[str] | None = None) -> int:
    """Count the cases that the unsharded reference model finds, greedy, with full attention."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pikv_ds.integrations.hf import checkpoints
    from pikv_ds.tools.reference_model import build

    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle_cases")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    path = build(args.num_experts)
    disable_progress_bar()
    tokenizer = checkpoints.load_tokenizer(path)
    model = checkpoints.load_model(path, getattr(torch, args.dtype))
    cases = needle_cases(tokenizer, seed=args.seed)
    hits, started = 0, time.perf_counter()
    for case in cases:
        ids = torch.tensor([case.input_ids])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        hit = found(text, case.answer)
        hits += hit
        print(
            f"{case.context_tokens:6d} tokens, depth {case.depth:.2f}: "
            f"{case.answer} {'found' if hit else 'LOST'} in {text!r}",
            flush=True,
        )
    seconds = time.perf_counter() - started
    print(f"found {hits} of {len(cases)} ({args.dtype}, full attention, {seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
