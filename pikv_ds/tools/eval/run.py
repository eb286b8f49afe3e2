"""Asks every method every question."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pikv_ds import checks
from pikv_ds.errors import UsageError
from pikv_ds.integrations.hf.cache import CACHE
from pikv_ds.tools.eval import tasks
from pikv_ds.tools.eval.methods import Full, Method, Prepared
from pikv_ds.tools.eval.snapshot import Snapshot, take

TEXT_CHUNK = 16
"""Tokens of a *text* case that are predicted in one pass."""


@dataclass
class Outcome:
    """One method on one case."""

    case: str
    task: str
    context_tokens: int
    method: str
    family: str
    score: float | None
    """Share of the answers found; None for *text*."""
    same_tokens: bool
    """Whether every token (for *text*, every best guess) is that of the full cache."""
    bytes_per_token: float
    full_bytes_per_token: float
    seconds_per_token: float
    loss: float | None = None
    """Mean negative log-likelihood of a *text*'s tokens, nats."""
    divergence: float | None = None
    """Mean KL divergence from the full cache's predictions, nats."""
    agreement: float | None = None
    """Share of best guesses that are the full cache's."""


@dataclass
class Answer:
    tokens: list[int]
    logits: Tensor
    """``[T, vocabulary]`` float32, of *text* only."""
    seconds: float
    """Per decoded token."""
    num_bytes: int


@torch.inference_mode()
def ask(model: PreTrainedModel, case: tasks.Case, prepared: Prepared) -> Answer:
    """Goes on from a compressed context: the question, then greedy decoding; or the text's next tokens."""
    at = case.context_tokens

    def forward(ids: Sequence[int], last: bool) -> Tensor:
        nonlocal at
        kwargs: dict[str, Any] = {}
        if prepared.positions:
            kwargs["position_ids"] = torch.arange(at, at + len(ids))[None]
        at += len(ids)
        out = model(
            torch.tensor([list(ids)]),
            use_cache=True,
            logits_to_keep=int(last),
            **{CACHE: prepared.cache, **kwargs},
        )
        return out.logits[0].float()

    if not case.answers:
        pieces = []
        chunk = 1 if prepared.ragged else TEXT_CHUNK
        for start in range(0, len(case.question_ids), chunk):
            pieces.append(forward(case.question_ids[start : start + chunk], last=False))
        logits = torch.cat(pieces)
        return Answer(logits.argmax(-1).tolist(), logits, 0.0, prepared.nbytes())
    question = case.question_ids
    while prepared.ragged and len(question) > 1:  # a mask is of one length
        forward(question[:1], last=True)
        question = question[1:]
    token = int(forward(question, last=True)[-1].argmax())
    tokens, times = [token], []
    for _ in range(case.new_tokens - 1):
        started = time.perf_counter()
        token = int(forward([token], last=True)[-1].argmax())
        times.append(time.perf_counter() - started)
        tokens.append(token)
    return Answer(tokens, torch.empty(0), sorted(times)[len(times) // 2], prepared.nbytes())


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    cases: Sequence[tasks.Case],
    methods: Sequence[Method],
    done: dict[tuple[str, str], Outcome],
    save: Callable[[], None],
    step: Callable[[str], None],
) -> None:
    """Fills `done`, by (case, method); what is in it already is not run again.

    Args:
        save: called after every case.
        step: called after every method with what was done.
    """
    for case in cases:
        missing = [m for m in methods if (case.key, m.name) not in done]
        if not missing:
            for m in methods:
                step(m.name)
            continue
        snapshot = take(model, torch.tensor([case.context_ids]))
        full = answer(model, case, Full(), snapshot)
        for method in methods:
            if method in missing:
                got = full if isinstance(method, Full) else answer(model, case, method, snapshot)
                done[case.key, method.name] = outcome(tokenizer, case, method, got, full)
            step(method.name)
        save()


def answer(model: PreTrainedModel, case: tasks.Case, method: Method, snapshot: Snapshot) -> Answer:
    """One method's answer to one case."""
    with torch.inference_mode(), method.open(model, snapshot) as prepared:
        return ask(model, case, prepared)


def outcome(tokenizer: Any, case: tasks.Case, method: Method, got: Answer, full: Answer) -> Outcome:
    """What is noted of an answer."""
    total = case.context_tokens + len(case.question_ids) + max(0, case.new_tokens - 1)
    out = Outcome(
        case.key,
        case.task,
        case.context_tokens,
        method.name,
        method.family,
        tasks.score(case, tokenizer.decode(got.tokens)) if case.answers else None,
        got.tokens == full.tokens,
        got.num_bytes / total,
        full.num_bytes / total,
        got.seconds,
    )
    if not case.answers:  # logits of position i predict token i + 1
        mine, theirs = got.logits.log_softmax(-1), full.logits.log_softmax(-1)
        targets = torch.tensor(case.question_ids[1:])
        out.loss = float(-mine[:-1].gather(1, targets[:, None]).mean())
        out.divergence = float((theirs.exp() * (theirs - mine)).sum(-1).mean())
        out.agreement = float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
    return out


def read(path: Path) -> tuple[dict[tuple[str, str], Outcome], dict[str, Any]]:
    """Outcomes of a run, and its settings.

    Raises:
        ValueError: the file is none of `pikv eval`'s.
    """
    try:
        content = checks.read_json(path)
        return {(o["case"], o["method"]): Outcome(**o) for o in content["outcomes"]}, dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--json {path}: no results of `pikv eval` ({checks.one_line(error)}); name another file"
        ) from None


def load(path: Path, settings: dict[str, Any]) -> tuple[dict[tuple[str, str], Outcome], dict[str, Any]]:
    """Outcomes of an earlier run with the same settings, and the settings of both: more methods may join.

    Args:
        settings: all that decides over the outcomes; ``methods`` has the configurations by name.

    Raises:
        ValueError: the file is of another run.
    """
    if not path.exists():
        return {}, settings
    done, theirs = read(path)
    old = theirs.get("methods", {})
    methods = {**old, **settings["methods"]}
    there, here = {**theirs, "methods": {**methods, **old}}, {**settings, "methods": methods}
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            values = f"{checks.shown(there.get(key))} there, {checks.shown(here.get(key))} here"
            raise UsageError(
                f"--json {path}: holds results of other settings ({key}: {values}); name another file, or leave out "
                "--resume"
            )
    return done, here


def dump(path: Path, settings: dict[str, Any], done: dict[tuple[str, str], Outcome], extra: dict[str, Any]) -> None:
    """Writes all outcomes, by way of a second file, so that an interrupted run leaves a whole one."""
    head = json.dumps({"settings": settings, **extra, "outcomes": []}).removesuffix("]}")
    lines = ",\n".join(json.dumps(_written(o)) for o in done.values())  # a line each: small, and to be compared
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(f"{head}\n{lines}\n]}}\n")
    partial.replace(path)


def _written(outcome: Outcome) -> dict[str, Any]:
    """An outcome without what only *text* has, where it has it not."""
    return {k: v for k, v in asdict(outcome).items() if v is not None or k == "score"}
