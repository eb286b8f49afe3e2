"""The server end to end: two ranks, a small random model with PiKV, real HTTP, real signals."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("flask")
pytest.importorskip("hypercorn")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

import tiny_megatron

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model lives on a CPU"),
]

SCRIPT = Path(__file__).with_name("serve_tiny.py")
ROOT = SCRIPT.parents[2]
SECONDS = 60.0
CONTEXT = 200


class Server:
    """A server in processes of its own."""

    def __init__(self, folder: Path, *arguments: str, command: Sequence[str] = (str(SCRIPT),)) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self.output = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, *command, "--model", str(folder), "--port", "0", "--context-length", str(CONTEXT),
             *arguments],
            env=environment, stdout=self.output.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.url = ""

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", self.output.read_text())
            if found:
                self.url = found[0]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready:\n{self.output.read_text()}")

    def request(self, path: str, body: Any = None, timeout: float = SECONDS) -> tuple[int, Any]:
        """Status and answer, decoded where it is JSON; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        with contextlib.suppress(json.JSONDecodeError):
            return status, json.loads(text)
        return status, text

    def figures(self, name: str) -> dict[str, float]:
        """A gauge of every rank."""
        text = self.request("/metrics")[1]
        return {
            rank: float(value) for rank, value in re.findall(rf'^{name}{{rank="(\d)"}} (\S+)$', text, re.MULTILINE)
        }

    def counter(self, name: str) -> float:
        """A figure of the whole server."""
        found = re.search(rf"^{name} (\S+)$", self.request("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def connect(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), SECONDS)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        family = psutil.Process(self.process.pid).children()
        return next(p for p in family if p.environ().get("RANK") == str(number))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code; nothing of the job may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"left behind: {alive}"
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_megatron.save_tokenizer(path)
    (path / "config.json").write_text("{}")
    (path / "pikv.json").write_text(json.dumps({"page_size": 8, "capacity_tokens": 600, "timeout_s": 20}))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder, "--ranks", "2", "--pikv-config", str(folder / "pikv.json"), "--body-timeout", "4")
    try:
        made.wait_until_ready()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()


@pytest.fixture(scope="module")
def model() -> Any:
    tiny_megatron.initialize()
    return tiny_megatron.build()


def completion(server: Server, ids: list[int], count: int) -> tuple[int, Any]:
    return server.request("/v1/completions", {"prompt": ids, "max_tokens": count, "temperature": 0})


def text_of(folder: Path, ids: list[int]) -> str:
    from megatron_patch.tokenizer import HFTokenizer

    return HFTokenizer.load(str(folder), tiny_megatron.VOCAB).detokenize(ids)


def expected(model: Any, folder: Path, prompt: list[int], count: int) -> str:
    """What a model without any cache answers, up to the end-of-text token."""
    ids = tiny_megatron.greedy(model, prompt, count)
    return text_of(folder, ids[: ids.index(1) + 1] if 1 in ids else ids)


def test_completions_are_those_of_the_model(server: Server, model: Any, folder: Path) -> None:
    prompt = [(5 * i + 2) % 100 for i in range(70)]
    status, answer = completion(server, prompt, 30)
    assert status == 200
    assert answer["choices"][0]["text"] == expected(model, folder, prompt, 30)
    assert answer["usage"]["prompt_tokens"] == 70
    assert answer["usage"]["completion_tokens"] <= 30
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_log_probabilities_belong_to_the_tokens(server: Server) -> None:
    body = {"prompt": [[2, 3], [4]], "max_tokens": 6, "temperature": 0, "logprobs": 2}
    status, answer = server.request("/v1/completions", body)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        shown = choice["logprobs"]
        assert len(shown["tokens"]) == len(shown["token_logprobs"]) == len(shown["top_logprobs"]) > 0
        assert all(value <= 0 for value in shown["token_logprobs"])


def test_chat_goes_through_the_template(server: Server, model: Any, folder: Path) -> None:
    from megatron_patch.tokenizer import HFTokenizer

    messages = [{"role": "user", "content": "the old whale"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    status, answer = server.request("/v1/chat/completions", body)
    assert status == 200
    prompt = HFTokenizer.load(str(folder)).tokenize("user : the old whale assistant :")
    assert answer["choices"][0]["message"]["content"] == expected(model, folder, prompt, 8)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_many_clients_at_once_get_their_own_answers(server: Server, model: Any, folder: Path) -> None:
    prompts = [[(seed * i + seed) % 100 + 2 for i in range(5 + 9 * seed)] for seed in range(1, 13)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: completion(server, p, 12), prompts))
    assert [status for status, _ in answers] == [200] * len(prompts)
    for prompt, (_, answer) in zip(prompts, answers, strict=True):
        assert answer["choices"][0]["text"] == expected(model, folder, prompt, 12)


def test_the_official_client_chats(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "the old whale"}]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=5, temperature=0, user="me", metadata={"job": "7"}
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "said"}]
    client.chat.completions.create(model=model, messages=messages, max_completion_tokens=1)
    with pytest.raises(openai.BadRequestError, match="stream is not supported"):
        client.chat.completions.create(model=model, messages=messages, stream=True)
    with pytest.raises(openai.BadRequestError, match="seed is not supported") as refused:
        client.completions.create(model=model, prompt="the old whale", seed=7)
    assert refused.value.param == "seed"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist") as missing:
        client.completions.create(model="gpt-4", prompt="the old whale")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\xfa", "the body is not JSON"),
        (b"", "the body is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ([1], "the body must be a JSON object, not a list"),
        ({}, "prompt is missing or empty"),
        ({"prompt": {"a": 1}}, "prompt must be text, token ids or a list of such, not an object"),
        ({"prompt": [1, 10**6]}, "token id 1000000 is not in the vocabulary"),
        (rb'{"prompt": "\ud800"}', "prompt is no text: half of a surrogate pair"),
        ({"prompt": "a " * 2000}, "prompt has 4000 characters; the context is 200 tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens must be a whole number"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": [2] * 190, "max_tokens": 20}, "the prompt has 190 tokens and max_tokens is 20, 210 in all"),
    ],
)
def test_what_cannot_be_served_is_a_400_with_the_reason(server: Server, body: Any, words: str) -> None:
    before = server.counter("megatron:prompt_tokens_total")
    status, answer = server.request("/v1/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert server.counter("megatron:prompt_tokens_total") == before  # it did not reach the engine


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "FOO"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_method_that_a_path_does_not_have_is_a_405(server: Server, path: str, method: str) -> None:
    answer, body = exchange(server, method, path)
    assert answer.status == 405
    assert answer.getheader("allow") == "POST, OPTIONS"
    assert body == b"" if method == "HEAD" else f"has no {method}" in json.loads(body)["error"]["message"]


def test_pages_have_heads_and_options(server: Server) -> None:
    for path in ("/health", "/v1/health", "/v1/models", "/metrics"):
        head, body = exchange(server, "HEAD", path)
        assert (head.status, body) == (200, b"")
        assert int(head.getheader("content-length") or 0) > 10
        assert exchange(server, "POST", path)[0].getheader("allow") == "GET, HEAD, OPTIONS"
    for path, allow in (("/health", "GET, HEAD, OPTIONS"), ("/v1/completions", "POST, OPTIONS")):
        options, body = exchange(server, "OPTIONS", path)
        assert (options.status, body, options.getheader("allow")) == (200, b"", allow)


def test_a_connection_is_kept_for_the_next_request(server: Server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)
    connection.connect()
    used = connection.sock
    for method, path in (("GET", "/health"), ("HEAD", "/metrics"), ("PUT", "/health"), ("GET", "/v1/models")):
        connection.request(method, path)
        connection.getresponse().read()
    connection.request("POST", "/v1/completions", b"{}")
    assert connection.getresponse().status == 400
    assert connection.sock is used


def exchange(server: Server, method: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    """A request with any method, and its answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer, answer.read()


def answered(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer that comes on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(announce(68157440))
        status, _, answer = answered(connection)
    assert status == 413
    assert "the body has 68157440 bytes; at most 1054976 fit" in answer["error"]["message"]


def test_a_client_that_sends_all_of_a_large_body_sees_why_it_is_refused(server: Server) -> None:
    status, answer = server.request("/v1/completions", b'{"prompt": "' + b"a" * 65 * 2**20 + b'"}')
    assert (status, answer["error"]["code"]) == (413, 413)


def test_a_body_without_a_length_is_cut_off_at_the_limit(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(17):  # 1.06 MiB
            connection.sendall(chunk)
        status, _, answer = answered(connection)
    assert status == 413
    assert "the body has more than 1054976 bytes" in answer["error"]["message"]


def test_large_unfinished_bodies_cost_no_memory(server: Server, model: Any, folder: Path) -> None:
    """Twelve clients announce 64 MiB each, and send half of it whatever they are told."""
    front, answer = server.rank(0), expected(model, folder, [4, 5], 5)
    assert completion(server, [4, 5], 5)[1]["choices"][0]["text"] == answer
    before, most = front.memory_info().rss, 0
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(server.connect())
            connection.sendall(announce(64 * 2**20))
            for _ in range(32):
                connection.sendall(b"x" * 2**20)
                most = max(most, front.memory_info().rss)
            assert answered(connection)[0] == 413
        assert completion(server, [4, 5], 5)[1]["choices"][0]["text"] == answer
    assert most - before < 64 * 2**20  # of 384 MiB


def test_unfinished_bodies_keep_nobody_waiting(server: Server, model: Any, folder: Path) -> None:
    """200 clients send 0.9 MiB each of the 1 MiB that they announce, and 100 nothing of it."""
    front, answer = server.rank(0), expected(model, folder, [4, 5], 5)
    assert completion(server, [4, 5], 5)[1]["choices"][0]["text"] == answer
    threads = front.num_threads()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(300)]
        for i, connection in enumerate(connections):
            connection.sendall(announce(2**20) + (b"x" * (9 * 2**20 // 10) if i < 200 else b""))
        assert completion(server, [4, 5], 5)[1]["choices"][0]["text"] == answer
        assert front.num_threads() - threads < 20
        answers = [answered(connection) for connection in connections]
    assert {status for status, _, _ in answers} == {408}
    assert "0 bytes of 1048576 of the body had come when its time was up" in answers[299][2]["error"]["message"]


def announce(length: int) -> bytes:
    """The head of a completion request whose body is to come."""
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def readable(connections: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Those with something to read. Not by `select.select`: a test process may have more than 1,024 files open."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(seconds)]  # type: ignore[misc]


def test_a_full_queue_is_a_429_and_the_pages_answer_meanwhile(server: Server) -> None:
    """One rank stands still, so that all requests wait: 2 x 8 in the batches, 256 behind them, and 28 too many."""
    body = b'{"prompt": [5, 6, 7], "max_tokens": 2}'
    still = server.rank(1)
    with contextlib.ExitStack() as stack:
        still.suspend()
        stack.callback(still.resume)
        waiting = [stack.enter_context(server.connect()) for _ in range(300)]
        for connection in waiting:
            connection.sendall(announce(len(body)) + body)
        deadline, refused = time.monotonic() + SECONDS, []
        while len(refused) < 28 and time.monotonic() < deadline:
            refused = readable(waiting, 1)
        for path in ("/health", "/v1/models", "/metrics"):
            assert server.request(path, timeout=10)[0] == 200
        assert server.request("/v1/completions", b"{", timeout=10)[0] == 429
        assert len(readable(waiting, 0)) == 28  # nobody else has been answered
        for connection in refused:
            status, headers, answer = answered(connection)
            assert (status, headers["retry-after"]) == (429, "1")
            assert "272 sequences are in work or waiting" in answer["error"]["message"]
            assert answer["error"]["type"] == "rate_limit_error"
        still.resume()
        assert {answered(connection)[0] for connection in waiting if connection not in refused} == {200}


def test_everything_listens_on_loopback(server: Server) -> None:
    job = psutil.Process(server.process.pid)
    listening = {
        connection.laddr.ip
        for process in [job, *job.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_an_unknown_path_is_a_404_that_names_the_known_ones(server: Server) -> None:
    status, answer = server.request("/v2/nothing")
    assert status == 404
    assert "/v1/completions" in answer["error"]["message"]


def test_a_client_that_goes_away_harms_nobody_and_leaves_no_page(server: Server, model: Any, folder: Path) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    body = json.dumps({"prompt": [3] * 100, "max_tokens": 90, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head + body, head + body, head + body[:10], head[:20]):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
    assert completion(server, [4, 5], 5)[1]["choices"][0]["text"] == expected(model, folder, [4, 5], 5)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        held = server.figures("pikv:pages"), server.figures("pikv:tokens")
        if server.figures("megatron:num_requests_running") == {"0": 0, "1": 0} and not any(held[0].values()):
            break
        time.sleep(0.05)
    assert held == ({"0": 0, "1": 0}, {"0": 0, "1": 0})
    assert server.figures("pikv:seals_total")["0"] > 0
    skews = server.figures("pikv:skew")
    assert set(skews) == {"0", "1"}
    assert all(1 <= skew <= 2 for skew in skews.values())
    answered = server.counter("megatron:time_to_first_token_seconds_count")
    assert answered > 0
    assert server.counter("megatron:time_to_first_token_seconds_sum") > 0
    assert server.counter("megatron:inter_token_latency_seconds_count") > answered
    assert server.figures("megatron:kv_cache_usage_perc") == {}  # that buffer is not there
    assert server.figures("pikv:kv_cache_usage_perc") == {"0": 0, "1": 0}


def test_sigterm_answers_what_is_running_and_ends_with_0(server: Server) -> None:
    """The last one: it stops the module's server. What has not come to its end is not running."""
    unfinished = server.connect()
    unfinished.sendall(announce(1000) + b"{")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(completion, server, [7 + i] * 40, 60) for i in range(4)]
        deadline = time.monotonic() + SECONDS
        while not sum(server.figures("megatron:num_requests_running").values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stop() == 0
        assert [r.result()[0] for r in running] == [200] * 4
    assert answered(unfinished)[0] == 408
    unfinished.close()


def test_a_rank_that_dies_ends_the_job(folder: Path) -> None:
    made = Server(folder, "--ranks", "2")
    made.wait_until_ready()
    children = psutil.Process(made.process.pid).children()
    ranks = [child for child in children if "serve_tiny" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    family = psutil.Process(made.process.pid).children(recursive=True)
    ranks[1].kill()
    assert made.process.wait(SECONDS) != 0
    assert "rank 1 was killed by SIGKILL" in made.output.read_text()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "--model nowhere: no config.json there"),
        (("--pikv-config", "nowhere.json"), "nowhere.json: no such file"),
        (("--ranks", "3", "--tp", "2"), "--tp 2 does not divide the 3 rank(s)"),
        (("--max-queue", "-1"), "--max-queue: -1: use a whole number of at least 0"),
        (("--body-timeout", "nan"), "--body-timeout: nan: use a number of seconds above 0"),
    ],
)
def test_a_users_mistake_is_one_line(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "megatron_patch.server", "--model", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = Server(folder, "--port", str(taken.getsockname()[1]))
        assert made.process.wait(SECONDS) == 2
        assert "in use" in made.output.read_text()


def test_tensor_parallel_ranks_serve_a_checkpoint(tmp_path: Path) -> None:
    """The real server, not the tiny one's script: a Hugging Face folder on two tensor-parallel ranks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny_megatron.VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, sliding_window=None, eos_token_id=1, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    plain = MixtralForCausalLM(config).eval()
    for name, weight in plain.named_parameters():
        if "norm" not in name:
            weight.data.normal_(0, 0.3)
    plain.save_pretrained(tmp_path)
    tiny_megatron.save_tokenizer(tmp_path)
    (tmp_path / "pikv.json").write_text(json.dumps({"page_size": 8, "timeout_s": 20}))
    ids = torch.tensor([[(5 * i + 2) % 100 for i in range(70)]])
    with torch.inference_mode():
        tokens = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, 70:]
    arguments = ["--ranks", "2", "--tp", "2", "--dtype", "float32", "--pikv-config", str(tmp_path / "pikv.json")]
    made = Server(tmp_path, *arguments, command=["-m", "megatron_patch.server"])
    try:
        made.wait_until_ready()
        status, answer = completion(made, ids[0].tolist(), 20)
        assert status == 200
        assert answer["choices"][0]["text"] == text_of(tmp_path, tokens.tolist())
        assert made.stop() == 0
    finally:
        if made.process.poll() is None:
            made.process.kill()
