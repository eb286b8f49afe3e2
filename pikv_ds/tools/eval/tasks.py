"""Prompts whose answers can be counted, made with seeds from real prose.

*needle* hides one sentence with a number (or a word) in a text; *multikey* hides four of them and asks for one;
*tracking* (variable tracking) and *common* (common words) follow RULER (Hsieh et al. 2024). *text* has no
question: the model reads on, and its predictions are compared with those over the uncompressed cache.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pikv_ds.errors import UsageError
from pikv_ds.tools.eval.text import chat_parts, sentences

NEEDLE = " The special magic {what} for {city} is: {answer}."
INSTRUCTION = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {what} afterwards.\n\n"
)
QUESTION = "What is the special magic {what} for {city} mentioned in the provided text?"
ANSWER_PREFIX = "The special magic {what} for {city} mentioned in the provided text is"

CITIES = (
    "Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Tokyo", "Cairo", "Boston",
    "Chicago", "Dublin", "Oslo", "Lisbon", "Athens", "Prague", "Sydney", "Toronto", "Delhi",
)  # fmt: skip
ADJECTIVES = ("amber", "silent", "golden", "rapid", "frozen", "gentle", "purple", "hollow", "bright", "ancient")
NOUNS = ("falcon", "harbor", "lantern", "meadow", "pepper", "rocket", "saddle", "timber", "violin", "walnut")


@dataclass(frozen=True)
class Case:
    """One prompt. `input_ids` ends with `question_ids`: what compresses a context before the
    question is known may look at `context_ids` only."""

    task: str
    kind: str
    input_ids: list[int]
    question_ids: list[int]
    answers: tuple[str, ...]
    """All of them are to be found in what the model generates; none for *text*."""
    context_tokens: int
    depth: float
    new_tokens: int = 10
    needle: tuple[int, int] = (0, 0)
    """Places of the asked-for sentence's tokens in the context, where there is one."""

    @property
    def answer(self) -> str:
        return self.answers[0]

    @property
    def context_ids(self) -> list[int]:
        """The first `context_tokens` of `input_ids`: chat head and document with the needle."""
        return self.input_ids[: self.context_tokens]

    @property
    def key(self) -> str:
        """A name, the same in every run with the same settings."""
        return (
            f"{self.task}/{self.kind}/{self.context_tokens}/{self.depth:.3f}/{self.answers[0] if self.answers else ''}"
        )


class Haystack:
    """Prose to hide sentences in, and a source of chance."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.prose = [s for text in texts for s in sentences(text)]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def hide(self, head: list[int], pieces: Sequence[tuple[float, list[int]]], length: int) -> list[int]:
        """`length` tokens: a head, then prose with pieces at depths in (0, 1).

        Raises:
            ValueError: the length is too small.
        """
        room = length - len(head) - sum(len(ids) for _, ids in pieces)
        if room <= 0:
            raise UsageError(f"lengths has {length}: the smallest is {length - room + 1}")
        start = self.rng.randrange(len(self.prose))
        waiting = sorted(pieces, key=lambda p: p[0])
        body: list[int] = []
        filler = 0
        for k in range(len(self.prose)):
            ids = self.encode(self.prose[(start + k) % len(self.prose)])
            while waiting and filler + len(ids) / 2 > waiting[0][0] * room:
                body += waiting.pop(0)[1]
            ids = ids[: room - filler]
            body += ids
            filler += len(ids)
            if filler >= room:
                break
        for _, piece in waiting:
            body += piece
        return head + body


def needle(haystack: Haystack, length: int, depth: float, index: int, kind: str) -> Case:
    """One needle: ``kind`` is "5", "7" or "16" digits, or "word"."""
    return _needles(haystack, length, depth, index, kind, others=0)


def multikey(haystack: Haystack, length: int, depth: float, index: int, kind: str) -> Case:
    """Four needles, one question."""
    return _needles(haystack, length, depth, index, kind, others=3)


def _needles(haystack: Haystack, length: int, depth: float, index: int, kind: str, others: int) -> Case:
    rng = haystack.rng
    what = "word" if kind == "word" else "number"

    drawn: set[str] = set()

    def draw() -> str:
        while True:
            if kind == "word":
                out = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
            else:
                out = str(rng.randrange(10 ** (int(kind) - 1), 10 ** int(kind)))
            if out not in drawn:
                drawn.add(out)
                return out

    city = CITIES[index % len(CITIES)]
    answer = draw()
    pieces = [(depth, haystack.encode(NEEDLE.format(what=what, city=city, answer=answer)))]
    for i in range(others):
        other = CITIES[(index + 1 + i) % len(CITIES)]
        pieces.append((rng.random(), haystack.encode(NEEDLE.format(what=what, city=other, answer=draw()))))
    head, question = chat_parts(
        haystack.tokenizer, QUESTION.format(what=what, city=city), ANSWER_PREFIX.format(what=what, city=city)
    )
    context = haystack.hide(head + haystack.encode(INSTRUCTION.format(what=what)), pieces, length)
    new = 10 if kind in ("5", "7") else 20
    task = "multikey" if others else "needle"
    ids = pieces[0][1]
    start = next(i for i in range(len(context)) if context[i : i + len(ids)] == ids)
    return Case(task, kind, context + question, question, (answer,), length, depth, new, (start, start + len(ids)))


def tracking(haystack: Haystack, length: int, depth: float, index: int, kind: str) -> Case:
    """A number is assigned to a variable, and that to others, ``kind`` times in all; which variables have it?"""
    rng, hops = haystack.rng, int(kind)
    names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)) for _ in range(hops)]
    value = str(rng.randrange(10000, 100000))
    sources = [value, *(f"VAR {n}" for n in names)]
    places = sorted(rng.random() for _ in range(hops))
    pieces = [(p, haystack.encode(f"\nVAR {n} = {s}\n")) for p, n, s in zip(places, names, sources, strict=False)]
    head, question = chat_parts(
        haystack.tokenizer,
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: According to the chain(s) of variable assignment in the text above, {hops} variables are assigned "
        f"the value {value}, they are:",
    )
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    context = haystack.hide(head + haystack.encode(intro), pieces, length)
    return Case("tracking", kind, context + question, question, tuple(names), length, depth, 12 * hops)


def common(haystack: Haystack, length: int, depth: float, index: int, kind: str) -> Case:
    """A list of words, ``kind`` of which come ten times as often as the others; which ones?"""
    rng, count = haystack.rng, int(kind)
    vocabulary = sorted({w.lower() for s in haystack.prose for w in re.findall(r"\b[a-z]{5,9}\b", s)})
    words = rng.sample(vocabulary, min(len(vocabulary), 400))
    often, rare = words[:count], words[count:]
    head, question = chat_parts(
        haystack.tokenizer,
        f"Question: What are the {count} most common words in the above list?",
        f"Answer: The top {count} words that appear most often in the list are:",
    )
    intro = "Below is a numbered list of words. Memorize the ones that appear most often.\n"
    head = head + haystack.encode(intro)
    ids: list[int] = []
    number = 1
    batch: list[str] = []
    while len(head) + len(ids) < length:  # shares of a list as long as it has to be
        if not batch:
            batch = often * 3 + rng.sample(rare, min(len(rare), 4 * count))
            rng.shuffle(batch)
        ids += haystack.encode(f"{number}. {batch.pop()} ")
        number += 1
    context = (head + ids)[:length]
    return Case("common", kind, context + question, question, tuple(often), length, depth, 8 * count)


def text(haystack: Haystack, length: int, depth: float, index: int, kind: str) -> Case:
    """Prose, and ``kind`` more tokens of it to predict."""
    start = haystack.rng.randrange(len(haystack.prose))
    ids: list[int] = []
    for k in range(len(haystack.prose)):
        ids += haystack.encode(haystack.prose[(start + k) % len(haystack.prose)])
        if len(ids) >= length + int(kind):
            break
    ids = ids[: length + int(kind)]
    return Case("text", kind, ids, ids[length:], (), length, depth, 0)


TASKS: dict[str, tuple[Callable[[Haystack, int, float, int, str], Case], tuple[str, ...]]] = {
    "needle": (needle, ("5", "7", "16", "word")),
    "multikey": (multikey, ("5", "word")),
    "tracking": (tracking, ("3",)),
    "common": (common, ("5",)),
    "text": (text, ("128",)),
}
"""Each task's generator and its kinds."""


def make_cases(
    tokenizer: Any, texts: Sequence[str], tasks: Sequence[str], lengths: Sequence[int], depths: int, seed: int
) -> list[Case]:
    """One case per task, length and depth; kinds go round.

    Args:
        lengths: tokens in front of the question, exactly.
        depths: how many places, evenly spread in (0, 1): (i + 1/2) / depths.
    """
    haystack, cases = Haystack(tokenizer, texts, seed), []
    for task in tasks:
        make, kinds = TASKS[task]
        index = 0
        for length in lengths:
            for i in range(depths):
                cases.append(make(haystack, length, (i + 0.5) / depths, index, kinds[index % len(kinds)]))
                index += 1
    return cases


def found(generated: str, answer: str) -> bool:
    """Whether the answer stands in the generated text; a number not as a part of a longer one."""
    if answer.isdigit():
        return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", generated.replace(",", "")) is not None
    return answer.lower() in generated.lower()


def score(case: Case, generated: str) -> float:
    """Share of the answers that were found."""
    return sum(found(generated, answer) for answer in case.answers) / max(1, len(case.answers))
