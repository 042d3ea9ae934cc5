"""Text in, text out: what a person calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rankwise
from rankwise.engine.runtime.params import SamplingParams
from rankwise.engine.runtime.text import TextStream
from rankwise.errors import RankwiseError

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(model_folder: Callable[[str], Path]) -> rankwise.LLM:
    return rankwise.LLM(str(model_folder("llama")), max_model_len=100, kv_tokens=800, dtype="fp32", device="cpu")


def free(llm: rankwise.LLM) -> bool:
    return llm.engine.pool.available() == llm.engine.pool.count


def test_prompts_in_completions_out_in_their_order(llm: rankwise.LLM) -> None:
    counted = []

    class Track:
        def __init__(self, name: str, total: int) -> None:
            counted.append(total)

        def __enter__(self) -> Callable[[], None]:
            return lambda: counted.append(1)

        def __exit__(self, *_: object) -> None: ...

    texts = ["The module", "An exception is", "def f(x):"]
    done = llm.generate(texts, GREEDY, track=Track)
    assert [c.prompt_tokens for c in done] == [llm.encode(text) for text in texts]
    whole = [llm.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in done]
    half = "\ufffd"  # of a character, which is not shown at the end
    assert [c.text for c in done] == [text.rstrip(half) for text in whole]
    assert {c.finish_reason for c in done} == {"length"}
    assert counted == [3, 1, 1, 1]
    assert llm.generate(texts[1], GREEDY)[0].tokens == done[1].tokens
    assert llm.generate(llm.encode(texts[1]), GREEDY)[0].tokens == done[1].tokens
    assert llm.generate([]) == []
    assert free(llm)


def test_each_prompt_may_have_its_own_params(llm: rankwise.LLM) -> None:
    short = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    first, second = llm.generate(["The", "The"], [short, GREEDY])
    assert second.tokens[:2] == first.tokens
    with pytest.raises(RankwiseError, match="params: 1; one, or 2 as there are prompts"):
        llm.generate(["a", "b"], [short])


def test_a_stream_is_the_completion_in_pieces(llm: rankwise.LLM) -> None:
    pieces = list(llm.stream("The module", GREEDY))
    assert "".join(pieces) == llm.generate("The module", GREEDY)[0].text
    assert len(pieces) > 1
    assert free(llm)


def test_closing_a_stream_cancels_it(llm: rankwise.LLM) -> None:
    stream = llm.stream("The module", GREEDY)
    next(stream)
    assert not free(llm)
    stream.close()
    assert free(llm)
    assert not llm.engine.busy


def test_a_stop_text_ends_the_output_and_is_no_part_of_it(llm: rankwise.LLM) -> None:
    whole = llm.generate("The module", GREEDY)[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=stop)
    done = llm.generate("The module", params)[0]
    assert (done.text, done.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert "".join(llm.stream("The module", params)) == done.text
    assert free(llm)


def test_one_bad_prompt_leaves_nothing_behind(llm: rankwise.LLM) -> None:
    with pytest.raises(RankwiseError, match="prompt: 0 tokens; allowed: 1 to 99"):
        llm.generate(["The", []], GREEDY)
    assert not llm.engine.busy
    assert free(llm)


def test_text_comes_in_whole_characters(tokenizer: Any) -> None:
    text = "naïve – 東京 🙂 end"
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text).input_ids:
        pieces.append(stream.push(token))
    assert "".join(pieces) + stream.finish() == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", "E"])
def test_the_beginning_of_a_stop_text_is_held_back(tokenizer: Any, stop: str) -> None:
    stream, shown, text = TextStream(tokenizer, [stop]), "", "ab EN cd END ef"
    for token in tokenizer(text).input_ids:
        shown += stream.push(token)
        assert text[: text.index(stop)].startswith(shown)
    assert shown + stream.finish() == text[: text.index(stop)]
    assert stream.stopped


def test_chat_needs_a_template(llm: rankwise.LLM) -> None:
    with pytest.raises(RankwiseError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1000}, "max_model_len: 1000; allowed: 2 to 128"),
        ({"max_model_len": 1}, "max_model_len: 1; allowed: 2 to 128"),
        ({"kv_tokens": 10**12}, "kv_tokens: 1000000000000; allowed: up to"),
    ],
)
def test_limits_are_checked(model_folder: Callable[[str], Path], options: dict[str, int], message: str) -> None:
    with pytest.raises(RankwiseError, match=message):
        rankwise.LLM(str(model_folder("llama")), device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_params_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{named}: "):
        SamplingParams(**options)


def test_the_plan_of_memory_is_told(llm: rankwise.LLM) -> None:
    assert str(llm.plan).startswith("KV cache: 800 tokens in 50 blocks")
    assert llm.plan.blocks * llm.plan.block_bytes == llm.engine.cache_bytes
