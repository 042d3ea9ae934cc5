"""How a server starts and ends: signals, time-outs, an engine that breaks, packages that are missing."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from served import serve

import rankwise
from rankwise.engine.doors.server.app import Door
from rankwise.engine.doors.server.config import ServeConfig
from rankwise.engine.doors.server.process import bind
from rankwise.errors import RankwiseError

LONG: dict[str, Any] = {"model": "tiny", "prompt": "The module", "extra_body": {"ignore_eos": True}}


def test_sigterm_lets_accepted_requests_end(chatty: Path) -> None:
    with serve(chatty, "--name", "tiny", "--kv-tokens", "16384", "--max-sequences", "2") as server:
        client = server.openai()
        streams = [client.completions.create(stream=True, max_tokens=1500, **LONG) for _ in range(3)]  # one waits
        next(streams[0])
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(max_tokens=1, **LONG)
        assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
        assert server.process.poll() is None
        ends = [[event.choices[0].finish_reason for event in stream][-1] for stream in streams]
        assert ends == ["length"] * 3
        code, err = server.stopped()
        assert code == 0
        assert "shutting down: 3 requests in flight" in err
        assert err.endswith("stopped\n")
        assert "Traceback" not in err


def test_what_does_not_end_within_the_grace_period_is_told(chatty: Path) -> None:
    with serve(chatty, "--name", "tiny", "--kv-tokens", "16384", "--grace", "0.3") as server:
        stream = server.openai().completions.create(stream=True, max_tokens=4000, **LONG)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        code, err = server.stopped(10)
        assert (code, "Traceback" in err) == (0, False), err


@contextmanager
def inside(llm: rankwise.LLM, **options: Any) -> Iterator[tuple[Door, str]]:
    """The same application and uvicorn, in a thread here, so that a test can reach its engine."""
    door = Door(llm, ServeConfig("tiny", **options))
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(door, http="h11", ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield door, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def llm(chatty: Path) -> rankwise.LLM:
    return rankwise.LLM(str(chatty), device="cpu", dtype="fp32", kv_tokens=8192, max_sequences=2)


def test_an_engine_that_fails_fails_its_requests_and_says_so(llm: rankwise.LLM, caplog: Any) -> None:
    with inside(llm) as (door, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=30)
        streams = [client.completions.create(stream=True, max_tokens=4000, **LONG) for _ in range(3)]
        next(streams[0])
        caught: list[Exception] = []

        def whole() -> None:
            with pytest.raises(openai.InternalServerError) as error:
                client.completions.create(max_tokens=4000, **LONG)
            caught.append(error.value)

        asking = threading.Thread(target=whole)
        asking.start()
        while door.metrics.state.waiting < 2:
            time.sleep(0.01)
        llm.engine.keys.pop()  # a layer's cache is gone: the next step cannot but fail
        for stream in streams:
            with pytest.raises(openai.APIError, match="the engine failed") as error:
                list(stream)
            assert error.value.code == "engine_failed"
        asking.join(20)
        assert [error.code for error in caught] == ["engine_failed"]  # type: ignore[attr-defined]
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(max_tokens=1, **LONG)
        assert refused.value.status_code == 503
        assert 'outcome="failed"} 4.0' in httpx.get(f"{url}/metrics").text
        assert "the engine failed" in caplog.text


def test_a_text_that_cannot_be_made_ends_only_its_request(llm: rankwise.LLM) -> None:
    """A model's last rows may stand for no token; a tokenizer that raises must not end the engine."""
    with inside(llm) as (door, url):
        ask: Callable[[], httpx.Response] = lambda: httpx.post(  # noqa: E731
            f"{url}/v1/completions", json={"model": "tiny", "prompt": "The", "max_tokens": 3}, timeout=30
        )
        assert ask().status_code == 200
        tokenizer, llm.tokenizer = llm.tokenizer, object()
        assert ask().status_code == 500
        llm.tokenizer = tokenizer
        assert ask().status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert door.metrics.state.used == 0


def test_a_request_may_not_take_longer_than_it_may(llm: rankwise.LLM) -> None:
    with inside(llm, timeout=0.5) as (door, url):
        body = {"model": "tiny", "prompt": "The", "max_tokens": 4000, "ignore_eos": True}
        late = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=30)
        with pytest.raises(openai.APIError, match=r"longer than 0\.5 s"):
            list(client.completions.create(stream=True, max_tokens=4000, **LONG))
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as idle:  # promises a body that never comes
            idle.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            idle.settimeout(10)
            assert b"408 Request Timeout" in idle.recv(4096)
        assert 'outcome="timeout"} 3.0' in httpx.get(f"{url}/metrics").text
        end = time.monotonic() + 5
        while door.metrics.state.used and time.monotonic() < end:
            time.sleep(0.01)
        assert door.metrics.state.used == 0


def test_an_address_that_is_taken(chatty: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RankwiseError, match=f"host and port: 127.0.0.1:{port} .*; a free address is needed"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"port": 70000}, "port"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "two words"}, "api_key"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"max_body": 0}, "max_body"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"grace": -1.0}, "grace"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_options_are_checked(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{field}: ") as caught:
        ServeConfig("tiny", **options)
    assert "two words" not in str(caught.value)  # a key is not shown


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_one_line_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from rankwise.cli import main; main(['serve', 'nowhere'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: serve: no {package}; needs the extra: pip install 'rankwise[serve]'\n"
