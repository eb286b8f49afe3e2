"""Real prose, and the chat template around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_ds.errors import UsageError


def sentences(text: str) -> list[str]:
    """Split English prose at sentence ends; every piece keeps the white space in front of it, so
    that pieces tokenized one by one give the tokens of the whole."""
    titles = r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)"
    ends = re.finditer(titles + r"[.!?]['\"’”)]*(?=\s+['\"‘“(]?[A-Z])", text)
    pieces, start = [], 0
    for end in ends:
        pieces.append(text[start : end.end()])
        start = end.end()
    return pieces + ([text[start:]] if start < len(text) else [])


def chat_parts(tokenizer: Any, question: str, answer_prefix: str = "") -> tuple[list[int], list[int]]:
    """Token ids in front of a document and behind it: `(head_ids, question_ids)`.

    The chat template goes around document and question; `answer_prefix` starts the assistant's
    answer, which the model then continues. A tokenizer without a template gets plain text.
    """
    marker = "\x00"
    chat = f"{marker}\n\n{question}\n"
    if tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{marker}\n\n{question}"}], tokenize=False, add_generation_prompt=True
        )
    head, tail = chat.split(marker)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return encode(head), encode(tail + answer_prefix)


def read(paths: Sequence[Path]) -> list[str]:
    """The texts of some files.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not paths:
        raise UsageError("no text to hide needles in: name files with --text")
    out = []
    for path in paths:
        try:
            out.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text {path}: {error}; name a text in UTF-8") from None
        if not out[-1].strip():
            raise UsageError(f"--text {path}: is empty; name a text in UTF-8")
    return out
