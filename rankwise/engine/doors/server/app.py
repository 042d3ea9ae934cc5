"""Routes. `make_app` is an ASGI application for one process: its engine has one thread and no others."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from rankwise import __version__
from rankwise.engine.doors.server.call import Call
from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.faults import SHAPE, Fault, of_input, of_validation
from rankwise.engine.doors.server.guard import REPORT, Guard, Message, Receive, Send, outcome
from rankwise.engine.doors.server.loop import EngineLoop, Job
from rankwise.engine.doors.server.metrics import Metrics
from rankwise.engine.doors.server.prompts import Prompts
from rankwise.engine.doors.server.replies import ChatReply, CompletionReply, Reply
from rankwise.engine.doors.server.schema import ChatRequest, CompletionRequest, Sampling
from rankwise.engine.doors.server.spelling import Spelling
from rankwise.engine.runtime.llm import LLM
from rankwise.errors import RankwiseError

ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error", "content": {"application/json": {"schema": SHAPE}}}
}
ANSWERS = ERRORS | {
    200: {"description": "An answer; events of a stream", "content": {"application/json": {}, "text/event-stream": {}}}
}

log = logging.getLogger("rankwise.serve")


class Stream(Response):
    """Server-sent events of one call; the call is cancelled when the client goes.

    Args:
        call: whose pieces.
        reply: makes events of them.
    """

    def __init__(self, call: Call, reply: Reply) -> None:
        self.call, self.reply, self.status_code, self.background = call, reply, 200, None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI. What goes wrong after the first byte is an event, as the status is sent."""

        async def body(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        watcher = asyncio.create_task(self.call.watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self.reply.stream(self.call.pieces()):
                    await body(event)
            except Fault as fault:
                scope[REPORT]["outcome"] = outcome(fault.status)
                await body(b"data: " + json.dumps(fault.body()).encode() + b"\n\n")
            await body(b"", more=False)
        finally:
            watcher.cancel()
            self.call.cancel()


class Door:
    """The application and what it holds.

    Args:
        llm: whose engine it takes over.
        config: limits, key and name.
    """

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.config, self.metrics = config, Metrics()
        self.loop = EngineLoop(llm, config.capacity, config.timeout, self.metrics)
        self.prompts = Prompts(llm, config)
        self.spelling = Spelling(self.prompts.tokenizer)
        self.reader = ThreadPoolExecutor(1, "tokenizer")
        self.app = self._routes()
        self.guard = Guard(self.app, config, self.metrics)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self.guard(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.loop.start()
        yield
        await asyncio.to_thread(self.loop.stop)
        self.reader.shutdown(wait=False, cancel_futures=True)

    def _routes(self) -> FastAPI:
        about: dict[str, Any] = {"title": "rankwise", "summary": "OpenAI-compatible completions of one model."}
        app = FastAPI(**about, version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        posted: dict[str, Any] = {"methods": ["POST"], "responses": ANSWERS, "response_model": None}
        app.add_api_route("/v1/completions", self.complete, **posted)
        app.add_api_route("/v1/chat/completions", self.chat, **posted)
        app.add_api_route("/v1/models", self.models, responses=ERRORS, response_model=None)
        app.add_api_route("/v1/models/{name:path}", self.model, responses=ERRORS, response_model=None)
        app.add_api_route("/health", self.health, response_model=None)
        app.add_api_route("/metrics", self.prometheus, response_model=None)
        app.add_exception_handler(Fault, _shaped)
        app.add_exception_handler(RankwiseError, _shaped)
        app.add_exception_handler(RequestValidationError, _shaped)
        app.add_exception_handler(HTTPException, _shaped)
        app.add_exception_handler(Exception, _shaped)
        return app

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        return await self._answer(request, body, lambda: self.prompts.of_completion(body), CompletionReply)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await self._answer(request, body, lambda: self.prompts.of_chat(body), ChatReply)

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The same by its name."""
        self._check_name(name)
        return self._card()

    async def health(self) -> Response:
        """200 while requests are taken, else 503 and why."""
        state = "failed" if self.loop.failure else "shutting down" if self.guard.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def prometheus(self) -> Response:
        """Metrics."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _answer(
        self, request: Request, body: Sampling, read: Callable[[], list[Job]], kind: type[Reply]
    ) -> Response:
        self._check_name(body.model)
        jobs = await asyncio.get_running_loop().run_in_executor(self.reader, read)
        firsts = jobs[:: body.choices]
        prompt_tokens = sum(len(prompt) for prompt, _ in firsts)
        call = self.loop.submit(jobs)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        logprobs = body.top_logprobs_wanted is not None
        counts = prompt_tokens, len(firsts), len(jobs)
        reply = kind(self.config.served_name, *counts, self.spelling, logprobs, body.wants_usage)
        if body.stream:
            return Stream(call, reply)
        watcher = asyncio.create_task(call.watch(request.receive))
        try:
            async for piece in call.pieces():
                reply.add(piece)
            return Response(json.dumps(reply.whole()), media_type="application/json")
        finally:
            watcher.cancel()
            call.cancel()

    def _check_name(self, name: str) -> None:
        if name != self.config.served_name:
            message = f"model: this server has only {self.config.served_name}"
            raise Fault(404, message, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self.config.served_name, "object": "model", "created": 0, "owned_by": "rankwise"}


async def _shaped(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        error = of_validation(error.errors())
    elif isinstance(error, RankwiseError):
        error = of_input(error)
    elif isinstance(error, HTTPException):
        error = Fault(error.status_code, str(error.detail), headers=error.headers)
    elif not isinstance(error, Fault):
        error = Fault(500, "the server failed; its log says more", kind="server_error", code="internal_error")
    return error.response()
