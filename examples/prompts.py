"""Prompts over real documents: the texts of `examples/data` under the model's chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"

DEMO_DOCUMENT = "moby_dick"
DEMO_QUESTION = "What is the name of the inn where the narrator stays?"
DEMO_ANSWER = "Spouter-Inn"  # given for prompts of 5,000 to 6,000 tokens


def texts() -> dict[str, str]:
    """The texts of `examples/data` by file name without `.txt`, sorted."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.txt"))}


def sentences(text: str) -> list[str]:
    """Split English prose at sentence ends; every piece keeps the white space that follows it."""
    ends = re.finditer(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]['\"’”)]*\s+(?=['\"‘“(]?[A-Z])", text)
    pieces, start = [], 0
    for end in ends:
        pieces.append(text[start : end.end()])
        start = end.end()
    return pieces + ([text[start:]] if start < len(text) else [])


def chat_parts(tokenizer: Any, question: str, answer_prefix: str = "") -> tuple[list[int], list[int]]:
    """Token ids in front of a document and behind it: `(head_ids, question_ids)`.

    The chat template goes around document and question; `answer_prefix` starts the assistant's
    answer, which the model then continues.
    """
    marker = "\x00"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{marker}\n\n{question}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    head, tail = chat.split(marker)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return encode(head), encode(tail + answer_prefix)


def long_prompt(
    tokenizer: Any,
    num_tokens: int,
    question: str = DEMO_QUESTION,
    document: str = DEMO_DOCUMENT,
    answer_prefix: str = "",
) -> list[int]:
    """A prompt of exactly `num_tokens` tokens: the beginning of a document, then a question.

    Args:
        num_tokens: of the whole prompt, chat template and question included.
        document: a file name of `examples/data` without `.txt`.

    Returns:
        Token ids, ready for `generate` (as `torch.tensor([ids])`).
    """
    head, tail = chat_parts(tokenizer, question, answer_prefix)
    ids = list(tokenizer(texts()[document], add_special_tokens=False, verbose=False).input_ids)
    room = num_tokens - len(head) - len(tail)
    if not 0 < room <= len(ids):
        raise ValueError(
            f"num_tokens is {num_tokens}: {document} allows "
            f"{len(head) + len(tail) + 1} to {len(head) + len(tail) + len(ids)}"
        )
    return head + ids[:room] + tail
