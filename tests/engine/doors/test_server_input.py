"""What a client may get wrong: all of it is refused in OpenAI's shape, its field named; none is the server's fault."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Served, serve

from rankwise.engine.doors.server.schema import ChatRequest, CompletionRequest

KEY = "a-key-of-this-test"
HEAD = {"authorization": f"Bearer {KEY}"}
HELLO = [{"role": "user", "content": "hello"}]
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "echo", "logit_bias", "no_such"})


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Served]:
    limits = ["--max-model-len", "256", "--kv-tokens", "4096", "--max-tokens", "100", "--max-body", "50000"]
    few = ["--max-sequences", "4", "--max-queue", "4"]
    with serve(chatty, "--name", "tiny", *limits, *few, RANKWISE_API_KEY=KEY) as it:
        yield it
        it.wait(it.empty)


def send(server: Served, path: str, **parts: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", timeout=60, **{"headers": HEAD, **parts})


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, if it has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"], dict)
    return body["error"]


BAD = "invalid_value"
COMPLETION = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": HELLO}
SAID = {"role": "assistant", "content": "hello"}
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("completions", {"prompt": "x"}, "model", "missing_required_parameter"),
    ("completions", {"model": "tiny"}, "prompt", "missing_required_parameter"),
    ("completions", {**COMPLETION, "prompt": ""}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": []}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [[]]}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": 3}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [1, "x"]}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [512]}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [-1]}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [10**30]}, "prompt", BAD),
    ("completions", {**COMPLETION, "prompt": [2] * 256}, "prompt", "context_length_exceeded"),
    ("completions", {**COMPLETION, "prompt": ["x"] * 9}, "prompt", BAD),
    ("completions", {**COMPLETION, "n": 9}, "n", BAD),
    ("completions", {**COMPLETION, "n": 0}, "n", BAD),
    ("completions", {**COMPLETION, "max_tokens": 0}, "max_tokens", BAD),
    ("completions", {**COMPLETION, "max_tokens": 101}, "max_tokens", BAD),
    ("completions", {**COMPLETION, "max_tokens": "5"}, "max_tokens", BAD),
    ("completions", {**COMPLETION, "max_tokens": True}, "max_tokens", BAD),
    ("completions", {**COMPLETION, "max_tokens": 1.5}, "max_tokens", BAD),
    ("completions", {**COMPLETION, "prompt": [2] * 200, "max_tokens": 57}, "max_tokens", "context_length_exceeded"),
    ("completions", {**COMPLETION, "temperature": -0.1}, "temperature", BAD),
    ("completions", {**COMPLETION, "temperature": 2.1}, "temperature", BAD),
    ("completions", {**COMPLETION, "top_p": 1.1}, "top_p", BAD),
    ("completions", {**COMPLETION, "presence_penalty": 3}, "presence_penalty", BAD),
    ("completions", {**COMPLETION, "repetition_penalty": 0}, "repetition_penalty", BAD),
    ("completions", {**COMPLETION, "top_k": 2**70}, "top_k", BAD),
    ("completions", {**COMPLETION, "seed": 2**63}, "seed", BAD),
    ("completions", {**COMPLETION, "logprobs": 21}, "logprobs", BAD),
    ("completions", {**COMPLETION, "stop": [""]}, "stop[0]", BAD),
    ("completions", {**COMPLETION, "stop": "\ud800"}, "stop", BAD),
    ("completions", {**COMPLETION, "prompt": ["x", "\udfff"]}, "prompt[1]", BAD),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", BAD),
    ("completions", {**COMPLETION, "stop": ["a"] * 5}, "stop", BAD),
    ("completions", {**COMPLETION, "stop": "a" * 300}, "stop", BAD),
    ("completions", {**COMPLETION, "stream_options": {"include_usage": True}}, "stream_options", BAD),
    ("completions", {**COMPLETION, "echo": True}, "echo", BAD),
    ("completions", {**COMPLETION, "echo": 0}, "echo", BAD),
    ("completions", {**COMPLETION, "best_of": 2}, "best_of", BAD),
    ("completions", {**COMPLETION, "best_of": 1, "n": 2}, "best_of", BAD),
    ("completions", {**COMPLETION, "logit_bias": {"5": 1}}, "logit_bias", BAD),
    ("completions", {**COMPLETION, "no_such": 1}, "no_such", "unknown_parameter"),
    ("completions", {**COMPLETION, "messages": HELLO}, "messages", "unknown_parameter"),
    ("chat/completions", {"model": "tiny"}, "messages", "missing_required_parameter"),
    ("chat/completions", {**CHAT, "messages": []}, "messages", BAD),
    ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    (
        "chat/completions",
        {**CHAT, "messages": [*HELLO, {"role": "tool", "content": ""}]},
        "messages[1].role",
        BAD,
    ),
    ("chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "x"}]}, "messages", BAD),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": None}]}, "messages[0].content", BAD),
    *(
        ("chat/completions", {**CHAT, "messages": [*HELLO, {**SAID, name: value}]}, f"messages[1].{name}", BAD)
        for name, value in {
            "refusal": "no",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            "function_call": {"name": "f", "arguments": "{}"},
            "audio": {"id": "a"},
            "annotations": [{"type": "url_citation"}],
            "reasoning_content": "hm",
        }.items()
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{**HELLO[0], "no_such": None}]},
        "messages[0].no_such",
        "unknown_parameter",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", BAD),
    ("chat/completions", {**CHAT, "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", BAD),
    ("chat/completions", {**CHAT, "max_completion_tokens": 101}, "max_completion_tokens", BAD),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools", BAD),
    ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format", BAD),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), WRONG, ids=[f"{w[2]}-{i}" for i, w in enumerate(WRONG)])
def test_bad_fields_are_named(server: Served, path: str, body: dict[str, Any], param: str, code: str) -> None:
    content = json.dumps(body).encode()  # httpx cannot say half a surrogate pair
    head = {**HEAD, "content-type": "application/json"}
    error = refused(send(server, path, content=content, headers=head))
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert (param or "").split("[")[0] in error["message"]
    assert error["message"].count(f"{param}: ") <= 1  # it is named once


def test_what_asks_for_nothing_is_taken(server: Served) -> None:
    neutral = {"logit_bias": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "me"}
    nothing = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "max_tokens", "stream_options", "audio"])
    body = {**CHAT, **neutral, **nothing, "stream": None, "metadata": {"a": "b"}, "store": True, "max_tokens": 2}
    assert send(server, "chat/completions", json=body).status_code == 200
    for more in ({"best_of": None}, {"best_of": 1}, {"best_of": 2, "n": 2}):
        assert send(server, "completions", json={**COMPLETION, "max_tokens": 1, **more}).status_code == 200
    edges = {"temperature": 1e-300, "top_p": 0, "min_p": 1, "repetition_penalty": 100, "top_k": -1, "seed": -(2**63)}
    for more in ({}, {"temperature": 2, "repetition_penalty": 0.01}, {"temperature": 1e-4, "top_k": 2**31}):
        answer = send(server, "completions", json={**COMPLETION, **edges, "max_tokens": 100, "logprobs": 20, **more})
        assert answer.status_code == 200, answer.text


def test_what_says_nothing_in_a_message_is_taken(server: Served) -> None:
    names = ["refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content", "name"]
    empty = {"refusal": "", "tool_calls": [], "function_call": {}, "audio": {}, "annotations": [], "name": ""}
    found = []
    for message in (
        {**SAID, "content": ""},
        {**SAID, "content": None},
        {**SAID, "content": [], **dict.fromkeys(names)},
        {**SAID, "content": None, **empty, "reasoning_content": ""},
    ):
        answer = send(server, "chat/completions", json={**CHAT, "messages": [*HELLO, message, *HELLO], "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["usage"]["prompt_tokens"])
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 40000,
        b'{"model": "\\u0000", "prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_broken_bodies(server: Served, path: str, content: bytes) -> None:
    refused(send(server, path, content=content, headers={**HEAD, "content-type": "application/json"}))


def test_bodies_of_another_type(server: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        head = {**HEAD, "content-type": kind}
        error = refused(send(server, "completions", content=b'{"model": "tiny"}', headers=head))
        assert "application/json" in error["message"]


def test_a_large_body(server: Served) -> None:
    for size in (50_001, 2_000_000):  # the second is larger than the sockets' buffers
        error = refused(send(server, "completions", json={**COMPLETION, "prompt": "x" * size}), 413)
        assert error["message"] == "the body is larger than 50000 bytes"

    def chunks() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        yield from (b"x" * 1000 for _ in range(60))

    refused(send(server, "completions", content=chunks()), 413)
    assert send(server, "completions", json=COMPLETION).status_code == 200


def test_other_paths_and_verbs(server: Served) -> None:
    refused(send(server, "nothing"), 404)
    refused(httpx.get(f"{server.url}/v1/completions", headers=HEAD), 405)
    refused(httpx.get(f"{server.url}/docs", headers=HEAD), 404)


def test_the_key(server: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai("a-key-of-this-tesT").models.list()
    assert caught.value.code == "invalid_api_key"
    assert server.openai(KEY).models.list().data[0].id == "tiny"
    for header in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer"}):
        error = refused(send(server, "completions", json=COMPLETION, headers=header), 401)
        assert KEY not in error["message"]
    refused(httpx.get(f"{server.url}/openapi.json"), 401)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert send(server, "completions", json=COMPLETION, headers={"authorization": f"bearer {KEY}"}).status_code == 200


text = st.text(st.characters(), max_size=20)  # halves of surrogate pairs too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant"])
likely: dict[str, st.SearchStrategy[Any]] = {
    "prompt": text | st.lists(st.integers(-1, 520), max_size=8) | st.lists(text, max_size=3),
    "messages": st.lists(st.fixed_dictionaries({"role": roles, "content": text}), max_size=3),
    "max_tokens": st.integers(0, 12),
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "stop": text | st.lists(text, max_size=5),
}
noise = st.just({}) | st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)


def test_nothing_that_a_client_sends_is_the_servers_fault(server: Served) -> None:
    found: set[int] = set()

    @settings(max_examples=200, deadline=None, database=None)
    @given(chat=st.booleans(), base=st.fixed_dictionaries({}, optional=likely), noise=noise)
    def fuzz(chat: bool, base: dict[str, Any], noise: dict[str, Any]) -> None:
        start = CHAT if chat else COMPLETION
        base.pop("prompt" if chat else "messages", None)
        content = json.dumps({**start, "max_tokens": 3, **base, **noise}).encode()
        head = {**HEAD, "content-type": "application/json"}
        answer = send(server, "chat/completions" if chat else "completions", content=content, headers=head)
        found.add(answer.status_code)
        if answer.status_code == 200:
            assert '"error"' not in answer.text
        else:
            assert answer.status_code in (400, 404), answer.text
            refused(answer, answer.status_code)

    fuzz()
    assert {200, 400} <= found
    assert httpx.get(f"{server.url}/health").status_code == 200
