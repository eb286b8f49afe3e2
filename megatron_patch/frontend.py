"""The HTTP side: Megatron's own endpoints, with checks before them and OpenAI's fields after them.

It runs on rank 0, beside the engine, in two threads with an event loop each:

* *http* reads requests, bounds them (`asgi`), and answers ``/health``, ``/v1/models`` and ``/metrics`` itself, so that
  these answer whatever the engine or a tokenizer is busy with;
* *endpoints* runs Megatron's endpoints and its client. A request in work is a task there and has no thread.

Bodies are checked, and their texts tokenized, in a few threads between the two.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from megatron_patch import asgi, validation
from megatron_patch.asgi import Answer, Bodies, Disconnected, Refused, Request, json_answer
from megatron_patch.endpoints import COMPLETION_PATHS, Client, Endpoints
from megatron_patch.gauges import Metrics
from pikv_ds import checks

KNOWN_PATHS = "/health, /metrics, /v1/models, /v1/completions and /v1/chat/completions"

CHECKING_THREADS = 4

BODY_BYTES_UNDER_WAY = 32 * 2**20
"""Unfinished bodies may take this many bytes together, or four times the largest body if that is more. Hypercorn's
buffers come on top of it, at most half a MiB per connection."""

RETRY_SECONDS = 1
"""After which a client that found the queue full may ask again."""

DRAIN_SECONDS = 3600.0
"""How long running requests may take after the server was asked to stop."""

logger = logging.getLogger(__name__)


class Application:
    """The server as an ASGI application.

    Args:
        complete: answers a completion request: its path, and the body that `validation.check` has passed.
        check: `validation.check` for this server's model, as ``check(decoded body, chat)``.
        limits: of what is served.
        metrics: what ``/metrics`` shows.
        most_sequences: in work or waiting; a request that would exceed it is told to come again.
        body_seconds: in which a request's body must have come.
    """

    def __init__(
        self,
        complete: Callable[[str, dict[str, Any]], Awaitable[Answer]],
        check: Callable[[Any, bool], dict[str, Any]],
        limits: validation.Limits,
        metrics: Metrics,
        most_sequences: int,
        body_seconds: float,
    ) -> None:
        self._complete, self._check, self._metrics = complete, check, metrics
        self._most_sequences, self._sequences = most_sequences, 0
        most = limits.body_bytes
        self._bodies = Bodies(most, max(BODY_BYTES_UNDER_WAY, 4 * most), body_seconds)
        self._checking = concurrent.futures.ThreadPoolExecutor(CHECKING_THREADS, "check")
        model = {"id": limits.model, "object": "model", "created": int(time.time()), "owned_by": "megatron"}
        self._models = json_answer({"object": "list", "data": [{**model, "max_model_len": limits.context_length}]})
        self._resources: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/health": self._health,
            "/v1/health": self._health,
            "/metrics": self._show_metrics,
            "/v1/models": self._show_models,
        }

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":  # lifespan needs nothing
            return
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except Refused as refused:
            answer = refused.answer
        except Disconnected:
            return
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            answer = Refused(500, "the server failed; its log says why").answer
        if request.path in COMPLETION_PATHS and answer.status != 200:
            self._metrics.rejected.labels(answer.status).inc()
        await request.answer(send, answer)

    def stop(self) -> None:
        """Waits for no more of the bodies that have not come; what is in work is not touched."""
        self._bodies.give_up()

    async def _answer(self, request: Request) -> Answer:
        resource, chat = self._resources.get(request.path), COMPLETION_PATHS.get(request.path)
        if resource is None and chat is None:
            raise Refused(404, f"{request.path[:100]} is not known here; this server has {KNOWN_PATHS}")
        methods = ("POST",) if resource is None else ("GET", "HEAD")
        allow = ", ".join((*methods, "OPTIONS"))
        if request.method == "OPTIONS":
            return Answer(200, b"", (("allow", allow),))
        if request.method not in methods:
            raise Refused(405, f"{request.path} has no {request.method}; use {allow}", headers={"allow": allow})
        return await resource() if resource is not None else await self._completion(request, bool(chat))

    async def _health(self) -> Answer:
        return json_answer({"status": "ok", "ready": True})

    async def _show_metrics(self) -> Answer:
        text = await asyncio.to_thread(self._metrics.text)  # it asks the ranks' store
        return Answer(200, text, (("content-type", "text/plain; version=0.0.4; charset=utf-8"),))

    async def _show_models(self) -> Answer:
        return self._models

    async def _completion(self, request: Request, chat: bool) -> Answer:
        self._refuse_if_full(1)
        data = await self._bodies.read(request)
        with self._admitted(1):  # while it is checked: how many it makes is not known before
            checking = asyncio.get_running_loop().run_in_executor(self._checking, self._checked, data, chat)
            del data  # a megabyte, perhaps, that would stay for as long as the answer takes
            clean = await checking
        sequences = validation.sequences(clean)
        if sequences > self._most_sequences:
            raise Refused(
                400,
                f"the request makes {sequences} sequences, and this server takes at most {self._most_sequences} "
                "together (--max-requests on each rank, and --max-queue): send fewer in one request",
                "n" if chat else "prompt",
            )
        with self._admitted(sequences):
            return await self._complete(request.path, clean)

    def _checked(self, data: bytes, chat: bool) -> dict[str, Any]:
        try:
            return self._check(validation.decode(data), chat)
        except validation.BadRequest as error:
            raise Refused(error.status, str(error), error.param, error.code) from None

    def _refuse_if_full(self, sequences: int) -> None:
        if self._sequences + sequences > self._most_sequences:
            raise Refused(
                429,
                f"{self._sequences} sequences are in work or waiting, and this request makes {sequences}; this server "
                f"takes {self._most_sequences} together (--max-queue): ask again later",
                headers={"retry-after": str(RETRY_SECONDS)},
            )

    @contextlib.contextmanager
    def _admitted(self, sequences: int) -> Iterator[None]:
        """Counts the sequences of a request while it is open; refuses a request that there is no room for."""
        self._refuse_if_full(sequences)
        self._sequences += sequences
        try:
            yield
        finally:
            self._sequences -= sequences


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use shows before a model is loaded.

    With ``SO_REUSEADDR``, without which a restarted server would have to wait for old connections to time out, two
    sockets may be bound to one port; only one of them can listen. Connections wait until they are accepted.

    Raises:
        OSError: the address is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as unless_it_listens:
            bound = unless_it_listens.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
            unless_it_listens.pop_all()
            return bound
    except (OSError, UnicodeError) as error:  # a name with an empty or long label is the latter
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OSError(
            f"--host {checks.named(host)} --port {port}: cannot listen there: {reason}; name another address or port "
            "(--port 0: any free one)"
        ) from None


class Frontend:
    """The server in its threads.

    Args:
        bound: from `listen`.
        address: of the coordinator.
        tokenizer: such as `tokenizer.HFTokenizer`.
        limits, metrics, most_sequences, body_seconds: see `Application`.

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
        most_sequences: int,
        body_seconds: float,
    ) -> None:
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._bound, self._address = bound, address
        self._tokenizer, self._limits, self._metrics = tokenizer, limits, metrics
        self._most_sequences, self._body_seconds = most_sequences, body_seconds
        self._stop = threading.Event()
        self._endpoints = asyncio.new_event_loop()
        for name, run in (("endpoints", self._endpoints.run_forever), ("http", self._run)):
            threading.Thread(target=self._watch, args=(run,), name=name, daemon=True).start()

    def stop(self) -> None:
        """Accept no more, answer what is running, then stop the engines. Returns at once."""
        self._stop.set()

    def _watch(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # a SystemExit of Megatron's, too
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # the other thread was first
                self.done.set_exception(RuntimeError(f"the HTTP server failed: {error!r}"))

    def _run(self) -> None:
        asyncio.run(self._serve())
        self.done.set_result(None)

    async def _serve(self) -> None:
        client = Client(self._address, self._metrics, self._tokenizer.eod)
        await self._in_endpoints_loop(client.start(self._endpoints))
        megatron = Endpoints(client, self._tokenizer, self._limits.model)
        app = Application(
            lambda path, body: self._in_endpoints_loop(megatron.answer(path, body)),
            lambda body, chat: validation.check(body, chat, self._tokenizer, self._limits),
            self._limits,
            self._metrics,
            self._most_sequences,
            self._body_seconds,
        )
        config = Config()
        config.bind = [f"fd://{self._bound.detach()}"]
        config.graceful_timeout = DRAIN_SECONDS
        config.max_app_queue_size = 2  # pieces of a body, of 64 KiB each, that wait to be asked for
        config.errorlog = logger
        try:
            await serve(app, config, shutdown_trigger=lambda: self._asked_to_stop(app), mode="asgi")
        except* OSError:  # a connection that broke while the server waited for it to end
            if not self._stop.is_set():
                raise
            logger.exception("a connection broke while the server was stopping")
        await self._in_endpoints_loop(self._end(client))
        self._endpoints.call_soon_threadsafe(self._endpoints.stop)

    def _in_endpoints_loop(self, work: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """Runs a coroutine in the endpoints' loop."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._endpoints))

    async def _end(self, client: Client) -> None:
        await client.drained()
        await client.stop_engines()
        client.stop()

    async def _asked_to_stop(self, app: Application) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(0.05)
        app.stop()
