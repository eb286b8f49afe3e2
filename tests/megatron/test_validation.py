"""What the HTTP server lets through to Megatron, and what it refuses with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_patch.validation import NEUTRAL, BadRequest, Limits, check, decode, sequences

LIMITS = Limits("tiny", context_length=32, vocab_size=100, longest_token=1)


class Tokenizer:
    """One token per character."""

    has_chat_template = True

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % 100 for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        if messages[0]["role"] == "tool":
            raise TypeError("tool messages are unknown")
        return [1] * sum(len(m["content"]) for m in messages)


def completion(**body: Any) -> dict[str, Any]:
    return check({"prompt": "abc", **body}, False, Tokenizer(), LIMITS)


def chat(**body: Any) -> dict[str, Any]:
    return check({"messages": [{"role": "user", "content": "abc"}], **body}, True, Tokenizer(), LIMITS)


def test_prompts_become_tokens() -> None:
    assert completion()["prompt"] == [[97, 98, 99]]
    assert completion(prompt=["a", "bc"])["prompt"] == [[97], [98, 99]]
    assert completion(prompt=[1, 2])["prompt"] == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]])["prompt"] == [[1], [2, 3]]
    assert completion(echo=True)["prompt"] == "abc"


def test_the_body_is_not_changed() -> None:
    body = {"prompt": "abc", "temperature": 0}
    check(body, False, Tokenizer(), LIMITS)
    assert body == {"prompt": "abc", "temperature": 0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1.0, 0, 0.0)),
        ({"top_k": 5}, (1.0, 5, 0.0)),  # Megatron asserts that not both are set, and its top_p is 1 by default
        ({"top_p": 0.9}, (1.0, 0, 0.9)),
        ({"temperature": 0}, (0.0, 0, 0.0)),
        ({"temperature": 1e-9}, (0.0, 0, 0.0)),  # logits / 1e-9 overflow
        ({"temperature": None, "top_p": None}, (1.0, 0, 0.0)),
    ],
)
def test_sampling_is_what_megatron_can_do(given: dict[str, Any], expected: tuple[float, int, float]) -> None:
    clean = completion(**given)
    assert (clean["temperature"], clean["top_k"], clean["top_p"]) == expected


def test_chat_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert chat(messages=[{"role": "user", "content": parts}])["messages"] == [{"role": "user", "content": "abc"}]


def test_the_newer_name_of_max_tokens() -> None:
    assert chat(max_completion_tokens=7)["max_tokens"] == 7
    assert chat(max_completion_tokens=None, max_tokens=5)["max_tokens"] == 5
    assert chat(max_completion_tokens=5, max_tokens=5)["max_tokens"] == 5
    with pytest.raises(BadRequest, match="max_tokens and max_completion_tokens differ"):
        chat(max_completion_tokens=7, max_tokens=5)


def test_neutral_values_of_what_megatron_ignores_pass() -> None:
    assert completion() == completion(
        stream=False, stop=None, presence_penalty=0.0, best_of=1, model="tiny", seed=None
    )
    assert completion() == completion(**{name: values[0] for name, values in NEUTRAL.items()})
    assert completion() == completion(whatever=None)


def test_notes_of_the_client_are_no_parameters() -> None:
    assert chat() == chat(user="me", metadata={"job": "7"}, store=True, service_tier="flex")


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 7},
        {"seed": 0},
        {"min_tokens": 5},
        {"ignore_eos": True},
        {"stop": ["\n"]},
        {"stop_token_ids": [7]},
        {"repetition_penalty": 1.1},
        {"length_penalty": 2},
        {"use_beam_search": True},
        {"min_p": 0.1},
        {"logit_bias": {"7": 100}},
        {"guided_json": {}},
        {"structured_outputs": {"regex": "a+"}},
        {"tools": [{}]},
        {"tool_choice": "required"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 3},
        {"skip_special_tokens": False},
        {"truncate_prompt_tokens": 10},
        {"prompt_logprobs": 0},
        {"chat_template": "{{ messages }}"},
        {"add_generation_prompt": False},
        {"stream_options": {"include_usage": True}},
        {"no_such_thing": 0},
        {"max_token": 5},
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
def test_what_megatron_would_ignore_is_refused_by_name(ask: Any, asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(
        BadRequest, match=f"^{name} is not supported by Megatron Core's server; leave it out"
    ) as caught:
        ask(**asked)
    assert (caught.value.param, caught.value.status) == (name, 400)


def test_fields_of_the_other_endpoint_are_refused() -> None:
    with pytest.raises(BadRequest, match="messages is not supported"):
        completion(messages=[])
    with pytest.raises(BadRequest, match="prompt is not supported"):
        chat(prompt="a")
    with pytest.raises(BadRequest, match="echo is not supported"):
        chat(echo=True)


def test_a_misspelt_field_is_told_the_right_one() -> None:
    with pytest.raises(BadRequest, match=r"temprature is not supported .* \(do you mean temperature\?\)"):
        completion(temprature=0)


def test_what_a_message_has_beside_its_text_is_refused() -> None:
    message = {"role": "user", "content": "abc"}
    assert chat(messages=[{**message, "refusal": None, "tool_calls": []}]) == chat()
    for name in ("name", "tool_calls", "tool_call_id"):
        with pytest.raises(BadRequest, match=rf"messages\[0\].{name} is not supported"):
            chat(messages=[{**message, name: "x"}])


@pytest.mark.parametrize("model", ["other", ""])
def test_another_model_does_not_exist(model: str) -> None:
    with pytest.raises(BadRequest, match=f"the model '{model}' does not exist; this server has 'tiny'") as caught:
        completion(model=model)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_a_model_must_be_a_string() -> None:
    with pytest.raises(BadRequest, match="model must be a string, not a number"):
        completion(model=5)


class Untouched(Tokenizer):
    """May not be asked for anything."""

    def tokenize(self, text: str) -> list[int]:
        raise AssertionError(f"{len(text)} characters were tokenized")

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        raise AssertionError("messages were tokenized")


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    assert LIMITS.characters == 32 * 16
    long = "x" * 513
    said = "has 513 characters; the context is 32 tokens, which stand for at most 512 characters: shorten it"
    for body in ({"prompt": long}, {"prompt": ["a", long]}, {"prompt": long, "echo": True}):
        with pytest.raises(BadRequest, match=f"prompt {said}"):
            check(body, False, Untouched(), LIMITS)
    halves = [{"role": "user", "content": "x" * 300}, {"role": "user", "content": "x" * 205}]
    with pytest.raises(BadRequest, match=f"messages {said}"):
        check({"messages": halves}, True, Untouched(), LIMITS)
    with pytest.raises(BadRequest, match="65 prompts in one request"):
        check({"prompt": ["a"] * 65}, False, Untouched(), LIMITS)


def test_limits_follow_from_the_context_and_the_tokenizer() -> None:
    limits = Limits("m", context_length=131072, vocab_size=100, longest_token=40)
    assert limits.characters == 131072 * 40
    assert limits.body_bytes == 2**20 + 32 * 131072
    assert len(json.dumps({"prompt": [[151935] * 131000], "max_tokens": 16})) < limits.body_bytes


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "\ud800"}', "prompt"),
        (b'{"prompt": "\xed\xa0\x80"}', "prompt"),  # the same, encoded as no encoder may
        (rb'{"prompt": ["a", "b\udfffc"]}', "prompt"),
        (rb'{"messages": [{"role": "user", "content": "\ud83d \ude00"}]}', "messages"),
        (rb'{"messages": [{"role": "\ud800", "content": "a"}]}', "messages"),
        (rb'{"metadata": {"a": {"b": ["\udc00"]}}}', "metadata"),
        (rb'{"metadata": {"\udc00": 1}}', "metadata"),
        (rb'{"user": "\ud800"}', "user"),
        (rb'{"\ud800": 1}', None),
        (rb'["\ud800"]', None),
        (b'{"metadata": ' + b"[" * 400 + rb'"\ud800"' + b"]" * 400 + b"}", "metadata"),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(body: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest, match=r"half of a surrogate pair, '\\u[0-9a-f]{4}', at \d") as caught:
        decode(body)
    assert caught.value.param == param
    str(caught.value).encode()  # it can be sent


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert decode(rb'{"prompt": "\ud83d\ude00"}') == {"prompt": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b"1" * 5000])
def test_what_is_not_json_says_so(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"the body is (not JSON|nested too deeply)"):
        decode(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"temperature": 10**400}, "temperature is a number of about 401 digits"),
        ({"temperature": float("inf")}, "temperature is inf; it must be from 0 to 100"),
        ({"top_k": 10**400}, "top_k is a number of about 401 digits"),
        ({"prompt": [10**400]}, "is not in the vocabulary"),
        ({"temperature": "x" * 10**6}, "temperature must be a number"),
        ({"max_tokens": json.loads("[" * 900 + "]" * 900)}, "max_tokens must be a whole number"),
        ({"x" * 10**6: 1}, "is not supported"),
        ({"model": "x" * 10**6}, "does not exist"),
    ],
)
def test_what_is_wrong_is_repeated_only_in_part(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**body)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_sequences_of_a_request() -> None:
    assert sequences(completion()) == 1
    assert sequences(completion(prompt=["a", "bc"])) == 2
    assert sequences(completion(prompt=[[1], [2], [3]])) == 3
    assert sequences(completion(prompt=[1, 2])) == 1
    assert sequences(completion(prompt=[1, 2], echo=True)) == 1
    assert sequences(completion(prompt=["a", "bc"], echo=True)) == 2
    assert sequences(chat(n=5)) == 5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": ""}, "prompt is missing or empty"),
        ({"prompt": None}, "prompt is missing or empty"),
        ({"prompt": 7}, "not a number"),
        ({"prompt": {}}, "not an object"),
        ({"prompt": ["a", 1]}, "prompt mixes types"),
        ({"prompt": [True]}, "prompt mixes types"),
        ({"prompt": [1, 100]}, "token id 100 is not in the vocabulary (0 to 99)"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": ["a", ""]}, "the prompt has no tokens"),
        ({"prompt": [[]]}, "the prompt has no tokens"),
        ({"prompt": ["a"] * 65}, "at most 64"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
        ({"max_tokens": 2.5}, "whole number"),
        ({"max_tokens": True}, "whole number"),
        ({"max_tokens": 30}, "the prompt has 3 tokens and max_tokens is 30, 33 in all; the context is 32 tokens"),
        ({"prompt": "x" * 40}, "the prompt has 40 tokens and max_tokens is 16"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature is -1; it must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0}, "above 0"),
        ({"top_k": 100}, "top_k is 100; it must be from 0 to 99"),
        ({"top_k": 5, "top_p": 0.5}, "cannot both be set"),
        ({"n": 2}, "repeat the prompt"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"echo": "yes"}, "echo must be true or false"),
        ({"stream": True}, "stream is not supported by Megatron Core's server"),
        ({"stop": ["\n"]}, "stop is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    ],
)
def test_a_bad_completion_is_refused_with_a_reason(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**body)
    assert words in str(caught.value)
    assert caught.value.param in {*body, "prompt", "max_tokens"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": None}, "messages must be a list"),
        ({"messages": []}, "at least one"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": ["hello"]}, "messages[0] must be an object"),
        ({"messages": [{"content": "a"}]}, "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string, not null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "refuses these messages: tool messages are unknown"),
        ({"messages": [{"role": "user", "content": "x" * 40}]}, "the prompt has 40 tokens"),
        ({"logprobs": True}, "use /v1/completions"),
        ({"n": 0}, "n is 0"),
        ({"tools": [{}]}, "tools is not supported"),
    ],
)
def test_a_bad_chat_is_refused_with_a_reason(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**body)
    assert words in str(caught.value)


@pytest.mark.parametrize("body", [[], "text", 3, None, True])
def test_a_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(BadRequest, match="the body must be a JSON object"):
        check(body, False, Tokenizer(), LIMITS)


def test_a_tokenizer_without_a_template_has_no_chat() -> None:
    tokenizer = Tokenizer()
    tokenizer.has_chat_template = False
    with pytest.raises(BadRequest, match="no chat template"):
        check({"messages": [{"role": "user", "content": "a"}]}, True, tokenizer, LIMITS)


def test_a_field_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BadRequest, match="prompt is there twice; leave one out"):
        decode(b'{"prompt": "a", "prompt": "b"}')
