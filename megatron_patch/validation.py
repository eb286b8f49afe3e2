"""Requests to the HTTP server, checked before they reach Megatron.

Megatron's engine answers many a bad request with a failed assertion, which ends the engine and with
it the service for everybody. Whatever passes here is safe.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pikv_ds import checks
from pikv_ds.checks import shown
from pikv_ds.errors import UsageError

DEFAULT_MAX_TOKENS = 16
"""Megatron's own, and that of OpenAI's completions."""

LEAST_TEMPERATURE = 0.01
MOST_LOGPROBS = 20
MOST_CHOICES = 64
"""Prompts or choices of one request."""

LEAST_BODY_BYTES = 2**20
BODY_BYTES_PER_TOKEN = 32
"""Of a token's place in the context: four times what a token id takes in JSON, seven times what English text does."""

LEAST_CHARACTERS_PER_TOKEN = 16
"""A tokenizer of short words may drop the spaces between them, and has one token for every word that it lacks."""

READ = ("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "logprobs")
READ_OF_COMPLETIONS = (*READ, "prompt", "echo")
READ_OF_CHATS = (*READ, "messages")
"""What the endpoints do something with; the rest of a body is in one of the tables below, or refused."""

SAYS_NOTHING_OF_THE_ANSWER = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Notes for the books of who runs the service: they may be there, and are not looked at."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "bad_words": ([],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "suffix": ("",),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
}
"""Parameters of OpenAI's and vLLM's that Megatron's endpoints do not read, and the values that ask for what they do
anyway. Any other value is refused: an answer that silently lacks what was asked for would be worse. ``null`` asks for
nothing, whatever the parameter. What is not listed (``seed``, ``guided_json``, a misspelling, …) is always refused."""

NEUTRAL_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,)}
NEUTRAL_IN_CHATS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
}

READ_OF_MESSAGES = ("role", "content")
NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],)}


class BadRequest(ValueError):
    """A request that cannot be served as it is; the message is for its sender.

    Attributes:
        param: the field of the body that is wrong, None for the body itself.
        status: of HTTP.
        code: OpenAI's word for the reason, where it has one that clients look at.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Limits:
    """What the server can take.

    Args:
        model: name that it is served under.
        context_length: tokens of one sequence, prompt and answer.
        vocab_size: token ids are below it.
        longest_token: most characters of text that one token stands for.
    """

    model: str
    context_length: int
    vocab_size: int
    longest_token: int

    @property
    def characters(self) -> int:
        """A longer text has more tokens than the context, unless the tokenizer drops most of it."""
        return self.context_length * max(self.longest_token, LEAST_CHARACTERS_PER_TOKEN)

    @property
    def body_bytes(self) -> int:
        """Most of a request's body, all its prompts together."""
        return LEAST_BODY_BYTES + BODY_BYTES_PER_TOKEN * self.context_length


def decode(data: bytes) -> Any:
    """The JSON of a body.

    Raises:
        BadRequest: it is none, or some string in it is not text.
    """
    try:
        body = checks.parse_json(data.decode("utf-8", "surrogatepass"))  # halves of a pair are named below
    except (UsageError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error}") from None
    _refuse_lone_surrogates(body)
    return body


def _refuse_lone_surrogates(body: Any) -> None:
    r"""JSON may hold halves of a character (``"\ud800"``), which no tokenizer takes and no answer can repeat."""
    rest: list[tuple[str, str | None, Any]] = [("the body", None, body)]  # where, in which field, what
    while rest:  # not by recursion: JSON may be nested as deeply as Python's stack allows
        where, param, value = rest.pop()
        where = where if len(where) < 100 else f"{where[:80]}…"
        if isinstance(value, str):
            _refuse_lone_surrogate(value, where, param)
        elif isinstance(value, dict):
            for name, inner in value.items():
                _refuse_lone_surrogate(name, f"a name in {where}", param)
                rest.append((name if param is None else f"{where}.{name}", param or name, inner))
        elif isinstance(value, list):
            inner_ones = ((i, inner) for i, inner in enumerate(value) if isinstance(inner, str | dict | list))
            rest.extend((f"{where}[{i}]", param, inner) for i, inner in inner_ones)


def _refuse_lone_surrogate(text: str, where: str, param: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise BadRequest(f"{where} is no text: half of a surrogate pair, {half}, at {error.start}", param) from None


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
    clean = {name: value for name, value in body.items() if value is not None}
    _fields(clean, chat)
    _model(clean, limits)
    if "max_completion_tokens" in clean:  # chat's newer name
        newer = clean.pop("max_completion_tokens")
        if clean.setdefault("max_tokens", newer) != newer:
            raise BadRequest("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    count = _integer(clean, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    _sampling(clean, limits)
    choices = _integer(clean, "n", 1, 1, MOST_CHOICES)
    if not isinstance(clean.get("echo") or False, bool):
        raise BadRequest(f"echo must be true or false, not {shown(clean['echo'])}", "echo")
    if chat:
        clean["messages"] = _messages(clean.get("messages"))
        if clean.get("logprobs"):  # Megatron asks for the prompt's, which the engine does not keep
            raise BadRequest(
                "logprobs are not supported by Megatron Core's chat endpoint; use /v1/completions", "logprobs"
            )
        clean["logprobs"] = False
        if not tokenizer.has_chat_template:
            raise BadRequest("the model's tokenizer has no chat template: use /v1/completions", "messages")
        characters = sum(len(text) for message in clean["messages"] for text in message.values())
        _refuse_too_long(characters, "messages", limits)
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


def sequences(clean: Mapping[str, Any]) -> int:
    """How many sequences a request makes of the engine: one for each prompt or choice; `clean` is from `check`."""
    prompt = clean.get("prompt", "")
    return len(prompt) if isinstance(prompt, list) and not _is_int(prompt[0]) else int(clean["n"])


def _fields(clean: dict[str, Any], chat: bool) -> None:
    """Refuses what the endpoint would ignore, and drops what asks for nothing."""
    read = READ_OF_CHATS if chat else READ_OF_COMPLETIONS
    neutral = NEUTRAL | (NEUTRAL_IN_CHATS if chat else NEUTRAL_IN_COMPLETIONS)
    for name in [name for name in clean if name not in read]:
        value = clean.pop(name)
        if name in SAYS_NOTHING_OF_THE_ANSWER or any(value == asks_nothing for asks_nothing in neutral.get(name, ())):
            continue
        name = name[:60]
        meant = difflib.get_close_matches(name, read, 1, 0.8) if name not in neutral else []
        raise _not_supported(name, name, f" (do you mean {meant[0]}?)" if meant else "")


def _not_supported(what: str, param: str, hint: str = "") -> BadRequest:
    return BadRequest(f"{what} is not supported by Megatron Core's server; leave it out{hint}", param)


def _model(clean: dict[str, Any], limits: Limits) -> None:
    model = clean.pop("model", limits.model)
    if not isinstance(model, str):
        raise BadRequest(f"model must be a string, not {_kind(model)}", "model")
    if model != limits.model:
        raise BadRequest(
            f"the model {shown(model)} does not exist; this server has {limits.model!r}",
            "model",
            status=404,
            code="model_not_found",
        )


def _refuse_too_long(characters: int, field: str, limits: Limits) -> None:
    """Refuses a text that cannot fit, before any time goes into its tokens."""
    if characters > limits.characters:
        raise BadRequest(
            f"{field} has {characters} characters; the context is {limits.context_length} tokens, "
            f"which stand for at most {limits.characters} characters: shorten it",
            field,
        )


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
        for name, value in message.items():
            if name not in READ_OF_MESSAGES and value is not None and value not in NEUTRAL_IN_MESSAGES.get(name, ()):
                raise _not_supported(f"messages[{i}].{name[:60]}", "messages")
        clean.append({"role": message["role"], "content": content})
    return clean


def _prompts(prompt: Any, tokenizer: Any, limits: Limits) -> list[list[int]]:
    """Token ids of each prompt of a text, a list of texts, token ids or a list of those."""
    if prompt is None or prompt == "" or prompt == []:
        raise BadRequest("prompt is missing or empty", "prompt")
    if not isinstance(prompt, str | list):
        raise BadRequest(f"prompt must be text, token ids or a list of such, not {_kind(prompt)}", "prompt")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else prompt
    if all(_is_int(p) for p in prompts):
        prompts = [prompts]
    if len(prompts) > MOST_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts in one request; send at most {MOST_CHOICES}", "prompt")
    if all(isinstance(p, str) for p in prompts):
        for text in prompts:
            _refuse_too_long(len(text), "prompt", limits)
        return [tokenizer.tokenize(text) for text in prompts]
    if not all(isinstance(p, list) and all(_is_int(i) for i in p) for p in prompts):
        raise BadRequest("prompt mixes types; give strings, token ids or lists of token ids", "prompt")
    for i in (i for ids in prompts for i in ids):
        if not 0 <= i < limits.vocab_size:
            raise BadRequest(f"token id {shown(i)} is not in the vocabulary (0 to {limits.vocab_size - 1})", "prompt")
    return prompts


def _integer(clean: dict[str, Any], name: str, default: int, least: int, most: int | None = None) -> int:
    value = clean.get(name)
    value = default if value is None else value
    if not _is_int(value):
        raise BadRequest(f"{name} must be a whole number, not {shown(value)}", name)
    if value < least or (most is not None and value > most):
        raise BadRequest(f"{name} is {shown(value)}; it must be {_range(least, most)}", name)
    clean[name] = value
    return int(value)


def _number(clean: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = clean.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise BadRequest(f"{name} must be a number, not {shown(value)}", name)
    if not least <= value <= most:  # infinities, too
        raise BadRequest(f"{name} is {shown(value)}; it must be {_range(least, most)}", name)
    clean[name] = float(value)
    return float(value)


def _range(least: float, most: float | None) -> str:
    return f"at least {least:.15g}" if most is None else f"from {least:.15g} to {most:.15g}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
