"""More requests than places, clients that go away, and many of both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from served import Served, serve

from bench.soak import Mix, soak

LONG: dict[str, Any] = {"model": "tiny", "prompt": "The module", "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Served]:
    limits = ["--max-sequences", "2", "--max-queue", "2", "--kv-tokens", "16384"]
    with serve(chatty, "--name", "tiny", *limits) as it:
        yield it
        it.wait(it.empty)


def opened(server: Served, tokens: int, **options: Any) -> Any:
    """A stream whose request is accepted."""
    more: Any = {"stream_options": {"include_usage": True}, **options}
    return server.openai().completions.create(stream=True, max_tokens=tokens, **more, **LONG)


def tokens_of(stream: Any) -> int:
    """How many come, by the stream's last event."""
    return int(list(stream)[-1].usage.completion_tokens)


def test_what_the_queue_cannot_hold_is_refused_and_the_rest_completes(server: Served) -> None:
    before = server.metric("requests_total", outcome="overloaded")
    streams = [opened(server, 1000) for _ in range(4)]
    server.wait(lambda: (server.metric("running"), server.metric("queue_length")) == (2, 2))
    assert 0 < server.metric("kv_use") < 1
    with pytest.raises(openai.RateLimitError) as caught:
        opened(server, 1)
    assert caught.value.code == "queue_full"
    assert caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
    assert server.post(prompt="x", n=2).status_code == 429
    assert [tokens_of(stream) for stream in streams] == [1000] * 4
    assert server.metric("requests_total", outcome="overloaded") - before == 2
    assert server.post(prompt="x").status_code == 200


def test_a_client_that_waits_as_it_is_told_gets_its_answer(server: Served) -> None:
    streams = [opened(server, 400) for _ in range(4)]
    patient = server.openai(max_retries=10).completions.create(max_tokens=1, **LONG)
    assert patient.usage is not None
    assert patient.usage.completion_tokens == 1
    assert [tokens_of(stream) for stream in streams] == [400] * 4


def test_a_client_that_goes_away_frees_its_blocks(server: Served) -> None:
    generated, cancelled = server.metric("generated_tokens_total"), server.metric("requests_total", outcome="cancelled")
    stream = opened(server, 4000)
    for _ in range(20):
        next(stream)
    assert server.metric("kv_blocks_used") > 0
    stream.close()
    server.wait(server.empty, seconds=2)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    server.wait(server.empty, seconds=2)
    server.wait(lambda: server.metric("requests_total", outcome="cancelled") - cancelled == 2)
    assert server.metric("generated_tokens_total") - generated < 3000


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(server: Served) -> None:
    running = [opened(server, 2000) for _ in range(2)]
    server.wait(lambda: server.metric("running") == 2)
    waiting = opened(server, 4000)
    server.wait(lambda: server.metric("queue_length") == 1)
    waiting.close()
    server.wait(lambda: server.metric("queue_length") == 0, seconds=2)
    assert server.metric("running") == 2
    for stream in running:
        stream.close()
    server.wait(server.empty, seconds=2)


def test_a_slow_reader_holds_up_nobody(server: Served) -> None:
    slow = opened(server, 800, logprobs=20)  # megabytes, more than sockets buffer
    next(slow)
    assert server.post(prompt="x", max_tokens=20, ignore_eos=True).json()["usage"]["completion_tokens"] == 20
    server.wait(server.empty, seconds=60)  # the engine is done with it
    assert tokens_of(slow) == 800  # and all of it was kept


def test_hundreds_of_requests_leak_nothing(chatty: Path) -> None:
    """A cache so small that sequences lose their places, a third of the clients impatient."""
    limits = ["--max-sequences", "8", "--max-queue", "64", "--kv-tokens", "2048", "--max-model-len", "1024"]
    with serve(chatty, "--name", "tiny", *limits) as server:
        mix = Mix(requests=300, together=24, words=100, tokens=48)
        result = soak(server.url, "tiny", psutil.Process(server.process.pid), mix)
        assert result["left"] == {"queue_length": 0, "running": 0, "kv_blocks_used": 0}
        assert set(result["clients"]) == {"completed", "given up"}
        assert result["clients"]["completed"] >= 300 * 2 // 3
        done = sum(v for name, v in result["server"].items() if name.endswith("completed"))
        assert result["clients"]["completed"] <= done <= sum(result["server"].values()) <= 300
        assert sum(v for name, v in result["server"].items() if name.endswith("cancelled")) > 20
        assert max(result["memory"]) - result["memory"][0] < 40, result["memory"]  # MiB
        server.process.terminate()
        code, err = server.stopped()
        assert (code, "Traceback" in err, "ERROR" in err) == (0, False, False), err
