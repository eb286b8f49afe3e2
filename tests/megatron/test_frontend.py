"""The HTTP side without an engine: who is let in, what a request leaves behind, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("flask")
pytest.importorskip("hypercorn")
pytest.importorskip("prometheus_client")

from megatron_patch import frontend, validation
from megatron_patch.asgi import Answer, json_answer
from megatron_patch.gauges import Metrics

SECONDS = 20.0
LIMITS = validation.Limits("tiny", 100, 100, 16)


class Engine:
    """Holds every request until it is told to answer."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.asked: list[dict[str, Any]] = []

    async def complete(self, path: str, body: dict[str, Any]) -> Answer:
        self.asked.append(body)
        await self.let_go.wait()
        return json_answer({})


def application(complete: Callable[[str, dict[str, Any]], Awaitable[Answer]], most_sequences: int) -> Any:
    tokenizer = SimpleNamespace(tokenize=lambda text: [ord(c) % 100 for c in text], has_chat_template=True)
    tokenizer.apply_chat_template = lambda messages, **_: [1, 2, 3]
    board: Any = SimpleNamespace(read=dict)
    return frontend.Application(
        complete,
        lambda body, chat: validation.check(body, chat, tokenizer, LIMITS),
        LIMITS,
        Metrics(board),
        most_sequences,
        SECONDS,
    )


async def post(app: Any, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, dict[bytes, bytes], Any]:
    """Status, headers and decoded body of the answer."""
    data, sent = json.dumps(body).encode(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-length", str(len(data)).encode())]
    async with asyncio.timeout(SECONDS):
        await app(
            {"type": "http", "method": "POST", "path": path, "http_version": "1.1", "headers": headers}, receive, send
        )
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(b"".join(m["body"] for m in sent[1:]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_request_counts_with_all_its_sequences_before_it_is_let_in() -> None:
    """Six places, of which one is taken: six prompts are too many now, five are not, and then there is no room."""

    async def run() -> None:
        engine = Engine()
        app = application(engine.complete, 6)
        first = asyncio.create_task(post(app, {"prompt": [1]}))
        await until(lambda: len(engine.asked) == 1)
        status, headers, answer = await post(app, {"prompt": [[1]] * 6})
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert "1 sequences are in work or waiting, and this request makes 6; this server takes 6" in str(answer)
        status, _, answer = await post(app, {"messages": [{"role": "user", "content": "a"}], "n": 6}, CHAT)
        assert status == 429
        second = asyncio.create_task(post(app, {"prompt": [[1]] * 5}))
        await until(lambda: len(engine.asked) == 2)
        assert (await post(app, {"prompt": [1]}))[0] == 429
        engine.let_go.set()
        assert [(await task)[0] for task in (first, second)] == [200, 200]
        assert (await post(app, {"prompt": [[1]] * 6}))[0] == 200  # all places are free again
        assert len(engine.asked) == 3

    asyncio.run(run())


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"] * 7}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 7}, "n"),
    ],
)
def test_a_request_that_never_fits_is_not_told_to_come_again(path: str, body: dict[str, Any], param: str) -> None:
    async def run() -> None:
        engine = Engine()
        status, headers, answer = await post(application(engine.complete, 6), body, path)
        assert (status, answer["error"]["param"]) == (400, param)
        assert b"retry-after" not in headers
        assert "makes 7 sequences, and this server takes at most 6 together" in answer["error"]["message"]
        assert engine.asked == []

    asyncio.run(run())


def test_a_body_is_not_kept_while_its_answer_is_made() -> None:
    dropped = threading.Event()

    class Body(bytes):
        def __del__(self) -> None:
            dropped.set()

    async def read(request: Any) -> bytes:
        await request.receive()
        return Body(b'{"prompt": [1, 2]}')

    async def complete(path: str, body: dict[str, Any]) -> Answer:
        return json_answer({"dropped": await asyncio.to_thread(dropped.wait, 10)})

    app = application(complete, 6)
    app._bodies.read = read
    assert asyncio.run(post(app, {}))[2] == {"dropped": True}


def test_a_port_in_use_shows_at_once() -> None:
    with frontend.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            OSError, match=f"--host 127.0.0.1 --port {port}: cannot listen there: Address already in use"
        ):
            frontend.listen("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), 10):
            assert first.accept()
    frontend.listen("127.0.0.1", port).close()  # at once, although a connection of before is not yet forgotten


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a" * 70 + ".invalid"])
def test_a_host_that_is_not_this_machine_s_is_named(host: str) -> None:
    with pytest.raises(OSError, match=r"--host '?[a-z0-9.-]+'? --port 0: cannot listen there: "):
        frontend.listen(host, 0)


class Client:
    """In place of the one that talks to Megatron's coordinator."""

    def __init__(self, *_: Any) -> None:
        pass

    async def start(self, _: Any) -> None:
        pass

    async def drained(self) -> None:
        pass

    async def stop_engines(self) -> None:
        pass

    def stop(self) -> None:
        pass


def stopped(monkeypatch: pytest.MonkeyPatch, error: Exception, stop: bool = True) -> frontend.Frontend:
    """A server whose hypercorn ends with an error when it was asked to stop, or without that."""

    async def serve(*_: Any, shutdown_trigger: Callable[[], Awaitable[None]], **__: Any) -> None:
        if stop:
            await shutdown_trigger()
        raise error

    monkeypatch.setattr(frontend, "serve", serve)
    monkeypatch.setattr(frontend, "Client", Client)
    board: Any = SimpleNamespace(read=dict)
    tokenizer = SimpleNamespace(eod=0)
    bound = frontend.listen("127.0.0.1", 0)
    front = frontend.Frontend(bound, "", tokenizer, LIMITS, Metrics(board), 6, SECONDS)
    if stop:
        front.stop()
    return front


@pytest.mark.parametrize(
    "error", [ConnectionResetError("gone"), ExceptionGroup("of a connection", [BrokenPipeError("gone")])]
)
def test_a_connection_that_breaks_while_the_server_stops_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with caplog.at_level(logging.ERROR, frontend.logger.name):
        assert stopped(monkeypatch, error).done.result(SECONDS) is None
    (record,) = caplog.records
    assert record.getMessage() == "a connection broke while the server was stopping"
    assert "gone" in caplog.text


@pytest.mark.parametrize(
    "error", [KeyError("ours"), ExceptionGroup("mixed", [ConnectionResetError(), KeyError("ours")])]
)
def test_another_failure_while_the_server_stops_is_an_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(RuntimeError, match=r"the HTTP server failed: .*KeyError\('ours'\)"):
        stopped(monkeypatch, error).done.result(SECONDS)


def test_a_connection_s_failure_in_a_running_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"the HTTP server failed: .*gone"):
        stopped(monkeypatch, ConnectionResetError("gone"), stop=False).done.result(SECONDS)
