"""What the guard in front of the server's application counts."""

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest

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
