"""Prompts over real documents: the texts of `examples/data` under the model's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pikv_ds.errors import UsageError
from pikv_ds.tools.eval.text import chat_parts, sentences

DATA = Path(__file__).resolve().parent / "data"

DEMO_DOCUMENT = "moby_dick"
DEMO_QUESTION = "What is the name of the inn where the narrator stays?"
DEMO_ANSWER_PREFIX = "The name of the inn where the narrator stays is"


def texts() -> dict[str, str]:
    """The texts of `examples/data` by file name without `.txt`, sorted."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.txt"))}


def long_prompt(
    tokenizer: Any,
    num_tokens: int,
    question: str = DEMO_QUESTION,
    document: str = DEMO_DOCUMENT,
    answer_prefix: str | None = None,
) -> list[int]:
    """The beginning of a document, cut at a sentence end, then a question about it.

    Args:
        num_tokens: at most, chat template and question included; what misses is less than a
            sentence.
        document: a file name of `examples/data` without `.txt`.
        answer_prefix: how the assistant's answer starts; default `DEMO_ANSWER_PREFIX` for
            `DEMO_QUESTION`, nothing for any other question.

    Returns:
        Token ids, ready for `generate` (as `torch.tensor([ids])`).
    """
    if answer_prefix is None:
        answer_prefix = DEMO_ANSWER_PREFIX if question == DEMO_QUESTION else ""
    ids, tail = chat_parts(tokenizer, question, answer_prefix)
    smallest = len(ids) + len(tail)
    for sentence in sentences(texts()[document]):
        more = tokenizer(sentence, add_special_tokens=False).input_ids
        if len(ids) + len(more) + len(tail) > num_tokens:
            if len(ids) + len(tail) == smallest:
                raise UsageError(f"num_tokens is {num_tokens}: give at least {smallest + len(more)}")
            return ids + tail
        ids += more
    raise UsageError(f"num_tokens is {num_tokens}: all of {document} is {len(ids) + len(tail)}")
