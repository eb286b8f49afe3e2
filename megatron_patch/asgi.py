"""What the HTTP side needs of ASGI: bodies that are bounded in size, time and memory, and answers in OpenAI's form.

WSGI reads a body before anything looks at it, or holds a thread for it. Here a body that is too large is refused at
once, and one that does not come costs the bytes that have come, for so many seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

LINGER_SECONDS = 2.0
"""How long the rest of a refused body is read and dropped. A connection that is closed with bytes unread is reset, and
a client that writes its whole body before it reads would never see why."""


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


class Refused(Exception):
    """Ends a request with an error.

    Args:
        message, param, code: as OpenAI's clients read them; `code` is the status where OpenAI has no word.
        headers: more than the body's own.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code or status}
        plain = json_answer({"error": error}, status)
        self.answer = plain._replace(headers=(*plain.headers, *(headers or {}).items()))


class Disconnected(Exception):
    """The client has gone away; nobody is left to answer."""


def json_answer(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode())


class Bodies:
    """Reads requests' bodies.

    Where all that are under way together exceed what is granted, the one that has been under way for the longest gives
    way: a client that sends slowly, or nothing, keeps nobody from being served. To be used in one event loop.

    Args:
        most_bytes: of one body.
        most_bytes_under_way: of all bodies whose end has not come yet.
        seconds: in which a body must have come.
    """

    def __init__(self, most_bytes: int, most_bytes_under_way: int, seconds: float) -> None:
        self._most_bytes, self._most_bytes_under_way, self._seconds = most_bytes, most_bytes_under_way, seconds
        self._under_way: dict[asyncio.Timeout, int] = {}  # bytes of each, the oldest first

    async def read(self, request: Request) -> bytes:
        """A request's body.

        Raises:
            Refused: 413, it is too large; 408, it did not come in time or gave way to others.
            Disconnected: the client has gone.
        """
        length = request.content_length
        if length is not None and length > self._most_bytes:
            raise self._too_large(f"{length} bytes")
        parts: list[bytes] = []
        arrived = 0
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                self._under_way[deadline] = 0
                try:
                    while (part := await request.receive()) is not None:
                        parts.append(part)
                        arrived += len(part)
                        if arrived > self._most_bytes:
                            raise self._too_large(f"more than {self._most_bytes} bytes")
                        if deadline in self._under_way:
                            self._under_way[deadline] = arrived
                            self._make_room()
                finally:
                    self._under_way.pop(deadline, None)
        except TimeoutError:
            parts.clear()  # the error, with this frame, lives until it has been answered
            of = "" if length is None else f" of {length}"
            raise Refused(
                408,
                f"{arrived} bytes{of} of the body had come when its time was up: {self._seconds:g} s, or less where "
                "others need the room or the server stops",
            ) from None
        return b"".join(parts)

    def _make_room(self) -> None:
        while sum(self._under_way.values()) > self._most_bytes_under_way:
            self._give_up_oldest()

    def give_up(self) -> None:
        """Refuses all that are under way, so that the server can stop."""
        while self._under_way:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        oldest = next(iter(self._under_way))
        del self._under_way[oldest]
        if not oldest.expired():  # its own time may be up at this moment
            oldest.reschedule(asyncio.get_running_loop().time())

    def _too_large(self, size: str) -> Refused:
        return Refused(413, f"the body has {size}; at most {self._most_bytes} fit: send less in one request")


class Request:
    """A request of which the body may not have been read.

    Args:
        scope, receive: as ASGI hands them over; of type "http".

    Attributes:
        content_length: bytes of the body, where the client has said it.
        complete: whether all of the body has been read.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method, self.path, self.http_version = scope["method"], scope["path"], scope["http_version"]
        self._receive = receive
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"")
        self.content_length = int(length) if length.isdigit() else None
        # HTTP/1 has no body but for one of these headers; in HTTP/2 only its end tells.
        announced = b"transfer-encoding" in headers or length.strip(b"0") != b""
        self.complete = self.http_version.startswith("1") and not announced

    async def receive(self) -> bytes | None:
        """Some of the body, None after its end.

        Raises:
            Disconnected: the client has gone.
        """
        if self.complete:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        self.complete = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def answer(self, send: Send, answer: Answer) -> None:
        """Sends an answer; then reads what is left of the body, for a while."""
        headers = [*answer.headers, ("content-length", str(len(answer.body)))]
        if not self.complete and self.http_version.startswith("1"):
            headers.append(("connection", "close"))
        encoded = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        with contextlib.suppress(TimeoutError, Disconnected):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self.receive() is not None:
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
