"""Bodies made from the schema that the server gives of itself: what fits it is taken, what does not is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.openapi import from_dict
from served import Served, serve

from rankwise.engine.doors.server.schema import ChatRequest, CompletionRequest, Message

PATHS = ["/v1/completions", "/v1/chat/completions"]
TOKENS = {"type": "integer", "minimum": 0, "maximum": 511}
Check = Callable[[schemathesis.Case], None]
FEW = {"type": "integer", "minimum": 1, "maximum": 4}


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Served]:
    limits = ["--max-sequences", "8", "--max-queue", "64", "--kv-tokens", "8192", "--max-tokens", "4"]
    with serve(chatty, "--name", "tiny", *limits) as it:
        yield it
        it.wait(it.empty)


def written(server: Served) -> dict[str, Any]:
    """The server's schema, with the name of its model."""
    whole: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    for name in ("CompletionRequest", "ChatRequest"):
        whole["components"]["schemas"][name]["properties"]["model"] = {"const": "tiny"}
    return whole


def narrowed(whole: dict[str, Any]) -> dict[str, Any]:
    """With the limits, too, that are the model's and the server's options'."""
    text = {"type": "string", "minLength": 1, "maxLength": 40}
    tokens = {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": 8}
    texts, many = ({"type": "array", "items": one, "minItems": 1, "maxItems": 3} for one in (text, tokens))
    completion, chat = (
        whole["components"]["schemas"][f"{name}Request"]["properties"] for name in ("Completion", "Chat")
    )
    completion["prompt"] = {"anyOf": [text, texts, tokens, many]}
    for fields in (completion, chat):
        for key in {"n", "best_of", "max_tokens", "max_completion_tokens"} & fields.keys():
            fields[key]["anyOf"][0] |= FEW
    return whole


def agreed(body: dict[str, Any]) -> dict[str, Any]:
    """With the rules between fields, which the schema tells in words; whole numbers are written as such."""

    def number(text: str) -> int | float:
        return int(float(text)) if float(text).is_integer() else float(text)

    body = json.loads(json.dumps(body), parse_float=number)
    if "best_of" in body:
        body["best_of"] = body.get("n")
    if not body.get("stream"):
        body.pop("stream_options", None)
    if "messages" in body:
        said = [{**one, "content": one["content"] or ""} for one in body["messages"]]
        body["messages"] = [{"role": "user", "content": "hello"}, *said]  # users begin
        body["max_tokens"] = 2
        body.pop("max_completion_tokens", None)
        if not body.get("logprobs"):
            body.pop("top_logprobs", None)
    return body


def tried(schema: dict[str, Any], path: str, mode: GenerationMode, count: int, check: Check) -> None:
    """Check so many bodies for a path, always the same ones."""
    bodies = from_dict(schema)[path]["POST"].as_strategy(generation_mode=mode)
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=slow)
    @given(bodies)
    def each(case: schemathesis.Case) -> None:
        check(case)

    each()


def test_the_schema_says_what_is_taken_without_effect(server: Served) -> None:
    whole = written(server)
    for request in (CompletionRequest, ChatRequest, Message):
        fields = whole["components"]["schemas"][request.__name__]["properties"]
        assert fields.keys() == {*request.model_fields, *request.neutral, *request.aside}
        for name, allowed in request.neutral.items():
            assert fields[name]["enum"] == [None, *allowed]
        lists = [kind["maxItems"] for kind in fields.get("stop", {}).get("anyOf", []) if kind["type"] == "array"]
        assert lists == ([4] if "stop" in fields else [])
    assert all("422" not in way["responses"] for paths in whole["paths"].values() for way in paths.values())


@pytest.mark.parametrize("path", PATHS)
def test_what_fits_the_schema_is_taken(server: Served, path: str) -> None:
    def check(case: schemathesis.Case) -> None:
        answer = httpx.post(f"{server.url}{path}", json=agreed(case.body), timeout=60)
        assert answer.status_code == 200, (case.body, answer.text)
        assert '"error"' not in answer.text

    tried(narrowed(written(server)), path, GenerationMode.POSITIVE, 60, check)


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_the_schema_is_refused(server: Served, path: str) -> None:
    def check(case: schemathesis.Case) -> None:
        answer = case.call(base_url=server.url)
        assert 400 <= answer.status_code < 500, (case.body, answer.text)
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]

    tried(written(server), path, GenerationMode.NEGATIVE, 120, check)
    assert httpx.get(f"{server.url}/health").status_code == 200
