"""Bodies of requests: bounded in size, time and memory, without a server around them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_patch.asgi import Bodies, Disconnected, Refused, Request, json_answer

SECONDS = 60.0


class Client:
    """Sends the parts of a body, then nothing: neither more nor its end, unless told to."""

    def __init__(self, *parts: bytes, length: int | None = None, ends: bool = False) -> None:
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if ends:
            self.messages.append({"type": "http.request", "body": b"", "more_body": False})
        self.asked = 0
        chunked = (b"transfer-encoding", b"chunked")
        headers = [chunked if length is None else (b"content-length", str(length).encode())]
        scope = {"method": "POST", "path": "/", "http_version": "1.1", "headers": headers}
        self.request = Request(scope, self.receive)
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        if not self.messages:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return self.messages.pop(0)

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def refused(bodies: Bodies, client: Client) -> tuple[int, str]:
    """Status and message of a body's refusal."""
    with pytest.raises(Refused) as caught:
        asyncio.run(bodies.read(client.request))
    error = json.loads(caught.value.answer.body)["error"]
    assert error["code"] == caught.value.answer.status
    return caught.value.answer.status, error["message"]


def test_a_body_is_its_parts() -> None:
    client = Client(b"ab", b"", b"c", ends=True)
    assert asyncio.run(Bodies(3, 100, SECONDS).read(client.request)) == b"abc"
    assert client.request.complete


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    client = Client(b"abcd", length=4, ends=True)
    assert refused(Bodies(3, 100, SECONDS), client) == (
        413,
        "the body has 4 bytes; at most 3 fit: send less in one request",
    )
    assert client.asked == 0


def test_a_body_of_unknown_length_is_read_to_the_limit() -> None:
    client = Client(b"ab", b"cd", b"ef", b"gh", ends=True)
    assert refused(Bodies(3, 100, SECONDS), client)[0] == 413
    assert client.asked == 2


def test_a_body_that_does_not_come_ends_with_a_408() -> None:
    status, message = refused(Bodies(10, 100, 0.05), Client(b"ab", length=9))
    assert status == 408
    assert message.startswith("2 bytes of 9 of the body had come when its time was up: 0.05 s")


def test_a_client_that_leaves_is_not_answered() -> None:
    client = Client(b"ab")
    client.messages.append({"type": "http.disconnect"})
    with pytest.raises(Disconnected):
        asyncio.run(Bodies(10, 100, SECONDS).read(client.request))


async def read_all(bodies: Bodies, clients: Sequence[Client]) -> list[Any]:
    """What comes of bodies that begin one after the other."""
    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(bodies.read(client.request)))
        while client.messages and not tasks[-1].done():
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # the last part is counted
    done, waiting = await asyncio.wait(tasks, timeout=0.05)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return [task.exception() or task.result() if task in done else None for task in tasks]


def test_the_oldest_unfinished_body_gives_way() -> None:
    """Of three that hang, 60 bytes each, 130 find room; a fourth that comes whole is served."""
    hang = [Client(b"x" * 60) for _ in range(3)]
    whole = Client(b"y" * 60, ends=True)
    first, second, third, fourth = asyncio.run(read_all(Bodies(60, 130, SECONDS), [*hang, whole]))
    assert [first.answer.status, second.answer.status] == [408, 408]
    assert third is None  # still waiting
    assert fourth == b"y" * 60


def test_a_server_that_stops_gives_up_what_has_not_come() -> None:
    bodies, client = Bodies(60, 130, SECONDS), Client(b"x" * 50)

    async def run() -> None:
        reading = asyncio.create_task(bodies.read(client.request))
        while client.messages:
            await asyncio.sleep(0)
        bodies.give_up()
        with pytest.raises(Refused, match="50 bytes of the body had come"):
            await reading

    asyncio.run(run())


async def hanging(bodies: Bodies, client: Client) -> tuple[asyncio.Task[bytes], asyncio.Timeout]:
    """A body whose parts have all come and whose end has not, and its deadline."""
    reading = asyncio.create_task(bodies.read(client.request))
    while client.messages:
        await asyncio.sleep(0)
    return reading, next(iter(bodies._under_way))


def at_the_moment_of(deadline: asyncio.Timeout, *calls: tuple[float, Any]) -> None:
    """Lets the event loop make calls so many seconds after the deadline, or before it, in the round in which it fires:
    its reader has not heard of it by then."""
    when = deadline.when()
    assert when is not None
    loop = asyncio.get_running_loop()
    for seconds, call in calls:
        loop.call_at(when + seconds, call)
    time.sleep(max(0.0, when - loop.time()) + 0.02)


def test_a_server_that_stops_just_when_a_body_s_time_is_up() -> None:
    bodies, client = Bodies(60, 130, 0.2), Client(b"x" * 50)
    failed: list[BaseException] = []

    def give_up() -> None:
        try:
            bodies.give_up()
        except RuntimeError as error:
            failed.append(error)

    async def run() -> None:
        reading, deadline = await hanging(bodies, client)
        at_the_moment_of(deadline, (0.01, give_up))
        with pytest.raises(Refused, match="50 bytes of the body had come"):
            await reading
        assert deadline.expired()

    asyncio.run(run())
    assert failed == []


def test_room_is_made_just_when_the_oldest_body_s_time_is_up() -> None:
    """The other one, which needs the room, comes whole nevertheless."""
    bodies = Bodies(60, 80, 0.2)

    async def run() -> None:
        reading, deadline = await hanging(bodies, Client(b"x" * 50))
        bodies._seconds = SECONDS  # of the next one
        came = asyncio.get_running_loop().create_future()
        parts = [b"y" * 60, b""]

        async def receive() -> dict[str, Any]:
            await came
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        whole = Client(length=60)
        whole.request._receive = receive
        other = asyncio.create_task(bodies.read(whole.request))
        await asyncio.sleep(0)
        at_the_moment_of(deadline, (-0.01, lambda: came.set_result(None)))
        assert await other == b"y" * 60
        with pytest.raises(Refused, match="50 bytes of the body had come"):
            await reading

    asyncio.run(run())


def test_a_request_without_a_body_is_complete() -> None:
    """Its connection may be used again."""

    async def receive() -> dict[str, Any]:
        raise AssertionError

    scope = {"method": "GET", "path": "/", "http_version": "1.1", "headers": [(b"Host", b"x")]}
    request, client = Request(scope, receive), Client()
    assert asyncio.run(Bodies(3, 100, SECONDS).read(request)) == b""
    asyncio.run(request.answer(client.send, json_answer({})))
    assert b"connection" not in dict(client.sent[0]["headers"])


def test_room_comes_back_when_a_body_has_ended() -> None:
    bodies = Bodies(60, 60, SECONDS)

    async def run() -> None:
        for _ in range(3):
            assert await bodies.read(Client(b"x" * 60, ends=True).request) == b"x" * 60
        with pytest.raises(Refused):
            await bodies.read(Client(b"x" * 61).request)
        assert await bodies.read(Client(b"x" * 60, ends=True).request) == b"x" * 60

    asyncio.run(run())


def test_an_answer_comes_before_the_rest_of_the_body_which_is_read_nevertheless() -> None:
    client = Client(b"a", b"b", b"c", ends=True)

    async def run() -> None:
        await client.request.receive()
        await client.request.answer(client.send, json_answer({"a": 1}, 413))

    asyncio.run(run())
    assert [m["type"] for m in client.sent] == ["http.response.start", "http.response.body", "http.response.body"]
    start, body, end = client.sent
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    assert (b"content-length", b"8") in start["headers"]
    assert (body["body"], body["more_body"], end["more_body"]) == (b'{"a": 1}', True, False)
    assert not client.messages
