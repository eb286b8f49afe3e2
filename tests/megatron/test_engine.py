"""Megatron's engines on a CPU give the tokens of a model without any cache, on one rank and on two."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

import tiny_megatron
from harness import Ranks, ranks_fixture

from megatron_patch import engine
from megatron_patch.tokenizer import HFTokenizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model lives on a CPU")
ranks = ranks_fixture(2, "megatron")

PROMPTS = ("the old whale", " ".join(tiny_megatron.WORDS * 6), "a")  # 3, 84 and 1 token(s)
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_megatron.save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HFTokenizer:
    return HFTokenizer.load(str(folder), tiny_megatron.VOCAB)


@pytest.fixture(scope="module")
def model() -> Any:
    tiny_megatron.initialize()
    return tiny_megatron.build()


def sampling(count: int = COUNT) -> Any:
    return engine.greedy(count)


def dynamic(
    model: Any, tokenizer: Any, prompts: tuple[str, ...], count: int = COUNT, **kwargs: Any
) -> list[list[int]]:
    settings = {"max_requests": 4, "max_tokens": 256, "context_length": 128, **kwargs}
    records = tiny_megatron.dynamic_engine(model, tokenizer, **settings).generate(list(prompts), sampling(count))
    return [list(record.merge().generated_tokens) for record in records]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="usual"),
        pytest.param({"max_tokens": 64}, id="a prompt in chunks"),
        pytest.param({"max_requests": 1}, id="one after the other"),
    ],
)
def test_the_dynamic_engine_equals_a_model_without_cache(
    model: Any, tokenizer: HFTokenizer, settings: dict[str, Any]
) -> None:
    expected = [tiny_megatron.greedy(model, tokenizer.tokenize(p), COUNT) for p in PROMPTS]
    assert dynamic(model, tokenizer, PROMPTS, **settings) == expected


def test_a_request_that_is_evicted_and_resumed_loses_no_token(model: Any, tokenizer: HFTokenizer) -> None:
    prompts = ("the old whale said it was a ship", "the sea was old and it was in the night on")
    expected = [tiny_megatron.greedy(model, tokenizer.tokenize(p), 40) for p in prompts]
    block = engine.kv_bytes_per_token(model.config) * tiny_megatron.BLOCK_TOKENS
    served = tiny_megatron.dynamic_engine(
        model,
        tokenizer,
        max_requests=4,
        max_tokens=64,
        context_length=64,
        buffer_gib=5.5 * block / 2**30,  # of the 7 or 8 blocks that both need
    )
    records = served.generate(list(prompts), sampling(40))
    assert [list(r.merge().generated_tokens) for r in records] == expected
    assert served.evicted_request_count > 0


def test_a_buffer_that_is_too_small_for_a_sequence_is_refused(model: Any, tokenizer: HFTokenizer) -> None:
    with pytest.raises(ValueError, match=r"cannot hold one sequence of 4096 tokens: use at least"):
        engine.dynamic_engine(model, tokenizer, max_requests=1, max_tokens=64, context_length=4096, buffer_gib=1e-5)


def test_the_static_engine_equals_a_model_without_cache(model: Any, tokenizer: HFTokenizer) -> None:
    expected = [tiny_megatron.greedy(model, tokenizer.tokenize(p), COUNT) for p in PROMPTS]
    requests = tiny_megatron.static_engine(model, tokenizer).generate(
        prompts=list(PROMPTS), sampling_params=sampling()
    )
    assert [[int(i) for i in request.generated_tokens] for request in requests] == expected


def case_two_ranks(rank: int, folder: str) -> tuple[list[list[int]], list[list[int]]]:
    """Each rank has a prompt of its own; both take as many steps."""
    tiny_megatron.initialize()
    model = tiny_megatron.build()
    tokenizer = HFTokenizer.load(folder, tiny_megatron.VOCAB)
    mine = (PROMPTS[rank],)
    expected = [tiny_megatron.greedy(model, tokenizer.tokenize(p), COUNT) for p in mine]
    return dynamic(model, tokenizer, mine), expected


@pytest.mark.distributed
def test_two_ranks_with_different_prompts(ranks: Ranks, folder: Path, model: Any, tokenizer: HFTokenizer) -> None:
    alone = [tiny_megatron.greedy(model, tokenizer.tokenize(p), COUNT) for p in PROMPTS]
    for rank, (got, expected) in enumerate(ranks.run(case_two_ranks, folder=str(folder))):
        assert got == expected == [alone[rank]]


def test_the_tokenizer_speaks_megatrons_language(tokenizer: HFTokenizer) -> None:
    text = "the old whale"
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.offsets(ids, text) == [0, 3, 7]
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (1, None, tiny_megatron.VOCAB)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert tokenizer.detokenize(chat) == "user : the old whale assistant :"


def test_a_tokenizer_without_a_template_says_so(folder: Path) -> None:
    plain = HFTokenizer.load(str(folder))
    plain.hf.chat_template = None
    with pytest.raises(ValueError, match="use /v1/completions"):
        plain.apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("machines", [1, 2])
def test_megatrons_sockets_leave_the_machine_only_where_ranks_do(
    machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.inference import data_parallel_inference_coordinator
    from megatron.core.inference.engines import async_zmq_communicator, dynamic_engine

    from megatron_patch import coordinator

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // machines))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    coordinator.choose_addresses()
    asks = (data_parallel_inference_coordinator, async_zmq_communicator, dynamic_engine)
    assert {module.socket.gethostname() for module in asks} == {"127.0.0.1" if machines == 1 else "node7"}
    monkeypatch.undo()
    coordinator.choose_addresses()


def test_the_longest_token_of_a_tokenizer(tokenizer: HFTokenizer) -> None:
    assert tokenizer.longest_token == len("assistant")
