"""The HTTP side: Megatron's own endpoints, with checks before them and OpenAI's fields after them.

It runs on rank 0 in a thread with an event loop of its own, so that ``/health`` answers while the
engine computes. Megatron's endpoints are a WSGI application whose requests run in threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import logging
import socket
import threading
import time
from typing import Any

import flask
from hypercorn.asyncio import serve
from hypercorn.config import Config
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.inference_request import DynamicInferenceEventType
from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints
from werkzeug.exceptions import HTTPException

from megatron_patch import validation
from megatron_patch.gauges import Metrics

COMPLETION_PATHS = {
    "/completions": False,
    "/v1/completions": False,
    "/chat/completions": True,
    "/v1/chat/completions": True,
}
"""Megatron's paths, and whether each is for chats."""

KNOWN_PATHS = "/health, /metrics, /v1/models, /v1/completions and /v1/chat/completions"

MOST_CONNECTIONS = 256
"""Requests in work or waiting at the same time; each has a thread. More wait for one."""

MOST_BODY_BYTES = 64 * 2**20

DRAIN_SECONDS = 3600.0
"""How long running requests may take after the server was asked to stop."""


class Client(InferenceClient):  # type: ignore[misc]
    """Megatron's client, for requests from many threads, and with an account of them.

    ZeroMQ sockets belong to one thread; Megatron's endpoints would use this one from all theirs.

    Args:
        address: of the coordinator.
        metrics: counts what is answered.
    """

    def __init__(self, address: str, metrics: Metrics, eod: int) -> None:
        super().__init__(address)
        self._metrics, self._eod = metrics, eod

    def add_request(self, prompt: Any, sampling_params: Any) -> asyncio.Future[Any]:
        """Called by an endpoint, in its thread's loop; the answer goes to that loop."""
        answer = asyncio.run_coroutine_threadsafe(self._ask(prompt, sampling_params), self._loop)
        flask.g.setdefault("answers", []).append(answer)
        return asyncio.wrap_future(answer)

    async def _ask(self, prompt: Any, sampling_params: Any) -> Any:
        arrived = time.time()
        record = await InferenceClient.add_request(self, prompt, sampling_params)
        request = record.merge()  # one that was evicted and resumed comes in pieces
        if request.failed():
            raise RuntimeError("; ".join(str(e.payload) for e in request.events if e.payload) or "the request failed")
        record.requests = [request]
        metrics = self._metrics
        metrics.success.labels(finish_reason(request, self._eod)).inc()
        metrics.prompt_tokens.inc(len(request.prompt_tokens))
        metrics.generation_tokens.inc(len(request.generated_tokens))
        metrics.latency.observe(time.time() - arrived)
        added = next((e.timestamp for e in request.events if e.type == DynamicInferenceEventType.ADD), arrived)
        metrics.queue.observe(max(0.0, added - arrived))
        first, *rest = request.tpot or [0.0]  # durations of the steps that made its tokens
        metrics.first_token.observe(max(0.0, added - arrived) + first)
        for seconds in rest:
            metrics.step.observe(seconds)
        return record

    async def drained(self) -> None:
        """Waits for the requests whose senders have gone away, too."""
        while self.completion_futures:
            await asyncio.sleep(0.02)


def finish_reason(request: Any, eod: int) -> str:
    """OpenAI's word for why a request ended."""
    return "stop" if request.generated_tokens and request.generated_tokens[-1] == eod else "length"


def application(client: Any, tokenizer: Any, limits: validation.Limits, metrics: Metrics, name: str) -> flask.Flask:
    """Megatron's endpoints as a Flask application.

    Args:
        client: what the endpoints send requests with.
        name: of the model, as answers call it.
    """
    app = flask.Flask(__name__)
    app.config.update(client=client, tokenizer=tokenizer)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for blueprint in endpoints.__all__:
        app.register_blueprint(blueprint)
    numbers = itertools.count()
    started = int(time.time())

    @app.get("/metrics")
    def show_metrics() -> flask.Response:
        return flask.Response(metrics.text(), mimetype="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> flask.Response:
        model = {"id": name, "object": "model", "created": started, "owned_by": "megatron"}
        return flask.jsonify({"object": "list", "data": [{**model, "max_model_len": limits.context_length}]})

    @app.before_request
    def check() -> None:
        chat = COMPLETION_PATHS.get(flask.request.path)
        if chat is None or flask.request.method != "POST":
            return
        try:
            body = json.loads(flask.request.get_data())
        except ValueError as error:
            raise validation.BadRequest(f"the body is not JSON: {error}") from None
        except RecursionError:
            raise validation.BadRequest("the body is nested too deeply") from None
        body = validation.check(body, chat, tokenizer, limits)
        flask.request.get_json = lambda *_, **__: body  # type: ignore[method-assign]

    @app.after_request
    def complete(response: flask.Response) -> flask.Response:
        chat = COMPLETION_PATHS.get(flask.request.path)
        if chat is None:
            return response
        if response.status_code != 200:
            metrics.rejected.labels(response.status_code).inc()
            return response if response.is_json else _error(response.get_data(as_text=True), response.status_code)
        requests = [answer.result().requests[0] for answer in flask.g.answers]
        answer = response.get_json()
        for index, (choice, request) in enumerate(zip(answer["choices"], requests, strict=True)):
            choice.update(index=index, finish_reason=finish_reason(request, tokenizer.eod))
            for field in ("token_logprobs", "top_logprobs") if choice["logprobs"] else ():
                # Megatron puts a None in front, as for a prompt's first token, which is not among its tokens.
                choice["logprobs"][field] = (choice["logprobs"][field] or [None])[1:] or None
        prompt = len(requests[0].prompt_tokens) if chat else sum(len(r.prompt_tokens) for r in requests)
        generated = sum(len(r.generated_tokens) for r in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{started:x}-{next(numbers)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        response.set_data(flask.json.dumps({**head, **answer, "usage": usage}))
        return response

    @app.errorhandler(validation.BadRequest)
    def refuse(error: validation.BadRequest) -> flask.Response:
        return _error(str(error), 400, error.param)

    @app.errorhandler(HTTPException)
    def refuse_http(error: HTTPException) -> flask.Response:
        more = f" This server has {KNOWN_PATHS}." if error.code == 404 else ""
        return _error(f"{error.description}{more}", error.code or 500)

    return app


def _error(message: str, status: int, param: str | None = None) -> flask.Response:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    response = flask.jsonify({"error": {"message": message, "type": kind, "param": param, "code": status}})
    response.status_code = status
    return response


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening, so that a port in use shows before a model is loaded.

    Raises:
        OSError: the address is in use or not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


class Frontend:
    """The server in its thread.

    Args:
        bound: from `listen`.
        address: of the coordinator.
        tokenizer, limits, metrics, name: see `application`.

    Attributes:
        done: completes when the server has stopped and the engines were told to; an exception if
            it failed.
    """

    def __init__(
        self,
        bound: socket.socket,
        address: str,
        tokenizer: Any,
        limits: validation.Limits,
        metrics: Metrics,
        name: str,
    ) -> None:
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._bound, self._address = bound, address
        self._tokenizer, self._limits, self._metrics, self._name = tokenizer, limits, metrics, name
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="http", daemon=True).start()

    def stop(self) -> None:
        """Accept no more, answer what is running, then stop the engines. Returns at once."""
        self._stop.set()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # a SystemExit of Megatron's, too
            self.done.set_exception(RuntimeError(f"the HTTP server failed: {error!r}"))
        else:
            self.done.set_result(None)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(MOST_CONNECTIONS, "http"))
        client = Client(self._address, self._metrics, self._tokenizer.eod)
        await client.start(loop)
        config = Config()
        config.bind = [f"fd://{self._bound.detach()}"]
        config.graceful_timeout = DRAIN_SECONDS
        config.wsgi_max_body_size = MOST_BODY_BYTES
        config.errorlog = logging.getLogger("megatron_patch.frontend")
        app = application(client, self._tokenizer, self._limits, self._metrics, self._name)
        try:
            await serve(app, config, shutdown_trigger=self._asked_to_stop, mode="wsgi")
        except Exception:  # a connection that broke while the server waited for it to end
            if not self._stop.is_set():
                raise
        await client.drained()
        await client.stop_engines()
        client.stop()

    async def _asked_to_stop(self) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(0.05)
