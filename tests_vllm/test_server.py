"""`rankwise serve --engine vllm` and OpenAI's own client."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from rankwise.engine.doors.vllm.launch import free_port

SCRIPT = Path(sys.executable).with_name("rankwise")
ASKED: list[Any] = [{"role": "user", "content": "Name three colours."}]
KEY = "a-secret"


@pytest.fixture(scope="module")
def client(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """The server's log is in a file, of which the end is shown if it does not start; SIGTERM ends it."""
    port, log = free_port("127.0.0.1"), tmp_path_factory.mktemp("server") / "log"
    command = [str(SCRIPT), "serve", str(smollm), "--engine", "vllm", "--name", "small", "--port", str(port)]
    environment = os.environ | {"RANKWISE_API_KEY": KEY, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        arguments = [*command, "--max-model-len", "512", "--", "--enforce-eager"]
        process = subprocess.Popen(
            arguments, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        until_up(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own


def until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def test_chat_and_stream_say_the_same(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "small", "messages": ASKED, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.usage.completion_tokens > 0
    assert whole.choices[0].message.content
    events = list(client.chat.completions.create(**options, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    assert len(events) > 3


def test_32_at_once(client: OpenAI) -> None:
    def ask(number: int) -> Any:
        prompt = f"The number {number} is"
        return client.completions.create(
            model="small", prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )

    with ThreadPoolExecutor(32) as pool:
        done = list(pool.map(ask, range(32)))
    assert [one.usage.completion_tokens for one in done] == [16] * 32
    assert len({one.choices[0].text for one in done}) > 4


def test_names_limits_and_keys(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.model_dump()["max_model_len"]) == ("small", 512)
    with pytest.raises(BadRequestError):
        client.completions.create(model="small", prompt="a " * 600, max_tokens=16)
    url = str(client.base_url)
    assert httpx.get(f"{url}models").status_code == 401
    assert json.loads(httpx.get(f"{url}models", headers={"Authorization": f"Bearer {KEY}"}).text)["data"]
