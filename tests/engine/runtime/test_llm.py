"""Text in, text out: what a person calls."""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import rankwise
from rankwise.engine.runtime.memory import plan_blocks, step_bytes
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


def test_streams_and_calls_side_by_side(llm: rankwise.LLM) -> None:
    """A step serves all of them, whoever asked for it; each of them sees its own text, whole."""
    texts = ["The module", "An exception is", "def f(x):"]
    wanted = [done.text for done in llm.generate(texts, GREEDY)]
    zipped = ["", ""]
    for pieces in zip_longest(*(llm.stream(text, GREEDY) for text in texts[:2]), fillvalue=""):
        zipped = [text + piece for text, piece in zip(zipped, pieces, strict=True)]
    assert zipped == wanted[:2]
    stop = wanted[1][len(wanted[1]) // 2 :][:3]
    first, stopped = llm.stream(texts[0], GREEDY), llm.stream(texts[1], replace(GREEDY, stop=stop))
    begun = [next(first), next(stopped)]
    assert llm.generate(texts[2], GREEDY)[0].text == wanted[2]
    assert begun[0] + "".join(first) == wanted[0]
    assert begun[1] + "".join(stopped) == wanted[1][: wanted[1].index(stop)]
    assert free(llm)
    assert not llm._outputs


def test_a_text_that_cannot_be_made_ends_its_own_request(llm: rankwise.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The module", "An exception is"]
    wanted, push = [done.text for done in llm.generate(texts, GREEDY)], TextStream.push

    def broken(stream: TextStream, token: int) -> str:
        if stream.stop == ("broken",):
            raise ValueError("no text")
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", broken)
    whole = llm.stream(texts[0], GREEDY)
    begun = next(whole)
    with pytest.raises(ValueError, match="no text"):
        llm.generate(texts, [GREEDY, replace(GREEDY, stop="broken")])
    with pytest.raises(ValueError, match="no text"):
        list(llm.stream(texts[1], replace(GREEDY, stop="broken")))
    assert begun + "".join(whole) == wanted[0]
    assert free(llm)
    assert not llm._outputs


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


def test_the_space_before_the_first_word_is_part_of_the_output() -> None:
    """SentencePiece's decoder drops it where a text begins; an output is not where the text begins."""
    words = {"▁The": 0, "▁capital": 1, "▁is": 2, "▁Paris": 3, ".": 4, "<unk>": 5}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    for prompt, output, wanted in (
        ([0, 1, 2], [3, 4], " Paris."),
        ([2, 4], [0, 3], " The Paris"),
        ([], [3, 4], "Paris."),
    ):
        stream = TextStream(tokenizer, prompt=prompt)
        assert "".join(stream.push(token) for token in output) + stream.finish() == wanted


def test_a_prompt_that_ends_within_a_character(tokenizer: Any) -> None:
    ids = tokenizer("naïve – 東京 🙂 end").input_ids
    for cut in range(len(ids)):
        stream = TextStream(tokenizer, prompt=ids[:cut])
        shown = "".join(stream.push(token) for token in ids[cut:]) + stream.finish()
        before = tokenizer.decode(ids[:cut])
        assert (before + shown == tokenizer.decode(ids)) or before.endswith("\ufffd")
        assert "naïve" not in shown or not cut


def test_chat_needs_a_template(llm: rankwise.LLM) -> None:
    with pytest.raises(RankwiseError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1000}, "max_model_len: 1000; allowed: 2 to 128"),
        ({"max_model_len": 1}, "max_model_len: 1; allowed: 2 to 128"),
        ({"kv_tokens": 10**12}, "kv_tokens: 1000000000000; allowed: up to"),
        ({"kv_tokens": 0}, "kv_tokens: 0; allowed: a whole number from 1"),
        ({"block_size": 0}, "block_size: 0; allowed: a whole number from 1"),
        ({"max_sequences": 0}, "max_sequences: 0; allowed: a whole number from 1"),
        ({"max_batched_tokens": 0}, "max_batched_tokens: 0; allowed: a whole number from 1"),
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
        ({"logprobs": 1.5}, "logprobs"),
        ({"top_k": 10**30}, "top_k"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_params_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{named}: "):
        SamplingParams(**options)


@pytest.mark.parametrize("token", [-1, 512, 2**40])
def test_ids_that_the_model_does_not_have_are_refused(llm: rankwise.LLM, token: int) -> None:
    with pytest.raises(RankwiseError, match=f"prompt: token {token}; allowed: ids from 0 to 511"):
        llm.generate([[5, 6], [5, token]], GREEDY)
    assert free(llm)


def test_ids_may_be_numpys(llm: rankwise.LLM) -> None:
    assert llm.generate(np.array([5, 6, 7]), GREEDY)[0].tokens == llm.generate([5, 6, 7], GREEDY)[0].tokens


def test_a_temperature_that_no_division_stands_takes_the_likeliest(llm: rankwise.LLM) -> None:
    cold = replace(GREEDY, temperature=1e-40)
    assert llm.generate("The module", cold)[0].tokens == llm.generate("The module", GREEDY)[0].tokens


def test_what_a_step_takes_stays_free(llm: rankwise.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.engine.runtime.memory.free_bytes", lambda device: 2**30)
    plans = [plan_blocks(2**20, torch.device("cpu"), 16, None, 10**9, workspace=w) for w in (0, 2**28)]
    assert [plan.blocks for plan in plans] == [512, 256]
    with pytest.raises(RankwiseError, match="kv_tokens: 16; allowed: up to 0"):
        plan_blocks(2**20, torch.device("cpu"), 16, None, 10**9, workspace=2**30)
    config = llm.model_config
    few, many = (step_bytes(config, torch.float32, tokens, rows) for tokens, rows in ((1, 1), (1024, 64)))
    assert few * 64 < many < few * 1024
    assert llm.plan.workspace == many


def test_the_plan_of_memory_is_told(
    model_folder: Callable[[str], Path], llm: rankwise.LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rankwise"):
        rankwise.LLM(str(model_folder("llama")), max_model_len=100, kv_tokens=800, dtype="fp32", device="cpu")
    assert str(llm.plan).startswith("KV cache: 800 tokens in 50 blocks")
    assert [record.message for record in caplog.records][-1].startswith("KV cache: 800 tokens in 50 blocks")
    assert llm.plan.blocks * llm.plan.block_bytes == llm.engine.cache_bytes
