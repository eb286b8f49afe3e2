"""Megatron's server as users start it: two ranks, several clients, bad requests, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("asgiref", reason="Megatron's server needs flask[async]")
pytest.importorskip("hypercorn", reason="Megatron's server needs it")

import psutil
import tiny_megatron

from megatron_patch.tokenizer import HFTokenizer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model lives on a CPU"),
]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
END_SECONDS = 60.0


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Waits until a condition holds and returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds:g} s: {what}"
        time.sleep(0.05)
    return value


class Server:
    """A server of the tiny model, from its start to its end."""

    def __init__(self, folder: Path, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("serve_tiny.py"))]
        command += ["--model", str(folder), "--no-pikv", "--port", "0", *arguments]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            self.url = until(self._address, START_SECONDS, "no address printed")
            until(lambda: self.get("/health")[0] == 200, START_SECONDS, "not healthy")
        except BaseException:
            self.kill()
            print(log.read_text())
            raise
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"http://[\d.]+:\d+", self.log.read_text())
        return found[0] if found else None

    def get(self, path: str) -> tuple[int, str]:
        return self._open(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded answer; `body` as it is if bytes, else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self._open(urllib.request.Request(self.url + path, data=data, method="POST"))
        return status, json.loads(text)

    def complete(self, prompt: str | list[int], count: int = 8) -> str:
        status, answer = self.post("/v1/completions", {"prompt": prompt, "max_tokens": count, "temperature": 0})
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def figure(self, name: str) -> float:
        """The sum of a figure of /metrics over its labels."""
        lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics")[1], flags=re.MULTILINE)
        return sum(map(float, lines))

    @staticmethod
    def _open(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except urllib.error.URLError:  # nobody listens (yet)
            return 0, ""

    def end(self) -> int:
        """Exit code, once the process has ended; nothing that it started may be left."""
        code = self.process.wait(END_SECONDS)
        _, alive = psutil.wait_procs(self.family, timeout=10)
        assert not alive, alive
        return code

    def kill(self) -> None:
        processes = [self.process, *getattr(self, "family", [])]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += psutil.Process(self.process.pid).children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_megatron.save_tokenizer(path)
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, for all tests; the last of them ends it."""
    running = Server(folder, tmp_path_factory.mktemp("server") / "log", "--ranks", "2", "--max-requests", "4")
    yield running
    running.kill()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str | list[int], int], str]:
    """The text of the tiny model's greedy tokens, without a cache and on one rank."""
    tiny_megatron.initialize()
    model = tiny_megatron.build()
    tokenizer = HFTokenizer.load(str(folder), tiny_megatron.VOCAB)

    def text(prompt: str | list[int], count: int = 8) -> str:
        ids = tokenizer.tokenize(prompt) if isinstance(prompt, str) else prompt
        return tokenizer.detokenize(tiny_megatron.greedy(model, ids, count))

    return text


Text = Callable[..., str]


def test_completions_are_the_models_own(server: Server, expected: Text) -> None:
    status, answer = server.post(
        "/v1/completions", {"prompt": ["the old whale", "a ship"], "max_tokens": 8, "temperature": 0, "logprobs": 1}
    )
    assert status == 200
    assert [c["text"] for c in answer["choices"]] == [expected("the old whale"), expected("a ship")]
    assert [(c["index"], c["finish_reason"]) for c in answer["choices"]] == [(0, "length"), (1, "length")]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 8
    assert all(value <= 0 for value in logprobs["token_logprobs"])


def test_a_lone_request_leaves_the_other_rank_idle(server: Server, expected: Text) -> None:
    for prompt in ("the sea", "night", "it was old"):  # in turn to either rank; the other runs dummy passes
        assert server.complete(prompt, 24) == expected(prompt, 24)


def test_chat_goes_through_the_template(server: Server, expected: Text) -> None:
    messages = [{"role": "user", "content": "the old whale"}]
    status, answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected("user : the old whale assistant :")
    assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("chat.completion", 7)


def test_many_clients_at_once(server: Server, expected: Text) -> None:
    prompts = [
        " ".join(tiny_megatron.WORDS[: 1 + i % 7] * (1 + i % 5)) for i in range(14)
    ]  # more than the batches hold
    counts = [3 + 5 * (i % 4) for i in range(14)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(server.complete, prompts, counts))
    assert texts == [expected(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]


def test_a_client_that_goes_away_harms_nobody(server: Server, expected: Text) -> None:
    before = server.figure("megatron:request_success_total")
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "the sea", "max_tokens": 200, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head + body, head + body[:10], head[:20]):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
            if sent == head + body:
                until(lambda: server.figure("megatron:num_requests_running") > 0, 20, "the request did not start")
    assert server.complete("night") == expected("night")
    until(lambda: server.figure("megatron:request_success_total") == before + 2, 30, "the request was not finished")
    until(lambda: server.figure("megatron:num_requests_running") == 0, 10, "a request is left over")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", b'{"prompt": ', "the body is not JSON"),
        ("/v1/completions", b"\xff\xfe\xfa", "the body is not JSON"),
        ("/v1/completions", b"", "the body is not JSON"),
        ("/v1/completions", b"[" * 100_000, "nested too deeply"),
        ("/v1/completions", [], "the body must be a JSON object, not a list"),
        ("/v1/completions", {"max_tokens": 3}, "prompt is missing"),
        ("/v1/completions", {"prompt": "the", "max_tokens": 0}, "max_tokens is 0"),
        ("/v1/completions", {"prompt": [1, 5000]}, "token id 5000 is not in the vocabulary"),
        (
            "/v1/completions",
            {"prompt": "the " * 600, "max_tokens": 5},
            "the prompt has 600 tokens and max_tokens is 5, 605 in all; the context is 512 tokens",
        ),
        ("/v1/chat/completions", {"messages": "hello"}, "messages must be a list"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}, "stream"),
    ],
)
def test_bad_requests_do_not_reach_the_engine(server: Server, path: str, body: Any, words: str) -> None:
    before = server.figure("megatron:prompt_tokens_total")
    status, answer = server.post(path, body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.figure("megatron:prompt_tokens_total") == before


def test_other_paths_and_methods(server: Server) -> None:
    status, text = server.get("/v1/nothing")
    assert status == 404
    assert "/v1/completions" in json.loads(text)["error"]["message"]
    assert server.get("/v1/completions")[0] == 405
    assert json.loads(server.get("/v1/models")[1])["data"][0]["max_model_len"] == tiny_megatron.MAX_LENGTH


def test_figures_of_every_rank(server: Server) -> None:
    server.complete("the sea")
    text = server.get("/metrics")[1]
    for rank in (0, 1):
        assert f'megatron:num_requests_waiting{{rank="{rank}"}} 0.0' in text
        assert f'pikv:stored_bytes{{rank="{rank}"}} 7.0' in text
    assert server.figure("megatron:e2e_request_latency_seconds_count") > 0


def test_the_openai_client(server: Server, expected: Text) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        answer = client.completions.create(model=name, prompt="the sea", max_tokens=8, temperature=0)
        assert answer.choices[0].text == expected("the sea")
        with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
            client.completions.create(model=name, prompt="the sea", max_tokens=0)


def test_sigterm_lets_running_requests_finish(server: Server, expected: Text) -> None:
    counts = (250, 180, 120)
    with ThreadPoolExecutor(len(counts)) as pool:
        answers = [pool.submit(server.complete, "the sea", count) for count in counts]
        until(lambda: server.figure("megatron:num_requests_running") >= 2, 20, "the requests did not start")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/health")[0] == 0, 20, "still accepting")
        assert [a.result(60) for a in answers] == [expected("the sea", count) for count in counts]
    assert server.end() == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_a_rank_that_dies_ends_the_job(folder: Path, tmp_path: Path) -> None:
    server = Server(folder, tmp_path / "log", "--ranks", "2")
    try:
        rank1 = next(
            p for p in server.family if p.environ().get("RANK") == "1" and "serve_tiny" in " ".join(p.cmdline())
        )
        rank1.kill()
        assert server.end() not in (0, None)
        assert "rank 1 was killed by SIGKILL" in server.log.read_text()
    finally:
        server.kill()


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = command("--model", str(folder), "--no-pikv", "--port", str(other.getsockname()[1]))
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), ("--model nowhere", "no config.json")),
        (("--model", "{folder}", "--ranks", "3", "--tp", "2"), ("--tp 2 does not divide the 3 rank(s)",)),
        (("--model", "{folder}", "--pikv-config", "nowhere.json"), ("nowhere.json", "no such file")),
        (("--model", "{folder}", "--port", "70000"), ("--port 70000",)),
        (("--model", "{folder}", "--max-requests", "0"), ("--max-requests 0: use at least 1",)),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = command(*(a.format(folder=folder) for a in arguments))
    assert done.returncode == 2
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


def test_help_shows_commands() -> None:
    done = command("--help")
    assert done.returncode == 0
    for word in ("launch/megatron_server.sh --model", "torchrun", "--pikv-config", "--no-pikv", "curl"):
        assert word in done.stdout


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, through the script that starts it."""
    environment = {**os.environ, "PYTHON": sys.executable}
    script = ROOT / "launch" / "megatron_server.sh"
    return subprocess.run(
        [str(script), *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
