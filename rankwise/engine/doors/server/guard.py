"""The gate before the routes: key, size, number, time; and the count of how requests ended."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.faults import Fault, unavailable
from rankwise.engine.doors.server.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/metrics")  # no key, and answered while the server goes down
COUNTED = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
OUTCOMES = {408: "timeout", 429: "overloaded", 499: "cancelled", 503: "unavailable", 504: "timeout"}
REPORT = "rankwise.report"  # where the routes leave what the status does not tell
BODY = 20.0  # seconds for a request's body to come; as long as it does not, it holds a place
SLACK = 5.0  # seconds beyond a request's time for its last bytes to be taken
DISCARD = 1 << 24  # bytes beyond the limit that are read and dropped, so that the client hears why


class Guard:
    """ASGI: lets requests through to an application, or answers in its place.

    Args:
        app: behind it.
        config: limits and key.
        metrics: where outcomes are counted.
    """

    def __init__(self, app: App, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.open, self.working = 0, 0  # the latter without those that only look something up
        self.draining, self.idle = False, asyncio.Event()
        self.idle.set()
        self._key = None if config.api_key is None else config.api_key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the server's start and end."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        status = 499  # unless an answer begins

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        report: dict[str, str] = {}
        scope[REPORT] = report
        works = scope["method"] != "GET"
        self.open += 1
        self.working += works
        self.idle.clear()
        try:
            await self._guarded(scope, receive, noting)
        except BaseException as error:
            report.setdefault("outcome", "failed" if isinstance(error, Exception) else "cancelled")
            raise
        finally:
            self.open -= 1
            self.working -= works
            if self.open == 0:
                self.idle.set()
            if scope["path"] in COUNTED and scope["method"] == "POST":
                self.metrics.requests.labels(COUNTED[scope["path"]], report.get("outcome") or outcome(status)).inc()

    async def _guarded(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope["method"], dict(scope["headers"]))
            receive = await self._with_body(receive)
        except Fault as fault:
            return await fault.response()(scope, receive, send)
        try:
            async with asyncio.timeout(self.config.timeout + SLACK):
                await self.app(scope, receive, send)
        except TimeoutError:  # a call's own time-out came before; so the answer is not taken. The server closes it
            scope[REPORT].setdefault("outcome", "timeout")

    def _admit(self, method: str, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if self._key is not None and not (secrets.compare_digest(given, self._key) and scheme.lower() == b"bearer"):
            what = "not this server's" if given else "none was given; send it as a bearer token"
            raise Fault(401, f"API key: {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if method != "GET" and self.working > 2 * self.config.capacity:
            message = "too many requests are open"
            raise Fault(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.config.max_body + DISCARD:
            raise self._too_large()

    async def _with_body(self, receive: Receive) -> Receive:
        """Read the body within its limits; what is returned gives it again, then what follows."""
        body, size, more = bytearray(), 0, True
        seconds = min(BODY, self.config.timeout)
        try:
            async with asyncio.timeout(seconds):
                while more and size <= self.config.max_body + DISCARD:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Fault(499, "the client is gone", code="disconnected")
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size <= self.config.max_body:
                        body += message.get("body", b"")
        except TimeoutError:
            late, head = f"the body did not come within {seconds:g} s", {"Connection": "close"}
            raise Fault(408, late, kind="timeout_error", code="request_timeout", headers=head) from None
        if size > self.config.max_body:
            raise self._too_large()
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again

    def _too_large(self) -> Fault:
        message = f"the body is larger than {self.config.max_body} bytes"
        return Fault(413, message, code="body_too_large", headers={"Connection": "close"})


def outcome(status: int) -> str:
    """How a request ended, by its status: completed, refused, overloaded, cancelled, unavailable, timeout, failed."""
    if status in OUTCOMES:
        return OUTCOMES[status]
    return "completed" if status < 400 else "refused" if status < 500 else "failed"
