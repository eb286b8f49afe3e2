"""Megatron's endpoints and its client, within the server's process: OpenAI's fields after them, and an account."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import flask
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.inference_request import DynamicInferenceEventType
from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints

from megatron_patch.asgi import Answer, Refused, json_answer
from megatron_patch.gauges import Metrics

COMPLETION_PATHS = {
    "/completions": False,
    "/v1/completions": False,
    "/chat/completions": True,
    "/v1/chat/completions": True,
}
"""Megatron's paths, and whether each is for chats."""


class Client(InferenceClient):  # type: ignore[misc]
    """Megatron's client, with an account of what it was asked; to be used in the loop that started it.

    Args:
        address: of the coordinator.
        metrics: counts what is answered.
    """

    def __init__(self, address: str, metrics: Metrics, eod: int) -> None:
        super().__init__(address)
        self._metrics, self._eod = metrics, eod

    def add_request(self, prompt: Any, sampling_params: Any) -> asyncio.Future[Any]:
        """Called by an endpoint."""
        answer = asyncio.ensure_future(self._ask(prompt, sampling_params))
        flask.g.setdefault("answers", []).append(answer)
        return answer

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


class Endpoints:
    """Megatron's endpoints. They are Flask's views, but coroutines: they run as tasks, without WSGI and its threads.

    Args:
        client: what they send requests with.
        name: of the model, as answers call it.
    """

    def __init__(self, client: Client, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._numbers, self._started = itertools.count(), int(time.time())
        self._app = flask.Flask(__name__)
        self._app.config.update(client=client, tokenizer=tokenizer)
        for blueprint in endpoints.__all__:
            self._app.register_blueprint(blueprint)

    async def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """What the endpoint of a path makes of a body that `validation.check` has passed.

        Raises:
            Refused: 500, the engine could not.
        """
        with self._app.test_request_context(path, method="POST") as context:
            context.request.get_json = lambda *_, **__: body  # type: ignore[method-assign]
            view, _ = context.url_adapter.match()  # type: ignore[union-attr]
            response = self._app.make_response(await self._app.view_functions[view]())
            if response.status_code != 200:
                raise Refused(response.status_code, response.get_data(as_text=True))
            requests = [answer.result().requests[0] for answer in flask.g.answers]
        return json_answer(self._complete(response.get_json(), requests, COMPLETION_PATHS[path]))

    def _complete(self, answer: dict[str, Any], requests: list[Any], chat: bool) -> dict[str, Any]:
        """Adds the fields of OpenAI's that Megatron leaves out."""
        for index, (choice, request) in enumerate(zip(answer["choices"], requests, strict=True)):
            choice.update(index=index, finish_reason=finish_reason(request, self._tokenizer.eod))
            for field in ("token_logprobs", "top_logprobs") if choice["logprobs"] else ():
                # Megatron puts a None in front, as for a prompt's first token, which is not among its tokens.
                choice["logprobs"][field] = (choice["logprobs"][field] or [None])[1:] or None
        prompt = len(requests[0].prompt_tokens) if chat else sum(len(r.prompt_tokens) for r in requests)
        generated = sum(len(r.generated_tokens) for r in requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._started:x}-{next(self._numbers)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        return {**head, **answer, "usage": usage}
