"""Requests to the HTTP server, checked before they reach Megatron.

Megatron's engine answers many a bad request with a failed assertion, which ends the engine and with
it the service for everybody. Whatever passes here is safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_MAX_TOKENS = 16
"""Megatron's own, and that of OpenAI's completions."""

LEAST_TEMPERATURE = 0.01
MOST_LOGPROBS = 20
MOST_CHOICES = 64
"""Prompts or choices of one request."""

IGNORED_BY_MEGATRON: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "stop": (None, [], ""),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "response_format": (None, {"type": "text"}),
}
"""Parameters of OpenAI's that Megatron's endpoints do not read, and the values that ask for nothing.
Any other value is refused: an answer that silently lacks what was asked for would be worse."""


class BadRequest(ValueError):
    """A request that cannot be served as it is; the message is for its sender.

    Attributes:
        param: the field of the body that is wrong, None for the body itself.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Limits:
    """What the engine can take.

    Args:
        context_length: tokens of one sequence, prompt and answer.
        vocab_size: token ids are below it.
    """

    context_length: int
    vocab_size: int


def check(body: Any, chat: bool, tokenizer: Any, limits: Limits) -> dict[str, Any]:
    """The body of a completion request in the form that Megatron's endpoint reads.

    Args:
        body: decoded JSON; not changed.
        chat: of ``/v1/chat/completions``, with messages instead of a prompt.
        tokenizer: such as `tokenizer.HFTokenizer`.

    Raises:
        BadRequest: what is wrong, and in which field.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"the body must be a JSON object, not {_kind(body)}")
    for name, neutral in IGNORED_BY_MEGATRON.items():
        if body.get(name) not in neutral:
            raise BadRequest(f"{name} is not supported by Megatron Core's server; leave it out", name)
    clean = dict(body)
    if "max_completion_tokens" in clean:  # chat's newer name
        clean["max_tokens"] = clean.pop("max_completion_tokens")
    count = _integer(clean, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    _sampling(clean, limits)
    choices = _integer(clean, "n", 1, 1, MOST_CHOICES)
    if not isinstance(clean.get("echo") or False, bool):
        raise BadRequest(f"echo must be true or false, not {clean['echo']!r}", "echo")
    if chat:
        clean["messages"] = _messages(clean.get("messages"))
        if clean.get("logprobs"):  # Megatron asks for the prompt's, which the engine does not keep
            raise BadRequest("logprobs are not supported by Megatron Core's chat endpoint; use /v1/completions")
        clean["logprobs"] = False
        clean.pop("top_logprobs", None)
        if not tokenizer.has_chat_template:
            raise BadRequest("the model's tokenizer has no chat template: use /v1/completions", "messages")
        try:
            prompts = [tokenizer.apply_chat_template(clean["messages"], tokenize=True, add_generation_prompt=True)]
        except Exception as error:  # a template may refuse anything, such as two user messages in a row
            raise BadRequest(f"the model's chat template refuses these messages: {error}", "messages") from None
    else:
        if choices != 1:
            raise BadRequest("n is not supported by Megatron Core's completions; repeat the prompt in a list", "n")
        if clean.get("logprobs") is not None:
            _integer(clean, "logprobs", 0, 0, min(MOST_LOGPROBS, limits.vocab_size))
            if clean.get("echo"):
                raise BadRequest("logprobs of the prompt (echo) are not kept by this server", "echo")
        prompts = _prompts(clean.get("prompt"), tokenizer, limits)
        if not clean.get("echo"):  # the tokens are known now; text is needed to repeat it
            clean["prompt"] = prompts
    for ids in prompts:
        if not ids:
            raise BadRequest("the prompt has no tokens", "messages" if chat else "prompt")
        if len(ids) + count > limits.context_length:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens and max_tokens is {count}, {len(ids) + count} in all; "
                f"the context is {limits.context_length} tokens: shorten the prompt or lower max_tokens",
                "messages" if chat else "prompt",
            )
    return clean


def _sampling(clean: dict[str, Any], limits: Limits) -> None:
    """Temperature, top-p and top-k; Megatron samples by one of the latter two.

    A temperature so low that logits divided by it overflow means greedy, as 0 does.
    """
    if _number(clean, "temperature", 1.0, 0.0, 100.0) < LEAST_TEMPERATURE:
        clean["temperature"] = 0.0
    top_p = _number(clean, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise BadRequest("top_p is 0; it must be above 0 and at most 1", "top_p")
    top_k = _integer(clean, "top_k", 0, 0, limits.vocab_size - 1)
    if top_k and top_p < 1:
        raise BadRequest("top_k and top_p cannot both be set: Megatron Core samples by one of them", "top_k")
    if top_p == 1:
        clean["top_p"] = 0.0  # Megatron's word for no limit that goes with a top_k


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    clean = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRequest(f'messages[{i}] must be an object with a "role" and a "content"', "messages")
        content = message.get("content")
        if isinstance(content, list):  # parts; only text ones
            if not all(
                isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise BadRequest(f"messages[{i}].content: this model reads text only", "messages")
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str):
            raise BadRequest(f"messages[{i}].content must be a string, not {_kind(content)}", "messages")
        clean.append({"role": message["role"], "content": content})
    return clean


def _prompts(prompt: Any, tokenizer: Any, limits: Limits) -> list[list[int]]:
    """Token ids of each prompt of a text, a list of texts, token ids or a list of those."""
    if prompt is None or prompt == "" or prompt == []:
        raise BadRequest("prompt is missing or empty", "prompt")
    if isinstance(prompt, str):
        return [tokenizer.tokenize(prompt)]
    if not isinstance(prompt, list):
        raise BadRequest(f"prompt must be text, token ids or a list of such, not {_kind(prompt)}", "prompt")
    if all(isinstance(p, str) for p in prompt):
        ids = [tokenizer.tokenize(p) for p in prompt]
    elif all(_is_int(p) for p in prompt):
        ids = [prompt]
    elif all(isinstance(p, list) and all(_is_int(i) for i in p) for p in prompt):
        ids = prompt
    else:
        raise BadRequest("prompt mixes types; give strings, token ids or lists of token ids", "prompt")
    if len(ids) > MOST_CHOICES:
        raise BadRequest(f"{len(ids)} prompts in one request; send at most {MOST_CHOICES}", "prompt")
    for i in (i for sequence in ids for i in sequence):
        if not 0 <= i < limits.vocab_size:
            raise BadRequest(f"token id {i} is not in the vocabulary (0 to {limits.vocab_size - 1})", "prompt")
    return ids


def _integer(clean: dict[str, Any], name: str, default: int, least: int, most: int | None = None) -> int:
    value = clean.get(name)
    value = default if value is None else value
    if not _is_int(value):
        raise BadRequest(f"{name} must be a whole number, not {value!r}", name)
    if value < least or (most is not None and value > most):
        raise BadRequest(f"{name} is {value}; it must be {_range(least, most)}", name)
    clean[name] = value
    return int(value)


def _number(clean: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = clean.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRequest(f"{name} must be a number, not {value!r}", name)
    if not least <= value <= most:
        raise BadRequest(f"{name} is {value:g}; it must be {_range(least, most)}", name)
    clean[name] = float(value)
    return float(value)


def _range(least: float, most: float | None) -> str:
    return f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
