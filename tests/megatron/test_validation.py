"""What the HTTP server lets through to Megatron, and what it refuses with which words."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_patch.validation import BadRequest, Limits, check

LIMITS = Limits(context_length=32, vocab_size=100)


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


def test_neutral_values_of_what_megatron_ignores_pass() -> None:
    completion(stream=False, stop=None, presence_penalty=0.0, best_of=1, user="me", seed=7, model="any")


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
