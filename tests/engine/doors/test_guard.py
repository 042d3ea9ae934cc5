"""What the guard in front of the server's application counts."""

import asyncio
import json
from contextlib import nullcontext
from typing import Any

import pytest

from rankwise.engine.doors.server import guard as gate
from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.guard import REPORT, Guard
from rankwise.engine.doors.server.metrics import Metrics

SCOPE = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}


@pytest.mark.parametrize(
    ("known", "raised", "counted"),
    [
        ("failed", TimeoutError, "failed"),  # told of the failure, the client does not take the last bytes
        ("failed", asyncio.CancelledError, "failed"),  # told of the failure, the client leaves before the last byte
        (None, asyncio.CancelledError, "cancelled"),
        (None, ValueError, "failed"),
        (None, None, "completed"),
    ],
)
def test_a_request_counts_as_what_ended_it_first(
    known: str | None, raised: type[BaseException] | None, counted: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if known:
            scope[REPORT]["outcome"] = known
        if raised:
            raise raised

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        pass

    metrics = Metrics()
    guard = Guard(app, ServeConfig("tiny"), metrics)
    with pytest.raises(raised) if raised not in (None, TimeoutError) else nullcontext():
        asyncio.run(guard(dict(SCOPE), receive, send))
    values = {
        sample.labels["outcome"]: sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "rankwise_requests_total"
    }
    assert values == {counted: 1.0}


async def answered(guard: Guard, receive: Any, path: str = "/v1/completions", method: str = "POST") -> tuple[int, Any]:
    """Status and body."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({**SCOPE, "path": path, "method": method}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'"hello"'})


async def half() -> dict[str, Any]:
    """A body that does not end."""
    await asyncio.sleep(1000)
    raise AssertionError


async def nothing() -> dict[str, Any]:
    return {"type": "http.request"}


def test_a_body_has_less_time_than_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY", 0.05)
    guard = Guard(hello, ServeConfig("tiny", timeout=600), Metrics())
    status, body = asyncio.run(asyncio.wait_for(answered(guard, half), 10))
    assert status == 408
    assert body["error"]["code"] == "request_timeout"
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (guard.open, guard.working) == (0, 0)


def test_half_sent_bodies_do_not_keep_look_ups_out() -> None:
    async def run() -> list[int]:
        guard = Guard(hello, ServeConfig("tiny", max_sequences=1, max_queue=0), Metrics())
        stuck = [asyncio.create_task(answered(guard, half)) for _ in range(2)]
        lookups = [asyncio.create_task(answered(guard, half, "/v1/models", "GET")) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert guard.open == 5
        models = await answered(guard, nothing, "/v1/models", "GET")
        work = await answered(guard, nothing)
        for task in (*stuck[:1], *lookups):
            task.cancel()
        await asyncio.sleep(0.01)
        freed = await answered(guard, nothing)
        stuck[1].cancel()
        return [models[0], work[0], freed[0]]

    assert asyncio.run(run()) == [200, 429, 200]
