"""The server as OpenAI's own client sees it, on a tiny model, beside what the library gives."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Served, serve

import rankwise
from rankwise.engine.runtime.params import Completion, SamplingParams

PROMPT = "The module defines"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Served]:
    with serve(chatty, "--name", "tiny", "--kv-tokens", "8192", "--max-sequences", "8", "--max-model-len", "512") as it:
        yield it
        it.wait(it.empty)  # whatever the tests did, nothing is held


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def llm(chatty: Path) -> rankwise.LLM:
    return rankwise.LLM(str(chatty), device="cpu", dtype="fp32", max_model_len=512, kv_tokens=2048)


def expected(llm: rankwise.LLM, prompt: str | list[int] = PROMPT, **options: Any) -> Completion:
    """What the library gives for it."""
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0, "ignore_eos": True, **options})
    return llm.generate(prompt, params)[0]


def test_a_completion(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    wanted = expected(llm)
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [
        (0, wanted.text, "length", None)
    ]
    assert answer.usage is not None
    lengths = len(wanted.prompt_tokens), len(wanted.tokens)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == lengths
    assert answer.usage.total_tokens == sum(lengths)


def test_a_chat(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    prompt = llm.chat(MESSAGES)
    assert llm.tokenizer.decode(prompt) == "[system] Be brief. [user] What is a list? [answer]"
    wanted = expected(llm, prompt)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_conversation_goes_on_from_what_was_answered(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    said = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY).choices[0].message
    assert said.content
    more = {"role": "user", "content": "And a tuple?"}
    plain = [*MESSAGES, {"role": "assistant", "content": said.content}, more]
    for kept in (said, said.model_dump(), said.model_dump(exclude_none=True)):
        history: Any = [*MESSAGES, kept, more]
        answer = client.chat.completions.create(model="tiny", messages=history, **GREEDY)
        assert answer.choices[0].message.content == expected(llm, llm.chat(plain)).text


def test_newer_names_of_chat_mean_the_same(client: openai.OpenAI) -> None:
    old = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        MESSAGES[1],
    ]
    options = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
    new = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=24, **options)
    assert new.choices[0].message == old.choices[0].message
    assert new.usage is not None
    assert new.usage.completion_tokens == 24


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 7}, {"n": 3, "temperature": 1, "seed": 7}])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, **GREEDY, **sampling}
    whole = client.completions.create(**body)
    texts, reasons, events = [""] * len(whole.choices), [""] * len(whole.choices), 0
    usages = []
    for event in client.completions.create(stream=True, stream_options={"include_usage": True}, **body):
        events += 1
        usages.append(event.usage)
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert events > 3
    assert usages[:-1] == [None] * (events - 1)
    assert usages[-1].completion_tokens == whole.usage.completion_tokens == 24 * len(texts)  # type: ignore[union-attr]


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = client.chat.completions.create(**body).choices[0]
    events = [event.choices[0] for event in client.chat.completions.create(stream=True, **body)]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == whole.message.content
    assert events[-1].finish_reason == "length"
    assert whole.logprobs is not None
    assert [e.logprobs.content[0] for e in events if e.logprobs] == whole.logprobs.content


def test_a_stream_is_made_of_events_that_end_with_done(server: Served) -> None:
    lines = server.post(prompt=PROMPT, stream=True, max_tokens=3, ignore_eos=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    assert server.post(prompt=PROMPT, stream=True, max_tokens=3).headers["content-type"].startswith("text/event-stream")


def test_stop_texts(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    text = expected(llm).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "stop": ["never said", stop], **GREEDY}
    whole = client.completions.create(**body)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(event.choices[0].text for event in client.completions.create(stream=True, **body))
    assert streamed == whole.choices[0].text


def test_log_probabilities(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    wanted = expected(llm, logprobs=3)
    assert wanted.logprobs is not None
    answer = client.completions.create(model="tiny", prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    found = answer.logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx([known.chosen for known in wanted.logprobs], rel=1e-4)
    for top, known in zip(found.top_logprobs or [], wanted.logprobs, strict=True):
        assert list(top.values()) == pytest.approx(list(known.top.values()), rel=1e-4)
    for token, offset, one in zip(found.tokens or [], found.text_offset or [], wanted.tokens, strict=True):
        alone = llm.tokenizer.decode([one])
        assert token == alone or ("�" in alone and token.startswith("bytes:\\x"))
        assert answer.text[offset:].lstrip("�").startswith(alone) or "�" in alone  # broken characters come late
    assert sum(not token.startswith("bytes:") for token in found.tokens or []) > 3
    assert all(0 < math.exp(value) < 1 for value in found.token_logprobs or [])


def listed(client: openai.OpenAI, **body: Any) -> tuple[str, Any]:
    """A text and its log-probabilities, which are those of its stream."""
    body = {"model": "tiny", "prompt": PROMPT, "logprobs": 2, **body}
    whole = client.completions.create(**body).choices[0]
    events = [event.choices[0] for event in client.completions.create(stream=True, **body)]
    assert "".join(event.text for event in events) == whole.text
    known = [event.logprobs for event in events if event.logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for each in known for one in getattr(each, name)] == getattr(whole.logprobs, name), name
    return whole.text, whole.logprobs


def test_tokens_from_a_stop_text_on_have_no_log_probabilities(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    wanted = expected(llm)
    for at in range(len(wanted.text) // 2, len(wanted.text) // 2 + 4):  # at a token's beginning and within one
        stop = wanted.text[at : at + 6]
        text, known = listed(client, stop=[stop, wanted.text[at + 2 : at + 9] + "never"], **GREEDY)
        assert text == wanted.text[: wanted.text.index(stop)]
        assert all(offset < len(text) for offset in known.text_offset)
        assert text.startswith("".join(known.tokens[:-1]))
        assert "".join(known.tokens).startswith(text)
    assert listed(client, stop=wanted.text[:3], **GREEDY)[1].tokens == []


def test_an_end_of_sequence_has_no_log_probability(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    for seed in range(200):
        tokens = expected(llm, temperature=2, seed=seed, max_tokens=60, ignore_eos=False).tokens
        if tokens[-1] == 1 and len(tokens) > 3:
            break
    else:
        pytest.fail("no answer of these ends by itself")
    text, known = listed(client, temperature=2, seed=seed, max_tokens=60)
    assert len(known.tokens) == sum(token not in (0, 1) for token in tokens)
    assert "</s>" not in known.tokens
    assert max(known.text_offset) <= len(text)


def test_bytes_of_tokens_are_those_of_the_text(client: openai.OpenAI) -> None:
    options = {**GREEDY, "temperature": 1.8, "max_tokens": 200}
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "seed": 3, **options}
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.logprobs is not None
    raw = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content or [])
    text = (choice.message.content or "").rstrip("�")
    assert len(text) > 100
    assert raw.decode(errors="replace").replace("</s>", "").replace("<s>", "").startswith(text)


def test_a_seed_fixes_the_text(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    def text(seed: int) -> str:
        body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, **GREEDY, "temperature": 1, "seed": seed}
        return client.completions.create(**body).choices[0].text

    assert text(1) == text(1) == expected(llm, temperature=1, seed=1).text
    assert text(1) != text(2)


def test_sampling_options_reach_the_engine(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    standard = {"temperature": 1.2, "top_p": 0.8, "presence_penalty": 1.5, "frequency_penalty": -0.5}
    extensions = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
    texts = []
    for left_out in [None, *standard, *extensions]:
        some, more = ({k: v for k, v in each.items() if k != left_out} for each in (standard, extensions))
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "seed": 5, **some}
        answer = client.completions.create(model="tiny", **body, extra_body={"ignore_eos": True, **more})
        texts.append(answer.choices[0].text)
        assert texts[-1] == expected(llm, **{"temperature": 1.0, "seed": 5, **some, **more}).text, left_out
    assert sum(text != texts[0] for text in texts) >= 3  # options matter here, so a lost one would show


def test_ignore_eos(server: Served, llm: rankwise.LLM) -> None:
    """An end of sequence is all but forced by its being the likeliest token somewhere."""
    for seed in range(200):
        tokens = expected(llm, temperature=2, seed=seed, max_tokens=60).tokens
        if 1 in tokens[:-1]:
            break
    at = tokens.index(1)
    body = {"prompt": PROMPT, "temperature": 2, "seed": seed, "max_tokens": 60}
    ended = server.post(**body).json()
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", at + 1)
    assert server.post(**body, ignore_eos=True).json()["usage"]["completion_tokens"] == 60


def test_many_prompts_and_choices(client: openai.OpenAI, llm: rankwise.LLM) -> None:
    prompts = [PROMPT, "An exception is"]
    body: dict[str, Any] = {**GREEDY, "temperature": 1, "seed": 4, "n": 2}
    answer = client.completions.create(model="tiny", prompt=prompts, **body)
    wanted = [expected(llm, prompt, temperature=1, seed=seed) for prompt in prompts for seed in (4, 5)]
    assert [(c.index, c.text) for c in answer.choices] == [(i, one.text) for i, one in enumerate(wanted)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(llm.encode(prompt)) for prompt in prompts)
    ids = [llm.encode(prompt) for prompt in prompts]
    again = client.completions.create(model="tiny", prompt=ids, **body)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]
    assert client.completions.create(model="tiny", prompt=ids[0], **GREEDY).choices[0].text == expected(llm).text


def test_a_shared_prefix_is_not_computed_again(server: Served) -> None:
    body = {"prompt": "a prefix that two requests share, long enough for blocks " * 3, "max_tokens": 1}
    first, second = (server.post(**body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 48
    assert second["prompt_tokens_details"]["cached_tokens"] % 16 == 0


def test_what_is_cached_is_counted_once_for_a_prompt(server: Served) -> None:
    prompts = [f"the {name} prefix of several answers, long enough for blocks " * 3 for name in ("first", "second")]
    body = {"prompt": prompts, "max_tokens": 1, "n": 3}
    for usage in (server.post(**body).json()["usage"] for _ in range(2)):
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached <= usage["prompt_tokens"]
    assert cached >= 2 * 48


def test_a_completion_without_a_limit_is_short_and_a_chat_takes_what_is_left(server: Served) -> None:
    assert server.post(prompt=PROMPT, ignore_eos=True).json()["usage"]["completion_tokens"] == 16
    body = server.post("chat/completions", messages=MESSAGES, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 512


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_health_and_metrics(server: Served) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = [server.metric(name) for name in ("prompt_tokens_total", "generated_tokens_total")]
    counts = [server.metric(f"{name}_seconds_count") for name in ("time_to_first_token", "inter_token")]
    done = server.metric("requests_total", endpoint="completions", outcome="completed")
    usage = server.post(prompt=PROMPT, max_tokens=9, ignore_eos=True).json()["usage"]
    assert server.metric("prompt_tokens_total") - before[0] == usage["prompt_tokens"]
    assert server.metric("generated_tokens_total") - before[1] == 9
    assert server.metric("requests_total", endpoint="completions", outcome="completed") - done == 1
    assert server.metric("time_to_first_token_seconds_count") - counts[0] == 1
    assert server.metric("inter_token_seconds_count") - counts[1] == 8
    server.wait(server.empty)
    assert server.metric("kv_blocks") == 512
    assert httpx.get(f"{server.url}/metrics").headers["content-type"].startswith("text/plain")
